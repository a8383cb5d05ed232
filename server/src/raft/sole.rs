//! Whether this node is the only voter of its cluster: asked before each reply, at the gate, while
//! the log appends and applies memberships. The rule, and why it is right, is that of
//! [`cluster::sole`](crate::cluster::sole).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::types::Membership;
use crate::cluster::{NodeId, sole};

/// Whether this node is the only voter.
#[derive(Debug, Default)]
pub(super) struct Sole {
    rule: Mutex<sole::Sole>,
    is_sole: Arc<AtomicBool>,
}

impl Sole {
    /// For whoever asks.
    pub(super) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.is_sole)
    }

    /// A membership is going to be appended; to be told before anybody else can have it.
    pub(super) fn appended(&self, index: u64, membership: &Membership) {
        self.note(|rule| rule.appended(index, voters(membership)));
    }

    /// A membership is applied.
    pub(super) fn applied(&self, index: u64, membership: &Membership) {
        self.note(|rule| rule.applied(index, voters(membership)));
    }

    /// The log was read: this node is `own`, and that is the last membership in it.
    pub(super) fn begin(&self, own: u64, last: Option<(u64, &Membership)>) {
        self.note(|rule| {
            if let Some((index, membership)) = last {
                rule.appended(index, voters(membership));
            }
            rule.begin(NodeId(own));
        });
    }

    fn note(&self, change: impl FnOnce(&mut sole::Sole)) {
        let mut rule = self.rule.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut rule);
        self.is_sole.store(rule.is_sole(), Ordering::Release);
    }
}

/// Of a joint membership those of both halves.
fn voters(membership: &Membership) -> impl Iterator<Item = NodeId> + '_ {
    membership.voter_ids().map(NodeId)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::super::types::Member;
    use super::*;

    fn membership(configs: &[&[u64]]) -> Membership {
        let of = |voters: &&[u64]| voters.iter().copied().collect::<BTreeSet<u64>>();
        let nodes = configs.iter().copied().flatten();
        let nodes: BTreeMap<u64, Member> =
            nodes.map(|node| (*node, Member::alone(*node))).collect();
        Membership::new(configs.iter().map(of).collect(), nodes).unwrap_or_default()
    }

    #[test]
    fn a_joint_membership_has_the_voters_of_both_halves() {
        let sole = Sole::default();
        let is_sole = || sole.flag().load(Ordering::Acquire);
        sole.begin(1, Some((1, &membership(&[&[1]]))));
        sole.applied(1, &membership(&[&[1]]));
        assert!(is_sole());
        sole.appended(5, &membership(&[&[1], &[1, 2]]));
        assert!(!is_sole());
        sole.applied(8, &membership(&[&[1, 2], &[1]]));
        assert!(!is_sole());
        sole.applied(9, &membership(&[&[1]]));
        assert!(is_sole());
    }
}
