//! Replies and the gate: what is made while it is open and not sent before it closes is not sent
//! at all, over TCP and UDP, and the connection ends as a client may see it.
//!
//! A test and the server's task share one thread, so that a reply can be in the mailbox, and the
//! gate close, before the task looks at either: every worker is kept busy until the call is
//! queued, and the test's thread does not let go until the call is carried out.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::tcp::{self, Stop};
use super::udp;
use crate::backend::credential;
use crate::call::{Mode, Port};
use crate::gate::Gate;
use crate::node::{Node, WORKERS};
use crate::pool::Job;
use crate::programs::nfs3::wire::Nfsstat3;
use crate::programs::tests::samples::{Sample, args, nfs_call, put_dirop, put_sattr};
use crate::programs::tests::scene::node;

/// How long anything may take that has to happen.
const TIME_MAX: Duration = Duration::from_secs(30);
/// How long to listen where nothing is to come.
const SILENCE: Duration = Duration::from_millis(300);

/// A node, and one who calls it.
struct Scene {
    node: Arc<Node>,
    root: Vec<u8>,
    file: Vec<u8>,
    stop: watch::Sender<Stop>,
    exported: TempDir,
    _state: TempDir,
}

impl Scene {
    fn new(floats: bool) -> Self {
        let (state, exported) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(exported.path().join("file"), "content").unwrap();
        let gate = Gate::open_for_good();
        let node = Arc::new(node(state.path(), exported.path(), gate, floats));
        let volume = node.files.volumes().remove(0);
        let root = node.files.open_root(&volume).unwrap();
        let (me, attributes) = (credential::own_caller(), root.attributes().unwrap());
        let file = node
            .files
            .lookup(&root, &attributes, c"file", me, Mode::Worker);
        Self {
            root: root.handle.as_slice().to_vec(),
            file: file.unwrap().handle.as_slice().to_vec(),
            node,
            stop: watch::Sender::new(Stop::Serve),
            exported,
            _state: state,
        }
    }

    fn path(&self) -> &Path {
        self.exported.path()
    }

    /// A connection, and the task that serves it.
    async fn connect(&self) -> (TcpStream, JoinHandle<std::io::Result<()>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (stream, peer) = accepted.unwrap();
        let slot = self.node.connections.enter(peer.ip()).unwrap();
        let node = Arc::clone(&self.node);
        let stop = self.stop.subscribe();
        let stream = stream.into_std().unwrap();
        let served = tcp::serve(node, Port::Nfs, stream, peer, slot, stop);
        (client.unwrap(), tokio::spawn(served))
    }

    /// A socket that is connected to the one that is served.
    async fn datagrams(&self) -> UdpSocket {
        let own = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        own.set_nonblocking(true).unwrap();
        let address = own.local_addr().unwrap();
        let (node, stop) = (Arc::clone(&self.node), self.stop.subscribe());
        tokio::spawn(udp::serve(node, Port::Nfs, own, stop));
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let client = UdpSocket::bind(any).await.unwrap();
        client.connect(address).await.unwrap();
        client
    }

    fn create(&self) -> Sample {
        let args = args(|w| {
            put_dirop(w, &self.root, "new");
            w.u32(1);
            put_sattr(w);
        });
        nfs_call(8, args, Nfsstat3::Ok)
    }

    /// Calls that a worker carries out; all but the first change nothing.
    fn calls(&self) -> [Sample; 3] {
        let list = |counts: &[u32]| {
            args(|w| {
                w.opaque(&self.root);
                w.u64(0);
                w.u64(0);
                for count in counts {
                    w.u32(*count);
                }
            })
        };
        [
            self.create(),
            nfs_call(16, list(&[4096]), Nfsstat3::Ok),
            nfs_call(17, list(&[512, 4096]), Nfsstat3::Ok),
        ]
    }

    /// A call that is answered by the task that takes it.
    fn getattr(&self) -> Sample {
        nfs_call(1, args(|w| w.opaque(&self.file)), Nfsstat3::Ok)
    }

    fn disk(&self) -> u64 {
        self.node.files.volumes().remove(0).dev
    }

    /// Keeps every worker busy until what is returned is dropped.
    fn busy(&self) -> mpsc::Sender<()> {
        let (free, stuck) = mpsc::channel();
        let stuck = Arc::new(std::sync::Mutex::new(stuck));
        let (begin, begun) = mpsc::channel();
        for number in 0..WORKERS {
            let (stuck, begin) = (Arc::clone(&stuck), begin.clone());
            let work = move || {
                begin.send(()).unwrap();
                let _ = stuck.lock().unwrap().recv();
                None
            };
            let job = Job {
                kind: 0,
                // No disk has such a number, and no two of them share their part of the workers.
                group: u64::MAX - number as u64,
                work: Box::new(work),
            };
            self.node.pool.submit_first(0, job);
            begun.recv_timeout(TIME_MAX).unwrap();
        }
        free
    }

    /// Lets the task take a call that was sent, until it is with the workers.
    async fn queued(&self) {
        let deadline = Instant::now() + TIME_MAX;
        while self.node.pool.queued() == 0 {
            assert!(Instant::now() < deadline, "the call does not come");
            tokio::task::yield_now().await;
        }
    }

    /// Waits until a call is carried out, and does not let the task see that it is.
    fn carried_out(&self, before: u64) {
        let deadline = Instant::now() + TIME_MAX;
        while self.node.pool.ended(self.disk()) == before {
            assert!(Instant::now() < deadline, "the call is not carried out");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn record(sample: &Sample) -> Vec<u8> {
    let message = sample.message();
    let mark = 0x8000_0000 | message.len() as u32;
    [&mark.to_be_bytes()[..], &message].concat()
}

/// When the gate closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closes {
    Never,
    /// While the call waits for a worker.
    BeforeTheEffect,
    /// When the reply is made, and before it is sent.
    BeforeTheReply,
}

const ALL: [Closes; 3] = [
    Closes::Never,
    Closes::BeforeTheEffect,
    Closes::BeforeTheReply,
];

impl Closes {
    /// Has the call that was just sent carried out, and the gate closed when it is to.
    async fn carry_out(self, scene: &Scene, busy: mpsc::Sender<()>) {
        scene.queued().await;
        let before = scene.node.pool.ended(scene.disk());
        if self == Self::BeforeTheEffect {
            scene.node.gate.close();
        }
        drop(busy);
        scene.carried_out(before);
        if self == Self::BeforeTheReply {
            scene.node.gate.close();
        }
    }
}

/// Whether something comes.
async fn hears(stream: &mut TcpStream) -> Option<usize> {
    let mut bytes = [0; 8192];
    // An end by reset is an end too.
    let read = timeout(SILENCE, stream.read(&mut bytes)).await;
    read.ok().map(|read| read.unwrap_or(0))
}

#[tokio::test]
async fn a_reply_that_waits_when_the_gate_closes_is_not_sent_over_tcp() {
    for (closes, number) in ALL
        .into_iter()
        .flat_map(|closes| [0, 1, 2].map(|n| (closes, n)))
    {
        let scene = Scene::new(false);
        let (mut client, served) = scene.connect().await;
        let busy = scene.busy();
        let call = &scene.calls()[number];
        client.write_all(&record(call)).await.unwrap();
        closes.carry_out(&scene, busy).await;
        let heard = hears(&mut client).await;
        let was_made = scene.path().join("new").exists();
        if closes == Closes::Never {
            assert!(heard.is_some_and(|bytes| bytes > 0), "{call:?}");
        } else {
            assert_eq!(heard, Some(0), "the connection ends: {closes:?}, {call:?}");
            let ended = timeout(TIME_MAX, served).await.unwrap().unwrap();
            assert_eq!(ended.unwrap_err().to_string(), "the lease is over");
        }
        let is_made = number == 0 && closes != Closes::BeforeTheEffect;
        assert_eq!(was_made, is_made, "{closes:?}, {call:?}");
    }
}

#[tokio::test]
async fn a_connection_to_a_floating_address_says_nothing_more_until_the_address_is_gone() {
    for closes in [Closes::BeforeTheEffect, Closes::BeforeTheReply] {
        let scene = Scene::new(true);
        let (mut client, served) = scene.connect().await;
        let busy = scene.busy();
        client.write_all(&record(&scene.create())).await.unwrap();
        closes.carry_out(&scene, busy).await;
        assert_eq!(hears(&mut client).await, None, "{closes:?}");
        // What comes now is not even read.
        client.write_all(&record(&scene.getattr())).await.unwrap();
        assert_eq!(hears(&mut client).await, None, "{closes:?}");
        assert!(!served.is_finished());
        scene.stop.send(Stop::Destroy).unwrap();
        assert_eq!(hears(&mut client).await, Some(0), "{closes:?}");
    }
}

#[tokio::test]
async fn a_reply_that_waits_when_the_gate_closes_is_not_sent_over_udp() {
    for (closes, number) in ALL
        .into_iter()
        .flat_map(|closes| [0, 1, 2].map(|n| (closes, n)))
    {
        let scene = Scene::new(false);
        let client = scene.datagrams().await;
        let busy = scene.busy();
        let call = &scene.calls()[number];
        client.send(&call.message()).await.unwrap();
        closes.carry_out(&scene, busy).await;
        let mut bytes = [0; 8192];
        let heard = timeout(SILENCE, client.recv(&mut bytes)).await.is_ok();
        assert_eq!(heard, closes == Closes::Never, "{closes:?}, {call:?}");
    }
}

#[tokio::test]
async fn what_is_answered_at_once_is_not_answered_behind_a_closed_gate() {
    let scene = Scene::new(false);
    let (mut client, _) = scene.connect().await;
    let datagrams = scene.datagrams().await;
    let getattr = scene.getattr();
    let mut bytes = [0; 8192];
    client.write_all(&record(&getattr)).await.unwrap();
    assert!(hears(&mut client).await.is_some_and(|bytes| bytes > 0));
    datagrams.send(&getattr.message()).await.unwrap();
    timeout(TIME_MAX, datagrams.recv(&mut bytes))
        .await
        .unwrap()
        .unwrap();
    scene.node.gate.close();
    client.write_all(&record(&getattr)).await.unwrap();
    assert_eq!(hears(&mut client).await, None);
    // Whoever watches the gate ends all connections; one that is used again ends by itself.
    assert!(scene.node.gate.has_turned_away());
    client.write_all(&record(&getattr)).await.unwrap();
    assert_eq!(hears(&mut client).await, Some(0), "the connection ends");
    datagrams.send(&getattr.message()).await.unwrap();
    let heard = timeout(SILENCE, datagrams.recv(&mut bytes)).await;
    assert!(heard.is_err(), "a datagram is answered");
}
