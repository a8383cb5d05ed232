//! All nodes lose their power at once: what they had told is on their disk.
//!
//! The state directories of the three nodes and the exported tree lie on one ext4 file system with
//! a journal, in a loop image. When the power goes, every process is killed and the file system is
//! shut down as it stands, without a word to its journal: what was written and not synced is gone,
//! as in a cache of pages. A copy of the image, which is what the disk holds, is mounted in its
//! place, and all nodes start again on it. (The image behaves as a disk without a volatile cache.)
//!
//! The journal brings nothing to disk by itself for as long as a test takes, so whatever is there
//! was synced by a node. That the test would notice nodes that do not sync is a test itself. Needs
//! root.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::taker::{Taker, work_until};
use havenfs_tests::client::{Cred, Nlm, Peer};
use havenfs_tests::cluster::client::Client;
use havenfs_tests::cluster::{Cluster, NODES};
use havenfs_tests::lab::random::Random;

use crate::programs::{is_root, sh, text};
use crate::scene::{ALPHA, ONE, Scene, rises_by_one};

/// How many answers those get who take and drop locks, and how many records are written.
const ANSWERS_MIN: u64 = 200;
const RECORDS_MIN: usize = 50;
const IMAGE_BYTES: u64 = 256 << 20;
/// The clients who take and drop locks, each on a file of its own, and the one who looks.
const TAKERS: [u8; 2] = [4, 5];
const JUDGE: u8 = 6;
/// Shuts a file system down, which needs a call that no program of the shell makes:
/// `EXT4_IOC_SHUTDOWN` with `EXT4_GOING_FLAGS_NOLOGFLUSH`.
const SHUT_DOWN: &str = "import fcntl, os, struct, sys
fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587D, struct.pack('I', 2))";

/// A cluster all of whose files are on one disk.
struct Power {
    cluster: Cluster,
    /// How often the power went.
    cuts: usize,
}

impl Power {
    fn run(test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        is_root()?;
        let mut power = Self {
            cluster: Cluster::new(&ONE)?,
            cuts: 0,
        };
        fs::create_dir(power.disk())?;
        let image = power.image();
        fs::File::create(&image)?.set_len(IMAGE_BYTES)?;
        // Without the work that the kernel else does in the background for minutes.
        let eager = "lazy_itable_init=0,lazy_journal_init=0";
        sh(&["mkfs.ext4", "-q", "-F", "-E", eager, &text(&image)])?;
        power.mount()?;
        let result = test(&mut power);
        if result.is_err() {
            power.cluster.show_logs();
        }
        result
    }

    fn disk(&self) -> PathBuf {
        self.cluster.site.path().join("disk")
    }

    fn image(&self) -> PathBuf {
        let name = format!("image-{}", self.cuts);
        self.cluster.site.path().join(name)
    }

    /// What lies on the disk, and where the nodes have it.
    fn places(&self) -> Vec<(PathBuf, PathBuf)> {
        let site = &self.cluster.site;
        let states = NODES.map(|node| (self.disk().join(node), site.state(node)));
        let export = (self.disk().join("export"), site.export(ALPHA));
        states.into_iter().chain([export]).collect()
    }

    fn mount(&self) -> Result<()> {
        let (image, disk) = (text(&self.image()), text(&self.disk()));
        // The journal is not written by itself before this many seconds.
        sh(&["mount", "-o", "loop,commit=600", &image, &disk])?;
        for (on_disk, place) in self.places() {
            let is_export = place == self.cluster.site.export(ALPHA);
            fs::create_dir_all(&on_disk)?;
            fs::create_dir_all(&place)?;
            let mode = if is_export { 0o777 } else { 0o700 };
            fs::set_permissions(&on_disk, fs::Permissions::from_mode(mode))?;
            sh(&["mount", "--bind", &text(&on_disk), &text(&place)])?;
        }
        Ok(())
    }

    /// The power goes, for all at once, and comes back.
    fn cut(&mut self) -> Result<()> {
        self.cluster.kill_all(&NODES)?;
        sh(&["python3", "-c", SHUT_DOWN, &text(&self.disk())])?;
        let held = self.image();
        for (_, place) in self.places() {
            sh(&["umount", &text(&place)])?;
        }
        self.cuts += 1;
        // While the file system that is down still has the image: what it would write now, as its
        // last word, is not on the copy.
        fs::copy(&held, self.image())?;
        sh(&["umount", &text(&self.disk())])?;
        self.mount()
    }

    /// What each node, alone, finds its term to be: that of its vote.
    fn terms_alone(&mut self) -> Result<BTreeMap<&'static str, u64>> {
        let mut terms = BTreeMap::new();
        for node in NODES {
            self.cluster.spawn(node)?;
            let term = self
                .cluster
                .wait(&format!("{node} knows its term"), |cluster| {
                    cluster.status(node).ok()?["term"].as_u64()
                });
            self.cluster.kill(node)?;
            terms.insert(node, term?);
        }
        Ok(terms)
    }
}

impl Drop for Power {
    fn drop(&mut self) {
        // They may be dead, and what is mounted too.
        let _ = self.cluster.kill_all(&NODES);
        for (_, place) in self.places() {
            let _ = sh(&["umount", "-l", &text(&place)]);
        }
        let _ = sh(&["umount", "-l", &text(&self.disk())]);
    }
}

/// Owners of locks, each on a file of its own.
fn takers(power: &Power) -> Result<Vec<Taker>> {
    let site = &power.cluster.site;
    let taker = |number: u8| {
        let name = number.to_string();
        fs::write(site.export(ALPHA).join(&name), "")?;
        let fh = Client::new(site, "taker", number, ALPHA).find(site, ALPHA, &name)?;
        Ok(Taker::new(&fh, "taker", number.into()))
    };
    TAKERS.into_iter().map(taker).collect()
}

fn connect(power: &Power, number: u8) -> Result<Nlm> {
    let site = &power.cluster.site;
    let own = SocketAddr::new(site.client(number), 0);
    let service = SocketAddr::new(site.service(ALPHA), site.ports.nlm);
    let peer = Peer::connect_from(Transport::Tcp, own, service)?;
    Ok(Nlm::new(peer, Cred::root()))
}

/// Has everybody at work when the power goes, and says what is not as it was told. A node in
/// `planted` has a fault.
fn what_is_lost(power: &mut Power, planted: &[&str], fault: &'static str) -> Result<Vec<String>> {
    for node in NODES {
        power.cluster.plant = planted.contains(&node).then_some(fault);
        power.cluster.spawn(node)?;
    }
    power.cluster.plant = None;
    for node in NODES {
        power.cluster.wait_joined(node)?;
    }
    let before = power
        .cluster
        .wait_serving(ALPHA, |serving| serving.node == "n1")?;
    let mut scene = Scene::new(&power.cluster)?;
    let mut takers = takers(power)?;
    // What there is before is not what the test is about.
    sh(&["sync", "-f", &text(&power.disk())])?;

    // A term that only the logs know, and votes.
    let leader = power.cluster.wait_leader()?;
    let next = power.cluster.others(&[leader])[0];
    power.cluster.operate(leader, &["transfer", "--to", next])?;
    power.cluster.wait(&format!("{next} leads"), |cluster| {
        (cluster.wait_leader().ok()? == next).then_some(())
    })?;
    scene.lock_and_wait()?;
    let writer = scene.writer(&power.cluster);
    writer.wait_more(RECORDS_MIN)?;
    let mut told = BTreeMap::new();
    for node in NODES {
        let term = power.cluster.status(node)?["term"].as_u64();
        told.insert(node, term.context("a term")?);
    }
    let connections = TAKERS.map(|number| connect(power, number));
    let connections: Result<Vec<_>> = connections.into_iter().collect();
    let mut written = 0;
    let cut = || {
        written = writer.done();
        power.cut()
    };
    let mut random = Random::seeded();
    work_until(&mut takers, connections?, &mut random, ANSWERS_MIN, cut)?;

    let mut lost = Vec::new();
    let terms = power.terms_alone()?;
    println!("the power went after {written} records; terms: told {told:?}, found {terms:?}");
    for (node, term) in &terms {
        if *term < told[node] {
            lost.push(format!("{node} told term {}, and has {term}", told[node]));
        }
    }
    for node in NODES {
        power.cluster.spawn(node)?;
    }
    let after = power.cluster.wait_serving(ALPHA, |_| true)?;
    if after.epoch <= before.epoch {
        lost.push(format!("{before:?}, then {after:?}"));
    }
    if let Err(error) = scene.is_held() {
        lost.push(format!("A's lock: {error:#}"));
    }
    let mut judge = connect(power, JUDGE)?;
    for taker in &mut takers {
        lost.extend(taker.judge(&mut judge, "judge")?);
    }
    // It went on with the record that it had in hand.
    writer.wait_more(RECORDS_MIN)?;
    let written = writer.finish()?;
    ensure!(written.verifiers()?.len() == 2, "one for each activation");
    if let Err(error) = scene.check_written(&written) {
        lost.push(format!("{error:#}"));
    }
    if lost.is_empty() {
        rises_by_one(before, after)?;
        scene.unlock_for_b()?;
        scene.machines_are_well()?;
    }
    Ok(lost)
}

#[test]
fn what_was_told_outlives_the_power_of_all_nodes() -> Result<()> {
    Power::run(|power| {
        let lost = what_is_lost(power, &[], "")?;
        ensure!(lost.is_empty(), "{lost:#?}");
        Ok(())
    })
}

#[test]
fn nodes_that_do_not_sync_their_logs_are_found_out() -> Result<()> {
    Power::run(|power| {
        let lost = what_is_lost(power, &NODES, "no-log-sync")?;
        println!("{} things are not as they were told: {lost:#?}", lost.len());
        let says = |what: &str| lost.iter().any(|lost| lost.contains(what));
        ensure!(says("told term"), "every vote was there");
        ensure!(says("is lost") || says("A's lock"), "every lock was there");
        Ok(())
    })
}

#[test]
fn one_node_that_does_not_sync_its_log_is_found_out_by_its_vote() -> Result<()> {
    Power::run(|power| {
        let lost = what_is_lost(power, &["n3"], "no-log-sync")?;
        println!("not as it was told: {lost:#?}");
        match &lost[..] {
            [one] if one.starts_with("n3 told term") => Ok(()),
            lost => bail!("a majority has all the rest: {lost:?}"),
        }
    })
}

#[test]
fn nodes_that_do_not_sync_what_is_written_are_found_out() -> Result<()> {
    Power::run(|power| {
        let lost = what_is_lost(power, &NODES, "no-sync")?;
        println!("not as it was told: {lost:#?}");
        match &lost[..] {
            [one] if one.starts_with("record ") => Ok(()),
            lost => bail!("the logs have all the rest: {lost:?}"),
        }
    })
}
