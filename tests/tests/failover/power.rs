//! The active node's process or its host ends without a word.

use anyhow::Result;
use havenfs_tests::lab::cluster::{Cluster, Plan, Serving};

use crate::scene::{ALPHA, Expected, Scene, Setting, in_scene, is_caught};

#[test]
fn death_of_the_active_node() -> Result<()> {
    in_scene("death", &Setting::usual(true), deaths)
}

#[test]
fn death_of_the_active_node_without_notices() -> Result<()> {
    in_scene("death-quiet", &Setting::usual(false), deaths)
}

fn deaths(scene: &mut Scene<'_>) -> Result<()> {
    for leads in [true, false] {
        let role = if leads { "leads" } else { "follows" };
        place(&scene.cluster, leads)?;
        let name = format!("power loss of the active node, which {role}");
        scene.case(
            &name,
            Expected::Takeover,
            |cluster, before| cluster.power_off(before.node),
            |cluster, before| cluster.power_on(before.node),
        )?;
        place(&scene.cluster, leads)?;
        let name = format!("kill -9 of the active node, which {role}");
        scene.case(
            &name,
            Expected::Takeover,
            |cluster, before| cluster.kill(before.node),
            |cluster, before| cluster.restart(before.node),
        )?;
    }
    Ok(())
}

/// The checks would see a node that answers writes before it has done them.
#[test]
fn writes_that_are_answered_too_early_are_caught() -> Result<()> {
    let broken = Setting {
        plan: Plan {
            fault: Some("fsync"),
            ..Setting::usual(true).plan
        },
        ..Setting::usual(true)
    };
    in_scene("caught-fsync", &broken, |scene| {
        scene.case(
            "kill -9 of the active node, which owes writes",
            Expected::Takeover,
            |cluster, before| cluster.kill(before.node),
            |cluster, before| cluster.restart(before.node),
        )?;
        // The new node owes writes as well, and may do them.
        scene.end_writing()?;
        is_caught(scene.nothing_is_lost(), &["acknowledged, but lost"])
    })
}

/// Has the service served by the node that leads, or by one that follows.
pub(crate) fn place(cluster: &Cluster<'_>, leads: bool) -> Result<Serving> {
    let leader = cluster.wait_leader()?;
    let serving = cluster.wait_serving(ALPHA.name, |_| true)?;
    if (serving.node == leader) == leads {
        return Ok(serving);
    }
    let to = if leads {
        leader
    } else {
        cluster.others(&[leader])[0]
    };
    cluster.move_to(ALPHA.name, to)
}
