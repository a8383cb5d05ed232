//! The replicated state in memory, fed by the log, and its snapshots.
//!
//! Entries are applied in batches, each under one write lock, so that readers on other threads see
//! a batch whole; the answers go out after the lock is released. A snapshot is a clone of the
//! state, which shares all its parts, written by a thread that may wait for the disk; applying
//! goes on meanwhile. A snapshot that can't be written is reported and tried again later: without
//! it the log is longer, and nothing is lost.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use futures_util::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{OptionalSend, RaftSnapshotBuilder};
use tokio::sync::{Notify, watch};

use super::error::StoreError;
use super::log::Shared;
use super::pending::{Done, Pending};
use super::snapshot;
use super::thread::blocking;
use super::types::{Applied, LogId, Payload, Proposed, SnapshotMeta, StoredMembership, Types};
use crate::cluster::{ClusterCommand, ClusterState, Command, Outcome, Queue, ServiceCommand};

/// A snapshot is due when the log since the last one has grown to the last one's length divided by
/// this. More often would write more in snapshots than in the log by a larger factor; less often
/// would make a start longer, which reads both, and takes several times longer for a byte of log.
const SNAPSHOT_DIVISOR: u64 = 2;
/// How many entries are applied under one lock at most.
const BATCH_ENTRIES_MAX: usize = 256;

type RaftSnapshot = openraft::Snapshot<super::types::LeaderId, u64, super::types::Member, Content>;

/// The file of a snapshot, read from its beginning; `None` where none could be written.
pub(super) struct Content(pub(super) Option<File>);

/// The snapshot of a store, and when the next one is due.
#[derive(Debug)]
pub(super) struct Snapshots {
    dir: PathBuf,
    store_id: u64,
    log: Arc<Shared>,
    /// What the snapshot file says about itself. Held while a new one is written, so that there is
    /// one writer.
    current: Mutex<Option<SnapshotMeta>>,
    /// Below this much log none is due.
    after_bytes: u64,
    /// How much log makes the next one due.
    threshold: AtomicU64,
    under_way: AtomicBool,
    due: Notify,
}

impl Snapshots {
    /// `current`: what the snapshot file says about itself, and its length.
    pub(super) fn new(
        dir: PathBuf,
        store_id: u64,
        log: Arc<Shared>,
        after_bytes: u64,
        current: Option<(SnapshotMeta, u64)>,
    ) -> Self {
        let bytes = current.as_ref().map_or(0, |(_, bytes)| *bytes);
        Self {
            dir,
            store_id,
            log,
            current: Mutex::new(current.map(|(meta, _)| meta)),
            after_bytes,
            threshold: AtomicU64::new(after_bytes.max(bytes / SNAPSHOT_DIVISOR)),
            under_way: AtomicBool::new(false),
            due: Notify::new(),
        }
    }

    /// Returns when a snapshot is due.
    pub(super) async fn due(&self) {
        self.due.notified().await;
    }

    fn check(&self) {
        if self.log.since_snapshot() > self.threshold.load(Ordering::Relaxed)
            && !self.under_way.swap(true, Ordering::Relaxed)
        {
            self.due.notify_one();
        }
    }

    /// Writes a snapshot, unless a later one was installed meanwhile; returns the one that is there
    /// then. Waits for the disk.
    fn write(&self, meta: SnapshotMeta, state: &ClusterState) -> Result<RaftSnapshot, StoreError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        // What is appended and not yet applied is counted as covered too; the next one comes later
        // by so much.
        let covered = self.log.since_snapshot();
        if current
            .as_ref()
            .is_none_or(|current| current.last_log_id <= meta.last_log_id)
        {
            let written = snapshot::write(&self.dir, self.store_id, &meta, state);
            let next = written
                .as_ref()
                .map_or(covered.saturating_add(self.after_bytes), |bytes| {
                    self.after_bytes.max(bytes / SNAPSHOT_DIVISOR)
                });
            self.threshold.store(next, Ordering::Relaxed);
            self.under_way.store(false, Ordering::Relaxed);
            written?;
            self.log.covered(covered);
            *current = Some(meta);
        } else {
            self.under_way.store(false, Ordering::Relaxed);
        }
        let current = current.clone().unwrap_or_default();
        self.open(current)
    }

    /// The snapshot that is there. Waits for the disk.
    fn read(&self) -> Result<Option<RaftSnapshot>, StoreError> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.clone().map(|meta| self.open(meta)).transpose()
    }

    fn open(&self, meta: SnapshotMeta) -> Result<RaftSnapshot, StoreError> {
        let path = snapshot::path(&self.dir);
        let file = File::open(&path).map_err(StoreError::io("open", &path))?;
        Ok(RaftSnapshot {
            meta,
            snapshot: Content(Some(file)),
        })
    }
}

/// openraft's state machine.
pub(super) struct Machine {
    state: Arc<RwLock<ClusterState>>,
    applied: Option<LogId>,
    membership: StoredMembership,
    snapshots: Arc<Snapshots>,
    pending: Arc<Pending>,
    /// Counts changes of who serves what.
    changes: watch::Sender<u64>,
    /// The membership, for others.
    settled: watch::Sender<StoredMembership>,
}

impl Machine {
    pub(super) fn new(
        state: Arc<RwLock<ClusterState>>,
        meta: SnapshotMeta,
        snapshots: Arc<Snapshots>,
        pending: Arc<Pending>,
    ) -> Self {
        let machine = Self {
            pending,
            changes: watch::Sender::new(0),
            settled: watch::Sender::new(StoredMembership::default()),
            state,
            applied: meta.last_log_id,
            membership: meta.last_membership,
            snapshots,
        };
        machine.see_all();
        machine.tell_membership();
        machine
    }

    /// Tells who is a member for sure, since a majority has it.
    fn tell_membership(&self) {
        if let Some(log_id) = self.membership.log_id() {
            let membership = self.membership.membership();
            self.snapshots.log.sole.applied(log_id.index, membership);
        }
        self.settled.send_replace(self.membership.clone());
    }

    /// The members as the last applied membership has them.
    pub(super) fn watch_members(&self) -> watch::Receiver<StoredMembership> {
        self.settled.subscribe()
    }

    /// What a snapshot says of leases is seen now: when it was written can't be told here.
    fn see_all(&self) {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        for renewal in state.renewals() {
            self.snapshots.log.see(renewal, false);
        }
    }

    /// What it applies to.
    pub(super) fn state(&self) -> Arc<RwLock<ClusterState>> {
        Arc::clone(&self.state)
    }

    /// For waiting until somebody else serves something.
    pub(super) fn watch_changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn apply_batch(&mut self, batch: &mut Vec<EntryResponder<Types>>, told: &mut Told) {
        let mut changes = false;
        {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            for (entry, responder) in batch.drain(..) {
                match &entry.payload {
                    Payload::Blank => {}
                    Payload::Normal(Proposed { origin, command }) => {
                        changes |= concerns_all(command);
                        self.snapshots.log.see_applied(command);
                        if let Some(outcome) = state.apply(origin, command)
                            && let Some(done) = self.pending.applied(origin)
                        {
                            told.push((done, outcome));
                        }
                    }
                    Payload::Membership(membership) => {
                        let log_id = Some(entry.log_id);
                        self.membership = StoredMembership::new(log_id, membership.clone());
                        self.tell_membership();
                        changes = true;
                    }
                }
                self.applied = Some(entry.log_id);
                if let Some(responder) = responder {
                    responder.send(Applied);
                }
            }
        }
        for (done, outcome) in told.drain(..) {
            done(Ok(outcome));
        }
        if changes {
            self.changes.send_modify(|count| *count += 1);
        }
    }

    fn builder(&self) -> Builder {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        Builder {
            state: state.clone(),
            meta: SnapshotMeta {
                last_log_id: self.applied,
                last_membership: self.membership.clone(),
            },
            snapshots: Arc::clone(&self.snapshots),
        }
    }
}

/// Outcomes that are told when the state can be read again.
type Told = Vec<(Done, Outcome)>;

/// Whether a command may change who serves what, or as what.
fn concerns_all(command: &Command) -> bool {
    match command {
        // Who waits for a fence may have it confirmed by hand.
        Command::Service(_, command) => matches!(
            command,
            ServiceCommand::InForce { .. } | ServiceCommand::Fenced { .. }
        ),
        Command::Cluster(command) => {
            !matches!(command, ClusterCommand::Renew(_) | ClusterCommand::Allot(_))
        }
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = Content;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        let mut batch = Vec::with_capacity(BATCH_ENTRIES_MAX.min(entries.size_hint().0));
        let mut told = Vec::new();
        while let Some(entry) = entries.next().await {
            batch.push(entry?);
            if batch.len() == BATCH_ENTRIES_MAX {
                self.apply_batch(&mut batch, &mut told);
            }
        }
        self.apply_batch(&mut batch, &mut told);
        self.snapshots.check();
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        self.builder()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, content: Content) -> io::Result<()> {
        let snapshots = Arc::clone(&self.snapshots);
        let expected = meta.clone();
        let install = move || {
            let path = snapshot::path(&snapshots.dir);
            let Some(file) = content.0 else {
                return Err(StoreError::damaged(&path, 0, "no snapshot was sent"));
            };
            let snapshot = snapshot::read_file(&path, &file, None)?;
            if snapshot.meta != expected {
                let problem = "the snapshot that was sent is not the one that was announced";
                return Err(StoreError::damaged(&path, 0, problem));
            }
            snapshots.write(snapshot.meta.clone(), &snapshot.state)?;
            Ok(snapshot)
        };
        let snapshot = blocking(install).await?;
        let origin = self.pending.origin();
        let passed = Queue::ALL.map(|queue| {
            let applied = snapshot
                .state
                .applied(origin.node, origin.incarnation, queue);
            (queue, applied)
        });
        let before = {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *state, snapshot.state)
        };
        // It may take a while to let go of a million locks.
        drop(tokio::task::spawn_blocking(move || drop(before)));
        self.see_all();
        self.applied = snapshot.meta.last_log_id;
        self.membership = snapshot.meta.last_membership;
        self.tell_membership();
        for (queue, number) in passed {
            self.pending.passed_over(queue, number);
        }
        self.changes.send_modify(|count| *count += 1);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<RaftSnapshot>> {
        let snapshots = Arc::clone(&self.snapshots);
        blocking(move || snapshots.read()).await
    }
}

/// A state that is going to be written.
pub(super) struct Builder {
    state: ClusterState,
    meta: SnapshotMeta,
    snapshots: Arc<Snapshots>,
}

impl RaftSnapshotBuilder<Types> for Builder {
    type SnapshotData = Content;

    async fn build_snapshot(&mut self) -> io::Result<RaftSnapshot> {
        let state = std::mem::take(&mut self.state);
        let meta = self.meta.clone();
        let snapshots = Arc::clone(&self.snapshots);
        let write = move || Ok::<_, StoreError>(snapshots.write(meta, &state));
        match blocking(write).await? {
            Ok(snapshot) => Ok(snapshot),
            Err(error) => {
                tracing::error!(%error, "no snapshot is written; the log grows until one is");
                // openraft takes an error for the end of the store, and an older place for no
                // change.
                Ok(RaftSnapshot {
                    meta: SnapshotMeta::default(),
                    snapshot: Content(None),
                })
            }
        }
    }
}
