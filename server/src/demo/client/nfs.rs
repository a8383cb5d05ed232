//! NFSv3 and MOUNT, as far as the demo uses them.
//!
//! Encodes arguments and decodes results of one connection's calls. A status other than OK is an
//! error, except JUKEBOX, upon which the call is made again as clients do.
//!
//! Source: RFC 1813 3.3 and 5.2.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use havenfs::programs::mount::wire::{Mountres3, procedure as mount_procedure};
use havenfs_rpc::xdr::{Reader, Writer, XdrError, decode_all};

use super::super::interrupt;
use super::rpc::{RpcClient, args};

/// The most that one READ asks for, in bytes.
pub(crate) const READ_BYTES_MAX: u32 = 64 * 1024;
/// The longest file handle, in bytes.
const HANDLE_BYTES_MAX: usize = 64;
const FATTR3_BYTES: usize = 84;
const WCC_ATTR_BYTES: usize = 24;
/// NFS3ERR_JUKEBOX: try again later.
const JUKEBOX: u32 = 10_008;
const JUKEBOX_PAUSE: Duration = Duration::from_millis(50);
const JUKEBOX_TIME_MAX: Duration = Duration::from_secs(10);

/// The numbers of the procedures.
pub(crate) mod procedure {
    pub(crate) const GETATTR: u32 = 1;
    pub(crate) const LOOKUP: u32 = 3;
    pub(crate) const READ: u32 = 6;
    pub(crate) const WRITE: u32 = 7;
    pub(crate) const CREATE: u32 = 8;
    pub(crate) const COMMIT: u32 = 21;
}

/// `stable_how`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stable {
    /// The server may answer before the data is on stable storage.
    Unstable,
    /// Data and attributes are on stable storage when the server answers.
    FileSync,
}

impl Stable {
    const fn number(self) -> u32 {
        match self {
            Self::Unstable => 0,
            Self::FileSync => 2,
        }
    }
}

/// The answer to a WRITE.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Written {
    /// How many bytes.
    pub(crate) count: u32,
    /// Whether they are on stable storage.
    pub(crate) committed: Stable,
    /// Changes when the server may have lost what was not committed.
    pub(crate) write_verifier: u64,
}

/// What tells files apart, and their size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// The size in bytes.
    pub(crate) size: u64,
    /// The file system.
    pub(crate) fsid: u64,
    /// The file in it.
    pub(crate) fileid: u64,
}

/// MNT: the handle of an exported directory.
pub(crate) fn mount(rpc: &mut RpcClient, path: &[u8]) -> Result<Vec<u8>> {
    let results = rpc.call(mount_procedure::MNT, &args(|w| w.opaque(path)))?;
    match decode_all(&results).context("MNT has a malformed result")? {
        Mountres3::Ok(mounted) => Ok(mounted.fhandle.to_vec()),
        Mountres3::Err(status) => bail!("the export cannot be mounted: {status:?}"),
    }
}

/// A client of NFS on one connection.
#[derive(Debug)]
pub(crate) struct Nfs {
    rpc: RpcClient,
}

impl Nfs {
    /// Takes a client of the NFS port.
    pub(crate) const fn new(rpc: RpcClient) -> Self {
        Self { rpc }
    }

    /// How often a call was sent again.
    pub(crate) const fn resends(&self) -> u32 {
        self.rpc.resends()
    }

    /// CREATE of a file that everybody may write; one that is there is taken. Returns its handle.
    pub(crate) fn create(&mut self, dir: &[u8], name: &str) -> Result<Vec<u8>> {
        let call = args(|w| {
            w.opaque(dir);
            w.opaque(name.as_bytes());
            // UNCHECKED, and of sattr3 only the mode.
            w.u32(0);
            w.optional(Some(&Mode(0o666)));
            for _ in 0..5 {
                w.u32(0);
            }
        });
        let results = self.call("CREATE", procedure::CREATE, &call)?;
        let mut reader = Reader::new(&results);
        let handle = if reader.bool()? {
            Some(reader.opaque(HANDLE_BYTES_MAX)?.to_owned())
        } else {
            None
        };
        handle.map_or_else(|| self.lookup(dir, name), Ok)
    }

    /// LOOKUP: the handle of a file.
    pub(crate) fn lookup(&mut self, dir: &[u8], name: &str) -> Result<Vec<u8>> {
        let call = args(|w| {
            w.opaque(dir);
            w.opaque(name.as_bytes());
        });
        let results = self.call("LOOKUP", procedure::LOOKUP, &call)?;
        Ok(Reader::new(&results).opaque(HANDLE_BYTES_MAX)?.to_owned())
    }

    /// GETATTR.
    pub(crate) fn getattr(&mut self, fh: &[u8]) -> Result<Attributes> {
        let results = self.call("GETATTR", procedure::GETATTR, &args(|w| w.opaque(fh)))?;
        let mut reader = Reader::new(&results);
        // Type, mode, links, owner, group.
        for _ in 0..5 {
            reader.u32()?;
        }
        let size = reader.u64()?;
        // Space used, device numbers.
        for _ in 0..2 {
            reader.u64()?;
        }
        Ok(Attributes {
            size,
            fsid: reader.u64()?,
            fileid: reader.u64()?,
        })
    }

    /// WRITE.
    pub(crate) fn write(
        &mut self,
        fh: &[u8],
        offset: u64,
        stable: Stable,
        data: &[u8],
    ) -> Result<Written> {
        let call = args(|w| {
            w.opaque(fh);
            w.u64(offset);
            w.u32(u32::try_from(data.len()).unwrap_or(u32::MAX));
            w.u32(stable.number());
            w.opaque(data);
        });
        let results = self.call("WRITE", procedure::WRITE, &call)?;
        let mut reader = Reader::new(&results);
        skip_wcc_data(&mut reader)?;
        Ok(Written {
            count: reader.u32()?,
            committed: match reader.u32()? {
                0 => Stable::Unstable,
                _ => Stable::FileSync,
            },
            write_verifier: reader.u64()?,
        })
    }

    /// COMMIT of a whole file: the write verifier.
    pub(crate) fn commit(&mut self, fh: &[u8]) -> Result<u64> {
        let call = args(|w| {
            w.opaque(fh);
            w.u64(0);
            w.u32(0);
        });
        let results = self.call("COMMIT", procedure::COMMIT, &call)?;
        let mut reader = Reader::new(&results);
        skip_wcc_data(&mut reader)?;
        Ok(reader.u64()?)
    }

    /// READ of at most [`READ_BYTES_MAX`] bytes; fewer at the end of the file.
    pub(crate) fn read(&mut self, fh: &[u8], offset: u64, count: u32) -> Result<Vec<u8>> {
        let call = args(|w| {
            w.opaque(fh);
            w.u64(offset);
            w.u32(count);
        });
        let results = self.call("READ", procedure::READ, &call)?;
        let mut reader = Reader::new(&results);
        skip_post_op_attr(&mut reader)?;
        // Count and end of file.
        reader.u64()?;
        Ok(reader.opaque(READ_BYTES_MAX as usize)?.to_owned())
    }

    /// Makes a call until it has a status that is not JUKEBOX; returns what stands behind OK.
    fn call(&mut self, name: &str, procedure: u32, call: &[u8]) -> Result<Vec<u8>> {
        let deadline = Instant::now() + JUKEBOX_TIME_MAX;
        loop {
            let results = self.rpc.call(procedure, call)?;
            let mut reader = Reader::new(&results);
            match reader.u32()? {
                0 => return Ok(reader.rest().to_owned()),
                JUKEBOX if Instant::now() < deadline => interrupt::sleep(JUKEBOX_PAUSE)?,
                status => bail!("{name} fails with status {status}"),
            }
        }
    }
}

struct Mode(u32);

impl havenfs_rpc::xdr::Encode for Mode {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.u32(self.0);
    }
}

fn skip_post_op_attr(reader: &mut Reader<'_>) -> Result<(), XdrError> {
    if reader.bool()? {
        reader.fixed::<FATTR3_BYTES>()?;
    }
    Ok(())
}

fn skip_wcc_data(reader: &mut Reader<'_>) -> Result<(), XdrError> {
    if reader.bool()? {
        reader.fixed::<WCC_ATTR_BYTES>()?;
    }
    skip_post_op_attr(reader)
}
