//! The proposals of this node that are not applied yet, in order.
//!
//! A proposal stays here until its entry is applied on this very node, so its outcome is what this
//! node's state made of it, and a reader who knows the outcome finds it in the state. It is sent to
//! the leader, and when that one is lost, sent again to the next, with all that follow it; the
//! state tells the copies by their origin. So a proposal is carried out once, in its place in the
//! queue, or its node ends before.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::proposer::Unavailable;
use super::types::Proposed;
use crate::cluster::{Command, NodeId, Origin, Outcome, Queue};

/// What is done with an outcome.
pub(super) type Done = Box<dyn FnOnce(Result<Outcome, Unavailable>) + Send>;

/// All of them.
pub(super) struct Pending {
    /// 0 until this node knows its number; nothing is proposed before.
    node: AtomicU64,
    incarnation: u64,
    queues: Mutex<Queues>,
    /// How many there are.
    count: AtomicUsize,
    /// Told when something may be sent.
    changed: Notify,
}

#[derive(Default)]
struct Queues {
    calls: Waiting,
    leases: Waiting,
    closed: bool,
}

impl Queues {
    const fn of(&mut self, queue: Queue) -> &mut Waiting {
        match queue {
            Queue::Calls => &mut self.calls,
            Queue::Leases => &mut self.leases,
        }
    }
}

/// One queue.
#[derive(Default)]
struct Waiting {
    /// The number of the last proposal.
    last: u64,
    proposals: VecDeque<(Proposed, Done)>,
    /// How many of the first ones the present leader has been sent.
    sent: usize,
}

impl Pending {
    pub(super) fn new(incarnation: u64) -> Self {
        Self {
            node: AtomicU64::new(0),
            incarnation,
            queues: Mutex::default(),
            count: AtomicUsize::new(0),
            changed: Notify::new(),
        }
    }

    /// This node has a number now.
    pub(super) fn set_node(&self, node: u64) {
        self.node.store(node, Ordering::Release);
    }

    fn node(&self) -> NodeId {
        NodeId(self.node.load(Ordering::Acquire))
    }

    /// Whose proposals they are, in which life.
    pub(super) fn origin(&self) -> Origin {
        Origin {
            node: self.node(),
            incarnation: self.incarnation,
            ..Origin::default()
        }
    }

    /// How many proposals have no outcome yet.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Returns when something may be sent.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Puts a proposal at the end of its queue; gives it back if there are too many, or none are
    /// taken any more.
    pub(super) fn push(&self, queue: Queue, command: Command, done: Done) {
        let mut queues = self.lock();
        let refused = if queues.closed {
            Some(Unavailable::Stopped)
        } else if queues.of(queue).proposals.len() >= most(queue) {
            Some(Unavailable::Busy)
        } else {
            None
        };
        if let Some(refused) = refused {
            drop(queues);
            done(Err(refused));
            return;
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        let waiting = queues.of(queue);
        waiting.last += 1;
        let origin = Origin {
            node: self.node(),
            incarnation: self.incarnation,
            queue,
            number: waiting.last,
        };
        let proposed = Proposed {
            origin,
            command: Arc::new(command),
        };
        waiting.proposals.push_back((proposed, done));
        drop(queues);
        self.changed.notify_one();
    }

    /// Takes what is to be sent now, leases first; no more than [`SENT_MAX`] of a queue are under
    /// way, so that a lease never waits behind all the locks that are proposed.
    pub(super) fn to_send(&self, batch: &mut Vec<Proposed>) {
        let mut queues = self.lock();
        for queue in [Queue::Leases, Queue::Calls] {
            let waiting = queues.of(queue);
            let unsent = waiting.proposals.iter().skip(waiting.sent);
            let room = SENT_MAX.saturating_sub(waiting.sent);
            let before = batch.len();
            batch.extend(unsent.take(room).map(|(proposed, _)| proposed.clone()));
            waiting.sent += batch.len() - before;
        }
    }

    /// All that is here must be sent again: what the leader was sent may be lost.
    pub(super) fn send_again(&self) {
        let mut queues = self.lock();
        for queue in Queue::ALL {
            queues.of(queue).sent = 0;
        }
    }

    /// The entry of a proposal is applied: takes it out. None if it is not from this life of this
    /// node.
    pub(super) fn applied(&self, origin: &Origin) -> Option<Done> {
        if (origin.node, origin.incarnation) != (self.node(), self.incarnation) {
            return None;
        }
        let mut queues = self.lock();
        let waiting = queues.of(origin.queue);
        // Entries are applied in the order of their numbers, so it is the first one.
        let (first, _) = waiting.proposals.front()?;
        if first.origin.number != origin.number {
            return None;
        }
        let (_, done) = waiting.proposals.pop_front()?;
        let was_full = waiting.sent >= SENT_MAX;
        waiting.sent = waiting.sent.saturating_sub(1);
        let more = was_full && waiting.proposals.len() > waiting.sent;
        drop(queues);
        self.count.fetch_sub(1, Ordering::Relaxed);
        if more {
            self.changed.notify_one();
        }
        Some(done)
    }

    /// A snapshot has taken the place of entries: what they made of proposals up to this number is
    /// not known.
    pub(super) fn passed_over(&self, queue: Queue, number: u64) {
        loop {
            let mut queues = self.lock();
            let waiting = queues.of(queue);
            let passed = waiting.proposals.front();
            if passed.is_none_or(|(proposed, _)| proposed.origin.number > number) {
                return;
            }
            let passed = waiting.proposals.pop_front();
            waiting.sent = waiting.sent.saturating_sub(1);
            drop(queues);
            self.end(passed);
        }
    }

    /// Takes no further proposals.
    pub(super) fn close(&self) {
        self.lock().closed = true;
    }

    /// Answers all that are here, since nothing will become of them here any more.
    pub(super) fn give_up(&self) {
        self.close();
        for queue in Queue::ALL {
            loop {
                let first = self.lock().of(queue).proposals.pop_front();
                if first.is_none() {
                    break;
                }
                self.end(first);
            }
        }
    }

    fn end(&self, proposal: Option<(Proposed, Done)>) {
        if let Some((_, done)) = proposal {
            self.count.fetch_sub(1, Ordering::Relaxed);
            done(Err(Unavailable::Unknown));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Pending")
            .field("node", &self.node())
            .field("incarnation", &self.incarnation)
            .field("count", &self.count())
            .finish_non_exhaustive()
    }
}

/// How many proposals may be in a queue. Calls can't take the room of leases.
const fn most(queue: Queue) -> usize {
    match queue {
        Queue::Calls => super::PROPOSALS_MAX,
        Queue::Leases => LEASES_MAX,
    }
}

/// A lease has few renewals under way, and each service one assignment.
const LEASES_MAX: usize = 1024;
/// How many proposals of a queue the leader is sent before it has applied the first of them.
const SENT_MAX: usize = 2048;
