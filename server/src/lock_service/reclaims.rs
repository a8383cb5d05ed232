//! Which locks from before a restart their hosts have spoken of since: a reclaim of a lock that
//! the table has writes nothing, so it is noted here, for people to look at.
//!
//! Local to this process; nothing depends on it. An activation forgets it all.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use havenfs_nlm::listing::LockId;
use havenfs_nlm::table::LockTable;
use tokio::time::Instant;

/// The reclaims of this activation.
#[derive(Debug, Default)]
pub struct Reclaims(Mutex<HashMap<LockId, Instant>>);

impl Reclaims {
    /// Notes that a host reclaimed these locks now.
    pub(super) fn note(&self, ids: &[LockId], table: &LockTable) {
        let now = Instant::now();
        let mut notes = self.notes();
        if notes.len() > NOTES_MIN && notes.len() > 2 * table.lock_count() {
            // Half of them at least are of locks that are gone.
            notes.retain(|id, _| table.has_lock(*id));
        }
        notes.extend(ids.iter().map(|id| (*id, now)));
    }

    /// When a lock was reclaimed last, if it was.
    pub fn last(&self, id: LockId) -> Option<Instant> {
        self.notes().get(&id).copied()
    }

    pub(super) fn clear(&self) {
        self.notes().clear();
    }

    fn notes(&self) -> MutexGuard<'_, HashMap<LockId, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fewer notes are kept whatever became of their locks.
const NOTES_MIN: usize = 10_000;
