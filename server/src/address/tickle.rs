//! Wakes clients whose connections ended with the last active node.
//!
//! Such a client waits for the answer to a segment that nobody has, for as long as it has waited
//! before (its timeout doubles), or sits there idle. So for each connection that the last active
//! node had, an ACK with wrong numbers is sent in its name: the client answers with its own numbers
//! (RFC 9293 3.10.7.4), the kernel here knows no such connection and resets it (3.5.2), and the
//! client connects anew at once. CTDB was the first to do it.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

use crate::cluster::connections::Connection;

/// Sends one ACK for each connection of an address; best effort.
pub(super) fn tickle(ip: IpAddr, connections: &[Connection]) -> io::Result<()> {
    let domain = if ip.is_ipv4() {
        Domain::IPV4
    } else {
        Domain::IPV6
    };
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::TCP))?;
    // Every segment that this machine receives would be put there.
    socket.set_recv_buffer_size(0)?;
    socket.bind(&SocketAddr::new(ip, 0).into())?;
    let mut failed = Ok(());
    for connection in connections.iter().filter(|one| one.local().ip() == ip) {
        let (own, client) = (connection.local(), connection.peer());
        // A raw socket has no ports, and IPv6 refuses one.
        let to = SocketAddr::new(client.ip(), 0);
        if let Err(error) = socket.send_to(&segment(own, client), &to.into()) {
            failed = Err(error);
        }
    }
    failed
}

/// A TCP header of an ACK that is out of any window.
fn segment(own: SocketAddr, client: SocketAddr) -> [u8; 20] {
    let mut segment = [0; 20];
    segment[..2].copy_from_slice(&own.port().to_be_bytes());
    segment[2..4].copy_from_slice(&client.port().to_be_bytes());
    segment[12] = 5 << 4;
    segment[13] = ACK;
    segment[14..16].copy_from_slice(&1024_u16.to_be_bytes());
    let sum = checksum(own.ip(), client.ip(), &segment);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

/// The checksum of RFC 9293 3.1, with its pseudo header.
fn checksum(own: IpAddr, client: IpAddr, segment: &[u8]) -> u16 {
    let mut bytes = Vec::with_capacity(64);
    for ip in [own, client] {
        match ip {
            IpAddr::V4(ip) => bytes.extend(ip.octets()),
            IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
    }
    // Protocol and length; for IPv6 both are longer, which adds nothing to the sum.
    bytes.extend([0, 6]);
    bytes.extend((segment.len() as u16).to_be_bytes());
    bytes.extend(segment);
    let words = bytes.chunks(2).map(|word| match *word {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

const ACK: u8 = 0x10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_right() {
        for [own, client] in [
            ["192.0.2.100:2049", "192.0.2.11:876"],
            ["[2001:db8::100]:2049", "[2001:db8::11]:876"],
        ] {
            let own: SocketAddr = own.parse().expect("an address");
            let client: SocketAddr = client.parse().expect("an address");
            let segment = segment(own, client);
            assert_eq!(segment[..4], [8, 1, 3, 108]);
            // A sum over what has its sum in it is all ones.
            assert_eq!(checksum(own.ip(), client.ip(), &segment), 0);
        }
    }
}
