//! Two services on two nodes: what happens to one is nothing to the other, wherever they are.

use std::time::Instant;

use anyhow::{Result, ensure};
use havenfs_tests::client::nlm::stat;
use havenfs_tests::cluster::Cluster;
use havenfs_tests::cluster::client::Client;
use nfs3_types::mount::mountstat3;
use nfs3_types::nfs3::nfsstat3;

use crate::scene::{ALPHA, BETA, ELECTION_TIME_MAX, Scene, TAKEOVER_TIME_MAX, TWO, ms};

const SOME: usize = 50;

/// What belongs to one service is unknown at the address of the other.
fn are_strangers(cluster: &Cluster, one: &mut Scene, other: &mut Scene) -> Result<()> {
    for (scene, elsewhere) in [(&*one, &*other), (&*other, &*one)] {
        // A host that uses the one asks at the address of the other.
        let mut lost = Client::new(&cluster.site, "lost", 0, elsewhere.service);
        let getattr = lost.getattr(&scene.fh)?.map(|_| ());
        ensure!(getattr == Err(nfsstat3::NFS3ERR_STALE), "{getattr:?}");
        let lock = lost.lock_of(&scene.fh, 1, 7000, 1);
        let answers = [lost.lock(&lock)?, lost.unlock(&lock)?];
        ensure!(answers == [stat::STALE_FH; 2], "{answers:?}");
        let path = cluster.site.export(scene.service);
        let mounted = lost.mount(&path.to_string_lossy())?;
        let noent = Err(mountstat3::MNT3ERR_NOENT as u32);
        ensure!(mounted == noent, "{mounted:?}");
    }
    // And where it belongs, it is what it was.
    one.is_held()?;
    other.is_held()
}

#[test]
fn the_end_of_a_node_is_nothing_to_the_service_of_another() -> Result<()> {
    Cluster::run(&TWO, |cluster| {
        let mut alpha = Scene::of(cluster, ALPHA, 1)?;
        let mut beta = Scene::of(cluster, BETA, 4)?;
        for scene in [&mut alpha, &mut beta] {
            scene.lock_and_wait()?;
        }
        are_strangers(cluster, &mut alpha, &mut beta)?;
        let before = cluster.wait_serving(BETA, |_| true)?;
        let node_of_alpha = cluster.wait_serving(ALPHA, |_| true)?.node;
        ensure!(node_of_alpha != before.node, "both on {node_of_alpha}");
        let leader = cluster.wait_leader()?;
        let writers = [alpha.writer(cluster), beta.writer(cluster)];
        let locker = beta.locker(cluster, &beta.a, 12);
        for load in &writers {
            load.wait_more(SOME)?;
        }
        locker.wait_more(SOME)?;

        let killed = Instant::now();
        cluster.kill(node_of_alpha)?;
        let taken = cluster.wait_serving(ALPHA, |serving| serving.node != node_of_alpha)?;
        for load in &writers {
            load.wait_more(SOME)?;
        }
        locker.wait_more(SOME)?;
        let [of_alpha, of_beta] = writers;
        let (of_alpha, of_beta) = (of_alpha.finish()?, of_beta.finish()?);
        let locked = locker.finish()?;
        let gap = of_beta.client.nfs.longest_gap(killed);
        let lock_gap = locked.client.nlm.longest_gap(killed);
        let alpha_gap = of_alpha.client.nfs.longest_gap(killed);
        println!(
            "{node_of_alpha} killed with {ALPHA} ({leader} led), which {} has now; longest gaps \
             of {BETA} on {}: WRITE {}, LOCK {}; of {ALPHA}: WRITE {}",
            taken.node,
            before.node,
            ms(gap),
            ms(lock_gap),
            ms(alpha_gap)
        );
        for caller in [&of_beta.client.nfs, &locked.client.nlm] {
            ensure!(
                caller.connections == 1,
                "{} connections",
                caller.connections
            );
            ensure!(caller.stalls == 0, "{} stalls", caller.stalls);
        }
        ensure!(cluster.wait_serving(BETA, |_| true)? == before);
        ensure!(of_beta.verifiers()?.len() == 1, "one activation");
        ensure!(gap <= ELECTION_TIME_MAX && lock_gap <= ELECTION_TIME_MAX);
        ensure!(alpha_gap <= TAKEOVER_TIME_MAX, "{alpha_gap:?}");
        alpha.check_written(&of_alpha)?;
        beta.check_written(&of_beta)?;

        // Both on one node.
        if taken.node != before.node {
            cluster.move_to(ALPHA, before.node)?;
        }
        are_strangers(cluster, &mut alpha, &mut beta)?;
        for scene in [&mut alpha, &mut beta] {
            scene.unlock_for_b()?;
            scene.machines_are_well()?;
        }
        Ok(())
    })
}
