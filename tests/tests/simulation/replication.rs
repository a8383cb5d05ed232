//! How entries get from a leader to its followers, to their disks and into their states: the other
//! half of `raft`.

use std::rc::Rc;

use havenfs::cluster::lease::Moment;
use havenfs::cluster::placement::Seen;
use havenfs::cluster::{ClusterCommand, ClusterState, Command, NodeId};

use crate::checks::Broken;
use crate::members::Set;
use crate::node::NodeEvent;
use crate::plan::NODES;
use crate::raft::{Append, Entry, HEARTBEAT, Message, Proposed, Role, Snapshot};
use crate::world::World;

impl World {
    pub(crate) fn heartbeat(&mut self, n: usize, term: u64) {
        let raft = &self.nodes[n].raft;
        if raft.role != Role::Leader || raft.term != term {
            return;
        }
        for to in self.members_but(n) {
            let raft = &mut self.nodes[n].raft;
            // What was sent and not heard of may be lost.
            raft.next[to] = raft.next[to].min(raft.matched[to] + 1).max(1);
            if raft.matched[to] == 0 {
                raft.next[to] = raft.last().max(1);
            }
            self.replicate(n, to);
        }
        self.node_after(n, HEARTBEAT, NodeEvent::Heartbeat(term));
    }

    /// Sends a follower what it does not have.
    pub(crate) fn replicate(&mut self, n: usize, to: usize) {
        let raft = &mut self.nodes[n].raft;
        let term = raft.term;
        let prev = raft.next[to] - 1;
        let Some(prev_term) = raft.term_at(prev) else {
            if let Some(snapshot) = raft.snapshot.clone() {
                self.send(n, to, Message::Install { term, snapshot });
            }
            return;
        };
        let skipped = (prev - raft.base) as usize;
        let entries: Vec<Entry> = raft.log.iter().skip(skipped).take(64).cloned().collect();
        raft.next[to] += entries.len() as u64;
        let append = Append {
            term,
            prev,
            prev_term,
            entries,
            commit: raft.commit,
        };
        self.send(n, to, Message::Append(append));
    }

    /// A leader takes a proposal.
    pub(crate) fn take_proposal(&mut self, n: usize, proposed: Rc<Proposed>) {
        let term = self.nodes[n].raft.term;
        let proposed = Some(proposed);
        let members = None;
        self.append(
            n,
            vec![Entry {
                term,
                proposed,
                members,
            }],
        );
        self.replicate_all(n);
    }

    pub(crate) fn replicate_all(&mut self, n: usize) {
        for to in self.members_but(n) {
            self.replicate(n, to);
        }
    }

    /// Entries get into a node's log: here, and not where they are applied, it sees renewals.
    pub(crate) fn append(&mut self, n: usize, entries: Vec<Entry>) {
        let now = self.local(n);
        for entry in entries {
            let node = &mut self.nodes[n];
            if let Some((node_id, seen)) = renewal_in(&entry, now) {
                node.seen.insert(node_id, seen);
            }
            let members = entry.members;
            node.raft.log.push(entry);
            let index = node.raft.last();
            if let Some(members) = members {
                self.membership_appended(n, index, members);
            }
        }
        self.sync(n);
    }

    fn sync(&mut self, n: usize) {
        let slow = self.nodes[n].log_slow_until.saturating_sub(self.now);
        let took = slow + 100_000 + self.short_time();
        let raft = &mut self.nodes[n].raft;
        if raft.is_writing || raft.synced >= raft.last() {
            return;
        }
        raft.is_writing = true;
        raft.write += 1;
        let (write, upto) = (raft.write, raft.last());
        self.node_after(n, took, NodeEvent::Synced(write, upto));
    }

    pub(crate) fn synced(&mut self, n: usize, write: u64, upto: u64) {
        let raft = &mut self.nodes[n].raft;
        if raft.write != write {
            return;
        }
        raft.is_writing = false;
        raft.synced = raft.synced.max(upto);
        if raft.role == Role::Leader {
            self.advance(n);
        } else {
            self.tell_leader(n);
        }
        self.sync(n);
    }

    fn tell_leader(&mut self, n: usize) {
        let raft = &self.nodes[n].raft;
        let (term, matched) = (raft.term, raft.synced.min(raft.verified));
        if let Some(leader) = raft.leader {
            self.send(n, leader, Message::Appended { term, matched });
        }
    }

    /// What a majority has on disk is committed, if it is of this term.
    pub(crate) fn advance(&mut self, n: usize) {
        let raft = &mut self.nodes[n].raft;
        raft.matched[n] = raft.synced;
        let members = raft.members.1;
        let have = |index: u64| {
            let have = (0..NODES).filter(|n| raft.matched[*n] >= index);
            have.fold(Set(0), Set::with)
        };
        let matched = raft.matched.into_iter();
        let agreed = matched.filter(|index| members.agree(have(*index)));
        let commit = agreed.max().unwrap_or(0);
        if commit > raft.commit && raft.term_at(commit) == Some(raft.term) {
            raft.commit = commit;
            self.apply_soon(n);
        }
    }

    /// A leader sent something: this node follows it.
    fn follow(&mut self, n: usize, from: usize, term: u64) -> bool {
        let raft = &self.nodes[n].raft;
        let own = raft.term;
        if term < own {
            let last = raft.last();
            self.send(n, from, Message::Behind { term: own, last });
            return false;
        }
        if term > own || raft.role != Role::Follower {
            self.step_down(n, term);
        }
        self.nodes[n].raft.leader = Some(from);
        self.heard(n);
        true
    }

    pub(crate) fn append_of(&mut self, n: usize, from: usize, append: Append) {
        if !self.follow(n, from, append.term) {
            return;
        }
        let raft = &mut self.nodes[n].raft;
        let Append {
            term,
            mut prev,
            mut prev_term,
            mut entries,
            commit,
        } = append;
        if prev < raft.base {
            let known = ((raft.base - prev) as usize).min(entries.len());
            entries.drain(..known);
            prev += known as u64;
            if prev < raft.base {
                prev = raft.base;
            }
            prev_term = raft.term_at(prev).unwrap_or(prev_term);
        }
        if raft.term_at(prev) != Some(prev_term) {
            let last = raft.last().min(prev.saturating_sub(1)).max(raft.base);
            self.send(n, from, Message::Behind { term, last });
            return;
        }
        let mut index = prev;
        let mut new = Vec::new();
        let mut entries = entries.into_iter();
        for entry in entries.by_ref() {
            let raft = &mut self.nodes[n].raft;
            if raft.term_at(index + 1) == Some(entry.term) {
                index += 1;
                continue;
            }
            if raft.last() > index {
                let committed = raft.commit > index;
                raft.truncate(index);
                self.count("entries taken back");
                if committed {
                    self.broken(Broken::LogsDiffer, || {
                        format!("n{n} takes back what was committed behind {index}")
                    });
                }
            }
            new.push(entry);
            break;
        }
        new.extend(entries);
        index += new.len() as u64;
        self.append(n, new);
        let raft = &mut self.nodes[n].raft;
        raft.verified = raft.verified.max(index);
        raft.commit = raft.commit.max(commit.min(raft.verified));
        self.apply_soon(n);
        self.tell_leader(n);
    }

    pub(crate) fn install(&mut self, n: usize, from: usize, term: u64, snapshot: &Rc<Snapshot>) {
        if !self.follow(n, from, term) {
            return;
        }
        let raft = &mut self.nodes[n].raft;
        raft.verified = raft.verified.max(snapshot.index.min(raft.last()));
        if snapshot.index > raft.applied {
            if raft.term_at(snapshot.index) == Some(snapshot.term) {
                raft.log.drain(..(snapshot.index - raft.base) as usize);
            } else {
                raft.log.clear();
            }
            raft.write += 1;
            raft.is_writing = false;
            raft.base = snapshot.index;
            raft.base_term = snapshot.term;
            raft.synced = raft.synced.max(snapshot.index).min(raft.last());
            raft.snapshot = Some(Rc::clone(snapshot));
            raft.base_members = snapshot.members;
            raft.find_members();
            raft.commit = raft.commit.max(snapshot.index);
            raft.applied = snapshot.index;
            raft.verified = raft.verified.max(snapshot.index);
            let mut bytes = Vec::new();
            let written = snapshot.state.write(&mut bytes);
            let state = ClusterState::read(&mut &*bytes);
            let state = written.and(state).unwrap_or_default();
            self.nodes[n].state = state;
            self.count("snapshots installed");
            let index = snapshot.index;
            self.say(|_| format!("n{n} takes a snapshot up to {index}"));
            self.check_state(n);
            let (at, members) = snapshot.members;
            self.membership_applied(n, at, members);
            self.snapshot_installed(n);
        }
        self.tell_leader(n);
        self.sync(n);
    }

    fn apply_soon(&mut self, n: usize) {
        let stuck = self.nodes[n].stuck_until.saturating_sub(self.now);
        let took = stuck + self.short_time();
        let raft = &mut self.nodes[n].raft;
        if raft.commit > raft.applied && !raft.is_applying {
            raft.is_applying = true;
            self.node_after(n, took, NodeEvent::Apply);
        }
    }

    /// Applies all that is committed, as one batch.
    pub(crate) fn apply(&mut self, n: usize) {
        let raft = &mut self.nodes[n].raft;
        raft.is_applying = false;
        let first = raft.applied + 1;
        let mut batch = Vec::new();
        for index in first..=raft.commit.min(raft.last()) {
            let Some(entry) = raft.entry(index).cloned() else {
                return;
            };
            batch.push((index, entry));
        }
        self.apply_batch(n, batch);
        self.make_snapshot(n);
    }

    fn make_snapshot(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        let raft = &mut node.raft;
        let index = raft.applied;
        if index < raft.base + self.plan.snapshot_every + self.plan.entries_kept {
            return;
        }
        let (Some(term), purged) = (raft.term_at(index), index - self.plan.entries_kept) else {
            return;
        };
        raft.base_term = raft.term_at(purged).unwrap_or(0);
        for (entry, index) in raft
            .log
            .drain(..(purged - raft.base) as usize)
            .zip(raft.base + 1..)
        {
            if let Some(members) = entry.members {
                raft.base_members = (index, members);
            }
        }
        raft.base = purged;
        raft.synced = raft.synced.max(purged);
        raft.snapshot = Some(Rc::new(Snapshot {
            index,
            term,
            state: node.state.clone(),
            members: raft.applied_members,
        }));
    }
}

/// Whose renewal an entry has.
pub(crate) fn renewal_in(entry: &Entry, at: Moment) -> Option<(NodeId, Seen)> {
    let Command::Cluster(command) = &entry.proposed.as_ref()?.command else {
        return None;
    };
    let renewal = match command {
        ClusterCommand::Renew(renewal) => renewal,
        ClusterCommand::Assign(assign) => &assign.renewal,
        _ => return None,
    };
    let id = renewal.id();
    Some((renewal.node, Seen { id, at }))
}
