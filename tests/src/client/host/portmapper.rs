//! The portmapper of a [`Host`](super::Host): a list of ports, and a note of every lookup.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};
use havenfs_rpc::message::AcceptStat;
use havenfs_rpc::portmap::universal_address;
use havenfs_rpc::program;

use super::super::nfs::args;
use super::super::nlm::Fields;
use super::super::peer::Transport;
use super::super::portmap::{TCP, UDP};
use super::Received;

/// How a portmapper takes lookups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookups {
    /// It answers versions 2, 3 and 4.
    Answered,
    /// It knows version 2 only.
    Version2Only,
    /// It knows versions 3 and 4 only.
    Rpcbind,
    /// It never answers.
    Ignored,
}

/// A lookup that a portmapper has received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookup {
    /// Where it came from.
    pub from: SocketAddr,
    /// What it came over.
    pub transport: Transport,
    /// The portmapper's version.
    pub rpcb_version: u32,
    /// The program that was asked for.
    pub program: u32,
    /// The version that was asked for.
    pub version: u32,
    /// The protocol that was asked for: [`TCP`] or [`UDP`].
    pub protocol: u32,
}

/// The portmapper itself.
#[derive(Debug)]
pub(super) struct Portmapper {
    at: IpAddr,
    pub(super) lookups: Lookups,
    /// Program, version, protocol, port.
    entries: Vec<(u32, u32, u32, u16)>,
    pub(super) seen: Vec<Lookup>,
}

impl Portmapper {
    /// One that knows NLM and NSM at these ports.
    pub(super) fn new(at: IpAddr, udp: u16, tcp: u16) -> Self {
        Self {
            at,
            lookups: Lookups::Answered,
            entries: entries(udp, tcp),
            seen: Vec::new(),
        }
    }

    /// Takes a program out of the list.
    pub(super) fn unregister(&mut self, program: u32) {
        self.entries.retain(|(known, ..)| *known != program);
    }

    /// Puts an entry into the list; an earlier one of the same kind goes.
    pub(super) fn register(&mut self, program: u32, version: u32, protocol: u32, port: u16) {
        let key = (program, version, protocol);
        self.entries.retain(|(p, v, t, _)| (*p, *v, *t) != key);
        self.entries.push((program, version, protocol, port));
    }

    /// Answers a call as [`Lookups`] says.
    pub(super) fn answer(&mut self, call: &Received) -> Result<()> {
        let versions = match self.lookups {
            Lookups::Answered => 2..=4,
            Lookups::Version2Only => 2..=2,
            Lookups::Rpcbind => 3..=4,
            Lookups::Ignored => {
                self.look_up(call)?;
                return Ok(());
            }
        };
        if !versions.contains(&call.version) {
            let (low, high) = (*versions.start(), *versions.end());
            return call.refuse(AcceptStat::ProgMismatch { low, high });
        }
        match (call.version, call.procedure) {
            (_, 0) => call.reply(&[]),
            (2, 3) => {
                let port = self.look_up(call)?.unwrap_or(0);
                call.reply(&args(|w| w.u32(port.into())))
            }
            (3 | 4, 3) | (4, 9) => {
                let port = self.look_up(call)?;
                let address = port.map(|port| universal_address(SocketAddr::new(self.at, port)));
                call.reply(&args(|w| w.opaque(address.unwrap_or_default().as_bytes())))
            }
            _ => call.refuse(AcceptStat::ProcUnavail),
        }
    }

    /// Notes a lookup and finds the port. Nothing but GETPORT, GETADDR and GETVERSADDR is one.
    fn look_up(&mut self, call: &Received) -> Result<Option<u16>> {
        if !matches!(call.procedure, 3 | 9) {
            return Ok(None);
        }
        let mut fields = Fields::new(&call.args);
        let (program, version) = (fields.field()?, fields.field()?);
        let protocol = if call.version == 2 {
            let protocol = fields.field()?;
            fields.field::<u32>()?;
            protocol
        } else {
            let netid = fields.opaque()?;
            fields.opaque()?;
            fields.opaque()?;
            match netid.as_slice() {
                b"tcp" | b"tcp6" => TCP,
                b"udp" | b"udp6" => UDP,
                _ => bail!("netid {}", netid.escape_ascii()),
            }
        };
        fields.finish()?;
        self.seen.push(Lookup {
            from: call.from,
            transport: call.transport,
            rpcb_version: call.version,
            program,
            version,
            protocol,
        });
        let key = (program, version, protocol);
        let mut entries = self.entries.iter();
        Ok(entries.find_map(|(p, v, t, port)| ((*p, *v, *t) == key).then_some(*port)))
    }
}

/// What a machine registers that serves NLM and NSM.
fn entries(udp: u16, tcp: u16) -> Vec<(u32, u32, u32, u16)> {
    let versions = [
        (program::NLM, 1),
        (program::NLM, 3),
        (program::NLM, 4),
        (program::NSM, 1),
    ];
    versions
        .into_iter()
        .flat_map(|(program, version)| [(program, version, UDP, udp), (program, version, TCP, tcp)])
        .collect()
}
