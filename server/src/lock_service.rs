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
mod connections;
mod counters;
mod granting;
mod lanes;
mod monitors;
mod operator;
mod planted;
mod reclaims;
mod result_calls;

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use havenfs_nlm::keys::FileKey;
use havenfs_nlm::limits::Limits;
use havenfs_nlm::listing::LockId;
use havenfs_nlm::suspicion::Suspicions;
use havenfs_nlm::table::{LockOutcome, LockTable};
use havenfs_nsm::notifier::{Progress, Target};
use havenfs_nsm::nsm_state::NsmState;
use havenfs_rpc::record::{begin_record, end_record};
use havenfs_rpc::xdr::Writer;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;

use self::announcing::Announcements;
pub use self::connections::{Entered, LockConnections, Sign};
pub use self::counters::LockCounters;
pub use self::granting::Answer;
pub use self::lanes::Lane;
use self::lanes::Lanes;
pub use self::monitors::{Monitor, Monitors};
pub use self::operator::Verified;
pub use self::reclaims::Reclaims;
pub use self::result_calls::{ResultCall, ResultCalls};
use crate::call::Proposal;
use crate::cluster::state::Activation;
use crate::cluster::{ClusterState, Command, Outcome};
use crate::config::{Announce, Settings};
use crate::fault::{Fault, is_planted};
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
    /// Where tasks are started.
    control: Handle,
    /// The epoch in which this node serves; 0 before it does.
    epoch: AtomicU32,
    lanes: Lanes,
    /// Told when the table has new grants.
    granted: Notify,
    /// The newest grant that was told so.
    last_grant: AtomicU64,
    /// How often something hinted at locks whose owners are gone, when that was told last.
    suspicions: Mutex<Suspicions>,
    /// Whether anybody's writes are refused.
    refusing: AtomicBool,
    reclaims: Reclaims,
    counters: Arc<LockCounters>,
    result_calls: ResultCalls,
    announcements: Arc<Announcements>,
    monitors: Monitors,
    serving: Mutex<Option<Serving>>,
    announce: Announce,
    names: Vec<String>,
    grace: Duration,
    limits: Limits,
}

/// What an activation has started; ended when dropped.
#[derive(Debug)]
struct Serving {
    answers: mpsc::Sender<Answer>,
    to_tell: mpsc::Sender<(Target, NsmState)>,
    tasks: Vec<AbortHandle>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl LockService {
    /// Makes the service of a node that does not serve yet. Must run on the control runtime.
    pub fn new(
        settings: &Settings,
        state: Arc<RwLock<ClusterState>>,
        proposer: Proposer,
        calls: Arc<HostCalls>,
    ) -> Self {
        Self {
            state,
            proposer,
            control: Handle::current(),
            epoch: AtomicU32::new(0),
            lanes: Lanes::default(),
            granted: Notify::new(),
            last_grant: AtomicU64::new(0),
            suspicions: Mutex::default(),
            refusing: AtomicBool::new(false),
            reclaims: Reclaims::default(),
            counters: Arc::default(),
            result_calls: ResultCalls::start(Arc::clone(&calls)),
            calls,
            announcements: Arc::default(),
            monitors: Monitors::default(),
            serving: Mutex::default(),
            announce: settings.announce,
            names: announcing::names(&settings.service_names),
            grace: settings.grace,
            limits: settings.lock_limits,
        }
    }

    /// Begins to serve in a new epoch, in which all that was locked before still is. `recover`:
    /// locks may be missing.
    pub async fn activate(&self, recover: bool) -> Result<(), Unavailable> {
        if self.state().epoch() == 0 && !recover {
            // An empty folder can't know whether it is new or lost.
            tracing::info!(
                "the store of locks is new, so nobody holds any; if this service ran before and \
                 its state directory was lost, stop it and start it once with --recover, so that \
                 clients can reclaim their locks before others take them"
            );
        }
        let command = Command::Activate(activation(recover));
        self.proposer.ask(command).await?;
        let (epoch, limits) = (self.state().epoch(), self.limits);
        if *self.state().table().limits() != limits {
            let command = Command::SetLimits { epoch, limits };
            self.proposer.ask(command).await?;
        }
        self.take_over();
        Ok(())
    }

    /// Takes calls under the epoch that was just begun.
    fn take_over(&self) {
        let state = self.state();
        let (epoch, nsm_state) = (state.epoch(), state.nsm_state().0);
        tracing::info!(
            epoch,
            nsm_state,
            locks = state.table().lock_count(),
            "serving"
        );
        *self
            .suspicions
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = state.table().suspicions();
        drop(state);
        self.reclaims.clear();
        self.look_for_refusals();
        self.epoch.store(epoch, Ordering::Release);
    }

    /// Starts what an activation brings with it, and ends what the one before had started. Called
    /// when NLM and NSM answer, since hosts come back with reclaims as soon as they are told.
    pub fn begin(self: &Arc<Self>) {
        let Some(epoch) = self.epoch() else { return };
        let (nsm_state, in_grace) = {
            let state = self.state();
            (state.nsm_state(), state.in_grace())
        };
        let calls = || Arc::clone(&self.calls);
        let (answers, answers_taken) = mpsc::channel(ANSWERS_MAX);
        let (to_tell, to_tell_taken) = mpsc::channel(ANSWERS_MAX);
        let granting = granting::run(Arc::clone(self), calls(), epoch, answers_taken);
        let telling = announcing::run(
            calls(),
            self.names.clone(),
            nsm_state,
            announcing::targets(self, self.announce),
            Arc::clone(&self.announcements),
            to_tell_taken,
        );
        let mut tasks = vec![
            self.control.spawn(granting).abort_handle(),
            self.control.spawn(telling).abort_handle(),
        ];
        if in_grace {
            tracing::warn!(
                seconds = self.grace.as_secs(),
                "locks may be missing: only what hosts held before is granted until grace is over"
            );
            let (locks, grace) = (Arc::clone(self), self.grace);
            let waiting = async move {
                tokio::time::sleep(grace).await;
                if let Err(error) = locks.end_grace("its time is over").await {
                    tracing::error!(%error, "cannot end grace");
                }
            };
            tasks.push(self.control.spawn(waiting).abort_handle());
        }
        *self.serving() = Some(Serving {
            answers,
            to_tell,
            tasks,
        });
    }

    /// The change that does what a restart does, without one: a new epoch and state, and hosts are
    /// told (SM_SIMU_CRASH). `reply` is appended once it is done.
    pub fn simulated_crash(
        self: &Arc<Self>,
        reply: impl FnOnce(&mut Writer<'_>) + Send + 'static,
    ) -> Proposal {
        let locks = Arc::clone(self);
        let answer = move |_: Outcome, writer: &mut Writer<'_>| {
            locks.take_over();
            locks.begin();
            reply(writer);
            true
        };
        Proposal {
            command: Command::Activate(activation(false)),
            answer: Box::new(answer),
        }
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
        if let Some(serving) = &*self.serving() {
            let _ = serving.answers.try_send(answer);
        }
    }

    /// Local programs that want to hear of reboots.
    pub const fn monitors(&self) -> &Monitors {
        &self.monitors
    }

    /// Passes a reboot on to the local programs that asked for it.
    pub fn pass_on(&self, mon_name: &[u8], address: IpAddr, state: i32) {
        for call in self.monitors.calls_for(mon_name, address, state) {
            self.result_calls.send(call);
        }
    }

    fn serving(&self) -> MutexGuard<'_, Option<Serving>> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
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
        let since = Instant::now();
        let forgotten = is_planted(Fault::ForgetGrant).then(|| command.clone());
        self.proposer.propose(command, move |outcome| {
            let Ok(outcome) = outcome else {
                locks.counters.changes_unknown.add(1);
                return;
            };
            if let Some(forgotten) = forgotten {
                planted::forget(&locks, forgotten, &outcome);
            }
            locks.counters.changed(since.elapsed());
            if let Outcome::Lock(LockOutcome::TooMany(limit)) = outcome {
                locks.counters.limit_hit(limit);
            }
            locks.look_at_table(&outcome);
            let mut out = Vec::with_capacity(REPLY_BYTES);
            let start = begin_record(&mut out);
            if answer(outcome, &mut Writer::new(&mut out)) {
                end_record(&mut out, start);
                // When more outcomes are coming, the connection's task sends several at a time.
                let tell = if locks.proposer.is_idle() {
                    sink.send_at_once(out)
                } else {
                    sink.send(out)
                };
                if let Some(tell) = tell {
                    tell.tell();
                }
            }
        });
    }

    /// Wakes the delivery of grants if a change has made some, and tells of new suspicions.
    fn look_at_table(&self, outcome: &Outcome) {
        if matches!(outcome, Outcome::EarlierEpoch | Outcome::Grace) {
            return;
        }
        let (newest, suspicions) = {
            let state = self.state();
            (state.table().last_grant(), state.table().suspicions())
        };
        if self.last_grant.swap(newest, Ordering::AcqRel) != newest {
            self.granted.notify_one();
        }
        let mut told = self
            .suspicions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let told = &mut *told;
        // Each kind is told once a process; how often is in the metrics.
        for (count, told, what) in [
            (
                suspicions.older_life,
                &mut told.older_life,
                "a host locks with a higher NSM state: it may have rebooted without a notice, and \
                 not know of its older locks",
            ),
            (
                suspicions.other_address,
                &mut told.other_address,
                "a lock owner came under another address: it can't unlock what it locked under the \
                 old one",
            ),
            (
                suspicions.doubtful_notice,
                &mut told.doubtful_notice,
                "a notice of a reboot is not believed, since an older connection of that host lives",
            ),
        ] {
            if count > *told {
                *told = u64::MAX;
                tracing::warn!(
                    "{what}; the locks stay, see `havenfs locks list`, `locks verify` and \
                     `locks break`"
                );
            }
        }
    }

    /// Counters of what happens to locks.
    pub const fn counters(&self) -> &Arc<LockCounters> {
        &self.counters
    }

    /// Which locks were reclaimed since the last restart.
    pub const fn reclaims(&self) -> &Reclaims {
        &self.reclaims
    }

    /// Notes that a host reclaimed locks that the table has.
    pub fn note_reclaim(&self, ids: &[LockId], table: &LockTable) {
        self.counters.reclaims_granted.add(1);
        self.reclaims.note(ids, table);
    }

    /// Whether a host may not write to a file now. `key` is asked for only if it matters.
    pub fn refuses_writes(&self, host: IpAddr, key: impl FnOnce() -> Option<FileKey>) -> bool {
        if !self.refusing.load(Ordering::Acquire) {
            return false;
        }
        let key = key();
        let refused = self.state().table().refuses_writes(host, key.as_ref());
        if refused {
            self.counters.writes_refused.add(1);
        }
        refused
    }

    fn look_for_refusals(&self) {
        let some = self.state().table().refused_writers().next().is_some();
        self.refusing.store(some, Ordering::Release);
    }
}

fn activation(recover: bool) -> Activation {
    Activation {
        incarnation: random_u64(),
        unix_seconds: unix_seconds().into(),
        recover,
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
