//! TCP: one task per connection, all buffered calls answered with one write.
//!
//! The task goes round: take finished replies, serve whole records, send everything, wait. While
//! replies wait to be sent nothing more is read, so a peer that does not read is paused, and after
//! [`REPLY_TIME_MAX`] closed; a record that does not arrive whole in [`RECORD_TIME_MAX`] closes the
//! connection as well.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::BufMut;
use havenfs_rpc::record::RecordReader;
use rustix::net::Shutdown;
use tokio::io::AsyncReadExt as _;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::intake::Intake;
use super::limits::{
    BUFFERS_KEPT_MAX, BYTES_ALWAYS, BYTES_PER_CONNECTION_MAX, CALLS_OUTSTANDING_MAX,
    COPY_BYTES_MAX, FLUSH_BYTES, IDLE_TIME_MAX, NFS_RECORD_BYTES_MAX, RECORD_TIME_MAX,
    REPLY_BYTES_MIN, REPLY_TIME_MAX, Reservation, SIDE_RECORD_BYTES_MAX, Share, Slot, TooMany,
};
use super::mailbox::{Mailbox, Reply};
use super::runtimes::Runtimes;
use crate::backend::sys;
use crate::call::{Origin, Port, Transport};
use crate::clients::Entered;
use crate::node::Node;
use crate::pool::Job;

/// How much of the buffer of small replies is kept for the next batch.
const GATHERED_BYTES_KEPT: usize = 64 * 1024;
/// How many replies one system call sends.
const SEGMENTS_MAX: usize = 64;
/// How long a peer may take to see the end of a connection.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(2);
/// How often a connection looks at its times.
const TICK: Duration = Duration::from_secs(5);
/// How long to wait before asking again whether all connections together hold less.
const BUDGET_RETRY: Duration = Duration::from_millis(10);
/// How long a peer may take to have its answers, and how often that is asked; nobody tells.
const ACKNOWLEDGED_TIME_MAX: Duration = Duration::from_millis(100);
const ACKNOWLEDGED_CHECK: Duration = Duration::from_millis(1);

/// How a service stops on this node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stop {
    /// It serves.
    #[default]
    Serve,
    /// No new calls; what was taken is answered.
    Finish,
    /// At once: the lease is over, or another node has the service.
    Destroy,
}

impl Stop {
    /// Whether it does not serve any more.
    pub const fn is_stopped(self) -> bool {
        !matches!(self, Self::Serve)
    }

    /// Waits until all is to be closed. What moves along with its address stays open, unread, until
    /// then: to close it earlier would tell clients before the other node is ready.
    pub async fn destroyed(stop: &mut watch::Receiver<Self>) {
        // An error says that it is over as well.
        let _ = stop.wait_for(|stop| *stop == Self::Destroy).await;
    }
}

/// Accepts connections until it is stopped.
pub async fn accept(
    node: Arc<Node>,
    port: Port,
    listener: TcpListener,
    runtimes: Arc<Runtimes>,
    mut stop: watch::Receiver<Stop>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| stop.is_stopped()) => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                let slot = match node.connections.enter(peer.ip().to_canonical()) {
                    Ok(slot) => slot,
                    Err(TooMany::InAll) => {
                        node.metrics.limit_connections.add(1);
                        continue;
                    }
                    Err(TooMany::OfPeer) => {
                        node.metrics.limit_connections_per_peer.add(1);
                        continue;
                    }
                };
                node.metrics.connections.add(1);
                let (node, stop) = (Arc::clone(&node), stop.clone());
                // The other thread's runtime must watch the socket from now on.
                let Ok(stream) = stream.into_std() else {
                    continue;
                };
                runtimes.next().spawn(async move {
                    if let Err(error) = serve(node, port, stream, peer, slot, stop).await {
                        tracing::debug!(%peer, %error, "connection closed");
                    }
                });
            }
            Err(error) => {
                // Out of descriptors, or a connection that was gone before it was accepted.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(BUDGET_RETRY).await;
            }
        }
    }
    if node.floats {
        // Whoever connects now is not accepted, but not refused either: it shall find the other
        // node.
        Stop::destroyed(&mut stop).await;
    }
}

/// Serves a connection until its end, or until it is stopped.
pub(super) async fn serve(
    node: Arc<Node>,
    port: Port,
    stream: std::net::TcpStream,
    peer: SocketAddr,
    slot: Slot,
    mut stop: watch::Receiver<Stop>,
) -> io::Result<()> {
    let share = Share::new(Arc::clone(&node.budget), Arc::clone(&slot.peer));
    let origin = Origin::new(peer, stream.local_addr()?, Transport::Tcp);
    // Declared before all that owns the connection, and so dropped after it.
    let _held = node.guard.as_ref().and_then(|guard| guard.hold(&stream));
    let stream = TcpStream::from_std(stream)?;
    stream.set_nodelay(true)?;
    let clients = Arc::clone(&node.clients);
    let client = (port == Port::Nfs).then(|| clients.enter(&origin));
    let record_bytes_max = if port == Port::Nfs {
        NFS_RECORD_BYTES_MAX
    } else {
        SIDE_RECORD_BYTES_MAX
    };
    let (receiver, sender) = stream.into_split();
    let sender = Arc::new(sender);
    let locking = || node.lock_connections.enter(&origin, &sender);
    let _locking = (port == Port::Nlm).then(locking);
    let mut connection = Connection {
        mailbox: Arc::new(Mailbox::default()),
        reader: RecordReader::new(record_bytes_max),
        out: Outbox::default(),
        held: share.reserve(0),
        share,
        record_since: None,
        last_call: Instant::now(),
        received: 0,
        jobs: Vec::new(),
        client,
        port,
        origin,
        receiver,
        sender,
        node,
    };
    let ended = tokio::select! {
        result = connection.run() => Some(result),
        stop = stop.wait_for(|stop| stop.is_stopped()) => {
            // Nothing more is sent, and what is unread stays so.
            if stop.is_ok_and(|stop| *stop == Stop::Destroy) {
                return Ok(());
            }
            None
        }
    };
    let floats = connection.node.floats;
    if let Some(result) = ended {
        if floats && connection.node.gate.has_turned_away() {
            // The lease is over, and the client is not to see how: the address goes first.
            drop(slot);
            Stop::destroyed(&mut stop).await;
        }
        return result;
    }
    // What was taken is answered: a call that was carried out and not answered would be repeated
    // after the restart, and fail.
    let sender = Arc::clone(&connection.sender);
    let finishing = async {
        if floats {
            connection.answer_all().await?;
            timeout(ACKNOWLEDGED_TIME_MAX, acknowledged(&sender)).await?
        } else {
            connection.finish().await
        }
    };
    let result = tokio::select! {
        result = finishing => result,
        () = Stop::destroyed(&mut stop) => return Ok(()),
    };
    if floats {
        // It has its answers, or does not read them, and counts no more.
        drop(slot);
        Stop::destroyed(&mut stop).await;
    }
    result
}

/// Waits until the peer has everything that was sent.
async fn acknowledged(sender: &OwnedWriteHalf) -> io::Result<()> {
    let stream: &TcpStream = sender.as_ref();
    while sys::unacknowledged_bytes(stream.as_fd())? > 0 {
        sleep(ACKNOWLEDGED_CHECK).await;
    }
    Ok(())
}

fn lease_is_over() -> io::Error {
    io::Error::other("the lease is over")
}

/// Replies that wait to be sent.
#[derive(Default)]
struct Outbox {
    /// Small replies, one after the other, and how much of them is sent.
    gathered: Vec<u8>,
    gathered_at: usize,
    /// Large replies, and how much of the first one is sent.
    large: VecDeque<Reply>,
    large_at: usize,
}

impl Outbox {
    fn len(&self) -> usize {
        self.gathered.len()
            + self
                .large
                .iter()
                .map(|reply| reply.bytes.len())
                .sum::<usize>()
    }

    fn add(&mut self, reply: Reply) {
        if reply.bytes.len() <= COPY_BYTES_MAX {
            self.gathered.extend_from_slice(&reply.bytes);
        } else {
            self.large.push_back(reply);
        }
    }
}

/// Why nothing more is served now.
#[derive(PartialEq, Eq)]
enum Pause {
    /// No whole record is there.
    Empty,
    /// Replies must be sent first.
    Flush,
    /// Too many calls of this connection are with the workers.
    Outstanding,
    /// All connections together hold too much.
    Budget,
}

struct Connection {
    node: Arc<Node>,
    port: Port,
    origin: Origin,
    receiver: OwnedReadHalf,
    sender: Arc<OwnedWriteHalf>,
    reader: RecordReader,
    mailbox: Arc<Mailbox>,
    out: Outbox,
    /// Bytes of the half-received record and of gathered replies.
    held: Reservation,
    share: Share,
    /// When the first bytes of the half-received record were there.
    record_since: Option<Instant>,
    last_call: Instant,
    /// Bytes received since they were last counted.
    received: u64,
    /// Empty between rounds.
    jobs: Vec<Job>,
    /// Where an NFS client's traffic is counted.
    client: Option<Entered>,
}

impl Connection {
    async fn run(&mut self) -> io::Result<()> {
        // One timer for the life of the connection: setting one for every wait would cost more
        // than a short call.
        let tick = sleep(TICK);
        tokio::pin!(tick);
        // A connection that was only opened holds nothing.
        let mut dormant = true;
        // Bytes have come and are not read yet.
        let mut readable = false;
        loop {
            if self.node.gate.has_turned_away() {
                return Err(lease_is_over());
            }
            for reply in self.mailbox.take() {
                self.out.add(reply);
            }
            let pause = self.serve_records()?;
            self.held
                .resize(self.reader.held_bytes() + self.out.gathered.len());
            if self.out.len() > 0 {
                self.flush().await?;
                self.held.resize(self.reader.held_bytes());
            }
            match pause {
                Pause::Flush => {}
                Pause::Outstanding => {
                    self.node.metrics.limit_outstanding.add(1);
                    self.mailbox.changed().await;
                }
                Pause::Budget => self.wait_for_room().await?,
                Pause::Empty => {
                    if self.reader.held_bytes() == 0 {
                        self.record_since = None;
                    } else if self.record_since.is_none() {
                        self.record_since = Some(Instant::now());
                    }
                    let crowded = self.node.connections.all() > BUFFERS_KEPT_MAX;
                    if crowded && !dormant && !readable && self.reader.held_bytes() == 0 {
                        self.release();
                        dormant = true;
                    }
                    if self.port == Port::Nlm && self.mailbox.outstanding() > 0 {
                        self.mailbox.lend(&self.sender);
                    }
                    if dormant {
                        // No buffer while nothing comes.
                        tokio::select! {
                            biased;
                            () = self.mailbox.changed() => {}
                            ready = self.receiver.readable() => {
                                ready?;
                                (dormant, readable) = (false, true);
                            }
                            () = &mut tick => {
                                tick.as_mut().reset(Instant::now() + TICK);
                                if !self.check_times()? {
                                    return Ok(());
                                }
                            }
                        }
                        continue;
                    }
                    let held = self.reader.held_bytes();
                    if !self.share.has_room(held) {
                        self.wait_for_room().await?;
                        continue;
                    }
                    let (buffer, bytes_max) = self.reader.space();
                    // When memory is short, a connection gets on up to a small share.
                    let step = if self.share.has_room(usize::MAX) {
                        bytes_max
                    } else {
                        BYTES_ALWAYS.saturating_sub(held).max(1)
                    };
                    let mut room = buffer.limit(bytes_max.min(step));
                    tokio::select! {
                        biased;
                        () = self.mailbox.changed() => {}
                        read = self.receiver.read_buf(&mut room) => {
                            let bytes = read?;
                            readable = false;
                            if bytes == 0 {
                                // The peer sends no more, but still wants its answers.
                                return self.finish().await;
                            }
                            self.received += bytes as u64;
                        }
                        () = &mut tick => {
                            tick.as_mut().reset(Instant::now() + TICK);
                            if !self.check_times()? {
                                return Ok(());
                            }
                            if self.last_call.elapsed() >= TICK {
                                self.release();
                                dormant = true;
                            }
                        }
                    }
                }
            }
        }
    }

    /// Waits a little: what is needed may be given back by this connection or by another one.
    async fn wait_for_room(&mut self) -> io::Result<()> {
        self.node.metrics.limit_bytes_in_all.add(1);
        // Whether something was given back is asked again by whoever waits.
        let _ = timeout(BUDGET_RETRY, self.mailbox.changed()).await;
        self.check_times().map(|_| ())
    }

    /// Gives the buffers back; nothing may be in them.
    fn release(&mut self) {
        self.reader.release();
        if self.out.gathered.is_empty() {
            self.out.gathered = Vec::new();
        }
    }

    /// Serves whole records until something says pause.
    fn serve_records(&mut self) -> io::Result<Pause> {
        let mut jobs = std::mem::take(&mut self.jobs);
        let before = self.out.gathered.len();
        let mut calls = 0;
        let mut clock = std::time::Instant::now();
        let pause = loop {
            let unsent = self.out.len();
            if unsent >= FLUSH_BYTES {
                break Ok(Pause::Flush);
            }
            let held = self.mailbox.reserved() + unsent;
            if self.mailbox.outstanding() >= CALLS_OUTSTANDING_MAX
                || held >= BYTES_PER_CONNECTION_MAX
            {
                break Ok(Pause::Outstanding);
            }
            // Received bytes don't count here: to serve them is the way to be rid of them.
            if !self.share.has_room(held) {
                break Ok(Pause::Budget);
            }
            let record = match self.reader.next_record() {
                Ok(Some(record)) => record,
                Ok(None) => break Ok(Pause::Empty),
                Err(_) => {
                    self.node.metrics.limit_record_bytes.add(1);
                    break Err(io::Error::other("record too long"));
                }
            };
            calls += 1;
            let mut intake = Intake {
                node: &self.node,
                port: self.port,
                mailbox: &self.mailbox,
                reply_to: None,
                share: &self.share,
                jobs: &mut jobs,
                clock: &mut clock,
            };
            intake.take(&self.origin, record, &mut self.out.gathered);
        };
        self.node.pool.submit(self.mailbox.id(), &mut jobs);
        self.jobs = jobs;
        if calls > 0 {
            // Every whole record ends the time that the next one may take.
            self.record_since = None;
            self.last_call = Instant::now();
        }
        if let Some(client) = &self.client {
            client.add(calls, (self.out.gathered.len() - before) as u64);
            client.add_received(std::mem::take(&mut self.received));
        }
        pause
    }

    /// Judges how long the connection has been silent, and how long its record has taken; false
    /// if it is to be closed quietly.
    fn check_times(&self) -> io::Result<bool> {
        if self
            .record_since
            .is_some_and(|since| since.elapsed() > RECORD_TIME_MAX)
        {
            self.node.metrics.limit_record_time.add(1);
            return Err(io::Error::other("record did not arrive whole in time"));
        }
        // Calls that are with the workers are no idleness.
        if self.mailbox.outstanding() == 0 && self.last_call.elapsed() > IDLE_TIME_MAX {
            self.node.metrics.limit_idle_time.add(1);
            return Ok(false);
        }
        Ok(true)
    }

    /// Answers what the workers still have, and what they have finished.
    async fn answer_all(&mut self) -> io::Result<()> {
        loop {
            // Asked before taking: a reply is put in before its call counts as answered.
            let complete = self.mailbox.outstanding() == 0;
            for reply in self.mailbox.take() {
                self.out.add(reply);
            }
            if self.node.floats {
                // Who does not read has no part in how long others wait.
                timeout(ACKNOWLEDGED_TIME_MAX, self.flush()).await??;
            } else {
                self.flush().await?;
            }
            if complete {
                return Ok(());
            }
            // The last reply may have been sent by whoever had it, who tells nobody.
            if self.mailbox.outstanding() > 0 {
                self.mailbox.changed().await;
            }
        }
    }

    /// Answers what was taken, and ends the connection.
    async fn finish(&mut self) -> io::Result<()> {
        self.answer_all().await?;
        // To close a socket with unread bytes in it resets the connection, which takes the answers
        // away that the peer has not read yet: so read on until the peer has seen the end.
        let stream: &TcpStream = (*self.sender).as_ref();
        rustix::net::shutdown(stream, Shutdown::Write)?;
        let mut scratch = [0; 4096];
        let drain = async {
            while self.receiver.read(&mut scratch).await? > 0 {}
            Ok::<_, io::Error>(())
        };
        // Whoever does not close has had its time.
        timeout(DRAIN_TIME_MAX, drain).await.unwrap_or(Ok(()))
    }

    /// Sends everything. Whoever takes it too slowly is closed. May be dropped while it waits and
    /// called again.
    async fn flush(&mut self) -> io::Result<()> {
        let (mut deadline, mut taken) = (Instant::now() + REPLY_TIME_MAX, 0);
        let Outbox {
            gathered,
            gathered_at,
            large,
            large_at,
        } = &mut self.out;
        while *gathered_at < gathered.len() || !large.is_empty() {
            if !self.node.gate.admits() {
                return Err(lease_is_over());
            }
            let mut segments = [IoSlice::new(&[]); SEGMENTS_MAX];
            // A reply that is sent in part must be finished before anything else is.
            let first = (*large_at == 0).then(|| gathered.get(*gathered_at..).unwrap_or_default());
            let others = large.iter().enumerate().map(|(index, reply)| {
                let at = if index == 0 { *large_at } else { 0 };
                reply.bytes.get(at..).unwrap_or_default()
            });
            let mut count = 0;
            for (place, bytes) in segments.iter_mut().zip(first.into_iter().chain(others)) {
                *place = IoSlice::new(bytes);
                count += 1;
            }
            let segments = segments.get(..count).unwrap_or_default();
            let mut sent = match self.sender.try_write_vectored(segments) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if timeout_at(deadline, self.sender.writable()).await.is_err() {
                        self.node.metrics.limit_reply_time.add(1);
                        return Err(io::Error::other("replies were not read in time"));
                    }
                    continue;
                }
                sent => sent?,
            };
            if sent == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            taken += sent;
            if taken >= REPLY_BYTES_MIN {
                (deadline, taken) = (Instant::now() + REPLY_TIME_MAX, 0);
            }
            if *large_at == 0 {
                let from_gathered = sent.min(gathered.len() - *gathered_at);
                *gathered_at += from_gathered;
                sent -= from_gathered;
            }
            while let Some(reply) = large.front().filter(|_| sent > 0) {
                let rest = reply.bytes.len() - *large_at;
                if sent < rest {
                    *large_at += sent;
                    break;
                }
                sent -= rest;
                *large_at = 0;
                large.pop_front();
            }
        }
        gathered.clear();
        *gathered_at = 0;
        gathered.shrink_to(GATHERED_BYTES_KEPT);
        Ok(())
    }
}
