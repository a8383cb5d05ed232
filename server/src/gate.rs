//! Whether this node may answer for a service: asked before each call's effect and before each
//! reply.
//!
//! One gate is for one epoch. It opens until a moment of the node's own clock, which every renewal
//! of the lease puts off, and closes for good when the node lets the service go. So a process that
//! was stopped for a while and goes on does nothing more under a lease that is over, whatever its
//! tasks had in hand: no task has to be told. Who is between this question and the system call when
//! the process is stopped can't be helped here; that is what the fence of a storage is for.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::clock::boot_time;
use crate::cluster::lease::Moment;
use crate::fault::{Fault, is_planted};

/// Open as long as this node may serve.
#[derive(Debug)]
pub struct Gate {
    epoch: u32,
    /// Until when it is open, in nanoseconds.
    until: AtomicU64,
    /// Nothing opens it again.
    is_over: AtomicBool,
}

impl Gate {
    /// A gate for an epoch, closed.
    pub fn new(epoch: u32) -> Self {
        Self {
            epoch,
            until: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
        }
    }

    /// A gate without a lease: open until it is closed.
    pub fn open_for_good() -> Self {
        let gate = Self::new(1);
        gate.open_until(Moment::NEVER);
        gate
    }

    /// Which epoch it is for.
    pub const fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Whether this node may answer now.
    pub fn is_open(&self) -> bool {
        if self.is_over.load(Ordering::Acquire) {
            return false;
        }
        let until = self.until();
        until == Moment::NEVER || boot_time() < until || is_planted(Fault::NoLease)
    }

    /// Until when it is open.
    pub fn until(&self) -> Moment {
        Moment(self.until.load(Ordering::Acquire))
    }

    /// The lease holds until then, if not longer already.
    pub fn open_until(&self, until: Moment) {
        self.until.fetch_max(until.0, Ordering::AcqRel);
    }

    /// Closes it for good.
    pub fn close(&self) {
        self.is_over.store(true, Ordering::Release);
    }

    /// Whether it was closed for good.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_is_open_until_its_moment_and_never_after_it_was_closed() {
        let gate = Gate::new(3);
        assert!(!gate.is_open());
        let now = boot_time();
        gate.open_until(now + Duration::from_hours(1));
        assert!(gate.is_open());
        // A late answer does not shorten it.
        gate.open_until(now);
        assert!(gate.is_open());
        gate.close();
        assert!(!gate.is_open());
        gate.open_until(Moment::NEVER);
        assert!(!gate.is_open());
    }
}
