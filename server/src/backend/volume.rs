//! One file system of an export: the descriptor that its handles are opened against.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags, fstat, fstatfs, openat};
use rustix::io::Errno;

use super::sys::{self, KernelHandle};

/// A file system that is open for service.
#[derive(Debug)]
pub struct Volume {
    /// The export it belongs to.
    pub export_id: u32,
    /// Its number within the export; 0 is the file system of the export's root.
    pub fs_id: u32,
    /// What clients see as `fsid`: configured, or generated once and stored.
    pub fsid: u64,
    /// Device number, to tell its files from those of other file systems on this node.
    pub dev: u64,
    /// The same for every mount of one file system, also of its parts with device numbers of their
    /// own (btrfs subvolumes): tells whether two volumes can show the same file.
    pub superblock: u64,
    /// Inode number of the root of the export (or of the mount, where `fs_id` is not 0).
    pub root_ino: u64,
    /// Whether the kernel makes handles and lets this process open them; if not, the handle
    /// table stands in.
    pub has_handles: bool,
    /// Whether even the attributes of an open file may have to be asked for elsewhere, so that no
    /// call may be carried out inline.
    pub always_waits: bool,
    /// Whether reading never waits, though the kernel does not say so when asked (RWF_NOWAIT): the
    /// files are in memory.
    pub in_memory: bool,
    /// The mount, as the kernel numbers it until the next boot.
    pub mount_id: i32,
    /// How often something that was written was brought to disk.
    syncs: AtomicU64,
    /// It does not answer.
    hangs: AtomicBool,
    root: OwnedFd,
    /// The directory through the mount that everybody sees: as long as it is open, the file system
    /// can't be unmounted and given to another node while this one still writes to it.
    _pin: OwnedFd,
}

impl Volume {
    /// Opens the directory at `path` as the root of a volume.
    ///
    /// Unless `crosses`, and where the process may, the root is taken from a private copy of the
    /// mount without the mounts below it: then a directory that another file system is mounted on
    /// is seen as it is underneath, as clients of a Linux kernel server see it.
    ///
    /// # Errors
    /// What open(2) says: the directory is missing, or not a directory.
    pub fn open(
        path: &Path,
        export_id: u32,
        fs_id: u32,
        fsid: u64,
        crosses: bool,
    ) -> Result<Self, Errno> {
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::INVAL)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let copy = if crosses {
            Err(Errno::NOSYS)
        } else {
            sys::clone_mount(&name)
        };
        let pin = rustix::fs::open(path, flags, Mode::empty())?;
        let root = match copy {
            Ok(tree) => openat(&tree, c".", flags, Mode::empty())?,
            Err(_) => rustix::fs::open(path, flags, Mode::empty())?,
        };
        let stat = fstat(&root)?;
        let magic = fstatfs(&root)?.f_type as u64;
        let mount_id = sys::name_to_handle(root.as_fd(), c"").map_or(-1, |(_, mount)| mount);
        let has_handles = sys::name_to_handle(root.as_fd(), c"")
            .and_then(|(handle, _)| sys::open_by_handle(root.as_fd(), &handle, libc::O_PATH))
            .is_ok();
        Ok(Self {
            export_id,
            fs_id,
            fsid,
            dev: stat.st_dev,
            superblock: Mount::of(pin.as_fd()).map_or(stat.st_dev, |mount| mount.number),
            root_ino: stat.st_ino,
            has_handles,
            always_waits: ANSWERED_ELSEWHERE.contains(&magic),
            in_memory: magic == TMPFS,
            mount_id,
            syncs: AtomicU64::new(0),
            hangs: AtomicBool::new(false),
            root,
            _pin: pin,
        })
    }

    /// Whether names and links may go from one to the other.
    pub const fn is_same(&self, other: &Self) -> bool {
        self.export_id == other.export_id && self.fs_id == other.fs_id && self.dev == other.dev
    }

    /// The root directory, opened for reading.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Notes that something that was written is on disk: it answers.
    pub fn note_synced(&self) {
        self.syncs.fetch_add(1, Ordering::Relaxed);
    }

    /// How often that was so.
    pub fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    /// Whether a probe of it has not come back in time: what may wait for it is put off.
    pub fn hangs(&self) -> bool {
        self.hangs.load(Ordering::Relaxed)
    }

    /// Notes that.
    pub fn set_hangs(&self, hangs: bool) {
        self.hangs.store(hangs, Ordering::Relaxed);
    }

    /// Brings all that is written to the file system to disk, by whomever. Waits for the disk.
    pub fn sync(&self) -> Result<(), Errno> {
        rustix::fs::syncfs(self.root())
    }

    /// Opens a file by the kernel's handle.
    pub fn open_by_handle(&self, handle: &KernelHandle, flags: OFlags) -> Result<OwnedFd, Errno> {
        sys::open_by_handle(self.root(), handle, flags.bits().cast_signed())
    }
}

/// Where a directory is, whatever mounts lead to it: the number of its file system, and its path in
/// there. `None` if the kernel does not say.
pub fn place_of(directory: &Path) -> Option<(u64, PathBuf)> {
    let directory = std::fs::canonicalize(directory).ok()?;
    let fd = std::fs::File::open(&directory).ok()?;
    let mount = Mount::of(fd.as_fd())?;
    let inside = directory.strip_prefix(mount.at).ok()?;
    Some((mount.number, mount.root.join(inside)))
}

/// A line of the kernel's table of mounts (proc(5)). Paths with blanks are escaped in it.
struct Mount {
    /// The device number.
    number: u64,
    /// Which part of the file system it shows.
    root: PathBuf,
    /// Where.
    at: PathBuf,
}

impl Mount {
    fn of(fd: BorrowedFd<'_>) -> Option<Self> {
        let own = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
        let id = own.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
        let table = std::fs::read("/proc/self/mountinfo").ok()?;
        let table = String::from_utf8_lossy(&table);
        table.lines().find_map(|line| {
            let mut fields = line.split(' ');
            if fields.next()? != id.trim() {
                return None;
            }
            let (major, minor) = fields.nth(1)?.split_once(':')?;
            Some(Self {
                number: rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?),
                root: fields.next()?.into(),
                at: fields.next()?.into(),
            })
        })
    }
}

const TMPFS: u64 = 0x0102_1994;
/// File systems whose calls another process or machine answers: FUSE, NFS, SMB, 9P, Ceph.
const ANSWERED_ELSEWHERE: [u64; 6] = [
    0x6573_5546,
    0x6969,
    0xff53_4d42,
    0xfe53_4d42,
    0x0102_1997,
    0x00c3_6400,
];
