//! A file system that one node at a time may mount goes with the service, never to a node while
//! another one may still write to it, and with all that was acknowledged when a power cut took the
//! rest: what the lost node's kernel had not written.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_tests::lab::acks::{Answered, wait_for_changes};
use havenfs_tests::lab::cluster::{Cluster, Plan, Serving, Storage};

use crate::scene::{ALPHA, Expected, RECONNECT_TIME_MAX, Scene, Setting, in_scene, is_caught};

#[test]
fn a_file_system_of_one_node_at_a_time() -> Result<()> {
    in_scene("image", &in_image(true), one_at_a_time)
}

#[test]
fn a_file_system_of_one_node_at_a_time_without_notices() -> Result<()> {
    in_scene("image-quiet", &in_image(false), power_loss)
}

/// The checks would see a node that answers what only its page cache has.
#[test]
fn writes_that_were_never_synced_are_caught() -> Result<()> {
    let mut broken = in_image(true);
    broken.plan.fault = Some("no-sync");
    in_scene("caught-no-sync", &broken, |scene| {
        // What was there before is on the disk, or the client would miss the file itself.
        let before = scene.cluster.wait_serving(ALPHA.name, |_| true)?;
        let host = scene.cluster.host(before.node);
        host.sh(&format!("sync -f {}", ALPHA.export))?;
        power_loss(scene)?;
        scene.end_writing()?;
        is_caught(scene.nothing_is_lost(), &["acknowledged, but lost"])
    })
}

pub(crate) fn in_image(has_notices: bool) -> Setting {
    let usual = Setting::usual(has_notices);
    Setting {
        plan: Plan {
            storage: Storage::Image,
            ..usual.plan
        },
        ..usual
    }
}

fn power_loss(scene: &mut Scene<'_>) -> Result<()> {
    scene.case(
        "power loss, ext4 that is mounted by the active node",
        Expected::Takeover,
        |cluster, before| cluster.power_off(before.node),
        |cluster, before| cluster.power_on(before.node),
    )
}

fn one_at_a_time(scene: &mut Scene<'_>) -> Result<()> {
    // Stable writes, COMMITs, and changes of names: each is on the disk when it is answered.
    let worker = scene.c2.spawn_worker(WORKER, 1)?;
    wait_for_changes(&worker, CHANGES, RECONNECT_TIME_MAX)?;
    each_way(scene)?;
    wait_for_changes(&worker, CHANGES, RECONNECT_TIME_MAX)?;
    // Nobody answers it after that, so its last words have come through when they are read.
    let files = scene.cluster.directory_in_the_end(ALPHA.name, WORKER)?;
    let answered = Answered::parse(&worker.output()?)?;
    let losses = answered.losses(&files, WORKER);
    let changes = answered.changes();
    eprintln!("failover: {changes} changes were acknowledged");
    ensure!(losses.is_empty(), "acknowledged, but lost: {losses:#?}");
    Ok(())
}

fn each_way(scene: &mut Scene<'_>) -> Result<()> {
    power_loss(scene)?;
    let told = scene.cluster.events(ALPHA.name)?.len();
    scene.case(
        "moved, ext4 that is mounted by the active node",
        Expected::Move,
        |cluster, before| {
            let to = cluster.others(&[before.node])[0];
            cluster.order_move(ALPHA.name, to)
        },
        |cluster, before| {
            let now = cluster.serving(ALPHA.name)?.map(|serving| serving.node);
            let wanted = [
                format!("unmount {}", before.node),
                format!("mount {}", now.unwrap_or_default()),
            ];
            let events = cluster.events(ALPHA.name)?;
            ensure!(events[told..] == wanted, "{:?}", &events[told..]);
            Ok(())
        },
    )?;
    scene.case(
        "the active node is stopped, and its power cut only when it is asked for",
        Expected::Takeover,
        |cluster, before| {
            cluster.pause(before.node)?;
            stays_with(cluster, before)?;
            cluster.power_off(before.node)
        },
        |cluster, before| cluster.power_on(before.node),
    )?;
    scene.case(
        "kill -9 of the active node, whose host keeps the mount until its power is cut",
        Expected::Takeover,
        |cluster, before| {
            cluster.kill(before.node)?;
            stays_with(cluster, before)?;
            cluster.power_off(before.node)
        },
        |cluster, before| cluster.power_on(before.node),
    )
}

/// The fence of a node is asked for; while it has not happened, the file system is that node's.
fn stays_with(cluster: &Cluster<'_>, before: Serving) -> Result<()> {
    let (order, fenced) = (
        format!("fence {}", before.node),
        format!("fenced {}", before.node),
    );
    let told = |words: &str| -> Result<usize> {
        let events = cluster.events(ALPHA.name)?;
        Ok(events.iter().filter(|event| *event == words).count())
    };
    let earlier = told(&fenced)?;
    cluster.wait("the fence is asked for", |_| {
        told(&order)
            .is_ok_and(|orders| orders > earlier)
            .then_some(())
    })?;
    let deadline = Instant::now() + UNFENCED_TIME;
    while Instant::now() < deadline {
        ensure!(told(&fenced)? == earlier, "fenced, but it has power");
        ensure!(cluster.is_mounted(ALPHA.name)?, "unmounted by nobody");
        let serving = cluster.serving(ALPHA.name)?;
        ensure!(serving.is_none(), "served without a fence: {serving:?}");
        thread::sleep(POLL);
    }
    Ok(())
}

/// The directory of the worker.
const WORKER: &str = "w1";
/// How many show that it goes on.
const CHANGES: usize = 20;
/// Long enough for a node that would not wait.
const UNFENCED_TIME: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(20);
