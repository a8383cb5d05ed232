//! NFSv3: one method per procedure, in the order of RFC 1813 3.3.
//!
//! A method encodes its arguments by hand and returns the results as `nfs3_types` decodes them.
//! An RPC error is an error of the test; tests that want one build the call with [`args`] and use
//! [`Peer::exchange`].

use anyhow::{Context, Result, ensure};
use havenfs_rpc::program;
use havenfs_rpc::xdr::Writer;
use nfs3_types::nfs3;
use nfs3_types::xdr_codec::Unpack;

use super::attributes::{Answer, Results, Sattr};
use super::peer::Peer;
use super::rpc::{Cred, Header, Outcome};

/// The numbers of the procedures.
#[expect(missing_docs, reason = "named and explained in RFC 1813 3.3")]
pub mod procedure {
    pub const NULL: u32 = 0;
    pub const GETATTR: u32 = 1;
    pub const SETATTR: u32 = 2;
    pub const LOOKUP: u32 = 3;
    pub const ACCESS: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const READ: u32 = 6;
    pub const WRITE: u32 = 7;
    pub const CREATE: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const SYMLINK: u32 = 10;
    pub const MKNOD: u32 = 11;
    pub const REMOVE: u32 = 12;
    pub const RMDIR: u32 = 13;
    pub const RENAME: u32 = 14;
    pub const LINK: u32 = 15;
    pub const READDIR: u32 = 16;
    pub const READDIRPLUS: u32 = 17;
    pub const FSSTAT: u32 = 18;
    pub const FSINFO: u32 = 19;
    pub const PATHCONF: u32 = 20;
    pub const COMMIT: u32 = 21;
}

/// `stable_how`.
pub const UNSTABLE: u32 = 0;
/// `stable_how`.
pub const DATA_SYNC: u32 = 1;
/// `stable_how`.
pub const FILE_SYNC: u32 = 2;

/// How CREATE treats a file that exists.
#[derive(Debug, Clone, Copy)]
pub enum How {
    /// Take it.
    Unchecked(Sattr),
    /// Refuse.
    Guarded(Sattr),
    /// Take it if this verifier made it.
    Exclusive([u8; 8]),
}

/// What MKNOD makes: `ftype3`, and device numbers for devices.
#[derive(Debug, Clone, Copy)]
pub enum Node {
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    Character(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// Any other number of `ftype3`, with nothing after it.
    Other(u32),
}

/// Encodes arguments.
pub fn args(write: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut Writer::new(&mut out));
    out
}

/// Encodes `diropargs3`.
pub fn dirop(writer: &mut Writer<'_>, dir: &[u8], name: &[u8]) {
    writer.opaque(dir);
    writer.opaque(name);
}

/// A client of NFSv3 on one connection, acting as one user.
#[derive(Debug)]
pub struct Nfs {
    /// The connection.
    pub peer: Peer,
    /// Whom it acts as.
    pub cred: Cred,
}

impl Nfs {
    /// Takes a connection to the NFS port.
    pub const fn new(peer: Peer, cred: Cred) -> Self {
        Self { peer, cred }
    }

    /// Makes a call whose RPC outcome the test wants to see.
    pub fn outcome(&mut self, procedure: u32, args: &[u8]) -> Result<Outcome> {
        let header = Header::new(program::NFS, 3, procedure, &self.cred);
        self.peer.exchange(&header, args)
    }

    /// Makes a call that RPC accepts and decodes its results, all of them.
    pub fn call<T: Unpack>(&mut self, procedure: u32, args: &[u8]) -> Result<T> {
        let results = self
            .outcome(procedure, args)?
            .results()
            .with_context(|| format!("procedure {procedure} of NFS"))?;
        unpack(&results)
    }

    /// NULL.
    pub fn null(&mut self) -> Result<()> {
        let results = self.outcome(procedure::NULL, &[])?.results()?;
        ensure!(results.is_empty(), "NULL has results");
        Ok(())
    }

    /// GETATTR.
    pub fn getattr(&mut self, fh: &[u8]) -> Result<nfs3::GETATTR3res> {
        self.call(procedure::GETATTR, &args(|w| w.opaque(fh)))
    }

    /// SETATTR; `guard` is a ctime in seconds and nanoseconds.
    pub fn setattr(
        &mut self,
        fh: &[u8],
        new: &Sattr,
        guard: Option<(u32, u32)>,
    ) -> Result<nfs3::SETATTR3res> {
        let args = args(|w| {
            w.opaque(fh);
            new.encode(w);
            w.bool(guard.is_some());
            if let Some((seconds, nanoseconds)) = guard {
                w.u32(seconds);
                w.u32(nanoseconds);
            }
        });
        self.call(procedure::SETATTR, &args)
    }

    /// LOOKUP.
    pub fn lookup(&mut self, dir: &[u8], name: &[u8]) -> Result<nfs3::LOOKUP3res> {
        self.call(procedure::LOOKUP, &args(|w| dirop(w, dir, name)))
    }

    /// ACCESS.
    pub fn access(&mut self, fh: &[u8], wanted: u32) -> Result<nfs3::ACCESS3res> {
        let args = args(|w| {
            w.opaque(fh);
            w.u32(wanted);
        });
        self.call(procedure::ACCESS, &args)
    }

    /// READLINK.
    pub fn readlink(&mut self, fh: &[u8]) -> Result<nfs3::READLINK3res<'static>> {
        self.call(procedure::READLINK, &args(|w| w.opaque(fh)))
    }

    /// READ.
    pub fn read(&mut self, fh: &[u8], at: u64, count: u32) -> Result<nfs3::READ3res<'static>> {
        let args = args(|w| {
            w.opaque(fh);
            w.u64(at);
            w.u32(count);
        });
        self.call(procedure::READ, &args)
    }

    /// WRITE of all of `data`.
    pub fn write(
        &mut self,
        fh: &[u8],
        at: u64,
        stable: u32,
        data: &[u8],
    ) -> Result<nfs3::WRITE3res> {
        let args = write_args(fh, at, data.len() as u32, stable, data);
        self.call(procedure::WRITE, &args)
    }

    /// CREATE.
    pub fn create(&mut self, dir: &[u8], name: &[u8], how: How) -> Result<nfs3::CREATE3res> {
        let args = args(|w| {
            dirop(w, dir, name);
            match how {
                How::Unchecked(new) => {
                    w.u32(0);
                    new.encode(w);
                }
                How::Guarded(new) => {
                    w.u32(1);
                    new.encode(w);
                }
                How::Exclusive(verifier) => {
                    w.u32(2);
                    w.fixed(&verifier);
                }
            }
        });
        self.call(procedure::CREATE, &args)
    }

    /// MKDIR.
    pub fn mkdir(&mut self, dir: &[u8], name: &[u8], new: &Sattr) -> Result<nfs3::MKDIR3res> {
        let args = args(|w| {
            dirop(w, dir, name);
            new.encode(w);
        });
        self.call(procedure::MKDIR, &args)
    }

    /// SYMLINK.
    pub fn symlink(
        &mut self,
        dir: &[u8],
        name: &[u8],
        new: &Sattr,
        text: &[u8],
    ) -> Result<nfs3::SYMLINK3res> {
        let args = args(|w| {
            dirop(w, dir, name);
            new.encode(w);
            w.opaque(text);
        });
        self.call(procedure::SYMLINK, &args)
    }

    /// MKNOD.
    pub fn mknod(
        &mut self,
        dir: &[u8],
        name: &[u8],
        node: Node,
        new: &Sattr,
    ) -> Result<nfs3::MKNOD3res> {
        let args = args(|w| {
            dirop(w, dir, name);
            let (kind, device) = match node {
                Node::Block(major, minor) => (3, Some((major, minor))),
                Node::Character(major, minor) => (4, Some((major, minor))),
                Node::Socket => (6, None),
                Node::Fifo => (7, None),
                Node::Other(kind) => {
                    w.u32(kind);
                    return;
                }
            };
            w.u32(kind);
            new.encode(w);
            if let Some((major, minor)) = device {
                w.u32(major);
                w.u32(minor);
            }
        });
        self.call(procedure::MKNOD, &args)
    }

    /// REMOVE.
    pub fn remove(&mut self, dir: &[u8], name: &[u8]) -> Result<nfs3::REMOVE3res> {
        self.call(procedure::REMOVE, &args(|w| dirop(w, dir, name)))
    }

    /// RMDIR.
    pub fn rmdir(&mut self, dir: &[u8], name: &[u8]) -> Result<nfs3::RMDIR3res> {
        self.call(procedure::RMDIR, &args(|w| dirop(w, dir, name)))
    }

    /// RENAME.
    pub fn rename(&mut self, from: (&[u8], &[u8]), to: (&[u8], &[u8])) -> Result<nfs3::RENAME3res> {
        let args = args(|w| {
            dirop(w, from.0, from.1);
            dirop(w, to.0, to.1);
        });
        self.call(procedure::RENAME, &args)
    }

    /// LINK.
    pub fn link(&mut self, fh: &[u8], dir: &[u8], name: &[u8]) -> Result<nfs3::LINK3res> {
        let args = args(|w| {
            w.opaque(fh);
            dirop(w, dir, name);
        });
        self.call(procedure::LINK, &args)
    }

    /// READDIR from a cookie.
    pub fn readdir(
        &mut self,
        dir: &[u8],
        cookie: u64,
        count: u32,
    ) -> Result<nfs3::READDIR3res<'static>> {
        let args = args(|w| {
            w.opaque(dir);
            w.u64(cookie);
            w.u64(0);
            w.u32(count);
        });
        self.call(procedure::READDIR, &args)
    }

    /// READDIRPLUS from a cookie.
    pub fn readdirplus(
        &mut self,
        dir: &[u8],
        cookie: u64,
        dircount: u32,
        maxcount: u32,
    ) -> Result<nfs3::READDIRPLUS3res<'static>> {
        let args = args(|w| {
            w.opaque(dir);
            w.u64(cookie);
            w.u64(0);
            w.u32(dircount);
            w.u32(maxcount);
        });
        self.call(procedure::READDIRPLUS, &args)
    }

    /// FSSTAT.
    pub fn fsstat(&mut self, fh: &[u8]) -> Result<nfs3::FSSTAT3res> {
        self.call(procedure::FSSTAT, &args(|w| w.opaque(fh)))
    }

    /// FSINFO.
    pub fn fsinfo(&mut self, fh: &[u8]) -> Result<nfs3::FSINFO3res> {
        self.call(procedure::FSINFO, &args(|w| w.opaque(fh)))
    }

    /// PATHCONF.
    pub fn pathconf(&mut self, fh: &[u8]) -> Result<nfs3::PATHCONF3res> {
        self.call(procedure::PATHCONF, &args(|w| w.opaque(fh)))
    }

    /// COMMIT.
    pub fn commit(&mut self, fh: &[u8], at: u64, count: u32) -> Result<nfs3::COMMIT3res> {
        let args = args(|w| {
            w.opaque(fh);
            w.u64(at);
            w.u32(count);
        });
        self.call(procedure::COMMIT, &args)
    }

    /// Looks a name up that must be there; returns its handle.
    pub fn find(&mut self, dir: &[u8], name: &[u8]) -> Result<Vec<u8>> {
        match self.lookup(dir, name)? {
            nfs3::Nfs3Result::Ok(ok) => Ok(ok.object.data.into_owned()),
            nfs3::Nfs3Result::Err((status, _)) => {
                anyhow::bail!("LOOKUP of {}: {status}", name.escape_ascii())
            }
        }
    }

    /// Attributes of a file that must be there.
    pub fn attributes(&mut self, fh: &[u8]) -> Result<nfs3::fattr3> {
        match self.getattr(fh)? {
            nfs3::Nfs3Result::Ok(ok) => Ok(ok.obj_attributes),
            nfs3::Nfs3Result::Err((status, _)) => anyhow::bail!("GETATTR: {status}"),
        }
    }
}

/// Arguments of WRITE whose count and data may contradict each other.
pub fn write_args(fh: &[u8], at: u64, count: u32, stable: u32, data: &[u8]) -> Vec<u8> {
    args(|w| {
        w.opaque(fh);
        w.u64(at);
        w.u32(count);
        w.u32(stable);
        w.opaque(data);
    })
}

/// Decodes results and makes sure that nothing is left over.
pub fn unpack<T: Unpack>(results: &[u8]) -> Result<T> {
    let mut rest = results;
    let (value, _) = T::unpack(&mut rest)
        .map_err(|error| anyhow::anyhow!("malformed results: {error}: {results:02x?}"))?;
    ensure!(
        rest.is_empty(),
        "{} bytes behind the results: {results:02x?}",
        rest.len()
    );
    Ok(value)
}

/// What all results have in common, of any procedure.
pub fn answer<R: Results>(results: Result<R>) -> Result<Answer> {
    Ok(results?.answer())
}
