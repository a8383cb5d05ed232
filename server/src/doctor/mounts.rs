//! Which file system a path lies on, by the kernel's table of mounts.
//!
//! Source: proc(5), `/proc/pid/mountinfo`.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// File systems whose files are gone with a reboot.
const IN_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];

/// File systems on a disk that know of no other machine.
const ONE_MACHINE: [&str; 6] = ["ext4", "ext3", "ext2", "xfs", "btrfs", "f2fs"];

/// One mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    point: PathBuf,
    /// `major:minor`.
    device: String,
    /// `ext4`, `fuse.sshfs` and the like.
    pub(super) kind: String,
    /// Options of the mount and of the file system.
    options: Vec<String>,
}

impl Mount {
    /// Whether its files are gone with a reboot.
    pub(super) fn is_in_memory(&self) -> bool {
        IN_MEMORY.contains(&self.kind.as_str())
    }

    /// Whether nothing can be written to it.
    pub(super) fn is_read_only(&self) -> bool {
        self.has("ro")
    }

    /// Why a sync does not keep its promise here, if so.
    pub(super) fn sync_is_void(&self) -> Option<&'static str> {
        if self.is_in_memory() {
            return Some("it is in memory, so that everything is gone after a reboot");
        }
        if self.kind == "overlay" && self.has("volatile") {
            return Some("it is mounted with `volatile`, so that syncs do nothing");
        }
        if self.has("nobarrier") || self.has("barrier=0") {
            return Some(
                "it is mounted without barriers, so that a power cut may lose synced data",
            );
        }
        None
    }

    /// Whether it is somebody else's promise that synced data stays.
    pub(super) fn is_remote(&self) -> bool {
        self.kind.starts_with("fuse")
            || ["nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs"].contains(&self.kind.as_str())
    }

    /// What it is called, if only one machine may mount it at a time.
    pub(super) fn of_one_machine(&self) -> Option<&str> {
        ONE_MACHINE
            .contains(&self.kind.as_str())
            .then_some(&*self.kind)
    }

    /// Whether it is an ext4 without a journal; `false` where the kernel does not tell.
    pub(super) fn lacks_journal(&self) -> bool {
        if self.kind != "ext4" {
            return false;
        }
        let Ok(device) = fs::canonicalize(format!("/sys/dev/block/{}", self.device)) else {
            return false;
        };
        let Some(name) = device.file_name() else {
            return false;
        };
        let task = Path::new("/sys/fs/ext4").join(name).join("journal_task");
        fs::read_to_string(task).is_ok_and(|task| task.trim() == "<none>")
    }

    fn has(&self, option: &str) -> bool {
        self.options.iter().any(|have| have == option)
    }
}

/// Everything that is mounted, in the order in which it was.
#[derive(Debug, Default)]
pub(super) struct Mounts(Vec<Mount>);

impl Mounts {
    /// Reads the table of this process; empty where there is none.
    pub(super) fn read() -> Self {
        Self::parse(&fs::read("/proc/self/mountinfo").unwrap_or_default())
    }

    fn parse(table: &[u8]) -> Self {
        let lines = table.split(|byte| *byte == b'\n');
        Self(lines.filter_map(parse_line).collect())
    }

    /// The mount that a path lies on; its symbolic links are followed.
    pub(super) fn of(&self, path: &Path) -> Option<&Mount> {
        let real = fs::canonicalize(path).ok()?;
        self.holding(&real)
    }

    /// Whether nothing is mounted between the root of all and a path.
    pub(super) fn is_on_root(&self, path: &Path) -> bool {
        self.of(path)
            .is_some_and(|mount| mount.point == Path::new("/"))
    }

    fn holding(&self, path: &Path) -> Option<&Mount> {
        let holding = self.0.iter().filter(|mount| path.starts_with(&mount.point));
        // Of several at the same place the last one covers the others, and `max_by_key` takes it.
        holding.max_by_key(|mount| mount.point.components().count())
    }
}

/// `id parent major:minor root point options [optional...] - kind source options`.
fn parse_line(line: &[u8]) -> Option<Mount> {
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let text = |word: &&[u8]| String::from_utf8_lossy(word).into_owned();
    let dash = words.iter().position(|word| *word == b"-")?;
    let mut options = String::new();
    for word in [words.get(5), words.get(dash + 3)].into_iter().flatten() {
        options.push_str(&text(word));
        options.push(',');
    }
    Some(Mount {
        point: PathBuf::from(OsString::from_vec(unescape(words.get(4)?))),
        device: words.get(2).map(text)?,
        kind: words.get(dash + 1).map(text)?,
        options: options.split(',').map(str::to_owned).collect(),
    })
}

/// Turns `\ooo` into the byte it stands for.
fn unescape(mut text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    while let Some((first, rest)) = text.split_first() {
        let octal = rest.get(..3).filter(|_| *first == b'\\');
        let byte = octal
            .and_then(|octal| std::str::from_utf8(octal).ok())
            .and_then(|octal| u8::from_str_radix(octal, 8).ok());
        if let Some(byte) = byte {
            out.push(byte);
            text = rest.get(3..).unwrap_or_default();
        } else {
            out.push(*first);
            text = rest;
        }
    }
    out
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
28 27 0:30 / /srv rw,relatime shared:1 master:2 - xfs /dev/vdb rw,nobarrier
29 28 0:31 / /srv/my\\040files ro,relatime - tmpfs none rw,size=4k
30 27 0:32 / /srv rw - btrfs /dev/vdc rw
31 27 0:33 / /over rw - overlay overlay rw,lowerdir=/a,volatile
nonsense
";

    #[test]
    fn a_path_lies_on_the_innermost_and_latest_mount() {
        let mounts = Mounts::parse(TABLE);
        let kind = |path: &str| &mounts.holding(Path::new(path)).unwrap().kind;
        assert_eq!(kind("/"), "ext4");
        assert_eq!(kind("/srvx"), "ext4");
        assert_eq!(kind("/srv/data"), "btrfs");
        assert_eq!(kind("/srv/my files/x"), "tmpfs");
    }

    #[test]
    fn options_of_both_kinds_count() {
        let mounts = Mounts::parse(TABLE);
        let at = |path: &str| mounts.holding(Path::new(path)).unwrap();
        assert!(at("/srv/my files").is_read_only() && at("/srv/my files").is_in_memory());
        assert!(!at("/").is_read_only() && at("/").sync_is_void().is_none());
        assert!(at("/over").sync_is_void().unwrap().contains("volatile"));
        let xfs = mounts.0.iter().find(|mount| mount.kind == "xfs").unwrap();
        assert!(xfs.sync_is_void().unwrap().contains("barriers"));
    }
}
