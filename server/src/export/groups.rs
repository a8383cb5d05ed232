//! The groups of a user as this machine knows them, for exports with `manage_gids`.
//!
//! AUTH_SYS carries 16 groups at most, and a client may claim any; with `manage_gids` they are
//! ignored and looked up here by user number. A slow directory service must not stall calls, so
//! answers come from a cache that threads fill. How a user is looked up is the caller's to give:
//! it takes a system call that only `backend` may make.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::background::{BackgroundCache, Lifetime, NoAnswer};

/// Supplementary groups by user number, as far as they are known.
pub struct Groups {
    cache: BackgroundCache<u32, u32>,
    changes: Arc<watch::Sender<u64>>,
}

impl Groups {
    /// Makes an empty store; `lookup` returns a user's groups, none for an unknown user.
    pub fn new(lookup: impl Fn(u32) -> Result<Vec<u32>, NoAnswer> + Send + Sync + 'static) -> Self {
        let changes = Arc::new(watch::Sender::new(0));
        let lookup = Box::new(move |uid: &u32| {
            let mut groups = lookup(*uid)?;
            groups.truncate(GROUPS_MAX);
            Ok(groups.into())
        });
        let cache = BackgroundCache::new("groups", LIFETIME, Arc::clone(&changes), lookup);
        Self { cache, changes }
    }

    /// Starts the threads; needed once an export has `manage_gids`, harmless when repeated.
    ///
    /// # Errors
    /// A thread cannot be made.
    pub fn start(&self) -> io::Result<()> {
        self.cache.start(WORKERS)
    }

    /// Returns the supplementary groups of a user; `None` if they are not known yet (JUKEBOX).
    pub fn of(&self, uid: u32) -> Option<Arc<[u32]>> {
        self.cache.get(&uid)
    }

    /// Follows the answers, so that a pending call can wait for its own.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

impl std::fmt::Debug for Groups {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Groups").finish_non_exhaustive()
    }
}

/// Source for half an hour: the default of NFS-Ganesha, which administrators know.
const LIFETIME: Lifetime = Lifetime {
    fresh: Duration::from_mins(30),
    idle_max: Duration::from_hours(2),
    retry: Duration::from_secs(10),
    entries_max: 16_384,
};
const WORKERS: usize = 2;
/// NGROUPS_MAX of Linux.
const GROUPS_MAX: usize = 65_536;

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn groups_are_unknown_first_and_then_those_of_the_directory() {
        let groups = Groups::new(|uid| Ok(vec![uid + 1, 27]));
        assert_eq!(groups.of(1000), None);
        groups.start().expect("threads");
        let deadline = Instant::now() + Duration::from_mins(1);
        let found = loop {
            if let Some(found) = groups.of(1000) {
                break found;
            }
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        };
        assert_eq!(&*found, [1001, 27]);
    }
}
