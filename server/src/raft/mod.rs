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

mod around;
mod change;
mod cluster;
mod codec;
mod differing;
mod error;
mod index;
mod joining;
mod leading;
mod log;
mod machine;
mod moved;
mod offline;
mod open;
mod opened;
mod peer;
mod pending;
#[cfg(test)]
mod planted;
mod proposer;
mod recover;
mod route;
mod segment;
mod snapshot;
mod sole;
mod stored;
#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
mod thread;
mod types;
mod wal;

use std::path::Path;
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use openraft::{Config, Raft, SnapshotPolicy};
use tokio::sync::watch;

pub use self::around::{check_none_formed, check_none_lives};
pub use self::change::{ChangeError, MemberChange, go_alone};
pub use self::cluster::{Cluster, MemberSeen};
pub use self::error::StoreError;
pub use self::offline::{OfflineError, Survived, begin, survive};
pub use self::peer::{Applicant, lives};
pub use self::proposer::{PROPOSALS_MAX, Proposer, Unavailable};

use self::joining::{Joined, Started, lead_alone, start_alone, start_member};
use self::log::Shared;
use self::machine::Machine;
use self::opened::Opened;
use self::proposer::Driver;
use self::thread::EngineThread;
use self::types::Types;
use self::wal::Options;
use crate::cluster::service::Active;
use crate::cluster::{ClusterState, NodeId};
use crate::config::cluster::ClusterConfig;

const HEARTBEAT_MS: u64 = 50;
/// Looks whether a file can be the key of a cluster.
///
/// # Errors
/// What to tell people, with a hint.
pub fn check_key_file(path: &Path) -> Result<(), String> {
    let key = peer::ClusterKey::read(path);
    key.map(drop).map_err(|error| error.to_string())
}

/// A leader that is silent for the longer of these is not followed any more, and the first that
/// wants to lead says so after the two together; so the next one leads after 0.5 to 0.7 s, which
/// must be well below a lease.
const ELECTION_MS_MIN: u64 = 150;
const ELECTION_MS_MAX: u64 = 300;
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
    changes: watch::Receiver<u64>,
    log: Arc<Shared>,
    incarnation: u64,
    thread: EngineThread,
    log_thread: JoinHandle<()>,
    joined: Option<Joined>,
}

impl Store {
    /// Opens the store in `dir`, or makes it if there is none. Alone, it returns when this node
    /// leads its cluster of one and all that the log holds is applied; with a cluster, when that is
    /// formed and this node's engine runs, whoever leads. `missing` is told what it waits for.
    pub async fn open(
        dir: &Path,
        cluster: Option<&ClusterConfig>,
        missing: watch::Sender<Vec<String>>,
    ) -> Result<Self, StoreError> {
        let cluster = cluster.map(|cluster| (cluster.clone(), missing));
        Self::open_with(dir, cluster, Options::default()).await
    }

    async fn open_with(
        dir: &Path,
        cluster: Option<(ClusterConfig, watch::Sender<Vec<String>>)>,
        options: Options,
    ) -> Result<Self, StoreError> {
        let dir = dir.to_path_buf();
        let opening = dir.clone();
        let opened = tokio::task::spawn_blocking(move || Opened::open(opening, options));
        let mut opened = opened
            .await
            .map_err(|error| stopped("open its files", &error))??;
        opened.stored.check_done()?;
        let log = opened.log.shared();
        let mut failure = log.watch_failure();
        let state = opened.machine.state();
        let changes = opened.machine.watch_changes();
        let incarnation = opened.pending.origin().incarnation;
        let store_id = opened.stored.store_id;
        let Some(log_thread) = opened.log_thread.take() else {
            return Err(stopped("start", &"its log has no thread"));
        };
        let (config, is_alone) = (config()?, cluster.is_none());
        let thread =
            EngineThread::start(!is_alone).map_err(|error| stopped("start its thread", &error))?;
        let start = async move {
            match cluster {
                None => start_alone(opened, config).await,
                Some((cluster, missing)) => {
                    start_member(dir, opened, config, cluster, missing).await
                }
            }
        };
        let started = thread.handle().spawn(start).await;
        let started = started.map_err(|error| stopped("start", &error))?;
        // It reads the log, and that names what is wrong better than openraft does.
        let Started {
            engine,
            driver,
            joined,
        } = started.map_err(|error| first(&failure, error))?;
        let store = Self {
            state,
            proposer: driver.proposer(),
            driver,
            failure: failure.clone(),
            changes,
            log,
            incarnation,
            thread,
            log_thread,
            joined,
            engine,
        };
        if !is_alone {
            return Ok(store);
        }
        let result = tokio::select! {
            result = lead_alone(&store.engine, store_id) => result,
            // The sender lives as long as the engine.
            Ok(_) = failure.wait_for(Option::is_some) => Ok(()),
        };
        let failure = store.failure.borrow().clone();
        match (failure, result) {
            (Some(error), _) | (None, Err(error)) => Err(error),
            (None, Ok(())) => Ok(store),
        }
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

    /// For waiting until somebody else serves something: changes each time.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    /// Who is in the cluster, and who this node is in it.
    pub fn cluster(&self) -> Cluster {
        let own = Active {
            node: NodeId(*self.engine.node_id()),
            incarnation: self.incarnation,
        };
        let changes = self.joined.as_ref();
        let changes = changes.and_then(|joined| joined.changes.clone());
        Cluster::new(self.engine.clone(), Arc::clone(&self.log), own, changes)
    }

    /// What signs file handles, the same on all nodes of the cluster; none if this node is alone.
    pub fn handle_secret(&self) -> Option<[u8; 16]> {
        self.joined.as_ref().map(|joined| joined.handle_secret)
    }

    /// Returns when the store has failed and the process must end. Never before.
    pub async fn failed(&self) -> StoreError {
        let mut failure = self.failure.clone();
        // It ends with the engine, which says why before. What the engine says with every entry
        // would wake whoever waits here with every entry.
        let mut engine = self.engine.server_metrics();
        let mut running = true;
        let joined = self.joined.as_ref();
        let mut removed = joined.map(|joined| joined.peers.watch_removed());
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
            let reason = removed
                .as_ref()
                .and_then(|removed| removed.borrow().clone());
            if let Some(reason) = reason {
                return StoreError::Removed(reason);
            }
            let removal = async {
                let told = match &mut removed {
                    Some(removed) => removed.changed().await.is_ok(),
                    None => false,
                };
                if !told {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                // The sender lives as long as this.
                Ok(()) = failure.changed() => {}
                changed = engine.changed() => running = changed.is_ok(),
                () = removal => {}
            }
        }
    }

    /// Takes no further proposals, answers those that were taken, and stops.
    pub async fn close(mut self) {
        self.driver.stop().await;
        if self.joined.is_some() {
            hand_over(&self.engine).await;
        }
        // Whatever went wrong is in the log, and the process ends now.
        let _ = self.engine.shutdown().await;
        drop(self.joined);
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
        // A leader sends entries to the others while it writes them itself. One that led on in its
        // term after a restart could put other entries in the place of those that it has lost, and
        // the others would not notice.
        enable_leader_restore: Some(false),
        ..Config::default()
    };
    config
        .validate()
        .map_err(|error| stopped("check its configuration", &error))
}

/// Has another member lead, if this node does: that spares the others an election.
async fn hand_over(engine: &Engine) {
    let own = *engine.node_id();
    let mut leadership = engine.server_metrics();
    let others = {
        let metrics = leadership.borrow_watched();
        let members = metrics.membership_config.nodes();
        let others = members.filter(|(node, _)| **node != own);
        // Rather one with data: a witness has nothing to lead for.
        let mut others: Vec<_> = others
            .map(|(node, member)| (member.witness, *node))
            .collect();
        others.sort_unstable();
        others
    };
    for (_, other) in others {
        if !engine.is_leader() {
            return;
        }
        // An error says that the engine has ended.
        if engine.trigger().transfer_leader(other).await.is_err() {
            return;
        }
        let handed = async {
            while leadership.borrow_watched().current_leader == Some(own) {
                if leadership.changed().await.is_err() {
                    return;
                }
            }
        };
        // One that does not live takes nothing.
        let _ = tokio::time::timeout(HAND_OVER_MAX, handed).await;
    }
}

/// How long a member may take to become the leader.
const HAND_OVER_MAX: Duration = Duration::from_millis(200);

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
