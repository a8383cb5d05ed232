//! Snapshots on their way: a file in pieces, checked whole before openraft sees it.
//!
//! The receiving side writes the pieces to a file beside its snapshot that has no name any more
//! when the first piece comes, and compares length, checksum and description at the end: a damaged
//! snapshot must cost the sender a connection and not the receiver its life. One snapshot comes at
//! a time. Files are read and written on threads that may wait for the disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use openraft::raft::SnapshotResponse;
use tokio::time::timeout;

use super::link::{Link, LinkError, Receiver};
use super::serve::Served;
use super::wire::{Announced, CHUNK_BYTES_MAX, Message};
use crate::raft::error::StoreError;
use crate::raft::machine::Content;
use crate::raft::snapshot;
use crate::raft::thread::blocking;
use crate::raft::types::{LeaderId, Member, Types, Vote};

type RaftSnapshot = openraft::Snapshot<LeaderId, u64, Member, Content>;

/// The longest snapshot that is taken. A million locks are some 100 MiB.
const SNAPSHOT_BYTES_MAX: u64 = 64 << 30;
/// How long the next piece may take.
const CHUNK_MAX: Duration = Duration::from_secs(10);
/// How long a member may take to read a snapshot that it has, and to write its own.
const INSTALL_MAX: Duration = Duration::from_mins(5);

/// Why a snapshot is not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransferError {
    /// The connection is of no use.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The file could not be written.
    #[error("cannot write a snapshot that comes: {0}")]
    Write(io::Error),
    /// It is not what was announced.
    #[error("a snapshot that came can't be used: {0}")]
    Unusable(String),
    /// It is too long, or another one is under way.
    #[error("a snapshot of {bytes} bytes is not taken: {problem}")]
    NotTaken {
        /// Its length.
        bytes: u64,
        /// Why.
        problem: &'static str,
    },
    /// The engine has ended.
    #[error("the store has stopped")]
    Stopped,
}

/// Sends a snapshot and waits until it is installed.
pub(super) async fn send(
    link: &mut Link,
    vote: Vote,
    snapshot: RaftSnapshot,
) -> Result<SnapshotResponse<Types>, LinkError> {
    let Content(Some(file)) = snapshot.snapshot else {
        return Err(io::Error::other("there is no snapshot").into());
    };
    let file = Arc::new(file);
    let bytes = file.metadata()?.len();
    let announced = Announced {
        vote,
        meta: snapshot.meta,
        bytes,
    };
    link.sender.send(&Message::Snapshot(announced)).await?;
    let mut offset = 0;
    while offset < bytes {
        let length = (bytes - offset).min(CHUNK_BYTES_MAX as u64) as usize;
        let file = Arc::clone(&file);
        let read = move || {
            let mut chunk = vec![0; length];
            file.read_exact_at(&mut chunk, offset).map(|()| chunk)
        };
        let chunk = blocking(read).await?;
        link.sender.send(&Message::Chunk(chunk)).await?;
        offset += length as u64;
    }
    let answer = timeout(INSTALL_MAX, link.receiver.receive());
    match answer.await.map_err(|_| LinkError::TimedOut)?? {
        Message::Installed(response) => Ok(response),
        Message::Refused(reason) => Err(io::Error::other(reason).into()),
        _ => Err(LinkError::OutOfPlace),
    }
}

/// Takes the snapshot that was announced, and has it installed.
pub(super) async fn receive(
    served: &Served,
    receiver: &mut Receiver,
    announced: Announced,
) -> Result<SnapshotResponse<Types>, TransferError> {
    let bytes = announced.bytes;
    let not_taken = |problem| TransferError::NotTaken { bytes, problem };
    if bytes > SNAPSHOT_BYTES_MAX {
        return Err(not_taken("it is too long"));
    }
    let _only = served
        .snapshots
        .try_acquire()
        .map_err(|_| not_taken("another one is coming"))?;
    let dir = served.dir.clone();
    let file = blocking(move || nameless(&dir)).await;
    let file = Arc::new(file.map_err(TransferError::Write)?);
    let mut offset = 0;
    while offset < bytes {
        let message = timeout(CHUNK_MAX, receiver.receive());
        let Message::Chunk(chunk) = message.await.map_err(|_| LinkError::TimedOut)?? else {
            return Err(LinkError::OutOfPlace.into());
        };
        let end = offset + chunk.len() as u64;
        if end > bytes {
            return Err(LinkError::OutOfPlace.into());
        }
        let file = Arc::clone(&file);
        let written = blocking(move || file.write_all_at(&chunk, offset)).await;
        written.map_err(TransferError::Write)?;
        offset = end;
    }
    let path = received(&served.dir);
    let check = move || Ok::<_, io::Error>((snapshot::check_file(&path, &file), file));
    let (found, file) = blocking(check).await.map_err(TransferError::Write)?;
    let meta = announced.meta;
    if found.map_err(|error| TransferError::Unusable(problem_of(error)))? != meta {
        let problem = "it is not the one that was announced".to_owned();
        return Err(TransferError::Unusable(problem));
    }
    // All tasks that wrote have let go of it.
    let content = Content(Arc::into_inner(file));
    let snapshot = RaftSnapshot {
        meta,
        snapshot: content,
    };
    let installed = served
        .engine
        .install_full_snapshot(announced.vote, snapshot);
    installed.await.map_err(|_| TransferError::Stopped)
}

/// What is wrong, without the hints that are for a file of this store.
fn problem_of(error: StoreError) -> String {
    match error {
        StoreError::Io { problem, .. }
        | StoreError::Full { problem, .. }
        | StoreError::Damaged { problem, .. }
        | StoreError::Newer { problem, .. }
        | StoreError::Older { problem, .. }
        | StoreError::Stopped { problem, .. }
        | StoreError::Removed(problem)
        | StoreError::Cluster(problem) => problem,
        StoreError::Missing { problem, .. } => problem.to_owned(),
        half_done @ StoreError::HalfDone { .. } => half_done.to_string(),
    }
}

fn received(dir: &Path) -> PathBuf {
    dir.join("snapshot.received")
}

/// A file that is gone when it is closed.
fn nameless(dir: &Path) -> io::Result<File> {
    let path = received(dir);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}
