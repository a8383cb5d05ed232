//! The state directory of a node: what must be the same after a restart.
//!
//! Owns the file `state.json` (keys that sign handles, ids of exports and of the file systems
//! inside them, count of starts) and the lock that keeps a second server out. Ids and keys are
//! added and never changed or dropped, since handles that clients hold depend on them: an export
//! that is taken away and comes back finds its old id.
//!
//! The file is replaced whole: written beside, synced, renamed, folder synced. It has a version; a
//! file from a newer version is refused and left alone.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::backend::handle::HandleKey;
use crate::random::random_u64;

/// Version 2 added the numbers of file systems.
const VERSION: u32 = 2;

/// Why the state directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A step on a file failed.
    #[error("cannot {step} `{}`: {source}", .path.display())]
    Io {
        /// What was tried.
        step: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another server holds the directory.
    #[error("state directory `{}` is in use by process {pid}\nhint: stop that server first, or \
             give this one a state directory of its own with --state-dir", .path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process that holds it, as it says.
        pid: String,
    },
    /// The file is not what was written.
    #[error("state file `{}` is damaged: {problem}\nhint: restore it from a backup; if there is \
             none, move it away, and all clients must mount again", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The file comes from a newer program.
    #[error("state file `{}` has version {found}, and this program knows {VERSION}\nhint: run the \
             newer havenfs that wrote it", .path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
}

/// A path that need not be text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum StoredPath {
    Text(String),
    Bytes(Vec<u8>),
}

impl StoredPath {
    fn new(path: &Path) -> Self {
        let bytes = path.as_os_str().as_bytes();
        String::from_utf8(bytes.to_vec()).map_or_else(|_| Self::Bytes(bytes.to_vec()), Self::Text)
    }

    fn to_path(&self) -> PathBuf {
        match self {
            Self::Text(text) => PathBuf::from(text),
            Self::Bytes(bytes) => PathBuf::from(OsString::from_vec(bytes.clone())),
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct StoredKey {
    id: u8,
    secret: [u8; 16],
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct StoredExport {
    path: StoredPath,
    id: u32,
    fsid: u64,
    #[serde(default)]
    file_system: Option<u32>,
    /// File systems mounted inside.
    mounts: Vec<StoredMount>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct StoredMount {
    /// Relative to the export.
    path: StoredPath,
    fs_id: u32,
    fsid: u64,
    #[serde(default)]
    file_system: Option<u32>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Stored {
    version: u32,
    starts: u64,
    handle_keys: Vec<StoredKey>,
    exports: Vec<StoredExport>,
}

/// The numbers of one file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsNumbers {
    /// Its number within the export.
    pub fs_id: u32,
    /// What clients see as `fsid`.
    pub fsid: u64,
}

/// The open state directory. The lock is held for as long as this value lives.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    stored: Mutex<Stored>,
    _lock: File,
}

impl State {
    /// Opens the directory, makes it if it is missing, and counts this start.
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        let fail = |step, path: &Path| {
            let path = path.to_path_buf();
            move |source| StateError::Io { step, path, source }
        };
        let mut builder = std::fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(fail("make", dir))?;
        let lock = take_lock(dir)?;
        let path = dir.join("state.json");
        let mut stored = match std::fs::read(&path) {
            Ok(bytes) => parse(&path, &bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => new_state(),
            Err(error) => return Err(fail("read", &path)(error)),
        };
        stored.starts += 1;
        let state = Self {
            dir: dir.to_path_buf(),
            stored: Mutex::new(stored),
            _lock: lock,
        };
        state.save(&state.lock())?;
        Ok(state)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How often a server was started on this directory, this time included.
    pub fn starts(&self) -> u64 {
        self.lock().starts
    }

    /// The keys that sign handles; the last one is the newest.
    pub fn handle_keys(&self) -> Vec<HandleKey> {
        let stored = self.lock();
        stored
            .handle_keys
            .iter()
            .map(|key| HandleKey {
                id: key.id,
                secret: key.secret,
            })
            .collect()
    }

    /// The id of the export at `path`, and its generated `fsid`; allotted at first sight.
    pub fn export_numbers(&self, path: &Path) -> Result<(u32, u64), StateError> {
        let mut stored = self.lock();
        if let Some(export) = stored
            .exports
            .iter()
            .find(|export| export.path.to_path() == path)
        {
            return Ok((export.id, export.fsid));
        }
        let id = stored
            .exports
            .iter()
            .map(|export| export.id)
            .max()
            .unwrap_or(0)
            + 1;
        let fsid = random_u64();
        let path = StoredPath::new(path);
        stored.exports.push(StoredExport {
            path,
            id,
            fsid,
            file_system: None,
            mounts: Vec::new(),
        });
        self.save(&stored)?;
        Ok((id, fsid))
    }

    /// The numbers of the file system mounted at `path` (relative) inside an export; allotted at
    /// first sight. `None` if there is no such export.
    pub fn mount_numbers(
        &self,
        export_id: u32,
        path: &Path,
    ) -> Result<Option<FsNumbers>, StateError> {
        let mut stored = self.lock();
        let Some(export) = stored
            .exports
            .iter_mut()
            .find(|export| export.id == export_id)
        else {
            return Ok(None);
        };
        if let Some(mount) = export
            .mounts
            .iter()
            .find(|mount| mount.path.to_path() == path)
        {
            return Ok(Some(FsNumbers {
                fs_id: mount.fs_id,
                fsid: mount.fsid,
            }));
        }
        let fs_id = export
            .mounts
            .iter()
            .map(|mount| mount.fs_id)
            .max()
            .unwrap_or(0)
            + 1;
        let numbers = FsNumbers {
            fs_id,
            fsid: random_u64(),
        };
        let path = StoredPath::new(path);
        export.mounts.push(StoredMount {
            path,
            fs_id,
            fsid: numbers.fsid,
            file_system: None,
        });
        self.save(&stored)?;
        Ok(Some(numbers))
    }

    /// The numbers of the file systems that stand behind the parts of exports, by export id and
    /// file-system id within it: one number for one file system, however many exports and mounts
    /// show it, so that a file has one lock table. Those of removed exports are kept.
    pub fn file_systems(&self) -> HashMap<(u32, u32), u32> {
        let stored = self.lock();
        let numbers = stored.exports.iter().flat_map(|export| {
            let mounts = export.mounts.iter();
            mounts
                .map(|mount| ((export.id, mount.fs_id), mount.file_system))
                .chain([((export.id, 0), export.file_system)])
        });
        numbers
            .filter_map(|(ids, number)| Some((ids, number?)))
            .collect()
    }

    /// Sets the number of a file system: `number`, or one that no other has.
    pub fn set_file_system(
        &self,
        export_id: u32,
        fs_id: u32,
        number: Option<u32>,
    ) -> Result<u32, StateError> {
        let mut stored = self.lock();
        let number = number.unwrap_or_else(|| stored.file_system_max() + 1);
        if let Some(place) = stored.file_system_mut(export_id, fs_id) {
            *place = Some(number);
        }
        self.save(&stored)?;
        Ok(number)
    }

    /// The file systems that were ever seen mounted inside an export.
    pub fn known_mounts(&self, export_id: u32) -> Vec<(PathBuf, FsNumbers)> {
        let stored = self.lock();
        let mounts = stored.exports.iter().find(|export| export.id == export_id);
        mounts.map_or_else(Vec::new, |export| {
            let numbers = |mount: &StoredMount| FsNumbers {
                fs_id: mount.fs_id,
                fsid: mount.fsid,
            };
            export
                .mounts
                .iter()
                .map(|mount| (mount.path.to_path(), numbers(mount)))
                .collect()
        })
    }

    fn lock(&self) -> MutexGuard<'_, Stored> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self, stored: &Stored) -> Result<(), StateError> {
        let path = self.dir.join("state.json");
        let text = serde_json::to_vec_pretty(stored).map_err(|error| StateError::Damaged {
            path: path.clone(),
            problem: error.to_string(),
        })?;
        replace_file(&path, &text).map_err(|source| StateError::Io {
            step: "write",
            path,
            source,
        })
    }
}

impl Stored {
    fn file_system_mut(&mut self, export_id: u32, fs_id: u32) -> Option<&mut Option<u32>> {
        let mut exports = self.exports.iter_mut();
        let export = exports.find(|export| export.id == export_id)?;
        if fs_id == 0 {
            return Some(&mut export.file_system);
        }
        let mut mounts = export.mounts.iter_mut();
        let mount = mounts.find(|mount| mount.fs_id == fs_id)?;
        Some(&mut mount.file_system)
    }

    fn file_system_max(&self) -> u32 {
        let mounts = self.exports.iter().flat_map(|export| &export.mounts);
        let mounts = mounts.filter_map(|mount| mount.file_system);
        let roots = self.exports.iter().filter_map(|export| export.file_system);
        roots.chain(mounts).max().unwrap_or(0)
    }
}

/// Replaces a file so that after a crash there is the old content or the new, and nothing else.
pub fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

fn take_lock(dir: &Path) -> Result<File, StateError> {
    let path = dir.join("lock");
    let fail = |step| {
        let path = path.clone();
        move |source| StateError::Io { step, path, source }
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(fail("open"))?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut pid = String::new();
        // Only for the message; an unreadable number is shown as such.
        if file.read_to_string(&mut pid).is_err() || pid.trim().is_empty() {
            "(unknown)".clone_into(&mut pid);
        }
        return Err(StateError::InUse {
            path: dir.to_path_buf(),
            pid: pid.trim().to_owned(),
        });
    }
    file.set_len(0).map_err(fail("write"))?;
    writeln!(file, "{}", std::process::id()).map_err(fail("write"))?;
    Ok(file)
}

fn new_state() -> Stored {
    let [low, high] = [random_u64(), random_u64()].map(u64::to_ne_bytes);
    let mut secret = [0; 16];
    secret[..8].copy_from_slice(&low);
    secret[8..].copy_from_slice(&high);
    Stored {
        version: VERSION,
        starts: 0,
        handle_keys: vec![StoredKey { id: 1, secret }],
        exports: Vec::new(),
    }
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Stored, StateError> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let damaged = |error: serde_json::Error| StateError::Damaged {
        path: path.to_path_buf(),
        problem: error.to_string(),
    };
    let Version { version } = serde_json::from_slice(bytes).map_err(damaged)?;
    if version > VERSION {
        return Err(StateError::Newer {
            path: path.to_path_buf(),
            found: version,
        });
    }
    let mut stored: Stored = serde_json::from_slice(bytes).map_err(damaged)?;
    // What an older version wrote lacks nothing that can't be added now.
    stored.version = VERSION;
    if stored.handle_keys.is_empty() {
        let problem = "it holds no handle key".to_owned();
        return Err(StateError::Damaged {
            path: path.to_path_buf(),
            problem,
        });
    }
    Ok(stored)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_keys_outlive_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let first = State::open(dir.path()).unwrap();
        let keys = first.handle_keys();
        let a = first.export_numbers(Path::new("/a")).unwrap();
        let b = first.export_numbers(Path::new("/b")).unwrap();
        let inside = first.mount_numbers(a.0, Path::new("x/y")).unwrap().unwrap();
        assert_ne!(a.0, b.0);
        assert_eq!(first.mount_numbers(99, Path::new("x")).unwrap(), None);
        assert_eq!(first.file_systems(), HashMap::new());
        assert_eq!(first.set_file_system(a.0, 0, None).unwrap(), 1);
        assert_eq!(first.set_file_system(a.0, inside.fs_id, None).unwrap(), 2);
        assert_eq!(first.set_file_system(b.0, 0, Some(1)).unwrap(), 1);
        drop(first);
        let second = State::open(dir.path()).unwrap();
        assert_eq!(second.starts(), 2);
        assert_eq!(second.handle_keys(), keys);
        assert_eq!(second.export_numbers(Path::new("/b")).unwrap(), b);
        assert_eq!(second.export_numbers(Path::new("/a")).unwrap(), a);
        assert_eq!(second.known_mounts(a.0), [(PathBuf::from("x/y"), inside)]);
        let numbers = [((a.0, 0), 1), ((a.0, inside.fs_id), 2), ((b.0, 0), 1)];
        assert_eq!(second.file_systems(), HashMap::from(numbers));
    }

    #[test]
    fn a_file_of_the_first_version_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"version": 1, "starts": 4, "handle_keys": [{"id": 1, "secret":
            [1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]}], "exports": [{"path": "/a", "id": 7,
            "fsid": 8, "mounts": [{"path": "m", "fs_id": 1, "fsid": 9}]}]}"#;
        std::fs::write(dir.path().join("state.json"), text).unwrap();
        let state = State::open(dir.path()).unwrap();
        assert_eq!(state.export_numbers(Path::new("/a")).unwrap(), (7, 8));
        assert_eq!(state.set_file_system(7, 1, None).unwrap(), 1);
        drop(state);
        let again = std::fs::read_to_string(dir.path().join("state.json")).unwrap();
        assert!(again.contains("\"version\": 2"), "{again}");
    }

    #[test]
    fn a_second_server_is_kept_out() {
        let dir = tempfile::tempdir().unwrap();
        let _first = State::open(dir.path()).unwrap();
        let error = State::open(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains(&format!("process {}", std::process::id())),
            "{error}"
        );
    }

    #[test]
    fn damage_and_newer_versions_are_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        for (text, expected) in [
            ("{\"version\": 3}", "has version 3"),
            ("{\"version\": 1", "damaged"),
            ("", "damaged"),
            (
                "{\"version\":1,\"starts\":1,\"handle_keys\":[],\"exports\":[]}",
                "no handle key",
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = State::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }
}
