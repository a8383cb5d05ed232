//! What the kernel is asked for over netlink: links, addresses, rules that drop packets.
//!
//! One request, one answer; nothing is remembered, so that whatever an operator does by hand
//! meanwhile is no surprise. The sockets stay open, so that a process without free descriptors can
//! still withdraw an address. A request takes some ten microseconds unless somebody else holds the
//! kernel's lock of its network configuration.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope, CacheInfo,
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

impl Netlink {
    /// Looks an interface up.
    ///
    /// # Errors
    /// ENODEV: there is none of this name.
    pub(super) fn link(&mut self, name: &str) -> io::Result<Link> {
        let mut message = LinkMessage::default();
        let wanted = LinkAttribute::IfName(name.to_owned());
        message.attributes.push(wanted);
        let request = RouteNetlinkMessage::GetLink(message);
        let answers = self.exchange(request, NLM_F_REQUEST | NLM_F_ACK)?;
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
        let flags = found.header.flags;
        Ok(Link {
            index: found.header.index,
            hardware: hardware.unwrap_or_default(),
            is_up: flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
        })
    }

    /// Gives an address to an interface, or prolongs it; the kernel takes it away after so many
    /// seconds. The route of its network comes along, as everybody expects.
    pub(super) fn set_address(
        &mut self,
        index: u32,
        address: FloatingAddress,
        seconds: u32,
    ) -> io::Result<()> {
        let mut message = address_message(index, address);
        // Not preferred: nothing else of this machine is to take it as its own source address.
        let mut lifetime = CacheInfo::default();
        lifetime.ifa_valid = seconds;
        // The old node may still have it: that is no reason to wait, nor to give up.
        let flags = AddressFlags::Nodad;
        message.attributes.extend([
            AddressAttribute::CacheInfo(lifetime),
            AddressAttribute::Flags(flags),
        ]);
        let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let request = RouteNetlinkMessage::NewAddress(message);
        self.change(request, flags)
    }

    /// Takes an address away from wherever this machine has it.
    pub(super) fn remove_address(&mut self, ip: IpAddr) -> io::Result<()> {
        for there in self.addresses(ip)? {
            let mut message = there.message;
            // Of no use in a request to remove it.
            message.attributes.retain(|attribute| {
                matches!(
                    attribute,
                    AddressAttribute::Local(_) | AddressAttribute::Address(_)
                )
            });
            let request = RouteNetlinkMessage::DelAddress(message);
            let removed = self.change(request, NLM_F_REQUEST | NLM_F_ACK);
            ignore(removed, &[libc::EADDRNOTAVAIL, libc::ENODEV])?;
        }
        Ok(())
    }

    /// Whether this machine has an address that this program has not put there: its own are never
    /// preferred.
    pub(super) fn is_foreign(&mut self, ip: IpAddr) -> io::Result<bool> {
        let there = self.addresses(ip)?;
        Ok(there.iter().any(|there| !there.is_deprecated))
    }

    fn addresses(&mut self, ip: IpAddr) -> io::Result<Vec<There>> {
        let mut message = AddressMessage::default();
        message.header.family = family(ip);
        let request = RouteNetlinkMessage::GetAddress(message);
        let answers = self.exchange(request, NLM_F_REQUEST | NLM_F_DUMP)?;
        let there = answers.into_iter().filter_map(|answer| {
            let RouteNetlinkMessage::NewAddress(message) = answer else {
                return None;
            };
            // IPv6 has no local address beside the address, but for tunnels.
            let is_it = message.attributes.iter().any(|attribute| match attribute {
                AddressAttribute::Local(local) => *local == ip,
                AddressAttribute::Address(address) => ip.is_ipv6() && *address == ip,
                _ => false,
            });
            let flags = message.header.flags;
            is_it.then_some(There {
                is_deprecated: flags.contains(AddressHeaderFlags::Deprecated),
                message,
            })
        });
        Ok(there.collect())
    }

    /// Forgets the neighbours on an interface that have not said yet where they are, and with them
    /// the packets that wait for that: else they leave when the cable is put in again, whatever has
    /// become of the address and the connections that they come from.
    pub(super) fn forget_waiting_packets(&mut self, index: u32, ip: IpAddr) -> io::Result<()> {
        let mut all = NeighbourMessage::default();
        all.header.family = family(ip);
        let request = RouteNetlinkMessage::GetNeighbour(all);
        let answers = self.exchange(request, NLM_F_REQUEST | NLM_F_DUMP)?;
        for answer in answers {
            let RouteNetlinkMessage::NewNeighbour(mut neighbour) = answer else {
                continue;
            };
            let header = &neighbour.header;
            if header.ifindex != index || header.state != NeighbourState::Incomplete {
                continue;
            }
            let is_key =
                |one: &NeighbourAttribute| matches!(one, NeighbourAttribute::Destination(_));
            neighbour.attributes.retain(is_key);
            let request = RouteNetlinkMessage::DelNeighbour(neighbour);
            let removed = self.change(request, NLM_F_REQUEST | NLM_F_ACK);
            ignore(removed, &[libc::ENOENT])?;
        }
        Ok(())
    }

    /// Drops whatever leaves this machine with this source address, until [`Netlink::unblock`].
    pub(super) fn block(&mut self, ip: IpAddr) -> io::Result<()> {
        let request = RouteNetlinkMessage::NewRule(rule_message(ip));
        let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let added = self.change(request, flags);
        ignore(added, &[libc::EEXIST])
    }

    /// Ends [`Netlink::block`]; fine if nothing is blocked.
    pub(super) fn unblock(&mut self, ip: IpAddr) -> io::Result<()> {
        let request = RouteNetlinkMessage::DelRule(rule_message(ip));
        let removed = self.change(request, NLM_F_REQUEST | NLM_F_ACK);
        ignore(removed, &[libc::ENOENT])
    }

    fn change(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange::<_, RouteNetlinkMessage>(request, flags)
            .map(drop)
    }
}

/// An address that this machine has.
struct There {
    message: AddressMessage,
    is_deprecated: bool,
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

/// A way to the kernel.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    /// Of the last request: what answers an earlier one, which was given up, is passed over.
    sequence: u32,
}

impl Netlink {
    /// Opens one for the configuration of the network.
    pub(super) fn route() -> io::Result<Self> {
        Self::open(NETLINK_ROUTE)
    }

    /// Opens one for a protocol of netlink.
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends one request and returns what comes back until the kernel says that this is all.
    pub(super) fn exchange<Q, A>(&mut self, request: Q, flags: u16) -> io::Result<Vec<A>>
    where
        Q: NetlinkSerializable,
        NetlinkPayload<Q>: From<Q>,
        A: NetlinkDeserializable,
    {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), request.into());
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (received, _) = self.socket.recv_from_full()?;
            let mut rest = received.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<A>::deserialize(rest).map_err(io::Error::other)?;
                let length = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
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
