//! A table of many locks: what a lock costs in memory, what a call costs in the full table, and how
//! long a start takes with it.
//!
//! Everything goes through calls to the server's own program: 10,000 hosts, each with an address of
//! its own, take 100 locks each, every lock with an owner of its own. The export is a tmpfs, the
//! state directory lies on a disk. Resident memory is read before the first lock, when every file
//! was opened once already, so that only locks come between.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use havenfs_nlm::wire::{Nlm4Lock, procedure};
use havenfs_rpc::program::{NFS, NLM};

use crate::compare::{Site, WHO};
use crate::cpu;
use crate::dataset::{self, file_name};
use crate::load::Figures;
use crate::locks::{self, DENIED, GRANTED};
use crate::measure::{self, Place, Row, SHAPES};
use crate::peers::{self, Peer, Running, Setup};
use crate::session::Session;
use crate::workload::Workload;

const LOCKS_PER_HOST: usize = 100;
/// How many hosts take their locks at a time, each all of them at once.
const FILLERS: usize = 4;
/// How many files are asked for at a time.
const WINDOW: usize = 64;
/// How long the cost of a call is measured.
const LENGTH: Duration = Duration::from_secs(2);
/// How long a snapshot is waited for while calls go on.
const SNAPSHOT_TIME_MAX: Duration = Duration::from_mins(2);
const POLL: Duration = Duration::from_millis(2);

/// How many locks, and how they are spread.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ScaleArgs {
    #[arg(long, default_value_t = 1_000_000)]
    locks: usize,
    /// Locks on each file
    #[arg(long, default_value_t = 10)]
    per_file: usize,
    #[command(flatten)]
    site: Site,
}

/// Fills a server with locks and prints what that costs.
pub(crate) fn run(args: &ScaleArgs) -> anyhow::Result<()> {
    let Some(setup) = args.site.enter()? else {
        return Ok(());
    };
    let files = args.locks.div_ceil(args.per_file);
    dataset::fill_empty(&setup.export, LOCKED, files, WHO.uid, WHO.gid)?;
    let state = setup.state.clone();
    let server = peers::start(Peer::Havenfs, &setup)?;
    let scale = Scale {
        state,
        locks: Locks::find(&server.place, args.locks, files)?,
        server,
    };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{} locks, {} on each file", args.locks, args.per_file)?;
    let empty = scale.cost()?;
    let before = cpu::memory_kib(&scale.server.pids).0;
    let began = Instant::now();
    scale.locks.take(&scale.server.place)?;
    let rate = args.locks as f64 / began.elapsed().as_secs_f64();
    writeln!(out, "taken by {rate:.0} calls a second")?;
    let memory = |scale: &Scale| {
        let (now, peak) = cpu::memory_kib(&scale.server.pids);
        let a_lock = |kib: u64| (kib.saturating_sub(before) * 1024) as f64 / args.locks as f64;
        (a_lock(now), a_lock(peak))
    };
    let (now, peak) = memory(&scale);
    writeln!(
        out,
        "memory: {now:.0} bytes a lock, at most {peak:.0} so far"
    )?;
    let full = scale.cost()?;
    for (name, figures) in [("empty", empty), ("full", full)] {
        writeln!(
            out,
            "a call in the {name} table: {:.2} us of server time, {:.0} a second",
            figures.server_us(),
            figures.rate()
        )?;
    }
    writeln!(
        out,
        "full / empty: {:.2}",
        full.server_us() / empty.server_us()
    )?;
    let (snapshot, longest) = scale.snapshot()?;
    writeln!(
        out,
        "a snapshot: {:.2} s, the longest call meanwhile {longest:.1} ms",
        snapshot.as_secs_f64()
    )?;
    let (now, peak) = memory(&scale);
    writeln!(
        out,
        "memory after it: {now:.0} bytes a lock, at most {peak:.0}"
    )?;
    restart(scale, &setup, &mut out)
}

/// Kills the server as a crash would, and starts it again.
fn restart(scale: Scale, setup: &Setup, out: &mut impl Write) -> anyhow::Result<()> {
    let Scale { locks, server, .. } = scale;
    drop(server);
    let began = Instant::now();
    let server = peers::start(Peer::Havenfs, setup)?;
    let mut nlm = Session::connect(server.place.nlm, WHO)?;
    locks.check(&mut nlm)?;
    writeln!(
        out,
        "a start with them: {:.2} s to the first answer, {:.2} s to the first of NLM",
        server.start_ms / 1e3,
        began.elapsed().as_secs_f64()
    )?;
    let (now, _) = cpu::memory_kib(&server.pids);
    let a_lock = (now * 1024) as f64 / locks.count as f64;
    writeln!(
        out,
        "memory after the start: {a_lock:.0} bytes a lock in all"
    )?;
    Ok(())
}

struct Scale {
    state: PathBuf,
    locks: Locks,
    server: Running,
}

/// Many locks of many hosts, and the files that they lie on.
#[derive(Debug)]
pub(crate) struct Locks {
    count: usize,
    handles: Vec<Vec<u8>>,
}

/// Who takes a lock, as a Linux client would say it.
struct Locker {
    caller_name: String,
    oh: String,
    svid: i32,
    file: usize,
    l_offset: u64,
}

impl Locker {
    fn of(number: usize, files: usize) -> Self {
        let (host, svid) = (number / LOCKS_PER_HOST, number % LOCKS_PER_HOST);
        let caller_name = format!("host-{host:05}");
        Self {
            oh: format!("{svid}@{caller_name}"),
            caller_name,
            svid: svid as i32,
            file: number % files,
            l_offset: (number / files * 200) as u64,
        }
    }

    fn alock<'a>(&'a self, handles: &'a [Vec<u8>]) -> Nlm4Lock<'a> {
        Nlm4Lock {
            caller_name: self.caller_name.as_bytes(),
            fh: &handles[self.file],
            oh: self.oh.as_bytes(),
            svid: self.svid,
            l_offset: self.l_offset,
            l_len: 100,
        }
    }
}

/// The address of a host, on loopback as all of them.
pub(crate) fn address(host: usize) -> IpAddr {
    let [.., high, middle, low] = (host as u32 + 1).to_be_bytes();
    Ipv4Addr::new(127, 1 + high, middle, low).into()
}

impl Locks {
    /// Asks for the handle of each file, and has each opened once.
    pub(crate) fn find(place: &Place, count: usize, files: usize) -> anyhow::Result<Self> {
        let root = Session::connect(place.mount, place.who)?.mount(&place.path)?;
        let mut session = Session::connect(place.nfs, place.who)?;
        let directory = session.lookup(&root, LOCKED)?;
        let mut handles = Vec::with_capacity(files);
        for first in (0..files).step_by(WINDOW) {
            let names = (first..files.min(first + WINDOW)).map(file_name);
            let answers = session.calls((NFS, 3, 3), names, |name, args| {
                args.opaque(&directory);
                args.opaque(name.as_bytes());
            })?;
            let found = handles.len();
            for answer in answers {
                let (status, rest) = answer.split_at_checked(8).context("a short answer")?;
                ensure!(status[..4] == [0; 4], "a LOOKUP failed");
                let len = u32::from_be_bytes([status[4], status[5], status[6], status[7]]);
                handles.push(rest.get(..len as usize).context("no handle")?.to_vec());
            }
            session.calls((NFS, 3, 1), &handles[found..], |handle, args| {
                args.opaque(handle);
            })?;
        }
        Ok(Self { count, handles })
    }

    /// How many hosts take them.
    pub(crate) const fn hosts(&self) -> usize {
        self.count.div_ceil(LOCKS_PER_HOST)
    }

    /// Takes them all.
    pub(crate) fn take(&self, place: &Place) -> anyhow::Result<()> {
        let files = self.handles.len();
        let fill = |filler: usize| -> anyhow::Result<()> {
            for host in (filler..self.hosts()).step_by(FILLERS) {
                let mut nlm = Session::connect_from(address(host), place.nlm, place.who)?;
                let first = host * LOCKS_PER_HOST;
                let wanted = first..self.count.min(first + LOCKS_PER_HOST);
                let lockers = wanted.map(|number| Locker::of(number, files));
                let answers = nlm.calls((NLM, 4, procedure::LOCK), lockers, |locker, args| {
                    args.value(&locks::lock(locker.alock(&self.handles)));
                })?;
                for answer in answers {
                    let status = locks::status_of(&answer)?;
                    ensure!(status == GRANTED, "a LOCK got status {status}");
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let fillers: Vec<_> = (0..FILLERS)
                .map(|filler| scope.spawn(move || fill(filler)))
                .collect();
            for filler in fillers {
                filler
                    .join()
                    .map_err(|_| anyhow::anyhow!("a filler panicked"))??;
            }
            Ok(())
        })
    }

    /// Whether NLM answers, and the last one is still held.
    pub(crate) fn check(&self, nlm: &mut Session) -> anyhow::Result<()> {
        if self.count == 0 {
            nlm.call((NLM, 4, procedure::NULL), |_| {})?;
            return Ok(());
        }
        let last = Locker::of(self.count - 1, self.handles.len());
        let asked = Nlm4Lock {
            caller_name: b"somebody else",
            ..last.alock(&self.handles)
        };
        let results = nlm.call((NLM, 4, procedure::TEST), |args| {
            args.value(&locks::test(asked));
        })?;
        ensure!(
            locks::status_of(&results)? == DENIED,
            "the last lock is gone"
        );
        Ok(())
    }
}

impl Scale {
    /// What a call costs now.
    fn cost(&self) -> anyhow::Result<Figures> {
        let row = Row {
            workload: Workload::LockUnlock,
            shape: SHAPES[0],
            first_pass: false,
        };
        measure::measure(&self.server.place, row, &self.server.pids, LENGTH)
    }

    /// Goes on calling until a snapshot was written: how long that took, and the longest call
    /// meanwhile in ms.
    fn snapshot(&self) -> anyhow::Result<(Duration, f64)> {
        let beside = self.state.join("havenfs/store/snapshot.new");
        let done = AtomicBool::new(false);
        let wait = |there: bool| {
            while beside.exists() != there && !done.load(Ordering::Relaxed) {
                std::thread::sleep(POLL);
            }
            Instant::now()
        };
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                // One that is under way already is not measured.
                wait(false);
                let began = wait(true);
                wait(false) - began
            });
            let started = Instant::now();
            let mut longest = 0.0;
            while !watcher.is_finished() && started.elapsed() < SNAPSHOT_TIME_MAX {
                let latency = self.cost()?.latency.context("no latency")?;
                longest = f64::max(longest, latency.longest / 1e3);
            }
            done.store(true, Ordering::Relaxed);
            let took = watcher.join().map_err(|_| anyhow::anyhow!("it panicked"))?;
            Ok((took, longest))
        })
    }
}

/// The directory of the files that are locked.
pub(crate) const LOCKED: &str = "locked";
