//! READ, WRITE and COMMIT on opened files.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::fsync;
use rustix::io::{Errno, ReadWriteFlags};

use super::attributes::{Attributes, Want};
use super::credential::Caller;
use super::file::File;
use super::files::Files;
use super::{Failure, Mode};

/// The largest offset that the kernel's signed file offsets allow, in bytes.
pub const OFFSET_MAX: u64 = i64::MAX as u64;

/// What a read found.
#[derive(Debug, Clone, Copy)]
pub struct ReadDone {
    /// Attributes as they were after the read.
    pub attributes: Attributes,
    /// Bytes appended to the buffer.
    pub count: usize,
    /// Whether the last byte of the file was reached.
    pub eof: bool,
}

/// Reads up to `count` bytes at `offset` and appends them to `out`.
///
/// The owner may read whatever the mode says, since the client checked it when the file was
/// opened (the mode may have changed since); so may who may execute it, because a program is
/// paged in by READ. Source: Linux fs/nfsd/vfs.c.
///
/// Permission is judged by the attributes that are read afterwards for the reply: what was read
/// without it never leaves the buffer.
///
/// # Errors
/// EISDIR, EINVAL, EACCES; [`Failure::Wait`] if the data is not in memory.
pub fn read(
    file: &File,
    caller: &Caller,
    offset: u64,
    count: usize,
    out: &mut Vec<u8>,
    mode: Mode,
) -> Result<ReadDone, Failure> {
    file.must_be_regular()?;
    let start = out.len();
    let done = read_and_judge(file, caller, offset, count, out, mode);
    if done.is_err() {
        out.truncate(start);
    }
    done
}

fn read_and_judge(
    file: &File,
    caller: &Caller,
    offset: u64,
    count: usize,
    out: &mut Vec<u8>,
    mode: Mode,
) -> Result<ReadDone, Failure> {
    let start = out.len();
    if count > 0 && offset <= OFFSET_MAX {
        let fd = file.read_fd(mode)?;
        let no_wait = mode == Mode::Inline && !file.volume.in_memory;
        let count = usize::try_from(OFFSET_MAX - offset)
            .unwrap_or(count)
            .min(count);
        read_at(fd.as_fd(), offset, count, out, no_wait)?;
    }
    let attributes = file.attributes()?;
    if caller.uid != attributes.uid {
        match file.allows(&attributes, caller, Want::READ, mode) {
            Err(Failure::Os(Errno::ACCESS)) => {
                file.allows(&attributes, caller, Want::EXECUTE, mode)?;
            }
            other => other?,
        }
    }
    let got = out.len() - start;
    let end = offset.saturating_add(got as u64);
    if got < count && end < attributes.size && mode == Mode::Inline {
        // Only the first part is in memory.
        return Err(Failure::Wait);
    }
    Ok(ReadDone {
        attributes,
        count: got,
        eof: end >= attributes.size,
    })
}

/// Reads until `count` bytes or the end of the file; with `no_wait` what is in memory.
fn read_at(
    fd: BorrowedFd<'_>,
    offset: u64,
    count: usize,
    out: &mut Vec<u8>,
    no_wait: bool,
) -> Result<(), Failure> {
    let start = out.len();
    out.reserve(count);
    let flags = if no_wait {
        ReadWriteFlags::NOWAIT
    } else {
        ReadWriteFlags::empty()
    };
    loop {
        let done = out.len() - start;
        let at = offset + done as u64;
        match super::sys::preadv2_append(fd, out, start + count, at, flags) {
            Ok(0) => return Ok(()),
            // A short read is the end of the file, or of what is in memory: the caller's look at
            // the size tells, and a second system call for every last page is saved.
            Ok(_) if no_wait || out.len() - start == count => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            // Not in memory, or a file system without RWF_NOWAIT.
            Err(Errno::AGAIN | Errno::OPNOTSUPP) if no_wait => return Err(Failure::Wait),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Writes `data` at `offset`; with `stable` it is on disk, with all attributes, before this
/// returns. Returns the attributes afterwards.
///
/// # Errors
/// EISDIR, EINVAL, EACCES, EFBIG; what write(2) and fsync(2) say. After a failed sync the write
/// verifier is another.
pub fn write(
    files: &Files,
    file: &File,
    caller: &Caller,
    offset: u64,
    data: &[u8],
    stable: bool,
) -> Result<Attributes, Failure> {
    file.must_be_regular()?;
    let before = file.attributes()?;
    if caller.uid != before.uid {
        file.allows(&before, caller, Want::WRITE, Mode::Worker)?;
    }
    if offset
        .checked_add(data.len() as u64)
        .is_none_or(|end| end > OFFSET_MAX)
    {
        return Err(Errno::FBIG.into());
    }
    let fd = file.write_fd(Mode::Worker)?;
    let mut done = 0;
    while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pwrite(&fd, rest, offset + done as u64) {
            Ok(0) => return Err(Errno::IO.into()),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => {
                // What was written before the error is not answered, but it is there.
                file.note_written();
                return Err(errno.into());
            }
        }
    }
    // The server writes as root, which keeps the set-id bits: take them away as the kernel would
    // have done for the caller.
    if let Some(mode) = before.mode_after_write(caller).filter(|_| !data.is_empty()) {
        super::setattr::set_mode(file, mode)?;
    }
    if !data.is_empty() {
        file.note_written();
    }
    if stable {
        file.sync_written(|| sync_file(files, file, fd.as_fd()))?;
    }
    file.attributes()
}

/// Brings what was written to the file onto the disk; free if nothing was written since the last
/// time.
///
/// # Errors
/// As [`write`].
pub fn commit(files: &Files, file: &File, caller: &Caller) -> Result<Attributes, Failure> {
    file.must_be_regular()?;
    let before = file.attributes()?;
    if caller.uid != before.uid {
        file.allows(&before, caller, Want::WRITE, Mode::Worker)?;
    }
    file.sync_written(|| {
        let fd = match file.write_fd(Mode::Worker) {
            Ok(fd) => fd,
            // A read-only or busy file can still be synced through a reading descriptor.
            Err(_) => file.read_fd(Mode::Worker).map_err(|_| Errno::IO)?,
        };
        sync_file(files, file, fd.as_fd())
    })?;
    file.attributes()
}

/// Brings a file or directory to disk: the one place where that is done. After a failure the write
/// verifier is another.
pub fn sync_file(files: &Files, file: &File, fd: BorrowedFd<'_>) -> Result<(), Errno> {
    if crate::fault::no_sync() {
        return Ok(());
    }
    fsync(fd).inspect_err(|errno| files.note_sync_failed(file, *errno))
}
