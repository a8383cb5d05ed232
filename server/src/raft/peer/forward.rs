//! Proposals on their way to the leader's log.
//!
//! One direction only: a proposal that is taken is not answered, since the node that it came from
//! applies its entry like all others. The first that is not taken ends the connection, with
//! [`Message::NotLeader`] if that can still be sent.
//!
//! All proposals of a connection are bound to the leadership that there was when the first one
//! came. What is taken of them is therefore a beginning of what was sent, in its order: no later
//! one gets into the log after an earlier one was refused, even if this node leads again meanwhile.
//! Of those that are neither applied nor known to be refused, nobody can tell whether they will be.

use std::sync::Arc;

use openraft::raft::ClientWriteResult;
use tokio::sync::{Notify, Semaphore};

use super::dial::{PeerError, Peers};
use super::link::{Link, LinkError, Receiver, Sender};
use super::wire::{FORWARDS_MAX, Message};
use crate::raft::Engine;
use crate::raft::proposer::Unavailable;
use crate::raft::types::{Member, Proposed, Reply, Types};

type Written = ClientWriteResult<Types>;

/// How many proposals of a connection may be under way; more are not read.
pub(super) const UNANSWERED_MAX: usize = 2048;

/// The way of a node's proposals to the leader.
pub(in crate::raft) struct Forwarder {
    link: Link,
}

/// Why no proposals go this way any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::raft) enum Ended {
    /// The other node does not lead, or did not go on leading.
    NotLeader,
    /// The connection ended.
    Broken,
}

impl Forwarder {
    /// Connects to the node that is thought to lead.
    pub(in crate::raft) async fn connect(
        peers: &Peers,
        node: u64,
        member: &Member,
    ) -> Result<Self, PeerError> {
        let link = peers.dial(node, member).await;
        let link = link.inspect_err(|error| peers.complain(node, member, error))?;
        peers.settle(node, member);
        Ok(Self { link })
    }

    /// Sends proposals, in order and with one write. After an error, or if this is dropped, how
    /// many of them arrived is unknown and the forwarder is of no use any more.
    pub(in crate::raft) async fn send(&mut self, batch: &[Proposed]) -> std::io::Result<()> {
        let sender = &mut self.link.sender;
        for part in batch.chunks(FORWARDS_MAX) {
            let added = sender.add(&Message::Forward(part.to_vec()));
            added.map_err(std::io::Error::other)?;
        }
        sender.flush().await.map_err(std::io::Error::other)
    }

    /// Returns when no proposals go this way any more. May be dropped and called again.
    pub(in crate::raft) async fn ended(&mut self) -> Ended {
        match self.link.receiver.receive().await {
            Ok(Message::NotLeader) => Ended::NotLeader,
            // Nothing else may come.
            Ok(_) | Err(_) => Ended::Broken,
        }
    }
}

/// Proposes what comes on a connection, beginning with `batch`. Returns when the connection ends
/// or something is not taken; the caller closes the connection.
pub(super) async fn take(
    engine: &Engine,
    batch: Vec<Proposed>,
    receiver: &mut Receiver,
    sender: &mut Sender,
) -> Result<(), LinkError> {
    match propose(engine, batch, receiver).await {
        Err(Refused::Link(error)) => Err(error),
        Err(Refused::NotTaken) => sender.send(&Message::NotLeader).await,
    }
}

/// Why proposing ended.
enum Refused {
    Link(LinkError),
    NotTaken,
}

async fn propose(
    engine: &Engine,
    mut batch: Vec<Proposed>,
    receiver: &mut Receiver,
) -> Result<std::convert::Infallible, Refused> {
    let leader = engine.as_leader().map_err(|_| Refused::NotTaken)?;
    let leader_id = leader.to_committed_leader_id();
    let room = Arc::new(Semaphore::new(UNANSWERED_MAX));
    let refused = Arc::new(Notify::new());
    loop {
        for proposed in batch {
            let permit = tokio::select! {
                biased;
                () = refused.notified() => return Err(Refused::NotTaken),
                permit = Arc::clone(&room).acquire_owned() => permit,
            };
            let refused = Arc::clone(&refused);
            let reply = Reply::new(move |written: Result<Written, Unavailable>| {
                if !matches!(written, Ok(Ok(_))) {
                    refused.notify_one();
                }
                drop(permit);
            });
            let write = engine.write(proposed).with_leader(leader_id);
            // An error says that the engine has ended.
            let written = write.responder(reply).await;
            written.map_err(|_| Refused::NotTaken)?;
        }
        let message = tokio::select! {
            biased;
            () = refused.notified() => return Err(Refused::NotTaken),
            message = receiver.receive() => message,
        };
        batch = match message.map_err(Refused::Link)? {
            Message::Forward(batch) => batch,
            _ => return Err(Refused::Link(LinkError::OutOfPlace)),
        };
    }
}
