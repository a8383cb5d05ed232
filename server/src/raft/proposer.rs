//! Proposing: from any thread into the log, and the outcome back.
//!
//! A proposal never waits for room: at most [`PROPOSALS_MAX`] are under way, and further ones are
//! refused. One task hands them to whoever leads, as many as are waiting each time it runs; while
//! nobody leads they wait here, so that an election costs those who ask its time and no more.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;

use super::Engine;
use super::machine::Snapshots;
use super::peer::Peers;
use super::pending::Pending;
use super::route::{EngineEnded, Route};
use super::types::Proposed;
use crate::cluster::{Command, Outcome, Queue};

/// How many proposals may be under way, from being proposed to being answered.
pub const PROPOSALS_MAX: usize = 16_384;

/// Why a proposal has no outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// Too many proposals are under way. It was not proposed.
    #[error("{PROPOSALS_MAX} proposals are waiting for the store")]
    Busy,
    /// The store stops or has failed. It was not proposed.
    #[error("the store takes no proposals any more")]
    Stopped,
    /// It was proposed, and whether it is or will be committed can't be known.
    #[error("the store has stopped before the outcome was known")]
    Unknown,
}

/// Changes the replicated state. A handle: clones are alike.
#[derive(Debug, Clone)]
pub struct Proposer {
    pending: Arc<Pending>,
}

impl Proposer {
    pub(super) const fn new(pending: Arc<Pending>) -> Self {
        Self { pending }
    }

    /// Proposes a command, from any thread. Never waits.
    ///
    /// `done` runs once: with the outcome, on the thread of consensus and in the order of the log,
    /// when the command is durable and applied on this node; or with the reason why there is none,
    /// on whatever thread finds out, the caller's included. It must not wait.
    pub fn propose(
        &self,
        command: Command,
        done: impl FnOnce(Result<Outcome, Unavailable>) + Send + 'static,
    ) {
        self.propose_in(Queue::Calls, command, done);
    }

    /// As [`Proposer::propose`], in one of the queues.
    pub fn propose_in(
        &self,
        queue: Queue,
        command: Command,
        done: impl FnOnce(Result<Outcome, Unavailable>) + Send + 'static,
    ) {
        self.pending.push(queue, command, Box::new(done));
    }

    /// Whether nothing is under way. Asked by a `done`, it tells that it is the only one.
    pub fn is_idle(&self) -> bool {
        self.pending.count() == 0
    }

    /// Proposes a command and waits for its outcome.
    pub async fn ask(&self, command: Command) -> Result<Outcome, Unavailable> {
        self.ask_in(Queue::Calls, command).await
    }

    /// As [`Proposer::ask`], in one of the queues.
    pub async fn ask_in(&self, queue: Queue, command: Command) -> Result<Outcome, Unavailable> {
        let (tell, told) = oneshot::channel();
        self.propose_in(queue, command, move |result| {
            // Whoever asked may have given up.
            let _ = tell.send(result);
        });
        told.await.unwrap_or(Err(Unavailable::Unknown))
    }

    /// Proposes a command and waits for its outcome, on a thread that may wait. Not on that of
    /// consensus.
    pub fn ask_blocking(&self, command: Command) -> Result<Outcome, Unavailable> {
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        self.propose(command, move |result| {
            let _ = tell.send(result);
        });
        let result = told.recv_timeout(BLOCKING_TIME_MAX);
        result.unwrap_or(Err(Unavailable::Unknown))
    }
}

/// How long a thread is kept waiting for an outcome.
const BLOCKING_TIME_MAX: Duration = Duration::from_secs(10);

/// The task that hands proposals to the leader.
#[derive(Debug)]
pub(super) struct Driver {
    pending: Arc<Pending>,
    stop: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Driver {
    /// Starts it on the current runtime; `peers` are the other nodes, if there are any.
    pub(super) fn start(
        engine: Engine,
        snapshots: Arc<Snapshots>,
        pending: Arc<Pending>,
        peers: Option<Peers>,
    ) -> Self {
        let stop = Arc::new(Notify::new());
        let route = Route::new(engine.clone(), peers);
        let driving = drive(route, snapshots, Arc::clone(&pending), Arc::clone(&stop));
        Self {
            pending,
            stop,
            task: tokio::spawn(driving),
        }
    }

    pub(super) fn proposer(&self) -> Proposer {
        Proposer::new(Arc::clone(&self.pending))
    }

    /// Takes no further proposals and returns when those that were taken are answered, or can't be
    /// soon.
    pub(super) async fn stop(&mut self) {
        self.pending.close();
        self.stop.notify_one();
        // It fails only if the task has ended already.
        let _ = tokio::time::timeout(STOP_TIME_MAX, &mut self.task).await;
        self.pending.give_up();
    }
}

/// How long proposals may take at the end.
const STOP_TIME_MAX: Duration = Duration::from_millis(500);

impl Drop for Driver {
    fn drop(&mut self) {
        self.task.abort();
        self.pending.give_up();
    }
}

async fn drive(
    mut route: Route,
    snapshots: Arc<Snapshots>,
    pending: Arc<Pending>,
    stop: Arc<Notify>,
) {
    let engine = route.engine().clone();
    let mut batch: Vec<Proposed> = Vec::new();
    let mut stopping = false;
    loop {
        if route.find().await {
            // What the leader before was sent may be lost.
            pending.send_again();
        }
        if route.leads_somewhere() {
            pending.to_send(&mut batch);
            if let Err(EngineEnded) = route.send(&mut batch).await {
                // `Store::failed` reports it. Nobody is answered any more.
                return pending.give_up();
            }
        }
        if stopping && pending.count() == 0 {
            break;
        }
        tokio::select! {
            biased;
            () = stop.notified() => stopping = true,
            // An error says that the engine has ended, which `Store::failed` reports.
            () = snapshots.due() => drop(engine.trigger().snapshot().await),
            changed = route.changed() => if let Err(EngineEnded) = changed {
                return pending.give_up();
            },
            () = pending.changed() => {}
        }
    }
}
