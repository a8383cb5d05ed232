//! Where workers put finished replies, and a connection's task takes them all at once. While the
//! task waits and has nothing to send, it may lend its socket: who has the only reply of a call
//! that waited for the log then sends it, and saves the time that it takes to wake the task.
//!
//! A [`Sink`] is the right to send one reply; whoever holds it sends it or drops it, so that the
//! count of outstanding calls always comes down. The reply cache may move a running call's reply
//! to a newer connection by replacing the sink.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::Notify;

use super::limits::{COPY_BYTES_MAX, Reservation};
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
    replies: Mutex<Replies>,
    outstanding: AtomicUsize,
    reserved: AtomicUsize,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Replies {
    finished: Vec<Reply>,
    /// Lent until the task takes what is finished.
    socket: Weak<OwnedWriteHalf>,
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

    /// Takes all finished replies, and the socket back if it was lent.
    pub fn take(&self) -> Vec<Reply> {
        std::mem::take(&mut *self.replies()).finished
    }

    /// Lends the socket until the next [`Mailbox::take`]. All that was taken must be sent.
    pub fn lend(&self, socket: &Arc<OwnedWriteHalf>) {
        self.replies().socket = Arc::downgrade(socket);
    }

    fn replies(&self) -> MutexGuard<'_, Replies> {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner)
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
            counted: false,
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
    /// Whether the call was counted down already.
    counted: bool,
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
        self.mailbox.replies().finished.push(reply);
        Some(Arc::clone(&self.mailbox) as Arc<dyn Tell>)
        // Dropping the sink counts the call down.
    }

    /// Sends the reply if the socket is lent and takes it, or else as [`Sink::send`]. Never waits.
    pub fn send_at_once(mut self, mut bytes: Vec<u8>) -> Option<Arc<dyn Tell>> {
        let mailbox = Arc::clone(&self.mailbox);
        let mut replies = mailbox.replies();
        let lent = replies.socket.upgrade();
        let may_send = replies.finished.is_empty() && bytes.len() <= COPY_BYTES_MAX;
        if let Some(socket) = lent.filter(|_| may_send) {
            // The task sends the rest, and comes upon the error if there is one.
            let sent = socket.try_write(&bytes).unwrap_or(0);
            if sent == bytes.len() {
                self.reservation = None;
                // Nobody is told: the task must see it when it takes the socket back.
                self.count_down();
                return None;
            }
            bytes.drain(..sent);
        }
        let mut reservation = self.reservation.take()?;
        reservation.resize(bytes.len());
        replies.finished.push(Reply {
            bytes,
            to: self.to,
            reservation,
        });
        drop(replies);
        Some(Arc::clone(&self.mailbox) as Arc<dyn Tell>)
    }
}

impl Tell for Mailbox {
    fn tell(&self) {
        self.wake.notify_one();
    }
}

impl Sink {
    fn count_down(&mut self) {
        if !std::mem::replace(&mut self.counted, true) {
            let mailbox = &self.mailbox;
            mailbox.outstanding.fetch_sub(1, Ordering::AcqRel);
            mailbox.reserved.fetch_sub(self.reserved, Ordering::AcqRel);
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.count_down();
        // Not sent: nobody else will tell the task that one call less is outstanding.
        if self.reservation.is_some() {
            self.mailbox.tell();
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use tokio::io::AsyncReadExt as _;
    use tokio::net::{TcpListener, TcpStream};

    use super::super::limits::{Budget, Share};
    use super::*;

    #[tokio::test]
    async fn a_reply_is_sent_at_once_only_while_the_socket_is_lent_and_nothing_is_before_it() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (_receiver, sender) = listener.accept().await.unwrap().0.into_split();
        sender.writable().await.unwrap();
        let sender = Arc::new(sender);
        let share = Share::new(Arc::new(Budget::default()), Arc::default());
        let mailbox = Arc::new(Mailbox::default());
        let sink = || mailbox.sink(None, share.reserve(1));
        let finished = || -> Vec<Vec<u8>> {
            let replies = mailbox.take().into_iter();
            replies.map(|reply| reply.bytes).collect()
        };

        // Not lent yet.
        assert!(sink().send_at_once(b"1".to_vec()).is_some());
        mailbox.lend(&sender);
        // Behind another one.
        assert!(sink().send_at_once(b"2".to_vec()).is_some());
        assert_eq!(finished(), [b"1", b"2"]);
        mailbox.lend(&sender);
        assert!(sink().send_at_once(b"3".to_vec()).is_none());
        assert!(finished().is_empty());
        // Taken back by that.
        assert!(sink().send_at_once(b"4".to_vec()).is_some());
        assert_eq!(finished(), [b"4"]);
        assert_eq!((mailbox.outstanding(), mailbox.reserved()), (0, 0));

        // What does not fit is left for the task, to the byte.
        let long = vec![b'5'; COPY_BYTES_MAX];
        let (mut sent, mut rest) = (Vec::new(), Vec::new());
        while rest.is_empty() {
            mailbox.lend(&sender);
            let told = sink().send_at_once(long.clone());
            rest = finished().concat();
            assert_eq!(told.is_some(), !rest.is_empty());
            sent.extend_from_slice(&long[..long.len() - rest.len()]);
        }
        // What the task would send in another order is left to it whole.
        mailbox.lend(&sender);
        let longer = vec![b'5'; COPY_BYTES_MAX + 1];
        assert!(sink().send_at_once(longer.clone()).is_some());
        assert_eq!(finished(), [longer]);
        // A connection that has ended.
        mailbox.lend(&sender);
        drop(sender);
        assert!(sink().send_at_once(b"6".to_vec()).is_some());
        let mut received = Vec::new();
        peer.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, [b"3", &sent[..]].concat());
    }
}
