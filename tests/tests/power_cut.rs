//! Power cuts: what the server answered as durable is on its disk after the power went.
//!
//! The server runs in one virtual machine, its export on a disk image; a second one mounts it and
//! changes files with `lab-acklog`, which logs every answer. The server's machine is killed at a
//! random moment: what it had written to the disk stays, its page cache is gone. (The disk image
//! behaves as a disk without a volatile cache: a write that the machine's kernel submitted is
//! kept.) After the reboot its disk is compared with the log, then the server starts again, the
//! client carries on and the next cut comes.
//!
//! That this would notice a server that does not sync is a test itself: the same scene with a
//! server whose syncs are planted to do nothing must lose something. Needs root.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use havenfs_tests::lab::acks::{Answered, wait_for_changes};
use havenfs_tests::lab::random::Random;
use havenfs_tests::lab::site::in_lab;
use havenfs_tests::lab::{Lab, Machine, Process, Vm, havenfs_binary, havenfs_fault_binary};

#[test]
fn nothing_answered_is_lost_on_ext4() -> Result<()> {
    nothing_answered_is_lost("mkfs.ext4 -q", 4)
}

#[test]
fn nothing_answered_is_lost_on_xfs() -> Result<()> {
    nothing_answered_is_lost("mkfs.xfs -q", 2)
}

#[test]
fn a_server_that_does_not_sync_is_found_out() -> Result<()> {
    // ext4's journal writes back by itself every 5 s, so a cut may by luck come right after.
    const CUTS_MAX: usize = 5;
    in_lab("no-sync", |lab| {
        let scene = Scene::set(lab, "mkfs.ext4 -q", Syncs::DoNothing)?;
        let mut random = Random::seeded();
        let mut server = scene.serve()?;
        scene.client.mount(SERVER, EXPORT)?;
        let workers = scene.start_workers(&mut random)?;
        for cut in 0..CUTS_MAX {
            scene.cut(server, &workers, &mut random)?;
            let losses = scene.losses(&workers)?;
            if !losses.is_empty() {
                eprintln!(
                    "cut {cut}: {} losses were found, as they should",
                    losses.len()
                );
                return Ok(());
            }
            server = scene.serve()?;
        }
        anyhow::bail!("{CUTS_MAX} power cuts of a server that never syncs went unnoticed")
    })
}

fn nothing_answered_is_lost(mkfs: &str, cuts: usize) -> Result<()> {
    in_lab("power", |lab| {
        let scene = Scene::set(lab, mkfs, Syncs::Work)?;
        let mut random = Random::seeded();
        let mut server = scene.serve()?;
        scene.client.mount(SERVER, EXPORT)?;
        let workers = scene.start_workers(&mut random)?;
        for cut in 0..cuts {
            scene.cut(server, &workers, &mut random)?;
            let losses = scene.losses(&workers)?;
            ensure!(
                losses.is_empty(),
                "cut {cut}: answered, but lost: {losses:#?}"
            );
            server = scene.serve()?;
        }
        // The client's calls that met no server are answered by the last one: no STALE, no EIO.
        for worker in &workers {
            wait_for_changes(worker, 10, LIMIT)?;
        }
        Ok(())
    })
}

/// The server's machine and the client's.
struct Scene<'lab> {
    lab: &'lab Lab,
    server: Vm<'lab>,
    client: Vm<'lab>,
    syncs: Syncs,
}

#[derive(Clone, Copy)]
enum Syncs {
    Work,
    DoNothing,
}

impl<'lab> Scene<'lab> {
    fn set(lab: &'lab Lab, mkfs: &str, syncs: Syncs) -> Result<Self> {
        let binary = match syncs {
            Syncs::Work => havenfs_binary()?,
            Syncs::DoNothing => havenfs_fault_binary()?,
        };
        // A link would do, but the binary may lie on another file system.
        std::fs::copy(&binary, lab.share().join("havenfs"))
            .with_context(|| binary.display().to_string())?;
        let machine = Machine {
            disk: Some(lab.disk("server.img", DISK_MIB)?),
            ..Machine::default()
        };
        let server = lab.boot(SERVER, &machine)?;
        server.sh(&format!(
            "{mkfs} /dev/ubda && {MOUNT_DISK} && mkdir {EXPORT} {DISK}/state && sync"
        ))?;
        Ok(Self {
            lab,
            server,
            client: lab.client("c1")?,
            syncs,
        })
    }

    /// Starts the server in its machine, whose disk is mounted already.
    fn serve(&self) -> Result<Process> {
        let fault = match self.syncs {
            Syncs::Work => "",
            Syncs::DoNothing => "HAVENFS_FAULT=no-sync ",
        };
        let line = format!(
            "{fault}/share/havenfs serve --portmap embedded --state-dir {DISK}/state \
             --export '{EXPORT}:*(rw,no_root_squash)'"
        );
        let mut server = self.server.spawn("havenfs", LIMIT, &line)?;
        server.wait_for_line("havenfs ready", LIMIT)?;
        Ok(server)
    }

    fn start_workers(&self, random: &mut Random) -> Result<Vec<Process>> {
        let start = |name: &&str| self.client.spawn_worker(name, random.below(1 << 32));
        WORKERS.iter().map(start).collect()
    }

    /// Lets the workers work for a random time, cuts the power, boots and mounts the disk.
    fn cut(&self, server: Process, workers: &[Process], random: &mut Random) -> Result<()> {
        for worker in workers {
            wait_for_changes(worker, 20, LIMIT)?;
        }
        std::thread::sleep(Duration::from_millis(random.below(1500)));
        self.server.kill()?;
        drop(server);
        self.server.reset()?;
        self.server.sh(MOUNT_DISK)?;
        Ok(())
    }

    /// Compares the disk with what the workers were told. The boot took seconds, so the last of
    /// their words has come through.
    fn losses(&self, workers: &[Process]) -> Result<Vec<String>> {
        self.server
            .sh(&format!("rm -rf /share/copy && cp -r {EXPORT} /share/copy"))?;
        let mut losses = Vec::new();
        for (name, worker) in WORKERS.iter().zip(workers) {
            let answered = Answered::parse(&worker.output()?)?;
            eprintln!("{name}: {} changes were answered", answered.changes());
            losses.extend(answered.losses(&self.lab.share().join("copy"), name));
        }
        Ok(losses)
    }
}

const SERVER: &str = "c2";
const WORKERS: [&str; 3] = ["w1", "w2", "w3"];
/// In the server's machine; /mnt is a directory in memory, made anew at each boot.
const DISK: &str = "/mnt/disk";
const EXPORT: &str = "/mnt/disk/export";
const MOUNT_DISK: &str = "mkdir -p /mnt/disk && mount /dev/ubda /mnt/disk";
/// XFS wants 300 MB.
const DISK_MIB: u64 = 400;
const LIMIT: Duration = Duration::from_mins(2);
