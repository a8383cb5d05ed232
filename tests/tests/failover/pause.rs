//! The active node stands still, or can't be reached, and is back after another one has taken its
//! service: it must find out before it says anything. And what no node can know, since all links
//! are up: that clients don't reach it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_tests::lab::cluster::{Cluster, NODES, Plan, Serving, host_of};

use crate::scene::{ALPHA, Expected, Scene, Setting, in_scene, is_caught};

#[test]
fn an_active_node_that_comes_back() -> Result<()> {
    in_scene("pause", &Setting::usual(true), comes_back)
}

#[test]
fn an_active_node_that_comes_back_without_notices() -> Result<()> {
    in_scene("pause-quiet", &Setting::usual(false), comes_back)
}

fn comes_back(scene: &mut Scene<'_>) -> Result<()> {
    let lab = scene.lab;
    scene.case(
        "the active node is cut off from the other nodes",
        Expected::Takeover,
        |cluster, before| cluster.cut_from_peers(before.node),
        |cluster, before| {
            cluster.heal_to_peers(before.node)?;
            cluster.wait_joined(before.node)
        },
    )?;
    scene.case(
        "the active node is cut off from all",
        Expected::Takeover,
        |cluster, before| {
            lab.cut(host_of(before.node))?;
            cluster.cut_from_peers(before.node)
        },
        |cluster, before| {
            lab.heal(host_of(before.node))?;
            cluster.heal_to_peers(before.node)?;
            cluster.wait_joined(before.node)
        },
    )?;
    scene.case(
        "the active node is stopped, and goes on",
        Expected::Takeover,
        |cluster, before| cluster.pause(before.node),
        |cluster, before| {
            cluster.resume(before.node)?;
            cluster.wait_joined(before.node)
        },
    )
}

/// The checks would see a node that ignores the end of its lease.
#[test]
fn an_active_node_that_answers_without_its_lease_is_caught() -> Result<()> {
    let broken = Setting {
        plan: Plan {
            fault: Some("lease"),
            ..Setting::usual(true).plan
        },
        ..Setting::usual(true)
    };
    in_scene("caught-lease", &broken, |scene| {
        let outcome = scene.case(
            "the active node is stopped, and goes on in spite of its lease",
            Expected::Takeover,
            |cluster, before| cluster.pause(before.node),
            |cluster, before| {
                cluster.resume(before.node)?;
                cluster.wait_joined(before.node)
            },
        );
        // On the wire, or by its own word, if it is asked before it hears of the other one.
        is_caught(outcome, &["the old node spoke", "two nodes answer for"])
    })
}

#[test]
fn an_active_node_whose_cable_is_pulled_out() -> Result<()> {
    in_scene("unplugged", &Setting::usual(true), unplugged)
}

#[test]
fn an_active_node_whose_cable_is_pulled_out_without_notices() -> Result<()> {
    in_scene("unplugged-quiet", &Setting::usual(false), unplugged)
}

fn unplugged(scene: &mut Scene<'_>) -> Result<()> {
    let lab = scene.lab;
    scene.case(
        "the cable to the clients is pulled out of the active node",
        Expected::Takeover,
        |_, before| lab.unplug(host_of(before.node)),
        |cluster, before| {
            lab.plug(host_of(before.node))?;
            cluster.wait_joined(before.node)
        },
    )?;
    // It is given away at once, also if no other node could have it: whoever is reached first
    // takes it then.
    scene.case(
        "the cables to the clients are pulled out of all nodes, and one is plugged in again",
        Expected::Again,
        |cluster, before| {
            for node in NODES {
                lab.unplug(host_of(node))?;
            }
            cluster.wait("the service is released", |cluster| {
                let told = cluster.service(before.node, ALPHA.name)?;
                told.active.is_none().then_some(())
            })?;
            let other = cluster.others(&[before.node])[0];
            lab.plug(host_of(other))
        },
        |cluster, before| {
            let other = cluster.others(&[before.node])[0];
            let serving = cluster.serving(ALPHA.name)?;
            let by = serving.map(|serving| serving.node);
            ensure!(by == Some(other), "served without a cable: {by:?}");
            let mut nodes = cluster.others(&[other]).into_iter();
            nodes.try_for_each(|node| lab.plug(host_of(node)))
        },
    )
}

/// A node whose link is up can't know that frames get lost behind it, so it keeps the service.
#[test]
fn clients_that_do_not_reach_the_active_node_wait_until_they_do_or_it_is_moved() -> Result<()> {
    in_scene("clients-cut-off", &Setting::usual(true), |scene| {
        let lab = scene.lab;
        let from = scene.records()?.count();
        scene.case(
            "the active node is cut off from clients for a while, its link is up",
            Expected::Nothing,
            |cluster, before| {
                lab.cut(host_of(before.node))?;
                stays(cluster, before)?;
                lab.heal(host_of(before.node))
            },
            |_, _| Ok(()),
        )?;
        let silent = scene.records()?.longest_gap(from);
        ensure!(silent >= CUT_OFF_TIME, "they had answers: {silent:?}");
        let from = scene.records()?.count();
        scene.case(
            "the active node is cut off from clients until the service is moved",
            Expected::Move,
            |cluster, before| {
                lab.cut(host_of(before.node))?;
                stays(cluster, before)?;
                let to = cluster.others(&[before.node])[0];
                cluster.order_move(ALPHA.name, to)
            },
            |_, before| lab.heal(host_of(before.node)),
        )?;
        let silent = scene.records()?.longest_gap(from);
        ensure!(silent >= CUT_OFF_TIME, "they had answers: {silent:?}");
        Ok(())
    })
}

/// For some time the service stays where it is.
fn stays(cluster: &Cluster<'_>, before: Serving) -> Result<()> {
    let deadline = Instant::now() + CUT_OFF_TIME;
    while Instant::now() < deadline {
        let serving = cluster.serving(ALPHA.name)?;
        ensure!(serving == Some(before), "{before:?}, {serving:?}");
        thread::sleep(POLL);
    }
    Ok(())
}

/// Twice as long as any node takes to find out what it can find out.
const CUT_OFF_TIME: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(20);
