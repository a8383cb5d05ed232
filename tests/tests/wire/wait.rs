//! NLM: requests that wait, GRANTED, and what crosses on the wire.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use havenfs_rpc::message::AcceptStat;
use havenfs_rpc::program;
use havenfs_tests::client::host::Received;
use havenfs_tests::client::nlm::{Tested, procedure, res_args, stat};
use havenfs_tests::client::peer::{ANSWER_TIME_MAX, Transport};
use havenfs_tests::server::V4;

use crate::locking::{B, Machine, Scene};
use crate::scene::OPEN;

/// Nothing more is expected; long enough for what would be wrong to arrive.
const QUIET: Duration = Duration::from_millis(700);

/// `machine` waits for the file that B holds.
fn wait_behind_b(scene: &Scene, machine: &Machine, transport: Transport) -> Result<()> {
    ensure!(scene.server.nlm(B)?.lock(&scene.lock_of("b", 1))? == stat::GRANTED);
    let mut nlm = machine.nlm(scene, transport)?;
    ensure!(nlm.lock(&scene.waiting("a", 1))? == stat::BLOCKED);
    Ok(())
}

fn unlock_b(scene: &Scene) -> Result<()> {
    ensure!(scene.server.nlm(B)?.unlock(&scene.lock_of("b", 1))? == stat::GRANTED);
    Ok(())
}

/// Who is in the way of an exclusive lock of a stranger.
fn holder(scene: &Scene) -> Result<Option<i32>> {
    let stranger = IpAddr::from([127, 0, 0, 13]);
    let tested = scene
        .server
        .nlm(stranger)?
        .test(&scene.lock_of("stranger", 9))?;
    Ok(match tested {
        Tested::Denied(holder) => Some(holder.svid),
        Tested::Other(_) => None,
    })
}

/// Receives a GRANTED_MSG and answers its call.
fn receive(machine: &Machine) -> Result<Received> {
    let call = machine
        .host
        .next_call_of(program::NLM, procedure::GRANTED_MSG)?;
    call.reply(&[])?;
    Ok(call)
}

#[test]
fn needs_root_a_waiter_is_told_in_the_way_it_asked() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let machine = Machine::start(1)?;
    for transport in [Transport::Tcp, Transport::Udp] {
        for version in [1, 3, 4] {
            ensure!(scene.server.nlm(B)?.lock(&scene.lock_of("b", 1))? == stat::GRANTED);
            let mut nlm = machine.nlm(&scene, transport)?;
            nlm.version = version;
            let wanted = scene.waiting("a", 1).range(7, 100);
            ensure!(nlm.lock(&wanted)? == stat::BLOCKED);
            unlock_b(&scene)?;
            let call = receive(&machine)?;
            ensure!((call.transport, call.version) == (transport, version));
            ensure!(
                call.from.ip() == V4,
                "from the address that was asked: {}",
                call.from
            );
            ensure!(
                call.from.port() < 1024,
                "from a reserved port: {}",
                call.from
            );
            let granted = call.granted()?;
            ensure!(granted.cookie.len() == 16, "no cookie of macOS");
            let same = (&granted.fh, &granted.oh, granted.svid, &granted.caller_name);
            ensure!(same == (&wanted.fh, &wanted.oh, wanted.svid, &wanted.caller_name));
            ensure!((granted.l_offset, granted.l_len) == (7, 100) && granted.exclusive);
            nlm.granted_res(&granted.cookie, stat::GRANTED)?;
            ensure!(machine.host.next_call_within(QUIET)?.is_none(), "told once");
            ensure!(holder(&scene)? == Some(1));
            ensure!(nlm.unlock(&wanted)? == stat::GRANTED);
        }
    }
    Ok(())
}

/// `machine` takes the lock that B gives back, but its answer is lost, and the second telling finds
/// nobody there who waits. Says whether `next` in line is told within `limit` that the lock is its
/// own, which two hosts believe then.
fn is_given_twice(
    scene: &Scene,
    machine: &Machine,
    next: &Machine,
    limit: Duration,
) -> Result<bool> {
    wait_behind_b(scene, machine, Transport::Tcp)?;
    let mut nlm = next.nlm(scene, Transport::Tcp)?;
    ensure!(nlm.lock(&scene.waiting("next", 2))? == stat::BLOCKED);
    unlock_b(scene)?;
    let first = receive(machine)?.granted()?.cookie;
    let second = receive(machine)?.granted()?.cookie;
    ensure!(first != second, "each telling has its own cookie");
    machine
        .nlm(scene, Transport::Tcp)?
        .granted_res(&second, stat::DENIED)?;
    let told = next.host.next_call_within(limit)?;
    told.as_ref().map_or(Ok(false), |call| {
        ensure!(call.granted()?.svid == 2, "of its own lock");
        Ok(true)
    })
}

#[test]
fn needs_root_a_grant_that_is_not_answered_is_told_again_and_never_taken_back() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let (machine, next) = (Machine::start(1)?, Machine::start(2)?);
    ensure!(!is_given_twice(&scene, &machine, &next, QUIET)?);
    ensure!(holder(&scene)? == Some(1));
    ensure!(scene.server.nlm(B)?.lock(&scene.lock_of("b", 1))? == stat::DENIED);
    let mut nlm = machine.nlm(&scene, Transport::Tcp)?;
    ensure!(nlm.unlock(&scene.lock_of("a", 1))? == stat::GRANTED);
    ensure!(receive(&next)?.granted()?.svid == 2);
    ensure!(holder(&scene)? == Some(2));
    Ok(())
}

#[test]
fn needs_root_a_server_that_takes_grants_back_is_found_out() -> Result<()> {
    let mut scene = Scene::new(OPEN)?;
    scene.site.set_fault(Some("release-on-lost-granted-res"));
    let scene = scene.restart(OPEN)?;
    let (machine, next) = (Machine::start(1)?, Machine::start(2)?);
    ensure!(is_given_twice(&scene, &machine, &next, ANSWER_TIME_MAX)?);
    Ok(())
}

#[test]
fn needs_root_the_first_telling_refused_gives_the_lock_to_the_next() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let (machine, next) = (Machine::start(1)?, Machine::start(2)?);
    wait_behind_b(&scene, &machine, Transport::Tcp)?;
    let mut nlm = next.nlm(&scene, Transport::Tcp)?;
    ensure!(nlm.lock(&scene.waiting("next", 2))? == stat::BLOCKED);
    unlock_b(&scene)?;
    let cookie = receive(&machine)?.granted()?.cookie;
    // A stranger can't answer for the host.
    scene.server.nlm(B)?.granted_res(&cookie, stat::DENIED)?;
    ensure!(next.host.next_call_within(QUIET)?.is_none());
    machine
        .nlm(&scene, Transport::Tcp)?
        .granted_res(&cookie, stat::DENIED)?;
    receive(&next)?;
    ensure!(holder(&scene)? == Some(2));
    Ok(())
}

#[test]
fn needs_root_cancel_and_granted_cross() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let machine = Machine::start(1)?;
    wait_behind_b(&scene, &machine, Transport::Tcp)?;
    let mut nlm = machine.nlm(&scene, Transport::Tcp)?;
    ensure!(nlm.cancel(&scene.waiting("a", 1))? == stat::GRANTED);
    unlock_b(&scene)?;
    ensure!(
        machine.host.next_call_within(QUIET)?.is_none(),
        "nobody waits"
    );
    ensure!(holder(&scene)? == None);
    // And now the GRANTED is on its way when the CANCEL comes.
    wait_behind_b(&scene, &machine, Transport::Tcp)?;
    unlock_b(&scene)?;
    let cookie = receive(&machine)?.granted()?.cookie;
    ensure!(nlm.cancel(&scene.waiting("a", 1))? == stat::GRANTED);
    ensure!(holder(&scene)? == None);
    nlm.granted_res(&cookie, stat::DENIED)?;
    ensure!(scene.server.nlm(B)?.lock(&scene.lock_of("b", 1))? == stat::GRANTED);
    nlm.granted_res(&cookie, stat::GRANTED)?;
    ensure!(
        holder(&scene)? == Some(1),
        "B's, whatever is said of an old grant"
    );
    Ok(())
}

#[test]
fn needs_root_who_polls_gets_its_lock_and_is_told_no_more() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let machine = Machine::start(1)?;
    wait_behind_b(&scene, &machine, Transport::Udp)?;
    let mut nlm = machine.nlm(&scene, Transport::Udp)?;
    ensure!(
        nlm.lock(&scene.waiting("a", 1))? == stat::BLOCKED,
        "asks again"
    );
    unlock_b(&scene)?;
    receive(&machine)?;
    ensure!(nlm.lock(&scene.waiting("a", 1))? == stat::GRANTED);
    ensure!(
        machine
            .host
            .next_call_within(Duration::from_millis(1500))?
            .is_none()
    );
    Ok(())
}

#[test]
fn needs_root_a_host_without_the_message_form_is_called() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let machine = Machine::start(1)?;
    wait_behind_b(&scene, &machine, Transport::Tcp)?;
    unlock_b(&scene)?;
    let call = machine
        .host
        .next_call_of(program::NLM, procedure::GRANTED_MSG)?;
    call.refuse(AcceptStat::ProcUnavail)?;
    let call = machine
        .host
        .next_call_of(program::NLM, procedure::GRANTED)?;
    call.reply(&res_args(&call.granted()?.cookie, stat::GRANTED))?;
    ensure!(
        machine
            .host
            .next_call_within(Duration::from_millis(1500))?
            .is_none()
    );
    ensure!(holder(&scene)? == Some(1));
    Ok(())
}

#[test]
fn needs_root_a_restart_keeps_who_waits_in_line_and_tells_what_was_granted() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let (first, second) = (Machine::start(1)?, Machine::start(2)?);
    wait_behind_b(&scene, &first, Transport::Tcp)?;
    let mut nlm = second.nlm(&scene, Transport::Tcp)?;
    ensure!(nlm.lock(&scene.waiting("second", 2))? == stat::BLOCKED);
    let scene = scene.restart_with(OPEN, &["--announce", "never"])?;
    ensure!(holder(&scene)? == Some(1));
    unlock_b(&scene)?;
    let old = receive(&first)?.granted()?.cookie;
    // The answer never comes; the next life tells it again, and does not believe a denial.
    let scene = scene.restart_with(OPEN, &["--announce", "never"])?;
    let again = receive(&first)?.granted()?.cookie;
    ensure!(old != again);
    let mut nlm = first.nlm(&scene, Transport::Tcp)?;
    nlm.granted_res(&old, stat::DENIED)?;
    nlm.granted_res(&again, stat::DENIED)?;
    ensure!(second.host.next_call_within(QUIET)?.is_none());
    ensure!(nlm.unlock(&scene.lock_of("a", 1))? == stat::GRANTED);
    let last = receive(&second)?.granted()?;
    ensure!(last.svid == 2);
    Ok(())
}

#[test]
fn needs_root_a_grant_to_a_host_that_is_not_there_goes_to_the_next() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let (gone, next) = (Machine::start(1)?, Machine::start(2)?);
    wait_behind_b(&scene, &gone, Transport::Tcp)?;
    let mut nlm = next.nlm(&scene, Transport::Tcp)?;
    ensure!(nlm.lock(&scene.waiting("next", 2))? == stat::BLOCKED);
    gone.host.unregister(program::NLM);
    unlock_b(&scene)?;
    // After 1 + 2 + 4 s.
    let call = next.host.next_call_within(Duration::from_secs(20))?;
    ensure!(call.is_some_and(|call| call.procedure == procedure::GRANTED_MSG));
    ensure!(holder(&scene)? == Some(2));
    Ok(())
}

#[test]
fn waiting_for_each_other_is_a_deadlock() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let (mut a, mut b) = (scene.server.nlm(crate::locking::A)?, scene.server.nlm(B)?);
    ensure!(a.lock(&scene.lock_of("a", 1).range(0, 1))? == stat::GRANTED);
    ensure!(b.lock(&scene.lock_of("b", 1).range(1, 1))? == stat::GRANTED);
    ensure!(a.lock(&scene.waiting("a", 1).range(1, 1))? == stat::BLOCKED);
    ensure!(b.lock(&scene.waiting("b", 1).range(0, 1))? == stat::DEADLCK);
    b.version = 3;
    ensure!(
        b.lock(&scene.waiting("b", 1).range(0, 1))? == stat::BLOCKED,
        "has no word for it"
    );
    Ok(())
}
