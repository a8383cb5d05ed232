//! The duplicate request cache: a call that is sent again gets the first answer again.
//!
//! Owns the replies of the ten procedures whose repetition would do harm (RFC 1813 4.5: a REMOVE
//! that is repeated says NOENT). A repeat of a finished call is answered from here; a repeat of a
//! call that is still running is attached to it, and the answer goes to the newest connection,
//! because a client repeats on a new connection when the old one has died.
//!
//! The key leaves out the client's port, since most clients come back from another one, and takes
//! in what tells two calls with the same transaction id apart: the service's address, the
//! procedure, the length, the credential and the two ends of the arguments.
//!
//! Bounded by bytes, and by time: hosts use transaction ids again. WRITE and SETATTR, whose
//! repetition does little harm, have a part of their own, so that a stream of writes does not push
//! out the answer of a RENAME. Running calls are never pushed out.
//!
//! The cache is per node and in memory: a crash loses it, and a client that repeats a REMOVE
//! across a crash sees NOENT. Who gives a service away hands the newest replies over
//! ([`ReplyCache::newest`], [`ReplyCache::adopt`]; `cluster::replies` is how). For that a key means
//! the same on all nodes: its checksum is made with a secret that follows from the one that signs
//! handles, which all nodes of a cluster have, and nobody else.

use std::collections::{HashMap, VecDeque};
use std::hash::Hasher;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use havenfs_rpc::message::{AcceptStat, Call, Reply, ReplyOutcome};
use havenfs_rpc::program;
use havenfs_rpc::record::MARK_BYTES;
use havenfs_rpc::xdr::{Decode as _, Reader};
use siphasher::sip::{SipHasher13, SipHasher24};

use crate::backend::handle::HandleKey;
use crate::call::Origin;
use crate::cluster::replies::{KeptReply, TIME_MAX};
use crate::net::mailbox::Sink;
use crate::pool::Tell;

/// Bytes of replies kept for calls that must not be repeated.
const BYTES_MAX: usize = 12 * 1024 * 1024;
/// Bytes of replies kept for WRITE and SETATTR.
const REPEATABLE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// What an entry costs besides its reply.
const ENTRY_BYTES: usize = 200;
/// How much of the arguments is looked at, from their start and from their end.
const ARGS_BYTES: usize = 256;
const ARGS_END_BYTES: usize = 64;

/// What tells calls apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    peer: IpAddr,
    local: IpAddr,
    xid: u32,
    procedure: u32,
    len: usize,
    checksum: u64,
}

impl std::hash::Hash for Key {
    /// The checksum spreads well enough; it is made with a secret, so nobody can choose it.
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.checksum ^ u64::from(self.xid));
    }
}

/// Whether the reply to a call of this procedure is kept.
const fn is_kept(procedure: u32) -> bool {
    matches!(procedure, 2 | 7..=15)
}

impl Key {
    fn new((first, second): (u64, u64), origin: &Origin, call: &Call<'_>) -> Option<Self> {
        let kept = call.program == program::NFS
            && call.version == program::NFS_VERSION
            && is_kept(call.procedure);
        kept.then(|| {
            let mut hasher = SipHasher13::new_with_keys(first, second);
            hasher.write_u32(call.cred.flavor);
            hasher.write(call.cred.body);
            hasher.write(call.args.get(..ARGS_BYTES).unwrap_or(call.args));
            hasher.write(
                call.args
                    .last_chunk::<ARGS_END_BYTES>()
                    .map_or(&[], |end| end),
            );
            Self {
                peer: origin.host(),
                local: origin.local.ip(),
                xid: call.xid,
                procedure: call.procedure,
                len: call.args.len(),
                checksum: hasher.finish(),
            }
        })
    }

    /// Whether a repetition does little harm (SETATTR, WRITE).
    const fn repeatable(&self) -> bool {
        matches!(self.procedure, 2 | 7)
    }
}

/// Whether a reply of NFS, with its record mark, says that the call was carried out.
fn says_done(reply: &[u8]) -> bool {
    let mut reader = Reader::new(reply.get(MARK_BYTES..).unwrap_or_default());
    let reply = Reply::decode(&mut reader);
    reply.is_ok_and(|reply| {
        let status = reply.results.first_chunk::<4>();
        reply.outcome == ReplyOutcome::Accepted(AcceptStat::Success) && status == Some(&[0; 4])
    })
}

#[derive(Debug)]
enum Entry {
    /// The call runs; the reply goes here.
    Running(Sink),
    /// The call was answered at this time.
    Done(Arc<[u8]>, Instant),
}

/// What to do with a call.
#[derive(Debug)]
pub enum Begin {
    /// It is new: run it, and then call [`ReplyCache::finish`].
    New,
    /// It is running already: its answer will come to the newest connection.
    Attached,
    /// It was answered with these bytes.
    Done(Arc<[u8]>),
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Key, Entry>,
    /// Answered calls, oldest first: those that must not be repeated, and the others.
    ages: [VecDeque<(Key, Instant)>; 2],
    bytes: [usize; 2],
}

impl Inner {
    /// Drops an answer.
    fn forget(&mut self, key: &Key) {
        if let Some(Entry::Done(reply, _)) = self.entries.remove(key) {
            self.bytes[usize::from(key.repeatable())] -= reply.len() + ENTRY_BYTES;
        }
    }

    /// Keeps an answer, and drops older ones for it.
    fn keep(&mut self, key: Key, reply: Arc<[u8]>, at: Instant) {
        self.forget(&key);
        let part = usize::from(key.repeatable());
        self.bytes[part] += reply.len() + ENTRY_BYTES;
        self.entries.insert(key, Entry::Done(reply, at));
        self.ages[part].push_back((key, at));
        let max = [BYTES_MAX, REPEATABLE_BYTES_MAX][part];
        while let Some((oldest, at)) = self.ages[part].front().copied()
            && (self.bytes[part] > max || at.elapsed() > TIME_MAX)
        {
            self.ages[part].pop_front();
            // An entry that was replaced meanwhile is younger, and stands further behind.
            if matches!(self.entries.get(&oldest), Some(Entry::Done(_, entered)) if *entered == at)
            {
                self.forget(&oldest);
            }
        }
    }
}

/// The replies that may be asked for again.
#[derive(Debug)]
pub struct ReplyCache {
    /// Of the checksums.
    secret: (u64, u64),
    inner: Mutex<Inner>,
}

impl ReplyCache {
    /// An empty one. `keys` are those that sign handles; the first one counts.
    pub fn new(keys: &[HandleKey]) -> Self {
        let secret = keys.first().map_or([0; 16], |key| key.secret);
        // Not the secret itself, which makes handles.
        let half = |which: u8| {
            let mut hasher = SipHasher24::new_with_key(&secret);
            hasher.write(b"reply cache");
            hasher.write_u8(which);
            hasher.finish()
        };
        Self {
            secret: (half(0), half(1)),
            inner: Mutex::default(),
        }
    }

    /// The key of a call, if its reply is to be kept.
    pub fn key(&self, origin: &Origin, call: &Call<'_>) -> Option<Key> {
        Key::new(self.secret, origin, call)
    }

    /// Replies for whoever serves next, of `bytes_max` at most: the newest ones. Those of WRITE and
    /// SETATTR, of which there may be many and which matter less, get an eighth at most. Only those
    /// that say that it was done: what was refused changed nothing, so it may be tried again, and
    /// an error of a disk that is dead here would not be true there.
    pub fn newest(&self, bytes_max: usize) -> Vec<KeptReply> {
        let mut newest = Vec::new();
        let left = self.newest_of(0, bytes_max, &mut newest);
        self.newest_of(1, left.min(bytes_max / 8), &mut newest);
        newest
    }

    /// Adds those of one part; returns how much room is left.
    fn newest_of(&self, part: usize, mut room: usize, newest: &mut Vec<KeptReply>) -> usize {
        let inner = self.lock();
        for (key, entered) in inner.ages[part].iter().rev() {
            let age = entered.elapsed();
            let Some(Entry::Done(reply, at)) = inner.entries.get(key) else {
                continue;
            };
            // An entry that was replaced stands further ahead, and was taken there.
            if at != entered || age > TIME_MAX || !says_done(reply) {
                continue;
            }
            let kept = KeptReply {
                peer: key.peer,
                local: key.local,
                xid: key.xid,
                procedure: key.procedure,
                args_bytes: u32::try_from(key.len).unwrap_or(u32::MAX),
                checksum: key.checksum,
                age_ms: u32::try_from(age.as_millis()).unwrap_or(u32::MAX),
                reply: (&**reply).into(),
            };
            let Some(left) = room.checked_sub(kept.cost()) else {
                break;
            };
            room = left;
            newest.push(kept);
        }
        room
    }

    /// Takes over what another node has answered; to be called before anything is served. `since`:
    /// how long ago it was handed over.
    pub fn adopt<'a>(&self, replies: impl Iterator<Item = &'a KeptReply>, since: Duration) {
        let mut replies: Vec<_> = replies.filter(|kept| is_kept(kept.procedure)).collect();
        // Oldest first, as they are kept.
        replies.sort_by_key(|kept| std::cmp::Reverse(kept.age_ms));
        let now = Instant::now();
        let mut inner = self.lock();
        for kept in replies {
            let age = since.saturating_add(Duration::from_millis(kept.age_ms.into()));
            let Some(at) = now.checked_sub(age).filter(|_| age < TIME_MAX) else {
                continue;
            };
            let key = Key {
                peer: kept.peer,
                local: kept.local,
                xid: kept.xid,
                procedure: kept.procedure,
                len: kept.args_bytes as usize,
                checksum: kept.checksum,
            };
            inner.keep(key, Arc::from(&*kept.reply), at);
        }
    }

    /// Looks a call up; a new one is entered as running, and its reply belongs to `sink`.
    pub fn begin(&self, key: Key, sink: Sink) -> Begin {
        let mut inner = self.lock();
        let replaced = match inner.entries.get_mut(&key) {
            Some(Entry::Done(reply, at)) if at.elapsed() < TIME_MAX => {
                return Begin::Done(Arc::clone(reply));
            }
            Some(Entry::Running(older)) => std::mem::replace(older, sink),
            _ => {
                inner.forget(&key);
                inner.entries.insert(key, Entry::Running(sink));
                return Begin::New;
            }
        };
        drop(inner);
        // Counts down on the connection that no longer waits.
        drop(replaced);
        Begin::Attached
    }

    /// Enters the reply of a running call and sends it; returns who must be told. Without a reply
    /// the call is forgotten.
    #[must_use]
    pub fn finish(&self, key: Key, reply: Option<Vec<u8>>) -> Option<Arc<dyn Tell>> {
        let mut inner = self.lock();
        let Some(Entry::Running(sink)) = inner.entries.remove(&key) else {
            return None;
        };
        let reply = reply?;
        inner.keep(key, Arc::from(reply.as_slice()), Instant::now());
        drop(inner);
        sink.send(reply)
    }

    /// Whether a call is known: it runs, or was answered.
    pub fn has(&self, key: &Key) -> bool {
        self.lock().entries.contains_key(key)
    }

    /// How many replies are kept.
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Whether no reply is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use havenfs_rpc::auth::OpaqueAuth;
    use havenfs_rpc::message;
    use havenfs_rpc::record::{begin_record, end_record};
    use havenfs_rpc::xdr::Writer;

    use super::*;
    use crate::call::Transport;
    use crate::net::limits::Share;
    use crate::net::mailbox::Mailbox;

    fn cache() -> ReplyCache {
        let secret = [7; 16];
        ReplyCache::new(&[HandleKey { id: 1, secret }])
    }

    fn key(xid: u32, procedure: u32) -> Key {
        let address = ([127, 0, 0, 1], 700).into();
        let origin = Origin::new(address, address, Transport::Tcp);
        cache()
            .key(&origin, &call(xid, procedure, b"args"))
            .expect("a kept procedure")
    }

    fn call(xid: u32, procedure: u32, args: &'static [u8]) -> Call<'static> {
        let (program, version) = (program::NFS, 3);
        let (cred, verf) = (OpaqueAuth::NONE, OpaqueAuth::NONE);
        Call {
            xid,
            program,
            version,
            procedure,
            cred,
            verf,
            args,
        }
    }

    fn sink(mailbox: &Arc<Mailbox>) -> Sink {
        mailbox.sink(None, Share::new(Arc::default(), Arc::default()).reserve(1))
    }

    /// A reply with a status and some results.
    fn reply(status: u32) -> Vec<u8> {
        let mut reply = Vec::new();
        let start = begin_record(&mut reply);
        let mut writer = Writer::new(&mut reply);
        message::reply_accepted(&mut writer, 1, AcceptStat::Success);
        writer.u32(status);
        reply.resize(1000, 0);
        end_record(&mut reply, start);
        reply
    }

    const NFS3ERR_IO: u32 = 5;
    const NFS3ERR_ROFS: u32 = 30;
    const REMOVE: u32 = 12;
    const WRITE: u32 = 7;

    #[test]
    fn idempotent_calls_are_not_kept() {
        let address = ([127, 0, 0, 1], 700).into();
        let origin = Origin::new(address, address, Transport::Tcp);
        for procedure in [1, 3, 4, 5, 6, 16, 17, 18, 19, 20, 21] {
            assert_eq!(cache().key(&origin, &call(1, procedure, b"")), None);
        }
    }

    #[test]
    fn the_port_makes_no_difference_and_the_arguments_do() {
        let origin = |port| {
            let local = ([127, 0, 0, 2], 2049).into();
            Origin::new(([127, 0, 0, 1], port).into(), local, Transport::Tcp)
        };
        let first = cache().key(&origin(700), &call(1, REMOVE, b"aaaa"));
        assert_eq!(first, cache().key(&origin(701), &call(1, REMOVE, b"aaaa")));
        assert_ne!(first, cache().key(&origin(700), &call(1, REMOVE, b"aaab")));
        assert_ne!(first, cache().key(&origin(700), &call(2, REMOVE, b"aaaa")));
    }

    #[test]
    fn a_repeat_of_a_running_call_moves_its_answer_to_the_newest_connection() {
        let cache = cache();
        let (old, new) = (Arc::new(Mailbox::default()), Arc::new(Mailbox::default()));
        assert!(matches!(
            cache.begin(key(1, REMOVE), sink(&old)),
            Begin::New
        ));
        assert!(matches!(
            cache.begin(key(1, REMOVE), sink(&new)),
            Begin::Attached
        ));
        assert_eq!((old.outstanding(), new.outstanding()), (0, 1));
        assert!(
            cache
                .finish(key(1, REMOVE), Some(b"reply".to_vec()))
                .is_some()
        );
        assert_eq!((old.take().len(), new.take().len()), (0, 1));
        assert_eq!(new.outstanding(), 0);
        assert!(matches!(
            cache.begin(key(1, REMOVE), sink(&old)),
            Begin::Done(reply) if *reply == *b"reply"
        ));
    }

    #[test]
    fn a_call_without_a_reply_is_forgotten() {
        let cache = cache();
        let mailbox = Arc::new(Mailbox::default());
        assert!(matches!(
            cache.begin(key(1, REMOVE), sink(&mailbox)),
            Begin::New
        ));
        assert!(cache.finish(key(1, REMOVE), None).is_none());
        assert_eq!(mailbox.outstanding(), 0);
        assert!(matches!(
            cache.begin(key(1, REMOVE), sink(&mailbox)),
            Begin::New
        ));
    }

    #[test]
    fn writes_do_not_push_out_a_remove() {
        let cache = cache();
        let mailbox = Arc::new(Mailbox::default());
        let answer = |key| {
            assert!(matches!(cache.begin(key, sink(&mailbox)), Begin::New));
            assert!(cache.finish(key, Some(vec![0; 1000])).is_some());
        };
        answer(key(1, REMOVE));
        for xid in 0..20_000 {
            answer(key(xid, WRITE));
        }
        assert!(matches!(
            cache.begin(key(1, REMOVE), sink(&mailbox)),
            Begin::Done(_)
        ));
        assert!(matches!(
            cache.begin(key(0, WRITE), sink(&mailbox)),
            Begin::New
        ));
        assert!(cache.len() < 5000, "bounded by bytes");
    }

    #[test]
    fn another_node_gives_the_first_answer_for_as_long_as_this_one_would_have() {
        let (cache, other) = (cache(), self::cache());
        let mailbox = Arc::new(Mailbox::default());
        let answer = |key, reply: &[u8]| {
            assert!(matches!(cache.begin(key, sink(&mailbox)), Begin::New));
            assert!(cache.finish(key, Some(reply.to_vec())).is_some());
        };
        answer(key(1, REMOVE), &reply(0));
        for xid in 0..100 {
            answer(key(xid, WRITE), &reply(0));
        }
        // A disk that is dead here says nothing of that of the next node.
        for status in [NFS3ERR_IO, NFS3ERR_ROFS] {
            answer(key(status, REMOVE), &reply(status));
        }
        let room = 40_000;
        let mut handed = cache.newest(room);
        assert!(handed.iter().map(KeptReply::cost).sum::<usize>() <= room);
        assert_eq!((handed[0].procedure, handed[1].xid), (REMOVE, 99));
        let old = KeptReply {
            xid: 2,
            age_ms: 120_000,
            ..handed[0].clone()
        };
        handed.push(old);
        other.adopt(handed.iter(), Duration::from_secs(3));
        let late = self::cache();
        late.adopt(handed.iter(), TIME_MAX);
        assert!(late.is_empty(), "they have grown old on the way");
        assert!(matches!(
            other.begin(key(1, REMOVE), sink(&mailbox)),
            Begin::Done(reply) if *reply == *self::reply(0)
        ));
        let known = |xid, procedure| {
            let begun = other.begin(key(xid, procedure), sink(&mailbox));
            matches!(begun, Begin::Done(_))
        };
        assert!(!known(NFS3ERR_IO, REMOVE) && !known(NFS3ERR_ROFS, REMOVE));
        assert!(known(99, WRITE) && !known(0, WRITE) && !known(2, REMOVE));
    }
}
