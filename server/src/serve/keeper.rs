//! Keeps one service on this node: takes it when it is this node's turn, serves it while the lease
//! holds, and lets it go.
//!
//! One task for each service; it runs as long as the process.
//!
//! ```text
//!             turn                  open                     lease over
//!   standby -------> assigned ----------------> serving <------------------> silent
//!      ^  ^             |                        |   |      renewed,           |
//!      |  |   can't be opened: release           |   |      same epoch         |
//!      |  +----------------------+               |   |                         |
//!      |                         another node has it now: destroy              |
//!      +-----------------------------------------+-----------------------------+
//!      +------- released <----- stopped (finished, synced, gate closed) <--- a move, or the end
//! ```
//!
//! What if the node dies here? In `standby` it has nothing. Assigned or serving: its next life, or
//! after its lease another node, takes the service in a new epoch. Stopped and not yet released:
//! the same, since its gate is closed for good before the release is proposed.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};

use super::ServeError;
use super::leases::Leases;
use super::opening::{Open, Shared, open};
use crate::clock::boot_time;
use crate::cluster::command::{Assign, Release, RenewalId};
use crate::cluster::lease::Moment;
use crate::cluster::placement::{Turn, View};
use crate::cluster::service::Active;
use crate::cluster::{ClusterCommand, Command, NodeId, Outcome, Queue, ServiceId, ServiceState};
use crate::gate::Gate;
use crate::lock_service::unix_seconds;
use crate::raft::Unavailable;
use crate::services::{Slot, Takeover};

/// What `serve` hears of a service.
#[derive(Debug)]
pub(super) enum Event {
    /// It is served here; what to tell people.
    Serving(String),
}

/// The task of one service.
pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    pub(super) leases: Arc<Leases>,
    pub(super) slot: Arc<Slot>,
    pub(super) changes: watch::Receiver<u64>,
    pub(super) stopping: watch::Receiver<bool>,
    pub(super) events: mpsc::Sender<Event>,
    /// The service's id.
    id: ServiceId,
    /// Since when nobody has it.
    free_since: Option<Moment>,
    /// Not before this, since it failed here; and how often.
    not_before: Moment,
    failures: u32,
    /// Whether locks may be missing: said once, for the first assignment.
    recover: bool,
}

/// The service is assigned to this node.
struct Assigned {
    gate: Arc<Gate>,
    takeover: Takeover,
}

/// Why a service was served no longer.
enum End {
    /// Another node has it.
    Lost,
    /// It was released, so that it can be taken elsewhere.
    Released,
    /// The process ends.
    Stopped,
}

impl Keeper {
    pub(super) fn new(
        shared: Arc<Shared>,
        leases: Arc<Leases>,
        slot: Arc<Slot>,
        changes: watch::Receiver<u64>,
        stopping: watch::Receiver<bool>,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let recover = slot.config.settings.recover;
        Self {
            shared,
            leases,
            slot,
            changes,
            stopping,
            events,
            id: ServiceId::default(),
            free_since: None,
            not_before: Moment::default(),
            failures: 0,
            recover,
        }
    }

    /// Runs until the process is to stop.
    ///
    /// # Errors
    /// Why the service can't be served, if no other node could serve it.
    pub(super) async fn keep(mut self) -> Result<(), ServeError> {
        let mut stopping = self.stopping.clone();
        loop {
            let assigned = tokio::select! {
                assigned = self.stand_by() => assigned.map_err(ServeError::Activate)?,
                () = stopped(&mut stopping) => return Ok(()),
            };
            let end = self.serve(assigned).await?;
            self.slot.set_serving(None);
            self.free_since = None;
            match end {
                End::Stopped => return Ok(()),
                End::Lost | End::Released => {}
            }
        }
    }

    /// Waits for this node's turn and takes the service.
    async fn stand_by(&mut self) -> Result<Assigned, Unavailable> {
        if self.id == ServiceId::default() {
            let name = self.slot.config.name.as_str().into();
            let name = Command::Cluster(ClusterCommand::Name { name });
            if let Outcome::Named(id) = self.shared.proposer.ask(name).await? {
                self.id = id;
                // Nobody else sets it.
                let _ = self.slot.id.set(id);
            }
        }
        loop {
            let now = boot_time();
            self.changes.borrow_and_update();
            let wake = match self.turn(now) {
                Turn::Mine { after } => match self.take(after).await? {
                    Some(assigned) => return Ok(assigned),
                    None => now + TAKE_AGAIN,
                },
                Turn::NotBefore(moment) => moment.min(now + LOOK_AGAIN),
                Turn::Nobodys => now + LOOK_AGAIN,
            };
            tokio::select! {
                () = sleep(wake.since(boot_time())) => {}
                // The sender ends with the store, and then the process.
                Ok(()) = self.changes.changed() => {}
            }
        }
    }

    fn turn(&mut self, now: Moment) -> Turn {
        let Some(joined) = self.leases.joined() else {
            return Turn::NotBefore(now + JOIN_AGAIN);
        };
        let services = &self.shared.services;
        let candidates = services.cluster.data_nodes();
        let preferred = self.slot.config.preferred.as_deref();
        let preferred = preferred.and_then(|name| services.cluster.node_of(name));
        let state = services.state();
        let active = state.service(self.id).and_then(ServiceState::active);
        match active {
            // Nothing is open here, so what is assigned to this life must be begun anew.
            Some(active) if active == self.own() => return Turn::Mine { after: None },
            Some(_) => self.free_since = None,
            None => {
                self.free_since.get_or_insert(now);
            }
        }
        let view = View {
            state: &state,
            service: self.id,
            me: self.own().node,
            incarnation: self.own().incarnation,
            candidates: &candidates,
            preferred,
            seen: |node| services.cluster.seen(node),
            free_since: self.free_since.unwrap_or(now),
            joined,
            not_before: self.not_before,
        };
        view.turn(now)
    }

    /// Proposes to take the service; none if somebody else was faster.
    async fn take(&mut self, after: Option<RenewalId>) -> Result<Option<Assigned>, Unavailable> {
        let begun = Instant::now();
        let Some(renewal) = self.leases.renewal() else {
            return Ok(None);
        };
        let (expected_epoch, before, was_moved) = {
            let state = self.shared.services.state();
            let service = state.service(self.id);
            let service =
                service.map(|service| (service.epoch(), service.active(), service.wanted()));
            let (epoch, active, wanted) = service.unwrap_or_default();
            (
                epoch,
                active,
                active.is_none() && wanted == Some(renewal.node),
            )
        };
        let seq = renewal.seq;
        let silent = before.and_then(|before| self.shared.services.cluster.seen(before.node));
        let silent = silent.map(|seen| boot_time().since(seen.at));
        let command = ClusterCommand::Assign(Assign {
            service: self.id,
            expected_epoch,
            after,
            renewal,
            unix_seconds: unix_seconds().into(),
            recover: self.recover,
        });
        let proposer = &self.shared.proposer;
        let outcome = proposer
            .ask_in(Queue::Leases, Command::Cluster(command))
            .await;
        let Ok(Outcome::Assigned(epoch)) = outcome else {
            self.leases.dropped(seq);
            return outcome.map(|_| None);
        };
        self.recover = false;
        let gate = self.leases.assigned(self.id, epoch, seq);
        let own = self.own().node;
        let from = before.map(|before| before.node).filter(|node| *node != own);
        let mut phases = Vec::new();
        if let Some(silent) = silent.filter(|_| from.is_some()) {
            phases.push(("lease", silent));
        }
        phases.push(("assign", begun.elapsed()));
        let takeover = Takeover {
            kind: match (from, was_moved) {
                (Some(_), _) => "takeover",
                (None, true) => "move",
                (None, false) => "start",
            },
            from,
            epoch,
            phases,
        };
        Ok(Some(Assigned { gate, takeover }))
    }

    /// Opens the service and serves it until another node has it, or it is to go.
    async fn serve(&mut self, assigned: Assigned) -> Result<End, ServeError> {
        let Assigned { gate, mut takeover } = assigned;
        let mut last = Instant::now();
        let mut note = |phase| {
            let now = Instant::now();
            takeover.phases.push((phase, now - last));
            last = now;
        };
        let (shared, slot) = (Arc::clone(&self.shared), Arc::clone(&self.slot));
        let patient = !self.leases.is_alone();
        let opened = open(&shared, &slot, self.id, &gate, patient, &mut note).await;
        let opened = match opened {
            Ok(opened) => opened,
            // Nobody else could do better.
            Err(error) if self.leases.is_alone() => return Err(error),
            Err(error) => {
                self.failures += 1;
                let pause = FAILED_PAUSE.saturating_mul(1 << self.failures.min(FAILED_MAX));
                self.not_before = boot_time() + pause;
                tracing::error!(
                    service = slot.config.name,
                    epoch = gate.epoch(),
                    "cannot serve it here, another node may: {error}"
                );
                self.release(&gate).await;
                return Ok(End::Released);
            }
        };
        self.failures = 0;
        slot.set_serving(Some(Arc::clone(&opened.node)));
        tell(&slot, &takeover);
        slot.set_takeover(takeover);
        let ready = super::ready::ready_line(&opened, &slot.config.settings);
        // It listens as long as the process does not stop.
        let _ = self.events.send(Event::Serving(ready)).await;
        Ok(self.hold(opened, &gate).await)
    }

    /// Serves while it may.
    async fn hold(&mut self, mut opened: Open, gate: &Arc<Gate>) -> End {
        let mut stopping = self.stopping.clone();
        let name = self.slot.config.name.clone();
        loop {
            self.changes.borrow_and_update();
            if !self.is_mine(gate) {
                tracing::warn!(
                    service = name,
                    epoch = gate.epoch(),
                    "another node serves it now"
                );
                self.leases.let_go(gate);
                return End::Lost;
            }
            if let Some(to) = self.is_wanted_elsewhere() {
                tracing::info!(service = name, to = %to, "moving it away");
                self.stop(opened, gate, MOVE_TIME_MAX).await;
                return End::Released;
            }
            if gate.is_open() && !opened.is_listening() {
                tracing::warn!(service = name, "the lease holds again: serving");
                if let Err(error) = opened.listen(&self.shared, true).await {
                    tracing::error!(service = name, "cannot listen again: {error}");
                    self.stop(opened, gate, Duration::ZERO).await;
                    return End::Released;
                }
            } else if !gate.is_open() && opened.is_listening() {
                tracing::warn!(
                    service = name,
                    "the lease is over, since it can't be renewed: serving nothing until it is"
                );
                opened.destroy();
            }
            let pause = if gate.until() == Moment::NEVER {
                LOOK_AGAIN
            } else if gate.is_open() {
                gate.until().since(boot_time()) + CLOCK_STEP
            } else {
                LEASE_LOOK
            };
            tokio::select! {
                () = sleep(pause) => {}
                Ok(()) = self.changes.changed() => {}
                () = stopped(&mut stopping) => {
                    self.stop(opened, gate, STOP_TIME_MAX).await;
                    return End::Stopped;
                }
            }
        }
    }

    /// Stops serving and then says so; in that order, since a release is believed at once.
    async fn stop(&mut self, mut opened: Open, gate: &Arc<Gate>, time_max: Duration) {
        opened.finish(time_max).await;
        opened.leave().await;
        if !self.leases.is_alone() {
            opened.sync().await;
        }
        self.leases.let_go(gate);
        self.slot.set_serving(None);
        let node = Arc::clone(&opened.node);
        drop(opened);
        finish_pool(node).await;
        if !self.leases.is_alone() {
            self.release(gate).await;
        }
    }

    /// Gives the service back; nothing of it answers here any more.
    async fn release(&self, gate: &Arc<Gate>) {
        self.leases.let_go(gate);
        let own = self.own();
        let release = ClusterCommand::Release(Release {
            service: self.id,
            epoch: gate.epoch(),
            node: own.node,
            incarnation: own.incarnation,
        });
        let release = Command::Cluster(release);
        let asked = self.shared.proposer.ask_in(Queue::Leases, release);
        // Without a quorum it may take long; the lease is over before.
        if let Ok(Err(error)) = tokio::time::timeout(RELEASE_TIME_MAX, asked).await {
            tracing::warn!(%error, "the service is not released; others wait for its lease");
        }
    }

    fn is_mine(&self, gate: &Gate) -> bool {
        let state = self.shared.services.state();
        let service = state.service(self.id);
        service.is_some_and(|service| {
            service.epoch() == gate.epoch() && service.active() == Some(self.own())
        })
    }

    /// Where an operator wants it, if it can go there.
    fn is_wanted_elsewhere(&self) -> Option<NodeId> {
        let services = &self.shared.services;
        let wanted = services.state().service(self.id)?.wanted()?;
        let lives = services.cluster.lives(wanted, &services.state());
        let may = services.cluster.data_nodes().contains(&wanted) && lives;
        (may && wanted != self.own().node).then_some(wanted)
    }

    fn own(&self) -> Active {
        self.shared.services.cluster.own()
    }
}

/// Returns when the process is to stop.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // An error says that the process ends as well.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Waits for what the workers have in hand, off the control runtime.
async fn finish_pool(node: Arc<crate::node::Node>) {
    let finished = tokio::task::spawn_blocking(move || {
        if !node.pool.finish(STOP_TIME_MAX) {
            // A disk hangs. Waiting would not bring it back.
            tracing::error!("calls are stuck in the kernel; leaving them behind");
        }
    });
    // A panic has ended the process already.
    let _ = finished.await;
}

/// One line with all that an operator wants to know of it.
fn tell(slot: &Slot, takeover: &Takeover) {
    let phases: Vec<String> = takeover
        .phases
        .iter()
        .map(|(phase, took)| format!("{phase} {:.1}", took.as_secs_f64() * 1000.0))
        .collect();
    tracing::info!(
        service = slot.config.name,
        epoch = takeover.epoch,
        kind = takeover.kind,
        from = takeover.from.map(|node| node.0),
        total_ms = takeover.total().as_secs_f64() * 1000.0,
        phases_ms = phases.join(", "),
        "serving"
    );
}

/// After a lost race, before the next try.
const TAKE_AGAIN: Duration = Duration::from_millis(20);
/// While the lease of this node has not begun.
const JOIN_AGAIN: Duration = Duration::from_millis(20);
/// However quiet it is.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How often a node without a lease looks whether it has one.
const LEASE_LOOK: Duration = Duration::from_millis(20);
const CLOCK_STEP: Duration = Duration::from_millis(1);
/// How long calls under way may take in a planned move.
const MOVE_TIME_MAX: Duration = Duration::from_millis(100);
/// How long they may take at the end of the process.
const STOP_TIME_MAX: Duration = Duration::from_secs(5);
const RELEASE_TIME_MAX: Duration = Duration::from_millis(500);
/// How long a node that failed to open a service leaves it to others, doubled each time.
const FAILED_PAUSE: Duration = Duration::from_secs(1);
const FAILED_MAX: u32 = 5;
