//! What a keeper has the log note of its node, with which addresses it runs, and what it sees there
//! of its service: that an address is another one's by now, or that it was forgotten.

use tokio::time::sleep;

use super::{Keeper, TAKE_AGAIN};
use crate::cluster::service::running::{RunningNote, Runs};
use crate::cluster::{ClusterCommand, Command, Outcome};
use crate::definitions;
use crate::serve::defining::drop_copy;

impl Keeper {
    /// Has the log say with which addresses this process runs, before it can take the service.
    pub(super) async fn note_running(&self) {
        let services = &self.shared.services;
        if services.config.cluster.is_none() {
            return;
        }
        let own = services.cluster.own();
        let note = Command::Cluster(ClusterCommand::NoteRunning(RunningNote {
            service: self.id,
            runs: Runs {
                node: own.node,
                incarnation: own.incarnation,
                addresses: definitions::addresses_of(&self.slot.config.settings),
            },
        }));
        loop {
            // If it was forgotten just now, it is not taken either.
            if let Ok(Outcome::Done | Outcome::NoSuchService) =
                self.shared.proposer.ask(note.clone()).await
            {
                return;
            }
            // The store is busy, or ends, and then the process does.
            sleep(TAKE_AGAIN).await;
        }
    }

    /// Whether this node runs with an address that another service has by now. Says so once.
    pub(super) fn look_for_clash(&mut self) {
        let services = &self.shared.services;
        let node = services.cluster.own().node;
        let other = {
            let state = services.state();
            let other = state.clash(self.id, node);
            other.map(|other| other.name().to_owned())
        };
        if let Some(other) = &other
            && !self.clashes
        {
            tracing::error!(
                service = self.slot.config.name,
                other,
                "this node runs with an address that another service has by now, so that it does \
                 not serve this one: restart this node"
            );
        }
        self.clashes = other.is_some();
    }

    /// Whether an operator has had the service forgotten: it is not to be had any more by this
    /// process. Says so once.
    pub(super) fn look_whether_forgotten(&mut self) {
        let is_forgotten = {
            let state = self.shared.services.state();
            state.service(self.id).is_none()
        };
        if is_forgotten && !self.is_forgotten {
            tracing::error!(
                service = self.slot.config.name,
                "an operator has had this service forgotten: take it out of the files of this \
                 node, or restart this node to have it begin anew, without locks"
            );
            drop_copy(&self.shared, &self.slot);
        }
        self.is_forgotten = is_forgotten;
    }
}
