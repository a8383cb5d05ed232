//! Who mounted what from a service, as it is replicated: the list behind MOUNT's DUMP, so that
//! `showmount -a` knows it after a takeover.
//!
//! Kept as the active node tells it, and best effort: nothing but DUMP depends on it. What is told,
//! and when, is `serve::mounts`'. The order of the entries is not kept.
//!
//! Invariants: at most [`MOUNTS_MAX`] entries, each with a path of at most [`PATH_BYTES_MAX`].

use std::io::{self, Read, Write};
use std::net::IpAddr;

use imbl::OrdSet;
use serde::{Deserialize, Serialize};

use super::rows::{damaged, read_row, write_end, write_row};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mount {
    /// The host that mounted.
    pub host: IpAddr,
    /// What it mounted, as it named it.
    pub path: Box<[u8]>,
}

/// Carries out a change; what finds no room, or is too long, is not kept.
pub(super) fn change(kept: &mut OrdSet<Mount>, came: &[Mount], went: &[Mount]) {
    for mount in went {
        kept.remove(mount);
    }
    for mount in came {
        if kept.len() < MOUNTS_MAX && mount.path.len() <= PATH_BYTES_MAX {
            kept.insert(mount.clone());
        }
    }
}

/// Writes them as [`read`] reads them.
pub(super) fn write(
    kept: &OrdSet<Mount>,
    out: &mut impl Write,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    for mount in kept {
        write_row(out, buffer, mount)?;
    }
    write_end(out)
}

/// Reads what [`write`] wrote.
pub(super) fn read(input: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<OrdSet<Mount>> {
    let mut kept = OrdSet::new();
    while let Some(mount) = read_row::<Mount>(input, buffer)? {
        if kept.len() >= MOUNTS_MAX || mount.path.len() > PATH_BYTES_MAX {
            return Err(damaged());
        }
        kept.insert(mount);
    }
    Ok(kept)
}

/// How many are kept for a service: as many as a node's own list has.
pub const MOUNTS_MAX: usize = 4096;
/// The longest path (RFC 1813 5: MNTPATHLEN).
pub const PATH_BYTES_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(number: u32, path_bytes: usize) -> Mount {
        let path = vec![b'p'; path_bytes].into();
        let host = IpAddr::from(number.to_be_bytes());
        Mount { host, path }
    }

    #[test]
    fn what_finds_no_room_or_is_too_long_is_not_kept() {
        let mut kept = OrdSet::new();
        let many: Vec<_> = (0..MOUNTS_MAX as u32).map(|host| mount(host, 5)).collect();
        change(&mut kept, &many, &[]);
        change(&mut kept, &[mount(9_999, 5)], &[]);
        assert!(kept.len() == MOUNTS_MAX && !kept.contains(&mount(9_999, 5)));
        let came = [mount(9_999, 5), mount(9_998, PATH_BYTES_MAX + 1)];
        change(&mut kept, &came, &many[..2]);
        assert!(kept.len() == MOUNTS_MAX - 1 && kept.contains(&mount(9_999, 5)));
    }

    #[test]
    fn more_than_there_can_be_is_damage() {
        let mut kept: OrdSet<_> = (0..MOUNTS_MAX as u32).map(|host| mount(host, 5)).collect();
        let read_back = |kept: &OrdSet<Mount>| {
            let (mut bytes, mut buffer) = (Vec::new(), Vec::new());
            write(kept, &mut bytes, &mut buffer).ok()?;
            read(&mut bytes.as_slice(), &mut buffer).ok()
        };
        assert_eq!(read_back(&kept), Some(kept.clone()));
        kept.insert(mount(9_999, 5));
        assert_eq!(read_back(&kept), None);
    }
}
