//! What the [keeper](super) makes of the health of its storage: that it is asked for, and that the
//! log knows of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Keeper;
use crate::cluster::command::StorageNote;
use crate::cluster::{ClusterCommand, Command, Queue};
use crate::serve::probing;
use crate::services::Health;

impl Keeper {
    /// Begins to ask the storage whether it works. If it did not in an earlier life of this node,
    /// it is not believed to before it was seen to.
    pub(super) fn start_probing(&self) -> Option<JoinSet<()>> {
        let time_max = self.slot.config.storage_time_max?;
        if self.is_noted_failing() {
            let problem = "it did not when this was noted last".to_owned();
            self.slot.health.send_replace(Health::Fails(problem));
        }
        let mut probing = JoinSet::new();
        let services = Arc::clone(&self.shared.services);
        probing.spawn(probing::watch(services, Arc::clone(&self.slot), time_max));
        Some(probing)
    }

    fn is_noted_failing(&self) -> bool {
        let own = self.shared.services.cluster.own().node;
        let state = self.shared.services.state();
        let service = state.service(self.id);
        service.is_some_and(|service| service.failing().contains(&own))
    }

    /// Has the log say of this node's storage what is so; if that gets lost, again later. What
    /// failed and was not tried since stays noted for [`DOUBT_TIME`], in which this node may take
    /// what nobody else has, and the service is not given to it. Where nobody asks the storage
    /// nothing is known of it.
    pub(super) fn note_health(&mut self) {
        if self.is_forgotten {
            return;
        }
        let is_untried = *self.health.borrow() == Health::Untried;
        if is_untried && self.slot.config.storage_time_max.is_some() {
            let since = *self.doubted_since.get_or_insert_with(Instant::now);
            if since.elapsed() < DOUBT_TIME {
                return;
            }
        } else {
            self.doubted_since = None;
        }
        let fails = self.health.borrow().fails();
        if fails == self.is_noted_failing() || self.noting.swap(true, Ordering::AcqRel) {
            return;
        }
        let note = Command::Cluster(ClusterCommand::NoteStorage(StorageNote {
            service: self.id,
            node: self.shared.services.cluster.own().node,
            fails,
        }));
        let noting = Arc::clone(&self.noting);
        let proposer = &self.shared.proposer;
        proposer.propose_in(Queue::Leases, note, move |_| {
            noting.store(false, Ordering::Release);
        });
    }

    /// Whether the storage hangs here without an error, where no other node knows of its own.
    pub(super) fn hangs_unseen(&self) -> bool {
        let hangs = matches!(*self.health.borrow(), Health::Hangs(_));
        hangs && self.slot.config.hooks.all().next().is_some()
    }
}

/// How long a node whose storage failed is given nothing before it was tried again: so long may
/// somebody take to repair it.
const DOUBT_TIME: Duration = Duration::from_mins(10);
