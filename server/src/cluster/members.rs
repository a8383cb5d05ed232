//! What the replicated state knows of members beyond who they are, which the log's membership
//! says: who was removed, whether locks may have been lost with others, and the keys of file
//! handles that a node brought along when it became a cluster.
//!
//! A node is *retired* before it is removed, and stays so for good: its number is never given
//! again, nothing is assigned to it any more, and it is not let in. So a removed node that has not
//! heard of it can't be in anybody's way, whatever of its proposals are still under way.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::NodeId;

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    retired: BTreeSet<NodeId>,
    handle_keys: Vec<HandleSecret>,
    /// The log of a node was taken for the whole one, though entries may be missing in it.
    is_forced: bool,
}

/// A key that signs file handles.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandleSecret {
    /// Its number, which is part of the handles.
    pub id: u8,
    /// What signs.
    pub secret: [u8; 16],
}

impl std::fmt::Debug for HandleSecret {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // It must not get into a log for people.
        write!(out, "HandleSecret({})", self.id)
    }
}

/// A change of the members. New ones are added at the end: their order is their number in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemberCommand {
    /// A node is going to be removed. Void while it has a service, or has still to be fenced for
    /// one: whoever fences it needs its name.
    Retire {
        /// Which one.
        node: NodeId,
    },
    /// All other voters are lost and were made sure to be off; the log of one is taken for the
    /// whole one.
    SoleSurvivor {
        /// The other members.
        lost: Vec<NodeId>,
        /// Whether the log may lack what a majority without its node has acknowledged.
        is_incomplete: bool,
    },
    /// A server without a cluster becomes the first node of one.
    Begin {
        /// What the only service was called, and what it is called from now on.
        renamed: Option<(Box<str>, Box<str>)>,
        /// What its handles were signed with.
        handle_keys: Vec<HandleSecret>,
    },
}

impl Members {
    /// Nothing is assigned to this node any more.
    pub(super) fn retire(&mut self, node: NodeId) {
        self.retired.insert(node);
    }

    /// Whether a node was removed, or is going to be.
    pub fn is_retired(&self, node: NodeId) -> bool {
        self.retired.contains(&node)
    }

    /// The highest number of a removed node.
    pub fn last_retired(&self) -> Option<NodeId> {
        self.retired.last().copied()
    }

    /// Entries may be missing from now on.
    pub(super) const fn force(&mut self) {
        self.is_forced = true;
    }

    /// Whether entries may be missing, so that a service that is not known may have had locks.
    pub(super) const fn is_forced(&self) -> bool {
        self.is_forced
    }

    /// Keys are added and never dropped, since handles that clients hold depend on them.
    pub(super) fn add_keys(&mut self, keys: &[HandleSecret]) {
        for key in keys {
            if self.handle_keys.iter().all(|known| known.id != key.id) {
                self.handle_keys.push(key.clone());
            }
        }
    }

    /// The keys that a node brought along, which are older than the cluster's own.
    pub fn handle_keys(&self) -> &[HandleSecret] {
        &self.handle_keys
    }
}
