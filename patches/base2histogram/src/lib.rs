//! Stands in for the crate `base2histogram`, with which openraft counts for its own statistics.
//!
//! That crate builds tables of 25 MiB when the first histogram is made, for all widths of which
//! openraft uses one: two thirds of the memory of an idle server, and half of the time in which it
//! starts. Nothing switches that off. This one has what openraft calls, under the same names, and a
//! bucket for each power of two. To be removed when a release of the other one builds what is used.

use std::fmt;
use std::marker::PhantomData;

/// Counts of values by their highest bit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram<T = ()> {
    /// At each place the values with so many bits.
    buckets: [u64; 65],
    _kind: PhantomData<T>,
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Histogram<T> {
    /// Makes an empty histogram.
    pub const fn new() -> Self {
        Self {
            buckets: [0; 65],
            _kind: PhantomData,
        }
    }

    /// Counts a value.
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// Counts a value `count` times.
    pub fn record_n(&mut self, value: u64, count: u64) {
        let bits = (u64::BITS - value.leading_zeros()) as usize;
        if let Some(bucket) = self.buckets.get_mut(bits) {
            *bucket = bucket.saturating_add(count);
        }
    }

    /// The number of values.
    pub fn total(&self) -> u64 {
        self.buckets
            .iter()
            .fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The values below which certain parts of all lie, each the lowest of its bucket.
    pub fn percentile_stats(&self) -> PercentileStats {
        let at = |permille| self.value_at(permille);
        PercentileStats {
            samples: self.total(),
            p0_1: at(1),
            p1: at(10),
            p5: at(50),
            p10: at(100),
            p50: at(500),
            p90: at(900),
            p99: at(990),
            p99_9: at(999),
        }
    }

    fn value_at(&self, permille: u64) -> u64 {
        let wanted = self.total().saturating_mul(permille).div_ceil(1000);
        let mut seen = 0;
        let reached = self.buckets.iter().position(|count| {
            seen = count.saturating_add(seen);
            seen >= wanted
        });
        match reached {
            None | Some(0) => 0,
            Some(bits) => 1 << (bits - 1),
        }
    }
}

/// What part of all values lies below which value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say all")]
pub struct PercentileStats {
    pub samples: u64,
    pub p0_1: u64,
    pub p1: u64,
    pub p5: u64,
    pub p10: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Several histograms under their names, to be printed.
#[derive(Debug, Clone, Default)]
pub struct AsciiChart(Vec<(String, PercentileStats)>);

impl AsciiChart {
    /// Makes an empty one.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds a histogram.
    #[must_use]
    pub fn add<T>(mut self, name: &str, histogram: Histogram<T>) -> Self {
        self.0.push((name.to_owned(), histogram.percentile_stats()));
        self
    }
}

impl fmt::Display for AsciiChart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = self.0.iter();
        lines.try_for_each(|(name, stats)| writeln!(f, "{name}: {stats}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_in_their_buckets() {
        let mut histogram = Histogram::<()>::new();
        assert_eq!(histogram.percentile_stats().p50, 0);
        for value in 0..1000 {
            histogram.record(value);
        }
        histogram.record(u64::MAX);
        let stats = histogram.percentile_stats();
        assert_eq!((stats.samples, stats.p50, stats.p99), (1001, 256, 512));
        assert_eq!(histogram.value_at(1000), 1 << 63);
    }
}
