//! Starting the engine: of a node that is alone, or of a member of a cluster.
//!
//! A member opens its port first, since the others ask there who it is while the cluster is formed;
//! then it waits until it belongs to a cluster, and only then does the engine run. Runs on the
//! thread of consensus.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openraft::Config;
use openraft::async_runtime::WatchReceiver as _;
use openraft::error::Fatal;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::change::Changes;
use super::error::StoreError;
use super::opened::Opened;
use super::peer::{Alone, ClusterKey, Configured, Peers, Served, check_name, form, serve_peers};
use super::proposer::{Driver, Proposer};
use super::stored::Formed;
use super::types::{Member, Types};
use super::{Engine, stopped};
use super::{around, leading, moved};
use crate::config::cluster::ClusterConfig;

/// The number of a node that is alone.
const LONE_NODE: u64 = 1;
/// Connections of members that wait to be accepted.
const BACKLOG: i32 = 128;
const HANDLE_KEY_LABEL: &str = "havenfs file handles 1";

/// A running engine.
pub(super) struct Started {
    pub(super) engine: Engine,
    pub(super) driver: Driver,
    /// What it has of a cluster; none if it is alone.
    pub(super) joined: Option<Joined>,
}

/// What a member of a cluster has besides its engine.
pub(super) struct Joined {
    pub(super) peers: Peers,
    formed: Formed,
    /// How an operator changes the members.
    pub(super) changes: Option<Changes>,
    /// What signs file handles, the same on all nodes.
    pub(super) handle_secret: [u8; 16],
    /// The task that serves the members' port, and the one that sees to what is in `leading`.
    tasks: Vec<AbortHandle>,
    /// Gone with this: whoever comes to the port finds no engine.
    served: watch::Sender<Option<Served>>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Starts the engine of a node that is alone.
pub(super) async fn start_alone(opened: Opened, config: Config) -> Result<Started, StoreError> {
    if opened.stored.formed.is_some() {
        return Err(StoreError::Cluster(
            "the store belongs to a cluster, and the configuration names no members\nhint: start \
             it with the configuration of its cluster, or with another state directory"
                .to_owned(),
        ));
    }
    opened.pending.set_node(LONE_NODE);
    let (log, machine) = (opened.log, opened.machine);
    let engine = Engine::new(LONE_NODE, Arc::new(config), Alone, log, machine).await;
    let engine = engine.map_err(|error: Fatal<Types>| stopped("start", &error))?;
    Ok(Started {
        driver: Driver::start(engine.clone(), opened.snapshots, opened.pending, None),
        engine,
        joined: None,
    })
}

/// Makes a node that is alone lead, and waits until its log is applied.
pub(super) async fn lead_alone(engine: &Engine, store_id: u64) -> Result<(), StoreError> {
    let initialized = engine.is_initialized().await;
    if initialized.map_err(|error| stopped("start", &error))? {
        let elected = engine.trigger().elect(false).await;
        elected.map_err(|error| stopped("elect itself", &error))?;
    } else {
        let members = BTreeMap::from([(LONE_NODE, Member::alone(store_id))]);
        let formed = engine.initialize(members).await;
        formed.map_err(|error| stopped("form a cluster of one", &error))?;
    }
    // An entry that is durable may have been acknowledged: all of them must be applied, and they
    // are once an entry of this start is committed.
    let applied = engine.wait_for_recovery(None).await;
    applied.map_err(|error| stopped("apply the log", &error))?;
    // Ticks are for heartbeats and elections, and there is nobody else: an idle node sleeps.
    engine.runtime_config().tick(false);
    Ok(())
}

/// Starts the engine of a member, when the cluster is formed; says to `missing` what it waits for.
pub(super) async fn start_member(
    dir: PathBuf,
    mut opened: Opened,
    config: Config,
    cluster: ClusterConfig,
    missing: watch::Sender<Vec<String>>,
) -> Result<Started, StoreError> {
    opened.log.shared().set_others();
    let key = ClusterKey::read(&cluster.key_file);
    let key = key.map_err(|error| StoreError::Cluster(error.to_string()))?;
    let derived = key.derive(HANDLE_KEY_LABEL);
    let handle_secret = std::array::from_fn(|at| derived[at]);
    let configured = around::configured(&cluster);
    let own = configured
        .iter()
        .find(|member| *member.name == *cluster.node);
    let Some(own) = own else {
        let problem = format!("node `{}` is no member", cluster.node);
        return Err(StoreError::Cluster(problem));
    };
    // Whoever has the store of another node would be told about that one's address.
    check_name(&cluster.node, opened.stored.formed.as_ref())
        .map_err(|error| StoreError::Cluster(error.to_string()))?;
    // What it was admitted with counts; it can't be changed but by removing it and adding it anew.
    let address = moved::settle(&dir, &mut opened, own.address).await?;
    let listener = listen(address, own.address)?;
    let peers = Peers::new(
        key,
        &cluster.node,
        &opened.stored,
        opened.is_empty,
        &configured,
    );
    let (served, engines) = watch::channel(None);
    let port = tokio::spawn(serve_peers(listener, peers.clone(), engines)).abort_handle();
    let formed = form(&peers, &dir, &missing).await;
    let formed = formed.map_err(|error| StoreError::Cluster(error.to_string()))?;
    let joined = Joined {
        peers: peers.clone(),
        formed,
        changes: None,
        handle_secret,
        tasks: vec![port],
        served,
    };
    run_member(&dir, opened, config, joined, configured).await
}

async fn run_member(
    dir: &Path,
    opened: Opened,
    config: Config,
    mut joined: Joined,
    configured: Vec<Configured>,
) -> Result<Started, StoreError> {
    let Joined { peers, formed, .. } = &joined;
    let (peers, formed) = (peers.clone(), formed.clone());
    let store_id = opened.stored.store_id;
    opened.pending.set_node(formed.node);
    let (log, machine) = (opened.log, opened.machine);
    let (state, settled) = (machine.state(), machine.watch_members());
    let shared = log.shared();
    let config = Arc::new(config);
    let engine = Engine::new(formed.node, config, peers.clone(), log, machine).await;
    let engine = engine.map_err(|error: Fatal<Types>| stopped("start", &error))?;
    let last = Arc::clone(&engine.server_metrics().borrow_watched().membership_config);
    let index = last.log_id().map(|log_id| log_id.index);
    let own = formed.node;
    shared
        .sole
        .begin(own, index.map(|index| (index, last.membership())));
    peers.follow(leading::Log::new(
        &engine,
        settled.clone(),
        Arc::clone(&state),
    ));
    let pending = opened.pending;
    let changes = Changes::new(
        engine.clone(),
        peers.clone(),
        Arc::clone(&state),
        Proposer::new(Arc::clone(&pending)),
    );
    joined.served.send_replace(Some(Served::new(
        engine.clone(),
        dir,
        Some(changes.clone()),
    )));
    let turn = changes.turns();
    joined.changes = Some(changes);
    let initialized = engine.is_initialized().await;
    let initialized = initialized.map_err(|error| stopped("start", &error))?;
    if formed.is_founder() && !initialized {
        let begun = engine.initialize(formed.members.clone()).await;
        begun.map_err(|error| stopped("begin the log of the cluster", &error))?;
    }
    // The only voter need not wait for anybody's silence.
    if initialized && last.voter_ids().eq([own]) {
        around::check_none_went_on(&peers, &configured, &formed, store_id).await?;
        let elected = engine.trigger().elect(false).await;
        elected.map_err(|error| stopped("elect itself", &error))?;
    }
    if let Some(member) = formed.members.get(&own) {
        let (engine, turn, address) = (engine.clone(), Arc::clone(&turn), member.address);
        let correcting = async move { moved::correct(&engine, &turn, address).await };
        joined.tasks.push(tokio::spawn(correcting).abort_handle());
    }
    let seeing = leading::see_to(
        engine.clone(),
        peers.clone(),
        configured,
        settled,
        state,
        turn,
    );
    joined.tasks.push(tokio::spawn(seeing).abort_handle());
    let driver = Driver::start(engine.clone(), opened.snapshots, pending, Some(peers));
    Ok(Started {
        engine,
        driver,
        joined: Some(joined),
    })
}

/// Opens the members' port at `address`, which the configuration has at `configured`.
fn listen(address: SocketAddr, configured: SocketAddr) -> Result<TcpListener, StoreError> {
    let open = || {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
        // A restarted node must not wait for its old connections to be forgotten.
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    open().map_err(|error| {
        if address != configured {
            return StoreError::Cluster(format!(
                "cannot listen on {address}, the address with which this node was admitted to the \
                 cluster and which store.json has: {error}\nhint: give its machine that address \
                 back; to have it at {configured}, say `havenfs cluster remove` for it on another \
                 member, move its state directory away, start it, and add it anew"
            ));
        }
        StoreError::Cluster(format!(
            "cannot listen on {address} for the other nodes: {error}\nhint: the address of this \
             node in [[cluster.member]] must be one of this machine's, and its port free"
        ))
    })
}
