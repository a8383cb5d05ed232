//! A node is killed: the leader that serves nothing, the active node that follows, the active node
//! that leads. And many times, one after the other.

use std::time::Instant;

use anyhow::{Result, ensure};
use havenfs_tests::client::nlm::stat;
use havenfs_tests::cluster::load::{Go, Load};
use havenfs_tests::cluster::{Cluster, Serving};

use crate::scene::{
    ALPHA, ELECTION_TIME_MAX, Locked, ONE, Scene, TAKEOVER_TIME_MAX, ms, rises_by_one,
};

/// How much a load gets done before and after something happens.
const SOME: usize = 50;
const TAKEOVERS: usize = 20;

/// Has the service served by the node that leads, or by one that follows.
fn place(cluster: &Cluster, leads: bool) -> Result<(Serving, &'static str)> {
    let leader = cluster.wait_leader()?;
    let serving = cluster.wait_serving(ALPHA, |_| true)?;
    if (serving.node == leader) == leads {
        return Ok((serving, leader));
    }
    let to = if leads {
        leader
    } else {
        cluster.others(&[leader])[0]
    };
    let serving = cluster.move_to(ALPHA, to)?;
    let now = cluster.wait_leader()?;
    ensure!(
        (serving.node == now) == leads,
        "the leader changed meanwhile"
    );
    Ok((serving, now))
}

#[test]
fn the_leader_that_serves_nothing_is_killed() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let (before, leader) = place(cluster, false)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let writer = scene.writer(cluster);
        let locker = scene.locker(cluster, &scene.a, 12);
        writer.wait_more(SOME)?;
        locker.wait_more(SOME)?;
        let killed = Instant::now();
        cluster.kill(leader)?;
        let new = cluster.wait_leader()?;
        let elected = killed.elapsed();
        writer.wait_more(SOME)?;
        locker.wait_more(SOME)?;
        let (written, locked) = (writer.finish()?, locker.finish()?);
        let write_gap = written.client.nfs.longest_gap(killed);
        let lock_gap = locked.client.nlm.longest_gap(killed);
        println!(
            "leader {leader} killed, {new} leads after {}; longest gaps: WRITE {}, LOCK {}",
            ms(elected),
            ms(write_gap),
            ms(lock_gap)
        );
        let after = cluster.wait_serving(ALPHA, |_| true)?;
        ensure!(after == before, "{before:?}, {after:?}");
        for caller in [&written.client.nfs, &locked.client.nlm] {
            ensure!(
                caller.connections == 1,
                "{} connections",
                caller.connections
            );
            ensure!(caller.stalls == 0, "{} stalls", caller.stalls);
        }
        ensure!(lock_gap <= ELECTION_TIME_MAX, "{lock_gap:?}");
        ensure!(write_gap <= ELECTION_TIME_MAX, "{write_gap:?}");
        ensure!(written.verifiers()?.len() == 1, "one activation");
        scene.is_held()?;
        scene.check_written(&written)?;
        scene.unlock_for_b()?;
        scene.machines_are_well()
    })
}

/// Kills the active node and looks at every promise.
fn the_active_node_is_killed(leads: bool) -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let (before, leader) = place(cluster, leads)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let file = scene.a.getattr(&scene.fh)?;
        let file = file.map_err(|status| anyhow::anyhow!("GETATTR: {status}"))?;
        let writer = scene.writer(cluster);
        writer.wait_more(SOME)?;
        let killed = Instant::now();
        cluster.kill(before.node)?;
        // Asked at once, and until somebody answers.
        let mut other = scene.c.another(&cluster.site);
        let new = other.lock_of(&scene.fh, 34, 1000, 10);
        let asking = Load::start(move |_: &Go| {
            let stat = other.lock(&new)?;
            Ok((stat, Instant::now()))
        });
        scene.is_held()?;
        let held = killed.elapsed();
        let (stat, at) = asking.finish()?;
        ensure!(stat == stat::GRANTED, "a new LOCK is answered {stat}");
        let after = cluster.wait_serving(ALPHA, |serving| serving.node != before.node)?;
        writer.wait_more(SOME)?;
        let written = writer.finish()?;
        let gap = written.client.nfs.longest_gap(killed);
        let granted = scene.unlock_for_b()?;
        let notice = scene.machine_a.wait_notice(before.nsm_state)?;
        println!(
            "{} killed, leader was {leader}; {} serves: held after {}, new lock after {}, longest \
             WRITE gap {}, waiter granted within {}, notice after {}",
            before.node,
            after.node,
            ms(held),
            ms(at - killed),
            ms(gap),
            ms(granted),
            ms(notice.at.saturating_duration_since(killed)),
        );
        rises_by_one(before, after)?;
        ensure!(i64::from(notice.nsm_state) == after.nsm_state, "{notice:?}");
        ensure!(notice.from.ip() == scene.a.service, "{notice:?}");
        ensure!(gap <= TAKEOVER_TIME_MAX, "{gap:?}");
        ensure!(
            written.client.nfs.stalls == 0,
            "{:?}",
            written.client.nfs.stalls
        );
        let verifiers = written.verifiers()?;
        ensure!(verifiers.len() == 2, "{verifiers:02x?}");
        scene.check_written(&written)?;
        let again = scene.c.getattr(&scene.fh)?;
        let again = again.map_err(|status| anyhow::anyhow!("GETATTR: {status}"))?;
        let same = (again.fsid, again.fileid) == (file.fsid, file.fileid);
        ensure!(same, "{file:?}, {again:?}");
        scene.machines_are_well()
    })
}

#[test]
fn the_active_node_that_follows_is_killed() -> Result<()> {
    the_active_node_is_killed(false)
}

#[test]
fn the_active_node_that_leads_is_killed() -> Result<()> {
    the_active_node_is_killed(true)
}

#[test]
fn many_takeovers_lose_no_lock() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let mut scene = Scene::new(cluster)?;
        let held = scene.held();
        ensure!(scene.a.lock(&held)? == stat::GRANTED);
        let of_b = scene.b.lock_of(&scene.fh, 21, 100, 10);
        ensure!(scene.b.lock(&of_b)? == stat::GRANTED);
        // Wants both all the time, and never gets them.
        let mut wanting = scene.c.another(&cluster.site);
        let fh = scene.fh.clone();
        let wanting = Load::start(move |go: &Go| {
            while go.on() {
                for (at, len) in [(0, 100), (100, 10), (50, 100)] {
                    let lock = wanting.lock_of(&fh, 33, at, len);
                    let stat = wanting.lock(&lock)?;
                    ensure!(stat == stat::DENIED, "LOCK of {at} is answered {stat}");
                }
                go.count();
                go.breathe();
            }
            Ok(wanting)
        });
        // Two more take and drop one lock in turns.
        let lockers = [
            scene.locker(cluster, &scene.a, 12),
            scene.locker(cluster, &scene.b, 23),
        ];
        let mut serving = cluster.wait_serving(ALPHA, |_| true)?;
        let mut times = Vec::new();
        for _ in 0..TAKEOVERS {
            wanting.wait_more(2)?;
            for locker in &lockers {
                locker.wait_more(2)?;
            }
            let before = serving;
            let killed = Instant::now();
            cluster.kill(before.node)?;
            serving = cluster.wait_serving(ALPHA, |serving| serving.node != before.node)?;
            times.push(killed.elapsed().as_millis());
            rises_by_one(before, serving)?;
            wanting.wait_more(2)?;
            scene.is_held()?;
            let of_c = scene.c.lock_of(&scene.fh, 33, 100, 10);
            ensure!(scene.c.holder(&of_c)? == Some(21), "B's lock");
            cluster.restart(before.node)?;
        }
        let wanting = wanting.finish()?;
        times.sort_unstable();
        println!(
            "{TAKEOVERS} takeovers, served again after (ms): {times:?}; {} calls were denied, {} \
             stalls",
            wanting.nlm.answers.len(),
            wanting.nlm.stalls
        );
        let [one, other] = lockers;
        let (one, other) = (one.finish()?, other.finish()?);
        Locked::exclude_each_other(&one, &other)?;
        for caller in [&wanting.nlm, &one.client.nlm, &other.client.nlm] {
            ensure!(caller.stalls == 0, "{} stalls", caller.stalls);
        }
        let held = scene.held();
        ensure!(scene.a.unlock(&held)? == stat::GRANTED);
        let wanted = scene.wanted();
        ensure!(scene.c.lock(&wanted)? == stat::GRANTED);
        scene.machines_are_well()
    })
}
