//! The types that openraft is instantiated with.
//!
//! A log entry carries a [`Command`] behind a shared pointer, since openraft copies entries between
//! its log and its state machine. Whether openraft takes a proposal is told through [`Reply`],
//! which is used up exactly once: of a proposal that openraft drops it is told too.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use openraft::impls::{BoxedErrorSource, InlineBatch, TokioRuntime};
use openraft::raft::responder::Responder;
use openraft::{EntryPayload, OptionalSend, RaftTypeConfig};

use super::proposer::Unavailable;
use crate::cluster::{Command, Origin};

/// openraft's parameters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Types;

impl RaftTypeConfig for Types {
    type D = Proposed;
    type R = Applied;
    type NodeId = u64;
    type Node = Member;
    type Term = u64;
    type LeaderId = LeaderId;
    type Vote = Vote;
    type Payload = Payload;
    type Entry = Entry;
    type AsyncRuntime = TokioRuntime;
    type Responder<T>
        = Reply<T>
    where
        T: OptionalSend + 'static;
    type Batch<T>
        = InlineBatch<T>
    where
        T: OptionalSend + 'static;
    type ErrorSource = BoxedErrorSource;
}

pub(super) type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>;
pub(super) type Vote = openraft::Vote<LeaderId>;
pub(super) type Payload = EntryPayload<Proposed, u64, Member>;
pub(super) type Entry = openraft::Entry<LeaderId, Payload>;
pub(super) type LogId = openraft::LogId<LeaderId>;
pub(super) type Membership = openraft::Membership<u64, Member>;
pub(super) type StoredMembership = openraft::StoredMembership<LeaderId, u64, Member>;
pub(super) type SnapshotMeta = openraft::SnapshotMeta<LeaderId, u64, Member>;

/// A command in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Proposed {
    /// Where it comes from.
    pub(super) origin: Origin,
    /// What it asks for.
    pub(super) command: Arc<Command>,
}

impl fmt::Display for Proposed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:?}", self.command)
    }
}

/// That an entry is applied. The outcome goes to whoever proposed it, by way of `pending`.
#[derive(Debug)]
pub(super) struct Applied;

/// What is known of a voter: its number alone would not tell a wiped disk from the voter's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    /// The random number that the member's store was born with.
    pub(super) store_id: u64,
    /// What people call it; at most [`NAME_BYTES_MAX`], and empty in a cluster of one without one.
    pub(super) name: Box<str>,
    /// Where the others reach it; [`NO_ADDRESS`] if nobody does.
    pub(super) address: SocketAddr,
    /// Whether it votes and keeps the log, and serves nobody.
    pub(super) witness: bool,
}

impl Member {
    /// The only member of a cluster of one.
    pub(super) fn alone(store_id: u64) -> Self {
        Self {
            store_id,
            name: Box::default(),
            address: NO_ADDRESS,
            witness: false,
        }
    }
}

impl Default for Member {
    fn default() -> Self {
        Self::alone(0)
    }
}

/// The longest name of a member.
pub(super) const NAME_BYTES_MAX: usize = 64;
/// The address of a member that has no other members to talk to.
pub(super) const NO_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

type Done<T> = Box<dyn FnOnce(Result<T, Unavailable>) + Send>;

/// Tells a proposer the result, or that openraft dropped the proposal.
pub(super) struct Reply<T>(Option<Done<T>>);

impl<T> Reply<T> {
    pub(super) fn new(done: impl FnOnce(Result<T, Unavailable>) + Send + 'static) -> Self {
        Self(Some(Box::new(done)))
    }
}

impl<T: OptionalSend + 'static> Responder<Types, T> for Reply<T> {
    fn on_complete(mut self, result: T) {
        if let Some(done) = self.0.take() {
            done(Ok(result));
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done(Err(Unavailable::Unknown));
        }
    }
}
