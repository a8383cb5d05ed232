//! The replicated state: what every node agrees on, and the one function that changes it.
//!
//! Owns [`ClusterState`] and [`Command`]. Pure: no clock, no randomness, no files, no tasks; what
//! a command needs of these it carries. The log of `raft` feeds [`ClusterState::apply`], and
//! nothing else does.

pub mod command;
pub mod state;

pub use command::{Command, Outcome};
pub use state::ClusterState;
