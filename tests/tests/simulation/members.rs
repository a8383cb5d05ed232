//! Who is a member, and the operator who changes that: as `raft::change`, over the small Raft of
//! `raft`. Whoever leads carries out what the operator asks for, one entry of a membership at a
//! time, and none before the last one is committed in the leader's own term; what a leader that is
//! lost has left half done the next one finishes. A node that is removed is retired before, and is
//! let in nowhere when that is known; its number never comes again, so a machine that comes back
//! with an empty disk is a new node.

use std::rc::Rc;

use havenfs::cluster::members::MemberCommand;
use havenfs::cluster::{ClusterCommand, Command, NodeId, Queue};

use crate::clock::MS;
use crate::node::node_id;
use crate::pending::Then;
use crate::plan::NODES;
use crate::raft::{Entry, Role};
use crate::sabotage::Sabotage;
use crate::world::{Event, World};

/// Some of the nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Set(pub(crate) u8);

impl Set {
    pub(crate) const fn has(self, n: usize) -> bool {
        self.0 & 1 << n != 0
    }

    pub(crate) const fn with(self, n: usize) -> Self {
        Self(self.0 | 1 << n)
    }

    pub(crate) const fn without(self, n: usize) -> Self {
        Self(self.0 & !(1 << n))
    }

    pub(crate) const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = usize> {
        (0..NODES).filter(move |n| self.has(*n))
    }

    const fn has_majority(self, of: Self) -> bool {
        Self(self.0 & of.0).len() > of.len() / 2
    }
}

/// A membership; where the voters change a joint one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Members {
    voters: Set,
    /// Who votes from now on, and must agree as well.
    next: Option<Set>,
    learners: Set,
}

impl Members {
    pub(crate) const fn of(voters: Set) -> Self {
        Self {
            voters,
            next: None,
            learners: Set(0),
        }
    }

    /// Whoever votes, in either half.
    pub(crate) const fn voters(self) -> Set {
        match self.next {
            Some(next) => Set(self.voters.0 | next.0),
            None => self.voters,
        }
    }

    pub(crate) const fn all(self) -> Set {
        Set(self.voters().0 | self.learners.0)
    }

    /// How the log calls the voters.
    pub(crate) fn voter_ids(self) -> impl Iterator<Item = NodeId> {
        self.voters().iter().map(node_id)
    }

    /// Whether these are enough.
    pub(crate) fn agree(self, nodes: Set) -> bool {
        let next = self.next.unwrap_or(self.voters);
        nodes.has_majority(self.voters) && nodes.has_majority(next)
    }

    const fn becoming(self, next: Set) -> Self {
        Self {
            next: Some(next),
            learners: Set(self.learners.0 & !next.0),
            ..self
        }
    }
}

/// What an operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Add(usize),
    Remove(usize),
}

impl World {
    /// The operator looks what became of the first change, and asks whoever leads to go on.
    pub(crate) fn operate(&mut self) {
        let again = self.between(10, 300) * MS;
        self.after(again, Event::Operate);
        let leads = |n: &usize| {
            let node = &self.nodes[*n];
            node.is_up && !node.is_stopped && node.raft.role == Role::Leader
        };
        let leaders: Vec<usize> = (0..NODES).filter(leads).collect();
        if leaders.is_empty() {
            return;
        }
        // One of them may have been replaced, and not know it.
        let n = leaders[self.below(leaders.len() as u64) as usize];
        let raft = &self.nodes[n].raft;
        let (at, members) = raft.members;
        if raft.commit < at || raft.term_at(raft.commit) != Some(raft.term) {
            return;
        }
        if let Some(next) = members.next {
            let begun_by = self.begun_change.take();
            if begun_by != Some(n) {
                self.count("changes that another leader finished");
            }
            self.change_members(n, Members::of(next));
            return;
        }
        match self.changes.front().copied() {
            Some(Change::Add(m)) => self.add(n, members, m),
            Some(Change::Remove(m)) => self.remove(n, members, m),
            None => {}
        }
    }

    fn add(&mut self, n: usize, members: Members, m: usize) {
        if members.voters().has(m) {
            self.changes.pop_front();
            self.count("nodes added");
        } else if !members.all().has(m) {
            // It waits to be added, with an empty disk.
            self.nodes[m].is_out = false;
            self.start_node(m);
            let learners = members.learners.with(m);
            self.change_members(
                n,
                Members {
                    learners,
                    ..members
                },
            );
        } else if self.is_heard(n, m) {
            self.begun_change = Some(n);
            self.change_members(n, members.becoming(members.voters.with(m)));
        }
    }

    fn remove(&mut self, n: usize, members: Members, m: usize) {
        if !members.all().has(m) {
            self.changes.pop_front();
            self.count("nodes removed");
            return;
        }
        let left = members.voters.without(m);
        let heard = left.iter().filter(|other| self.is_heard(n, *other));
        let heard = heard.fold(Set(0), Set::with);
        if !heard.has_majority(left) {
            return;
        }
        if n == m {
            // The next leader removes it.
            let term = self.nodes[n].raft.term;
            self.step_down(n, term);
            self.heard(n);
            self.nodes[n].raft.timeout *= 2;
            self.drive(n);
            return;
        }
        let state = &self.nodes[n].state;
        if state.members().is_retired(node_id(m)) {
            self.begun_change = Some(n);
            self.change_members(n, members.becoming(left));
            return;
        }
        let served = state.services().find(|(_, service)| {
            let active = service.active();
            active.is_some_and(|active| active.node == node_id(m))
        });
        let to = left.iter().find(|to| self.plan.data[*to]);
        let command = match served.zip(to) {
            Some(((service, _), to)) => ClusterCommand::Move {
                service,
                to: node_id(to),
            },
            None => ClusterCommand::Members(MemberCommand::Retire { node: node_id(m) }),
        };
        self.propose(n, Queue::Calls, Command::Cluster(command), Then::Nothing);
    }

    /// Whether the leader `n` has heard of a node lately that has nearly all of its log.
    fn is_heard(&self, n: usize, of: usize) -> bool {
        let raft = &self.nodes[n].raft;
        let is_near = raft.matched[of] > 0 && raft.matched[of] + BEHIND_MAX >= raft.last();
        of == n || is_near && self.now - raft.answered[of] < SILENT_MAX
    }

    fn change_members(&mut self, n: usize, members: Members) {
        self.say(|_| format!("n{n}: {members:?}"));
        let term = self.nodes[n].raft.term;
        self.append(
            n,
            vec![Entry {
                term,
                proposed: None,
                members: Some(members),
            }],
        );
        self.replicate_all(n);
    }

    /// A membership gets into a node's log, before anybody else hears of it from there.
    pub(crate) fn membership_appended(&mut self, n: usize, index: u64, members: Members) {
        let counts = self.sabotage != Some(Sabotage::LateMembers);
        let node = &mut self.nodes[n];
        node.raft.members = (index, members);
        if counts {
            node.sole.appended(index, members.voter_ids());
        }
        self.look_whether_sole(n);
        if members.all().has(n) {
            self.begin_services(n);
        }
    }

    /// A majority has it.
    pub(crate) fn membership_applied(&mut self, n: usize, index: u64, members: Members) {
        let node = &mut self.nodes[n];
        node.raft.applied_members = (index, members);
        let was_sole = node.is_sole.get();
        node.sole.applied(index, members.voter_ids());
        self.look_whether_sole(n);
        if !was_sole && self.nodes[n].is_sole.get() {
            self.count("nodes that were left alone");
        }
        self.poll_all(n);
    }

    fn look_whether_sole(&mut self, n: usize) {
        let node = &self.nodes[n];
        node.is_sole.set(node.sole.is_sole());
        for s in 0..self.plan.services {
            self.check_gates(s);
        }
    }

    /// The log is read at the start: what it says of the members.
    pub(crate) fn read_members(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        node.sole = havenfs::cluster::sole::Sole::default();
        node.is_sole = Rc::default();
        let (index, applied) = node.raft.applied_members;
        node.sole.applied(index, applied.voter_ids());
        let (index, last) = node.raft.members;
        node.sole.appended(index, last.voter_ids());
        node.sole.begin(node_id(n));
        node.is_sole.set(node.sole.is_sole());
        if last.all().has(n) {
            self.begin_services(n);
        }
    }

    /// Whether a node would not be let in: it was removed, as far as `n` knows.
    pub(crate) fn is_removed(&self, n: usize, other: usize) -> bool {
        let node = &self.nodes[n];
        let is_member = node.raft.members.1.all().has(other);
        !is_member && node.state.members().is_retired(node_id(other))
    }

    /// It is told so, and ends for good.
    pub(crate) fn refused(&mut self, n: usize) {
        self.count("removed nodes that were told so");
        self.crash_node(n);
        self.nodes[n].is_out = true;
    }
}

/// Who was not heard of for so long counts for nothing.
const SILENT_MAX: u64 = 1000 * MS;
/// How many entries a node may lack that is going to vote.
const BEHIND_MAX: u64 = 20;
