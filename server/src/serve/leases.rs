//! Renews this node's lease, and opens the gates of the services that it holds for as long.
//!
//! Runs on a thread of its own: a renewal that comes late takes all services of the node away, so
//! nothing else may be in its way. How long renewals take is kept for people, and told to the log
//! when it comes near the lease. What the lease is worth is decided in
//! [`cluster::lease`](crate::cluster::lease); here are the clock, the proposals and the gates.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;

use crate::clock::boot_time;
use crate::cluster::command::Renewal;
use crate::cluster::lease::{Lease, Moment};
use crate::cluster::renewal_times::RenewalTimes;
use crate::cluster::service::Active;
use crate::cluster::{ClusterCommand, Command, Outcome, Queue, ServiceId};
use crate::gate::Gate;
use crate::raft::{Cluster, Proposer};

/// The lease of this node, and what it holds.
#[derive(Debug)]
pub(super) struct Leases {
    proposer: Proposer,
    inner: Mutex<Inner>,
    /// How often the lease is renewed; never without a cluster.
    every: Option<Duration>,
    cluster: Cluster,
    lease: Duration,
    times: Arc<Mutex<RenewalTimes>>,
    /// When the thread last began a renewal, or would have.
    beat: AtomicU64,
}

#[derive(Debug)]
struct Inner {
    lease: Lease,
    gates: BTreeMap<ServiceId, Arc<Gate>>,
    /// When the first renewal was committed.
    joined: Option<Moment>,
    /// When it was last told that renewals are slow.
    warned: Option<Moment>,
}

impl Leases {
    /// The lease of this life of a node; `alone`: there is no cluster, and no lease to renew.
    /// `times`: where it is noted how long renewals take.
    pub(super) fn new(
        proposer: Proposer,
        cluster: Cluster,
        lease_ms: u32,
        alone: bool,
        times: Arc<Mutex<RenewalTimes>>,
    ) -> Self {
        let Active { node, incarnation } = cluster.own();
        let every = Duration::from_millis(u64::from(lease_ms / RENEWALS_PER_LEASE));
        Self {
            proposer,
            inner: Mutex::new(Inner {
                lease: Lease::new(node, incarnation, lease_ms),
                gates: BTreeMap::new(),
                joined: alone.then(boot_time),
                warned: None,
            }),
            every: (!alone).then_some(every),
            cluster,
            lease: Duration::from_millis(u64::from(lease_ms)),
            times,
            beat: AtomicU64::new(boot_time().0),
        }
    }

    /// Starts the thread that renews the lease; none if there is nothing to renew.
    pub(super) fn start(self: &Arc<Self>) -> io::Result<Option<Renewing>> {
        let Some(every) = self.every else {
            return Ok(None);
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()?;
        let (stop, stopped) = oneshot::channel();
        let leases = Arc::clone(self);
        let run = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = leases.renew_all_the_time(every) => {}
                    // An error says that the sender is gone, which means stop as well.
                    _ = stopped => {}
                }
            });
        };
        let thread = std::thread::Builder::new().name("lease".to_owned());
        Ok(Some(Renewing {
            _stop: stop,
            _thread: thread.spawn(run)?,
        }))
    }

    async fn renew_all_the_time(self: Arc<Self>, every: Duration) {
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.beat.store(boot_time().0, Ordering::Release);
            // Whoever is going to be a voter is a member before: the lease begins in time.
            if self.cluster.needs_no_lease() {
                self.lock().joined.get_or_insert_with(boot_time);
                continue;
            }
            let Some(renewal) = self.renewal() else {
                continue;
            };
            let (leases, seq) = (Arc::clone(&self), renewal.seq);
            let command = Command::Cluster(ClusterCommand::Renew(renewal));
            let done = move |outcome| match outcome {
                Ok(Outcome::Renewed(services)) => leases.renewed(seq, &services),
                _ => leases.lock().lease.dropped(seq),
            };
            self.proposer.propose_in(Queue::Leases, command, done);
        }
    }

    /// A renewal to be proposed at once, by itself or in an assignment.
    pub(super) fn renewal(&self) -> Option<Renewal> {
        // The clock first: what comes between is on the safe side.
        let now = boot_time();
        self.lock().lease.renew(now)
    }

    fn renewed(&self, seq: u64, services: &[(ServiceId, u32)]) {
        let mut inner = self.lock();
        if let Some(asked) = inner.lease.renewed(seq, services) {
            self.note_time(&mut inner, asked);
        }
        inner.joined.get_or_insert_with(boot_time);
        for (service, epoch) in services {
            inner.open(*service, *epoch);
        }
    }

    fn note_time(&self, inner: &mut Inner, asked: Moment) {
        let now = boot_time();
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        times.note(now.since(asked));
        let is_news = inner
            .warned
            .is_none_or(|warned| now.since(warned) >= WARN_AGAIN_AFTER);
        if is_news && times.are_slow(self.lease) {
            inner.warned = Some(now);
            tracing::warn!(
                p99_ms = times.p99().map_or(0, |p99| p99.as_millis()),
                lease_ms = self.lease.as_millis(),
                "renewals of the lease are slow: if they take longer than the lease, services stop\n\
                 hint: see the disks of the state directories and the network between the nodes, or \
                 raise lease_ms on all nodes"
            );
        }
    }

    /// Whether the thread that renews the lease lives, and gets its turn.
    pub(super) fn is_beating(&self) -> bool {
        let beat = Moment(self.beat.load(Ordering::Acquire));
        let silent = boot_time().since(beat);
        self.every
            .is_none_or(|every| silent < every.max(BEAT_MIN) * BEATS_MISSED_MAX)
    }

    /// A service is assigned to this node by a command with this renewal in it; returns its gate.
    pub(super) fn assigned(&self, service: ServiceId, epoch: u32, seq: u64) -> Arc<Gate> {
        let gate = Arc::new(Gate::in_cluster(epoch, self.cluster.sole()));
        let mut inner = self.lock();
        inner.lease.renewed(seq, &[(service, epoch)]);
        if let Some(before) = inner.gates.insert(service, Arc::clone(&gate)) {
            before.close();
        }
        if self.every.is_none() {
            gate.open_until(Moment::NEVER);
        }
        inner.open(service, epoch);
        gate
    }

    /// Nothing came of a renewal.
    pub(super) fn dropped(&self, seq: u64) {
        self.lock().lease.dropped(seq);
    }

    /// This node lets a service go, in that epoch for good.
    pub(super) fn let_go(&self, gate: &Arc<Gate>) {
        gate.close();
        let mut inner = self.lock();
        inner.gates.retain(|_, held| !Arc::ptr_eq(held, gate));
    }

    /// When this life of the node began to renew its lease; none if it has not yet.
    pub(super) fn joined(&self) -> Option<Moment> {
        self.lock().joined
    }

    /// Whether there is no cluster.
    pub(super) const fn is_alone(&self) -> bool {
        self.every.is_none()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn open(&self, service: ServiceId, epoch: u32) {
        let gate = self.gates.get(&service);
        let until = self.lease.until(service, epoch);
        if let Some((gate, until)) = gate.zip(until)
            && gate.epoch() == epoch
        {
            gate.open_until(until);
        }
    }
}

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Renewing {
    _stop: oneshot::Sender<()>,
    _thread: JoinHandle<()>,
}

/// How often it is told that renewals are slow.
const WARN_AGAIN_AFTER: Duration = Duration::from_mins(1);
/// The thread of the lease is taken for dead after so many beats that did not come, each of
/// `BEAT_MIN` at least.
const BEATS_MISSED_MAX: u32 = 5;
const BEAT_MIN: Duration = Duration::from_millis(200);
/// A lease outlives some renewals that come late or not at all.
const RENEWALS_PER_LEASE: u32 = 6;
