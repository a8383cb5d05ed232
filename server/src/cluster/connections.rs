//! The TCP connections that clients have to a service, as they are replicated: so that the node
//! that takes the service over can wake the clients, which else wait for an answer that never comes
//! until their own timers tell them to send again.
//!
//! Kept as the active node tells them, and best effort: one that is missing costs its client a
//! wait, and one too many costs a packet. Nothing here says who holds what; a connection that is
//! gone says nothing about its host. Which ones are told, and when, is `serve::connections`'.

use std::io::{self, Read, Write};
use std::net::SocketAddr;

use imbl::OrdSet;
use serde::{Deserialize, Serialize};

use super::rows::{damaged, read_row, write_end, write_row};

/// A connection, by its two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Connection {
    local: SocketAddr,
    peer: SocketAddr,
}

impl Connection {
    /// A connection between these ends. Only addresses and ports count, in their plain form: what
    /// else the kernel tells of an IPv6 end (scope and flow) means nothing on another node, is not
    /// written, and so must not make two of one.
    pub fn new(local: SocketAddr, peer: SocketAddr) -> Self {
        let plain = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
        Self {
            local: plain(local),
            peer: plain(peer),
        }
    }

    /// The service's address and port.
    pub const fn local(&self) -> SocketAddr {
        self.local
    }

    /// The client's address and port.
    pub const fn peer(&self) -> SocketAddr {
        self.peer
    }
}

/// Carries out a change; what finds no room is not kept.
pub(super) fn change(kept: &mut OrdSet<Connection>, came: &[Connection], went: &[Connection]) {
    for connection in went {
        kept.remove(connection);
    }
    for connection in came {
        if kept.len() < CONNECTIONS_MAX {
            kept.insert(*connection);
        }
    }
}

/// Writes them as [`read`] reads them.
pub(super) fn write(
    kept: &OrdSet<Connection>,
    out: &mut impl Write,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    for connection in kept {
        write_row(out, buffer, connection)?;
    }
    write_end(out)
}

/// Reads what [`write`] wrote.
pub(super) fn read(input: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<OrdSet<Connection>> {
    let mut kept = OrdSet::new();
    while let Some(connection) = read_row(input, buffer)? {
        if kept.len() >= CONNECTIONS_MAX {
            return Err(damaged());
        }
        kept.insert(connection);
    }
    Ok(kept)
}

/// How many are kept for a service: twice as many as a node serves at a time, since after a
/// takeover those of the last epoch stay for a while beside the new ones.
pub const CONNECTIONS_MAX: usize = 20_000;
