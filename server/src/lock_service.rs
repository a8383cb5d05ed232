//! The locks as the programs of this node see them: the replicated state to read, the way to
//! propose a change, and the order in which the calls of a host are proposed.
//!
//! A call is accepted under the epoch in force; a change that is proposed under an older one does
//! nothing, so what was accepted before a takeover can't take effect after it.
//!
//! ```text
//!   activate: epoch + 1, next NSM state -----> begin: grants are delivered,
//!   (before anything listens)                         hosts are told of the restart,
//!                                                     grace runs, if locks may be missing
//! ```

mod announcing;
mod granting;
mod lanes;
mod result_calls;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use havenfs_nsm::notifier::{Progress, Target};
use havenfs_rpc::record::{begin_record, end_record};
use havenfs_rpc::xdr::Writer;
use tokio::sync::{Notify, mpsc};

use self::announcing::Announcements;
pub use self::granting::Answer;
pub use self::lanes::Lane;
use self::lanes::Lanes;
pub use self::result_calls::{ResultCall, ResultCalls};
use crate::call::Proposal;
use crate::cluster::state::Activation;
use crate::cluster::{ClusterState, Command, Outcome};
use crate::config::Settings;
pub use crate::host_calls::Callee;
use crate::host_calls::HostCalls;
use crate::net::mailbox::Sink;
use crate::raft::{Proposer, Unavailable};
use crate::random::random_u64;

/// The locks of the service.
#[derive(Debug)]
pub struct LockService {
    state: Arc<RwLock<ClusterState>>,
    proposer: Proposer,
    calls: Arc<HostCalls>,
    /// The epoch in which this node serves; 0 before it does.
    epoch: AtomicU32,
    lanes: Lanes,
    /// Told when the table has new grants.
    granted: Notify,
    /// The newest grant that was told so.
    last_grant: AtomicU64,
    answers: mpsc::Sender<Answer>,
    to_tell: mpsc::Sender<Target>,
    result_calls: ResultCalls,
    announcements: Arc<Announcements>,
    inbox: Mutex<Option<Inbox>>,
}

/// What the tasks of an activation read from.
#[derive(Debug)]
struct Inbox {
    answers: mpsc::Receiver<Answer>,
    to_tell: mpsc::Receiver<Target>,
    result_calls: mpsc::Receiver<ResultCall>,
}

impl LockService {
    /// Makes the service of a node that does not serve yet.
    pub fn new(
        state: Arc<RwLock<ClusterState>>,
        proposer: Proposer,
        calls: Arc<HostCalls>,
    ) -> Self {
        let (answers, answers_taken) = mpsc::channel(ANSWERS_MAX);
        let (to_tell, to_tell_taken) = mpsc::channel(ANSWERS_MAX);
        let (result_calls, result_calls_taken) = ResultCalls::new();
        Self {
            state,
            proposer,
            calls,
            epoch: AtomicU32::new(0),
            lanes: Lanes::default(),
            granted: Notify::new(),
            last_grant: AtomicU64::new(0),
            answers,
            to_tell,
            result_calls,
            announcements: Arc::default(),
            inbox: Mutex::new(Some(Inbox {
                answers: answers_taken,
                to_tell: to_tell_taken,
                result_calls: result_calls_taken,
            })),
        }
    }

    /// Begins to serve in a new epoch, in which all that was locked before still is. `recover`:
    /// locks may be missing.
    pub async fn activate(&self, recover: bool) -> Result<(), Unavailable> {
        let activation = Activation {
            incarnation: random_u64(),
            unix_seconds: unix_seconds().into(),
            recover,
        };
        self.proposer.ask(Command::Activate(activation)).await?;
        let (epoch, nsm_state, locks) = {
            let state = self.state();
            (state.epoch(), state.nsm_state(), state.table().lock_count())
        };
        self.epoch.store(epoch, Ordering::Release);
        tracing::info!(epoch, nsm_state = nsm_state.0, locks, "serving");
        Ok(())
    }

    /// Starts what an activation brings with it, on the current runtime: called once, when NLM and
    /// NSM answer, since hosts come back with reclaims as soon as they are told.
    pub fn begin(self: &Arc<Self>, settings: &Settings) {
        let inbox = self
            .inbox
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let (Some(inbox), Some(epoch)) = (inbox, self.epoch()) else {
            return;
        };
        let (nsm_state, in_grace) = {
            let state = self.state();
            (state.nsm_state(), state.in_grace())
        };
        let calls = || Arc::clone(&self.calls);
        let granting = granting::run(Arc::clone(self), calls(), epoch, inbox.answers);
        tokio::spawn(granting);
        tokio::spawn(result_calls::run(calls(), inbox.result_calls));
        let first = announcing::targets(self, settings.announce);
        let names = announcing::names(&settings.service_names);
        let progress = Arc::clone(&self.announcements);
        let telling = announcing::run(calls(), names, nsm_state, first, progress, inbox.to_tell);
        tokio::spawn(telling);
        if in_grace {
            let (locks, grace) = (Arc::clone(self), settings.grace);
            tracing::warn!(
                seconds = grace.as_secs(),
                "locks may be missing: only what hosts held before is granted until grace is over"
            );
            tokio::spawn(async move {
                tokio::time::sleep(grace).await;
                if let Err(error) = locks.end_grace("its time is over").await {
                    tracing::error!(%error, "cannot end grace");
                }
            });
        }
    }

    /// Ends grace; returns what to say about it.
    pub async fn end_grace(&self, why: &'static str) -> Result<String, Unavailable> {
        let Some(epoch) = self.epoch() else {
            return Err(Unavailable::Stopped);
        };
        let now = unix_seconds();
        let outcome = self.proposer.ask(Command::EndGrace { epoch, now }).await?;
        self.look_for_grants(&outcome);
        Ok(match outcome {
            Outcome::Freed(freed) => {
                tracing::info!(why, lapsed = freed.locks, "grace is over");
                format!("grace is over; {} locks were not reclaimed", freed.locks)
            }
            _ => "there is no grace to end".to_owned(),
        })
    }

    /// The epoch in which this node serves, if it does.
    pub fn epoch(&self) -> Option<u32> {
        Some(self.epoch.load(Ordering::Acquire)).filter(|epoch| *epoch != 0)
    }

    /// The replicated state. What waits for this to be dropped is every change of locks.
    pub fn state(&self) -> RwLockReadGuard<'_, ClusterState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a host's answer to GRANTED_MSG. One too many is lost, as a message may be: the host is
    /// told again.
    pub fn answered(&self, answer: Answer) {
        let _ = self.answers.try_send(answer);
    }

    /// Tells a host of the last restart once more; returns under how many addresses of ours it is
    /// known.
    pub fn tell_again(&self, host: IpAddr) -> usize {
        let targets: BTreeSet<Target> = {
            let state = self.state();
            let hosts = state.table().monitored_hosts(true);
            let hosts = hosts.filter(|key| key.address == host);
            hosts.map(announcing::target).collect()
        };
        // What does not fit is told when asked for again.
        let told = targets
            .iter()
            .filter(|target| self.to_tell.try_send(**target).is_ok());
        told.count()
    }

    /// The way back to hosts that made asynchronous calls.
    pub fn result_calls(&self) -> ResultCalls {
        self.result_calls.clone()
    }

    /// How far the hosts were told of the restart.
    pub fn announcements(&self) -> Vec<(Target, Progress)> {
        self.announcements.progress()
    }

    /// Returns when the table may have new grants.
    async fn granted(&self) {
        self.granted.notified().await;
    }

    /// Proposes what a call asks for, and sends the reply that follows from its outcome. A change
    /// whose fate is unknown is not answered: the host asks again.
    fn propose(self: &Arc<Self>, proposal: Proposal, sink: Sink) {
        let Proposal { command, answer } = proposal;
        let locks = Arc::clone(self);
        self.proposer.propose(command, move |outcome| {
            let Ok(outcome) = outcome else { return };
            locks.look_for_grants(&outcome);
            let mut out = Vec::with_capacity(REPLY_BYTES);
            let start = begin_record(&mut out);
            if answer(outcome, &mut Writer::new(&mut out)) {
                end_record(&mut out, start);
                if let Some(tell) = sink.send(out) {
                    tell.tell();
                }
            }
        });
    }

    /// Wakes the delivery of grants if a change has made some.
    fn look_for_grants(&self, outcome: &Outcome) {
        if matches!(outcome, Outcome::EarlierEpoch | Outcome::Grace) {
            return;
        }
        let newest = self.state().table().last_grant();
        if self.last_grant.swap(newest, Ordering::AcqRel) != newest {
            self.granted.notify_one();
        }
    }
}

/// The wall clock, in seconds since 1970, for people to read.
pub fn unix_seconds() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs() as u32)
}

/// What a reply of NLM usually holds.
const REPLY_BYTES: usize = 128;
/// Answers of hosts that may wait to be looked at.
const ANSWERS_MAX: usize = 4096;
