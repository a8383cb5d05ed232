//! openraft's way to one member: requests one after the other on a connection that is kept.
//!
//! The connection is made when it is needed, by a task of its own: openraft drops a heartbeat that
//! takes too long, and what was begun of the connection would be lost with it, each time. While a
//! request is under way the connection belongs to the request, so that a request that is dropped
//! closes it and a late answer is never taken for that of the next one.

use std::future::Future;
use std::time::Duration;

use openraft::error::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, RaftNetworkFactory, RaftNetworkV2};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::dial::{PeerError, Peers};
use super::link::{Link, LinkError};
use super::transfer;
use super::wire::Message;
use crate::raft::machine::Content;
use crate::raft::types::{LeaderId, Member, Types, Vote};

type RaftSnapshot = openraft::Snapshot<LeaderId, u64, Member, Content>;

/// How long a request waits for a connection at most; less if openraft gives it less.
const CONNECT_MAX: Duration = Duration::from_millis(200);
/// How long an answer to entries may take, which a disk must sync. Heartbeats have a connection of
/// their own, and openraft gives up on them sooner.
const APPEND_MAX: Duration = Duration::from_secs(1);
/// After a member could not be asked.
const BACKOFF: Duration = Duration::from_millis(50);
/// Entries that are sent together have at most about so many bytes; the rest goes next.
const APPEND_BYTES_MAX: usize = 8 << 20;

/// One member.
pub(in crate::raft) struct Peer {
    peers: Peers,
    node: u64,
    member: Member,
    link: Option<Link>,
    dialing: Option<JoinHandle<Result<Link, PeerError>>>,
}

impl RaftNetworkFactory<Types> for Peers {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &Member) -> Peer {
        Peer {
            peers: self.clone(),
            node: target,
            member: node.clone(),
            link: None,
            dialing: None,
        }
    }
}

impl Peer {
    /// Takes the connection; makes one if there is none.
    async fn link(&mut self, within: Duration) -> Result<Link, PeerError> {
        if let Some(link) = self.link.take() {
            return Ok(link);
        }
        let dialing = self.dialing.get_or_insert_with(|| {
            let (peers, node, member) = (self.peers.clone(), self.node, self.member.clone());
            tokio::spawn(async move { peers.dial(node, &member).await })
        });
        let dialed = timeout(within.min(CONNECT_MAX), dialing).await;
        // It goes on, for the next request.
        let dialed = dialed.map_err(|_| LinkError::TimedOut)?;
        self.dialing = None;
        dialed.map_err(std::io::Error::other)?
    }

    /// Asks what `put` appends and waits for the answer; `within` that time there is one, or none.
    async fn ask(
        &mut self,
        put: impl FnOnce(&mut Vec<u8>) + Send,
        within: Duration,
    ) -> Result<Message, PeerError> {
        let asked = async {
            let mut link = self.link(within).await?;
            link.sender.add_as(put)?;
            link.sender.flush().await?;
            let answer = link.receiver.receive().await?;
            Ok::<_, PeerError>((link, answer))
        };
        let (link, answer) = timeout(within, asked)
            .await
            .unwrap_or_else(|_| Err(LinkError::TimedOut.into()))
            .inspect_err(|error| self.peers.complain(self.node, &self.member, error))?;
        self.peers.settle(self.node, &self.member);
        if let Message::Refused(reason) = answer {
            return Err(PeerError::RefusedBy(reason));
        }
        self.link = Some(link);
        Ok(answer)
    }

    /// An answer of another kind: the connection is of no use any more.
    fn out_of_place<T>(&mut self) -> Result<T, RPCError<Types>> {
        self.link = None;
        Err(unreachable(&LinkError::OutOfPlace).into())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Some(dialing) = &self.dialing {
            dialing.abort();
        }
    }
}

fn unreachable(error: &(impl std::error::Error + 'static)) -> Unreachable<Types> {
    Unreachable::new(error)
}

impl RaftNetworkV2<Types> for Peer {
    type SnapshotData = Content;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        let within = option.hard_ttl().max(APPEND_MAX);
        let mut count = 0;
        let put = |out: &mut Vec<u8>| {
            count = Message::encode_append(out, &rpc, APPEND_BYTES_MAX);
        };
        let answer = self.ask(put, within).await;
        let answer = answer.map_err(|error| unreachable(&error))?;
        let sent = rpc.entries.get(..count).unwrap_or_default();
        let last = sent.last().map(|entry| entry.log_id).or(rpc.prev_log_id);
        let whole = count == rpc.entries.len();
        match answer {
            Message::Appended(AppendEntriesResponse::Success) if !whole => {
                Ok(AppendEntriesResponse::PartialSuccess(last))
            }
            // Both would end openraft if they came without being possible.
            Message::Appended(AppendEntriesResponse::Conflict) if rpc.prev_log_id.is_none() => {
                self.out_of_place()
            }
            Message::Appended(AppendEntriesResponse::PartialSuccess(upto))
                if upto < rpc.prev_log_id || upto > last =>
            {
                self.out_of_place()
            }
            Message::Appended(response) => Ok(response),
            _ => self.out_of_place(),
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.voted(&Message::Vote(rpc), &option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.voted(&Message::PreVote(rpc), &option).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: RaftSnapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let sent = async {
            let mut link = self.link(CONNECT_MAX).await?;
            let response = transfer::send(&mut link, vote, snapshot).await?;
            self.link = Some(link);
            Ok::<_, PeerError>(response)
        };
        let sent = tokio::select! {
            sent = sent => sent,
            closed = cancel => return Err(closed.into()),
        };
        sent.map_err(|error| {
            self.peers.complain(self.node, &self.member, &error);
            unreachable(&error).into()
        })
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        let request = Message::Transfer(req);
        let answer = self.ask(|out| request.encode(out), option.hard_ttl()).await;
        match answer.map_err(|error| unreachable(&error))? {
            Message::Transferred(response) => Ok(response),
            _ => self.out_of_place(),
        }
    }

    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(BACKOFF)))
    }
}

impl Peer {
    async fn voted(
        &mut self,
        request: &Message,
        option: &RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let answer = self.ask(|out| request.encode(out), option.hard_ttl()).await;
        match answer.map_err(|error| unreachable(&error))? {
            Message::Voted(response) => Ok(response),
            _ => self.out_of_place(),
        }
    }
}
