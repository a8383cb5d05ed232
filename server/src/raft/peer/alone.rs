//! The way to other voters. A cluster of one has none: whatever is sent can't be reached.

use std::future::Future;
use std::io;

use openraft::error::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, RaftNetworkFactory, RaftNetworkV2};

use crate::raft::machine::Content;
use crate::raft::types::{LeaderId, Member, Types, Vote};

type RaftSnapshot = openraft::Snapshot<LeaderId, u64, Member, Content>;

/// Makes connections that reach nobody.
#[derive(Debug)]
pub(in crate::raft) struct Alone;

impl RaftNetworkFactory<Types> for Alone {
    type Network = Self;

    async fn new_client(&mut self, _target: u64, _node: &Member) -> Self {
        Self
    }
}

impl RaftNetworkV2<Types> for Alone {
    type SnapshotData = Content;

    async fn append_entries(
        &mut self,
        _rpc: AppendEntriesRequest<Types>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        Err(unreachable().into())
    }

    async fn vote(
        &mut self,
        _rpc: VoteRequest<Types>,
        _option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        Err(unreachable().into())
    }

    /// Refuses, where openraft's default would grant.
    async fn pre_vote(
        &mut self,
        _rpc: VoteRequest<Types>,
        _option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        Err(unreachable().into())
    }

    async fn full_snapshot(
        &mut self,
        _vote: Vote,
        _snapshot: RaftSnapshot,
        _cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        Err(unreachable().into())
    }
}

fn unreachable() -> Unreachable<Types> {
    Unreachable::new(&io::Error::other("a cluster of one has no other voters"))
}
