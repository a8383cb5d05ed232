//! Opening a service in an epoch, and closing it: exports, locks, ports, listeners.
//!
//! Nothing answers before the exports are open and the locks of the epoch are there; hosts are told
//! of the restart when NLM answers. Whatever was opened is closed again if a later step fails.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use imbl::OrdSet;
use rustix::io::Errno;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::connections::replicate_connections;
use super::defining::Following;
use super::handing::take_over;
use super::mounts::{replicate_mounts, replicated_list, tell_last};
use super::ports::{self, Numbers, Ports};
use super::probing;
use super::{ServeError, spawn_port, system, tidy};
use crate::address::Floating;
use crate::address::guard::Guard;
use crate::backend::handle::HandleKey;
use crate::backend::table::{Entry, HandleTable, TableError};
use crate::call::Port;
use crate::cluster::connections::Connection;
use crate::cluster::definition::Defined;
use crate::cluster::handles::HandleEntry;
use crate::cluster::{ClusterState, Command, Outcome, ServiceCommand, ServiceId};
use crate::config::Settings;
use crate::definitions;
use crate::export::ExportSpec;
use crate::gate::Gate;
use crate::host_calls::HostCalls;
use crate::lock_service::LockService;
use crate::mount_list::MountList;
use crate::net::runtimes::Runtimes;
use crate::net::tcp::Stop;
use crate::node::{Node, Parts, StorageUse};
use crate::numbering::Numbering;
use crate::raft::Proposer;
use crate::register::{self, Choice};
use crate::services::{Services, Slot};
use crate::state::State;
use crate::volumes;

/// What all services of this node share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) services: Arc<Services>,
    pub(super) proposer: Proposer,
    /// The state directory.
    pub(super) state: Arc<State>,
    pub(super) handle_keys: HandleKeys,
    /// How many files a service may have open.
    pub(super) descriptors: usize,
    pub(super) data: Arc<Runtimes>,
    /// Who keeps clients from seeing how this process dies.
    pub(super) guard: Option<Arc<Guard>>,
}

/// A service that is open in an epoch.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) node: Arc<Node>,
    pub(super) locks: Arc<LockService>,
    service: ServiceId,
    settings: Settings,
    /// Its addresses, if they move along.
    floating: Option<Arc<Floating>>,
    pub(super) choice: Arc<Choice>,
    pub(super) numbers: Numbers,
    /// How listeners and connections are stopped; none while there are none.
    stop: Option<watch::Sender<Stop>>,
    /// Why it is open in part only.
    pub(super) problem: Option<ServeError>,
    tasks: Vec<AbortHandle>,
}

impl Drop for Open {
    /// Whatever becomes of it, nothing answers any more.
    fn drop(&mut self) {
        // Mostly nothing, since it is destroyed before.
        if let Some(floating) = &self.floating {
            floating.withdraw();
        }
        self.close();
        for task in &self.tasks {
            task.abort();
        }
        self.locks.end();
    }
}

/// Opens a service; `note` is told of each step that is done.
pub(super) async fn open(
    shared: &Arc<Shared>,
    slot: &Arc<Slot>,
    service: ServiceId,
    gate: &Arc<Gate>,
    storage_use: Arc<StorageUse>,
    patient: bool,
    note: &mut impl FnMut(&'static str),
) -> Result<Open, ServeError> {
    let defined = {
        let state = shared.services.state();
        let service = state.service(service);
        service.and_then(|service| service.defined().cloned())
    };
    let made = {
        let (shared, slot, gate) = (Arc::clone(shared), Arc::clone(slot), Arc::clone(gate));
        let defined = defined.clone();
        // Directories may lie on a slow disk, and ids on a slow log.
        tokio::task::spawn_blocking(move || {
            make(
                &shared,
                &slot,
                service,
                &gate,
                storage_use,
                defined.as_deref(),
            )
        })
    };
    let made = made.await.map_err(std::io::Error::other);
    let (node, locks) = made.map_err(system("open the exports"))??;
    note("exports");
    if let Some(time_max) = slot.config.storage_time_max {
        // Nothing of a client is under way yet, so it can be left alone, also if it hangs.
        probing::try_once(slot, &node, time_max).await?;
        note("probe");
    }
    locks.open().await.map_err(ServeError::Activate)?;
    take_over(&shared.services.state(), service, &node);
    note("locks");
    let mut opened = Open {
        choice: Arc::new(Choice::Off(register::OffReason::Asked)),
        numbers: Numbers::default(),
        node,
        locks,
        service,
        settings: slot.config.settings.clone(),
        floating: slot.floating.clone(),
        stop: None,
        problem: None,
        tasks: Vec::new(),
    };
    if let Err(problem) = opened.listen(shared, patient).await {
        opened.problem = Some(problem);
        return Ok(opened);
    }
    note("listen");
    if opened.floating.is_some() {
        if let Err(problem) = opened.raise(shared).await {
            opened.problem = Some(problem);
            return Ok(opened);
        }
        note("address");
    }
    let tidying = Arc::clone(&opened.node);
    let unsticking = Arc::clone(&opened.node);
    opened.tasks.extend([
        tokio::spawn(async move { tidy(&tidying).await }).abort_handle(),
        tokio::spawn(async move { unsticking.pool.unstick().await }).abort_handle(),
    ]);
    let choice = Arc::clone(&opened.choice);
    opened
        .tasks
        .push(tokio::spawn(async move { watch_registration(&choice).await }).abort_handle());
    opened.locks.begin();
    if let Some(running) = defined {
        let following = Following {
            shared: Arc::clone(shared),
            slot: Arc::clone(slot),
            service,
            node: Arc::clone(&opened.node),
            running,
            taken_back: 0,
        };
        let following = following.follow(shared.services.changes.clone());
        opened.tasks.push(tokio::spawn(following).abort_handle());
    }
    note("answer");
    Ok(opened)
}

/// Wakes the clients that had these connections and have not come back; some times, since nobody
/// says whether it was heard.
async fn wake(floating: Arc<Floating>, node: Arc<Node>, lost: OrdSet<Connection>) {
    for pause in WAKE_PAUSES {
        tokio::time::sleep(pause).await;
        let back: BTreeSet<_> = node.clients.list().iter().map(|one| one.peer).collect();
        let lost = lost.iter().filter(|one| !back.contains(&one.peer()));
        let lost: Vec<_> = lost.copied().collect();
        let (floating, gate) = (Arc::clone(&floating), Arc::clone(&node.gate));
        let waking = tokio::task::spawn_blocking(move || floating.tickle(&gate, &lost));
        // A panic has ended the process already.
        let _ = waking.await;
    }
}

/// Looks whether rpcbind still has our entries.
async fn watch_registration(choice: &Choice) {
    if let Choice::Registered(registration) = choice {
        registration.watch(REGISTRATION_CHECK).await;
    }
}

/// What signs handles.
#[derive(Debug)]
pub(super) enum HandleKeys {
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
fn make(
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
    let (specs, names) = what_is_served(shared, slot, defined)?;
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
    volumes::open_exports(&node, &[])?;
    Ok((node, locks))
}

/// The exports and names of a service: as it is defined, or on a node without a cluster as its
/// files say.
fn what_is_served(
    shared: &Shared,
    slot: &Slot,
    defined: Option<&Defined>,
) -> Result<(Vec<ExportSpec>, Vec<String>), ServeError> {
    let (service, settings) = (&slot.config.name, &slot.config.settings);
    if let Some(Defined { definition, .. }) = defined {
        let specs = definitions::specs_of(service, definition)?;
        definitions::check_overlap(&shared.services, service, &specs)?;
        return Ok((specs, definitions::names_of(definition)));
    }
    volumes::check_lists(&shared.services.config.export_lists())?;
    let specs = volumes::read_lists(&settings.sources)?;
    Ok((specs, settings.service_names.clone()))
}

/// Where what is a service's and this node's alone is kept, in a cluster.
pub(super) fn service_dir(state: &State, name: &str) -> std::io::Result<PathBuf> {
    let dir = state.dir().join("services").join(name);
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// An entry as it is replicated.
pub(super) fn replicated(entry: &Entry) -> HandleEntry {
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

impl Open {
    /// Binds the ports and serves them. `patient`: an address may still be held by the process of
    /// an earlier active node on this machine.
    pub(super) async fn listen(
        &mut self,
        shared: &Shared,
        patient: bool,
    ) -> Result<(), ServeError> {
        let settings = &self.settings;
        let deadline = Instant::now()
            + if patient {
                BIND_TIME_MAX
            } else {
                Duration::ZERO
            };
        let ports = loop {
            match Ports::bind(settings) {
                Err(ServeError::Listen { error, .. })
                    if error.source.kind() == std::io::ErrorKind::AddrInUse
                        && Instant::now() < deadline
                        && !self.node.gate.is_over() =>
                {
                    tokio::time::sleep(BIND_AGAIN).await;
                }
                bound => break bound?,
            }
        };
        self.node.ports.set_own(ports.entries());
        let portmap_settings = register::Settings::new(settings.portmap_port, &settings.listen);
        let wanted = settings.portmap;
        let choice = register::choose(wanted, &portmap_settings, &ports.entries()).await?;
        // Set at the first time, and the same later.
        let _ = self.node.portmapper.set(choice.to_string());
        self.numbers = ports.numbers();
        let portmap = match &choice {
            Choice::Embedded => {
                let bound = ports::bind_portmap(settings)?;
                self.node
                    .ports
                    .set_own(ports.entries_with_portmap(bound.port));
                Some((Port::Portmap, bound))
            }
            _ => None,
        };
        self.choice = Arc::new(choice);
        let (stop, stopped) = watch::channel(Stop::Serve);
        self.stop = Some(stop);
        for (port, bound) in ports.into_sockets().into_iter().chain(portmap) {
            spawn_port(&self.node, &shared.data, port, bound, &stopped)
                .map_err(system("serve a port"))?;
        }
        if shared.services.config.cluster.is_some() {
            let (node, services) = (Arc::clone(&self.node), Arc::clone(&shared.services));
            let listen = settings.listen.clone();
            // Both end with the listeners.
            tokio::spawn(replicate_mounts(
                Arc::clone(&node),
                Arc::clone(&services),
                self.service,
                stopped.clone(),
            ));
            tokio::spawn(replicate_connections(
                node,
                services,
                self.service,
                listen,
                stopped,
            ));
        }
        Ok(())
    }

    /// Brings the addresses here, if the lease holds, and tells the neighbours: now and some times
    /// more. Whoever calls sees by the gate whether they came.
    pub(super) async fn raise(&mut self, shared: &Shared) -> Result<(), ServeError> {
        let Some(floating) = self.floating.clone() else {
            return Ok(());
        };
        let gate = Arc::clone(&self.node.gate);
        let raising = {
            let (floating, gate) = (Arc::clone(&floating), Arc::clone(&gate));
            // Somebody else may have the kernel's lock of its network configuration.
            tokio::task::spawn_blocking(move || floating.raise(&gate))
        };
        let raised = raising.await.map_err(std::io::Error::other);
        if !raised.map_err(system("raise the addresses"))?? {
            return Ok(());
        }
        let announcing = tokio::spawn(Arc::clone(&floating).announce(gate));
        let lost = {
            let state = shared.services.state();
            let service = state.service(self.service);
            service.map(|service| service.connections().clone())
        };
        let waking = wake(floating, Arc::clone(&self.node), lost.unwrap_or_default());
        let waking = tokio::spawn(waking);
        let tasks = [announcing.abort_handle(), waking.abort_handle()];
        self.tasks.extend(tasks);
        Ok(())
    }

    /// Whether it has listeners.
    pub(super) const fn is_listening(&self) -> bool {
        self.stop.is_some()
    }

    /// Closes all listeners and connections at once; nothing is answered, nothing unread is read.
    pub(super) async fn destroy(&mut self) {
        // First, so that clients don't see how the connections end.
        if let Some(floating) = self.floating.clone() {
            // Somebody else may have the kernel's lock of its network configuration.
            let withdrawing = tokio::task::spawn_blocking(move || floating.withdraw());
            // A panic has ended the process already.
            let _ = withdrawing.await;
        }
        self.close();
    }

    fn close(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Nobody may be left to listen.
            let _ = stop.send(Stop::Destroy);
        }
    }

    /// Takes no new calls, answers what was taken, and closes. Returns when that is done, or its
    /// time is over.
    pub(super) async fn finish(&mut self, time_max: Duration) {
        let Some(stop) = &self.stop else { return };
        // Nobody may be left to listen.
        let _ = stop.send(Stop::Finish);
        let drained = async {
            while self.node.connections.all() > 0 {
                tokio::time::sleep(STOP_CHECK).await;
            }
        };
        // What is not answered by then is not answered at all.
        let _ = tokio::time::timeout(time_max, drained).await;
        self.destroy().await;
    }

    /// Ends the workers, so that no change is under way any more, and brings all to disk. The gate
    /// must be closed.
    ///
    /// # Errors
    /// If a call is stuck in the kernel, or what was written can't be brought to disk in time: then
    /// nobody may be told that this node has stopped.
    pub(super) async fn settle(&self, time_max: Duration) -> Result<(), Unsettled> {
        let node = Arc::clone(&self.node);
        let settle = move || {
            let stuck = node.pool.finish(time_max);
            // What is written to ask the storage whether it works is nobody's.
            if stuck > node.probes.load(Ordering::Acquire) {
                return Err(Unsettled::Stuck);
            }
            let exports = node.exports.load();
            let puts_off = |id| {
                let export = exports.by_id(id);
                export.is_some_and(|export| export.rules().iter().any(|rule| !rule.options.sync))
            };
            let synced = node.files.sync_all(puts_off);
            synced.then_some(()).ok_or(Unsettled::NotOnDisk)
        };
        let settling = tokio::task::spawn_blocking(settle);
        match tokio::time::timeout(time_max + time_max, settling).await {
            Ok(Ok(settled)) => settled,
            // A panic has ended the process already.
            Ok(Err(_)) | Err(_) => Err(Unsettled::NotOnDisk),
        }
    }

    /// Takes back what is registered elsewhere, if no other service needs it, and saves what is
    /// this node's.
    pub(super) async fn leave(&self, shared: &Shared) {
        // What stops as well does not count: whoever is last takes the entries away.
        let slots = shared.services.slots.iter();
        let mut others = slots.filter_map(|slot| slot.serving());
        let is_shared = others.any(|node| !Arc::ptr_eq(&node, &self.node));
        if let Choice::Registered(registration) = &*self.choice
            && !is_shared
            && let Ok(Err(error)) =
                tokio::time::timeout(LEAVE_TIME_MAX, registration.remove()).await
        {
            tracing::warn!(%error, "cannot take the registration with rpcbind back");
        }
        if shared.services.config.cluster.is_some() {
            tell_last(&self.node, &shared.services, self.service).await;
        }
        let node = Arc::clone(&self.node);
        let save = move || {
            if let Err(error) = node.mounts.save_if_dirty() {
                tracing::warn!(%error, "cannot save the mount list");
            }
        };
        let saving = tokio::task::spawn_blocking(save);
        // Nobody's life depends on it.
        let _ = tokio::time::timeout(LEAVE_TIME_MAX, saving).await;
    }
}

/// Why a service can't be said to have stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unsettled {
    /// A call does not come back from the kernel.
    #[error("a call is stuck in the kernel, most likely on a disk that hangs")]
    Stuck,
    /// Something that was written is not on disk.
    #[error("what was written can't be brought to disk")]
    NotOnDisk,
}

impl From<TableError> for ServeError {
    fn from(error: TableError) -> Self {
        Self::Table(error)
    }
}

/// How long an address may be held by an earlier active node on this machine.
const BIND_TIME_MAX: Duration = Duration::from_secs(30);
/// How often rpcbind is asked whether our entries are still there.
const REGISTRATION_CHECK: Duration = Duration::from_secs(5);
const BIND_AGAIN: Duration = Duration::from_millis(20);
const STOP_CHECK: Duration = Duration::from_millis(5);
/// When clients are woken, each counted from the one before.
const WAKE_PAUSES: [Duration; 3] = [
    Duration::ZERO,
    Duration::from_millis(300),
    Duration::from_millis(700),
];
const LEAVE_TIME_MAX: Duration = Duration::from_secs(2);
/// How long the workers, and then the disk, may take at the end.
pub(super) const SETTLE_TIME_MAX: Duration = Duration::from_secs(5);
/// The same where it is known that the disk does not answer.
pub(super) const SETTLE_DEAD_TIME_MAX: Duration = Duration::from_secs(1);
