//! Listing a directory from a cookie on.
//!
//! A cookie is the kernel's own position (`d_off`), so it stays valid for the life of the
//! directory, survives the removal of the entry that it came from, and means the same on every
//! node that sees the same file system. Each page opens the directory afresh, seeks once, and
//! reads until the page is full: the cost of a page does not depend on the size of the directory.

use std::ffi::CStr;
use std::mem::MaybeUninit;

use rustix::fs::{OFlags, RawDir, SeekFrom, seek};
use rustix::io::Errno;

use super::Failure;
use super::file::File;

/// An entry as the kernel lists it.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// The name.
    pub name: &'a CStr,
    /// Inode number; for a mount point that of the directory underneath.
    pub ino: u64,
    /// The position behind this entry.
    pub dir_cookie: u64,
}

/// Whether to go on with a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Show the next entry.
    Continue,
    /// The page is full; the entry just shown was not taken.
    Stop,
}

/// Shows the entries of `dir` behind `dir_cookie` (0: from the start) to `take`, until it says
/// stop. Returns true if the end of the directory was reached.
///
/// `bytes_hint` is the size of the page that the caller fills; about as much is read at a time.
///
/// # Errors
/// ENOTDIR; EINVAL if the position is none of this directory's.
pub fn list(
    dir: &File,
    dir_cookie: u64,
    bytes_hint: usize,
    mut take: impl FnMut(&Entry<'_>) -> Result<Next, Failure>,
) -> Result<bool, Failure> {
    dir.must_be_dir()?;
    let fd = dir.reopen(OFlags::RDONLY | OFlags::DIRECTORY)?;
    if dir_cookie != 0 {
        if i64::try_from(dir_cookie).is_err() {
            return Err(Errno::INVAL.into());
        }
        seek(&fd, SeekFrom::Start(dir_cookie))?;
    }
    let mut buffer = Vec::new();
    buffer.resize(
        bytes_hint.clamp(BUFFER_BYTES_MIN, BUFFER_BYTES_MAX),
        MaybeUninit::uninit(),
    );
    let mut entries = RawDir::new(&fd, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let shown = Entry {
            name: entry.file_name(),
            ino: entry.ino(),
            dir_cookie: entry.next_entry_cookie(),
        };
        if take(&shown)? == Next::Stop {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Holds the longest entry with room to spare.
const BUFFER_BYTES_MIN: usize = 2048;
const BUFFER_BYTES_MAX: usize = 64 * 1024;
