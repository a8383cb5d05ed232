//! File attributes and who may do what, as far as mode bits tell.
//!
//! Pure: no system calls. A file with a POSIX ACL is judged by the kernel instead (see
//! [`super::file::File::allows`]).

pub use rustix::fs::FileType;
use rustix::fs::Stat;

use super::credential::Caller;

/// A time with nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds.
    pub seconds: i64,
    /// Nanoseconds below one second.
    pub nanoseconds: u32,
}

/// The attributes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// What kind of file it is.
    pub kind: FileType,
    /// Permission bits with set-user-id, set-group-id and sticky bit.
    pub mode: u32,
    /// Number of names.
    pub nlink: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Allocated bytes.
    pub used: u64,
    /// Major number of a device.
    pub rdev_major: u32,
    /// Minor number of a device.
    pub rdev_minor: u32,
    /// Device number of the file system: valid on this node until the next boot only.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Last access.
    pub atime: Time,
    /// Last change of the contents.
    pub mtime: Time,
    /// Last change of contents or attributes.
    pub ctime: Time,
}

impl From<&Stat> for Attributes {
    fn from(stat: &Stat) -> Self {
        let time = |seconds: i64, nanoseconds: u64| Time {
            seconds,
            nanoseconds: u32::try_from(nanoseconds).unwrap_or(0),
        };
        Self {
            kind: FileType::from_raw_mode(stat.st_mode),
            mode: stat.st_mode & 0o7777,
            nlink: stat.st_nlink,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: stat.st_size as u64,
            used: (stat.st_blocks as u64).saturating_mul(512),
            rdev_major: rustix::fs::major(stat.st_rdev),
            rdev_minor: rustix::fs::minor(stat.st_rdev),
            dev: stat.st_dev,
            ino: stat.st_ino,
            atime: time(stat.st_atime, stat.st_atime_nsec),
            mtime: time(stat.st_mtime, stat.st_mtime_nsec),
            ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

/// What a caller wants to do with a file: the bits of one group of the mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want(pub u32);

impl Want {
    /// Read a file, list a directory.
    pub const READ: Self = Self(4);
    /// Write a file, change a directory.
    pub const WRITE: Self = Self(2);
    /// Execute a file, search a directory.
    pub const EXECUTE: Self = Self(1);

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl Attributes {
    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.kind == FileType::Directory
    }

    /// Whether the mode bits let `caller` do all of `want`; the superuser may do everything but
    /// execute a file that nobody may execute.
    pub fn mode_allows(&self, caller: &Caller, want: Want) -> bool {
        if caller.uid == 0 {
            let execute = want.0 & Want::EXECUTE.0 != 0;
            return !execute || self.is_dir() || self.mode & 0o111 != 0;
        }
        let shift = if caller.uid == self.uid {
            6
        } else if caller.in_group(self.gid) {
            3
        } else {
            0
        };
        (self.mode >> shift) & want.0 == want.0
    }
}

#[cfg(test)]
mod tests {
    use havenfs_rpc::auth::Gids;

    use super::super::credential::Groups;
    use super::*;

    const EPOCH: Time = Time {
        seconds: 0,
        nanoseconds: 0,
    };

    fn file(mode: u32, uid: u32, gid: u32) -> Attributes {
        Attributes {
            kind: FileType::RegularFile,
            mode,
            nlink: 1,
            uid,
            gid,
            size: 0,
            used: 0,
            rdev_major: 0,
            rdev_minor: 0,
            dev: 0,
            ino: 1,
            atime: EPOCH,
            mtime: EPOCH,
            ctime: EPOCH,
        }
    }

    fn caller(uid: u32, gid: u32, more: &[u32]) -> Caller {
        Caller {
            uid,
            gid,
            groups: Groups::Wire(Gids::new(more.iter().copied())),
        }
    }

    #[test]
    fn the_first_class_that_fits_decides() {
        let file = file(0o074, 10, 20);
        assert!(
            !file.mode_allows(&caller(10, 20, &[]), Want::READ),
            "owner, though in the group"
        );
        assert!(file.mode_allows(&caller(11, 20, &[]), Want::READ.and(Want::WRITE)));
        assert!(
            file.mode_allows(&caller(11, 1, &[20]), Want::EXECUTE),
            "supplementary group"
        );
        assert!(file.mode_allows(&caller(11, 1, &[]), Want::READ));
        assert!(!file.mode_allows(&caller(11, 1, &[]), Want::READ.and(Want::WRITE)));
    }

    #[test]
    fn root_may_all_but_execute_what_nobody_may() {
        assert!(file(0, 10, 20).mode_allows(&caller(0, 0, &[]), Want::READ.and(Want::WRITE)));
        assert!(!file(0o666, 10, 20).mode_allows(&caller(0, 0, &[]), Want::EXECUTE));
        assert!(file(0o100, 10, 20).mode_allows(&caller(0, 0, &[]), Want::EXECUTE));
    }
}
