//! The embedded portmapper: versions 2, 3 and 4 of program 100000.
//!
//! Owns the answers from the table of registered ports ([`PortTable`]). Does not bind port 111 and
//! does not speak to an rpcbind of the machine; `register` does.
//!
//! What differs from a common rpcbind, and why: calls are never forwarded (CALLIT, BCAST and
//! INDIRECT launder source addresses and amplify); SET and UNSET come only from this machine's
//! loopback and a reserved port; GETADDR answers for the network id that was asked for, where
//! rpcbind takes that of the transport, since FreeBSD asks for `tcp` over UDP.
//!
//! Invariants: nothing here waits; a list sent over UDP stays below [`UDP_LIST_BYTES_MAX`]; no
//! answer to a lookup holds an unspecified address.
//!
//! Source: RFC 1833 2 and 3; for the choice among versions, rpcbind's behaviour.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use havenfs_rpc::portmap::{
    self, Mapping, NETBUF_BYTES_MAX, Netbuf, Netid, Protocol, Rpcb, RpcbEntry, Uaddr, procedure,
};
use havenfs_rpc::xdr::{Writer, decode_all};

use self::table::Statistics;
pub use self::table::{ENTRIES_MAX, Owner, PortEntry, PortTable};
use super::write_list;
use crate::call::{Origin, Refusal, Request, Transport};

mod table;

/// Carries out one procedure; never waits.
///
/// # Errors
/// [`Refusal::Silence`] for calls that ask to be forwarded, which the RFC wants unanswered when
/// they fail.
pub fn serve(
    table: &PortTable,
    request: &Request<'_>,
    writer: &mut Writer<'_>,
) -> Result<(), Refusal> {
    table.count(request.version, request.procedure);
    if request.version == portmap::VERSION_2 {
        serve_portmapper(table, request, writer)
    } else {
        serve_rpcbind(table, request, writer)
    }
}

fn serve_portmapper(
    table: &PortTable,
    request: &Request<'_>,
    writer: &mut Writer<'_>,
) -> Result<(), Refusal> {
    match request.procedure {
        procedure::PMAP_SET => {
            let mapping: Mapping = decode_all(request.args)?;
            let done = may_change(request.origin) && pmap_set(table, mapping);
            table.count_set(request.version, done);
            writer.bool(done);
        }
        procedure::PMAP_UNSET => {
            let mapping: Mapping = decode_all(request.args)?;
            // Version 2 knows IPv4 only, and its UNSET means both protocols.
            let done = may_change(request.origin)
                && table.unset(mapping.program, mapping.version, |netid| !netid.is_ipv6());
            table.count_unset(request.version, done);
            writer.bool(done);
        }
        procedure::PMAP_GETPORT => {
            let mapping: Mapping = decode_all(request.args)?;
            writer.u32(pmap_getport(table, mapping, request.origin).into());
        }
        procedure::PMAP_DUMP => {
            decode_all::<()>(request.args)?;
            let mappings = table
                .entries()
                .into_iter()
                .filter(|entry| !entry.netid.is_ipv6());
            write_list(
                request.origin,
                writer,
                mappings.map(|entry| Mapping {
                    program: entry.program,
                    version: entry.version,
                    protocol: entry.netid.protocol().number(),
                    port: entry.address.port().into(),
                }),
            );
        }
        procedure::PMAP_CALLIT => return Err(Refusal::Silence),
        _ => return Err(Refusal::ProcUnavail),
    }
    Ok(())
}

fn pmap_set(table: &PortTable, mapping: Mapping) -> bool {
    let protocol = Protocol::from_number(mapping.protocol);
    let (Some(protocol), Ok(port)) = (protocol, u16::try_from(mapping.port)) else {
        return false;
    };
    let netid = Netid::new(protocol, false);
    let address = SocketAddr::new(netid.unspecified(), port);
    let Mapping {
        program, version, ..
    } = mapping;
    table.set(PortEntry {
        program,
        version,
        netid,
        address,
        owner: Owner::Superuser,
    })
}

/// The port, or 0. Version 2 means IPv4; who asks over IPv6 also gets a port that is only there.
fn pmap_getport(table: &PortTable, mapping: Mapping, origin: &Origin) -> u16 {
    let Some(protocol) = Protocol::from_number(mapping.protocol) else {
        return 0;
    };
    let find = |ipv6| table.find(mapping.program, mapping.version, Netid::new(protocol, ipv6));
    let entry = find(false).or_else(|| {
        if origin.local.is_ipv6() {
            find(true)
        } else {
            None
        }
    });
    entry.map_or(0, |entry| entry.address.port())
}

fn serve_rpcbind(
    table: &PortTable,
    request: &Request<'_>,
    writer: &mut Writer<'_>,
) -> Result<(), Refusal> {
    let origin = request.origin;
    let since_4 = request.version >= portmap::VERSION_4;
    match request.procedure {
        procedure::SET => {
            let rpcb: Rpcb<'_> = decode_all(request.args)?;
            let done = may_change(origin) && rpcb_set(table, &rpcb);
            table.count_set(request.version, done);
            writer.bool(done);
        }
        procedure::UNSET => {
            let rpcb: Rpcb<'_> = decode_all(request.args)?;
            let asked = Netid::from_name(rpcb.netid);
            let concerns = |netid| rpcb.netid.is_empty() || Some(netid) == asked;
            let done = may_change(origin) && table.unset(rpcb.program, rpcb.version, concerns);
            table.count_unset(request.version, done);
            writer.bool(done);
        }
        procedure::GETADDR => {
            let rpcb: Rpcb<'_> = decode_all(request.args)?;
            let netid = asked_netid(&rpcb, origin);
            let entry = netid.and_then(|netid| table.find(rpcb.program, rpcb.version, netid));
            write_address(entry, origin, writer);
        }
        procedure::DUMP => {
            decode_all::<()>(request.args)?;
            let entries = table.entries();
            let texts: Vec<String> = entries
                .iter()
                .map(|entry| portmap::universal_address(entry.address))
                .collect();
            let rpcbs = entries.iter().zip(&texts).map(|(entry, addr)| Rpcb {
                program: entry.program,
                version: entry.version,
                netid: entry.netid.name().as_bytes(),
                addr: addr.as_bytes(),
                owner: entry.owner.name().as_bytes(),
            });
            write_list(origin, writer, rpcbs);
        }
        procedure::BCAST => return Err(Refusal::Silence),
        procedure::GETTIME => {
            decode_all::<()>(request.args)?;
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            // The protocol's own 32 bits.
            writer.u32(now.as_secs() as u32);
        }
        procedure::UADDR2TADDR => {
            let uaddr: Uaddr<'_> = decode_all(request.args)?;
            let taddr = portmap::parse_universal_address(uaddr.0).map(taddr_from);
            let buf = taddr.as_deref().unwrap_or_default();
            writer.value(&Netbuf {
                maxlen: buf.len() as u32,
                buf,
            });
        }
        procedure::TADDR2UADDR => {
            let netbuf: Netbuf<'_> = decode_all(request.args)?;
            let text = address_from(netbuf.buf).map(portmap::universal_address);
            writer.value(&Uaddr(text.unwrap_or_default().as_bytes()));
        }
        procedure::GETVERSADDR if since_4 => {
            let rpcb: Rpcb<'_> = decode_all(request.args)?;
            let netid = asked_netid(&rpcb, origin);
            let entry = netid.and_then(|netid| table.find_exact(rpcb.program, rpcb.version, netid));
            write_address(entry, origin, writer);
        }
        procedure::GETADDRLIST if since_4 => {
            let rpcb: Rpcb<'_> = decode_all(request.args)?;
            let found: Vec<(Netid, String)> = Netid::ALL
                .into_iter()
                .filter_map(|netid| table.find_exact(rpcb.program, rpcb.version, netid))
                .filter_map(|entry| Some((entry.netid, reachable(entry, origin)?)))
                .collect();
            let entries = found
                .iter()
                .map(|(netid, uaddr)| RpcbEntry::new(*netid, uaddr.as_bytes()));
            write_list(origin, writer, entries);
        }
        procedure::GETSTAT if since_4 => {
            decode_all::<()>(request.args)?;
            write_statistics(&table.statistics, writer);
        }
        // INDIRECT as well, whose callers do want to hear about a failure.
        _ => return Err(Refusal::ProcUnavail),
    }
    Ok(())
}

fn rpcb_set(table: &PortTable, rpcb: &Rpcb<'_>) -> bool {
    let netid = Netid::from_name(rpcb.netid);
    let address = portmap::parse_universal_address(rpcb.addr);
    let (Some(netid), Some(address)) = (netid, address) else {
        return false;
    };
    let Rpcb {
        program, version, ..
    } = *rpcb;
    table.set(PortEntry {
        program,
        version,
        netid,
        address,
        owner: Owner::Superuser,
    })
}

/// Whether SET and UNSET are this caller's to use: a process of this machine that was allowed to
/// take a reserved port.
fn may_change(origin: &Origin) -> bool {
    origin.is_loopback() && origin.local.ip().is_loopback() && origin.from_reserved_port()
}

/// The network id in question: the one that is named, or the transport of the call if none is.
fn asked_netid(rpcb: &Rpcb<'_>, origin: &Origin) -> Option<Netid> {
    if !rpcb.netid.is_empty() {
        return Netid::from_name(rpcb.netid);
    }
    let protocol = match origin.transport {
        Transport::Tcp => Protocol::Tcp,
        Transport::Udp => Protocol::Udp,
    };
    Some(Netid::new(protocol, origin.local.is_ipv6()))
}

/// Where the asker reaches `entry`: at the address that it has asked, unless the entry is for a
/// certain address. There is none if it asked over the other family.
fn reachable(entry: PortEntry, origin: &Origin) -> Option<String> {
    let ip: IpAddr = if entry.address.ip().is_unspecified() {
        origin.local.ip()
    } else {
        entry.address.ip()
    };
    if ip.is_ipv6() != entry.netid.is_ipv6() || ip.is_unspecified() {
        return None;
    }
    Some(portmap::universal_address(SocketAddr::new(
        ip,
        entry.address.port(),
    )))
}

fn write_address(entry: Option<PortEntry>, origin: &Origin, writer: &mut Writer<'_>) {
    let text = entry
        .and_then(|entry| reachable(entry, origin))
        .unwrap_or_default();
    writer.value(&Uaddr(text.as_bytes()));
}

/// `rpcb_stat_byvers`: counts of calls, SET and UNSET; lookups by program and forwarded calls are
/// not kept, so their lists are empty.
fn write_statistics(statistics: &Statistics, writer: &mut Writer<'_>) {
    for ((calls, sets), unsets) in statistics
        .calls
        .iter()
        .zip(&statistics.sets)
        .zip(&statistics.unsets)
    {
        for counter in calls.iter().chain([sets, unsets]) {
            writer.u32(counter.load(Ordering::Relaxed));
        }
        writer.bool(false);
        writer.bool(false);
    }
}

const AF_INET: u16 = libc::AF_INET as u16;
const AF_INET6: u16 = libc::AF_INET6 as u16;

/// The `sockaddr_in` or `sockaddr_in6` of an address.
fn taddr_from(address: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(NETBUF_BYTES_MAX);
    let port = address.port().to_be_bytes();
    match address.ip() {
        IpAddr::V4(ip) => {
            bytes.extend_from_slice(&AF_INET.to_ne_bytes());
            bytes.extend_from_slice(&port);
            bytes.extend_from_slice(&ip.octets());
            bytes.extend_from_slice(&[0; 8]);
        }
        IpAddr::V6(ip) => {
            bytes.extend_from_slice(&AF_INET6.to_ne_bytes());
            bytes.extend_from_slice(&port);
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&ip.octets());
            bytes.extend_from_slice(&[0; 4]);
        }
    }
    bytes
}

/// The address in a `sockaddr_in` or `sockaddr_in6`.
fn address_from(bytes: &[u8]) -> Option<SocketAddr> {
    let (family, rest) = bytes.split_first_chunk()?;
    let (port, rest) = rest.split_first_chunk()?;
    let ip: IpAddr = match u16::from_ne_bytes(*family) {
        AF_INET => IpAddr::from(*rest.first_chunk::<4>()?),
        AF_INET6 => IpAddr::from(*rest.get(4..)?.first_chunk::<16>()?),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes(*port)))
}

#[cfg(test)]
mod tests;
