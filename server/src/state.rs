//! The state directory of a node: what must be the same after a restart.
//!
//! Owns the file `state.json` (keys that sign handles, count of starts) and the lock that keeps a
//! second server out. Keys are added and never changed or dropped, since handles that clients hold
//! depend on them. It has a copy of the numbers of exports and file systems as well, which are
//! replicated state: if the store is lost or was never there, they come from here, so that the
//! handles that clients hold stay right.
//!
//! The file is replaced whole: written beside, synced, renamed, folder synced. It has a version; a
//! file from a newer version is refused and left alone.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::backend::handle::HandleKey;
use crate::cluster::ServiceId;
use crate::cluster::numbers::{ExportNumbers, MountNumbers};
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
    fn new(bytes: &[u8]) -> Self {
        String::from_utf8(bytes.to_vec()).map_or_else(|_| Self::Bytes(bytes.to_vec()), Self::Text)
    }

    fn bytes(&self) -> Box<[u8]> {
        match self {
            Self::Text(text) => text.as_bytes().into(),
            Self::Bytes(bytes) => bytes.as_slice().into(),
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

impl StoredMount {
    fn new(mount: &MountNumbers) -> Self {
        Self {
            path: StoredPath::new(&mount.path),
            fs_id: mount.fs_id,
            fsid: mount.fsid,
            file_system: mount.file_system,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Stored {
    version: u32,
    starts: u64,
    handle_keys: Vec<StoredKey>,
    #[serde(default)]
    exports: Vec<StoredExport>,
}

/// The open state directory. The lock is held for as long as this value lives.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    stored: Mutex<Stored>,
    lock: File,
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
            lock,
        };
        state.save(&state.stored())?;
        Ok(state)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How often a server was started on this directory, this time included.
    pub fn starts(&self) -> u64 {
        self.stored().starts
    }

    /// The keys that sign handles; the last one is the newest.
    pub fn handle_keys(&self) -> Vec<HandleKey> {
        let stored = self.stored();
        stored
            .handle_keys
            .iter()
            .map(|key| HandleKey {
                id: key.id,
                secret: key.secret,
            })
            .collect()
    }

    /// Keeps a copy of the numbers of exports.
    pub fn keep_copy(&self, exports: &[ExportNumbers]) -> Result<(), StateError> {
        let mut stored = self.stored();
        let copy = exports.iter().map(|export| StoredExport {
            path: StoredPath::new(&export.path),
            id: export.id,
            fsid: export.fsid,
            file_system: export.file_system,
            mounts: export.mounts.iter().map(StoredMount::new).collect(),
        });
        stored.exports = copy.collect();
        self.save(&stored)
    }

    /// The copy of the numbers of exports.
    pub fn copy_of_exports(&self) -> Vec<ExportNumbers> {
        let stored = self.stored();
        let exports = stored.exports.iter().map(|export| {
            let mounts = export.mounts.iter().map(|mount| MountNumbers {
                path: mount.path.bytes(),
                fs_id: mount.fs_id,
                fsid: mount.fsid,
                file_system: mount.file_system,
            });
            ExportNumbers {
                service: ServiceId::FIRST,
                path: export.path.bytes(),
                id: export.id,
                fsid: export.fsid,
                file_system: export.file_system,
                mounts: mounts.collect(),
            }
        });
        exports.collect()
    }

    /// The lock that keeps others out: whoever has a copy of it keeps it locked.
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    fn stored(&self) -> MutexGuard<'_, Stored> {
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

/// How long the lock may be held by what is left of an earlier life.
const LOCK_TIME_MAX: Duration = Duration::from_secs(1);
const LOCK_AGAIN: Duration = Duration::from_millis(10);

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
    // The guard of an earlier life may still be at it, for some milliseconds.
    let deadline = Instant::now() + LOCK_TIME_MAX;
    let is_taken = loop {
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            break false;
        }
        if Instant::now() > deadline {
            break true;
        }
        std::thread::sleep(LOCK_AGAIN);
    };
    if is_taken {
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
    fn keys_and_the_copy_of_numbers_outlive_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let first = State::open(dir.path()).unwrap();
        let keys = first.handle_keys();
        let export = |path: &[u8], id| ExportNumbers {
            service: ServiceId::FIRST,
            path: path.into(),
            id,
            fsid: 5,
            file_system: Some(id),
            mounts: vec![MountNumbers {
                path: b"m".as_slice().into(),
                fs_id: 1,
                fsid: 9,
                file_system: None,
            }],
        };
        let exports = [export(b"/a", 1), export(b"/\xff", 2)];
        first.keep_copy(&exports).unwrap();
        drop(first);
        let second = State::open(dir.path()).unwrap();
        assert_eq!(second.starts(), 2);
        assert_eq!(second.handle_keys(), keys);
        assert_eq!(second.copy_of_exports(), exports);
    }

    #[test]
    fn a_file_of_the_first_version_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"version": 1, "starts": 4, "handle_keys": [{"id": 1, "secret":
            [1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]}], "exports": [{"path": "/a", "id": 7,
            "fsid": 8, "mounts": [{"path": "m", "fs_id": 1, "fsid": 9}]}]}"#;
        std::fs::write(dir.path().join("state.json"), text).unwrap();
        let state = State::open(dir.path()).unwrap();
        let exports = state.copy_of_exports();
        assert_eq!((exports[0].id, exports[0].fsid), (7, 8));
        assert_eq!(
            (exports[0].mounts[0].fs_id, exports[0].file_system),
            (1, None)
        );
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
