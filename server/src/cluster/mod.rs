//! The replicated state: what every node agrees on, and the one function that changes it; and what
//! a node makes of it by itself: whether it may serve, and whether it is its turn to take over.
//!
//! Owns [`ClusterState`] and [`Command`]; [`lease`], [`sole`], [`placement`], [`failback`] and
//! [`reconcile`] are local.
//!
//! Pure: no clock, no randomness, no files, no tasks; what a command needs of these it carries. The
//! log of `raft` feeds [`ClusterState::apply`], and nothing else does.

pub mod command;
pub mod connections;
pub mod definition;
pub mod failback;
pub mod handles;
mod ids;
pub mod lease;
pub mod members;
pub mod mounts;
pub mod numbers;
pub mod placement;
pub mod reconcile;
pub mod renewal_times;
pub mod replies;
mod rows;
pub mod service;
pub mod sole;
pub mod state;
pub mod wish;

pub use command::{ClusterCommand, Command, Outcome, ServiceCommand};
pub use ids::{NodeId, Origin, Queue, ServiceId};
pub use service::ServiceState;
pub use state::ClusterState;
pub use wish::Wish;
