//! What the embedded portmapper answers, procedure by procedure.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use havenfs_rpc::auth::Credential;
use havenfs_rpc::portmap::List;
use havenfs_rpc::program;
use havenfs_rpc::xdr::{Decode, Encode};
use proptest::prelude::*;

use super::*;
use crate::call::Mode;
use crate::programs::UDP_LIST_BYTES_MAX;

const LOCAL_ROOT: &str = "127.0.0.1:700";
const NFS_TCP: Mapping = mapping(program::NFS, 3, 6, 0);

const fn mapping(program: u32, version: u32, protocol: u32, port: u32) -> Mapping {
    Mapping {
        program,
        version,
        protocol,
        port,
    }
}

fn rpcb<'a>(program: u32, version: u32, netid: &'a str, addr: &'a str) -> Rpcb<'a> {
    let (netid, addr) = (netid.as_bytes(), addr.as_bytes());
    Rpcb {
        program,
        version,
        netid,
        addr,
        owner: b"0",
    }
}

fn table() -> PortTable {
    let mut own = Vec::new();
    for netid in Netid::ALL {
        for version in [2, 3, 4] {
            own.push(PortEntry::own(program::PORTMAP, version, netid, 111));
        }
        for version in [1, 3] {
            own.push(PortEntry::own(program::MOUNT, version, netid, 20_048));
        }
        if netid.protocol() == Protocol::Tcp {
            own.push(PortEntry::own(program::NFS, 3, netid, 2049));
        }
    }
    PortTable::new(own)
}

fn origin(peer: &str, local: &str, transport: Transport) -> Origin {
    Origin::new(peer.parse().unwrap(), local.parse().unwrap(), transport)
}

fn call_from(
    table: &PortTable,
    origin: &Origin,
    version: u32,
    procedure: u32,
    args: &[u8],
) -> Result<Vec<u8>, Refusal> {
    let request = Request {
        origin,
        mode: Mode::Inline,
        xid: 1,
        version,
        procedure,
        credential: Credential::None,
        args,
    };
    let mut out = Vec::new();
    serve(table, &request, &mut Writer::new(&mut out)).map(|()| out)
}

fn encoded(value: &impl Encode) -> Vec<u8> {
    let mut out = Vec::new();
    value.encode(&mut Writer::new(&mut out));
    out
}

/// Calls over TCP as a far host.
fn ask(table: &PortTable, version: u32, procedure: u32, args: &impl Encode) -> Vec<u8> {
    let origin = origin("192.0.2.9:40000", "192.0.2.1:111", Transport::Tcp);
    call_from(table, &origin, version, procedure, &encoded(args)).unwrap()
}

/// Calls over TCP as this machine's superuser; the answer is a bool.
fn change(table: &PortTable, version: u32, procedure: u32, args: &impl Encode) -> bool {
    let origin = origin(LOCAL_ROOT, "127.0.0.1:111", Transport::Tcp);
    let reply = call_from(table, &origin, version, procedure, &encoded(args)).unwrap();
    reply == [0, 0, 0, 1]
}

fn port(table: &PortTable, question: Mapping) -> u32 {
    let reply = ask(table, 2, procedure::PMAP_GETPORT, &question);
    u32::from_be_bytes(reply.try_into().unwrap())
}

fn address(table: &PortTable, number: u32, question: Rpcb<'_>, local: &str) -> String {
    let origin = origin("192.0.2.9:40000", local, Transport::Udp);
    let reply = call_from(table, &origin, 4, number, &encoded(&question)).unwrap();
    String::from_utf8(decode_all::<Uaddr<'_>>(&reply).unwrap().0.to_vec()).unwrap()
}

struct Nothing;

impl Encode for Nothing {
    fn encode(&self, _: &mut Writer<'_>) {}
}

fn list<'a, T: Decode<'a>>(reply: &'a [u8]) -> Vec<T> {
    decode_all::<List<T>>(reply).unwrap().0
}

#[test]
fn getport_answers_the_port_of_the_version_or_of_another() {
    let table = table();
    assert_eq!(port(&table, NFS_TCP), 2049);
    assert_eq!(port(&table, mapping(program::NFS, 4, 6, 0)), 2049);
    assert_eq!(port(&table, mapping(program::NFS, 3, 17, 0)), 0);
    assert_eq!(port(&table, mapping(program::MOUNT, 3, 17, 0)), 20_048);
    assert_eq!(port(&table, mapping(program::NLM, 4, 6, 0)), 0);
    assert_eq!(port(&table, mapping(program::NFS, 3, 1, 0)), 0);
    assert!(change(
        &table,
        2,
        procedure::PMAP_SET,
        &mapping(300, 1, 6, 1001)
    ));
    assert!(change(
        &table,
        2,
        procedure::PMAP_SET,
        &mapping(300, 2, 6, 1002)
    ));
    assert_eq!(port(&table, mapping(300, 1, 6, 0)), 1001);
    assert_eq!(port(&table, mapping(300, 3, 6, 0)), 1002);
}

#[test]
fn getaddr_answers_the_address_that_was_asked() {
    let table = table();
    let getaddr = |question, local| address(&table, procedure::GETADDR, question, local);
    let nfs = |netid| rpcb(program::NFS, 3, netid, "");
    assert_eq!(getaddr(nfs("tcp"), "192.0.2.1:111"), "192.0.2.1.8.1");
    assert_eq!(
        getaddr(nfs("tcp"), "[::ffff:192.0.2.1]:111"),
        "192.0.2.1.8.1"
    );
    assert_eq!(getaddr(nfs("tcp6"), "[2001:db8::1]:111"), "2001:db8::1.8.1");
    // No network id: that of the call, which is udp, and NFS is not there.
    assert_eq!(getaddr(nfs(""), "192.0.2.1:111"), "");
    assert_eq!(
        getaddr(rpcb(program::MOUNT, 3, "", ""), "192.0.2.1:111"),
        "192.0.2.1.78.80"
    );
    // An address of the other family is not known here.
    assert_eq!(getaddr(nfs("tcp6"), "192.0.2.1:111"), "");
    assert_eq!(getaddr(nfs("tcp"), "0.0.0.0:111"), "");
    assert_eq!(getaddr(nfs("local"), "192.0.2.1:111"), "");
    assert_eq!(
        getaddr(rpcb(program::NLM, 4, "tcp", ""), "192.0.2.1:111"),
        ""
    );
    // An entry for a certain address keeps it.
    assert!(change(
        &table,
        4,
        procedure::SET,
        &rpcb(300, 1, "udp", "192.0.2.7.1.1")
    ));
    assert_eq!(
        getaddr(rpcb(300, 1, "udp", ""), "192.0.2.1:111"),
        "192.0.2.7.1.1"
    );
}

#[test]
fn getversaddr_is_strict_where_getaddr_is_not() {
    let table = table();
    let question = rpcb(program::NFS, 4, "tcp", "");
    let local = "192.0.2.1:111";
    assert_eq!(
        address(&table, procedure::GETADDR, question, local),
        "192.0.2.1.8.1"
    );
    assert_eq!(address(&table, procedure::GETVERSADDR, question, local), "");
    let question = rpcb(program::NFS, 3, "tcp", "");
    assert_eq!(
        address(&table, procedure::GETVERSADDR, question, local),
        "192.0.2.1.8.1"
    );
}

#[test]
fn dumps_show_every_entry_of_their_version() {
    let table = table();
    assert!(change(
        &table,
        3,
        procedure::SET,
        &rpcb(300, 1, "udp6", "::.1.2")
    ));
    let reply = ask(&table, 2, procedure::PMAP_DUMP, &Nothing);
    let mappings: Vec<Mapping> = list(&reply);
    assert_eq!(mappings.len(), 11);
    assert!(mappings.contains(&mapping(program::NFS, 3, 6, 2049)));
    for version in [3, 4] {
        let reply = ask(&table, version, procedure::DUMP, &Nothing);
        let rpcbs: Vec<Rpcb<'_>> = list(&reply);
        assert_eq!(rpcbs.len(), 23);
        let nfs = Rpcb {
            owner: b"havenfs",
            ..rpcb(program::NFS, 3, "tcp6", "::.8.1")
        };
        assert!(rpcbs.contains(&nfs));
        let last = Rpcb {
            owner: b"superuser",
            ..rpcb(300, 1, "udp6", "::.1.2")
        };
        assert_eq!(rpcbs.last(), Some(&last));
    }
}

#[test]
fn getaddrlist_names_the_transports_that_the_asker_can_use() {
    let table = table();
    let reply = ask(
        &table,
        4,
        procedure::GETADDRLIST,
        &rpcb(program::MOUNT, 3, "", ""),
    );
    let entries: Vec<RpcbEntry<'_>> = list(&reply);
    let expected = [
        RpcbEntry {
            maddr: b"192.0.2.1.78.80",
            netid: b"tcp",
            semantics: 3,
            protofmly: b"inet",
            proto: b"tcp",
        },
        RpcbEntry {
            maddr: b"192.0.2.1.78.80",
            netid: b"udp",
            semantics: 1,
            protofmly: b"inet",
            proto: b"udp",
        },
    ];
    assert_eq!(entries, expected);
}

#[test]
fn only_the_superuser_of_this_machine_changes_entries() {
    let table = table();
    let strangers = [
        ("127.0.0.1:1024", "127.0.0.1:111"),
        ("192.0.2.9:700", "192.0.2.1:111"),
    ];
    for (peer, local) in strangers {
        let origin = origin(peer, local, Transport::Udp);
        let v2 = encoded(&mapping(300, 1, 6, 1001));
        let v4 = encoded(&rpcb(300, 1, "tcp", "0.0.0.0.1.1"));
        for (version, args) in [(2, &v2), (3, &v4), (4, &v4)] {
            let reply = call_from(&table, &origin, version, procedure::SET, args);
            assert_eq!(reply, Ok(vec![0; 4]));
        }
        assert_eq!(port(&table, mapping(300, 1, 6, 0)), 0);
    }
    assert!(change(
        &table,
        4,
        procedure::SET,
        &rpcb(300, 1, "tcp", "0.0.0.0.1.1")
    ));
    assert_eq!(port(&table, mapping(300, 1, 6, 0)), 257);
    for (peer, local) in strangers {
        let origin = origin(peer, local, Transport::Tcp);
        let args = encoded(&rpcb(300, 1, "", ""));
        assert_eq!(
            call_from(&table, &origin, 4, procedure::UNSET, &args),
            Ok(vec![0; 4])
        );
    }
    assert_eq!(port(&table, mapping(300, 1, 6, 0)), 257);
}

#[test]
fn own_entries_stay_and_others_come_and_go() {
    let table = table();
    assert!(!change(
        &table,
        4,
        procedure::UNSET,
        &rpcb(program::NFS, 3, "", "")
    ));
    assert!(!change(&table, 2, procedure::PMAP_UNSET, &NFS_TCP));
    assert!(!change(
        &table,
        4,
        procedure::SET,
        &rpcb(program::NFS, 3, "tcp", "0.0.0.0.1.1")
    ));
    assert_eq!(port(&table, NFS_TCP), 2049);
    // The same mapping again is granted, a different one is not.
    for netid in ["tcp", "udp"] {
        let addr = "0.0.0.0.1.1";
        assert!(change(
            &table,
            4,
            procedure::SET,
            &rpcb(300, 1, netid, addr)
        ));
        assert!(change(
            &table,
            3,
            procedure::SET,
            &rpcb(300, 1, netid, addr)
        ));
        assert!(!change(
            &table,
            4,
            procedure::SET,
            &rpcb(300, 1, netid, "0.0.0.0.1.2")
        ));
    }
    assert!(change(
        &table,
        4,
        procedure::SET,
        &rpcb(300, 1, "tcp6", "::.1.1")
    ));
    assert!(change(
        &table,
        4,
        procedure::UNSET,
        &rpcb(300, 1, "tcp", "")
    ));
    assert!(!change(
        &table,
        4,
        procedure::UNSET,
        &rpcb(300, 1, "tcp", "")
    ));
    assert!(!change(
        &table,
        4,
        procedure::UNSET,
        &rpcb(300, 1, "local", "")
    ));
    assert_eq!(port(&table, mapping(300, 1, 17, 0)), 257);
    assert!(change(
        &table,
        2,
        procedure::PMAP_UNSET,
        &mapping(300, 1, 6, 0)
    ));
    assert_eq!(port(&table, mapping(300, 1, 17, 0)), 0);
    assert!(change(&table, 4, procedure::UNSET, &rpcb(300, 1, "", "")));
    assert_eq!(table.entries().len(), 22);
}

#[test]
fn own_entries_are_replaced_and_come_first() {
    let table = table();
    for program in [300, program::NLM] {
        assert!(change(
            &table,
            4,
            procedure::SET,
            &rpcb(program, 4, "tcp", "0.0.0.0.1.1")
        ));
    }
    let nlm = PortEntry::own(program::NLM, 4, Netid::Tcp, 32_803);
    table.set_own([nlm, nlm, PortEntry::own(program::NFS, 3, Netid::Tcp, 2050)]);
    let ports: Vec<u16> = table
        .entries()
        .iter()
        .map(|entry| entry.address.port())
        .collect();
    assert_eq!(ports, [32_803, 2050, 257]);
    assert_eq!(port(&table, NFS_TCP), 2050);
}

#[test]
fn malformed_registrations_are_refused() {
    let table = table();
    let wrong = [
        ("tcp", ""),
        ("tcp", "::.1.1"),
        ("tcp6", "0.0.0.0.1.1"),
        ("local", "/run/x"),
        ("tcp", "0.0.0.0.0.0"),
        ("", "0.0.0.0.1.1"),
    ];
    for (netid, addr) in wrong {
        assert!(
            !change(&table, 4, procedure::SET, &rpcb(300, 1, netid, addr)),
            "{netid} {addr}"
        );
    }
    for (protocol, port) in [(6, 0), (6, 65_536), (1, 80)] {
        assert!(!change(
            &table,
            2,
            procedure::PMAP_SET,
            &mapping(300, 1, protocol, port)
        ));
    }
    assert_eq!(table.entries().len(), 22);
}

#[test]
fn the_table_is_bounded_and_so_is_a_datagram() {
    let table = table();
    for program in 0..1000 {
        let fits = change(
            &table,
            4,
            procedure::SET,
            &rpcb(program, 1, "tcp", "192.168.200.200.200.200"),
        );
        assert_eq!(fits, program < (ENTRIES_MAX - 22) as u32);
    }
    assert_eq!(table.entries().len(), ENTRIES_MAX);
    let reply = ask(&table, 4, procedure::DUMP, &Nothing);
    assert_eq!(list::<Rpcb<'_>>(&reply).len(), ENTRIES_MAX);
    let origin = origin("192.0.2.9:40000", "192.0.2.1:111", Transport::Udp);
    let reply = call_from(&table, &origin, 4, procedure::DUMP, &[]).unwrap();
    assert!(reply.len() <= UDP_LIST_BYTES_MAX + 4);
    let rpcbs: Vec<Rpcb<'_>> = list(&reply);
    assert!(rpcbs.len() > 100 && rpcbs.len() < ENTRIES_MAX);
    let own = rpcbs.iter().filter(|rpcb| rpcb.owner == b"havenfs").count();
    assert_eq!(own, 22);
}

#[test]
fn nothing_is_forwarded() {
    let table = table();
    let origin = origin(LOCAL_ROOT, "127.0.0.1:111", Transport::Udp);
    let call = |version, number| call_from(&table, &origin, version, number, &[0; 40]);
    for version in [2, 3, 4] {
        assert_eq!(call(version, procedure::BCAST), Err(Refusal::Silence));
    }
    assert_eq!(call(4, procedure::INDIRECT), Err(Refusal::ProcUnavail));
}

#[test]
fn each_version_has_its_own_procedures() {
    let table = table();
    let origin = origin(LOCAL_ROOT, "127.0.0.1:111", Transport::Udp);
    for (version, last) in [(2, 5), (3, 8), (4, 12)] {
        for number in 1..=last {
            let unknown = version == 4 && number == procedure::INDIRECT;
            let reply = call_from(&table, &origin, version, number, &[0xff; 7]);
            let expected = match (number, unknown) {
                (procedure::BCAST, _) => Refusal::Silence,
                (_, true) => Refusal::ProcUnavail,
                _ => Refusal::GarbageArgs,
            };
            assert_eq!(reply, Err(expected), "version {version} procedure {number}");
        }
        let reply = call_from(&table, &origin, version, last + 1, &[]);
        assert_eq!(reply, Err(Refusal::ProcUnavail));
    }
}

#[test]
fn time_and_address_conversion() {
    let table = table();
    let time = ask(&table, 3, procedure::GETTIME, &Nothing);
    assert!(u32::from_be_bytes(time.try_into().unwrap()) > 1_700_000_000);
    for text in ["192.0.2.1.8.1", "2001:db8::1.8.1"] {
        let reply = ask(&table, 3, procedure::UADDR2TADDR, &Uaddr(text.as_bytes()));
        let netbuf: Netbuf<'_> = decode_all(&reply).unwrap();
        assert_eq!(netbuf.buf.len(), if text.contains(':') { 28 } else { 16 });
        let reply = ask(&table, 3, procedure::TADDR2UADDR, &netbuf);
        assert_eq!(decode_all(&reply), Ok(Uaddr(text.as_bytes())));
    }
    let reply = ask(&table, 3, procedure::UADDR2TADDR, &Uaddr(b"/run/x"));
    assert_eq!(
        decode_all(&reply),
        Ok(Netbuf {
            maxlen: 0,
            buf: b""
        })
    );
}

#[test]
fn statistics_count_what_was_called() {
    let table = table();
    for _ in 0..3 {
        port(&table, NFS_TCP);
    }
    assert!(change(
        &table,
        4,
        procedure::SET,
        &rpcb(300, 1, "tcp", "0.0.0.0.1.1")
    ));
    let reply = ask(&table, 4, procedure::GETSTAT, &Nothing);
    let words: Vec<u32> = reply
        .chunks(4)
        .map(|word| u32::from_be_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(words.len(), 3 * 17);
    let mut expected = vec![0; 3 * 17];
    expected[procedure::PMAP_GETPORT as usize] = 3;
    let version_4 = 2 * 17;
    expected[version_4 + procedure::SET as usize] = 1;
    expected[version_4 + procedure::GETSTAT as usize] = 1;
    expected[version_4 + 13] = 1;
    assert_eq!(words, expected);
}

proptest! {
    #[test]
    fn random_calls_never_panic_and_never_touch_own_entries(
        calls in prop::collection::vec(
            (2u32..5, 0u32..14, prop::collection::vec(any::<u8>(), 0..60)), 1..20,
        ),
    ) {
        let table = table();
        let origin = origin(LOCAL_ROOT, "127.0.0.1:111", Transport::Udp);
        for (version, number, args) in calls {
            let _ = call_from(&table, &origin, version, number, &args);
        }
        let own = table.entries().iter().filter(|entry| entry.owner == Owner::Server).count();
        prop_assert_eq!(own, 22);
    }
}
