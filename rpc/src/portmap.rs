//! The portmapper's messages, version 2 (portmapper) and versions 3 and 4 (rpcbind).
//!
//! Owns: the procedures' numbers, the arguments and results in both directions (we serve them and
//! ask peers for them), network ids and universal addresses. Decides nothing: what is registered
//! is the server's.
//!
//! The RFC gives its strings no maximum. The maxima here hold everything that a network id of
//! this project's transports, a universal address or the path of a local socket can need.
//!
//! Source: RFC 1833 2 and 3, RFC 5665 5.2.3 (universal addresses), RFC 5665 5.1 (network ids).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::xdr::{Decode, Encode, Reader, Writer, XdrError};

/// The portmapper: IPv4 only, ports instead of addresses.
pub const VERSION_2: u32 = 2;
/// The first version of rpcbind.
pub const VERSION_3: u32 = 3;
/// The second version of rpcbind.
pub const VERSION_4: u32 = 4;

/// The longest network id, in bytes.
pub const NETID_BYTES_MAX: usize = 64;
/// The longest universal address, in bytes: a local socket's path has at most 108.
pub const ADDR_BYTES_MAX: usize = 256;
/// The longest name of an owner, in bytes.
pub const OWNER_BYTES_MAX: usize = 256;
/// The longest `netbuf`, in bytes: the size of a `sockaddr_storage`.
pub const NETBUF_BYTES_MAX: usize = 128;

/// The numbers of the procedures; those of version 2 have the prefix `PMAP`, as in the RFC.
pub mod procedure {
    /// Registers a mapping.
    pub const PMAP_SET: u32 = 1;
    /// Removes a program's version, whatever the protocol.
    pub const PMAP_UNSET: u32 = 2;
    /// Asks for a port.
    pub const PMAP_GETPORT: u32 = 3;
    /// Lists all mappings.
    pub const PMAP_DUMP: u32 = 4;
    /// Forwards a call.
    pub const PMAP_CALLIT: u32 = 5;

    /// Registers an address.
    pub const SET: u32 = 1;
    /// Removes an address.
    pub const UNSET: u32 = 2;
    /// Asks for an address, of another version if need be.
    pub const GETADDR: u32 = 3;
    /// Lists all addresses.
    pub const DUMP: u32 = 4;
    /// Forwards a call (CALLIT in version 3, BCAST in version 4).
    pub const BCAST: u32 = 5;
    /// Asks for the time in seconds since 1970.
    pub const GETTIME: u32 = 6;
    /// Turns a universal address into a local one.
    pub const UADDR2TADDR: u32 = 7;
    /// Turns a local address into a universal one.
    pub const TADDR2UADDR: u32 = 8;
    /// Asks for the address of exactly this version (version 4).
    pub const GETVERSADDR: u32 = 9;
    /// Forwards a call and reports errors (version 4).
    pub const INDIRECT: u32 = 10;
    /// Asks for the addresses on all transports (version 4).
    pub const GETADDRLIST: u32 = 11;
    /// Asks for the statistics (version 4).
    pub const GETSTAT: u32 = 12;
}

/// A transport protocol; version 2 of the portmapper sends it as its number in IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP, number 6.
    Tcp,
    /// UDP, number 17.
    Udp,
}

impl Protocol {
    /// The protocol's number in IP.
    pub const fn number(self) -> u32 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// The protocol with this number in IP.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }
}

/// The network ids that this project serves: a protocol over a family of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Netid {
    /// TCP over IPv4.
    Tcp,
    /// UDP over IPv4.
    Udp,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over IPv6.
    Udp6,
}

impl Netid {
    /// All network ids.
    pub const ALL: [Self; 4] = [Self::Tcp, Self::Udp, Self::Tcp6, Self::Udp6];

    /// The network id of `protocol` over IPv6 or IPv4.
    pub const fn new(protocol: Protocol, ipv6: bool) -> Self {
        match (protocol, ipv6) {
            (Protocol::Tcp, false) => Self::Tcp,
            (Protocol::Udp, false) => Self::Udp,
            (Protocol::Tcp, true) => Self::Tcp6,
            (Protocol::Udp, true) => Self::Udp6,
        }
    }

    /// The name, as it stands in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Tcp6 => "tcp6",
            Self::Udp6 => "udp6",
        }
    }

    /// The network id with this name.
    pub fn from_name(name: &[u8]) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|netid| netid.name().as_bytes() == name)
    }

    /// The protocol.
    pub const fn protocol(self) -> Protocol {
        match self {
            Self::Tcp | Self::Tcp6 => Protocol::Tcp,
            Self::Udp | Self::Udp6 => Protocol::Udp,
        }
    }

    /// Whether addresses are those of IPv6.
    pub const fn is_ipv6(self) -> bool {
        matches!(self, Self::Tcp6 | Self::Udp6)
    }

    /// The address that stands for every address of the family.
    pub const fn unspecified(self) -> IpAddr {
        if self.is_ipv6() {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        } else {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        }
    }
}

/// Writes a universal address: the address as text, then the port's two bytes in decimal.
pub fn universal_address(address: SocketAddr) -> String {
    let [high, low] = address.port().to_be_bytes();
    format!("{}.{high}.{low}", address.ip())
}

/// Reads a universal address, or `None` if it is not one of IPv4 or IPv6.
pub fn parse_universal_address(text: &[u8]) -> Option<SocketAddr> {
    let text = std::str::from_utf8(text).ok()?;
    let (rest, low) = text.rsplit_once('.')?;
    let (host, high) = rest.rsplit_once('.')?;
    let port = u16::from_be_bytes([decimal_byte(high)?, decimal_byte(low)?]);
    Some(SocketAddr::new(host.parse().ok()?, port))
}

/// Reads a number from 0 to 255 without the sign that `parse` would take.
fn decimal_byte(text: &str) -> Option<u8> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().ok()
    } else {
        None
    }
}

/// `mapping` of version 2: argument of SET, UNSET and GETPORT, element of DUMP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The program's number.
    pub program: u32,
    /// The program's version.
    pub version: u32,
    /// The protocol's number in IP; see [`Protocol::from_number`].
    pub protocol: u32,
    /// The port; 0 in the argument of GETPORT and UNSET.
    pub port: u32,
}

impl Decode<'_> for Mapping {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            program: reader.u32()?,
            version: reader.u32()?,
            protocol: reader.u32()?,
            port: reader.u32()?,
        })
    }
}

impl Encode for Mapping {
    fn encode(&self, writer: &mut Writer<'_>) {
        for value in [self.program, self.version, self.protocol, self.port] {
            writer.u32(value);
        }
    }
}

/// `rpcb` of versions 3 and 4: argument of SET, UNSET and GETADDR, element of DUMP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rpcb<'a> {
    /// The program's number.
    pub program: u32,
    /// The program's version.
    pub version: u32,
    /// The network id; empty in UNSET for all of them.
    pub netid: &'a [u8],
    /// The universal address; in GETADDR empty or the asker's idea of the server's address.
    pub addr: &'a [u8],
    /// Who registered it; rpcbind decides that by itself.
    pub owner: &'a [u8],
}

impl<'a> Decode<'a> for Rpcb<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            program: reader.u32()?,
            version: reader.u32()?,
            netid: reader.opaque(NETID_BYTES_MAX)?,
            addr: reader.opaque(ADDR_BYTES_MAX)?,
            owner: reader.opaque(OWNER_BYTES_MAX)?,
        })
    }
}

impl Encode for Rpcb<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.u32(self.program);
        writer.u32(self.version);
        writer.opaque(self.netid);
        writer.opaque(self.addr);
        writer.opaque(self.owner);
    }
}

/// `rpcb_entry` of version 4: element of GETADDRLIST's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RpcbEntry<'a> {
    /// The universal address, with the interface that the asker can reach.
    pub maddr: &'a [u8],
    /// The network id.
    pub netid: &'a [u8],
    /// The kind of transport: [`RpcbEntry::CLTS`] or [`RpcbEntry::COTS_ORD`].
    pub semantics: u32,
    /// The family of protocols: `inet` or `inet6`.
    pub protofmly: &'a [u8],
    /// The protocol: `tcp` or `udp`.
    pub proto: &'a [u8],
}

impl<'a> RpcbEntry<'a> {
    /// Connectionless.
    pub const CLTS: u32 = 1;
    /// Connection-oriented with orderly release.
    pub const COTS_ORD: u32 = 3;

    /// Describes `maddr` on the transport `netid`.
    pub const fn new(netid: Netid, maddr: &'a [u8]) -> Self {
        let (semantics, proto) = match netid.protocol() {
            Protocol::Tcp => (Self::COTS_ORD, "tcp"),
            Protocol::Udp => (Self::CLTS, "udp"),
        };
        let protofmly = if netid.is_ipv6() { "inet6" } else { "inet" };
        Self {
            maddr,
            netid: netid.name().as_bytes(),
            semantics,
            protofmly: protofmly.as_bytes(),
            proto: proto.as_bytes(),
        }
    }
}

impl<'a> Decode<'a> for RpcbEntry<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            maddr: reader.opaque(ADDR_BYTES_MAX)?,
            netid: reader.opaque(NETID_BYTES_MAX)?,
            semantics: reader.u32()?,
            protofmly: reader.opaque(NETID_BYTES_MAX)?,
            proto: reader.opaque(NETID_BYTES_MAX)?,
        })
    }
}

impl Encode for RpcbEntry<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.maddr);
        writer.opaque(self.netid);
        writer.u32(self.semantics);
        writer.opaque(self.protofmly);
        writer.opaque(self.proto);
    }
}

/// The linked list that DUMP and GETADDRLIST answer with.
///
/// Decoding holds one element for each that has arrived whole, so the message bounds the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List<T>(pub Vec<T>);

impl<'a, T: Decode<'a>> Decode<'a> for List<T> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        let mut items = Vec::new();
        while let Some(item) = reader.optional()? {
            items.push(item);
        }
        Ok(Self(items))
    }
}

impl<T: Encode> Encode for List<T> {
    fn encode(&self, writer: &mut Writer<'_>) {
        for item in &self.0 {
            writer.optional(Some(item));
        }
        writer.bool(false);
    }
}

/// A string that is the whole result of GETADDR, GETVERSADDR or TADDR2UADDR, and the argument of
/// UADDR2TADDR; empty for "not registered".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uaddr<'a>(pub &'a [u8]);

impl<'a> Decode<'a> for Uaddr<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        reader.opaque(ADDR_BYTES_MAX).map(Self)
    }
}

impl Encode for Uaddr<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.0);
    }
}

/// `netbuf`: a `sockaddr` in the byte order of the machine that serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Netbuf<'a> {
    /// The size of the buffer that the bytes lie in.
    pub maxlen: u32,
    /// The bytes.
    pub buf: &'a [u8],
}

impl<'a> Decode<'a> for Netbuf<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            maxlen: reader.u32()?,
            buf: reader.opaque(NETBUF_BYTES_MAX)?,
        })
    }
}

impl Encode for Netbuf<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.u32(self.maxlen);
        writer.opaque(self.buf);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
