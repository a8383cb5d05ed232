//! The Network Status Monitor without input or output.
//!
//! Owns: the messages ([`wire`]), what a host's name may look like ([`nsm_name`]), the state number
//! and how it rises ([`nsm_state`]), whom to tell of it and when ([`notifier`]), and what a notice
//! from a host means ([`inbound`]).
//!
//! Does not own sockets, clocks, files, threads or randomness: values in, values out. Knows neither
//! the lock manager nor the cluster.
//!
//! Source: XNFS chapter 11.
#![forbid(unsafe_code)]

pub mod inbound;
pub mod notifier;
pub mod nsm_name;
pub mod nsm_state;
pub mod wire;
