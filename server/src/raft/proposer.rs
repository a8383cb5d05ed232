//! Proposing: from any thread into the log, and the outcome back.
//!
//! A proposal never waits for room: at most [`PROPOSALS_MAX`] are under way, and further ones are
//! refused. One task hands them to the engine, as many as are waiting each time it runs.

use std::sync::Arc;

use openraft::error::ClientWriteError;
use openraft::raft::ClientWriteResult;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::Engine;
use super::log::Shared;
use super::machine::Snapshots;
use super::types::{Proposed, Reply, Types};
use crate::cluster::{Command, Outcome};

/// How many proposals may be under way, from being proposed to being answered.
pub const PROPOSALS_MAX: usize = 16_384;
/// How many the driver takes at a time.
const BATCH_MAX: usize = 256;

/// Why a proposal has no outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// Too many proposals are under way. It was not proposed.
    #[error("{PROPOSALS_MAX} proposals are waiting for the store")]
    Busy,
    /// Another node leads. It was not proposed.
    #[error("another node leads the cluster, or none does")]
    NotLeader,
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
    queue: mpsc::Sender<Proposal>,
    log: Arc<Shared>,
}

type Written = ClientWriteResult<Types>;

struct Proposal {
    command: Proposed,
    reply: Reply<Written>,
}

impl std::fmt::Debug for Proposal {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.command.fmt(out)
    }
}

impl Proposer {
    /// Proposes a command, from any thread. Never waits.
    ///
    /// `done` runs once: with the outcome, on the thread of consensus and in the order of the log,
    /// when the command is durable and applied; or with the reason why there is none, on whatever
    /// thread finds out, the caller's included. It must not wait.
    pub fn propose(
        &self,
        command: Command,
        done: impl FnOnce(Result<Outcome, Unavailable>) + Send + 'static,
    ) {
        if self.log.begin_proposal() > PROPOSALS_MAX {
            self.log.end_proposal();
            done(Err(Unavailable::Busy));
            return;
        }
        let log = Arc::clone(&self.log);
        let reply = Reply::new(move |written: Result<Written, Unavailable>| {
            log.end_proposal();
            done(outcome(written));
        });
        let command = Proposed(Arc::new(command));
        if let Err(refused) = self.queue.try_send(Proposal { command, reply }) {
            refused.into_inner().reply.refuse();
        }
    }

    /// Whether nothing is under way. Asked by a `done`, it tells that it is the only one.
    pub fn is_idle(&self) -> bool {
        self.log.proposals() == 0
    }

    /// Proposes a command and waits for its outcome.
    pub async fn ask(&self, command: Command) -> Result<Outcome, Unavailable> {
        let (tell, told) = oneshot::channel();
        self.propose(command, move |result| {
            // Whoever asked may have given up.
            let _ = tell.send(result);
        });
        told.await.unwrap_or(Err(Unavailable::Unknown))
    }
}

fn outcome(written: Result<Written, Unavailable>) -> Result<Outcome, Unavailable> {
    match written? {
        // Entries without an outcome are not proposed here.
        Ok(response) => response.data.0.ok_or(Unavailable::Unknown),
        Err(ClientWriteError::ForwardToLeader(_)) => Err(Unavailable::NotLeader),
        Err(
            ClientWriteError::LogEntryDiscarded(_)
            | ClientWriteError::ChangeMembershipError(_)
            | ClientWriteError::PreconditionFailed(_),
        ) => Err(Unavailable::Unknown),
    }
}

/// The task that hands proposals to the engine.
#[derive(Debug)]
pub(super) struct Driver {
    proposer: Proposer,
    stop: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Driver {
    /// Starts it on the current runtime.
    pub(super) fn start(engine: Engine, snapshots: Arc<Snapshots>, log: Arc<Shared>) -> Self {
        // Never full, since the proposals under way are counted.
        let (queue, proposals) = mpsc::channel(PROPOSALS_MAX);
        let stop = Arc::new(Notify::new());
        let task = tokio::spawn(drive(engine, snapshots, proposals, Arc::clone(&stop)));
        Self {
            proposer: Proposer { queue, log },
            stop,
            task,
        }
    }

    pub(super) fn proposer(&self) -> Proposer {
        self.proposer.clone()
    }

    /// Takes no further proposals and returns when those that were taken are answered.
    pub(super) async fn stop(&mut self) {
        self.stop.notify_one();
        // It fails only if the task has ended already.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn drive(
    engine: Engine,
    snapshots: Arc<Snapshots>,
    mut proposals: mpsc::Receiver<Proposal>,
    stop: Arc<Notify>,
) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    loop {
        tokio::select! {
            biased;
            () = stop.notified() => proposals.close(),
            // An error says that the engine has ended, which `Store::failed` reports.
            () = snapshots.due() => drop(engine.trigger().snapshot().await),
            taken = proposals.recv_many(&mut batch, BATCH_MAX) => {
                if taken == 0 {
                    break;
                }
                for Proposal { command, reply } in batch.drain(..) {
                    // If the engine has ended it drops the reply, and that answers.
                    drop(engine.client_write_ff(command, Some(reply)).await);
                }
            }
        }
    }
    // Answers come in the order of the log, so with this one all before it are given.
    drop(engine.write_blank().await);
}
