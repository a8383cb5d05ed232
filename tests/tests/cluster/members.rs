//! Nodes come and go while a service is used: leaders are told to let others lead, a cluster of one
//! grows to three and shrinks again, a node whose disk was wiped comes back.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use havenfs_tests::cluster::{Cluster, LEASE_TIME};

use crate::scene::{ALPHA, ONE, Scene, ms};

/// How long clients may wait while members come and go: nothing of a service changes by that. A
/// busy machine may lose a lease.
const UNNOTICED_MAX: Duration = LEASE_TIME;

/// Makes a cluster of `n1` alone, and waits until it serves.
pub(crate) fn start_one(cluster: &mut Cluster) -> Result<()> {
    let error = refused(cluster.repair("n1", &["init", "--absent", "n2"]))?;
    ensure!(error.contains("init --absent n3`"), "{error}");
    let said = cluster.repair("n1", &["init", "--absent", "n2", "--absent", "n3"])?;
    ensure!(said.contains("havenfs cluster add n2 --address"), "{said}");
    cluster.spawn("n1")?;
    cluster.wait_joined("n1")?;
    cluster.wait_serving(ALPHA, |serving| serving.node == "n1")?;
    Ok(())
}

/// What an operator is told who is refused something.
pub(crate) fn refused(said: Result<String>) -> Result<String> {
    match said {
        Ok(said) => bail!("it was done: {said}"),
        Err(error) => Ok(error.to_string()),
    }
}

fn in_new(test: impl FnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
    let mut cluster = Cluster::new(&ONE)?;
    let result = test(&mut cluster);
    if result.is_err() {
        cluster.show_logs();
    }
    result
}

/// A removed node has ended, and said why and what to do.
fn has_ended(cluster: &mut Cluster, name: &str) -> Result<()> {
    let status = cluster.wait_ended(name)?;
    let log = cluster.log(name)?;
    let is_told = log.contains("was removed");
    ensure!(status.code() == Some(3) && is_told, "{status}: {log}");
    ensure!(log.contains("move its state directory away"), "{log}");
    Ok(())
}

#[test]
fn one_becomes_three_and_one_again_while_a_lock_is_held() -> Result<()> {
    in_new(|cluster| {
        start_one(cluster)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let before = cluster.wait_serving(ALPHA, |_| true)?;
        let begun = Instant::now();
        let writer = scene.writer(cluster);
        cluster.spawn("n2")?;
        let said = cluster.add("n1", "n2")?;
        ensure!(said.contains("an even number of voters"), "{said}");
        cluster.spawn("n3")?;
        let said = cluster.add("n2", "n3")?;
        ensure!(said.contains("3 vote (n1, n2, n3)"), "{said}");
        scene.is_held()?;
        // It had a lease before the others could have taken anything.
        ensure!(cluster.wait_serving(ALPHA, |_| true)? == before);
        let mut written = writer.finish()?;
        println!("two nodes were added in {}", ms(begun.elapsed()));
        let gap = written.client.nfs.longest_gap(begun);
        println!("meanwhile the longest pause of writes was {}", ms(gap));
        ensure!(gap < UNNOTICED_MAX);
        // They count: one more is lost, and its service goes on.
        cluster.kill("n1")?;
        let after = cluster.wait_serving(ALPHA, |serving| serving.node != "n1")?;
        ensure!(after.epoch == before.epoch + 1, "{after:?}");
        scene.is_held()?;
        cluster.restart("n1")?;
        cluster.move_to(ALPHA, "n1")?;
        let back = cluster.wait_serving(ALPHA, |_| true)?;
        // Whoever serves is not removed.
        let error = refused(cluster.operate("n2", &["remove", "n1"]))?;
        ensure!(error.contains("havenfs service move alpha --to"), "{error}");
        let begun = Instant::now();
        let writer = scene.writer(cluster);
        let said = cluster.operate("n1", &["remove", "n2"])?;
        ensure!(said.contains("2 vote (n1, n3)"), "{said}");
        has_ended(cluster, "n2")?;
        let said = cluster.operate("n1", &["remove", "n3"])?;
        ensure!(said.contains("1 vote (n1)"), "{said}");
        has_ended(cluster, "n3")?;
        let error = refused(cluster.operate("n1", &["remove", "n1"]))?;
        ensure!(error.contains("the only voter"), "{error}");
        scene.is_held()?;
        ensure!(cluster.wait_serving(ALPHA, |_| true)? == back);
        written = writer.finish()?;
        println!("two nodes were removed in {}", ms(begun.elapsed()));
        let gap = written.client.nfs.longest_gap(begun);
        println!("meanwhile the longest pause of writes was {}", ms(gap));
        ensure!(gap < UNNOTICED_MAX);
        // A removed node that is started again is not let in.
        cluster.spawn("n3")?;
        has_ended(cluster, "n3")?;
        cluster.kill("n1")?;
        cluster.restart("n1")?;
        cluster.wait_serving(ALPHA, |serving| serving.node == "n1")?;
        scene.is_held()?;
        scene.unlock_for_b()?;
        scene.machines_are_well()
    })
}

#[test]
fn leadership_goes_where_it_is_wanted() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let scene = Scene::new(cluster)?;
        let begun = Instant::now();
        let writer = scene.writer(cluster);
        let before = cluster.wait_serving(ALPHA, |_| true)?;
        let leader = cluster.wait_leader()?;
        let other = cluster.others(&[leader])[0];
        let asked = cluster.others(&[leader, other])[0];
        let said = cluster.operate(asked, &["transfer", "--to", other])?;
        ensure!(said.contains(&format!("`{other}` leads now")), "{said}");
        ensure!(cluster.wait_leader()? == other);
        cluster.operate(asked, &["transfer"])?;
        ensure!(cluster.wait_leader()? != other);
        let error = refused(cluster.operate(asked, &["transfer", "--to", "n9"]))?;
        ensure!(error.contains("there are: n1, n2, n3"), "{error}");
        let written = writer.finish()?;
        let gap = written.client.nfs.longest_gap(begun);
        println!("the longest pause of writes was {}", ms(gap));
        ensure!(gap < UNNOTICED_MAX && cluster.wait_serving(ALPHA, |_| true)? == before);
        Ok(())
    })
}

#[test]
fn a_wiped_node_comes_back_under_its_name() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        cluster.kill("n3")?;
        fs::remove_dir_all(cluster.site.state("n3"))?;
        // Two of three must live, and two do; without n2 only one would.
        let error = refused(cluster.operate("n1", &["remove", "n2"]))?;
        ensure!(error.contains("n3 was not heard of lately"), "{error}");
        cluster.spawn("n3")?;
        cluster.wait("n3 says what to do", |cluster| {
            let log = cluster.log("n3").ok()?;
            log.contains("havenfs cluster remove n3").then_some(())
        })?;
        let said = cluster.operate("n3", &["status"])?;
        ensure!(said.contains("WAITS FOR ITS CLUSTER"), "{said}");
        ensure!(said.contains("havenfs cluster remove n3"), "{said}");
        let address = cluster.site.member("n3")?.to_string();
        let error = refused(cluster.operate("n2", &["add", "n3", "--address", &address]))?;
        ensure!(error.contains("havenfs cluster remove n3"), "{error}");
        cluster.operate("n2", &["remove", "n3"])?;
        let said = cluster.add("n1", "n3")?;
        ensure!(said.contains("number 4"), "{said}");
        // It counts again.
        cluster.kill("n2")?;
        scene.is_held()?;
        cluster.kill("n1")?;
        cluster.spawn("n2")?;
        cluster.wait_serving(ALPHA, |serving| serving.node != "n1")?;
        scene.is_held()?;
        scene.unlock_for_b()?;
        scene.machines_are_well()
    })
}
