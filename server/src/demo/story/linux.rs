//! The part of client K, which is a real Linux kernel in a virtual machine.
//!
//! It does what programs do: it mounts, locks with fcntl(2) and writes. Where there is none,
//! nothing of this is told.

use std::time::Instant;

use anyhow::Result;
use havenfs_nlm::wire::Nlm4Stats;
use serde_json::Value;

use super::super::cluster::{Cluster, LOOK};
use super::super::guest;
use super::super::interrupt::{self, Interrupted};
use super::super::ledger::Lock;
use super::super::linux::{Linux, NAME, what_is_missing};
use super::super::proof::{broken, promised};
use super::super::site::GUEST;
use super::super::timeline::{Timeline, milliseconds};
use super::super::writer::read_back;
use super::{GRANT_TIME_MAX, SERVE_TIME_MAX, Scene};

/// The bytes that it locks, and those that it asks for when another node has the service.
const FIRST: Lock = Linux::owns(20_000, 1000);
const SECOND: Lock = Linux::owns(22_000, 100);
/// What its kernel may say of this service and nothing else: that something went wrong.
const COMPLAINTS: [&str; 8] = [
    "nfs",
    "NFS",
    "lockd",
    "RPC",
    "statd",
    "BUG",
    "WARNING",
    "blocked for",
];

/// Switches a machine with a Linux kernel on, if there can be one.
pub(super) fn switch_on(
    cluster: &Cluster<'_>,
    timeline: &Timeline,
    began: Instant,
) -> Result<Option<Linux>> {
    let Some(bridge) = cluster.bridge() else {
        return Ok(None);
    };
    if let Some(why) = what_is_missing() {
        without(timeline, &why);
        return Ok(None);
    }
    let machine = bridge
        .add_guest()
        .and_then(|()| Linux::switch_on(cluster.site()));
    match machine {
        Ok(machine) => {
            timeline.step(
                began.elapsed(),
                "a virtual machine with Linux begins to boot",
            );
            Ok(Some(machine))
        }
        Err(error) if error.is::<Interrupted>() => Err(error),
        Err(error) => {
            without(timeline, &format!("{error:#}"));
            Ok(None)
        }
    }
}

/// Waits until the machine has booted, and has it mount the export.
pub(super) fn mount(linux: Option<Linux>, timeline: &Timeline) -> Result<Option<Linux>> {
    let Some(mut linux) = linux else {
        return Ok(None);
    };
    let began = Instant::now();
    let kernel = match linux.wait_up() {
        Ok(kernel) => kernel,
        Err(error) if error.is::<Interrupted>() => return Err(error),
        Err(error) => {
            without(timeline, &format!("{error:#}"));
            return Ok(None);
        }
    };
    let text = format!("client {NAME}, a virtual machine with {kernel}, has booted");
    timeline.step(began.elapsed(), &text);
    let began = Instant::now();
    promised(linux.mount(), "a Linux kernel cannot mount the export")?;
    let text = format!("{NAME}'s kernel has mounted it: mount -t nfs -o vers=3 nfs-service:/...");
    timeline.step(began.elapsed(), &text);
    Ok(Some(linux))
}

fn without(timeline: &Timeline, why: &str) {
    let text = format!("no Linux kernel takes part, built-in clients do: {why}");
    timeline.step(None, &text);
}

impl Scene<'_, '_> {
    /// Has K lock and begin to write, and B wait for what K has.
    pub(super) fn linux_locks_and_writes(&self) -> Result<()> {
        let Some(linux) = &self.linux else {
            return Ok(());
        };
        let began = Instant::now();
        promised(linux.lock(FIRST), "a Linux kernel is not given a free lock")?;
        self.ledger.granted(FIRST);
        let text = format!("{NAME} locks {} with fcntl(2): it has them", FIRST.bytes);
        self.timeline.step(began.elapsed(), &text);
        let asked = Instant::now();
        let waiting = self.waiting_for_linux();
        let stat = self.b.locks.lock(waiting, true)?;
        if stat != Nlm4Stats::Blocked {
            self.ledger.check()?;
            return broken(format!("a LOCK that has to wait is answered {stat:?}"));
        }
        let text = format!("B wants the same {}: BLOCKED, and waits", waiting.bytes);
        self.timeline.step(asked.elapsed(), &text);
        linux.write(self.run)
    }

    /// The request that waits for what K has.
    fn waiting_for_linux(&self) -> Lock {
        self.b.lock(4, FIRST.bytes.first, FIRST.bytes.count)
    }

    /// Has K lock anew. Not before its writes go on: a lock manager whose call was under way when
    /// its connection ended pauses 5 s by itself, whoever answers.
    pub(super) fn linux_locks_anew(&self, events: &mut Vec<(Instant, String)>) -> Result<()> {
        let Some(linux) = &self.linux else {
            return Ok(());
        };
        promised(linux.lock(SECOND), "a Linux kernel is not given a new lock")?;
        self.ledger.granted(SECOND);
        let text = format!("a new lock, {} for {NAME}'s kernel: GRANTED", SECOND.bytes);
        events.push((Instant::now(), text));
        Ok(())
    }

    /// Waits until K's writes are answered after `since`, and tells the gap.
    pub(super) fn linux_goes_on(
        &self,
        from: Instant,
        since: Instant,
        events: &mut Vec<(Instant, String)>,
    ) -> Result<()> {
        let Some(linux) = &self.linux else {
            return Ok(());
        };
        let deadline = Instant::now() + SERVE_TIME_MAX;
        while !linux.ledger.has_answer_after(since) {
            linux.ledger.check()?;
            if Instant::now() > deadline {
                return broken(format!("client {NAME}'s writes are not answered any more"));
            }
            interrupt::sleep(LOOK)?;
        }
        let (gap, at) = linux.ledger.longest_gap(from);
        let gap = milliseconds(gap);
        let text = format!("{NAME}'s kernel writes on; the longest gap of its program is {gap}");
        events.push((at, text));
        Ok(())
    }

    /// Waits until K's kernel has heard of the new node and has asked for its locks again. The node
    /// tells, since a kernel says nothing of it.
    pub(super) fn linux_has_reclaimed(
        &self,
        node: &str,
        events: &mut Vec<(Instant, String)>,
    ) -> Result<()> {
        if self.linux.is_none() {
            return Ok(());
        }
        let request = format!("host {}", self.cluster.site().client(GUEST));
        let deadline = Instant::now() + SERVE_TIME_MAX;
        loop {
            let answer = self.cluster.ask(node, &request).unwrap_or_default();
            let locks = answer.pointer("/locks/entries").and_then(Value::as_array);
            let confirmed =
                |lock: &Value| lock.get("confirmed").and_then(Value::as_bool) == Some(true);
            if locks.is_some_and(|locks| !locks.is_empty() && locks.iter().all(confirmed)) {
                let text =
                    format!("{NAME}'s statd was told, and its kernel has reclaimed its lock");
                events.push((Instant::now(), text));
                return Ok(());
            }
            if Instant::now() > deadline {
                return broken(format!("client {NAME} hears of no restart: {answer}"));
            }
            interrupt::sleep(LOOK)?;
        }
    }

    /// K's writes, under those of client A.
    pub(super) fn linux_strip(&self, from: Instant, to: Instant) {
        if let Some(linux) = &self.linux {
            self.timeline
                .step(None, &format!("{NAME}'s, by its kernel:"));
            self.timeline.strip(&linux.ledger.answers(), from, to, &[]);
        }
    }

    /// Every record that K's kernel was told is stable is read by client B; returns how many.
    pub(super) fn linux_records_are_there(&mut self) -> Result<usize> {
        let Some(linux) = &self.linux else {
            return Ok(0);
        };
        let began = Instant::now();
        linux.ledger.check()?;
        let root = self.b.root.clone();
        let found = self.b.nfs.lookup(&root, guest::JOURNAL);
        let fh = promised(found, "a file of a Linux client is not found")?;
        let read = read_back(&mut self.b.nfs, &fh, self.run, &linux.ledger);
        let count = promised(read, "records of a Linux client cannot be read")?;
        let text = format!("all {count} records that {NAME}'s kernel took for stable are there");
        self.timeline.step(began.elapsed(), &text);
        Ok(count)
    }

    /// K gives its lock back, and B, which has waited all the time, gets it.
    pub(super) fn linux_unlocks(&self) -> Result<()> {
        let Some(linux) = &self.linux else {
            return Ok(());
        };
        let waiting = self.waiting_for_linux();
        if !self.b.locks.waits_for(waiting) {
            self.ledger.check()?;
            let bytes = waiting.bytes;
            return broken(format!("client B was granted {bytes}, which K holds"));
        }
        let began = Instant::now();
        self.ledger.release(FIRST);
        promised(
            linux.unlock(FIRST),
            "a Linux kernel cannot give a lock back",
        )?;
        let Some(at) = self.b.locks.wait_granted(waiting, GRANT_TIME_MAX)? else {
            return broken("client B waits for a lock that is free, and is not called");
        };
        self.ledger.check()?;
        let text = format!("{NAME} unlocks {}, and B is called: GRANTED", waiting.bytes);
        self.timeline
            .step(at.saturating_duration_since(began), &text);
        Ok(())
    }

    /// K stops writing.
    pub(super) fn linux_stops(&self) -> Result<()> {
        match &self.linux {
            Some(linux) => promised(linux.stop(), "a Linux client cannot end its writes"),
            None => Ok(()),
        }
    }

    /// K gives back what it has and unmounts; its kernel must have nothing to complain of.
    pub(super) fn linux_leaves(&mut self) -> Result<()> {
        let Some(linux) = &mut self.linux else {
            return Ok(());
        };
        let began = Instant::now();
        self.ledger.release(SECOND);
        promised(
            linux.unlock(SECOND),
            "a Linux kernel cannot give a lock back",
        )?;
        let log = promised(linux.kernel_log(), "a Linux client does not tell its log")?;
        let complains = |line: &&String| COMPLAINTS.iter().any(|words| line.contains(words));
        if let Some(line) = log.iter().find(complains) {
            return broken(format!("{NAME}'s kernel says: {line}"));
        }
        promised(
            linux.switch_off(),
            "a Linux kernel cannot unmount the export",
        )?;
        let text = format!("{NAME} has unmounted, and its kernel log has no word of all this");
        self.timeline.step(began.elapsed(), &text);
        Ok(())
    }
}
