//! Keeps one service on this node: carries out the steps that
//! [`reconcile`](crate::cluster::reconcile) decides.
//!
//! One task for each service; it runs as long as the process, and does one thing at a time. Whether
//! anything may be answered is never asked here but at the [gate](crate::gate), so that it does not
//! matter when this task comes to run.

mod defined;
mod health;
mod leaving;
mod noting;
mod taking;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::ServeError;
use super::leases::Leases;
use super::opening::{Open, Shared};
use super::storage::{Prepared, Reason, Storage};
use crate::address::AddressError;
use crate::clock::boot_time;
use crate::cluster::lease::Moment;
use crate::cluster::placement::View;
use crate::cluster::reconcile::{Reconciler, Sight, Step, Why};
use crate::cluster::service::ServiceState;
use crate::cluster::{ClusterCommand, Command, NodeId, Outcome, ServiceId};
use crate::fault::{Fault, is_planted};
use crate::gate::Gate;
use crate::services::{Departure, Health, Slot, Takeover};

/// What `serve` hears of a service.
#[derive(Debug)]
pub(super) enum Event {
    /// It is served here; what to tell people.
    Serving(String),
}

/// The task of one service.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    leases: Arc<Leases>,
    slot: Arc<Slot>,
    changes: watch::Receiver<u64>,
    /// Whether clients can reach this node.
    link: watch::Receiver<bool>,
    /// Whether the storage works on this node.
    health: watch::Receiver<Health>,
    /// A note of that is on its way into the log.
    noting: Arc<AtomicBool>,
    events: mpsc::Sender<Event>,
    reconciler: Reconciler,
    id: ServiceId,
    /// Until when this node serves, in the epoch that it has.
    gate: Option<Arc<Gate>>,
    opened: Option<Open>,
    storage: Storage,
    /// How the service came here.
    takeover: Option<Takeover>,
    /// How it leaves, from when it is stopped until it is released.
    leaving: Option<Departure>,
    /// Whether locks may be missing: said once, for the first assignment.
    recover: bool,
    /// The version of the definition that was looked at last.
    version: u64,
    /// This node runs with an address that another service has.
    clashes: bool,
    /// The cluster does not know the service any more.
    is_forgotten: bool,
    /// Since when it is not known whether storage that failed works again.
    doubted_since: Option<Instant>,
}

impl Keeper {
    pub(super) fn new(
        shared: Arc<Shared>,
        leases: Arc<Leases>,
        slot: Arc<Slot>,
        changes: watch::Receiver<u64>,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let recover = slot.config.settings.recover;
        let floating = slot.floating.as_ref();
        // Of addresses that are everywhere nothing is known.
        let link = floating.map_or_else(|| watch::channel(true).1, |floating| floating.link());
        let storage = Storage::new(&slot.config, shared.services.config.cluster.as_ref());
        Self {
            link,
            health: slot.health.subscribe(),
            noting: Arc::default(),
            shared,
            leases,
            slot,
            changes,
            events,
            reconciler: Reconciler::default(),
            id: ServiceId::default(),
            gate: None,
            opened: None,
            storage,
            takeover: None,
            leaving: None,
            recover,
            version: 0,
            clashes: false,
            is_forgotten: false,
            doubted_since: None,
        }
    }

    /// Runs until `stopping` says so.
    ///
    /// # Errors
    /// Why the service can't be served, if no other node could serve it.
    pub(super) async fn keep(
        mut self,
        mut stopping: watch::Receiver<bool>,
    ) -> Result<(), ServeError> {
        let defining = async {
            self.name().await;
            self.note_running().await;
            self.define().await;
        };
        tokio::select! {
            () = defining => {}
            () = stopped(&mut stopping) => return Ok(()),
        }
        let _probing = self.start_probing();
        loop {
            if *stopping.borrow() {
                self.reconciler.end();
            }
            self.changes.borrow_and_update();
            self.link.borrow_and_update();
            self.look_at_definition();
            self.look_for_clash();
            self.look_whether_forgotten();
            self.health.borrow_and_update();
            // Before the step: who is given the service knows that it is not to be given back.
            self.note_health();
            let wake = match self.step() {
                Step::End => {
                    self.put_down_or_tell(Reason::Stop).await;
                    return Ok(());
                }
                Step::Wait(moment) => moment,
                Step::LetGo => {
                    let epoch = {
                        let state = self.shared.services.state();
                        state.service(self.id).map_or(0, ServiceState::epoch)
                    };
                    match self.storage.let_go(epoch).await {
                        None => continue,
                        Some(moment) => moment,
                    }
                }
                Step::Open { epoch } if !self.storage.is_ready_for(epoch) => {
                    match self.prepare(&stopping).await? {
                        Prepared::Ready => continue,
                        Prepared::NotBefore(moment) => moment,
                    }
                }
                Step::Release { epoch } if *stopping.borrow() => {
                    // It may have stopped in the middle of an opening.
                    self.put_down(Reason::Stop).await?;
                    // Without a majority it takes long; the lease is over before.
                    let _ = timeout(RELEASE_TIME_MAX, self.release(epoch)).await;
                    return Ok(());
                }
                // It could not be opened, and what was done for that is not undone yet.
                Step::Release { .. } if self.storage.may_be_up() => {
                    match self.storage.undo().await {
                        None => continue,
                        Some(moment) => moment,
                    }
                }
                step @ (Step::Take { .. } | Step::Open { .. } | Step::Release { .. }) => {
                    tokio::select! {
                        done = self.carry_out(step) => done?,
                        // Without a majority it takes as long as that; nothing is open then.
                        () = stopped(&mut stopping) => {}
                    }
                    continue;
                }
                step => {
                    self.carry_out(step).await?;
                    continue;
                }
            };
            tokio::select! {
                () = sleep(wake.since(boot_time()) + CLOCK_STEP) => {}
                // The sender ends with the store, and then the process.
                Ok(()) = self.changes.changed() => {}
                // The same.
                Ok(()) = self.link.changed() => {}
                // The same.
                Ok(()) = self.health.changed() => {}
                Ok(()) = stopping.changed() => {}
            }
        }
    }

    /// Asks the log for the service's id.
    async fn name(&mut self) {
        loop {
            let name = self.slot.config.name.as_str().into();
            let name = Command::Cluster(ClusterCommand::Name { name });
            if let Ok(Outcome::Named(id)) = self.shared.proposer.ask(name).await {
                self.id = id;
                // Nobody else sets it.
                let _ = self.slot.id.set(id);
                return;
            }
            // The store is busy, or ends, and then the process does.
            sleep(TAKE_AGAIN).await;
        }
    }

    /// What is to be done now.
    fn step(&mut self) -> Step {
        let services = &self.shared.services;
        let candidates = services.cluster.data_nodes();
        let preferred = self.slot.config.preferred.as_deref();
        let own = services.cluster.own();
        let state = services.state();
        let defined = state.service(self.id).and_then(ServiceState::defined);
        let sight = Sight {
            view: View {
                state: &state,
                service: self.id,
                me: own.node,
                incarnation: own.incarnation,
                candidates: &candidates,
                preferred: preferred.and_then(|name| services.cluster.node_of(name)),
                seen: |node| services.cluster.seen(node),
                free_since: Moment::default(),
                joined: Moment::default(),
                not_before: Moment::default(),
                is_stale: defined
                    .is_some_and(|defined| self.slot.runs_other_addresses(&defined.definition)),
            },
            joined: self.leases.joined(),
            lease: self.lease(),
            is_alone: self.leases.is_alone(),
            is_reachable: *self.link.borrow() && !self.clashes,
            storage_works: !self.health.borrow().fails(),
            hangs_unseen: self.hangs_unseen(),
            may_be_up: self.storage.may_be_up(),
            fail_back: self.slot.config.fail_back,
        };
        self.reconciler.poll(boot_time(), sight)
    }

    /// Until when the lease holds; it counts as over as long as a connection is there on which an
    /// answer may be missing.
    fn lease(&self) -> Moment {
        let is_listening = self.opened.as_ref().is_some_and(Open::is_listening);
        match &self.gate {
            Some(_) if is_planted(Fault::NoLease) => Moment::NEVER,
            Some(gate) if !is_listening || !gate.has_turned_away() => gate.until(),
            _ => Moment::default(),
        }
    }

    async fn carry_out(&mut self, step: Step) -> Result<(), ServeError> {
        let name = &self.slot.config.name;
        match step {
            Step::Take {
                expected_epoch,
                after,
            } => {
                let taken = self.take(expected_epoch, after).await;
                self.reconciler.taken(taken);
            }
            Step::Open { .. } => self.open().await?,
            Step::GoBack { epoch, to } => {
                self.go_back(epoch, to).await;
                self.reconciler.asked_back(boot_time());
            }
            Step::Silence => {
                let holds = self.gate.as_ref().is_some_and(|gate| gate.is_open());
                if self.clashes {
                    tracing::warn!(
                        service = name,
                        "another service has an address of it: serving nothing until this node is \
                         restarted"
                    );
                } else if !*self.link.borrow() {
                    tracing::warn!(
                        service = name,
                        "clients can't reach this node, nor is there another one: waiting"
                    );
                } else if holds {
                    tracing::warn!(
                        service = name,
                        "beginning anew with connections and addresses"
                    );
                } else {
                    tracing::warn!(
                        service = name,
                        "the lease is over, since it can't be renewed: serving nothing until it is"
                    );
                }
                if let Some(opened) = &mut self.opened {
                    opened.destroy().await;
                }
                self.reconciler.speaks(false);
            }
            Step::Speak => {
                tracing::warn!(service = name, "serving again");
                self.speak().await?;
            }
            Step::Drop => {
                tracing::warn!(service = name, "another node serves it now");
                // The storage is let go before the service can be taken again.
                self.let_go().await;
                self.reconciler.dropped();
            }
            Step::Stop(why) => {
                let (time_max, reason) = match why {
                    Why::Moved(to) => {
                        let to = self.shared.services.cluster.name_of(to);
                        tracing::info!(service = name, to, "moving it away");
                        (MOVE_TIME_MAX, Reason::Move)
                    }
                    Why::Unreachable => {
                        tracing::warn!(
                            service = name,
                            "clients can't reach this node: giving it to another one"
                        );
                        (Duration::ZERO, Reason::Move)
                    }
                    Why::StorageFails => {
                        tracing::warn!(
                            service = name,
                            "its storage does not work on this node: giving it to another one"
                        );
                        (Duration::ZERO, Reason::Failed)
                    }
                    Why::Withdrawn => {
                        tracing::warn!(
                            service = name,
                            "an operator releases it: nobody serves it until it is taken or moved"
                        );
                        (MOVE_TIME_MAX, Reason::Stop)
                    }
                    Why::Ends => (STOP_TIME_MAX, Reason::Stop),
                };
                self.stop(time_max, reason).await?;
                self.reconciler.stopped();
            }
            Step::Release { epoch } => {
                self.release(epoch).await;
                self.reconciler.released();
            }
            // Asked for by nobody but the loop.
            Step::Wait(_) | Step::LetGo | Step::End => {}
        }
        Ok(())
    }

    /// Listens again after a silence.
    async fn speak(&mut self) -> Result<(), ServeError> {
        let Some(opened) = &mut self.opened else {
            return Ok(());
        };
        opened.node.gate.begin_anew();
        let listening = async {
            opened.listen(&self.shared, true).await?;
            opened.raise(&self.shared).await
        };
        match listening.await {
            Ok(()) => self.reconciler.speaks(true),
            // It is not believed yet that the link is down, or it went again just now.
            Err(ServeError::Address(error @ AddressError::NoLink { .. })) => {
                tracing::info!(service = self.slot.config.name, "not yet: {error}");
                opened.destroy().await;
                sleep(SPEAK_AGAIN).await;
            }
            Err(error) => {
                let service = &self.slot.config.name;
                tracing::error!(service, "cannot listen again: {error}");
                // What the workers had in hand when the silence began may have gone on.
                self.stop(Duration::ZERO, Reason::Failed).await?;
                self.reconciler.stopped();
            }
        }
        Ok(())
    }

    /// Asks the log for the service to go to the node that it prefers. It is served meanwhile.
    async fn go_back(&self, epoch: u32, to: NodeId) {
        let name = self.shared.services.cluster.name_of(to);
        tracing::info!(
            service = self.slot.config.name,
            to = name,
            "going back to the preferred node, which has lived for long enough"
        );
        let service = self.id;
        let command = Command::Cluster(ClusterCommand::GoBack { service, epoch, to });
        // Asked again later if nothing comes of it.
        let _ = timeout(GO_BACK_TIME_MAX, self.shared.proposer.ask(command)).await;
    }
}

/// Returns when the process is to stop.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // An error says that the process ends as well.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// After a lost race, before the next look.
const TAKE_AGAIN: Duration = Duration::from_millis(20);
/// Before the next look at a link.
const SPEAK_AGAIN: Duration = Duration::from_millis(100);
const CLOCK_STEP: Duration = Duration::from_millis(1);
/// How long calls under way may take in a planned move.
const MOVE_TIME_MAX: Duration = Duration::from_millis(100);
/// How long they may take at the end of the process.
const STOP_TIME_MAX: Duration = Duration::from_secs(5);
/// How long the log may take to note that the service is to go back.
const GO_BACK_TIME_MAX: Duration = Duration::from_millis(500);
const RELEASE_TIME_MAX: Duration = Duration::from_millis(500);
