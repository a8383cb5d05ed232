//! Brings the export table into force: opens the file systems of each export, and crosses into
//! those that are mounted inside.
//!
//! Without `crossmnt` a directory that something is mounted on shows what lies underneath, or is
//! refused. With it, or with an export of its own that says `nohide`, LOOKUP goes on in the
//! mounted file system, which gets numbers of its own in the replicated state, so that its handles
//! survive a restart.

pub mod overlap;
mod reload;

use std::collections::HashMap;
use std::ffi::CStr;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, PoisonError};

use rustix::fs::{Mode as OpenMode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;

use crate::backend::file::File;
use crate::backend::volume::Volume;
use crate::backend::{Failure, credential};
use crate::cluster::definition::TooLarge;
use crate::export::{
    self, DirectoryFault, Export, ExportErrors, ExportSpec, ExportTable, Fsid, Groups, Names,
    Sources, Verdict,
};
use crate::node::Node;
use crate::numbering::{Numbering, NumberingError};
pub use crate::volumes::overlap::{check_lists, check_overlap};
pub use crate::volumes::reload::{expected, reload};

/// An export that can't be served now.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The directory can't be opened.
    #[error("cannot export `{}`: {errno}", .path.display())]
    Open {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        errno: Errno,
    },
    /// Two exports turned out to show one file system, and both have locks under a number of their
    /// own: which of two locks on a file came first can't be told any more.
    #[error(
        "cannot export `{}`: it shows the same file system as another export, which it did not \
         before, and there are locks from both\nhint: unlock what is locked under one of them \
         before both are exported", .path.display()
    )]
    TwoNumbers {
        /// The directory.
        path: PathBuf,
    },
    /// It gets no numbers.
    #[error(transparent)]
    Numbering(#[from] NumberingError),
}

/// Why the export lists can't be brought into force.
#[derive(Debug, thiserror::Error)]
pub enum ExportsError {
    /// The lists have errors.
    #[error("{}", join(.0))]
    Lists(ExportErrors),
    /// They list nothing.
    #[error(
        "nothing is exported\nhint: name a directory in `exports` of its [[service]], or in its \
         exports_file"
    )]
    Nothing,
    /// A service of a cluster can't have so much.
    #[error("{0}\nhint: export a directory above them, or make two services of it")]
    TooLarge(TooLarge),
    /// A directory can't be exported.
    #[error("{0}")]
    Directory(String),
    /// See [`VolumeError`].
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Two services show the same files.
    #[error(
        "services `{one}` and `{other}` both export `{}`: each export belongs to one service, or \
         both could give the same lock away", .path.display()
    )]
    Overlap {
        /// A service.
        one: String,
        /// Another one.
        other: String,
        /// What both export.
        path: PathBuf,
    },
    /// Clients are to write where nobody can.
    #[error(
        "cannot export `{}` for writing: {errno}\nhint: export it `ro`, or have its file system \
         mounted for writing on all nodes", .path.display()
    )]
    NotWritable {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        errno: Errno,
    },
    /// Which files are free is not known now.
    #[error(
        "service `{0}` has a new definition that is not in force yet, so that its files may not be \
         free\nhint: wait until `havenfs service list` shows it in force, then reload again; if it \
         stays so, see the log of its active node"
    )]
    Unsettled(String),
    /// It gets no id.
    #[error(transparent)]
    Numbering(#[from] NumberingError),
    /// A thread that looks names up can't be made.
    #[error("cannot start looking up names: {0}")]
    Thread(std::io::Error),
}

fn join(errors: &ExportErrors) -> String {
    let lines: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

/// Reads the export lists.
pub fn read_lists(sources: &Sources) -> Result<Vec<ExportSpec>, ExportsError> {
    let loaded = export::load(sources).map_err(ExportsError::Lists)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    Ok(loaded.specs)
}

/// Looks at the directories and gives every export its id.
pub fn load_table(
    specs: Vec<ExportSpec>,
    numbering: &Numbering,
) -> Result<ExportTable, ExportsError> {
    for problem in export::check_directories(&specs) {
        match problem.fault {
            DirectoryFault::NotMounted | DirectoryFault::SameDirectory => {
                tracing::warn!("{}", problem.problem);
            }
            _ => return Err(ExportsError::Directory(problem.problem.to_string())),
        }
    }
    let mut ids = HashMap::new();
    for spec in &specs {
        ids.insert(spec.path.clone(), numbering.export_numbers(&spec.path)?.0);
    }
    Ok(ExportTable::new(specs, |path: &Path| {
        ids.get(path).copied().unwrap_or(0)
    }))
}

/// Starts what a table needs to be asked: the lookup of names and of groups.
pub fn prepare(names: &Names, groups: &Groups, table: &ExportTable) -> Result<(), ExportsError> {
    names.prepare(table).map_err(ExportsError::Thread)?;
    if table.manages_gids() {
        groups.start().map_err(ExportsError::Thread)?;
    }
    Ok(())
}

/// Opens every export that is not open; one whose `mountpoint` is not mounted is left out for now.
pub fn open_exports(node: &Node) -> Result<(), ExportsError> {
    let exports = node.exports.load_full();
    let mut failed = None;
    for export in missing(node, &exports, &[]) {
        // The others are opened all the same.
        if let Err(error) = open_export(node, &exports, export) {
            failed = failed.or(Some(error));
        }
    }
    failed.map_or(Ok(()), |error| Err(error.into()))
}

/// The exports that are not open and could be; those in `again` although they are.
fn missing<'a>(node: &Node, exports: &'a ExportTable, again: &[u32]) -> Vec<&'a Export> {
    let specs: Vec<_> = exports
        .exports()
        .iter()
        .map(|export| export.spec.clone())
        .collect();
    let faults = export::check_directories(&specs);
    let is_unmounted = |export: &Export| {
        faults.iter().any(|problem| {
            problem.path == export.spec.path && problem.fault == DirectoryFault::NotMounted
        })
    };
    let is_open = |export: &Export| node.files.volume(export.id, 0).is_some();
    let exports = exports.exports().iter();
    exports
        .filter(|export| !is_unmounted(export))
        .filter(|export| !is_open(export) || again.contains(&export.id))
        .collect()
}

/// A volume that is not in service yet.
struct Fresh {
    volume: Volume,
    path: PathBuf,
}

/// Opens the volumes of one export, and puts them into service.
fn open_export(node: &Node, exports: &ExportTable, export: &Export) -> Result<(), VolumeError> {
    for Fresh { volume, path } in open_volumes(node, exports, export)? {
        bring_in(node, volume, &path)?;
    }
    Ok(())
}

/// Opens the volumes of one export: its root, and what is known to be mounted inside.
fn open_volumes(
    node: &Node,
    exports: &ExportTable,
    export: &Export,
) -> Result<Vec<Fresh>, VolumeError> {
    let path = &export.spec.path;
    let (_, generated) = node.numbers.export_numbers(path)?;
    let fsid = match export.spec.fsid {
        None => generated,
        Some(Fsid::Root) => 0,
        Some(Fsid::Number(number)) => u64::from(number),
        Some(Fsid::Uuid(uuid)) => fold_uuid(&uuid),
    };
    let root = Volume::open(path, export.id, 0, fsid, crosses(exports, export));
    let root = root.map_err(|errno| VolumeError::Open {
        path: path.clone(),
        errno,
    })?;
    if !root.has_handles {
        tracing::info!(
            export = %path.display(),
            "no kernel file handles here: using the handle table in the state directory"
        );
    }
    let dev = root.dev;
    let mut opened = vec![Fresh {
        volume: root,
        path: path.clone(),
    }];
    for (inside, numbers) in node.numbers.known_mounts(export.id) {
        let path = path.join(inside);
        // Something else, or nothing, may be mounted there now; then its handles are stale.
        if let Ok(volume) = Volume::open(&path, export.id, numbers.fs_id, numbers.fsid, true)
            && volume.dev != dev
        {
            opened.push(Fresh { volume, path });
        }
    }
    Ok(opened)
}

/// Whether LOOKUP may leave the file system of this export's root.
fn crosses(exports: &ExportTable, export: &Export) -> bool {
    let own = export.rules().iter().any(|rule| rule.options.crossmnt);
    own || exports.exports().iter().any(|other| {
        other.id != export.id
            && other.spec.path.starts_with(&export.spec.path)
            && other.rules().iter().any(|rule| rule.options.nohide)
    })
}

/// Goes on from `dir` into what is mounted on `name`. Runs on a worker thread.
///
/// # Errors
/// EACCES where the exports don't allow it.
pub fn cross(
    node: &Node,
    exports: &ExportTable,
    dir: &File,
    name: &CStr,
    crossmnt: bool,
    peer: IpAddr,
) -> Result<Arc<File>, Failure> {
    credential::as_server();
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = openat2(
        dir.fd(),
        name,
        flags,
        OpenMode::empty(),
        ResolveFlags::empty(),
    )?;
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let path = rustix::fs::readlink(link, Vec::new())?;
    let path = PathBuf::from(std::ffi::OsString::from_vec(path.into_bytes()));
    let inner = exports
        .by_path(&path)
        .filter(|(_, rest)| rest.as_os_str().is_empty());
    if let Some((export, _)) = inner {
        let shown = matches!(
            export.policy(peer, &node.names),
            Verdict::Allowed(rule) if crossmnt || rule.options.nohide
        );
        let volume = node.files.volume(export.id, 0).filter(|_| shown);
        return node
            .files
            .open_root(&volume.ok_or(Failure::Os(Errno::ACCESS))?);
    }
    let export = exports.by_id(dir.volume.export_id).ok_or(Failure::Stale)?;
    let inside = path
        .strip_prefix(&export.spec.path)
        .unwrap_or(Path::new(""));
    if !crossmnt || inside.as_os_str().is_empty() {
        return Err(Errno::ACCESS.into());
    }
    let numbers = node
        .numbers
        .mount_numbers(export.id, inside)
        .map_err(|error| {
            tracing::error!(%error, "cannot cross into a mounted file system");
            Failure::Jukebox
        })?;
    let numbers = numbers.ok_or(Failure::Stale)?;
    let dev = fstat(fd.as_fd())?.st_dev;
    let volume = node
        .files
        .volume_or_open(export.id, numbers.fs_id, dev, || {
            Volume::open(&path, export.id, numbers.fs_id, numbers.fsid, true)
        })?;
    // Before any of its files gets a handle.
    let numbered = {
        let _alone = numbering(node);
        let twins = node.files.twins_of(&volume);
        number_file_system(node, &volume, &path, twins.iter().map(|twin| &**twin))
    };
    numbered.map_err(|error| {
        tracing::error!(%error, "cannot cross into a mounted file system");
        Failure::Jukebox
    })?;
    node.files.open_root(&volume)
}

/// Puts a volume into service; its file system has a number then.
fn bring_in(node: &Node, volume: Volume, path: &Path) -> Result<Arc<Volume>, VolumeError> {
    let _alone = numbering(node);
    let twins = node.files.twins_of(&volume);
    number_file_system(node, &volume, path, twins.iter().map(|twin| &**twin))?;
    Ok(node.files.add_volume(volume))
}

fn numbering(node: &Node) -> MutexGuard<'_, ()> {
    node.numbering
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Gives the file system of a volume the number that locks on its files are known by: the one that
/// it has, or that of another volume that shows the same file system, or a new one. One at a time
/// ([`numbering`]): two numbers for one file system are two locks on one file.
fn number_file_system<'a>(
    node: &Node,
    volume: &Volume,
    path: &Path,
    mut twins: impl Iterator<Item = &'a Volume>,
) -> Result<(), VolumeError> {
    let (export_id, fs_id) = (volume.export_id, volume.fs_id);
    let own = node.files.file_system(export_id, fs_id);
    let twin = twins.find_map(|twin| node.files.file_system(twin.export_id, twin.fs_id));
    if own.is_some_and(|own| twin.is_none_or(|twin| twin == own)) {
        return Ok(());
    }
    if let Some(own) = own
        && node.has_locks_on(own)
    {
        return Err(VolumeError::TwoNumbers {
            path: path.to_path_buf(),
        });
    }
    let number = node.numbers.set_file_system(path, export_id, fs_id, twin)?;
    node.files.set_file_system(export_id, fs_id, number);
    Ok(())
}

/// Folds a UUID into the 64 bits that NFSv3 has for `fsid`.
fn fold_uuid(uuid: &[u8; 16]) -> u64 {
    let (low, high) = (
        u128::from_be_bytes(*uuid) as u64,
        (u128::from_be_bytes(*uuid) >> 64) as u64,
    );
    low ^ high
}
