//! A node that is taking the service is lost in the middle of that, before it has answered
//! anything: the third one takes it from both.
//!
//! The commands of the second node hang, and it is cut off from everything. The first one is back
//! by then, since three nodes need two, but clients can't reach it, so that it takes nothing.
//! Fenced is whoever may have touched the file system: the first node, and the second one if it
//! came so far.

use std::cell::Cell;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::lab::capture::mac_of;
use havenfs_tests::lab::clock::Micros;
use havenfs_tests::lab::cluster::{Cluster, Serving, Step, host_of};

use crate::scene::{ALPHA, Expected, Scene, in_scene, now};
use crate::storage::in_image;

#[test]
fn a_node_that_is_lost_in_its_takeover_never_served_and_is_fenced_if_it_has_the_storage()
-> Result<()> {
    in_scene("twice", &in_image(true), |scene| {
        lost_twice(scene, "in the fence", Step::Fence)?;
        lost_twice(scene, "in the mount", Step::Mount)
    })
}

fn lost_twice(scene: &mut Scene<'_>, name: &str, step: Step) -> Result<()> {
    let (lab, began) = (scene.lab, now());
    let told = scene.cluster.events(ALPHA.name)?.len();
    let nodes = Cell::new(None);
    scene.case(
        &format!("power loss, and the next node is cut off {name}"),
        Expected::Takeover,
        |cluster, before| {
            let others = cluster.others(&[before.node]);
            for node in &others {
                cluster.hold(ALPHA.name, node, step)?;
            }
            cluster.power_off(before.node)?;
            let second = cluster.wait("a node hangs in its takeover", |cluster| {
                let is_stuck = |node: &&str| {
                    let events = cluster.events(ALPHA.name).unwrap_or_default();
                    events[told..].contains(&step.words_of(node))
                };
                others.iter().copied().find(is_stuck)
            })?;
            let third = cluster.others(&[before.node, second])[0];
            nodes.set(Some([before.node, second, third]));
            cluster.let_go(ALPHA.name, third, step)?;
            serves_nothing(cluster, second)?;
            cluster.cut_from_peers(second)?;
            lab.cut(host_of(second))?;
            cluster.power_on_without_clients(before.node)?;
            if step == Step::Mount {
                waits_for_the_second_fence(cluster, told, second)?;
                cluster.power_off(second)?;
            }
            third_serves(cluster, second, third)
        },
        |cluster, _| {
            let [first, second, _] = nodes.get().context("they are known")?;
            cluster.let_go(ALPHA.name, second, step)?;
            lab.plug(host_of(first))?;
            if step == Step::Mount {
                cluster.power_on(second)?;
            } else {
                lab.heal(host_of(second))?;
                cluster.heal_to_peers(second)?;
            }
            cluster.wait_joined(first)?;
            cluster.wait_joined(second)
        },
    )?;
    let [first, second, third] = nodes.get().context("they are known")?;
    says_nothing_by_the_address(scene, second, began)?;
    let events = scene.cluster.events(ALPHA.name)?;
    let fence = |lost: &str| [format!("fence {lost}"), format!("fenced {lost}")];
    let hangs = step.words_of(second);
    let (first_fenced, mounts) = (fence(first), format!("mount {third}"));
    let wanted = match step {
        Step::Fence => [vec![hangs], first_fenced.into(), vec![mounts]],
        Step::Mount => {
            let mounted = vec![format!("mount {second}"), hangs];
            let behind = fence(second).into_iter().chain([mounts]);
            [first_fenced.into(), mounted, behind.collect()]
        }
    };
    let events = &events[told..];
    ensure!(events == wanted.concat(), "{events:?}, not {wanted:?}");
    Ok(())
}

/// As long as its commands have not ended, a node does not serve, though clients could reach it.
fn serves_nothing(cluster: &Cluster<'_>, second: &str) -> Result<()> {
    let deadline = Instant::now() + UNFENCED_TIME;
    while Instant::now() < deadline {
        let told = cluster.service(second, ALPHA.name);
        let told = told.with_context(|| format!("{second} says nothing"))?;
        ensure!(!told.serving, "{second} served in its takeover: {told:?}");
        thread::sleep(POLL);
    }
    Ok(())
}

/// The second node has the image mounted and is not fenced: nobody else touches it, nor serves.
fn waits_for_the_second_fence(cluster: &Cluster<'_>, told: usize, second: &str) -> Result<()> {
    let has_come = |words: &str| -> Result<bool> {
        let events = cluster.events(ALPHA.name)?;
        Ok(events[told..].iter().any(|event| event == words))
    };
    let (order, fenced) = (format!("fence {second}"), format!("fenced {second}"));
    cluster.wait("the fence is asked for", |_| {
        has_come(&order).is_ok_and(|has| has).then_some(())
    })?;
    let deadline = Instant::now() + UNFENCED_TIME;
    while Instant::now() < deadline {
        ensure!(!has_come(&fenced)?, "fenced, but it has power");
        let serving = cluster.serving(ALPHA.name)?;
        ensure!(serving.is_none(), "served without a fence: {serving:?}");
        thread::sleep(POLL);
    }
    Ok(())
}

/// The third node serves in the end, and the second one never says that it does.
fn third_serves(cluster: &Cluster<'_>, second: &str, third: &str) -> Result<()> {
    let said = Cell::new(false);
    cluster.wait("the third node serves", |cluster| {
        let told = cluster.service(second, ALPHA.name);
        said.set(said.get() || told.is_some_and(|told| told.serving));
        let serving: Option<Serving> = cluster.serving(ALPHA.name).ok()?;
        serving.filter(|serving| serving.node == third).map(drop)
    })?;
    ensure!(!said.get(), "{second} served, and hangs in its takeover");
    Ok(())
}

/// A node has said nothing as the service since then.
fn says_nothing_by_the_address(scene: &Scene<'_>, node: &str, since: Micros) -> Result<()> {
    let (addresses, mac) = (scene.addresses()?, mac_of(host_of(node)));
    let frames = scene.capture.frames()?;
    let mut own = frames.iter().filter(|it| it.mac == mac && it.at >= since);
    let said = own.find(|it| addresses.contains(&it.from));
    ensure!(said.is_none(), "{node} never served, but said: {said:?}");
    scene.nothing_is_left_on(node)
}

/// Long enough for a node that would not wait, neither for a fence nor for its own command.
const UNFENCED_TIME: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(20);
