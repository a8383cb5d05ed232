//! The test client against a host, without a server between them: each judges the other.

use anyhow::{Result, ensure};

use super::super::nfs::args;
use super::super::nlm::{Fields, Holder, Share, next_cookie, procedure, stat};
use super::super::portmap::{Portmap, TCP, UDP};
use super::super::{Cred, Nlm, Nsm, Outcome};
use super::*;

/// A host at an address that no other test uses, with its portmapper on any port.
fn host(last: u8) -> Result<Host> {
    Host::start_at(SocketAddr::from(([127, 77, 0, last], 0)))
}

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];

fn service(host: &Host, transport: Transport) -> SocketAddr {
    match transport {
        Transport::Tcp => host.tcp,
        Transport::Udp => host.udp,
    }
}

#[test]
fn receives_what_a_server_would_send() -> Result<()> {
    let host = host(1)?;
    let lock = Lock {
        cookie: vec![1, 2, 3, 4],
        ..Lock::new(b"handle", "client1", -7).range(0xffff_fff0, 0)
    };
    for (transport, version) in TRANSPORTS.into_iter().zip([3, 4]) {
        let peer = Peer::connect(transport, service(&host, transport))?;
        let own = peer.local_addr()?;
        let mut nlm = Nlm::new(peer, Cred::root());
        nlm.version = version;
        nlm.null()?;
        // Sent without waiting for the answer, which is the host's to give.
        let args = lock.args(version, procedure::GRANTED_MSG);
        let header = rpc::Header::new(program::NLM, version, procedure::GRANTED_MSG, &nlm.cred);
        nlm.peer.send(&header.message(77, &args))?;
        let call = host.next_call()?;
        ensure!((call.from, call.transport, call.xid) == (own, transport, 77));
        ensure!(call.granted()? == lock, "{call:?}");
        ensure!(call.res().is_err() && call.flavor == 1);
        call.reply(&[])?;
        let outcome = rpc::open_reply(77, &nlm.peer.receive()?)?;
        ensure!(outcome == Outcome::Success(Vec::new()), "{outcome:?}");
        // Refused, and not answered at all.
        nlm.peer.send(&header.message(78, &args))?;
        host.next_call()?.refuse(AcceptStat::ProcUnavail)?;
        let outcome = rpc::open_reply(78, &nlm.peer.receive()?)?;
        ensure!(outcome == Outcome::ProcUnavail, "{outcome:?}");
        nlm.peer.send(&header.message(79, &args))?;
        drop(host.next_call()?);
        nlm.peer.set_answer_time(LOOK_UP)?;
        ensure!(nlm.peer.receive().is_err(), "an answer to a dropped call");
    }
    ensure!(host.next_call_within(Duration::ZERO)?.is_none());
    Ok(())
}

#[test]
fn reads_results_of_every_kind() -> Result<()> {
    let host = host(2)?;
    let at = host.tcp;
    let answers = thread::spawn(move || answer_one_of_each(&host));
    let mut nlm = Nlm::new(Peer::tcp(at)?, Cred::root());
    let lock = Lock::new(b"handle", "client1", 1);
    let holder = Holder {
        exclusive: false,
        svid: 9,
        oh: b"other".to_vec(),
        l_offset: 3,
        l_len: 4,
    };
    ensure!(nlm.test(&lock)? == Tested::Denied(holder));
    ensure!(nlm.lock(&lock)? == stat::BLOCKED);
    let wrong_cookie = nlm.unlock(&lock);
    ensure!(wrong_cookie.is_err(), "{wrong_cookie:?}");
    nlm.granted_res(b"grant", stat::DENIED)?;
    let share = Share {
        cookie: next_cookie(),
        caller_name: b"pc".to_vec(),
        fh: b"handle".to_vec(),
        oh: b"owner".to_vec(),
        mode: 1,
        access: 2,
        reclaim: false,
    };
    ensure!(nlm.share(&share)? == (stat::GRANTED, -1));
    let mut nsm = Nsm::new(Peer::tcp(at)?);
    nsm.notify(b"server", 5)?;
    ensure!(nsm.stat(b"client1")? == (nsm::STAT_SUCC, 7));
    answers.join().expect("the host answers")
}

fn answer_one_of_each(host: &Host) -> Result<()> {
    let next = |procedure| host.next_call_of(program::NLM, procedure);
    let cookie = |call: &Received| Fields::new(&call.args).opaque();
    let test = next(procedure::TEST)?;
    let found = cookie(&test)?;
    test.reply(&args(|w| {
        w.opaque(&found);
        w.u32(stat::DENIED);
        w.bool(false);
        w.i32(9);
        w.opaque(b"other");
        w.u64(3);
        w.u64(4);
    }))?;
    let lock = next(procedure::LOCK)?;
    lock.reply(&nlm::res_args(&cookie(&lock)?, stat::BLOCKED))?;
    next(procedure::UNLOCK)?.reply(&nlm::res_args(b"not the cookie", stat::GRANTED))?;
    let res = next(procedure::GRANTED_RES)?;
    ensure!(nlm::read_res(&res.args)? == (b"grant".to_vec(), stat::DENIED));
    res.reply(&[])?;
    let share = next(procedure::SHARE)?;
    let shared = cookie(&share)?;
    share.reply(&args(|w| {
        w.opaque(&shared);
        w.u32(stat::GRANTED);
        w.i32(-1);
    }))?;
    let notify = host.next_call_of(program::NSM, nsm::procedure::SM_NOTIFY)?;
    ensure!(notify.notified()? == (b"server".to_vec(), 5) && notify.flavor == 0);
    notify.reply(&[])?;
    let asked = host.next_call_of(program::NSM, nsm::procedure::SM_STAT)?;
    asked.reply(&args(|w| {
        w.u32(nsm::STAT_SUCC);
        w.i32(7);
    }))
}

#[test]
fn its_portmapper_answers_as_it_is_told() -> Result<()> {
    let host = host(3)?;
    for transport in TRANSPORTS {
        let peer = Peer::connect(transport, host.portmap)?;
        let mut portmap = Portmap { peer };
        ensure!(portmap.getport(program::NLM, 4, UDP)? == u32::from(host.udp.port()));
        ensure!(portmap.getport(program::NSM, 1, TCP)? == u32::from(host.tcp.port()));
        ensure!(portmap.getport(program::NFS, 3, TCP)? == 0);
        let address = portmap.getaddr(4, program::NLM, 3, "udp")?;
        ensure!(address == havenfs_rpc::portmap::universal_address(host.udp));
        ensure!(portmap.getaddr(3, program::NLM, 2, "tcp")?.is_empty());
    }
    let mut portmap = Portmap {
        peer: Peer::udp(host.portmap)?,
    };
    host.unregister(program::NSM);
    ensure!(portmap.getport(program::NSM, 1, UDP)? == 0);
    host.register(program::NSM, 1, UDP, 9);
    ensure!(portmap.getport(program::NSM, 1, UDP)? == 9);
    host.set_lookups(Lookups::Version2Only);
    let outcome = portmap.outcome(4, 3, &[])?;
    ensure!(outcome == Outcome::ProgMismatch(2, 2), "{outcome:?}");
    host.set_lookups(Lookups::Rpcbind);
    let outcome = portmap.outcome(2, 3, &[])?;
    ensure!(outcome == Outcome::ProgMismatch(3, 4), "{outcome:?}");
    host.set_lookups(Lookups::Ignored);
    let before = host.lookups().len();
    portmap.peer.set_answer_time(LOOK_UP)?;
    ensure!(portmap.getport(program::NLM, 1, TCP).is_err());
    let expected = Lookup {
        from: portmap.peer.local_addr()?,
        transport: Transport::Udp,
        rpcb_version: 2,
        program: program::NLM,
        version: 1,
        protocol: TCP,
    };
    let lookups = host.lookups();
    ensure!(lookups.len() == before + 1 && lookups.last() == Some(&expected));
    ensure!(host.next_call_within(Duration::ZERO)?.is_none());
    Ok(())
}

#[test]
fn is_found_at_port_111_and_sees_reserved_ports_needs_root() -> Result<()> {
    let address = IpAddr::from([127, 77, 0, 5]);
    let stranger = IpAddr::from([127, 77, 0, 6]);
    // One life after the other, as in tests of restarts.
    for _ in 0..2 {
        let host = Host::start(address)?;
        for transport in TRANSPORTS {
            let portmapper = SocketAddr::new(address, 111);
            let peer = Peer::connect_reserved_from(transport, stranger, portmapper)?;
            let own = peer.local_addr()?;
            ensure!(own.ip() == stranger && own.port() < 1024, "{own}");
            let mut portmap = Portmap { peer };
            ensure!(portmap.getport(program::NLM, 4, UDP)? == u32::from(host.udp.port()));
            ensure!(
                host.lookups()
                    .last()
                    .is_some_and(|lookup| lookup.from == own)
            );
        }
    }
    Ok(())
}

#[test]
fn what_is_no_call_is_an_error() -> Result<()> {
    let host = host(4)?;
    Peer::udp(host.udp)?.send(b"noise")?;
    let error = host.next_call();
    ensure!(error.is_err(), "{error:?}");
    Ok(())
}
