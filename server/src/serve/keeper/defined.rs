//! What a keeper does about the definition of its service: proposes that of this node's files where
//! there is none, and warns where they differ from the one that is served.
//!
//! The files are read in a task of its own, since they may lie on a disk that hangs: a service that
//! is defined waits for no file of any node.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::Keeper;
use crate::cluster::definition::{Defined, Definition};
use crate::cluster::service::ServiceState;
use crate::cluster::{ClusterCommand, Command, Outcome, ServiceId};
use crate::config::service::ServiceConfig;
use crate::definitions;
use crate::serve::defining::keep_copy;
use crate::services::{Services, Slot};
use crate::volumes::ExportsError;

impl Keeper {
    /// Returns when the service is defined: by this node's files, if by none before. A node whose
    /// files have mistakes waits for another one.
    pub(super) async fn define(&mut self) {
        let services = Arc::clone(&self.shared.services);
        let name = &self.slot.config.name;
        let mut configured = services.config.services.iter();
        let Some(files) = configured.find(|service| service.name == *name) else {
            return;
        };
        if services.config.cluster.is_none() {
            return;
        }
        let mut said = String::new();
        loop {
            let files = files.clone();
            let mut reading = tokio::spawn(read(
                Arc::clone(&services),
                Arc::clone(&self.slot),
                self.id,
                files,
            ));
            let Some(read) = self.wait_for(&mut reading).await else {
                // What it still reads is told when it is there.
                return;
            };
            let proposed = match read {
                Ok(definition) => self.propose(definition).await,
                Err(problem) => Err(problem),
            };
            let Err(problem) = proposed else {
                return;
            };
            if said != problem {
                tracing::error!(
                    service = name,
                    "the files of this node do not define the service, waiting for another node to \
                     define it: {problem}"
                );
                said = problem;
            }
            sleep(DEFINE_AGAIN).await;
        }
    }

    /// What the files say; none if the service is defined before that is known.
    async fn wait_for(
        &self,
        reading: &mut JoinHandle<Result<Definition, String>>,
    ) -> Option<Result<Definition, String>> {
        let mut changes = self.changes.clone();
        let mut is_late = false;
        loop {
            changes.borrow_and_update();
            if self.defined().is_some() {
                return None;
            }
            tokio::select! {
                // A panic has ended the process already.
                read = &mut *reading => return Some(read.unwrap_or_else(|error| Err(error.to_string()))),
                // An error says that the store has ended, and then the process does.
                Ok(()) = changes.changed() => {}
                () = sleep(LATE_AFTER), if !is_late => {
                    is_late = true;
                    tracing::error!(
                        service = self.slot.config.name,
                        "the export lists of this node do not answer: waiting for them, or for \
                         another node to define the service\nhint: see the kernel's log (`dmesg`) \
                         for the disk"
                    );
                }
            }
        }
    }

    async fn propose(&self, definition: Definition) -> Result<(), String> {
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
        defined(&self.shared.services, self.id)
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
            warn_of_differences(service, &files, &defined);
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

fn defined(services: &Services, id: ServiceId) -> Option<Arc<Defined>> {
    let state = services.state();
    let service = state.service(id);
    service.and_then(ServiceState::defined).cloned()
}

/// Reads the files of this node, and looks whether they may define the service where nothing does;
/// where something does, says what is wrong with them.
async fn read(
    services: Arc<Services>,
    slot: Arc<Slot>,
    id: ServiceId,
    files: ServiceConfig,
) -> Result<Definition, String> {
    let was_defined = defined(&services, id).is_some();
    let reading = tokio::task::spawn_blocking({
        let services = Arc::clone(&services);
        move || {
            let definition = definitions::of_files(&files)?;
            if !was_defined {
                let specs = definitions::specs_of(&files.name, &definition)?;
                definitions::overlap::may_propose(&services, &files.name, &specs)?;
            }
            Ok(definition)
        }
    });
    let read = reading.await.map_err(|error| error.to_string());
    let read = read.and_then(|read| read.map_err(|error: ExportsError| error.to_string()));
    let service = &slot.config.name;
    if let Ok(definition) = &read {
        slot.set_files(Some(definition.clone()));
    }
    if let Some(defined) = defined(&services, id) {
        match &read {
            Ok(definition) => warn_of_differences(service, definition, &defined),
            Err(problem) => tracing::error!(
                service,
                "the files of this node do not define the service, what the cluster has is served: \
                 {problem}"
            ),
        }
    }
    read
}

fn warn_of_differences(service: &str, files: &Definition, defined: &Defined) {
    let differs = files.differences(&defined.definition);
    if !differs.is_empty() {
        tracing::warn!(
            service,
            version = defined.version,
            differs = differs.join(", "),
            "the files of this node differ from what the cluster serves, which holds; make them \
             the same, or run `havenfs exports reload` here to have all nodes serve what these say"
        );
    }
}

/// After a mistake, before the files are read again.
const DEFINE_AGAIN: Duration = Duration::from_secs(1);
/// For how long nothing is said of files that do not answer.
const LATE_AFTER: Duration = Duration::from_secs(10);
