//! What a file system has room for, and what it allows.

use rustix::fs::{fstatfs, fstatvfs};

use super::Failure;
use super::file::File;

/// How much a file system holds. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Size.
    pub bytes: u64,
    /// Free.
    pub free_bytes: u64,
    /// Free for callers other than root.
    pub available_bytes: u64,
    /// Number of files it can have.
    pub files: u64,
    /// Files that can still be made.
    pub free_files: u64,
    /// Files that callers other than root can still make.
    pub available_files: u64,
}

/// What a file system allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NameLimits {
    /// The most names of one file.
    pub link_max: u32,
    /// The longest name, in bytes.
    pub name_max: u32,
}

/// The space of the file system that a file lies on.
pub fn space(file: &File) -> Result<Space, Failure> {
    let stat = fstatvfs(file.fd())?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Ok(Space {
        bytes: bytes(stat.f_blocks),
        free_bytes: bytes(stat.f_bfree),
        available_bytes: bytes(stat.f_bavail),
        files: stat.f_files,
        free_files: stat.f_ffree,
        available_files: stat.f_favail,
    })
}

/// The limits of the file system that a file lies on.
pub fn name_limits(file: &File) -> Result<NameLimits, Failure> {
    let name_max = u32::try_from(fstatvfs(file.fd())?.f_namemax).unwrap_or(u32::MAX);
    // Linux has no call that tells the most names of a file: these are the numbers of the file
    // systems' own headers (ext4, XFS, tmpfs, btrfs); 127 is what POSIX says for "unknown".
    let link_max = match fstatfs(file.fd())?.f_type as u64 {
        0xef53 => 65_000,
        0x5846_5342 | 0x0102_1994 => i32::MAX as u32,
        0x9123_683e => 65_535,
        _ => 127,
    };
    Ok(NameLimits { link_max, name_max })
}
