//! The state number of a monitor, and its one rule of succession.
//!
//! A number says which life of a host a message belongs to: odd while the host is up, even once it
//! has gone down on purpose. Peers look for one thing, that a number is unlike the last one they
//! saw; so ours must never come twice, even if the store that held the last one is lost or old.
//! Therefore it follows the clock where the clock is ahead.
//!
//! Source: XNFS chapter 11 (odd and even); the clock as in CTDB.

use serde::{Deserialize, Serialize};

/// A state number; that of a peer may be any number.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct NsmState(pub i32);

impl NsmState {
    /// What peers send that do not know their state, and what a service has before its first start.
    pub const UNKNOWN: Self = Self(0);

    /// Whether this number says that its host is up.
    pub const fn is_up(self) -> bool {
        self.0 & 1 == 1
    }

    /// The number of the life that follows the one with the number `stored`, of which a service
    /// that has never run has [`NsmState::UNKNOWN`]: `stored + 2` or the time as an odd number,
    /// whichever is greater. It is odd, positive and greater than `stored`.
    ///
    /// Numbers end at 2^31-1. After the last one comes the time alone, which then is lower: peers
    /// compare for equality, so a lower number does what a number that stands still would not. The
    /// time begins anew at 2^31 seconds, in January 2038; a number from before then still rises by
    /// 2 with each life.
    pub fn next(stored: Self, unix_seconds: u64) -> Self {
        let clock = i32::try_from(unix_seconds & 0x7fff_ffff).unwrap_or(0) | 1;
        let after = stored.0.max(0).checked_add(2).unwrap_or(0) | 1;
        Self(after.max(clock))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 1 January 2026.
    const NOW: u64 = 1_767_225_600;

    fn next(stored: i32, unix_seconds: u64) -> i32 {
        NsmState::next(NsmState(stored), unix_seconds).0
    }

    #[test]
    fn follows_the_clock_or_the_last_number_whichever_is_ahead() {
        assert_eq!(next(0, NOW), 1_767_225_601);
        assert_eq!(next(1_767_225_601, NOW), 1_767_225_603);
        assert_eq!(next(1_767_225_601, NOW + 1), 1_767_225_603);
        assert_eq!(next(1_767_225_601, NOW + 9), 1_767_225_609);
        // Without a clock it is what Linux does: 3 first, then up by 2.
        assert_eq!(next(0, 0), 3);
        assert_eq!(next(3, 0), 5);
        assert_eq!(next(4, 0), 7);
        assert_eq!(next(-7, 0), 3);
    }

    #[test]
    fn the_last_numbers_and_what_follows_them() {
        assert_eq!(next(i32::MAX - 3, NOW), i32::MAX);
        assert_eq!(next(i32::MAX - 2, NOW), i32::MAX);
        assert_eq!(next(i32::MAX - 1, NOW), 1_767_225_601);
        assert_eq!(next(i32::MAX, NOW), 1_767_225_601);
        assert_eq!(next(i32::MAX, 0), 1);
        // The clock's own end.
        assert_eq!(next(0, 0x7fff_ffff), i32::MAX);
        assert_eq!(next(2_147_000_001, 0x8000_0000), 2_147_000_003);
        assert_eq!(next(0, 0x8000_1000), 0x1001);
        assert_eq!(next(5, u64::MAX), i32::MAX);
    }

    #[test]
    fn odd_is_up() {
        assert!(NsmState(3).is_up() && NsmState(-1).is_up());
        assert!(!NsmState(4).is_up() && !NsmState::UNKNOWN.is_up());
    }

    proptest! {
        #[test]
        fn is_odd_positive_and_another_number(stored: i32, unix_seconds: u64) {
            let next = NsmState::next(NsmState(stored), unix_seconds);
            prop_assert!(next.is_up());
            prop_assert!(next.0 > 0);
            if stored < i32::MAX - 1 {
                prop_assert!(next > NsmState(stored));
            }
        }

        /// Lives at any times, also with a clock that jumps: no number comes twice.
        #[test]
        fn never_repeats(
            first in 0..2_000_000_000i32,
            times in prop::collection::vec(0..2_100_000_000u64, 1..200),
        ) {
            let mut last = NsmState(first);
            for unix_seconds in times {
                let next = NsmState::next(last, unix_seconds);
                prop_assert!(next > last);
                last = next;
            }
        }

        /// A store that forgot the last lives repeats none of them, as long as the clock is right
        /// and a life took two seconds.
        #[test]
        fn a_lost_store_repeats_nothing(
            start in 1_000_000_000u64..2_000_000_000,
            lives in prop::collection::vec(2u64..100_000, 1..50),
        ) {
            let (mut now, mut last) = (start, NsmState::UNKNOWN);
            for seconds in lives {
                last = NsmState::next(last, now);
                now += seconds;
            }
            prop_assert!(NsmState::next(NsmState::UNKNOWN, now) > last);
        }
    }
}
