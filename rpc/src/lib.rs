//! ONC RPC version 2 without input or output: the wire layer that `nlm`, `nsm` and `server` share.
//!
//! Owns: XDR with a maximum on every variable-length read ([`xdr`]), TCP record marking
//! ([`record`]), call and reply headers ([`message`]), credentials ([`auth`]), the portmapper's
//! messages ([`portmap`]) and the numbers of the programs ([`program`]).
//!
//! Does not own sockets, clocks, files, threads or randomness: bytes in, values out, and back.
//!
//! Invariants: nothing here panics on any input, and nothing here takes memory because a length
//! field on the wire asks for it: a maximum is checked first. (The buffer of a large record is
//! reserved when its mark has been checked, but its pages are used only as bytes arrive.)
//!
//! Source: RFC 4506 (XDR), RFC 5531 (RPC), RFC 1833 (binding protocols).

#![forbid(unsafe_code)]

pub mod auth;
pub mod message;
pub mod portmap;
pub mod program;
pub mod record;
pub mod xdr;
