//! One end of a conversation with the server: a TCP connection or a connected UDP socket.
//!
//! Owns record marking towards the server and the wait for an answer, with a deadline. Messages
//! are any bytes; [`Peer::exchange`] is the proper way, [`Peer::send`] and [`Peer::receive`] are
//! for tests that send something else.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use super::rpc::{self, Header, LAST_FRAGMENT, Outcome};

/// How long a server may take to answer; a debug build on a busy machine needs a moment.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// The longest reply that is read: 1 MiB of data and its attributes.
const REPLY_BYTES_MAX: usize = (1 << 20) + 4096;

/// A transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A connection with the server.
#[derive(Debug)]
pub enum Peer {
    /// A TCP connection.
    Tcp(TcpStream),
    /// A UDP socket that takes answers from one address only, as the Linux kernel's does.
    Udp(UdpSocket),
}

impl Peer {
    /// Connects from any port.
    pub fn connect(transport: Transport, server: SocketAddr) -> Result<Self> {
        let any = match server {
            SocketAddr::V4(_) => SocketAddr::from(([0, 0, 0, 0], 0)),
            SocketAddr::V6(_) => SocketAddr::from(([0u16; 8], 0)),
        };
        Self::connect_from(transport, any, server)
    }

    /// Connects over TCP from any port.
    pub fn tcp(server: SocketAddr) -> Result<Self> {
        Self::connect(Transport::Tcp, server)
    }

    /// Connects over UDP from any port.
    pub fn udp(server: SocketAddr) -> Result<Self> {
        Self::connect(Transport::Udp, server)
    }

    /// Connects from an address and port.
    pub fn connect_from(transport: Transport, own: SocketAddr, server: SocketAddr) -> Result<Self> {
        let (kind, protocol) = match transport {
            Transport::Tcp => (Type::STREAM, Protocol::TCP),
            Transport::Udp => (Type::DGRAM, Protocol::UDP),
        };
        let socket = Socket::new(Domain::for_address(server), kind, Some(protocol))?;
        socket.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        socket.set_write_timeout(Some(ANSWER_TIME_MAX))?;
        if transport == Transport::Tcp {
            socket.set_reuse_address(true)?;
            socket.set_tcp_nodelay(true)?;
        }
        socket
            .bind(&own.into())
            .with_context(|| format!("cannot bind {own}"))?;
        socket
            .connect(&server.into())
            .with_context(|| format!("cannot connect to {server}"))?;
        Ok(match transport {
            Transport::Tcp => Self::Tcp(socket.into()),
            Transport::Udp => Self::Udp(socket.into()),
        })
    }

    /// Connects from a port below 1024, which needs root.
    pub fn connect_reserved(transport: Transport, server: SocketAddr) -> Result<Self> {
        let own: IpAddr = match server {
            SocketAddr::V4(_) => [127, 0, 0, 1].into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        };
        Self::connect_reserved_from(transport, own, server)
    }

    /// Connects from an address and a port below 1024, which needs root.
    pub fn connect_reserved_from(
        transport: Transport,
        own: IpAddr,
        server: SocketAddr,
    ) -> Result<Self> {
        let mut last = None;
        for port in (600..1024).rev() {
            match Self::connect_from(transport, SocketAddr::new(own, port), server) {
                Ok(peer) => return Ok(peer),
                Err(error) => last = Some(error),
            }
        }
        bail!("no reserved port is free: {last:?}")
    }

    /// Its own address and port.
    pub fn local_addr(&self) -> Result<SocketAddr> {
        Ok(match self {
            Self::Tcp(stream) => stream.local_addr()?,
            Self::Udp(socket) => socket.local_addr()?,
        })
    }

    /// Changes how long [`Peer::receive`] waits.
    pub fn set_answer_time(&self, limit: Duration) -> Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(Some(limit))?,
            Self::Udp(socket) => socket.set_read_timeout(Some(limit))?,
        }
        Ok(())
    }

    /// Sends a message: one record of one fragment, or one datagram.
    pub fn send(&mut self, message: &[u8]) -> Result<()> {
        match self {
            Self::Tcp(_) => self.send_raw(&rpc::record(message)),
            Self::Udp(_) => self.send_raw(message),
        }
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Tcp(stream) => stream.write_all(bytes)?,
            Self::Udp(socket) => {
                socket.send(bytes)?;
            }
        }
        Ok(())
    }

    /// Says that nothing more will be sent.
    pub fn finish_sending(&self) -> Result<()> {
        if let Self::Tcp(stream) = self {
            stream.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    /// Waits for the next message.
    pub fn receive(&mut self) -> Result<Vec<u8>> {
        match self {
            Self::Tcp(stream) => {
                let mut message = Vec::new();
                loop {
                    let mut mark = [0; 4];
                    stream
                        .read_exact(&mut mark)
                        .context("no answer from the server")?;
                    let mark = u32::from_be_bytes(mark);
                    let len = (mark & !LAST_FRAGMENT) as usize;
                    let start = message.len();
                    ensure!(start + len <= REPLY_BYTES_MAX, "a reply of {len} bytes");
                    message.resize(start + len, 0);
                    stream
                        .read_exact(message.get_mut(start..).unwrap_or_default())
                        .context("half an answer from the server")?;
                    if mark & LAST_FRAGMENT != 0 {
                        return Ok(message);
                    }
                }
            }
            Self::Udp(socket) => {
                let mut message = vec![0; 65_536];
                let len = socket
                    .recv(&mut message)
                    .context("no answer from the server")?;
                message.truncate(len);
                Ok(message)
            }
        }
    }

    /// Whether the server has closed the connection, waiting for that if need be. Whatever it
    /// sends before that is thrown away.
    pub fn is_closed(&mut self) -> Result<bool> {
        let Self::Tcp(stream) = self else {
            return Ok(false);
        };
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(true),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Ok(true);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Makes one call with a transaction id of its own and waits for its answer.
    pub fn exchange(&mut self, header: &Header, args: &[u8]) -> Result<Outcome> {
        self.exchange_as(rpc::next_xid(), header, args)
    }

    /// Makes one call with the given transaction id and waits for its answer.
    pub fn exchange_as(&mut self, xid: u32, header: &Header, args: &[u8]) -> Result<Outcome> {
        self.send(&header.message(xid, args))?;
        let reply = self.receive()?;
        rpc::open_reply(xid, &reply)
    }
}
