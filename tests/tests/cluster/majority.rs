//! Without a majority nobody answers, and when it is back, all is there.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_tests::client::nlm::stat;
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::rpc::Cred;
use havenfs_tests::client::{Nfs, Peer};
use havenfs_tests::cluster::client::Client;
use havenfs_tests::cluster::load::{Go, Load};
use havenfs_tests::cluster::site::Site;
use havenfs_tests::cluster::{Cluster, NODES, POLL};

use crate::scene::{ALPHA, LEASE_AND_MORE, ONE, Scene, ms};

/// How long nobody may answer, counted from the loss of the majority.
const SILENCE: Duration = Duration::from_secs(5);
/// How long one question waits; any answer takes milliseconds.
const PATIENCE: Duration = Duration::from_millis(500);
const SOME: usize = 50;

/// What became of questions that were asked all the time.
#[derive(Debug)]
pub(crate) struct Asked {
    /// When the last answer came.
    pub(crate) last: Instant,
    /// What came in place of the first answer that did not.
    pub(crate) lost: String,
    /// How many more questions were asked in vain, and how many new connections were accepted.
    pub(crate) in_vain: usize,
    pub(crate) accepted: usize,
}

/// Asks for the attributes of a file again and again until `end`: over one connection as long as
/// it stands, and then over new ones. The first question has to be answered.
pub(crate) fn ask_until(site: &Site, client: &Client, fh: &[u8], end: Instant) -> Result<Asked> {
    let own = SocketAddr::new(client.address, 0);
    let at = SocketAddr::new(client.service, site.ports.nfs);
    let connect = || {
        let peer = Peer::connect_from(Transport::Tcp, own, at)?;
        peer.set_answer_time(PATIENCE)?;
        anyhow::Ok(Nfs::new(peer, Cred::root()))
    };
    let mut nfs = connect()?;
    nfs.attributes(fh)?;
    let mut asked = Asked {
        last: Instant::now(),
        lost: String::new(),
        in_vain: 0,
        accepted: 0,
    };
    let mut standing = Some(nfs);
    let mut ask = || {
        if standing.is_none() {
            standing = connect().ok();
            asked.accepted += usize::from(standing.is_some());
        }
        match standing.as_mut().map(|nfs| nfs.attributes(fh)) {
            Some(Ok(_)) => asked.last = Instant::now(),
            Some(Err(error)) if asked.lost.is_empty() => {
                asked.lost = format!("{error:#}");
                standing = None;
            }
            Some(Err(_)) | None => {
                asked.in_vain += 1;
                standing = None;
            }
        }
    };
    let deadline = end;
    while Instant::now() < deadline {
        ask();
        thread::sleep(POLL);
    }
    Ok(asked)
}

/// Nobody answered for longer than a lease after the majority was lost.
pub(crate) fn is_silent_after(asked: &Asked, lost: Instant) -> Result<()> {
    let longest = asked.last.saturating_duration_since(lost);
    println!(
        "the last answer came {} after the majority was lost; then, over the connection that \
         stood: {}; {} more in vain, {} connections accepted",
        ms(longest),
        asked.lost,
        asked.in_vain,
        asked.accepted
    );
    ensure!(
        !asked.lost.is_empty() && longest <= LEASE_AND_MORE,
        "{asked:?}"
    );
    Ok(())
}

#[test]
fn one_node_of_three_says_nothing() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let before = cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let writer = scene.writer(cluster);
        writer.wait_more(SOME)?;
        let others = cluster.others(&[before.node]);
        let lost = Instant::now();
        cluster.kill_all(&others)?;
        // Asked at once, and sent again until somebody answers.
        let mut asking = scene.c.another(&cluster.site);
        let new = asking.lock_of(&scene.fh, 34, 4000, 10);
        let pending = Load::start(move |go: &Go| {
            let stat = asking.lock(&new)?;
            go.count();
            Ok((stat, Instant::now()))
        });
        let asked = ask_until(&cluster.site, &scene.c, &scene.fh, lost + SILENCE)?;
        is_silent_after(&asked, lost)?;
        ensure!(
            pending.done() == 0,
            "a LOCK was answered without a majority"
        );
        let status = cluster.service(before.node, ALPHA)?;
        ensure!(!status.serving, "{status:?}");
        let written = writer.done();

        let begun = Instant::now();
        cluster.restart(others[0])?;
        let after = cluster.wait_serving(ALPHA, |_| true)?;
        let served = begun.elapsed();
        writer.wait_more(SOME)?;
        ensure!(after.epoch >= before.epoch, "{before:?}, {after:?}");
        scene.is_held()?;
        let (stat, at) = pending.finish()?;
        ensure!(stat == stat::GRANTED, "the LOCK sent again: {stat}");
        println!(
            "{} serves {} after the start of {}, in epoch {} after {}; the LOCK that was asked \
             without a majority is granted after {}; {written} records written before",
            after.node,
            ms(served),
            others[0],
            after.epoch,
            before.epoch,
            ms(at.saturating_duration_since(begun))
        );
        let held = scene.a.lock_of(&scene.fh, 12, 4000, 10);
        ensure!(scene.a.holder(&held)? == Some(34), "it is held");
        let written = writer.finish()?;
        scene.check_written(&written)?;
        // A lease that was lost and came back is no new activation.
        let activations = written.verifiers()?.len() as u64;
        ensure!(
            activations == 1 + after.epoch - before.epoch,
            "{activations}"
        );
        // The last one back changes nothing.
        cluster.restart(others[1])?;
        ensure!(cluster.wait_serving(ALPHA, |_| true)? == after);
        scene.is_held()?;
        scene.unlock_for_b()?;
        scene.machines_are_well()
    })
}

#[test]
fn a_node_that_answers_without_a_lease_is_found_out() -> Result<()> {
    let mut cluster = Cluster::new(&ONE)?;
    cluster.plant = Some("lease");
    cluster.start()?;
    let serving = cluster.wait_serving(ALPHA, |_| true)?;
    let scene = Scene::new(&cluster)?;
    let lost = Instant::now();
    cluster.kill_all(&cluster.others(&[serving.node]))?;
    let end = lost + LEASE_AND_MORE * 2;
    let asked = ask_until(&cluster.site, &scene.c, &scene.fh, end)?;
    ensure!(is_silent_after(&asked, lost).is_err(), "{asked:?}");
    Ok(())
}

#[test]
fn all_nodes_are_killed_at_once_and_come_back() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let before = cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let writer = scene.writer(cluster);
        writer.wait_more(SOME)?;
        let killed = Instant::now();
        cluster.kill_all(&NODES)?;
        for node in NODES {
            cluster.spawn(node)?;
        }
        for node in NODES {
            cluster.wait_joined(node)?;
        }
        let after = cluster.wait_serving(ALPHA, |_| true)?;
        let served = killed.elapsed();
        writer.wait_more(SOME)?;
        let written = writer.finish()?;
        println!(
            "all killed; {} serves after {}, in epoch {} after {}; longest WRITE gap {}",
            after.node,
            ms(served),
            after.epoch,
            before.epoch,
            ms(written.client.nfs.longest_gap(killed))
        );
        ensure!(after.epoch > before.epoch, "{before:?}, {after:?}");
        ensure!(after.nsm_state > before.nsm_state && after.nsm_state % 2 == 1);
        ensure!(
            written.client.nfs.stalls == 0,
            "{}",
            written.client.nfs.stalls
        );
        scene.is_held()?;
        scene.check_written(&written)?;
        ensure!(
            scene.a.getattr(&scene.fh)?.is_ok(),
            "the handle is as good as before"
        );
        scene.unlock_for_b()?;
        scene.machine_a.wait_notice(before.nsm_state)?;
        scene.machines_are_well()
    })
}
