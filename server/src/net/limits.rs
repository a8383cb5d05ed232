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
/// Bytes that all connections of one peer may hold.
pub const BYTES_PER_PEER_MAX: usize = BYTES_IN_ALL_MAX / 4;
/// A connection that holds less is served even when the others hold too much.
pub const BYTES_ALWAYS: usize = 64 * 1024;
/// With more connections than this none keeps its buffers when it waits; before, one keeps them for
/// the seconds until it counts as idle.
pub const BUFFERS_KEPT_MAX: usize = 512;
/// Connections in all, if the descriptors allow it.
pub const CONNECTIONS_MAX: usize = 10_000;
/// How long a record may take from its first byte to its last.
pub const RECORD_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a peer may take to read the next [`REPLY_BYTES_MIN`] of its replies, or the rest.
pub const REPLY_TIME_MAX: Duration = Duration::from_secs(30);
/// See [`REPLY_TIME_MAX`].
pub const REPLY_BYTES_MIN: usize = 256 * 1024;
/// How long a connection may be silent. Linux clients close theirs after 5 minutes.
pub const IDLE_TIME_MAX: Duration = Duration::from_mins(15);
/// A reply up to this size is copied together with others; a larger one is sent from its place.
pub const COPY_BYTES_MAX: usize = 8 * 1024;
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
}

/// What is held for one peer address.
#[derive(Debug, Default)]
pub struct Peer {
    connections: AtomicUsize,
    used: AtomicUsize,
}

/// A connection's access to the budget: what it takes counts for its peer and for all.
#[derive(Debug, Clone)]
pub struct Share {
    budget: Arc<Budget>,
    peer: Arc<Peer>,
}

impl Share {
    /// Makes the share of one peer.
    pub const fn new(budget: Arc<Budget>, peer: Arc<Peer>) -> Self {
        Self { budget, peer }
    }

    /// Whether a connection that holds `held` bytes may take another call. One that holds little
    /// may always, whatever others do.
    pub fn has_room(&self, held: usize) -> bool {
        held < BYTES_ALWAYS
            || (self.budget.used() < BYTES_IN_ALL_MAX
                && self.peer.used.load(Ordering::Relaxed) < BYTES_PER_PEER_MAX)
    }

    /// Takes `bytes`.
    pub fn reserve(&self, bytes: usize) -> Reservation {
        let mut reservation = Reservation {
            share: self.clone(),
            bytes: 0,
        };
        reservation.resize(bytes);
        reservation
    }
}

/// A part of the budget, given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    share: Share,
    bytes: usize,
}

impl Reservation {
    /// Its size.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes it as large as what is held now.
    pub fn resize(&mut self, bytes: usize) {
        if bytes != self.bytes {
            let more = bytes.wrapping_sub(self.bytes);
            // Wraps around for less, which is right modulo 2^64.
            self.share.budget.used.fetch_add(more, Ordering::Relaxed);
            self.share.peer.used.fetch_add(more, Ordering::Relaxed);
            self.bytes = bytes;
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.resize(0);
    }
}

/// Counts connections, in all and by peer.
#[derive(Debug)]
pub struct ConnectionCounts {
    max: usize,
    peers: Mutex<HashMap<IpAddr, Arc<Peer>>>,
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
        let of_peer = Arc::clone(peers.entry(peer).or_default());
        // Half of them at most, so that no peer keeps all others out.
        if of_peer.connections.load(Ordering::Relaxed) >= self.max.div_ceil(2) {
            return Err(TooMany::OfPeer);
        }
        of_peer.connections.fetch_add(1, Ordering::Relaxed);
        self.all.fetch_add(1, Ordering::Relaxed);
        drop(peers);
        Ok(Slot {
            counts: Arc::clone(self),
            address: peer,
            peer: of_peer,
        })
    }
}

/// A connection's place among all.
#[derive(Debug)]
pub struct Slot {
    counts: Arc<ConnectionCounts>,
    address: IpAddr,
    /// What its peer holds.
    pub peer: Arc<Peer>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut peers = self
            .counts
            .peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.peer.connections.fetch_sub(1, Ordering::Relaxed) == 1 {
            peers.remove(&self.address);
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
        let share = Share::new(Arc::clone(&budget), Arc::default());
        let mut reservation = share.reserve(100);
        reservation.resize(40);
        assert_eq!(budget.used(), 40);
        reservation.resize(70);
        assert_eq!(budget.used(), 70);
        drop(reservation);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn one_peer_can_not_take_what_others_need() {
        let budget = Arc::new(Budget::default());
        let greedy = Share::new(Arc::clone(&budget), Arc::default());
        let modest = Share::new(budget, Arc::default());
        let _taken = greedy.reserve(BYTES_PER_PEER_MAX);
        assert!(!greedy.has_room(BYTES_ALWAYS));
        assert!(modest.has_room(BYTES_ALWAYS));
        let others: Vec<_> = (0..3).map(|_| modest.reserve(BYTES_PER_PEER_MAX)).collect();
        assert!(!modest.has_room(BYTES_ALWAYS), "all together hold too much");
        assert!(modest.has_room(0), "who holds nothing is served");
        drop(others);
        assert!(modest.has_room(BYTES_ALWAYS));
    }

    #[test]
    fn a_closed_connection_makes_room() {
        let counts = Arc::new(ConnectionCounts::new(2));
        let [peer, other] = [1, 2].map(|last| IpAddr::from([127, 0, 0, last]));
        let first = counts.enter(peer);
        assert!(first.is_ok());
        assert_eq!(counts.enter(peer).err(), Some(TooMany::OfPeer));
        let second = counts.enter(other);
        assert!(second.is_ok());
        assert_eq!(counts.enter(other).err(), Some(TooMany::InAll));
        drop(first);
        assert!(counts.enter(peer).is_ok());
    }
}
