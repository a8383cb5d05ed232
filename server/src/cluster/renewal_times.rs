//! How long the last renewals of a node's lease took, from the look at the clock until they were
//! committed: what an operator wants to know before a lease ends for that.
//!
//! Local and pure. A renewal whose fate is unknown does not count; a log that stands still is seen
//! by the lease that ends.

use std::collections::VecDeque;
use std::time::Duration;

/// The last ones.
#[derive(Debug, Default)]
pub struct RenewalTimes {
    times: VecDeque<Duration>,
}

impl RenewalTimes {
    /// One more was committed.
    pub fn note(&mut self, took: Duration) {
        if self.times.len() >= KEPT {
            self.times.pop_front();
        }
        self.times.push_back(took);
    }

    /// Which time 99 of 100 keep; none before there are enough to say.
    pub fn p99(&self) -> Option<Duration> {
        if self.times.len() < ENOUGH {
            return None;
        }
        let mut times: Vec<Duration> = self.times.iter().copied().collect();
        times.sort_unstable();
        let place = (times.len() * 99).div_ceil(100);
        times.get(place.saturating_sub(1)).copied()
    }

    /// Whether there is little room left: a lease outlives a renewal that takes less than all of
    /// it, but not some of these in a row.
    pub fn are_slow(&self, lease: Duration) -> bool {
        self.p99().is_some_and(|p99| p99 > lease / 3)
    }
}

const KEPT: usize = 100;
const ENOUGH: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_millis(1200);

    #[test]
    fn one_late_renewal_of_a_hundred_is_no_news_and_two_are() {
        let mut times = RenewalTimes::default();
        for ms in 1..ENOUGH as u64 {
            times.note(Duration::from_millis(ms));
        }
        assert_eq!(times.p99(), None);
        for _ in 0..KEPT {
            times.note(Duration::from_millis(5));
        }
        times.note(Duration::from_secs(1));
        assert_eq!(times.p99(), Some(Duration::from_millis(5)));
        assert!(!times.are_slow(LEASE));
        times.note(Duration::from_secs(1));
        assert_eq!(times.p99(), Some(Duration::from_secs(1)));
        assert!(times.are_slow(LEASE));
        for _ in 0..KEPT {
            times.note(Duration::from_millis(5));
        }
        assert!(!times.are_slow(LEASE));
    }
}
