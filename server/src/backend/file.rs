//! One opened file: its descriptors, what is known of its ACL, and what is not yet on disk.
//!
//! A file is held by an O_PATH descriptor, which has no side effects and works for every kind of
//! file. Descriptors for reading and writing are opened when first needed, as the server itself,
//! and so give no permission: every call is judged by [`File::allows`] on its own.
//!
//! Write descriptors are closed again when idle ([`File::close_idle`]), because Linux refuses to
//! execute a file that somebody has open for writing.
//!
//! Invariant of the sync counters: a write adds to `written` after its data is in the page cache
//! and before it is answered; a sync takes `written` before it begins and stores it in `synced`
//! when it has succeeded. Equal counters mean that all answered writes are on disk. A file that
//! was just opened does not know what its predecessors wrote, so it starts unequal.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FileType, Mode as OpenMode, OFlags, fstat, fstatvfs, readlinkat};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use super::attributes::{Attributes, Want};
use super::credential::{self, Caller};
use super::handle::FileHandle;
use super::setattr;
use super::sys::{self, KernelHandle};
use super::volume::Volume;
use super::{Failure, Mode};

/// What is known about the file's POSIX ACL: these bits, below the change time they hold for.
const ACL_NONE: u64 = 1;
const ACL_PRESENT: u64 = 2;

/// What counts as written in a file that was just opened.
const WRITTEN_UNKNOWN: u64 = 1;

/// A change time younger than this may hide a second change in the same clock tick.
const CLOCK_TICK_NS: i64 = 50_000_000;
const WHOLE_SECONDS_TICK_NS: i64 = 2_000_000_000;

/// An opened file.
#[derive(Debug)]
pub struct File {
    /// The handle that clients know it by.
    pub handle: FileHandle,
    /// The file system it lies on.
    pub volume: Arc<Volume>,
    kernel: KernelHandle,
    fd: OwnedFd,
    /// `fd` itself is open for reading.
    readable: bool,
    kind: FileType,
    read: Mutex<Option<Arc<OwnedFd>>>,
    write: Mutex<Option<Arc<OwnedFd>>>,
    used: AtomicBool,
    acl: AtomicU64,
    written: AtomicU64,
    synced: AtomicU64,
    sync: Mutex<()>,
    /// Whether it is counted in `dirty_files`.
    counted: AtomicBool,
    dirty_files: Arc<AtomicUsize>,
}

impl Drop for File {
    fn drop(&mut self) {
        self.count_clean();
    }
}

/// A descriptor to read or write with: the file's own, or a shared one.
#[derive(Debug)]
pub enum DataFd<'a> {
    /// The descriptor that the file is held by.
    Own(BorrowedFd<'a>),
    /// One that was opened for this purpose.
    Opened(Arc<OwnedFd>),
}

impl AsFd for DataFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Own(fd) => fd.as_fd(),
            Self::Opened(fd) => fd.as_fd(),
        }
    }
}

impl File {
    /// Takes over a descriptor; `readable` says that it was opened for reading, `dirty_files`
    /// counts the files with writes that are not on disk.
    pub const fn new(
        handle: FileHandle,
        kernel: KernelHandle,
        volume: Arc<Volume>,
        fd: OwnedFd,
        kind: FileType,
        readable: bool,
        dirty_files: Arc<AtomicUsize>,
    ) -> Self {
        Self {
            handle,
            volume,
            kernel,
            fd,
            readable,
            kind,
            read: Mutex::new(None),
            write: Mutex::new(None),
            used: AtomicBool::new(false),
            acl: AtomicU64::new(0),
            written: AtomicU64::new(WRITTEN_UNKNOWN),
            synced: AtomicU64::new(0),
            sync: Mutex::new(()),
            counted: AtomicBool::new(false),
            dirty_files,
        }
    }

    /// The descriptor that the file is held by; good for attributes and as a directory.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The kernel's handle, or the number of its entry in the handle table.
    pub const fn handle_parts(&self) -> KernelHandle {
        self.kernel
    }

    /// The kind of file.
    pub const fn kind(&self) -> FileType {
        self.kind
    }

    /// Whether it is the root of its export (or of a mount inside it).
    pub fn is_root(&self, attributes: &Attributes) -> bool {
        attributes.ino == self.volume.root_ino && attributes.dev == self.volume.dev
    }

    /// Reads the attributes.
    ///
    /// # Errors
    /// [`Failure::Stale`] if the last name of the file is gone: this cache alone keeps it.
    pub fn attributes(&self) -> Result<Attributes, Failure> {
        let stat = fstat(&self.fd)?;
        if stat.st_nlink == 0 {
            return Err(Failure::Stale);
        }
        Ok(Attributes::from(&stat))
    }

    /// What clients see as `fsid`: that of the volume, unless the file system has parts with inode
    /// numbers of their own (btrfs subvolumes), which clients must be able to tell apart.
    pub fn fsid(&self, attributes: &Attributes) -> u64 {
        if attributes.dev == self.volume.dev {
            return self.volume.fsid;
        }
        fstatvfs(&self.fd).map_or(self.volume.fsid, |part| {
            self.volume.fsid ^ part.f_fsid.rotate_left(17)
        })
    }

    /// The text of a symbolic link.
    ///
    /// # Errors
    /// EINVAL if it is none; [`Failure::Wait`], since a long text is a block of its own on disk.
    pub fn read_link(&self, mode: Mode) -> Result<CString, Failure> {
        if self.kind != FileType::Symlink {
            return Err(Errno::INVAL.into());
        }
        if mode == Mode::Inline {
            return Err(Failure::Wait);
        }
        Ok(readlinkat(&self.fd, c"", Vec::new())?)
    }

    /// Succeeds if it is a directory.
    ///
    /// # Errors
    /// ENOTDIR.
    pub fn must_be_dir(&self) -> Result<(), Failure> {
        if self.kind == FileType::Directory {
            Ok(())
        } else {
            Err(Errno::NOTDIR.into())
        }
    }

    /// Succeeds if it is a regular file. Anything else must never be opened for data: a FIFO or a
    /// device would block or act.
    ///
    /// # Errors
    /// EISDIR for a directory, EINVAL for the rest.
    pub fn must_be_regular(&self) -> Result<(), Failure> {
        match self.kind {
            FileType::RegularFile => Ok(()),
            FileType::Directory => Err(Errno::ISDIR.into()),
            _ => Err(Errno::INVAL.into()),
        }
    }

    /// Succeeds if `caller` may do all of `want`.
    ///
    /// Mode bits are judged here; if the file has an ACL, the kernel is asked under the caller's
    /// identity, which only a worker thread can do.
    ///
    /// # Errors
    /// EACCES, or [`Failure::Wait`].
    pub fn allows(
        &self,
        attributes: &Attributes,
        caller: &Caller,
        want: Want,
        mode: Mode,
    ) -> Result<(), Failure> {
        if !self.has_acl(attributes, mode)? {
            let allowed = attributes.mode_allows(caller, want);
            return if allowed {
                Ok(())
            } else {
                Err(Errno::ACCESS.into())
            };
        }
        if mode == Mode::Inline {
            return Err(Failure::Wait);
        }
        Ok(credential::as_caller(caller, || {
            sys::may_access(self.fd.as_fd(), want.0)
        })?)
    }

    /// Whether the file has an access ACL beyond its mode bits. The answer is kept for as long as
    /// the change time stays the same, which an ACL can't be given without changing.
    fn has_acl(&self, attributes: &Attributes, mode: Mode) -> Result<bool, Failure> {
        if self.kind == FileType::Symlink {
            return Ok(false);
        }
        let ctime = attributes.ctime;
        let ctime_ns = ctime
            .seconds
            .wrapping_mul(1_000_000_000)
            .wrapping_add(i64::from(ctime.nanoseconds));
        let at_ctime = ctime_ns.cast_unsigned() << 2;
        let known = self.acl.load(Ordering::Relaxed);
        if known == at_ctime | ACL_NONE {
            return Ok(false);
        }
        if known == at_ctime | ACL_PRESENT {
            return Ok(true);
        }
        if mode == Mode::Inline {
            return Err(Failure::Wait);
        }
        credential::as_server();
        let path = self.proc_path();
        let present =
            match rustix::fs::getxattr(&path, c"system.posix_acl_access", &mut [0u8; 0][..]) {
                Ok(_) => true,
                Err(Errno::NODATA | Errno::OPNOTSUPP) => false,
                // No /proc: whether there is an ACL can't be told, so nobody gets in.
                Err(Errno::NOENT) => return Err(Errno::IO.into()),
                Err(errno) => return Err(errno.into()),
            };
        let now = clock_gettime(ClockId::RealtimeCoarse);
        let now_ns = now
            .tv_sec
            .wrapping_mul(1_000_000_000)
            .wrapping_add(now.tv_nsec);
        // Some file systems keep whole seconds only.
        let tick = if ctime.nanoseconds == 0 {
            WHOLE_SECONDS_TICK_NS
        } else {
            CLOCK_TICK_NS
        };
        if now_ns.wrapping_sub(ctime_ns) > tick {
            let known = if present { ACL_PRESENT } else { ACL_NONE };
            self.acl.store(at_ctime | known, Ordering::Relaxed);
        }
        Ok(present)
    }

    /// A path of the file that system calls without a descriptor form accept.
    pub fn proc_path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }

    /// A descriptor for reading.
    ///
    /// # Errors
    /// [`Failure::Jukebox`] while another process holds a lease on the file.
    pub fn read_fd(&self, mode: Mode) -> Result<DataFd<'_>, Failure> {
        if self.readable {
            return Ok(DataFd::Own(self.fd()));
        }
        self.data_fd(&self.read, OFlags::RDONLY, mode)
    }

    /// A descriptor for writing.
    ///
    /// # Errors
    /// EROFS, ETXTBSY, or as [`File::read_fd`].
    pub fn write_fd(&self, mode: Mode) -> Result<DataFd<'_>, Failure> {
        self.data_fd(&self.write, OFlags::WRONLY, mode)
    }

    /// The descriptor to sync through. A file with writes that are not on disk must be synced
    /// through the one that was open when they were made: a newer one is not told of an error in
    /// writing them back that somebody else was told of before it was opened.
    ///
    /// # Errors
    /// As [`File::read_fd`].
    pub fn sync_fd(&self) -> Result<DataFd<'_>, Failure> {
        let opened = self
            .write
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        opened.map_or_else(|| self.read_fd(Mode::Worker), |fd| Ok(DataFd::Opened(fd)))
    }

    fn data_fd(
        &self,
        slot: &Mutex<Option<Arc<OwnedFd>>>,
        flags: OFlags,
        mode: Mode,
    ) -> Result<DataFd<'_>, Failure> {
        self.used.store(true, Ordering::Relaxed);
        let lock = || slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fd) = &*lock() {
            return Ok(DataFd::Opened(Arc::clone(fd)));
        }
        if mode == Mode::Inline {
            return Err(Failure::Wait);
        }
        // Opened without the lock, which others take inline: opening may wait.
        let fd = Arc::new(self.reopen(flags)?);
        let mut slot = lock();
        let fd = slot.get_or_insert(fd);
        Ok(DataFd::Opened(Arc::clone(fd)))
    }

    /// Opens the file anew, as the server itself. O_NONBLOCK: never wait for a lease to break.
    pub fn reopen(&self, flags: OFlags) -> Result<OwnedFd, Failure> {
        credential::as_server();
        match self.reopen_as_is(flags) {
            Err(Errno::ACCESS) if !credential::can_switch() => Ok(self.reopen_own(flags)?),
            opened => Ok(opened?),
        }
    }

    fn reopen_as_is(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if self.volume.has_handles {
            return self.volume.open_by_handle(&self.kernel, flags);
        }
        rustix::fs::open(self.proc_path(), flags, OpenMode::empty())
    }

    /// Opens a file of the server's own user whose mode keeps even its owner out, which a server
    /// without privilege can't pass: the owner gets in for a moment. Clients expect that the owner
    /// of an open file may go on using it (and EXCLUSIVE creates begin with mode 0).
    fn reopen_own(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        let attributes = Attributes::from(&fstat(&self.fd)?);
        if attributes.uid != credential::own_caller().uid {
            return Err(Errno::ACCESS);
        }
        setattr::chmod(self, attributes.mode | 0o700)?;
        let opened = self.reopen_as_is(flags);
        setattr::chmod(self, attributes.mode)?;
        opened
    }

    /// Whether answered writes wait for a sync. Such a file must stay open: its successor would not
    /// know of them, nor of an error in writing them back that was reported to somebody else.
    pub fn is_dirty(&self) -> bool {
        let written = self.written.load(Ordering::Acquire);
        written > WRITTEN_UNKNOWN && self.synced.load(Ordering::Acquire) < written
    }

    /// Whether nothing was read or written since the last call.
    pub fn was_idle(&self) -> bool {
        !self.used.swap(false, Ordering::Relaxed)
    }

    /// Closes the data descriptors.
    pub fn close_data(&self) {
        if !self.is_dirty() {
            for slot in [&self.read, &self.write] {
                slot.lock().unwrap_or_else(PoisonError::into_inner).take();
            }
        }
    }

    /// Notes that a change is in the page cache and about to be answered.
    pub fn note_written(&self) {
        self.written.fetch_add(1, Ordering::AcqRel);
        if !self.counted.swap(true, Ordering::AcqRel) {
            self.dirty_files.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn count_clean(&self) {
        if self.counted.swap(false, Ordering::AcqRel) {
            self.dirty_files.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Runs `sync` unless every answered write is known to be on disk.
    ///
    /// One sync at a time: those that wait meanwhile find that theirs is done. And since the
    /// kernel reports a failed write-back once, nobody may be told that all is well between the
    /// report and what follows from it, so `sync` also does that.
    pub fn sync_written(&self, sync: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        let _alone = self.sync.lock().unwrap_or_else(PoisonError::into_inner);
        let written = self.written.load(Ordering::Acquire);
        if self.synced.load(Ordering::Acquire) >= written {
            return Ok(());
        }
        // Before the sync: a write that comes meanwhile counts the file again.
        self.count_clean();
        if let Err(errno) = sync() {
            if !self.counted.swap(true, Ordering::AcqRel) {
                self.dirty_files.fetch_add(1, Ordering::Relaxed);
            }
            return Err(errno);
        }
        self.synced.store(written, Ordering::Release);
        // The sync of a file that was just opened may have found nothing to do.
        if written > WRITTEN_UNKNOWN {
            self.volume.note_synced();
        }
        Ok(())
    }

    /// Runs `sync` in any case, for changes of attributes and names; counts for data as well.
    pub fn sync_always(&self, sync: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        self.note_written();
        self.sync_written(sync)
    }
}
