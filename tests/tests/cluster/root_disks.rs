//! The disk of a node hangs, or fails, while the node itself lives: the service goes where a disk
//! works, and stays where it is if there is none.
//!
//! Each node sees a disk of its own under the path of the export: a copy of one ext4 image, in a
//! mount namespace of the node, so that handles mean the same file on all of them. What is written
//! on one is not on the others, and no test here asks for it. Writes hang by freezing the file
//! system, as they would on a disk that is gone; a write that hangs can't be interrupted, nor can
//! the process that made it end. Needs root.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::client::nlm::stat;
use havenfs_tests::cluster::site::{Plan, Site};
use havenfs_tests::cluster::{Cluster, NODES, POLL, Serving};

use crate::programs::{is_root, sh, text};
use crate::scene::{ALPHA, BETA, Scene, ms};

/// What is configured: how long a disk may take.
const STORAGE_SECONDS: u64 = 3;
const STORAGE_TIME: Duration = Duration::from_secs(STORAGE_SECONDS);
/// How long a node may answer whose disk hangs: the pause between two probes, the deadline, and a
/// busy machine.
const ANSWERS_MAX: Duration = Duration::from_millis(STORAGE_SECONDS * 1000 * 7 / 6 + 1500);

const ON_N1: [Plan; 2] = [
    Plan {
        name: ALPHA,
        preferred: "n1",
    },
    Plan {
        name: BETA,
        preferred: "n1",
    },
];

/// A cluster whose nodes have disks of their own for the first service; the second one has none.
struct Disks {
    cluster: Cluster,
}

impl Disks {
    fn run(test: impl FnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
        is_root()?;
        let mut disks = Self {
            cluster: Cluster::new(&ON_N1)?,
        };
        disks.make()?;
        let cluster = &mut disks.cluster;
        cluster.within = Some(within);
        let result = cluster.start().and_then(|()| test(cluster));
        if result.is_err() {
            cluster.show_logs();
        }
        result
    }

    fn make(&self) -> Result<()> {
        let site = &self.cluster.site;
        let image = site.path().join("image");
        fs::File::create(&image)?.set_len(64 << 20)?;
        sh(&["mkfs.ext4", "-q", "-F", &text(&image)])?;
        for (place, node) in ["first"].into_iter().chain(NODES).enumerate() {
            let (own, at) = (site.path().join(format!("image-{node}")), disk(site, node));
            fs::copy(&image, &own)?;
            fs::create_dir(&at)?;
            sh(&["mount", "-o", "loop", &text(&own), &text(&at)])?;
            if place == 0 {
                // All copies have the same files.
                fs::set_permissions(&at, fs::Permissions::from_mode(0o777))?;
                for name in ["locked", "journal"] {
                    fs::write(at.join(name), "")?;
                }
                sh(&["umount", &text(&at)])?;
                fs::rename(&own, &image)?;
            }
        }
        for node in NODES {
            let seconds = format!("storage_seconds = {STORAGE_SECONDS}\n[[service]]\n");
            let config = site.config_text(node)?;
            // After the first service's other keys, that is before the second one.
            let (first, second) = config
                .rsplit_once("[[service]]\n")
                .context("two services")?;
            fs::write(site.config(node), format!("{first}{seconds}{second}"))?;
        }
        Ok(())
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        for node in NODES {
            // It may not be frozen.
            let _ = thaw(&self.cluster.site, node);
        }
        for node in NODES {
            let _ = self.cluster.kill(node);
        }
        for node in NODES {
            let _ = sh(&["umount", "-l", &text(&disk(&self.cluster.site, node))]);
        }
    }
}

/// Where a node's disk is mounted for all to see.
fn disk(site: &Site, node: &str) -> PathBuf {
    site.path().join(format!("disk-{node}"))
}

/// Puts the node's own disk under the path of the export, for it alone.
fn within(site: &Site, node: &str) -> Vec<String> {
    let mount = format!(
        "mount --bind {} {} && exec \"$@\"",
        disk(site, node).display(),
        site.export(ALPHA).display()
    );
    let words = ["unshare", "--mount", "sh", "-c", &mount, "sh"];
    words.map(str::to_owned).into()
}

/// Has all writes to a node's disk hang.
fn freeze(site: &Site, node: &str) -> Result<()> {
    sh(&["fsfreeze", "--freeze", &text(&disk(site, node))])
}

fn thaw(site: &Site, node: &str) -> Result<()> {
    sh(&["fsfreeze", "--unfreeze", &text(&disk(site, node))])
}

/// What a node says of the storage of a service.
fn storage(cluster: &Cluster, node: &str, service: &str) -> Option<String> {
    let status = cluster.status(node).ok()?;
    let mut services = status["services"].as_array()?.iter();
    let told = services.find(|told| told["name"] == *service)?;
    told["storage"]["works"]
        .as_bool()
        .map(|works| works.to_string())
}

/// Waits until a service has stayed as it is for a while.
fn stays(cluster: &Cluster, as_it_is: Serving, time: Duration) -> Result<()> {
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        let serving = cluster.serving(ALPHA)?;
        ensure!(serving == Some(as_it_is), "{as_it_is:?}, then {serving:?}");
        std::thread::sleep(POLL);
    }
    Ok(())
}

#[test]
fn a_service_leaves_a_disk_that_hangs_and_so_does_all_that_is_on_the_node() -> Result<()> {
    Disks::run(|cluster| {
        let before = cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        let mut other = Scene::of(cluster, BETA, 3)?;
        ensure!(other.a.lock(&other.held())? == stat::GRANTED);
        let writer = scene.writer(cluster);
        writer.wait_more(20)?;
        ensure!(storage(cluster, "n1", ALPHA).as_deref() == Some("true"));

        let frozen = Instant::now();
        freeze(&cluster.site, before.node)?;
        let after = cluster.wait_serving(ALPHA, |serving| serving.node != before.node)?;
        let moved = frozen.elapsed();
        ensure!(after.epoch == before.epoch + 1, "{before:?}, {after:?}");
        let went = cluster.wait_serving(BETA, |serving| serving.node != before.node)?;
        println!(
            "its disk hangs for {}: served by {} after {}, the other service by {}",
            ms(STORAGE_TIME),
            after.node,
            ms(moved),
            went.node
        );
        writer.wait_more(20)?;
        let log = cluster.log(before.node)?;
        ensure!(log.contains("does not answer a write for 3 s"), "{log}");
        scene.is_held()?;
        ensure!(other.c.holder(&other.wanted())? == Some(crate::scene::HOLDER));
        // The process can't end; whatever it does, it says nothing.
        thaw(&cluster.site, before.node)?;
        let written = writer.finish()?;
        println!(
            "longest pause of WRITE: {}",
            ms(written.client.nfs.longest_gap(frozen))
        );
        ensure!(written.verifiers()?.len() == 2, "one for each activation");
        scene.unlock_for_b()?;
        scene.machines_are_well()
    })
}

#[test]
fn where_the_disks_of_all_hang_it_stays_and_goes_on_when_one_works() -> Result<()> {
    Disks::run(|cluster| {
        let before = cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(cluster)?;
        scene.lock_and_wait()?;
        for node in NODES {
            freeze(&cluster.site, node)?;
        }
        for node in NODES {
            cluster.wait(&format!("{node} says that its disk hangs"), |cluster| {
                (storage(cluster, node, ALPHA)? == "false").then_some(())
            })?;
        }
        stays(cluster, before, STORAGE_TIME * 2)?;
        // What needs no disk is answered.
        scene.is_held()?;
        ensure!(scene.a.getattr(&scene.fh)?.is_ok());
        // What needs one is put off, so that no client waits for an answer that can't come.
        let journal = scene.journal.clone();
        let error = scene.a.write(&journal, 0, b"later").err();
        let error = error.context("a WRITE on a disk that hangs")?.to_string();
        ensure!(
            error.contains("JUKEBOX") || error.contains("10008"),
            "{error}"
        );
        let next = cluster.others(&[before.node])[1];
        let thawed = Instant::now();
        thaw(&cluster.site, next)?;
        let after = cluster.wait_serving(ALPHA, |serving| serving.node != before.node)?;
        println!(
            "a disk works again: served there after {}",
            ms(thawed.elapsed())
        );
        ensure!(after.node == next, "{after:?}");
        scene.is_held()
    })
}

#[test]
fn a_node_stops_to_answer_at_its_deadline() -> Result<()> {
    Disks::run(|cluster| {
        let before = cluster.wait_serving(ALPHA, |_| true)?;
        let mut scene = Scene::new(cluster)?;
        let frozen = Instant::now();
        freeze(&cluster.site, before.node)?;
        // Attributes come from memory, so they are answered for as long as the node may.
        let mut last = frozen;
        while cluster
            .service(before.node, ALPHA)
            .is_ok_and(|told| told.serving)
        {
            scene.c.getattr(&scene.fh)?.ok();
            last = Instant::now();
        }
        println!(
            "stopped to answer {} after its disk hung",
            ms(last - frozen)
        );
        ensure!(last - frozen + POLL >= STORAGE_TIME, "too early");
        ensure!(last - frozen <= ANSWERS_MAX, "{:?}", last - frozen);
        Ok(())
    })
}
