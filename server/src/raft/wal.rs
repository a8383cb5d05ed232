//! What writes the log: one write and one sync for all that waits, then the callbacks.
//!
//! Owns the log file that is written to. A thread takes jobs in the order in which they were given,
//! makes as many as are waiting into one frame (see `segment`), writes it, syncs it, tells the
//! shared index where the entries lie, and only then runs the callbacks. When its queue is empty,
//! whoever would give it a job may carry it out instead. A new file begins when a
//! frame doesn't fit; it repeats the vote and what is purged, so that older files can go.
//!
//! The first failed write or sync is final: what the kernel dropped would not be written by a
//! second sync that succeeds. From then on every job is answered with the error, and the failure is
//! published, so that the process ends and starts again from what the disk holds.
//!
//! If the process dies: before the write, nobody was told; within it, the frame is recognised as
//! unfinished and cleared at the next start; after it, the entries are there, told or not.

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use openraft::storage::IOFlushed;
use tokio::sync::{mpsc, oneshot};

use super::codec::{self, Past};
use super::error::StoreError;
use super::index::Segment;
use super::log::Shared;
use super::recover::{self, Place, next_index};
use super::segment::{FrameBuilder, HEADER_BYTES, Header, put_record};
use super::types::{LogId, Types, Vote};
use crate::fault::{Fault, is_planted};

/// What is reserved for a log file.
const SEGMENT_BYTES: u64 = 2 << 20;
/// Below this a snapshot would cost more than reading the log at a start.
const SNAPSHOT_AFTER_BYTES: u64 = 16 << 20;
/// A frame takes no further job when it is this long.
const FRAME_BYTES_MAX: usize = 1 << 20;
const EARLY_ANSWER_PAUSE: Duration = Duration::from_millis(300);

/// One change of the log.
#[derive(Debug)]
pub(super) enum Change {
    /// Entries in order.
    Entries {
        /// The lowest index.
        first: u64,
        /// The last one.
        last: LogId,
    },
    /// A vote.
    Vote(Vote),
    /// Entries after this one are gone.
    Truncated(Option<LogId>),
    /// Entries up to this one are gone.
    Purged(LogId),
}

/// Who hears that a change is durable.
pub(super) enum Done {
    /// openraft, by its callback.
    Flushed(IOFlushed<Types>),
    /// A waiting call.
    Told(oneshot::Sender<Result<(), StoreError>>),
    /// Nobody.
    Nobody,
}

impl Done {
    fn run(self, result: Result<(), StoreError>) {
        match self {
            Self::Flushed(callback) => callback.io_completed(result.map_err(StoreError::into_io)),
            // The call was given up.
            Self::Told(sender) => drop(sender.send(result)),
            Self::Nobody => {}
        }
    }
}

/// One change on its way to the disk.
pub(super) struct Job {
    /// Its records, each with its length.
    pub(super) records: Vec<u8>,
    /// How many they are.
    pub(super) count: u32,
    /// What they say.
    pub(super) change: Change,
    /// Who waits.
    pub(super) done: Done,
}

/// Sizes, and the faults that tests plant.
#[derive(Debug, Clone)]
pub(super) struct Options {
    /// What is reserved for a log file at least.
    pub(super) segment_bytes: u64,
    /// How much log there must be before a snapshot is worth it.
    pub(super) snapshot_after_bytes: u64,
    #[cfg(test)]
    pub(super) planted: std::sync::Arc<super::planted::Planted>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            segment_bytes: SEGMENT_BYTES,
            snapshot_after_bytes: SNAPSHOT_AFTER_BYTES,
            #[cfg(test)]
            planted: std::sync::Arc::default(),
        }
    }
}

/// The log's thread: carries out jobs until nobody can give any more.
pub(super) fn run(writer: &Mutex<Writer>, mut jobs: mpsc::Receiver<Job>, shared: &Shared) {
    let mut group = Vec::new();
    let mut next = None;
    while let Some(first) = next.take().or_else(|| jobs.blocking_recv()) {
        let mut bytes = first.records.len();
        group.push(first);
        next = loop {
            match jobs.try_recv() {
                // What a frame truncates must not be in it.
                Ok(job) if matches!(job.change, Change::Truncated(_)) => break Some(job),
                Ok(job) if bytes > FRAME_BYTES_MAX => break Some(job),
                Ok(job) => {
                    bytes += job.records.len();
                    group.push(job);
                }
                Err(_) => break None,
            }
        };
        let count = group.len();
        carry_out(writer, &mut group, shared);
        shared.carried_out(count);
    }
}

/// Makes a group of changes durable with one write and one sync, and tells those who wait. Leaves
/// the group empty. Waits for the disk.
pub(super) fn carry_out(writer: &Mutex<Writer>, group: &mut Vec<Job>, shared: &Shared) {
    if is_planted(Fault::AnswerBeforeCommit) {
        answer_early(group);
    }
    let result = if let Some(error) = shared.failure() {
        Err(error)
    } else {
        let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.commit(group, shared)
    };
    if let Err(error) = &result {
        shared.fail(error);
    }
    for job in group.drain(..) {
        job.done.run(result.clone());
    }
    if result.is_err() {
        return;
    }
    // One at a time, and after everybody was told: a snapshot makes a whole log needless at once.
    let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = writer.remove_one() {
        shared.fail(&error);
    }
}

/// The log's writing end.
#[derive(Debug)]
pub(super) struct Writer {
    dir: PathBuf,
    place: Place,
    past: Past,
    options: Options,
    /// Files that hold only what is purged. What is left of them when the process ends is removed
    /// by a later one.
    needless: VecDeque<PathBuf>,
    /// Reused from frame to frame.
    memory: Vec<u8>,
}

impl Writer {
    /// Goes on where a recovered log ends.
    pub(super) fn new(dir: &Path, place: Place, past: Past, options: Options) -> Self {
        Self {
            dir: dir.to_path_buf(),
            place,
            past,
            options,
            needless: VecDeque::new(),
            memory: Vec::new(),
        }
    }

    /// Makes a group of changes durable.
    fn commit(&mut self, group: &[Job], shared: &Shared) -> Result<(), StoreError> {
        #[cfg(test)]
        self.options.planted.check_alive()?;
        let mut builder = FrameBuilder::new(std::mem::take(&mut self.memory));
        let bytes = group.iter().map(|job| job.records.len()).sum();
        if self.place.end + builder.len(bytes) as u64 > self.place.file_bytes {
            self.rotate(builder.len(bytes) as u64, shared)?;
            let mut records = Vec::new();
            put_record(&mut records, |out| codec::put_past(out, &self.past));
            builder.push(&records, 1);
        }
        for job in group {
            builder.push(&job.records, job.count);
        }
        let place = &mut self.place;
        let frame = builder.finish(place.header.key(), place.sequence);
        place
            .file
            .write_all_at(&frame, place.end)
            .map_err(StoreError::io("write", &place.path))?;
        #[cfg(test)]
        self.options.planted.check_sync(&place.path)?;
        if !is_planted(Fault::NoLogSync) {
            place
                .file
                .sync_data()
                .map_err(StoreError::io("sync", &place.path))?;
        }
        let offset = place.end;
        place.end += frame.len() as u64;
        place.sequence += 1;
        self.memory = frame;
        self.publish(offset, group, shared);
        Ok(())
    }

    /// Begins a new file with room for a frame of `frame_bytes`.
    fn rotate(&mut self, frame_bytes: u64, shared: &Shared) -> Result<(), StoreError> {
        let header = Header {
            number: self.place.header.number + 1,
            first_sequence: self.place.sequence,
            ..self.place.header
        };
        let path = recover::path(&self.dir, header.number);
        #[cfg(test)]
        self.options.planted.check_space(&path)?;
        // The past that a new file repeats is shorter than a page.
        let needed = (HEADER_BYTES as u64 + frame_bytes + 4096).next_multiple_of(4096);
        let file_bytes = self.options.segment_bytes.max(needed);
        let file = recover::create(&self.dir, &header, file_bytes)?;
        shared.index(|index| {
            index.add_segment(Segment {
                header,
                path: path.clone(),
                end: HEADER_BYTES as u64,
                last_index: None,
            });
        });
        self.place = Place {
            file,
            path,
            header,
            file_bytes,
            end: HEADER_BYTES as u64,
            sequence: self.place.sequence,
        };
        Ok(())
    }

    /// Tells the index what the frame at `offset` holds.
    fn publish(&mut self, offset: u64, group: &[Job], shared: &Shared) {
        let end = self.place.end;
        shared.index(|index| {
            if let Some(segment) = index.segments.back_mut() {
                segment.end = end;
            }
            for job in group {
                match &job.change {
                    Change::Entries { first, last } => {
                        index.add_entries(offset, *first, last.index);
                        self.past.last = Some(*last);
                    }
                    Change::Vote(vote) => self.past.vote = Some(*vote),
                    Change::Truncated(last) => {
                        index.truncate(next_index(*last));
                        self.past.last = *last;
                    }
                    Change::Purged(upto) => {
                        self.needless.extend(index.purge(upto.index));
                        self.past.purge(*upto);
                    }
                }
            }
        });
    }

    fn remove_one(&mut self) -> Result<(), StoreError> {
        let Some(path) = self.needless.pop_front() else {
            return Ok(());
        };
        match std::fs::remove_file(&path) {
            // Somebody else has removed it: nothing is lost by that.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(StoreError::io("remove", &path)),
        }
    }
}

/// The planted fault: openraft hears that entries are durable before they are written. The pause
/// lets a test end the process in between.
fn answer_early(group: &mut [Job]) {
    for job in &mut *group {
        if matches!(job.done, Done::Flushed(_)) {
            std::mem::replace(&mut job.done, Done::Nobody).run(Ok(()));
        }
    }
    std::thread::sleep(EARLY_ANSWER_PAUSE);
}
