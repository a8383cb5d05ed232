//! Nodes that are not what they were: with an empty disk, or without the cluster's key. They are
//! let in nowhere, count for no majority, and say what to do.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_tests::cluster::{Cluster, TIME_MAX};

use crate::majority::{ask_until, is_silent_after};
use crate::scene::{ALPHA, ONE, Scene};

/// How long nobody may answer, counted from the loss of the majority.
const SILENCE: Duration = Duration::from_secs(5);

/// A node that runs and counts for nothing: one more is killed, and nobody serves. `words` are in
/// its log.
fn counts_for_nothing(cluster: &mut Cluster, outcast: &str, words: &[&str]) -> Result<()> {
    let before = cluster.wait_serving(ALPHA, |_| true)?;
    let mut scene = Scene::new(cluster)?;
    scene.lock_and_wait()?;
    let deadline = Instant::now() + TIME_MAX;
    let log = cluster.wait("its log names the remedy", |cluster| {
        let log = cluster.log(outcast).ok()?;
        let is_whole = words.iter().all(|word| log.contains(word));
        (is_whole || Instant::now() + Duration::from_secs(1) > deadline).then_some(log)
    })?;
    for word in words {
        ensure!(
            log.contains(word),
            "no `{word}` in the log of {outcast}:\n{log}"
        );
    }
    // Its former life may count as alive until its lease is over.
    cluster.wait("it knows nobody", |cluster| {
        knows_nobody(cluster, outcast).ok()
    })?;
    let other = cluster.others(&[outcast, before.node])[0];
    let lost = Instant::now();
    cluster.kill(other)?;
    let asked = ask_until(&cluster.site, &scene.c, &scene.fh, lost + SILENCE)?;
    is_silent_after(&asked, lost)?;
    ensure!(cluster.is_running(outcast)?, "{outcast} has ended");
    knows_nobody(cluster, outcast)?;
    // With a proper one it goes on.
    cluster.spawn(other)?;
    let after = cluster.wait_serving(ALPHA, |_| true)?;
    ensure!(after.epoch >= before.epoch, "{before:?}, {after:?}");
    scene.is_held()?;
    scene.unlock_for_b()?;
    scene.machines_are_well()
}

/// The node has not even become a member; or it has once been one, and now it neither hears of the
/// others, nor they of it.
fn knows_nobody(cluster: &Cluster, outcast: &str) -> Result<()> {
    if !cluster.is_ready(outcast) {
        return Ok(());
    }
    for asked in cluster.running() {
        let status = cluster.status(asked)?;
        let members = status["members"].as_array();
        for member in members.into_iter().flatten() {
            let is_apart = (member["name"] == *outcast) != (asked == outcast);
            ensure!(
                !is_apart || member["lives"] == false,
                "{asked} says {status}"
            );
        }
    }
    let status = cluster.service(outcast, ALPHA)?;
    ensure!(!status.serving, "{outcast} says {status:?}");
    Ok(())
}

/// A node that serves nothing.
fn bystander(cluster: &Cluster) -> Result<&'static str> {
    let serving = cluster.wait_serving(ALPHA, |_| true)?;
    Ok(cluster.others(&[serving.node])[1])
}

#[test]
fn a_wiped_node_does_not_vote() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let wiped = bystander(cluster)?;
        cluster.kill(wiped)?;
        fs::remove_dir_all(cluster.site.state(wiped))?;
        cluster.spawn(wiped)?;
        counts_for_nothing(
            cluster,
            wiped,
            &[
                "this node with another store",
                "remove this node from the cluster",
            ],
        )
    })
}

/// A node that is no member of anything yet, or was one until it got another key.
fn another_key_gets_nothing(was_a_member: bool) -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let stranger = bystander(cluster)?;
        cluster.kill(stranger)?;
        let text = cluster.site.config_text(stranger)?;
        let key = "a key of another cluster, which is as long as it has to be";
        cluster.site.write_key("other.key", key)?;
        ensure!(text.contains("cluster.key"));
        let text = text.replace("cluster.key", "other.key");
        fs::write(cluster.site.config(stranger), text)?;
        if !was_a_member {
            fs::remove_dir_all(cluster.site.state(stranger))?;
        }
        cluster.spawn(stranger)?;
        counts_for_nothing(cluster, stranger, &["compare the cluster keys"])
    })
}

#[test]
fn a_member_that_got_another_key_gets_nothing() -> Result<()> {
    another_key_gets_nothing(true)
}

#[test]
fn a_stranger_with_another_key_gets_nothing() -> Result<()> {
    another_key_gets_nothing(false)
}
