//! What a keeper does about the definition of its service: proposes that of this node's files where
//! there is none, and warns where they differ from the one that is served.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::Keeper;
use crate::cluster::definition::Defined;
use crate::cluster::service::ServiceState;
use crate::cluster::{ClusterCommand, Command, Outcome};
use crate::config::service::ServiceConfig;
use crate::definitions;
use crate::serve::defining::keep_copy;

impl Keeper {
    /// Returns when the service is defined: by this node's files, if by none before. A node whose
    /// files have mistakes waits for another one.
    pub(super) async fn define(&mut self) {
        let configured = &self.shared.services.config;
        let name = &self.slot.config.name;
        let mut services = configured.services.iter();
        let Some(files) = services.find(|service| service.name == *name) else {
            return;
        };
        if configured.cluster.is_none() {
            return;
        }
        let mut said = String::new();
        loop {
            let Err(problem) = self.try_to_define(files.clone()).await else {
                return;
            };
            let is_defined = self.defined().is_some();
            if said != problem {
                let then = if is_defined {
                    "what the cluster has is served"
                } else {
                    "waiting for another node to define it"
                };
                tracing::error!(
                    service = name,
                    "the files of this node do not define the service, {then}: {problem}"
                );
                said = problem;
            }
            if is_defined {
                return;
            }
            sleep(DEFINE_AGAIN).await;
        }
    }

    async fn try_to_define(&self, files: ServiceConfig) -> Result<(), String> {
        // Lists may lie on a slow disk.
        let reading = tokio::task::spawn_blocking(move || definitions::of_files(&files));
        let read = reading.await.map_err(|error| error.to_string())?;
        let definition = read.map_err(|error| error.to_string())?;
        self.slot.set_files(Some(definition.clone()));
        if self.defined().is_some() {
            return Ok(());
        }
        let define = Command::Cluster(ClusterCommand::Define {
            service: self.id,
            expected_version: 0,
            definition,
        });
        let outcome = self.shared.proposer.ask(define).await;
        match outcome.map_err(|error| error.to_string())? {
            Outcome::Defined(_) => Ok(()),
            // Another node was faster.
            _ if self.defined().is_some() => Ok(()),
            Outcome::NotDefined(problem) => {
                let cluster = &self.shared.services.cluster;
                Err(problem.told(|node| cluster.name_of(node)))
            }
            _ => Err("the cluster does not know it".to_owned()),
        }
    }

    fn defined(&self) -> Option<Arc<Defined>> {
        let state = self.shared.services.state();
        let service = state.service(self.id);
        service.and_then(ServiceState::defined).cloned()
    }

    /// Warns once for each definition that is not that of this node's files, and keeps a copy.
    pub(super) fn look_at_definition(&mut self) {
        let Some(defined) = self.defined() else {
            return;
        };
        if defined.version == self.version {
            return;
        }
        self.version = defined.version;
        let (service, version) = (&self.slot.config.name, defined.version);
        if let Some(files) = self.slot.files() {
            let differs = files.differences(&defined.definition);
            if !differs.is_empty() {
                tracing::warn!(
                    service,
                    version,
                    differs = differs.join(", "),
                    "the files of this node differ from what the cluster serves, which holds; make \
                     them the same, or run `havenfs exports reload` here to have all nodes serve \
                     what these say"
                );
            }
        }
        if self.slot.runs_other_addresses(&defined.definition) {
            tracing::warn!(
                service,
                version,
                "this node runs with other addresses than the service has now, and takes it only \
                 if no other node does: restart this node"
            );
        }
        keep_copy(&self.shared, &self.slot, defined);
    }
}

/// After a mistake, before the files are read again.
const DEFINE_AGAIN: Duration = Duration::from_secs(1);
