//! The files behind the exports: handles, identities and system calls. Knows no RPC.
//!
//! - [`handle`]: the bytes a client keeps; [`table`]: their stand-in where the kernel has none.
//! - [`volume`]: one file system of an export; [`file`]: one opened file and its caches.
//! - [`files`]: from handle to opened file, from directory and name to handle.
//! - [`data`]: READ, WRITE, COMMIT; [`namespace`]: names; [`directory`]: listing.
//! - [`probe`]: whether a file system still takes a write.
//! - [`credential`]: the caller's identity on a thread; [`sys`]: raw system calls.
//!
//! Every operation is told its [`Mode`]: with [`Mode::Inline`] it must not wait for a disk and
//! says [`Failure::Wait`] instead; the same operation is then run again on a worker thread.

pub mod attributes;
pub mod credential;
pub mod data;
pub mod directory;
pub mod file;
pub mod files;
pub mod handle;
pub mod namespace;
pub mod probe;
pub mod setattr;
pub mod space;
pub mod sys;
pub mod table;
pub mod volume;

#[cfg(test)]
mod tests;

use rustix::io::Errno;

/// Where a call is being carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// In a task of the data runtime: must not wait for a disk.
    Inline,
    /// On a worker thread: may wait.
    Worker,
}

/// Why an operation did not do what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// It may have to wait: run it again on a worker thread. Nothing was changed.
    Wait,
    /// The bytes are no handle that this service ever made.
    BadHandle,
    /// The handle was good once, but its file or its export is gone.
    Stale,
    /// Not now, but later: a lease must be given up first, or something is not ready.
    Jukebox,
    /// This node does not serve any more: there is no answer, and nothing was changed.
    NotServing,
    /// The kernel said no, or would have.
    Os(Errno),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::STALE => Self::Stale,
            // With O_NONBLOCK, open(2) says this where another process holds a lease.
            Errno::AGAIN => Self::Jukebox,
            errno => Self::Os(errno),
        }
    }
}
