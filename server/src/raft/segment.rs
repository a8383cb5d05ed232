//! The bytes of a log file, and how a crash is told from damage.
//!
//! A file is a header and frames. It is reserved at its full size before its first use, so that
//! a full disk is noticed there and not within a frame, and so that what is not written yet reads
//! as zeros. All numbers are little-endian.
//!
//! ```text
//! file   magic 8 | version 4 | checksum 4 | store id 8 | number 8 |
//!        sequence of its first frame 8 | zeros to 64
//! frame  checksum of the rest of this header 4 | version 1 | magic 3 | sequence 8 | body bytes 4 |
//!        checksum of the body 4 | records 4 | zero 4
//!        body: per record its length 4 and its bytes; then 1 to 32 bytes 0xff, to a multiple of 32
//! ```
//!
//! One frame is one write and one sync: frame k + 1 is written only when the sync of frame k has
//! returned. So after a crash at most the last frame is incomplete, and nobody was told of it:
//!
//! - A bad frame with a valid one after it, in this file or in a later one, is damage.
//! - Frames begin at multiples of 32 bytes, so a frame's header never straddles two sectors of the
//!   disk: after a crash it is there, or it is zeros. Any other header is damage.
//! - A bad body is a crash's if one of its sectors is still zeros (none is when written: each
//!   frame ends in a byte that is not zero) or if the file ends within it; otherwise it is damage.
//!   A record that itself holds a whole sector of zeros weakens this for the last frame alone.
//!
//! Checksums of frames are keyed with store and file, so that bytes of another file never pass.
//! Records are opaque here; see `codec`.

use std::path::Path;

use super::error::StoreError;

/// The version of this format.
pub(super) const VERSION: u32 = 1;
/// What a file begins with.
pub(super) const HEADER_BYTES: usize = 64;
/// Frames are multiples of this and begin at multiples of it.
pub(super) const FRAME_ALIGN: usize = 32;

const MAGIC: [u8; 8] = *b"havenlog";
const FRAME_HEADER_BYTES: usize = 32;
const FRAME_VERSION: u8 = 1;
const FRAME_MAGIC: [u8; 3] = *b"hvf";
const SECTOR_BYTES: usize = 512;

/// What a log file says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// The store that it belongs to.
    pub(super) store_id: u64,
    /// Files are numbered without a gap.
    pub(super) number: u64,
    /// The sequence number of its first frame.
    pub(super) first_sequence: u64,
}

impl Header {
    /// Its stored form.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.store_id.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.number.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.first_sequence.to_le_bytes());
        let checksum = crc32fast::hash(&bytes);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads what [`Header::encode`] wrote.
    pub(super) fn decode(path: &Path, bytes: &[u8]) -> Result<Self, StoreError> {
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(StoreError::damaged(path, 0, "it has no header"));
        };
        let mut unsigned = *header;
        unsigned[12..16].fill(0);
        if header[..8] != MAGIC || crc32fast::hash(&unsigned) != u32_at(header, 12) {
            return Err(StoreError::damaged(
                path,
                0,
                "its header does not match its checksum",
            ));
        }
        let version = u32_at(header, 8);
        if version != VERSION {
            return Err(StoreError::Newer {
                path: path.to_path_buf(),
                problem: format!("log version {version}, and this program knows {VERSION}"),
            });
        }
        Ok(Self {
            store_id: u64_at(header, 16),
            number: u64_at(header, 24),
            first_sequence: u64_at(header, 32),
        })
    }

    /// What the checksums of this file's frames are keyed with.
    pub(super) fn key(&self) -> u32 {
        crc32fast::hash(&self.encode())
    }
}

/// A frame under construction.
#[derive(Debug)]
pub(super) struct FrameBuilder {
    bytes: Vec<u8>,
    records: u32,
}

impl FrameBuilder {
    /// An empty frame that reuses memory.
    pub(super) fn new(mut memory: Vec<u8>) -> Self {
        memory.clear();
        memory.resize(FRAME_HEADER_BYTES, 0);
        Self {
            bytes: memory,
            records: 0,
        }
    }

    /// How long the frame is going to be, padding included.
    pub(super) fn len(&self, more: usize) -> usize {
        (self.bytes.len() + more + 1).next_multiple_of(FRAME_ALIGN)
    }

    /// Adds records that [`put_record`] has framed.
    pub(super) fn push(&mut self, records: &[u8], count: u32) {
        self.bytes.extend_from_slice(records);
        self.records += count;
    }

    /// The frame.
    pub(super) fn finish(mut self, key: u32, sequence: u64) -> Vec<u8> {
        let body_bytes = self.bytes.len() - FRAME_HEADER_BYTES;
        let body_checksum = checksum(key, &self.bytes[FRAME_HEADER_BYTES..]);
        let whole = self.len(0);
        self.bytes.resize(whole, 0xff);
        let header = &mut self.bytes[..FRAME_HEADER_BYTES];
        header[4] = FRAME_VERSION;
        header[5..8].copy_from_slice(&FRAME_MAGIC);
        header[8..16].copy_from_slice(&sequence.to_le_bytes());
        header[16..20].copy_from_slice(&(body_bytes as u32).to_le_bytes());
        header[20..24].copy_from_slice(&body_checksum.to_le_bytes());
        header[24..28].copy_from_slice(&self.records.to_le_bytes());
        let header_checksum = checksum(key, &header[4..]);
        header[..4].copy_from_slice(&header_checksum.to_le_bytes());
        self.bytes
    }
}

/// Appends one record with its length; `write` appends the record.
pub(super) fn put_record(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    write(out);
    let length = (out.len() - at - 4) as u32;
    out[at..at + 4].copy_from_slice(&length.to_le_bytes());
}

/// A whole and valid frame.
#[derive(Debug)]
pub(super) struct Frame<'a> {
    /// Its number in the whole log.
    pub(super) sequence: u64,
    /// Where the next frame begins.
    pub(super) end: usize,
    records: u32,
    body: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Its records. `None` if the body is not made of them, which its checksum rules out.
    pub(super) fn records(&self) -> Option<Vec<&'a [u8]>> {
        let mut rest = self.body;
        let mut records = Vec::new();
        while let Some((length, bytes)) = rest.split_first_chunk() {
            let (record, after) = bytes.split_at_checked(u32::from_le_bytes(*length) as usize)?;
            records.push(record);
            rest = after;
        }
        (rest.is_empty() && records.len() == self.records as usize).then_some(records)
    }
}

/// What there is at a place where a frame may begin.
#[derive(Debug)]
pub(super) enum Step<'a> {
    /// A frame.
    Frame(Frame<'a>),
    /// Zeros, or the end of the file.
    Empty,
    /// The file ends within a frame.
    Cut,
    /// Neither zeros nor a frame's header.
    BadHeader,
    /// A frame's header whose body is not what it says; the body ends here.
    BadBody(usize),
    /// The frame of a newer program.
    Newer(u8),
}

/// Looks at a place in a file.
pub(super) fn step(bytes: &[u8], at: usize, key: u32) -> Step<'_> {
    let rest = bytes.get(at..).unwrap_or_default();
    let Some(header) = rest.first_chunk::<FRAME_HEADER_BYTES>() else {
        return if is_zero(rest) {
            Step::Empty
        } else {
            Step::Cut
        };
    };
    if is_zero(header) {
        return Step::Empty;
    }
    if header[5..8] != FRAME_MAGIC || checksum(key, &header[4..]) != u32_at(header, 0) {
        return Step::BadHeader;
    }
    if header[4] != FRAME_VERSION {
        return Step::Newer(header[4]);
    }
    let body_end = FRAME_HEADER_BYTES + u32_at(header, 16) as usize;
    let whole = (body_end + 1).next_multiple_of(FRAME_ALIGN);
    let Some(body) = rest.get(FRAME_HEADER_BYTES..body_end) else {
        return Step::Cut;
    };
    if rest.len() < whole {
        return Step::Cut;
    }
    if checksum(key, body) != u32_at(header, 20) {
        return Step::BadBody(at + whole);
    }
    Step::Frame(Frame {
        sequence: u64_at(header, 8),
        end: at + whole,
        records: u32_at(header, 24),
        body,
    })
}

/// Where a file's frames end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tail {
    /// Where the next frame goes.
    pub(super) end: usize,
    /// The sequence number of the next frame.
    pub(super) sequence: u64,
    /// Whether an unfinished frame lies there and must be cleared.
    pub(super) torn: bool,
}

/// Reads a file's frames in order. `visit` gets each with its offset. `newest`: no later file
/// exists, so that an unfinished frame may be at the end.
pub(super) fn scan<'a>(
    path: &Path,
    bytes: &'a [u8],
    header: &Header,
    newest: bool,
    mut visit: impl FnMut(usize, &Frame<'a>) -> Result<(), StoreError>,
) -> Result<Tail, StoreError> {
    let key = header.key();
    let mut at = HEADER_BYTES;
    let mut sequence = header.first_sequence;
    loop {
        let problem = match step(bytes, at, key) {
            Step::Frame(frame) if frame.sequence == sequence => {
                visit(at, &frame)?;
                at = frame.end;
                sequence += 1;
                continue;
            }
            Step::Frame(_) => Some("a write is missing before it"),
            Step::Empty => None,
            Step::Cut if newest => None,
            Step::Cut => Some("the file ends within a write, and a later file exists"),
            Step::BadHeader => Some("neither a write nor free space begins there"),
            Step::BadBody(end) if newest && has_zero_sector(bytes, at, end) => None,
            Step::BadBody(_) => Some("what was written there does not match its checksum"),
            Step::Newer(version) => {
                return Err(StoreError::Newer {
                    path: path.to_path_buf(),
                    problem: format!("frame version {version} at byte {at}"),
                });
            }
        };
        if let Some(problem) = problem {
            return Err(StoreError::damaged(path, at as u64, problem));
        }
        let torn = !is_zero(bytes.get(at..).unwrap_or_default());
        if torn && (!newest || later_frame(bytes, at, key, sequence)) {
            let problem = "a write is damaged that later writes follow";
            return Err(StoreError::damaged(path, at as u64, problem));
        }
        return Ok(Tail {
            end: at,
            sequence,
            torn,
        });
    }
}

fn later_frame(bytes: &[u8], at: usize, key: u32, sequence: u64) -> bool {
    (at..bytes.len())
        .step_by(FRAME_ALIGN)
        .any(|at| matches!(step(bytes, at, key), Step::Frame(frame) if frame.sequence >= sequence))
}

/// Whether the disk may have left out a part of the frame from `start` to `end`.
fn has_zero_sector(bytes: &[u8], start: usize, end: usize) -> bool {
    let mut at = start;
    while at < end {
        let next = ((at / SECTOR_BYTES + 1) * SECTOR_BYTES).min(end);
        if is_zero(&bytes[at..next]) {
            return true;
        }
        at = next;
    }
    false
}

fn is_zero(bytes: &[u8]) -> bool {
    // Chunks let the compiler compare many bytes at once.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks
        .iter()
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

fn checksum(key: u32, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(key);
    hasher.update(bytes);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let chunk = bytes.get(at..).and_then(<[u8]>::first_chunk);
    chunk.map_or(0, |number| u32::from_le_bytes(*number))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let chunk = bytes.get(at..).and_then(<[u8]>::first_chunk);
    chunk.map_or(0, |number| u64::from_le_bytes(*number))
}
