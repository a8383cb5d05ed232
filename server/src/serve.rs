//! `havenfs serve`: puts a node together, says that it is ready, and takes it down again.
//!
//! Order at start: state directory (and its lock), export lists, ports, store, volumes, portmapper,
//! a new epoch, sockets, ready line. Nothing answers before the exports are open and the locks of
//! the life before are there. At SIGTERM: no new calls, what the workers have is finished, the
//! registration is taken back.

mod ports;
mod ready;

use std::sync::Arc;
use std::time::Duration;

use havenfs_rpc::program;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use self::ports::Ports;
use crate::backend::{credential, sys};
use crate::call::Port;
use crate::config::Settings;
use crate::control;
use crate::host_calls::HostCalls;
use crate::lock_service::LockService;
use crate::net::listen::{Bound, ListenError};
use crate::net::runtimes::Runtimes;
use crate::net::{tcp, udp};
use crate::node::{Node, NodeError};
use crate::pool::{self, Job};
use crate::raft::{Store, StoreError, Unavailable};
use crate::register::{self, Choice, RegisterError};
use crate::state::{State, StateError};
use crate::volumes::{self, ExportsError};

/// How often rpcbind is asked whether our entries are still there.
const REGISTRATION_CHECK: Duration = Duration::from_secs(5);
/// How often files without a name are closed, and the mount list is saved.
const TIDY_CHECK: Duration = Duration::from_secs(1);
/// How often all open files are looked at.
const TIDY_ALL: Duration = Duration::from_secs(10);
const STOP_CHECK: Duration = Duration::from_millis(10);
/// How long calls under way may take after SIGTERM.
const STOP_TIME_MAX: Duration = Duration::from_secs(5);

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
    /// The store does not take the command that begins to serve.
    #[error("cannot begin to serve locks: {0}")]
    Activate(Unavailable),
    /// See [`NodeError`].
    #[error(transparent)]
    Node(#[from] NodeError),
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

/// Runs a server until it is told to stop.
pub fn run(settings: &Settings) -> Result<(), ServeError> {
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
    let state = State::open(&settings.state_dir)?;
    let table = volumes::load_table(&settings.sources, &state)?;
    if table.exports().is_empty() {
        return Err(ServeError::NoExports);
    }
    let ports = Ports::bind(settings)?;
    let node = Arc::new(Node::new(state, table, ports.entries(), descriptors)?);
    let store = control.block_on(Store::open(&settings.state_dir.join("store")))?;
    let calls = Arc::new(HostCalls::new(program::PORTMAP_PORT));
    let (state, proposer) = (store.state(), store.proposer());
    let locks = {
        let _inside = control.enter();
        Arc::new(LockService::new(settings, state, proposer, calls))
    };
    // Nobody else sets it.
    let _ = node.locks.set(Arc::clone(&locks));
    volumes::open_exports(&node, &[])?;
    let data = Arc::new(Runtimes::start().map_err(system("start the data runtime"))?);
    let result = control.block_on(serve(settings, &node, &store, &locks, ports, &data));
    control.block_on(store.close());
    drop(control);
    if !node.pool.finish(STOP_TIME_MAX) {
        // A disk hangs. Waiting would not bring it back, and no call can be answered any more.
        tracing::error!("calls are stuck in the kernel; leaving them behind");
        std::process::exit(1);
    }
    if let Some(data) = Arc::into_inner(data) {
        data.finish();
    }
    result
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
    settings: &Settings,
    node: &Arc<Node>,
    store: &Store,
    locks: &Arc<LockService>,
    ports: Ports,
    data: &Arc<Runtimes>,
) -> Result<(), ServeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(system("catch SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("catch SIGINT"))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(system("catch SIGHUP"))?;
    let (stop, stopped) = watch::channel(false);
    let portmap_settings = register::Settings::new(settings.portmap_port, &settings.listen);
    let choice = register::choose(settings.portmap, &portmap_settings, &ports.entries()).await?;
    // Nobody else sets it.
    let _ = node.portmapper.set(choice.to_string());
    let numbers = ports.numbers();
    let portmap = match &choice {
        Choice::Embedded => {
            let bound = ports::bind_portmap(settings)?;
            node.ports.set_own(ports.entries_with_portmap(bound.port));
            Some((Port::Portmap, bound))
        }
        _ => None,
    };
    locks
        .activate(settings.recover)
        .await
        .map_err(ServeError::Activate)?;
    let sockets = ports.into_sockets().into_iter().chain(portmap);
    for (port, bound) in sockets {
        spawn_port(node, data, port, bound, &stopped).map_err(system("serve a port"))?;
    }
    locks.begin();
    let control = control::start(settings, Arc::clone(node), stopped.clone())
        .await
        .map_err(system("open the control socket"))?;
    ready::tell_ready(&ready::ready_line(node, settings, numbers, &choice));
    let watching = async {
        match &choice {
            Choice::Registered(registration) => registration.watch(REGISTRATION_CHECK).await,
            _ => std::future::pending().await,
        }
    };
    let tidying = tidy(node);
    let hangups = async {
        while hangup.recv().await.is_some() {
            control::reload_in_background(settings, node).await;
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = watching => {}
        () = tidying => {}
        () = node.pool.unstick() => {}
        () = hangups => {}
        error = store.failed() => return Err(error.into()),
    }
    tracing::info!("stopping");
    // Nobody may be left to listen. Connections answer what they have taken, and close.
    let _ = stop.send(true);
    let deadline = tokio::time::Instant::now() + STOP_TIME_MAX;
    let drained = async {
        while node.connections.all() > 0 {
            tokio::time::sleep(STOP_CHECK).await;
        }
    };
    tokio::select! {
        () = drained => {}
        () = tokio::time::sleep_until(deadline) => {}
        () = node.pool.unstick() => {}
    }
    if let Choice::Registered(registration) = &choice
        && let Ok(Err(error)) = tokio::time::timeout(STOP_TIME_MAX, registration.remove()).await
    {
        tracing::warn!(%error, "cannot take the registration with rpcbind back");
    }
    if let Err(error) = node.mounts.save_if_dirty() {
        tracing::warn!(%error, "cannot save the mount list");
    }
    control.close().await;
    Ok(())
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
    stopped: &watch::Receiver<bool>,
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
