//! The members as the leader sees them, and what follows: who can lead, who is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use openraft::async_runtime::{Instant as _, WatchReceiver as _};

use super::{ChangeError, refused};
use crate::raft::Engine;
use crate::raft::types::Member;

/// Who was not heard of for so long counts for nothing.
pub(super) const SILENT_MAX: Duration = Duration::from_secs(1);
/// How many entries a node may lack that is to lead or to vote: they are sent in a moment.
pub(super) const BEHIND_MAX: u64 = 1000;

/// The members as the leader sees them.
pub(super) struct Sight {
    pub(super) own: u64,
    pub(super) voters: BTreeSet<u64>,
    pub(super) members: BTreeMap<u64, Member>,
    /// How much of the log each has.
    pub(super) matched: BTreeMap<u64, u64>,
    pub(super) heard: BTreeSet<u64>,
    pub(super) last: u64,
}

impl Sight {
    pub(super) fn find(&self, name: &str) -> Option<(u64, &Member)> {
        let mut members = self.members.iter();
        let found = members.find(|(_, member)| *member.name == *name);
        found.map(|(node, member)| (*node, member))
    }

    pub(super) fn name(&self, node: u64) -> &str {
        self.members.get(&node).map_or("?", |member| &member.name)
    }

    pub(super) fn names(&self, nodes: &BTreeSet<u64>) -> String {
        let names: Vec<&str> = nodes.iter().map(|node| self.name(*node)).collect();
        names.join(", ")
    }

    pub(super) fn behind(&self, node: u64) -> Option<u64> {
        let matched = self.matched.get(&node)?;
        Some(self.last.saturating_sub(*matched))
    }

    /// Why a node can't lead; none if it can.
    pub(super) fn hindrance(&self, node: u64) -> Option<String> {
        let name = self.name(node);
        if self.members.get(&node).is_some_and(|member| member.witness) {
            return Some(format!(
                "`{name}` is a witness, which leads only if nobody else can"
            ));
        }
        if !self.voters.contains(&node) {
            return Some(format!("`{name}` does not vote yet"));
        }
        if !self.heard.contains(&node) {
            return Some(format!("`{name}` was not heard of lately"));
        }
        match self.behind(node) {
            Some(behind) if behind <= BEHIND_MAX => None,
            Some(behind) => Some(format!("`{name}` lacks {behind} entries of the log")),
            None => Some(format!("`{name}` has nothing of the log yet")),
        }
    }

    /// The node with data that can lead best, if not this one.
    pub(super) fn heir(&self) -> Option<u64> {
        let others = self.voters.iter().filter(|node| **node != self.own);
        let able = others.filter(|node| self.hindrance(**node).is_none());
        able.min_by_key(|node| (self.behind(**node), **node))
            .copied()
    }
}

/// What the engine says of the members now; of `matched` and `heard` only a leader knows.
pub(super) fn sight(engine: &Engine) -> Sight {
    sight_within(engine, SILENT_MAX)
}

/// The same, where only who answered within that time counts as heard.
pub(super) fn sight_within(engine: &Engine, time: Duration) -> Sight {
    let metrics = engine.metrics();
    let metrics = metrics.borrow_watched();
    let membership = &metrics.membership_config;
    let heard = metrics.heartbeat.iter().flatten();
    let heard = heard.filter(|(_, at)| at.is_some_and(|at| at.elapsed() < time));
    let matched = metrics.replication.iter().flatten();
    Sight {
        own: metrics.id,
        voters: membership.voter_ids().collect(),
        members: membership
            .nodes()
            .map(|(node, member)| (*node, member.clone()))
            .collect(),
        matched: matched
            .filter_map(|(node, matched)| Some((*node, matched.as_ref()?.index)))
            .collect(),
        heard: heard.map(|(node, _)| *node).chain([metrics.id]).collect(),
        last: metrics.last_log_index.unwrap_or_default(),
    }
}

/// The node with data that a witness that leads is to give the leadership to; none if it does not
/// lead, is none, or nobody can.
pub(in crate::raft) fn heir_of_witness(engine: &Engine) -> Option<(u64, String)> {
    let sight = sight(engine);
    let own = sight.members.get(&sight.own)?;
    if !own.witness || !engine.is_leader() {
        return None;
    }
    let heir = sight.heir()?;
    Some((heir, sight.name(heir).to_owned()))
}

/// Whether a voter can go: whoever is left must be able to go on.
pub(super) fn may_go(sight: &Sight, node: u64) -> Result<(), ChangeError> {
    let mut left = sight.voters.clone();
    left.remove(&node);
    let name = sight.name(node);
    if left.is_empty() {
        return Err(refused(format!(
            "node `{name}` is the only voter\nhint: to give the cluster up, stop it and move its \
             state directory away"
        )));
    }
    let has_data = |node: &u64| sight.members.get(node).is_some_and(|one| !one.witness);
    if !left.iter().any(has_data) {
        return Err(refused(format!(
            "without node `{name}` only witnesses are left ({}), which serve nothing\nhint: add \
             another node with data first",
            sight.names(&left)
        )));
    }
    let majority = left.len() / 2 + 1;
    let live: BTreeSet<u64> = left.intersection(&sight.heard).copied().collect();
    if live.len() < majority {
        let silent: BTreeSet<u64> = left.difference(&live).copied().collect();
        return Err(refused(format!(
            "without node `{name}` {majority} of {} must live, and {} was not heard of lately\n\
             hint: start it first, or remove it before",
            sight.names(&left),
            sight.names(&silent)
        )));
    }
    Ok(())
}

pub(super) fn unknown(sight: &Sight, name: &str) -> ChangeError {
    let all = sight.members.keys().copied().collect();
    let names = sight.names(&all);
    refused(format!(
        "the cluster has no node `{name}`; there are: {names}"
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::raft::change) fn sight_of(
        own: u64,
        voters: &[u64],
        witnesses: &[u64],
        heard: &[u64],
    ) -> Sight {
        let member = |node: &u64| {
            let member = Member {
                name: format!("n{node}").into(),
                witness: witnesses.contains(node),
                ..Member::alone(*node)
            };
            (*node, member)
        };
        Sight {
            own,
            voters: voters.iter().copied().collect(),
            members: voters.iter().map(member).collect(),
            matched: voters.iter().map(|node| (*node, 5000 + node)).collect(),
            heard: heard.iter().copied().collect(),
            last: 5010,
        }
    }

    #[test]
    fn the_heir_has_data_lives_and_has_the_log() {
        assert_eq!(sight_of(3, &[1, 2, 3], &[3], &[1, 2, 3]).heir(), Some(2));
        assert_eq!(sight_of(3, &[1, 2, 3], &[3], &[1, 3]).heir(), Some(1));
        assert_eq!(sight_of(1, &[1, 3], &[3], &[1, 3]).heir(), None);
        let mut behind = sight_of(3, &[1, 2, 3], &[3], &[1, 2, 3]);
        behind.last = 50_000;
        assert_eq!(behind.heir(), None);
        behind.matched.insert(1, 49_999);
        assert_eq!(behind.heir(), Some(1));
        let why = behind.hindrance(2).unwrap_or_default();
        assert!(why.contains("lacks 44998 entries"), "{why}");
    }

    #[test]
    fn nobody_goes_whom_the_others_need() {
        let why = |sight: &Sight, node| match may_go(sight, node) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        let all = sight_of(1, &[1, 2, 3], &[3], &[1, 2, 3]);
        assert_eq!(why(&all, 2), "");
        assert!(why(&sight_of(1, &[1], &[], &[1]), 1).contains("only voter"));
        assert!(why(&sight_of(1, &[1, 3], &[3], &[1, 3]), 1).contains("only witnesses"));
        // n3 is down: without n2 nothing goes on, but n3 itself may go.
        let down = sight_of(1, &[1, 2, 3], &[], &[1, 2]);
        assert!(
            why(&down, 2).contains("n3 was not heard of"),
            "{}",
            why(&down, 2)
        );
        assert_eq!(why(&down, 3), "");
    }
}
