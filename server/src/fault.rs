//! Planted faults, for the tests that prove that a broken promise would be noticed.
//!
//! Present only in builds with the feature `fault-injection`; everywhere else each question is
//! answered by a constant.

/// Whether syncs are left out (`HAVENFS_FAULT=no-sync`).
#[cfg(feature = "fault-injection")]
pub fn no_sync() -> bool {
    static NO_SYNC: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        std::env::var_os("HAVENFS_FAULT").is_some_and(|f| f == "no-sync")
    });
    *NO_SYNC
}

/// Whether syncs are left out: never in this build.
#[cfg(not(feature = "fault-injection"))]
pub const fn no_sync() -> bool {
    false
}
