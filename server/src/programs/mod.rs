//! The programs: each decodes a call, asks the domain, and encodes the answer.
//!
//! A program's `serve` gets a [`Request`](crate::call::Request) whose header is checked and a
//! writer that already holds the reply header; it appends the results or returns why there are
//! none. NULL never arrives here.

pub mod mount;
pub mod nfs3;
pub mod portmap;

#[cfg(test)]
mod tests;
