//! Who and what: numbers that must not be taken for each other.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A member of the cluster.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The one node of a store that has no cluster.
    pub const LONE: Self = Self(1);
}

impl fmt::Display for NodeId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// A service, allotted when it is first named.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct ServiceId(pub u32);

impl ServiceId {
    /// The service of a store that has no cluster, and the first one of every other.
    pub const FIRST: Self = Self(1);
}

/// Where a command comes from, and its place among those from there. A node sends a proposal again
/// when it can't know whether the leader that it was sent to is still there; so of two entries with
/// one origin the second does nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Whose proposal it is.
    pub node: NodeId,
    /// Which life of its process; rises with each.
    pub incarnation: u64,
    /// Which of its two queues.
    pub queue: Queue,
    /// Its place in the queue, from 1; 0 in logs from the time when there was one node.
    pub number: u64,
}

/// The queues of a node's proposals. Each keeps its order; they don't wait for each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Queue {
    /// What hosts and operators ask for.
    #[default]
    Calls,
    /// Leases and assignments, which must not wait behind a thousand locks.
    Leases,
}

impl Queue {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Calls, Self::Leases];

    /// Its place among them.
    pub(super) const fn place(self) -> usize {
        match self {
            Self::Calls => 0,
            Self::Leases => 1,
        }
    }
}
