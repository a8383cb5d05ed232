//! Who mounted what: the list behind MOUNT's DUMP, kept across restarts.
//!
//! Owns the list, its bound and the file `mounts` in the state directory; in a cluster the list is
//! replicated (`serve::mounts`), and there is no file. Does not decide who may
//! mount, and nothing but DUMP depends on it: clients that vanish leave entries behind, as in
//! every server, and the oldest are dropped when the list is full.
//!
//! [`MountList::add`] and its siblings change memory only, so that they can be called in a task;
//! [`MountList::save_if_dirty`] writes and syncs, and belongs on a worker thread. A crash between
//! the two loses the latest entries, which costs a line in `showmount -a` and nothing else.
//!
//! Invariants: at most [`ENTRIES_MAX`] entries, no two equal; the file is replaced as a whole
//! (temporary file, sync, rename, sync of the directory), so it is never half written; a file
//! that is not understood is never overwritten by [`MountList::open`].

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

/// The most entries that are kept.
pub const ENTRIES_MAX: usize = 4096;
/// The longest path that is kept, in bytes (RFC 1813 5: MNTPATHLEN).
pub const PATH_BYTES_MAX: usize = 1024;
/// The largest file that is read: every byte of every path may be written as three.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;
const FILE_NAME: &str = "mounts";
const TEMPORARY_NAME: &str = "mounts.new";
/// The version of the file's format.
const VERSION: u32 = 1;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// The host that mounted.
    pub host: IpAddr,
    /// What it mounted, as it named it.
    pub path: Vec<u8>,
}

/// Why the list can't be loaded or saved.
#[derive(Debug, thiserror::Error)]
pub enum MountListError {
    /// The file can't be read.
    #[error("cannot read the mount list `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The file is not a mount list.
    #[error(
        "`{}` is not a mount list: {reason}\n\
         hint: remove the file; only the output of `showmount -a` depends on it",
        path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A newer release wrote the file.
    #[error(
        "the mount list `{}` has format version {found}, this release knows {VERSION}\n\
         hint: start the newer release, or remove the file; only `showmount -a` depends on it",
        path.display()
    )]
    NewerVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The file can't be written.
    #[error("cannot write the mount list `{}`", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// The list of mounts.
#[derive(Debug)]
pub struct MountList {
    /// Where its file is; none where the cluster has the list.
    state_dir: Option<PathBuf>,
    inner: Mutex<Inner>,
    /// Held while the file is written, so that an older list never replaces a newer one.
    saving: Mutex<()>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Oldest first.
    entries: VecDeque<MountEntry>,
    dirty: bool,
}

impl MountList {
    /// Loads the list from `state_dir`; without a file it is empty.
    ///
    /// # Errors
    /// When there is a file that can't be read or understood. It is left as it is.
    pub fn open(state_dir: &Path) -> Result<Self, MountListError> {
        let entries = load(&state_dir.join(FILE_NAME))?;
        Ok(Self {
            state_dir: Some(state_dir.to_owned()),
            inner: Mutex::new(Inner {
                entries,
                dirty: false,
            }),
            saving: Mutex::new(()),
        })
    }

    /// A list that is kept in no file, but by the cluster, which has these entries.
    pub fn replicated(entries: impl Iterator<Item = MountEntry>) -> Self {
        Self {
            state_dir: None,
            inner: Mutex::new(Inner {
                entries: entries.take(ENTRIES_MAX).collect(),
                dirty: false,
            }),
            saving: Mutex::new(()),
        }
    }

    /// Adds a mount, as the newest; drops the oldest if the list is full.
    ///
    /// A path above [`PATH_BYTES_MAX`] is not added: MOUNT can't carry it.
    pub fn add(&self, host: IpAddr, path: &[u8]) {
        if path.len() > PATH_BYTES_MAX {
            return;
        }
        let host = host.to_canonical();
        let mut inner = self.lock();
        match inner.position(host, path) {
            // Clients repeat MNT; nothing has changed.
            Some(index) if index + 1 == inner.entries.len() => return,
            Some(index) => {
                inner.entries.remove(index);
            }
            None if inner.entries.len() >= ENTRIES_MAX => {
                inner.entries.pop_front();
            }
            None => {}
        }
        inner.entries.push_back(MountEntry {
            host,
            path: path.to_owned(),
        });
        inner.dirty = true;
    }

    /// Removes the mount of `path` by `host`, if there is one.
    pub fn remove(&self, host: IpAddr, path: &[u8]) {
        let mut inner = self.lock();
        if let Some(index) = inner.position(host.to_canonical(), path) {
            inner.entries.remove(index);
            inner.dirty = true;
        }
    }

    /// Removes all mounts of `host`.
    pub fn remove_all(&self, host: IpAddr) {
        let host = host.to_canonical();
        let mut inner = self.lock();
        let before = inner.entries.len();
        inner.entries.retain(|entry| entry.host != host);
        inner.dirty |= inner.entries.len() != before;
    }

    /// A copy of the list, oldest first.
    pub fn entries(&self) -> Vec<MountEntry> {
        self.lock().entries.iter().cloned().collect()
    }

    /// Writes the list if it has changed since the last time; says whether it had. Waits for the
    /// disk.
    ///
    /// # Errors
    /// When the file can't be written; the list stays marked as changed.
    pub fn save_if_dirty(&self) -> Result<bool, MountListError> {
        let Some(state_dir) = &self.state_dir else {
            return Ok(false);
        };
        let _saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let text = {
            let mut inner = self.lock();
            if !std::mem::take(&mut inner.dirty) {
                return Ok(false);
            }
            encode(&inner.entries)
        };
        let saved = replace_file(state_dir, &text);
        if saved.is_err() {
            self.lock().dirty = true;
        }
        saved.map(|()| true)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change leaves the list whole, so a panic elsewhere does not spoil it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn position(&self, host: IpAddr, path: &[u8]) -> Option<usize> {
        self.entries
            .iter()
            .rposition(|entry| entry.host == host && entry.path == path)
    }
}

fn replace_file(state_dir: &Path, text: &str) -> Result<(), MountListError> {
    let temporary = state_dir.join(TEMPORARY_NAME);
    let path = state_dir.join(FILE_NAME);
    let failed = |path: &Path| {
        let path = path.to_owned();
        |source| MountListError::Write { path, source }
    };
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&temporary).map_err(failed(&temporary))?;
    file.write_all(text.as_bytes())
        .map_err(failed(&temporary))?;
    file.sync_all().map_err(failed(&temporary))?;
    std::fs::rename(&temporary, &path).map_err(failed(&path))?;
    File::open(state_dir)
        .and_then(|directory| directory.sync_all())
        .map_err(failed(state_dir))
}

/// The file: JSON, so that it can be read without tools of ours.
#[derive(Debug, Serialize, Deserialize)]
struct StoredList {
    version: u32,
    /// Oldest first.
    mounts: Vec<StoredMount>,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoredMount {
    host: IpAddr,
    /// Bytes other than printable ASCII, and `%`, as `%XX`.
    path: String,
}

/// Read before the rest, since only the version says how to read it.
#[derive(Debug, Deserialize)]
struct StoredVersion {
    version: u32,
}

fn load(path: &Path) -> Result<VecDeque<MountEntry>, MountListError> {
    let read = |source| MountListError::Read {
        path: path.to_owned(),
        source,
    };
    let malformed = |reason: String| MountListError::Malformed {
        path: path.to_owned(),
        reason,
    };
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(file) => file
            .take(FILE_BYTES_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(read)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(VecDeque::new()),
        Err(error) => return Err(read(error)),
    };
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(malformed(format!(
            "it is larger than {FILE_BYTES_MAX} bytes"
        )));
    }
    let StoredVersion { version: found } =
        serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
    if found > VERSION {
        return Err(MountListError::NewerVersion {
            path: path.to_owned(),
            found,
        });
    }
    let stored: StoredList =
        serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
    if found != VERSION {
        return Err(malformed(format!("there is no format version {found}")));
    }
    let mut entries = VecDeque::with_capacity(stored.mounts.len().min(ENTRIES_MAX));
    // A file edited by hand may hold more than fit: the newest are kept.
    let surplus = stored.mounts.len().saturating_sub(ENTRIES_MAX);
    for mount in stored.mounts.into_iter().skip(surplus) {
        let path = unescape(&mount.path)
            .ok_or_else(|| malformed(format!("`{}` is not an escaped path", mount.path)))?;
        let entry = MountEntry {
            host: mount.host.to_canonical(),
            path,
        };
        if !entries.contains(&entry) {
            entries.push_back(entry);
        }
    }
    Ok(entries)
}

fn encode(entries: &VecDeque<MountEntry>) -> String {
    let mounts = entries.iter().map(|entry| StoredMount {
        host: entry.host,
        path: escape(&entry.path),
    });
    let stored = StoredList {
        version: VERSION,
        mounts: mounts.collect(),
    };
    // Serializing strings and numbers into memory has no way to fail.
    serde_json::to_string_pretty(&stored).unwrap_or_default() + "\n"
}

fn escape(path: &[u8]) -> String {
    let mut text = String::with_capacity(path.len());
    for byte in path {
        match byte {
            b'%' | 0..=b' ' | 0x7f.. => {
                // Writing into a String can't fail.
                let _ = write!(text, "%{byte:02X}");
            }
            _ => text.push(char::from(*byte)),
        }
    }
    text
}

fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut path = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        path.push(match byte {
            b'%' => {
                let high = char::from(bytes.next()?).to_digit(16)?;
                let low = char::from(bytes.next()?).to_digit(16)?;
                u8::try_from(high * 16 + low).ok()?
            }
            plain => plain,
        });
    }
    (path.len() <= PATH_BYTES_MAX).then_some(path)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const B: IpAddr = IpAddr::V6(std::net::Ipv6Addr::LOCALHOST);

    fn entry(host: IpAddr, path: &[u8]) -> MountEntry {
        MountEntry {
            host,
            path: path.to_owned(),
        }
    }

    #[test]
    fn entries_survive_a_restart_and_nothing_is_written_twice() {
        let dir = tempfile::tempdir().unwrap();
        let list = MountList::open(dir.path()).unwrap();
        assert!(!list.save_if_dirty().unwrap());
        list.add(A, b"/export");
        list.add(B, b"/with space/%41/\xff\n");
        list.add(B, b"/with space/%41/\xff\n");
        assert!(list.save_if_dirty().unwrap());
        assert!(!list.save_if_dirty().unwrap());
        let expected = vec![entry(A, b"/export"), entry(B, b"/with space/%41/\xff\n")];
        assert_eq!(MountList::open(dir.path()).unwrap().entries(), expected);
        assert!(!dir.path().join(TEMPORARY_NAME).exists());
        let text = std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap();
        assert!(text.contains("\"/with%20space/%2541/%FF%0A\""), "{text}");
    }

    #[test]
    fn a_host_removes_only_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let list = MountList::open(dir.path()).unwrap();
        for host in [A, B] {
            list.add(host, b"/x");
            list.add(host, b"/y");
        }
        let mapped = "::ffff:192.0.2.1".parse().unwrap();
        list.remove(mapped, b"/x");
        assert_eq!(
            list.entries(),
            [entry(A, b"/y"), entry(B, b"/x"), entry(B, b"/y")]
        );
        assert!(list.save_if_dirty().unwrap());
        list.remove(A, b"/x");
        assert!(!list.save_if_dirty().unwrap());
        list.remove_all(B);
        assert_eq!(list.entries(), [entry(A, b"/y")]);
        assert!(list.save_if_dirty().unwrap());
        list.remove_all(B);
        assert!(!list.save_if_dirty().unwrap());
    }

    #[test]
    fn a_full_list_drops_the_oldest() {
        let dir = tempfile::tempdir().unwrap();
        let list = MountList::open(dir.path()).unwrap();
        for number in 0..=ENTRIES_MAX {
            list.add(A, number.to_string().as_bytes());
            // The very first is used again and again, and so it is never the oldest.
            list.add(A, b"0");
        }
        list.add(A, &[b'p'; PATH_BYTES_MAX + 1]);
        let entries = list.entries();
        assert_eq!(entries.len(), ENTRIES_MAX);
        assert_eq!(entries[0], entry(A, b"2"));
        assert_eq!(entries[ENTRIES_MAX - 1], entry(A, b"0"));
    }

    #[test]
    fn a_file_that_is_not_understood_is_an_error_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let newer = r#"{"version": 2, "who_knows": []}"#;
        let cases = [
            (newer, "has format version 2"),
            ("", "is not a mount list: EOF"),
            (
                "{\"version\": 1, \"mounts\": [{\"host\": \"x\", \"path\": \"/\"}]}",
                "invalid IP",
            ),
            ("{\"version\": 0, \"mounts\": []}", "no format version 0"),
            (
                r#"{"version":1,"mounts":[{"host":"::1","path":"/%4"}]}"#,
                "`/%4` is not an escaped",
            ),
        ];
        for (text, message) in cases {
            std::fs::write(&path, text).unwrap();
            let error = MountList::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
            assert!(error.contains("hint: "), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(
            MountList::open(dir.path()),
            Err(MountListError::Read { .. })
        ));
    }

    #[test]
    fn a_failed_save_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let list = MountList::open(dir.path()).unwrap();
        list.add(A, b"/x");
        let obstacle = dir.path().join(TEMPORARY_NAME);
        std::fs::create_dir(&obstacle).unwrap();
        assert!(matches!(
            list.save_if_dirty(),
            Err(MountListError::Write { .. })
        ));
        std::fs::remove_dir(&obstacle).unwrap();
        assert!(list.save_if_dirty().unwrap());
        assert_eq!(
            MountList::open(dir.path()).unwrap().entries(),
            [entry(A, b"/x")]
        );
    }

    proptest! {
        #[test]
        fn every_path_survives_the_file(
            paths in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..10),
        ) {
            for path in paths {
                let text = escape(&path);
                prop_assert!(text.bytes().all(|byte| byte.is_ascii_graphic()));
                prop_assert_eq!(unescape(&text), Some(path));
            }
        }

        #[test]
        fn random_files_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(FILE_NAME), bytes).unwrap();
            prop_assert!(MountList::open(dir.path()).is_err());
        }
    }
}
