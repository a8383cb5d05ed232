//! A node: everything that the programs share, put together once at start.

use std::sync::{Arc, Mutex, OnceLock};

use arc_swap::ArcSwap;

use crate::backend::files::Files;
use crate::backend::handle::{FileHandle, Signer};
use crate::backend::sys;
use crate::backend::table::{HandleTable, TableError};
use crate::clients::Clients;
use crate::export::{ExportTable, Groups, Names, NoAnswer, Resolver};
use crate::lock_service::{LockConnections, LockService};
use crate::metrics::Metrics;
use crate::mount_list::{MountList, MountListError};
use crate::net::limits::{Budget, CONNECTIONS_MAX, ConnectionCounts};
use crate::pool::Pool;
use crate::programs::portmap::{PortEntry, PortTable};
use crate::reply_cache::ReplyCache;
use crate::state::State;
use crate::volumes::{self, ExportsError};

/// What the programs share.
#[derive(Debug)]
pub struct Node {
    /// The state directory.
    pub state: State,
    /// The exports in force; a reload swaps the table whole.
    pub exports: ArcSwap<ExportTable>,
    /// The names of hosts that the exports mention.
    pub names: Names,
    /// The groups of users, for `manage-gids`.
    pub groups: Groups,
    /// The files behind the exports.
    pub files: Files,
    /// Who mounted what.
    pub mounts: MountList,
    /// The programs and ports that the portmapper tells.
    pub ports: PortTable,
    /// How clients find the ports, for people; set once at start.
    pub portmapper: OnceLock<String>,
    /// Held while a file system gets its number, so that of two volumes that show one at the same
    /// moment the second sees the first.
    pub numbering: Mutex<()>,
    /// The locks; set once at start, before anything listens for NLM.
    pub locks: OnceLock<Arc<LockService>>,
    /// The answers that may be asked for again.
    pub reply_cache: ReplyCache,
    /// The worker threads.
    pub pool: Pool,
    /// The counters.
    pub metrics: Metrics,
    /// The bytes that all connections hold.
    pub budget: Arc<Budget>,
    /// The open connections, by peer.
    pub connections: Arc<ConnectionCounts>,
    /// The open connections of NFS clients.
    pub clients: Arc<Clients>,
    /// The open connections over which hosts lock files.
    pub lock_connections: Arc<LockConnections>,
}

/// Why a node can't be put together.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// See [`TableError`].
    #[error(transparent)]
    Table(#[from] TableError),
    /// See [`MountListError`].
    #[error(transparent)]
    MountList(#[from] MountListError),
    /// See [`ExportsError`].
    #[error(transparent)]
    Exports(#[from] ExportsError),
    /// The worker threads can't be started.
    #[error("cannot start the worker threads: {0}")]
    Workers(std::io::Error),
}

impl Node {
    /// Puts a node together; no export is open yet. `ports` are those that the portmapper tells,
    /// `descriptors` is how many files this process may have open.
    pub fn new(
        state: State,
        exports: ExportTable,
        ports: impl IntoIterator<Item = PortEntry>,
        descriptors: usize,
    ) -> Result<Self, NodeError> {
        let names = Names::new(Resolver::system());
        let groups = Groups::new(|uid| sys::groups_of_user(uid).map_err(|_| NoAnswer));
        volumes::prepare(&names, &groups, &exports)?;
        let signer = Signer::new(state.handle_keys());
        let handles = HandleTable::load(state.dir())?;
        let mounts = MountList::open(state.dir())?;
        // A file may have three descriptors; a part is left for connections and everything else.
        let file_systems = state.file_systems();
        let opened_max = (descriptors / 6).clamp(64, 65_536);
        let files = Files::new(signer, handles, file_systems, opened_max);
        Ok(Self {
            state,
            exports: ArcSwap::from_pointee(exports),
            names,
            groups,
            files,
            mounts,
            ports: PortTable::new(ports),
            portmapper: OnceLock::new(),
            numbering: Mutex::default(),
            locks: OnceLock::new(),
            reply_cache: ReplyCache::default(),
            pool: Pool::start(WORKERS).map_err(NodeError::Workers)?,
            metrics: Metrics::default(),
            budget: Arc::new(Budget::default()),
            connections: Arc::new(ConnectionCounts::new(CONNECTIONS_MAX.min(descriptors / 3))),
            clients: Arc::new(Clients::default()),
            lock_connections: Arc::default(),
        })
    }
}

impl Node {
    /// Whether a handle's export is listed but not open, because its file system is not mounted
    /// yet. "Stale" would reach applications and stick, so the answer is "later", or silence.
    pub fn awaits_volume_of(&self, handle: &FileHandle) -> bool {
        self.files.export_of(handle).is_ok_and(|id| {
            self.exports.load().by_id(id).is_some() && self.files.volume(id, 0).is_none()
        })
    }

    /// Whether there are locks on files of the file system with this number.
    pub fn has_locks_on(&self, file_system: u32) -> bool {
        self.locks.get().is_some_and(|locks| {
            let state = locks.state();
            state.table().has_files_from(&file_system.to_be_bytes())
        })
    }
}

/// Threads for calls that may wait for a disk.
const WORKERS: usize = 12;
