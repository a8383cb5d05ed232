//! What peers may make the server hold, with a name for each bound.
//!
//! [`Budget`] counts the bytes that all connections hold together: half-received records, calls
//! that wait for a worker, and replies that wait to be sent. A connection reserves before it takes
//! a call; [`Reservation`] gives back when the reply is sent or dropped.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::programs::nfs3::TRANSFER_BYTES_MAX;

/// The longest record on the NFS port: a WRITE of the largest size, with room for its header.
pub const NFS_RECORD_BYTES_MAX: usize = TRANSFER_BYTES_MAX as usize + 4096;
/// The longest record on the other ports.
pub const SIDE_RECORD_BYTES_MAX: usize = 64 * 1024;
/// The longest datagram that is read; the largest that UDP carries.
pub const DATAGRAM_BYTES_MAX: usize = 65_535;
/// Calls of one connection that may be with the workers.
pub const CALLS_OUTSTANDING_MAX: usize = 256;
/// Bytes that one connection may hold.
pub const BYTES_PER_CONNECTION_MAX: usize = 16 * 1024 * 1024;
/// Bytes that all connections may hold.
pub const BYTES_IN_ALL_MAX: usize = 128 * 1024 * 1024;
/// Connections in all, if the descriptors allow it.
pub const CONNECTIONS_MAX: usize = 10_000;
/// Connections of one peer address.
pub const CONNECTIONS_PER_PEER_MAX: usize = 4096;
/// How long a record may take from its first byte to its last.
pub const RECORD_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a peer may leave replies unread before it is closed.
pub const REPLY_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a connection may be silent. Linux clients close theirs after 5 minutes.
pub const IDLE_TIME_MAX: Duration = Duration::from_mins(15);
/// Replies are sent at the latest when so many bytes have gathered.
pub const FLUSH_BYTES: usize = 256 * 1024;

/// The bytes that all connections hold together.
#[derive(Debug, Default)]
pub struct Budget {
    used: AtomicUsize,
}

impl Budget {
    /// How many bytes are held.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether `more` bytes fit under the bound.
    pub fn has_room(&self, more: usize) -> bool {
        self.used().saturating_add(more) <= BYTES_IN_ALL_MAX
    }
}

/// A part of the budget, given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Reservation {
    /// Takes `bytes`; the caller has asked [`Budget::has_room`] where it can wait.
    pub fn new(budget: &Arc<Budget>, bytes: usize) -> Self {
        budget.used.fetch_add(bytes, Ordering::Relaxed);
        Self {
            budget: Arc::clone(budget),
            bytes,
        }
    }

    /// Its size.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes it as large as what is held now.
    pub fn resize(&mut self, bytes: usize) {
        if bytes != self.bytes {
            self.budget
                .used
                .fetch_add(bytes.wrapping_sub(self.bytes), Ordering::Relaxed);
            self.bytes = bytes;
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Counts connections, in all and by peer.
#[derive(Debug)]
pub struct ConnectionCounts {
    max: usize,
    peers: Mutex<HashMap<IpAddr, usize>>,
    all: AtomicUsize,
}

/// Why a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TooMany {
    /// There are too many in all.
    InAll,
    /// Its peer has too many.
    OfPeer,
}

impl ConnectionCounts {
    /// Allows `max` connections in all.
    pub fn new(max: usize) -> Self {
        Self {
            max,
            peers: Mutex::new(HashMap::new()),
            all: AtomicUsize::new(0),
        }
    }

    /// How many connections there are.
    pub fn all(&self) -> usize {
        self.all.load(Ordering::Relaxed)
    }

    /// Counts a connection of `peer` for as long as the slot lives.
    pub fn enter(self: &Arc<Self>, peer: IpAddr) -> Result<Slot, TooMany> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if self.all() >= self.max {
            return Err(TooMany::InAll);
        }
        let of_peer = peers.entry(peer).or_insert(0);
        if *of_peer >= CONNECTIONS_PER_PEER_MAX {
            return Err(TooMany::OfPeer);
        }
        *of_peer += 1;
        self.all.fetch_add(1, Ordering::Relaxed);
        drop(peers);
        Ok(Slot {
            counts: Arc::clone(self),
            peer,
        })
    }
}

/// A connection's place among all.
#[derive(Debug)]
pub struct Slot {
    counts: Arc<ConnectionCounts>,
    peer: IpAddr,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut peers = self
            .counts
            .peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(of_peer) = peers.get_mut(&self.peer) {
            *of_peer -= 1;
            if *of_peer == 0 {
                peers.remove(&self.peer);
            }
        }
        self.counts.all.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reservation_gives_back_what_it_took() {
        let budget = Arc::new(Budget::default());
        let mut reservation = Reservation::new(&budget, 100);
        reservation.resize(40);
        assert_eq!(budget.used(), 40);
        assert!(budget.has_room(BYTES_IN_ALL_MAX - 40));
        assert!(!budget.has_room(BYTES_IN_ALL_MAX - 39));
        reservation.resize(70);
        assert_eq!(budget.used(), 70);
        drop(reservation);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_closed_connection_makes_room() {
        let counts = Arc::new(ConnectionCounts::new(2));
        let peer = IpAddr::from([127, 0, 0, 1]);
        let first = counts.enter(peer);
        let second = counts.enter(peer);
        assert!(first.is_ok() && second.is_ok());
        assert_eq!(counts.enter(peer).err(), Some(TooMany::InAll));
        drop(first);
        assert!(counts.enter(peer).is_ok());
    }
}
