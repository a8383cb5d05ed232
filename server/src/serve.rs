//! `havenfs serve`: puts a node together, says that it is ready, and takes it down again.
//!
//! Order at start: state directory (and its lock), control socket, store; then each service for
//! itself, as its [keeper](keeper) decides. Nothing of a service answers before it is assigned to
//! this node, its exports are open and its locks are there. At SIGTERM: no new calls, what the
//! workers have is finished, the registration is taken back, the services are released.

mod closing;
mod connections;
mod defining;
mod first_start;
mod handing;
mod hooks;
mod keeper;
mod leases;
mod lists;
mod mounts;
pub mod offline;
mod opening;
mod ports;
mod probing;
mod ready;
mod storage;
mod watchdog;

use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use self::closing::{CLOSE_TIME_MAX, close_all};
use self::keeper::{Event, Keeper};
use self::leases::Leases;
use self::opening::{HandleKeys, Shared};
use crate::address::{AddressError, Addresses};
use crate::backend::table::TableError;
use crate::backend::{credential, sys};
use crate::call::Port;
use crate::config::cluster::NodeConfig;
use crate::config::service::ServiceConfig;
use crate::control;
use crate::control::early::EarlySocket;
use crate::definitions;
use crate::mount_list::MountListError;
use crate::net::listen::{Bound, ListenError};
use crate::net::runtimes::Runtimes;
use crate::net::tcp::Stop;
use crate::net::{tcp, udp};
use crate::node::{Node, NodeError};
use crate::pool::{self, Job};
use crate::raft::{Store, StoreError, Unavailable};
use crate::register::RegisterError;
use crate::services::{Services, Slot};
use crate::state::{State, StateError};
use crate::volumes::ExportsError;

/// How often files without a name are closed, and the mount list is saved.
const TIDY_CHECK: Duration = Duration::from_secs(1);
/// How often all open files are looked at.
const TIDY_ALL: Duration = Duration::from_secs(10);
/// How long threads that wait for a disk may take at the end.
const STUCK_TIME_MAX: Duration = Duration::from_secs(1);
/// How many events of services may wait to be looked at.
const EVENTS_MAX: usize = 64;

/// Why `serve` can't start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// See [`ExportsError`].
    #[error(transparent)]
    Exports(#[from] ExportsError),
    /// Nothing is exported.
    #[error(
        "nothing is exported\nhint: name a directory with --export DIR, or list it in /etc/exports"
    )]
    NoExports,
    /// Squashing would be without effect.
    #[error(
        "cannot act as the callers: user 0 without CAP_SETUID and CAP_SETGID, so every caller would \
         have root's rights\nhint: add the two capabilities, or run as a normal user"
    )]
    RootForAll,
    /// See [`StateError`].
    #[error(transparent)]
    State(#[from] StateError),
    /// See [`StoreError`].
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It took too long.
    #[error("the exports can't be opened in time\nhint: a disk may hang; see the kernel's log")]
    TooSlow,
    /// It can't be said to have stopped.
    #[error(
        "service `{service}` can't be stopped cleanly: {problem}\nhint: this process ends without \
         giving the service away; other nodes take it when its lease is over. Look at the kernel's \
         log for the disk"
    )]
    Unsettled {
        /// Which service.
        service: String,
        /// Why.
        problem: String,
    },
    /// The storage does not work on this node.
    #[error("its storage does not work on this node: {0}\nhint: see the kernel's log (`dmesg`)")]
    DeadStorage(String),
    /// The storage could not be made ready.
    #[error(
        "{0}\nhint: run the takeover_command of the service by hand to see what is wrong. It must \
         also succeed if there is nothing left to do"
    )]
    Takeover(String),
    /// The storage could not be let go.
    #[error(
        "the storage of service `{service}` can't be let go: {problem}\nhint: see what still uses it \
         (`fuser -v -m DIRECTORY`). As long as it can't be let go, the service is not given away: \
         other nodes take it when this process has ended and its lease is over"
    )]
    Storage {
        /// Which service.
        service: String,
        /// Why.
        problem: String,
    },
    /// The store does not take the command that begins to serve.
    #[error("cannot begin to serve locks: {0}")]
    Activate(Unavailable),
    /// See [`TableError`].
    #[error(transparent)]
    Table(TableError),
    /// See [`MountListError`].
    #[error(transparent)]
    MountList(#[from] MountListError),
    /// See [`NodeError`].
    #[error(transparent)]
    Node(#[from] NodeError),
    /// See [`AddressError`].
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A port is taken.
    #[error("{error}\nhint: {hint}")]
    Listen {
        /// What failed.
        error: ListenError,
        /// What to do.
        hint: String,
    },
    /// See [`RegisterError`].
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// Something that every process needs is not to be had.
    #[error("cannot {step}: {source}")]
    System {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

fn system(step: &'static str) -> impl FnOnce(std::io::Error) -> ServeError {
    move |source| ServeError::System { step, source }
}

/// Runs a node until it is told to stop.
pub fn run(config: &NodeConfig) -> Result<(), ServeError> {
    sys::clear_umask();
    let descriptors = raise_descriptor_limit();
    credential::drop_resource_privilege();
    if credential::is_root_for_all() {
        return Err(ServeError::RootForAll);
    }
    let control = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(system("start the control runtime"))?;
    let settings = &config.settings;
    let state = Arc::new(State::open(&settings.state_dir)?);
    lists::check(config, &state)?;
    let data = Arc::new(Runtimes::start().map_err(system("start the data runtime"))?);
    let (store, socket) = control.block_on(open_store(config))?;
    let lease = config.cluster.as_ref().map(|cluster| cluster.lease_ms);
    let lease = lease.map(|lease_ms| Duration::from_millis(u64::from(lease_ms)));
    let names = config.services.iter().map(|service| service.name.as_str());
    let names: Vec<&str> = names.collect();
    if let Err(error) = definitions::drop_other_copies(&opening::services_dir(&state), &names) {
        tracing::warn!(%error, "copies of definitions of services that are not in this node's files stay");
    }
    let slots = config.services.iter().cloned();
    let slots = slots.map(|service| {
        let service = if config.cluster.is_some() {
            as_defined(service, &state)
        } else {
            service
        };
        Arc::new(Slot::new(service, lease))
    });
    let services = Arc::new(Services {
        config: config.clone(),
        state: store.state(),
        proposer: store.proposer(),
        cluster: store.cluster(),
        changes: store.changes(),
        renewal_times: Arc::default(),
        starts: state.starts(),
        slots: slots.collect(),
    });
    let floating = services
        .slots
        .iter()
        .filter_map(|slot| slot.floating.clone());
    let addresses = Addresses::start(floating.collect(), state.lock())?;
    let shared = Arc::new(Shared {
        handle_keys: match store.handle_secret() {
            Some(secret) => HandleKeys::Derived(secret),
            None => HandleKeys::Own(state.handle_keys()),
        },
        services,
        proposer: store.proposer(),
        state,
        descriptors: descriptors / config.services.len().max(1),
        data: Arc::clone(&data),
        guard: addresses.guard.clone(),
    });
    let result = control.block_on(serve(&shared, &store, socket));
    control.block_on(store.close());
    // A thread that waits for a disk that hangs would be waited for without end.
    control.shutdown_timeout(STUCK_TIME_MAX);
    drop(shared);
    if let Some(data) = Arc::into_inner(data) {
        data.finish();
    }
    result
}

/// A service with the names and addresses that the cluster gave it, as this node knew it last.
fn as_defined(service: ServiceConfig, state: &State) -> ServiceConfig {
    let dir = opening::service_dir(state, &service.name);
    match dir.and_then(|dir| definitions::copy(&dir)) {
        Ok(Some(defined)) => definitions::with_definition(service, &defined.definition),
        Ok(None) => service,
        Err(error) => {
            tracing::warn!(
                service = service.name,
                %error,
                "the copy of the service's definition can't be read: beginning with the addresses \
                 of this node's files"
            );
            service
        }
    }
}

/// Opens the store. Where there is a cluster to wait for, the control socket is opened before and
/// says what is missing.
async fn open_store(config: &NodeConfig) -> Result<(Store, Option<UnixListener>), ServeError> {
    let (missing, told) = watch::channel(Vec::new());
    let dir = config.settings.state_dir.join("store");
    let opening = Store::open(&dir, config.cluster.as_ref(), missing);
    let Some(cluster) = &config.cluster else {
        return Ok((opening.await?, None));
    };
    let failed = || system("open the control socket");
    let early = EarlySocket::open(&config.settings.control, &cluster.node, told);
    let early = early.map_err(failed())?;
    match opening.await {
        Ok(store) => Ok((store, Some(early.hand_over().await.map_err(failed())?))),
        Err(error) => {
            early.remove();
            Err(error.into())
        }
    }
}

/// Raises the limit of open files as far as allowed; returns it.
fn raise_descriptor_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum;
    // A failure leaves the lower limit, which is then used.
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: most,
            maximum: most,
        },
    );
    let now = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
    usize::try_from(now).unwrap_or(1024)
}

async fn serve(
    shared: &Arc<Shared>,
    store: &Store,
    socket: Option<UnixListener>,
) -> Result<(), ServeError> {
    let services = &shared.services;
    let mut terminate = signal(SignalKind::terminate()).map_err(system("catch SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("catch SIGINT"))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(system("catch SIGHUP"))?;
    let (stop, stopped) = watch::channel(false);
    let lease_ms = services
        .config
        .cluster
        .as_ref()
        .map_or(0, |cluster| cluster.lease_ms);
    let leases = Arc::new(Leases::new(
        shared.proposer.clone(),
        services.cluster.clone(),
        lease_ms,
        services.config.cluster.is_none(),
        Arc::clone(&services.renewal_times),
    ));
    // A witness has no lease: nothing is ever assigned to it.
    let is_witness = services.config.is_witness();
    let renewing = if is_witness { Ok(None) } else { leases.start() };
    let _watchdog = watchdog::start({
        let (leases, stopped) = (Arc::clone(&leases), stopped.clone());
        // Who stops may renew nothing any more.
        move || is_witness || *stopped.borrow() || leases.is_beating()
    });
    let renewing = renewing.map_err(system("start the thread of the lease"))?;
    let (events, mut heard) = mpsc::channel(EVENTS_MAX);
    let mut keepers = JoinSet::new();
    for slot in &services.slots {
        let keeper = Keeper::new(
            Arc::clone(shared),
            Arc::clone(&leases),
            Arc::clone(slot),
            store.changes(),
            events.clone(),
        );
        keepers.spawn(keeper.keep(stopped.clone()));
    }
    drop(events);
    let control = control::start(Arc::clone(services), socket, stopped.clone())
        .await
        .map_err(system("open the control socket"))?;
    if let Some(cluster) = &services.config.cluster {
        ready::tell_ready(&ready::member_line(&cluster.node, &services.config));
    }
    let hangups = async {
        while hangup.recv().await.is_some() {
            control::reload_in_background(services).await;
        }
    };
    let serving = async {
        loop {
            tokio::select! {
                Some(Event::Serving(line)) = heard.recv() => {
                    if services.config.cluster.is_none() {
                        ready::tell_ready(&line);
                    } else {
                        tracing::info!("{line}");
                    }
                }
                // A panic has ended the process already.
                Some(Ok(ended)) = keepers.join_next() => return ended,
                // A witness.
                else => std::future::pending().await,
            }
        }
    };
    let mut result = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        () = hangups => Ok(()),
        ended = serving => ended,
        error = store.failed() => return Err(error.into()),
    };
    tracing::info!("stopping");
    // Nobody may be left to listen. Services answer what they have taken, and close; also those
    // that had nothing to do with the failure of another one.
    let _ = stop.send(true);
    let closed = close_all(&mut keepers, result.is_err(), renewing, CLOSE_TIME_MAX).await;
    result = result.and(closed);
    control.close().await;
    result
}

/// Does what is due from time to time, on worker threads. Each of the four on its own: a disk that
/// hangs keeps one of them, and the others go on.
async fn tidy(node: &Arc<Node>) {
    tokio::join!(
        repeat(node, TIDY_CHECK, |node| node.files.close_forgotten()),
        repeat(node, TIDY_ALL, |node| node.files.tidy()),
        repeat(node, TIDY_CHECK, |node| {
            if let Some(locks) = node.locks.get() {
                locks.tidy_lanes();
            }
        }),
        repeat(node, TIDY_CHECK, |node| {
            if let Err(error) = node.mounts.save_if_dirty() {
                tracing::warn!(%error, "cannot save the mount list; a restart will not know it");
            }
        }),
    );
}

/// Runs `work` on a worker thread again and again, with `pause` in between.
async fn repeat(node: &Arc<Node>, pause: Duration, work: fn(&Node)) {
    loop {
        tokio::time::sleep(pause).await;
        let (done, finished) = tokio::sync::oneshot::channel();
        let worker_node = Arc::clone(node);
        let work = move || {
            credential::as_server();
            work(&worker_node);
            // Fails only when the server stops.
            let _ = done.send(());
            None
        };
        let kind = pool::KINDS - 1;
        let source = 0;
        let mut jobs = vec![Job {
            kind,
            group: 0,
            work: Box::new(work),
        }];
        node.pool.submit(source, &mut jobs);
        // One at a time. An error says that the pool is closed.
        let _ = finished.await;
    }
}

fn spawn_port(
    node: &Arc<Node>,
    data: &Arc<Runtimes>,
    port: Port,
    bound: Bound,
    stopped: &watch::Receiver<Stop>,
) -> std::io::Result<()> {
    for listener in bound.tcp {
        // Connections are accepted on the control runtime and served on the others.
        let listener = tokio::net::TcpListener::from_std(listener)?;
        tokio::spawn(tcp::accept(
            Arc::clone(node),
            port,
            listener,
            Arc::clone(data),
            stopped.clone(),
        ));
    }
    for socket in bound.udp {
        let serving = udp::serve(Arc::clone(node), port, socket, stopped.clone());
        data.next().spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, ?port, "UDP socket failed");
            }
        });
    }
    Ok(())
}
