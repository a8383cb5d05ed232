//! What locks need beside calls: a file, other locks that lie on it, and what the disk costs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use havenfs::cluster::{Command, Outcome, ServiceCommand, ServiceId};
use havenfs::raft::Store;
use havenfs_nlm::wire::{Nlm4Lock, Nlm4LockArgs, Nlm4TestArgs, Nlm4UnlockArgs, procedure};
use havenfs_rpc::program::NLM;
use havenfs_rpc::xdr::Reader;
use rustix::fs::FallocateFlags;

use crate::cpu;
use crate::dataset::{self, file_name};
use crate::load::{Figures, Latency};
use crate::measure::Place;
use crate::session::Session;
use crate::workload::Workload;

/// Comes back with every answer.
pub(crate) const COOKIE: &[u8] = b"bench\0\0\0";
/// How many locks lie on a crowded file.
const CROWD: usize = 10_000;
/// How many owners a host has; its locks are given to them in turn.
const OWNERS: usize = 100;
/// What each lock covers; they lie side by side with gaps.
const LOCK_BYTES: u64 = 100;
/// Calls that are under way at a time in the largest shape.
const SLOTS_MAX: usize = 64;
/// The length of a log entry with a LOCK, about.
const RECORD_BYTES: usize = 256;
/// What is reserved for a file of records.
const RECORDS_BYTES: u64 = 2 << 20;

/// NLM4_GRANTED.
pub(crate) const GRANTED: u32 = 0;
/// NLM4_DENIED.
pub(crate) const DENIED: u32 = 1;

/// A host.
#[derive(Debug)]
pub(crate) struct Host {
    caller_name: &'static [u8],
    /// Where its locks begin.
    offset: u64,
}

/// The host that is measured: its locks lie behind those of the other.
pub(crate) const CALLER: Host = Host {
    caller_name: b"bench",
    offset: 1 << 40,
};
/// The host whose locks lie on the crowded file.
const HOLDER: Host = Host {
    caller_name: b"holder",
    offset: 0,
};

impl Host {
    /// Lock number `number` of this host.
    pub(crate) const fn lock<'a>(&self, fh: &'a [u8], number: usize) -> Nlm4Lock<'a> {
        Nlm4Lock {
            caller_name: self.caller_name,
            fh,
            oh: self.caller_name,
            svid: 1 + (number % OWNERS) as i32,
            l_offset: self.offset + 2 * LOCK_BYTES * number as u64,
            l_len: LOCK_BYTES,
        }
    }
}

/// What takes a lock.
pub(crate) const fn lock(alock: Nlm4Lock<'_>) -> Nlm4LockArgs<'_> {
    Nlm4LockArgs {
        cookie: COOKIE,
        block: false,
        exclusive: true,
        alock,
        reclaim: false,
        state: 1,
    }
}

/// What releases one.
pub(crate) const fn unlock(alock: Nlm4Lock<'_>) -> Nlm4UnlockArgs<'_> {
    Nlm4UnlockArgs {
        cookie: COOKIE,
        alock,
    }
}

/// What asks for one.
pub(crate) const fn test(alock: Nlm4Lock<'_>) -> Nlm4TestArgs<'_> {
    Nlm4TestArgs {
        cookie: COOKIE,
        exclusive: true,
        alock,
    }
}

/// The status in an `nlm4_res` or `nlm4_testres`.
pub(crate) fn status_of(results: &[u8]) -> anyhow::Result<u32> {
    let mut reader = Reader::new(results);
    ensure!(reader.opaque(COOKIE.len())? == COOKIE, "another cookie");
    Ok(reader.u32()?)
}

/// The file that a workload locks.
pub(crate) fn file(
    workload: Workload,
    session: &mut Session,
    root: &[u8],
) -> anyhow::Result<Vec<u8>> {
    let directory = session.lookup(root, dataset::SMALL_WRITE)?;
    let number = usize::from(workload == Workload::LockUnlockCrowded);
    session.lookup(&directory, &file_name(number))
}

/// Releases what an earlier measurement left, and takes the locks that are to lie on the file.
pub(crate) fn make_ready(
    workload: Workload,
    place: &Place,
    session: &mut Session,
    root: &[u8],
) -> anyhow::Result<()> {
    let fh = file(workload, session, root)?;
    let mut nlm = Session::connect(place.nlm, place.who)?;
    for number in 0..SLOTS_MAX {
        let args = unlock(CALLER.lock(&fh, number));
        let results = nlm.call((NLM, 4, procedure::UNLOCK), |out| out.value(&args))?;
        ensure!(status_of(&results)? == GRANTED, "an UNLOCK was refused");
    }
    if workload != Workload::LockUnlockCrowded {
        return Ok(());
    }
    let last = Nlm4Lock {
        caller_name: CALLER.caller_name,
        ..HOLDER.lock(&fh, CROWD - 1)
    };
    let results = nlm.call((NLM, 4, procedure::TEST), |out| out.value(&test(last)))?;
    if status_of(&results)? == DENIED {
        // They lie there already.
        return Ok(());
    }
    for number in 0..CROWD {
        let args = lock(HOLDER.lock(&fh, number));
        let results = nlm.call((NLM, 4, procedure::LOCK), |out| out.value(&args))?;
        ensure!(status_of(&results)? == GRANTED, "a LOCK was refused");
    }
    Ok(())
}

/// Writes small records one after the other into reserved space, each made durable by a sync.
pub(crate) fn commits(directory: &Path, length: Duration) -> anyhow::Result<Figures> {
    let path = directory.join("records");
    let record = [0x5a; RECORD_BYTES];
    let reserved = || -> anyhow::Result<File> {
        let file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, RECORDS_BYTES)?;
        file.sync_all()?;
        Ok(file)
    };
    let mut file = reserved()?;
    let mut end = 0;
    let mut times = Vec::new();
    let own_before = cpu::own_thread_ns();
    let began = Instant::now();
    while began.elapsed() < length {
        if end + RECORD_BYTES as u64 > RECORDS_BYTES {
            file = reserved()?;
            end = 0;
        }
        let before = Instant::now();
        file.write_all_at(&record, end)?;
        file.sync_data()?;
        times.push(before.elapsed());
        end += RECORD_BYTES as u64;
    }
    let seconds = began.elapsed().as_secs_f64();
    fs::remove_file(&path)?;
    Ok(figures(times, seconds, own_before))
}

/// Proposes one change after the other to a store of our own beside that of the server, each when
/// the outcome of the one before is there. The change does nothing: it is of a service that is not
/// there.
pub(crate) fn store_commits(directory: &Path, length: Duration) -> anyhow::Result<Figures> {
    let directory = directory.join("store-of-its-own");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()?;
    // Nothing is missing where there is no cluster.
    let (missing, _) = tokio::sync::watch::channel(Vec::new());
    let store = runtime.block_on(Store::open(&directory, None, missing))?;
    let proposer = store.proposer();
    let change = ServiceCommand::EndGrace {
        epoch: u32::MAX,
        now: 0,
    };
    let change = Command::Service(ServiceId::FIRST, change);
    let mut times = Vec::new();
    let own_before = cpu::own_thread_ns();
    let began = Instant::now();
    while began.elapsed() < length {
        let before = Instant::now();
        let outcome = runtime.block_on(proposer.ask(change.clone()))?;
        times.push(before.elapsed());
        ensure!(outcome == Outcome::NoSuchService, "the store is not new");
    }
    let seconds = began.elapsed().as_secs_f64();
    runtime.block_on(store.close());
    fs::remove_dir_all(&directory)?;
    Ok(figures(times, seconds, own_before))
}

fn figures(times: Vec<Duration>, seconds: f64, own_ns_before: u64) -> Figures {
    let own_ns = cpu::own_thread_ns() - own_ns_before;
    Figures {
        units: times.len() as u64,
        seconds,
        server_ns: own_ns,
        generator_ns: own_ns,
        checked: 0,
        latency: Latency::of(times),
    }
}
