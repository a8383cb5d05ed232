//! What names files and lock owners, by what they are and by numbers, and when something happens:
//! the ground that all of the lock table stands on.

use serde::{Deserialize, Serialize};

/// A file by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileNo(pub(crate) u32);

/// A host by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HostNo(pub(crate) u32);

/// A lock owner by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OwnerNo(pub(crate) u32);

/// Which file: bytes that are the same for the same file on every node and through every export,
/// and for no other file. Made and read by the server's backend.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileKey(pub Box<[u8]>);

/// Who holds a lock: a process, or whatever a host counts as one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LockOwner {
    /// The host's number for it.
    pub svid: i32,
    /// The host's other name for it.
    pub oh: Box<[u8]>,
}

/// A lock owner among those of all hosts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct OwnerKey {
    /// First, so that the owners of a host stand together.
    pub(crate) host: HostNo,
    /// The owner within its host.
    pub(crate) owner: LockOwner,
}

/// When something happens, as the log says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The service's epoch.
    pub epoch: u32,
    /// The proposer's clock, in seconds since 1970; for people to read, nothing depends on it.
    pub now: u32,
    /// Whether locks may be missing in the table, so that nobody may be given anything but what it
    /// says it had before.
    pub in_grace: bool,
}
