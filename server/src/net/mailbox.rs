//! Where workers put finished replies, and a connection's task takes them all at once.
//!
//! A [`Sink`] is the right to send one reply; whoever holds it sends it or drops it, so that the
//! count of outstanding calls always comes down. The reply cache may move a running call's reply
//! to a newer connection by replacing the sink.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use super::limits::Reservation;
use crate::pool::Tell;

/// A finished reply, with its record mark in front.
#[derive(Debug)]
pub struct Reply {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// For a datagram: to whom, and from which of our addresses.
    pub to: Option<(SocketAddr, IpAddr)>,
    /// Its part of the budget, until it is sent.
    pub reservation: Reservation,
}

/// The finished replies of one connection or socket.
#[derive(Debug)]
pub struct Mailbox {
    /// Tells it from all others of this process.
    id: u64,
    replies: Mutex<Vec<Reply>>,
    outstanding: AtomicUsize,
    reserved: AtomicUsize,
    wake: Notify,
}

impl Default for Mailbox {
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            replies: Mutex::default(),
            outstanding: AtomicUsize::new(0),
            reserved: AtomicUsize::new(0),
            wake: Notify::new(),
        }
    }
}

impl Mailbox {
    /// Its number, by which its calls take turns with those of others.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// How many calls have not been answered yet.
    pub fn outstanding(&self) -> usize {
        self.outstanding.load(Ordering::Acquire)
    }

    /// How many bytes the calls that are not answered yet may hold.
    pub fn reserved(&self) -> usize {
        self.reserved.load(Ordering::Acquire)
    }

    /// Takes all finished replies.
    pub fn take(&self) -> Vec<Reply> {
        std::mem::take(&mut *self.replies.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until a reply was put in or a call was dropped since the last wait.
    pub async fn changed(&self) {
        self.wake.notified().await;
    }

    /// Makes the right to send one reply; `reservation` is what call and reply may hold.
    pub fn sink(
        self: &Arc<Self>,
        to: Option<(SocketAddr, IpAddr)>,
        reservation: Reservation,
    ) -> Sink {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
        let reserved = reservation.bytes();
        self.reserved.fetch_add(reserved, Ordering::AcqRel);
        Sink {
            mailbox: Arc::clone(self),
            to,
            reserved,
            reservation: Some(reservation),
        }
    }
}

/// The right to send one reply.
#[derive(Debug)]
pub struct Sink {
    mailbox: Arc<Mailbox>,
    to: Option<(SocketAddr, IpAddr)>,
    reserved: usize,
    reservation: Option<Reservation>,
}

impl Sink {
    /// Puts the reply into the mailbox; returns who must be told, which may be put off a little.
    #[must_use]
    pub fn send(mut self, bytes: Vec<u8>) -> Option<Arc<dyn Tell>> {
        let mut reservation = self.reservation.take()?;
        reservation.resize(bytes.len());
        let reply = Reply {
            bytes,
            to: self.to,
            reservation,
        };
        self.mailbox
            .replies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(reply);
        Some(Arc::clone(&self.mailbox) as Arc<dyn Tell>)
        // Dropping the sink counts the call down.
    }
}

impl Tell for Mailbox {
    fn tell(&self) {
        self.wake.notify_one();
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.mailbox.outstanding.fetch_sub(1, Ordering::AcqRel);
        self.mailbox
            .reserved
            .fetch_sub(self.reserved, Ordering::AcqRel);
        // Not sent: nobody else will tell the task that one call less is outstanding.
        if self.reservation.is_some() {
            self.mailbox.tell();
        }
    }
}
