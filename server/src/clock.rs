//! The clocks: the one that leases are measured by, and the one on the wall.

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::cluster::lease::Moment;

/// What CLOCK_BOOTTIME says: unlike `Instant`, it goes on while the machine is suspended, and a
/// lease must not outlive a suspension.
pub fn boot_time() -> Moment {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    Moment(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

/// The wall clock, in seconds since 1970, for people to read.
pub fn unix_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}
