//! What becomes of one message: answered at once, from the reply cache, or by a worker.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use havenfs_rpc::message::Call;
use havenfs_rpc::program;
use havenfs_rpc::record::{Record, begin_record, end_record};
use havenfs_rpc::xdr::Reader;

use super::limits::Reservation;
use super::mailbox::Mailbox;
use crate::dispatch::{self, Mode, Origin, Port, Served};
use crate::node::Node;
use crate::programs::nfs3::TRANSFER_BYTES_MAX;
use crate::reply_cache::{Begin, Key};

/// What a reply without data or entries holds at most.
const SMALL_REPLY_BYTES: usize = 1024;

/// What a connection or socket lends to its messages.
pub struct Intake<'a> {
    /// The node.
    pub node: &'a Arc<Node>,
    /// Which programs are served.
    pub port: Port,
    /// Where finished replies go.
    pub mailbox: &'a Arc<Mailbox>,
    /// For a datagram: to whom, and from which address.
    pub reply_to: Option<(SocketAddr, IpAddr)>,
}

impl Intake<'_> {
    /// Serves a message. The reply, with its record mark, is appended to `out`, or put into the
    /// mailbox later.
    pub fn take(&self, origin: &Origin, message: Record<'_>, out: &mut Vec<u8>) {
        let reply_bytes = reply_bytes_max(&message);
        let key = match Call::decode(&message) {
            Ok(call) if self.port == Port::Nfs => Key::new(origin, &call),
            _ => None,
        };
        let Some(key) = key else {
            let start = begin_record(out);
            match dispatch::serve(self.node, self.port, origin, Mode::Inline, &message, out) {
                Served::Replied => end_record(out, start),
                Served::Silent => out.truncate(start),
                Served::Wait => {
                    out.truncate(start);
                    let sink = self
                        .mailbox
                        .sink(self.reply_to, self.reserve(&message, reply_bytes));
                    self.submit(origin, message, move |_, reply| match reply {
                        Some(reply) => sink.send(reply),
                        None => drop(sink),
                    });
                }
            }
            return;
        };
        let sink = self
            .mailbox
            .sink(self.reply_to, self.reserve(&message, reply_bytes));
        match self.node.reply_cache.begin(key, sink) {
            Begin::New => {
                self.submit(origin, message, move |node, reply| {
                    node.reply_cache.finish(key, reply);
                });
            }
            Begin::Attached => self.node.metrics.replayed.add(1),
            Begin::Done(reply) => {
                self.node.metrics.replayed.add(1);
                out.extend_from_slice(&reply);
            }
        }
    }

    fn reserve(&self, message: &[u8], reply_bytes: usize) -> Reservation {
        Reservation::new(&self.node.budget, message.len() + reply_bytes)
    }

    fn submit(
        &self,
        origin: &Origin,
        message: Record<'_>,
        done: impl FnOnce(&Node, Option<Vec<u8>>) + Send + 'static,
    ) {
        let (node, port, origin) = (Arc::clone(self.node), self.port, *origin);
        let message = message.into_owned();
        self.node.pool.submit(Box::new(move || {
            let mut out = Vec::new();
            let start = begin_record(&mut out);
            let served = dispatch::serve(&node, port, &origin, Mode::Worker, &message, &mut out);
            // A call that still says "wait" is a bug of its procedure; silence is the safe answer.
            debug_assert_ne!(served, Served::Wait);
            drop(message);
            if served == Served::Replied {
                end_record(&mut out, start);
                done(&node, Some(out));
            } else {
                done(&node, None);
            }
        }));
    }
}

/// How many bytes the reply to a message may have, as its arguments say. The last field of READ,
/// READDIR and READDIRPLUS is a bound on the reply.
pub fn reply_bytes_max(message: &[u8]) -> usize {
    let mut header = Reader::new(message.get(12..).unwrap_or_default());
    let (program, _version, procedure) = (header.u32(), header.u32(), header.u32());
    if program != Ok(program::NFS) || !matches!(procedure, Ok(6 | 16 | 17)) {
        return SMALL_REPLY_BYTES;
    }
    let last = message
        .last_chunk::<4>()
        .map_or(0, |bytes| u32::from_be_bytes(*bytes));
    SMALL_REPLY_BYTES + last.min(TRANSFER_BYTES_MAX) as usize
}
