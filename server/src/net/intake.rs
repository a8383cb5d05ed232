//! What becomes of one message: answered at once, from the reply cache, or by a worker.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use havenfs_rpc::message::Call;
use havenfs_rpc::program;
use havenfs_rpc::record::{Record, begin_record, end_record};
use havenfs_rpc::xdr::Reader;
use tokio::time::timeout_at;

use super::limits::Share;
use super::mailbox::{Mailbox, Sink};
use crate::backend::handle::{self, HANDLE_BYTES_MAX};
use crate::backend::volume::Volume;
use crate::call::{Mode, Origin, Port, Proposal, Served};
use crate::dispatch;
use crate::export::{Export, Verdict};
use crate::node::Node;
use crate::pool::{Job, KINDS, Tell};
use crate::programs::nfs3::TRANSFER_BYTES_MAX;
use crate::reply_cache::Begin;

/// What a reply without data or entries holds at most.
const SMALL_REPLY_BYTES: usize = 512;
/// What the reply to READLINK holds at most: the longest text that Linux keeps.
const LINK_REPLY_BYTES: usize = SMALL_REPLY_BYTES + 4096;

/// How long a call waits for the name of a host that the exports mention.
const NAME_TIME_MAX: Duration = Duration::from_secs(3);

/// What a worker made of a call.
enum Finished {
    /// The reply, with its record mark.
    Reply(Vec<u8>),
    /// A change whose outcome makes the reply.
    Proposal(Proposal),
    /// No reply.
    Nothing,
}

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
    /// Its part of the budget.
    pub share: &'a Share,
    /// Calls that a worker must carry out; the owner submits them when it has taken all that is
    /// there.
    pub jobs: &'a mut Vec<Job>,
    /// When the message before was done with: one look at the clock a call is enough.
    pub clock: &'a mut Instant,
}

impl Intake<'_> {
    /// Serves a message. The reply, with its record mark, is appended to `out`, or put into the
    /// mailbox later.
    pub fn take(&mut self, origin: &Origin, message: Record<'_>, out: &mut Vec<u8>) {
        let call = match Call::decode(&message) {
            Ok(call) => call,
            Err(error) => {
                let start = begin_record(out);
                if dispatch::refuse(self.node, error, out) {
                    end_record(out, start);
                } else {
                    out.truncate(start);
                }
                return;
            }
        };
        let reserved = message.len() + reply_bytes_max(&call);
        let disk = disk_of(self.node, &call);
        // Its threads hang already: the client asks again, as often as it likes, and holds nothing.
        let hangs = disk.as_ref().is_some_and(|disk| disk.hangs());
        let kind = (
            call.procedure as usize % KINDS,
            disk.map_or(0, |disk| disk.dev),
        );
        let key = self.node.reply_cache.key(origin, &call);
        let Some(key) = key.filter(|_| self.port == Port::Nfs) else {
            let start = begin_record(out);
            let served = dispatch::serve(
                self.node,
                self.port,
                origin,
                Mode::Inline,
                &call,
                self.clock,
                out,
            );
            match served {
                Served::Replied => end_record(out, start),
                Served::Silent => out.truncate(start),
                // Whoever can make up addresses could fill the server with waiting calls; real
                // clients send datagrams again.
                Served::Pending if self.reply_to.is_some() => out.truncate(start),
                Served::Propose(proposal) => {
                    out.truncate(start);
                    let sink = self.sink(reserved);
                    if let Some(locks) = self.node.locks.get() {
                        locks.submit(origin.host(), proposal, sink);
                    }
                }
                Served::Wait if hangs => {
                    out.truncate(start);
                    put_off(&call, out);
                }
                Served::Wait | Served::Pending => {
                    out.truncate(start);
                    let sink = self.sink(reserved);
                    // Changes of locks keep their order, also when one of them waits for a disk, or
                    // a notice until it is known whether it is to be believed.
                    let lane = matches!(self.port, Port::Nlm | Port::Nsm)
                        .then(|| self.node.locks.get())
                        .flatten()
                        .map(|locks| locks.enter(origin.host()));
                    self.defer(origin, kind, message, move |_, finished| match finished {
                        Finished::Reply(bytes) => sink.send(bytes),
                        Finished::Proposal(proposal) => {
                            lane?.fill(proposal, sink);
                            None
                        }
                        Finished::Nothing => None,
                    });
                    if matches!(served, Served::Pending) {
                        self.submit_when_known(origin.host());
                    }
                }
            }
            return;
        };
        if hangs && self.node.gate.is_open() && !self.node.reply_cache.has(&key) {
            return put_off(&call, out);
        }
        let sink = self.sink(reserved);
        match self.node.reply_cache.begin(key, sink) {
            Begin::New => {
                self.defer(origin, kind, message, move |node, finished| {
                    let reply = match finished {
                        Finished::Reply(bytes) => Some(bytes),
                        Finished::Proposal(_) | Finished::Nothing => None,
                    };
                    node.reply_cache.finish(key, reply)
                });
            }
            Begin::Attached => self.node.metrics.replayed.add(1),
            Begin::Done(reply) => {
                self.node.metrics.replayed.add(1);
                out.extend_from_slice(&reply);
            }
        }
    }

    /// The right to send one reply, with room for a call and its reply of so many bytes.
    fn sink(&self, reserved: usize) -> Sink {
        let reservation = self.share.reserve(reserved);
        self.mailbox.sink(self.reply_to, reservation)
    }

    /// Leaves a call to a worker.
    fn defer(
        &mut self,
        origin: &Origin,
        (kind, group): (usize, u64),
        message: Record<'_>,
        done: impl FnOnce(&Node, Finished) -> Option<Arc<dyn Tell>> + Send + 'static,
    ) {
        let (node, port, origin) = (Arc::clone(self.node), self.port, *origin);
        let message = message.into_owned();
        let work = move || {
            let mut out = Vec::with_capacity(SMALL_REPLY_BYTES);
            let start = begin_record(&mut out);
            let mut clock = Instant::now();
            let served = match Call::decode(&message) {
                Ok(call) => dispatch::serve(
                    &node,
                    port,
                    &origin,
                    Mode::Worker,
                    &call,
                    &mut clock,
                    &mut out,
                ),
                // It was decoded before, from the same bytes.
                Err(_) => Served::Silent,
            };
            // A call that still says "wait" is a bug of its procedure; silence is the safe answer.
            debug_assert!(!matches!(served, Served::Wait));
            let finished = match served {
                Served::Replied => {
                    end_record(&mut out, start);
                    Finished::Reply(out)
                }
                Served::Propose(proposal) => Finished::Proposal(proposal),
                Served::Wait | Served::Pending | Served::Silent => Finished::Nothing,
            };
            done(&node, finished)
        };
        self.jobs.push(Job {
            kind,
            group,
            work: Box::new(work),
        });
    }

    /// Takes the last job out of the batch and submits it when the exports know what they say to
    /// `peer`, or after a while.
    fn submit_when_known(&mut self, peer: IpAddr) {
        let Some(job) = self.jobs.pop() else { return };
        let (node, source) = (Arc::clone(self.node), self.mailbox.id());
        tokio::spawn(async move {
            let mut names = node.names.subscribe();
            let deadline = tokio::time::Instant::now() + NAME_TIME_MAX;
            let is_pending =
                |export: &Export| matches!(export.policy(peer, &node.names), Verdict::Pending);
            while node.exports.load().exports().iter().any(is_pending) {
                // Any name may have become known; at the deadline a worker has the last word.
                if timeout_at(deadline, names.changed()).await.is_err() {
                    break;
                }
            }
            node.pool.submit(source, &mut vec![job]);
        });
    }
}

/// Answers a call of NFS that it is to be made again later.
fn put_off(call: &Call<'_>, out: &mut Vec<u8>) {
    let start = begin_record(out);
    dispatch::put_off(call, out);
    end_record(out, start);
}

/// The disk that a call may wait for. The handle is not checked: a forged one is refused before any
/// disk is asked.
fn disk_of(node: &Node, call: &Call<'_>) -> Option<Arc<Volume>> {
    if call.program != program::NFS {
        return None;
    }
    let handle = Reader::new(call.args).opaque(HANDLE_BYTES_MAX).ok();
    let export = handle.and_then(handle::export_id_claimed);
    export.and_then(|id| node.files.volume(id, 0))
}

/// How many bytes the reply to a call may have, as its arguments say. The last field of READ,
/// READDIR and READDIRPLUS is a bound on the reply.
fn reply_bytes_max(call: &Call<'_>) -> usize {
    match (call.program, call.procedure) {
        (program::NFS, 5) => return LINK_REPLY_BYTES,
        (program::NFS, 6 | 16 | 17) => {}
        _ => return SMALL_REPLY_BYTES,
    }
    let last = call
        .args
        .last_chunk::<4>()
        .map_or(0, |bytes| u32::from_be_bytes(*bytes));
    SMALL_REPLY_BYTES + last.min(TRANSFER_BYTES_MAX) as usize
}
