//! Judges the log of lock traffic: did two processes ever hold locks that exclude each other?
//!
//! Owns the reading of what `lab-locktool traffic` (`tests/lab/guest/locktool.py`) says, and three
//! independent checks of it:
//!
//! - the times between which each process is sure to have had its lock, after its request was
//!   answered and before its unlock was sent, do not overlap where they must not;
//! - every count made under an exclusive lock is in the file;
//! - nobody who held a shared lock saw the counts change.
//!
//! The last two need no clock. The first one sees what they cannot, a lock given twice to
//! processes that happened not to count at the same time; it compares times of two machines only
//! as far as their clocks are known, so an overlap that it reports is one.

use anyhow::{Context as _, Result, bail};

use super::clock::{Clock, Micros, parse_seconds};

/// What one virtual machine's workers said.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// The locks they held, in the order of their ends for each worker.
    pub held: Vec<Held>,
    /// How many requests were denied.
    pub denied: usize,
    /// How many waits were interrupted.
    pub interrupted: usize,
    /// What was added to each counter of the file.
    counted: Vec<u64>,
    /// Which worker saw counts change under its shared lock, and when.
    torn: Vec<String>,
}

/// A lock that a process had.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Held {
    /// The virtual machine.
    pub host: String,
    /// The process there.
    pub owner: String,
    /// The file.
    pub path: String,
    /// Whether it excludes every other lock; if not, it excludes exclusive ones.
    pub exclusive: bool,
    /// The first byte.
    pub start: u64,
    /// Behind the last byte; [`u64::MAX`] if the lock goes on to the end of the file.
    pub end: u64,
    /// How long the process had waited for it.
    pub waited: Micros,
    /// From when on it surely was held, by our clock.
    pub from: Micros,
    /// Until when it surely was held, by our clock.
    pub to: Micros,
    /// By how much the two may be wrong against times of another virtual machine.
    pub error: Micros,
}

impl Traffic {
    /// Reads the log of the workers in the virtual machine `host`, as far as it goes.
    ///
    /// # Errors
    /// A worker failed, or a line is none that workers say.
    pub fn parse(host: &str, log: &str, clock: &Clock) -> Result<Self> {
        let mut traffic = Self::default();
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        for line in whole.lines() {
            let add = traffic.add(host, line, clock);
            add.with_context(|| format!("{host}: {line}"))?;
        }
        Ok(traffic)
    }

    fn add(&mut self, host: &str, line: &str, clock: &Clock) -> Result<()> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [_, _, "denied"] => self.denied += 1,
            [_, _, "interrupted"] => self.interrupted += 1,
            [_, _, "torn", ..] => self.torn.push(format!("{host}: {line}")),
            [_, _, "counted", ref counts @ ..] => {
                self.counted.resize(counts.len(), 0);
                for (sum, count) in self.counted.iter_mut().zip(counts) {
                    *sum += count.parse::<u64>()?;
                }
            }
            [_, owner, "held", how, start, length, ref times @ .., path] => {
                let [asked, acquired, releasing, _] = times[..] else {
                    bail!("not four times");
                };
                let start = start.parse()?;
                let end = match length.parse()? {
                    0 => u64::MAX,
                    length => start + length,
                };
                let (from, error_from) = clock.ours(parse_seconds(acquired)?)?;
                let (to, error_to) = clock.ours(parse_seconds(releasing)?)?;
                self.held.push(Held {
                    host: host.to_owned(),
                    owner: owner.to_owned(),
                    path: path.to_owned(),
                    exclusive: how.split(',').any(|word| word == "exclusive"),
                    start,
                    end,
                    waited: parse_seconds(acquired)? - parse_seconds(asked)?,
                    from,
                    to,
                    error: error_from.max(error_to),
                });
            }
            _ => bail!("a worker failed, or this is no line of its log"),
        }
        Ok(())
    }
}

impl Held {
    /// The time that both surely held locks which exclude each other; `None` if there is none.
    fn shared_time(&self, other: &Self) -> Option<Micros> {
        let excluded = (self.exclusive || other.exclusive)
            && self.path == other.path
            && self.start < other.end
            && other.start < self.end
            && (&self.host, &self.owner) != (&other.host, &other.owner);
        // One machine's clock agrees with itself.
        let error = if self.host == other.host {
            0
        } else {
            self.error + other.error
        };
        let time = self.to.min(other.to) - self.from.max(other.from) - error;
        (excluded && time > 0).then_some(time)
    }

    fn describe(&self) -> String {
        let kind = if self.exclusive {
            "exclusive"
        } else {
            "shared"
        };
        format!(
            "{} {} {kind} {} {}..{}",
            self.host, self.owner, self.path, self.start, self.end
        )
    }
}

/// Everything that went wrong in the traffic of several virtual machines on one file whose counters
/// are now `file`; empty if all is well.
pub fn violations(traffic: &[Traffic], file: &str) -> Result<Vec<String>> {
    let held: Vec<Held> = traffic.iter().flat_map(|t| t.held.clone()).collect();
    let mut found = overlaps(&held);
    found.extend(traffic.iter().flat_map(|t| t.torn.clone()));
    found.extend(lost_counts(traffic, file)?);
    Ok(found)
}

/// Each pair of processes that held locks at the same time which exclude each other.
pub fn overlaps(held: &[Held]) -> Vec<String> {
    let mut by_time: Vec<&Held> = held.iter().collect();
    by_time.sort_by_key(|held| held.from);
    let mut found = Vec::new();
    for (at, first) in by_time.iter().enumerate() {
        // Who comes later overlaps no longer than that, whatever the clocks' error.
        let during = by_time[at + 1..]
            .iter()
            .take_while(|then| then.from < first.to);
        for then in during {
            if let Some(time) = first.shared_time(then) {
                found.push(format!(
                    "for {time} us from {} on: {} and {}",
                    then.from,
                    first.describe(),
                    then.describe()
                ));
            }
        }
    }
    found
}

/// Compares what was counted with the counters in the file, which have eight digits each.
fn lost_counts(traffic: &[Traffic], file: &str) -> Result<Vec<String>> {
    let counters = traffic.iter().map(|t| t.counted.len()).max().unwrap_or(0);
    let mut found = Vec::new();
    for at in 0..counters {
        let counted: u64 = traffic.iter().filter_map(|t| t.counted.get(at)).sum();
        let digits = file.get(at * DIGITS..(at + 1) * DIGITS).unwrap_or_default();
        let digits = digits.trim_matches('\0');
        let there: u64 = match digits {
            "" => 0,
            digits => digits
                .parse()
                .with_context(|| format!("counter {at} in the file: {digits:?}"))?,
        };
        if there != counted {
            found.push(format!("counter {at}: {there} in the file, {counted} made"));
        }
    }
    Ok(found)
}

const DIGITS: usize = 8;

#[cfg(test)]
mod tests {
    use super::super::clock::Reading;
    use super::*;

    /// An exclusive lock of the first ten bytes.
    fn held(owner: &str, from: Micros, to: Micros) -> Held {
        let (host, owner) = owner.split_once('/').expect("HOST/OWNER");
        Held {
            host: host.to_owned(),
            owner: owner.to_owned(),
            path: "/mnt/f".to_owned(),
            exclusive: true,
            start: 0,
            end: 10,
            waited: 0,
            from,
            to,
            error: 0,
        }
    }

    fn shared(held: Held) -> Held {
        Held {
            exclusive: false,
            ..held
        }
    }

    fn count(held: &[Held]) -> usize {
        overlaps(held).len()
    }

    #[test]
    fn a_lock_held_twice_is_found() {
        let found = overlaps(&[held("c2/w0", 150, 250), held("c1/w0", 100, 200)]);
        assert_eq!(
            found,
            [
                "for 50 us from 150 on: c1 w0 exclusive /mnt/f 0..10 and c2 w0 exclusive /mnt/f 0..10"
            ]
        );
        assert_eq!(
            count(&[held("c1/w0", 100, 200), held("c1/w1", 199, 210)]),
            1
        );
        // One within another, and more than two.
        let three = [
            held("c1/w0", 0, 100),
            held("c2/w0", 10, 20),
            held("c2/w1", 90, 95),
        ];
        assert_eq!(count(&three), 2);
    }

    #[test]
    fn one_after_the_other_is_right() {
        assert_eq!(
            count(&[held("c1/w0", 100, 200), held("c2/w0", 200, 300)]),
            0
        );
    }

    #[test]
    fn shared_locks_exclude_exclusive_ones_only() {
        let (one, two) = (held("c1/w0", 0, 100), held("c2/w0", 0, 100));
        assert_eq!(count(&[shared(one.clone()), shared(two.clone())]), 0);
        assert_eq!(count(&[shared(one), two]), 1);
    }

    #[test]
    fn other_ranges_files_and_the_same_process_do_not_count() {
        let one = held("c1/w0", 0, 100);
        let other = held("c2/w0", 0, 100);
        let beside = Held {
            start: 10,
            end: u64::MAX,
            ..other.clone()
        };
        assert_eq!(count(&[one.clone(), beside.clone()]), 0);
        let to_the_end = Held { start: 9, ..beside };
        assert_eq!(count(&[one.clone(), to_the_end]), 1);
        let elsewhere = Held {
            path: "/mnt/g".to_owned(),
            ..other
        };
        assert_eq!(count(&[one.clone(), elsewhere]), 0);
        assert_eq!(count(&[one.clone(), one]), 0);
    }

    #[test]
    fn what_clocks_may_be_wrong_is_no_overlap() {
        let unsure = |held: Held| Held { error: 30, ..held };
        let (one, two) = (held("c1/w0", 0, 100), held("c2/w0", 50, 200));
        assert_eq!(count(&[unsure(one.clone()), unsure(two.clone())]), 0);
        assert_eq!(count(&[unsure(one.clone()), two]), 1);
        // Within one machine there is nothing to be unsure of.
        let same = held("c1/w1", 99, 200);
        assert_eq!(count(&[unsure(one), unsure(same)]), 1);
    }

    fn clock() -> Clock {
        let mut clock = Clock::default();
        clock.note(Reading {
            at: 0,
            ahead: 1_000_000,
            error: 20,
        });
        clock
    }

    const LOG: &str = "\
        9.000000 w0 held fcntl,exclusive,wait 8 16 5.000000 6.000000 7.000000 8.000000 /mnt/f\n\
        9.100000 w1 held fcntl,shared,now 56 0 5.000000 5.000001 5.000002 8.000000 /mnt/f\n\
        9.200000 w0 denied\n9.300000 w1 interrupted\n\
        9.400000 w0 counted 0 1 1\n9.400000 w1 counted 2 0 0\n9.500000 w1 cut o";

    #[test]
    fn a_log_is_read_on_our_clock() -> Result<()> {
        let traffic = Traffic::parse("c1", LOG, &clock())?;
        let first = Held {
            start: 8,
            end: 24,
            waited: 1_000_000,
            error: 20,
            ..held("c1/w0", 5_000_000, 6_000_000)
        };
        assert_eq!(traffic.held[0], first);
        let second = &traffic.held[1];
        assert_eq!((second.exclusive, second.end), (false, u64::MAX));
        assert_eq!((traffic.denied, traffic.interrupted), (1, 1));
        assert_eq!(traffic.counted, [2, 1, 1]);
        Ok(())
    }

    #[test]
    fn a_worker_that_fails_is_told() {
        for line in ["9.000000 w0 failed ENOLCK\n", "Traceback: no such file\n"] {
            assert!(Traffic::parse("c1", line, &clock()).is_err(), "{line}");
        }
    }

    #[test]
    fn lost_counts_and_torn_reads_are_violations() -> Result<()> {
        let traffic = [Traffic::parse("c1", LOG, &clock())?];
        let right = "000000020000000100000001";
        assert_eq!(violations(&traffic, right)?, [""; 0]);
        let empty = concat!("\0\0\0\0\0\0\0\0", "00000001");
        assert_eq!(
            violations(&traffic, empty)?,
            [
                "counter 0: 0 in the file, 2 made",
                "counter 2: 0 in the file, 1 made"
            ]
        );
        assert!(violations(&traffic, "not some digits").is_err());
        let torn = [Traffic::parse("c2", "9.000000 w0 torn 0 1\n", &clock())?];
        assert_eq!(violations(&torn, "")?, ["c2: 9.000000 w0 torn 0 1"]);
        Ok(())
    }
}
