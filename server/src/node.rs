//! A service on this node: everything that its programs share, put together for each epoch that
//! this node serves. Nothing of an earlier epoch is left in it: not the write verifier, not an open
//! file, not a reply.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, OnceLock};

use arc_swap::ArcSwap;

use crate::address::guard::Guard;
use crate::backend::files::Files;
use crate::backend::handle::{FileHandle, HandleKey, Signer};
use crate::backend::sys;
use crate::backend::table::HandleTable;
use crate::clients::Clients;
use crate::export::{ExportTable, Groups, Names, NoAnswer, Resolver};
use crate::gate::Gate;
use crate::lock_service::{LockConnections, LockService};
use crate::looks::Looks;
use crate::metrics::Metrics;
use crate::mount_list::MountList;
use crate::net::limits::{Budget, CONNECTIONS_MAX, ConnectionCounts};
use crate::numbering::Numbering;
use crate::pool::Pool;
use crate::programs::portmap::PortTable;
use crate::reply_cache::ReplyCache;
use crate::volumes::overlap::Shown;
use crate::volumes::{self, ExportsError};

/// What the programs share.
#[derive(Debug)]
pub struct Node {
    /// Whether this node may answer.
    pub gate: Arc<Gate>,
    /// Whether its addresses move along with it: then connections end without a word when it goes.
    pub floats: bool,
    /// Who keeps clients from seeing how this process dies.
    pub guard: Option<Arc<Guard>>,
    /// The numbers of exports and file systems.
    pub numbers: Numbering,
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
    /// What it shows; others that are opened on this node are compared with it. Held here for as
    /// long as something of it may be open.
    pub shown: Mutex<Arc<Vec<Shown>>>,
    /// The locks; set once at start, before anything listens for NLM.
    pub locks: OnceLock<Arc<LockService>>,
    /// The answers that may be asked for again.
    pub reply_cache: ReplyCache,
    /// The worker threads.
    pub pool: Pool,
    /// How many of their jobs ask the storage whether it works.
    pub probes: Arc<AtomicUsize>,
    /// The counters.
    pub metrics: Metrics,
    /// The turns of people who look at its files.
    pub looks: Looks,
    /// The bytes that all connections hold.
    pub budget: Arc<Budget>,
    /// The open connections, by peer.
    pub connections: Arc<ConnectionCounts>,
    /// The open connections of NFS clients.
    pub clients: Arc<Clients>,
    /// The open connections over which hosts lock files.
    pub lock_connections: Arc<LockConnections>,
    /// Last, since fields are dropped in their order: nobody holds it any more when all files are
    /// closed.
    pub storage_use: Arc<StorageUse>,
}

/// Held by whatever may have something of a service's storage open. When nobody else holds it, the
/// storage can be unmounted.
#[derive(Debug, Default)]
pub struct StorageUse;

/// Why a node can't be put together.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// See [`ExportsError`].
    #[error(transparent)]
    Exports(#[from] ExportsError),
    /// The worker threads can't be started.
    #[error("cannot start the worker threads: {0}")]
    Workers(std::io::Error),
}

/// What a service brings.
#[derive(Debug)]
pub struct Parts {
    /// Whether this node may answer.
    pub gate: Arc<Gate>,
    /// Who mounted what.
    pub mounts: MountList,
    /// The keys that sign handles.
    pub handle_keys: Vec<HandleKey>,
    /// The numbers of exports and file systems.
    pub numbers: Numbering,
    /// The entries of handles that the kernel does not make.
    pub handles: HandleTable,
    /// What is exported.
    pub exports: ExportTable,
    /// How many files it may have open.
    pub descriptors: usize,
    /// Whether its addresses move along with it.
    pub floats: bool,
    /// Who keeps clients from seeing how this process dies.
    pub guard: Option<Arc<Guard>>,
    /// Tells how long something is open.
    pub storage_use: Arc<StorageUse>,
}

impl Node {
    /// Puts it together; no export is open yet.
    pub fn new(parts: Parts) -> Result<Self, NodeError> {
        let Parts {
            gate,
            mounts,
            handle_keys,
            numbers,
            handles,
            exports,
            descriptors,
            floats,
            guard,
            storage_use,
        } = parts;
        let names = Names::new(Resolver::system());
        let groups = Groups::new(|uid| sys::groups_of_user(uid).map_err(|_| NoAnswer));
        volumes::prepare(&names, &groups, &exports)?;
        let reply_cache = ReplyCache::new(&handle_keys);
        let signer = Signer::new(handle_keys);
        // A file may have three descriptors; a part is left for connections and everything else.
        let file_systems = numbers.file_systems();
        let opened_max = (descriptors / 6).clamp(64, 65_536);
        let files = Files::new(signer, handles, file_systems, opened_max, Arc::clone(&gate));
        Ok(Self {
            looks: Looks::default(),
            gate,
            floats,
            guard,
            numbers,
            exports: ArcSwap::from_pointee(exports),
            names,
            groups,
            files,
            mounts,
            ports: PortTable::new([]),
            portmapper: OnceLock::new(),
            numbering: Mutex::default(),
            shown: Mutex::default(),
            locks: OnceLock::new(),
            reply_cache,
            pool: Pool::start(WORKERS).map_err(NodeError::Workers)?,
            probes: Arc::default(),
            metrics: Metrics::default(),
            budget: Arc::new(Budget::default()),
            connections: Arc::new(ConnectionCounts::new(CONNECTIONS_MAX.min(descriptors / 3))),
            clients: Arc::new(Clients::default()),
            lock_connections: Arc::default(),
            storage_use,
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
pub(crate) const WORKERS: usize = 12;
