//! `kill -9` in the middle of lock traffic: what was answered is so in the server's next life.
//!
//! Nothing reclaims here, so nothing hides a lock that is lost. Power cuts are another test, since
//! what a killed process has written stays without a sync.

use std::fs;

use anyhow::{Result, bail, ensure};
use havenfs_tests::client::taker::{Taker, work_until};
use havenfs_tests::lab::random::Random;
use rustix::process::Signal;

use crate::locking::{A, B, Scene, look_up};
use crate::scene::OPEN;

const KILLS: usize = 5;
/// How many answers the owners get before a kill.
const ANSWERS_MIN: u64 = 200;

#[test]
fn no_lock_is_lost() -> Result<()> {
    let (mut scene, mut random) = (Scene::new(OPEN)?, Random::seeded());
    let mut takers = takers(&scene)?;
    for kill in 0..KILLS {
        scene = kill_while_locking(scene, &mut takers, &mut random, ANSWERS_MIN)?;
        let wrong = judge(&scene, &mut takers)?;
        ensure!(wrong.is_empty(), "kill {kill}: {wrong:#?}");
    }
    Ok(())
}

#[test]
fn a_server_that_answers_before_it_writes_is_found_out() -> Result<()> {
    let (mut scene, mut random) = (Scene::new(OPEN)?, Random::seeded());
    let mut takers = takers(&scene)?;
    for kill in 0..KILLS {
        scene.site.set_fault(Some("answer-before-commit"));
        scene = scene.restart(OPEN)?;
        // The fault makes all calls slow, also those that judge, and so ends with this life.
        scene.site.set_fault(None);
        scene = kill_while_locking(scene, &mut takers, &mut random, ANSWERS_MIN / 20)?;
        let wrong = judge(&scene, &mut takers)?;
        if !wrong.is_empty() {
            eprintln!("kill {kill}: {wrong:#?}");
            return Ok(());
        }
    }
    bail!("{KILLS} kills of a server that answers too early went unnoticed")
}

/// Owners of locks, each on a file of its own.
fn takers(scene: &Scene) -> Result<Vec<Taker>> {
    let taker = |svid: i32| {
        let name = format!("of-{svid}");
        fs::write(scene.site.export().join(&name), "")?;
        let fh = look_up(&scene.server, &scene.site, &name)?;
        Ok(Taker::new(&fh, "a", svid))
    };
    [1, 2].map(taker).into_iter().collect()
}

fn kill_while_locking(
    scene: Scene,
    takers: &mut [Taker],
    random: &mut Random,
    answers_min: u64,
) -> Result<Scene> {
    let connections: Result<Vec<_>> = takers.iter().map(|_| scene.server.nlm(A)).collect();
    let kill = || scene.server.signal(Signal::KILL);
    work_until(takers, connections?, random, answers_min, kill)?;
    scene.restart(OPEN)
}

/// What another host sees of the locks that is not what their owners were told.
fn judge(scene: &Scene, takers: &mut [Taker]) -> Result<Vec<String>> {
    let mut other = scene.server.nlm(B)?;
    let mut wrong = Vec::new();
    for taker in takers {
        wrong.extend(taker.judge(&mut other, "b")?);
    }
    Ok(wrong)
}
