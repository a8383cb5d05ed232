//! SETATTR: every check first, then the changes.
//!
//! A call that changes several attributes must not stop half-way for a reason that could have
//! been known before (RFC 1813 3.3.2), so [`check`] judges all of them; the kernel judges again
//! when ownership, mode and explicit times are changed under the caller's identity, and adds what
//! it alone knows (set-id bits lost by chown and chmod, immutable files).

use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode as FileMode, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
};
use rustix::io::Errno;

use super::attributes::{Attributes, Time, Want};
use super::credential::{self, Caller};
use super::data::{self, OFFSET_MAX};
use super::file::{DataFd, File};
use super::files::Files;
use super::sys;
use super::{Failure, Mode};
use crate::fault::{Fault, is_planted};

/// What a time becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The server's clock.
    Now,
    /// The caller's value.
    To(Time),
}

/// Which attributes to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Changes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of the contents.
    pub mtime: Option<SetTime>,
}

/// Changes attributes; returns those that the file has then.
///
/// # Errors
/// EPERM where only the owner may, EACCES where the mode says no, EISDIR and EINVAL for the size
/// of what is no file.
pub fn setattr(
    files: &Files,
    file: &File,
    caller: &Caller,
    changes: &Changes,
    durable: bool,
) -> Result<Attributes, Failure> {
    let fd = prepare(file, caller, changes)?;
    files.must_serve()?;
    carry_out(files, file, fd, caller, changes, durable)
}

/// The same as a part of a call that has changed something already: to stop in the middle of it
/// would leave what no repeat of the call makes whole.
pub(super) fn set(
    files: &Files,
    file: &File,
    caller: &Caller,
    changes: &Changes,
    durable: bool,
) -> Result<Attributes, Failure> {
    let fd = prepare(file, caller, changes)?;
    carry_out(files, file, fd, caller, changes, durable)
}

/// All that may refuse the call, or wait for the disk, before anything is changed; returns what the
/// size is set through, if it is.
fn prepare<'f>(
    file: &'f File,
    caller: &Caller,
    changes: &Changes,
) -> Result<Option<DataFd<'f>>, Failure> {
    let before = file.attributes()?;
    check(file, &before, caller, changes)?;
    let opened = changes.size.map(|_| file.write_fd(Mode::Worker));
    opened.transpose()
}

fn carry_out(
    files: &Files,
    file: &File,
    fd: Option<DataFd<'_>>,
    caller: &Caller,
    changes: &Changes,
    durable: bool,
) -> Result<Attributes, Failure> {
    if let Some((size, fd)) = changes.size.zip(fd) {
        // As the caller, for the same reasons as in WRITE.
        credential::as_caller(caller, || rustix::fs::ftruncate(&fd, size))?;
        file.note_written();
    }
    if changes.uid.is_some() || changes.gid.is_some() {
        let (uid, gid) = (
            changes.uid.map(Uid::from_raw),
            changes.gid.map(Gid::from_raw),
        );
        credential::as_caller(caller, || {
            rustix::fs::chownat(file.fd(), c"", uid, gid, AtFlags::EMPTY_PATH)
        })?;
    }
    if let Some(mode) = changes.mode {
        credential::as_caller(caller, || chmod(file, mode))?;
    }
    set_times(file, caller, changes)?;
    if durable {
        sync_attributes(files, file)?;
    }
    file.attributes()
}

impl Changes {
    /// Succeeds if the values can be set at all.
    ///
    /// # Errors
    /// EINVAL for the ids that mean "nobody", and for a second's worth of nanoseconds or more.
    pub fn check_values(&self) -> Result<(), Failure> {
        let nobody = self.uid == Some(u32::MAX) || self.gid == Some(u32::MAX);
        let overfull = [self.atime, self.mtime].iter().any(
            |time| matches!(time, Some(SetTime::To(time)) if time.nanoseconds >= 1_000_000_000),
        );
        if nobody || overfull {
            Err(Errno::INVAL.into())
        } else {
            Ok(())
        }
    }
}

fn check(
    file: &File,
    before: &Attributes,
    caller: &Caller,
    changes: &Changes,
) -> Result<(), Failure> {
    changes.check_values()?;
    let root = caller.uid == 0;
    let owner = root || caller.uid == before.uid;
    if let Some(size) = changes.size {
        file.must_be_regular()?;
        if size > OFFSET_MAX {
            return Err(Errno::FBIG.into());
        }
        if !owner {
            file.allows(before, caller, Want::WRITE, Mode::Worker)?;
        }
    }
    let gives_away = changes.uid.is_some_and(|uid| uid != before.uid);
    let foreign_group = changes
        .gid
        .is_some_and(|gid| gid != before.gid && !caller.in_group(gid));
    let owner_only = changes.mode.is_some()
        || changes.uid.is_some()
        || changes.gid.is_some()
        || [changes.atime, changes.mtime]
            .iter()
            .any(|t| matches!(t, Some(SetTime::To(_))));
    if (owner_only && !owner) || (!root && (gives_away || foreign_group)) {
        return Err(Errno::PERM.into());
    }
    if !owner && (changes.atime.is_some() || changes.mtime.is_some()) {
        file.allows(before, caller, Want::WRITE, Mode::Worker)?;
    }
    Ok(())
}

/// Sets the mode bits of a file of any kind, as whoever this thread acts as.
pub fn chmod(file: &File, mode: u32) -> Result<(), Errno> {
    match sys::chmod_path_fd(file.fd(), mode) {
        Err(Errno::NOSYS) if file.kind() == FileType::Symlink => Err(Errno::OPNOTSUPP),
        // Before Linux 6.6: through the name that /proc gives the descriptor.
        Err(Errno::NOSYS) => rustix::fs::chmod(file.proc_path(), FileMode::from_raw_mode(mode)),
        other => other,
    }
}

fn set_times(file: &File, caller: &Caller, changes: &Changes) -> Result<(), Failure> {
    if changes.atime.is_none() && changes.mtime.is_none() {
        return Ok(());
    }
    let time = |change: Option<SetTime>| match change {
        None => Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        Some(SetTime::Now) => Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW,
        },
        Some(SetTime::To(to)) => Timespec {
            tv_sec: to.seconds,
            tv_nsec: i64::from(to.nanoseconds),
        },
    };
    let times = Timestamps {
        last_access: time(changes.atime),
        last_modification: time(changes.mtime),
    };
    let set = || rustix::fs::utimensat(file.fd(), c"", &times, AtFlags::EMPTY_PATH);
    let explicit = [changes.atime, changes.mtime]
        .iter()
        .any(|time| matches!(time, Some(SetTime::To(_))));
    if explicit {
        credential::as_caller(caller, set)?;
    } else {
        // The kernel lets a writer who is not the owner set both times to now, but not one of
        // them; `check` has judged the right to write.
        credential::as_server();
        set()?;
    }
    Ok(())
}

/// Brings the attributes of a file of any kind onto the disk.
pub fn sync_attributes(files: &Files, file: &File) -> Result<(), Failure> {
    match file.kind() {
        FileType::RegularFile | FileType::Directory => {
            let fd = file.sync_fd()?;
            file.sync_always(|| data::sync_file(files, file, fd.as_fd()))?;
        }
        // What can't be opened for data has no sync of its own.
        _ if is_planted(Fault::NoSync) => {}
        _ => rustix::fs::syncfs(file.volume.root())
            .inspect_err(|errno| files.note_sync_failed(file, *errno))?,
    }
    Ok(())
}
