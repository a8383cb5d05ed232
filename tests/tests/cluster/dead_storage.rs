//! Nodes whose storage is dead, by a planted fault, and says so at once: nobody gives them a
//! service, and they take none, also if nobody else is left.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_tests::cluster::{Cluster, POLL};

use crate::scene::{ALPHA, ONE, Scene};

/// How long two nodes are watched that might pass a service to and fro.
const WATCHED: Duration = Duration::from_secs(8);
/// The first node that takes it can't know better, if nothing was tried yet; then all have said it.
const EPOCHS_MAX: u64 = 2;

/// Nodes that have said that their storage does not work, as another one knows.
fn failing(cluster: &Cluster, asked: &str) -> Option<usize> {
    let status = cluster.status(asked).ok()?;
    let failing = status["services"][0]["storage_fails_on"].as_array()?;
    Some(failing.len())
}

#[test]
fn a_service_does_not_go_where_the_storage_is_dead() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let before = cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        cluster.plant = Some("dead-storage");
        for node in ["n2", "n3"] {
            cluster.kill(node)?;
            cluster.restart(node)?;
        }
        cluster.wait("both say that their storage is dead", |cluster| {
            (failing(cluster, "n1")? == 2).then_some(())
        })?;
        let refused = cluster.ask("n1", &format!("move {ALPHA} n2"))?;
        let error = refused["error"].as_str().unwrap_or_default();
        ensure!(error.contains("does not work on node n2"), "{refused}");
        ensure!(cluster.serving(ALPHA)? == Some(before));

        // The only node on which it works dies.
        cluster.kill("n1")?;
        let deadline = Instant::now() + WATCHED;
        while Instant::now() < deadline {
            let serving = cluster.serving(ALPHA)?;
            ensure!(serving.is_none(), "{serving:?}");
            thread::sleep(POLL);
        }
        let epoch = cluster.service("n2", ALPHA)?.epoch;
        ensure!(
            epoch <= before.epoch + EPOCHS_MAX,
            "epoch {epoch} after {before:?}"
        );
        cluster.plant = None;
        cluster.restart("n1")?;
        let after = cluster.wait_serving(ALPHA, |serving| serving.node == "n1")?;
        println!(
            "epoch {} before, {epoch} with nobody able, then {}",
            before.epoch, after.epoch
        );
        scene.is_held()?;

        // One of them is repaired, and can be given it.
        cluster.kill("n2")?;
        cluster.restart("n2")?;
        cluster.wait("the storage of n2 works again", |cluster| {
            (failing(cluster, "n1")? == 1).then_some(())
        })?;
        cluster.move_to(ALPHA, "n2")?;
        scene.is_held()
    })
}
