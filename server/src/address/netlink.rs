//! What the kernel is asked for over netlink: links, addresses, rules that drop packets.
//!
//! One request, one answer; nothing is remembered, so that whatever an operator does by hand
//! meanwhile is no surprise. A request takes some ten microseconds unless somebody else holds the
//! kernel's lock of its network configuration.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressScope, CacheInfo,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::config::floating::FloatingAddress;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    /// The kernel's number of it.
    pub(super) index: u32,
    /// Its hardware address; empty if it has none.
    pub(super) hardware: Vec<u8>,
    /// Whether it is up, and its cable too.
    pub(super) is_up: bool,
}

/// Looks an interface up.
///
/// # Errors
/// ENODEV: there is none of this name.
pub(super) fn link(name: &str) -> io::Result<Link> {
    let mut message = LinkMessage::default();
    let wanted = LinkAttribute::IfName(name.to_owned());
    message.attributes.push(wanted);
    let request = RouteNetlinkMessage::GetLink(message);
    let answers = ask(request, NLM_F_REQUEST | NLM_F_ACK)?;
    let found = answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    });
    let found = found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
    let hardware = found
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(address) => Some(address.clone()),
            _ => None,
        });
    Ok(Link {
        index: found.header.index,
        hardware: hardware.unwrap_or_default(),
        is_up: found
            .header
            .flags
            .contains(LinkFlags::Up | LinkFlags::LowerUp),
    })
}

/// Gives an address to an interface, or prolongs it; the kernel takes it away after so many
/// seconds.
pub(super) fn set_address(index: u32, address: FloatingAddress, seconds: u32) -> io::Result<()> {
    let mut message = address_message(index, address);
    // Not preferred: nothing else of this machine is to take it as its own source address.
    let mut lifetime = CacheInfo::default();
    lifetime.ifa_valid = seconds;
    let mut flags = AddressFlags::Noprefixroute;
    if address.ip.is_ipv6() {
        // The old node may still have it: that is no reason to wait, nor to give up.
        flags |= AddressFlags::Nodad;
    } else {
        // With the first address of a network its route comes along, as everybody expects.
        flags.remove(AddressFlags::Noprefixroute);
    }
    message.attributes.extend([
        AddressAttribute::CacheInfo(lifetime),
        AddressAttribute::Flags(flags),
    ]);
    let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    let request = RouteNetlinkMessage::NewAddress(message);
    ask(request, flags).map(drop)
}

/// Takes an address away; fine if it is not there.
pub(super) fn remove_address(index: u32, address: FloatingAddress) -> io::Result<()> {
    let request = RouteNetlinkMessage::DelAddress(address_message(index, address));
    let removed = ask(request, NLM_F_REQUEST | NLM_F_ACK);
    ignore(removed.map(drop), &[libc::EADDRNOTAVAIL, libc::ENODEV])
}

fn address_message(index: u32, address: FloatingAddress) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip);
    message.header.prefix_len = address.prefix;
    message.header.scope = AddressScope::Universe;
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(address.ip),
        AddressAttribute::Address(address.ip),
    ];
    message
}

/// Forgets the neighbours on an interface that have not said yet where they are, and with them the
/// packets that wait for that: else they leave when the cable is put in again, whatever has become
/// of the address and the connections that they come from.
pub(super) fn forget_waiting_packets(index: u32, ip: IpAddr) -> io::Result<()> {
    let mut all = NeighbourMessage::default();
    all.header.family = family(ip);
    let request = RouteNetlinkMessage::GetNeighbour(all);
    for answer in ask(request, NLM_F_REQUEST | NLM_F_DUMP)? {
        let RouteNetlinkMessage::NewNeighbour(mut neighbour) = answer else {
            continue;
        };
        let header = &neighbour.header;
        if header.ifindex != index || header.state != NeighbourState::Incomplete {
            continue;
        }
        let is_key = |one: &NeighbourAttribute| matches!(one, NeighbourAttribute::Destination(_));
        neighbour.attributes.retain(is_key);
        let request = RouteNetlinkMessage::DelNeighbour(neighbour);
        let removed = ask(request, NLM_F_REQUEST | NLM_F_ACK);
        ignore(removed.map(drop), &[libc::ENOENT])?;
    }
    Ok(())
}

/// Drops whatever leaves this machine with this source address, until [`unblock`].
pub(super) fn block(ip: IpAddr) -> io::Result<()> {
    let request = RouteNetlinkMessage::NewRule(rule_message(ip));
    let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let added = ask(request, flags);
    ignore(added.map(drop), &[libc::EEXIST])
}

/// Ends [`block`]; fine if nothing is blocked.
pub(super) fn unblock(ip: IpAddr) -> io::Result<()> {
    let request = RouteNetlinkMessage::DelRule(rule_message(ip));
    let removed = ask(request, NLM_F_REQUEST | NLM_F_ACK);
    ignore(removed.map(drop), &[libc::ENOENT])
}

fn rule_message(ip: IpAddr) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(ip);
    message.header.src_len = if ip.is_ipv4() { 32 } else { 128 };
    message.header.action = RuleAction::Blackhole;
    message.attributes = vec![
        RuleAttribute::Source(ip),
        RuleAttribute::Priority(RULE_PRIORITY),
    ];
    message
}

const fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// What somebody else did already is done.
fn ignore(result: io::Result<()>, codes: &[i32]) -> io::Result<()> {
    match result {
        Err(error)
            if error
                .raw_os_error()
                .is_some_and(|code| codes.contains(&code)) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// Asks for changes and looks of the network's configuration.
fn ask(request: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
    Netlink::open(NETLINK_ROUTE)?.exchange(request, flags)
}

/// A way to the kernel.
pub(super) struct Netlink(Socket);

impl Netlink {
    /// Opens one for a protocol of netlink.
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Sends one request and returns what comes back until the kernel says that this is all.
    pub(super) fn exchange<Q, A>(&mut self, request: Q, flags: u16) -> io::Result<Vec<A>>
    where
        Q: NetlinkSerializable,
        NetlinkPayload<Q>: From<Q>,
        A: NetlinkDeserializable,
    {
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), request.into());
        message.header.flags = flags;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (received, _) = self.0.recv_from_full()?;
            let mut rest = received.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<A>::deserialize(rest).map_err(io::Error::other)?;
                let length = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    // An acknowledgement, or the end of a list.
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(answers),
                    _ => {}
                }
            }
        }
    }
}

/// Behind the rule for addresses of this machine, and before all others.
const RULE_PRIORITY: u32 = 1;
