//! Processes in virtual machines that take file locks as the test tells them.
//!
//! A [`Locker`] is one `lab-locktool` (`tests/lab/guest/locktool.py`) in a virtual machine; each
//! [`Actor`] is a process below it, and so a lock owner of its own. A test sends an actor a request
//! and waits, with a limit, for the event that answers it. Lock traffic at random is [`Vm`]'s too;
//! [`super::held`] judges it.
//!
//! Invariant: the processes end with their guards. An actor's events are told in their order, each
//! once.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use super::clock::{Clock, Micros, parse_seconds};
use super::process::{POLL, last_lines};
use super::{Process, Vm};

/// A lock that can be asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Lock {
    /// Which system call is used.
    pub api: Api,
    /// Whether it excludes all others.
    pub kind: Kind,
    /// The first byte; of no meaning to `flock`.
    pub start: u64,
    /// How many bytes, 0 for all to the end of the file; of no meaning to `flock`.
    pub length: u64,
}

/// The system call that locks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Api {
    /// POSIX locks of byte ranges, which belong to a process.
    Fcntl,
    /// BSD locks of whole files, which belong to an opened file.
    Flock,
}

/// What a lock excludes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Exclusive locks of others.
    Shared,
    /// All locks of others.
    Exclusive,
}

/// What an actor said.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Event {
    /// When, by the virtual machine's clock.
    pub at: Micros,
    /// What, as `lab-locktool` describes it.
    pub what: String,
}

/// The tool in one virtual machine.
#[derive(Debug)]
pub struct Locker<'vm> {
    vm: &'vm Vm<'vm>,
    process: Process,
    clock: RefCell<Clock>,
    actors: Cell<usize>,
}

/// A process that takes locks.
#[derive(Debug)]
pub struct Actor<'l> {
    locker: &'l Locker<'l>,
    /// The virtual machine's name and a number.
    name: String,
    /// How many of its events were told.
    told: Cell<usize>,
}

impl Lock {
    /// An exclusive lock of a byte range.
    #[must_use]
    pub const fn exclusive(start: u64, length: u64) -> Self {
        Self {
            api: Api::Fcntl,
            kind: Kind::Exclusive,
            start,
            length,
        }
    }

    /// A shared lock of a byte range.
    #[must_use]
    pub const fn shared(start: u64, length: u64) -> Self {
        Self {
            kind: Kind::Shared,
            ..Self::exclusive(start, length)
        }
    }

    /// A lock of a whole file with `flock`.
    #[must_use]
    pub const fn flock(kind: Kind) -> Self {
        Self {
            api: Api::Flock,
            kind,
            start: 0,
            length: 0,
        }
    }
}

impl fmt::Display for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let api = match self.api {
            Api::Fcntl => "fcntl",
            Api::Flock => "flock",
        };
        write!(f, "{api},{}", self.kind)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shared => "shared",
            Self::Exclusive => "exclusive",
        })
    }
}

impl Vm<'_> {
    /// Starts the tool that actors run under.
    pub fn locker(&self) -> Result<Locker<'_>> {
        let locker = Locker {
            vm: self,
            process: self.spawn_reading("actors", LIFE_MAX, "lab-locktool actors")?,
            clock: RefCell::default(),
            actors: Cell::new(0),
        };
        locker.read_clock()?;
        Ok(locker)
    }

    /// Starts workers that lock ranges of a file at random until they are told anything.
    pub fn spawn_traffic(&self, path: &str, workers: usize, seed: u64) -> Result<Process> {
        let seconds = LIFE_MAX.as_secs();
        let line = format!("lab-locktool traffic {path} {workers} {seconds} {seed}");
        self.spawn_reading("traffic", LIFE_MAX, &line)
    }

    /// How many SM_NOTIFY calls reached the machine since it was made, in all its lives.
    pub fn notices(&self) -> Result<usize> {
        let console = fs::read(self.dir().join("console.log"))?;
        let console = String::from_utf8_lossy(&console);
        Ok(console.matches("SM_NOTIFY from").count())
    }

    /// Whether the machine has told its servers, or tried to, that it was rebooted.
    pub fn has_told_reboot(&self) -> Result<bool> {
        let console = fs::read(self.dir().join("console.log"))?;
        Ok(String::from_utf8_lossy(&console).contains("sm-notify: Sending"))
    }

    /// Lets the machine hear no SM_NOTIFY from now on: what comes is taken and never read.
    pub fn drop_notices(&self) -> Result<()> {
        self.sh("kill -STOP $(pgrep -x rpc.statd)")?;
        Ok(())
    }

    /// What the kernel's lock client complained of since the machine was booted.
    pub fn lock_complaints(&self) -> Result<Vec<String>> {
        let log = self.sh("dmesg")?;
        let complaints = log.lines().filter(|line| line.contains("lockd: "));
        Ok(complaints.map(str::to_owned).collect())
    }
}

impl Locker<'_> {
    /// Starts an actor on a file, which it makes if need be.
    pub fn actor(&self, path: &str) -> Result<Actor<'_>> {
        let number = self.actors.get();
        self.actors.set(number + 1);
        let actor = Actor {
            locker: self,
            name: format!("{}-{number}", self.vm.name),
            told: Cell::new(0),
        };
        actor.say(&format!("start {path}"))?;
        let event = actor.next(ANSWER_TIME_MAX)?;
        ensure!(event.what.starts_with("ready"), "{actor}: {}", event.what);
        Ok(actor)
    }

    /// Reads the virtual machine's clock; to be called before and after what is timed.
    pub fn read_clock(&self) -> Result<()> {
        let reading = self.vm.clock()?;
        self.clock.borrow_mut().note(reading);
        Ok(())
    }

    /// When something happened by our clock, and by how much that may be wrong.
    pub fn ours(&self, event: &Event) -> Result<(Micros, Micros)> {
        self.clock.borrow().ours(event.at)
    }

    /// The events of one actor.
    fn events(&self, name: &str) -> Result<Vec<Event>> {
        let log = self.process.output()?;
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        let mut events = Vec::new();
        for line in whole.lines() {
            let mut words = line.splitn(3, ' ');
            let (at, of, what) = (words.next(), words.next(), words.next());
            let (Some(at), Some(of), Some(what)) = (at, of, what) else {
                bail!("lab-locktool failed:\n{}", last_lines(&log));
            };
            let at = parse_seconds(at).with_context(|| last_lines(&log))?;
            if of == name {
                let what = what.to_owned();
                events.push(Event { at, what });
            }
        }
        Ok(events)
    }
}

impl fmt::Display for Actor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Actor<'_> {
    /// Asks for a lock that must be given now or not at all; says whether it was given.
    pub fn try_lock(&self, lock: Lock) -> Result<bool> {
        self.begin_to_try(lock)?;
        self.was_given(ANSWER_TIME_MAX)
    }

    /// The first half of [`Actor::try_lock`], which does not wait for the answer.
    pub fn begin_to_try(&self, lock: Lock) -> Result<()> {
        self.say(&format!("lock {lock},now {} {}", lock.start, lock.length))?;
        self.expect("asking", ANSWER_TIME_MAX)?;
        Ok(())
    }

    /// The second half of [`Actor::try_lock`].
    pub fn was_given(&self, limit: Duration) -> Result<bool> {
        let event = self.next(limit)?;
        match event.what.as_str() {
            "acquired" => Ok(true),
            "denied" => Ok(false),
            other => bail!("{self}: {other}"),
        }
    }

    /// Asks for a lock, waiting if need be; [`Actor::acquired`] or [`Actor::interrupted`] follow.
    pub fn ask(&self, lock: Lock) -> Result<()> {
        self.say(&format!("lock {lock},wait {} {}", lock.start, lock.length))?;
        self.expect("asking", ANSWER_TIME_MAX)?;
        Ok(())
    }

    /// Asks for a lock that somebody else has, and makes sure that it is waited for.
    pub fn ask_blocked(&self, lock: Lock) -> Result<()> {
        self.ask(lock)?;
        self.still_blocked()
    }

    /// Makes sure that a lock that was asked for is not there yet.
    pub fn still_blocked(&self) -> Result<()> {
        self.say("settle")?;
        self.expect("blocked", ANSWER_TIME_MAX)?;
        Ok(())
    }

    /// Waits for a lock that was asked for.
    pub fn acquired(&self, limit: Duration) -> Result<Event> {
        self.expect("acquired", limit)
    }

    /// Drops a lock, or what there is in its range; says when that began.
    pub fn unlock(&self, lock: Lock) -> Result<Event> {
        self.say(&format!("unlock {lock} {} {}", lock.start, lock.length))?;
        self.released()
    }

    /// Closes the file, and so drops all locks; says when that began.
    pub fn close(&self) -> Result<Event> {
        self.say("close")?;
        self.released()
    }

    /// The lock that stands in the way of this one, if any: kind, start and length.
    pub fn conflict(&self, lock: Lock) -> Result<Option<(Kind, u64, u64)>> {
        self.say(&format!("test {lock} {} {}", lock.start, lock.length))?;
        let event = self.next(ANSWER_TIME_MAX)?;
        let words: Vec<&str> = event.what.split(' ').collect();
        let kind = match words[..] {
            ["free"] => return Ok(None),
            ["conflict", "shared", ..] => Kind::Shared,
            ["conflict", "exclusive", ..] => Kind::Exclusive,
            _ => bail!("{self}: {}", event.what),
        };
        ensure!(words.len() == 5, "{self}: {}", event.what);
        Ok(Some((kind, words[2].parse()?, words[3].parse()?)))
    }

    /// Interrupts a wait with SIGINT, and waits until it is over.
    pub fn interrupt(&self) -> Result<Event> {
        self.signal(Signal::INT)?;
        self.expect("interrupted", ANSWER_TIME_MAX)
    }

    /// Ends the process with SIGKILL; says when that was sent.
    pub fn kill(self) -> Result<Event> {
        let sent = self.signal(Signal::KILL)?;
        let ended = self.next(ANSWER_TIME_MAX)?;
        ensure!(ended.what.starts_with("ended"), "{self}: {}", ended.what);
        Ok(sent)
    }

    fn signal(&self, signal: Signal) -> Result<Event> {
        self.say(&format!("signal {}", signal.as_raw()))?;
        self.expect("signalled", ANSWER_TIME_MAX)
    }

    fn released(&self) -> Result<Event> {
        let began = self.expect("releasing", ANSWER_TIME_MAX)?;
        self.expect("released", ANSWER_TIME_MAX)?;
        Ok(began)
    }

    fn say(&self, command: &str) -> Result<()> {
        self.locker.process.say(&format!("{} {command}", self.name))
    }

    /// Waits for the next event, which must be this one.
    fn expect(&self, what: &str, limit: Duration) -> Result<Event> {
        let event = self.next(limit).with_context(|| what.to_owned())?;
        ensure!(event.what == what, "{self}: {}, not {what}", event.what);
        Ok(event)
    }

    fn next(&self, limit: Duration) -> Result<Event> {
        let deadline = Instant::now() + limit;
        loop {
            let events = self.locker.events(&self.name)?;
            if let Some(event) = events.get(self.told.get()) {
                self.told.set(self.told.get() + 1);
                return Ok(event.clone());
            }
            ensure!(
                Instant::now() < deadline,
                "{self} says nothing for {limit:?}; the log ends:\n{}\n{}",
                last_lines(&self.locker.process.output()?),
                self.locker.vm.console_tail()
            );
            thread::sleep(POLL);
        }
    }
}

/// No test goes on for longer.
const LIFE_MAX: Duration = Duration::from_mins(10);
/// For what needs no other lock owner to do something: a call or two on a busy machine, and what
/// a client waits before it connects anew.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(20);
