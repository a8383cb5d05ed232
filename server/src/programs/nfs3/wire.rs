//! The types of NFSv3 on the wire, spelled as in RFC 1813.
//!
//! Arguments are decoded into values that borrow from the message; results are appended piece by
//! piece with the `put_*` functions, because most of them are attributes and a few numbers.

use std::ffi::CString;

use havenfs_rpc::xdr::{Decode, Reader, Writer, XdrError};
use rustix::io::Errno;

use crate::backend::Failure;
use crate::backend::attributes::{Attributes, FileType, Time};
use crate::backend::handle::{FileHandle, HANDLE_BYTES_MAX};
use crate::backend::setattr::{Changes, SetTime};

/// The longest name that is decoded; above [`NAME_BYTES_MAX`] it is answered NAMETOOLONG.
const FILENAME_BYTES_MAX: usize = 4096;
/// The longest name that any file system takes, in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// The longest text of a symbolic link that is decoded.
const PATH_BYTES_MAX: usize = 8192;
/// The length of an encoded `fattr3`.
pub const FATTR3_BYTES: usize = 84;

/// `nfsstat3` (RFC 1813 2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "named and explained in RFC 1813 2.6")]
pub enum Nfsstat3 {
    Ok = 0,
    Perm = 1,
    NoEnt = 2,
    Io = 5,
    NxIo = 6,
    Acces = 13,
    Exist = 17,
    XDev = 18,
    NoDev = 19,
    NotDir = 20,
    IsDir = 21,
    Inval = 22,
    FBig = 27,
    NoSpc = 28,
    RoFs = 30,
    MLink = 31,
    NameTooLong = 63,
    NotEmpty = 66,
    DQuot = 69,
    Stale = 70,
    BadHandle = 10001,
    NotSync = 10002,
    BadCookie = 10003,
    NotSupp = 10004,
    TooSmall = 10005,
    ServerFault = 10006,
    BadType = 10007,
    Jukebox = 10008,
}

impl From<Errno> for Nfsstat3 {
    /// Every errno becomes a status that NFSv3 has; none leaks.
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PERM => Self::Perm,
            Errno::NOENT => Self::NoEnt,
            Errno::NXIO => Self::NxIo,
            // EBUSY: something is mounted there. It lasts, so "try later" would hang the client.
            Errno::ACCESS | Errno::BUSY => Self::Acces,
            Errno::EXIST => Self::Exist,
            Errno::XDEV => Self::XDev,
            Errno::NODEV => Self::NoDev,
            Errno::NOTDIR => Self::NotDir,
            Errno::ISDIR => Self::IsDir,
            // A symbolic link where a file or directory is wanted.
            Errno::INVAL | Errno::LOOP => Self::Inval,
            Errno::FBIG | Errno::OVERFLOW => Self::FBig,
            Errno::NOSPC => Self::NoSpc,
            Errno::ROFS => Self::RoFs,
            Errno::MLINK => Self::MLink,
            Errno::NAMETOOLONG => Self::NameTooLong,
            Errno::NOTEMPTY => Self::NotEmpty,
            Errno::DQUOT => Self::DQuot,
            Errno::STALE => Self::Stale,
            Errno::OPNOTSUPP | Errno::NOSYS => Self::NotSupp,
            // Out of descriptors or memory: another try may succeed.
            Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN => Self::Jukebox,
            _ => Self::Io,
        }
    }
}

/// Why a procedure fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fail {
    /// It may have to wait.
    Wait,
    /// It gets no answer.
    Silence,
    /// It answers with this status.
    Status(Nfsstat3),
}

impl From<Failure> for Fail {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Wait => Self::Wait,
            Failure::NotServing => Self::Silence,
            Failure::BadHandle => Self::Status(Nfsstat3::BadHandle),
            Failure::Stale => Self::Status(Nfsstat3::Stale),
            Failure::Jukebox => Self::Status(Nfsstat3::Jukebox),
            Failure::Os(errno) => Self::Status(errno.into()),
        }
    }
}

impl From<Nfsstat3> for Fail {
    fn from(status: Nfsstat3) -> Self {
        Self::Status(status)
    }
}

impl Decode<'_> for FileHandle {
    /// Above 64 bytes the arguments are garbage; any shorter handle is judged by its signature.
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Self::new(reader.opaque(HANDLE_BYTES_MAX)?).ok_or(XdrError::TooLong)
    }
}

/// `filename3`: a name that may not be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filename3<'a>(pub &'a [u8]);

impl<'a> Decode<'a> for Filename3<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        reader.opaque(FILENAME_BYTES_MAX).map(Self)
    }
}

impl Filename3<'_> {
    /// The name, if a directory can have such an entry.
    ///
    /// # Errors
    /// ACCES if it is empty or contains '/' or NUL (RFC 1813 3.2); NAMETOOLONG.
    pub fn check(&self) -> Result<CString, Nfsstat3> {
        if self.0.len() > NAME_BYTES_MAX {
            return Err(Nfsstat3::NameTooLong);
        }
        if self.0.is_empty() || self.0.contains(&b'/') {
            return Err(Nfsstat3::Acces);
        }
        CString::new(self.0).map_err(|_| Nfsstat3::Acces)
    }

    /// The name of something new.
    ///
    /// # Errors
    /// As [`Filename3::check`]; EXIST for "." and "..".
    pub fn check_new(&self) -> Result<CString, Nfsstat3> {
        if matches!(self.0, b"." | b"..") {
            Err(Nfsstat3::Exist)
        } else {
            self.check()
        }
    }
}

/// `diropargs3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Diropargs3<'a> {
    /// The directory.
    pub dir: FileHandle,
    /// The name in it.
    pub name: Filename3<'a>,
}

impl<'a> Decode<'a> for Diropargs3<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            dir: reader.value()?,
            name: reader.value()?,
        })
    }
}

/// `nfspath3`, the text of a symbolic link.
pub fn nfspath3<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], XdrError> {
    reader.opaque(PATH_BYTES_MAX)
}

impl Decode<'_> for Time {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            seconds: i64::from(reader.u32()?),
            nanoseconds: reader.u32()?,
        })
    }
}

fn set_time(reader: &mut Reader<'_>) -> Result<Option<SetTime>, XdrError> {
    Ok(match reader.u32()? {
        0 => None,
        1 => Some(SetTime::Now),
        2 => Some(SetTime::To(reader.value()?)),
        _ => return Err(XdrError::BadValue),
    })
}

fn optional_u32(reader: &mut Reader<'_>) -> Result<Option<u32>, XdrError> {
    Ok(if reader.bool()? {
        Some(reader.u32()?)
    } else {
        None
    })
}

impl Decode<'_> for Changes {
    /// `sattr3`. Bits of the mode outside 07777 have no meaning and are dropped.
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            mode: optional_u32(reader)?.map(|mode| mode & 0o7777),
            uid: optional_u32(reader)?,
            gid: optional_u32(reader)?,
            size: if reader.bool()? {
                Some(reader.u64()?)
            } else {
                None
            },
            atime: set_time(reader)?,
            mtime: set_time(reader)?,
        })
    }
}

/// Encodes `fattr3`.
pub fn fattr3(attributes: &Attributes, fsid: u64) -> [u8; FATTR3_BYTES] {
    let kind: u32 = match attributes.kind {
        FileType::Directory => 2,
        FileType::BlockDevice => 3,
        FileType::CharacterDevice => 4,
        FileType::Symlink => 5,
        FileType::Socket => 6,
        FileType::Fifo => 7,
        FileType::RegularFile | FileType::Unknown => 1,
    };
    let nlink = u32::try_from(attributes.nlink).unwrap_or(u32::MAX);
    let mut out = [0; FATTR3_BYTES];
    let mut rest = out.as_mut_slice();
    let mut put = |bytes: &[u8]| {
        let (head, tail) = std::mem::take(&mut rest).split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        rest = tail;
    };
    for value in [kind, attributes.mode, nlink, attributes.uid, attributes.gid] {
        put(&value.to_be_bytes());
    }
    put(&attributes.size.to_be_bytes());
    put(&attributes.used.to_be_bytes());
    put(&attributes.rdev_major.to_be_bytes());
    put(&attributes.rdev_minor.to_be_bytes());
    put(&fsid.to_be_bytes());
    put(&attributes.ino.to_be_bytes());
    for time in [attributes.atime, attributes.mtime, attributes.ctime] {
        // The wire has 32 bits; what does not fit is cut as Linux cuts it.
        put(&(time.seconds as u32).to_be_bytes());
        put(&time.nanoseconds.to_be_bytes());
    }
    out
}

/// Appends `post_op_attr`.
pub fn put_post_op_attr(writer: &mut Writer<'_>, attr: Option<&[u8; FATTR3_BYTES]>) {
    writer.bool(attr.is_some());
    if let Some(attr) = attr {
        writer.fixed(attr);
    }
}

/// Appends `wcc_data`.
///
/// `pre_op_attr` is always absent: local processes change the files too, so the server can't
/// promise that its "before" and the operation are one step, and wrong values make clients keep
/// stale caches, while absent ones only cost a fetch (RFC 1813 2.6).
pub fn put_wcc_data(writer: &mut Writer<'_>, after: Option<&[u8; FATTR3_BYTES]>) {
    writer.bool(false);
    put_post_op_attr(writer, after);
}

/// Appends `post_op_fh3`.
pub fn put_post_op_fh3(writer: &mut Writer<'_>, handle: Option<&FileHandle>) {
    writer.bool(handle.is_some());
    if let Some(handle) = handle {
        writer.opaque(handle.as_slice());
    }
}
