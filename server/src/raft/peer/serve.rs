//! The members' port: who comes in, and what is asked there.
//!
//! Owns the listening socket and one task for each connection, which end with it. A connection
//! shows the key and says who it is within [`HANDSHAKE_MAX`], or is closed without a word. Whoever
//! belongs to no cluster, or comes while this node belongs to none, hears who this node is, and no
//! more. A member's requests are answered one after the other, in the order in which they came.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use openraft::raft::AppendEntriesResponse;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::dial::Peers;
use super::forward;
use super::hello::{Hello, Refusal, Standing};
use super::link::{Link, LinkError};
use super::transfer::{self, TransferError};
use super::wire::Message;
use crate::raft::Engine;
use crate::raft::change::{ChangeError, Changes};

/// How many connections may be without proof of the key at a time; further ones are closed. Those
/// from members' addresses have as many to themselves, so that nobody else can keep members out.
pub(super) const HANDSHAKES_MAX: usize = 64;
/// How many connections of members there may be: each has some four to each other.
const CONNECTIONS_MAX: usize = 512;
/// How long a connection may take to say who it is.
const HANDSHAKE_MAX: Duration = Duration::from_secs(2);
/// How long a member waits for an engine that is being started.
const ENGINE_MAX: Duration = Duration::from_secs(10);
/// After a connection could not be accepted: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the log says about strangers and refused nodes is paced by these, beside node numbers.
const SUBJECT_STRANGERS: u64 = u64::MAX;
const SUBJECT_REFUSED: u64 = u64::MAX - 1;

/// What members' requests go to.
#[derive(Clone)]
pub(in crate::raft) struct Served {
    pub(super) engine: Engine,
    /// The folder of the store.
    pub(super) dir: PathBuf,
    /// For the one snapshot that may be coming.
    pub(super) snapshots: Arc<Semaphore>,
    /// What operators ask for; none in tests.
    changes: Option<Changes>,
}

impl Served {
    /// The engine of the store in `dir`.
    pub(in crate::raft) fn new(engine: Engine, dir: &Path, changes: Option<Changes>) -> Self {
        Self {
            changes,
            engine,
            dir: dir.to_path_buf(),
            snapshots: Arc::new(Semaphore::new(1)),
        }
    }

    /// The leader is heard of just now.
    fn note_leader(&self) {
        if let Some(changes) = &self.changes {
            changes.peers().note_leader();
        }
    }
}

/// Serves the members' port; never returns. Dropping it closes all connections.
///
/// `served` is `None` until there is an engine.
pub(in crate::raft) async fn serve_peers(
    listener: TcpListener,
    peers: Peers,
    served: watch::Receiver<Option<Served>>,
) {
    let of_members = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let of_others = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // A panic has ended the process already.
            Some(_) = tasks.join_next() => continue,
        };
        match accepted {
            Ok((stream, from)) => {
                let handshakes = if peers.has_member_at(from.ip()) {
                    &of_members
                } else {
                    &of_others
                };
                let Ok(permit) = Arc::clone(handshakes).try_acquire_owned() else {
                    peers.counters().limit_handshakes.add(1);
                    continue;
                };
                let connection = Connection {
                    from,
                    peers: peers.clone(),
                    served: served.clone(),
                    connections: Arc::clone(&connections),
                };
                tasks.spawn(connection.serve(stream, permit));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection of a member");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

struct Connection {
    from: SocketAddr,
    peers: Peers,
    served: watch::Receiver<Option<Served>>,
    connections: Arc<Semaphore>,
}

impl Connection {
    async fn serve(mut self, stream: TcpStream, handshake: OwnedSemaphorePermit) {
        let from = self.from;
        let greeted = timeout(HANDSHAKE_MAX, self.greeted(stream)).await;
        drop(handshake);
        let (link, hello) = match greeted.unwrap_or(Err(LinkError::TimedOut)) {
            Ok(greeted) => greeted,
            Err(error) => return self.turn_away(&error),
        };
        let Ok(_permit) = Arc::clone(&self.connections).try_acquire_owned() else {
            self.peers.counters().limit_connections.add(1);
            return;
        };
        if let Err(error) = self.answer(link, hello).await {
            tracing::debug!(%from, %error, "connection of a member closed");
        }
    }

    /// Shakes hands and hears who it is.
    async fn greeted(&self, stream: TcpStream) -> Result<(Link, Hello), LinkError> {
        let mut link = Link::accept(stream, self.peers.key()).await?;
        match link.receiver.receive().await? {
            Message::Hello(hello) => Ok((link, hello)),
            _ => Err(LinkError::OutOfPlace),
        }
    }

    fn turn_away(&self, error: &LinkError) {
        let counters = self.peers.counters();
        counters.strangers.add(1);
        let text = error.to_string();
        if self.peers.pace().says(SUBJECT_STRANGERS, &text) {
            let (from, count) = (self.from, counters.strangers.get());
            tracing::warn!(%from, count, "connection to the members' port closed: {text}");
        }
    }

    async fn answer(&mut self, mut link: Link, hello: Hello) -> Result<(), TransferError> {
        let is_formed = |standing: &Standing| matches!(standing, Standing::Formed { .. });
        let to_formed = is_formed(&hello.standing);
        let own = self.peers.hello(to_formed);
        if !to_formed || !is_formed(&own.standing) {
            self.peers.note_applicant(&hello);
            return Ok(link.sender.send(&Message::Hello(own)).await?);
        }
        if let Err(refusal) = self.peers.admit(&hello) {
            let counters = self.peers.counters();
            counters.refused.add(1);
            let text = refusal.to_string();
            if self.peers.pace().says(SUBJECT_REFUSED, &text) {
                let from = self.from;
                tracing::error!(%from, "a node is refused: {text}");
            }
            let refused = match refusal {
                // It has no business any more, with whomever.
                Refusal::Removed { .. } | Refusal::EarlierGeneration { .. } => {
                    Message::Removed(text)
                }
                _ => Message::Refused(text),
            };
            return Ok(link.sender.send(&refused).await?);
        }
        self.peers.counters().accepted.add(1);
        link.sender.send(&Message::Hello(own)).await?;
        link.receiver.admit();
        let started = async {
            let served = self.served.wait_for(Option::is_some).await;
            served.ok().and_then(|served| served.clone())
        };
        // If there is none, it was not started in time, or the store is being closed.
        let served = timeout(ENGINE_MAX, started).await.ok().flatten();
        let served = served.ok_or(TransferError::Stopped)?;
        loop {
            match answered(&served, &mut link).await {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(TransferError::Link(error)) => return Err(error.into()),
                Err(error) => {
                    let from = self.from;
                    tracing::warn!(%from, "a member's request failed: {error}");
                    let reason = Message::Refused(error.to_string());
                    return Ok(link.sender.send(&reason).await?);
                }
            }
        }
    }
}

/// Answers the next request; returns whether there may be another.
async fn answered(served: &Served, link: &mut Link) -> Result<bool, TransferError> {
    let engine = &served.engine;
    let stopped = |_| TransferError::Stopped;
    let answer = match link.receiver.receive().await? {
        Message::Append(request) => {
            let response = engine.append_entries(request).await;
            let response = response.map_err(|_| TransferError::Stopped)?;
            // Else it leads nobody any more.
            if !matches!(response, AppendEntriesResponse::HigherVote(_)) {
                served.note_leader();
            }
            Message::Appended(response)
        }
        Message::Vote(request) => {
            let response = engine.vote(request).await;
            Message::Voted(response.map_err(|_| TransferError::Stopped)?)
        }
        Message::PreVote(request) => {
            let response = engine.pre_vote(request).await;
            Message::Voted(response.map_err(|_| TransferError::Stopped)?)
        }
        Message::Transfer(request) => {
            let response = engine.handle_transfer_leader(request).await;
            Message::Transferred(response.map_err(stopped)?)
        }
        Message::Snapshot(announced) => {
            let response = transfer::receive(served, &mut link.receiver, announced).await?;
            Message::Installed(response)
        }
        Message::Forward(batch) => {
            forward::take(engine, batch, &mut link.receiver, &mut link.sender).await?;
            return Ok(false);
        }
        Message::Change(change) => {
            let changes = served.changes.as_ref().ok_or(TransferError::Stopped)?;
            match changes.carry_out(&change).await {
                Err(ChangeError::NotLeader) => Message::NotLeader,
                result => Message::Changed(result.map_err(|error| error.to_string())),
            }
        }
        Message::Hello(_)
        | Message::Removed(_)
        | Message::Changed(_)
        | Message::Refused(_)
        | Message::Appended(_)
        | Message::Voted(_)
        | Message::Chunk(_)
        | Message::Installed(_)
        | Message::Transferred(_)
        | Message::NotLeader => return Err(LinkError::OutOfPlace.into()),
    };
    link.sender.send(&answer).await?;
    Ok(true)
}
