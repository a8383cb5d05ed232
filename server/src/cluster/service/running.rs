//! Which addresses the processes of the nodes run with, as each says of itself when it starts.
//!
//! A process has the addresses that the service had when it started, and a definition may have
//! others by now. So it is not enough to compare definitions: whoever runs with an address has it
//! on its interface when it serves. The log is told, so that all nodes know the same of each other:
//! that an address is still in use, that a node is to be restarted before it is given the service,
//! and which nodes have the service in their files.
//!
//! A note stays until the node makes another one, over its death too: it makes one before it takes
//! the service.

use serde::{Deserialize, Serialize};

use super::{Outcome, ServiceState};
use crate::cluster::definition::{ADDRESSES_MAX, ServiceAddress};
use crate::cluster::{NodeId, ServiceId};

/// A node has started with a service in its files, and with these addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningNote {
    /// Which service.
    pub service: ServiceId,
    /// The node and the life that says it.
    pub runs: Runs,
}

/// What a node runs with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runs {
    /// The node.
    pub node: NodeId,
    /// Which life of its process.
    pub incarnation: u64,
    /// The addresses of the service there.
    pub addresses: Vec<ServiceAddress>,
}

impl ServiceState {
    /// Notes what a node runs with. More addresses than a definition may have are left out.
    pub(in crate::cluster) fn note_running(&mut self, runs: &Runs) -> Outcome {
        let mut runs = runs.clone();
        runs.addresses.truncate(ADDRESSES_MAX);
        self.running.retain(|noted| noted.node != runs.node);
        self.running.push(runs);
        Outcome::Done
    }

    /// The nodes that have started with the service in their files, and what they run with.
    pub fn running(&self) -> &[Runs] {
        &self.running
    }

    /// What a node runs with, as far as it has said.
    pub fn runs_on(&self, node: NodeId) -> Option<&Runs> {
        self.running.iter().find(|runs| runs.node == node)
    }

    /// Whether a node runs with other addresses than the service has now: it gets them by a
    /// restart.
    pub fn is_stale_on(&self, node: NodeId) -> bool {
        let runs = self.runs_on(node).zip(self.defined());
        runs.is_some_and(|(runs, defined)| runs.addresses != defined.definition.addresses)
    }
}
