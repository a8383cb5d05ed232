//! READ, WRITE and COMMIT on opened files.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::fsync;
use rustix::io::{Errno, ReadWriteFlags};

use super::attributes::{Attributes, Want};
use super::credential::{self, Caller};
use super::file::File;
use super::files::Files;
use super::{Failure, Mode};
use crate::fault::{Fault, is_planted};

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
    let mut hit_end = false;
    if count > 0 && offset <= OFFSET_MAX {
        let fd = file.read_fd(mode)?;
        let no_wait = mode == Mode::Inline && !file.volume.in_memory;
        let count = usize::try_from(OFFSET_MAX - offset)
            .unwrap_or(count)
            .min(count);
        hit_end = read_at(fd.as_fd(), offset, count, out, no_wait)?;
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
    if got < count && end < attributes.size && mode == Mode::Inline && !hit_end {
        // Only the first part is in memory.
        return Err(Failure::Wait);
    }
    Ok(ReadDone {
        attributes,
        count: got,
        // A file that grew meanwhile had its end there when it was read.
        eof: hit_end || end >= attributes.size,
    })
}

/// Reads until `count` bytes or the end of the file; with `no_wait` what is in memory. Returns
/// whether the end was met.
fn read_at(
    fd: BorrowedFd<'_>,
    offset: u64,
    count: usize,
    out: &mut Vec<u8>,
    no_wait: bool,
) -> Result<bool, Failure> {
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
            Ok(0) => return Ok(true),
            // A short read is the end of the file, or of what is in memory: the caller's look at
            // the size tells, and a second system call for every last page is saved.
            Ok(_) if no_wait || out.len() - start == count => return Ok(false),
            Ok(_) | Err(Errno::INTR) => {}
            // Not in memory, or a file system without RWF_NOWAIT.
            Err(Errno::AGAIN | Errno::OPNOTSUPP) if no_wait => return Err(Failure::Wait),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Writes `data` at `offset`; with `stable` it is on disk, with all attributes, before this
/// returns. Returns the attributes afterwards, and how many bytes were written.
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
) -> Result<(Attributes, usize), Failure> {
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
    if is_planted(Fault::LateWrites) {
        return planted_late(file, fd.as_fd(), offset, data);
    }
    let mut done = 0;
    while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
        if done == 0 {
            files.must_serve()?;
        } else if !files.may_go_on() {
            // What is written counts; nobody hears of it.
            break;
        }
        // As the caller: quotas and reserved blocks are theirs, and the kernel takes the set-id
        // bits away before the first byte is written.
        let written = credential::as_caller(caller, || {
            rustix::io::pwrite(&fd, rest, offset + done as u64)
        });
        match written {
            Ok(0) => return Err(Errno::IO.into()),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            // What was written before the error counts; the client finds out with its next call.
            Err(_) if done > 0 => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    if done > 0 {
        file.note_written();
        // Its volume was taken out of service and came back while this call ran: whoever commits
        // through the new one must know of this write.
        if let Some(other) = files.other_than(file) {
            other.note_written();
        }
    }
    // A client that writes many files and commits none would have them all kept open.
    if stable || files.has_too_many_dirty() {
        file.sync_written(|| sync_file(files, file, fd.as_fd()))?;
    }
    Ok((file.attributes()?, done))
}

/// The planted fault `fsync`: the write is answered as if it were on disk, and carried out later.
fn planted_late(
    file: &File,
    fd: BorrowedFd<'_>,
    offset: u64,
    data: &[u8],
) -> Result<(Attributes, usize), Failure> {
    let fd = fd.try_clone_to_owned().map_err(|_| Errno::MFILE)?;
    let bytes = data.to_vec();
    std::thread::spawn(move || {
        std::thread::sleep(LATE);
        // Nobody hears of an error, which is the fault.
        let _ = rustix::io::pwrite(&fd, &bytes, offset);
    });
    Ok((file.attributes()?, data.len()))
}

/// How late it is.
const LATE: std::time::Duration = std::time::Duration::from_secs(1);

/// Brings what was written to the file onto the disk; free if nothing was written since the last
/// time. Not after the lease: another node may have the disk by then, and this one is not to write
/// to it for an answer that nobody gets.
///
/// # Errors
/// As [`write`].
pub fn commit(files: &Files, file: &File, caller: &Caller) -> Result<Attributes, Failure> {
    file.must_be_regular()?;
    let before = file.attributes()?;
    if caller.uid != before.uid {
        file.allows(&before, caller, Want::WRITE, Mode::Worker)?;
    }
    files.must_serve()?;
    sync_pending(files, file)?;
    file.attributes()
}

/// Brings what was written to the file, by whomever, onto the disk; the server does it for files
/// that clients wrote to and left without a COMMIT.
pub fn sync_pending(files: &Files, file: &File) -> Result<(), Failure> {
    let fd = file.sync_fd()?;
    Ok(file.sync_written(|| sync_file(files, file, fd.as_fd()))?)
}

/// Brings a file or directory to disk: the one place where that is done. After a failure the write
/// verifier is another.
pub fn sync_file(files: &Files, file: &File, fd: BorrowedFd<'_>) -> Result<(), Errno> {
    if is_planted(Fault::NoSync) {
        return Ok(());
    }
    fsync(fd).inspect_err(|errno| files.note_sync_failed(file, *errno))
}
