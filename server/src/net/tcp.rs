//! TCP: one task per connection, all buffered calls answered with one write.
//!
//! The task goes round: take finished replies, serve whole records, send everything, wait. While
//! replies wait to be sent nothing more is read, so a peer that does not read is paused, and after
//! [`REPLY_TIME_MAX`] closed; a record that does not arrive whole in [`RECORD_TIME_MAX`] closes the
//! connection as well.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BufMut;
use havenfs_rpc::record::RecordReader;
use tokio::io::AsyncReadExt as _;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::intake::Intake;
use super::limits::{
    BYTES_PER_CONNECTION_MAX, CALLS_OUTSTANDING_MAX, FLUSH_BYTES, IDLE_TIME_MAX,
    NFS_RECORD_BYTES_MAX, RECORD_TIME_MAX, REPLY_TIME_MAX, Reservation, SIDE_RECORD_BYTES_MAX,
    TooMany,
};
use super::mailbox::{Mailbox, Reply};
use super::runtimes::Runtimes;
use crate::clients::Entered;
use crate::dispatch::{Origin, Port, Transport};
use crate::node::Node;
use crate::pool::Job;

/// How many replies one system call sends.
const SEGMENTS_MAX: usize = 64;
/// A reply up to this size is copied together with others; a larger one is sent from its place.
const COPY_BYTES_MAX: usize = 8 * 1024;
/// How often a connection looks at its times.
const TICK: Duration = Duration::from_secs(5);
/// How long to wait before asking again whether all connections together hold less.
const BUDGET_RETRY: Duration = Duration::from_millis(10);

/// Accepts connections until `stop` is true.
pub async fn accept(
    node: Arc<Node>,
    port: Port,
    listener: TcpListener,
    runtimes: Arc<Runtimes>,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
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
                    let _slot = slot;
                    if let Err(error) = serve(node, port, stream, peer, stop).await {
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
}

async fn serve(
    node: Arc<Node>,
    port: Port,
    stream: std::net::TcpStream,
    peer: SocketAddr,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let mut stream = TcpStream::from_std(stream)?;
    stream.set_nodelay(true)?;
    let origin = Origin::new(peer, stream.local_addr()?, Transport::Tcp);
    let clients = Arc::clone(&node.clients);
    let client = (port == Port::Nfs).then(|| clients.enter(&origin));
    let record_bytes_max = if port == Port::Nfs {
        NFS_RECORD_BYTES_MAX
    } else {
        SIDE_RECORD_BYTES_MAX
    };
    let (receiver, sender) = stream.split();
    let mut connection = Connection {
        mailbox: Arc::new(Mailbox::default()),
        reader: RecordReader::new(record_bytes_max),
        out: Outbox::default(),
        held: Reservation::new(&node.budget, 0),
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
    tokio::select! {
        result = connection.run() => result,
        // Calls under way are dropped with their connection: clients send them again.
        _ = stop.wait_for(|stop| *stop) => Ok(()),
    }
}

/// Replies that wait to be sent.
#[derive(Default)]
struct Outbox {
    /// Small replies, one after the other.
    gathered: Vec<u8>,
    /// Large replies.
    large: VecDeque<Reply>,
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

struct Connection<'s> {
    node: Arc<Node>,
    port: Port,
    origin: Origin,
    receiver: ReadHalf<'s>,
    sender: WriteHalf<'s>,
    reader: RecordReader,
    mailbox: Arc<Mailbox>,
    out: Outbox,
    /// Bytes of the half-received record and of gathered replies.
    held: Reservation,
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

impl Connection<'_> {
    async fn run(&mut self) -> io::Result<()> {
        // One timer for the life of the connection: setting one for every wait would cost more
        // than a short call.
        let tick = sleep(TICK);
        tokio::pin!(tick);
        loop {
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
                Pause::Budget => {
                    self.node.metrics.limit_bytes_in_all.add(1);
                    // What it needs may be given back by itself or by another connection.
                    let _ = timeout(BUDGET_RETRY, self.mailbox.changed()).await;
                    self.check_times()?;
                }
                Pause::Empty => {
                    if self.reader.held_bytes() == 0 {
                        self.record_since = None;
                    } else if self.record_since.is_none() {
                        self.record_since = Some(Instant::now());
                    }
                    let (buffer, bytes_max) = self.reader.space();
                    let mut room = buffer.limit(bytes_max);
                    tokio::select! {
                        biased;
                        () = self.mailbox.changed() => {}
                        read = self.receiver.read_buf(&mut room) => {
                            let bytes = read?;
                            if bytes == 0 {
                                return Ok(());
                            }
                            self.received += bytes as u64;
                        }
                        () = &mut tick => {
                            tick.as_mut().reset(Instant::now() + TICK);
                            if !self.check_times()? {
                                return Ok(());
                            }
                        }
                    }
                }
            }
        }
    }

    /// Serves whole records until something says pause.
    fn serve_records(&mut self) -> io::Result<Pause> {
        let mut jobs = std::mem::take(&mut self.jobs);
        let before = self.out.gathered.len();
        let mut calls = 0;
        let mut clock = std::time::Instant::now();
        let pause = loop {
            if self.out.len() >= FLUSH_BYTES {
                break Ok(Pause::Flush);
            }
            let held = self.mailbox.reserved() + self.out.len();
            if self.mailbox.outstanding() >= CALLS_OUTSTANDING_MAX
                || held >= BYTES_PER_CONNECTION_MAX
            {
                break Ok(Pause::Outstanding);
            }
            if !self.node.budget.has_room(0) {
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
                jobs: &mut jobs,
                clock: &mut clock,
            };
            intake.take(&self.origin, record, &mut self.out.gathered);
        };
        self.node.pool.submit(&mut jobs);
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

    /// Sends everything. Whoever takes nothing for [`REPLY_TIME_MAX`] is closed.
    async fn flush(&mut self) -> io::Result<()> {
        let Outbox { gathered, large } = &mut self.out;
        let mut gathered_at = 0;
        let mut large_at = 0;
        while gathered_at < gathered.len() || !large.is_empty() {
            let mut segments = [IoSlice::new(&[]); SEGMENTS_MAX];
            let first = std::iter::once(gathered.get(gathered_at..).unwrap_or_default());
            let others = large.iter().enumerate().map(|(index, reply)| {
                let at = if index == 0 { large_at } else { 0 };
                reply.bytes.get(at..).unwrap_or_default()
            });
            let mut count = 0;
            for (place, bytes) in segments.iter_mut().zip(first.chain(others)) {
                *place = IoSlice::new(bytes);
                count += 1;
            }
            let segments = segments.get(..count).unwrap_or_default();
            let mut sent = match self.sender.try_write_vectored(segments) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if timeout(REPLY_TIME_MAX, self.sender.writable())
                        .await
                        .is_err()
                    {
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
            let from_gathered = sent.min(gathered.len() - gathered_at);
            gathered_at += from_gathered;
            sent -= from_gathered;
            while let Some(reply) = large.front().filter(|_| sent > 0) {
                let rest = reply.bytes.len() - large_at;
                if sent < rest {
                    large_at += sent;
                    break;
                }
                sent -= rest;
                large_at = 0;
                large.pop_front();
            }
        }
        gathered.clear();
        gathered.shrink_to(FLUSH_BYTES);
        Ok(())
    }
}
