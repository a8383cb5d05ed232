//! The handle table: stands in where the kernel's handles can't be used.
//!
//! Some file systems make no handles (overlayfs in a container, some FUSE), and without
//! CAP_DAC_READ_SEARCH a process may not open them. Then a handle holds the number of an entry
//! here: which inode it is, and where it was last seen (directory and name). The entry is written
//! to the state directory before the handle is answered, so that handles survive a restart, and
//! synced when the change that it belongs to is ([`HandleTable::sync`]), so that they survive a
//! power cut where the file does.
//!
//! An inode is told apart from a later one with the same number by its time of birth; overlayfs
//! is left out of that, since it makes a file anew when it is first written to.
//!
//! In a cluster the entries are replicated in place of that, so that every node understands the
//! handles that one has answered: an entry is in the log before its handle is answered.
//!
//! What it can't do: follow a file or directory that somebody moved locally, behind the server's
//! back, until it is looked up again under its new name; its handle is stale until then.
//!
//! The file `handle-table`: a line that names the version, then a line an entry,
//! `id export fs inode birth parent name`, all numbers in decimal and the name in hexadecimal. A
//! later line with the same id replaces the earlier one; a line with inode 0 removes it. A last
//! line without its end is a torn write and is dropped: its handle was never answered.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::fmt::Write as _;
use std::fs::{File as StdFile, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{
    AtFlags, Mode as OpenMode, OFlags, ResolveFlags, StatxFlags, fstatfs, openat2, statx,
};
use rustix::io::Errno;

use super::Failure;
use super::file::File;
use super::sys::KernelHandle;
use super::volume::Volume;
use crate::fault::{Fault, is_planted};
use crate::random::random_u64;
use crate::state::replace_file;

/// The type that marks a handle as an entry of the table; no file system uses it.
const ENTRY_KIND: i32 = 0xffff;
const ROOT_ID: u64 = 0;
const FIRST_ID: u64 = 1;
const FIRST_LINE: &str = "havenfs handle table 1";
const OVERLAYFS_MAGIC: i64 = 0x794c_7630;
const DEPTH_MAX: usize = 2048;

/// Which file: export, file system, inode number, time of birth.
pub type Identity = (u32, u32, u64, i64);

/// Where a file was last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Which file.
    pub identity: Identity,
    /// The entry of its directory; 0 is the root of the file system.
    pub parent: u64,
    /// Its name there.
    pub name: CString,
}

#[derive(Debug, Default)]
struct Inner {
    entries: BTreeMap<u64, Entry>,
    ids: HashMap<Identity, u64>,
    log: Option<StdFile>,
    /// Length of the file: where the next line begins.
    len: u64,
}

/// Puts an entry into the replicated state, or takes it out; returns when it is there.
pub type Replicate = Box<dyn Fn(u64, Option<&Entry>) -> Result<(), Errno> + Send + Sync>;

/// The entries, in memory, and where else.
pub struct HandleTable {
    kept: Kept,
    inner: Mutex<Inner>,
    /// Held while an entry is made or changed, so that a file never gets two. Readers don't wait
    /// for it, since it may take as long as the log.
    changing: Mutex<()>,
}

enum Kept {
    /// In a file of the state directory.
    File(PathBuf),
    /// In the replicated state.
    Replicated(Replicate),
}

impl std::fmt::Debug for HandleTable {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("HandleTable").finish_non_exhaustive()
    }
}

/// Why the table can't be read.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The file can't be read or written.
    #[error("cannot use handle table `{}`", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is damaged, or from another version.
    #[error("handle table `{}`, line {line}: {problem}\nhint: it was written by another version \
             or is damaged; without it, clients must mount again: move it away to start anew",
            .path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        problem: &'static str,
    },
}

impl HandleTable {
    /// Reads the table from the state directory, or begins an empty one.
    pub fn load(state_dir: &Path) -> Result<Self, TableError> {
        let path = state_dir.join("handle-table");
        let text = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(TableError::Io { path, source }),
        };
        let mut inner = Inner::default();
        // Only what ends with a line feed was written whole.
        let whole = text
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        let lines = text.get(..whole).unwrap_or_default();
        let lines = std::str::from_utf8(lines).map_err(|_| TableError::Bad {
            path: path.clone(),
            line: 1,
            problem: "not text",
        })?;
        for (number, line) in lines.lines().enumerate() {
            let bad = |problem| TableError::Bad {
                path: path.clone(),
                line: number + 1,
                problem,
            };
            if number == 0 {
                if line != FIRST_LINE {
                    return Err(bad("unknown version"));
                }
                continue;
            }
            let (id, entry) = parse_line(line).ok_or_else(|| bad("unreadable entry"))?;
            inner.put(id, entry);
        }
        let fail = |source| TableError::Io {
            path: path.clone(),
            source,
        };
        if !text.is_empty() {
            // Written anew, without a torn end and without lines that later ones replaced.
            let compact = inner.text();
            if compact.as_bytes() != text {
                replace_file(&path, compact.as_bytes()).map_err(fail)?;
            }
            let log = OpenOptions::new().append(true).open(&path).map_err(fail)?;
            inner.len = log.metadata().map_err(fail)?.len();
            inner.log = Some(log);
        }
        Ok(Self {
            kept: Kept::File(path),
            inner: Mutex::new(inner),
            changing: Mutex::default(),
        })
    }

    /// A table whose entries are replicated; `entries` are those that there are.
    pub fn replicated(entries: impl Iterator<Item = (u64, Entry)>, replicate: Replicate) -> Self {
        let mut inner = Inner::default();
        for (id, entry) in entries {
            inner.put(id, Some(entry));
        }
        Self {
            kept: Kept::Replicated(replicate),
            inner: Mutex::new(inner),
            changing: Mutex::default(),
        }
    }

    /// All entries, by number.
    pub fn entries(&self) -> Vec<(u64, Entry)> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = inner.entries.iter();
        entries.map(|(id, entry)| (*id, entry.clone())).collect()
    }

    /// Whether a handle's inner part names an entry of the table.
    pub const fn is_entry(handle: &KernelHandle) -> bool {
        handle.kind == ENTRY_KIND
    }

    /// The handle of a volume's root.
    pub fn root(&self, _: &Volume) -> Result<KernelHandle, Errno> {
        entry_handle(ROOT_ID)
    }

    /// The handle of the file that was just opened as `name` in `dir`; enters it if it is new.
    pub fn entry(
        &self,
        dir: &File,
        name: &CStr,
        fd: BorrowedFd<'_>,
    ) -> Result<KernelHandle, Failure> {
        let identity = identity(&dir.volume, fd, c"")?;
        if identity.2 == dir.volume.root_ino && dir.volume.fs_id == identity.1 && name == c".." {
            return Ok(entry_handle(ROOT_ID)?);
        }
        let _alone = self.changing();
        let known = self.lock().ids.get(&identity).copied();
        if let Some(id) = known.filter(|_| name == c"..") {
            return Ok(entry_handle(id)?);
        }
        if let Some(id) = known {
            // Another name of the same file: the one that is known will do while it is right.
            let handle = entry_handle(id)?;
            if self.open(&dir.volume, &handle).is_ok() {
                return Ok(handle);
            }
        }
        let parent = number(&dir.handle_parts()).ok_or(Errno::STALE)?;
        let entry = Entry {
            identity,
            parent,
            name: name.to_owned(),
        };
        // Random, so that the number of an entry that was lost in a power cut never comes to stand
        // for another file: the lost handle is stale.
        let id = known.unwrap_or_else(|| random_u64().max(FIRST_ID));
        let is_there = self.lock().entries.get(&id) == Some(&entry);
        if !is_there {
            self.keep(id, Some(entry))?;
        }
        Ok(entry_handle(id)?)
    }

    /// The handle of `name` in `dir`, if the table has it.
    pub fn find(&self, dir: &File, name: &CStr) -> Option<KernelHandle> {
        let identity = identity(&dir.volume, dir.fd(), name).ok()?;
        let id = self.lock().ids.get(&identity).copied()?;
        entry_handle(id).ok()
    }

    /// Opens the file that an entry names, as a path.
    ///
    /// # Errors
    /// ESTALE if it is not where it was last seen.
    pub fn open(&self, volume: &Volume, handle: &KernelHandle) -> Result<OwnedFd, Errno> {
        let id = number(handle).ok_or(Errno::STALE)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (mut names, mut expected) = (Vec::new(), None);
        {
            let inner = self.lock();
            let mut at = id;
            while at != ROOT_ID {
                let entry = inner.entries.get(&at).ok_or(Errno::STALE)?;
                expected.get_or_insert(entry.identity);
                names.push(entry.name.clone());
                at = entry.parent;
                if names.len() > DEPTH_MAX {
                    return Err(Errno::STALE);
                }
            }
        }
        let mut fd = openat2(
            volume.root(),
            c".",
            flags,
            OpenMode::empty(),
            ResolveFlags::NO_XDEV,
        )?;
        for name in names.iter().rev() {
            let step = openat2(&fd, name, flags, OpenMode::empty(), ResolveFlags::NO_XDEV);
            fd = step.map_err(|errno| match errno {
                Errno::NOENT | Errno::NOTDIR | Errno::XDEV => Errno::STALE,
                errno => errno,
            })?;
        }
        if expected.is_some_and(|expected| identity(volume, fd.as_fd(), c"") != Ok(expected)) {
            return Err(Errno::STALE);
        }
        Ok(fd)
    }

    /// Notes that a file now has another name.
    pub fn renamed(&self, to: (&Arc<File>, &CStr)) -> Result<(), Failure> {
        let (dir, name) = to;
        if dir.volume.has_handles {
            return Ok(());
        }
        let Ok(identity) = identity(&dir.volume, dir.fd(), name) else {
            return Ok(());
        };
        let _alone = self.changing();
        let known = self.lock().ids.get(&identity).copied();
        let Some(id) = known else {
            return Ok(());
        };
        let parent = number(&dir.handle_parts()).ok_or(Errno::STALE)?;
        let entry = Entry {
            identity,
            parent,
            name: name.to_owned(),
        };
        Ok(self.keep(id, Some(entry))?)
    }

    /// Removes the entry of a file whose last name is gone.
    pub fn remove(&self, handle: &KernelHandle) -> Result<(), Failure> {
        let Some(id) = number(handle).filter(|id| *id != ROOT_ID) else {
            return Ok(());
        };
        let _alone = self.changing();
        let is_there = self.lock().entries.contains_key(&id);
        if is_there {
            self.keep(id, None)?;
        }
        Ok(())
    }

    /// Brings the entries to disk.
    pub fn sync(&self) -> Result<(), Failure> {
        let log = match &self.lock().log {
            Some(log) if !is_planted(Fault::NoSync) => log.try_clone().map_err(to_errno)?,
            _ => return Ok(()),
        };
        Ok(log.sync_data().map_err(to_errno)?)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps an entry where a kill of the process can't take it back, and only then in memory.
    fn keep(&self, id: u64, entry: Option<Entry>) -> Result<(), Errno> {
        match &self.kept {
            Kept::File(path) => {
                let mut inner = self.lock();
                Self::append_to_file(path, &mut inner, id, entry.as_ref())?;
                inner.put(id, entry);
            }
            Kept::Replicated(replicate) => {
                replicate(id, entry.as_ref())?;
                self.lock().put(id, entry);
            }
        }
        Ok(())
    }

    fn append_to_file(
        path: &Path,
        inner: &mut Inner,
        id: u64,
        entry: Option<&Entry>,
    ) -> Result<(), Errno> {
        if inner.log.is_none() {
            // The first entry ever, or the first one after a write failed.
            let whole = inner.text();
            replace_file(path, whole.as_bytes()).map_err(to_errno)?;
            let log = OpenOptions::new()
                .append(true)
                .open(path)
                .map_err(to_errno)?;
            inner.log = Some(log);
            inner.len = whole.len() as u64;
        }
        let line = format_line(id, entry);
        let Some(log) = &mut inner.log else {
            return Err(Errno::IO);
        };
        if let Err(error) = log.write_all(line.as_bytes()) {
            // A part of the line must not stand before the next one. If even this fails, the whole
            // file is written anew next time.
            if log.set_len(inner.len).is_err() {
                inner.log = None;
            }
            return Err(to_errno(error));
        }
        inner.len += line.len() as u64;
        Ok(())
    }
}

impl Inner {
    /// The whole file.
    fn text(&self) -> String {
        let mut text = format!("{FIRST_LINE}\n");
        for (id, entry) in &self.entries {
            text.push_str(&format_line(*id, Some(entry)));
        }
        text
    }

    fn put(&mut self, id: u64, entry: Option<Entry>) {
        let before = match entry {
            Some(entry) => {
                self.ids.insert(entry.identity, id);
                self.entries
                    .insert(id, entry.clone())
                    .filter(|b| b.identity != entry.identity)
            }
            None => self.entries.remove(&id),
        };
        if let Some(before) = before {
            self.ids.remove(&before.identity);
        }
    }
}

fn identity(volume: &Volume, dir: BorrowedFd<'_>, name: &CStr) -> Result<Identity, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW
        | if name.is_empty() {
            AtFlags::EMPTY_PATH
        } else {
            AtFlags::empty()
        };
    let found = statx(dir, name, flags, StatxFlags::INO | StatxFlags::BTIME)?;
    let has_birth = found.stx_mask & StatxFlags::BTIME.bits() != 0
        && fstatfs(volume.root())?.f_type != OVERLAYFS_MAGIC;
    let born = if has_birth {
        let time = found.stx_btime;
        time.tv_sec
            .wrapping_mul(1_000_000_000)
            .wrapping_add(i64::from(time.tv_nsec))
    } else {
        0
    };
    Ok((volume.export_id, volume.fs_id, found.stx_ino, born))
}

fn to_errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn entry_handle(id: u64) -> Result<KernelHandle, Errno> {
    KernelHandle::new(ENTRY_KIND, &id.to_be_bytes()).ok_or(Errno::OVERFLOW)
}

fn number(handle: &KernelHandle) -> Option<u64> {
    let bytes = <[u8; 8]>::try_from(handle.as_slice()).ok()?;
    HandleTable::is_entry(handle).then(|| u64::from_be_bytes(bytes))
}

fn format_line(id: u64, entry: Option<&Entry>) -> String {
    let Some(Entry {
        identity: (export, fs, ino, born),
        parent,
        name,
    }) = entry
    else {
        return format!("{id} 0 0 0 0 0 2d\n");
    };
    let mut line = format!("{id} {export} {fs} {ino} {born} {parent} ");
    for byte in name.as_bytes() {
        // Writing to a string can't fail.
        let _ = write!(line, "{byte:02x}");
    }
    line.push('\n');
    line
}

fn parse_line(line: &str) -> Option<(u64, Option<Entry>)> {
    let mut fields = line.split(' ');
    let id = fields.next()?.parse().ok()?;
    let export = fields.next()?.parse().ok()?;
    let fs = fields.next()?.parse().ok()?;
    let ino = fields.next()?.parse().ok()?;
    let born = fields.next()?.parse().ok()?;
    let parent = fields.next()?.parse().ok()?;
    let hex = fields.next()?;
    let mut name = Vec::with_capacity(hex.len() / 2);
    for at in (0..hex.len()).step_by(2) {
        name.push(u8::from_str_radix(hex.get(at..at + 2)?, 16).ok()?);
    }
    if fields.next().is_some() || id == ROOT_ID {
        return None;
    }
    if ino == 0 {
        return Some((id, None));
    }
    let name = CString::new(name).ok().filter(|name| !name.is_empty())?;
    Some((
        id,
        Some(Entry {
            identity: (export, fs, ino, born),
            parent,
            name,
        }),
    ))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_torn_last_line_is_dropped_and_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handle-table");
        std::fs::write(&path, format!("{FIRST_LINE}\n1 1 0 77 5 0 61\n2 1 0 78")).unwrap();
        let table = HandleTable::load(dir.path()).unwrap();
        assert_eq!(table.lock().entries.len(), 1);
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            format!("{FIRST_LINE}\n1 1 0 77 5 0 61\n")
        );
    }

    #[test]
    fn another_version_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handle-table");
        std::fs::write(&path, "havenfs handle table 2\n").unwrap();
        let error = HandleTable::load(dir.path()).unwrap_err();
        assert!(
            error.to_string().contains("line 1: unknown version"),
            "{error}"
        );
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "havenfs handle table 2\n"
        );
    }

    proptest! {
        #[test]
        fn lines_round_trip(
            id in 1u64.., export: u32, fs: u32, ino in 1u64.., born: i64, parent: u64,
            name in prop::collection::vec(1u8.., 1..255),
        ) {
            let name = CString::new(name).unwrap();
            let entry = Entry { identity: (export, fs, ino, born), parent, name };
            let line = format_line(id, Some(&entry));
            prop_assert_eq!(parse_line(line.trim_end()), Some((id, Some(entry))));
            prop_assert_eq!(parse_line(format_line(id, None).trim_end()), Some((id, None)));
        }

        #[test]
        fn any_line_is_read_or_refused(line in ".*") {
            let _ = parse_line(&line);
        }
    }
}
