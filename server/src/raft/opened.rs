//! The files of a store: found, made where there are none, read.
//!
//! A store is one folder: `store.json` (what it is), `lives` (how often it was opened), the log's
//! files and the snapshot. Nothing here talks to anybody.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;

use super::error::StoreError;
use super::log::Log;
use super::machine::{Machine, Snapshots};
use super::pending::Pending;
use super::segment::{self, Header};
use super::stored::{self, Stored};
use super::wal::Options;
use super::{recover, snapshot};
use crate::clock::unix_seconds;
use crate::cluster::ClusterState;
use crate::random::random_u64;
use crate::state::replace_file;

/// The files of a store, read.
pub(super) struct Opened {
    /// What the store says of itself.
    pub(super) stored: Stored,
    pub(super) log: Log,
    /// Taken by whoever waits for its end.
    pub(super) log_thread: Option<JoinHandle<()>>,
    pub(super) machine: Machine,
    pub(super) snapshots: Arc<Snapshots>,
    pub(super) pending: Arc<Pending>,
    /// Whether it holds nothing yet.
    pub(super) is_empty: bool,
}

impl Opened {
    /// Waits for the disk.
    pub(super) fn open(dir: PathBuf, options: Options) -> Result<Self, StoreError> {
        let stored = match stored::read(&dir)? {
            Some(stored) => stored,
            None => bear(&dir, &options)?,
        };
        let store_id = stored.store_id;
        let pending = Arc::new(Pending::new(next_life(&dir)?));
        let (state, current) = match snapshot::read(&dir, store_id)? {
            Some(snapshot) => (snapshot.state, Some((snapshot.meta, snapshot.bytes))),
            None => (ClusterState::default(), None),
        };
        let meta = current.as_ref().map(|(meta, _)| meta.clone());
        let meta = meta.unwrap_or_default();
        let above = meta.last_log_id.map(|last| last.index);
        let after_bytes = options.snapshot_after_bytes;
        let (log, log_thread) = Log::open(&dir, store_id, above, Arc::clone(&pending), options)?;
        if let Some(purged) = log.purged()
            && above.is_none_or(|above| above < purged)
        {
            return Err(StoreError::Missing {
                path: snapshot::path(&dir),
                problem: "the log's older entries were purged because a snapshot had them",
            });
        }
        let snapshots = Arc::new(Snapshots::new(
            dir,
            store_id,
            log.shared(),
            after_bytes,
            current,
        ));
        let state = Arc::new(RwLock::new(state));
        let machine = Machine::new(state, meta, Arc::clone(&snapshots), Arc::clone(&pending));
        Ok(Self {
            is_empty: above.is_none() && log.is_empty(),
            stored,
            log,
            log_thread: Some(log_thread),
            machine,
            snapshots,
            pending,
        })
    }
}

/// Numbers the lives of this node's process on this store, each higher than the one before; what an
/// earlier one has left on its way must not be taken for this one's.
fn next_life(dir: &Path) -> Result<u64, StoreError> {
    let path = dir.join("lives");
    let lives = match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse::<u64>().map_err(|error| {
            StoreError::damaged(&path, 0, format!("it holds no count of starts: {error}"))
        })?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(StoreError::io("read", &path)(error)),
    };
    // The clock, so that a file that is lost or old does not make an earlier life's number again.
    let life = lives.saturating_add(1).max(unix_seconds());
    replace_file(&path, format!("{life}\n").as_bytes()).map_err(StoreError::io("write", &path))?;
    Ok(life)
}

/// Makes an empty store. Its id is written last: without it there is no store yet.
fn bear(dir: &Path, options: &Options) -> Result<Stored, StoreError> {
    let path = stored::path(dir);
    let mut builder = std::fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(StoreError::io("make", dir))?;
    let half_born = |number: &u64| {
        let path = recover::path(dir, *number);
        let bytes = std::fs::read(&path).map_err(StoreError::io("read", &path))?;
        let unused = bytes.iter().skip(segment::HEADER_BYTES).all(|b| *b == 0);
        Ok((path, unused))
    };
    let found = recover::numbers(dir)?;
    let found: Vec<_> = found.iter().map(half_born).collect::<Result<_, _>>()?;
    if snapshot::path(dir).exists() || found.iter().any(|(_, unused)| !unused) {
        return Err(StoreError::Missing {
            path,
            problem: "the folder holds a log or a snapshot",
        });
    }
    for (path, _) in found {
        std::fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
    }
    let store_id = random_u64();
    let header = Header {
        store_id,
        number: 1,
        first_sequence: 1,
    };
    recover::create(dir, &header, options.segment_bytes)?;
    let stored = Stored {
        store_id,
        formed: None,
        pending: None,
    };
    stored::write(dir, &stored)?;
    if let Some(parent) = dir.parent() {
        recover::sync_folder(parent)?;
    }
    Ok(stored)
}
