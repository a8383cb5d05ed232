//! Names: creating, removing, renaming and linking files.
//!
//! Everything that makes or takes a name runs under the caller's identity, so that the kernel
//! judges permission and gives new files their owner, group and inherited ACL. With `durable` the
//! change is on disk before the call returns: the directory is synced, and a new file too.
//!
//! Runs on worker threads only.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Mode as FileMode, OFlags, ResolveFlags, linkat, mkdirat, mknodat, openat2,
    renameat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::attributes::{Time, Want};
use super::credential::{self, Caller};
use super::file::File;
use super::files::Files;
use super::handle::FileHandle;
use super::setattr::{self, Changes, SetTime};
use super::{Failure, Mode};

/// The parts of a call that changes a directory.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    /// All files.
    pub files: &'a Files,
    /// Who asks.
    pub caller: &'a Caller,
    /// Whether the change must be on disk before the call returns.
    pub durable: bool,
}

/// How CREATE treats a file that is there already (RFC 1813 3.3.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CreateHow {
    /// Take it, and set its size if one is given.
    Unchecked(Changes),
    /// Refuse.
    Guarded(Changes),
    /// Take it if this very call created it, as the verifier tells.
    Exclusive([u8; 8]),
}

/// What MKNOD makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// A character device with major and minor number.
    CharacterDevice(u32, u32),
    /// A block device with major and minor number.
    BlockDevice(u32, u32),
    /// A socket.
    Socket,
    /// A FIFO.
    Fifo,
}

const NEW_FILE: OFlags = OFlags::RDONLY
    .union(OFlags::CREATE)
    .union(OFlags::EXCL)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);
/// The largest device numbers that Linux keeps.
const MAJOR_MAX: u32 = (1 << 12) - 1;
const MINOR_MAX: u32 = (1 << 20) - 1;
const AS_PATH: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Change<'_> {
    /// CREATE. `may_cut` is asked before the size of a file that exists is changed.
    ///
    /// # Errors
    /// EEXIST, or EISDIR where a directory has the name; what `may_cut` says.
    pub fn create(
        &self,
        dir: &Arc<File>,
        name: &CStr,
        how: &CreateHow,
        may_cut: impl FnOnce(&FileHandle) -> Result<(), Failure>,
    ) -> Result<Arc<File>, Failure> {
        dir.must_be_dir()?;
        let mode = match how {
            CreateHow::Unchecked(changes) | CreateHow::Guarded(changes) => {
                changes.check_values()?;
                changes.mode.unwrap_or(0)
            }
            // Nobody but the owner gets in before the caller has set the mode.
            CreateHow::Exclusive(_) => 0,
        };
        self.files.must_serve()?;
        let made = credential::as_caller(self.caller, || {
            openat2(
                dir.fd(),
                name,
                NEW_FILE,
                FileMode::from_raw_mode(mode),
                ResolveFlags::NO_XDEV,
            )
        });
        match (made, how) {
            (Ok(fd), CreateHow::Unchecked(changes) | CreateHow::Guarded(changes)) => {
                let file = self.files.adopt(dir, name, fd, true)?;
                self.finish_new(
                    dir,
                    file,
                    &Changes {
                        mode: None,
                        ..*changes
                    },
                )
            }
            (Ok(fd), CreateHow::Exclusive(verifier)) => {
                let file = self.files.adopt(dir, name, fd, true)?;
                let [atime, mtime] = verifier_times(*verifier);
                let changes = Changes {
                    atime: Some(SetTime::To(atime)),
                    mtime: Some(SetTime::To(mtime)),
                    ..Changes::default()
                };
                self.finish_new(dir, file, &changes)
            }
            (Err(Errno::EXIST), CreateHow::Unchecked(changes)) => {
                let file = self.existing(dir, name)?;
                match file.kind() {
                    FileType::RegularFile => {}
                    FileType::Directory => return Err(Errno::ISDIR.into()),
                    _ => return Err(Errno::EXIST.into()),
                }
                if changes.size.is_some() {
                    may_cut(&file.handle)?;
                    let size_only = Changes {
                        size: changes.size,
                        ..Changes::default()
                    };
                    setattr::setattr(self.files, &file, self.caller, &size_only, self.durable)?;
                }
                Ok(file)
            }
            (Err(Errno::EXIST), CreateHow::Exclusive(verifier)) => {
                let file = self.existing(dir, name)?;
                let found = file.attributes()?;
                let [atime, mtime] = verifier_times(*verifier);
                let same = found.kind == FileType::RegularFile
                    && found.size == 0
                    && found.atime.seconds == atime.seconds
                    && found.mtime.seconds == mtime.seconds;
                if !same {
                    return Err(Errno::EXIST.into());
                }
                self.sync_new(dir, &file)?;
                Ok(file)
            }
            (Err(errno), _) => Err(errno.into()),
        }
    }

    /// MKDIR.
    pub fn mkdir(
        &self,
        dir: &Arc<File>,
        name: &CStr,
        changes: &Changes,
    ) -> Result<Arc<File>, Failure> {
        dir.must_be_dir()?;
        changes.check_values()?;
        let mode = FileMode::from_raw_mode(changes.mode.unwrap_or(0));
        self.files.must_serve()?;
        credential::as_caller(self.caller, || mkdirat(dir.fd(), name, mode))?;
        let made = self.existing(dir, name)?;
        // mkdir(2) ignores all but the permission and sticky bits, and keeps the set-group-id bit
        // that the directory above hands down.
        let set_id = changes.mode.filter(|mode| mode & 0o6000 != 0);
        let mode = match set_id {
            Some(mode) => Some(mode | (made.attributes()?.mode & 0o2000)),
            None => None,
        };
        // A directory has no size to set.
        let changes = Changes {
            mode,
            size: None,
            ..*changes
        };
        self.finish_new(dir, made, &changes)
    }

    /// SYMLINK.
    pub fn symlink(
        &self,
        dir: &Arc<File>,
        name: &CStr,
        target: &CStr,
        changes: &Changes,
    ) -> Result<Arc<File>, Failure> {
        dir.must_be_dir()?;
        changes.check_values()?;
        self.files.must_serve()?;
        credential::as_caller(self.caller, || symlinkat(target, dir.fd(), name))?;
        let made = self.existing(dir, name)?;
        // Symbolic links have no mode of their own on Linux.
        self.finish_new(
            dir,
            made,
            &Changes {
                mode: None,
                size: None,
                ..*changes
            },
        )
    }

    /// MKNOD.
    pub fn mknod(
        &self,
        dir: &Arc<File>,
        name: &CStr,
        special: Special,
        changes: &Changes,
    ) -> Result<Arc<File>, Failure> {
        dir.must_be_dir()?;
        changes.check_values()?;
        if let Special::CharacterDevice(major, minor) | Special::BlockDevice(major, minor) = special
            && (major > MAJOR_MAX || minor > MINOR_MAX)
        {
            return Err(Errno::INVAL.into());
        }
        let mode = FileMode::from_raw_mode(changes.mode.unwrap_or(0));
        let (kind, device) = match special {
            Special::CharacterDevice(major, minor) => {
                (FileType::CharacterDevice, rustix::fs::makedev(major, minor))
            }
            Special::BlockDevice(major, minor) => {
                (FileType::BlockDevice, rustix::fs::makedev(major, minor))
            }
            Special::Socket => (FileType::Socket, 0),
            Special::Fifo => (FileType::Fifo, 0),
        };
        self.files.must_serve()?;
        credential::as_caller(self.caller, || mknodat(dir.fd(), name, kind, mode, device))?;
        let made = self.existing(dir, name)?;
        self.finish_new(
            dir,
            made,
            &Changes {
                mode: None,
                size: None,
                ..*changes
            },
        )
    }

    /// REMOVE.
    ///
    /// # Errors
    /// EISDIR for a directory.
    pub fn remove(&self, dir: &Arc<File>, name: &CStr) -> Result<(), Failure> {
        self.unlink(dir, name, AtFlags::empty())
    }

    /// RMDIR.
    ///
    /// # Errors
    /// ENOTDIR, ENOTEMPTY.
    pub fn rmdir(&self, dir: &Arc<File>, name: &CStr) -> Result<(), Failure> {
        self.unlink(dir, name, AtFlags::REMOVEDIR)
    }

    fn unlink(&self, dir: &Arc<File>, name: &CStr, flags: AtFlags) -> Result<(), Failure> {
        dir.must_be_dir()?;
        self.files.must_serve()?;
        let gone = credential::as_caller(self.caller, || {
            let gone = self.files.cached_handle(dir, name);
            unlinkat(dir.fd(), name, flags)?;
            Ok(gone)
        })?;
        if let Some(handle) = gone {
            self.files.forget_if_unlinked(&handle);
        }
        self.sync_dir(dir)
    }

    /// RENAME.
    ///
    /// # Errors
    /// EXDEV between file systems or exports; EINVAL into a directory below itself.
    pub fn rename(
        &self,
        from: (&Arc<File>, &CStr),
        to: (&Arc<File>, &CStr),
    ) -> Result<(), Failure> {
        from.0.must_be_dir()?;
        to.0.must_be_dir()?;
        if !from.0.volume.is_same(&to.0.volume) {
            return Err(Errno::XDEV.into());
        }
        self.files.must_serve()?;
        let replaced = credential::as_caller(self.caller, || {
            let replaced = self.files.cached_handle(to.0, to.1);
            renameat(from.0.fd(), from.1, to.0.fd(), to.1)?;
            Ok(replaced)
        })?;
        if let Some(handle) = replaced {
            self.files.forget_if_unlinked(&handle);
        }
        if !to.0.volume.has_handles {
            credential::as_server();
            self.files.table().renamed(to)?;
        }
        self.sync_dir(to.0)?;
        if !Arc::ptr_eq(from.0, to.0) {
            self.sync_dir(from.0)?;
        }
        Ok(())
    }

    /// LINK.
    ///
    /// Permission is judged here and the link is made as the server itself: the kernel would
    /// apply its own rule against links to foreign files (`fs.protected_hardlinks`), which is
    /// meant for local users and which clients do not expect.
    ///
    /// # Errors
    /// EXDEV between file systems or exports; EPERM for a directory.
    pub fn link(&self, file: &Arc<File>, dir: &Arc<File>, name: &CStr) -> Result<(), Failure> {
        dir.must_be_dir()?;
        if !file.volume.is_same(&dir.volume) {
            return Err(Errno::XDEV.into());
        }
        let before = dir.attributes()?;
        dir.allows(
            &before,
            self.caller,
            Want::WRITE.and(Want::EXECUTE),
            Mode::Worker,
        )?;
        self.files.must_serve()?;
        credential::as_server();
        match linkat(file.fd(), c"", dir.fd(), name, AtFlags::EMPTY_PATH) {
            // Without CAP_DAC_READ_SEARCH a descriptor can't be linked by itself.
            Err(Errno::NOENT) => linkat(
                rustix::fs::CWD,
                file.proc_path(),
                dir.fd(),
                name,
                AtFlags::SYMLINK_FOLLOW,
            )?,
            other => other?,
        }
        self.sync_new(dir, file)
    }

    /// Opens what stands under `name` now.
    fn existing(&self, dir: &Arc<File>, name: &CStr) -> Result<Arc<File>, Failure> {
        credential::as_server();
        let fd: OwnedFd = openat2(
            dir.fd(),
            name,
            AS_PATH,
            FileMode::empty(),
            ResolveFlags::NO_XDEV,
        )?;
        self.files.adopt(dir, name, fd, false)
    }

    /// Sets the attributes that the creating call could not, and brings everything to disk.
    fn finish_new(
        &self,
        dir: &Arc<File>,
        file: Arc<File>,
        changes: &Changes,
    ) -> Result<Arc<File>, Failure> {
        let mut changes = *changes;
        if self.caller.uid != 0 {
            // As Linux does: only the superuser gives a new file away; for others the creating
            // call has set owner and group.
            changes.uid = None;
            changes.gid = None;
        }
        // Somebody who may write the directory too may have put another file in the place of what
        // was just made; that one must keep its attributes.
        let ours = file.attributes()?.uid == self.caller.uid;
        if changes != Changes::default() && ours {
            // It goes with what has been done already, and so nothing is asked in between.
            setattr::set(self.files, &file, self.caller, &changes, false)?;
        }
        self.sync_new(dir, &file)?;
        Ok(file)
    }

    /// Brings a new name, and the file that has it, to disk.
    fn sync_new(&self, dir: &Arc<File>, file: &File) -> Result<(), Failure> {
        if self.durable && matches!(file.kind(), FileType::RegularFile | FileType::Directory) {
            setattr::sync_attributes(self.files, file)?;
        }
        self.sync_dir(dir)
    }

    fn sync_dir(&self, dir: &File) -> Result<(), Failure> {
        if !self.durable {
            return Ok(());
        }
        if !dir.volume.has_handles {
            self.files.table().sync()?;
        }
        setattr::sync_attributes(self.files, dir)
    }
}

/// Where the verifier of an EXCLUSIVE create is kept until the client sets the real times: in the
/// seconds of both times, which every file system stores and every node sees. The top bit of each
/// half is left out, because old clients take it for a negative time.
fn verifier_times(verifier: [u8; 8]) -> [Time; 2] {
    let whole = u64::from_be_bytes(verifier);
    [(whole >> 32) as u32, whole as u32].map(|half| Time {
        seconds: i64::from(half & 0x7fff_ffff),
        nanoseconds: 0,
    })
}
