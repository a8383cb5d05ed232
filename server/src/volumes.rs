//! Brings the export table into force: opens the file systems of each export, and crosses into
//! those that are mounted inside.
//!
//! Without `crossmnt` a directory that something is mounted on shows what lies underneath, or is
//! refused. With it, or with an export of its own that says `nohide`, LOOKUP goes on in the
//! mounted file system, which gets numbers of its own in the state directory, so that its handles
//! survive a restart.

use std::ffi::CStr;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode as OpenMode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;

use crate::backend::file::File;
use crate::backend::volume::Volume;
use crate::backend::{Failure, credential};
use crate::export::{Export, ExportTable, Fsid, Verdict};
use crate::node::Node;
use crate::state::StateError;

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
    /// Its numbers can't be stored.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Opens the volumes of one export: its root, and what is known to be mounted inside.
pub fn open_export(node: &Node, export: &Export) -> Result<(), VolumeError> {
    let path = &export.spec.path;
    let (_, generated) = node.state.export_numbers(path)?;
    let fsid = match export.spec.fsid {
        None => generated,
        Some(Fsid::Root) => 0,
        Some(Fsid::Number(number)) => u64::from(number),
        Some(Fsid::Uuid(uuid)) => fold_uuid(&uuid),
    };
    let volume =
        Volume::open(path, export.id, 0, fsid, crosses(node, export)).map_err(|errno| {
            VolumeError::Open {
                path: path.clone(),
                errno,
            }
        })?;
    if !volume.has_handles {
        tracing::info!(
            export = %path.display(),
            "no kernel file handles here: using the handle table in the state directory"
        );
    }
    let root = node.files.add_volume(volume);
    for (inside, numbers) in node.state.known_mounts(export.id) {
        let path = path.join(inside);
        // Something else, or nothing, may be mounted there now; then its handles are stale.
        if let Ok(volume) = Volume::open(&path, export.id, numbers.fs_id, numbers.fsid, true)
            && volume.dev != root.dev
        {
            node.files.add_volume(volume);
        }
    }
    Ok(())
}

/// Whether LOOKUP may leave the file system of this export's root.
fn crosses(node: &Node, export: &Export) -> bool {
    let own = export.rules().iter().any(|rule| rule.options.crossmnt);
    let exports = node.exports.load();
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
        .state
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
    node.files.open_root(&volume)
}

/// Folds a UUID into the 64 bits that NFSv3 has for `fsid`.
fn fold_uuid(uuid: &[u8; 16]) -> u64 {
    let (low, high) = (
        u128::from_be_bytes(*uuid) as u64,
        (u128::from_be_bytes(*uuid) >> 64) as u64,
    );
    low ^ high
}
