//! The portmapper: version 2, and GETADDR of versions 3 and 4.

use anyhow::Result;
use havenfs_rpc::program;
use nfs3_types::portmap::{mapping, pmaplist};
use nfs3_types::xdr_codec::Opaque;

use super::nfs::{args, unpack};
use super::peer::Peer;
use super::rpc::{Cred, Header, Outcome};

/// The number of TCP in the portmapper's messages.
pub const TCP: u32 = 6;
/// The number of UDP.
pub const UDP: u32 = 17;

/// A client of the portmapper on one connection.
#[derive(Debug)]
pub struct Portmap {
    /// The connection.
    pub peer: Peer,
}

impl Portmap {
    /// Makes a call whose RPC outcome the test wants to see.
    pub fn outcome(&mut self, version: u32, procedure: u32, args: &[u8]) -> Result<Outcome> {
        let header = Header::new(program::PORTMAP, version, procedure, &Cred::None);
        self.peer.exchange(&header, args)
    }

    /// GETPORT; 0 is "not registered".
    pub fn getport(&mut self, program: u32, version: u32, protocol: u32) -> Result<u32> {
        let args = mapping_args(program, version, protocol, 0);
        unpack(&self.outcome(2, 3, &args)?.results()?)
    }

    /// SET; returns whether it was done.
    pub fn set(&mut self, program: u32, version: u32, protocol: u32, port: u32) -> Result<bool> {
        let args = mapping_args(program, version, protocol, port);
        unpack(&self.outcome(2, 1, &args)?.results()?)
    }

    /// UNSET; returns whether it was done.
    pub fn unset(&mut self, program: u32, version: u32) -> Result<bool> {
        let args = mapping_args(program, version, 0, 0);
        unpack(&self.outcome(2, 2, &args)?.results()?)
    }

    /// DUMP: program, version, protocol, port.
    pub fn dump(&mut self) -> Result<Vec<(u32, u32, u32, u32)>> {
        let list: pmaplist = unpack(&self.outcome(2, 4, &[])?.results()?)?;
        let entry = |m: mapping| (m.prog, m.vers, m.prot, m.port);
        Ok(list.into_inner().into_iter().map(entry).collect())
    }

    /// GETADDR of version 3 or 4, with the empty `r_addr` and `r_owner` that clients send.
    pub fn getaddr(
        &mut self,
        rpcb_version: u32,
        program: u32,
        version: u32,
        netid: &str,
    ) -> Result<String> {
        let args = args(|w| {
            w.u32(program);
            w.u32(version);
            w.opaque(netid.as_bytes());
            w.opaque(b"");
            w.opaque(b"");
        });
        let address: Opaque<'static> = unpack(&self.outcome(rpcb_version, 3, &args)?.results()?)?;
        Ok(String::from_utf8(address.into_owned())?)
    }
}

fn mapping_args(program: u32, version: u32, protocol: u32, port: u32) -> Vec<u8> {
    args(|w| {
        for value in [program, version, protocol, port] {
            w.u32(value);
        }
    })
}
