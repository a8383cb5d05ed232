//! From `(l_offset, l_len)` to the bytes that are meant, and back. Nothing else in the project
//! knows that a length of 0 means "to the end".

use serde::{Deserialize, Serialize};

/// The last byte that a file can have: offsets are signed in the kernels on both sides.
pub const OFFSET_MAX: u64 = i64::MAX as u64;
/// The last byte that versions 1 and 3 can name.
pub const OFFSET_MAX_V3: u64 = u32::MAX as u64;

/// Bytes `start` to `last`, both included; a range to the end of the file ends at [`OFFSET_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ByteRange {
    start: u64,
    last: u64,
}

/// The range begins behind the last byte that a file can have: NLM4_FBIG.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooFar;

impl ByteRange {
    /// The whole file.
    pub const ALL: Self = Self {
        start: 0,
        last: OFFSET_MAX,
    };

    /// Reads the fields of a lock. `offset_max` is [`OFFSET_MAX`], or [`OFFSET_MAX_V3`] for
    /// versions 1 and 3. A length of 0, and an end at or behind `offset_max`, mean the end of the
    /// file, as with Linux, FreeBSD and illumos clients.
    ///
    /// # Errors
    /// [`TooFar`] if `l_offset` is above `offset_max`.
    pub const fn from_wire(l_offset: u64, l_len: u64, offset_max: u64) -> Result<Self, TooFar> {
        if l_offset > offset_max {
            return Err(TooFar);
        }
        let last = match l_len.checked_sub(1) {
            None => OFFSET_MAX,
            Some(more) => match l_offset.checked_add(more) {
                Some(last) if last < offset_max => last,
                _ => OFFSET_MAX,
            },
        };
        Ok(Self {
            start: l_offset,
            last,
        })
    }

    /// `l_offset` and `l_len`; a range to the end has length 0.
    pub const fn to_wire(self) -> (u64, u64) {
        if self.last == OFFSET_MAX {
            (self.start, 0)
        } else {
            (self.start, self.last - self.start + 1)
        }
    }

    /// Bytes `start` to `last`; `None` if they are in the wrong order.
    pub const fn new(start: u64, last: u64) -> Option<Self> {
        if start <= last && last <= OFFSET_MAX {
            Some(Self { start, last })
        } else {
            None
        }
    }

    /// The first byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The last byte.
    pub const fn last(self) -> u64 {
        self.last
    }

    /// Whether a byte is in both.
    pub const fn overlaps(self, other: Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// This range and the bytes beside it: what overlaps that overlaps or touches this range.
    #[must_use]
    pub const fn with_neighbours(self) -> Self {
        Self {
            start: self.start.saturating_sub(1),
            last: if self.last < OFFSET_MAX {
                self.last + 1
            } else {
                OFFSET_MAX
            },
        }
    }

    /// The smallest range that holds both.
    #[must_use]
    pub const fn join(self, other: Self) -> Self {
        Self {
            start: if self.start < other.start {
                self.start
            } else {
                other.start
            },
            last: if self.last > other.last {
                self.last
            } else {
                other.last
            },
        }
    }

    /// What of this range lies before and behind `other`.
    pub const fn without(self, other: Self) -> [Option<Self>; 2] {
        let before = match other.start.checked_sub(1) {
            Some(last) if last < self.last => Self::new(self.start, last),
            Some(_) => Some(self),
            None => None,
        };
        let after = if other.last < OFFSET_MAX {
            let start = other.last + 1;
            Self::new(
                if start > self.start {
                    start
                } else {
                    self.start
                },
                self.last,
            )
        } else {
            None
        };
        [before, after]
    }
}

impl std::fmt::Display for ByteRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.last == OFFSET_MAX {
            write!(f, "{}-end", self.start)
        } else {
            write!(f, "{}-{}", self.start, self.last)
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    fn v4(l_offset: u64, l_len: u64) -> Result<ByteRange, TooFar> {
        ByteRange::from_wire(l_offset, l_len, OFFSET_MAX)
    }

    #[test]
    fn lengths_that_mean_the_end() {
        for len in [0, u64::MAX, OFFSET_MAX, OFFSET_MAX - 9, OFFSET_MAX - 8] {
            assert_eq!(v4(10, len).unwrap().to_wire(), (10, 0), "{len}");
        }
        assert_eq!(v4(0, 0), Ok(ByteRange::ALL));
        assert_eq!(v4(OFFSET_MAX, 1), v4(OFFSET_MAX, 0));
        let v3 = |offset, len| ByteRange::from_wire(offset, len, OFFSET_MAX_V3);
        assert_eq!(v3(1, OFFSET_MAX_V3), v4(1, 0));
        assert_eq!(v3(1, OFFSET_MAX_V3 - 2).unwrap().last(), OFFSET_MAX_V3 - 2);
    }

    #[test]
    fn exact_lengths_come_back() {
        for (offset, len) in [(0, 1), (7, 100), (0, OFFSET_MAX), (5, OFFSET_MAX - 6)] {
            let range = v4(offset, len).unwrap();
            let expected = if offset + len > OFFSET_MAX { 0 } else { len };
            assert_eq!(range.to_wire(), (offset, expected));
        }
        assert_eq!(v4(OFFSET_MAX + 1, 1), Err(TooFar));
        assert_eq!(v4(u64::MAX, 0), Err(TooFar));
    }

    #[test]
    fn parts_beside_another_range() {
        let range = |start, last| ByteRange::new(start, last).unwrap();
        let parts = |a: ByteRange, b| a.without(b).map(|part| part.map(|r| (r.start, r.last)));
        assert_eq!(
            parts(range(10, 20), range(12, 15)),
            [Some((10, 11)), Some((16, 20))]
        );
        assert_eq!(parts(range(10, 20), range(10, 20)), [None, None]);
        assert_eq!(parts(range(10, 20), range(0, 12)), [None, Some((13, 20))]);
        assert_eq!(parts(range(10, 20), range(15, 30)), [Some((10, 14)), None]);
        assert_eq!(parts(range(0, 5), ByteRange::ALL), [None, None]);
        assert_eq!(parts(range(10, 20), range(30, 40)), [Some((10, 20)), None]);
        assert_eq!(parts(range(10, 20), range(1, 2)), [None, Some((10, 20))]);
        let touch = |one: ByteRange, other| one.with_neighbours().overlaps(other);
        assert!(touch(range(0, 4), range(5, 6)) && !range(0, 4).overlaps(range(5, 6)));
        assert!(touch(range(5, 6), range(0, 4)) && !touch(range(0, 4), range(6, 6)));
        assert!(touch(ByteRange::ALL, range(3, 3)));
    }
}
