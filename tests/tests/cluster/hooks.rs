//! The commands of a service: in which order they run, what their failures lead to, and that
//! nothing of the storage is open when it is let go.

use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Result, anyhow, ensure};
use havenfs_tests::client::nlm::stat;
use havenfs_tests::cluster::{Cluster, NODES, status};

use crate::hooked::{Hooked, has_ended};
use crate::scene::{ALPHA, Scene, rises_by_one};

/// The phases of a takeover, by name.
fn phases(cluster: &Cluster, node: &str) -> Result<Vec<String>> {
    let status = cluster.status(node)?;
    let phases = status["services"][0]["last_takeover"]["phases"].as_array();
    let names = phases.into_iter().flatten();
    Ok(names
        .filter_map(|phase| phase["name"].as_str().map(str::to_owned))
        .collect())
}

#[test]
fn a_takeover_fences_first_and_makes_the_storage_ready_then() -> Result<()> {
    Hooked::run(|hooked| {
        let before = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(&hooked.cluster)?;
        scene.lock_and_wait()?;
        let first = hooked.events();
        ensure!(
            first.last() == Some(&format!("takeover n1 lost= epoch={} start", before.epoch)),
            "{first:?}"
        );
        hooked.cluster.kill(before.node)?;
        let after = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        rises_by_one(before, after)?;
        scene.is_held()?;
        let (node, epoch) = (after.node, after.epoch);
        let events = hooked.events();
        ensure!(
            events[first.len()..]
                == [
                    format!("fence {node} lost=n1 epoch={epoch} takeover"),
                    format!("takeover {node} lost=n1 epoch={epoch} takeover"),
                ],
            "{events:?}"
        );
        let phases = phases(&hooked.cluster, node)?;
        ensure!(
            phases.starts_with(&["lease", "assign", "fence", "storage", "exports"].map(Into::into)),
            "{phases:?}"
        );
        let told = fs::read_to_string(hooked.path("service"))?;
        let address = hooked.cluster.site.service(ALPHA);
        ensure!(told == format!("{ALPHA} {address}\n"), "{told}");

        // Its next life is not fenced by anybody, and fences nobody.
        hooked.cluster.restart("n1")?;
        let back = hooked.cluster.move_to(ALPHA, "n1")?;
        scene.is_held()?;
        let later = hooked.events().split_off(events.len());
        ensure!(
            later
                == [
                    format!("release {node} lost= epoch={epoch} move"),
                    format!("takeover n1 lost= epoch={} move", back.epoch),
                ],
            "{later:?}"
        );
        scene.unlock_for_b()?;
        Ok(())
    })
}

#[test]
fn a_service_stays_down_until_the_fence_succeeds() -> Result<()> {
    Hooked::run(|hooked| {
        let mut scene = Scene::new(&hooked.cluster)?;
        scene.lock_and_wait()?;
        let (before, next) = hooked.lose_without_fence()?;
        hooked.is_down_on(next, before.node)?;
        for node in NODES {
            hooked.fails("fence", node, false)?;
        }
        let after = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        ensure!(after.node == next, "{after:?}");
        rises_by_one(before, after)?;
        scene.is_held()?;
        let log = hooked.cluster.log(next)?;
        ensure!(log.contains("the node is fenced"), "{log}");
        let status = hooked.cluster.status(next)?;
        let unfenced = status["services"][0]["unfenced"].as_array();
        ensure!(unfenced.is_some_and(Vec::is_empty), "{status}");
        scene.unlock_for_b()?;
        Ok(())
    })
}

#[test]
fn an_operator_can_confirm_a_fence_that_fails() -> Result<()> {
    Hooked::run(|hooked| {
        let mut scene = Scene::new(&hooked.cluster)?;
        scene.lock_and_wait()?;
        let (before, next) = hooked.lose_without_fence()?;
        let confirm = |words: &str| hooked.cluster.ask(next, &format!("confirm-fence {words}"));
        let unknown = confirm("beta")?;
        ensure!(
            unknown["error"] == "the cluster has no service `beta`; there are: alpha",
            "{unknown}"
        );
        let wrong = confirm(&format!("{ALPHA} {next}"))?;
        let text = wrong["error"].as_str().unwrap_or_default();
        ensure!(text.contains(&format!("but of {}", before.node)), "{wrong}");
        hooked.is_down_on(next, before.node)?;

        // Any node may be told.
        let other = hooked.cluster.others(&[before.node, next])[0];
        let request = format!("confirm-fence {ALPHA} {}", before.node);
        let done = hooked.cluster.ask(other, &request)?;
        ensure!(done["done"].is_string(), "{done}");
        let after = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        ensure!(after.node == next, "{after:?}");
        rises_by_one(before, after)?;
        scene.is_held()?;
        let again = confirm(ALPHA)?;
        ensure!(
            again["error"] == format!("service `{ALPHA}` waits for no fence"),
            "{again}"
        );
        Ok(())
    })
}

/// Whoever switched the node off by hand does not wait for a command that can't.
#[test]
fn a_confirmed_fence_ends_a_command_that_hangs() -> Result<()> {
    Hooked::run(|hooked| {
        let mut scene = Scene::new(&hooked.cluster)?;
        scene.lock_and_wait()?;
        let before = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        for node in NODES {
            hooked.hangs("fence", node, true)?;
        }
        hooked.cluster.kill(before.node)?;
        let process = hooked.wait_hangs()?;
        let other = hooked.cluster.others(&[before.node])[0];
        let done = hooked
            .cluster
            .ask(other, &format!("confirm-fence {ALPHA}"))?;
        ensure!(done["done"].is_string(), "{done}");
        let confirmed = Instant::now();
        let after = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        // Its time limit is 20 s, and a pause would follow.
        let took = confirmed.elapsed();
        ensure!(took < Duration::from_secs(10), "only after {took:?}");
        ensure!(has_ended(&process), "the command still runs");
        rises_by_one(before, after)?;
        scene.is_held()
    })
}

/// Who asks a host what it knows of, and waits for it, or reads a long list, keeps nothing open
/// that has to be let go.
#[test]
fn whoever_looks_at_locks_does_not_keep_a_service_from_moving() -> Result<()> {
    Hooked::run(|hooked| {
        let scene = &mut Scene::new(&hooked.cluster)?;
        let held = scene.held();
        ensure!(scene.a.lock(&held)? == stat::GRANTED);
        let before = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        let to = hooked.cluster.others(&[before.node])[0];
        let socket = hooked.cluster.site.control(before.node);
        // The host hears of it and reclaims nothing, so that it is waited for.
        let request = format!("verify {}", scene.a.address);
        let cluster = &hooked.cluster;
        let (answer, moved) = thread::scope(|scope| {
            let asked = scope.spawn(|| status::ask(&socket, &request));
            let heard = scene.machine_a.wait_notice(before.nsm_state - 1);
            let moved = heard.and_then(|_| cluster.move_to(ALPHA, to));
            (asked.join(), moved)
        });
        rises_by_one(before, moved?)?;
        let answer = answer.map_err(|_| anyhow!("the thread panicked"))??;
        let said = answer["error"].as_str().unwrap_or_default();
        ensure!(said.contains("is leaving this node"), "{answer}");
        let released = format!("release {} lost= epoch={} move", before.node, before.epoch);
        let events = hooked.events();
        ensure!(events.contains(&released), "{events:?}");
        scene.is_held()
    })
}

/// The one that can't fence gives the service away when it ends, and with it the fence; but not to
/// the node that was to be fenced.
#[test]
fn a_node_never_fences_itself() -> Result<()> {
    Hooked::run(|hooked| {
        let mut scene = Scene::new(&hooked.cluster)?;
        scene.lock_and_wait()?;
        let (before, next) = hooked.lose_without_fence()?;
        hooked.cluster.restart(before.node)?;
        hooked.is_down_on(next, before.node)?;
        hooked.cluster.stop(next)?;
        let after = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        ensure!(after.node == before.node, "{after:?}");
        scene.is_held()?;
        let events = hooked.events();
        let own = format!("fence {}", before.node);
        ensure!(
            !events.iter().any(|line| line.starts_with(&own)),
            "{events:?}"
        );
        let last = format!("takeover {} lost= epoch={} start", after.node, after.epoch);
        ensure!(events.last() == Some(&last), "{events:?}");
        Ok(())
    })
}

#[test]
fn the_storage_is_let_go_with_nothing_open_before_another_node_takes_it() -> Result<()> {
    Hooked::run(|hooked| {
        let cluster = &hooked.cluster;
        let mut serving = cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let writer = scene.writer(cluster);
        for node in ["n2", "n1", "n3"] {
            writer.wait_more(20)?;
            let from = hooked.events().len();
            let moved = cluster.move_to(ALPHA, node)?;
            rises_by_one(serving, moved)?;
            let events = hooked.events().split_off(from);
            ensure!(
                events
                    == [
                        format!(
                            "release {} lost= epoch={} move",
                            serving.node, serving.epoch
                        ),
                        format!("takeover {node} lost= epoch={} move", moved.epoch),
                    ],
                "{events:?}"
            );
            serving = moved;
            scene.is_held()?;
        }
        writer.wait_more(20)?;
        let from = hooked.events().len();
        hooked.cluster.stop(serving.node)?;
        let after = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        let events = hooked.events().split_off(from);
        ensure!(
            events
                == [
                    format!(
                        "release {} lost= epoch={} stop",
                        serving.node, serving.epoch
                    ),
                    format!("takeover {} lost= epoch={} start", after.node, after.epoch),
                ],
            "{events:?}"
        );
        writer.wait_more(20)?;
        let written = writer.finish()?;
        scene.check_written(&written)?;
        scene.unlock_for_b()?;
        scene.machines_are_well()
    })
}

#[test]
fn a_service_whose_storage_cannot_be_let_go_is_not_given_away() -> Result<()> {
    Hooked::run(|hooked| {
        let before = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(&hooked.cluster)?;
        scene.lock_and_wait()?;
        hooked.fails("release", before.node, true)?;
        let from = hooked.events().len();
        let to = hooked.cluster.others(&[before.node])[0];
        let asked = hooked.cluster.ask(to, &format!("move {ALPHA} {to}"))?;
        ensure!(asked["error"].is_null(), "{asked}");
        let status = hooked.cluster.wait_ended(before.node)?;
        ensure!(!status.success(), "{status}");
        let log = hooked.cluster.log(before.node)?;
        let said = "can't be let go: release hook exited with status 3: the release has no power";
        ensure!(log.contains(said), "{log}");
        let after = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        scene.is_held()?;
        let events = hooked.events().split_off(from);
        let fence = format!("fence {} lost={}", after.node, before.node);
        ensure!(
            events
                .first()
                .is_some_and(|line| line.starts_with("release"))
                && events.get(1).is_some_and(|line| line.starts_with(&fence)),
            "{events:?}"
        );
        Ok(())
    })
}

#[test]
fn a_node_whose_storage_does_not_come_leaves_the_service_to_others() -> Result<()> {
    Hooked::run(|hooked| {
        let before = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(&hooked.cluster)?;
        scene.lock_and_wait()?;
        let to = hooked.cluster.others(&[before.node])[0];
        hooked.fails("takeover", to, true)?;
        let from = hooked.events().len();
        // Whoever has moved it hears what came of that.
        let moved = move_by_hand(hooked, before.node, to);
        let told = moved.err().map(|error| error.to_string());
        let after = hooked
            .cluster
            .wait_serving(ALPHA, |serving| serving.epoch > before.epoch)?;
        ensure!(after.node != to, "{after:?}");
        let expected = format!(
            "`{ALPHA}` did not come to node {to}, and is on node {}",
            after.node
        );
        ensure!(
            told.as_ref().is_some_and(|told| told.contains(&expected)),
            "{told:?}"
        );
        scene.is_held()?;
        let events = hooked.events().split_off(from);
        let epoch = before.epoch + 1;
        ensure!(
            events[1..3]
                == [
                    format!("takeover {to} lost= epoch={epoch} move"),
                    format!("release {to} lost= epoch={epoch} failed"),
                ],
            "{events:?}"
        );
        let log = hooked.cluster.log(to)?;
        let said = "takeover hook exited with status 3: the takeover has no power";
        ensure!(log.contains(said), "{log}");
        let other = hooked.cluster.others(&[after.node, to])[0];
        let told = move_by_hand(hooked, to, other)?;
        let expected = format!("service `{ALPHA}` is served by node {other}, ");
        ensure!(told.starts_with(&expected), "{told}");
        hooked
            .cluster
            .wait_serving(ALPHA, |serving| serving.node == other)?;
        Ok(())
    })
}

/// As an operator does, who is told what comes of it.
fn move_by_hand(hooked: &Hooked, asked: &str, to: &str) -> Result<String> {
    let control = hooked.cluster.site.control(asked);
    let control = control.to_string_lossy();
    let words = ["service", "move", ALPHA, "--to", to, "--control", &control];
    hooked.cluster.command(&words)
}

/// A node that wakes after its lease lets its storage go, so that it can be used again.
#[test]
fn a_node_that_lost_the_service_lets_its_storage_go() -> Result<()> {
    Hooked::run(|hooked| {
        let before = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(&hooked.cluster)?;
        let held = scene.held();
        ensure!(scene.a.lock(&held)? == stat::GRANTED);
        hooked.cluster.pause(before.node)?;
        // Its sockets are still there, so the next one can't listen before it wakes.
        let taken = format!("lost={} epoch={} takeover", before.node, before.epoch + 1);
        hooked.cluster.wait("another node takes it", |_| {
            let events = hooked.events();
            let last = events.last()?;
            (last.starts_with("takeover") && last.ends_with(&taken)).then_some(())
        })?;
        hooked.cluster.resume(before.node)?;
        let released = format!(
            "release {} lost= epoch={} takeover",
            before.node, before.epoch
        );
        hooked.cluster.wait("the storage is let go", |_| {
            let events = hooked.events();
            events.contains(&released).then_some(())
        })?;
        hooked.cluster.wait("it says so", |cluster| {
            let log = cluster.log(before.node).ok()?;
            log.contains("the storage is released").then_some(())
        })?;
        let after = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        ensure!(after.node != before.node, "{after:?}");
        scene.is_held()
    })
}

#[test]
fn without_a_cluster_the_storage_comes_and_goes_as_well() -> Result<()> {
    let hooked = Hooked::new(|text, commands| {
        let commands = commands.lines();
        let commands = commands.filter(|line| !line.starts_with("fence_command"));
        let commands = commands.collect::<Vec<_>>().join("\n");
        let (before, rest) = text.split_once("[cluster]").unwrap_or_default();
        let service = rest.split_once("[[service]]").unwrap_or_default().1;
        format!("{before}[[service]]{service}{commands}\n")
    })?;
    hooked.shown(|hooked| {
        hooked.cluster.spawn("n1")?;
        let cluster = &hooked.cluster;
        cluster.wait("n1 is ready", |cluster| {
            cluster.is_ready("n1").then_some(())
        })?;
        hooked.cluster.stop("n1")?;
        let first = [
            "takeover  lost= epoch=1 start",
            "release  lost= epoch=1 stop",
        ];
        ensure!(hooked.events() == first, "{:?}", hooked.events());

        // What can't begin is undone, and the process ends, since nobody else can do better.
        hooked.fails("takeover", "", true)?;
        hooked.cluster.spawn("n1")?;
        let status = hooked.cluster.wait_ended("n1")?;
        ensure!(!status.success(), "{status}");
        let log = hooked.cluster.log("n1")?;
        let said = "error: takeover hook exited with status 3: the takeover has no power\nhint: ";
        ensure!(log.contains(said), "{log}");
        let events = hooked.events().split_off(2);
        let second = [
            "takeover  lost= epoch=2 start",
            "release  lost= epoch=2 failed",
        ];
        ensure!(events == second, "{events:?}");
        Ok(())
    })
}
