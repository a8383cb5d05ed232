//! The service is moved as an operator orders it, and by the end of a node that is told to stop.

use anyhow::Result;

use crate::scene::{ALPHA, Expected, Scene, Setting, in_scene};

#[test]
fn planned_moves() -> Result<()> {
    in_scene("moves", &Setting::usual(true), moves)
}

#[test]
fn planned_moves_without_notices() -> Result<()> {
    in_scene("moves-quiet", &Setting::usual(false), moves)
}

fn moves(scene: &mut Scene<'_>) -> Result<()> {
    scene.case(
        "moved",
        Expected::Move,
        |cluster, before| {
            let to = cluster.others(&[before.node])[0];
            cluster.order_move(ALPHA.name, to)
        },
        |_, _| Ok(()),
    )?;
    scene.case(
        "moved back at once",
        Expected::Again,
        |cluster, before| {
            let to = cluster.others(&[before.node])[0];
            cluster.move_to(ALPHA.name, to)?;
            cluster.order_move(ALPHA.name, before.node)
        },
        |_, _| Ok(()),
    )?;
    scene.case(
        "the active node is told to end",
        Expected::Move,
        |cluster, before| cluster.stop(before.node),
        |cluster, before| cluster.restart(before.node),
    )
}

#[test]
fn twenty_takeovers() -> Result<()> {
    in_scene("twenty", &Setting::usual(true), |scene| {
        const TAKEOVERS: usize = 20;
        for round in 0..TAKEOVERS {
            if round % 2 == 0 {
                scene.case(
                    &format!("{round}: moved"),
                    Expected::Move,
                    |cluster, before| {
                        let to = cluster.others(&[before.node])[round / 2 % 2];
                        cluster.order_move(ALPHA.name, to)
                    },
                    |_, _| Ok(()),
                )?;
            } else {
                scene.case(
                    &format!("{round}: killed"),
                    Expected::Takeover,
                    |cluster, before| cluster.kill(before.node),
                    |cluster, before| cluster.restart(before.node),
                )?;
            }
        }
        Ok(())
    })
}
