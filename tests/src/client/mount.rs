//! MOUNT, versions 1 to 3.

use anyhow::Result;
use havenfs_rpc::program;
use nfs3_types::mount::{mountlist, mountres3, mountstat3};
use nfs3_types::xdr_codec::{List, Opaque};

use super::nfs::{args, unpack};
use super::peer::Peer;
use super::rpc::{Cred, Header, Outcome};

/// The numbers of the procedures.
#[expect(missing_docs, reason = "named and explained in RFC 1813 5.2")]
pub mod procedure {
    pub const NULL: u32 = 0;
    pub const MNT: u32 = 1;
    pub const DUMP: u32 = 2;
    pub const UMNT: u32 = 3;
    pub const UMNTALL: u32 = 4;
    pub const EXPORT: u32 = 5;
}

/// A client of MOUNT on one connection.
#[derive(Debug)]
pub struct Mount {
    /// The connection.
    pub peer: Peer,
    /// Whom it acts as.
    pub cred: Cred,
    /// The version; 3 unless a test says otherwise.
    pub version: u32,
}

/// What MNT gave out: a handle, or the number of the status.
pub type Mounted = std::result::Result<Vec<u8>, u32>;

impl Mount {
    /// Takes a connection to the MOUNT port.
    pub const fn new(peer: Peer, cred: Cred) -> Self {
        Self {
            peer,
            cred,
            version: 3,
        }
    }

    /// Makes a call whose RPC outcome the test wants to see.
    pub fn outcome(&mut self, procedure: u32, args: &[u8]) -> Result<Outcome> {
        let header = Header::new(program::MOUNT, self.version, procedure, &self.cred);
        self.peer.exchange(&header, args)
    }

    /// MNT of version 3; on success the flavors must be AUTH_SYS alone.
    pub fn mnt(&mut self, path: &[u8]) -> Result<Mounted> {
        let results = self
            .outcome(procedure::MNT, &args(|w| w.opaque(path)))?
            .results()?;
        let mounted: mountres3<'static> = unpack(&results)?;
        Ok(match mounted {
            mountres3::Ok(ok) => {
                anyhow::ensure!(ok.auth_flavors == [1], "flavors {:?}", ok.auth_flavors);
                Ok(ok.fhandle.0.into_owned())
            }
            mountres3::Err(status) => Err(number(status)),
        })
    }

    /// DUMP: hosts and paths.
    pub fn dump(&mut self) -> Result<Vec<(String, String)>> {
        let results = self.outcome(procedure::DUMP, &[])?.results()?;
        let list: mountlist<'static, 'static> = unpack(&results)?;
        let text = |bytes: &Opaque<'_>| String::from_utf8_lossy(&bytes.0).into_owned();
        Ok(list
            .into_inner()
            .iter()
            .map(|entry| (text(&entry.ml_hostname.0), text(&entry.ml_directory.0)))
            .collect())
    }

    /// UMNT.
    pub fn umnt(&mut self, path: &[u8]) -> Result<()> {
        let results = self
            .outcome(procedure::UMNT, &args(|w| w.opaque(path)))?
            .results()?;
        anyhow::ensure!(results.is_empty(), "UMNT has results");
        Ok(())
    }

    /// UMNTALL.
    pub fn umntall(&mut self) -> Result<()> {
        let results = self.outcome(procedure::UMNTALL, &[])?.results()?;
        anyhow::ensure!(results.is_empty(), "UMNTALL has results");
        Ok(())
    }

    /// EXPORT: directories, and for whom they are.
    pub fn export(&mut self) -> Result<Vec<(String, Vec<String>)>> {
        let results = self.outcome(procedure::EXPORT, &[])?.results()?;
        let list: nfs3_types::mount::exports<'static, 'static> = unpack(&results)?;
        let text = |bytes: &Opaque<'_>| String::from_utf8_lossy(&bytes.0).into_owned();
        let groups = |list: &List<nfs3_types::mount::name<'_>>| {
            list.0.iter().map(|name| text(&name.0)).collect()
        };
        Ok(list
            .into_inner()
            .iter()
            .map(|entry| (text(&entry.ex_dir.0), groups(&entry.ex_groups)))
            .collect())
    }
}

const fn number(status: mountstat3) -> u32 {
    status as u32
}
