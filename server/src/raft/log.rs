//! The log as openraft sees it: entries in order, the vote, and what is purged.
//!
//! Owns the newest entries in memory and hands every change to the thread of `wal`; only the entry
//! of a proposal that is alone is written at once. Entries can be read as soon as they are
//! appended; they leave memory when they are durable and more than [`CACHE_BYTES_MAX`] newer ones
//! are there, and are read from the disk from then on, on a thread that may wait for it. A vote
//! and a truncation return when they are durable. The last committed entry is not stored: a node
//! applies its log again when it learns what is committed.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::{Stream, StreamExt, stream};
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};
use tokio::sync::{mpsc, oneshot, watch};

use super::codec::{self, Past};
use super::error::StoreError;
use super::index::{self, Index, Piece};
use super::open::Open;
use super::pending::Pending;
use super::recover::{self, next_index};
use super::segment::put_record;
use super::sole::Sole;
use super::types::{Entry, LogId, Payload, Types, Vote};
use super::wal::{self, Change, Done, Job, Options, Writer};
use crate::clock::boot_time;
use crate::cluster::command::{Assign, Renewal};
use crate::cluster::placement::Seen;
use crate::cluster::{ClusterCommand, Command, NodeId};
use crate::fault::{Fault, is_planted};

/// How many bytes of encoded entries stay in memory.
const CACHE_BYTES_MAX: usize = 2 << 20;
/// How many changes may wait for the log's thread; openraft waits when they are more.
const JOBS_MAX: usize = 1024;
/// How many entries are read in one piece when a long log is applied.
const STREAM_ENTRIES: u64 = 1024;

/// What the writing thread and the readers share.
#[derive(Debug)]
pub(super) struct Shared {
    memory: Mutex<Memory>,
    failure: watch::Sender<Option<StoreError>>,
    /// The bytes of entries since the last snapshot.
    since_snapshot: AtomicU64,
    /// The proposals of this node.
    pending: Arc<Pending>,
    seen: Mutex<BTreeMap<NodeId, Seen>>,
    /// Whether there are other voters, or may be.
    has_others: AtomicBool,
    /// Whether this node is the only voter.
    pub(super) sole: Sole,
    /// Which services are open.
    pub(super) open: Open,
    /// Changes that the log's thread has not carried out yet.
    queued: AtomicUsize,
}

#[derive(Debug)]
struct Memory {
    past: Past,
    /// The newest entries, without a gap up to the last one.
    cache: VecDeque<Cached>,
    cache_bytes: usize,
    /// The index after the last entry that is durable.
    durable: u64,
    index: Index,
}

#[derive(Debug)]
struct Cached {
    entry: Entry,
    bytes: usize,
}

impl Shared {
    /// Works on the index of what is durable, and lets go of memory that it makes needless.
    pub(super) fn index<T>(&self, work: impl FnOnce(&mut Index) -> T) -> T {
        let mut memory = self.lock();
        let result = work(&mut memory.index);
        memory.durable = memory.index.next();
        memory.shrink();
        result
    }

    /// Why nothing is written any more.
    pub(super) fn failure(&self) -> Option<StoreError> {
        self.failure.borrow().clone()
    }

    /// Tells everyone that nothing is written any more. The first reason stays.
    pub(super) fn fail(&self, error: &StoreError) {
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            failure.get_or_insert_with(|| error.clone());
            first
        });
    }

    /// For waiting until nothing is written any more.
    pub(super) fn watch_failure(&self) -> watch::Receiver<Option<StoreError>> {
        self.failure.subscribe()
    }

    /// The bytes of entries since the last snapshot.
    pub(super) fn since_snapshot(&self) -> u64 {
        self.since_snapshot.load(Ordering::Relaxed)
    }

    /// A snapshot covers `bytes` of what was counted.
    pub(super) fn covered(&self, bytes: u64) {
        self.since_snapshot.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// There are other voters, or may be soon.
    pub(super) fn set_others(&self) {
        self.has_others.store(true, Ordering::Relaxed);
    }

    /// When this node first saw the last renewal of a node's lease; it may be one that was taken
    /// back.
    pub(super) fn seen(&self, node: NodeId) -> Option<Seen> {
        self.seen_map().get(&node).copied()
    }

    /// Notes when a renewal is first seen: where it is appended, since to apply it waits for a
    /// leader. Of a membership others hear after this.
    fn see_appended(&self, entry: &Entry) {
        match &entry.payload {
            Payload::Normal(proposed) => {
                if let Some(renewal) = renewal_in(&proposed.command) {
                    self.see(renewal, true);
                }
            }
            Payload::Membership(membership) => self.sole.appended(entry.log_id.index, membership),
            Payload::Blank => {}
        }
    }

    /// An entry that was appended in an earlier life of this process is first seen when it is
    /// applied.
    pub(super) fn see_applied(&self, command: &Command) {
        self.open.see(command);
        if let Some(renewal) = renewal_in(command) {
            self.see(renewal, false);
        }
    }

    /// `anew`: although it, or a later one that was taken back, was seen before.
    pub(super) fn see(&self, renewal: &Renewal, anew: bool) {
        let mut seen = self.seen_map();
        let id = renewal.id();
        let known = seen.get(&renewal.node);
        if anew || known.is_none_or(|known| known.id < id) {
            let at = boot_time();
            seen.insert(renewal.node, Seen { id, at });
        }
    }

    fn seen_map(&self) -> MutexGuard<'_, BTreeMap<NodeId, Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log's thread has carried out `count` changes.
    pub(super) fn carried_out(&self, count: usize) {
        self.queued.fetch_sub(count, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the error of a read, so that its text is not lost in openraft's.
    fn failed_read(&self, error: StoreError) -> io::Error {
        self.fail(&error);
        error.into_io()
    }
}

/// The renewal of a lease that a command is, or has in it.
fn renewal_in(command: &Command) -> Option<&Renewal> {
    match command {
        Command::Cluster(
            ClusterCommand::Renew(renewal) | ClusterCommand::Assign(Assign { renewal, .. }),
        ) => Some(renewal),
        _ => None,
    }
}

impl Memory {
    fn shrink(&mut self) {
        while self.cache_bytes > CACHE_BYTES_MAX
            && let Some(first) = self.cache.front()
            && first.entry.log_id.index < self.durable
        {
            self.cache_bytes -= first.bytes;
            self.cache.pop_front();
        }
    }

    fn forget_upto(&mut self, index: u64) {
        while let Some(first) = self.cache.front()
            && first.entry.log_id.index <= index
        {
            self.cache_bytes -= first.bytes;
            self.cache.pop_front();
        }
    }

    fn forget_from(&mut self, index: u64) {
        while let Some(last) = self.cache.back()
            && last.entry.log_id.index >= index
        {
            self.cache_bytes -= last.bytes;
            self.cache.pop_back();
        }
    }

    /// What of the entries in a range lies on the disk, and the entries that follow from memory.
    fn plan(&self, start: Bound<u64>, end: Bound<u64>) -> (Vec<Piece>, Vec<Entry>) {
        let first = first_of(start).max(next_index(self.past.purged));
        let next = next_of(end).min(next_index(self.past.last));
        let cached = self.cache.front();
        let cached = cached.map_or(u64::MAX, |first| first.entry.log_id.index);
        let pieces = if first < next.min(cached) {
            self.index.pieces(first, next.min(cached))
        } else {
            Vec::new()
        };
        let skipped = first.saturating_sub(cached) as usize;
        let wanted = next.saturating_sub(first.max(cached)) as usize;
        let entries = self.cache.iter().skip(skipped).take(wanted);
        (pieces, entries.map(|cached| cached.entry.clone()).collect())
    }
}

/// openraft's log storage.
pub(super) struct Log {
    shared: Arc<Shared>,
    writer: Arc<Mutex<Writer>>,
    jobs: mpsc::Sender<Job>,
}

impl Log {
    /// Opens the log in `dir` and starts its thread, which ends when this value is dropped.
    /// `above`: the last index that a snapshot has. Waits for the disk.
    pub(super) fn open(
        dir: &Path,
        store_id: u64,
        above: Option<u64>,
        pending: Arc<Pending>,
        options: Options,
    ) -> Result<(Self, std::thread::JoinHandle<()>), StoreError> {
        let recovered = recover::recover(dir, store_id, above)?;
        let past = recovered.past;
        let writer = Writer::new(dir, recovered.place, past, options);
        let writer = Arc::new(Mutex::new(writer));
        let shared = Arc::new(Shared {
            memory: Mutex::new(Memory {
                durable: next_index(past.last),
                past,
                cache: VecDeque::new(),
                cache_bytes: 0,
                index: recovered.index,
            }),
            failure: watch::Sender::new(None),
            since_snapshot: AtomicU64::new(recovered.bytes_above),
            pending,
            seen: Mutex::default(),
            has_others: AtomicBool::new(false),
            sole: Sole::default(),
            open: Open::default(),
            queued: AtomicUsize::new(0),
        });
        let (jobs, queue) = mpsc::channel(JOBS_MAX);
        let (thread_writer, thread_shared) = (Arc::clone(&writer), Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || wal::run(&thread_writer, queue, &thread_shared))
            .map_err(StoreError::io("start the thread for", dir))?;
        let log = Self {
            shared,
            writer,
            jobs,
        };
        Ok((log, thread))
    }

    /// What the log tells others.
    pub(super) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Whether it has never had an entry.
    pub(super) fn is_empty(&self) -> bool {
        self.shared.lock().past.last.is_none()
    }

    /// The index up to which entries are purged.
    pub(super) fn purged(&self) -> Option<u64> {
        let memory = self.shared.lock();
        memory.past.purged.map(|purged| purged.index)
    }

    async fn give(&self, job: Job) -> io::Result<()> {
        self.shared.queued.fetch_add(1, Ordering::Relaxed);
        self.jobs.send(job).await.map_err(|_| gone())
    }

    /// Whether to hand a change to another thread would gain nothing: no other proposal could be
    /// made ready meanwhile. There is no other voter either, who could write meanwhile, and no
    /// heartbeat to send: a cluster of several does not write here.
    fn is_alone(&self) -> bool {
        // Nobody else adds to the queue, so nothing comes between this look and the write.
        !self.shared.has_others.load(Ordering::Relaxed)
            && self.shared.pending.count() == 1
            && self.shared.queued.load(Ordering::Acquire) == 0
    }

    /// Gives one record and waits until it is durable.
    async fn give_and_wait(&self, records: Vec<u8>, change: Change) -> io::Result<()> {
        let (told, waiting) = oneshot::channel();
        let job = Job {
            records,
            count: 1,
            change,
            done: Done::Told(told),
        };
        self.give(job).await?;
        let result = waiting.await.map_err(|_| gone())?;
        result.map_err(StoreError::into_io)
    }
}

fn gone() -> io::Error {
    io::Error::other("the log's thread is gone")
}

impl RaftLogStorage<Types> for Log {
    type LogReader = Reader;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let memory = self.shared.lock();
        Ok(LogState {
            last_purged_log_id: memory.past.purged,
            last_log_id: memory.past.last,
        })
    }

    async fn get_log_reader(&mut self) -> Reader {
        Reader {
            shared: self.shared(),
        }
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let mut records = Vec::new();
        put_record(&mut records, |out| codec::put_vote(out, vote));
        self.give_and_wait(records, Change::Vote(*vote)).await?;
        self.shared.lock().past.vote = Some(*vote);
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut records = Vec::new();
        let mut cached = Vec::new();
        for entry in entries {
            self.shared.see_appended(&entry);
            let start = records.len();
            put_record(&mut records, |out| codec::put_entry(out, &entry));
            let bytes = records.len() - start;
            cached.push(Cached { entry, bytes });
        }
        let (Some(first), Some(last)) = (cached.first(), cached.last()) else {
            callback.io_completed(Ok(()));
            return Ok(());
        };
        let last = last.entry.log_id;
        let change = Change::Entries {
            first: first.entry.log_id.index,
            last,
        };
        let (count, bytes) = (cached.len() as u32, records.len());
        {
            let mut memory = self.shared.lock();
            memory.cache_bytes += bytes;
            memory.cache.extend(cached);
            memory.past.last = Some(last);
        }
        let counter = &self.shared.since_snapshot;
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
        let job = Job {
            records,
            count,
            change,
            done: Done::Flushed(callback),
        };
        // Who is to answer before the write can't write.
        if self.is_alone() && !is_planted(Fault::AnswerBeforeCommit) {
            wal::carry_out(&self.writer, &mut vec![job], &self.shared);
            return Ok(());
        }
        self.give(job).await
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        {
            let mut memory = self.shared.lock();
            let next = next_index(last);
            if next >= next_index(memory.past.last) {
                return Ok(());
            }
            memory.forget_from(next);
            memory.past.last = last;
        }
        let mut records = Vec::new();
        put_record(&mut records, |out| codec::put_truncated(out, last));
        // Until this returns nothing is appended, so no new entry is taken for a durable one.
        self.give_and_wait(records, Change::Truncated(last)).await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        {
            let mut memory = self.shared.lock();
            memory.forget_upto(upto.index);
            memory.past.purge(upto);
        }
        let mut records = Vec::new();
        put_record(&mut records, |out| codec::put_purged(out, upto));
        let job = Job {
            records,
            count: 1,
            change: Change::Purged(upto),
            done: Done::Nobody,
        };
        self.give(job).await
    }
}

/// openraft's log reader.
pub(super) struct Reader {
    shared: Arc<Shared>,
}

impl Reader {
    async fn read(&self, start: Bound<u64>, end: Bound<u64>) -> io::Result<Vec<Entry>> {
        let (pieces, cached) = self.shared.lock().plan(start, end);
        if pieces.is_empty() {
            return Ok(cached);
        }
        let read = tokio::task::spawn_blocking(move || index::read(&pieces));
        let mut entries = read
            .await
            .map_err(io::Error::other)?
            .map_err(|error| self.shared.failed_read(error))?;
        entries.extend(cached);
        Ok(entries)
    }
}

impl RaftLogReader<Types> for Reader {
    async fn try_get_log_entries<R>(&mut self, range: R) -> io::Result<Vec<Entry>>
    where
        R: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.read(range.start_bound().cloned(), range.end_bound().cloned())
            .await
    }

    /// In pieces: after a start the whole log is applied, and it need not fit into memory.
    async fn entries_stream<R>(
        &mut self,
        range: R,
    ) -> impl Stream<Item = io::Result<Entry>> + OptionalSend
    where
        R: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let reader = Self {
            shared: Arc::clone(&self.shared),
        };
        let next = next_of(range.end_bound().cloned());
        let first = first_of(range.start_bound().cloned());
        let pieces = stream::unfold(Some((reader, first)), move |state| async move {
            let (reader, first) = state?;
            let piece = first.saturating_add(STREAM_ENTRIES).min(next);
            let read = reader.read(Bound::Included(first), Bound::Excluded(piece));
            let entries = match read.await {
                Ok(entries) => entries,
                Err(error) => return Some((vec![Err(error)], None)),
            };
            let after = entries.last()?.log_id.index + 1;
            let entries = entries.into_iter().map(Ok).collect();
            Some((entries, (after < next).then_some((reader, after))))
        });
        Box::pin(pieces.flat_map(stream::iter))
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.shared.lock().past.vote)
    }
}

fn first_of(start: Bound<u64>) -> u64 {
    match start {
        Bound::Included(index) => index,
        Bound::Excluded(index) => index.saturating_add(1),
        Bound::Unbounded => 0,
    }
}

/// The index after a range.
fn next_of(end: Bound<u64>) -> u64 {
    match end {
        Bound::Included(index) => index.saturating_add(1),
        Bound::Excluded(index) => index,
        Bound::Unbounded => u64::MAX,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
