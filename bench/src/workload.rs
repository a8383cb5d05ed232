//! The kinds of load and their names.

use havenfs_nlm::wire::procedure;
use havenfs_rpc::program;
use serde::{Deserialize, Serialize};

/// One kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Workload {
    Null,
    Getattr,
    Access,
    Lookup,
    Read4k,
    Write4k,
    /// CREATE and REMOVE in turn
    CreateRemove,
    /// READDIRPLUS of a directory of 1,000 files; counted per entry
    List1k,
    /// of 100,000 files
    List100k,
    /// of 1,000,000 files
    List1m,
    Read1m,
    Write1m,
    /// LOCK and UNLOCK in turn, by a host without other locks
    LockUnlock,
    /// The same on a file on which another host holds 10,000 locks
    LockUnlockCrowded,
    /// No call: what a store pays at least to make a small record durable
    Commit,
    /// No call: what havenfs's own store takes from a proposal to its outcome
    StoreCommit,
}

impl Workload {
    /// All but the lists.
    pub(crate) const CALLS: [Self; 9] = [
        Self::Null,
        Self::Getattr,
        Self::Access,
        Self::Lookup,
        Self::Read4k,
        Self::Write4k,
        Self::CreateRemove,
        Self::Read1m,
        Self::Write1m,
    ];
    /// What needs a state directory that outlives the process.
    pub(crate) const LOCKS: [Self; 4] = [
        Self::Commit,
        Self::StoreCommit,
        Self::LockUnlock,
        Self::LockUnlockCrowded,
    ];
    /// The lists, counted per entry.
    pub(crate) const LISTS: [Self; 3] = [Self::List1k, Self::List100k, Self::List1m];

    /// The procedure's name as the tables show it.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Null => "NULL",
            Self::Getattr => "GETATTR",
            Self::Access => "ACCESS",
            Self::Lookup => "LOOKUP",
            Self::Read4k => "READ 4 KiB",
            Self::Write4k => "WRITE 4 KiB unstable",
            Self::CreateRemove => "CREATE and REMOVE, mean",
            Self::List1k => "READDIRPLUS, an entry of 1,000",
            Self::List100k => "READDIRPLUS, an entry of 100,000",
            Self::List1m => "READDIRPLUS, an entry of 1,000,000",
            Self::Read1m => "READ 1 MiB",
            Self::Write1m => "WRITE 1 MiB unstable",
            Self::LockUnlock => "LOCK and UNLOCK, mean",
            Self::LockUnlockCrowded => "LOCK and UNLOCK, 10,000 locks on the file",
            Self::Commit => "write and fdatasync of 256 bytes",
            Self::StoreCommit => "a commit of havenfs's store",
        }
    }

    /// The number of files in the directory that is listed.
    pub(crate) const fn listed(self) -> Option<u32> {
        match self {
            Self::List1k => Some(1_000),
            Self::List100k => Some(100_000),
            Self::List1m => Some(1_000_000),
            _ => None,
        }
    }

    /// Whether its calls are those of the lock manager.
    pub(crate) const fn locks(self) -> bool {
        matches!(self, Self::LockUnlock | Self::LockUnlockCrowded)
    }

    /// The program and version that are called.
    pub(crate) const fn program(self) -> (u32, u32) {
        if self.locks() {
            (program::NLM, 4)
        } else {
            (program::NFS, 3)
        }
    }

    /// The procedure, or the first of two.
    pub(crate) const fn procedure(self) -> u32 {
        match self {
            Self::Null | Self::Commit | Self::StoreCommit => 0,
            Self::Getattr => 1,
            Self::Lookup => 3,
            Self::Access => 4,
            Self::Read4k | Self::Read1m => 6,
            Self::Write4k | Self::Write1m => 7,
            Self::LockUnlock | Self::LockUnlockCrowded => procedure::LOCK,
            Self::CreateRemove => 8,
            Self::List1k | Self::List100k | Self::List1m => 17,
        }
    }

    pub(crate) const fn payload(self) -> usize {
        match self {
            Self::Read4k | Self::Write4k => 4 << 10,
            Self::Read1m | Self::Write1m => 1 << 20,
            _ => 0,
        }
    }
}
