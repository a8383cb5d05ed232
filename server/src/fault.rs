//! Planted faults, for the tests that prove that a broken promise would be noticed.
//!
//! Present only in builds with the feature `fault-injection`; everywhere else each question is
//! answered by a constant. `HAVENFS_FAULT` names the fault of a process.

/// Whether syncs of exported files are left out (`HAVENFS_FAULT=no-sync`).
#[cfg(feature = "fault-injection")]
pub fn no_sync() -> bool {
    static NO_SYNC: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| is_planted("no-sync"));
    *NO_SYNC
}

/// Whether syncs are left out: never in this build.
#[cfg(not(feature = "fault-injection"))]
pub const fn no_sync() -> bool {
    false
}

/// Whether syncs of the replicated log are left out (`HAVENFS_FAULT=no-log-sync`).
#[cfg(feature = "fault-injection")]
pub fn no_log_sync() -> bool {
    static NO_LOG_SYNC: std::sync::LazyLock<bool> =
        std::sync::LazyLock::new(|| is_planted("no-log-sync"));
    *NO_LOG_SYNC
}

/// Whether syncs of the replicated log are left out: never in this build.
#[cfg(not(feature = "fault-injection"))]
pub const fn no_log_sync() -> bool {
    false
}

/// Whether proposals are answered a while before their entry is written
/// (`HAVENFS_FAULT=answer-before-commit`).
#[cfg(feature = "fault-injection")]
pub fn answer_before_commit() -> bool {
    static EARLY: std::sync::LazyLock<bool> =
        std::sync::LazyLock::new(|| is_planted("answer-before-commit"));
    *EARLY
}

/// Whether proposals are answered before their entry is written: never in this build.
#[cfg(not(feature = "fault-injection"))]
pub const fn answer_before_commit() -> bool {
    false
}

/// Whether some locks are forgotten as soon as they are granted (`HAVENFS_FAULT=forget-grant`).
#[cfg(feature = "fault-injection")]
pub fn forget_grant() -> bool {
    static FORGET: std::sync::LazyLock<bool> =
        std::sync::LazyLock::new(|| is_planted("forget-grant"));
    *FORGET
}

/// Whether locks are forgotten: never in this build.
#[cfg(not(feature = "fault-injection"))]
pub const fn forget_grant() -> bool {
    false
}

/// Whether a lock goes to the next in line when its host refuses it after any telling, although the
/// answer to an earlier one may be lost (`HAVENFS_FAULT=release-on-lost-granted-res`).
#[cfg(feature = "fault-injection")]
pub fn release_on_lost_granted_res() -> bool {
    static RELEASE: std::sync::LazyLock<bool> =
        std::sync::LazyLock::new(|| is_planted("release-on-lost-granted-res"));
    *RELEASE
}

/// Whether a lock that may have been taken goes to others: never in this build.
#[cfg(not(feature = "fault-injection"))]
pub const fn release_on_lost_granted_res() -> bool {
    false
}

#[cfg(feature = "fault-injection")]
fn is_planted(name: &str) -> bool {
    std::env::var_os("HAVENFS_FAULT").is_some_and(|fault| fault == name)
}
