//! Whether this node is the only voter of its cluster: asked before each reply, at the gate.
//!
//! The only voter needs no lease, and has none. That ends when another voter comes, and comes back
//! when all others are gone, while services are served. The rule: *a lease is needed from the
//! moment this node has appended a membership with another voter until it has applied one, the last
//! that it has appended, of itself alone.* Why that keeps one service from having two nodes:
//!
//! - *On the way up.* Another node proposes to take a service only when its own log says that it
//!   is a voter. The entry that says so was appended by the leader before it was sent to anybody,
//!   and the leader was this node, the only voter; so the lease was needed here before. From then
//!   on rules 1 and 2 of [`state`](crate::cluster::state) hold as in any cluster: the other waits
//!   for the last renewal, and if there is none this node has been silent since.
//! - *On the way down.* When a membership of this node alone is applied here, it is committed, by
//!   majorities of the old voters and the new one. An assignment to another node that is in the log
//!   before it was applied here before. One that is in the log after it is appended by this node,
//!   the only one that can lead, and is void: a node is retired before it is removed, and nothing
//!   is assigned to a retired node.
//! - *A membership that is taken back.* One with another voter that was appended, and then
//!   truncated, leaves the lease needed, until a later one of this node alone is applied.
//! - *After a start* nothing is known until the log has been read for the last membership in it;
//!   until then the lease is needed. An older membership of this node alone, applied again from the
//!   log, does not count if a later one is in the log.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::types::Membership;

/// Whether this node is the only voter.
#[derive(Debug, Default)]
pub(super) struct Sole {
    seen: Mutex<Seen>,
    is_sole: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct Seen {
    /// This node, once the log was read.
    own: Option<u64>,
    /// Where in the log the last membership is that has several voters.
    several: Option<u64>,
    /// Where the last applied membership with one voter is, and who that is.
    one: Option<(u64, u64)>,
}

impl Sole {
    /// For whoever asks.
    pub(super) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.is_sole)
    }

    /// A membership is going to be appended; to be told before anybody else can have it.
    pub(super) fn appended(&self, index: u64, membership: &Membership) {
        if membership.voter_ids().count() != 1 {
            self.note(|seen| seen.several = seen.several.max(Some(index)));
        }
    }

    /// A membership is applied.
    pub(super) fn applied(&self, index: u64, membership: &Membership) {
        let mut voters = membership.voter_ids();
        match (voters.next(), voters.next()) {
            (Some(voter), None) => self.note(|seen| seen.one = seen.one.max(Some((index, voter)))),
            _ => self.note(|seen| seen.several = seen.several.max(Some(index))),
        }
    }

    /// The log was read: this node is `own`, and that is the last membership in it.
    pub(super) fn begin(&self, own: u64, last: Option<(u64, &Membership)>) {
        if let Some((index, membership)) = last {
            self.appended(index, membership);
        }
        self.note(|seen| seen.own = Some(own));
    }

    fn note(&self, change: impl FnOnce(&mut Seen)) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut seen);
        let is_sole = seen.one.is_some_and(|(index, voter)| {
            seen.own == Some(voter) && seen.several.is_none_or(|several| several < index)
        });
        self.is_sole.store(is_sole, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
