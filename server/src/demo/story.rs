//! What happens, in order: start, two clients, the end of a node, what is left, the way back.
//!
//! Owns the order and the words. The checks are in [`super::proof`], the load in
//! [`super::writer`]; nothing here decides what a promise is. The story is the same on loopback
//! addresses and on a network of the nodes' own; what is seen only there is told in `address` and
//! `linux`.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use havenfs::random::random_u64;
use havenfs_nlm::wire::Nlm4Stats;

use super::client::nfs::Attributes;
use super::client::rpc::Machine;
use super::client::{Client, Export};
use super::cluster::{Active, Cluster, LOOK};
use super::interrupt;
use super::ledger::{Ledger, Lock};
use super::linux::Linux;
use super::proof::{
    all_locks_are_held, broken, handle_still_works, hears_of_it, is_granted, is_held, promised,
};
use super::site::{NODES, SERVICE_NAME};
use super::timeline::{Timeline, milliseconds};
use super::writer::{Load, read_back};

mod address;
mod after;
mod linux;
mod sleeper;

/// The file that has locks.
const LOCKED: &str = "account.dat";
/// The file that records are written into.
const JOURNAL: &str = "journal.txt";
/// How long the service may take to be served at first, or again.
const SERVE_TIME_MAX: Duration = Duration::from_secs(20);
/// How long a client may wait for a lock that is free.
const GRANT_TIME_MAX: Duration = Duration::from_secs(5);
/// What is written before a node dies: at least so long, and so much.
const LOAD_TIME: Duration = Duration::from_millis(1200);
const LOAD_RECORDS_MIN: usize = 100;
/// How much of the writing the strip shows around an outage.
const AROUND: Duration = Duration::from_millis(600);
/// Locks of client A that nobody waits for.
const MORE_LOCKS: u64 = 16;

/// How the active node is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT when another node has the service.
    Pause,
}

/// The people on the stage. Fields are dropped in this order: the load first.
struct Scene<'s, 'c> {
    load: Load,
    /// The client that is a Linux kernel, if there is one.
    linux: Option<Linux>,
    a: Client,
    b: Client,
    cluster: &'s mut Cluster<'c>,
    timeline: &'s Timeline,
    ledger: Arc<Ledger>,
    /// The number of this run, which is in every record.
    run: u32,
    journal: Vec<u8>,
    journal_before: Attributes,
    active: Active,
    account: Lock,
}

/// Tells the story.
///
/// # Errors
/// [`super::ledger::BrokenPromise`] if a promise was broken; any other if the story could not be
/// told.
pub(super) fn tell(
    cluster: &mut Cluster<'_>,
    timeline: &Timeline,
    ending: Ending,
) -> Result<String> {
    let began = Instant::now();
    timeline.section("Start", "since the start");
    let linux = linux::switch_on(cluster, timeline, began)?;
    let active = start(cluster, timeline, began)?;
    let mut scene = Scene::set(cluster, timeline, active, linux)?;
    scene.lock_and_write()?;
    let verdict = match ending {
        Ending::Kill => scene.kill_and_return()?,
        Ending::Pause => scene.pause()?,
    };
    scene.end()?;
    Ok(verdict)
}

fn start(cluster: &mut Cluster<'_>, timeline: &Timeline, began: Instant) -> Result<Active> {
    let site = cluster.site();
    timeline.detail(&format!("all files are in {}", site.root().display()));
    let leader = cluster.start()?;
    let nodes = NODES.join(", ");
    let text = format!("the nodes {nodes} have found each other; {leader} leads");
    timeline.step(began.elapsed(), &text);
    let active = cluster.wait_active(SERVE_TIME_MAX, |_| true)?;
    let active = active.context("no node begins to serve\nhint: the nodes' logs may say why")?;
    let (address, port) = (site.service(), site.ports.nfs);
    let text = format!(
        "{} serves {SERVICE_NAME} at {address}, NFS on port {port}: it is the active node",
        active.node
    );
    timeline.step(began.elapsed(), &text);
    address::is_with_its_node(cluster, timeline, active.node)?;
    Ok(active)
}

impl<'s, 'c> Scene<'s, 'c> {
    fn set(
        cluster: &'s mut Cluster<'c>,
        timeline: &'s Timeline,
        active: Active,
        linux: Option<Linux>,
    ) -> Result<Self> {
        timeline.section("The clients", "how long it took");
        let site = cluster.site();
        let ledger = Arc::new(Ledger::default());
        let export = Export {
            portmap: (site.service(), site.ports.portmap).into(),
            path: site.export().to_string_lossy().into_owned().into_bytes(),
            host_portmap_port: site.ports.host_portmap,
        };
        let began = Instant::now();
        let mount =
            |name, number| Client::mount(name, site.client(number), &export, LOCKED, &ledger);
        let (mut a, b) = (mount("A", 1)?, mount("B", 2)?);
        let text = format!(
            "client A ({}) and client B ({}) have mounted the export over NFSv3",
            site.client(1),
            site.client(2)
        );
        timeline.step(began.elapsed(), &text);
        let root = a.root.clone();
        let journal = a.nfs.create(&root, JOURNAL)?;
        let journal_before = a.nfs.getattr(&journal)?;
        let run = random_u64() as u32;
        let machine = Machine::start();
        let nfs = a.another_nfs(&machine);
        let account = a.lock(1, 0, 1000);
        let load = Load::start(nfs, journal.clone(), run, Arc::clone(&ledger), machine);
        let linux = linux::mount(linux, timeline)?;
        Ok(Self {
            load,
            linux,
            a,
            b,
            cluster,
            timeline,
            ledger,
            run,
            journal,
            journal_before,
            active,
            account,
        })
    }

    /// The request that waits for what client A has.
    fn waiting(&self) -> Lock {
        self.b
            .lock(1, self.account.bytes.first, self.account.bytes.count)
    }

    fn lock_and_write(&mut self) -> Result<()> {
        let began = Instant::now();
        let (a, b, account) = (&self.a, &self.b, self.account);
        is_granted(a.locks.lock(account, false)?, account)?;
        let text = format!("A locks {} of {LOCKED}: GRANTED", account.bytes);
        self.timeline.step(began.elapsed(), &text);
        let asked = Instant::now();
        let waiting = self.waiting();
        match b.locks.lock(waiting, true)? {
            Nlm4Stats::Blocked => {}
            Nlm4Stats::Granted => return self.given_away(),
            stat => return broken(format!("a LOCK that has to wait is answered {stat:?}")),
        }
        let text = format!("B wants the same {}: BLOCKED, and waits", waiting.bytes);
        self.timeline.step(asked.elapsed(), &text);
        let more = Instant::now();
        for number in 0..MORE_LOCKS {
            let lock = a.lock(2, 10_000 + number * 100, 10);
            is_granted(a.locks.lock(lock, false)?, lock)?;
        }
        let own = b.lock(2, 2000, 1000);
        is_granted(b.locks.lock(own, false)?, own)?;
        let text = format!("A locks {MORE_LOCKS} ranges more, B {}: GRANTED", own.bytes);
        self.timeline.step(more.elapsed(), &text);
        self.linux_locks_and_writes()?;
        self.locks_are_held()?;
        while began.elapsed() < LOAD_TIME || self.ledger.stable().len() < LOAD_RECORDS_MIN {
            self.ledger.check()?;
            if began.elapsed() > SERVE_TIME_MAX {
                return broken("client A's writes are not answered");
            }
            interrupt::sleep(LOOK)?;
        }
        let count = self.ledger.stable().len();
        let text = format!("A writes numbered records all the time: {count} acknowledged so far");
        self.timeline.step(None, &text);
        Ok(())
    }

    fn given_away<T>(&self) -> Result<T> {
        self.ledger.check()?;
        broken(format!(
            "client B was granted {}, which client A holds",
            self.account.bytes
        ))
    }

    /// The nodes are asked for every lock of the ledger.
    fn locks_are_held(&self) -> Result<()> {
        let began = Instant::now();
        let count = all_locks_are_held(&self.ledger, &self.a, &self.b)?;
        self.address_is_on_one_node()?;
        let text = format!("all {count} locks are held: TEST names the holder, LOCK is DENIED");
        self.timeline.step(began.elapsed(), &text);
        Ok(())
    }

    /// Every acknowledged record is read by client B, which has not written any.
    fn records_are_there(&mut self) -> Result<usize> {
        let began = Instant::now();
        let read = read_back(&mut self.b.nfs, &self.journal, self.run, &self.ledger);
        let count = promised(read, "acknowledged records cannot be read")?;
        handle_still_works(&mut self.b, JOURNAL, &self.journal, self.journal_before)?;
        let text = format!("all {count} acknowledged records are there, byte for byte");
        self.timeline.step(began.elapsed(), &text);
        Ok(count + self.linux_records_are_there()?)
    }

    fn kill_and_return(&mut self) -> Result<String> {
        let dead = self.active.node;
        let kill_gap = self.kill()?;
        self.takeover();
        self.timeline.section("What is left", "how long it took");
        self.records_are_there()?;
        self.locks_are_held()?;
        self.unlock()?;
        let (move_gap, records) = self.bring_back(dead)?;
        let locks = self.ledger.grants();
        Ok(format!(
            "{records} records and {locks} locks, none lost; gaps: loss {}, move {}",
            milliseconds(kill_gap),
            milliseconds(move_gap)
        ))
    }

    /// Kills the active node; returns the longest time without an answer to a WRITE.
    fn kill(&mut self) -> Result<Duration> {
        let old = self.active.clone();
        self.timeline
            .section(&format!("The end of {}", old.node), "since its end");
        let text = if self.cluster.bridge().is_some() {
            format!(
                "{} loses its power: its cable is dead, its processes are gone",
                old.node
            )
        } else {
            let process = self.cluster.process(old.node)?;
            format!("kill -9 of process {process}: {} is gone", old.node)
        };
        let killed = Instant::now();
        self.cluster.kill(old.node)?;
        self.timeline.step(Duration::ZERO, &text);
        let new = self.b.lock(3, 4000, 100);
        let stranger = self.b.another_lock_manager(&self.ledger);
        let (locks, account) = (&self.b.locks, self.account);
        let cluster = &mut *self.cluster;
        // Asked at once, and again and again until somebody answers, as clients do. So the answers
        // come before anybody hears of the restart and reclaims what may be forgotten.
        let (active, granted, kept) = thread::scope(|scope| {
            let asking = scope.spawn(|| (locks.lock(new, false), Instant::now()));
            let testing = scope.spawn(|| (is_held(&stranger, account), Instant::now()));
            let active = cluster.wait_active(SERVE_TIME_MAX, |active| active.node != old.node);
            (active, joined(asking), joined(testing))
        });
        let Some(active) = active? else {
            return broken(format!(
                "no other node serves after the end of {}",
                old.node
            ));
        };
        let since = |at: Instant| at.saturating_duration_since(killed);
        let mut events = Vec::new();
        let text = format!(
            "{} answers for the service, in epoch {}",
            active.node, active.epoch
        );
        events.push((active.at, text));
        let (stat, at) = granted;
        is_granted(promised(stat, "a new lock is not granted")?, new)?;
        events.push((at, format!("a new lock, {} for B: GRANTED", new.bytes)));
        let (held, at) = kept;
        held?;
        self.ledger.check()?;
        let text = format!("{} are still A's: a LOCK by B is DENIED", account.bytes);
        events.push((at, text));
        self.wait_for_writes(active.at)?;
        self.linux_goes_on(killed, active.at, &mut events)?;
        self.linux_has_reclaimed(active.node, &mut events)?;
        self.linux_locks_anew(&mut events)?;
        let (gap, resumed) = self.ledger.longest_gap(killed);
        let text = format!(
            "A's record that was under way is answered; the longest gap is {}",
            milliseconds(gap)
        );
        events.push((resumed, text));
        let mut heard_by = Vec::new();
        for client in [&self.a, &self.b] {
            let heard = hears_of_it(client, killed, &self.ledger)?;
            after::note_notice(client.name, &heard, &mut events);
            heard_by.push((client.name, heard));
        }
        self.address_has_moved(killed, active.node, &mut events)?;
        events.sort_by_key(|(at, _)| *at);
        for (at, text) in &events {
            self.timeline.step(since(*at), text);
        }
        for (client, heard) in heard_by {
            let (state, names) = (heard.nsm_state, heard.names.join(", "));
            let text = format!("client {client} was told state {state} of {names}");
            self.timeline.detail(&text);
        }
        // Nobody unlocked, so nobody may have got it.
        if !self.b.locks.waits_for(self.waiting()) {
            return self.given_away();
        }
        let to = resumed + AROUND;
        while Instant::now() < to {
            interrupt::sleep(LOOK)?;
        }
        let from = killed.checked_sub(AROUND).unwrap_or(killed);
        self.timeline.gap();
        self.timeline.step(None, "A's answered writes over time:");
        let back = format!("{} answers", active.node);
        let notes = [(killed, "loss"), (resumed, back.as_str())];
        self.timeline
            .strip(&self.ledger.answers(), from, to, &notes);
        self.linux_strip(from, to);
        self.active = active;
        Ok(gap)
    }

    fn wait_for_writes(&self, since: Instant) -> Result<()> {
        let deadline = Instant::now() + SERVE_TIME_MAX;
        while !self.ledger.has_answer_after(since) {
            self.ledger.check()?;
            if Instant::now() > deadline {
                return broken("client A's writes are not answered any more");
            }
            interrupt::sleep(LOOK)?;
        }
        Ok(())
    }

    /// Client A gives its lock back, and client B, which has waited all the time, gets it.
    fn unlock(&self) -> Result<()> {
        let waiting = self.waiting();
        let began = Instant::now();
        match promised(
            self.a.locks.unlock(self.account),
            "a lock cannot be given back",
        )? {
            Nlm4Stats::Granted => {}
            stat => return broken(format!("UNLOCK is answered {stat:?}")),
        }
        let Some(at) = self.b.locks.wait_granted(waiting, GRANT_TIME_MAX)? else {
            return broken("client B waits for a lock that is free, and is not called");
        };
        self.ledger.check()?;
        let text = format!("A unlocks {}, and B is called: GRANTED", waiting.bytes);
        self.timeline
            .step(at.saturating_duration_since(began), &text);
        self.linux_unlocks()
    }
}

/// What a thread has returned.
fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    let result = thread.join();
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
