//! The snapshot file: the whole state at one place in the log.
//!
//! ```text
//! magic 8 | version 4 | bytes of what it says about itself 4 | store id 8 | that, see `codec` |
//! the state, in its own encoding | bytes of all before 8 | checksum of all before 4
//! ```
//!
//! It is written beside the old one, synced and renamed over it, so that after a crash there is the
//! old one or the new one. It is checked whole before anything of it is believed.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::codec;
use super::error::StoreError;
use super::recover::sync_folder;
use super::types::SnapshotMeta;
use crate::cluster::ClusterState;
use crate::fault::{Fault, is_planted};

const MAGIC: [u8; 8] = *b"havensnp";
/// Version 1 had the numbers that the lock table gave last; version 2 no marks of suspect locks.
pub(super) const VERSION: u32 = 3;
const HEADER_BYTES: usize = 24;
const TRAILER_BYTES: u64 = 12;
const BUFFER_BYTES: usize = 1 << 16;
/// Measured: with four times as much, syncs of the log took up to 30 ms meanwhile.
const UNSYNCED_BYTES_MAX: usize = 1 << 18;

/// A snapshot that was read.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) meta: SnapshotMeta,
    pub(super) state: ClusterState,
    /// How long its file is.
    pub(super) bytes: u64,
}

/// Where the snapshot of a store is.
pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join("snapshot")
}

/// Writes a snapshot and puts it in the place of the old one. Waits for the disk. Returns its
/// length.
pub(super) fn write(
    dir: &Path,
    store_id: u64,
    meta: &SnapshotMeta,
    state: &ClusterState,
) -> Result<u64, StoreError> {
    let beside = dir.join("snapshot.new");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)
        .map_err(StoreError::io("make", &beside))?;
    let bytes = write_content(&file, store_id, meta, state).map_err(|error| {
        // It would only take the space that is lacking.
        let _ = std::fs::remove_file(&beside);
        StoreError::io("write", &beside)(error)
    })?;
    if !is_planted(Fault::NoLogSync) {
        file.sync_all().map_err(StoreError::io("sync", &beside))?;
    }
    std::fs::rename(&beside, path(dir)).map_err(StoreError::io("rename", &beside))?;
    sync_folder(dir)?;
    Ok(bytes)
}

fn write_content(
    file: &File,
    store_id: u64,
    meta: &SnapshotMeta,
    state: &ClusterState,
) -> io::Result<u64> {
    let meta = codec::snapshot_meta(meta);
    let unsynced = Unsynced { file, bytes: 0 };
    let mut out = Summing {
        inner: BufWriter::with_capacity(BUFFER_BYTES, unsynced),
        hasher: crc32fast::Hasher::new(),
        bytes: 0,
    };
    out.write_all(&MAGIC)?;
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&(meta.len() as u32).to_le_bytes())?;
    out.write_all(&store_id.to_le_bytes())?;
    out.write_all(&meta)?;
    state.write(&mut out)?;
    let (bytes, checksum) = (out.bytes, out.hasher.finalize());
    let mut inner = out.inner;
    inner.write_all(&bytes.to_le_bytes())?;
    inner.write_all(&checksum.to_le_bytes())?;
    inner.flush()?;
    Ok(bytes + TRAILER_BYTES)
}

/// Reads the snapshot of a store; `None` if it has none yet. Waits for the disk.
pub(super) fn read(dir: &Path, store_id: u64) -> Result<Option<Snapshot>, StoreError> {
    let path = path(dir);
    match File::open(&path) {
        Ok(file) => read_file(&path, &file, Some(store_id)).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io("open", &path)(error)),
    }
}

/// Reads what [`write`] wrote, whole. `store_id`: the only store whose snapshot it may be.
pub(super) fn read_file(
    path: &Path,
    file: &File,
    store_id: Option<u64>,
) -> Result<Snapshot, StoreError> {
    let mut opened = open(path, file)?;
    if store_id.is_some_and(|expected| expected != opened.store_id) {
        return Err(StoreError::damaged(path, 0, "it belongs to another store"));
    }
    let state_at = opened.state_at;
    let state = ClusterState::read(&mut opened.rest).map_err(|error| match error.kind() {
        io::ErrorKind::Unsupported => StoreError::Newer {
            path: path.to_path_buf(),
            problem: error.to_string(),
        },
        _ => StoreError::damaged(path, state_at, format!("its state: {error}")),
    })?;
    if opened.rest.limit() != 0 {
        let problem = "bytes are left over after the state";
        return Err(StoreError::damaged(path, state_at, problem));
    }
    Ok(Snapshot {
        meta: opened.meta,
        state,
        bytes: opened.bytes,
    })
}

/// Checks what [`write`] wrote, of whichever store, up to its checksum, without reading the state;
/// returns what it says about itself. Waits for the disk.
pub(super) fn check_file(path: &Path, file: &File) -> Result<SnapshotMeta, StoreError> {
    Ok(open(path, file)?.meta)
}

/// A snapshot of which all but the state is read.
struct Opened<'a> {
    meta: SnapshotMeta,
    store_id: u64,
    bytes: u64,
    state_at: u64,
    rest: io::Take<BufReader<&'a File>>,
}

fn open<'a>(path: &Path, file: &'a File) -> Result<Opened<'a>, StoreError> {
    let damaged = |problem: &str| StoreError::damaged(path, 0, problem);
    let fail = || StoreError::io("read", path);
    let mut input = file;
    let bytes = input.seek(SeekFrom::End(0)).map_err(fail())?;
    input.rewind().map_err(fail())?;
    let Some(content) = bytes.checked_sub(TRAILER_BYTES) else {
        return Err(damaged("it is too short"));
    };
    let mut input = BufReader::with_capacity(BUFFER_BYTES, input);
    check(&mut input, content)
        .map_err(fail())?
        .map_err(&damaged)?;
    input.rewind().map_err(fail())?;
    let mut input = input.take(content);
    let mut header = [0; HEADER_BYTES];
    input.read_exact(&mut header).map_err(fail())?;
    let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
    if header[..8] != MAGIC {
        return Err(damaged("it is no snapshot"));
    }
    let version = number(8);
    if version != VERSION {
        let path = path.to_path_buf();
        let problem = format!("snapshot version {version}, and this program knows {VERSION}");
        return Err(if version > VERSION {
            StoreError::Newer { path, problem }
        } else {
            StoreError::Older { path, problem }
        });
    }
    let mut meta = Vec::new();
    let meta_bytes = u64::from(number(12));
    let read = (&mut input).take(meta_bytes).read_to_end(&mut meta);
    read.map_err(fail())?;
    let meta =
        codec::read_snapshot_meta(&meta).map_err(|error| error.at(path, HEADER_BYTES as u64))?;
    Ok(Opened {
        meta,
        store_id: u64::from(number(16)) | u64::from(number(20)) << 32,
        bytes,
        state_at: HEADER_BYTES as u64 + meta_bytes,
        rest: input,
    })
}

/// Compares length and checksum of the first `content` bytes with what follows them.
fn check(input: &mut impl Read, content: u64) -> io::Result<Result<(), &'static str>> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut left = content;
    while left > 0 {
        let part = left.min(BUFFER_BYTES as u64) as usize;
        input.read_exact(&mut buffer[..part])?;
        hasher.update(&buffer[..part]);
        left -= part as u64;
    }
    let mut length = [0; 8];
    let mut checksum = [0; 4];
    input.read_exact(&mut length)?;
    input.read_exact(&mut checksum)?;
    if u64::from_le_bytes(length) != content {
        return Ok(Err("its length is not what it says at its end"));
    }
    if u32::from_le_bytes(checksum) != hasher.finalize() {
        return Ok(Err("it does not match its checksum"));
    }
    Ok(Ok(()))
}

/// Syncs after every few writes: a large snapshot synced at once would keep the disk from the log.
struct Unsynced<'a> {
    file: &'a File,
    bytes: usize,
}

impl Write for Unsynced<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes > UNSYNCED_BYTES_MAX {
            self.bytes = 0;
            if !is_planted(Fault::NoLogSync) {
                self.file.sync_data()?;
            }
        }
        let written = self.file.write(bytes)?;
        self.bytes += written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Counts and sums what goes through.
struct Summing<W> {
    inner: W,
    hasher: crc32fast::Hasher,
    bytes: u64,
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
