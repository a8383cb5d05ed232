//! Nodes die that serve nothing, two die at once, one dies while it takes over.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::cluster::LEASE_TIME;
use havenfs_tests::lab::clock::Micros;
use havenfs_tests::lab::cluster::{Cluster, NODES, Plan, Serving};

use crate::power::place;
use crate::scene::{ALPHA, Expected, Scene, Setting, in_scene, now};

#[test]
fn loss_of_others() -> Result<()> {
    in_scene("others", &Setting::usual(true), others)
}

#[test]
fn loss_of_others_without_notices() -> Result<()> {
    in_scene("others-quiet", &Setting::usual(false), others)
}

fn others(scene: &mut Scene<'_>) -> Result<()> {
    let mut alone = None;
    scene.case(
        "two of three nodes lose their power, and one of them comes back",
        Expected::Any,
        |cluster, before| {
            let gone = cluster.others(&[before.node]);
            for node in &gone {
                cluster.power_off(node)?;
            }
            alone = Some((before.node, stays_silent(cluster, before)?));
            cluster.power_on(gone[0])
        },
        |cluster, before| {
            let gone = cluster.others(&[before.node]);
            cluster.power_on(gone[1])
        },
    )?;
    let (last, times) = alone.context("the case has happened")?;
    scene.was_silent(last, times)?;
    scene.case(
        "the active node and another one are killed, and one of them comes back",
        Expected::Again,
        |cluster, before| {
            let other = cluster.others(&[before.node])[0];
            cluster.kill(before.node)?;
            cluster.kill(other)?;
            cluster.spawn(other)
        },
        |cluster, before| cluster.restart(before.node),
    )?;
    scene.case(
        "all nodes are killed and come back",
        Expected::Again,
        |cluster, _| {
            for node in NODES {
                cluster.kill(node)?;
            }
            NODES.into_iter().try_for_each(|node| cluster.spawn(node))
        },
        |cluster, _| {
            let mut nodes = NODES.into_iter();
            nodes.try_for_each(|node| cluster.wait_joined(node))
        },
    )?;
    scene.case(
        "a node is killed that has just been given the service of a killed one",
        Expected::Again,
        |cluster, before| {
            cluster.kill(before.node)?;
            let next = wait_assigned(cluster, before)?;
            cluster.kill(&next)?;
            cluster.spawn(before.node)?;
            cluster.spawn(&next)
        },
        |cluster, _| {
            let mut nodes = NODES.into_iter();
            nodes.try_for_each(|node| cluster.wait_joined(node))
        },
    )
}

/// The active node serves nothing any more, for some time; returns since when it had no majority,
/// and until when this was looked at.
fn stays_silent(cluster: &Cluster<'_>, before: Serving) -> Result<[Micros; 2]> {
    let (from, deadline) = (now(), Instant::now() + LEASE_TIME + SILENT_TIME);
    cluster.wait("the last node falls silent", |cluster| {
        let told = cluster.service(before.node, ALPHA.name)?;
        (!told.serving).then_some(())
    })?;
    while Instant::now() < deadline {
        let serving = cluster.serving(ALPHA.name)?;
        ensure!(serving.is_none(), "served without a majority: {serving:?}");
        thread::sleep(POLL);
    }
    Ok([from, now()])
}

/// The node that the service is assigned to next, whether it serves already or not.
fn wait_assigned(cluster: &Cluster<'_>, before: Serving) -> Result<String> {
    cluster.wait("the service is assigned to another node", |cluster| {
        let mut told = cluster.running().filter_map(|node| {
            let told = cluster.service(node, ALPHA.name)?;
            (told.epoch > before.epoch).then_some(told.active?)
        });
        told.find(|active| active != before.node)
    })
}

#[test]
fn two_nodes_and_a_witness() -> Result<()> {
    in_scene("witness", &with_witness(true), losses_beside_a_witness)
}

#[test]
fn two_nodes_and_a_witness_without_notices() -> Result<()> {
    in_scene(
        "witness-quiet",
        &with_witness(false),
        losses_beside_a_witness,
    )
}

fn with_witness(has_notices: bool) -> Setting {
    let usual = Setting::usual(has_notices);
    Setting {
        plan: Plan {
            has_witness: true,
            ..usual.plan
        },
        ..usual
    }
}

fn losses_beside_a_witness(scene: &mut Scene<'_>) -> Result<()> {
    scene.case(
        "the witness loses its power",
        Expected::Nothing,
        |cluster, _| {
            cluster.power_off(WITNESS)?;
            cluster.wait_leader().map(drop)
        },
        |cluster, _| cluster.power_on(WITNESS),
    )?;
    scene.case(
        "one of two nodes with data loses its power",
        Expected::Takeover,
        |cluster, before| cluster.power_off(before.node),
        |cluster, before| cluster.power_on(before.node),
    )
}

#[test]
fn a_witness_leads_only_until_a_node_with_data_can() -> Result<()> {
    in_scene("witness-leads", &with_witness(true), |scene| {
        let leader = scene.cluster.wait_leader()?;
        let answer = scene.cluster.ask(leader, &format!("transfer {WITNESS}"))?;
        ensure!(answer["error"].is_string(), "it was made to lead: {answer}");
        let leads = place(&scene.cluster, true)?.node;
        let other = scene.cluster.others(&[leads])[0];
        scene.cluster.cut_from_peers(other)?;
        // By then it misses entries; and so it does the one with which the waiter gets in line.
        scene.cluster.wait("the node is missed", |cluster| {
            (!cluster.lives(leads, other)).then_some(())
        })?;
        scene.case(
            "the witness alone has what the lost node has written last",
            Expected::Takeover,
            |cluster, before| {
                cluster.power_off(before.node)?;
                cluster.heal_to_peers(other)?;
                hands_over(cluster)
            },
            |cluster, before| cluster.power_on(before.node),
        )
    })
}

/// The witness has led, and a node with data leads.
fn hands_over(cluster: &Cluster<'_>) -> Result<()> {
    cluster.wait(
        "the witness leads, and a node with data after it",
        |cluster| {
            let said = cluster.output(WITNESS).ok()?;
            let has_led = said.contains("this witness leads, and has");
            let status = cluster.ask(WITNESS, "cluster").ok()?;
            let leader = status["leader"].as_str()?;
            (has_led && leader != WITNESS).then_some(())
        },
    )
}

const WITNESS: &str = NODES[2];
/// How long a node without a majority is looked at after the end of its lease.
const SILENT_TIME: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(20);
