//! A node is stopped in its tracks for long, with many calls in hand and more on their way to it:
//! what was not done when it stopped is never done by it, and what was not answered then is never
//! answered.
//!
//! What the paused node does is seen in the exported directory itself, and in the table of the node
//! that has the service meanwhile: both must be, at any later time, as they were found while it
//! stood still. As in [`pause`](crate::pause), what clients send lands at the paused node.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::Peer;
use havenfs_tests::client::nfs::{self, FILE_SYNC, write_args};
use havenfs_tests::client::nlm::{procedure, stat};
use havenfs_tests::cluster::Cluster;

use crate::pause::{connections, ends_silently, is_free, send, taken_from, wait_until};
use crate::scene::{ALPHA, ONE, Scene, ms, rises_by_one};

/// How long the node is paused.
const PAUSE: Duration = Duration::from_secs(30);
/// After so long nothing is on its way any more that the node sent before the pause.
const SETTLED: Duration = Duration::from_secs(1);
/// How many calls of each kind are sent at once: more than it carries out before it stops.
const BURST: u64 = 400;
const RECORD: &[u8] = b"written.";
/// Where the locks of the burst are.
const LOCKS_FROM: u64 = 10_000;

/// Takes what was sent over a connection; returns how many replies that are.
fn drain(peer: &mut Peer) -> Result<usize> {
    peer.set_answer_time(SETTLED)?;
    let mut count = 0;
    while peer.receive().is_ok() {
        count += 1;
    }
    Ok(count)
}

/// Where the records of a file are; a part of one counts as well.
fn records(content: &[u8]) -> BTreeSet<usize> {
    let records = content.chunks(RECORD.len()).enumerate();
    let written = records.filter(|(_, record)| record.iter().any(|byte| *byte != 0));
    written.map(|(number, _)| number).collect()
}

#[test]
fn what_a_node_has_in_hand_when_it_is_paused_for_long_is_never_done() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let before = cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let [early, late] = ["early", "late"].map(|name| cluster.site.export(ALPHA).join(name));
        for path in [&early, &late] {
            fs::write(path, "")?;
        }
        let early_fh = scene.c.find(&cluster.site, ALPHA, "early")?;
        let late_fh = scene.c.find(&cluster.site, ALPHA, "late")?;
        // Connections that stand, with a call answered over each: two for what is sent before the
        // pause, two for what is sent in it.
        let mut peers = Vec::new();
        for _ in 0..2 {
            let (nfs, nlm) = connections(cluster, &scene)?;
            peers.extend([nfs.peer, nlm.peer]);
        }
        let write = |peer: &mut Peer, fh: &[u8], number: u64| {
            let at = number * RECORD.len() as u64;
            let args = write_args(fh, at, RECORD.len() as u32, FILE_SYNC, RECORD);
            send(peer, (program::NFS, 3), nfs::procedure::WRITE, &args)
        };
        // With gaps, so that each stands for itself in the table.
        let lock_of = |number| scene.c.lock_of(&scene.fh, 35, LOCKS_FROM + number * 20, 10);
        let lock = |peer: &mut Peer, number| {
            let args = lock_of(number).args(4, procedure::LOCK);
            send(peer, (program::NLM, 4), procedure::LOCK, &args)
        };

        for number in 0..BURST {
            write(&mut peers[0], &early_fh, number)?;
            lock(&mut peers[1], number)?;
        }
        let paused = Instant::now();
        cluster.pause(before.node)?;
        let written = fs::read(&early)?;
        for number in 0..3 {
            write(&mut peers[2], &late_fh, number)?;
            lock(&mut peers[3], BURST + number)?;
        }
        let taken = taken_from(cluster, before.node)?;
        let taken_after = paused.elapsed();
        let replies = [drain(&mut peers[0])?, drain(&mut peers[1])?];
        let table = cluster.service(&taken, ALPHA)?.locks;
        wait_until(paused + PAUSE);
        let still = cluster.service(&taken, ALPHA)?.locks;
        ensure!(still == table, "{table} locks, then {still}");
        let resumed = Instant::now();
        cluster.resume(before.node)?;

        for peer in &mut peers {
            ends_silently(peer)?;
        }
        let ended = resumed.elapsed();
        let after = cluster.wait_serving(ALPHA, |serving| serving.node == taken)?;
        rises_by_one(before, after)?;
        cluster.wait("the node knows who has the service", |cluster| {
            let told = cluster.service(before.node, ALPHA).ok()?;
            (told.active.as_deref() == Some(after.node)).then_some(())
        })?;
        wait_until(Instant::now() + SETTLED);
        // A's is one of them.
        let (done, held) = (records(&written).len(), table - 1);
        println!(
            "{} paused for {}; {} had the service after {}; of {BURST} WRITEs {done} were done and {} \
             answered, of as many LOCKs {} held and {} answered; old connections ended {} after SIGCONT",
            before.node,
            ms(resumed - paused),
            after.node,
            ms(taken_after),
            replies[0],
            held,
            replies[1],
            ms(ended)
        );
        ensure!(done < BURST as usize, "it was faster than the test");
        ensure!(held < BURST, "it was faster than the test");
        // What was answered is done and held; what was done need not have been answered.
        ensure!(replies[0] <= done && replies[1] as u64 <= held);
        ensure!(fs::read(&early)? == written, "WRITEs were done late");
        ensure!(fs::read(&late)?.is_empty(), "a late WRITE was done");
        let now = cluster.service(after.node, ALPHA)?.locks;
        ensure!(now == table, "{table} locks, then {now}");
        for number in 0..3 {
            is_free(&mut scene.a, &lock_of(BURST + number))?;
        }
        let wanted = lock_of(BURST);
        scene.is_held()?;
        ensure!(cluster.is_running(before.node)?, "it has ended");
        scene.unlock_for_b()?;
        ensure!(scene.c.lock(&wanted)? == stat::GRANTED);
        scene.machines_are_well()
    })
}
