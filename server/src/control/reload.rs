//! `exports reload` and SIGHUP: the files of this node are read again.
//!
//! Without a cluster they come into force at once. In a cluster they are a proposal: a new
//! definition of the service, which the active node brings into force, whichever that is. Who asks
//! is told what became of it there.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use super::cluster::ASK_TIME_MAX;
use crate::cluster::definition::{Definition, InForce, Undefined};
use crate::cluster::{ClusterCommand, Command, Outcome, ServiceId, ServiceState};
use crate::config::cluster::NodeConfig;
use crate::services::{Services, Slot};
use crate::{definitions, volumes};

/// Reads the files of all services again, without holding up the control runtime.
pub async fn reload_in_background(services: &Arc<Services>) {
    for slot in &services.slots {
        let is_alone = services.config.cluster.is_none();
        if is_alone && slot.serving().is_none() {
            continue;
        }
        match reload(services, slot, None).await {
            Ok(done) => tracing::info!(service = slot.config.name, "export lists reloaded: {done}"),
            Err(error) => {
                tracing::error!(
                    service = slot.config.name,
                    "export lists not reloaded: {error}"
                );
            }
        }
    }
}

/// Reads the files of a service again. `expected_version`: only if the cluster has this definition
/// of it now.
///
/// # Errors
/// What to tell whoever asked.
pub(super) async fn reload(
    services: &Arc<Services>,
    slot: &Arc<Slot>,
    expected_version: Option<u64>,
) -> Result<String, String> {
    if services.config.cluster.is_some() {
        return propose(services, slot, expected_version).await;
    }
    let name = &slot.config.name;
    let node = slot.serving();
    let node = node.ok_or_else(|| format!("service `{name}` is not served now"))?;
    let sources = slot.config.settings.sources.clone();
    let services = Arc::clone(services);
    slot.looks
        .look(move || {
            volumes::check_lists(&services.config.export_lists())?;
            volumes::reload(volumes::read_lists(&sources)?, &node, false)
        })
        .await
}

async fn propose(
    services: &Arc<Services>,
    slot: &Arc<Slot>,
    expected_version: Option<u64>,
) -> Result<String, String> {
    let name = slot.config.name.clone();
    let not_yet = || format!("the cluster does not know service `{name}` yet");
    let id = *slot.id.get().ok_or_else(not_yet)?;
    let known = services
        .state()
        .service(id)
        .map_or(0, ServiceState::version);
    let definition = {
        let (services, name) = (Arc::clone(services), name.clone());
        let reading = timeout(
            READ_TIME_MAX,
            slot.looks.look(move || read(&services, &name)),
        );
        let late = |_| {
            "the export lists or exported directories do not answer\nhint: a disk may hang, also \
             that of another service: see the kernel's log (`dmesg`), or reload on another node"
                .to_owned()
        };
        reading.await.map_err(late)??
    };
    slot.set_files(Some(definition.clone()));
    let expected = expected_version.unwrap_or(known);
    // Other services would have to wait until the same was in force once more.
    if expected == known && is_in_force(services, id, known) && is_so(services, id, &definition) {
        return wait_in_force(services, slot, id, known, &definition).await;
    }
    let command = Command::Cluster(ClusterCommand::Define {
        service: id,
        expected_version: expected,
        definition: definition.clone(),
    });
    let asked = timeout(ASK_TIME_MAX, services.proposer.ask(command)).await;
    let asked = asked.map_err(|_| {
        "the cluster has no majority now; it may take the new definition when it has one\nhint: \
         see `havenfs cluster status`"
            .to_owned()
    })?;
    match asked.map_err(|error| error.to_string())? {
        Outcome::Defined(version) => wait_in_force(services, slot, id, version, &definition).await,
        Outcome::NotDefined(Undefined::OtherVersion(version)) => {
            // All nodes may have been told at once, with the same files.
            if expected_version.is_none() && is_so(services, id, &definition) {
                return wait_in_force(services, slot, id, version, &definition).await;
            }
            Err(format!(
                "service `{name}` was defined anew meanwhile: it has version {version}, and this \
                 would follow {expected}\nhint: see `havenfs service list`, and reload again if it \
                 is still wanted"
            ))
        }
        Outcome::NotDefined(
            problem @ (Undefined::AddressTaken { .. } | Undefined::AddressInUse { .. }),
        ) => Err(format!(
            "service `{name}` is not defined anew: {}",
            problem.told(|node| services.cluster.name_of(node))
        )),
        Outcome::NotDefined(problem) => Err(format!(
            "service `{name}` is not defined anew: {problem}\nhint: correct the files of this node"
        )),
        _ => Err(not_yet()),
    }
}

/// What the files of this node say now, the configuration file included.
fn read(services: &Services, name: &str) -> Result<Definition, String> {
    let config = &services.config;
    let fresh: NodeConfig = config.read_again().map_err(|error| error.to_string())?;
    let mut all = fresh.services.iter();
    let service = all.find(|service| service.name == name).ok_or_else(|| {
        format!("the configuration file of this node has no service `{name}` any more")
    })?;
    let definition = definitions::of_files(service).map_err(|error| error.to_string())?;
    let specs = definitions::specs_of(name, &definition).map_err(|error| error.to_string())?;
    let checked = definitions::overlap::may_propose(services, name, &specs);
    checked.map_err(|error| match &error {
        volumes::ExportsError::Overlap { one, other, .. } => {
            let ghost = if one == name { other } else { one };
            format!(
                "{error}\nhint: if `{ghost}` is in the files of no node any more, `havenfs service \
                 forget {ghost}` ends it"
            )
        }
        _ => error.to_string(),
    })?;
    Ok(definition)
}

fn is_in_force(services: &Services, id: ServiceId, version: u64) -> bool {
    let state = services.state();
    let told = state.service(id).map(ServiceState::in_force);
    told.is_some_and(|told| told.version == version && !told.refused)
}

fn is_so(services: &Services, id: ServiceId, definition: &Definition) -> bool {
    let state = services.state();
    let defined = state.service(id).and_then(|service| service.defined());
    defined.is_some_and(|defined| defined.definition == *definition)
}

/// Waits until the active node has made something of a definition, and says what.
async fn wait_in_force(
    services: &Services,
    slot: &Slot,
    id: ServiceId,
    version: u64,
    definition: &Definition,
) -> Result<String, String> {
    let mut changes = services.changes.clone();
    let deadline = Instant::now() + IN_FORCE_TIME_MAX;
    let name = &slot.config.name;
    loop {
        changes.borrow_and_update();
        let found = {
            let state = services.state();
            state
                .service(id)
                .map(|service| (Arc::clone(service.in_force()), service.defined().cloned()))
        };
        let (in_force, defined) = found.unzip();
        let defined = defined.flatten();
        let active = services.active(slot);
        match in_force.as_deref() {
            Some(InForce {
                version: told,
                refused,
                said,
            }) if *told >= version => {
                let active = active.unwrap_or_else(|| "the active node".to_owned());
                let is_other = defined.is_some_and(|defined| {
                    defined.version == *told && defined.definition != *definition
                });
                return if !refused && is_other {
                    Err(format!(
                        "version {version} was followed by another one: version {told} is in force \
                         on {active}: {said}\nhint: see `havenfs service list`, and reload again \
                         if it is still wanted"
                    ))
                } else if *refused {
                    Err(format!(
                        "{active} can't bring it into force, so that what was before stays: {said}"
                    ))
                } else {
                    Ok(format!("version {told}, on {active}: {said}"))
                };
            }
            _ => {}
        }
        // The sender ends with the process.
        if !matches!(timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {
            return Ok(match active {
                Some(active) => format!(
                    "version {version} is stored; {active} has not brought it into force yet: see \
                     its log and `havenfs service list`"
                ),
                None => format!(
                    "version {version} is stored; no node serves `{name}` now, and the next that \
                     does begins with it"
                ),
            });
        }
    }
}

/// How long the files of this node may take, and the directories that they name.
const READ_TIME_MAX: Duration = Duration::from_secs(10);
/// How long for the active node, whose disks may be slow.
const IN_FORCE_TIME_MAX: Duration = Duration::from_secs(10);
