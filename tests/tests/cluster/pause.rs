//! A node is stopped in its tracks and goes on: it says nothing more of what it had in hand.
//!
//! The addresses are fixed, so the paused process keeps the listening sockets, and what clients
//! send lands there. So nobody answers until it goes on; the other node has taken the service long
//! before. What is tested is that the two never answer in turns, and that nothing is lost or done
//! late.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::nfs::{self, FILE_SYNC, args, write_args};
use havenfs_tests::client::nlm::{Lock, procedure, stat};
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::rpc::{Cred, Header, next_xid};
use havenfs_tests::client::{Nfs, Nlm, Peer};
use havenfs_tests::cluster::client::Client;
use havenfs_tests::cluster::{Cluster, POLL};

use crate::scene::{ALPHA, Locked, ONE, Scene, ms, rises_by_one};

/// How long the node is paused.
const PAUSE: Duration = Duration::from_secs(5);
/// After so long nothing is on its way any more that the node sent before the pause.
const SETTLED: Duration = Duration::from_secs(1);
/// How long the node may take to close its connections when it goes on.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(5);
const SOME: usize = 50;

/// Two connections that stand, with a call answered over each.
pub(crate) fn connections(cluster: &Cluster, scene: &Scene) -> Result<(Nfs, Nlm)> {
    let connect = |port| {
        let own = SocketAddr::new(scene.c.address, 0);
        Peer::connect_from(Transport::Tcp, own, SocketAddr::new(scene.c.service, port))
    };
    let mut nfs = Nfs::new(connect(cluster.site.ports.nfs)?, Cred::root());
    nfs.attributes(&scene.fh)?;
    let mut nlm = Nlm::new(connect(cluster.site.ports.nlm)?, Cred::root());
    nlm.null()?;
    Ok((nfs, nlm))
}

/// Sends a call whose answer nobody waits for.
pub(crate) fn send(
    peer: &mut Peer,
    (program, version): (u32, u32),
    procedure: u32,
    args: &[u8],
) -> Result<()> {
    let header = Header::new(program, version, procedure, &Cred::root());
    peer.send(&header.message(next_xid(), args))?;
    Ok(())
}

/// Waits until another node has the service; it can't listen yet, since the paused process has the
/// sockets.
pub(crate) fn taken_from(cluster: &Cluster, paused: &str) -> Result<String> {
    cluster.wait("another node has the service", |cluster| {
        let node = cluster.running().next()?;
        let active = cluster.service(node, ALPHA).ok()?.active?;
        (active != paused).then_some(active)
    })
}

/// A LOCK that the paused node had in hand was not done, as another client sees it.
pub(crate) fn is_free(other: &mut Client, late: &Lock) -> Result<()> {
    let asked = other.lock_of(&late.fh, 12, late.l_offset, late.l_len);
    let holder = other.holder(&asked)?;
    ensure!(holder.is_none(), "the late LOCK was done: {holder:?}");
    Ok(())
}

#[test]
fn a_paused_node_says_nothing_when_it_goes_on() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let before = cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let path = cluster.site.export(ALPHA).join("late");
        fs::write(&path, "")?;
        let late = scene.c.find(&cluster.site, ALPHA, "late")?;
        let (mut nfs, mut nlm) = connections(cluster, &scene)?;
        let writer = scene.writer(cluster);
        writer.wait_more(SOME)?;

        let paused = Instant::now();
        cluster.pause(before.node)?;
        // The kernel takes them, and the node must never carry them out.
        let write = write_args(&late, 0, 4, FILE_SYNC, b"late");
        send(
            &mut nfs.peer,
            (program::NFS, 3),
            nfs::procedure::WRITE,
            &write,
        )?;
        let getattr = args(|w| w.opaque(&scene.fh));
        send(
            &mut nfs.peer,
            (program::NFS, 3),
            nfs::procedure::GETATTR,
            &getattr,
        )?;
        let lock = scene.c.lock_of(&scene.fh, 35, 3000, 10);
        let lock_args = lock.args(4, procedure::LOCK);
        send(
            &mut nlm.peer,
            (program::NLM, 4),
            procedure::LOCK,
            &lock_args,
        )?;
        let taken = taken_from(cluster, before.node)?;
        let taken_after = paused.elapsed();
        wait_until(paused + SETTLED);
        let answered = writer.done();
        wait_until(paused + PAUSE);
        ensure!(
            writer.done() == answered,
            "answered while the node is paused"
        );

        let resumed = Instant::now();
        cluster.resume(before.node)?;
        let ends = [ends_silently(&mut nfs.peer)?, ends_silently(&mut nlm.peer)?];
        let after = cluster.wait_serving(ALPHA, |serving| serving.node != before.node)?;
        let served = resumed.elapsed();
        ensure!(after.node == taken, "{after:?}, and {taken} had it");
        rises_by_one(before, after)?;
        writer.wait_more(SOME)?;
        let written = writer.finish()?;
        println!(
            "{} paused for {}; {taken} had the service after {}, and served {} after SIGCONT; old \
             connections ended: {ends:?}; longest WRITE gap {}, {} stalls",
            before.node,
            ms(resumed - paused),
            ms(taken_after),
            ms(served),
            ms(written.client.nfs.longest_gap(paused)),
            written.client.nfs.stalls
        );
        // One after the other, and never the first one again.
        let verifiers = written.verifiers()?;
        ensure!(verifiers.len() == 2, "{verifiers:02x?}");
        scene.check_written(&written)?;
        ensure!(fs::read(&path)?.is_empty(), "the late WRITE was done");
        is_free(&mut scene.a, &lock)?;
        scene.is_held()?;

        // It is a standby like any other.
        ensure!(cluster.is_running(before.node)?, "it has ended");
        let status = cluster.service(before.node, ALPHA)?;
        ensure!(!status.serving, "{status:?}");
        ensure!(status.active.as_deref() == Some(after.node), "{status:?}");
        let back = cluster.move_to(ALPHA, before.node)?;
        rises_by_one(after, back)?;
        scene.is_held()?;
        scene.unlock_for_b()?;
        ensure!(scene.c.lock(&lock)? == stat::GRANTED);
        scene.machines_are_well()
    })
}

/// Waits for the end of a connection over which nothing comes; says how it ended.
pub(crate) fn ends_silently(peer: &mut Peer) -> Result<ErrorKind> {
    peer.set_answer_time(CLOSE_TIME_MAX)?;
    let error = match peer.receive() {
        Ok(reply) => bail!("an answer over an old connection: {reply:02x?}"),
        Err(error) => error,
    };
    match error.root_cause().downcast_ref::<io::Error>() {
        Some(error)
            if matches!(
                error.kind(),
                ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
            ) =>
        {
            Ok(error.kind())
        }
        _ => Err(error.context("the connection still stands")),
    }
}

pub(crate) fn wait_until(deadline: Instant) {
    while Instant::now() < deadline {
        thread::sleep(POLL);
    }
}

/// Pauses around the length of a lease, in which the service stays or goes.
#[test]
fn short_pauses_lose_nothing() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let writer = scene.writer(cluster);
        let lockers = [
            scene.locker(cluster, &scene.a, 12),
            scene.locker(cluster, &scene.b, 23),
        ];
        let mut told = Vec::new();
        for pause_ms in [300, 900, 1100, 1200, 1250, 1300, 1500, 2000] {
            writer.wait_more(SOME)?;
            for locker in &lockers {
                locker.wait_more(SOME)?;
            }
            let before = cluster.wait_serving(ALPHA, |_| true)?;
            let paused = Instant::now();
            cluster.pause(before.node)?;
            wait_until(paused + Duration::from_millis(pause_ms));
            cluster.resume(before.node)?;
            writer.wait_more(SOME)?;
            scene.is_held()?;
            let after = cluster.wait_serving(ALPHA, |_| true)?;
            let epochs = after.epoch - before.epoch;
            ensure!(epochs <= 1, "{before:?}, {after:?}");
            told.push((pause_ms, epochs));
        }
        let written = writer.finish()?;
        let [one, other] = lockers;
        let (one, other) = (one.finish()?, other.finish()?);
        println!(
            "pauses (ms) and how often the service went elsewhere: {told:?}; {} records, {} and \
             {} locks, stalls: {}, {} and {}",
            written.count(),
            one.locked.len(),
            other.locked.len(),
            written.client.nfs.stalls,
            one.client.nlm.stalls,
            other.client.nlm.stalls
        );
        Locked::exclude_each_other(&one, &other)?;
        let went = told
            .iter()
            .map(|(_, epochs)| *epochs as usize)
            .sum::<usize>();
        ensure!(
            written.verifiers()?.len() == 1 + went,
            "one for each activation"
        );
        for caller in [&written.client.nfs, &one.client.nlm, &other.client.nlm] {
            ensure!(caller.stalls == 0, "{} stalls", caller.stalls);
        }
        scene.check_written(&written)?;
        scene.unlock_for_b()?;
        scene.machines_are_well()
    })
}
