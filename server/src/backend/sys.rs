//! System calls that no safe crate wraps. The only unsafe code of the project.
//!
//! Each function is a thin wrapper with the kernel's meaning; descriptors come and go as
//! `BorrowedFd` and `OwnedFd`. Identity calls are raw, because the C library's versions change
//! every thread of the process.

#![expect(unsafe_code, reason = "the one place where raw system calls are made")]

use std::ffi::{CStr, c_int, c_long};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::UnshareFlags;

/// The longest kernel file handle that fits into one of ours, in bytes.
pub const KERNEL_HANDLE_BYTES_MAX: usize = 44;

/// A file handle as the kernel gives it: type and opaque bytes, valid for one file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KernelHandle {
    /// The file system's own type number.
    pub kind: i32,
    len: u8,
    bytes: [u8; KERNEL_HANDLE_BYTES_MAX],
}

impl KernelHandle {
    /// Makes a handle from its parts; `None` if `bytes` are too many.
    pub fn new(kind: i32, bytes: &[u8]) -> Option<Self> {
        let mut handle = Self {
            kind,
            len: 0,
            bytes: [0; KERNEL_HANDLE_BYTES_MAX],
        };
        handle.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        handle.len = u8::try_from(bytes.len()).ok()?;
        Some(handle)
    }

    /// The opaque bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// `struct file_handle` of the kernel with room for the longest handle.
#[repr(C)]
struct RawHandle {
    handle_bytes: u32,
    handle_type: i32,
    f_handle: [u8; KERNEL_HANDLE_BYTES_MAX],
}

/// Asks for the handle of `name` in `dir` (or of `dir` itself if `name` is empty) and the id of
/// its mount. Does not follow a symbolic link.
///
/// # Errors
/// EOPNOTSUPP: the file system has no handles. EOVERFLOW: its handles do not fit.
pub fn name_to_handle(dir: BorrowedFd<'_>, name: &CStr) -> Result<(KernelHandle, i32), Errno> {
    let mut raw = RawHandle {
        handle_bytes: KERNEL_HANDLE_BYTES_MAX as u32,
        handle_type: 0,
        f_handle: [0; KERNEL_HANDLE_BYTES_MAX],
    };
    let mut mount_id: c_int = 0;
    // SAFETY: `name` ends with NUL; `raw` is a `struct file_handle` whose `handle_bytes` tells
    // how much room follows it; both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            dir.as_raw_fd(),
            name.as_ptr(),
            &raw mut raw,
            &raw mut mount_id,
            if name.is_empty() {
                libc::AT_EMPTY_PATH
            } else {
                0
            },
        )
    };
    check(result)?;
    let bytes = raw
        .f_handle
        .get(..raw.handle_bytes as usize)
        .ok_or(Errno::OVERFLOW)?;
    let handle = KernelHandle::new(raw.handle_type, bytes).ok_or(Errno::OVERFLOW)?;
    Ok((handle, mount_id))
}

/// Opens the file that `handle` names on the file system of `mount`.
///
/// # Errors
/// ESTALE: there is no such file any more. EPERM: this process lacks CAP_DAC_READ_SEARCH in the
/// initial user namespace.
pub fn open_by_handle(
    mount: BorrowedFd<'_>,
    handle: &KernelHandle,
    flags: c_int,
) -> Result<OwnedFd, Errno> {
    let mut raw = RawHandle {
        handle_bytes: u32::from(handle.len),
        handle_type: handle.kind,
        f_handle: handle.bytes,
    };
    // SAFETY: `raw` is a `struct file_handle` with `handle_bytes` initialised bytes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw mut raw,
            flags | libc::O_CLOEXEC,
        )
    };
    owned(result)
}

/// Makes a private copy of the mount that `path` lies on, beginning at `path` and without the
/// mounts below it, so that directories under mount points can be seen.
///
/// # Errors
/// EPERM: needs CAP_SYS_ADMIN.
pub fn clone_mount(path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: `path` ends with NUL.
    let result =
        unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    owned(result)
}

/// Sets the file system user id of this thread. The kernel reports no error, so the new value is
/// read back.
///
/// # Errors
/// EPERM: the id was not taken over (no CAP_SETUID, or not mapped in this user namespace).
pub fn set_fsuid(uid: u32) -> Result<(), Errno> {
    // SAFETY: no memory is involved; the call concerns this thread only.
    unsafe {
        libc::syscall(libc::SYS_setfsuid, uid);
        // An id of -1 is never valid: the call changes nothing and returns the current one.
        let now = libc::syscall(libc::SYS_setfsuid, u32::MAX);
        if now as u32 == uid {
            Ok(())
        } else {
            Err(Errno::PERM)
        }
    }
}

/// Sets the file system group id of this thread.
///
/// # Errors
/// As [`set_fsuid`].
pub fn set_fsgid(gid: u32) -> Result<(), Errno> {
    // SAFETY: no memory is involved; the call concerns this thread only.
    unsafe {
        libc::syscall(libc::SYS_setfsgid, gid);
        let now = libc::syscall(libc::SYS_setfsgid, u32::MAX);
        if now as u32 == gid {
            Ok(())
        } else {
            Err(Errno::PERM)
        }
    }
}

/// Sets the supplementary groups of this thread.
///
/// # Errors
/// EPERM: no CAP_SETGID. EINVAL: a group is not mapped in this user namespace.
pub fn set_groups(gids: &[u32]) -> Result<(), Errno> {
    // SAFETY: `gids` holds as many ids as the call is told.
    let result = unsafe { libc::syscall(libc::SYS_setgroups, gids.len(), gids.as_ptr()) };
    check(result)
}

/// Sets mode bits through a descriptor that may have been opened with O_PATH.
///
/// # Errors
/// ENOSYS before Linux 6.6; others as chmod(2).
pub fn chmod_path_fd(fd: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
    const SYS_FCHMODAT2: c_long = 452;
    // SAFETY: the path is a NUL-terminated constant.
    let result = unsafe {
        libc::syscall(
            SYS_FCHMODAT2,
            fd.as_raw_fd(),
            c"".as_ptr(),
            mode,
            libc::AT_EMPTY_PATH,
        )
    };
    check(result)
}

/// Asks whether this thread's identity may do what `want` says (R_OK, W_OK, X_OK) with an open
/// file, ACLs included.
///
/// # Errors
/// EACCES or EROFS if not.
pub fn may_access(fd: BorrowedFd<'_>, want: u32) -> Result<(), Errno> {
    let flags = libc::AT_EACCESS | libc::AT_EMPTY_PATH;
    // SAFETY: the path is a NUL-terminated constant.
    let result = unsafe {
        libc::syscall(
            libc::SYS_faccessat2,
            fd.as_raw_fd(),
            c"".as_ptr(),
            want,
            flags,
        )
    };
    check(result)
}

/// Drops the process's file mode creation mask, so that modes are those the callers ask for.
pub fn clear_umask() {
    // SAFETY: umask(2) has no failure and touches no memory.
    unsafe {
        libc::umask(0);
    }
}

/// Has a child process begin with this file mode creation mask.
pub fn set_umask_of_child(command: &mut Command, mask: u32) {
    let set = move || {
        // SAFETY: umask(2) has no failure and touches no memory.
        unsafe {
            libc::umask(mask);
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes one system call, which is async-signal-safe;
    // it takes no memory and no lock.
    unsafe {
        command.pre_exec(set);
    }
}

/// Has the kernel kill a child process when the thread that starts it ends, and with it at the
/// latest when this process does. Not what the child starts; and a program with a set-user-ID bit
/// or capabilities of its own escapes.
pub fn end_child_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let set = move || {
        // SAFETY: prctl(2) with this option takes a number and touches no memory.
        let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // A parent that has died before is not told of; the child has another one by now.
        // SAFETY: getppid(2) has no failure and touches no memory.
        let now = unsafe { libc::getppid() };
        if u32::try_from(now) == Ok(parent) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    };
    // SAFETY: between fork and exec the closure makes two system calls, which are
    // async-signal-safe; its errors are numbers, so it takes no memory and no lock.
    unsafe {
        command.pre_exec(set);
    }
}

/// How long ago anything, data or an acknowledgement, came over a TCP connection; none if the
/// connection is not established any more.
///
/// # Errors
/// ENOPROTOOPT or EOPNOTSUPP: it is no TCP socket.
pub fn tcp_heard(socket: BorrowedFd<'_>) -> Result<Option<Duration>, Errno> {
    // The beginning of `struct tcp_info`: eight bytes, of which the first is the state, and numbers
    // of four bytes each.
    let mut info = [0u32; TCP_INFO_WORDS];
    let mut bytes = size_of_val(&info) as libc::socklen_t;
    // SAFETY: `info` has room for `bytes` bytes, of which the kernel writes no more; both outlive
    // the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    check(result.into())?;
    let [state, ..] = info[0].to_ne_bytes();
    let (data_ms, ack_ms) = (info[LAST_DATA_RECV], info[LAST_ACK_RECV]);
    let heard = Duration::from_millis(data_ms.min(ack_ms).into());
    Ok((state == TCP_ESTABLISHED).then_some(heard))
}

/// `TCP_ESTABLISHED` of the kernel.
const TCP_ESTABLISHED: u8 = 1;
/// Where `tcpi_last_data_recv` and `tcpi_last_ack_recv` lie, in words.
const LAST_DATA_RECV: usize = 13;
const LAST_ACK_RECV: usize = 14;
const TCP_INFO_WORDS: usize = 15;

fn check(result: c_long) -> Result<(), Errno> {
    if result >= 0 {
        Ok(())
    } else {
        Err(last_errno())
    }
}

fn owned(result: c_long) -> Result<OwnedFd, Errno> {
    check(result)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as c_int) })
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Reads at `offset` into the unused capacity of `out`, which then counts as used; never beyond
/// the length `len_max`. Returns the number of bytes.
///
/// # Errors
/// As preadv2(2); EAGAIN with RWF_NOWAIT if the data is not in memory.
pub fn preadv2_append(
    fd: BorrowedFd<'_>,
    out: &mut Vec<u8>,
    len_max: usize,
    offset: u64,
    flags: rustix::io::ReadWriteFlags,
) -> Result<usize, Errno> {
    let len = out.len();
    let room = len_max.saturating_sub(len);
    let spare = out.spare_capacity_mut();
    let room = room.min(spare.len());
    let vector = libc::iovec {
        iov_base: spare.as_mut_ptr().cast(),
        iov_len: room,
    };
    // SAFETY: the vector covers `room` bytes of unused capacity of `out`.
    let result = unsafe {
        libc::preadv2(
            fd.as_raw_fd(),
            &raw const vector,
            1,
            offset.cast_signed(),
            flags.bits().cast_signed(),
        )
    };
    check(result as c_long)?;
    let count = (result.cast_unsigned()).min(room);
    // SAFETY: the kernel has filled `count` bytes behind the old length, within the capacity.
    unsafe { out.set_len(len + count) };
    Ok(count)
}
/// Returns the groups of a user by the system's user database; none for an unknown user.
///
/// Blocks for as long as the database does; a user's own group is among the groups.
pub fn groups_of_user(uid: u32) -> Result<Vec<u32>, Errno> {
    let mut buffer = vec![0_u8; 1024];
    let mut entry = std::mem::MaybeUninit::<libc::passwd>::uninit();
    let entry = loop {
        let mut found: *mut libc::passwd = std::ptr::null_mut();
        // SAFETY: all pointers are valid for the call, and the buffer's length is passed with it.
        let error = unsafe {
            libc::getpwuid_r(
                uid,
                entry.as_mut_ptr(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                &raw mut found,
            )
        };
        match error {
            libc::ERANGE if buffer.len() < PASSWD_BYTES_MAX => buffer.resize(buffer.len() * 2, 0),
            0 | libc::ENOENT | libc::ESRCH if found.is_null() => return Ok(Vec::new()),
            // SAFETY: the call succeeded and says that it filled `entry`.
            0 => break unsafe { entry.assume_init_ref() },
            error => return Err(Errno::from_raw_os_error(error)),
        }
    };
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut count = libc::c_int::try_from(groups.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the name lies in `buffer`, which lives; `count` is the length of `groups`.
        let fits = unsafe {
            libc::getgrouplist(
                entry.pw_name,
                entry.pw_gid,
                groups.as_mut_ptr(),
                &raw mut count,
            )
        };
        let needed = usize::try_from(count).unwrap_or(0);
        if fits >= 0 {
            groups.truncate(needed);
            return Ok(groups);
        }
        if groups.len() >= NGROUPS_MAX {
            return Ok(groups);
        }
        groups.resize(needed.max(groups.len() * 2).min(NGROUPS_MAX), 0);
    }
}

/// Opens a socket for [`send_frame`]; it receives nothing. To close one takes the kernel long.
///
/// # Errors
/// EPERM: this process lacks CAP_NET_RAW.
pub fn frame_socket() -> Result<OwnedFd, Errno> {
    // SAFETY: a call without pointers.
    owned(c_long::from(unsafe {
        libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0)
    }))
}

/// Sends an Ethernet frame, headers included, through an interface.
///
/// # Errors
/// ENETDOWN: the interface is down.
pub fn send_frame(socket: BorrowedFd<'_>, interface: u32, frame: &[u8]) -> Result<(), Errno> {
    // SAFETY: all its fields are numbers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = interface as c_int;
    // SAFETY: `frame` is readable for its length, `address` is a `sockaddr_ll` of the length given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    check(sent as c_long)
}

/// Keeps this process going when it is asked to end: it ends by itself.
pub fn ignore_requests_to_end() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        // SAFETY: to ignore a signal installs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Gives this thread namespaces of its own, empty ones but for copies of the mounts; with
/// [`UnshareFlags::NEWPID`] it is the processes that it starts next that get one, and the first of
/// them is process 1 there.
///
/// # Errors
/// EPERM: needs CAP_SYS_ADMIN.
///
/// # Panics
/// For [`UnshareFlags::FILES`]: no thread has descriptors of its own.
pub fn leave_namespaces(flags: UnshareFlags) -> Result<(), Errno> {
    assert!(
        !flags.contains(UnshareFlags::FILES),
        "descriptors are shared"
    );
    // SAFETY: the table of descriptors stays what it is for all threads.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// Takes or drops an exclusive lock on some bytes of a file, as fcntl(2) does with F_SETLK: it does
/// not wait for whoever has it.
///
/// # Errors
/// EAGAIN or EACCES: somebody else has it.
pub fn lock_bytes(
    file: BorrowedFd<'_>,
    first: i64,
    count: i64,
    release: bool,
) -> Result<(), Errno> {
    let kind = if release {
        libc::F_UNLCK
    } else {
        libc::F_WRLCK
    };
    // SAFETY: all its fields are numbers, for which zero is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = first;
    lock.l_len = count;
    // SAFETY: this operation reads a `struct flock`, which `lock` is.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const lock) };
    check(c_long::from(result))
}

/// How many bytes of a TCP connection the peer has not acknowledged yet.
pub fn unacknowledged_bytes(socket: BorrowedFd<'_>) -> Result<usize, Errno> {
    let mut bytes: c_int = 0;
    // SAFETY: this request writes one `int`, which `bytes` is.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    check(c_long::from(result))?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// An entry of the user database is not larger.
const PASSWD_BYTES_MAX: usize = 1 << 20;
/// What Linux allows a process.
const NGROUPS_MAX: usize = 65_536;
