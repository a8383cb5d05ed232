//! The lease of this node: until when it may serve, by its own clock.
//!
//! Local and pure: the caller reads the clock, proposes the renewals, and tells what became of
//! them. It is rule 1 of [`state`](super::state): what counts is the moment *before* the renewal
//! was proposed, since everybody else waits from a moment after that. A renewal of an earlier life
//! of this process is not in `asked`, so it counts for nothing although it is in the log.
//!
//! ```text
//!   renew(now) -> Renewal --propose--> committed, applied --> renewed(seq, services)
//!        |                                                       |
//!        +-- asked: (seq, now)                                     +-- until: now + lease
//! ```
//!
//! While this node is the only voter there is no lease: nobody else can be assigned anything.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Add;
use std::time::Duration;

use super::command::Renewal;
use super::{NodeId, ServiceId};

/// A moment of the clock that goes on while the machine is suspended (CLOCK_BOOTTIME), in
/// nanoseconds. Moments of two machines have nothing to do with each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

impl Moment {
    /// It never comes.
    pub const NEVER: Self = Self(u64::MAX);

    /// How long after `earlier` it is; zero if it is before.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanos))
    }
}

/// How long others wait beyond a lease: clocks of two machines may differ in speed by so much.
pub fn margin(lease_ms: u32) -> Duration {
    Duration::from_millis(u64::from(
        lease_ms.div_ceil(MARGIN_DIVISOR).max(MARGIN_MS_MIN),
    ))
}

/// How long others wait after they saw a renewal.
pub fn wait(renewal: &Renewal) -> Duration {
    Duration::from_millis(renewal.lease_ms.into()) + margin(renewal.lease_ms)
}

/// Until when this node may serve what.
#[derive(Debug)]
pub struct Lease {
    node: NodeId,
    incarnation: u64,
    time_ms: u32,
    last_seq: u64,
    /// Renewals whose fate is unknown, with the moment before each was proposed.
    asked: VecDeque<(u64, Moment)>,
    until: BTreeMap<ServiceId, (u32, Moment)>,
}

impl Lease {
    /// The lease of a life of a node, which has not begun.
    pub const fn new(node: NodeId, incarnation: u64, lease_ms: u32) -> Self {
        Self {
            node,
            incarnation,
            time_ms: lease_ms,
            last_seq: 0,
            asked: VecDeque::new(),
            until: BTreeMap::new(),
        }
    }

    /// The next renewal, to be proposed now; none while too many are under way, since then the log
    /// does not get on and one more would not help.
    pub fn renew(&mut self, now: Moment) -> Option<Renewal> {
        if self.asked.len() >= ASKED_MAX {
            return None;
        }
        self.last_seq += 1;
        self.asked.push_back((self.last_seq, now));
        Some(Renewal {
            node: self.node,
            incarnation: self.incarnation,
            seq: self.last_seq,
            lease_ms: self.time_ms,
        })
    }

    /// A renewal is in the log, where these services are assigned to this life in these epochs;
    /// returns the moment before it was proposed, if it is not too late to count.
    pub fn renewed(&mut self, seq: u64, services: &[(ServiceId, u32)]) -> Option<Moment> {
        let asked = self.take(seq)?;
        let end = asked + Duration::from_millis(self.time_ms.into());
        for (service, epoch) in services {
            let until = self.until.entry(*service).or_default();
            // Answers may come in another order than the log has.
            *until = (*until).max((*epoch, end));
        }
        Some(asked)
    }

    /// It will never be known what became of a renewal, or nothing became of it.
    pub fn dropped(&mut self, seq: u64) {
        let _ = self.take(seq);
    }

    fn take(&mut self, seq: u64) -> Option<Moment> {
        let place = self.asked.iter().position(|(asked, _)| *asked == seq)?;
        self.asked.remove(place).map(|(_, moment)| moment)
    }

    /// Until when this node may serve a service in an epoch; none if it never might.
    pub fn until(&self, service: ServiceId, epoch: u32) -> Option<Moment> {
        let (of_epoch, until) = self.until.get(&service)?;
        (*of_epoch == epoch).then_some(*until)
    }
}

/// Renewals under way at most.
const ASKED_MAX: usize = 16;
/// The margin is a fiftieth of the lease, and at least so much.
const MARGIN_DIVISOR: u32 = 50;
const MARGIN_MS_MIN: u32 = 50;

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    const SERVICE: ServiceId = ServiceId(1);

    fn at(ms: u64) -> Moment {
        Moment(ms * 1_000_000)
    }

    #[test]
    fn the_lease_counts_from_before_the_proposal() {
        let mut lease = Lease::new(NodeId(1), 7, 1200);
        let renewal = lease.renew(at(100)).unwrap();
        assert_eq!((renewal.incarnation, renewal.seq), (7, 1));
        assert_eq!(lease.until(SERVICE, 3), None);
        // Committed whenever: what counts is the 100.
        lease.renewed(renewal.seq, &[(SERVICE, 3)]);
        assert_eq!(lease.until(SERVICE, 3), Some(at(1300)));
        assert_eq!(lease.until(SERVICE, 4), None);
        assert_eq!(lease.until(ServiceId(2), 3), None);
    }

    #[test]
    fn a_replayed_renewal_counts_for_nothing() {
        let mut lease = Lease::new(NodeId(1), 8, 1200);
        lease.renewed(1, &[(SERVICE, 3)]);
        assert_eq!(lease.until(SERVICE, 3), None);
        let renewal = lease.renew(at(5)).unwrap();
        lease.renewed(renewal.seq, &[(SERVICE, 3)]);
        // A second time: it was used up.
        lease.renewed(renewal.seq, &[(SERVICE, 4)]);
        assert_eq!(lease.until(SERVICE, 3), Some(at(1205)));
    }

    #[test]
    fn answers_in_another_order_never_shorten_it() {
        let mut lease = Lease::new(NodeId(1), 8, 1000);
        let first = lease.renew(at(0)).unwrap();
        let second = lease.renew(at(200)).unwrap();
        lease.renewed(second.seq, &[(SERVICE, 1)]);
        lease.renewed(first.seq, &[(SERVICE, 1)]);
        assert_eq!(lease.until(SERVICE, 1), Some(at(1200)));
    }

    #[test]
    fn an_earlier_epoch_does_not_come_back() {
        let mut lease = Lease::new(NodeId(1), 8, 1000);
        let first = lease.renew(at(0)).unwrap();
        let second = lease.renew(at(200)).unwrap();
        lease.renewed(second.seq, &[(SERVICE, 2)]);
        lease.renewed(first.seq, &[(SERVICE, 1)]);
        assert_eq!(lease.until(SERVICE, 2), Some(at(1200)));
        assert_eq!(lease.until(SERVICE, 1), None);
    }

    #[test]
    fn a_log_that_stands_still_is_not_asked_without_end() {
        let mut lease = Lease::new(NodeId(1), 8, 1000);
        let seqs: Vec<u64> = (0..)
            .map_while(|ms| lease.renew(at(ms)))
            .map(|r| r.seq)
            .collect();
        assert_eq!(seqs.len(), ASKED_MAX);
        lease.dropped(seqs[3]);
        assert!(lease.renew(at(99)).is_some());
        assert!(lease.renew(at(99)).is_none());
    }

    #[test]
    fn the_margin_grows_with_the_lease() {
        assert_eq!(margin(1200), Duration::from_millis(50));
        assert_eq!(margin(10_000), Duration::from_millis(200));
    }
}
