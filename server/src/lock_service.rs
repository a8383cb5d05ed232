//! The locks as the programs of this node see them: the replicated state to read, the way to
//! propose a change, and the order in which the calls of a host are proposed.
//!
//! A call is accepted under the epoch in force; a change that is proposed under an older one does
//! nothing, so what was accepted before a takeover can't take effect after it.
//!
//! There is one for each epoch that this node serves; its [gate](crate::gate) says whether it still
//! does.
//!
//! ```text
//!   the service is assigned ------> open ------------> begin: grants are delivered,
//!   to this node: epoch + 1,        (before anything          hosts are told of the restart,
//!   next NSM state                   listens)                 grace runs, if locks may be missing
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
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use havenfs_nlm::host::CallDigest;
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
use crate::clock;
use crate::cluster::{ClusterState, Command, Outcome, ServiceCommand, ServiceId, ServiceState};
use crate::config::{Announce, Reclaim, Settings};
use crate::fault::{Fault, is_planted};
use crate::gate::Gate;
pub use crate::host_calls::Callee;
use crate::host_calls::HostCalls;
use crate::net::mailbox::Sink;
use crate::raft::{Proposer, Unavailable};

/// The locks of the service.
#[derive(Debug)]
pub struct LockService {
    state: Arc<RwLock<ClusterState>>,
    proposer: Proposer,
    service: ServiceId,
    /// Until when this node serves, in one epoch.
    gate: Arc<Gate>,
    calls: Arc<HostCalls>,
    /// Where tasks are started.
    control: Handle,
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
    names: Arc<announcing::ServiceNames>,
    grace: Duration,
    limits: Limits,
    reclaim: Reclaim,
}

/// What an activation has started; ended when dropped.
#[derive(Debug)]
struct Serving {
    answers: mpsc::Sender<Answer>,
    telling: Telling,
    tasks: Vec<AbortHandle>,
}

/// The task that tells hosts of restarts; ended when dropped.
#[derive(Debug)]
struct Telling {
    to_tell: mpsc::Sender<(Target, NsmState)>,
    task: AbortHandle,
}

impl Drop for Telling {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// The replicated state of the service, for as long as this is held.
pub struct ServiceRead<'a> {
    state: RwLockReadGuard<'a, ClusterState>,
    service: ServiceId,
}

impl Deref for ServiceRead<'_> {
    type Target = ServiceState;

    fn deref(&self) -> &ServiceState {
        static NOTHING: LazyLock<ServiceState> = LazyLock::new(ServiceState::default);
        // It is there: a service is never removed, and this one was assigned.
        self.state.service(self.service).unwrap_or(&NOTHING)
    }
}

impl LockService {
    /// The locks of a service in the epoch of `gate`. Must run on the control runtime.
    pub fn new(
        settings: &Settings,
        service: ServiceId,
        gate: Arc<Gate>,
        state: Arc<RwLock<ClusterState>>,
        proposer: Proposer,
        calls: Arc<HostCalls>,
    ) -> Self {
        Self {
            state,
            proposer,
            service,
            gate,
            control: Handle::current(),
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
            names: Arc::new(announcing::ServiceNames::new(&settings.service_names)),
            grace: settings.grace,
            limits: settings.lock_limits,
            reclaim: settings.reclaim,
        }
    }

    /// Makes ready to take calls in an epoch in which all that was locked before still is.
    pub async fn open(&self) -> Result<(), Unavailable> {
        let (epoch, limits) = (self.gate.epoch(), self.limits);
        if *self.state().table().limits() != limits {
            self.ask(ServiceCommand::SetLimits { epoch, limits })
                .await?;
        }
        let lenient = self.reclaim == Reclaim::Lenient;
        if self.state().table().is_lenient() != lenient {
            self.ask(ServiceCommand::SetReclaims { epoch, lenient })
                .await?;
        }
        let state = self.state();
        let nsm_state = state.nsm_state().0;
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
        self.look_for_refusals();
        Ok(())
    }

    /// Hosts that are told from now on hear of these names.
    pub fn set_names(&self, configured: &[String]) {
        self.names.set(configured);
    }

    /// Proposes a change of the service and waits for its outcome.
    pub async fn ask(&self, command: ServiceCommand) -> Result<Outcome, Unavailable> {
        self.proposer
            .ask(Command::Service(self.service, command))
            .await
    }

    /// Proposes a change of the service.
    fn propose_change(
        &self,
        command: ServiceCommand,
        done: impl FnOnce(Result<Outcome, Unavailable>) + Send + 'static,
    ) {
        self.proposer
            .propose(Command::Service(self.service, command), done);
    }

    /// Starts what an epoch brings with it, and ends what was started before. Called
    /// when NLM and NSM answer, since hosts come back with reclaims as soon as they are told.
    pub fn begin(self: &Arc<Self>) {
        let epoch = self.gate.epoch();
        let in_grace = self.state().in_grace();
        let (answers, answers_taken) = mpsc::channel(ANSWERS_MAX);
        let calls = Arc::clone(&self.calls);
        let granting = granting::run(Arc::clone(self), calls, epoch, answers_taken);
        let mut tasks = vec![self.control.spawn(granting).abort_handle()];
        if in_grace {
            tracing::warn!(
                seconds = self.grace.as_secs(),
                "locks may be missing: only what hosts held before is granted until grace is over"
            );
            let (locks, grace) = (Arc::clone(self), self.grace);
            let waiting = async move {
                tokio::time::sleep(grace).await;
                locks.end_grace_for_sure().await;
            };
            tasks.push(self.control.spawn(waiting).abort_handle());
        }
        *self.serving() = Some(Serving {
            answers,
            telling: self.start_telling(),
            tasks,
        });
    }

    /// Tells all hosts that want to hear of it of the state that the service has now.
    fn start_telling(self: &Arc<Self>) -> Telling {
        let nsm_state = self.state().nsm_state();
        let (to_tell, to_tell_taken) = mpsc::channel(ANSWERS_MAX);
        let telling = announcing::run(
            Arc::clone(&self.calls),
            Arc::clone(&self.names),
            nsm_state,
            announcing::targets(self, self.announce),
            Arc::clone(&self.announcements),
            to_tell_taken,
        );
        let task = self.control.spawn(telling).abort_handle();
        Telling { to_tell, task }
    }

    /// The change that does for hosts what a restart does, without one: a new state, and they are
    /// told (SM_SIMU_CRASH). The epoch goes on, and so does who delivers its grants: another one
    /// would not know what was sent before. `reply` is appended once it is done.
    pub fn simulated_crash(
        self: &Arc<Self>,
        reply: impl FnOnce(&mut Writer<'_>) + Send + 'static,
    ) -> Proposal {
        let locks = Arc::clone(self);
        let answer = move |_: Outcome, writer: &mut Writer<'_>| {
            locks.reclaims.clear();
            if let Some(serving) = &mut *locks.serving() {
                // First: it would send the old number to those who are to hear of the new one.
                serving.telling.task.abort();
                serving.telling = locks.start_telling();
            }
            reply(writer);
            true
        };
        Proposal {
            command: ServiceCommand::RaiseNsmState {
                epoch: self.gate.epoch(),
                unix_seconds: unix_seconds().into(),
            },
            answer: Box::new(answer),
        }
    }

    /// The epoch in which this node serves, if it does.
    pub fn epoch(&self) -> Option<u32> {
        self.gate.admits().then(|| self.gate.epoch())
    }

    /// The replicated state. What waits for this to be dropped is every change of locks.
    pub fn state(&self) -> ServiceRead<'_> {
        ServiceRead {
            state: self.state.read().unwrap_or_else(PoisonError::into_inner),
            service: self.service,
        }
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
        let forgets = is_planted(Fault::ForgetGrant) || is_planted(Fault::ForgetEachGrant);
        let forgotten = forgets.then(|| command.clone());
        self.propose_change(command, move |outcome| {
            // After the lease nobody is answered: another node may have gone on meanwhile.
            let outcome = outcome.ok().filter(|_| locks.gate.admits());
            let Some(outcome) = outcome else {
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

    /// Ends what [`LockService::begin`] has started.
    pub fn end(&self) {
        *self.serving() = None;
    }

    /// Which locks were reclaimed since the last restart.
    pub const fn reclaims(&self) -> &Reclaims {
        &self.reclaims
    }

    /// Notes that a host reclaimed locks that the table has, with this call.
    pub fn note_reclaim(&self, call: CallDigest, ids: &[LockId], table: &LockTable) {
        self.counters.reclaims_granted.add(1);
        self.reclaims.note(call, ids, table);
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

/// The wall clock as the lock table has it, in seconds since 1970.
pub fn unix_seconds() -> u32 {
    clock::unix_seconds() as u32
}

/// What a reply of NLM usually holds.
const REPLY_BYTES: usize = 128;
/// Answers of hosts that may wait to be looked at.
const ANSWERS_MAX: usize = 4096;
