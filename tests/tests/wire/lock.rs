//! NLM: LOCK, UNLOCK, TEST and what a restart leaves of them.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};

use anyhow::{Result, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::nlm::{Holder, Lock, Tested, procedure, stat};
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::rpc::{next_xid, record};
use havenfs_tests::client::{Cred, Header};
use havenfs_tests::server::{Server, Site};

use crate::locking::{A, B, Scene, look_up};
use crate::scene::OPEN;

#[test]
fn a_lock_is_held_against_others_and_released() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
    let (of_a, of_b) = (scene.lock_of("a", 1), scene.lock_of("b", 1));
    ensure!(a.lock(&of_a.range(10, 10))? == stat::GRANTED);
    ensure!(b.lock(&of_b.range(19, 1))? == stat::DENIED);
    ensure!(b.lock(&of_b.range(20, 0))? == stat::GRANTED, "adjacent");
    let holder = Holder {
        exclusive: true,
        svid: 1,
        oh: of_a.oh.clone(),
        l_offset: 10,
        l_len: 10,
    };
    ensure!(b.test(&of_b.range(0, 100))? == Tested::Denied(holder));
    ensure!(
        a.test(&of_a.range(0, 20))? == Tested::Other(stat::GRANTED),
        "its own"
    );
    ensure!(a.unlock(&of_a.range(0, 0))? == stat::GRANTED);
    ensure!(b.lock(&of_b.range(19, 1))? == stat::GRANTED);
    ensure!(
        a.unlock(&of_a.range(0, 0))? == stat::GRANTED,
        "nothing held"
    );
    Ok(())
}

#[test]
fn shared_locks_are_shared() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
    let shared = |host| Lock {
        exclusive: false,
        ..scene.lock_of(host, 1)
    };
    ensure!(a.lock(&shared("a"))? == stat::GRANTED);
    ensure!(b.lock(&shared("b"))? == stat::GRANTED);
    ensure!(
        b.lock(&scene.lock_of("b", 1))? == stat::DENIED,
        "an upgrade"
    );
    ensure!(a.unlock(&shared("a"))? == stat::GRANTED);
    ensure!(b.lock(&scene.lock_of("b", 1))? == stat::GRANTED);
    ensure!(a.lock(&shared("a"))? == stat::DENIED);
    Ok(())
}

#[test]
fn a_killed_server_has_its_locks_when_it_is_back() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let (of_a, of_b) = (scene.lock_of("a", 1), scene.lock_of("b", 1));
    ensure!(scene.server.nlm(A)?.lock(&of_a.range(0, 10))? == stat::GRANTED);
    ensure!(scene.server.nlm(A)?.lock(&of_a.range(20, 10))? == stat::GRANTED);
    ensure!(scene.server.nlm(A)?.unlock(&of_a.range(20, 5))? == stat::GRANTED);
    let scene = scene.restart(OPEN)?;
    let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
    ensure!(b.lock(&of_b.range(0, 1))? == stat::DENIED);
    ensure!(
        b.lock(&of_b.range(20, 5))? == stat::GRANTED,
        "at once, without grace"
    );
    ensure!(b.lock(&of_b.range(24, 2))? == stat::DENIED);
    ensure!(a.unlock(&of_a.range(0, 0))? == stat::GRANTED);
    ensure!(b.lock(&of_b.range(0, 0))? == stat::GRANTED);
    let scene = scene.restart(OPEN)?;
    ensure!(scene.server.nlm(A)?.lock(&of_a.range(5, 1))? == stat::DENIED);
    Ok(())
}

#[test]
fn copies_of_calls_change_nothing() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
    let (lock, unlock) = (scene.lock_of("a", 1), scene.lock_of("a", 1));
    let (lock_xid, unlock_xid) = (next_xid(), next_xid());
    ensure!(a.call_as(lock_xid, procedure::LOCK, &lock)? == stat::GRANTED);
    ensure!(a.call_as(unlock_xid, procedure::UNLOCK, &unlock)? == stat::GRANTED);
    // Copies on another connection: the LOCK must not come back, nor the UNLOCK do harm.
    let mut again = scene.server.nlm(A)?;
    ensure!(again.call_as(lock_xid, procedure::LOCK, &lock)? == stat::GRANTED);
    ensure!(b.lock(&scene.lock_of("b", 1))? == stat::GRANTED);
    ensure!(b.unlock(&scene.lock_of("b", 1))? == stat::GRANTED);
    ensure!(a.lock(&scene.lock_of("a", 1))? == stat::GRANTED);
    ensure!(again.call_as(unlock_xid, procedure::UNLOCK, &unlock)? == stat::GRANTED);
    ensure!(b.lock(&scene.lock_of("b", 1))? == stat::DENIED);
    // And not after a restart either.
    let scene = scene.restart(OPEN)?;
    let mut again = scene.server.nlm_at(A, Transport::Udp)?;
    ensure!(again.call_as(unlock_xid, procedure::UNLOCK, &unlock)? == stat::GRANTED);
    let mut b = scene.server.nlm(B)?;
    ensure!(b.lock(&scene.lock_of("b", 1))? == stat::DENIED);
    Ok(())
}

#[test]
fn a_lock_comes_off_when_its_file_and_its_export_are_gone() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let of_a = scene.lock_of("a", 1);
    ensure!(scene.server.nlm(A)?.lock(&of_a)? == stat::GRANTED);
    fs::remove_file(scene.site.export().join("file"))?;
    let other = scene.site.path().join("other");
    fs::create_dir(&other)?;
    let Scene { site, server, fh } = scene;
    server.kill()?;
    let server = site.serve_exports(&[&format!("{}:*({OPEN})", other.display())], &[])?;
    let mut a = server.nlm(A)?;
    ensure!(a.test(&of_a)? == Tested::Other(stat::STALE_FH));
    ensure!(a.lock(&Lock::new(&fh, "a", 1))? == stat::STALE_FH);
    ensure!(
        a.cancel(&Lock::new(&fh, "a", 1))? == stat::DENIED,
        "it is held"
    );
    ensure!(a.unlock(&Lock::new(&fh, "a", 1))? == stat::GRANTED);
    ensure!(
        a.cancel(&Lock::new(&fh, "a", 1))? == stat::GRANTED,
        "no more"
    );
    Ok(())
}

#[test]
fn a_file_has_one_lock_table_in_all_exports_that_show_it() -> Result<()> {
    let site = Site::new()?;
    let inner = site.export().join("inner");
    fs::create_dir(&inner)?;
    fs::write(inner.join("file"), "")?;
    let outer = format!("{}:*({OPEN})", site.export().display());
    let nested = format!("{}:*({OPEN})", inner.display());
    let server = site.serve_exports(&[&outer, &nested], &[])?;
    let mut nfs = server.nfs(Cred::root())?;
    let root = server.handle(&site.export())?;
    let dir = nfs.find(&root, b"inner")?;
    let through_outer = nfs.find(&dir, b"file")?;
    let root = server.handle(&inner)?;
    let through_nested = nfs.find(&root, b"file")?;
    ensure!(through_outer != through_nested, "two exports, two handles");
    let (mut a, mut b) = (server.nlm(A)?, server.nlm(B)?);
    ensure!(a.lock(&Lock::new(&through_outer, "a", 1))? == stat::GRANTED);
    ensure!(b.lock(&Lock::new(&through_nested, "b", 1))? == stat::DENIED);
    ensure!(a.unlock(&Lock::new(&through_nested, "a", 1))? == stat::GRANTED);
    ensure!(b.lock(&Lock::new(&through_outer, "b", 1))? == stat::GRANTED);
    Ok(())
}

#[test]
fn ranges_that_can_not_be() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
    let (of_a, of_b) = (scene.lock_of("a", 1), scene.lock_of("b", 1));
    let end = 1 << 63;
    ensure!(a.lock(&of_a.range(end, 1))? == stat::FBIG);
    ensure!(a.unlock(&of_a.range(end, 1))? == stat::GRANTED, "always");
    ensure!(a.test(&of_a.range(u64::MAX, 0))? == Tested::Other(stat::FBIG));
    ensure!(a.lock(&of_a.range(end - 1, 1))? == stat::GRANTED);
    ensure!(b.lock(&of_b.range(end - 2, u64::MAX))? == stat::DENIED);
    let holder = b.test(&of_b.range(0, 0))?;
    ensure!(matches!(&holder, Tested::Denied(held) if held.l_offset == end - 1 && held.l_len == 0));
    Ok(())
}

#[test]
fn older_versions_see_32_bits() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    for version in [1, 3] {
        let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
        a.version = version;
        let (of_a, of_b) = (scene.lock_of("a", 1), scene.lock_of("b", 1));
        ensure!(a.lock(&of_a.range(0, 10))? == stat::GRANTED);
        ensure!(b.lock(&of_b.range(5, 10))? == stat::DENIED);
        ensure!(b.lock(&of_b.range(1 << 40, 10))? == stat::GRANTED);
        // A lock to the end in 32 bits is one to the end.
        ensure!(a.lock(&of_a.range(20, 0))? == stat::DENIED);
        let tested = a.test(&of_a.range(20, 0))?;
        ensure!(matches!(&tested, Tested::Denied(held) if held.l_offset == u64::from(u32::MAX)));
        ensure!(b.unlock(&of_b.range(0, 0))? == stat::GRANTED);
        ensure!(a.lock(&of_a.range(20, 0))? == stat::GRANTED);
        ensure!(b.lock(&of_b.range(1 << 40, 10))? == stat::DENIED);
        ensure!(a.unlock(&of_a.range(0, 0))? == stat::GRANTED);
        // A bad handle has no status of its own there.
        let bad = Lock::new(b"no handle", "a", 1);
        ensure!(a.lock(&bad)? == stat::DENIED_NOLOCKS);
        ensure!(b.lock(&bad)? == stat::STALE_FH);
    }
    Ok(())
}

#[test]
fn the_same_owner_over_udp_and_tcp_is_one() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let mut udp = scene.server.nlm_at(A, Transport::Udp)?;
    ensure!(udp.lock(&scene.lock_of("a", 1))? == stat::GRANTED);
    let mut tcp = scene.server.nlm(A)?;
    ensure!(tcp.test(&scene.lock_of("a", 1))? == Tested::Other(stat::GRANTED));
    // But neither another process, nor another name, nor another address is.
    ensure!(tcp.lock(&scene.lock_of("a", 2))? == stat::DENIED);
    ensure!(tcp.lock(&scene.lock_of("b", 1))? == stat::DENIED);
    let mut other = scene.server.nlm(B)?;
    ensure!(other.lock(&scene.lock_of("a", 1))? == stat::DENIED);
    ensure!(other.unlock(&scene.lock_of("a", 1))? == stat::GRANTED);
    ensure!(
        tcp.lock(&scene.lock_of("a", 2))? == stat::DENIED,
        "still held"
    );
    ensure!(tcp.unlock(&scene.lock_of("a", 1))? == stat::GRANTED);
    ensure!(tcp.lock(&scene.lock_of("a", 2))? == stat::GRANTED);
    Ok(())
}

#[test]
fn an_unlock_does_not_overtake_the_lock_before_it() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let names: Vec<String> = (0..50).map(|number| format!("cold-{number}")).collect();
    for name in &names {
        fs::write(scene.site.export().join(name), "")?;
    }
    let handles: Result<Vec<_>> = names
        .iter()
        .map(|name| look_up(&scene.server, &scene.site, name))
        .collect();
    // The new life of the server has none of the files open, so each LOCK waits for a worker.
    let scene = scene.restart(OPEN)?;
    let mut b = scene.server.nlm(B)?;
    for fh in handles? {
        let mut a = scene.server.nlm(A)?;
        let lock = Lock::new(&fh, "a", 1);
        let mut both = Vec::new();
        for number in [procedure::LOCK, procedure::UNLOCK] {
            let header = Header::new(program::NLM, 4, number, &a.cred);
            both.extend(record(&header.message(next_xid(), &lock.args(4, number))));
        }
        a.peer.send_raw(&both)?;
        for _ in 0..2 {
            a.peer.receive()?;
        }
        ensure!(b.lock(&Lock::new(&fh, "b", 1))? == stat::GRANTED);
    }
    Ok(())
}

#[test]
fn permissions_that_needs_root_to_set_up() -> Result<()> {
    let scene = Scene::new("rw,insecure")?;
    let file = scene.site.export().join("file");
    chown(&file, Some(4201), Some(4201))?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o200))?;
    let ask = |server: &Server, cred: Cred| {
        let mut nlm = server.nlm(A)?;
        nlm.cred = cred;
        let stat = nlm.lock(&scene.lock_of("a", 1))?;
        nlm.unlock(&scene.lock_of("a", 1))?;
        Ok::<_, anyhow::Error>(stat)
    };
    let user = |uid| Cred::user(uid, uid);
    ensure!(
        ask(&scene.server, user(4201))? == stat::GRANTED,
        "the owner"
    );
    ensure!(
        ask(&scene.server, user(4202))? == stat::DENIED,
        "may not read"
    );
    ensure!(
        ask(&scene.server, Cred::root())? == stat::DENIED,
        "squashed"
    );
    fs::set_permissions(&file, fs::Permissions::from_mode(0o204))?;
    ensure!(ask(&scene.server, user(4202))? == stat::GRANTED, "may read");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o000))?;
    let scene_fh = scene.fh.clone();
    let Scene { site, server, .. } = scene;
    server.kill()?;
    let server = site.serve("rw,insecure,no_auth_nlm")?;
    let mut nlm = server.nlm(A)?;
    nlm.cred = user(4202);
    ensure!(nlm.lock(&Lock::new(&scene_fh, "a", 1))? == stat::GRANTED);
    server.kill()?;
    let server = site.serve("ro,insecure,no_auth_nlm")?;
    let mut nlm = server.nlm(B)?;
    ensure!(nlm.lock(&Lock::new(&scene_fh, "b", 1))? == stat::ROFS);
    let shared = Lock {
        exclusive: false,
        ..Lock::new(&scene_fh, "b", 1)
    };
    ensure!(
        nlm.lock(&shared)? == stat::DENIED,
        "but it may be shared, if it were free"
    );
    server.kill()?;
    let only = format!("{}:127.0.0.1({OPEN})", site.export().display());
    let server = site.serve_exports(&[&only], &[])?;
    ensure!(
        server.nlm(B)?.lock(&shared)? == stat::STALE_FH,
        "not this host's"
    );
    server.kill()?;
    let secure = site.serve("rw,no_root_squash")?;
    ensure!(
        secure.nlm(B)?.lock(&shared)? == stat::DENIED,
        "not from this port"
    );
    Ok(())
}

/// What the tests of restarts claim can fail: a server that answers before its log is on disk loses
/// a lock when it is killed, and the next one is given to somebody else.
#[test]
fn a_server_that_answers_too_early_is_found_out() -> Result<()> {
    let mut scene = Scene::new(OPEN)?;
    for _ in 0..10 {
        scene.site.set_fault(Some("answer-before-commit"));
        scene = scene.restart(OPEN)?;
        let mut a = scene.server.nlm(A)?;
        ensure!(a.lock(&scene.lock_of("a", 1))? == stat::GRANTED);
        scene.site.set_fault(None);
        scene = scene.restart(OPEN)?;
        if scene.server.nlm(B)?.lock(&scene.lock_of("b", 1))? == stat::GRANTED {
            return Ok(());
        }
        // The machine was slow, and the log was written before the kill came.
        ensure!(scene.server.nlm(A)?.unlock(&scene.lock_of("a", 1))? == stat::GRANTED);
    }
    anyhow::bail!("the fault was never noticed")
}

#[test]
fn needs_root_a_mount_that_two_exports_cross_into_at_once_has_one_lock_table() -> Result<()> {
    for round in 0..15 {
        let site = Site::new()?;
        for dir in ["one", "one/m", "two", "two/m"] {
            fs::create_dir(site.path().join(dir))?;
        }
        let site = site.with_mounts(
            "mount -t tmpfs -o mode=777 none one/m; echo x > one/m/file; mount --bind one/m two/m",
        );
        let exports = ["one", "two"].map(|name| {
            let path = site.path().join(name);
            format!("{}:*({OPEN},crossmnt)", path.display())
        });
        let server = site.serve_exports(&[&exports[0], &exports[1]], &[])?;
        // At the same moment, through both.
        let look_up = |name: &str| {
            let root = server.handle(&site.path().join(name))?;
            let mut nfs = server.nfs(Cred::root())?;
            let crossed = nfs.find(&root, b"m")?;
            nfs.find(&crossed, b"file")
        };
        let [one, two] = std::thread::scope(|scope| {
            let both = ["one", "two"].map(|name| scope.spawn(move || look_up(name)));
            both.map(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("panicked")))
        });
        let (one, two) = (Lock::new(&one?, "a", 1), Lock::new(&two?, "b", 1));
        ensure!(server.nlm(A)?.lock(&one)? == stat::GRANTED);
        ensure!(server.nlm(B)?.lock(&two)? == stat::DENIED, "round {round}");
    }
    Ok(())
}
