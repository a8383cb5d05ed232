//! What an operator does to a service as a whole: a service that was released is served by nobody,
//! whatever is restarted, until it is taken or moved; an announcement reaches all its hosts.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use havenfs_tests::cluster::machine::Notice;
use havenfs_tests::cluster::{Cluster, NODES, POLL};
use serde_json::Value;

use crate::hooked::Hooked;
use crate::scene::{ALPHA, LEASE_AND_MORE, ONE, Scene};

/// What an operator says to a node; an error if it is refused.
fn say(cluster: &Cluster, node: &str, request: &str) -> Result<String> {
    let answer = cluster.ask(node, request)?;
    match answer["error"].as_str() {
        None => Ok(answer["done"].as_str().unwrap_or_default().to_owned()),
        Some(error) => bail!("{error}"),
    }
}

/// Whether a node knows that the service is released, and by whom it is still had.
fn told(cluster: &Cluster, node: &str) -> Option<(bool, Value)> {
    let status = cluster.status(node).ok()?;
    let service = status["services"].as_array()?.first()?;
    Some((service["released"] == true, service["active"].clone()))
}

fn wait_released(cluster: &Cluster) -> Result<()> {
    cluster.wait("all nodes know it to be released", |cluster| {
        let mut told = cluster.running().map(|node| told(cluster, node));
        told.all(|told| told == Some((true, Value::Null)))
            .then_some(())
    })
}

/// Nobody takes it within the time in which a lost node's service is taken.
fn stays_released(cluster: &Cluster) -> Result<()> {
    let deadline = Instant::now() + LEASE_AND_MORE + Duration::from_secs(1);
    while Instant::now() < deadline {
        let serving = cluster.serving(ALPHA)?;
        ensure!(serving.is_none(), "{serving:?}");
        thread::sleep(POLL);
    }
    wait_released(cluster)
}

#[test]
fn a_released_service_stays_down_over_restarts_until_it_is_taken() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let before = cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let done = say(cluster, "n2", &format!("release {ALPHA}"))?;
        ensure!(done.contains("node n1 has stopped it"), "{done}");
        wait_released(cluster)?;
        stays_released(cluster)?;
        let again = say(cluster, "n1", &format!("release {ALPHA}"));
        let again = again.err().map(|error| error.to_string());
        ensure!(
            again.as_deref() == Some("service `alpha` is released already"),
            "{again:?}"
        );
        // One after the other, and all at once.
        for node in NODES {
            cluster.stop(node)?;
            cluster.restart(node)?;
        }
        cluster.kill_all(&NODES)?;
        for node in NODES {
            cluster.spawn(node)?;
        }
        for node in NODES {
            cluster.wait_joined(node)?;
        }
        stays_released(cluster)?;
        let done = say(cluster, "n3", &format!("take {ALPHA}"))?;
        ensure!(done.contains("begins on node n3"), "{done}");
        let after = cluster.wait_serving(ALPHA, |serving| serving.node == "n3")?;
        ensure!(after.epoch == before.epoch + 1, "{before:?} {after:?}");
        scene.is_held()?;
        // From another node it is a planned move.
        say(cluster, "n2", &format!("take {ALPHA}"))?;
        let moved = cluster.wait_serving(ALPHA, |serving| serving.node == "n2")?;
        ensure!(moved.epoch == after.epoch + 1, "{after:?} {moved:?}");
        say(cluster, "n2", &format!("release {ALPHA}"))?;
        wait_released(cluster)?;
        cluster.move_to(ALPHA, "n1")?;
        scene.is_held()?;
        scene.unlock_for_b()?;
        scene.machines_are_well()
    })
}

#[test]
fn what_a_lost_node_had_is_let_go_by_it_when_it_is_back() -> Result<()> {
    Hooked::run(|hooked| {
        let cluster = &mut hooked.cluster;
        let before = cluster.wait_serving(ALPHA, |_| true)?;
        cluster.wait_leader()?;
        cluster.kill("n1")?;
        // In time, since the others wait for the lease.
        let done = say(cluster, "n2", &format!("release {ALPHA}"))?;
        ensure!(done.contains("is released"), "{done}");
        let deadline = Instant::now() + LEASE_AND_MORE + Duration::from_secs(1);
        while Instant::now() < deadline {
            let serving = cluster.serving(ALPHA)?;
            ensure!(serving.is_none(), "{serving:?}");
            thread::sleep(POLL);
        }
        ensure!(told(cluster, "n2") == Some((true, "n1".into())));
        cluster.restart("n1")?;
        wait_released(cluster)?;
        let events = hooked.all_events();
        let last = events.last().map_or("", String::as_str);
        ensure!(last.starts_with("release n1 "), "{events:?}");
        let after = hooked.cluster.move_to(ALPHA, "n3")?;
        ensure!(after.epoch > before.epoch, "{before:?} {after:?}");
        let events = hooked.events();
        ensure!(
            !events.iter().any(|event| event.starts_with("fence ")),
            "{events:?}"
        );
        Ok(())
    })
}

#[test]
fn an_announcement_reaches_all_hosts_under_all_names_with_one_number() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let serving = cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let request = format!("announce {ALPHA}");
        let elsewhere = say(cluster, "n2", &request).err();
        let elsewhere = elsewhere.map(|error| error.to_string());
        ensure!(
            elsewhere.as_deref() == Some("service `alpha` is served by node n1: ask there"),
            "{elsewhere:?}"
        );
        let answer = cluster.ask("n1", &request)?;
        ensure!(answer["hosts"] == 2, "{answer}");
        let state = answer["nsm_state"].as_i64().unwrap_or_default();
        ensure!(state > serving.nsm_state && state % 2 == 1, "{answer}");
        let service = cluster.site.service(ALPHA);
        let names = [
            "alpha.example".to_owned(),
            "alpha".to_owned(),
            service.to_string(),
        ];
        for machine in [&scene.machine_a, &scene.machine_b] {
            let heard = cluster.wait("all names are heard", |_| {
                let notices = machine.heard().notices;
                let is_heard = |name: &String| notices.iter().any(|notice| notice.name == *name);
                names.iter().all(is_heard).then_some(notices)
            })?;
            let is_right = |notice: &Notice| {
                i64::from(notice.nsm_state) == state && notice.from.ip() == service
            };
            ensure!(heard.iter().all(is_right), "{heard:?}");
        }
        cluster.wait("the list shows that they were told", |cluster| {
            let hosts = cluster.ask("n1", "hosts").ok()?;
            let mut hosts = hosts["entries"].as_array()?.iter();
            hosts.all(|host| host["restart"] == "told").then_some(())
        })?;
        scene.is_held()?;
        scene.unlock_for_b()?;
        scene.machines_are_well()
    })
}
