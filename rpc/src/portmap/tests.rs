//! What the messages look like, that they survive both directions, and that no bytes hurt.

use proptest::prelude::*;

use super::*;
use crate::xdr::decode_all;

fn encoded(value: &impl Encode) -> Vec<u8> {
    let mut out = Vec::new();
    value.encode(&mut Writer::new(&mut out));
    out
}

#[test]
fn universal_addresses_as_rfc_5665_writes_them() {
    let cases = [
        ("10.1.3.7.2.15", "10.1.3.7:527"),
        ("0.0.0.0.8.1", "0.0.0.0:2049"),
        ("::.8.1", "[::]:2049"),
        ("fe80::1.0.111", "[fe80::1]:111"),
        ("::ffff:192.0.2.1.78.80", "[::ffff:192.0.2.1]:20048"),
    ];
    for (text, address) in cases {
        let address: SocketAddr = address.parse().unwrap();
        assert_eq!(universal_address(address), text);
        assert_eq!(parse_universal_address(text.as_bytes()), Some(address));
    }
    let wrong: [&[u8]; 11] = [
        b"",
        b".",
        b"8.1",
        b"10.0.0.1",
        b"10.0.0.1.8",
        b"10.0.0.1.8.256",
        b"10.0.0.1.+8.1",
        b"10.0.0.1.8.",
        b"10.0.0.1..1",
        b"/run/rpcbind.sock",
        b"\xff.0.0.1.8.1",
    ];
    for text in wrong {
        assert_eq!(
            parse_universal_address(text),
            None,
            "{}",
            text.escape_ascii()
        );
    }
}

#[test]
fn a_dump_of_version_2_has_the_bytes_of_rfc_1833() {
    let list = List(vec![Mapping {
        program: 100_003,
        version: 3,
        protocol: 6,
        port: 2049,
    }]);
    let bytes = [
        0, 0, 0, 1, 0, 1, 0x86, 0xa3, 0, 0, 0, 3, 0, 0, 0, 6, 0, 0, 8, 1, 0, 0, 0, 0,
    ];
    assert_eq!(encoded(&list), bytes);
    assert_eq!(decode_all(&bytes), Ok(list));
}

#[test]
fn strings_above_their_maximum_are_refused() {
    let netid = [b'x'; NETID_BYTES_MAX + 1];
    let rpcb = Rpcb {
        program: 1,
        version: 1,
        netid: &netid,
        addr: b"",
        owner: b"",
    };
    assert_eq!(
        decode_all::<Rpcb<'_>>(&encoded(&rpcb)),
        Err(XdrError::TooLong)
    );
}

#[test]
fn network_ids_and_protocols_round_trip() {
    for netid in Netid::ALL {
        assert_eq!(Netid::from_name(netid.name().as_bytes()), Some(netid));
        assert_eq!(Netid::new(netid.protocol(), netid.is_ipv6()), netid);
        let number = netid.protocol().number();
        assert_eq!(Protocol::from_number(number), Some(netid.protocol()));
        assert_eq!(netid.unspecified().is_ipv6(), netid.is_ipv6());
    }
    assert_eq!(Netid::from_name(b"local"), None);
    assert_eq!(Protocol::from_number(1), None);
}

/// Asserts that a value is read back as it was written.
macro_rules! round_trips {
    ($value:ident) => {
        let bytes = encoded(&$value);
        prop_assert_eq!(decode_all(&bytes), Ok($value));
    };
}

type Strings = (Vec<u8>, Vec<u8>, Vec<u8>);

fn strings() -> impl Strategy<Value = Strings> {
    let bytes = |max: usize| prop::collection::vec(any::<u8>(), 0..=max);
    (
        bytes(NETID_BYTES_MAX),
        bytes(ADDR_BYTES_MAX),
        bytes(OWNER_BYTES_MAX),
    )
}

fn decode_everything(bytes: &[u8]) {
    // Whatever comes back is allowed; a panic or an abort of the allocator is not.
    let _ = decode_all::<Mapping>(bytes);
    let _ = decode_all::<Rpcb<'_>>(bytes);
    let _ = decode_all::<Uaddr<'_>>(bytes);
    let _ = decode_all::<Netbuf<'_>>(bytes);
    if let Ok(list) = decode_all::<List<Mapping>>(bytes) {
        assert!(list.0.len() <= bytes.len() / 20);
    }
    if let Ok(list) = decode_all::<List<Rpcb<'_>>>(bytes) {
        assert!(list.0.len() <= bytes.len() / 24);
    }
    let _ = decode_all::<List<RpcbEntry<'_>>>(bytes);
    let _ = parse_universal_address(bytes);
}

proptest! {
    #[test]
    fn addresses_round_trip(v6: bool, bits: u128, port: u16) {
        let ip: IpAddr = if v6 {
            Ipv6Addr::from_bits(bits).into()
        } else {
            Ipv4Addr::from_bits(bits as u32).into()
        };
        let address = SocketAddr::new(ip, port);
        let text = universal_address(address);
        prop_assert!(text.len() <= ADDR_BYTES_MAX);
        prop_assert_eq!(parse_universal_address(text.as_bytes()), Some(address));
    }

    #[test]
    fn mappings_round_trip(values in prop::collection::vec(any::<[u32; 4]>(), 0..20)) {
        let list = List(values.into_iter().map(|[program, version, protocol, port]| {
            Mapping { program, version, protocol, port }
        }).collect());
        round_trips!(list);
    }

    #[test]
    fn entries_round_trip(
        texts in prop::collection::vec(strings(), 0..8),
        program: u32, version: u32, maxlen: u32,
    ) {
        let rpcbs = List(texts.iter().map(|(netid, addr, owner)| {
            Rpcb { program, version, netid, addr, owner }
        }).collect());
        round_trips!(rpcbs);
        let entries = List(texts.iter().map(|(netid, addr, _)| RpcbEntry {
            maddr: addr, netid, semantics: version, protofmly: netid, proto: netid,
        }).collect());
        round_trips!(entries);
        for (netid, addr, _) in &texts {
            let uaddr = Uaddr(addr);
            round_trips!(uaddr);
            let netbuf = Netbuf { maxlen, buf: netid };
            round_trips!(netbuf);
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        decode_everything(&bytes);
    }

    #[test]
    fn mutated_messages_never_panic(
        (netid, addr, owner) in strings(),
        at: prop::sample::Index,
        byte: u8,
        cut: prop::sample::Index,
    ) {
        let (netid, addr, owner) = (&netid, &addr, &owner);
        let rpcb = Rpcb { program: 100_003, version: 3, netid, addr, owner };
        let mut bytes = encoded(&List(vec![rpcb, rpcb]));
        *at.get_mut(&mut bytes) = byte;
        bytes.truncate(cut.index(bytes.len() + 1));
        decode_everything(&bytes);
    }
}
