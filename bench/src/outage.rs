//! What clients notice while a service is gone: the longest time between two writes that were
//! answered, the time until somebody else gets a new lock, and whether a lock that was held is
//! given to anybody else.
//!
//! Three clients with a connection each, which they open again whenever it fails; nobody reclaims
//! anything, as if no notice of a restart had come.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use havenfs_nlm::wire::{Nlm4Lock, procedure};
use havenfs_rpc::program::{NFS, NLM};

use crate::dataset::{self, file_name};
use crate::locks::{self, GRANTED};
use crate::measure::Place;
use crate::scale;
use crate::session::Session;

/// What was noticed, counted from the moment at which the service was broken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outage {
    /// The longest time between two writes that were answered.
    pub(crate) write_gap: Duration,
    /// The same of a service on another node, if there is one.
    pub(crate) other_gap: Option<Duration>,
    /// When a host that had none got a lock that nobody else has.
    pub(crate) new_lock: Duration,
    /// When the lock that was held all the time was given to somebody else, if it was.
    pub(crate) given_away: Option<Duration>,
}

/// How long a call may take before its client connects again.
const PATIENCE: Duration = Duration::from_millis(250);
const AGAIN: Duration = Duration::from_millis(5);
/// How long the clients go on before the service is broken.
const BEFORE: Duration = Duration::from_millis(500);
/// The bytes of each write.
const WRITE_BYTES: usize = 4096;

/// Where the new lock begins.
const NEW_LOCK: u64 = 1 << 20;

/// Whose lock is held, who wants the same one, and who wants another.
const HOLDER: usize = 20_000;
const RIVAL: usize = 20_001;
const NEWCOMER: usize = 20_002;

/// Breaks the service with `act`, and watches until a new lock is granted and `settle` has passed
/// since.
pub(crate) fn watch(
    place: &Place,
    other: Option<&Place>,
    settle: Duration,
    time_max: Duration,
    act: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Outage> {
    let written = find(place, 0)?;
    let locked = find(place, 1)?;
    let beside = other.map(|other| anyhow::Ok((other, find(other, 2)?)));
    let beside = beside.transpose()?;
    let mut holder = Client::new(place, HOLDER, &locked);
    ensure!(holder.lock(0) == Some(GRANTED), "no lock to begin with");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(place, &written, &done));
        let beside = beside.as_ref();
        let beside = beside.map(|(other, file)| scope.spawn(|| write(other, file, &done)));
        std::thread::sleep(BEFORE);
        let broken = Instant::now();
        let (file, end) = (&locked[..], &done);
        let rival = scope.spawn(move || {
            let mut rival = Client::new(place, RIVAL, file);
            let given = until(end, || rival.lock(0) == Some(GRANTED));
            given.inspect(|_| rival.unlock(0)).map(|at| at - broken)
        });
        let newcomer = scope.spawn(move || {
            // From the moment at which nobody answers.
            let mut newcomer = Client::new(place, NEWCOMER, file);
            let granted = until(end, || newcomer.lock(NEW_LOCK) == Some(GRANTED));
            granted
                .inspect(|_| newcomer.unlock(NEW_LOCK))
                .map(|at| at - broken)
        });
        let acted = act();
        while !newcomer.is_finished() && broken.elapsed() < time_max {
            std::thread::sleep(AGAIN);
        }
        std::thread::sleep(settle);
        done.store(true, Ordering::Relaxed);
        let gone = |_| anyhow::anyhow!("a client panicked");
        let (write_gap, given_away, new_lock) = (
            writer.join().map_err(gone)?,
            rival.join().map_err(gone)?,
            newcomer.join().map_err(gone)?,
        );
        let other_gap = beside.map(|writer| writer.join().map_err(gone));
        acted?;
        holder.unlock(0);
        Ok(Outage {
            write_gap,
            other_gap: other_gap.transpose()?,
            new_lock: new_lock.context("no new lock was granted in time")?,
            given_away,
        })
    })
}

/// Waits until new locks are granted.
pub(crate) fn wait_for_locks(place: &Place, time_max: Duration) -> anyhow::Result<()> {
    let locked = find(place, 1)?;
    let mut client = Client::new(place, NEWCOMER, &locked);
    let began = Instant::now();
    while client.lock(NEW_LOCK) != Some(GRANTED) {
        ensure!(began.elapsed() < time_max, "no lock is granted");
        std::thread::sleep(AGAIN);
    }
    client.unlock(NEW_LOCK);
    Ok(())
}

/// The handle of a file.
fn find(place: &Place, number: usize) -> anyhow::Result<Vec<u8>> {
    let root = Session::connect(place.mount, place.who)?.mount(&place.path)?;
    let mut session = Session::connect(place.nfs, place.who)?;
    let directory = session.lookup(&root, dataset::SMALL_WRITE)?;
    session.lookup(&directory, &file_name(number))
}

/// When `is_so` came true.
fn until(done: &AtomicBool, mut is_so: impl FnMut() -> bool) -> Option<Instant> {
    while !done.load(Ordering::Relaxed) {
        if is_so() {
            return Some(Instant::now());
        }
        std::thread::sleep(AGAIN);
    }
    None
}

/// Writes one block after the other, each on stable storage, and returns the longest time between
/// two that were answered.
fn write(place: &Place, file: &[u8], done: &AtomicBool) -> Duration {
    let mut session = None;
    let (mut last, mut gap) = (Instant::now(), Duration::ZERO);
    let data = [0x5a; WRITE_BYTES];
    while !done.load(Ordering::Relaxed) {
        if session.is_none() {
            session = connect(place, scale::address(HOLDER), place.nfs);
        }
        let answer = session.as_mut().map(|session| {
            session.call((NFS, 3, 7), |args| {
                args.opaque(file);
                args.u64(0);
                args.u32(WRITE_BYTES as u32);
                // FILE_SYNC
                args.u32(2);
                args.opaque(&data);
            })
        });
        match answer {
            Some(Ok(results)) if results.starts_with(&[0; 4]) => {
                gap = gap.max(last.elapsed());
                last = Instant::now();
            }
            Some(Ok(_)) => {}
            Some(Err(_)) | None => session = None,
        }
        std::thread::sleep(AGAIN);
    }
    gap.max(last.elapsed())
}

/// A host that asks for locks of one file.
struct Client<'a> {
    place: &'a Place,
    address: IpAddr,
    name: String,
    file: &'a [u8],
    session: Option<Session>,
}

impl<'a> Client<'a> {
    fn new(place: &'a Place, number: usize, file: &'a [u8]) -> Self {
        Self {
            place,
            address: scale::address(number),
            name: format!("host-{number}"),
            file,
            session: None,
        }
    }

    fn alock(&self, l_offset: u64) -> Nlm4Lock<'_> {
        Nlm4Lock {
            caller_name: self.name.as_bytes(),
            fh: self.file,
            oh: self.name.as_bytes(),
            svid: 1,
            l_offset,
            l_len: 100,
        }
    }

    /// The status of a LOCK; none if it was not answered.
    fn lock(&mut self, l_offset: u64) -> Option<u32> {
        let mut session = self.session.take().or_else(|| self.connect())?;
        let asked = locks::lock(self.alock(l_offset));
        let results = session.call((NLM, 4, procedure::LOCK), |args| args.value(&asked));
        let status = locks::status_of(&results.ok()?).ok();
        self.session = Some(session);
        status
    }

    /// Whatever becomes of it.
    fn unlock(&mut self, l_offset: u64) {
        if let Some(mut session) = self.session.take().or_else(|| self.connect()) {
            let asked = locks::unlock(self.alock(l_offset));
            let _ = session.call((NLM, 4, procedure::UNLOCK), |args| args.value(&asked));
        }
    }

    fn connect(&self) -> Option<Session> {
        connect(self.place, self.address, self.place.nlm)
    }
}

fn connect(place: &Place, source: IpAddr, to: SocketAddr) -> Option<Session> {
    let session = Session::connect_from(source, to, place.who).ok()?;
    session.set_patience(PATIENCE).ok()?;
    Some(session)
}
