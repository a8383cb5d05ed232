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

/// Binds `port` on every address; none given means all of IPv4 and, where the kernel has it, all
/// of IPv6. With port 0 the kernel chooses one, the same for all.
pub fn bind(
    purpose: &'static str,
    addresses: &[IpAddr],
    port: u16,
    udp: bool,
) -> Result<Bound, ListenError> {
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
        let listener = match tcp(address) {
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
                .push(datagram(address).map_err(|error| fail("UDP", address, error))?);
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

fn tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    // A restarted server must not wait for the old connections to be forgotten.
    socket.set_reuse_address(true)?;
    prepare(&socket, address)?;
    socket.listen(1024)?;
    Ok(socket.into())
}

fn datagram(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    prepare(&socket, address)?;
    Ok(socket.into())
}

fn prepare(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())
}
