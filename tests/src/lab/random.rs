//! Random numbers for tests, repeatable by their seed.

use std::time::{SystemTime, UNIX_EPOCH};

/// A small generator of random numbers (splitmix64), so that a printed seed repeats a run.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Seeded by `HAVENFS_SEED`, else by the clock; prints the seed.
    pub fn seeded() -> Self {
        let now = || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
        };
        let given = std::env::var("HAVENFS_SEED")
            .ok()
            .and_then(|s| s.parse().ok());
        let seed = given.unwrap_or_else(|| now().as_nanos() as u64);
        eprintln!("HAVENFS_SEED={seed}");
        Self(seed)
    }

    /// Seeded by a number that another generator gave, for a thread of its own.
    pub const fn with_seed(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, less than `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}
