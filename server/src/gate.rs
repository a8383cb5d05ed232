//! Whether this node may answer for a service: asked before each call's effect and before each
//! reply.
//!
//! One gate is for one epoch. It opens until a moment of the node's own clock, which every renewal
//! of the lease puts off, and closes for good when the node lets the service go. So a process that
//! was stopped for a while and goes on does nothing more under a lease that is over, whatever its
//! tasks had in hand: no task has to be told. A node that is the only voter of its cluster needs no
//! lease; whether it is so is asked each time as well, since other voters come and go. Who is
//! between this question and the system call when the process is stopped can't be helped here; that
//! is what the fence of a storage is for.

use std::sync::Arc;
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
    /// Somebody was turned away: whoever waits on a connection for that answer would wait in vain.
    turned_away: AtomicBool,
    /// Whether this node is the only voter, so that nobody else can be assigned anything.
    is_sole: Arc<AtomicBool>,
}

impl Gate {
    /// A gate for an epoch, closed.
    pub fn new(epoch: u32) -> Self {
        Self::in_cluster(epoch, Arc::default())
    }

    /// The same, of a node that needs no lease while `is_sole` says so.
    pub fn in_cluster(epoch: u32, is_sole: Arc<AtomicBool>) -> Self {
        Self {
            epoch,
            is_sole,
            until: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
            turned_away: AtomicBool::new(false),
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
        if is_planted(Fault::NoLease) {
            return true;
        }
        let until = self.until();
        !self.is_over() && (until == Moment::NEVER || boot_time() < until)
    }

    /// The same, asked for a call: one that hears no is never answered, so the connection that it
    /// came on is of no use any more ([`Gate::has_turned_away`]).
    pub fn admits(&self) -> bool {
        let is_open = self.is_open();
        if !is_open {
            self.turn_away();
        }
        is_open
    }

    /// All connections must go: see [`Gate::has_turned_away`].
    pub fn turn_away(&self) {
        self.turned_away.store(true, Ordering::Release);
    }

    /// Whether a call may have been left without an answer: then all connections must go, also if
    /// the lease holds again meanwhile, since clients wait long for an answer on one that stays.
    pub fn has_turned_away(&self) -> bool {
        self.turned_away.load(Ordering::Acquire)
    }

    /// All connections are gone, and new ones may come.
    pub fn begin_anew(&self) {
        self.turned_away.store(false, Ordering::Release);
    }

    /// Until when it is open.
    pub fn until(&self) -> Moment {
        if self.is_sole.load(Ordering::Acquire) {
            return Moment::NEVER;
        }
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
        assert!(!gate.is_open() && !gate.has_turned_away());
        assert!(!gate.admits() && gate.has_turned_away());
        gate.begin_anew();
        let now = boot_time();
        gate.open_until(now + Duration::from_hours(1));
        assert!(gate.is_open());
        // A late answer does not shorten it.
        gate.open_until(now);
        assert!(gate.is_open());
        assert!(!gate.has_turned_away());
        gate.close();
        assert!(!gate.is_open());
        gate.open_until(Moment::NEVER);
        assert!(!gate.is_open());
    }

    #[test]
    fn the_only_voter_needs_a_lease_as_soon_as_it_is_not_the_only_one() {
        let is_sole = Arc::new(AtomicBool::new(true));
        let gate = Gate::in_cluster(3, Arc::clone(&is_sole));
        assert!(gate.admits());
        is_sole.store(false, Ordering::Release);
        assert!(!gate.admits(), "it has no lease");
        gate.open_until(boot_time() + Duration::from_hours(1));
        assert!(gate.is_open());
    }
}
