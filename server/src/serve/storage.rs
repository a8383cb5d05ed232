//! The storage of one service on this node, as far as it is the operator's commands that fence,
//! mount and unmount it: when each is run, and what its end means.
//!
//! ```text
//!           fence, for each             takeover                      release
//!   down ------------------> fenced --------------> up, ready --------------------> down
//!    ^    unfenced node, until           |       exports are opened    all is closed
//!    |    it succeeds or an              | failed
//!    |    operator confirms it           v
//!    +-------------- release ---------- up
//! ```
//!
//! Owns the commands that run. Does not open files, nor assign or release services: the
//! [keeper](super::keeper) asks here before it opens a service and before it proposes a release.
//!
//! Invariants:
//! - Nothing of the storage is touched in an epoch before every node that may still write to it is
//!   fenced: [`ServiceState::unfenced`](crate::cluster::ServiceState::unfenced), which outlives
//!   this node. If this node dies between the fence and the log's entry of it, the next one fences
//!   again. Never this node itself: apply takes its name off the list.
//! - As long as a fence fails, this node keeps the service, down, and tries again. If it gave the
//!   service away, the next node would have the same fence to run.
//! - A fence is only begun while the service is assigned to this node and its lease holds, so that
//!   a node that was cut off does not fence those who go on without it.
//! - The storage counts as up from the moment when it may be, and as down when the release command
//!   has succeeded. That one is run only when nothing of the storage is open any more.
//! - Two commands of a service never run at a time, also if whoever waited for one has gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Access, access};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::hooks::{self, Hook, HookError, Said};
use super::opening::Shared;
use crate::clock::boot_time;
use crate::cluster::lease::Moment;
use crate::cluster::service::Active;
use crate::cluster::{Command, NodeId, Outcome, Queue, ServiceCommand, ServiceId};
use crate::config::cluster::{ClusterConfig, ServiceConfig};
use crate::config::hooks::{HookCommand, Hooks};
use crate::gate::Gate;
use crate::node::StorageUse;
use crate::services::Takeover;

/// The storage of one service on this node.
#[derive(Debug)]
pub(super) struct Storage {
    service: String,
    /// The name of this node; none without a cluster.
    node: Option<String>,
    /// The addresses of the service, with spaces between.
    addresses: String,
    hooks: Hooks,
    in_use: Arc<StorageUse>,
    /// Whether the takeover command may have done something.
    is_up: bool,
    /// The last epoch that was prepared for.
    epoch: u32,
    /// Whether all is done for it.
    is_ready: bool,
    fencing: Fencing,
    /// A command that was begun and not seen to end.
    running: Option<Running>,
}

/// How far the fences of an epoch are.
#[derive(Debug, Default)]
struct Fencing {
    epoch: u32,
    /// When it began.
    begun: Option<Instant>,
    /// Whose fence has succeeded here, whether or not the log has it.
    done: Vec<NodeId>,
    /// How often the fence that is due has failed.
    failures: u32,
    /// The next try.
    not_before: Moment,
}

#[derive(Debug)]
struct Running {
    cut_short: Arc<AtomicBool>,
    end: JoinHandle<Result<Said, HookError>>,
}

/// Why a command is run, as it is told in `HAVENFS_REASON`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// A node died, or was cut off: also told to the loser, if it is there to hear it.
    Takeover,
    /// An operator wants the service elsewhere.
    Move,
    /// The service was not served.
    Start,
    /// The process ends.
    Stop,
    /// The service can't be served here.
    Failed,
}

/// What a service is about to be opened with.
pub(super) struct Near<'a> {
    pub(super) shared: &'a Shared,
    pub(super) id: ServiceId,
    pub(super) gate: &'a Gate,
    pub(super) takeover: &'a mut Takeover,
    pub(super) changes: watch::Receiver<u64>,
    pub(super) stopping: watch::Receiver<bool>,
}

/// What came of [`Storage::prepare`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prepared {
    /// The exports may be opened, if the service is still this node's.
    Ready,
    /// Not yet: ask again then, or when something changes.
    NotBefore(Moment),
}

/// Why the storage can't be let go.
#[derive(Debug, thiserror::Error)]
pub(super) enum StorageError {
    /// The release command would fail, or pull it from under somebody's feet.
    #[error("something of it is still open")]
    StillOpen,
    /// The release command failed.
    #[error(transparent)]
    Hook(#[from] HookError),
}

impl Storage {
    pub(super) fn new(config: &ServiceConfig, cluster: Option<&ClusterConfig>) -> Self {
        for (key, command) in config.hooks.all() {
            // Better now than in a takeover. It may be there by then, so it is no more than a word.
            if let Err(error) = access(&command.program, Access::EXEC_OK) {
                let (service, program) = (&config.name, command.program.display());
                tracing::warn!(service, "the {key} `{program}` can't be run now: {error}");
            }
        }
        let addresses = config.settings.listen.iter().map(ToString::to_string);
        Self {
            service: config.name.clone(),
            node: cluster.map(|cluster| cluster.node.clone()),
            addresses: addresses.collect::<Vec<_>>().join(" "),
            hooks: config.hooks.clone(),
            in_use: Arc::default(),
            is_up: false,
            epoch: 0,
            is_ready: false,
            fencing: Fencing::default(),
            running: None,
        }
    }

    /// To be held by whatever has something of the storage open.
    pub(super) fn in_use(&self) -> Arc<StorageUse> {
        Arc::clone(&self.in_use)
    }

    /// Whether exports may be opened in that epoch.
    pub(super) const fn is_ready_for(&self, epoch: u32) -> bool {
        self.is_ready && self.epoch == epoch
    }

    /// Fences the nodes that lost the service and makes the storage ready: as much of that as can
    /// be done now. Ends early if the process stops, or the service is not this node's any more.
    ///
    /// # Errors
    /// If the takeover command fails: then the storage is to be let go again.
    pub(super) async fn prepare(&mut self, near: &mut Near<'_>) -> Result<Prepared, HookError> {
        let epoch = near.gate.epoch();
        (self.epoch, self.is_ready) = (epoch, false);
        if self.hooks.fence.is_some()
            && let Some(again) = self.fence_all(near).await
        {
            return Ok(Prepared::NotBefore(again));
        }
        let now = boot_time();
        if now >= near.gate.until() {
            // The fence took long, and another node may have the service.
            return Ok(Prepared::NotBefore(now + LEASE_LOOK));
        }
        self.is_up = self.hooks.takeover.is_some() || self.hooks.release.is_some();
        if let Some(command) = self.hooks.takeover.clone() {
            let begun = Instant::now();
            let reason = match near.takeover.kind {
                "takeover" => Reason::Takeover,
                "move" => Reason::Move,
                _ => Reason::Start,
            };
            let from = near.takeover.from;
            let from = from.map(|node| near.shared.services.cluster.name_of(node));
            let title = "takeover hook".to_owned();
            let hook = self.hook(title, command, epoch, reason, from);
            match self.run_while(hook, near, |_| true).await {
                Ok(_) => near.takeover.phases.push(("storage", begun.elapsed())),
                // Whoever asks finds out why.
                Err(HookError::CutShort(_)) => return Ok(Prepared::NotBefore(boot_time())),
                Err(error) => return Err(error),
            }
        }
        self.is_ready = true;
        Ok(Prepared::Ready)
    }

    /// Fences one node after the other; none when that is done, else when to go on.
    async fn fence_all(&mut self, near: &mut Near<'_>) -> Option<Moment> {
        let epoch = near.gate.epoch();
        if self.fencing.epoch != epoch {
            self.fencing = Fencing {
                epoch,
                ..Fencing::default()
            };
        }
        while let Some(lost) = self.next_unfenced(near) {
            self.fencing.begun.get_or_insert_with(Instant::now);
            let now = boot_time();
            if now < self.fencing.not_before {
                return Some(self.fencing.not_before);
            }
            if now >= near.gate.until() {
                return Some(now + LEASE_LOOK);
            }
            if !self.fence(near, lost).await {
                return Some(self.fencing.not_before.max(boot_time()));
            }
        }
        if let Some(begun) = self.fencing.begun.take() {
            near.takeover.phases.push(("fence", begun.elapsed()));
        }
        None
    }

    /// The next node that may still write to the storage.
    fn next_unfenced(&self, near: &Near<'_>) -> Option<NodeId> {
        let state = near.shared.services.state();
        let unfenced = state.service(near.id)?.unfenced().iter().copied();
        let mut unfenced = unfenced.filter(|node| !self.fencing.done.contains(node));
        unfenced.next()
    }

    /// Runs the fence for one node, and has the log note that it has succeeded. Returns whether
    /// the node is fenced.
    async fn fence(&mut self, near: &mut Near<'_>, lost: NodeId) -> bool {
        let Some(command) = self.hooks.fence.clone() else {
            return true;
        };
        let epoch = near.gate.epoch();
        let name = near.shared.services.cluster.name_of(lost);
        let title = format!("fence hook for node `{name}`");
        let (reason, from) = (Reason::Takeover, Some(name.clone()));
        let hook = self.hook(title, command, epoch, reason, from);
        let service = self.service.clone();
        tracing::warn!(service, epoch, node = name, "fencing the node that lost it");
        let is_needed = |unfenced: &[NodeId]| unfenced.contains(&lost);
        match self.run_while(hook, near, is_needed).await {
            Ok(said) => {
                tracing::info!(service, epoch, node = name, output = %said, "the node is fenced");
                self.fencing.failures = 0;
                self.fencing.not_before = Moment::default();
                self.fencing.done.push(lost);
                if !note_fenced(near.shared, near.id, epoch, vec![lost]).await {
                    tracing::warn!(
                        service,
                        epoch,
                        node = name,
                        "the log could not note that the node is fenced: whoever takes the service \
                         next fences it again"
                    );
                }
                true
            }
            // The next look says why: confirmed, taken away, or the end.
            Err(HookError::CutShort(_)) => false,
            Err(error) => {
                let pause = FENCE_PAUSE.saturating_mul(1 << self.fencing.failures.min(5));
                let pause = pause.min(FENCE_PAUSE_MAX);
                self.fencing.failures += 1;
                self.fencing.not_before = boot_time() + pause;
                let output = error.said().map(ToString::to_string);
                tracing::error!(
                    service,
                    epoch,
                    output = output.unwrap_or_default(),
                    "cannot take over service `{service}`, which stays down: {error}; the next try \
                     is in {} s\nhint: make sure that `{name}` is off, then confirm the fence by \
                     hand: havenfs service confirm-fence {service} --node {name}",
                    pause.as_secs()
                );
                false
            }
        }
    }

    /// Nothing but a fence needs to know who lost the service: where there is none, forgets them,
    /// so that they are not fenced without a reason if the configuration changes one day. Nobody
    /// waits for it, and if it comes to nothing the next takeover does it.
    pub(super) fn forget_unfenced(&self, shared: &Arc<Shared>, id: ServiceId, epoch: u32) {
        if self.hooks.fence.is_some() {
            return;
        }
        let state = shared.services.state();
        let nodes = state.service(id).map(|service| service.unfenced().to_vec());
        drop(state);
        if let Some(nodes) = nodes.filter(|nodes| !nodes.is_empty()) {
            let shared = Arc::clone(shared);
            tokio::spawn(async move { note_fenced(&shared, id, epoch, nodes).await });
        }
    }

    /// Lets the storage go, if it may be up, once nothing of it is open.
    ///
    /// # Errors
    /// If that can't be done: then it is up, and nobody may be told otherwise.
    pub(super) async fn put_down(&mut self, reason: Reason) -> Result<(), StorageError> {
        self.end_running().await;
        if !self.is_up {
            return Ok(());
        }
        self.is_ready = false;
        let epoch = self.epoch;
        if let Some(command) = self.hooks.release.clone() {
            let closed = async {
                while Arc::strong_count(&self.in_use) > 1 {
                    sleep(CLOSED_CHECK).await;
                }
            };
            timeout(CLOSED_TIME_MAX, closed)
                .await
                .map_err(|_| StorageError::StillOpen)?;
            let title = "release hook".to_owned();
            let hook = self.hook(title, command, epoch, reason, None);
            let said = self.run(hook).await?;
            let service = &self.service;
            tracing::info!(service, epoch, output = %said, "the storage is released");
        }
        self.is_up = false;
        Ok(())
    }

    fn hook(
        &self,
        title: String,
        command: HookCommand,
        epoch: u32,
        reason: Reason,
        lost: Option<String>,
    ) -> Hook {
        Hook {
            title,
            command,
            environment: vec![
                ("HAVENFS_SERVICE", Some(self.service.clone())),
                ("HAVENFS_NODE", self.node.clone()),
                ("HAVENFS_LOST_NODE", lost),
                ("HAVENFS_EPOCH", Some(epoch.to_string())),
                ("HAVENFS_REASON", Some(reason.as_str().to_owned())),
                ("HAVENFS_ADDRESSES", Some(self.addresses.clone())),
            ],
            time_max: self.hooks.time_max,
        }
    }

    /// Runs a command as long as the process does not stop, the service is this node's, and
    /// `is_needed` agrees, which is asked with the unfenced nodes; else ends it early.
    async fn run_while(
        &mut self,
        hook: Hook,
        near: &mut Near<'_>,
        is_needed: impl Fn(&[NodeId]) -> bool,
    ) -> Result<Said, HookError> {
        let own = near.shared.services.cluster.own();
        let own = Active {
            node: own.node,
            incarnation: own.incarnation,
        };
        let epoch = near.gate.epoch();
        let services = &near.shared.services;
        let is_moot = || {
            let state = services.state();
            state.service(near.id).is_none_or(|service| {
                service.epoch() != epoch
                    || service.active() != Some(own)
                    || !is_needed(service.unfenced())
            })
        };
        let (changes, stopping) = (&mut near.changes, &mut near.stopping);
        let moot = async {
            while !is_moot() {
                // An error says that the store ends, and then the process does.
                if changes.changed().await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            // In this order, so that what is not needed already is never begun.
            biased;
            () = moot => {}
            // An error says that the process ends as well.
            _ = stopping.wait_for(|stop| *stop) => {}
            end = self.run(hook) => return end,
        }
        self.end_running()
            .await
            .unwrap_or_else(|| Err(HookError::CutShort("hook".to_owned())))
    }

    /// Runs a command to its end. If this is not waited for, the command goes on until
    /// [`Storage::end_running`].
    async fn run(&mut self, hook: Hook) -> Result<Said, HookError> {
        self.end_running().await;
        let cut_short = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cut_short);
        let title = hook.title.clone();
        let end = tokio::task::spawn_blocking(move || hooks::run(&hook, &flag));
        let running = self.running.insert(Running { cut_short, end });
        let end = (&mut running.end).await;
        self.running = None;
        // A panic has ended the process already.
        end.unwrap_or(Err(HookError::CutShort(title)))
    }

    /// Ends what was begun and is not waited for any more; returns what became of it.
    async fn end_running(&mut self) -> Option<Result<Said, HookError>> {
        let running = self.running.as_mut()?;
        running.cut_short.store(true, Ordering::Release);
        let end = (&mut running.end).await;
        self.running = None;
        end.ok()
    }
}

impl Reason {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Takeover => "takeover",
            Self::Move => "move",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Failed => "failed",
        }
    }
}

/// Has the log note that these nodes can't write any more; whether it has.
async fn note_fenced(shared: &Shared, id: ServiceId, epoch: u32, nodes: Vec<NodeId>) -> bool {
    let command = Command::Service(id, ServiceCommand::Fenced { epoch, nodes });
    let noted = timeout(
        NOTE_TIME_MAX,
        shared.proposer.ask_in(Queue::Leases, command),
    )
    .await;
    matches!(noted, Ok(Ok(Outcome::Done)))
}

/// Between two tries of a fence, doubled each time.
const FENCE_PAUSE: Duration = Duration::from_secs(1);
const FENCE_PAUSE_MAX: Duration = Duration::from_secs(30);
/// How often a node without a lease looks whether it has one.
const LEASE_LOOK: Duration = Duration::from_millis(20);
/// How long it may take until the log has an entry; the service is down meanwhile.
const NOTE_TIME_MAX: Duration = Duration::from_secs(5);
/// How long connections and threads may take to end after they were told to.
const CLOSED_TIME_MAX: Duration = Duration::from_secs(10);
const CLOSED_CHECK: Duration = Duration::from_millis(2);
