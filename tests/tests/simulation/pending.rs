//! The proposals of a node and their way to whoever leads: a model of `raft::pending` and
//! `raft::route`.
//!
//! Two queues, each in order; a proposal stays until its entry is applied here. What is sent on one
//! connection arrives in order or not at all; when the leader changes or the connection is lost,
//! everything is sent again.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use havenfs::cluster::{Command, NodeId, Origin, Outcome, Queue};

use crate::calls::ServedCall;
use crate::checks::Broken;
use crate::clock::MS;
use crate::node::NodeEvent;
use crate::raft::{Proposed, Role, place};
use crate::sabotage::Sabotage;
use crate::world::World;

/// What is done with an outcome.
#[derive(Debug)]
pub(crate) enum Then {
    /// It was the name of a service.
    Named { service: usize },
    /// It was this renewal.
    Renewed { seq: u64 },
    /// It was an assignment: of a step of a keeper.
    Taken { service: usize, step: u64, seq: u64 },
    /// It was a release.
    Released { service: usize, step: u64 },
    /// It was that a fence is needed.
    NeedNoted { service: usize, step: u64 },
    /// It was asked by a host.
    Answer(ServedCall),
    /// Nobody waits for it.
    Nothing,
}

/// One queue.
#[derive(Debug, Default)]
struct Waiting {
    last: u64,
    proposals: VecDeque<(Rc<Proposed>, Then)>,
    sent: usize,
}

/// Where proposals go.
#[derive(Debug)]
enum Way {
    Nowhere,
    Here,
    There {
        connection: u64,
        next: u64,
        /// When the last batch arrives, so that the next one does not overtake it.
        last_arrives: u64,
        is_lost: bool,
    },
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Pending {
    queues: [Waiting; Queue::ALL.len()],
    way: Way,
    /// Who led, and in which term, when the way was chosen.
    chosen: (Option<usize>, u64),
    /// As a leader: which batch comes next on each connection.
    expected: BTreeMap<u64, u64>,
}

/// A batch on its way to the leader of a term.
#[derive(Debug)]
pub(crate) struct Batch {
    from: usize,
    term: u64,
    connection: u64,
    number: u64,
    proposals: Vec<Rc<Proposed>>,
}

impl Pending {
    pub(crate) const fn new() -> Self {
        Self {
            queues: [const {
                Waiting {
                    last: 0,
                    proposals: VecDeque::new(),
                    sent: 0,
                }
            }; Queue::ALL.len()],
            way: Way::Nowhere,
            chosen: (None, 0),
            expected: BTreeMap::new(),
        }
    }

    fn take_unsent(&mut self) -> Vec<Rc<Proposed>> {
        let mut batch = Vec::new();
        for queue in [Queue::Leases, Queue::Calls] {
            let waiting = &mut self.queues[place(queue)];
            let unsent = waiting.proposals.iter().skip(waiting.sent);
            batch.extend(unsent.map(|(proposed, _)| Rc::clone(proposed)));
            waiting.sent = waiting.proposals.len();
        }
        batch
    }

    /// Takes out the proposal whose entry is applied.
    pub(crate) fn applied(&mut self, proposed: &Proposed) -> Option<Then> {
        let waiting = &mut self.queues[place(proposed.origin.queue)];
        let at = waiting
            .proposals
            .iter()
            .position(|(first, _)| first.id == proposed.id)?;
        waiting.sent = waiting.sent.saturating_sub(1);
        waiting.proposals.remove(at).map(|(_, then)| then)
    }

    /// Takes out what a snapshot passed over: nobody knows what became of it.
    pub(crate) fn passed_over(&mut self, queue: Queue, number: u64) -> Vec<Then> {
        let waiting = &mut self.queues[place(queue)];
        let mut passed = Vec::new();
        while let Some((first, _)) = waiting.proposals.front()
            && first.origin.number <= number
        {
            passed.extend(waiting.proposals.pop_front().map(|(_, then)| then));
            waiting.sent = waiting.sent.saturating_sub(1);
        }
        passed
    }
}

impl World {
    /// Proposes a command.
    pub(crate) fn propose(&mut self, n: usize, queue: Queue, command: Command, then: Then) {
        let id = self.number();
        let node = &mut self.nodes[n];
        let waiting = &mut node.pending.queues[place(queue)];
        waiting.last += 1;
        let origin = Origin {
            node: NodeId(n as u64 + 1),
            incarnation: node.life,
            queue,
            number: waiting.last,
        };
        let proposed = Rc::new(Proposed {
            id,
            origin,
            command,
        });
        waiting.proposals.push_back((proposed, then));
        self.drive(n);
    }

    /// Sends what may be sent, to whoever leads now.
    pub(crate) fn drive(&mut self, n: usize) {
        let leadership = self.leadership(n);
        let node = &mut self.nodes[n];
        let is_nowhere = matches!(node.pending.way, Way::Nowhere);
        if node.pending.chosen != leadership || is_nowhere && leadership.0.is_some() {
            node.pending.chosen = leadership;
            for waiting in &mut node.pending.queues {
                waiting.sent = 0;
            }
            let connection = self.number();
            self.nodes[n].pending.way = match leadership.0 {
                None => Way::Nowhere,
                Some(leader) if leader == n => Way::Here,
                Some(_) => Way::There {
                    connection,
                    next: 0,
                    last_arrives: self.now,
                    is_lost: false,
                },
            };
        }
        let Some(leader) = leadership.0 else { return };
        let batch = self.nodes[n].pending.take_unsent();
        if batch.is_empty() {
            return;
        }
        if leader == n {
            if self.nodes[n].raft.role == Role::Leader {
                for proposed in batch {
                    self.take_proposal(n, proposed);
                }
            }
            return;
        }
        let arrives = self.way(n, leader);
        let Way::There {
            connection,
            next,
            last_arrives,
            is_lost,
        } = &mut self.nodes[n].pending.way
        else {
            return;
        };
        let connection = *connection;
        let Some(after) = arrives.filter(|_| !*is_lost) else {
            // TCP tries for a while; then the connection is given up.
            if !std::mem::replace(is_lost, true) {
                let found_out = self.between(50, 400) * MS;
                self.node_after(n, found_out, NodeEvent::ConnectionLost(connection));
            }
            return;
        };
        *last_arrives = (self.now + after).max(*last_arrives);
        let (after, number) = (*last_arrives - self.now, *next);
        *next += 1;
        let batch = Batch {
            from: n,
            term: leadership.1,
            connection,
            number,
            proposals: batch,
        };
        // Whether the leader's process still lives then is not known here.
        self.node_after(leader, after, NodeEvent::Forwarded(batch));
        self.node_after(n, LOOK_AGAIN, NodeEvent::LookAtWay(connection));
    }

    /// The leader takes what another node sends it.
    pub(crate) fn forwarded(&mut self, n: usize, batch: Batch) {
        let raft = &self.nodes[n].raft;
        let leads = raft.role == Role::Leader && raft.term == batch.term;
        let expected = self.nodes[n].pending.expected.entry(batch.connection);
        let expected = expected.or_default();
        if !leads || *expected != batch.number {
            self.count("batches refused");
            let after = self.between(1, 30) * MS;
            let lost = NodeEvent::ConnectionLost(batch.connection);
            self.node_after(batch.from, after, lost);
            return;
        }
        *expected += 1;
        for proposed in batch.proposals {
            self.take_proposal(n, proposed);
        }
    }

    /// A connection to the leader is lost.
    pub(crate) fn connection_lost(&mut self, n: usize, lost: u64) {
        if let Way::There { connection, .. } = self.nodes[n].pending.way
            && connection == lost
        {
            self.nodes[n].pending.way = Way::Nowhere;
            self.node_after(n, ASK_AGAIN, NodeEvent::Drive);
        }
    }

    /// What was sent long ago and is not applied may have gone with the leader's process: its
    /// machine says so when it is asked.
    pub(crate) fn look_at_way(&mut self, n: usize, sent_on: u64) {
        let Way::There { connection, .. } = self.nodes[n].pending.way else {
            return;
        };
        let has_sent = self.nodes[n].pending.queues.iter().any(|w| w.sent > 0);
        let leader = self.nodes[n].pending.chosen.0;
        let has_ended = leader.is_some_and(|leader| !self.nodes[leader].is_up);
        if connection == sent_on && has_sent && has_ended {
            self.connection_lost(n, connection);
        }
    }

    /// An entry of this life of this node is applied.
    pub(crate) fn applied_here(
        &mut self,
        n: usize,
        proposed: &Proposed,
        outcome: Outcome,
    ) -> Option<(Then, Outcome)> {
        let node = &mut self.nodes[n];
        let is_own = proposed.origin.node == NodeId(n as u64 + 1)
            && proposed.origin.incarnation == node.life;
        if !is_own {
            return None;
        }
        let first = node.pending.queues[place(proposed.origin.queue)]
            .proposals
            .front();
        let in_order = first.is_some_and(|(first, _)| first.id == proposed.id);
        if !in_order && self.sabotage != Some(Sabotage::NoOrigins) {
            let id = proposed.id;
            self.broken(Broken::Twice, || {
                format!("proposal {id} of n{n} is carried out and is not the next in its queue")
            });
        }
        let then = self.nodes[n].pending.applied(proposed)?;
        Some((then, outcome))
    }
}

/// How soon a leader that did not take proposals is asked again.
const ASK_AGAIN: u64 = 20 * MS;
/// How soon the end of the leader's process is noticed.
const LOOK_AGAIN: u64 = 60 * MS;
