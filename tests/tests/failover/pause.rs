//! The active node stands still, or can't be reached, and is back after another one has taken its
//! service: it must find out before it says anything.

use anyhow::{Result, ensure};
use havenfs_tests::lab::cluster::host_of;

use crate::scene::{Expected, Scene, Setting, in_scene};

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
    // Nobody is better off, so nothing moves; it is there again when one cable is.
    scene.case(
        "the cables to the clients are pulled out of all nodes, and one is plugged in again",
        Expected::Any,
        |cluster, before| {
            for node in cluster.others(&[]) {
                lab.unplug(host_of(node))?;
            }
            let other = cluster.others(&[before.node])[0];
            lab.plug(host_of(other))
        },
        |cluster, _| {
            for node in cluster.others(&[]) {
                lab.plug(host_of(node))?;
            }
            ensure!(cluster.serving("alpha")?.is_some(), "nobody serves");
            Ok(())
        },
    )
}
