//! Registration of this server's ports with an rpcbind that runs on this machine.
//!
//! Owns finding that rpcbind, a way in that it accepts, and the entries' life: registered at the
//! start (stale ones replaced), again when rpcbind restarts, removed at a clean stop. Does not
//! decide whether to register; `register` does.
//!
//! The truth is what DUMP on the portmapper's port of this network namespace shows, since that is
//! what clients ask. The local socket belongs to a mount namespace instead and may lead to the
//! rpcbind of another network: so each way in is first proved with an entry of a random,
//! transient program that must appear in that DUMP, before anything else is changed through it.
//!
//! Invariants: no entry is removed behind which another server answers; entries are removed one
//! by one, with an explicit network id, as an empty one would remove more.
//!
//! Source: RFC 1833 2 and 3; rpcbind's behaviour where a SET of a present entry is concerned.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use havenfs_rpc::message::AcceptStat;
use havenfs_rpc::portmap::{self, List, Mapping, Netid, Protocol, Rpcb, procedure};
use havenfs_rpc::program;
use havenfs_rpc::xdr::{Decode, Reader, XdrError, decode_all};
use tracing::{info, warn};

use crate::programs::portmap::PortEntry;
use crate::register::{RegisterError, Settings, chain};
use crate::rpc_client::{
    ClientError, NoArgs, Procedure, RpcClient, SourcePort, Target, call_once, random_u32,
};

/// How long a server whose entry stands in the way has for its answer.
const PING_TIMEOUT: Duration = Duration::from_secs(1);
/// RFC 5531 8: 0x40000000 to 0x5fffffff are transient, for anyone.
const TRANSIENT_PROGRAM: u32 = 0x4000_0000;
const TRANSIENT_MASK: u32 = 0x1fff_ffff;

/// An entry as rpcbind shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registered {
    /// The program's number.
    pub program: u32,
    /// The program's version.
    pub version: u32,
    /// The transport.
    pub netid: Netid,
    /// The address; version 2 knows only the port.
    pub address: SocketAddr,
}

impl fmt::Display for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            program,
            version,
            netid,
            address,
        } = self;
        let port = address.port();
        match *program {
            program::NFS => write!(f, "NFS version {version}"),
            program::MOUNT => write!(f, "MOUNT version {version}"),
            program::NLM => write!(f, "NLM version {version}"),
            program::NSM => write!(f, "NSM version {version}"),
            _ => write!(f, "program {program} version {version}"),
        }?;
        write!(f, " on {} port {port}", netid.name())
    }
}

impl From<&PortEntry> for Registered {
    fn from(entry: &PortEntry) -> Self {
        let PortEntry {
            program,
            version,
            netid,
            address,
            ..
        } = *entry;
        Self {
            program,
            version,
            netid,
            address,
        }
    }
}

/// Our entries in the rpcbind of this machine.
#[derive(Debug)]
pub struct Registration {
    rpcbind: Rpcbind,
    own: Vec<Registered>,
}

/// What [`Registration::check`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checked {
    /// All entries are there.
    Intact,
    /// Entries were missing or changed, and are registered again.
    Renewed,
}

impl Registration {
    /// Registers `own`, replacing stale entries; ends when DUMP shows all of them.
    pub(super) async fn start(rpcbind: Rpcbind, own: &[PortEntry]) -> Result<Self, RegisterError> {
        let own = own.iter().map(Registered::from);
        let own = own.filter(|entry| {
            // rpcbind is the portmapper itself; version 2 has no place for IPv6.
            entry.program != program::PORTMAP
                && !(rpcbind.version == portmap::VERSION_2 && entry.netid.is_ipv6())
        });
        let registration = Self {
            own: own.collect(),
            rpcbind,
        };
        registration.check().await?;
        Ok(registration)
    }

    /// The address of rpcbind.
    pub const fn address(&self) -> SocketAddr {
        self.rpcbind.address
    }

    /// Checks that all entries are there, and registers again what is not.
    ///
    /// # Errors
    /// When rpcbind does not answer or refuses, or another server holds a program of ours.
    pub async fn check(&self) -> Result<Checked, RegisterError> {
        let mut present = self.rpcbind.dump().await?;
        let stale = self.stale(&present).await?;
        if stale.is_empty() && self.missing(&present).is_empty() {
            return Ok(Checked::Intact);
        }
        let mut way_in = self.rpcbind.way_in(self.probe_port()).await?;
        if !stale.is_empty() {
            for entry in stale {
                // A refusal shows when our entry can't be set.
                self.rpcbind.unset(&mut way_in, &entry).await?;
            }
            // In version 2 one UNSET removes both protocols, a good entry of ours with it.
            present = self.rpcbind.dump().await?;
        }
        let missing = self.missing(&present);
        for entry in missing {
            if !self.rpcbind.set(&mut way_in, entry).await? {
                return Err(RegisterError::Refused { entry: *entry });
            }
        }
        present = self.rpcbind.dump().await?;
        match self.missing(&present).first() {
            Some(entry) => Err(RegisterError::NotShown { entry: **entry }),
            None => Ok(Checked::Renewed),
        }
    }

    fn missing(&self, present: &[Registered]) -> Vec<&Registered> {
        self.own
            .iter()
            .filter(|entry| !present.contains(entry))
            .collect()
    }

    /// Entries of our programs that nobody stands behind, or only we.
    async fn stale(&self, present: &[Registered]) -> Result<Vec<Registered>, RegisterError> {
        let mut stale = Vec::new();
        for entry in present {
            let program = || self.own.iter().filter(|own| own.program == entry.program);
            if program().next().is_none() || self.own.contains(entry) {
                continue;
            }
            let port_is_ours = program().any(|own| {
                own.address.port() == entry.address.port()
                    && own.netid.protocol() == entry.netid.protocol()
            });
            if !port_is_ours && is_alive(entry).await {
                return Err(RegisterError::Conflict { entry: *entry });
            }
            stale.push(*entry);
        }
        Ok(stale)
    }

    /// Checks every `interval`, and never ends; may be dropped at any time.
    ///
    /// What has changed is logged once, not at every turn.
    pub async fn watch(&self, interval: Duration) {
        let mut trouble = None;
        loop {
            tokio::time::sleep(interval).await;
            match self.check().await {
                Ok(Checked::Intact) => {
                    if trouble.take().is_some() {
                        info!("rpcbind answers again and has our ports");
                    }
                }
                Ok(Checked::Renewed) => {
                    trouble = None;
                    info!("rpcbind had lost our ports; registered them again");
                }
                Err(error) => {
                    let text = chain(&error);
                    if trouble.as_ref() != Some(&text) {
                        warn!(error = text, "cannot keep our ports in rpcbind");
                        trouble = Some(text);
                    }
                }
            }
        }
    }

    /// Removes those of our entries that are still there; gives their number.
    pub async fn remove(&self) -> Result<usize, RegisterError> {
        let present = self.rpcbind.dump().await?;
        let ours: Vec<&Registered> = self
            .own
            .iter()
            .filter(|entry| present.contains(entry))
            .collect();
        if ours.is_empty() {
            return Ok(0);
        }
        let mut way_in = self.rpcbind.way_in(self.probe_port()).await?;
        let mut removed = 0;
        for entry in ours {
            removed += usize::from(self.rpcbind.unset(&mut way_in, entry).await?);
        }
        Ok(removed)
    }

    /// A port for the probe: rpcbind lets only root register reserved ones, and ours are allowed.
    fn probe_port(&self) -> u16 {
        self.own
            .first()
            .map_or(u16::MAX, |entry| entry.address.port())
    }
}

/// Whether a server of the entry's program answers at the entry's address.
async fn is_alive(entry: &Registered) -> bool {
    let mut address = entry.address;
    if address.ip().is_unspecified() {
        address.set_ip(loopback(entry.netid.is_ipv6()));
    }
    let target = match entry.netid.protocol() {
        Protocol::Tcp => Target::Tcp(address),
        Protocol::Udp => Target::Udp(address),
    };
    let null = Procedure {
        program: entry.program,
        version: entry.version,
        number: 0,
    };
    match call_once(target, SourcePort::Any, PING_TIMEOUT, null, &NoArgs).await {
        Ok(_) | Err(ClientError::Denied { .. }) => true,
        Err(ClientError::NotServed { stat, .. }) => stat != AcceptStat::ProgUnavail,
        Err(_) => false,
    }
}

const fn loopback(ipv6: bool) -> IpAddr {
    if ipv6 {
        IpAddr::V6(Ipv6Addr::LOCALHOST)
    } else {
        IpAddr::V4(Ipv4Addr::LOCALHOST)
    }
}

/// An rpcbind that answers on the portmapper's port of this network namespace.
#[derive(Debug)]
pub(super) struct Rpcbind {
    address: SocketAddr,
    /// The highest version that it serves.
    version: u32,
    sockets: Vec<PathBuf>,
    timeout: Duration,
}

impl Rpcbind {
    /// Looks for rpcbind on the loopback addresses.
    pub(super) async fn find(settings: &Settings) -> Option<Self> {
        for ipv6 in [false, true] {
            for version in [portmap::VERSION_4, portmap::VERSION_3, portmap::VERSION_2] {
                let rpcbind = Self {
                    address: SocketAddr::new(loopback(ipv6), settings.port),
                    version,
                    sockets: settings.sockets.clone(),
                    timeout: settings.timeout,
                };
                match rpcbind.dump().await {
                    Ok(_) => return Some(rpcbind),
                    Err(error) if error.is_other_version() => {}
                    Err(_) => break,
                }
            }
        }
        None
    }

    /// All entries over TCP and UDP, as clients see them.
    async fn dump(&self) -> Result<Vec<Registered>, ClientError> {
        let target = Target::Tcp(self.address);
        let mut client = RpcClient::connect(target, SourcePort::Any, self.timeout).await?;
        let results = client
            .call(self.procedure(procedure::DUMP), &NoArgs)
            .await?;
        if self.version == portmap::VERSION_2 {
            let List(mappings) = decoded::<List<Mapping>>(&client, &results)?;
            Ok(mappings.iter().filter_map(from_mapping).collect())
        } else {
            let List(rpcbs) = decoded::<List<Rpcb<'_>>>(&client, &results)?;
            Ok(rpcbs.iter().filter_map(from_rpcb).collect())
        }
    }

    /// Connects to where this rpcbind lets us change entries: its local socket, else the loopback
    /// address from a reserved port.
    async fn way_in(&self, probe_port: u16) -> Result<RpcClient, RegisterError> {
        let sockets = self
            .sockets
            .iter()
            .map(|path| (Target::Local(path.clone()), SourcePort::Any));
        let loopback = (Target::Tcp(self.address), SourcePort::Reserved);
        let mut reason = None;
        for (target, source) in sockets.chain([loopback]) {
            match self.try_way_in(target, source, probe_port).await {
                Ok(Some(client)) => return Ok(client),
                Ok(None) => {}
                Err(error) => reason = Some(error),
            }
        }
        Err(RegisterError::NoWayIn {
            rpcbind: self.address,
            source: reason.map(Box::new),
        })
    }

    /// Connects and proves with a transient entry that changes made here show in DUMP.
    async fn try_way_in(
        &self,
        target: Target,
        source: SourcePort,
        probe_port: u16,
    ) -> Result<Option<RpcClient>, ClientError> {
        let mut client = RpcClient::connect(target, source, self.timeout).await?;
        let probe = Registered {
            program: TRANSIENT_PROGRAM | (random_u32() & TRANSIENT_MASK),
            version: 1,
            netid: Netid::Tcp,
            address: SocketAddr::new(Netid::Tcp.unspecified(), probe_port),
        };
        if !self.set(&mut client, &probe).await? {
            return Ok(None);
        }
        let shown = self.dump().await.map(|present| present.contains(&probe));
        self.unset(&mut client, &probe).await?;
        Ok(shown?.then_some(client))
    }

    async fn set(&self, client: &mut RpcClient, entry: &Registered) -> Result<bool, ClientError> {
        self.change(client, procedure::SET, entry).await
    }

    async fn unset(&self, client: &mut RpcClient, entry: &Registered) -> Result<bool, ClientError> {
        self.change(client, procedure::UNSET, entry).await
    }

    async fn change(
        &self,
        client: &mut RpcClient,
        number: u32,
        entry: &Registered,
    ) -> Result<bool, ClientError> {
        let results = if self.version == portmap::VERSION_2 {
            let mapping = Mapping {
                program: entry.program,
                version: entry.version,
                protocol: entry.netid.protocol().number(),
                port: entry.address.port().into(),
            };
            client.call(self.procedure(number), &mapping).await?
        } else {
            let addr = portmap::universal_address(entry.address);
            // What libraries send; rpcbind itself goes by the socket's peer.
            let owner = rustix::process::geteuid().as_raw().to_string();
            let rpcb = Rpcb {
                program: entry.program,
                version: entry.version,
                netid: entry.netid.name().as_bytes(),
                addr: addr.as_bytes(),
                owner: owner.as_bytes(),
            };
            client.call(self.procedure(number), &rpcb).await?
        };
        Ok(decoded::<Done>(client, &results)?.0)
    }

    const fn procedure(&self, number: u32) -> Procedure {
        Procedure {
            program: program::PORTMAP,
            version: self.version,
            number,
        }
    }
}

/// The result of SET and UNSET.
struct Done(bool);

impl Decode<'_> for Done {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        reader.bool().map(Self)
    }
}

fn decoded<'a, T: Decode<'a>>(client: &RpcClient, results: &'a [u8]) -> Result<T, ClientError> {
    decode_all(results).map_err(|_| ClientError::Malformed {
        target: client.target().clone(),
    })
}

fn from_mapping(mapping: &Mapping) -> Option<Registered> {
    let netid = Netid::new(Protocol::from_number(mapping.protocol)?, false);
    let address = SocketAddr::new(netid.unspecified(), u16::try_from(mapping.port).ok()?);
    Some(Registered {
        program: mapping.program,
        version: mapping.version,
        netid,
        address,
    })
}

/// Entries on other transports, such as local sockets, are none of ours.
fn from_rpcb(rpcb: &Rpcb<'_>) -> Option<Registered> {
    let netid = Netid::from_name(rpcb.netid)?;
    let address = portmap::parse_universal_address(rpcb.addr)?;
    Some(Registered {
        program: rpcb.program,
        version: rpcb.version,
        netid,
        address,
    })
}
