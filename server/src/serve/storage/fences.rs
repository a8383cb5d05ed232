//! Fences the nodes that may still write to a service's storage, and has the log note it; and that
//! this node is one of them from now on.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::{LEASE_LOOK, Near, Reason, Storage, pause_after};
use crate::clock::boot_time;
use crate::cluster::lease::Moment;
use crate::cluster::{Command, NodeId, Outcome, Queue, ServiceCommand, ServiceState};
use crate::serve::hooks::HookError;

/// How far the fences of an epoch are.
#[derive(Debug, Default)]
pub(super) struct Fencing {
    epoch: u32,
    /// When it began.
    begun: Option<Instant>,
    /// Whose fence has succeeded here, whether or not the log has it.
    done: Vec<NodeId>,
    /// How often the fence that is due has failed.
    failures: u32,
    /// The next try.
    not_before: Moment,
    /// Whether the log has it that this node is to be fenced if it loses the service.
    is_need_noted: bool,
}

impl Storage {
    /// Fences one node after the other; none when that is done, else when to go on.
    pub(super) async fn fence_all(&mut self, near: &mut Near<'_>) -> Option<Moment> {
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
            if !near.gate.is_open() {
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
        let unfenced = state.service(near.id)?.unfenced();
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
        let is_needed = |service: &ServiceState| service.unfenced().any(|node| node == lost);
        match self.run_while(hook, near, is_needed).await {
            Ok(said) => {
                tracing::info!(service, epoch, node = name, output = %said, "the node is fenced");
                self.fencing.failures = 0;
                self.fencing.not_before = Moment::default();
                self.fencing.done.push(lost);
                let nodes = vec![lost];
                let fenced = ServiceCommand::Fenced { epoch, nodes };
                if !note(near, fenced).await {
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
                let pause = pause_after(self.fencing.failures);
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

    /// Where there is a fence, has the log note that whoever takes the service from this node has
    /// to fence it. None when that is so, else when to try again.
    pub(super) async fn note_need(&mut self, near: &Near<'_>) -> Option<Moment> {
        let epoch = near.gate.epoch();
        if self.hooks.fence.is_none()
            || (self.fencing.epoch, self.fencing.is_need_noted) == (epoch, true)
        {
            return None;
        }
        let is_noted = note(near, ServiceCommand::NeedsFence { epoch }).await;
        self.fencing.is_need_noted = is_noted;
        // Nothing of the storage was touched: if the service is not this node's any more, nothing
        // is to be undone.
        (!is_noted).then(|| boot_time() + LEASE_LOOK)
    }
}

/// Has the log note something; whether it has.
async fn note(near: &Near<'_>, command: ServiceCommand) -> bool {
    let command = Command::Service(near.id, command);
    let asked = near.shared.proposer.ask_in(Queue::Leases, command);
    matches!(timeout(NOTE_TIME_MAX, asked).await, Ok(Ok(Outcome::Done)))
}

/// How long it may take until the log has an entry; the service is down meanwhile.
const NOTE_TIME_MAX: Duration = Duration::from_secs(5);
