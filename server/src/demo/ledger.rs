//! What the clients were told: the one side of every promise that the demo checks.
//!
//! Owns the locks that were told GRANTED and not given back, the records that were acknowledged as
//! stable, and when writes were answered. Decides nothing about the server but one thing: two
//! owners were told that they have the same bytes, or a record is not what was acknowledged. Asks
//! no server and knows no socket; threads share it.
//!
//! Invariant: a lock leaves the ledger before its UNLOCK is sent, since from then on the server may
//! give it to somebody else before we hear of it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

/// The length of a record.
pub(super) const RECORD_BYTES: usize = 128;
/// Where the checksum stands in a record: eight digits and a line break at its end.
const CHECKSUM_AT: usize = RECORD_BYTES - 9;

/// A promise of the server that it did not keep, in words that end the demo.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct BrokenPromise(pub(super) String);

/// The process of a client whose kernel numbers them as it likes.
pub(super) const KERNEL: i32 = 0;

/// Who has a lock: a process on a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Owner {
    /// The client.
    pub(super) client: &'static str,
    /// The process on it.
    pub(super) svid: i32,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The first process of a client is the client to the reader.
        match self.svid {
            1 | KERNEL => write!(f, "client {}", self.client),
            svid => write!(f, "process {svid} on client {}", self.client),
        }
    }
}

/// Bytes of the one file that has locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bytes {
    /// The first one.
    pub(super) first: u64,
    /// How many, at least one.
    pub(super) count: u64,
}

impl Bytes {
    /// Whether a byte is in both.
    pub(super) const fn meets(&self, other: &Self) -> bool {
        self.first < other.first + other.count && other.first < self.first + self.count
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes {}-{}", self.first, self.first + self.count - 1)
    }
}

/// A lock; all locks of the demo are exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lock {
    /// Whose.
    pub(super) owner: Owner,
    /// Of what.
    pub(super) bytes: Bytes,
}

impl fmt::Display for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.bytes, self.owner)
    }
}

/// The ledger.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    held: Vec<Lock>,
    grants: usize,
    /// When each record was acknowledged.
    stable: BTreeMap<u64, Instant>,
    answers: Vec<Instant>,
    broken: Option<String>,
}

impl Ledger {
    /// A lock was told GRANTED, by a reply or by a call. Telling it again changes nothing.
    pub(super) fn granted(&self, lock: Lock) {
        let mut entries = self.entries();
        if entries.held.contains(&lock) {
            return;
        }
        let in_the_way = |held: &&Lock| held.owner != lock.owner && held.bytes.meets(&lock.bytes);
        if let Some(held) = entries.held.iter().find(in_the_way).copied() {
            let Lock { owner, bytes } = lock;
            let text = format!("{owner} was granted {bytes}, which {} holds", held.owner);
            entries.broken.get_or_insert(text);
        }
        entries.held.push(lock);
        entries.grants += 1;
    }

    /// An UNLOCK is about to be sent.
    pub(super) fn release(&self, lock: Lock) {
        self.entries().held.retain(|held| *held != lock);
    }

    /// The locks that are held.
    pub(super) fn held(&self) -> Vec<Lock> {
        self.entries().held.clone()
    }

    /// How many locks were ever granted.
    pub(super) fn grants(&self) -> usize {
        self.entries().grants
    }

    /// Notes a promise that was seen to be broken by a thread that can't tell it.
    pub(super) fn broken(&self, text: String) {
        self.entries().broken.get_or_insert(text);
    }

    /// Fails with [`BrokenPromise`] if one was seen.
    pub(super) fn check(&self) -> Result<()> {
        match self.entries().broken.clone() {
            Some(text) => Err(BrokenPromise(text).into()),
            None => Ok(()),
        }
    }

    /// A WRITE was answered, whatever the answer promises.
    pub(super) fn answered(&self, at: Instant) {
        self.entries().answers.push(at);
    }

    /// These records are on stable storage, says the server.
    pub(super) fn acknowledged(&self, records: impl IntoIterator<Item = u64>) {
        let now = Instant::now();
        let records = records.into_iter().map(|record| (record, now));
        self.entries().stable.extend(records);
    }

    /// The records that are acknowledged by now, in order, and when.
    pub(super) fn stable(&self) -> Vec<(u64, Instant)> {
        let entries = self.entries();
        entries
            .stable
            .iter()
            .map(|(at, when)| (*at, *when))
            .collect()
    }

    /// When writes were answered, in order.
    pub(super) fn answers(&self) -> Vec<Instant> {
        self.entries().answers.clone()
    }

    /// The longest time without an answer that ended after `from`, and when it ended.
    pub(super) fn longest_gap(&self, from: Instant) -> (Duration, Instant) {
        longest_gap(&self.entries().answers, from)
    }

    /// Whether a WRITE was answered after `from`.
    pub(super) fn has_answer_after(&self, from: Instant) -> bool {
        self.entries().answers.last().is_some_and(|at| *at > from)
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn longest_gap(answers: &[Instant], from: Instant) -> (Duration, Instant) {
    let gaps = answers.windows(2).filter_map(|pair| match pair {
        [begin, end] if *end > from => Some((end.saturating_duration_since(*begin), *end)),
        _ => None,
    });
    gaps.max().unwrap_or((Duration::ZERO, from))
}

/// A record: a line of text with its number, the number of this run, and a checksum.
pub(super) fn record(run: u32, number: u64) -> [u8; RECORD_BYTES] {
    let text = format!("record {number:08} of run {run:08x} ");
    let mut bytes = [b'.'; RECORD_BYTES];
    for (place, byte) in bytes.iter_mut().zip(text.bytes()) {
        *place = byte;
    }
    let (body, end) = bytes.split_at_mut(CHECKSUM_AT);
    let checksum = format!("{:08x}\n", crc32fast::hash(body));
    for (place, byte) in end.iter_mut().zip(checksum.bytes()) {
        *place = byte;
    }
    bytes
}

/// What is wrong with a record that was read back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// Nothing is there.
    Lost,
    /// Its checksum or its number is not right.
    Damaged,
}

/// Judges what was read where a record was written.
pub(super) fn judge(run: u32, number: u64, found: Option<&[u8]>) -> Option<Fault> {
    match found {
        Some(found) if found == record(run, number) => None,
        Some(found) if found.iter().any(|byte| *byte != 0) => Some(Fault::Damaged),
        _ => Some(Fault::Lost),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn lock(client: &'static str, first: u64) -> Lock {
        Lock {
            owner: Owner { client, svid: 1 },
            bytes: Bytes { first, count: 10 },
        }
    }

    #[test]
    fn one_lock_for_two_owners_is_a_broken_promise() {
        let ledger = Ledger::default();
        ledger.granted(lock("A", 0));
        ledger.granted(lock("A", 0));
        ledger.granted(lock("B", 10));
        assert!(ledger.check().is_ok());
        assert_eq!(ledger.grants(), 2);
        ledger.granted(lock("B", 9));
        let error = ledger.check().err().map(|error| error.to_string());
        let told = "client B was granted bytes 9-18, which client A holds";
        assert_eq!(error.as_deref(), Some(told));
    }

    #[test]
    fn what_is_given_back_may_be_given_on() {
        let ledger = Ledger::default();
        ledger.granted(lock("A", 0));
        ledger.release(lock("A", 0));
        ledger.granted(lock("B", 5));
        assert!(ledger.check().is_ok());
        assert_eq!(ledger.held(), [lock("B", 5)]);
    }

    #[test]
    fn records_are_told_from_holes_and_rubbish() {
        let good = record(7, 42);
        assert_eq!(good.last(), Some(&b'\n'));
        assert_eq!(judge(7, 42, Some(&good)), None);
        assert_eq!(judge(7, 42, Some(&[0; RECORD_BYTES])), Some(Fault::Lost));
        assert_eq!(judge(7, 42, None), Some(Fault::Lost));
        assert_eq!(judge(7, 43, Some(&good)), Some(Fault::Damaged));
        assert_eq!(judge(8, 42, Some(&good)), Some(Fault::Damaged));
    }

    #[test]
    fn a_gap_may_begin_before_the_moment_that_is_asked_about() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let answers = [at(0), at(300), at(310), at(400), at(405)];
        let gap = |ms, end| (Duration::from_millis(ms), at(end));
        assert_eq!(longest_gap(&answers, at(320)), gap(90, 400));
        assert_eq!(longest_gap(&answers, at(100)), gap(300, 300));
        assert_eq!(longest_gap(&answers, at(500)), gap(0, 500));
    }
}
