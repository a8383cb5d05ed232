//! The replicated log and what it is for: commands go in, their outcomes come out, in one order.
//!
//! Owns the store's folder (its id, the log, the snapshot), the consensus engine openraft and all
//! of its types, which nobody outside sees. Does not decide anything about locks: what a command
//! does is in [`ClusterState::apply`]. `serve` opens the [`Store`] on the control runtime and ends
//! the process when it [has failed](Store::failed); everyone else holds a [`Proposer`].
//!
//! ```text
//!   Proposer --> queue --> drive --> openraft --> log --> wal (write, sync) --> segment
//!      ^                               |           |
//!      |                               v           +--> index, recover (reading, opening)
//!      +------- outcome ---------- machine --> ClusterState, snapshot
//! ```
//!
//! All of this runs on a [thread of its own](thread). `wal` has another one, to which goes all that
//! does not come alone: the next batch is made ready while the one before is written. A proposal
//! that comes when nothing else is under way is written by the first thread itself.
//!
//! # Promises
//!
//! - A proposal is answered with an outcome only when its entry is synced and applied. Outcomes
//!   come in the order of the log.
//! - Every proposal is answered once; [`Unavailable::Unknown`] says that it may yet take effect.
//! - [`Store::open`] returns only when all that was ever acknowledged is applied again.
//! - A file that is damaged, missing or newer is named and nothing is changed; nothing that was
//!   acknowledged is left out silently.
//! - The first failed write or sync of the log is final. It is never tried again, because the
//!   kernel drops what it could not write and calls the next sync a success.
//!
//! # If the process dies
//!
//! - Before the log's write: the proposal never was. Nobody was told.
//! - Within the write: the start recognises the unfinished write and clears it.
//! - After the write, told or not: the start applies it.
//! - While a snapshot is written: the old one and the log are there; the new one is begun anew.
//! - After the snapshot, before the log is purged: the log's older entries are skipped.
//! - While the store is born: its id is written last, and only an empty log may lack it.
//!
//! # The log is our own
//!
//! The crate raft-log 0.4.6 was measured beside it. It takes a flipped bit in a length for a write
//! that a crash cut short, and drops that entry and all acknowledged ones after it: so did 8 % of
//! all single flipped bits in a log of ten entries, without an error. It notices a full disk in the
//! middle of a write. And its files grow with every write, where ours are reserved and a sync has
//! no length to record, so that a sync takes two thirds of the time (half on ext4 with a journal).
//!
//! A cluster of one elects itself at once and waits for no lease.

mod codec;
mod error;
mod index;
mod log;
mod machine;
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "the store does not form clusters yet")
)]
mod peer;
#[cfg(test)]
mod planted;
mod proposer;
mod recover;
mod segment;
mod snapshot;
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "the store does not form clusters yet")
)]
mod stored;
#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
mod thread;
mod types;
mod wal;

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;

use openraft::async_runtime::WatchReceiver as _;
use openraft::error::Fatal;
use openraft::{Config, Raft, SnapshotPolicy};
use tokio::sync::watch;

pub use self::error::StoreError;
pub use self::proposer::{PROPOSALS_MAX, Proposer, Unavailable};

use self::log::Log;
use self::machine::{Machine, Snapshots};
use self::peer::Alone;
use self::proposer::Driver;
use self::segment::Header;
use self::stored::Stored;
use self::thread::EngineThread;
use self::types::{Member, Types};
use self::wal::Options;
use crate::cluster::ClusterState;
use crate::random::random_u64;

/// The number of a node that has no configured one.
const NODE: u64 = 1;
const HEARTBEAT_MS: u64 = 50;
const ELECTION_MS_MIN: u64 = 200;
const ELECTION_MS_MAX: u64 = 400;
/// Entries that stay in the log after a snapshot, so that a follower that is a little behind needs
/// no snapshot.
const ENTRIES_KEPT: u64 = 1000;

type Engine = Raft<Types, Machine>;

/// The running store of this node.
pub struct Store {
    engine: Engine,
    state: Arc<RwLock<ClusterState>>,
    proposer: Proposer,
    driver: Driver,
    failure: watch::Receiver<Option<StoreError>>,
    thread: EngineThread,
    log_thread: JoinHandle<()>,
}

impl Store {
    /// Opens the store in `dir`, or makes it if there is none. Returns when this node leads its
    /// cluster of one and all that the log holds is applied.
    pub async fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(dir, Options::default()).await
    }

    async fn open_with(dir: &Path, options: Options) -> Result<Self, StoreError> {
        let dir = dir.to_path_buf();
        let opened = tokio::task::spawn_blocking(move || Opened::open(dir, options));
        let opened = opened
            .await
            .map_err(|error| stopped("open its files", &error))??;
        let shared = opened.log.shared();
        let mut failure = shared.watch_failure();
        let state = opened.machine.state();
        let config = Arc::new(config()?);
        let thread = EngineThread::start().map_err(|error| stopped("start its thread", &error))?;
        let start = async move {
            let (log, machine) = (opened.log, opened.machine);
            let engine = Engine::new(NODE, config, Alone, log, machine).await?;
            let driver = Driver::start(engine.clone(), opened.snapshots, shared);
            Ok::<_, Fatal<Types>>((engine, driver))
        };
        let started = thread.handle().spawn(start).await;
        let started = started.map_err(|error| stopped("start", &error))?;
        // It reads the log, and that names what is wrong better than openraft does.
        let (engine, driver) =
            started.map_err(|error| first(&failure, stopped("start", &error)))?;
        let store = Self {
            state,
            proposer: driver.proposer(),
            driver,
            failure: failure.clone(),
            thread,
            log_thread: opened.log_thread,
            engine,
        };
        let store_id = opened.store_id;
        let result = tokio::select! {
            result = store.lead(store_id) => result,
            // The sender lives as long as the engine.
            Ok(_) = failure.wait_for(Option::is_some) => Ok(()),
        };
        let failure = store.failure.borrow().clone();
        match (failure, result) {
            (Some(error), _) | (None, Err(error)) => Err(error),
            (None, Ok(())) => Ok(store),
        }
    }

    /// Becomes the leader and waits until the log is applied.
    async fn lead(&self, store_id: u64) -> Result<(), StoreError> {
        let initialized = self.engine.is_initialized().await;
        if initialized.map_err(|error| stopped("start", &error))? {
            let elected = self.engine.trigger().elect(false).await;
            elected.map_err(|error| stopped("elect itself", &error))?;
        } else {
            let members = BTreeMap::from([(NODE, Member::alone(store_id))]);
            let formed = self.engine.initialize(members).await;
            formed.map_err(|error| stopped("form a cluster of one", &error))?;
        }
        // An entry that is durable may have been acknowledged: all of them must be applied, and
        // they are once an entry of this start is committed.
        let applied = self.engine.wait_for_recovery(None).await;
        applied.map_err(|error| stopped("apply the log", &error))?;
        // Ticks are for heartbeats and elections, and there is nobody else: an idle node sleeps.
        self.engine.runtime_config().tick(false);
        Ok(())
    }

    /// The replicated state, for reading. It changes between two reads; a reader holds the lock for
    /// a moment only, since applying waits for it.
    pub fn state(&self) -> Arc<RwLock<ClusterState>> {
        Arc::clone(&self.state)
    }

    /// The way to change it.
    pub fn proposer(&self) -> Proposer {
        self.proposer.clone()
    }

    /// Returns when the store has failed and the process must end. Never before.
    pub async fn failed(&self) -> StoreError {
        let mut failure = self.failure.clone();
        // It ends with the engine, which says why before. What the engine says with every entry
        // would wake whoever waits here with every entry.
        let mut engine = self.engine.server_metrics();
        let mut running = true;
        loop {
            if let Some(error) = failure.borrow_and_update().clone() {
                return error;
            }
            if let Err(error) = &self.engine.metrics().borrow_watched().running_state {
                return stopped("go on", error);
            }
            if !running {
                return stopped("go on", &"its engine has ended");
            }
            tokio::select! {
                // The sender lives as long as this.
                Ok(()) = failure.changed() => {}
                changed = engine.changed() => running = changed.is_ok(),
            }
        }
    }

    /// Takes no further proposals, answers those that were taken, and stops.
    pub async fn close(mut self) {
        self.driver.stop().await;
        // Whatever went wrong is in the log, and the process ends now.
        let _ = self.engine.shutdown().await;
        drop(self.engine);
        drop(self.driver);
        let (thread, log_thread) = (self.thread, self.log_thread);
        let ended = tokio::task::spawn_blocking(move || {
            thread.finish();
            // It ends when the engine has let go of the log.
            log_thread.join()
        });
        // A panic was seen already.
        let _ = ended.await;
    }
}

/// The files of a store, read.
struct Opened {
    store_id: u64,
    log: Log,
    log_thread: JoinHandle<()>,
    machine: Machine,
    snapshots: Arc<Snapshots>,
}

impl Opened {
    /// Waits for the disk.
    fn open(dir: PathBuf, options: Options) -> Result<Self, StoreError> {
        let store_id = store_id(&dir, &options)?;
        let (state, current) = match snapshot::read(&dir, store_id)? {
            Some(snapshot) => (snapshot.state, Some((snapshot.meta, snapshot.bytes))),
            None => (ClusterState::default(), None),
        };
        let meta = current.as_ref().map(|(meta, _)| meta.clone());
        let meta = meta.unwrap_or_default();
        let above = meta.last_log_id.map(|last| last.index);
        let after_bytes = options.snapshot_after_bytes;
        let (log, log_thread) = Log::open(&dir, store_id, above, options)?;
        if let Some(purged) = log.purged()
            && above.is_none_or(|above| above < purged)
        {
            return Err(StoreError::Missing {
                path: snapshot::path(&dir),
                problem: "the log's older entries were purged because a snapshot had them",
            });
        }
        let snapshots = Arc::new(Snapshots::new(
            dir,
            store_id,
            log.shared(),
            after_bytes,
            current,
        ));
        let state = Arc::new(RwLock::new(state));
        let machine = Machine::new(state, meta, Arc::clone(&snapshots));
        Ok(Self {
            store_id,
            log,
            log_thread,
            machine,
            snapshots,
        })
    }
}

/// The id that the store was born with; bears it if it does not exist.
fn store_id(dir: &Path, options: &Options) -> Result<u64, StoreError> {
    match stored::read(dir)? {
        Some(stored) => Ok(stored.store_id),
        None => bear(dir, options),
    }
}

/// Makes an empty store. Its id is written last: without it there is no store yet.
fn bear(dir: &Path, options: &Options) -> Result<u64, StoreError> {
    let path = stored::path(dir);
    let mut builder = std::fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(StoreError::io("make", dir))?;
    let half_born = |number: &u64| {
        let path = recover::path(dir, *number);
        let bytes = std::fs::read(&path).map_err(StoreError::io("read", &path))?;
        let unused = bytes.iter().skip(segment::HEADER_BYTES).all(|b| *b == 0);
        Ok((path, unused))
    };
    let found = recover::numbers(dir)?;
    let found: Vec<_> = found.iter().map(half_born).collect::<Result<_, _>>()?;
    if snapshot::path(dir).exists() || found.iter().any(|(_, unused)| !unused) {
        return Err(StoreError::Missing {
            path,
            problem: "the folder holds a log or a snapshot",
        });
    }
    for (path, _) in found {
        std::fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
    }
    let store_id = random_u64();
    let header = Header {
        store_id,
        number: 1,
        first_sequence: 1,
    };
    recover::create(dir, &header, options.segment_bytes)?;
    stored::write(
        dir,
        &Stored {
            store_id,
            formed: None,
        },
    )?;
    if let Some(parent) = dir.parent() {
        recover::sync_folder(parent)?;
    }
    Ok(store_id)
}

fn config() -> Result<Config, StoreError> {
    let config = Config {
        cluster_name: "havenfs".to_owned(),
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: ELECTION_MS_MIN,
        election_timeout_max: ELECTION_MS_MAX,
        // `machine` decides by bytes.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: ENTRIES_KEPT,
        enable_pre_vote: Some(true),
        ..Config::default()
    };
    config
        .validate()
        .map_err(|error| stopped("check its configuration", &error))
}

/// The log's own error, if it has one: it says more.
fn first(failure: &watch::Receiver<Option<StoreError>>, other: StoreError) -> StoreError {
    failure.borrow().clone().unwrap_or(other)
}

fn stopped(step: &'static str, error: &impl ToString) -> StoreError {
    StoreError::Stopped {
        step,
        problem: error.to_string(),
    }
}
