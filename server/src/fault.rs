//! Planted faults, for the tests that prove that a broken promise would be noticed, and for those
//! who want to see it: `havenfs demo --break`.
//!
//! A fault is planted once, at start, by a hidden option of `serve` which says so in the log;
//! builds with the feature `fault-injection` also take it from `HAVENFS_FAULT`. Nothing else plants
//! one.

use std::sync::OnceLock;

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
    /// `grant`: each lock is gone as soon as it was granted.
    ForgetEachGrant,
    /// `lease`: the node answers although its lease is over.
    NoLease,
    /// `dead-storage`: whoever asks the exported storage whether it works hears an error.
    DeadStorage,
    /// `control-hangs`: some seconds after the start the control runtime does nothing any more.
    ControlHangs,
    /// `fsync`: writes are answered a second before they are carried out.
    LateWrites,
}

impl Fault {
    /// A fault by its name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "no-sync" => Self::NoSync,
            "no-log-sync" => Self::NoLogSync,
            "answer-before-commit" => Self::AnswerBeforeCommit,
            "forget-grant" => Self::ForgetGrant,
            "release-on-lost-granted-res" => Self::ReleaseOnLostGrantedRes,
            "grant" => Self::ForgetEachGrant,
            "lease" => Self::NoLease,
            "dead-storage" => Self::DeadStorage,
            "control-hangs" => Self::ControlHangs,
            "fsync" => Self::LateWrites,
            _ => return None,
        })
    }
}

static PLANTED: OnceLock<Fault> = OnceLock::new();

/// Plants a fault in this process; the first one stays.
pub fn plant(fault: Fault) {
    tracing::error!(?fault, "this server breaks a promise on purpose");
    // A second one would change nothing.
    let _ = PLANTED.set(fault);
}

/// Plants what the environment names, in a build for tests.
pub fn plant_from_environment() {
    #[cfg(feature = "fault-injection")]
    if let Ok(name) = std::env::var("HAVENFS_FAULT") {
        // A test with a typo would find nothing, and pass.
        plant(Fault::from_name(&name).unwrap_or_else(|| panic!("no such fault: {name}")));
    }
}

/// Whether this process has a fault.
pub fn is_planted(fault: Fault) -> bool {
    PLANTED.get() == Some(&fault)
}
