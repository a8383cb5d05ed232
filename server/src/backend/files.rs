//! From handle to opened file, and from directory and name to handle.
//!
//! [`Files`] owns the volumes, the key that signs handles and the cache of opened files. A handle
//! whose bytes are in the cache was checked before; others are checked byte by byte before the
//! kernel sees anything of them. No call walks a path that a client gave: names are looked up one
//! by one, and symbolic links are never followed.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::hash::Hasher as _;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use havenfs_nlm::keys::FileKey;
use quick_cache::sync::{Cache, GuardResult};
use quick_cache::{DefaultHashBuilder, Lifecycle, UnitWeighter};
use rustix::fs::{
    AtFlags, FileType, Mode as OpenMode, OFlags, ResolveFlags, fstat, openat2, statat,
};
use rustix::io::Errno;
use siphasher::sip::SipHasher13;

use super::attributes::{Attributes, Want};
use super::credential::{self, Caller};
use super::file::File;
use super::handle::{FileHandle, HandleParts, Signer};
use super::sys::{self, KernelHandle};
use super::table::HandleTable;
use super::volume::Volume;
use super::{Failure, Mode};
use crate::gate::Gate;
use crate::random::random_u64;

/// How far above a directory its export's root may be: a path of one-letter names.
const DEPTH_MAX: usize = 2048;

type Opened = Cache<FileHandle, Arc<File>, UnitWeighter, DefaultHashBuilder, KeepUsed>;

/// What the cache must not push out: files in use, and files with writes that are not on disk. A
/// second [`File`] of the same inode would not know of those writes, and a COMMIT through it would
/// answer without a sync.
#[derive(Debug, Clone, Copy)]
struct KeepUsed;

impl Lifecycle<FileHandle, Arc<File>> for KeepUsed {
    type RequestState = ();

    fn begin_request(&self) {}

    fn is_pinned(&self, _: &FileHandle, file: &Arc<File>) -> bool {
        Arc::strong_count(file) > 1 || file.is_dirty()
    }
}

/// All files that can be served.
#[derive(Debug)]
pub struct Files {
    signer: Signer,
    volumes: RwLock<HashMap<(u32, u32), Arc<Volume>>>,
    /// The numbers of file systems, as the state directory has them.
    file_systems: RwLock<HashMap<(u32, u32), u32>>,
    crossing: Mutex<()>,
    opened: Opened,
    /// Files without a name, to be closed by a worker: that frees their space, which takes time.
    forgotten: Mutex<Vec<Arc<File>>>,
    /// What names led to lately, by hashes of the names: a hint and nothing more.
    looked_up: Cache<u64, FileHandle>,
    /// How many files have writes that are not on disk.
    dirty: Arc<AtomicUsize>,
    dirty_max: usize,
    table: HandleTable,
    write_verifier: AtomicU64,
    gate: Arc<Gate>,
}

impl Files {
    /// Makes an empty set that keeps about `opened_max` files open. `file_systems` are those that
    /// ever were exported, as
    /// [`Numbering::file_systems`](crate::numbering::Numbering::file_systems) says.
    pub fn new(
        signer: Signer,
        table: HandleTable,
        file_systems: HashMap<(u32, u32), u32>,
        opened_max: usize,
        gate: Arc<Gate>,
    ) -> Self {
        Self {
            signer,
            volumes: RwLock::new(HashMap::new()),
            file_systems: RwLock::new(file_systems),
            crossing: Mutex::new(()),
            opened: Opened::with(
                opened_max,
                opened_max as u64,
                UnitWeighter,
                DefaultHashBuilder::default(),
                KeepUsed,
            ),
            forgotten: Mutex::new(Vec::new()),
            looked_up: Cache::new(opened_max),
            dirty: Arc::default(),
            dirty_max: opened_max / 2,
            table,
            write_verifier: AtomicU64::new(random_u64()),
            gate,
        }
    }

    /// To be asked right before whatever changes a file: a call may have waited long for a disk, or
    /// for the log, since it began.
    ///
    /// # Errors
    /// [`Failure::NotServing`] if this node serves no more.
    pub fn must_serve(&self) -> Result<(), Failure> {
        if self.gate.admits() {
            Ok(())
        } else {
            Err(Failure::NotServing)
        }
    }

    /// Whether a change that was begun may go on, where its parts are whole by themselves.
    pub fn may_go_on(&self) -> bool {
        self.gate.admits()
    }

    /// The write verifier (RFC 1813 3.3.7): differs after each start and after each failed sync,
    /// so that clients send again what may be lost.
    pub fn write_verifier(&self) -> u64 {
        self.write_verifier.load(Ordering::Acquire)
    }

    /// Notes that a sync failed: unstable data of any client may be lost.
    pub fn note_sync_failed(&self, file: &File, errno: Errno) {
        tracing::error!(fh = ?file.handle, error = %errno, "sync failed; changing the write verifier");
        self.write_verifier.store(random_u64(), Ordering::Release);
    }

    /// Puts `volume` into service, in place of an earlier one with the same numbers, whose files
    /// are then opened anew.
    pub fn add_volume(&self, volume: Volume) -> Arc<Volume> {
        let volume = Arc::new(volume);
        let mut volumes = self.volumes.write().unwrap_or_else(PoisonError::into_inner);
        let replaced = volumes.insert((volume.export_id, volume.fs_id), Arc::clone(&volume));
        drop(volumes);
        if let Some(replaced) = replaced {
            self.opened
                .retain(|_, file| !Arc::ptr_eq(&file.volume, &replaced));
        }
        volume
    }

    /// The volume with these numbers if it is the file system `dev`, else what `open` makes: of
    /// two workers that cross into the same mount at once, both get the same volume.
    pub fn volume_or_open(
        &self,
        export_id: u32,
        fs_id: u32,
        dev: u64,
        open: impl FnOnce() -> Result<Volume, Errno>,
    ) -> Result<Arc<Volume>, Errno> {
        let known = || {
            self.volume(export_id, fs_id)
                .filter(|volume| volume.dev == dev)
        };
        if let Some(volume) = known() {
            return Ok(volume);
        }
        let volume = open()?;
        let _alone = self.crossing.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(known().unwrap_or_else(|| self.add_volume(volume)))
    }

    /// Takes every volume of an export out of service and forgets its opened files.
    pub fn remove_export(&self, export_id: u32) {
        let mut volumes = self.volumes.write().unwrap_or_else(PoisonError::into_inner);
        volumes.retain(|(id, _), _| *id != export_id);
        drop(volumes);
        self.opened
            .retain(|_, file| file.volume.export_id != export_id);
    }

    /// The volume with these numbers.
    pub fn volume(&self, export_id: u32, fs_id: u32) -> Option<Arc<Volume>> {
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        volumes.get(&(export_id, fs_id)).cloned()
    }

    /// All volumes that are in service.
    pub fn volumes(&self) -> Vec<Arc<Volume>> {
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        volumes.values().map(Arc::clone).collect()
    }

    /// The volumes that can show the same files as `volume`, besides itself.
    pub fn twins_of(&self, volume: &Volume) -> Vec<Arc<Volume>> {
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        let own = (volume.export_id, volume.fs_id);
        let twins = volumes
            .iter()
            .filter(|(ids, other)| other.superblock == volume.superblock && **ids != own);
        twins.map(|(_, twin)| Arc::clone(twin)).collect()
    }

    /// The number of the file system behind a volume, if it has one yet.
    pub fn file_system(&self, export_id: u32, fs_id: u32) -> Option<u32> {
        let numbers = self
            .file_systems
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        numbers.get(&(export_id, fs_id)).copied()
    }

    /// The numbers of the file systems behind the exports that are meant.
    pub fn file_systems_of(&self, is_meant: impl Fn(u32) -> bool) -> HashSet<u32> {
        let numbers = self
            .file_systems
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let meant = numbers.iter().filter(|((id, _), _)| is_meant(*id));
        meant.map(|(_, number)| *number).collect()
    }

    /// Notes the number of the file system behind a volume.
    pub fn set_file_system(&self, export_id: u32, fs_id: u32, number: u32) {
        let mut numbers = self
            .file_systems
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        numbers.insert((export_id, fs_id), number);
    }

    /// What locks know the file by that a handle names: the number of its file system and the
    /// kernel's handle, so that every export and mount that shows the file yields the same.
    ///
    /// Looks at the bytes of the handle and nothing else: the file may be gone and its export
    /// removed, and its locks must still come off.
    ///
    /// # Errors
    /// [`Failure::BadHandle`] if it is none of ours.
    pub fn lock_key(&self, handle: &FileHandle) -> Result<FileKey, Failure> {
        let parts = self.signer.open(handle).map_err(|_| Failure::BadHandle)?;
        let number = self
            .file_system(parts.export_id, parts.fs_id)
            .ok_or(Failure::BadHandle)?;
        let kind = parts.file.kind.to_be_bytes();
        let key = [&number.to_be_bytes()[..], &kind, parts.file.as_slice()].concat();
        Ok(FileKey(key.into()))
    }

    /// Where the file is that locks know by `key`: an export that shows it, and its path inside, as
    /// far as the kernel knows it. `None` if no export shows its file system, or it is gone. Waits
    /// for the disk.
    pub fn path_of(&self, key: &FileKey) -> Option<(u32, PathBuf)> {
        let (number, rest) = key.0.split_first_chunk()?;
        let (kind, bytes) = rest.split_first_chunk()?;
        let kernel = KernelHandle::new(i32::from_be_bytes(*kind), bytes)?;
        let number = u32::from_be_bytes(*number);
        let volume = {
            let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
            let mut shown = volumes.values();
            let shows = |volume: &&Arc<Volume>| {
                self.file_system(volume.export_id, volume.fs_id) == Some(number)
            };
            shown.find(shows).cloned()?
        };
        credential::as_server();
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = if HandleTable::is_entry(&kernel) {
            self.table.open(&volume, &kernel).ok()?
        } else {
            volume.open_by_handle(&kernel, flags).ok()?
        };
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let path = std::fs::read_link(link).ok()?;
        Some((volume.export_id, path))
    }

    /// The export that a handle says it belongs to, if the handle is ours.
    pub fn export_of(&self, handle: &FileHandle) -> Result<u32, Failure> {
        if let Some(file) = self.opened.get(handle) {
            return Ok(file.volume.export_id);
        }
        Ok(self
            .signer
            .open(handle)
            .map_err(|_| Failure::BadHandle)?
            .export_id)
    }

    /// Opens the file that `handle` names.
    ///
    /// # Errors
    /// [`Failure::BadHandle`], [`Failure::Stale`], or [`Failure::Wait`] if it is not open yet.
    pub fn open(&self, handle: &FileHandle, mode: Mode) -> Result<Arc<File>, Failure> {
        if let Some(file) = self.opened.get(handle) {
            if mode == Mode::Inline && file.volume.always_waits {
                return Err(Failure::Wait);
            }
            return Ok(file);
        }
        let parts = self.signer.open(handle).map_err(|_| Failure::BadHandle)?;
        let volume = self
            .volume(parts.export_id, parts.fs_id)
            .ok_or(Failure::Stale)?;
        if mode == Mode::Inline {
            return Err(Failure::Wait);
        }
        credential::as_server();
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let fd = if HandleTable::is_entry(&parts.file) {
            self.table.open(&volume, &parts.file)?
        } else {
            volume.open_by_handle(&parts.file, flags)?
        };
        let stat = fstat(&fd)?;
        if stat.st_nlink == 0 {
            // Removed, and only kept by somebody who has it open still.
            return Err(Failure::Stale);
        }
        let kind = FileType::from_raw_mode(stat.st_mode);
        Ok(self.keep(*handle, parts.file, &volume, fd, kind, false))
    }

    /// Opens the root of a volume.
    pub fn open_root(&self, volume: &Arc<Volume>) -> Result<Arc<File>, Failure> {
        credential::as_server();
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(volume.root(), c".", flags, OpenMode::empty())?;
        let kernel = if volume.has_handles {
            sys::name_to_handle(fd.as_fd(), c"")?.0
        } else {
            self.table.root(volume)?
        };
        let handle = self.sign(volume, kernel)?;
        Ok(self.keep(handle, kernel, volume, fd, FileType::Directory, false))
    }

    /// Looks `name` up in `dir`, with the permission to search it. Does not follow a symbolic
    /// link; `..` stops at the root of the export.
    ///
    /// # Errors
    /// As RFC 1813 3.3.3 lists them; EXDEV if another file system is mounted there.
    pub fn lookup(
        &self,
        dir: &Arc<File>,
        dir_attributes: &Attributes,
        name: &CStr,
        caller: &Caller,
        mode: Mode,
    ) -> Result<Arc<File>, Failure> {
        dir.must_be_dir()?;
        dir.allows(dir_attributes, caller, Want::EXECUTE, mode)?;
        match name.to_bytes() {
            b"." => return Ok(Arc::clone(dir)),
            b".." => return self.parent(dir, dir_attributes, mode),
            _ => {}
        }
        if mode == Mode::Inline {
            if !dir.volume.has_handles {
                return Err(Failure::Wait);
            }
            let known = self.looked_up.get(&name_key(dir, name));
            if let Some(file) = known.and_then(|handle| self.opened.get(&handle)) {
                return self.lookup_warm(dir, name, file);
            }
        } else {
            credential::as_server();
        }
        let mut resolve = ResolveFlags::NO_XDEV;
        if mode == Mode::Inline {
            resolve |= ResolveFlags::CACHED;
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match openat2(dir.fd(), name, flags, OpenMode::empty(), resolve) {
            Ok(fd) => fd,
            Err(Errno::AGAIN) if mode == Mode::Inline => return Err(Failure::Wait),
            Err(errno) => return Err(errno.into()),
        };
        let found = self.adopt(dir, name, fd, false)?;
        self.looked_up.insert(name_key(dir, name), found.handle);
        Ok(found)
    }

    /// Looks up a name that led to `known` before, which is still open and so keeps the name in the
    /// kernel's own cache: its handle is to be had without opening anything.
    fn lookup_warm(
        &self,
        dir: &Arc<File>,
        name: &CStr,
        known: Arc<File>,
    ) -> Result<Arc<File>, Failure> {
        let (kernel, mount) = sys::name_to_handle(dir.fd(), name)?;
        if mount != dir.volume.mount_id {
            return Err(Errno::XDEV.into());
        }
        let handle = self.sign(&dir.volume, kernel)?;
        if handle == known.handle {
            return Ok(known);
        }
        // Another file has the name now; if it is not open, a worker opens it.
        self.opened.get(&handle).ok_or(Failure::Wait)
    }

    /// Keeps a descriptor of `name` in `dir` that was just opened. `readable`: it was opened for
    /// reading and not only as a path.
    pub fn adopt(
        &self,
        dir: &Arc<File>,
        name: &CStr,
        fd: OwnedFd,
        readable: bool,
    ) -> Result<Arc<File>, Failure> {
        let kernel = if dir.volume.has_handles {
            sys::name_to_handle(fd.as_fd(), c"")?.0
        } else {
            credential::as_server();
            self.table.entry(dir, name, fd.as_fd())?
        };
        let handle = self.sign(&dir.volume, kernel)?;
        if let Some(file) = self.opened.get(&handle) {
            return Ok(file);
        }
        let kind = FileType::from_raw_mode(fstat(&fd)?.st_mode);
        Ok(self.keep(handle, kernel, &dir.volume, fd, kind, readable))
    }

    fn sign(&self, volume: &Volume, kernel: KernelHandle) -> Result<FileHandle, Failure> {
        self.signer
            .sign(&parts(volume, kernel))
            .ok_or(Failure::Os(Errno::OVERFLOW))
    }

    /// Puts a file into the cache, unless another thread was first: there is one [`File`] for a
    /// handle at any time, since it knows what is not on disk yet.
    fn keep(
        &self,
        handle: FileHandle,
        kernel: KernelHandle,
        volume: &Arc<Volume>,
        fd: OwnedFd,
        kind: FileType,
        readable: bool,
    ) -> Arc<File> {
        let (volume, dirty) = (Arc::clone(volume), Arc::clone(&self.dirty));
        let file = Arc::new(File::new(handle, kernel, volume, fd, kind, readable, dirty));
        match self.opened.get_value_or_guard(&handle, None) {
            GuardResult::Value(first) => first,
            GuardResult::Guard(guard) => {
                // Fails only if the handle was removed meanwhile: then it is stale anyway.
                let _ = guard.insert(Arc::clone(&file));
                file
            }
            GuardResult::Timeout => file,
        }
    }

    /// Attributes and handle of `name` in `dir` without opening it, for a listing. `None` where
    /// the client must find out by LOOKUP: the entry has vanished meanwhile, another file system
    /// is mounted on it, or it is a part of the file system with inode numbers of its own.
    pub fn details(&self, dir: &File, name: &CStr) -> Option<(Attributes, FileHandle)> {
        if !dir.volume.has_handles {
            return None;
        }
        let (kernel, mount) = sys::name_to_handle(dir.fd(), name).ok()?;
        if mount != dir.volume.mount_id {
            return None;
        }
        let stat = statat(dir.fd(), name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        let attributes = Attributes::from(&stat);
        if attributes.dev != dir.volume.dev {
            return None;
        }
        Some((attributes, self.signer.sign(&parts(&dir.volume, kernel))?))
    }

    /// The directory above `dir`; the root of a volume is its own parent.
    fn parent(
        &self,
        dir: &Arc<File>,
        attributes: &Attributes,
        mode: Mode,
    ) -> Result<Arc<File>, Failure> {
        if dir.is_root(attributes) {
            return Ok(Arc::clone(dir));
        }
        if mode == Mode::Inline {
            return Err(Failure::Wait);
        }
        credential::as_server();
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let up = |fd: std::os::fd::BorrowedFd<'_>| {
            openat2(fd, c"..", flags, OpenMode::empty(), ResolveFlags::NO_XDEV)
        };
        let parent = up(dir.fd())?;
        // A directory may have been moved out of the export: walk up until the root is met.
        let mut above: Option<OwnedFd> = None;
        let mut before = None;
        for _ in 0..DEPTH_MAX {
            let here = above.as_ref().unwrap_or(&parent);
            let stat = fstat(here)?;
            let place = (stat.st_dev, stat.st_ino);
            if place == (dir.volume.dev, dir.volume.root_ino) {
                return self.adopt(dir, c"..", parent, false);
            }
            if before == Some(place) {
                break;
            }
            before = Some(place);
            above = Some(up(here.as_fd())?);
        }
        Err(Failure::Stale)
    }

    /// Forgets the file `handle` if its last name is gone, so that its space is freed.
    pub fn forget_if_unlinked(&self, handle: &FileHandle) {
        if let Some(file) = self.opened.peek(handle)
            && file.attributes() == Err(Failure::Stale)
        {
            self.opened.remove(handle);
            if HandleTable::is_entry(&file.handle_parts()) {
                credential::as_server();
                if let Err(failure) = self.table.remove(&file.handle_parts()) {
                    // The entry stays: its handle says STALE, as it does without the entry.
                    tracing::warn!(?failure, "cannot remove an entry of the handle table");
                }
            }
        }
    }

    /// Forgets a file that turned out to be stale; it is closed by a worker.
    pub fn forget(&self, handle: &FileHandle) {
        if let Some((_, file)) = self.opened.remove(handle) {
            let mut forgotten = self
                .forgotten
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            forgotten.push(file);
        }
    }

    /// Whether so many files have writes that are not on disk, and can't be closed for that, that a
    /// further one must be synced at once.
    pub fn has_too_many_dirty(&self) -> bool {
        self.dirty.load(Ordering::Relaxed) > self.dirty_max
    }

    /// The file that is open under this handle now, if it is not `file`.
    pub fn other_than(&self, file: &File) -> Option<Arc<File>> {
        let current = self.opened.get(&file.handle)?;
        (!std::ptr::eq(&raw const *current, file)).then_some(current)
    }

    /// The handle that the cache may know `name` by, before the name is taken away.
    /// Asked as the caller, who needs the right to search for the change as well.
    pub fn cached_handle(&self, dir: &File, name: &CStr) -> Option<FileHandle> {
        if dir.volume.has_handles {
            let (kernel, _) = sys::name_to_handle(dir.fd(), name).ok()?;
            return self.signer.sign(&parts(&dir.volume, kernel));
        }
        let kernel = self.table.find(dir, name)?;
        self.signer.sign(&parts(&dir.volume, kernel))
    }

    /// The handle table, which stands in where the kernel's handles can't be used.
    pub const fn table(&self) -> &HandleTable {
        &self.table
    }

    /// Closes files whose last name is gone, so that their space is freed. Runs on a worker.
    pub fn close_forgotten(&self) {
        let mut forgotten = self
            .forgotten
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let files = std::mem::take(&mut *forgotten);
        drop(forgotten);
        drop(files);
    }

    /// Looks at every open file: forgets those that were removed behind the server's back, syncs
    /// those that clients wrote and left, and closes idle data descriptors. Runs on a worker.
    pub fn tidy(&self) {
        credential::as_server();
        let files: Vec<Arc<File>> = self.opened.iter().map(|(_, file)| file).collect();
        for file in files {
            if file.attributes() == Err(Failure::Stale) {
                self.forget(&file.handle);
            } else if file.was_idle() {
                if file.is_dirty() {
                    // A failure changes the write verifier, which tells the clients.
                    let _ = super::data::sync_pending(self, &file);
                }
                file.close_data();
            }
        }
    }

    /// Brings all that was written to disk, and all of the file systems of exports that put changes
    /// of names off as well; false if that failed. Waits for the disk.
    pub fn sync_all(&self, puts_off: impl Fn(u32) -> bool) -> bool {
        credential::as_server();
        let files: Vec<Arc<File>> = self.opened.iter().map(|(_, file)| file).collect();
        let mut dirty = files.iter().filter(|file| file.is_dirty());
        // A failure changes the write verifier, and is in the log.
        let mut synced = dirty.all(|file| super::data::sync_pending(self, file).is_ok());
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        for volume in volumes.values().filter(|volume| puts_off(volume.export_id)) {
            synced &= volume.sync().is_ok();
        }
        synced
    }

    /// How many files are open.
    pub fn opened_count(&self) -> usize {
        self.opened.len()
    }
}

fn name_key(dir: &File, name: &CStr) -> u64 {
    let mut hasher = SipHasher13::new();
    hasher.write(dir.handle.as_slice());
    hasher.write(name.to_bytes());
    hasher.finish()
}

fn parts(volume: &Volume, file: KernelHandle) -> HandleParts {
    HandleParts {
        export_id: volume.export_id,
        fs_id: volume.fs_id,
        file,
    }
}
