//! The clock of one node, as CLOCK_BOOTTIME: it goes on while the node is stopped, at a speed that
//! differs a little from that of true time. Where it begins means nothing.

use havenfs::cluster::lease::Moment;

/// True time goes in nanoseconds.
pub(crate) const MS: u64 = 1_000_000;
/// Clocks are off by so many millionths at most: two of them by twice as many, which a lease of
/// 1.2 s with its margin of 50 ms just allows.
pub(crate) const DRIFT_PPM_MAX: u64 = 20_000;

/// A clock.
#[derive(Debug)]
pub(crate) struct Clock {
    /// What it showed when true time was 0; moved by jumps.
    base: u64,
    /// How much faster than true time it goes, in millionths.
    drift_ppm: i64,
}

impl Clock {
    pub(crate) const fn new(base: u64, drift_ppm: i64) -> Self {
        Self { base, drift_ppm }
    }

    /// What it shows at a moment of true time.
    pub(crate) const fn read(&self, now: u64) -> Moment {
        let drift = now as i64 / 1000 * self.drift_ppm / 1000;
        Moment(self.base + now.saturating_add_signed(drift))
    }

    /// How long it takes, in true time, until it shows a moment; rounded up.
    pub(crate) const fn until(&self, now: u64, moment: Moment) -> u64 {
        let wait = moment.0.saturating_sub(self.read(now).0) as i128;
        let true_wait = wait * 1_000_000 / (1_000_000 + self.drift_ppm as i128);
        true_wait as u64 + 2000
    }

    /// It jumps forward.
    pub(crate) const fn jump(&mut self, by: u64) {
        self.base += by;
    }
}
