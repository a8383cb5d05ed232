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
//! [keeper](super::keeper) asks here before it opens a service, before it proposes a release, and
//! before it stands by.
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
//! - Nothing of the storage is touched before the log has noted that this node is to be fenced if
//!   it loses the service ([`ServiceCommand::NeedsFence`]), where there is a fence.
//! - The storage counts as up from the moment when it may be, which is the beginning, since an
//!   earlier life of this process may have left it up; and as down when the release command has
//!   succeeded, which is run only when nothing of the storage is open any more; or, where there is
//!   a fence and no such command, when nothing of it is open. As long as the storage is up, the
//!   service is neither given away nor, once lost, taken again.
//! - Two commands of a service never run at a time, also if whoever waited for one has gone. One
//!   that can't be killed keeps all others from running, and the storage up, until it has ended.

mod fences;
mod running;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{Access, access};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use self::fences::Fencing;
use self::running::Running;
use super::hooks::{Hook, HookError, Remnant};
use super::opening::Shared;
use crate::clock::boot_time;
use crate::cluster::ServiceId;
use crate::cluster::lease::Moment;
use crate::config::cluster::ClusterConfig;
use crate::config::hooks::{HookCommand, Hooks};
use crate::config::service::ServiceConfig;
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
    /// Whether a takeover command may have done something, in this life or in an earlier one; or
    /// whether something may be open that only a fence would keep from writing.
    is_up: bool,
    /// How often it could not be let go where nobody waited for that.
    failures: u32,
    /// The next try.
    not_before: Moment,
    /// The last epoch that was prepared for.
    epoch: u32,
    /// Whether all is done for it.
    is_ready: bool,
    fencing: Fencing,
    /// A command that was begun and not seen to end.
    running: Option<Running>,
    /// One that could not be ended.
    remnant: Option<Arc<Remnant>>,
}

/// Why a command is run, as it is told in `HAVENFS_REASON`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// A node died, or was cut off: also told to the loser, if it is there to hear it.
    Takeover,
    /// An operator wants the service elsewhere.
    Move,
    /// The service was not served; or this process begins, and an earlier one may have left the
    /// storage up.
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
        if config.hooks.fence.is_some() && config.hooks.release.is_none() {
            tracing::warn!(
                service = config.name,
                "storage = \"fence\" without a release_command: after a move or a stop nothing but \
                 this program keeps this node from writing, so the storage must not be mounted on \
                 a node that does not serve it"
            );
        }
        let addresses = config.settings.listen.iter().map(ToString::to_string);
        Self {
            service: config.name.clone(),
            node: cluster.map(|cluster| cluster.node.clone()),
            addresses: addresses.collect::<Vec<_>>().join(" "),
            hooks: config.hooks.clone(),
            in_use: Arc::default(),
            is_up: config.hooks.release.is_some(),
            failures: 0,
            not_before: Moment::default(),
            epoch: 0,
            is_ready: false,
            fencing: Fencing::default(),
            running: None,
            remnant: None,
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

    /// Whether something of it may be up, or becoming so.
    pub(super) const fn may_be_up(&self) -> bool {
        self.is_up || self.remnant.is_some()
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
        if let Some(again) = self.note_need(near).await {
            return Ok(Prepared::NotBefore(again));
        }
        let now = boot_time();
        if !near.gate.is_open() {
            // The fence took long, and another node may have the service.
            return Ok(Prepared::NotBefore(now + LEASE_LOOK));
        }
        self.is_up = self.hooks.all().next().is_some();
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

    /// Lets the storage go, if it may be up, once nothing of it is open.
    ///
    /// # Errors
    /// If that can't be done: then it is up, and nobody may be told otherwise.
    pub(super) async fn put_down(&mut self, reason: Reason) -> Result<(), StorageError> {
        self.end_running().await;
        self.is_ready = false;
        // Whatever it does, another node must not begin beside it.
        self.check_remnant()?;
        if !self.is_up {
            return Ok(());
        }
        let epoch = self.epoch;
        // Where it is neither unmounted nor fenced after a release, a write that is stuck in the
        // kernel, also one that only asked whether the storage works, might come to disk beside
        // the next node.
        if self.hooks.release.is_some() || self.hooks.fence.is_some() {
            let closed = async {
                while Arc::strong_count(&self.in_use) > 1 {
                    sleep(CLOSED_CHECK).await;
                }
            };
            timeout(CLOSED_TIME_MAX, closed)
                .await
                .map_err(|_| StorageError::StillOpen)?;
        }
        if let Some(command) = self.hooks.release.clone() {
            let title = "release hook".to_owned();
            let hook = self.hook(title, command, epoch, reason, None);
            let said = self.run(hook).await?;
            let service = &self.service;
            tracing::info!(service, epoch, output = %said, "the storage is released");
        }
        self.is_up = false;
        Ok(())
    }

    /// Lets the storage go that may be up while this node has no say in the service. `epoch`: what
    /// the service has. None when it is down, else when to try again.
    pub(super) async fn let_go(&mut self, epoch: u32) -> Option<Moment> {
        if boot_time() < self.not_before {
            return Some(self.not_before);
        }
        let reason = if self.epoch == 0 {
            // Nothing was begun in this life.
            self.epoch = epoch;
            Reason::Start
        } else {
            Reason::Takeover
        };
        let (error, pause) = self.try_to_put_down(reason).await?;
        let service = &self.service;
        tracing::error!(
            service,
            "cannot let the storage of service `{service}` go, which another node may have: \
             {error}; the next try is in {} s, and the service is not taken here before one \
             succeeds\nhint: a release_command must succeed if there is nothing to do",
            pause.as_secs()
        );
        Some(self.not_before)
    }

    /// Lets the storage go after the service could not be opened here, which it is still this
    /// node's to give away. None when it is down, else when to try again: nothing was answered, so
    /// to wait costs nobody more than the service, and the next node would most likely get stuck in
    /// the same place.
    pub(super) async fn undo(&mut self) -> Option<Moment> {
        if boot_time() < self.not_before {
            return Some(self.not_before);
        }
        let (error, pause) = self.try_to_put_down(Reason::Failed).await?;
        let service = &self.service;
        tracing::error!(
            service,
            "service `{service}` could not be opened here, and what was done for it can't be \
             undone: {error}; NOBODY SERVES IT, since no other node may have it before; the next \
             try is in {} s\nhint: see whether its storage hangs, on this node or on all; if only \
             here, stop havenfs on this node, or its machine, and another one takes the service",
            pause.as_secs()
        );
        Some(self.not_before)
    }

    /// None if it is down; else why not, and how long to wait.
    async fn try_to_put_down(&mut self, reason: Reason) -> Option<(StorageError, Duration)> {
        let Err(error) = self.put_down(reason).await else {
            self.failures = 0;
            return None;
        };
        let pause = pause_after(self.failures);
        self.failures += 1;
        self.not_before = boot_time() + pause;
        Some((error, pause))
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
}

impl Reason {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Takeover => "takeover",
            Self::Move => "move",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Failed => "failed",
        }
    }
}

/// How long to wait after so many failures.
fn pause_after(failures: u32) -> Duration {
    PAUSE.saturating_mul(1 << failures.min(5)).min(PAUSE_MAX)
}

/// Between two tries, doubled each time.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// How often a node without a lease looks whether it has one.
const LEASE_LOOK: Duration = Duration::from_millis(20);
/// How long connections and threads may take to end after they were told to.
const CLOSED_TIME_MAX: Duration = Duration::from_secs(10);
const CLOSED_CHECK: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests;
