//! The commands of a service that are in the way: storage that an earlier life of a node has left
//! up, storage that can't be let go, and commands that go on when nobody wants them any more.

use anyhow::{Result, ensure};
use havenfs_tests::cluster::{Cluster, NODES};

use crate::hooked::{Hooked, has_ended};
use crate::scene::{ALPHA, Scene, rises_by_one};

#[test]
fn a_node_that_begins_lets_go_what_a_killed_one_left() -> Result<()> {
    Hooked::run(|hooked| {
        let before = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        // Nobody had it when they began.
        hooked.cluster.wait("all have begun", |_| {
            let events = hooked.all_events();
            let begun = |node| events.contains(&format!("release {node} lost= epoch=0 start"));
            // One that begins after n1 has it sees that epoch.
            let later = |node| events.contains(&format!("release {node} lost= epoch=1 start"));
            NODES
                .iter()
                .all(|node| begun(node) || later(node))
                .then_some(())
        })?;
        hooked.cluster.kill(before.node)?;
        let after = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        // Its own is taken again as it is.
        let from = hooked.all_events().len();
        hooked.cluster.kill_all(
            &NODES
                .map(|node| node)
                .into_iter()
                .filter(|node| *node != before.node)
                .collect::<Vec<_>>(),
        )?;
        hooked.cluster.spawn(after.node)?;
        hooked.cluster.spawn(before.node)?;
        let again = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        hooked.cluster.wait("the other one has begun", |_| {
            let events = hooked.all_events().split_off(from);
            let begun = format!("release {} lost= epoch=", before.node);
            let mut events = events.iter();
            events
                .any(|line| line.starts_with(&begun) && line.ends_with("start"))
                .then_some(())
        })?;
        ensure!(again.node == after.node, "{again:?}");
        let events = hooked.all_events().split_off(from);
        let own = format!("release {}", after.node);
        ensure!(
            !events.iter().any(|line| line.starts_with(&own)),
            "{events:?}"
        );
        Ok(())
    })
}

/// A node that wakes when another one has the service, and can't let the storage go, does not take
/// the service again before it could.
#[test]
fn what_cannot_be_let_go_is_not_taken_again() -> Result<()> {
    Hooked::run(|hooked| {
        let before = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        hooked.fails("release", before.node, true)?;
        hooked.cluster.pause(before.node)?;
        let next = hooked.cluster.wait("another node takes it", |_| {
            let events = hooked.events();
            let others = hooked.cluster.others(&[before.node]);
            others.into_iter().find(|node| {
                let taken = format!("takeover {node} lost={}", before.node);
                events.iter().any(|line| line.starts_with(&taken))
            })
        })?;
        hooked.cluster.resume(before.node)?;
        let failed = |cluster: &Cluster, times: usize| {
            cluster.wait("it can't be let go", |cluster| {
                let log = cluster.log(before.node).ok()?;
                let failures = log.matches("cannot let the storage of service").count();
                (failures >= times).then_some(())
            })
        };
        failed(&hooked.cluster, 1)?;
        hooked
            .cluster
            .wait_serving(ALPHA, |serving| serving.node == next)?;
        // The only one that could take it is the one that must not.
        let third = hooked.cluster.others(&[before.node, next])[0];
        hooked.fails("takeover", third, true)?;
        hooked.cluster.stop(next)?;
        failed(&hooked.cluster, 3)?;
        ensure!(hooked.cluster.serving(ALPHA)?.is_none());
        let taken = format!("takeover {}", before.node);
        let events = hooked.events();
        let count = |events: &[String]| {
            events
                .iter()
                .filter(|line| line.starts_with(&taken))
                .count()
        };
        ensure!(count(&events) == 1, "{events:?}");
        let log = hooked.cluster.log(before.node)?;
        ensure!(
            log.contains("hint: a release_command must succeed"),
            "{log}"
        );

        hooked.fails("release", before.node, false)?;
        hooked
            .cluster
            .wait_serving(ALPHA, |serving| serving.node == before.node)?;
        let events = hooked.events();
        let released = format!("release {} lost=", before.node);
        let last: Vec<_> = events
            .iter()
            .filter(|line| line.starts_with(&taken) || line.starts_with(&released))
            .collect();
        let last = &last[last.len() - 2..];
        ensure!(
            last[0].starts_with(&released) && last[1].starts_with(&taken),
            "{events:?}"
        );
        Ok(())
    })
}

#[test]
fn a_fence_ends_with_the_lease_of_its_node() -> Result<()> {
    Hooked::run(|hooked| {
        let before = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        for node in NODES {
            hooked.hangs("fence", node, true)?;
        }
        hooked.cluster.kill(before.node)?;
        let fence = hooked.wait_hangs()?;
        let fences = hooked.events();
        let next = hooked
            .cluster
            .others(&[before.node])
            .into_iter()
            .find(|node| {
                let begun = format!("fence {node} ");
                fences.iter().any(|line| line.starts_with(&begun))
            });
        let other = hooked
            .cluster
            .others(&[before.node, next.unwrap_or_default()])[0];
        hooked.cluster.pause(other)?;
        // Long before its time is over.
        hooked.cluster.wait("the log says so", |cluster| {
            let log = cluster.log(next?).ok()?;
            log.contains("the lease is over: ending the fence hook")
                .then_some(())
        })?;
        hooked
            .cluster
            .wait("the fence ends", |_| has_ended(&fence).then_some(()))?;
        let log = hooked.cluster.log(next.unwrap_or_default())?;
        ensure!(!log.contains("did not end within"), "{log}");
        for node in NODES {
            hooked.hangs("fence", node, false)?;
        }
        hooked.cluster.resume(other)?;
        let after = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        ensure!(after.node != before.node, "{after:?}");
        Ok(())
    })
}

#[test]
fn a_command_dies_with_a_killed_server() -> Result<()> {
    Hooked::run(|hooked| {
        let before = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        let to = hooked.cluster.others(&[before.node])[0];
        hooked.hangs("takeover", to, true)?;
        let asked = hooked.cluster.ask(to, &format!("move {ALPHA} {to}"))?;
        ensure!(asked["error"].is_null(), "{asked}");
        let takeover = hooked.wait_hangs()?;
        hooked.cluster.kill(to)?;
        hooked
            .cluster
            .wait("the command ends", |_| has_ended(&takeover).then_some(()))?;
        // Long before its own time is over, and that of the next ones.
        let after = hooked.cluster.wait_serving(ALPHA, |_| true)?;
        ensure!(after.node != to, "{after:?}");
        Ok(())
    })
}

/// A service that waits for a fence can be moved to a node that may be better at it.
#[test]
fn a_move_takes_the_fence_along() -> Result<()> {
    Hooked::run(|hooked| {
        let mut scene = Scene::new(&hooked.cluster)?;
        scene.lock_and_wait()?;
        let (before, next) = hooked.lose_without_fence()?;
        let to = hooked.cluster.others(&[before.node, next])[0];
        hooked.fails("fence", to, false)?;
        let after = hooked.cluster.move_to(ALPHA, to)?;
        rises_by_one(before, after).or_else(|_| {
            ensure!(after.epoch == before.epoch + 2, "{after:?}");
            Ok(())
        })?;
        scene.is_held()?;
        let events = hooked.events();
        let fence = format!(
            "fence {to} lost={} epoch={} takeover",
            before.node, after.epoch
        );
        ensure!(events.contains(&fence), "{events:?}");
        scene.unlock_for_b()?;
        Ok(())
    })
}
