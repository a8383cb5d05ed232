//! Opening a service in an epoch, and closing it: exports, locks, ports, listeners.
//!
//! Nothing answers before the exports are open and the locks of the epoch are there; hosts are told
//! of the restart when NLM answers. Whatever was opened is closed again if a later step fails.

mod making;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use imbl::OrdSet;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use self::making::make;
pub(super) use self::making::{HandleKeys, replicated, service_dir, services_dir};
use super::connections::replicate_connections;
use super::defining::Following;
use super::handing::take_over;
use super::mounts::{replicate_mounts, tell_last};
use super::ports::{self, Numbers, Ports};
use super::probing;
use super::{ServeError, spawn_port, system, tidy};
use crate::address::Floating;
use crate::address::guard::Guard;
use crate::backend::table::TableError;
use crate::call::Port;
use crate::cluster::ServiceId;
use crate::cluster::connections::Connection;
use crate::config::Settings;
use crate::gate::Gate;
use crate::lock_service::LockService;
use crate::net::runtimes::Runtimes;
use crate::net::tcp::Stop;
use crate::node::{Node, StorageUse};
use crate::raft::Proposer;
use crate::register::{self, Choice};
use crate::services::{Services, Slot};
use crate::state::State;

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
            taken_back: None,
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
    /// time is over; `note` hears of each step that is done.
    pub(super) async fn finish(&mut self, time_max: Duration, note: &mut impl FnMut(&'static str)) {
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
        note("drain");
        self.destroy().await;
        note("address");
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
