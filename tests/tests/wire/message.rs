//! NLM: the forms that are answered by a call (macOS uses no others), and shares (as Windows opens
//! files).

use anyhow::{Result, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::host::Received;
use havenfs_tests::client::nlm::{Lock, Share, Tested, procedure, stat};
use havenfs_tests::client::peer::Transport;
use havenfs_tests::server::V4;

use crate::locking::{A, B, Machine, Scene};
use crate::scene::OPEN;

/// Receives a result and answers its call.
fn receive(machine: &Machine, number: u32) -> Result<Received> {
    let call = machine.host.next_call_of(program::NLM, number)?;
    call.reply(&[])?;
    ensure!(
        call.from.ip() == V4 && call.from.port() < 1024,
        "{}",
        call.from
    );
    Ok(call)
}

/// A cookie as macOS makes it.
fn with_cookie(lock: &Lock) -> Lock {
    Lock {
        cookie: vec![1, 2, 3, 4, 5, 6, 7, 8],
        ..lock.clone()
    }
}

#[test]
fn needs_root_every_message_form_is_answered_by_a_call() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let machine = Machine::start(1)?;
    for transport in [Transport::Tcp, Transport::Udp] {
        for version in [1, 3, 4] {
            let mut nlm = machine.nlm(&scene, transport)?;
            nlm.version = version;
            let lock = with_cookie(&scene.lock_of("mac", 77).range(5, 10));
            let res = |number| -> Result<u32> {
                let call = receive(&machine, number)?;
                ensure!((call.transport, call.version) == (transport, version));
                let (cookie, stat) = call.res()?;
                ensure!(cookie == lock.cookie, "byte for byte");
                Ok(stat)
            };
            nlm.lock_msg(&lock)?;
            ensure!(res(procedure::LOCK_RES)? == stat::GRANTED);
            let mut b = scene.server.nlm(B)?;
            ensure!(b.lock(&scene.lock_of("b", 1).range(14, 1))? == stat::DENIED);
            nlm.unlock_msg(&lock)?;
            ensure!(res(procedure::UNLOCK_RES)? == stat::GRANTED);
            ensure!(b.lock(&scene.lock_of("b", 1).range(14, 1))? == stat::GRANTED);
            nlm.test_msg(&lock)?;
            let (cookie, tested) = receive(&machine, procedure::TEST_RES)?.test_res()?;
            ensure!(cookie == lock.cookie);
            ensure!(matches!(&tested, Tested::Denied(held) if held.l_offset == 14));
            nlm.lock_msg(&lock)?;
            ensure!(res(procedure::LOCK_RES)? == stat::DENIED);
            let waiting = Lock {
                block: true,
                ..lock.clone()
            };
            nlm.lock_msg(&waiting)?;
            ensure!(res(procedure::LOCK_RES)? == stat::BLOCKED);
            nlm.cancel_msg(&waiting)?;
            ensure!(res(procedure::CANCEL_RES)? == stat::GRANTED);
            ensure!(b.unlock(&scene.lock_of("b", 1))? == stat::GRANTED);
            let bad = with_cookie(&Lock::new(b"no handle", "mac", 77));
            nlm.lock_msg(&bad)?;
            let expected = if version == 4 {
                stat::STALE_FH
            } else {
                stat::DENIED_NOLOCKS
            };
            ensure!(res(procedure::LOCK_RES)? == expected);
        }
    }
    Ok(())
}

#[test]
fn needs_root_a_message_that_is_sent_twice_does_one_thing() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let machine = Machine::start(1)?;
    let mut nlm = machine.nlm(&scene, Transport::Udp)?;
    let lock = scene.lock_of("mac", 1);
    nlm.lock_msg(&lock)?;
    receive(&machine, procedure::LOCK_RES)?;
    let xid = havenfs_tests::client::rpc::next_xid();
    let unlock = lock.args(4, procedure::UNLOCK_MSG);
    nlm.outcome_as(xid, procedure::UNLOCK_MSG, &unlock)?;
    ensure!(receive(&machine, procedure::UNLOCK_RES)?.res()?.1 == stat::GRANTED);
    nlm.lock_msg(&lock)?;
    ensure!(receive(&machine, procedure::LOCK_RES)?.res()?.1 == stat::GRANTED);
    // The copy is answered as the first one was, and the newer lock stays.
    nlm.outcome_as(xid, procedure::UNLOCK_MSG, &unlock)?;
    ensure!(receive(&machine, procedure::UNLOCK_RES)?.res()?.1 == stat::GRANTED);
    ensure!(scene.server.nlm(B)?.lock(&scene.lock_of("b", 1))? == stat::DENIED);
    Ok(())
}

/// What a host opens a file for, and what it denies others.
pub(crate) fn share(scene: &Scene, host: &str, access: u32, mode: u32) -> Share {
    Share {
        cookie: b"share".to_vec(),
        caller_name: host.into(),
        fh: scene.fh.clone(),
        oh: b"opener".to_vec(),
        mode,
        access,
        reclaim: false,
    }
}

pub(crate) const READ: u32 = 1;
const READ_WRITE: u32 = 3;

#[test]
fn a_share_keeps_others_from_opening_until_it_is_given_back() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    for version in [3, 4] {
        let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
        (a.version, b.version) = (version, version);
        // Denies writing.
        ensure!(a.share(&share(&scene, "a", READ, 2))?.0 == stat::GRANTED);
        ensure!(
            a.share(&share(&scene, "a", READ, 2))?.0 == stat::GRANTED,
            "again"
        );
        ensure!(b.share(&share(&scene, "b", READ_WRITE, 0))?.0 == stat::DENIED);
        ensure!(b.share(&share(&scene, "b", READ, 0))?.0 == stat::GRANTED);
        ensure!(b.unshare(&share(&scene, "b", READ, 0))?.0 == stat::GRANTED);
        ensure!(
            b.unshare(&share(&scene, "b", READ, 0))?.0 == stat::GRANTED,
            "of nothing"
        );
        ensure!(a.unshare(&share(&scene, "a", READ, 2))?.0 == stat::GRANTED);
        ensure!(b.share(&share(&scene, "b", READ_WRITE, 0))?.0 == stat::GRANTED);
        ensure!(b.unshare(&share(&scene, "b", READ_WRITE, 0))?.0 == stat::GRANTED);
    }
    Ok(())
}

#[test]
fn needs_root_a_share_outlives_the_server_and_not_its_host() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    ensure!(scene.server.nlm(A)?.share(&share(&scene, "a", READ, 3))?.0 == stat::GRANTED);
    let scene = scene.restart(OPEN)?;
    let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
    ensure!(b.share(&share(&scene, "b", READ, 0))?.0 == stat::DENIED);
    let reclaim = Share {
        reclaim: true,
        ..share(&scene, "a", READ, 3)
    };
    ensure!(a.share(&reclaim)?.0 == stat::GRANTED);
    scene.nsm(A)?.notify(b"a", 77)?;
    ensure!(b.share(&share(&scene, "b", READ, 0))?.0 == stat::GRANTED);
    Ok(())
}

#[test]
fn a_read_only_export_can_be_opened_as_windows_does() -> Result<()> {
    let scene = Scene::new("ro,insecure,no_root_squash")?;
    let mut a = scene.server.nlm(A)?;
    ensure!(a.share(&share(&scene, "a", READ, 2))?.0 == stat::GRANTED);
    ensure!(a.share(&share(&scene, "a", READ_WRITE, 0))?.0 == stat::ROFS);
    Ok(())
}
