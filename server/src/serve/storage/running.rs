//! Runs one command of a service at a time, for as long as it is needed and the lease of this node
//! holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::{Near, Storage};
use crate::clock::boot_time;
use crate::cluster::service::{Active, ServiceState};
use crate::gate::Gate;
use crate::serve::hooks::{self, Hook, HookError, Said};

/// A command that runs, as far as it is known.
#[derive(Debug)]
pub(super) struct Running {
    cut_short: Arc<AtomicBool>,
    end: JoinHandle<Result<Said, HookError>>,
}

impl Storage {
    /// Runs a command as long as the process does not stop, the service is this node's, and
    /// `is_needed` agrees, which is asked with the service's state; else ends it early, and also
    /// when the lease is over: what comes then must not meet a command of this node.
    pub(super) async fn run_while(
        &mut self,
        hook: Hook,
        near: &mut Near<'_>,
        is_needed: impl Fn(&ServiceState) -> bool,
    ) -> Result<Said, HookError> {
        let own = near.shared.services.cluster.own();
        let own = Active {
            node: own.node,
            incarnation: own.incarnation,
        };
        let epoch = near.gate.epoch();
        let (service, title) = (self.service.clone(), hook.title.clone());
        let services = &near.shared.services;
        let is_moot = || {
            let state = services.state();
            state.service(near.id).is_none_or(|service| {
                service.epoch() != epoch || service.active() != Some(own) || !is_needed(service)
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
            () = lease_over(near.gate) => {
                tracing::warn!(
                    service,
                    epoch,
                    "the lease is over: ending the {title}, until it holds again"
                );
            }
            // An error says that the process ends as well.
            _ = stopping.wait_for(|stop| *stop) => {}
            end = self.run(hook) => return end,
        }
        self.end_running()
            .await
            .unwrap_or_else(|| Err(HookError::CutShort(title)))
    }

    /// Runs a command to its end. If this is not waited for, the command goes on until
    /// [`Storage::end_running`].
    pub(super) async fn run(&mut self, hook: Hook) -> Result<Said, HookError> {
        self.end_running().await;
        self.check_remnant()?;
        let cut_short = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cut_short);
        let title = hook.title.clone();
        let end = tokio::task::spawn_blocking(move || hooks::run(&hook, &flag));
        let running = self.running.insert(Running { cut_short, end });
        let end = (&mut running.end).await;
        self.running = None;
        // A panic has ended the process already.
        self.keep_remnant(end.unwrap_or(Err(HookError::CutShort(title))))
    }

    /// Ends what was begun and is not waited for any more; returns what became of it.
    pub(super) async fn end_running(&mut self) -> Option<Result<Said, HookError>> {
        let running = self.running.as_mut()?;
        running.cut_short.store(true, Ordering::Release);
        let end = (&mut running.end).await;
        self.running = None;
        let end = end.ok()?;
        Some(self.keep_remnant(end))
    }

    pub(super) fn keep_remnant(&mut self, end: Result<Said, HookError>) -> Result<Said, HookError> {
        if let Err(HookError::StillRuns(remnant)) = &end {
            self.remnant = Some(Arc::clone(remnant));
        }
        end
    }

    /// # Errors
    /// If a command that could not be ended still runs.
    pub(super) fn check_remnant(&mut self) -> Result<(), HookError> {
        self.remnant.take_if(|remnant| remnant.has_ended());
        match &self.remnant {
            Some(remnant) => Err(HookError::StillRuns(Arc::clone(remnant))),
            None => Ok(()),
        }
    }
}

/// Returns when a gate is not open any more.
async fn lease_over(gate: &Gate) {
    while gate.is_open() {
        let rest = gate.until().since(boot_time());
        sleep(rest.clamp(GATE_LOOK_MIN, GATE_LOOK_MAX)).await;
    }
}

/// How often the lease is looked at, which is renewed more often.
const GATE_LOOK_MIN: Duration = Duration::from_millis(2);
const GATE_LOOK_MAX: Duration = Duration::from_millis(100);
