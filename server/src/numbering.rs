//! The numbers of exports and file systems as a service of this node asks for them: read from the
//! replicated state, and allotted by the log where there is none yet, so that they are the same on
//! every node before a handle has them in it.
//!
//! To ask for a new one waits for the log: not on the thread of consensus, nor where calls are
//! served inline.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use crate::cluster::numbers::Allot;
use crate::cluster::{ClusterCommand, ClusterState, Command, Origin, Outcome, ServiceId};
use crate::raft::Unavailable;
use crate::random::random_u64;
use crate::state::State;

/// The numbers of one file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsNumbers {
    /// Its number within the export.
    pub fs_id: u32,
    /// What clients see as `fsid`.
    pub fsid: u64,
}

/// A number can't be allotted.
#[derive(Debug, thiserror::Error)]
pub enum NumberingError {
    /// The log takes nothing.
    #[error("cannot number `{}`: {source}", .path.display())]
    Unavailable {
        /// What it is for.
        path: PathBuf,
        /// Why.
        #[source]
        source: Unavailable,
    },
    /// This node does not serve any more.
    #[error("cannot number `{}`: another node serves it now", .path.display())]
    EarlierEpoch {
        /// What it is for.
        path: PathBuf,
    },
}

/// Proposes a command and waits until it is carried out.
pub type Ask = Box<dyn Fn(Command) -> Result<Outcome, Unavailable> + Send + Sync>;

/// The numbers of a service.
pub struct Numbering {
    service: ServiceId,
    epoch: u32,
    state: Arc<RwLock<ClusterState>>,
    ask: Ask,
    /// Where a copy is kept, if this node is the only one.
    copy: Option<Arc<State>>,
}

impl Numbering {
    /// The numbers of a service; `copy` is where a copy is kept.
    pub const fn new(
        (service, epoch): (ServiceId, u32),
        state: Arc<RwLock<ClusterState>>,
        ask: Ask,
        copy: Option<Arc<State>>,
    ) -> Self {
        Self {
            service,
            epoch,
            state,
            ask,
            copy,
        }
    }

    /// Numbers that are kept in memory alone: for a server without a store, as tests make it.
    pub fn in_memory() -> Self {
        let state: Arc<RwLock<ClusterState>> = Arc::default();
        let applied = Arc::clone(&state);
        let ask = move |command: Command| {
            let mut state = applied.write().unwrap_or_else(PoisonError::into_inner);
            let outcome = state.apply(&Origin::default(), &command);
            outcome.ok_or(Unavailable::Unknown)
        };
        Self::new((ServiceId::FIRST, 0), state, Box::new(ask), None)
    }

    /// The id of the export at `path`, and its generated `fsid`; allotted at first sight.
    pub fn export_numbers(&self, path: &Path) -> Result<(u32, u64), NumberingError> {
        let bytes = path.as_os_str().as_bytes();
        let known = || {
            let state = self.state();
            let export = state.numbers().of_path(self.service, bytes);
            export.map(|export| (export.id, export.fsid))
        };
        let asked = || Allot::Export {
            service: self.service,
            path: bytes.into(),
            fsid: random_u64(),
        };
        Ok(self
            .known_or_allotted(path, known, asked)?
            .unwrap_or_default())
    }

    /// The numbers of the file system mounted at `path` (relative) inside an export; allotted at
    /// first sight. `None` if there is no such export.
    pub fn mount_numbers(
        &self,
        export: u32,
        path: &Path,
    ) -> Result<Option<FsNumbers>, NumberingError> {
        let bytes = path.as_os_str().as_bytes();
        let known = || {
            let state = self.state();
            let mut mounts = state.numbers().of_export(export)?.mounts.iter();
            let mount = mounts.find(|mount| *mount.path == *bytes)?;
            Some(FsNumbers {
                fs_id: mount.fs_id,
                fsid: mount.fsid,
            })
        };
        let asked = || Allot::Mount {
            export,
            path: bytes.into(),
            fsid: random_u64(),
        };
        self.known_or_allotted(path, known, asked)
    }

    /// The file systems that were ever seen mounted inside an export.
    pub fn known_mounts(&self, export: u32) -> Vec<(PathBuf, FsNumbers)> {
        let state = self.state();
        let export = state.numbers().of_export(export);
        let mounts = export.into_iter().flat_map(|export| &export.mounts);
        let mounts = mounts.map(|mount| {
            let numbers = FsNumbers {
                fs_id: mount.fs_id,
                fsid: mount.fsid,
            };
            let path = OsString::from_vec(mount.path.to_vec());
            (PathBuf::from(path), numbers)
        });
        mounts.collect()
    }

    /// The numbers of the file systems that stand behind the parts of exports, by export id and
    /// file-system id within it: one number for one file system, however many exports and mounts
    /// show it, so that a file has one lock table. Those of removed exports are kept.
    pub fn file_systems(&self) -> HashMap<(u32, u32), u32> {
        let state = self.state();
        let exports = state.numbers().exports().iter();
        let of_service = exports.filter(|export| export.service == self.service);
        let numbers = of_service.flat_map(|export| {
            let mounts = export.mounts.iter();
            mounts
                .map(|mount| ((export.id, mount.fs_id), mount.file_system))
                .chain([((export.id, 0), export.file_system)])
        });
        numbers
            .filter_map(|(ids, number)| Some((ids, number?)))
            .collect()
    }

    /// Sets the number of the file system at `path`: `number`, or one that no other has.
    pub fn set_file_system(
        &self,
        path: &Path,
        export: u32,
        fs_id: u32,
        number: Option<u32>,
    ) -> Result<u32, NumberingError> {
        self.allot(
            path,
            Allot::FileSystem {
                service: self.service,
                epoch: self.epoch,
                export,
                fs_id,
                number,
            },
        )?;
        let numbers = self.file_systems();
        Ok(numbers.get(&(export, fs_id)).copied().unwrap_or_default())
    }

    /// Takes over the copy, if the store has no numbers: it is new, or was lost.
    pub fn restore(&self) -> Result<(), Unavailable> {
        let exports = self.copy.as_ref().map(|copy| copy.copy_of_exports());
        let exports = exports.unwrap_or_default();
        if exports.is_empty() || !self.state().numbers().exports().is_empty() {
            return Ok(());
        }
        let command = ClusterCommand::Allot(Allot::Import(exports));
        (self.ask)(Command::Cluster(command)).map(drop)
    }

    fn known_or_allotted<T>(
        &self,
        path: &Path,
        known: impl Fn() -> Option<T>,
        asked: impl FnOnce() -> Allot,
    ) -> Result<Option<T>, NumberingError> {
        if let Some(numbers) = known() {
            return Ok(Some(numbers));
        }
        self.allot(path, asked())?;
        Ok(known())
    }

    fn allot(&self, path: &Path, asked: Allot) -> Result<(), NumberingError> {
        let command = Command::Cluster(ClusterCommand::Allot(asked));
        let outcome = (self.ask)(command).map_err(|source| NumberingError::Unavailable {
            path: path.to_path_buf(),
            source,
        })?;
        if outcome == Outcome::EarlierEpoch {
            let path = path.to_path_buf();
            return Err(NumberingError::EarlierEpoch { path });
        }
        let numbers = self.state().numbers().clone();
        if let Some(copy) = &self.copy
            && let Err(error) = copy.keep_copy(numbers.exports())
        {
            // The numbers themselves are in the store.
            tracing::warn!(%error, "no copy of the exports' numbers is kept");
        }
        Ok(())
    }

    fn state(&self) -> RwLockReadGuard<'_, ClusterState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Numbering {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Numbering")
            .field("service", &self.service)
            .finish_non_exhaustive()
    }
}
