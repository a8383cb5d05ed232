//! A stopped node is made a cluster: of a server that had none, or when all others are lost.

use std::fs;
use std::net::TcpListener;

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::client::nlm::stat;
use havenfs_tests::cluster::{Cluster, NODES};

use crate::members::refused;
use crate::scene::{ALPHA, ONE, Scene};

/// What a node's configuration says, without a cluster.
fn text_alone(cluster: &Cluster, name: &str) -> Result<String> {
    let text = cluster.site.config_text(name)?;
    let (before, rest) = text.split_once("[cluster]").context("no [cluster]")?;
    let (_, services) = rest.split_once("[[service]]").context("no [[service]]")?;
    let before = before.replace(&format!("node = \"{name}\"\n"), "");
    let services = services
        .lines()
        .filter(|line| !line.starts_with("preferred") && !line.starts_with("storage"));
    let services: Vec<&str> = services.collect();
    Ok(format!("{before}[[service]]{}\n", services.join("\n")))
}

#[test]
fn a_server_without_a_cluster_becomes_one_with_its_locks_and_handles() -> Result<()> {
    let mut cluster = Cluster::new(&ONE)?;
    let result = grow(&mut cluster);
    if result.is_err() {
        cluster.show_logs();
    }
    result
}

fn grow(cluster: &mut Cluster) -> Result<()> {
    let config = cluster.site.config("n1");
    let in_cluster = fs::read_to_string(&config)?;
    fs::write(&config, text_alone(cluster, "n1")?)?;
    cluster.spawn("n1")?;
    cluster.wait("it serves alone", |cluster| {
        cluster.is_ready("n1").then_some(())
    })?;
    let mut scene = Scene::new(cluster)?;
    scene.lock_and_wait()?;
    fs::write(&config, &in_cluster)?;
    let error = refused(cluster.repair("n1", &["init"]))?;
    ensure!(error.contains("is in use by process"), "{error}");
    cluster.stop("n1")?;
    // It would have to give its locks up.
    cluster.spawn("n1")?;
    ensure!(!cluster.wait_ended("n1")?.success());
    let log = cluster.log("n1")?;
    ensure!(log.contains("havenfs cluster init"), "{log}");
    crate::members::start_one(cluster)?;
    let status = cluster.service("n1", ALPHA)?;
    ensure!(status.locks == 1, "{status:?}");
    scene.is_held()?;
    // The others understand its handles as well.
    for name in ["n2", "n3"] {
        cluster.spawn(name)?;
        cluster.add("n1", name)?;
    }
    cluster.kill("n1")?;
    cluster.wait_serving(ALPHA, |serving| serving.node != "n1")?;
    scene.is_held()?;
    scene.unlock_for_b()?;
    scene.machines_are_well()?;
    let error = refused(cluster.repair("n1", &["init"]))?;
    ensure!(error.contains("belongs to a cluster already"), "{error}");
    Ok(())
}

#[test]
fn one_of_three_survives_with_grace_and_the_others_are_refused() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let mut scene = Scene::new(cluster)?;
        let held = scene.held();
        ensure!(scene.a.lock(&held)? == stat::GRANTED);
        cluster.kill_all(&["n2", "n3"])?;
        // One that is taken for dead, and lives.
        let both = ["sole-survivor", "--i-fenced", "n1", "--i-fenced", "n2"];
        let error = refused(cluster.repair("n3", &both))?;
        ensure!(error.contains("`n1` answers"), "{error}");
        cluster.kill("n1")?;
        let survive = ["sole-survivor", "--i-fenced", "n1"];
        let error = refused(cluster.repair("n3", &survive))?;
        ensure!(error.contains("to be off: n2"), "{error}");
        let survive = [&survive[..], &["--i-fenced", "n2"]].concat();
        let said = cluster.repair("n3", &survive)?;
        ensure!(said.contains("generation 1"), "{said}");
        let error = refused(cluster.repair("n3", &survive))?;
        ensure!(error.contains("the only voter already"), "{error}");
        cluster.spawn("n3")?;
        cluster.wait_serving(ALPHA, |serving| serving.node == "n3")?;
        // Locks may be missing: only what was held before may be locked now.
        let status = cluster.status("n3")?;
        ensure!(status["services"][0]["complete"] == false, "{status}");
        let wanted = scene.wanted();
        let answer = scene.c.lock(&wanted)?;
        ensure!(answer == stat::DENIED_GRACE_PERIOD, "{answer}");
        let mut reclaim = scene.held();
        reclaim.reclaim = true;
        ensure!(scene.a.lock(&reclaim)? == stat::GRANTED);
        cluster.ask("n3", "end-grace")?;
        scene.is_held()?;
        // The others were given up. Together they would be a majority of what was.
        for name in ["n1", "n2"] {
            cluster.spawn(name)?;
        }
        for name in ["n1", "n2"] {
            let status = cluster.wait_ended(name)?;
            let log = cluster.log(name)?;
            ensure!(!status.success() && log.contains("generation 0"), "{log}");
        }
        let status = cluster.service("n3", ALPHA)?;
        ensure!(status.serving, "{status:?}");
        // They come back empty.
        fs::remove_dir_all(cluster.site.state("n1"))?;
        cluster.spawn("n1")?;
        cluster.add("n3", "n1")?;
        let moved = cluster.move_to(ALPHA, "n1")?;
        ensure!(moved.node == "n1");
        scene.is_held()
    })
}

#[test]
fn grace_ends_although_there_was_no_majority_when_its_time_was_over() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let mut scene = Scene::new(cluster)?;
        cluster.kill_all(&NODES)?;
        for node in ["n1", "n3"] {
            let text = cluster.site.config_text(node)? + "grace_seconds = 6\n";
            fs::write(cluster.site.config(node), text)?;
        }
        let survive = ["sole-survivor", "--i-fenced", "n1", "--i-fenced", "n2"];
        cluster.repair("n3", &survive)?;
        fs::remove_dir_all(cluster.site.state("n1"))?;
        cluster.spawn("n3")?;
        cluster.wait_serving(ALPHA, |serving| serving.node == "n3")?;
        cluster.spawn("n1")?;
        cluster.add("n3", "n1")?;
        cluster.pause("n1")?;
        cluster.wait("its time is over", |cluster| {
            let log = cluster.log("n3").ok()?;
            let is_over = log.contains("grace is over and can't be ended yet");
            is_over.then_some(())
        })?;
        cluster.resume("n1")?;
        cluster.wait("new locks are granted", |cluster| {
            let status = cluster.status("n3").ok()?;
            (status["services"][0]["complete"] == true).then_some(())
        })?;
        let wanted = scene.wanted();
        ensure!(scene.c.lock(&wanted)? == stat::GRANTED);
        Ok(())
    })
}

#[test]
fn one_of_two_survives_with_all_locks() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        cluster.operate("n1", &["remove", "n3"])?;
        ensure!(!cluster.wait_ended("n3")?.success());
        cluster.kill_all(&["n1", "n2"])?;
        let survive = ["sole-survivor", "--i-fenced", "n1", "--none-went-on-alone"];
        let said = cluster.repair("n2", &survive)?;
        ensure!(said.contains("all locks are there"), "{said}");
        cluster.spawn("n2")?;
        cluster.wait_serving(ALPHA, |serving| serving.node == "n2")?;
        let status = cluster.status("n2")?;
        ensure!(status["services"][0]["complete"] == true, "{status}");
        scene.is_held()?;
        scene.unlock_for_b()?;
        scene.machines_are_well()?;
        // The only member may come back at another address, and the log has it then.
        cluster.stop("n2")?;
        let before = cluster.site.member("n2")?;
        let now = TcpListener::bind((before.ip(), 0))?
            .local_addr()?
            .to_string();
        let config = cluster.site.config("n2");
        let text = fs::read_to_string(&config)?;
        fs::write(&config, text.replace(&before.to_string(), &now))?;
        cluster.spawn("n2")?;
        cluster.wait_serving(ALPHA, |serving| serving.node == "n2")?;
        cluster.wait("the log has the other address", |cluster| {
            let status = cluster.status("n2").ok()?;
            (status["members"][0]["address"] == *now).then_some(())
        })
    })
}
