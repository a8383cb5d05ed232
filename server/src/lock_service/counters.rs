//! What has happened to locks in this process, counted for the metrics page.
//!
//! Not replicated: after a takeover each number begins anew, as that of any process does.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use havenfs_nlm::limits::Limit;
use havenfs_nlm::wire::{Nlm4Stats, procedure};

use super::unix_seconds;
use crate::metrics::Counter;

/// The procedures that are counted by status, with their names; a `_MSG` form counts as the
/// procedure whose form it is.
const PROCEDURES: [(u32, &str); 7] = [
    (procedure::TEST, "TEST"),
    (procedure::LOCK, "LOCK"),
    (procedure::CANCEL, "CANCEL"),
    (procedure::UNLOCK, "UNLOCK"),
    (procedure::SHARE, "SHARE"),
    (procedure::UNSHARE, "UNSHARE"),
    (procedure::NM_LOCK, "NM_LOCK"),
];
const STATUSES: usize = Nlm4Stats::ALL.len();

/// The counters of locking.
#[derive(Debug, Default)]
pub struct LockCounters {
    calls: [[Counter; STATUSES]; PROCEDURES.len()],
    limits: [Counter; Limit::ALL.len()],
    /// Changes of the replicated state that were carried out.
    pub changes: Counter,
    /// Nanoseconds that these took, from the proposal until they were on disk and carried out.
    change_ns: Counter,
    /// Changes whose fate is unknown, so that their calls were not answered.
    pub changes_unknown: Counter,
    /// Reclaims that were granted.
    pub reclaims_granted: Counter,
    /// Reclaims that were granted although the table did not have the lock, outside grace.
    pub reclaims_unknown: Counter,
    /// Reclaims that were refused: programs of the host work on without their locks.
    pub reclaims_refused: Counter,
    /// Times that a host was told of a lock that it waited for.
    pub grants_told: Counter,
    /// Times that a host could not be told.
    pub grants_untold: Counter,
    /// Grants that their hosts confirmed.
    pub grants_confirmed: Counter,
    /// Grants that their hosts refused.
    pub grants_refused: Counter,
    /// Reboots of hosts that were believed.
    pub reboots: Counter,
    /// Notices of reboots that changed nothing: seen before, or of a host that is not known.
    pub notices_ignored: Counter,
    /// Notices of reboots that were not from a reserved port, or had a bad name.
    pub notices_refused: Counter,
    /// Locks that ended by a reboot of their hosts.
    pub locks_rebooted: Counter,
    /// Locks that an operator broke.
    pub locks_broken: Counter,
    /// Writes that were refused, since an operator said so.
    pub writes_refused: Counter,
    /// When a refused reclaim was warned of, in seconds since 1970.
    warned: AtomicU64,
}

impl LockCounters {
    /// Counts the answer to a call.
    pub fn answered(&self, procedure: u32, stat: Nlm4Stats) {
        let of = PROCEDURES
            .iter()
            .position(|(number, _)| *number == procedure);
        let counters = of.and_then(|of| self.calls.get(of));
        if let Some(counter) = counters.and_then(|of| of.get(stat.number() as usize)) {
            counter.add(1);
        }
    }

    /// Counts a change that was carried out.
    pub fn changed(&self, took: Duration) {
        self.changes.add(1);
        self.change_ns
            .add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Counts a reclaim that was refused; returns whether to warn of it: once a second at most.
    pub fn reclaim_refused(&self) -> bool {
        self.reclaims_refused.add(1);
        let now = unix_seconds().into();
        self.warned.swap(now, Ordering::Relaxed) != now
    }

    /// Counts a limit that was hit.
    pub fn limit_hit(&self, limit: Limit) {
        if let Some(counter) = self.limits.get(limit as usize) {
            counter.add(1);
        }
    }

    /// The limits of the table, and how often each was hit.
    pub fn limits(&self) -> impl Iterator<Item = (Limit, u64)> {
        let counts = self.limits.iter().map(Counter::get);
        Limit::ALL.into_iter().zip(counts)
    }

    /// All of it in Prometheus' text form.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a string can't fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        head(out, "nlm_calls", "Calls of NLM by procedure and status.")?;
        for ((_, name), of) in PROCEDURES.iter().zip(&self.calls) {
            for (status, counter) in Nlm4Stats::ALL.iter().zip(of) {
                writeln!(
                    out,
                    "havenfs_nlm_calls_total{{procedure=\"{name}\",status=\"{status:?}\"}} {}",
                    counter.get()
                )?;
            }
        }
        head(
            out,
            "lock_limit_hit",
            "Times a limit of the lock table was hit.",
        )?;
        for (limit, count) in self.limits() {
            let name = limit.name();
            writeln!(
                out,
                "havenfs_lock_limit_hit_total{{limit=\"{name}\"}} {count}"
            )?;
        }
        for (name, help, counter) in self.plain() {
            head(out, name, help)?;
            writeln!(out, "havenfs_{name}_total {}", counter.get())?;
        }
        let name = "change_seconds";
        head(out, name, "Time until changes were on disk and made.")?;
        let seconds = Duration::from_nanos(self.change_ns.get()).as_secs_f64();
        writeln!(out, "havenfs_{name}_total {seconds}")
    }

    const fn plain(&self) -> [(&'static str, &'static str, &Counter); 15] {
        [
            ("changes", "Changes of locks that were made.", &self.changes),
            (
                "changes_unknown",
                "Changes of locks whose fate is unknown.",
                &self.changes_unknown,
            ),
            (
                "reclaims_granted",
                "Reclaims of locks that were granted.",
                &self.reclaims_granted,
            ),
            (
                "reclaims_unknown",
                "Reclaims of locks that were not known, granted all the same.",
                &self.reclaims_unknown,
            ),
            (
                "reclaims_refused",
                "Reclaims of locks that were refused.",
                &self.reclaims_refused,
            ),
            (
                "grants_told",
                "Times a host was told of a lock it waited for.",
                &self.grants_told,
            ),
            (
                "grants_untold",
                "Times a host could not be told of a lock.",
                &self.grants_untold,
            ),
            (
                "grants_confirmed",
                "Grants that hosts confirmed.",
                &self.grants_confirmed,
            ),
            (
                "grants_refused",
                "Grants that hosts refused.",
                &self.grants_refused,
            ),
            ("host_reboots", "Reboots of hosts.", &self.reboots),
            (
                "notices_ignored",
                "Notices of reboots that changed nothing.",
                &self.notices_ignored,
            ),
            (
                "notices_refused",
                "Notices of reboots that were refused.",
                &self.notices_refused,
            ),
            (
                "locks_rebooted",
                "Locks that ended by a reboot of their hosts.",
                &self.locks_rebooted,
            ),
            (
                "locks_broken",
                "Locks that an operator broke.",
                &self.locks_broken,
            ),
            (
                "writes_refused",
                "Writes refused to hosts whose locks were broken.",
                &self.writes_refused,
            ),
        ]
    }
}

fn head(out: &mut String, name: &str, help: &str) -> std::fmt::Result {
    writeln!(out, "# HELP havenfs_{name}_total {help}")?;
    writeln!(out, "# TYPE havenfs_{name}_total counter")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_is_counted_under_its_name() {
        let counters = LockCounters::default();
        counters.answered(procedure::LOCK, Nlm4Stats::Blocked);
        counters.answered(procedure::LOCK, Nlm4Stats::Blocked);
        counters.answered(procedure::NULL, Nlm4Stats::Granted);
        counters.limit_hit(Limit::LocksPerFile);
        counters.changed(Duration::from_millis(1500));
        let text = counters.render();
        for line in [
            "havenfs_nlm_calls_total{procedure=\"LOCK\",status=\"Blocked\"} 2",
            "havenfs_nlm_calls_total{procedure=\"LOCK\",status=\"Granted\"} 0",
            "havenfs_lock_limit_hit_total{limit=\"locks_per_file\"} 1",
            "havenfs_changes_total 1",
            "havenfs_change_seconds_total 1.5",
        ] {
            assert!(text.lines().any(|of| of == line), "{line} in\n{text}");
        }
    }
}
