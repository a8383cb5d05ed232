//! The cluster key: a file that all nodes have alike and nobody else has.
//!
//! Owns the secret and what is derived from it. The file is never used as it is: each use has a
//! label and a key of its own, so that none of them gives another away. White space at the end
//! does not count, since editors and copies by hand add and drop it.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use snow::params::HashChoice;
use snow::resolvers::{CryptoResolver, DefaultResolver};

/// The least that a key file has.
pub(in crate::raft) const KEY_BYTES_MIN: usize = 32;
/// What is read of a key file at most.
pub(in crate::raft) const KEY_BYTES_MAX: u64 = 4096;

/// How many bytes BLAKE2s gives.
const HASH_BYTES: usize = 32;
const LINK_LABEL: &str = "havenfs link between nodes 1";

/// Why there is no cluster key.
#[derive(Debug, thiserror::Error)]
pub(in crate::raft) enum KeyError {
    /// The file can't be read.
    #[error("cannot read the cluster key `{}`: {source}\nhint: make one on the first node, `head -c \
             32 /dev/urandom | base64 > {}`, mode 0600, and copy it to the others", .path.display(), .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Others than the owner may read or change it.
    #[error("the cluster key `{}` has mode {mode:04o}: others than its owner may read or change \
             it\nhint: chmod 0600 {}, and make a new key if somebody may have read it", .path.display(), .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It is too short or too long.
    #[error("the cluster key `{}` has {bytes} bytes, and {KEY_BYTES_MIN} to {KEY_BYTES_MAX} are \
             needed\nhint: make one, `head -c 32 /dev/urandom | base64 > {}`, and copy it to all \
             nodes", .path.display(), .path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// How many bytes it has, white space at the end not counted.
        bytes: u64,
    },
}

/// The secret that all nodes of a cluster share.
#[derive(Clone)]
pub(in crate::raft) struct ClusterKey([u8; HASH_BYTES]);

impl ClusterKey {
    /// Reads the key from its file. Waits for the disk.
    pub(in crate::raft) fn read(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::Read {
            path: path.to_path_buf(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            let path = path.to_path_buf();
            return Err(KeyError::Open { path, mode });
        }
        let mut content = Vec::new();
        let mut input = file.take(KEY_BYTES_MAX + 1);
        input.read_to_end(&mut content).map_err(failed)?;
        // An editor may have ended a text with a line; random bytes end as they like.
        let is_text = content.is_ascii();
        let secret = if is_text {
            content.trim_ascii_end()
        } else {
            &content
        };
        if secret.len() < KEY_BYTES_MIN || content.len() as u64 > KEY_BYTES_MAX {
            return Err(KeyError::Length {
                path: path.to_path_buf(),
                bytes: secret.len() as u64,
            });
        }
        Ok(Self::of(secret))
    }

    /// The key that a file with this content is.
    pub(in crate::raft) fn of(secret: &[u8]) -> Self {
        let mut hash = hasher();
        let mut key = [0; HASH_BYTES];
        hash.input(secret);
        hash.result(&mut key);
        Self(key)
    }

    /// The key of one use; other labels give keys that tell nothing about it.
    pub(in crate::raft) fn derive(&self, label: &str) -> [u8; HASH_BYTES] {
        let mut key = [0; HASH_BYTES];
        hasher().hmac(&self.0, label.as_bytes(), &mut key);
        key
    }

    /// What both ends of a connection must know.
    pub(super) fn of_links(&self) -> [u8; HASH_BYTES] {
        self.derive(LINK_LABEL)
    }
}

impl std::fmt::Debug for ClusterKey {
    /// Shows nothing of it.
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("ClusterKey")
    }
}

fn hasher() -> Box<dyn snow::types::Hash> {
    let hash = DefaultResolver.resolve_hash(&HashChoice::Blake2s);
    hash.expect("snow is built with BLAKE2s")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn write(path: &Path, content: &[u8], mode: u32) {
        std::fs::write(path, content).unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_key_is_what_the_file_says_without_white_space_at_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let secret = b"0123456789abcdef0123456789abcdef";
        write(&path, secret, 0o600);
        let key = ClusterKey::read(&path).unwrap();
        write(&path, &[&secret[..], b"\r\n"].concat(), 0o400);
        let copied = ClusterKey::read(&path).unwrap();
        assert_eq!(key.of_links(), copied.of_links());
        assert_ne!(key.derive("a"), key.derive("b"));
        assert_ne!(key.derive("a"), ClusterKey::of(b"other").derive("a"));
        assert!(!format!("{key:?}").contains('['), "a key is not shown");
    }

    #[test]
    fn a_key_is_derived_alike_for_ever() {
        // File handles and links between versions depend on it. Computed by Python's hashlib.
        let key = ClusterKey::of(b"0123456789abcdef0123456789abcdef");
        let expected = "cdc2b400a091941585fd735862fb732fc4c638079fdeec2ea89eb4e1994d68c3";
        let bytes = (0..32).map(|at| &expected[2 * at..2 * at + 2]);
        let bytes = bytes.map(|digits| u8::from_str_radix(digits, 16).unwrap());
        assert!(key.derive("test").into_iter().eq(bytes));
    }

    #[test]
    fn a_key_that_is_no_secret_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        assert!(matches!(
            ClusterKey::read(&path),
            Err(KeyError::Read { .. })
        ));
        for mode in [0o640, 0o604, 0o620, 0o601] {
            write(&path, &[7; 64], mode);
            let error = ClusterKey::read(&path).unwrap_err();
            assert!(matches!(error, KeyError::Open { .. }), "{error}");
            assert!(error.to_string().contains("hint: chmod 0600"), "{error}");
        }
        for content in [&[7; 31][..], &[b' '; 64], &[7; 4097]] {
            write(&path, content, 0o600);
            let error = ClusterKey::read(&path).unwrap_err();
            assert!(matches!(error, KeyError::Length { .. }), "{error}");
        }
    }
}
