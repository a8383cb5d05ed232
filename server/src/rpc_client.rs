//! A small RPC client: one call at a time to a peer over TCP, UDP or a local stream socket.
//!
//! Owns connecting (from a reserved port if need be), sending, retransmission over UDP, and the
//! checks of the reply. Knows no program: arguments and results are encoded bytes. Calls carry
//! AUTH_NONE. Used for rpcbind and for the ports and callbacks of peers, all of which may be
//! hostile or dead, so that everything here has a deadline and a bound.
//!
//! Invariants: a reply counts only if it comes from the address that was asked (a connected
//! socket) and repeats the call's transaction id, which is random for each call; at most
//! [`REPLY_BYTES_MAX`] bytes of a reply are held; a client whose call failed over a stream is
//! not used again, since a part of the call may have been sent.
//!
//! Source: RFC 5531 9 and 11.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use havenfs_rpc::auth::OpaqueAuth;
use havenfs_rpc::message::{AcceptStat, Call, Reply, ReplyOutcome};
use havenfs_rpc::record::{self, RecordReader};
use havenfs_rpc::xdr::{Encode, Writer, decode_all};
use rustix::rand::{GetRandomFlags, getrandom};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream, UdpSocket, UnixStream};
use tokio::time::{Instant, timeout_at};

/// The largest reply that is taken, in bytes.
pub const REPLY_BYTES_MAX: usize = 64 * 1024;
/// The wait before the first retransmission over UDP; each further one waits twice as long.
const RETRANSMIT_MS: u64 = 250;
/// The reserved ports that are tried, as Linux's own NFS client does.
const RESERVED_PORTS: std::ops::RangeInclusive<u16> = 665..=1023;
/// Ports among them that well-known servers may want to bind while we use them.
const PORTS_OF_OTHERS: [u16; 12] = [674, 749, 750, 751, 783, 853, 873, 989, 990, 992, 993, 995];

/// Where a peer is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Over TCP.
    Tcp(SocketAddr),
    /// Over UDP.
    Udp(SocketAddr),
    /// Through a local stream socket.
    Local(PathBuf),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address} (TCP)"),
            Self::Udp(address) => write!(f, "{address} (UDP)"),
            Self::Local(path) => write!(f, "`{}`", path.display()),
        }
    }
}

/// From which port a peer is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourcePort {
    /// Any that is free.
    Any,
    /// One below 1024, as a proof of privilege; needs that privilege.
    Reserved,
    /// One below 1024 if this process may have one and one is free, else any.
    ReservedIfAllowed,
}

/// From where a peer is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// From which of our addresses; `None` leaves it to the kernel.
    pub address: Option<IpAddr>,
    /// From which port.
    pub port: SourcePort,
}

impl From<SourcePort> for Source {
    fn from(port: SourcePort) -> Self {
        Self {
            address: None,
            port,
        }
    }
}

/// What is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Procedure {
    /// The program's number.
    pub program: u32,
    /// The program's version.
    pub version: u32,
    /// The procedure's number.
    pub number: u32,
}

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The peer can't be reached.
    #[error("cannot connect to {target}")]
    Connect {
        /// The peer.
        target: Target,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or the peer's machine says that nothing listens there.
    #[error("lost the connection to {target}")]
    Lost {
        /// The peer.
        target: Target,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The peer did not answer in time.
    #[error("no answer from {target} in {} ms", waited.as_millis())]
    TimedOut {
        /// The peer.
        target: Target,
        /// How long the wait was.
        waited: Duration,
    },
    /// What came is no reply, or is larger than [`REPLY_BYTES_MAX`].
    #[error("{target} sent a malformed reply")]
    Malformed {
        /// The peer.
        target: Target,
    },
    /// The peer accepted the call and has no result for it.
    #[error("{target} does not serve the call: {stat:?}")]
    NotServed {
        /// The peer.
        target: Target,
        /// The peer's reason, never [`AcceptStat::Success`].
        stat: AcceptStat,
    },
    /// The peer denied the call.
    #[error("{target} denied the call: {outcome:?}")]
    Denied {
        /// The peer.
        target: Target,
        /// The peer's reason.
        outcome: ReplyOutcome,
    },
}

impl ClientError {
    /// Whether the peer serves the program, but not this version of it, or not the program.
    pub const fn is_other_version(&self) -> bool {
        matches!(
            self,
            Self::NotServed {
                stat: AcceptStat::ProgMismatch { .. }
                    | AcceptStat::ProgUnavail
                    | AcceptStat::ProcUnavail,
                ..
            }
        )
    }
}

/// A client of one peer.
#[derive(Debug)]
pub struct RpcClient {
    target: Target,
    channel: Channel,
    timeout: Duration,
    /// Whether a call over UDP is sent again until it is answered.
    resends: bool,
}

#[derive(Debug)]
enum Channel {
    Udp(UdpSocket),
    Tcp(TcpStream, RecordReader),
    Local(UnixStream, RecordReader),
}

impl RpcClient {
    /// Connects to `target`; this and every call may take as long as `timeout`.
    pub async fn connect(
        target: Target,
        source: impl Into<Source>,
        timeout: Duration,
    ) -> Result<Self, ClientError> {
        let source = source.into();
        let connecting = async {
            Ok(match &target {
                Target::Tcp(address) => {
                    Channel::Tcp(connect_tcp(*address, source).await?, reader())
                }
                Target::Udp(address) => Channel::Udp(connect_udp(*address, source).await?),
                Target::Local(path) => Channel::Local(UnixStream::connect(path).await?, reader()),
            })
        };
        match tokio::time::timeout(timeout, connecting).await {
            Ok(Ok(channel)) => Ok(Self {
                target,
                channel,
                timeout,
                resends: true,
            }),
            Ok(Err(source)) => Err(ClientError::Connect { target, source }),
            Err(_) => Err(ClientError::TimedOut {
                target,
                waited: timeout,
            }),
        }
    }

    /// Sends each call over UDP once, whether it is answered or not.
    #[must_use]
    pub const fn without_resending(mut self) -> Self {
        self.resends = false;
        self
    }

    /// The peer.
    pub const fn target(&self) -> &Target {
        &self.target
    }

    /// Whether the peer has closed the connection, or has sent something that nobody asked for.
    pub fn is_stale(&self) -> bool {
        match &self.channel {
            Channel::Udp(_) => false,
            Channel::Tcp(stream, _) => is_readable(stream.try_read(&mut [0])),
            Channel::Local(stream, _) => is_readable(stream.try_read(&mut [0])),
        }
    }

    /// Carries out one call and gives its encoded results.
    ///
    /// # Errors
    /// After [`ClientError::Lost`], [`ClientError::TimedOut`] and [`ClientError::Malformed`] the
    /// client is to be dropped.
    pub async fn call(
        &mut self,
        procedure: Procedure,
        args: &impl Encode,
    ) -> Result<Vec<u8>, ClientError> {
        let xid = random_u32();
        let message = encode_call(xid, procedure, args);
        let deadline = Instant::now() + self.timeout;
        let exchange = async {
            match &mut self.channel {
                Channel::Udp(socket) => {
                    exchange_datagrams(socket, xid, &message, self.resends).await
                }
                Channel::Tcp(stream, reader) => {
                    exchange_records(stream, reader, xid, &message).await
                }
                Channel::Local(stream, reader) => {
                    exchange_records(stream, reader, xid, &message).await
                }
            }
        };
        let target = || self.target.clone();
        match timeout_at(deadline, exchange).await {
            Ok(Ok(reply)) => self.results(&reply),
            Ok(Err(Broken::Io(source))) => Err(ClientError::Lost {
                target: target(),
                source,
            }),
            Ok(Err(Broken::TooLong)) => Err(ClientError::Malformed { target: target() }),
            Err(_) => Err(ClientError::TimedOut {
                target: target(),
                waited: self.timeout,
            }),
        }
    }

    /// Takes the results out of a reply whose transaction id is known to be right.
    fn results(&self, reply: &[u8]) -> Result<Vec<u8>, ClientError> {
        let target = self.target.clone();
        match decode_all::<Reply<'_>>(reply) {
            Err(_) => Err(ClientError::Malformed { target }),
            Ok(Reply {
                outcome: ReplyOutcome::Accepted(AcceptStat::Success),
                results,
                ..
            }) => Ok(results.to_owned()),
            Ok(Reply {
                outcome: ReplyOutcome::Accepted(stat),
                ..
            }) => Err(ClientError::NotServed { target, stat }),
            Ok(Reply { outcome, .. }) => Err(ClientError::Denied { target, outcome }),
        }
    }
}

/// Connects, calls once and closes.
pub async fn call_once(
    target: Target,
    source: impl Into<Source>,
    timeout: Duration,
    procedure: Procedure,
    args: &impl Encode,
) -> Result<Vec<u8>, ClientError> {
    RpcClient::connect(target, source, timeout)
        .await?
        .call(procedure, args)
        .await
}

/// Arguments that are empty: those of NULL and DUMP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoArgs;

impl Encode for NoArgs {
    fn encode(&self, _: &mut Writer<'_>) {}
}

/// Why an exchange ended without a reply.
enum Broken {
    Io(io::Error),
    TooLong,
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Whether a try to read found the end, an error or data: anything but an idle connection.
fn is_readable(read: io::Result<usize>) -> bool {
    !matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

const fn reader() -> RecordReader {
    RecordReader::new(REPLY_BYTES_MAX)
}

fn encode_call(xid: u32, procedure: Procedure, args: &impl Encode) -> Vec<u8> {
    let mut encoded_args = Vec::new();
    args.encode(&mut Writer::new(&mut encoded_args));
    let call = Call {
        xid,
        program: procedure.program,
        version: procedure.version,
        procedure: procedure.number,
        cred: OpaqueAuth::NONE,
        verf: OpaqueAuth::NONE,
        args: &encoded_args,
    };
    let mut message = Vec::new();
    call.encode(&mut Writer::new(&mut message));
    message
}

/// Whether `message` begins with this transaction id.
fn answers(message: &[u8], xid: u32) -> bool {
    message.first_chunk() == Some(&xid.to_be_bytes())
}

/// Sends the call until a reply to it comes. Datagrams that are something else are dropped.
async fn exchange_datagrams(
    socket: &UdpSocket,
    xid: u32,
    message: &[u8],
    resends: bool,
) -> Result<Vec<u8>, Broken> {
    let mut buffer = vec![0; REPLY_BYTES_MAX];
    let mut wait = Duration::from_millis(RETRANSMIT_MS);
    if !resends {
        // Longer than the call may take.
        wait = Duration::from_hours(1);
    }
    loop {
        socket.send(message).await?;
        let resend_at = Instant::now() + wait;
        while let Ok(received) = timeout_at(resend_at, socket.recv(&mut buffer)).await {
            let reply = buffer.get(..received?).unwrap_or_default();
            if answers(reply, xid) {
                return Ok(reply.to_owned());
            }
        }
        wait *= 2;
    }
}

/// Sends the call as one record and takes records until one answers it: a late reply to a call
/// that was given up may come before.
async fn exchange_records<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    reader: &mut RecordReader,
    xid: u32,
    message: &[u8],
) -> Result<Vec<u8>, Broken> {
    let mut out = Vec::with_capacity(record::MARK_BYTES + message.len());
    let start = record::begin_record(&mut out);
    out.extend_from_slice(message);
    record::end_record(&mut out, start);
    stream.write_all(&out).await?;
    loop {
        while let Some(reply) = reader.next_record().map_err(|_| Broken::TooLong)? {
            if answers(&reply, xid) {
                return Ok(reply.into_owned());
            }
        }
        let (buffer, bytes_max) = reader.space();
        if (&mut *stream)
            .take(bytes_max as u64)
            .read_buf(buffer)
            .await?
            == 0
        {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
}

async fn connect_tcp(address: SocketAddr, source: Source) -> io::Result<TcpStream> {
    let connect = |local: Option<SocketAddr>| async move {
        let socket = if address.is_ipv6() {
            TcpSocket::new_v6()?
        } else {
            TcpSocket::new_v4()?
        };
        if let Some(local) = local {
            socket.bind(local)?;
        }
        // The pair of addresses may still be in TIME_WAIT, so connecting belongs here.
        socket.connect(address).await
    };
    let stream = from_source(address, source, connect).await?;
    stream.set_nodelay(true)?;
    if source.port != SourcePort::Any {
        // Reserved ports are few: a closed connection must not keep one for a minute (TIME_WAIT).
        // What it was for is done by then, or is given up.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    Ok(stream)
}

async fn connect_udp(address: SocketAddr, source: Source) -> io::Result<UdpSocket> {
    let bind = |local: Option<SocketAddr>| async move {
        let local = local.unwrap_or_else(|| SocketAddr::new(any_address(address), 0));
        let socket = Socket::new(Domain::for_address(local), Type::DGRAM.nonblocking(), None)?;
        socket.bind(&local.into())?;
        UdpSocket::from_std(socket.into())
    };
    let socket = from_source(address, source, bind).await?;
    socket.connect(address).await?;
    Ok(socket)
}

/// Makes an attempt from the address and port that `source` asks for; reserved ports are tried in
/// turn, from a random one on, until `attempt` finds one free.
async fn from_source<T, F: Future<Output = io::Result<T>>>(
    peer: SocketAddr,
    source: Source,
    attempt: impl Fn(Option<SocketAddr>) -> F,
) -> io::Result<T> {
    let any_port = source.address.map(|ip| SocketAddr::new(ip, 0));
    if source.port == SourcePort::Any {
        return attempt(any_port).await;
    }
    let ip = source.address.unwrap_or_else(|| any_address(peer));
    let first = random_u32() as usize % RESERVED_PORTS.len();
    let ports = RESERVED_PORTS
        .cycle()
        .skip(first)
        .take(RESERVED_PORTS.len());
    for port in ports.filter(|port| !PORTS_OF_OTHERS.contains(port)) {
        match attempt(Some(SocketAddr::new(ip, port))).await {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
                ) => {}
            Err(error)
                if error.kind() == io::ErrorKind::PermissionDenied
                    && source.port == SourcePort::ReservedIfAllowed =>
            {
                return attempt(any_port).await;
            }
            done => return done,
        }
    }
    if source.port == SourcePort::ReservedIfAllowed {
        return attempt(any_port).await;
    }
    Err(io::Error::new(
        io::ErrorKind::AddrInUse,
        "no reserved port is free",
    ))
}

const fn any_address(peer: SocketAddr) -> IpAddr {
    match peer {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    }
}

/// A number that a peer can't guess.
pub(crate) fn random_u32() -> u32 {
    let mut bytes = [0; 4];
    // Linux fills requests of this size whole; were it to fail, the source address is still
    // checked.
    let _ = getrandom(&mut bytes, GetRandomFlags::empty());
    u32::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests;
