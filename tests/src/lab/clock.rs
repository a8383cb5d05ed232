//! Puts the times that a virtual machine writes on the clock of the machine that runs the test.
//!
//! A virtual machine's clock is off and drifts, so it is read before and after whatever is timed.
//! Between two readings the drift is taken to be steady; what that may be wrong is part of the
//! error that comes with each time. All numbers are microseconds.

use std::str::FromStr;

use anyhow::{Context as _, Result, ensure};

/// Microseconds since 1970.
pub type Micros = i64;

/// One look at a virtual machine's clock.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reading {
    /// When that was, by our clock.
    pub at: Micros,
    /// The virtual machine's clock minus ours.
    pub ahead: Micros,
    /// By how much `ahead` may be wrong, in either direction.
    pub error: Micros,
}

impl FromStr for Reading {
    type Err = anyhow::Error;

    /// Reads what `vmctl clock` prints.
    fn from_str(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        ensure!(words.len() == 3, "not a reading of a clock: {line}");
        Ok(Self {
            at: parse_seconds(words[0])?,
            ahead: parse_seconds(words[1])?,
            error: parse_seconds(words[2])?,
        })
    }
}

/// What is known of one virtual machine's clock.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    /// In the order of their times.
    readings: Vec<Reading>,
}

impl Clock {
    /// Notes a reading, which must be later than the others.
    pub fn note(&mut self, reading: Reading) {
        self.readings.push(reading);
    }

    /// A time of the virtual machine by our clock, and by how much that may be wrong.
    ///
    /// Two times of one virtual machine never change their order.
    pub fn ours(&self, theirs: Micros) -> Result<(Micros, Micros)> {
        let first = self.readings.first().context("the clock was never read")?;
        let last = self.readings.last().unwrap_or(first);
        let after = |reading: &&Reading| reading.at + reading.ahead >= theirs;
        let next = self.readings.iter().find(after).unwrap_or(last);
        let before = |reading: &&Reading| reading.at + reading.ahead < theirs;
        let previous = self.readings.iter().rfind(before).unwrap_or(first);

        let (from, to) = (previous.at + previous.ahead, next.at + next.ahead);
        let drift = next.ahead - previous.ahead;
        let drifted = if from < theirs && theirs <= to {
            i128::from(drift) * i128::from(theirs - from) / i128::from(to - from)
        } else {
            0 // outside of all readings, or at one
        };
        let ours = theirs - previous.ahead - i64::try_from(drifted)?;
        Ok((ours, previous.error.max(next.error) + drift.abs()))
    }
}

/// Reads seconds with a fraction, such as `-0.000125`.
pub fn parse_seconds(text: &str) -> Result<Micros> {
    let read = || -> Option<Micros> {
        let (sign, digits) = match text.strip_prefix('-') {
            Some(digits) => (-1, digits),
            None => (1, text),
        };
        let (whole, fraction) = digits.split_once('.')?;
        if fraction.len() != 6 || !(whole.bytes().chain(fraction.bytes())).all(is_digit) {
            return None;
        }
        let whole: Micros = whole.parse().ok()?;
        let fraction: Micros = fraction.parse().ok()?;
        Some(sign * (whole.checked_mul(1_000_000)?.checked_add(fraction)?))
    };
    read().with_context(|| format!("not seconds with six digits behind the point: {text}"))
}

fn is_digit(byte: u8) -> bool {
    byte.is_ascii_digit()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(at: Micros, ahead: Micros, error: Micros) -> Reading {
        Reading { at, ahead, error }
    }

    #[test]
    fn a_reading_is_what_vmctl_prints() -> Result<()> {
        let line = "1764064800.000001 -0.000125 0.000300\n";
        let read: Reading = line.parse()?;
        assert_eq!(read, reading(1_764_064_800_000_001, -125, 300));
        for wrong in ["", "1.0 2.0 3.0", "1.000000 -0.000001", "a.000000"] {
            assert!(wrong.parse::<Reading>().is_err(), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn a_clock_without_readings_tells_nothing() {
        assert!(Clock::default().ours(0).is_err());
    }

    #[test]
    fn one_reading_holds_for_all_times() -> Result<()> {
        let mut clock = Clock::default();
        clock.note(reading(1000, 50, 7));
        assert_eq!(clock.ours(100)?, (50, 7));
        assert_eq!(clock.ours(5050)?, (5000, 7));
        Ok(())
    }

    #[test]
    fn drift_is_shared_out_between_readings_and_adds_to_the_error() -> Result<()> {
        let mut clock = Clock::default();
        clock.note(reading(1000, 0, 5));
        clock.note(reading(2000, 100, 9));
        assert_eq!(clock.ours(1000)?, (1000, 5));
        assert_eq!(clock.ours(1550)?, (1500, 109));
        assert_eq!(clock.ours(2100)?, (2000, 109));
        assert_eq!(clock.ours(2200)?, (2100, 9));
        Ok(())
    }
}
