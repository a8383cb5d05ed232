//! Destroys the TCP connections of an address in the kernel, whoever has them: this process, or
//! one that was killed and whose last words are still under way.
//!
//! A connection that is left over answers for its pair of addresses and ports when the address
//! comes back, and so keeps the client from connecting anew. To destroy one sends a reset, which
//! the caller must keep from leaving the machine ([`netlink::block`](super::netlink::block)).

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, TCP_TIME_WAIT};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::netlink::Netlink;

/// Destroys all connections that have this local address, and returns how many there were.
/// Listening sockets stay. Whatever fails, the others are destroyed.
///
/// # Errors
/// EOPNOTSUPP: the kernel can't (CONFIG_INET_DIAG_DESTROY).
pub(super) fn destroy(kernel: &mut Netlink, ip: IpAddr) -> io::Result<usize> {
    let mut destroyed = Ok(0);
    for (state, id) in connections(kernel, ip)? {
        let message = SockDiagDestroy::new(request(id, StateFlags::all()));
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        match kernel.exchange::<_, SockDiagMessage>(message, flags) {
            Ok(_) => destroyed = destroyed.map(|count| count + 1),
            // It has gone by itself.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            // Older kernels leave these to their time; they answer, but begin nothing.
            Err(_) if state == TCP_TIME_WAIT => {}
            Err(error) => destroyed = destroyed.and(Err(error)),
        }
    }
    destroyed
}

/// A way to the kernel for it.
pub(super) fn open() -> io::Result<Netlink> {
    Netlink::open(NETLINK_SOCK_DIAG)
}

fn connections(kernel: &mut Netlink, ip: IpAddr) -> io::Result<Vec<(u8, SocketId)>> {
    let any = if ip.is_ipv4() {
        SocketId::new_v4()
    } else {
        SocketId::new_v6()
    };
    let all = request(any, !StateFlags::LISTEN);
    let answers = kernel.exchange(all, NLM_F_REQUEST | NLM_F_DUMP)?;
    let found = answers.into_iter().filter_map(|answer| match answer {
        SockDiagMessage::InetResponse(response) => {
            let header = response.header;
            Some((header.state, header.socket_id))
        }
        _ => None,
    });
    Ok(found.filter(|(_, id)| id.source_address == ip).collect())
}

fn request(socket_id: SocketId, states: StateFlags) -> SockDiagMessage {
    SockDiagMessage::InetRequest(InetRequest {
        family: if socket_id.source_address.is_ipv4() {
            AF_INET
        } else {
            AF_INET6
        },
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states,
        socket_id,
    })
}
