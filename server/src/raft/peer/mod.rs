//! The way between nodes: connections that only holders of the cluster key can make, the messages
//! of consensus on them, and how empty nodes become a cluster.
//!
//! Owns what goes through the members' port. Does not decide who is a member (the log does, and
//! before there is one, [`forming`](form) does) nor what a message does (openraft does). `mod.rs`
//! of `raft` binds the port, starts [`serve_peers`], lets [`form`] finish if the store belongs to
//! no cluster yet, and gives [`Peers`] to the engine; the proposer holds a [`Forwarder`].
//!
//! ```text
//!   engine --> Peers (dial) --> Peer (remote) --+                +--> serve --> engine
//!   proposer ----------------> Forwarder -------+--> link ===> --+--> forward -> engine
//!   forming --> Peers::ask ---------------------+  key, frames   +--> transfer -> engine
//!                                                  hello, wire
//! ```
//!
//! # Invariants
//!
//! - Nothing is told to, and nothing but a handshake is read from, whoever lacks the cluster key.
//! - A request is answered, and an answer believed, only where both sides belong to one cluster,
//!   and the other side has the number, the name and the store that the membership knows. A wiped
//!   disk has another store, and so it can't vote in the place of its former self.
//! - A connection carries one request at a time; after any error, timeout or cancelled request it
//!   is closed and never used again, so that no answer is taken for that of another request.
//! - Every length that a peer gives has a named limit, and memory grows with what has arrived.
//!
//! # If the process dies
//!
//! A peer sees the connection end, at the latest when probes stay unanswered, and asks again:
//! openraft's requests may come twice. A snapshot that was half received has no name in the folder
//! and is gone. How forming goes on is told in `forming`.

mod alone;
mod applicants;
mod dial;
mod forming;
mod forward;
mod hello;
mod key;
mod link;
mod looking;
mod pace;
mod remote;
mod serve;
#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
mod transfer;
mod wire;

pub use self::applicants::{Applicant, lives};

pub(super) use self::alone::Alone;
pub(super) use self::{
    dial::{Membership, PeerError, Peers, ask_for},
    forming::{check_name, difference, form},
    forward::Forwarder,
    hello::{Configured, Refusal},
    key::ClusterKey,
    serve::{Served, serve_peers},
};
