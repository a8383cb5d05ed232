//! The usual scene of a failover: a cluster, a client that holds locks and writes, another one that
//! wants the same locks. And what must be so whenever something has happened to the cluster.
//!
//! Owns the order of a [`Scene::case`]: what is looked at before, during and after, and the line of
//! figures that it prints. What happens is the tests' business.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::lab::capture::Capture;
use havenfs_tests::lab::clock::Micros;
use havenfs_tests::lab::cluster::{Cluster, Plan, Service, Serving};
use havenfs_tests::lab::locks::{Actor, Lock, Locker};
use havenfs_tests::lab::records::{Records, wait_for_records};
use havenfs_tests::lab::site::in_lab;
use havenfs_tests::lab::{Lab, Machine, Process, Vm};

use crate::silence::Silence;

/// The service that most tests are about.
pub(crate) const ALPHA: Service = Service {
    name: "alpha",
    names: &["nfs-service"],
    addresses: &["10.77.0.100/24"],
    export: "/srv/export",
    preferred: "n1",
};

/// How a scene is set.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) plan: Plan,
    /// Whether clients hear SM_NOTIFY.
    pub(crate) has_notices: bool,
    /// What clients mount from: a name of the first service.
    pub(crate) mounted: &'static str,
    /// More options of the mount.
    pub(crate) options: &'static str,
}

impl Setting {
    /// One service, three nodes with data.
    pub(crate) fn usual(has_notices: bool) -> Self {
        Self {
            plan: Plan {
                services: vec![ALPHA],
                ..Plan::default()
            },
            has_notices,
            mounted: "nfs-service",
            options: "vers=3",
        }
    }
}

/// Cluster and clients.
pub(crate) struct Scene<'s> {
    pub(crate) lab: &'s Lab,
    pub(crate) cluster: Cluster<'s>,
    pub(crate) setting: Setting,
    /// Holds locks and writes.
    pub(crate) c1: &'s Vm<'s>,
    /// Wants them.
    pub(crate) c2: &'s Vm<'s>,
    here: &'s Locker<'s>,
    there: &'s Locker<'s>,
    holder: Actor<'s>,
    contender: Actor<'s>,
    waiter: Actor<'s>,
    fresh: [Actor<'s>; 2],
    /// How many cases there were.
    cases: u64,
    writer: Process,
    pub(crate) capture: Capture,
    /// Of the node that lost the service last.
    pub(crate) silence: Option<Silence>,
}

/// What a case is to do to the service.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Expected {
    /// Another node takes it when the lease is over.
    Takeover,
    /// It is handed over.
    Move,
    /// Some node takes it, perhaps the same, perhaps several times.
    Again,
    /// It may stay where it is.
    Any,
    /// It stays where it is.
    Nothing,
}

/// Sets a scene, and looks in the end whether anything that was acknowledged is lost.
pub(crate) fn in_scene(
    name: &str,
    setting: &Setting,
    test: impl FnOnce(&mut Scene<'_>) -> Result<()>,
) -> Result<()> {
    in_lab(name, |lab| {
        let mut cluster = Cluster::new(lab, setting.plan.clone())?;
        cluster.spawn_all()?;
        let (c1, c2) = boot_two(lab)?;
        cluster.wait_started()?;
        // From the beginning of the connections on.
        let capture = lab.capture("bridge")?;
        for client in [&c1, &c2] {
            mount(client, setting)?;
        }
        let (here, there) = (c1.locker()?, c2.locker()?);
        let holder = here.actor(LOCKED)?;
        for lock in [HELD, ALSO_HELD] {
            must(&holder, lock)?;
        }
        let fresh = [there.actor("/mnt/fresh")?, there.actor("/mnt/fresher")?];
        // The second client is known to the server as well before anything happens.
        must(&fresh[0], Lock::exclusive(0, 1))?;
        if !setting.has_notices {
            c1.drop_notices()?;
            c2.drop_notices()?;
        }
        let mut scene = Scene {
            lab,
            setting: setting.clone(),
            contender: there.actor(LOCKED)?,
            waiter: there.actor(LOCKED)?,
            writer: c1.spawn_writer(JOURNAL)?,
            capture,
            cluster,
            c1: &c1,
            c2: &c2,
            here: &here,
            there: &there,
            holder,
            fresh,
            cases: 0,
            silence: None,
        };
        wait_for_records(&scene.writer, SOME, START_TIME_MAX)?;
        let outcome = test(&mut scene);
        if let Err(error) = outcome {
            eprintln!("{}\n{}", c1.console_tail(), c2.console_tail());
            return Err(error);
        }
        if setting.plan.fault.is_some() {
            return Ok(());
        }
        scene.capture.end()?;
        scene.silence_goes_on()?;
        scene.nothing_is_lost()
    })
}

/// The checks are checked: this must fail, and say some of these words.
pub(crate) fn is_caught(outcome: Result<()>, words: &[&str]) -> Result<()> {
    let error = outcome.err().context("nobody has noticed")?;
    let said = format!("{error:#}");
    let is_meant = words.iter().any(|words| said.contains(words));
    ensure!(is_meant, "something else was noticed: {said}");
    let first: String = said.chars().take(CAUGHT_SHOWN).collect();
    eprintln!("failover: caught: {first}");
    Ok(())
}

impl<'s> Scene<'s> {
    /// Lets something happen and looks at every promise, then puts it right and looks again.
    ///
    /// Both are told who served when the case began.
    pub(crate) fn case(
        &mut self,
        name: &str,
        expected: Expected,
        happens: impl FnOnce(&mut Cluster<'s>, Serving) -> Result<()>,
        put_right: impl FnOnce(&mut Cluster<'s>, Serving) -> Result<()>,
    ) -> Result<()> {
        self.one_case(name, expected, happens, put_right)
            .with_context(|| format!("case `{name}`"))
    }

    fn one_case(
        &mut self,
        name: &str,
        expected: Expected,
        happens: impl FnOnce(&mut Cluster<'s>, Serving) -> Result<()>,
        put_right: impl FnOnce(&mut Cluster<'s>, Serving) -> Result<()>,
    ) -> Result<()> {
        let before = self.cluster.wait_serving(ALPHA.name, |_| true)?;
        self.silence_goes_on()?;
        let notices = self.c1.notices()?;
        must_not(&self.contender, HELD)?;
        self.waiter.ask_blocked(HELD)?;
        self.read_clocks()?;
        self.somebody_is_known(before)?;
        let records = self.records()?.count();

        let began = now();
        happens(&mut self.cluster, before)?;
        let happened = now();
        self.cases += 1;
        let new = Lock::exclusive(self.cases, 1);
        self.fresh[0].ask(new)?;
        // What the holder has is not given away, whenever it is asked for.
        self.contender.begin_to_try(HELD)?;
        let after = self
            .cluster
            .wait_serving(ALPHA.name, |after| match expected {
                Expected::Takeover | Expected::Move => after.node != before.node,
                Expected::Again => after.epoch > before.epoch,
                Expected::Nothing | Expected::Any => true,
            })?;
        self.fresh[1].ask(new)?;
        let given = self.contender.was_given(RECONNECT_TIME_MAX)?;
        ensure!(!given, "the other client got {HELD:?}");
        let mut new_lock = Micros::MAX;
        for fresh in &self.fresh {
            let acquired = fresh.acquired(RECONNECT_TIME_MAX).context("a new lock")?;
            new_lock = new_lock.min(self.there.ours(&acquired)?.0 - began);
        }
        wait_for_records(&self.writer, SOME, RECONNECT_TIME_MAX)?;
        let heard = self.notices_since(notices, expected)?;
        let reclaims = self.reclaims(before, after)?;
        self.waiter.still_blocked()?;
        self.holder.unlock(HELD)?;
        self.waiter.acquired(GRANT_TIME_MAX).context("the waiter")?;
        self.waiter.unlock(HELD)?;
        must(&self.holder, HELD)?;
        for fresh in &self.fresh {
            fresh.unlock(new)?;
        }
        let gap = self.records()?.longest_gap(records);

        put_right(&mut self.cluster, before)?;
        let last = self.cluster.wait_serving(ALPHA.name, |_| true)?;
        wait_for_records(&self.writer, SOME, RECONNECT_TIME_MAX)?;
        must_not(&self.contender, HELD)?;
        must_not(&self.contender, ALSO_HELD)?;
        let phases = self.cluster.service(after.node, ALPHA.name);
        let phases = phases.map_or_else(Vec::new, |told| told.phases);
        eprintln!(
            "failover: {name}: {} -> {} (epoch {} -> {}), longest gap of writes {} ms, new lock \
             after {} ms, {reclaims} reclaims, {heard} notices; phases {}",
            before.node,
            after.node,
            before.epoch,
            last.epoch,
            gap.as_millis(),
            new_lock / 1000,
            phases
                .iter()
                .map(|(name, ms)| format!("{name} {ms}"))
                .collect::<Vec<_>>()
                .join(", ")
        );
        ensure!(
            last.epoch == after.epoch,
            "taken twice: {after:?}, {last:?}"
        );
        if expected == Expected::Nothing {
            ensure!(after == before, "{before:?}, {after:?}");
        }
        if after.epoch > before.epoch {
            self.new_node_arrives(before, after, began)?;
        }
        if before.node != after.node {
            self.old_node_is_silent(expected, before, after, [began, happened])?;
            self.nothing_is_left_on(before.node)?;
        }
        self.kernels_do_not_complain()
    }

    /// What the writer was told so far.
    pub(crate) fn records(&self) -> Result<Records> {
        Records::of(&self.writer)
    }

    /// The waiter gets in line; returns who serves.
    pub(crate) fn line_up(&self) -> Result<&'static str> {
        self.waiter.ask_blocked(HELD)?;
        Ok(self.cluster.wait_serving(ALPHA.name, |_| true)?.node)
    }

    /// Takes the power of the holder's machine away.
    pub(crate) fn power_of_the_holder_goes(&mut self) -> Result<()> {
        self.writer.kill()?;
        self.c1.kill()
    }

    /// Nobody else gets what it holds.
    pub(crate) fn holder_still_has_its_lock(&self) -> Result<()> {
        self.waiter.still_blocked()?;
        must_not(&self.contender, HELD)
    }

    /// The waiter gets what it waits for.
    pub(crate) fn waiter_is_served(&self) -> Result<()> {
        self.waiter
            .acquired(REBOOT_TIME_MAX)
            .context("the waiter")?;
        must(&self.contender, ALSO_HELD)
    }

    /// How many notices the holder's machine has heard since there were so many.
    fn notices_since(&self, before: usize, expected: Expected) -> Result<usize> {
        let deadline = Instant::now() + NOTIFY_TIME_MAX;
        loop {
            let heard = self.c1.notices()? - before;
            if !self.setting.has_notices {
                ensure!(heard == 0, "{heard} notices were heard");
                return Ok(0);
            }
            if heard > 0 || matches!(expected, Expected::Nothing | Expected::Any) {
                return Ok(heard);
            }
            ensure!(Instant::now() < deadline, "no SM_NOTIFY was heard");
            thread::sleep(POLL);
        }
    }

    /// How many locks clients have claimed again from a node that was given the service: all that
    /// they had, if they were told.
    fn reclaims(&self, before: Serving, after: Serving) -> Result<u64> {
        let is_due = self.setting.has_notices && after.epoch > before.epoch;
        let deadline = Instant::now() + NOTIFY_TIME_MAX;
        loop {
            // Counted anew in each epoch.
            let counter = "havenfs_reclaims_granted_total";
            let reclaims = self.cluster.counter(after.node, counter)?;
            if !is_due || reclaims >= LOCKS_HELD {
                return Ok(reclaims);
            }
            ensure!(
                Instant::now() < deadline,
                "{reclaims} of {LOCKS_HELD} locks were reclaimed"
            );
            thread::sleep(POLL);
        }
    }

    fn read_clocks(&self) -> Result<()> {
        self.here.read_clock()?;
        self.there.read_clock()
    }

    /// What the clients' kernels say is harmless.
    pub(crate) fn kernels_do_not_complain(&self) -> Result<()> {
        for client in [self.c1, self.c2] {
            let log = client.sh("dmesg")?;
            let lines = |words: &[&str]| -> Vec<String> {
                let lines = log.lines();
                lines
                    .filter(|line| words.iter().any(|word| line.contains(word)))
                    .map(str::to_owned)
                    .collect()
            };
            let waits = lines(&WAITS);
            if !waits.is_empty() {
                eprintln!(
                    "  {} said {} times that it waits",
                    client.name(),
                    waits.len()
                );
            }
            let mut complaints = lines(&COMPLAINTS);
            complaints.retain(|line| !waits.contains(line));
            ensure!(complaints.is_empty(), "{}: {complaints:#?}", client.name());
        }
        Ok(())
    }

    /// Ends the writing, and waits until the file is as long as it has to be.
    pub(crate) fn end_writing(&mut self) -> Result<()> {
        self.writer.kill()?;
        let records = Records::of(&self.writer)?;
        let deadline = Instant::now() + START_TIME_MAX;
        loop {
            let file = self.cluster.file_in_the_end(ALPHA.name, "journal")?;
            if !records
                .losses(&file)
                .iter()
                .any(|loss| loss.ends_with("None"))
            {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the file stays too short");
            thread::sleep(POLL);
        }
    }

    /// Every record that was acknowledged is in the file. Nothing happens after that.
    pub(crate) fn nothing_is_lost(&mut self) -> Result<()> {
        // What is answered from now on may come too late to be in the file.
        let records = Records::of(&self.writer)?;
        let file = self.cluster.file_in_the_end(ALPHA.name, "journal")?;
        let losses = records.losses(&file);
        eprintln!("failover: {} records were acknowledged", records.count());
        ensure!(losses.is_empty(), "acknowledged, but lost: {losses:#?}");
        Ok(())
    }
}

/// Boots two clients at once.
fn boot_two(lab: &Lab) -> Result<(Vm<'_>, Vm<'_>)> {
    let machine = Machine {
        locks: true,
        ..Machine::default()
    };
    thread::scope(|scope| {
        let second = scope.spawn(|| lab.boot("c2", &machine));
        let first = lab.boot("c1", &machine);
        let panicked = |panic| std::panic::resume_unwind(panic);
        Ok((first?, second.join().unwrap_or_else(panicked)?))
    })
}

fn mount(client: &Vm<'_>, setting: &Setting) -> Result<()> {
    let Setting {
        mounted, options, ..
    } = setting;
    let export = ALPHA.export;
    client.sh(&format!(
        "mount -t nfs -o {options} {mounted}:{export} /mnt"
    ))?;
    Ok(())
}

#[track_caller]
fn must(actor: &Actor<'_>, lock: Lock) -> Result<()> {
    let caller = std::panic::Location::caller();
    ensure!(
        actor.try_lock(lock)?,
        "{caller}: {actor} must get {lock:?}, but does not"
    );
    Ok(())
}

#[track_caller]
fn must_not(actor: &Actor<'_>, lock: Lock) -> Result<()> {
    let caller = std::panic::Location::caller();
    ensure!(!actor.try_lock(lock)?, "{caller}: {actor} got {lock:?}");
    Ok(())
}

/// This machine's clock, which captures have as well.
pub(crate) fn now() -> Micros {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_micros() as Micros)
}

/// How much is shown of what was caught.
const CAUGHT_SHOWN: usize = 300;
const LOCKED: &str = "/mnt/locked";
const JOURNAL: &str = "/mnt/journal";
/// The lock that all is about.
const HELD: Lock = Lock::exclusive(0, 100);
/// One that nobody touches in a case.
const ALSO_HELD: Lock = Lock::exclusive(200, 10);
/// Both of them, and one of the second client.
const LOCKS_HELD: u64 = 3;
/// How many records show that writing goes on.
pub(crate) const SOME: usize = 10;
/// What a kernel says while it waits for a server.
const WAITS: [&str; 2] = ["not responding", " OK"];
/// What a kernel says when something was lost.
const COMPLAINTS: [&str; 4] = [
    "lockd: ",
    "tale file handle",
    "I/O error",
    "RPC call returned",
];
const START_TIME_MAX: Duration = Duration::from_secs(20);
/// A client that was refused a connection waits longer each time.
pub(crate) const RECONNECT_TIME_MAX: Duration = Duration::from_secs(30);
/// Much shorter than the half minute after which a Linux client asks again by itself.
const GRANT_TIME_MAX: Duration = Duration::from_secs(5);
/// A machine that has booted tells its servers again and again until they answer.
const REBOOT_TIME_MAX: Duration = Duration::from_mins(1);
const NOTIFY_TIME_MAX: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);
