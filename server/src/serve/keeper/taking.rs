//! How a service comes to this node: it is assigned, its storage is made ready, it is opened; and
//! one line that tells how long each step took.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::{Event, Keeper, TAKE_AGAIN};
use crate::clock::boot_time;
use crate::cluster::command::{Assign, RenewalId};
use crate::cluster::{ClusterCommand, Command, Outcome, Queue};
use crate::lock_service::unix_seconds;
use crate::serve::ServeError;
use crate::serve::first_start;
use crate::serve::opening::open;
use crate::serve::ready;
use crate::serve::storage::{Near, Prepared, Reason};
use crate::services::{Slot, Takeover, in_milliseconds, total};

impl Keeper {
    /// Proposes to take the service; none if somebody else was faster.
    pub(super) async fn take(
        &mut self,
        expected_epoch: u32,
        after: Option<RenewalId>,
    ) -> Option<u32> {
        let begun = Instant::now();
        let Some(renewal) = self.leases.renewal() else {
            sleep(TAKE_AGAIN).await;
            return None;
        };
        let cluster = &self.shared.services.cluster;
        // For people; what is proposed was decided from one look at the state.
        let (before, was_moved) = {
            let state = self.shared.services.state();
            let service = state.service(self.id);
            let service = service.map(|service| (service.active(), service.wish()));
            let (active, wish) = service.unwrap_or_default();
            let is_wanted = wish.node() == Some(renewal.node);
            (active, active.is_none() && is_wanted)
        };
        let seq = renewal.seq;
        let from = before.map(|before| before.node);
        let from = from.filter(|node| *node != cluster.own().node);
        let silent = from.and_then(|node| cluster.seen(node));
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
            // If it is not known, the state tells: what is assigned to this life is begun anew.
            self.leases.dropped(seq);
            sleep(TAKE_AGAIN).await;
            return None;
        };
        if epoch == FIRST_EPOCH && !self.recover {
            let is_known = self.leases.is_alone() && self.shared.services.starts > 1;
            first_start::tell(&self.slot.config.name, is_known);
        }
        self.recover = false;
        // It was released, or lost, and that is over.
        self.leaving = None;
        self.gate = Some(self.leases.assigned(self.id, epoch, seq));
        let lease = silent.map(|silent| ("lease", silent));
        self.takeover = Some(Takeover {
            kind: match (from, was_moved) {
                (Some(_), _) => "takeover",
                (None, true) => "move",
                (None, false) => "start",
            },
            from,
            epoch,
            phases: lease
                .into_iter()
                .chain([("assign", begun.elapsed())])
                .collect(),
        });
        Some(epoch)
    }

    /// Makes the storage ready, as far as that can be done now.
    ///
    /// # Errors
    /// Why it can't be, if nobody else could do better.
    pub(super) async fn prepare(
        &mut self,
        stopping: &watch::Receiver<bool>,
    ) -> Result<Prepared, ServeError> {
        let (Some(gate), Some(takeover)) = (&self.gate, &mut self.takeover) else {
            self.reconciler.opened(boot_time(), false);
            return Ok(Prepared::NotBefore(boot_time()));
        };
        let mut near = Near {
            shared: &self.shared,
            id: self.id,
            gate,
            takeover,
            changes: self.changes.clone(),
            stopping: stopping.clone(),
        };
        match self.storage.prepare(&mut near).await {
            Ok(prepared) => Ok(prepared),
            Err(error) => {
                self.cannot_open(ServeError::Takeover(error.to_string()))
                    .await?;
                Ok(Prepared::NotBefore(boot_time()))
            }
        }
    }

    /// It can't be opened here: undoes what was done, and leaves it to others.
    ///
    /// # Errors
    /// Why it can't be opened, if there are no others.
    async fn cannot_open(&mut self, error: ServeError) -> Result<(), ServeError> {
        if self.leases.is_alone() {
            self.put_down_or_tell(Reason::Failed).await;
            return Err(error);
        }
        tracing::error!(
            service = self.slot.config.name,
            epoch = self.gate.as_ref().map(|gate| gate.epoch()),
            "cannot serve it here, another node may: {error}"
        );
        self.let_go().await;
        // If that fails, it is tried again before the release. The process does not end for it:
        // nothing of the service was answered here, and other services are.
        let _ = self.storage.undo().await;
        self.reconciler.opened(boot_time(), false);
        Ok(())
    }

    /// Opens the service.
    ///
    /// # Errors
    /// Why it can't be, if nobody else could do better.
    pub(super) async fn open(&mut self) -> Result<(), ServeError> {
        let (Some(gate), Some(mut takeover)) = (self.gate.clone(), self.takeover.take()) else {
            self.reconciler.opened(boot_time(), false);
            return Ok(());
        };
        let mut last = Instant::now();
        let mut note = |phase| {
            let now = Instant::now();
            takeover.phases.push((phase, now - last));
            last = now;
        };
        let slot = &self.slot;
        let patient = !self.leases.is_alone();
        let in_use = self.storage.in_use();
        let opening = open(
            &self.shared,
            slot,
            self.id,
            &gate,
            in_use,
            patient,
            &mut note,
        );
        // The storage may take its time, and it is its own deadline that says how long.
        let time_max = OPEN_TIME_MAX + slot.config.storage_time_max.unwrap_or_default();
        let opened = match timeout(time_max, opening).await {
            Ok(opened) => opened,
            Err(_) => Err(ServeError::TooSlow),
        };
        // A listener may have served calls before another one could not be had.
        let opened = match opened {
            Ok(mut opened) => match opened.problem.take() {
                None => Ok(opened),
                Some(problem) => {
                    self.opened = Some(opened);
                    self.stop(Duration::ZERO, Reason::Failed).await?;
                    Err(problem)
                }
            },
            Err(error) => Err(error),
        };
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => return self.cannot_open(error).await,
        };
        let slot = &self.slot;
        slot.set_serving(Some(Arc::clone(&opened.node)));
        tell(slot, &takeover);
        slot.set_takeover(takeover);
        let ready = ready::ready_line(&opened, &slot.config.settings);
        self.opened = Some(opened);
        self.reconciler.opened(boot_time(), true);
        // It listens as long as the process does not stop.
        let _ = self.events.send(Event::Serving(ready)).await;
        Ok(())
    }
}

/// One line with all that an operator wants to know of it.
fn tell(slot: &Slot, takeover: &Takeover) {
    tracing::info!(
        service = slot.config.name,
        epoch = takeover.epoch,
        kind = takeover.kind,
        from = takeover.from.map(|node| node.0),
        total_ms = total(&takeover.phases).as_secs_f64() * 1000.0,
        phases_ms = in_milliseconds(&takeover.phases),
        "serving"
    );
}

/// The epoch in which a service is served for the first time ever.
const FIRST_EPOCH: u32 = 1;
/// How long it may take to open a service, before others get their turn; besides the try of its
/// storage.
const OPEN_TIME_MAX: Duration = Duration::from_secs(45);
