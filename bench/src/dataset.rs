//! The files that the workloads use, made once in a directory that every server exports.
//!
//! They are made with system calls and not through a server, so that no server is favoured by
//! having seen them, and so that a directory of a million files takes seconds.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;

use anyhow::Context as _;

use crate::pattern::Pattern;

/// How many small files there are for reading, and as many for writing.
pub(crate) const SMALL_FILES: usize = 1_000;
/// Their size: sixteen blocks of 4 KiB.
pub(crate) const SMALL_BYTES: u64 = 64 << 10;
/// How many large files there are for reading, and as many for writing.
pub(crate) const LARGE_FILES: usize = 8;
/// Their size: sixteen payloads of 1 MiB.
pub(crate) const LARGE_BYTES: u64 = 16 << 20;
/// Sizes of the directories that are listed.
pub(crate) const DIRECTORY_SIZES: [u32; 3] = [1_000, 100_000, 1_000_000];

/// Small files to read.
pub(crate) const SMALL_READ: &str = "small-read";
/// Small files to overwrite.
pub(crate) const SMALL_WRITE: &str = "small-write";
/// Large files to read.
pub(crate) const LARGE_READ: &str = "large-read";
/// Large files to overwrite.
pub(crate) const LARGE_WRITE: &str = "large-write";
/// Where files come and go.
pub(crate) const SCRATCH: &str = "scratch";

/// The name of file number `index` in each directory.
pub(crate) fn file_name(index: usize) -> String {
    format!("file-{index:07}")
}

/// The name of the directory with `entries` files.
pub(crate) fn directory_name(entries: u32) -> String {
    format!("list-{entries}")
}

/// Makes what is missing of the data set in `root`, owned by `uid` and `gid`; directories with
/// more than `entries_max` files are left out.
pub(crate) fn make(root: &Path, uid: u32, gid: u32, entries_max: u32) -> anyhow::Result<()> {
    let pattern = Pattern::new();
    fs::create_dir_all(root).with_context(|| format!("make {}", root.display()))?;
    own(root, uid, gid)?;
    for (name, files, bytes) in [
        (SMALL_READ, SMALL_FILES, SMALL_BYTES),
        (SMALL_WRITE, SMALL_FILES, SMALL_BYTES),
        (LARGE_READ, LARGE_FILES, LARGE_BYTES),
        (LARGE_WRITE, LARGE_FILES, LARGE_BYTES),
        (SCRATCH, 0, 0),
    ] {
        fill(
            root,
            name,
            files,
            |index, file| {
                let step = 64 << 10;
                for offset in (0..bytes).step_by(step) {
                    file.write_all(pattern.expected(index, offset, step))?;
                }
                Ok(())
            },
            uid,
            gid,
        )?;
    }
    for entries in DIRECTORY_SIZES
        .into_iter()
        .filter(|size| *size <= entries_max)
    {
        fill(
            root,
            &directory_name(entries),
            entries as usize,
            |_, _| Ok(()),
            uid,
            gid,
        )?;
    }
    Ok(())
}

/// Makes a directory of empty files unless it is there.
pub(crate) fn fill_empty(
    root: &Path,
    name: &str,
    files: usize,
    uid: u32,
    gid: u32,
) -> anyhow::Result<()> {
    fill(root, name, files, |_, _| Ok(()), uid, gid)
}

/// Makes a directory of files unless it is there; it gets its name when it is complete.
fn fill(
    root: &Path,
    name: &str,
    files: usize,
    write: impl Fn(usize, &mut fs::File) -> std::io::Result<()>,
    uid: u32,
    gid: u32,
) -> anyhow::Result<()> {
    let place = root.join(name);
    if place.exists() {
        return Ok(());
    }
    let growing = root.join(format!(".{name}"));
    if growing.exists() {
        fs::remove_dir_all(&growing)?;
    }
    fs::create_dir(&growing)?;
    for index in 0..files {
        let path = growing.join(file_name(index));
        let mut file = fs::File::create_new(&path)?;
        write(index, &mut file).with_context(|| format!("write {}", path.display()))?;
        own(&path, uid, gid)?;
    }
    own(&growing, uid, gid)?;
    fs::rename(&growing, &place)?;
    Ok(())
}

fn own(path: &Path, uid: u32, gid: u32) -> anyhow::Result<()> {
    if rustix::process::geteuid().is_root() {
        chown(path, Some(uid), Some(gid)).with_context(|| format!("chown {}", path.display()))?;
    }
    if path.is_dir() {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}
