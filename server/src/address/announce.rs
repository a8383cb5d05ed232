//! Tells the neighbours where an address is now: gratuitous ARP (RFC 826, RFC 5227 3), unsolicited
//! neighbour advertisements (RFC 4861 7.2.6).
//!
//! ARP in both forms, request and reply, since some switches and hosts drop one of them; and some
//! times, since nobody acknowledges it. Without it clients send to the old node until their own
//! entries expire, for minutes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::netlink::Link;
use crate::backend::sys;

/// When an address is announced, counted from when it is there.
pub(super) const SCHEDULE: [Duration; 7] = [
    Duration::ZERO,
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
];

/// Announces an address once; `frames` is a socket for frames. An interface without hardware
/// addresses has no neighbours to tell.
pub(super) fn announce(frames: BorrowedFd<'_>, link: &Link, ip: IpAddr) -> io::Result<()> {
    let Ok(hardware) = <[u8; 6]>::try_from(link.hardware.as_slice()) else {
        return Ok(());
    };
    match ip {
        IpAddr::V4(ip) => {
            for frame in [REQUEST, REPLY].map(|operation| arp(operation, hardware, ip)) {
                sys::send_frame(frames, link.index, &frame)?;
            }
            Ok(())
        }
        IpAddr::V6(ip) => advertise(link.index, hardware, ip),
    }
}

/// An Ethernet frame with an ARP packet in which sender and target are the same address.
fn arp(operation: u16, hardware: [u8; 6], ip: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend([0xff; 6]);
    frame.extend(hardware);
    frame.extend(0x0806_u16.to_be_bytes());
    frame.extend(1_u16.to_be_bytes()); // Ethernet
    frame.extend(0x0800_u16.to_be_bytes()); // IPv4
    frame.extend([6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(hardware);
    frame.extend(ip.octets());
    frame.extend([0xff; 6]);
    frame.extend(ip.octets());
    frame
}

fn advertise(index: u32, hardware: [u8; 6], ip: Ipv6Addr) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    socket.set_multicast_hops_v6(255)?;
    socket.set_multicast_if_v6(index)?;
    socket.bind(&SocketAddr::from((ip, 0)).into())?;
    // The kernel fills in the checksum.
    let all_nodes = SocketAddrV6::new(ALL_NODES, 0, 0, index);
    socket.send_to(
        &advertisement(hardware, ip),
        &SocketAddr::V6(all_nodes).into(),
    )?;
    Ok(())
}

/// A neighbour advertisement that overrides what a neighbour knew.
fn advertisement(hardware: [u8; 6], ip: Ipv6Addr) -> Vec<u8> {
    let mut message = Vec::with_capacity(32);
    message.extend([136, 0, 0, 0]);
    message.extend(0x2000_0000_u32.to_be_bytes()); // override
    message.extend(ip.octets());
    message.extend([2, 1]); // target link-layer address, in units of 8 bytes
    message.extend(hardware);
    message
}

const REQUEST: u16 = 1;
const REPLY: u16 = 2;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

#[cfg(test)]
mod tests {
    use super::*;

    const HARDWARE: [u8; 6] = [2, 0, 0, 0, 0, 7];

    #[test]
    fn a_gratuitous_arp_names_the_address_twice() {
        let frame = arp(REPLY, HARDWARE, Ipv4Addr::new(192, 0, 2, 100));
        let expected = [
            &[0xff; 6][..],
            &HARDWARE,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2],
            &HARDWARE,
            &[192, 0, 2, 100],
            &[0xff; 6],
            &[192, 0, 2, 100],
        ];
        assert_eq!(frame, expected.concat());
    }

    #[test]
    fn an_advertisement_overrides() {
        let ip = Ipv6Addr::LOCALHOST;
        let message = advertisement(HARDWARE, ip);
        assert_eq!(message.len(), 32);
        assert_eq!(message[..8], [136, 0, 0, 0, 0x20, 0, 0, 0]);
        assert_eq!(message[8..24], ip.octets());
        assert_eq!(message[24..], [2, 1, 2, 0, 0, 0, 0, 7]);
    }
}
