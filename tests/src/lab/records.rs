//! Compares the records that a client's `lab-writer` was told are durable with the file that a
//! server exports, and says for how long it was told nothing.
//!
//! Owns the reading of the log of `tests/lab/guest/writer.py`, and knows what a record looks like.
//! Whether a gap is too long is the tests' business.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::clock::{Micros, parse_seconds};
use super::process::{POLL, last_lines};
use super::{Process, Vm};

/// The records that were answered, in their order; times are the virtual machine's.
#[derive(Clone, Debug, Default)]
pub struct Records {
    ended: Vec<Micros>,
}

impl Vm<'_> {
    /// Starts to write records to a file of a mounted export.
    pub fn spawn_writer(&self, path: &str) -> Result<Process> {
        self.spawn("writer", LIFE_MAX, &format!("lab-writer {path}"))
    }
}

impl Records {
    /// Reads the log as far as it goes.
    ///
    /// # Errors
    /// The writer failed.
    pub fn parse(log: &str) -> Result<Self> {
        let mut records = Self::default();
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        for line in whole.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [number, _, ended] = words[..] else {
                anyhow::bail!("the writer failed: {line}");
            };
            let number: usize = number.parse().with_context(|| line.to_owned())?;
            ensure!(number == records.ended.len(), "after a record: {line}");
            records.ended.push(parse_seconds(ended)?);
        }
        Ok(records)
    }

    /// What a writer was told so far.
    pub fn of(writer: &Process) -> Result<Self> {
        Self::parse(&writer.output()?)
    }

    /// How many records there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.ended.len()
    }

    /// The longest time between the answers for two records, from the last one before record
    /// `from` on.
    #[must_use]
    pub fn longest_gap(&self, from: usize) -> Duration {
        let since = self.ended.get(from.saturating_sub(1)..).unwrap_or_default();
        let gaps = since.windows(2).map(|pair| pair[1] - pair[0]);
        Duration::from_micros(gaps.max().unwrap_or(0).unsigned_abs())
    }

    /// The records that are not in the file; each string names one.
    #[must_use]
    pub fn losses(&self, file: &[u8]) -> Vec<String> {
        let found = |number: &usize| {
            let at = number * PAGE_BYTES;
            file.get(at..at + RECORD_BYTES)
        };
        let all = 0..self.count();
        all.filter(|number| found(number) != Some(&record(*number)[..]))
            .map(|number| format!("record {number}: {:02x?}", found(&number)))
            .collect()
    }
}

/// Waits until a writer has been told of so many more records.
pub fn wait_for_records(writer: &Process, more: usize, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    let wanted = Records::of(writer)?.count() + more;
    loop {
        let log = writer.output()?;
        let count = Records::parse(&log)?.count();
        if count >= wanted {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{} of {wanted} records in {limit:?}; the log ends:\n{}",
            count,
            last_lines(&log)
        );
        std::thread::sleep(POLL);
    }
}

fn record(number: usize) -> [u8; RECORD_BYTES] {
    let mut record = [b'.'; RECORD_BYTES];
    let text = format!("record {number}");
    record[..text.len()].copy_from_slice(text.as_bytes());
    record[RECORD_BYTES - 1] = b'\n';
    record
}

const RECORD_BYTES: usize = 64;
/// Where a record is: see `tests/lab/guest/writer.py`.
const PAGE_BYTES: usize = 4096;
/// No test goes on for longer.
const LIFE_MAX: Duration = Duration::from_mins(10);

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "0 1.000000 1.010000\n1 1.030000 2.530000\n2 2.550000 2.560000\n3 2.5";

    #[test]
    fn the_longest_gap_begins_with_the_record_before() -> Result<()> {
        let records = Records::parse(LOG)?;
        assert_eq!(records.count(), 3);
        assert_eq!(records.longest_gap(0), Duration::from_millis(1520));
        assert_eq!(records.longest_gap(1), Duration::from_millis(1520));
        assert_eq!(records.longest_gap(2), Duration::from_millis(30));
        assert_eq!(records.longest_gap(9), Duration::ZERO);
        Ok(())
    }

    #[test]
    fn a_record_that_is_missing_or_another_is_lost() -> Result<()> {
        let records = Records::parse(LOG)?;
        let page = |number| [&record(number)[..], &[0; PAGE_BYTES - RECORD_BYTES]].concat();
        let mut file: Vec<u8> = (0..3).flat_map(page).collect();
        file.truncate(2 * PAGE_BYTES + RECORD_BYTES);
        assert_eq!(records.losses(&file), [""; 0]);
        file[PAGE_BYTES] = 0;
        file.pop();
        let losses = records.losses(&file);
        assert_eq!(losses.len(), 2, "{losses:?}");
        assert!(losses[1].starts_with("record 2: None"), "{losses:?}");
        Ok(())
    }

    #[test]
    fn a_writer_that_fails_is_no_log() {
        for log in ["0 1.000000 1.010000\nfailed EIO\n", "1 1.000000 1.010000\n"] {
            assert!(Records::parse(log).is_err(), "{log}");
        }
    }
}
