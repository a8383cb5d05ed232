//! A small Raft: terms, votes, entries that are appended before they are durable and durable before
//! they count, a leader that overwrites what was never committed, snapshots for who is far behind.
//!
//! It is honest about what leases depend on. An entry is seen where it is appended, committed or
//! not; it is committed when a majority has it on disk; each node applies it at a time of its own;
//! a crash takes what is not on disk, and a restart applies everything again once a leader says how
//! far it is committed. What openraft does beyond that (pre-vote, batches, flow control) is left
//! out; its effect is not: who has heard of a leader lately does not vote for another.

use std::rc::Rc;

use havenfs::cluster::{ClusterState, Command, Origin, Queue};

use crate::clock::MS;
use crate::members::{Members, Set};
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

/// An entry; with neither a proposal nor a membership it only begins a term.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) term: u64,
    pub(crate) proposed: Option<Rc<Proposed>>,
    pub(crate) members: Option<Members>,
}

/// The state at an index.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) state: ClusterState,
    pub(crate) members: (u64, Members),
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
    pub(crate) voted: Option<usize>,
    /// Entries up to this one are in the snapshot only.
    pub(crate) base: u64,
    pub(crate) base_term: u64,
    /// The last membership up to there, and where it is.
    pub(crate) base_members: (u64, Members),
    pub(crate) log: Vec<Entry>,
    /// The last entry that is durable.
    pub(crate) synced: u64,
    pub(crate) snapshot: Option<Rc<Snapshot>>,
    // In memory.
    /// The last membership in the log, which counts, and the last that was applied.
    pub(crate) members: (u64, Members),
    pub(crate) applied_members: (u64, Members),
    pub(crate) role: Role,
    pub(crate) leader: Option<usize>,
    pub(crate) votes: Set,
    pub(crate) commit: u64,
    pub(crate) applied: u64,
    /// How far the log is known to be the leader's.
    pub(crate) verified: u64,
    pub(crate) next: [u64; NODES],
    pub(crate) matched: [u64; NODES],
    /// When each was heard of last.
    pub(crate) answered: [u64; NODES],
    pub(crate) heard: u64,
    pub(crate) timeout: u64,
    /// Which write is under way.
    pub(crate) write: u64,
    pub(crate) is_writing: bool,
    pub(crate) is_applying: bool,
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
    pub(crate) term: u64,
    pub(crate) prev: u64,
    pub(crate) prev_term: u64,
    pub(crate) entries: Vec<Entry>,
    pub(crate) commit: u64,
}

impl Raft {
    /// An empty disk; with the voters if a cluster is formed of it.
    pub(crate) const fn new(voters: Set) -> Self {
        let members = (0, Members::of(voters));
        Self {
            term: 0,
            voted: None,
            base: 0,
            base_term: 0,
            base_members: members,
            log: Vec::new(),
            synced: 0,
            snapshot: None,
            members,
            applied_members: members,
            role: Role::Follower,
            leader: None,
            votes: Set(0),
            commit: 0,
            applied: 0,
            verified: 0,
            next: [1; NODES],
            matched: [0; NODES],
            answered: [0; NODES],
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

    pub(crate) fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.base {
            return Some(self.base_term);
        }
        self.entry(index).map(|entry| entry.term)
    }

    pub(crate) fn entry(&self, index: u64) -> Option<&Entry> {
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
        let applied = self.snapshot.as_ref().map(|s| s.members);
        let durable = Self {
            term: self.term,
            voted: self.voted,
            base: self.base,
            base_term: self.base_term,
            base_members: self.base_members,
            applied_members: applied.unwrap_or(self.base_members),
            log: std::mem::take(&mut self.log),
            synced: self.synced.max(self.base),
            snapshot: self.snapshot.take(),
            commit: of_snapshot,
            applied: of_snapshot,
            write: self.write + 1,
            ..Self::new(Set(0))
        };
        *self = durable;
        self.find_members();
    }

    /// Takes back everything behind an index.
    pub(crate) fn truncate(&mut self, index: u64) {
        self.log.truncate((index - self.base) as usize);
        self.find_members();
        self.synced = self.synced.min(index);
        self.verified = self.verified.min(index);
        self.write += 1;
        self.is_writing = false;
    }

    /// Looks for the last membership in the log.
    pub(crate) fn find_members(&mut self) {
        let entries = (self.base + 1..).zip(&self.log);
        let memberships = entries.filter_map(|(index, entry)| Some((index, entry.members?)));
        self.members = memberships.last().unwrap_or(self.base_members);
    }
}

impl World {
    pub(crate) fn step_down(&mut self, n: usize, term: u64) {
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

    pub(crate) fn heard(&mut self, n: usize) {
        let timeout = self.between(ELECTION_MIN, ELECTION_MAX);
        let raft = &mut self.nodes[n].raft;
        raft.heard = self.now;
        raft.timeout = timeout;
    }

    pub(crate) fn election(&mut self, n: usize) {
        let raft = &self.nodes[n].raft;
        let due = raft.heard + raft.timeout;
        let is_voter = raft.members.1.voters().has(n);
        if raft.role != Role::Leader && due <= self.now && is_voter {
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
        raft.votes = Set(1 << n);
        let last = raft.last_id();
        self.say(|_| format!("n{n} asks for votes in term {term}"));
        for to in self.members_but(n) {
            self.send(n, to, Message::AskVote { term, last });
        }
        self.count_votes(n);
        self.drive(n);
    }

    pub(crate) fn send(&mut self, from: usize, to: usize, message: Message) {
        if let Some(after) = self.way(from, to) {
            self.node_after(to, after, NodeEvent::Message(from, message));
        }
    }

    pub(crate) fn message(&mut self, n: usize, from: usize, message: Message) {
        if self.nodes[n].is_out || self.nodes[from].is_out {
            // The number is known, and the store's id is another one.
            return;
        }
        if self.is_removed(n, from) {
            if let Some(after) = self.way(n, from) {
                self.node_after(from, after, NodeEvent::Refused);
            }
            return;
        }
        let before = self.leadership(n);
        match message {
            Message::AskVote { term, last } => self.ask_vote(n, from, term, last),
            Message::Vote { term } => {
                let raft = &mut self.nodes[n].raft;
                if raft.role == Role::Candidate && term == raft.term {
                    raft.votes = raft.votes.with(from);
                    self.count_votes(n);
                }
            }
            Message::Append(append) => self.append_of(n, from, append),
            Message::Appended { term, matched } => {
                let raft = &mut self.nodes[n].raft;
                if raft.role == Role::Leader && term == raft.term {
                    raft.heard = self.now;
                    raft.answered[from] = self.now;
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

    fn count_votes(&mut self, n: usize) {
        let raft = &self.nodes[n].raft;
        if raft.members.1.agree(raft.votes) {
            self.lead(n);
        }
    }

    /// All that are members as far as a node's log goes, but itself.
    pub(crate) fn members_but(&self, n: usize) -> impl Iterator<Item = usize> + use<> {
        self.nodes[n].raft.members.1.all().without(n).iter()
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
                members: None,
            }],
        );
        self.heartbeat(n, term);
    }
}

/// The place of a queue.
pub(crate) const fn place(queue: Queue) -> usize {
    match queue {
        Queue::Calls => 0,
        Queue::Leases => 1,
    }
}

pub(crate) const HEARTBEAT: u64 = 60 * MS;
const ELECTION_MIN: u64 = 200 * MS;
const ELECTION_MAX: u64 = 450 * MS;
