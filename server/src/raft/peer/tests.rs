//! Nodes in one process: who is let in, forming, electing, replicating, losing a leader.

mod joint;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use openraft::Config;
use openraft::async_runtime::WatchReceiver as _;
use openraft::error::ClientWriteError;
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;

use super::dial::{Membership, PeerError, Peers};
use super::forming::{FormError, form};
use super::forward::{Ended, Forwarder};
use super::hello::{Configured, Refusal, Standing};
use super::key::ClusterKey;
use super::link::LinkError;
use super::serve::{HANDSHAKES_MAX, Served, serve_peers};
use crate::cluster::{ClusterState, ServiceId, ServiceState};
use crate::raft::change::Turn;
use crate::raft::leading::{Log, see_to};
use crate::raft::stored::{self, Formed, Stored};
use crate::raft::tests::{expected, proposed};
use crate::raft::types::Member;
use crate::raft::wal::Options;
use crate::raft::{Engine, Opened, config, snapshot};

const PATIENCE: Duration = Duration::from_secs(20);

fn key() -> ClusterKey {
    ClusterKey::of(b"a key for tests")
}

/// Returns when `holds` gives something.
async fn until<T>(what: &str, mut holds: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = holds() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn stored_of(store_id: u64, formed: Option<Formed>) -> Stored {
    Stored {
        store_id,
        formed,
        pending: None,
    }
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn member(name: &str, store_id: u64, address: SocketAddr) -> Member {
    Member {
        store_id,
        name: name.into(),
        address,
        witness: false,
    }
}

/// A node of cluster 7 without an engine.
fn formed(name: &str, node: u64, store_id: u64, members: &BTreeMap<u64, Member>) -> Peers {
    let formed = Some(Formed {
        cluster_id: 7,
        generation: 0,
        node,
        members: members.clone(),
    });
    Peers::new(key(), name, &stored_of(store_id, formed), false, &[])
}

async fn from_elsewhere(to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.99.0.1:0".parse().unwrap()).unwrap();
    socket.connect(to).await.unwrap()
}

/// Serves the port of a node that has no engine.
fn serve(listener: TcpListener, peers: &Peers) -> watch::Sender<Option<Served>> {
    let (tell, served) = watch::channel(None);
    tokio::spawn(serve_peers(listener, peers.clone(), served));
    tell
}

#[tokio::test]
async fn strangers_are_counted_and_cannot_keep_members_out() {
    let (listener, address) = listener().await;
    let members = BTreeMap::from([
        (1, member("n1", 11, address)),
        (2, member("n2", 12, address)),
    ]);
    let own = formed("n1", 1, 11, &members);
    let _engine = serve(listener, &own);
    let stored = stored_of(12, None);
    let wrong = ClusterKey::of(b"another key for tests");
    let stranger = Peers::new(wrong, "n2", &stored, true, &[]);
    let error = stranger.ask(address).await.err().unwrap();
    assert!(
        matches!(error, PeerError::Link(LinkError::NotWelcome)),
        "{error}"
    );
    let counters = own.counters();
    until("the stranger is counted", || {
        (counters.strangers.get() == 1).then_some(())
    })
    .await;
    // From an address that no member has.
    let mut silent = Vec::new();
    for _ in 0..HANDSHAKES_MAX {
        silent.push(from_elsewhere(address).await);
    }
    let _one_more = from_elsewhere(address).await;
    until("one is too many", || {
        (counters.limit_handshakes.get() == 1).then_some(())
    })
    .await;
    // A member is not kept out by them.
    let other = formed("n2", 2, 12, &members);
    other.dial(1, &members[&1]).await.unwrap();
    // They are given up after a while.
    until("silent strangers are closed", || {
        (counters.strangers.get() == 1 + HANDSHAKES_MAX as u64).then_some(())
    })
    .await;
    assert_eq!(counters.accepted.get(), 1);
}

#[tokio::test]
async fn a_node_with_another_store_is_refused_by_both_sides() {
    let (listener, address) = listener().await;
    let members = BTreeMap::from([
        (1, member("n1", 11, address)),
        (2, member("n2", 12, address)),
    ]);
    let own = formed("n1", 1, 11, &members);
    let _engine = serve(listener, &own);
    let other = formed("n2", 2, 12, &members);
    other.dial(1, &members[&1]).await.unwrap();
    // The one that comes lost its disk.
    let wiped = formed("n2", 2, 13, &members);
    let error = wiped.dial(1, &members[&1]).await.err().unwrap();
    assert!(matches!(error, PeerError::RefusedBy(_)), "{error}");
    assert!(
        error.to_string().contains("havenfs cluster remove n2"),
        "{error}"
    );
    assert_eq!(own.counters().refused.get(), 1);
    // The one that is asked lost its disk.
    let error = other
        .dial(1, &member("n1", 10, address))
        .await
        .err()
        .unwrap();
    let other_store = Refusal::OtherStore { name: "n1".into() };
    assert!(
        matches!(&error, PeerError::Refused(found) if *found == other_store),
        "{error}"
    );
    // What the engine knows counts, as soon as it knows something.
    own.follow(Fixed(BTreeMap::from([
        (1, member("n1", 11, address)),
        (3, member("n3", 3, address)),
    ])));
    let error = other.dial(1, &members[&1]).await.err().unwrap();
    assert!(error.to_string().contains("was removed"), "{error}");
    assert!(other.watch_removed().borrow().is_some());
    // What an empty node is told is what a majority has.
    let stored = stored_of(14, None);
    let empty = Peers::new(key(), "n4", &stored, true, &[]);
    let hello = empty.ask(address).await.unwrap();
    let Standing::Formed { members, .. } = hello.standing else {
        panic!("{hello:?}");
    };
    assert_eq!(members.into_keys().collect::<Vec<_>>(), [1]);
}

/// Members that never change; only the first is settled.
struct Fixed(BTreeMap<u64, Member>);

impl Membership for Fixed {
    fn known(&self) -> BTreeMap<u64, Member> {
        self.0.clone()
    }

    fn settled(&self) -> BTreeMap<u64, Member> {
        let first = self.0.iter().take(1);
        first
            .map(|(node, member)| (*node, member.clone()))
            .collect()
    }

    fn is_retired(&self, _node: u64) -> bool {
        false
    }
}

/// A whole node: store, port, engine.
struct Node {
    dir: PathBuf,
    peers: Peers,
    formed: Formed,
    engine: Engine,
    state: Arc<RwLock<ClusterState>>,
    port: tokio::task::JoinHandle<()>,
    tell: watch::Sender<Option<Served>>,
    log_thread: JoinHandle<()>,
}

impl Node {
    async fn start(
        dir: PathBuf,
        name: &str,
        listener: TcpListener,
        members: &[Configured],
        config: Config,
    ) -> Self {
        let open = {
            let dir = dir.clone();
            move || Opened::open(dir, Options::default()).unwrap()
        };
        let opened = tokio::task::spawn_blocking(open).await.unwrap();
        let stored = stored::read(&dir).unwrap().unwrap();
        let peers = Peers::new(key(), name, &stored, true, members);
        let (tell, served) = watch::channel(None);
        let port = tokio::spawn(serve_peers(listener, peers.clone(), served));
        let formed = form(&peers, &dir, &watch::Sender::default()).await.unwrap();
        let state = opened.machine.state();
        let settled = opened.machine.watch_members();
        let config = Arc::new(config);
        let (log, machine) = (opened.log, opened.machine);
        let engine = Engine::new(formed.node, config, peers.clone(), log, machine);
        let engine = engine.await.unwrap();
        peers.follow(Log::new(&engine, settled.clone(), Arc::clone(&state)));
        // Ends with the engine.
        tokio::spawn(see_to(
            engine.clone(),
            peers.clone(),
            members.to_vec(),
            settled,
            Arc::clone(&state),
            Turn::default(),
        ));
        tell.send(Some(Served::new(engine.clone(), &dir, None)))
            .ok()
            .unwrap();
        if formed.is_founder() && !engine.is_initialized().await.unwrap() {
            engine.initialize(formed.members.clone()).await.unwrap();
        }
        Self {
            dir,
            peers,
            formed,
            engine,
            state,
            port,
            tell,
            log_thread: opened.log_thread.unwrap(),
        }
    }

    fn state(&self) -> ServiceState {
        let state = self.state.read().unwrap();
        state.service(ServiceId::FIRST).cloned().unwrap_or_default()
    }

    async fn has(&self, count: u64) {
        let expected = expected(count);
        let what = format!("`{}` has {count} commands", self.peers.name());
        until(&what, || (self.state() == expected).then_some(())).await;
    }

    async fn stop(self) -> PathBuf {
        self.port.abort();
        let _ = self.port.await;
        self.engine.shutdown().await.unwrap();
        drop((self.engine, self.tell, self.peers));
        let log_thread = self.log_thread;
        let ended = tokio::task::spawn_blocking(move || log_thread.join());
        ended.await.unwrap().unwrap();
        self.dir
    }
}

/// The timings of the product.
fn brisk() -> Config {
    Config {
        max_in_snapshot_log_to_keep: 0,
        ..config().unwrap()
    }
}

/// With a leader that no slow disk unseats.
fn patient() -> Config {
    Config {
        election_timeout_min: 1000,
        election_timeout_max: 1500,
        ..config().unwrap()
    }
}

fn store(parent: &TempDir, name: &str) -> PathBuf {
    parent.path().join(name).join("store")
}

async fn configured(names: &[&str]) -> (Vec<TcpListener>, Vec<Configured>) {
    let (mut listeners, mut members) = (Vec::new(), Vec::new());
    for name in names {
        let (listener, address) = listener().await;
        listeners.push(listener);
        members.push(Configured {
            name: (*name).into(),
            address,
            witness: false,
        });
    }
    (listeners, members)
}

/// Three nodes that form a cluster from nothing.
async fn three(parent: &TempDir, config: fn() -> Config) -> (Vec<Node>, Vec<Configured>) {
    three_of(parent, config, None).await
}

/// The same; one of them may be a witness.
async fn three_of(
    parent: &TempDir,
    config: fn() -> Config,
    witness: Option<usize>,
) -> (Vec<Node>, Vec<Configured>) {
    let (listeners, mut members) = configured(&["n1", "n2", "n3"]).await;
    if let Some(member) = witness.and_then(|witness| members.get_mut(witness)) {
        member.witness = true;
    }
    let starting: Vec<_> = listeners
        .into_iter()
        .zip(members.clone())
        .map(|(listener, member)| {
            let (dir, members) = (store(parent, &member.name), members.clone());
            tokio::spawn(async move {
                Node::start(dir, &member.name, listener, &members, config()).await
            })
        })
        .collect();
    let mut nodes = Vec::new();
    for starting in starting {
        nodes.push(starting.await.unwrap());
    }
    (nodes, members)
}

/// Proposes commands to whoever leads. A leader refuses what comes before the others have answered
/// it, or when they have not for a while.
async fn write(nodes: &[Node], from: u64, to: u64) {
    let deadline = Instant::now() + PATIENCE;
    for number in from..to {
        let proposed = proposed(number);
        loop {
            let engine = &nodes[leader(nodes).await].engine;
            match engine.client_write(proposed.clone()).await {
                Ok(_) => break,
                Err(error) => {
                    let refused = error.api_error();
                    let refused = matches!(refused, Some(ClientWriteError::ForwardToLeader(_)));
                    assert!(refused && Instant::now() < deadline, "{error}");
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        }
    }
}

/// Returns when all have applied so much. Before, none may be stopped: the last one would not hear
/// what is committed.
async fn all_have(nodes: &[Node], count: u64) {
    for node in nodes {
        node.has(count).await;
    }
}

/// Which of the nodes all of them take for the leader.
async fn leader(nodes: &[Node]) -> usize {
    until("one leads and all know it", || {
        let said: Vec<_> = nodes
            .iter()
            .map(|node| node.engine.metrics().borrow_watched().current_leader)
            .collect();
        let first = said.first().copied().flatten()?;
        let known = said.iter().all(|said| *said == Some(first));
        let place = nodes.iter().position(|node| node.formed.node == first)?;
        (known && nodes[place].engine.is_leader()).then_some(place)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_form_replicate_and_outlive_a_leader_and_a_lost_log() {
    let parent = tempfile::tempdir().unwrap();
    let (mut nodes, members) = three(&parent, brisk).await;
    let cluster_id = nodes[0].formed.cluster_id;
    for (number, node) in (1..).zip(&nodes) {
        assert_eq!(
            (node.formed.cluster_id, node.formed.node),
            (cluster_id, number)
        );
        let stored = stored::read(&node.dir).unwrap().unwrap();
        assert_eq!(stored.formed.as_ref(), Some(&node.formed));
    }
    let first = leader(&nodes).await;
    write(&nodes, 0, 50).await;
    all_have(&nodes, 50).await;
    let lost = nodes.remove(first);
    let (name, address) = (lost.peers.name().to_owned(), members[first].address);
    let dir = lost.stop().await;
    write(&nodes, 50, 80).await;
    all_have(&nodes, 80).await;
    // What the lost one lacks is only in snapshots now.
    for node in &nodes {
        let engine = &node.engine;
        let last = engine.metrics().borrow_watched().last_applied;
        engine.trigger().snapshot().await.unwrap();
        until("the snapshot is written", || {
            let snapshot = engine.metrics().borrow_watched().snapshot;
            (snapshot >= last).then_some(())
        })
        .await;
        let index = last.unwrap().index;
        engine.trigger().purge_log(index).await.unwrap();
        until("the log is purged", || {
            let purged = engine.metrics().borrow_watched().purged;
            (purged >= last).then_some(())
        })
        .await;
    }
    assert!(!snapshot::path(&dir).exists());
    let listener = TcpListener::bind(address).await.unwrap();
    let back = Node::start(dir, &name, listener, &members, brisk()).await;
    assert_eq!(back.formed.cluster_id, cluster_id);
    back.has(80).await;
    assert!(snapshot::path(&back.dir).exists());
    nodes.push(back);
    write(&nodes, 80, 90).await;
    all_have(&nodes, 90).await;
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_that_leads_gives_the_leadership_to_a_node_with_data() {
    let parent = tempfile::tempdir().unwrap();
    let (nodes, _) = three_of(&parent, patient, Some(2)).await;
    let data_node_leads = || {
        let leads = nodes.iter().position(|node| node.engine.is_leader());
        leads.filter(|place| *place != 2)
    };
    until("a node with data leads", data_node_leads).await;
    write(&nodes, 0, 10).await;
    for round in 0..3 {
        let witness = &nodes[2].engine;
        // Leave of the leader whom all hear: the witness is told to lead by it.
        let leads = &nodes[leader(&nodes).await].engine;
        leads.trigger().transfer_leader(3).await.unwrap();
        until("the witness leads", || witness.is_leader().then_some(())).await;
        let begun = Instant::now();
        until("a node with data leads", data_node_leads).await;
        assert!(begun.elapsed() < Duration::from_secs(5), "round {round}");
    }
    write(&nodes, 10, 20).await;
    all_have(&nodes, 20).await;
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proposals_are_forwarded_in_order_to_the_one_that_leads() {
    let parent = tempfile::tempdir().unwrap();
    let (nodes, _) = three(&parent, patient).await;
    let leads = leader(&nodes).await;
    let follows = (leads + 1) % 3;
    let (from, to) = (&nodes[follows], &nodes[leads].formed);
    let member = |node: u64| &to.members[&node];
    let mut forwarder = Forwarder::connect(&from.peers, to.node, member(to.node))
        .await
        .unwrap();
    // More than may be under way.
    let batch: Vec<_> = (0..5000).map(proposed).collect();
    let (first, rest) = batch.split_at(10);
    forwarder.send(first).await.unwrap();
    forwarder.send(rest).await.unwrap();
    all_have(&nodes, 5000).await;
    // It is still there, and the other one never was.
    tokio::select! {
        biased;
        ended = forwarder.ended() => panic!("{ended:?}"),
        () = tokio::task::yield_now() => {}
    }
    let third = &nodes[(leads + 2) % 3].formed;
    let mut wrong = Forwarder::connect(&from.peers, third.node, member(third.node))
        .await
        .unwrap();
    wrong.send(first).await.unwrap();
    assert_eq!(wrong.ended().await, Ended::NotLeader);
    // Another leader: what was bound to the old one's leadership is not taken any more.
    let trigger = nodes[leads].engine.trigger();
    trigger.transfer_leader(from.formed.node).await.unwrap();
    until("another one leads", || {
        from.engine.is_leader().then_some(())
    })
    .await;
    forwarder.send(first).await.unwrap();
    assert_eq!(forwarder.ended().await, Ended::NotLeader);
    for node in nodes {
        assert_eq!(node.state(), expected(5000));
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_founder_that_died_before_it_told_anybody_founds_the_same_cluster() {
    let parent = tempfile::tempdir().unwrap();
    let (listeners, members) = configured(&["n1", "n2"]).await;
    let stores = ["n1", "n2"].map(|name| store(&parent, name));
    let mut ids = Vec::new();
    for dir in &stores {
        let dir = dir.clone();
        let open = move || {
            let opened = Opened::open(dir, Options::default()).unwrap();
            drop((opened.log, opened.machine, opened.snapshots));
            opened.log_thread.unwrap().join().unwrap();
            opened.stored.store_id
        };
        ids.push(tokio::task::spawn_blocking(open).await.unwrap());
    }
    // As if it had died between writing and answering.
    let numbered = (1..).zip(members.iter().zip(&ids));
    let settled = Formed {
        cluster_id: 99,
        generation: 0,
        node: 1,
        members: numbered
            .map(|(node, (configured, id))| {
                (node, member(&configured.name, *id, configured.address))
            })
            .collect(),
    };
    let stored = stored_of(ids[0], Some(settled.clone()));
    stored::write(&stores[0], &stored).unwrap();
    let [first, second] = <[TcpListener; 2]>::try_from(listeners).ok().unwrap();
    let (one, other) = tokio::join!(
        Node::start(stores[0].clone(), "n1", first, &members, brisk()),
        Node::start(stores[1].clone(), "n2", second, &members, brisk()),
    );
    assert_eq!((one.formed.cluster_id, one.formed.node), (99, 1));
    assert_eq!((other.formed.cluster_id, other.formed.node), (99, 2));
    assert_eq!(other.formed.members, settled.members);
    let nodes = [one, other];
    write(&nodes, 0, 5).await;
    all_have(&nodes, 5).await;
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test]
async fn a_store_in_use_forms_nothing_and_a_renamed_one_is_not_taken() {
    let parent = tempfile::tempdir().unwrap();
    let (_listeners, members) = configured(&["n1"]).await;
    let stored = stored_of(1, None);
    let used = Peers::new(key(), "n1", &stored, false, &members);
    let dir: &Path = parent.path();
    let error = form(&used, dir, &watch::Sender::default())
        .await
        .unwrap_err();
    assert!(matches!(error, FormError::NotEmpty), "{error}");
    let stranger = Peers::new(key(), "n9", &stored, true, &members);
    let error = form(&stranger, dir, &watch::Sender::default())
        .await
        .unwrap_err();
    assert!(matches!(error, FormError::Members(_)), "{error}");
    let only = BTreeMap::from([(1, member("n1", 1, members[0].address))]);
    let renamed = formed("n2", 1, 1, &only);
    let error = form(&renamed, dir, &watch::Sender::default())
        .await
        .unwrap_err();
    assert!(matches!(error, FormError::OtherName { .. }), "{error}");
    assert_eq!(stored::read(dir).unwrap(), None, "nothing was written");
}
