//! Calls to hosts: GRANTED and the results of asynchronous calls to their NLM, SM_NOTIFY to their
//! NSM.
//!
//! A host is called only at an address that it has called us from, and from the address of ours
//! that it called, since clients compare; never at an address or name that stands in a message. Its
//! portmapper tells the port, over the same transport, and is asked again when a call fails or the
//! caller says so. Everything has a deadline; a host that is dead or hostile costs a task that
//! waits. A TCP connection is kept for the next call for a while, since the calls of a busy lock
//! come one after the other and each connection takes one of the few reserved ports.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use havenfs_rpc::message::AcceptStat;
use havenfs_rpc::portmap::{
    Mapping, Netid, Protocol, Rpcb, Uaddr, VERSION_2, VERSION_3, VERSION_4,
    parse_universal_address, procedure, universal_address,
};
use havenfs_rpc::program;
use havenfs_rpc::xdr::{Encode, Reader, Writer, decode_all};

use crate::gate::Gate;
use crate::rpc_client::{ClientError, Procedure, RpcClient, Source, SourcePort, Target, call_once};

/// How long connecting, and a call, may take.
const CALL_TIME_MAX: Duration = Duration::from_secs(2);
/// How long a port is believed to be right.
const PORT_TIME_MAX: Duration = Duration::from_mins(1);
/// How many ports are remembered.
const PORTS_MAX: usize = 20_000;
/// How long a connection is kept for the next call; hosts keep them for minutes.
const IDLE_TIME_MAX: Duration = Duration::from_secs(30);
/// How many connections are kept.
const IDLE_MAX: usize = 64;

/// Where a host is called, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Callee {
    /// The host's address.
    pub address: IpAddr,
    /// Our address that it knows.
    pub from: IpAddr,
    /// The program and its version.
    pub program: (u32, u32),
    /// The transport.
    pub protocol: Protocol,
}

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The host serves no such program, says its portmapper.
    #[error("the host has no such program")]
    NoPort,
    /// Nothing was sent to the program.
    #[error("cannot reach the host: {0}")]
    Unsent(#[source] ClientError),
    /// Something was sent, and there is no result.
    #[error("no result: {0}")]
    Sent(#[source] ClientError),
    /// It was not sent, since this node serves no more, and another one may call that host now; or
    /// since it was of no use any more when the host was found.
    #[error("it is not to be sent now")]
    NotWanted,
}

impl CallError {
    /// Whether the program got the call and does not know the procedure.
    pub const fn is_no_such_procedure(&self) -> bool {
        matches!(
            self,
            Self::Sent(ClientError::NotServed {
                stat: AcceptStat::ProcUnavail,
                ..
            })
        )
    }
}

/// Calls hosts and remembers their ports.
#[derive(Debug)]
pub struct HostCalls {
    /// Nothing leaves while it is closed.
    gate: Arc<Gate>,
    portmap_port: u16,
    ports: Mutex<HashMap<Callee, (u16, Instant)>>,
    idle: Mutex<HashMap<Callee, (RpcClient, Instant)>>,
}

impl HostCalls {
    /// Makes a caller that asks portmappers on `portmap_port`, for as long as `gate` is open.
    pub fn new(portmap_port: u16, gate: Arc<Gate>) -> Self {
        Self {
            gate,
            portmap_port,
            ports: Mutex::default(),
            idle: Mutex::default(),
        }
    }

    /// Calls a procedure once; over UDP one datagram is sent. `look_up`: the port is asked for
    /// although it may be known.
    pub async fn call(
        &self,
        callee: Callee,
        number: u32,
        args: &impl Encode,
        look_up: bool,
    ) -> Result<Vec<u8>, CallError> {
        self.call_while(callee, number, args, look_up, || true)
            .await
    }

    /// As [`HostCalls::call`], if `is_wanted` says so right before it is sent: to find the host may
    /// have taken seconds.
    pub async fn call_while(
        &self,
        callee: Callee,
        number: u32,
        args: &impl Encode,
        look_up: bool,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Vec<u8>, CallError> {
        if !self.gate.is_open() {
            return Err(CallError::NotWanted);
        }
        let mut client = match self.take_idle(callee).filter(|_| !look_up) {
            Some(client) => client,
            None => self.connect(callee, look_up).await?,
        };
        let (program, version) = callee.program;
        let procedure = Procedure {
            program,
            version,
            number,
        };
        if !self.gate.is_open() || !is_wanted() {
            return Err(CallError::NotWanted);
        }
        let result = client.call(procedure, args).await.map_err(sent_or_not);
        if result.is_ok() {
            self.keep_idle(callee, client);
        } else {
            self.ports().remove(&callee);
        }
        result
    }

    async fn connect(&self, callee: Callee, look_up: bool) -> Result<RpcClient, CallError> {
        let address = SocketAddr::new(callee.address, self.port(callee, look_up).await?);
        let target = match callee.protocol {
            Protocol::Tcp => Target::Tcp(address),
            Protocol::Udp => Target::Udp(address),
        };
        match RpcClient::connect(target, source(callee), CALL_TIME_MAX).await {
            Ok(client) => Ok(client.without_resending()),
            Err(error) => {
                self.ports().remove(&callee);
                Err(CallError::Unsent(error))
            }
        }
    }

    /// A connection that an earlier call has left, if it is still good.
    fn take_idle(&self, callee: Callee) -> Option<RpcClient> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let (client, since) = idle.remove(&callee)?;
        (since.elapsed() < IDLE_TIME_MAX && !client.is_stale()).then_some(client)
    }

    fn keep_idle(&self, callee: Callee, client: RpcClient) {
        if callee.protocol == Protocol::Udp {
            return;
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|_, (_, since)| since.elapsed() < IDLE_TIME_MAX);
        if idle.len() < IDLE_MAX {
            idle.insert(callee, (client, Instant::now()));
        }
    }

    /// The port of a program of a host.
    async fn port(&self, callee: Callee, look_up: bool) -> Result<u16, CallError> {
        if !look_up {
            let known = self.ports().get(&callee).copied();
            if let Some((port, at)) = known
                && at.elapsed() < PORT_TIME_MAX
            {
                return Ok(port);
            }
        }
        let port = self.ask_port(callee).await.map_err(CallError::Unsent)?;
        let port = port.ok_or(CallError::NoPort)?;
        let mut ports = self.ports();
        if ports.len() >= PORTS_MAX {
            // Asked for again where needed.
            ports.clear();
        }
        ports.insert(callee, (port, Instant::now()));
        Ok(port)
    }

    /// Asks the host's portmapper: version 2 for IPv4, which all hosts have, and rpcbind for IPv6,
    /// the newest version first.
    async fn ask_port(&self, callee: Callee) -> Result<Option<u16>, ClientError> {
        let address = SocketAddr::new(callee.address, self.portmap_port);
        let (program, version) = callee.program;
        let question = |version, number| Procedure {
            program: program::PORTMAP,
            version,
            number,
        };
        let target = match callee.protocol {
            Protocol::Tcp => Target::Tcp(address),
            Protocol::Udp => Target::Udp(address),
        };
        if callee.address.is_ipv4() {
            let mapping = Mapping {
                program,
                version,
                protocol: callee.protocol.number(),
                port: 0,
            };
            let question = question(VERSION_2, procedure::PMAP_GETPORT);
            let results =
                call_once(target, source(callee), CALL_TIME_MAX, question, &mapping).await?;
            let port = Reader::new(&results).u32().unwrap_or(0);
            return Ok(u16::try_from(port).ok().filter(|port| *port != 0));
        }
        let addr = universal_address(address);
        let rpcb = Rpcb {
            program,
            version,
            netid: Netid::new(callee.protocol, true).name().as_bytes(),
            addr: addr.as_bytes(),
            owner: b"",
        };
        let ask = async |version| {
            let question = question(version, procedure::GETADDR);
            call_once(
                target.clone(),
                source(callee),
                CALL_TIME_MAX,
                question,
                &rpcb,
            )
            .await
        };
        let results = match ask(VERSION_4).await {
            Err(error) if error.is_other_version() => ask(VERSION_3).await?,
            results => results?,
        };
        let address = decode_all::<Uaddr<'_>>(&results).ok();
        let address = address.and_then(|Uaddr(text)| parse_universal_address(text));
        Ok(address
            .map(|address| address.port())
            .filter(|port| *port != 0))
    }

    fn ports(&self) -> MutexGuard<'_, HashMap<Callee, (u16, Instant)>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const fn source(callee: Callee) -> Source {
    Source {
        address: Some(callee.from),
        port: SourcePort::ReservedIfAllowed,
    }
}

/// A datagram to a port where nobody listens comes back as such: nobody has it.
fn sent_or_not(error: ClientError) -> CallError {
    match &error {
        ClientError::Lost {
            target: Target::Udp(_),
            source,
        } if source.kind() == std::io::ErrorKind::ConnectionRefused => CallError::Unsent(error),
        _ => CallError::Sent(error),
    }
}

/// Arguments that are encoded already.
#[derive(Debug, Clone)]
pub struct EncodedArgs(pub Vec<u8>);

impl Encode for EncodedArgs {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.buffer().extend_from_slice(&self.0);
    }
}
