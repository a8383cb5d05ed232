//! A small Raft: terms, votes, entries that are appended before they are durable and durable before
//! they count, a leader that overwrites what was never committed, snapshots for who is far behind.
//!
//! It is honest about what leases depend on. An entry is seen where it is appended, committed or
//! not; it is committed when a majority has it on disk; each node applies it at a time of its own;
//! a crash takes what is not on disk, and a restart applies everything again once a leader says how
//! far it is committed. What openraft does beyond that (pre-vote, batches, flow control) is left
//! out; its effect is not: who has heard of a leader lately does not vote for another.

use std::rc::Rc;

use havenfs::cluster::lease::Moment;
use havenfs::cluster::placement::Seen;
use havenfs::cluster::{ClusterCommand, ClusterState, Command, NodeId, Origin, Queue};

use crate::checks::Broken;
use crate::clock::MS;
use crate::node::NodeEvent;
use crate::plan::NODES;
use crate::world::World;

/// A proposal in the log.
#[derive(Debug)]
pub(crate) struct Proposed {
    /// Which of all proposals; known to the simulation alone.
    pub(crate) id: u64,
    pub(crate) origin: Origin,
    pub(crate) command: Command,
}

/// An entry; without a proposal it only begins a term.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) term: u64,
    pub(crate) proposed: Option<Rc<Proposed>>,
}

/// The state at an index.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) state: ClusterState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Follower,
    Candidate,
    Leader,
}

/// What a node has of it.
#[derive(Debug)]
pub(crate) struct Raft {
    // On disk.
    pub(crate) term: u64,
    voted: Option<usize>,
    /// Entries up to this one are in the snapshot only.
    base: u64,
    base_term: u64,
    log: Vec<Entry>,
    /// The last entry that is durable.
    synced: u64,
    pub(crate) snapshot: Option<Rc<Snapshot>>,
    // In memory.
    pub(crate) role: Role,
    pub(crate) leader: Option<usize>,
    votes: u8,
    commit: u64,
    pub(crate) applied: u64,
    /// How far the log is known to be the leader's.
    verified: u64,
    next: [u64; NODES],
    matched: [u64; NODES],
    heard: u64,
    timeout: u64,
    /// Which write is under way.
    write: u64,
    is_writing: bool,
    is_applying: bool,
}

/// What nodes say to each other.
#[derive(Debug)]
pub(crate) enum Message {
    AskVote { term: u64, last: (u64, u64) },
    Vote { term: u64 },
    Append(Append),
    Appended { term: u64, matched: u64 },
    Behind { term: u64, last: u64 },
    Install { term: u64, snapshot: Rc<Snapshot> },
}

#[derive(Debug)]
pub(crate) struct Append {
    term: u64,
    prev: u64,
    prev_term: u64,
    entries: Vec<Entry>,
    commit: u64,
}

impl Raft {
    pub(crate) const fn new() -> Self {
        Self {
            term: 0,
            voted: None,
            base: 0,
            base_term: 0,
            log: Vec::new(),
            synced: 0,
            snapshot: None,
            role: Role::Follower,
            leader: None,
            votes: 0,
            commit: 0,
            applied: 0,
            verified: 0,
            next: [1; NODES],
            matched: [0; NODES],
            heard: 0,
            timeout: 0,
            write: 0,
            is_writing: false,
            is_applying: false,
        }
    }

    /// The last index.
    pub(crate) const fn last(&self) -> u64 {
        self.base + self.log.len() as u64
    }

    fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.base {
            return Some(self.base_term);
        }
        self.entry(index).map(|entry| entry.term)
    }

    fn entry(&self, index: u64) -> Option<&Entry> {
        self.log.get(index.checked_sub(self.base + 1)? as usize)
    }

    fn last_id(&self) -> (u64, u64) {
        (self.term_at(self.last()).unwrap_or(0), self.last())
    }

    /// Entries that are durable, for whoever reads the log at a start.
    pub(crate) fn durable(&self) -> impl Iterator<Item = &Entry> {
        let count = self.synced.saturating_sub(self.base) as usize;
        self.log.iter().take(count)
    }

    /// The process ends: what is not durable is gone.
    pub(crate) fn crash(&mut self) {
        let kept = self.synced.saturating_sub(self.base) as usize;
        self.log.truncate(kept);
        let of_snapshot = self.snapshot.as_ref().map_or(0, |s| s.index);
        let durable = Self {
            term: self.term,
            voted: self.voted,
            base: self.base,
            base_term: self.base_term,
            log: std::mem::take(&mut self.log),
            synced: self.synced.max(self.base),
            snapshot: self.snapshot.take(),
            commit: of_snapshot,
            applied: of_snapshot,
            write: self.write + 1,
            ..Self::new()
        };
        *self = durable;
    }

    /// Takes back everything behind an index.
    fn truncate(&mut self, index: u64) {
        self.log.truncate((index - self.base) as usize);
        self.synced = self.synced.min(index);
        self.verified = self.verified.min(index);
        self.write += 1;
        self.is_writing = false;
    }
}

impl World {
    fn step_down(&mut self, n: usize, term: u64) {
        let raft = &mut self.nodes[n].raft;
        if term > raft.term {
            raft.term = term;
            raft.voted = None;
        }
        raft.role = Role::Follower;
        raft.leader = None;
        raft.verified = 0;
    }

    /// The process begins: it listens for a leader first.
    pub(crate) fn begin_raft(&mut self, n: usize) {
        self.heard(n);
        let timeout = self.nodes[n].raft.timeout;
        self.node_after(n, timeout, NodeEvent::Election);
    }

    fn heard(&mut self, n: usize) {
        let timeout = self.between(ELECTION_MIN, ELECTION_MAX);
        let raft = &mut self.nodes[n].raft;
        raft.heard = self.now;
        raft.timeout = timeout;
    }

    pub(crate) fn election(&mut self, n: usize) {
        let raft = &self.nodes[n].raft;
        let due = raft.heard + raft.timeout;
        if raft.role != Role::Leader && due <= self.now && !self.nodes[n].is_wiped {
            self.campaign(n);
        }
        let raft = &self.nodes[n].raft;
        let again = (raft.heard + raft.timeout).saturating_sub(self.now);
        self.node_after(n, again.max(10 * MS), NodeEvent::Election);
    }

    fn campaign(&mut self, n: usize) {
        let term = self.nodes[n].raft.term + 1;
        self.step_down(n, term);
        self.heard(n);
        let raft = &mut self.nodes[n].raft;
        raft.role = Role::Candidate;
        raft.voted = Some(n);
        raft.votes = 1 << n;
        let last = raft.last_id();
        self.say(|_| format!("n{n} asks for votes in term {term}"));
        for to in others(n) {
            self.send(n, to, Message::AskVote { term, last });
        }
        self.drive(n);
    }

    pub(crate) fn send(&mut self, from: usize, to: usize, message: Message) {
        if let Some(after) = self.way(from, to) {
            self.node_after(to, after, NodeEvent::Message(from, message));
        }
    }

    pub(crate) fn message(&mut self, n: usize, from: usize, message: Message) {
        if self.nodes[n].is_wiped || self.nodes[from].is_wiped {
            // The number is known, and the store's id is another one.
            return;
        }
        let before = self.leadership(n);
        match message {
            Message::AskVote { term, last } => self.ask_vote(n, from, term, last),
            Message::Vote { term } => {
                let raft = &mut self.nodes[n].raft;
                if raft.role == Role::Candidate && term == raft.term {
                    raft.votes |= 1 << from;
                    if raft.votes.count_ones() as usize >= MAJORITY {
                        self.lead(n);
                    }
                }
            }
            Message::Append(append) => self.append_of(n, from, append),
            Message::Appended { term, matched } => {
                let raft = &mut self.nodes[n].raft;
                if raft.role == Role::Leader && term == raft.term {
                    raft.heard = self.now;
                    raft.matched[from] = raft.matched[from].max(matched);
                    raft.next[from] = raft.next[from].max(matched + 1);
                    self.advance(n);
                } else if term > raft.term {
                    self.step_down(n, term);
                }
            }
            Message::Behind { term, last } => {
                let raft = &mut self.nodes[n].raft;
                if term > raft.term {
                    self.step_down(n, term);
                } else if raft.role == Role::Leader && term == raft.term {
                    raft.next[from] = last.max(raft.matched[from]) + 1;
                    self.replicate(n, from);
                }
            }
            Message::Install { term, snapshot } => self.install(n, from, term, &snapshot),
        }
        if self.leadership(n) != before {
            self.drive(n);
        }
    }

    /// Who leads as far as a node knows, and in which term.
    pub(crate) fn leadership(&self, n: usize) -> (Option<usize>, u64) {
        let raft = &self.nodes[n].raft;
        (raft.leader, raft.term)
    }

    fn ask_vote(&mut self, n: usize, from: usize, term: u64, last: (u64, u64)) {
        let raft = &self.nodes[n].raft;
        let has_leader = raft.leader.is_some() && self.now - raft.heard < ELECTION_MIN;
        if has_leader || term < raft.term {
            return;
        }
        if term > raft.term {
            self.step_down(n, term);
        }
        let raft = &mut self.nodes[n].raft;
        if raft.voted.is_none_or(|voted| voted == from) && last >= raft.last_id() {
            raft.voted = Some(from);
            self.heard(n);
            self.send(n, from, Message::Vote { term });
        }
    }

    fn lead(&mut self, n: usize) {
        self.count("leaders");
        let raft = &mut self.nodes[n].raft;
        raft.role = Role::Leader;
        raft.leader = Some(n);
        raft.heard = self.now;
        raft.next = [raft.last() + 1; NODES];
        raft.matched = [0; NODES];
        let term = raft.term;
        self.say(|_| format!("n{n} leads in term {term}"));
        self.append(
            n,
            vec![Entry {
                term,
                proposed: None,
            }],
        );
        self.heartbeat(n, term);
    }

    pub(crate) fn heartbeat(&mut self, n: usize, term: u64) {
        let raft = &self.nodes[n].raft;
        if raft.role != Role::Leader || raft.term != term {
            return;
        }
        for to in others(n) {
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
    fn replicate(&mut self, n: usize, to: usize) {
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
        self.append(n, vec![Entry { term, proposed }]);
        for to in others(n) {
            self.replicate(n, to);
        }
    }

    /// Entries get into a node's log: here, and not first where they are applied, it sees renewals.
    fn append(&mut self, n: usize, entries: Vec<Entry>) {
        let now = self.local(n);
        let node = &mut self.nodes[n];
        for entry in entries {
            if let Some((node_id, seen)) = renewal_in(&entry, now) {
                node.seen.insert(node_id, seen);
            }
            node.raft.log.push(entry);
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
    fn advance(&mut self, n: usize) {
        let raft = &mut self.nodes[n].raft;
        raft.matched[n] = raft.synced;
        let mut matched = raft.matched;
        matched.sort_unstable();
        let commit = matched[NODES - MAJORITY];
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

    fn append_of(&mut self, n: usize, from: usize, append: Append) {
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

    fn install(&mut self, n: usize, from: usize, term: u64, snapshot: &Rc<Snapshot>) {
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
            self.snapshot_installed(n);
        }
        self.tell_leader(n);
        self.sync(n);
    }

    fn apply_soon(&mut self, n: usize) {
        let took = self.short_time();
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
        raft.log.drain(..(purged - raft.base) as usize);
        raft.base = purged;
        raft.synced = raft.synced.max(purged);
        raft.snapshot = Some(Rc::new(Snapshot {
            index,
            term,
            state: node.state.clone(),
        }));
    }
}

/// Whose renewal an entry has.
/// The renewal of a lease that an entry is, or has in it.
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

/// All nodes but one.
pub(crate) fn others(n: usize) -> impl Iterator<Item = usize> {
    (0..NODES).filter(move |other| *other != n)
}

/// The place of a queue.
pub(crate) const fn place(queue: Queue) -> usize {
    match queue {
        Queue::Calls => 0,
        Queue::Leases => 1,
    }
}

const MAJORITY: usize = NODES / 2 + 1;
const HEARTBEAT: u64 = 60 * MS;
const ELECTION_MIN: u64 = 200 * MS;
const ELECTION_MAX: u64 = 450 * MS;
