//! The small test client: RPC over TCP and UDP, the portmapper, MOUNT, NFSv3, NLM and NSM; and what
//! a client's machine serves, to receive what the server sends on its own.
//!
//! It exists to send what real clients never send, so it checks nothing of what a test tells it to
//! send. What comes back is judged twice: reply headers are decoded by the crate `onc-rpc` and
//! results by `nfs3_types`, neither of them ours, and a result must end where its message ends.
//!
//! Not here: retransmission, caching, reconnecting. A call waits for its answer or fails the test.
//!
//! Invariant: transaction ids are never used twice in a process unless a test does so by hand, so
//! that the server's reply cache does not take a new call for a repeated one.

pub mod attributes;
pub mod host;
pub mod mount;
pub mod nfs;
pub mod nlm;
pub mod nsm;
pub mod peer;
pub mod portmap;
pub mod rpc;
pub mod taker;

pub use attributes::{Answer, Sattr, SetTime};
pub use host::Host;
pub use nfs::Nfs;
pub use nlm::Nlm;
pub use nsm::Nsm;
pub use peer::Peer;
pub use rpc::{Cred, Header, Outcome};
pub use taker::Taker;
