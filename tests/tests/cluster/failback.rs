//! A service goes back to its preferred node by itself where that is configured, and stays where an
//! operator has put it.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_tests::cluster::{Cluster, NODES, POLL};

use crate::scene::{ALPHA, ONE, Scene, ms, rises_by_one};

/// What is configured.
const AFTER: Duration = Duration::from_secs(2);

#[test]
fn it_goes_back_when_its_node_has_lived_for_a_while_unless_it_was_moved() -> Result<()> {
    let mut cluster = Cluster::new(&ONE)?;
    for node in NODES {
        let lines = format!(
            "preferred = \"n1\"\nfailback = \"auto\"\nfailback_seconds = {}\n",
            AFTER.as_secs()
        );
        let text = cluster.site.config_text(node)?;
        let text = text.replace("preferred = \"n1\"\n", &lines);
        fs::write(cluster.site.config(node), text)?;
    }
    let result = goes_back_and_stays(&mut cluster);
    if result.is_err() {
        cluster.show_logs();
    }
    result
}

fn goes_back_and_stays(cluster: &mut Cluster) -> Result<()> {
    cluster.start()?;
    let mut scene = Scene::new(cluster)?;
    scene.lock_and_wait()?;
    cluster.kill("n1")?;
    let elsewhere = cluster.wait_serving(ALPHA, |serving| serving.node != "n1")?;
    let begun = Instant::now();
    cluster.restart("n1")?;
    let back = cluster.wait_serving(ALPHA, |serving| serving.node == "n1")?;
    let took = begun.elapsed();
    println!("back after {}", ms(took));
    ensure!(took >= AFTER, "{took:?}");
    rises_by_one(elsewhere, back)?;
    let status = cluster.status("n1")?;
    let takeover = &status["services"][0]["last_takeover"];
    ensure!(takeover["kind"] == "move", "{status}");
    let log = cluster.log(elsewhere.node)?;
    ensure!(log.contains("going back to the preferred node"), "{log}");
    scene.is_held()?;
    // An operator's word.
    let put = cluster.move_to(ALPHA, "n3")?;
    let deadline = Instant::now() + AFTER + Duration::from_secs(2);
    while Instant::now() < deadline {
        let serving = cluster.serving(ALPHA)?;
        ensure!(serving == Some(put), "{serving:?}");
        thread::sleep(POLL);
    }
    let status = cluster.status("n2")?;
    ensure!(status["services"][0]["placed"] == "n3", "{status}");
    // It ends with the loss of that node.
    cluster.kill("n3")?;
    let after = cluster.wait_serving(ALPHA, |serving| serving.node == "n1")?;
    ensure!(after.epoch > put.epoch, "{put:?} {after:?}");
    scene.is_held()?;
    scene.unlock_for_b()?;
    scene.machines_are_well()
}
