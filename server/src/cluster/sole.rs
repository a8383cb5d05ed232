//! Whether a node is the only voter of its cluster, and so needs no lease. Local and pure.
//!
//! The only voter has no lease. That ends when another voter comes, and comes back when all others
//! are gone, while services are served. The rule: *a lease is needed from the moment this node has
//! appended a membership with another voter until it has applied one, the last that it has
//! appended, of itself alone.* Why that keeps one service from having two nodes:
//!
//! - *On the way up.* Another node proposes to take a service only when its own log says that it
//!   is a voter. The entry that says so was appended by the leader before it was sent to anybody,
//!   and the leader was this node, the only voter; so the lease was needed here before. From then
//!   on rules 1 and 2 of [`state`](super::state) hold as in any cluster: the other waits for the
//!   last renewal, and if there is none this node has been silent since.
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

use super::NodeId;

/// What a node has seen of memberships.
#[derive(Debug, Clone, Default)]
pub struct Sole {
    /// This node, once the log was read.
    own: Option<NodeId>,
    /// Where in the log the last membership is that has several voters.
    several: Option<u64>,
    /// Where the last applied membership with one voter is, and who that is.
    one: Option<(u64, NodeId)>,
}

impl Sole {
    /// A membership is going to be appended at an index, with these voters; to be told before
    /// anybody else can have it.
    pub fn appended(&mut self, index: u64, voters: impl IntoIterator<Item = NodeId>) {
        if voters.into_iter().count() != 1 {
            self.several = self.several.max(Some(index));
        }
    }

    /// A membership is applied.
    pub fn applied(&mut self, index: u64, voters: impl IntoIterator<Item = NodeId>) {
        let mut voters = voters.into_iter();
        match (voters.next(), voters.next()) {
            (Some(voter), None) => self.one = self.one.max(Some((index, voter))),
            _ => self.several = self.several.max(Some(index)),
        }
    }

    /// The log was read, and the last membership in it told as appended: this node is `own`.
    pub const fn begin(&mut self, own: NodeId) {
        self.own = Some(own);
    }

    /// Whether this node is the only voter, and needs no lease.
    pub fn is_sole(&self) -> bool {
        self.one.is_some_and(|(index, voter)| {
            self.own == Some(voter) && self.several.is_none_or(|several| several < index)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes<const N: usize>(voters: [u64; N]) -> [NodeId; N] {
        voters.map(NodeId)
    }

    #[test]
    fn a_lease_is_needed_from_append_to_apply() {
        let mut sole = Sole::default();
        sole.begin(NodeId(1));
        assert!(!sole.is_sole());
        sole.appended(1, nodes([1]));
        assert!(!sole.is_sole(), "not applied yet");
        sole.applied(1, nodes([1]));
        assert!(sole.is_sole());
        sole.appended(5, nodes([1, 2]));
        assert!(!sole.is_sole(), "appended");
        sole.appended(6, nodes([1, 2]));
        sole.applied(5, nodes([1, 2]));
        sole.appended(8, nodes([1, 2]));
        sole.appended(9, nodes([1]));
        assert!(!sole.is_sole(), "not applied yet");
        sole.applied(9, nodes([1]));
        assert!(sole.is_sole());
    }

    #[test]
    fn after_a_start_an_older_membership_does_not_count() {
        let mut sole = Sole::default();
        sole.applied(1, nodes([1]));
        assert!(!sole.is_sole(), "the log was not read yet");
        sole.appended(5, nodes([1, 2]));
        sole.begin(NodeId(1));
        assert!(!sole.is_sole());
        sole.applied(1, nodes([1]));
        assert!(!sole.is_sole());
        let mut other = Sole::default();
        other.begin(NodeId(2));
        other.applied(1, nodes([1]));
        assert!(!other.is_sole(), "it is another node");
    }
}
