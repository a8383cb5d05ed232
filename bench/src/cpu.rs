//! Processor time and memory of processes, read from /proc.
//!
//! The scheduler's own account in nanoseconds (`schedstat` of every thread) is used, because the
//! clock ticks of `stat` are 10 ms, a tenth of what a short row costs. Threads that ended between
//! two samples are missing in it; then the difference of the ticks, which keeps them, is larger
//! and is taken.

use std::collections::HashMap;
use std::fs;

use anyhow::Context as _;

/// Nanoseconds in a clock tick (USER_HZ is 100 on every 64-bit Linux).
const TICK_NS: u64 = 10_000_000;

/// The processor time of a server's processes at one moment.
#[derive(Debug, Default)]
pub(crate) struct Sample {
    threads: HashMap<u32, u64>,
    ticks: u64,
}

impl Sample {
    /// Reads the processor time of all threads of `pids`.
    pub(crate) fn take(pids: &[u32]) -> anyhow::Result<Self> {
        let mut sample = Self::default();
        for pid in pids {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat"))
                .with_context(|| format!("process {pid} is gone"))?;
            // Behind the name, which may hold anything: state is field 3, utime 14, stime 15.
            let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            sample.ticks += fields
                .split_ascii_whitespace()
                .skip(11)
                .take(2)
                .filter_map(|field| field.parse::<u64>().ok())
                .sum::<u64>();
            for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
                let tid = task.file_name().to_str().and_then(|tid| tid.parse().ok());
                // A thread may end between listing and reading.
                let time = fs::read_to_string(task.path().join("schedstat")).ok();
                if let (Some(tid), Some(time)) = (tid, time) {
                    let time = time.split_ascii_whitespace().next();
                    let time = time.and_then(|time| time.parse().ok()).unwrap_or(0);
                    sample.threads.insert(tid, time);
                }
            }
        }
        Ok(sample)
    }

    /// Nanoseconds of processor time since `before`.
    pub(crate) fn since_ns(&self, before: &Self) -> u64 {
        let precise = self
            .threads
            .iter()
            .map(|(tid, time)| time - before.threads.get(tid).copied().unwrap_or(0).min(*time))
            .sum::<u64>();
        let ticks = (self.ticks - before.ticks.min(self.ticks)) * TICK_NS;
        if ticks > precise + 3 * TICK_NS {
            ticks
        } else {
            precise
        }
    }
}

/// Resident and peak resident memory in KiB, summed over `pids`.
pub(crate) fn memory_kib(pids: &[u32]) -> (u64, u64) {
    let (mut now, mut peak) = (0, 0);
    for pid in pids {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .and_then(|rest| rest.split_ascii_whitespace().next())
                .and_then(|value| value.parse::<u64>().ok())
                .unwrap_or(0)
        };
        now += field("VmRSS:");
        peak += field("VmHWM:");
    }
    (now, peak)
}

/// Processor time of the calling thread in nanoseconds.
pub(crate) fn own_thread_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
