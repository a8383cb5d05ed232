//! Counters: calls and their time by procedure, limits that were hit, refusals.
//!
//! Plain atomics that every task adds to; [`Metrics::render`] writes them in the text form that
//! Prometheus reads. Times are kept as a histogram with powers of four from 1 us.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use havenfs_rpc::program;

use crate::programs::nfs3;

const BUCKETS: usize = 12;
/// How many peers are remembered as warned about.
const WARNED_MAX: usize = 1024;

/// A number that only rises.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// The sum so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Calls of one procedure.
#[derive(Debug, Default)]
struct Procedure {
    calls: Counter,
    total_ns: Counter,
    buckets: [Counter; BUCKETS],
}

/// All counters of the process.
#[derive(Debug, Default)]
pub struct Metrics {
    nfs: [Procedure; 22],
    other: Counter,
    /// Messages that were no calls, or whose header was garbage.
    pub malformed: Counter,
    /// Connections accepted.
    pub connections: Counter,
    /// Connections refused because there were too many in all.
    pub limit_connections: Counter,
    /// Connections refused because their peer had too many.
    pub limit_connections_per_peer: Counter,
    /// Connections closed because a record was announced that is too long.
    pub limit_record_bytes: Counter,
    /// Connections closed because a record did not arrive whole in time.
    pub limit_record_time: Counter,
    /// Connections closed because replies were not read in time.
    pub limit_reply_time: Counter,
    /// Connections closed because nothing came for long.
    pub limit_idle_time: Counter,
    /// Times a connection had to wait because it had too much outstanding.
    pub limit_outstanding: Counter,
    /// Times a connection had to wait because all together had too many bytes.
    pub limit_bytes_in_all: Counter,
    /// Replies answered from the reply cache.
    pub replayed: Counter,
    /// Calls refused because of their source port.
    pub refused_port: Counter,
    warned: Mutex<HashSet<IpAddr>>,
}

impl Metrics {
    /// Counts a call and its time.
    pub fn called(&self, program: u32, procedure: u32, elapsed: Duration) {
        let Some(of) = (program == program::NFS)
            .then(|| self.nfs.get(procedure as usize))
            .flatten()
        else {
            self.other.add(1);
            return;
        };
        of.calls.add(1);
        let ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        of.total_ns.add(ns);
        let us = ns / 1000;
        let bucket =
            (us.checked_ilog2().map_or(0, |log| log.div_ceil(2)) as usize).min(BUCKETS - 1);
        if let Some(bucket) = of.buckets.get(bucket) {
            bucket.add(1);
        }
    }

    /// How many calls were served.
    pub fn calls(&self) -> u64 {
        self.nfs.iter().map(|of| of.calls.get()).sum::<u64>() + self.other.get()
    }

    /// Counts a call from a port that is not reserved; says once per peer what to do.
    pub fn refused_port(&self, peer: &SocketAddr, export: &Path) {
        self.refused_port.add(1);
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.len() < WARNED_MAX && warned.insert(peer.ip()) {
            tracing::warn!(
                %peer,
                export = %export.display(),
                "call refused: it comes from a port above 1023, and the export is `secure`; \
                 mount with the option resvport, or give the export the option insecure"
            );
        }
    }

    /// All counters in Prometheus' text form.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a string can't fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "# HELP havenfs_nfs_calls_total Calls of NFS by procedure."
        )?;
        writeln!(out, "# TYPE havenfs_nfs_calls_total counter")?;
        for (name, of) in nfs3::PROCEDURES.iter().zip(&self.nfs) {
            writeln!(
                out,
                "havenfs_nfs_calls_total{{procedure=\"{name}\"}} {}",
                of.calls.get()
            )?;
        }
        writeln!(
            out,
            "# HELP havenfs_nfs_call_seconds Time from the decoded header to the reply."
        )?;
        writeln!(out, "# TYPE havenfs_nfs_call_seconds histogram")?;
        for (name, of) in nfs3::PROCEDURES.iter().zip(&self.nfs) {
            if of.calls.get() == 0 {
                continue;
            }
            let mut sum = 0;
            for (log, bucket) in of.buckets.iter().enumerate() {
                sum += bucket.get();
                if log + 1 < BUCKETS {
                    let le = 4f64.powi(i32::try_from(log).unwrap_or(0)) / 1e6;
                    writeln!(
                        out,
                        "havenfs_nfs_call_seconds_bucket{{procedure=\"{name}\",le=\"{le}\"}} {sum}"
                    )?;
                }
            }
            writeln!(
                out,
                "havenfs_nfs_call_seconds_bucket{{procedure=\"{name}\",le=\"+Inf\"}} {sum}"
            )?;
            let seconds = Duration::from_nanos(of.total_ns.get()).as_secs_f64();
            writeln!(
                out,
                "havenfs_nfs_call_seconds_sum{{procedure=\"{name}\"}} {seconds}"
            )?;
            writeln!(
                out,
                "havenfs_nfs_call_seconds_count{{procedure=\"{name}\"}} {sum}"
            )?;
        }
        for (name, help, counter) in [
            (
                "other_calls",
                "Calls of MOUNT and the portmapper.",
                &self.other,
            ),
            ("malformed", "Messages that were no calls.", &self.malformed),
            ("connections", "Connections accepted.", &self.connections),
            (
                "replayed",
                "Replies answered from the reply cache.",
                &self.replayed,
            ),
            (
                "refused_port",
                "Calls refused because of their source port.",
                &self.refused_port,
            ),
        ] {
            writeln!(out, "# HELP havenfs_{name}_total {help}")?;
            writeln!(out, "# TYPE havenfs_{name}_total counter")?;
            writeln!(out, "havenfs_{name}_total {}", counter.get())?;
        }
        writeln!(out, "# HELP havenfs_limit_hit_total Times a limit was hit.")?;
        writeln!(out, "# TYPE havenfs_limit_hit_total counter")?;
        for (limit, counter) in self.limits() {
            writeln!(
                out,
                "havenfs_limit_hit_total{{limit=\"{limit}\"}} {}",
                counter.get()
            )?;
        }
        Ok(())
    }

    /// The limits and how often each was hit.
    pub const fn limits(&self) -> [(&'static str, &Counter); 8] {
        [
            ("connections", &self.limit_connections),
            ("connections_per_peer", &self.limit_connections_per_peer),
            ("record_bytes", &self.limit_record_bytes),
            ("record_time", &self.limit_record_time),
            ("reply_time", &self.limit_reply_time),
            ("idle_time", &self.limit_idle_time),
            ("outstanding", &self.limit_outstanding),
            ("bytes_in_all", &self.limit_bytes_in_all),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_counted_in_its_bucket() {
        let metrics = Metrics::default();
        metrics.called(program::NFS, 1, Duration::from_nanos(900));
        metrics.called(program::NFS, 1, Duration::from_micros(3));
        metrics.called(program::NFS, 1, Duration::from_hours(1));
        let text = metrics.render();
        for line in [
            "havenfs_nfs_calls_total{procedure=\"GETATTR\"} 3",
            "havenfs_nfs_call_seconds_bucket{procedure=\"GETATTR\",le=\"0.000001\"} 1",
            "havenfs_nfs_call_seconds_bucket{procedure=\"GETATTR\",le=\"0.000004\"} 2",
            "havenfs_nfs_call_seconds_bucket{procedure=\"GETATTR\",le=\"+Inf\"} 3",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }
}
