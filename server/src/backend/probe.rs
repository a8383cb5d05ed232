//! Whether a file system still takes a write and brings it to disk.
//!
//! Two forms. [`Form::Write`]: a file without a name (O_TMPFILE) is made in the export's root, 4
//! KiB are written and synced, and it is gone with its descriptor: no listing, no time of a
//! directory and no notice shows it to anybody. [`Form::Look`], where nothing may be written or the
//! file system has no such files: its figures are asked for (statfs) and the directory is synced,
//! which finds out less, since both may be answered from memory.
//!
//! Only errors that say "this storage is dead" count as such. That it is full says that it works;
//! what this process lacks (descriptors, memory, rights) says nothing about it.
//!
//! Waits for the disk, for ever if that hangs: the caller runs it on a thread that may wait, with
//! the identity of the server, and has the deadline.

use std::os::fd::BorrowedFd;

use rustix::fs::{Mode, OFlags, fdatasync, fstatfs, fsync, openat};
use rustix::io::{Errno, pwrite};

use super::credential;

/// What is expected of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Clients may write, and it has taken a write before: if it says that it is read-only, the
    /// kernel made it so after an error.
    Writable,
    /// Clients may write if it can be written to: it may be read-only on purpose.
    MaybeWritable,
    /// Clients only read.
    Readable,
}

/// What was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Form {
    /// Its figures, and a sync of the directory.
    Look,
    /// A write and its sync.
    Write,
}

impl Form {
    /// For people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Look => "statfs and fsync",
            Self::Write => "write and fdatasync",
        }
    }
}

/// Tries the file system that a directory is on.
///
/// # Errors
/// What the kernel said, if that means that the storage is dead.
pub fn probe(directory: BorrowedFd<'_>, expected: Expected) -> Result<Form, Errno> {
    credential::as_server();
    if expected != Expected::Readable {
        match write(directory) {
            // That it is full is an answer.
            Ok(()) | Err(Errno::NOSPC | Errno::DQUOT) => return Ok(Form::Write),
            Err(Errno::ROFS) if expected == Expected::Writable => return Err(Errno::ROFS),
            Err(errno) if is_dead(errno) => return Err(errno),
            // No such files here, or no right to make one.
            Err(_) => {}
        }
    }
    let looked = fstatfs(directory).and_then(|_| fsync(directory));
    match looked {
        Err(errno) if is_dead(errno) => Err(errno),
        _ => Ok(Form::Look),
    }
}

fn write(directory: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = openat(directory, c".", flags, Mode::RUSR | Mode::WUSR)?;
    pwrite(&file, &[0; BYTES], 0)?;
    fdatasync(&file)
}

/// Whether an error says that the storage does not work, whoever asks.
const fn is_dead(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::IO
            | Errno::SHUTDOWN
            | Errno::NODEV
            | Errno::NXIO
            | Errno::STALE
            // Damaged: what ext4 and XFS say of themselves.
            | Errno::UCLEAN
            | Errno::REMOTEIO
            | Errno::TIMEDOUT
            // Whoever answers for it (FUSE, a server) is gone.
            | Errno::NOTCONN
            | Errno::HOSTDOWN
            | Errno::CONNABORTED
    )
}

const BYTES: usize = 4096;

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_probe_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let before = fs::metadata(dir.path()).unwrap();
        let fd = File::open(dir.path()).unwrap();
        let form = probe(fd.as_fd(), Expected::Writable).unwrap();
        assert_eq!(form, Form::Write);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let after = fs::metadata(dir.path()).unwrap();
        assert_eq!(after.modified().unwrap(), before.modified().unwrap());
        assert_eq!(
            probe(fd.as_fd(), Expected::Readable).unwrap(),
            Form::Look,
            "nothing is written where clients only read"
        );
    }

    #[test]
    fn where_no_file_can_be_made_it_looks() {
        let fd = File::open("/proc").unwrap();
        let form = probe(fd.as_fd(), Expected::MaybeWritable).unwrap();
        assert_eq!(form, Form::Look);
    }
}
