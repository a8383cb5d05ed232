//! A call on its way through the server: where it came from, what it asks, and what became of it.

use std::net::{IpAddr, SocketAddr};

use havenfs_rpc::auth::{AuthStat, Credential};
use havenfs_rpc::xdr::{Writer, XdrError};

pub use crate::backend::Mode;
use crate::cluster::{Outcome, ServiceCommand};

/// How a message arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// In a TCP stream.
    Tcp,
    /// As a UDP datagram.
    Udp,
}

/// Where a message came from and which of our addresses it was sent to. IPv4-mapped IPv6
/// addresses are the IPv4 host (use [`Origin::new`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// The peer's address and port.
    pub peer: SocketAddr,
    /// Our address and port.
    pub local: SocketAddr,
    /// The transport.
    pub transport: Transport,
}

impl Origin {
    /// Makes an origin with both addresses in their plain form.
    pub fn new(peer: SocketAddr, local: SocketAddr, transport: Transport) -> Self {
        let plain =
            |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        Self {
            peer: plain(peer),
            local: plain(local),
            transport,
        }
    }

    /// The peer's address.
    pub const fn host(&self) -> IpAddr {
        self.peer.ip()
    }

    /// Whether the peer sends from this machine's loopback.
    pub const fn is_loopback(&self) -> bool {
        self.peer.ip().is_loopback()
    }

    /// Whether the peer's port is one that only its superuser may use (below 1024).
    pub const fn from_reserved_port(&self) -> bool {
        self.peer.port() < 1024
    }
}

/// The set of programs that a port serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Port {
    /// NFS.
    Nfs,
    /// MOUNT.
    Mount,
    /// The portmapper.
    Portmap,
    /// NLM.
    Nlm,
    /// NSM.
    Nsm,
}

/// A call with its header checked and its arguments still encoded.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Where it came from.
    pub origin: &'a Origin,
    /// Where it runs.
    pub mode: Mode,
    /// The transaction id.
    pub xid: u32,
    /// The program's version, already checked.
    pub version: u32,
    /// The procedure.
    pub procedure: u32,
    /// Who the caller says it is.
    pub credential: Credential<'a>,
    /// The encoded arguments.
    pub args: &'a [u8],
}

/// Why a procedure wrote no results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The program has no such procedure.
    ProcUnavail,
    /// The arguments can't be decoded.
    GarbageArgs,
    /// The credential is refused.
    Auth(AuthStat),
    /// The call may have to wait: run it again with [`Mode::Worker`].
    Wait,
    /// The call needs a name that is being looked up: run it with [`Mode::Worker`] when
    /// something is known, or soon.
    Pending,
    /// The call gets no reply.
    Silence,
}

impl From<XdrError> for Refusal {
    fn from(_: XdrError) -> Self {
        Self::GarbageArgs
    }
}

/// A change of the replicated state that a call asks for, and how it is answered.
pub struct Proposal {
    /// The change.
    pub command: ServiceCommand,
    /// Appends the reply, with its header, once the change is on disk and carried out; false if
    /// the call gets none.
    pub answer: Answer,
}

/// See [`Proposal::answer`].
pub type Answer = Box<dyn FnOnce(Outcome, &mut Writer<'_>) -> bool + Send>;

impl std::fmt::Debug for Proposal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proposal")
            .field("command", &self.command)
            .finish_non_exhaustive()
    }
}

/// What [`serve`](crate::dispatch::serve) did.
#[derive(Debug)]
pub enum Served {
    /// The reply was appended.
    Replied,
    /// Nothing was appended: the call must run on a worker thread.
    Wait,
    /// Nothing was appended: the call must run on a worker thread, when a name was looked up.
    Pending,
    /// Nothing was appended: the reply follows from the outcome of this.
    Propose(Proposal),
    /// Nothing was appended and nothing will be.
    Silent,
}
