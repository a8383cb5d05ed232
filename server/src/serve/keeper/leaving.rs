//! How a service leaves this node: what was taken is finished, all is brought to disk, everything
//! is closed, the storage is let go, and the log hears of it; and one line that tells how long each
//! step took.

use std::time::Duration;

use tokio::time::Instant;

use super::Keeper;
use crate::cluster::command::Release;
use crate::cluster::service::Active;
use crate::cluster::{ClusterCommand, Command, Queue};
use crate::serve::ServeError;
use crate::serve::handing::hand_over;
use crate::serve::opening::{SETTLE_DEAD_TIME_MAX, SETTLE_TIME_MAX};
use crate::serve::storage::Reason;
use crate::services::{Departure, Slot, in_milliseconds, total};

impl Keeper {
    /// Stops serving: finishes what was taken, closes the gate, ends the workers and brings all to
    /// disk; in that order, so that nothing is changed here after it was brought to disk.
    ///
    /// # Errors
    /// If that can't be done in time. Then the process ends, without a release: the others wait for
    /// its lease, and for their fence.
    pub(super) async fn stop(
        &mut self,
        time_max: Duration,
        reason: Reason,
    ) -> Result<(), ServeError> {
        self.slot.set_serving(None);
        let mut leaving = Departure {
            kind: reason.as_str(),
            epoch: self.gate.as_ref().map_or(0, |gate| gate.epoch()),
            phases: Vec::new(),
        };
        let mut last = Instant::now();
        let mut note = |phase| {
            let now = Instant::now();
            leaving.phases.push((phase, now - last));
            last = now;
        };
        if let Some(opened) = &mut self.opened {
            opened.finish(time_max, &mut note).await;
            opened.leave(&self.shared).await;
            note("leave");
        }
        if let Some(gate) = &self.gate {
            gate.close();
        }
        let settle_time_max = if self.health.borrow().fails() {
            SETTLE_DEAD_TIME_MAX
        } else {
            SETTLE_TIME_MAX
        };
        if let Some(opened) = &self.opened {
            opened
                .settle(settle_time_max)
                .await
                .map_err(|problem| ServeError::Unsettled {
                    service: self.slot.config.name.clone(),
                    problem: problem.to_string(),
                })?;
            note("sync");
            if !self.leases.is_alone() {
                let proposer = &self.shared.proposer;
                hand_over(proposer, self.id, &opened.node).await;
                note("replies");
            }
        }
        // Only when everything is closed may the storage be let go.
        self.put_down(reason).await?;
        note("storage");
        self.leaving = Some(leaving);
        Ok(())
    }

    /// Closes everything for good, and lets the storage go.
    ///
    /// # Errors
    /// If the storage can't be let go. Then the process ends, without a release: the others wait
    /// for its lease, and for their fence.
    pub(super) async fn put_down(&mut self, reason: Reason) -> Result<(), ServeError> {
        self.let_go().await;
        let service = &self.slot.config.name;
        let put_down = self.storage.put_down(reason).await;
        put_down.map_err(|problem| ServeError::Storage {
            service: service.clone(),
            problem: problem.to_string(),
        })
    }

    /// The same, where the service is not this node's to give away any more.
    pub(super) async fn put_down_or_tell(&mut self, reason: Reason) {
        if let Err(error) = self.put_down(reason).await {
            tracing::error!("{error}");
        }
    }

    /// Closes everything for good.
    pub(super) async fn let_go(&mut self) {
        if let Some(gate) = self.gate.take() {
            self.leases.let_go(&gate);
        }
        self.slot.set_serving(None);
        if let Some(mut opened) = self.opened.take() {
            opened.destroy().await;
        }
    }

    /// Gives the service back; nothing of it answers here any more.
    pub(super) async fn release(&mut self, epoch: u32) {
        self.let_go().await;
        let begun = Instant::now();
        let leaving = self.leaving.take();
        let Active { node, incarnation } = self.shared.services.cluster.own();
        let release = Command::Cluster(ClusterCommand::Release(Release {
            service: self.id,
            epoch,
            node,
            incarnation,
        }));
        // However long it takes: what comes after it, such as to take the service again, must not
        // overtake a release that is still on its way.
        let released = self.shared.proposer.ask_in(Queue::Leases, release).await;
        if let Err(error) = released {
            tracing::warn!(%error, "the service is not released; others wait for its lease");
            return;
        }
        // It is gone without having been served since, if nothing is noted.
        let Some(mut leaving) = leaving.filter(|leaving| leaving.epoch == epoch) else {
            return;
        };
        leaving.phases.push(("release", begun.elapsed()));
        tell(&self.slot, &leaving);
        self.slot.set_departure(leaving);
    }
}

/// One line with all that an operator wants to know of it.
fn tell(slot: &Slot, leaving: &Departure) {
    tracing::info!(
        service = slot.config.name,
        epoch = leaving.epoch,
        kind = leaving.kind,
        total_ms = total(&leaving.phases).as_secs_f64() * 1000.0,
        phases_ms = in_milliseconds(&leaving.phases),
        "released"
    );
}
