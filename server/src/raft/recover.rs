//! Opening the log: reads every frame of every file, checks them, and repairs what a crash left.
//!
//! Owns the names of the log files. Nothing is changed before all files are read and found
//! sound, and then only this: the unfinished frame of a crash is cleared, and files that were
//! purged already but not yet removed are removed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

use super::codec::{self, Outline, Past};
use super::error::StoreError;
use super::index::{Index, Segment};
use super::segment::{self, FRAME_ALIGN, Frame, HEADER_BYTES, Header, Tail};
use super::types::LogId;

/// What the log files say, and where to go on writing.
#[derive(Debug)]
pub(super) struct Recovered {
    pub(super) past: Past,
    pub(super) index: Index,
    /// The bytes of entries above the index that was asked for.
    pub(super) bytes_above: u64,
    pub(super) place: Place,
}

/// Where the next frame goes.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) header: Header,
    /// How long the file is.
    pub(super) file_bytes: u64,
    /// The frame's offset.
    pub(super) end: u64,
    /// The frame's number.
    pub(super) sequence: u64,
}

/// The numbers of the log files in a folder, in order.
pub(super) fn numbers(dir: &Path) -> Result<Vec<u64>, StoreError> {
    let mut numbers = Vec::new();
    for file in std::fs::read_dir(dir).map_err(StoreError::io("list", dir))? {
        let name = file.map_err(StoreError::io("list", dir))?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("log-"));
        if let Some(number) = number.and_then(|number| number.parse().ok()) {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// The path of a log file.
pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("log-{number:016}"))
}

/// Makes a log file of at least `bytes`. It has its name only when it is whole and durable.
pub(super) fn create(dir: &Path, header: &Header, bytes: u64) -> Result<File, StoreError> {
    let beside = dir.join("log.new");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)
        .map_err(StoreError::io("make", &beside))?;
    reserve(&file, bytes).map_err(StoreError::io("reserve space for", &beside))?;
    file.write_all_at(&header.encode(), 0)
        .map_err(StoreError::io("write", &beside))?;
    file.sync_all().map_err(StoreError::io("sync", &beside))?;
    let path = path(dir, header.number);
    std::fs::rename(&beside, &path).map_err(StoreError::io("rename", &beside))?;
    sync_folder(dir)?;
    Ok(file)
}

/// Makes names in a folder durable.
pub(super) fn sync_folder(dir: &Path) -> Result<(), StoreError> {
    let folder = File::open(dir).map_err(StoreError::io("open", dir))?;
    folder.sync_all().map_err(StoreError::io("sync", dir))
}

/// Reserves space that reads as zeros.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
            let length = file.metadata()?.len();
            let zeros = vec![0; 1 << 16];
            let mut at = length;
            while at < bytes {
                let part = (bytes - at).min(zeros.len() as u64);
                file.write_all_at(&zeros[..part as usize], at)?;
                at += part;
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Reads the log in `dir`. `above`: the last index that a snapshot has.
pub(super) fn recover(
    dir: &Path,
    store_id: u64,
    above: Option<u64>,
) -> Result<Recovered, StoreError> {
    let all = numbers(dir)?;
    // A removal that a crash cut short may have left older files with a gap after them.
    let gap = all.windows(2).rposition(|pair| pair[0] + 1 != pair[1]);
    let (stale, present) = all.split_at(gap.map_or(0, |at| at + 1));
    let Some((newest, _)) = present.split_last() else {
        return Err(StoreError::Missing {
            path: path(dir, 1),
            problem: "the store exists, and its log does not",
        });
    };
    let mut replay = Replay::new(above);
    let mut sequence = None;
    let mut last = None;
    for number in present {
        let path = path(dir, *number);
        let bytes = std::fs::read(&path).map_err(StoreError::io("read", &path))?;
        let header = Header::decode(&path, &bytes)?;
        if header.store_id != store_id || header.number != *number {
            let problem = "it belongs to another store, or has another file's name";
            return Err(StoreError::damaged(&path, 16, problem));
        }
        if sequence.is_some_and(|expected| expected != header.first_sequence) {
            let problem = "writes are missing between the file before it and this one";
            return Err(StoreError::damaged(&path, 32, problem));
        }
        let tail = replay.file(&path, &bytes, header, number == newest)?;
        sequence = Some(tail.sequence);
        last = Some((path, header, tail, bytes.len() as u64));
    }
    replay.check(dir)?;
    let Some((path, header, tail, file_bytes)) = last else {
        return Err(StoreError::Missing {
            path: dir.to_path_buf(),
            problem: "there is no log file",
        });
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(StoreError::io("open", &path))?;
    if tail.torn {
        clear(&path, &file, &tail, file_bytes)?;
    }
    let stale = stale.iter().map(|number| self::path(dir, *number));
    for path in stale.chain(replay.obsolete) {
        std::fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
    }
    Ok(Recovered {
        past: replay.past,
        index: replay.index,
        bytes_above: replay.bytes_above,
        place: Place {
            file,
            path,
            header,
            file_bytes,
            end: tail.end as u64,
            sequence: tail.sequence,
        },
    })
}

/// Makes the space after the last whole frame read as zeros again.
fn clear(path: &Path, file: &File, tail: &Tail, file_bytes: u64) -> Result<(), StoreError> {
    let end = tail.end as u64;
    tracing::warn!(
        file = %path.display(),
        offset = end,
        "the last write was cut short by a crash and nobody was told of it; clearing it"
    );
    let whole = file_bytes.next_multiple_of(FRAME_ALIGN as u64);
    file.set_len(end).map_err(StoreError::io("shorten", path))?;
    reserve(file, whole).map_err(StoreError::io("reserve space for", path))?;
    file.sync_all().map_err(StoreError::io("sync", path))
}

/// What the records seen so far amount to.
struct Replay {
    past: Past,
    index: Index,
    above: Option<u64>,
    bytes_above: u64,
    /// Files that hold purged entries alone; a crash came before their removal.
    obsolete: Vec<PathBuf>,
}

impl Replay {
    fn new(above: Option<u64>) -> Self {
        Self {
            past: Past::default(),
            index: Index::default(),
            above,
            bytes_above: 0,
            obsolete: Vec::new(),
        }
    }

    fn file(
        &mut self,
        path: &Path,
        bytes: &[u8],
        header: Header,
        newest: bool,
    ) -> Result<Tail, StoreError> {
        self.index.add_segment(Segment {
            header,
            path: path.to_path_buf(),
            end: HEADER_BYTES as u64,
            last_index: None,
        });
        let tail = segment::scan(path, bytes, &header, newest, |offset, frame| {
            self.frame(path, offset as u64, frame)
        })?;
        if let Some(segment) = self.index.segments.back_mut() {
            segment.end = tail.end as u64;
        }
        Ok(tail)
    }

    fn frame(&mut self, path: &Path, offset: u64, frame: &Frame<'_>) -> Result<(), StoreError> {
        let damaged = |problem: &str| StoreError::damaged(path, offset, problem);
        let records = frame
            .records()
            .ok_or_else(|| damaged("its records do not fill it"))?;
        let mut first = None;
        for record in records {
            let outline = codec::outline(record).map_err(|error| error.at(path, offset))?;
            match outline {
                Outline::Vote(vote) => self.past.vote = Some(vote),
                Outline::Purged(upto) => self.purge(upto),
                Outline::Truncated(last) => {
                    self.index.truncate(next_index(last));
                    self.past.last = last;
                }
                Outline::Past(past) => {
                    if self.index.segments.len() > 1 && past != self.past {
                        return Err(damaged("it does not continue the file before it"));
                    }
                    self.past = past;
                }
                Outline::Entry(log_id) => {
                    let follows = self.past.last.map(|last| last.index + 1);
                    if follows.is_some_and(|follows| follows != log_id.index) {
                        return Err(damaged("an entry is out of order"));
                    }
                    if self.above.is_none_or(|above| log_id.index > above) {
                        self.bytes_above += record.len() as u64;
                    }
                    first.get_or_insert(log_id.index);
                    self.past.last = Some(log_id);
                }
            }
        }
        if let (Some(first), Some(last)) = (first, &self.past.last) {
            self.index.add_entries(offset, first, last.index);
        }
        Ok(())
    }

    fn purge(&mut self, upto: LogId) {
        if next_index(self.past.last) <= upto.index {
            self.index.truncate(0);
        }
        self.past.purge(upto);
    }

    /// Whether the files hold all entries from the purged ones on.
    fn check(&mut self, dir: &Path) -> Result<(), StoreError> {
        let expected = next_index(self.past.purged);
        let missing = match (self.index.first(), &self.past.last) {
            (Some(first), _) => first > expected,
            (None, Some(last)) => last.index >= expected,
            (None, None) => false,
        };
        if missing && let Some(oldest) = self.index.segments.front() {
            return Err(StoreError::Missing {
                path: path(dir, oldest.header.number.saturating_sub(1)),
                problem: "the log goes on before its oldest file",
            });
        }
        if let Some(purged) = &self.past.purged {
            self.obsolete = self.index.purge(purged.index);
        }
        Ok(())
    }
}

/// The index after a log id.
pub(super) fn next_index(log_id: Option<LogId>) -> u64 {
    log_id.map_or(0, |log_id| log_id.index + 1)
}
