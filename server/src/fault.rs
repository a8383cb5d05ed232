//! Planted faults, for the tests that prove that a broken promise would be noticed.
//!
//! Present only in builds with the feature `fault-injection`; everywhere else the question is
//! answered by a constant. `HAVENFS_FAULT` names the fault of a process.

/// A way to break a promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `no-sync`: syncs of exported files are left out.
    NoSync,
    /// `no-log-sync`: syncs of the replicated log are left out.
    NoLogSync,
    /// `answer-before-commit`: proposals are answered a while before their entry is written.
    AnswerBeforeCommit,
    /// `forget-grant`: some locks are gone as soon as they were granted.
    ForgetGrant,
    /// `release-on-lost-granted-res`: a lock goes to the next in line when its host refuses it
    /// after any telling, although the answer to an earlier one may be lost.
    ReleaseOnLostGrantedRes,
}

/// Whether this process has a fault.
#[cfg(feature = "fault-injection")]
pub fn is_planted(fault: Fault) -> bool {
    static PLANTED: std::sync::LazyLock<Option<Fault>> = std::sync::LazyLock::new(|| {
        let name = std::env::var("HAVENFS_FAULT").ok()?;
        Some(match name.as_str() {
            "no-sync" => Fault::NoSync,
            "no-log-sync" => Fault::NoLogSync,
            "answer-before-commit" => Fault::AnswerBeforeCommit,
            "forget-grant" => Fault::ForgetGrant,
            "release-on-lost-granted-res" => Fault::ReleaseOnLostGrantedRes,
            // A test with such a typo would find nothing, and pass.
            other => panic!("HAVENFS_FAULT names no fault: {other}"),
        })
    });
    *PLANTED == Some(fault)
}

/// Whether this process has a fault: never in this build.
#[cfg(not(feature = "fault-injection"))]
pub const fn is_planted(_: Fault) -> bool {
    false
}
