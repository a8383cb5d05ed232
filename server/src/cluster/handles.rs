//! An entry of the handle table as it is replicated: where a file was last seen. What it is for is
//! told in `backend::table`; here it is only kept, so that a handle that one node answered is
//! understood on all of them.

use serde::{Deserialize, Serialize};

/// Which file, and where it was last seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandleEntry {
    /// The export.
    pub export: u32,
    /// The file system within it.
    pub fs: u32,
    /// The inode.
    pub ino: u64,
    /// When the inode was born, in nanoseconds since 1970; 0 if that is not known.
    pub born: i64,
    /// The entry of its directory; 0 is the root of the file system.
    pub parent: u64,
    /// Its name there.
    pub name: Box<[u8]>,
}
