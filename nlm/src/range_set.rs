//! The byte ranges that are locked: test, set, clear, with the rules of POSIX.
//!
//! A new lock replaces what its owner had of the same bytes, adjacent locks of one kind become
//! one, and to unlock the middle of a lock leaves its two ends (IEEE Std 1003.1, fcntl). Knows
//! files and owners by their numbers and nothing of hosts, calls or waiting.
//!
//! Invariants: the ranges of one owner on one file don't overlap, and no two that touch could be
//! one; ranges of two owners on one file overlap only where both are shared. The second is what
//! the whole project stands for: [`RangeSet::set`] asserts it in builds with debug assertions, and
//! its callers ask [`RangeSet::conflict`] first, in the same command.

use std::num::NonZeroU64;

use imbl::{OrdMap, OrdSet};
use serde::{Deserialize, Serialize};

use crate::keys::{FileNo, OwnerNo};
use crate::range::ByteRange;
use crate::spans::{Span, Spans};

/// The number of a grant that its host has not confirmed yet.
pub type GrantId = NonZeroU64;

/// What is known of a held range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The last byte; the first one is in the key.
    pub(crate) last: u64,
    /// The grant that made it, as long as the host has not confirmed that.
    pub(crate) grant: Option<GrantId>,
    /// When it was granted, in seconds since 1970 by the clock of the node that proposed it.
    pub(crate) since: u32,
    /// The epoch in which its owner last set it.
    pub(crate) epoch: u32,
    /// The host's NSM state when it was set, 0 if it did not tell.
    pub(crate) nsm_state: i32,
    /// Whether nobody else may have it.
    pub(crate) exclusive: bool,
    /// Whether its owner was seen under another address since, and can't unlock it.
    pub(crate) suspect: bool,
}

impl Held {
    /// Whether two ranges that touch are one lock.
    fn is_one_with(&self, other: &Self) -> bool {
        self.exclusive == other.exclusive
            && self.grant.is_none()
            && other.grant.is_none()
            && self.nsm_state == other.nsm_state
            // What was reclaimed and what was not are told apart at the end of grace.
            && self.epoch == other.epoch
    }
}

/// A held range with its owner, as listings show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldRange {
    /// On which file.
    pub file: FileNo,
    /// Whose.
    pub owner: OwnerNo,
    /// Which bytes.
    pub range: ByteRange,
    /// All else.
    pub held: Held,
}

/// The ranges of a file that has many.
#[derive(Debug, Clone)]
struct Crowd {
    count: u32,
    spans: Spans,
}

/// The locked ranges of all files of a service.
#[derive(Debug, Clone, Default)]
pub(crate) struct RangeSet {
    held: OrdMap<(FileNo, OwnerNo, u64), Held>,
    /// Files with many ranges. Most have few and are not here: of those, the ranges are counted.
    crowds: OrdMap<FileNo, Crowd>,
    /// Which files an owner has ranges on.
    files_of: OrdSet<(OwnerNo, FileNo)>,
}

impl PartialEq for RangeSet {
    /// All else follows from these.
    fn eq(&self, other: &Self) -> bool {
        self.held == other.held
    }
}

impl RangeSet {
    /// How many ranges there are.
    pub(crate) fn len(&self) -> usize {
        self.held.len()
    }

    /// How many ranges a file has.
    pub(crate) fn count_on(&self, file: FileNo) -> u32 {
        let crowd = self.crowds.get(&file);
        crowd.map_or_else(|| self.on(file).count() as u32, |crowd| crowd.count)
    }

    /// The first range of another owner, by first byte, that keeps `owner` from having `range`.
    pub(crate) fn conflict(
        &self,
        file: FileNo,
        owner: Option<OwnerNo>,
        range: ByteRange,
        exclusive: bool,
    ) -> Option<HeldRange> {
        if let Some(crowd) = self.crowds.get(&file) {
            let span = crowd.spans.first_conflict(range, owner, exclusive)?;
            let key = (file, span.owner, span.range.start());
            return self.held.get(&key).and_then(|held| held_range(&key, held));
        }
        self.on(file)
            .filter(|found| {
                Some(found.owner) != owner
                    && found.range.overlaps(range)
                    && (exclusive || found.held.exclusive)
            })
            .min_by_key(|found| (found.range.start(), found.owner))
    }

    /// All ranges on a file, by owner and first byte.
    pub(crate) fn on(&self, file: FileNo) -> impl Iterator<Item = HeldRange> {
        let all = (file, OwnerNo(0), 0)..=(file, OwnerNo(u32::MAX), u64::MAX);
        self.held
            .range(all)
            .filter_map(|(key, held)| held_range(key, held))
    }

    /// All ranges of all files.
    pub(crate) fn iter(&self) -> impl Iterator<Item = HeldRange> {
        self.held
            .iter()
            .filter_map(|(key, held)| held_range(key, held))
    }

    /// The range of an owner on a file that starts at this byte.
    pub(crate) fn get(&self, file: FileNo, owner: OwnerNo, start: u64) -> Option<&Held> {
        self.held.get(&(file, owner, start))
    }

    /// The files that an owner has ranges on.
    pub(crate) fn files_of(&self, owner: OwnerNo) -> impl Iterator<Item = FileNo> {
        self.files_of
            .range((owner, FileNo(0))..=(owner, FileNo(u32::MAX)))
            .map(|(_, file)| *file)
    }

    /// The ranges of one owner on one file that overlap `range`, one after the other.
    pub(crate) fn own_overlapping(
        &self,
        file: FileNo,
        owner: OwnerNo,
        range: ByteRange,
    ) -> impl Iterator<Item = HeldRange> {
        let before = self
            .held
            .range((file, owner, 0)..(file, owner, range.start()))
            .next_back();
        let from = self
            .held
            .range((file, owner, range.start())..=(file, owner, range.last()));
        before
            .into_iter()
            .chain(from)
            .filter_map(|(key, held)| held_range(key, held))
            .filter(move |found| found.range.overlaps(range))
    }

    /// Whether a range is made of whole ranges that its owner has, so that to set it anew makes no
    /// more of them: a limit does not keep anybody from reclaiming what it has.
    pub(crate) fn is_made_of_own(&self, file: FileNo, owner: OwnerNo, range: ByteRange) -> bool {
        let mut next = Some(range.start());
        for own in self.own_overlapping(file, owner, range) {
            if next != Some(own.range.start()) {
                return false;
            }
            next = own.range.last().checked_add(1);
        }
        next == range.last().checked_add(1)
    }

    /// The same as a list, for those who change them.
    pub(crate) fn own(&self, file: FileNo, owner: OwnerNo, range: ByteRange) -> Vec<HeldRange> {
        self.own_overlapping(file, owner, range).collect()
    }

    /// Gives `range` to `owner`.
    ///
    /// `new` is what is known of the lock; its last byte is set here.
    pub(crate) fn set(&mut self, file: FileNo, owner: OwnerNo, range: ByteRange, mut new: Held) {
        debug_assert!(
            self.conflict(file, Some(owner), range, new.exclusive)
                .is_none(),
            "a lock that conflicts is never granted"
        );
        let mut whole = range;
        for old in self.own(file, owner, range.with_neighbours()) {
            if old.held.is_one_with(&new) {
                self.take(&old);
                whole = whole.join(old.range);
                new.since = new.since.min(old.held.since);
            } else if old.range.overlaps(range) {
                self.cut(&old, range);
            }
        }
        self.put(file, owner, whole, new);
    }

    /// Takes `range` from `owner`; returns what the owner had of it.
    pub(crate) fn clear(
        &mut self,
        file: FileNo,
        owner: OwnerNo,
        range: ByteRange,
    ) -> Vec<HeldRange> {
        let own = self.own(file, owner, range);
        for old in &own {
            self.cut(old, range);
        }
        own
    }

    /// Leaves of `old` what is not in `range`.
    fn cut(&mut self, old: &HeldRange, range: ByteRange) {
        self.take(old);
        for part in old.range.without(range).into_iter().flatten() {
            self.put(old.file, old.owner, part, old.held);
        }
    }

    /// Enters a range without looking at others.
    fn enter(&mut self, file: FileNo, owner: OwnerNo, range: ByteRange, held: Held) {
        let held = Held {
            last: range.last(),
            ..held
        };
        self.held.insert((file, owner, range.start()), held);
        self.files_of.insert((owner, file));
    }

    fn put(&mut self, file: FileNo, owner: OwnerNo, range: ByteRange, held: Held) {
        self.enter(file, owner, range, held);
        if let Some(crowd) = self.crowds.get_mut(&file) {
            crowd.count += 1;
            crowd.spans.insert(span(owner, range, held.exclusive));
        } else if self.count_on(file) >= CROWDED {
            let (mut count, mut spans) = (0, Spans::default());
            for found in self.on(file) {
                count += 1;
                spans.insert(span(found.owner, found.range, found.held.exclusive));
            }
            self.crowds.insert(file, Crowd { count, spans });
        }
    }

    fn take(&mut self, old: &HeldRange) {
        let (file, owner) = (old.file, old.owner);
        self.held.remove(&(file, owner, old.range.start()));
        let more = self
            .held
            .range((file, owner, 0)..=(file, owner, u64::MAX))
            .next();
        if more.is_none() {
            self.files_of.remove(&(owner, file));
        }
        if let Some(crowd) = self.crowds.get_mut(&file) {
            crowd.count -= 1;
            crowd.spans.remove(old.range.start(), owner);
            if crowd.count < CROWDED / 2 {
                self.crowds.remove(&file);
            }
        }
    }

    /// Marks a range as suspect.
    pub(crate) fn suspect(&mut self, found: &HeldRange) {
        let key = (found.file, found.owner, found.range.start());
        if let Some(held) = self.held.get_mut(&key) {
            held.suspect = true;
        }
    }

    /// Puts a range back that a snapshot holds; false if it conflicts with an earlier one.
    pub(crate) fn restore(&mut self, found: &HeldRange) -> bool {
        let (file, owner, range) = (found.file, found.owner, found.range);
        let last = self.held.get_max();
        if last.is_none_or(|((last, ..), _)| *last < file) {
            // They come by file: the first one of a file conflicts with nothing and crowds nobody.
            self.enter(file, owner, range, found.held);
            return true;
        }
        let conflict = self.conflict(file, Some(owner), range, found.held.exclusive);
        if conflict.is_none() {
            self.put(file, owner, range, found.held);
        }
        conflict.is_none()
    }
}

fn held_range(key: &(FileNo, OwnerNo, u64), held: &Held) -> Option<HeldRange> {
    let (file, owner, start) = *key;
    Some(HeldRange {
        file,
        owner,
        range: ByteRange::new(start, held.last)?,
        held: *held,
    })
}

const fn span(owner: OwnerNo, range: ByteRange, exclusive: bool) -> Span {
    Span {
        range,
        owner,
        exclusive,
    }
}

/// From so many ranges on, a file has an index; with fewer, looking at all of them is faster.
const CROWDED: u32 = 16;

#[cfg(test)]
mod tests;
