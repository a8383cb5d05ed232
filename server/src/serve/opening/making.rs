//! Puts the server of a service in an epoch together, from the replicated state and the disk. It
//! listens to nobody and answers nothing yet.

use std::ffi::CString;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use rustix::io::Errno;

use super::Shared;
use crate::backend::handle::HandleKey;
use crate::backend::table::{Entry, HandleTable};
use crate::cluster::definition::Defined;
use crate::cluster::handles::HandleEntry;
use crate::cluster::{ClusterState, Command, Outcome, ServiceCommand, ServiceId};
use crate::definitions;
use crate::export::ExportSpec;
use crate::gate::Gate;
use crate::host_calls::HostCalls;
use crate::lock_service::LockService;
use crate::mount_list::MountList;
use crate::node::{Node, Parts, StorageUse};
use crate::numbering::Numbering;
use crate::serve::ServeError;
use crate::serve::mounts::replicated_list;
use crate::services::Slot;
use crate::state::State;
use crate::volumes;
use crate::volumes::overlap::{Shown, with_places};

/// What signs handles.
#[derive(Debug)]
pub(in crate::serve) enum HandleKeys {
    /// Of this node alone.
    Own(Vec<HandleKey>),
    /// Derived from the cluster's key, beside those that the first node brought along.
    Derived([u8; 16]),
}

impl HandleKeys {
    /// All of them; the last one is the newest. Of one service a node knows them when it has it,
    /// since they are older in the log.
    fn of(&self, state: &ClusterState) -> Vec<HandleKey> {
        let secret = match self {
            Self::Own(keys) => return keys.clone(),
            Self::Derived(secret) => *secret,
        };
        let brought = state.members().handle_keys();
        let last = brought.iter().map(|key| key.id).max();
        let brought = brought.iter().map(|key| HandleKey {
            id: key.id,
            secret: key.secret,
        });
        let id = last.unwrap_or_default().saturating_add(1);
        brought.chain([HandleKey { id, secret }]).collect()
    }
}

/// What waits for disks and for the log.
pub(super) fn make(
    shared: &Shared,
    slot: &Slot,
    service: ServiceId,
    gate: &Arc<Gate>,
    storage_use: Arc<StorageUse>,
    defined: Option<&Defined>,
) -> Result<(Arc<Node>, Arc<LockService>), ServeError> {
    let settings = &slot.config.settings;
    let is_alone = shared.services.config.cluster.is_none();
    let proposer = shared.proposer.clone();
    let ask = Box::new(move |command| proposer.ask_blocking(command));
    let copy = is_alone.then(|| Arc::clone(&shared.state));
    let numbers = Numbering::new(
        (service, gate.epoch()),
        Arc::clone(&shared.services.state),
        ask,
        copy,
    );
    numbers.restore().map_err(ServeError::Activate)?;
    let Content {
        specs,
        names,
        shown,
    } = what_is_served(shared, slot, defined)?;
    let exports = volumes::load_table(specs, &numbers)?;
    if exports.exports().is_empty() {
        return Err(ServeError::NoExports);
    }
    let (handles, mounts) = if is_alone {
        let dir = shared.state.dir();
        (HandleTable::load(dir)?, MountList::open(dir)?)
    } else {
        (
            replicated_handles(shared, service, gate.epoch()),
            replicated_list(&shared.services, service),
        )
    };
    // Not inside what follows: the state would be locked as long, and applying waits for it.
    let handle_keys = shared.handle_keys.of(&shared.services.state());
    let node = Arc::new(Node::new(Parts {
        gate: Arc::clone(gate),
        mounts,
        handle_keys,
        numbers,
        handles,
        exports,
        descriptors: shared.descriptors,
        floats: slot.floating.is_some(),
        guard: shared.guard.clone().filter(|_| slot.floating.is_some()),
        storage_use,
    })?);
    *node.shown.lock().unwrap_or_else(PoisonError::into_inner) = shown;
    let calls = Arc::new(HostCalls::new(settings.host_portmap_port, Arc::clone(gate)));
    let locks = Arc::new(LockService::new(
        settings,
        service,
        Arc::clone(gate),
        Arc::clone(&shared.services.state),
        shared.proposer.clone(),
        calls,
    ));
    locks.set_names(&names);
    // Nobody else sets it.
    let _ = node.locks.set(Arc::clone(&locks));
    volumes::open_exports(&node)?;
    Ok((node, locks))
}

/// What a service serves.
struct Content {
    specs: Vec<ExportSpec>,
    names: Vec<String>,
    /// What others must not show.
    shown: Arc<Vec<Shown>>,
}

/// What a service serves: as it is defined, or on a node without a cluster as its files say.
fn what_is_served(
    shared: &Shared,
    slot: &Slot,
    defined: Option<&Defined>,
) -> Result<Content, ServeError> {
    let (service, settings) = (&slot.config.name, &slot.config.settings);
    if let Some(Defined { definition, .. }) = defined {
        let specs = definitions::specs_of(service, definition)?;
        let shown = Arc::new(with_places(service, &specs));
        // Before the look at the others: of two that are opened at once one sees the other.
        slot.set_shown(&shown);
        definitions::overlap::may_open(&shared.services, service, &shown)?;
        return Ok(Content {
            specs,
            names: definitions::names_of(definition),
            shown,
        });
    }
    volumes::check_lists(&shared.services.config.export_lists())?;
    let specs = volumes::read_lists(&settings.sources)?;
    Ok(Content {
        specs,
        names: settings.service_names.clone(),
        shown: Arc::default(),
    })
}

/// Where what is a service's and this node's alone is kept, in a cluster.
pub(in crate::serve) fn service_dir(state: &State, name: &str) -> std::io::Result<PathBuf> {
    let dir = services_dir(state).join(name);
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// Where all services have their directories.
pub(in crate::serve) fn services_dir(state: &State) -> PathBuf {
    state.dir().join("services")
}

/// An entry as it is replicated.
pub(in crate::serve) fn replicated(entry: &Entry) -> HandleEntry {
    let (export, fs, ino, born) = entry.identity;
    HandleEntry {
        export,
        fs,
        ino,
        born,
        parent: entry.parent,
        name: entry.name.as_bytes().into(),
    }
}

fn replicated_handles(shared: &Shared, service: ServiceId, epoch: u32) -> HandleTable {
    let proposer = shared.proposer.clone();
    let replicate = move |id, entry: Option<&Entry>| {
        let entry = entry.map(replicated);
        let command = ServiceCommand::SetHandle { epoch, id, entry };
        match proposer.ask_blocking(Command::Service(service, command)) {
            Ok(Outcome::Done) => Ok(()),
            Ok(Outcome::TooManyHandles) => Err(Errno::NOSPC),
            // Nobody is answered in an earlier epoch.
            Ok(_) | Err(_) => Err(Errno::IO),
        }
    };
    let state = shared.services.state();
    let entries = state
        .service(service)
        .map(|service| service.handles().clone());
    drop(state);
    let entries = entries.unwrap_or_default().into_iter();
    let entries = entries.filter_map(|(id, entry)| {
        // A name with a zero byte was never written.
        let name = CString::new(&*entry.name).ok()?;
        let identity = (entry.export, entry.fs, entry.ino, entry.born);
        let parent = entry.parent;
        Some((
            id,
            Entry {
                identity,
                parent,
                name,
            },
        ))
    });
    HandleTable::replicated(entries, Box::new(replicate))
}
