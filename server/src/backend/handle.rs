//! File handles: what a client keeps and what every node must understand.
//!
//! ```text
//! offset  bytes  content
//!      0      1  version (1)
//!      1      1  id of the key that signs it
//!      2      2  type of the kernel's handle
//!      4      4  export id
//!      8      4  file-system id within the export (0: the file system of its root)
//!     12      n  the kernel's handle, at most 44 bytes (empty in the handle of a table entry)
//!   12+n      8  SipHash-2-4 of all that stands before
//! ```
//!
//! Invariants: a handle never holds a device number, a mount id or a time of start, since these
//! differ from node to node and from boot to boot; the same file has the same bytes for as long
//! as it lives; without the key nobody makes a handle that [`Signer::open`] accepts, so a handle
//! is a proof that its file was once found inside its export. Keys are added, never dropped.
//!
//! The protocols' limit is 64 bytes (RFC 1813 2.4).

use std::hash::Hasher;

use siphasher::sip::SipHasher24;

use super::sys::KernelHandle;

/// The longest file handle of NFSv3, in bytes.
pub const HANDLE_BYTES_MAX: usize = 64;
const VERSION: u8 = 1;
const HEAD_BYTES: usize = 12;
const MAC_BYTES: usize = 8;

/// The bytes of a file handle.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FileHandle {
    len: u8,
    bytes: [u8; HANDLE_BYTES_MAX],
}

impl FileHandle {
    /// Takes over at most [`HANDLE_BYTES_MAX`] bytes; `None` if there are more.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let mut handle = Self {
            len: 0,
            bytes: [0; HANDLE_BYTES_MAX],
        };
        handle.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        handle.len = u8::try_from(bytes.len()).ok()?;
        Some(handle)
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl std::hash::Hash for FileHandle {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_slice().hash(state);
    }
}

impl std::fmt::Debug for FileHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_slice()
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The export that the bytes of a handle claim to belong to, unchecked.
pub fn export_id_claimed(bytes: &[u8]) -> Option<u32> {
    let (_, rest) = bytes.split_at_checked(4)?;
    rest.first_chunk().map(|id| u32::from_be_bytes(*id))
}

/// What a handle names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandleParts {
    /// The export it was found in.
    pub export_id: u32,
    /// The file system within the export.
    pub fs_id: u32,
    /// The kernel's handle, or the id of an entry of the handle table.
    pub file: KernelHandle,
}

/// The secret that signs handles.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HandleKey {
    /// Its number, which stands in the handles that it signed.
    pub id: u8,
    /// The key itself.
    pub secret: [u8; 16],
}

impl std::fmt::Debug for HandleKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HandleKey {{ id: {} }}", self.id)
    }
}

/// Why the bytes are no handle of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadHandle;

/// Makes and checks handles.
#[derive(Debug)]
pub struct Signer {
    /// All keys; the last one signs.
    keys: Vec<HandleKey>,
}

impl Signer {
    /// Makes a signer; the last of `keys` signs new handles, all are accepted.
    pub const fn new(keys: Vec<HandleKey>) -> Self {
        Self { keys }
    }

    /// Makes the handle of a file; `None` if there is no key or the kernel's type does not fit.
    pub fn sign(&self, parts: &HandleParts) -> Option<FileHandle> {
        let key = self.keys.last()?;
        let kind = u16::try_from(parts.file.kind).ok()?;
        let mut bytes = [0; HANDLE_BYTES_MAX];
        bytes[0] = VERSION;
        bytes[1] = key.id;
        bytes[2..4].copy_from_slice(&kind.to_be_bytes());
        bytes[4..8].copy_from_slice(&parts.export_id.to_be_bytes());
        bytes[8..12].copy_from_slice(&parts.fs_id.to_be_bytes());
        let file = parts.file.as_slice();
        let end = HEAD_BYTES + file.len();
        bytes[HEAD_BYTES..end].copy_from_slice(file);
        let mac = mac(key, &bytes[..end]);
        bytes[end..end + MAC_BYTES].copy_from_slice(&mac);
        Some(FileHandle {
            len: (end + MAC_BYTES) as u8,
            bytes,
        })
    }

    /// Checks a handle and takes it apart. Looks at nothing but its bytes.
    pub fn open(&self, handle: &FileHandle) -> Result<HandleParts, BadHandle> {
        let (body, their_mac) = handle
            .as_slice()
            .split_last_chunk::<MAC_BYTES>()
            .ok_or(BadHandle)?;
        let (head, file) = body.split_first_chunk::<HEAD_BYTES>().ok_or(BadHandle)?;
        let [version, key_id, kind_high, kind_low, ids @ ..] = *head;
        let [e0, e1, e2, e3, f0, f1, f2, f3] = ids;
        if version != VERSION {
            return Err(BadHandle);
        }
        let key = self
            .keys
            .iter()
            .find(|key| key.id == key_id)
            .ok_or(BadHandle)?;
        if mac(key, body) != *their_mac {
            return Err(BadHandle);
        }
        let kind = i32::from(u16::from_be_bytes([kind_high, kind_low]));
        Ok(HandleParts {
            export_id: u32::from_be_bytes([e0, e1, e2, e3]),
            fs_id: u32::from_be_bytes([f0, f1, f2, f3]),
            file: KernelHandle::new(kind, file).ok_or(BadHandle)?,
        })
    }
}

fn mac(key: &HandleKey, bytes: &[u8]) -> [u8; MAC_BYTES] {
    let mut hasher = SipHasher24::new_with_key(&key.secret);
    hasher.write(bytes);
    hasher.finish().to_le_bytes()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn signer(ids: &[u8]) -> Signer {
        Signer::new(
            ids.iter()
                .map(|id| HandleKey {
                    id: *id,
                    secret: [*id; 16],
                })
                .collect(),
        )
    }

    fn parts(file: &[u8]) -> HandleParts {
        let file = KernelHandle::new(0x81, file).unwrap();
        HandleParts {
            export_id: 7,
            fs_id: 3,
            file,
        }
    }

    #[test]
    fn a_later_key_leaves_older_handles_valid() {
        let handle = signer(&[1]).sign(&parts(b"inode")).unwrap();
        assert_eq!(signer(&[1, 2]).open(&handle), Ok(parts(b"inode")));
        assert_eq!(signer(&[2]).open(&handle), Err(BadHandle));
    }

    #[test]
    fn the_longest_kernel_handle_fits() {
        let handle = signer(&[1]).sign(&parts(&[9; 44])).unwrap();
        assert_eq!(handle.as_slice().len(), HANDLE_BYTES_MAX);
        assert_eq!(signer(&[1]).open(&handle), Ok(parts(&[9; 44])));
        assert!(KernelHandle::new(1, &[9; 45]).is_none());
    }

    proptest! {
        #[test]
        fn any_change_of_a_handle_is_noticed(
            file in prop::collection::vec(any::<u8>(), 0..44), at in 0usize..64, bit in 0u8..8,
        ) {
            let signer = signer(&[1]);
            let handle = signer.sign(&parts(&file)).unwrap();
            let mut bytes = handle.as_slice().to_vec();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let changed = FileHandle::new(&bytes).unwrap();
            prop_assert_eq!(signer.open(&changed), Err(BadHandle));
        }

        #[test]
        fn random_bytes_are_no_handle(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(signer(&[1]).open(&FileHandle::new(&bytes).unwrap()), Err(BadHandle));
        }
    }
}
