//! Binding ports: IPv4 and IPv6 side by side, TCP and UDP on the same number.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

/// A port that can't be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {transport} {address} for {purpose}: {source}")]
pub struct ListenError {
    /// What the port is for.
    pub purpose: &'static str,
    /// TCP or UDP.
    pub transport: &'static str,
    /// The address.
    pub address: SocketAddr,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// The sockets of one port.
#[derive(Debug, Default)]
pub struct Bound {
    /// Listening TCP sockets, one per address.
    pub tcp: Vec<TcpListener>,
    /// UDP sockets, one per address.
    pub udp: Vec<UdpSocket>,
    /// The port: the asked one, or the one that the kernel chose for 0.
    pub port: u16,
}

/// Where to listen.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The addresses; none means all of IPv4 and, where the kernel has it, all of IPv6.
    pub addresses: &'a [IpAddr],
    /// The port; with 0 the kernel chooses one, the same for all addresses.
    pub port: u16,
    /// Whether the addresses may come to this machine later: then the listeners stand already.
    pub is_early: bool,
}

/// Binds a port on every address, over TCP and, if asked, UDP.
pub fn bind(purpose: &'static str, place: Place<'_>, udp: bool) -> Result<Bound, ListenError> {
    let Place {
        addresses,
        port,
        is_early,
    } = place;
    let every = [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ];
    let wildcard = addresses.is_empty();
    let addresses = if wildcard { &every[..] } else { addresses };
    let mut bound = Bound {
        port,
        ..Bound::default()
    };
    for ip in addresses {
        let mut address = SocketAddr::new(*ip, bound.port);
        let fail = |transport, address, source| ListenError {
            purpose,
            transport,
            address,
            source,
        };
        let listener = match tcp(address, is_early) {
            Ok(listener) => listener,
            // A kernel without IPv6: IPv4 alone is right.
            Err(error) if wildcard && ip.is_ipv6() && no_such_family(&error) => continue,
            Err(error) => return Err(fail("TCP", address, error)),
        };
        let local = listener
            .local_addr()
            .map_err(|error| fail("TCP", address, error))?;
        bound.port = local.port();
        address.set_port(bound.port);
        bound.tcp.push(listener);
        if udp {
            bound
                .udp
                .push(datagram(address, is_early).map_err(|error| fail("UDP", address, error))?);
        }
    }
    Ok(bound)
}

fn no_such_family(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
    )
}

fn tcp(address: SocketAddr, is_early: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    // A restarted server must not wait for the old connections to be forgotten.
    socket.set_reuse_address(true)?;
    prepare(&socket, address, is_early)?;
    socket.listen(1024)?;
    Ok(socket.into())
}

fn datagram(address: SocketAddr, is_early: bool) -> io::Result<UdpSocket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    prepare(&socket, address, is_early)?;
    Ok(socket.into())
}

fn prepare(socket: &Socket, address: SocketAddr, is_early: bool) -> io::Result<()> {
    if is_early {
        bind_early(socket, address.ip())?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())
}

/// Lets a socket be bound to an address that is not here yet.
pub fn bind_early(socket: &Socket, ip: IpAddr) -> io::Result<()> {
    if ip.is_ipv4() {
        socket.set_freebind_v4(true)
    } else {
        socket.set_freebind_v6(true)
    }
}
