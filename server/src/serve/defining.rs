//! Brings new definitions of a service into force while this node has it open, and keeps the node's
//! copy of them.
//!
//! One task for as long as the service is open, in a cluster only. It waits until the replicated
//! definition is another one than that in force, brings it into force, and tells the cluster what
//! came of it, so that whoever asked for it on another node hears of it. It decides nothing: what
//! the definition is has been decided in the log.
//!
//! What can't be brought into force (a directory is missing, another service has the files) is
//! taken back: the task proposes the definition that was in force before. Otherwise a mistake in a
//! file of one node would keep the service from all of them at the next takeover. If it fails to
//! take it back, or dies before, the mistake stays, and the next node to take the service says it.
//!
//! ```text
//!   log: v2   in force 1, refused   v3 as v1   in force 3, refused
//! ```
//!
//! What is told is bound to the epoch, so it is told before as well: a node that was cut off takes
//! nothing back that the next one may have in force. And it is always the version that is in force
//! which is told, never the refused one: other services go by it.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::opening::{Shared, service_dir};
use crate::cluster::definition::{Defined, InForce, Undefined};
use crate::cluster::{ClusterCommand, Command, Outcome, ServiceCommand, ServiceId};
use crate::definitions;
use crate::node::Node;
use crate::raft::Unavailable;
use crate::services::Slot;
use crate::volumes::overlap::with_places;
use crate::volumes::{self, ExportsError};

/// What a service is that is open.
pub(super) struct Following {
    pub(super) shared: Arc<Shared>,
    pub(super) slot: Arc<Slot>,
    pub(super) service: ServiceId,
    pub(super) node: Arc<Node>,
    /// The definition in force.
    pub(super) running: Arc<Defined>,
    /// The version that takes back one that could not be brought into force, and why that could
    /// not.
    pub(super) taken_back: Option<(u64, String)>,
}

impl Following {
    /// Never returns, as long as the store lives.
    pub(super) async fn follow(mut self, mut changes: watch::Receiver<u64>) {
        self.tell_opened().await;
        let mut seen = self.running.version;
        loop {
            changes.borrow_and_update();
            let defined = self.defined();
            match defined.filter(|defined| defined.version > seen) {
                Some(defined) => {
                    seen = defined.version;
                    self.bring(defined).await;
                }
                // An error says that the store has ended, and then the process does.
                None => {
                    if changes.changed().await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn defined(&self) -> Option<Arc<Defined>> {
        let state = self.shared.services.state();
        state.service(self.service)?.defined().cloned()
    }

    /// Whoever waits for a definition is told of it also if it came into force by a takeover; that
    /// it was refused before does not count any more. It is told also if it was before, since
    /// whoever has moved the service knows by it that the service is open.
    async fn tell_opened(&self) {
        let told = {
            let state = self.shared.services.state();
            let service = state.service(self.service);
            service.map(|service| Arc::clone(service.in_force()))
        };
        let told = told.unwrap_or_default();
        let said = if told.version == self.running.version && !told.refused {
            told.said.to_string()
        } else {
            let count = self.node.exports.load().exports().len();
            format!("{count} exports in force")
        };
        self.tell(self.running.version, false, said).await;
    }

    async fn bring(&mut self, defined: Arc<Defined>) {
        let (service, version) = (&self.slot.config.name, defined.version);
        // Of two services that were defined anew at a time, one gives up first.
        let turn = self.service.0 % SETTLE_TURNS;
        let patience = SETTLE_TIME_MAX + SETTLE_STEP * turn;
        let begun = Instant::now();
        let brought = loop {
            let work = {
                let (shared, slot) = (Arc::clone(&self.shared), Arc::clone(&self.slot));
                let (node, running) = (Arc::clone(&self.node), Arc::clone(&self.running));
                let defined = Arc::clone(&defined);
                move || bring_exports(&shared, &slot, &node, &running, &defined)
            };
            let brought = tokio::task::spawn_blocking(work).await;
            match brought {
                // Another service is just being defined anew, and mostly that is soon over.
                Ok(Err(ExportsError::Unsettled(_))) if begun.elapsed() < patience => {
                    sleep(SETTLE_AGAIN).await;
                }
                Ok(brought) => break brought.map_err(|error| error.to_string()),
                Err(error) => break Err(error.to_string()),
            }
        };
        match brought {
            Ok(mut said) => {
                if let Some(locks) = self.node.locks.get() {
                    locks.set_names(&definitions::names_of(&defined.definition));
                }
                if self.slot.runs_other_addresses(&defined.definition) {
                    said.push_str(
                        "; its addresses change when the nodes are restarted, one after the other",
                    );
                }
                tracing::info!(service, version, "defined anew: {said}");
                self.running = defined;
                match self.taken_back.take_if(|(back, _)| *back == version) {
                    Some((_, problem)) => self.tell(version, true, problem).await,
                    None => self.tell(version, false, said).await,
                };
            }
            Err(problem) => {
                tracing::error!(
                    service,
                    version,
                    "the new definition can't be brought into force: {problem}"
                );
                if self.running.definition == defined.definition {
                    // It is in force all the same.
                    let refused = self.taken_back.take_if(|(back, _)| *back == version);
                    let problem = refused.map_or(problem, |(_, problem)| problem);
                    self.running = defined;
                    self.tell(version, true, problem).await;
                } else if self.tell(self.running.version, true, problem.clone()).await {
                    self.take_back(version, problem).await;
                }
            }
        }
    }

    async fn take_back(&mut self, version: u64, problem: String) {
        let define = ClusterCommand::Define {
            service: self.service,
            expected_version: version,
            definition: self.running.definition.clone(),
        };
        let define = Command::Cluster(define);
        let asked = loop {
            match self.shared.proposer.ask(define.clone()).await {
                // Other services wait for it.
                Err(Unavailable::Busy) => sleep(TELL_AGAIN).await,
                asked => break asked,
            }
        };
        match asked {
            Ok(Outcome::Defined(back)) => {
                tracing::warn!(
                    service = self.slot.config.name,
                    version = back,
                    "the definition that was in force before is the service's again"
                );
                let problem = format!("version {version}: {problem}");
                self.taken_back = Some((back, problem));
            }
            // Somebody else was faster.
            Ok(Outcome::NotDefined(Undefined::OtherVersion(_))) => {}
            Ok(outcome) => tracing::error!(?outcome, "the new definition is not taken back"),
            Err(error) => tracing::error!(%error, "the new definition is not taken back"),
        }
    }

    /// Tells which version is in force. Returns whether this node still has the service.
    async fn tell(&self, version: u64, refused: bool, said: String) -> bool {
        let in_force = InForce {
            version,
            refused,
            said: said.into(),
        };
        let command = ServiceCommand::InForce {
            epoch: self.node.gate.epoch(),
            in_force,
        };
        let command = Command::Service(self.service, command);
        let told = loop {
            match self.shared.proposer.ask(command.clone()).await {
                // Other services wait for it.
                Err(Unavailable::Busy) => sleep(TELL_AGAIN).await,
                told => break told,
            }
        };
        match told {
            Ok(Outcome::Done) => true,
            // It is another node's by now.
            Ok(_) => false,
            Err(error) => {
                tracing::warn!(%error, "the cluster is not told what became of the new definition");
                false
            }
        }
    }
}

/// Waits for disks and for the log.
fn bring_exports(
    shared: &Shared,
    slot: &Slot,
    node: &Node,
    running: &Defined,
    defined: &Defined,
) -> Result<String, ExportsError> {
    let service = &slot.config.name;
    let specs = definitions::specs_of(service, &defined.definition)?;
    let in_force = &running.definition;
    definitions::overlap::may_replace(&shared.services, service, &specs, in_force)?;
    let shown = Arc::new(with_places(service, &specs));
    let said = volumes::reload(specs, node, slot.config.storage_time_max.is_some())?;
    // The service may have left this node meanwhile.
    if slot
        .serving()
        .is_some_and(|serving| std::ptr::eq(&raw const *serving, node))
    {
        slot.set_shown(&shown);
    }
    *node.shown.lock().unwrap_or_else(PoisonError::into_inner) = shown;
    Ok(said)
}

/// Keeps a copy for the next start, if there is no newer one; without holding anybody up.
pub(super) fn keep_copy(shared: &Arc<Shared>, slot: &Arc<Slot>, defined: Arc<Defined>) {
    let (shared, slot) = (Arc::clone(shared), Arc::clone(slot));
    let name = slot.config.name.clone();
    tokio::task::spawn_blocking(move || {
        let mut kept = slot.copied.lock().unwrap_or_else(PoisonError::into_inner);
        if *kept >= defined.version {
            return;
        }
        let dir: io::Result<PathBuf> = service_dir(&shared.state, &name);
        match dir.and_then(|dir| definitions::keep_copy(&dir, &defined)) {
            Ok(()) => *kept = defined.version,
            Err(error) => tracing::warn!(
                service = name,
                %error,
                "no copy of the service's definition is kept: if its addresses change, this node \
                 does not know it at its next start"
            ),
        }
    });
}

/// Drops the copy for good: the service is forgotten, and if one with its name begins anew, its
/// files say what it is.
pub(super) fn drop_copy(shared: &Arc<Shared>, slot: &Arc<Slot>) {
    let (shared, slot) = (Arc::clone(shared), Arc::clone(slot));
    tokio::task::spawn_blocking(move || {
        let service = &slot.config.name;
        let mut kept = slot.copied.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = u64::MAX;
        let dir: io::Result<PathBuf> = service_dir(&shared.state, service);
        if let Err(error) = dir.and_then(|dir| definitions::drop_copy(&dir)) {
            tracing::warn!(
                service,
                %error,
                "the copy of the definition of a service that was forgotten stays: if the service \
                 begins anew, this node must be started twice"
            );
        }
    });
}

/// How long other services that are being defined anew are waited for.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(3);
const SETTLE_AGAIN: Duration = Duration::from_millis(100);
/// By so much longer for each of so many turns.
const SETTLE_STEP: Duration = Duration::from_secs(1);
const SETTLE_TURNS: u32 = 4;
/// Before a store that is busy is asked again.
const TELL_AGAIN: Duration = Duration::from_millis(100);
