//! Nodes die that serve nothing, two die at once, one dies while it takes over.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::cluster::LEASE_TIME;
use havenfs_tests::lab::clock::Micros;
use havenfs_tests::lab::cluster::{Cluster, NODES, Plan, Serving};

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
    let setting = Setting {
        plan: Plan {
            has_witness: true,
            ..Setting::usual(true).plan
        },
        ..Setting::usual(true)
    };
    in_scene("witness", &setting, |scene| {
        let witness = NODES[2];
        scene.case(
            "the witness loses its power",
            Expected::Nothing,
            |cluster, _| {
                cluster.power_off(witness)?;
                let leader = cluster.wait_leader()?;
                ensure!(leader != witness, "it leads");
                Ok(())
            },
            |cluster, _| cluster.power_on(witness),
        )?;
        scene.case(
            "one of two nodes with data loses its power",
            Expected::Takeover,
            |cluster, before| cluster.power_off(before.node),
            |cluster, before| cluster.power_on(before.node),
        )
    })
}

/// How long a node without a majority is looked at after the end of its lease.
const SILENT_TIME: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(20);
