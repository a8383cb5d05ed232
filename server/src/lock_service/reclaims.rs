//! Which locks from before a restart their hosts have spoken of since: a reclaim of a lock that
//! the table has writes nothing, so it is noted here, for people to look at.
//!
//! And which calls these were: the table remembers only calls that changed it, so a late copy of
//! such a reclaim that comes after the UNLOCK would be a reclaim of a lock that is not known, and a
//! lenient table would grant it for good. It gets its first answer instead.
//!
//! Local to this process. An activation forgets it all; then a late copy is as any other reclaim.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use havenfs_nlm::host::CallDigest;
use havenfs_nlm::listing::LockId;
use havenfs_nlm::table::LockTable;
use tokio::time::Instant;

/// The reclaims of this activation.
#[derive(Debug, Default)]
pub struct Reclaims(Mutex<Notes>);

#[derive(Debug, Default)]
struct Notes {
    /// When a lock was reclaimed last.
    locks: HashMap<LockId, Instant>,
    /// The last calls that did so, and the same in their order.
    calls: HashSet<u64>,
    order: VecDeque<u64>,
}

impl Reclaims {
    /// Notes that a host reclaimed these locks now, with this call.
    pub(super) fn note(&self, call: CallDigest, ids: &[LockId], table: &LockTable) {
        let now = Instant::now();
        let mut notes = self.notes();
        let Notes {
            locks,
            calls,
            order,
        } = &mut *notes;
        if locks.len() > NOTES_MIN && locks.len() > 2 * table.lock_count() {
            // Half of them at least are of locks that are gone.
            locks.retain(|id, _| table.has_lock(*id));
        }
        locks.extend(ids.iter().map(|id| (*id, now)));
        if calls.insert(call.0) {
            order.push_back(call.0);
        }
        if order.len() > CALLS_MAX
            && let Some(oldest) = order.pop_front()
        {
            calls.remove(&oldest);
        }
    }

    /// Whether a call is a copy of one that has reclaimed a lock.
    pub fn has_seen(&self, call: CallDigest) -> bool {
        self.notes().calls.contains(&call.0)
    }

    /// When a lock was reclaimed last, if it was.
    pub fn last(&self, id: LockId) -> Option<Instant> {
        self.notes().locks.get(&id).copied()
    }

    pub(super) fn clear(&self) {
        *self.notes() = Notes::default();
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many calls are remembered: more than come in the minute after a restart from which copies
/// come late.
const CALLS_MAX: usize = 100_000;
/// Fewer notes are kept whatever became of their locks.
const NOTES_MIN: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_calls_are_remembered_and_the_oldest_give_way() {
        let (reclaims, table) = (Reclaims::default(), LockTable::default());
        let last = CALLS_MAX as u64;
        for call in (0..=last).chain([last]) {
            reclaims.note(CallDigest(call), &[], &table);
        }
        let seen = |call| reclaims.has_seen(CallDigest(call));
        assert_eq!([seen(0), seen(1), seen(last)], [false, true, true]);
        reclaims.clear();
        assert!(!reclaims.has_seen(CallDigest(last)));
    }
}
