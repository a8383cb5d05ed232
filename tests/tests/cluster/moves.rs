//! Planned moves, to and fro, under load.

use std::fs;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::Peer;
use havenfs_tests::client::nfs::{args, dirop, procedure};
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::rpc::{Cred, Header, next_xid};
use havenfs_tests::cluster::{Cluster, POLL};

use crate::scene::{ALPHA, Locked, ONE, Scene, ms, rises_by_one};

const MOVES: usize = 10;
/// How many moves are cut short.
const CUT_SHORT: usize = 8;
/// How much each load gets done between two moves.
const SOME: usize = 30;
/// How long the service may be away: 0.1 s for calls under way, a sync, three commits, and a busy
/// machine. No lease is waited for.
const MOVE_TIME_MAX: Duration = Duration::from_secs(10);

#[test]
fn moves_to_and_fro_lose_nothing() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let mut serving = cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let writer = scene.writer(cluster);
        let lockers = [
            scene.locker(cluster, &scene.a, 12),
            scene.locker(cluster, &scene.b, 23),
        ];
        let begun = Instant::now();
        let places = [cluster.others(&[serving.node])[0], serving.node];
        let mut times = Vec::new();
        for to in places.into_iter().cycle().take(MOVES) {
            writer.wait_more(SOME)?;
            for locker in &lockers {
                locker.wait_more(SOME)?;
            }
            let asked = Instant::now();
            let moved = cluster.move_to(ALPHA, to)?;
            times.push(asked.elapsed().as_millis());
            rises_by_one(serving, moved)?;
            serving = moved;
            scene.is_held()?;
        }
        writer.wait_more(SOME)?;
        for locker in &lockers {
            locker.wait_more(SOME)?;
        }
        let written = writer.finish()?;
        let [one, other] = lockers;
        let (one, other) = (one.finish()?, other.finish()?);
        let gap = written.client.nfs.longest_gap(begun);
        let lock_gap = [&one, &other].map(|locked| locked.client.nlm.longest_gap(begun));
        println!(
            "{MOVES} moves, each took (ms): {times:?}; longest gaps: WRITE {}, LOCK {} and {}; {} \
             records, {} and {} locks",
            ms(gap),
            ms(lock_gap[0]),
            ms(lock_gap[1]),
            written.count(),
            one.locked.len(),
            other.locked.len()
        );
        Locked::exclude_each_other(&one, &other)?;
        ensure!(
            one.locked.len() + other.locked.len() >= SOME,
            "hardly a lock"
        );
        ensure!(
            written.verifiers()?.len() == MOVES + 1,
            "one for each activation"
        );
        for caller in [&written.client.nfs, &one.client.nlm, &other.client.nlm] {
            ensure!(caller.stalls == 0, "{} stalls", caller.stalls);
            let gap = caller.longest_gap(begun);
            ensure!(gap <= MOVE_TIME_MAX, "{gap:?}");
        }
        scene.check_written(&written)?;
        scene.unlock_for_b()?;
        scene.machines_are_well()
    })
}

/// A move is asked for, and one of the two nodes dies in the middle of it.
fn a_move_is_cut_short(dies: Dies) -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let writer = scene.writer(cluster);
        let lockers = [
            scene.locker(cluster, &scene.a, 12),
            scene.locker(cluster, &scene.b, 23),
        ];
        let mut times = Vec::new();
        for round in 0..CUT_SHORT {
            writer.wait_more(SOME)?;
            for locker in &lockers {
                locker.wait_more(SOME)?;
            }
            let from = cluster.wait_serving(ALPHA, |_| true)?;
            let to = cluster.others(&[from.node])[round % 2];
            cluster.ask(from.node, &format!("move {ALPHA} {to}"))?;
            // A move takes a tenth of a second, so each round cuts it elsewhere.
            let deadline = Instant::now() + Duration::from_millis(round as u64 * 15);
            while Instant::now() < deadline {
                thread::sleep(POLL);
            }
            let victim = match dies {
                Dies::Old => from.node,
                Dies::New => to,
            };
            let killed = Instant::now();
            cluster.kill(victim)?;
            let after = cluster.wait_serving(ALPHA, |serving| serving.node != victim)?;
            times.push((after.epoch - from.epoch, killed.elapsed().as_millis()));
            scene.is_held()?;
            cluster.restart(victim)?;
        }
        writer.wait_more(SOME)?;
        let written = writer.finish()?;
        let [one, other] = lockers;
        let (one, other) = (one.finish()?, other.finish()?);
        println!("epochs and time (ms) until it was served again: {times:?}");
        Locked::exclude_each_other(&one, &other)?;
        written.verifiers()?;
        for caller in [&written.client.nfs, &one.client.nlm, &other.client.nlm] {
            ensure!(caller.stalls == 0, "{} stalls", caller.stalls);
        }
        scene.check_written(&written)?;
        scene.unlock_for_b()?;
        scene.machines_are_well()
    })
}

/// Who dies in a move.
#[derive(Debug, Clone, Copy)]
enum Dies {
    Old,
    New,
}

#[test]
fn a_move_whose_old_node_dies_loses_nothing() -> Result<()> {
    a_move_is_cut_short(Dies::Old)
}

#[test]
fn a_move_whose_new_node_dies_loses_nothing() -> Result<()> {
    a_move_is_cut_short(Dies::New)
}

/// Removes a file, and sends the same call again over a new connection each time the service is
/// somewhere else.
#[test]
fn a_call_that_is_sent_again_after_a_move_gets_its_first_answer() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let mut scene = Scene::new(cluster)?;
        let export = cluster.site.export(ALPHA);
        fs::write(export.join("gone"), "")?;
        let root = scene.c.mount(&export.to_string_lossy())?;
        let root = root.map_err(|status| anyhow!("MNT: status {status}"))?;
        let args = args(|w| dirop(w, &root, b"gone"));
        let header = Header::new(program::NFS, 3, procedure::REMOVE, &Cred::root());
        let message = header.message(next_xid(), &args);
        let (own, at) = (scene.c.address, scene.c.service);
        let nfs = SocketAddr::new(at, cluster.site.ports.nfs);
        let send = || {
            let mut peer = Peer::connect_from(Transport::Tcp, SocketAddr::new(own, 0), nfs)?;
            peer.send(&message)?;
            peer.receive()
        };
        let first = send()?;
        // NFS3_OK behind the header of the reply.
        ensure!(first.get(24..28) == Some(&[0; 4]), "{first:02x?}");
        for to in ["n2", "n3", "n1"] {
            cluster.move_to(ALPHA, to)?;
            let again = send()?;
            ensure!(again == first, "on {to}: {again:02x?}, not {first:02x?}");
        }
        // A node that ends gives it away as well.
        cluster.stop("n1")?;
        let serving = cluster.wait_serving(ALPHA, |_| true)?;
        ensure!(send()? == first, "after the end of a node");
        // Who dies hands nothing over.
        cluster.restart("n1")?;
        cluster.kill(serving.node)?;
        cluster.wait_serving(ALPHA, |now| now.node != serving.node)?;
        let again = send()?;
        ensure!(again.get(24..28) == Some(&[0, 0, 0, 2]), "{again:02x?}");
        scene.lock_and_wait()
    })
}
