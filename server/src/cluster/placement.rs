//! Whose turn it is to take a service that nobody serves.
//!
//! Local and pure: each node asks for itself, from the replicated state and from what it saw
//! itself. Two that answer "mine" at once do no harm, since one assignment is valid and the other
//! is not; they only cost time. So the nodes that live take turns by rank: where an operator wants
//! the service, its preferred node, who serves fewest, and last the number of the node.
//!
//! Rule 2 of [`state`](super::state) is here: the wait begins when this node first saw the last
//! renewal of the active node, in the log, or in the state after a start or a snapshot, whoever led
//! then.
//! Counting from the election of a leader would add its time for nothing: a later renewal voids the
//! assignment anyway.

use std::time::Duration;

use super::command::RenewalId;
use super::lease::{Moment, wait};
use super::service::ServiceState;
use super::{ClusterState, NodeId, ServiceId, Wish};

/// When this node first saw a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The last one.
    pub id: RenewalId,
    /// When.
    pub at: Moment,
}

/// What a node knows when it asks.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, S> {
    /// The replicated state.
    pub state: &'a ClusterState,
    /// The service.
    pub service: ServiceId,
    /// Who asks.
    pub me: NodeId,
    /// In which life.
    pub incarnation: u64,
    /// The nodes that have the data.
    pub candidates: &'a [NodeId],
    /// Where it should be if all is well.
    pub preferred: Option<NodeId>,
    /// When the last renewal of a node was first seen, or a later one. If it was not, this node
    /// can't tell, and its wait has not begun.
    pub seen: S,
    /// Since when this node knows that nobody has it.
    pub free_since: Moment,
    /// When this life of the node began to renew its lease.
    pub joined: Moment,
    /// Not before this: it has failed here.
    pub not_before: Moment,
    /// Whether this node can't bring the addresses that the service has now: others go first.
    pub is_stale: bool,
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It is served by this node or, as far as is known, by another one that lives.
    Nobodys,
    /// This node's: it may propose to take it, after this renewal of the active node.
    Mine {
        /// See [`Assign::after`](super::command::Assign).
        after: Option<RenewalId>,
    },
    /// Not before this moment.
    NotBefore(Moment),
}

impl<S: Fn(NodeId) -> Option<Seen>> View<'_, S> {
    /// Whose turn it is now.
    pub fn turn(&self, now: Moment) -> Turn {
        let Some(service) = self.state.service(self.service) else {
            return Turn::Nobodys;
        };
        if !self.candidates.contains(&self.me) {
            return Turn::Nobodys;
        }
        let (free_at, after) = match service.active() {
            Some(active) if active.node == self.me => {
                // Its own: served by this life, or by an earlier one, which is over.
                if active.incarnation == self.incarnation {
                    return Turn::Nobodys;
                }
                return self.not_before_or_mine(now, Moment::default(), None);
            }
            // Of a node that was lost before it could release it, too.
            _ if service.wish() == Wish::Nobody => return Turn::Nobodys,
            Some(active) => {
                let over = self.over(active.node, now);
                let after = self.state.last_renewal(active.node);
                (over, after.map(super::command::Renewal::id))
            }
            None => (self.free_from(service), None),
        };
        let step = TURN_STEP.saturating_mul(self.rank(service, now));
        let stale = if self.is_stale {
            STALE_TIME
        } else {
            Duration::ZERO
        };
        // It has said that its storage fails, and could not try it since.
        let doubtful = if self.fails_on(self.me) {
            DOUBTFUL_TIME
        } else {
            Duration::ZERO
        };
        self.not_before_or_mine(now, free_at + step + stale + doubtful, after)
    }

    fn not_before_or_mine(&self, now: Moment, begin: Moment, after: Option<RenewalId>) -> Turn {
        let begin = begin.max(self.not_before);
        if now < begin {
            Turn::NotBefore(begin)
        } else {
            Turn::Mine { after }
        }
    }

    /// When a service that nobody has may be taken. The first time ever, the preferred node is
    /// given the time to start.
    fn free_from(&self, service: &ServiceState) -> Moment {
        let prefers_another = self.preferred.is_some_and(|preferred| preferred != self.me);
        if service.epoch() == 0 && prefers_another {
            self.free_since.max(self.joined + FIRST_START_TIME)
        } else {
            self.free_since
        }
    }

    /// Whether a node lives and has the data, on storage that works as far as it has said, and runs
    /// with no address that another service has.
    pub(super) fn is_able(&self, node: NodeId, now: Moment) -> bool {
        self.is_there(node, now) && (node == self.me || !self.fails_on(node))
    }

    /// The same, whatever it has said of its storage, which may be old: it finds out itself.
    pub(super) fn is_there(&self, node: NodeId, now: Moment) -> bool {
        let clashes = || self.state.clash(self.service, node).is_some();
        let lives = || self.over(node, now) > now && !clashes();
        self.candidates.contains(&node) && (node == self.me || lives())
    }

    /// The same of a node to which the service would be given although it can stay where it is:
    /// one that runs with other addresses is to be restarted before.
    pub(super) fn is_fit(&self, node: NodeId, now: Moment) -> bool {
        self.is_able(node, now) && !self.is_stale_on(node)
    }

    fn is_stale_on(&self, node: NodeId) -> bool {
        let service = self.state.service(self.service);
        service.is_some_and(|service| service.is_stale_on(node))
    }

    fn fails_on(&self, node: NodeId) -> bool {
        let service = self.state.service(self.service);
        service.is_some_and(|service| service.failing().contains(&node))
    }

    /// When the lease of a node is over for sure.
    fn over(&self, node: NodeId, now: Moment) -> Moment {
        let Some(last) = self.state.last_renewal(node) else {
            // It has never had a lease.
            return Moment::default();
        };
        // An older one was seen before the last was proposed.
        let seen = (self.seen)(node).filter(|seen| seen.id >= last.id());
        seen.map_or(now, |seen| seen.at) + wait(last)
    }

    /// How many living nodes come before this one.
    fn rank(&self, service: &ServiceState, now: Moment) -> u32 {
        let key = |node: NodeId| {
            (
                service.wish().node() != Some(node),
                self.preferred != Some(node),
                self.served_by(node),
                node,
            )
        };
        let own = key(self.me);
        let active = service.active().map(|active| active.node);
        let before = self.candidates.iter().filter(|node| {
            let node = **node;
            let is_other = node != self.me && active != Some(node);
            // One that can't bring the addresses waits until all others had their turns.
            let is_first = || self.is_stale || !self.is_stale_on(node);
            is_other && key(node) < own && self.is_able(node, now) && is_first()
        });
        u32::try_from(before.count()).unwrap_or(u32::MAX)
    }

    fn served_by(&self, node: NodeId) -> usize {
        let services = self.state.services();
        let served = services
            .filter(|(_, service)| service.active().is_some_and(|active| active.node == node));
        served.count()
    }
}

/// How long the next in rank gives the one before it.
const TURN_STEP: Duration = Duration::from_millis(300);
/// How long a node that can't bring the addresses gives all others, which may be starting: who can
/// comes first by that, and if none can, clients find some of the addresses at least.
const STALE_TIME: Duration = Duration::from_secs(3);
/// How long a node whose storage failed when it was tried last gives all others.
const DOUBTFUL_TIME: Duration = Duration::from_secs(3);
/// How long others give the preferred node at the first start ever.
const FIRST_START_TIME: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests;
