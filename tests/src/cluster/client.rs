//! A host that uses a service: its files over NFS, and its locks over NLM, through whatever happens
//! to the nodes.
//!
//! Owns two [callers](Caller) and nothing else; what it was told is returned, and who held what is
//! for the test to remember. Arguments and results are those of the project's small test client.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, anyhow, bail, ensure};
use havenfs_rpc::program;
use nfs3_types::nfs3::{self, Nfs3Result, nfsstat3};

use super::caller::Caller;
use super::site::Site;
use crate::client::mount::{Mount, Mounted};
use crate::client::nfs::{self, FILE_SYNC, args, dirop, unpack, write_args};
use crate::client::nlm::{Lock, Tested, procedure, read_res, read_test_res};
use crate::client::peer::Transport;
use crate::client::rpc::next_xid;
use crate::client::{Cred, Peer};

const NFS: (u32, u32) = (program::NFS, program::NFS_VERSION);
const NLM: (u32, u32) = (program::NLM, 4);

/// A host and what it uses.
#[derive(Debug)]
pub struct Client {
    /// What it calls itself.
    pub name: &'static str,
    /// Where it calls from.
    pub address: IpAddr,
    /// The service's address.
    pub service: IpAddr,
    /// Its calls of NFS.
    pub nfs: Caller,
    /// Its calls of NLM.
    pub nlm: Caller,
    mount_port: u16,
}

impl Client {
    /// The client with this number, of one service.
    pub fn new(site: &Site, name: &'static str, number: u8, service: &str) -> Self {
        let (address, service) = (site.client(number), site.service(service));
        let at = |port| SocketAddr::new(service, port);
        Self {
            name,
            address,
            service,
            nfs: Caller::new(address, at(site.ports.nfs)),
            nlm: Caller::new(address, at(site.ports.nlm)),
            mount_port: site.ports.mount,
        }
    }

    /// Another one of the same host, with connections of its own.
    #[must_use]
    pub fn another(&self, site: &Site) -> Self {
        let at = |port| SocketAddr::new(self.service, port);
        Self {
            nfs: Caller::new(self.address, at(site.ports.nfs)),
            nlm: Caller::new(self.address, at(site.ports.nlm)),
            ..*self
        }
    }

    /// Mounts a path; the status is the server's.
    pub fn mount(&self, path: &str) -> Result<Mounted> {
        let (own, at) = (self.address, SocketAddr::new(self.service, self.mount_port));
        let peer = Peer::connect_from(Transport::Tcp, SocketAddr::new(own, 0), at)?;
        Mount::new(peer, Cred::root()).mnt(path.as_bytes())
    }

    /// The handle of a file in the root of a service's export.
    pub fn find(&mut self, site: &Site, service: &str, name: &str) -> Result<Vec<u8>> {
        let path = site.export(service);
        let root = self.mount(&path.to_string_lossy())?;
        let root = root.map_err(|status| anyhow!("MNT of {}: status {status}", path.display()))?;
        let args = args(|w| dirop(w, &root, name.as_bytes()));
        let results = self.nfs.call(NFS, nfs::procedure::LOOKUP, &args)?;
        match unpack::<nfs3::LOOKUP3res>(&results)? {
            Nfs3Result::Ok(ok) => Ok(ok.object.data.into_owned()),
            Nfs3Result::Err((status, _)) => bail!("LOOKUP of {name}: {status}"),
        }
    }

    /// GETATTR.
    pub fn getattr(&mut self, fh: &[u8]) -> Result<std::result::Result<nfs3::fattr3, nfsstat3>> {
        let args = args(|w| w.opaque(fh));
        let results = self.nfs.call(NFS, nfs::procedure::GETATTR, &args)?;
        Ok(match unpack::<nfs3::GETATTR3res>(&results)? {
            Nfs3Result::Ok(ok) => Ok(ok.obj_attributes),
            Nfs3Result::Err((status, _)) => Err(status),
        })
    }

    /// WRITE, FILE_SYNC, which has to write all; returns the write verifier.
    pub fn write(&mut self, fh: &[u8], at: u64, data: &[u8]) -> Result<[u8; 8]> {
        let args = write_args(fh, at, data.len() as u32, FILE_SYNC, data);
        let results = self.nfs.call(NFS, nfs::procedure::WRITE, &args)?;
        match unpack::<nfs3::WRITE3res>(&results)? {
            Nfs3Result::Ok(ok) => {
                ensure!(ok.count as usize == data.len(), "short WRITE: {ok:?}");
                ensure!(ok.committed as u32 == FILE_SYNC, "not FILE_SYNC: {ok:?}");
                Ok(ok.verf.0)
            }
            Nfs3Result::Err((status, _)) => bail!("WRITE: {status}"),
        }
    }

    /// READ.
    pub fn read(&mut self, fh: &[u8], at: u64, count: u32) -> Result<Vec<u8>> {
        let args = args(|w| {
            w.opaque(fh);
            w.u64(at);
            w.u32(count);
        });
        let results = self.nfs.call(NFS, nfs::procedure::READ, &args)?;
        match unpack::<nfs3::READ3res<'_>>(&results)? {
            Nfs3Result::Ok(ok) => Ok(ok.data.0.into_owned()),
            Nfs3Result::Err((status, _)) => bail!("READ: {status}"),
        }
    }

    /// An exclusive lock of a range, that does not wait.
    pub fn lock_of(&self, fh: &[u8], svid: i32, l_offset: u64, l_len: u64) -> Lock {
        Lock::new(fh, self.name, svid).range(l_offset, l_len)
    }

    /// LOCK.
    pub fn lock(&mut self, lock: &Lock) -> Result<u32> {
        self.change(next_xid(), procedure::LOCK, lock)
    }

    /// UNLOCK.
    pub fn unlock(&mut self, lock: &Lock) -> Result<u32> {
        self.change(next_xid(), procedure::UNLOCK, lock)
    }

    /// LOCK or UNLOCK with a transaction id of the test's choice.
    pub fn change(&mut self, xid: u32, procedure: u32, lock: &Lock) -> Result<u32> {
        let args = lock.args(NLM.1, procedure);
        let results = self.nlm.call_as(xid, NLM, procedure, &args)?;
        let (cookie, stat) = read_res(&results)?;
        ensure!(cookie == lock.cookie, "cookie {cookie:02x?} for {lock:?}");
        Ok(stat)
    }

    /// TEST.
    pub fn test(&mut self, lock: &Lock) -> Result<Tested> {
        let args = lock.args(NLM.1, procedure::TEST);
        let results = self.nlm.call(NLM, procedure::TEST, &args)?;
        let (cookie, tested) = read_test_res(NLM.1, &results)?;
        ensure!(cookie == lock.cookie, "cookie {cookie:02x?} for {lock:?}");
        Ok(tested)
    }

    /// The process that holds what `lock` wants, as TEST by this client says; none if it is free.
    pub fn holder(&mut self, lock: &Lock) -> Result<Option<i32>> {
        match self.test(lock)? {
            Tested::Denied(holder) => Ok(Some(holder.svid)),
            Tested::Other(0) => Ok(None),
            Tested::Other(stat) => bail!("TEST: status {stat}"),
        }
    }
}
