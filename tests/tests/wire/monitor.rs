//! NSM both ways: hosts that reboot, and hosts that hear of our restarts; and grace.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::nlm::{Lock, Tested, procedure, stat};
use havenfs_tests::client::nsm::{MyId, notify_args};
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::rpc::next_xid;
use havenfs_tests::client::{Nsm, Outcome, Peer};
use havenfs_tests::server::{Site, V4};

use crate::locking::{A, B, Machine, Scene};
use crate::scene::OPEN;

const SM_NOTIFY: u32 = 6;

#[test]
fn needs_root_a_reboot_ends_a_hosts_locks_and_serves_who_waits() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let machine = Machine::start(1)?;
    let mut a = scene.server.nlm(A)?;
    let of_a = |state| Lock {
        state,
        ..scene.lock_of("a", 1)
    };
    ensure!(a.lock(&of_a(3).range(0, 10))? == stat::GRANTED);
    let mut waiter = machine.nlm(&scene, Transport::Tcp)?;
    ensure!(waiter.lock(&scene.waiting("waiter", 2).range(0, 10))? == stat::BLOCKED);
    drop(a);
    // After the reboot, before the notice: of the new life.
    let mut a = scene.server.nlm(A)?;
    ensure!(a.lock(&of_a(5).range(50, 10))? == stat::GRANTED);
    let mut nsm = scene.nsm(A)?;
    nsm.notify(b"a", 5)?;
    let call = machine
        .host
        .next_call_of(program::NLM, procedure::GRANTED_MSG)?;
    call.reply(&[])?;
    let mut b = scene.server.nlm(B)?;
    ensure!(b.lock(&scene.lock_of("b", 1).range(50, 1))? == stat::DENIED);
    // Hosts say it several times, and under several names.
    ensure!(a.lock(&of_a(5).range(80, 10))? == stat::GRANTED);
    nsm.notify(b"a.example.org", 5)?;
    nsm.notify(b"a", 5)?;
    ensure!(b.lock(&scene.lock_of("b", 1).range(80, 1))? == stat::DENIED);
    // The next one ends those as well.
    drop(a);
    nsm.notify(b"a", 7)?;
    ensure!(b.lock(&scene.lock_of("b", 1).range(50, 50))? == stat::GRANTED);
    Ok(())
}

#[test]
fn needs_root_forged_notices_release_nothing() -> Result<()> {
    let site = Site::new()?;
    fs::write(site.path().join("hosts"), "127.0.0.11 a\n")?;
    let scene = Scene::at(site.with_mounts("mount --bind hosts /etc/hosts"), OPEN)?;
    let mut a = scene.server.nlm(A)?;
    ensure!(a.lock(&scene.lock_of("a", 1))? == stat::GRANTED);
    let mut b = scene.server.nlm(B)?;
    ensure!(b.lock(&scene.lock_of("b", 1).range(0, 1))? == stat::DENIED);
    // From another host, under the name of the first.
    let mut other = scene.nsm(B)?;
    for name in [&b"a"[..], b"127.0.0.11", b"../../a", b"", &[b'a'; 1000]] {
        other.notify(name, 99)?;
    }
    // From the host's address, but not by its superuser.
    let server = SocketAddr::new(V4, scene.server.nsm_port);
    let peer = Peer::connect_from(Transport::Udp, SocketAddr::new(A, 0), server)?;
    let mut user = Nsm::new(peer);
    let outcome = user.outcome(SM_NOTIFY, &notify_args(b"a", 99))?;
    ensure!(!matches!(outcome, Outcome::Success(_)), "{outcome:?}");
    // Of two hosts behind one address, the one that is not named.
    ensure!(a.lock(&scene.lock_of("twin", 1).range(0, 1))? == stat::DENIED);
    let mut same = scene.nsm(A)?;
    same.notify(b"twin", 99)?;
    ensure!(b.lock(&scene.lock_of("b", 1))? == stat::DENIED);
    // FREE_ALL from elsewhere.
    b.free_all(b"a", 0)?;
    ensure!(b.lock(&scene.lock_of("b", 1))? == stat::DENIED);
    a.free_all(b"a", 0)?;
    ensure!(b.lock(&scene.lock_of("b", 1))? == stat::GRANTED);
    Ok(())
}

/// The host itself lives: its connection is older than the notice and answers. Its locks stay, and
/// are marked; copies of the notice change nothing, also when the connection is gone.
#[test]
fn needs_root_a_notice_of_a_host_that_lives_releases_nothing() -> Result<()> {
    let mut scene = Scene::new(OPEN)?;
    let mut a = scene.server.nlm(A)?;
    let of_a = Lock {
        state: 3,
        ..scene.lock_of("a", 1).range(0, 100)
    };
    ensure!(a.lock(&of_a)? == stat::GRANTED);
    // Its monitor was started anew: the number is higher, and nothing else is new.
    let later = Lock {
        state: 5,
        ..scene.lock_of("a", 1).range(200, 1)
    };
    ensure!(a.lock(&later)? == stat::GRANTED);
    let mut nsm = scene.nsm(A)?;
    nsm.notify(b"a", 5)?;
    scene.server.wait_for_line("is not believed")?;
    let mut b = scene.server.nlm(B)?;
    ensure!(b.lock(&scene.lock_of("b", 1))? == stat::DENIED);
    let locks = scene.site.ask("locks")?;
    let suspect = locks["entries"][0]["suspect"].as_str().unwrap_or_default();
    ensure!(suspect.contains("notice"), "{locks}");
    ensure!(scene.site.ask("status")?["locking"]["suspect"] == 1);
    // A living host closes what it does not need.
    drop(a);
    nsm.notify(b"a", 5)?;
    ensure!(b.lock(&scene.lock_of("b", 1).range(0, 100))? == stat::DENIED);
    // And then it does reboot.
    nsm.notify(b"a", 7)?;
    ensure!(b.lock(&scene.lock_of("b", 1))? == stat::GRANTED);
    Ok(())
}

/// From an address under which the host is not known: believed if its name has that address too.
#[test]
fn needs_root_a_notice_from_another_address_of_a_host_needs_its_name() -> Result<()> {
    let new = IpAddr::from([127, 0, 0, 77]);
    let site = Site::new()?;
    fs::write(
        site.path().join("hosts"),
        "127.0.0.11 a\n127.0.0.77 a\n127.0.0.12 b\n127.0.0.78 b\n",
    )?;
    let scene = Scene::at(site.with_mounts("mount --bind hosts /etc/hosts"), OPEN)?;
    for (host, address) in [("a", A), ("b", B)] {
        let start = if host == "a" { 0 } else { 100 };
        let lock = scene.lock_of(host, 1).range(start, 10);
        ensure!(scene.server.nlm(address)?.lock(&lock)? == stat::GRANTED);
    }
    let mut other = scene.server.nlm(IpAddr::from([127, 0, 0, 13]))?;
    // A name that this address does not have, and one that no host has.
    for name in [&b"b"[..], b"c"] {
        scene.nsm(new)?.notify(name, 5)?;
    }
    // Whoever has a domain can give any name in it any address.
    let stranger = IpAddr::from([127, 0, 0, 79]);
    scene.nsm(stranger)?.notify(b"a.elsewhere.example", 5)?;
    ensure!(other.lock(&scene.lock_of("x", 1).range(0, 1))? == stat::DENIED);
    ensure!(other.lock(&scene.lock_of("x", 1).range(100, 1))? == stat::DENIED);
    scene.nsm(new)?.notify(b"a", 5)?;
    ensure!(other.lock(&scene.lock_of("x", 1).range(0, 1))? == stat::GRANTED);
    ensure!(other.lock(&scene.lock_of("x", 1).range(100, 1))? == stat::DENIED);
    Ok(())
}

#[test]
fn needs_root_an_operator_asks_a_host_what_it_knows_of() -> Result<()> {
    let scene = Scene::with(OPEN, &["--service-name", "nas"])?;
    let machine = Machine::start(1)?;
    let mut nlm = machine.nlm(&scene, Transport::Tcp)?;
    for start in [0, 100] {
        ensure!(nlm.lock(&scene.lock_of("a", 1).range(start, 10))? == stat::GRANTED);
    }
    let (_, before) = scene.nsm(A)?.stat(b"x")?;
    let verify = format!("verify {}", machine.address);
    let answer = std::thread::scope(|scope| {
        let asking = scope.spawn(|| scene.site.ask(&verify));
        // The name and the address as a name, both with a number that the host has not seen.
        for _ in 0..2 {
            let call = machine.host.next_call_of(program::NSM, SM_NOTIFY)?;
            ensure!(call.notified()?.1 > before);
            call.reply(&[])?;
        }
        let reclaim = Lock {
            reclaim: true,
            ..scene.lock_of("a", 1).range(100, 10)
        };
        ensure!(nlm.lock(&reclaim)? == stat::GRANTED);
        let answer = asking.join();
        answer.unwrap_or_else(|_| anyhow::bail!("panicked"))
    })?;
    ensure!(answer["held"] == 2 && answer["reclaimed"] == 1, "{answer}");
    let missing = &answer["missing"]["entries"];
    ensure!(
        missing[0]["range"] == "0-9" && missing[1].is_null(),
        "{answer}"
    );
    ensure!(scene.site.ask("verify 127.0.0.99")?["error"].is_string());

    let host = scene.site.ask(&format!("host {}", machine.address))?;
    ensure!(host["hosts"][0]["restart"] == "told", "{host}");
    ensure!(
        host["locks"]["entries"].as_array().map(Vec::len) == Some(2),
        "{host}"
    );
    ensure!(scene.site.ask("host 127.0.0.99")?["error"].is_string());
    Ok(())
}

#[test]
fn locks_that_nobody_reclaims_are_told_from_those_that_are() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    for (host, address) in [("a", A), ("b", B)] {
        let start = if host == "a" { 0 } else { 100 };
        let lock = scene.lock_of(host, 1).range(start, 10);
        ensure!(scene.server.nlm(address)?.lock(&lock)? == stat::GRANTED);
    }
    let scene = scene.restart(OPEN)?;
    let reclaim = Lock {
        reclaim: true,
        ..scene.lock_of("a", 1).range(0, 10)
    };
    let mut a = scene.server.nlm(A)?;
    ensure!(a.lock(&reclaim)? == stat::GRANTED);
    ensure!(a.lock(&scene.lock_of("a", 1).range(200, 10))? == stat::GRANTED);
    let locks = scene.site.ask("locks")?;
    for entry in locks["entries"].as_array().into_iter().flatten() {
        let reclaimed = match entry["range"].as_str() {
            Some("0-9") => serde_json::json!(true),
            Some("100-109") => serde_json::json!(false),
            _ => serde_json::json!(null),
        };
        ensure!(entry["reclaimed"] == reclaimed, "{entry}");
    }
    let locking = &scene.site.ask("status")?["locking"];
    ensure!(
        locking["from_before"] == 2 && locking["not_reclaimed"] == 1,
        "{locking}"
    );
    Ok(())
}

#[test]
fn needs_root_hosts_with_locks_hear_of_a_restart_under_every_name() -> Result<()> {
    let names = [
        "--service-name",
        "files.example.org",
        "--service-name",
        "nas",
    ];
    let scene = Scene::with(OPEN, &names)?;
    let (machine, silent) = (Machine::start(1)?, Machine::start(2)?);
    let mut nlm = machine.nlm(&scene, Transport::Tcp)?;
    ensure!(nlm.lock(&scene.lock_of("a", 1).range(0, 1))? == stat::GRANTED);
    // Whoever does not monitor is not told, and whoever holds nothing has nothing to hear.
    let mut other = silent.nlm(&scene, Transport::Tcp)?;
    ensure!(other.nm_lock(&scene.lock_of("s", 1).range(1, 1))? == stat::GRANTED);
    let (_, before) = scene.nsm(A)?.stat(b"x")?;
    let scene = scene.restart_with(OPEN, &names)?;
    let mut heard = Vec::new();
    let mut state = 0;
    for _ in 0..4 {
        let call = machine.host.next_call_of(program::NSM, SM_NOTIFY)?;
        ensure!(call.transport == Transport::Udp);
        ensure!(
            call.from.ip() == V4 && call.from.port() < 1024,
            "{}",
            call.from
        );
        let (name, its_state) = call.notified()?;
        ensure!(state == 0 || state == its_state, "one state for all names");
        state = its_state;
        heard.push(String::from_utf8(name)?);
        call.reply(&[])?;
    }
    ensure!(
        heard == ["files.example.org", "nas", "files", "127.0.0.1"],
        "{heard:?}"
    );
    ensure!(
        state % 2 == 1 && state > before,
        "odd and new: {before}, {state}"
    );
    let (_, now) = scene.nsm(A)?.stat(b"x")?;
    ensure!(now == state);
    ensure!(
        silent
            .host
            .next_call_within(Duration::from_millis(700))?
            .is_none()
    );
    ensure!(
        machine
            .host
            .next_call_within(Duration::from_millis(700))?
            .is_none()
    );
    Ok(())
}

#[test]
fn needs_root_a_host_that_does_not_answer_is_told_again_over_tcp_too() -> Result<()> {
    let names = ["--service-name", "nas"];
    let scene = Scene::with(OPEN, &names)?;
    let machine = Machine::start(1)?;
    let mut nlm = machine.nlm(&scene, Transport::Tcp)?;
    ensure!(nlm.lock(&scene.lock_of("a", 1))? == stat::GRANTED);
    let _scene = scene.restart_with(OPEN, &names)?;
    let mut transports = Vec::new();
    while !transports.contains(&Transport::Tcp) {
        let call = machine.host.next_call_of(program::NSM, SM_NOTIFY)?;
        ensure!(call.notified()?.0 == b"nas");
        transports.push(call.transport);
        // No answer.
        if call.transport == Transport::Tcp {
            call.reply(&[])?;
        }
    }
    ensure!(transports[0] == Transport::Udp, "{transports:?}");
    let last = machine.host.next_call_of(program::NSM, SM_NOTIFY)?;
    ensure!(
        last.notified()?.0 == b"127.0.0.1",
        "and the address as a name"
    );
    last.reply(&[])?;
    Ok(())
}

#[test]
fn reclaims_of_what_is_held_are_granted_at_once() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    ensure!(
        scene
            .server
            .nlm(A)?
            .lock(&scene.lock_of("a", 1).range(0, 10))?
            == stat::GRANTED
    );
    let scene = scene.restart(OPEN)?;
    let reclaim = |host, start, len| Lock {
        reclaim: true,
        ..scene.lock_of(host, 1).range(start, len)
    };
    let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
    ensure!(a.lock(&reclaim("a", 0, 10))? == stat::GRANTED);
    ensure!(
        a.lock(&reclaim("a", 2, 3))? == stat::GRANTED,
        "a part of it"
    );
    ensure!(
        b.lock(&reclaim("b", 0, 1))? == stat::DENIED,
        "somebody else's"
    );
    Ok(())
}

#[test]
fn reclaims_of_what_is_not_known_are_as_configured() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let fh = scene.fh.clone();
    let reclaim = |start| Lock {
        reclaim: true,
        ..Lock::new(&fh, "b", 1).range(start, 10)
    };
    let refused = |scene: &Scene| -> Result<()> {
        let mut b = scene.server.nlm(B)?;
        ensure!(b.lock(&reclaim(300))? == stat::DENIED, "nobody's");
        ensure!(scene.server.nlm(A)?.test(&reclaim(300))? == Tested::Other(stat::GRANTED));
        Ok(())
    };
    let mut b = scene.server.nlm(B)?;
    ensure!(b.lock(&reclaim(100))? == stat::GRANTED, "lenient");
    let of_a = scene.lock_of("a", 1).range(105, 1);
    ensure!(scene.server.nlm(A)?.lock(&of_a)? == stat::DENIED);

    let scene = scene.restart_with(OPEN, &["--reclaim", "strict"])?;
    refused(&scene)?;
    let mut b = scene.server.nlm(B)?;
    ensure!(b.lock(&reclaim(100))? == stat::GRANTED, "it has that one");
    ensure!(b.unlock(&scene.lock_of("b", 1).range(100, 10))? == stat::GRANTED);
    ensure!(b.lock(&reclaim(100))? == stat::DENIED, "unlocked since");

    // It is said at each start.
    let scene = scene.restart(OPEN)?;
    let mut b = scene.server.nlm(B)?;
    ensure!(b.lock(&reclaim(100))? == stat::GRANTED);
    Ok(())
}

/// A reclaim of what the table has changes nothing that could be remembered with it.
#[test]
fn a_late_copy_of_a_reclaim_does_not_lock_what_was_unlocked_since() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let lock = scene.lock_of("a", 1).range(0, 10);
    ensure!(scene.server.nlm(A)?.lock(&lock)? == stat::GRANTED);
    let scene = scene.restart(OPEN)?;
    let reclaim = Lock {
        reclaim: true,
        ..lock.clone()
    };
    let mut a = scene.server.nlm(A)?;
    let xid = next_xid();
    for copy in ["the first", "a late copy"] {
        let stat = a.call_as(xid, procedure::LOCK, &reclaim)?;
        ensure!(stat == stat::GRANTED, "{copy}: {stat}");
        ensure!(a.unlock(&lock)? == stat::GRANTED);
    }
    ensure!(a.call_as(xid, procedure::LOCK, &reclaim)? == stat::GRANTED);
    let of_b = scene.lock_of("b", 1).range(0, 10);
    ensure!(scene.server.nlm(B)?.lock(&of_b)? == stat::GRANTED);
    Ok(())
}

#[test]
fn where_locks_may_be_missing_only_reclaims_are_granted() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let of_a = scene.lock_of("a", 1);
    ensure!(scene.server.nlm(A)?.lock(&of_a.range(0, 10))? == stat::GRANTED);
    ensure!(scene.server.nlm(A)?.lock(&of_a.range(20, 10))? == stat::GRANTED);
    let scene = scene.restart_with(OPEN, &["--recover", "--grace", "3000"])?;
    let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
    let of_b = scene.lock_of("b", 1);
    ensure!(b.lock(&of_b.range(500, 1))? == stat::DENIED_GRACE_PERIOD);
    ensure!(b.test(&of_b.range(500, 1))? == Tested::Other(stat::DENIED_GRACE_PERIOD));
    let fh = scene.fh.clone();
    let reclaim = |host, start| Lock {
        reclaim: true,
        ..Lock::new(&fh, host, 1).range(start, 10)
    };
    ensure!(a.lock(&reclaim("a", 0))? == stat::GRANTED);
    ensure!(
        b.lock(&reclaim("b", 700))? == stat::GRANTED,
        "the table did not have it"
    );
    ensure!(b.lock(&reclaim("b", 5))? == stat::DENIED);
    // Another restart is no end of it.
    let scene = scene.restart_with(OPEN, &["--grace", "3000"])?;
    let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
    ensure!(b.lock(&of_b.range(500, 1))? == stat::DENIED_GRACE_PERIOD);
    ensure!(a.lock(&reclaim("a", 0))? == stat::GRANTED);
    let status = scene.site.ask("status")?;
    ensure!(status["locking"]["in_grace"] == true && status["locking"]["complete"] == false);
    scene.site.ask("end-grace")?;
    ensure!(b.lock(&of_b.range(500, 1))? == stat::GRANTED);
    ensure!(
        b.lock(&of_b.range(0, 1))? == stat::DENIED,
        "it was reclaimed"
    );
    ensure!(b.lock(&of_b.range(20, 1))? == stat::GRANTED, "it was not");
    ensure!(a.lock(&reclaim("a", 20))? == stat::DENIED, "too late");
    let status = scene.site.ask("status")?;
    ensure!(status["locking"]["complete"] == true, "{status}");
    Ok(())
}

#[test]
fn a_new_state_directory_has_no_grace() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let stranger = IpAddr::from([127, 0, 0, 14]);
    ensure!(scene.server.nlm(stranger)?.lock(&scene.lock_of("x", 1))? == stat::GRANTED);
    let status = scene.site.ask("status")?;
    ensure!(
        status["locking"]["complete"] == true && status["locking"]["epoch"] == 1,
        "{status}"
    );
    // An empty directory can't know whether it is new or lost.
    let is_said =
        |log: &str| log.contains("the store of locks is new") && log.contains("--recover");
    let log = scene.server.log()?;
    ensure!(is_said(&log), "{log}");
    let log = scene.restart(OPEN)?.server.log()?;
    ensure!(!is_said(&log), "{log}");
    Ok(())
}

/// A lock manager on this machine, as it asks to be told.
fn local(my_name: &[u8]) -> MyId<'_> {
    MyId {
        my_name,
        my_prog: program::NLM,
        my_vers: 4,
        my_proc: 16,
    }
}

#[test]
fn needs_root_only_this_machine_may_ask_to_be_told() -> Result<()> {
    const SM_UNMON: u32 = 3;
    let scene = Scene::new(OPEN)?;
    let server = SocketAddr::new(V4, scene.server.nsm_port);
    let mut nsm = scene.nsm(A)?;
    ensure!(
        nsm.mon(b"c1", local(b"me"), [0; 16])?.0 == 0,
        "127.0.0.11 is this machine"
    );
    nsm.unmon(b"c1", local(b"me"))?;
    nsm.unmon_all(local(b"me"))?;
    let other = MyId {
        my_prog: program::NFS,
        ..local(b"me")
    };
    ensure!(nsm.mon(b"c1", other, [0; 16])?.0 == 1, "no lock manager");
    ensure!(nsm.mon(b"../c1", local(b"me"), [0; 16])?.0 == 1, "no name");
    let peer = Peer::connect_from(Transport::Udp, SocketAddr::new(V4, 0), server)?;
    let mut user = Nsm::new(peer);
    ensure!(
        user.mon(b"c1", local(b"me"), [0; 16])?.0 == 1,
        "not the superuser"
    );
    for procedure in [SM_UNMON, 4, 5] {
        let outcome = user.outcome(procedure, &[])?;
        ensure!(
            !matches!(outcome, Outcome::Success(_)),
            "{procedure}: {outcome:?}"
        );
    }
    Ok(())
}

#[test]
fn needs_root_a_simulated_crash_is_told_and_loses_nothing() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let machine = Machine::start(1)?;
    let mut nlm = machine.nlm(&scene, Transport::Tcp)?;
    ensure!(nlm.lock(&scene.lock_of("a", 1))? == stat::GRANTED);
    let (_, before) = scene.nsm(V4)?.stat(b"x")?;
    scene.nsm(V4)?.simu_crash()?;
    let call = machine.host.next_call_of(program::NSM, SM_NOTIFY)?;
    let (_, state) = call.notified()?;
    call.reply(&[])?;
    ensure!(state > before && scene.nsm(V4)?.stat(b"x")?.1 == state);
    let mut b = scene.server.nlm(B)?;
    ensure!(b.lock(&scene.lock_of("b", 1))? == stat::DENIED);
    ensure!(nlm.unlock(&scene.lock_of("a", 1))? == stat::GRANTED);
    ensure!(b.lock(&scene.lock_of("b", 1))? == stat::GRANTED);
    Ok(())
}
