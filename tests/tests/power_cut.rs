//! Power cuts: what the server answered as durable is on its disk after the power went.
//!
//! The server runs in one virtual machine, its export on a disk image; a second one mounts it and
//! changes files with `lab-acklog`, which logs every answer. The server's machine is killed at a
//! random moment: what it had written to the disk stays, its page cache is gone. (The disk image
//! behaves as a disk without a volatile cache: a write that the machine's kernel submitted is
//! kept.) After the reboot its disk is compared with the log, then the server starts again, the
//! client carries on and the next cut comes.
//!
//! Locks are taken and dropped by our small client, since a Linux kernel reclaims what a server has
//! lost, and so would hide it. After the reboot another host sees which of them are held.
//!
//! That this would notice a server that does not sync is a test itself: the same scenes with a
//! server whose syncs are planted to do nothing must lose something. Needs root.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use havenfs_rpc::program::{MOUNT_PORT, NFS_PORT, NLM_PORT};
use havenfs_tests::client::mount::Mount;
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::taker::{Taker, work_until};
use havenfs_tests::client::{Cred, Nfs, Nlm, Peer};
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
        let scene = Scene::set(lab, "mkfs.ext4 -q", Some("no-sync"))?;
        let client = lab.client("c1")?;
        let mut random = Random::seeded();
        let mut server = scene.serve()?;
        client.mount(SERVER, EXPORT)?;
        let workers = start_workers(&client, &mut random)?;
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
        let scene = Scene::set(lab, mkfs, None)?;
        let client = lab.client("c1")?;
        let mut random = Random::seeded();
        let mut server = scene.serve()?;
        client.mount(SERVER, EXPORT)?;
        let workers = start_workers(&client, &mut random)?;
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

#[test]
fn no_lock_is_lost() -> Result<()> {
    const CUTS: usize = 3;
    in_lab("power-locks", |lab| {
        let scene = Scene::set(lab, "mkfs.ext4 -q", None)?;
        let mut random = Random::seeded();
        let mut server = scene.serve()?;
        let mut takers = scene.takers()?;
        for cut in 0..CUTS {
            scene.cut_while_locking(server, &mut takers, &mut random)?;
            server = scene.serve()?;
            let wrong = scene.judge_locks(&mut takers)?;
            ensure!(wrong.is_empty(), "cut {cut}: {wrong:#?}");
        }
        Ok(())
    })
}

#[test]
fn a_server_that_does_not_sync_its_log_is_found_out() -> Result<()> {
    in_lab("no-log-sync", |lab| {
        let scene = Scene::set(lab, "mkfs.ext4 -q", Some("no-log-sync"))?;
        let server = scene.serve()?;
        let mut takers = scene.takers()?;
        scene.cut_while_locking(server, &mut takers, &mut Random::seeded())?;
        let _server = scene.serve()?;
        let wrong = scene.judge_locks(&mut takers)?;
        eprintln!("{} locks are not as they were told", wrong.len());
        ensure!(!wrong.is_empty(), "a log that was never synced was there");
        Ok(())
    })
}

/// The server's machine.
struct Scene<'lab> {
    lab: &'lab Lab,
    server: Vm<'lab>,
    /// The fault that the server has.
    fault: Option<&'static str>,
}

impl<'lab> Scene<'lab> {
    fn set(lab: &'lab Lab, mkfs: &str, fault: Option<&'static str>) -> Result<Self> {
        let binary = match fault {
            None => havenfs_binary()?,
            Some(_) => havenfs_fault_binary()?,
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
        Ok(Self { lab, server, fault })
    }

    /// Starts the server in its machine, whose disk is mounted already.
    fn serve(&self) -> Result<Process> {
        let fault = self.fault.unwrap_or_default();
        let line = format!(
            "HAVENFS_FAULT={fault} /share/havenfs serve --portmap embedded --state-dir {DISK}/state \
             --export '{EXPORT}:*(rw,no_root_squash)'"
        );
        let mut server = self.server.spawn("havenfs", LIMIT, &line)?;
        server.wait_for_line("havenfs ready", LIMIT)?;
        Ok(server)
    }

    /// Lets the workers work for a random time, cuts the power, boots and mounts the disk.
    fn cut(&self, server: Process, workers: &[Process], random: &mut Random) -> Result<()> {
        for worker in workers {
            wait_for_changes(worker, 20, LIMIT)?;
        }
        std::thread::sleep(Duration::from_millis(random.below(1500)));
        self.server.kill()?;
        drop(server);
        self.boot()
    }

    /// Gives the power back and mounts the disk.
    fn boot(&self) -> Result<()> {
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

    /// Owners of locks, each on a file of its own.
    fn takers(&self) -> Result<Vec<Taker>> {
        self.server
            .sh(&format!("touch {EXPORT}/1 {EXPORT}/2 && sync"))?;
        let peer = |port| self.connect("s1", port);
        let root = Mount::new(peer(MOUNT_PORT)?, Cred::root()).mnt(EXPORT.as_bytes())?;
        let root = root.map_err(|status| anyhow!("MNT: status {status}"))?;
        let mut nfs = Nfs::new(peer(NFS_PORT)?, Cred::root());
        let mut taker = |svid: i32| {
            let fh = nfs.find(&root, svid.to_string().as_bytes())?;
            Ok(Taker::new(&fh, "s1", svid))
        };
        [1, 2].map(&mut taker).into_iter().collect()
    }

    /// Lets the takers work, each on a connection of its own, cuts the power and boots.
    fn cut_while_locking(
        &self,
        server: Process,
        takers: &mut [Taker],
        random: &mut Random,
    ) -> Result<()> {
        let connect = |_: &Taker| Ok(Nlm::new(self.connect("s1", NLM_PORT)?, Cred::root()));
        let connections: Result<Vec<_>> = takers.iter().map(connect).collect();
        work_until(takers, connections?, random, ANSWERS_MIN, || {
            self.server.kill()
        })?;
        drop(server);
        self.boot()
    }

    /// What another host sees of the locks that is not what their owners were told.
    fn judge_locks(&self, takers: &mut [Taker]) -> Result<Vec<String>> {
        let mut other = Nlm::new(self.connect("s2", NLM_PORT)?, Cred::root());
        let mut wrong = Vec::new();
        for taker in takers {
            wrong.extend(taker.judge(&mut other, "s2")?);
        }
        Ok(wrong)
    }

    /// Connects from a host of the lab, from a port that the export takes for secure.
    fn connect(&self, host: &str, port: u16) -> Result<Peer> {
        let own = match host {
            "s1" => Ipv4Addr::new(10, 77, 0, 1),
            _ => Ipv4Addr::new(10, 77, 0, 2),
        };
        let server = SocketAddr::from((SERVER_ADDRESS, port));
        self.lab
            .host(host)
            .on_network(|| Peer::connect_reserved_from(Transport::Tcp, IpAddr::V4(own), server))
    }
}

fn start_workers(client: &Vm<'_>, random: &mut Random) -> Result<Vec<Process>> {
    let start = |name: &&str| client.spawn_worker(name, random.below(1 << 32));
    WORKERS.iter().map(start).collect()
}

const SERVER: &str = "c2";
const SERVER_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 12);
const WORKERS: [&str; 3] = ["w1", "w2", "w3"];
/// In the server's machine; /mnt is a directory in memory, made anew at each boot.
const DISK: &str = "/mnt/disk";
const EXPORT: &str = "/mnt/disk/export";
const MOUNT_DISK: &str = "mkdir -p /mnt/disk && mount /dev/ubda /mnt/disk";
/// How many answers the takers get before a cut.
const ANSWERS_MIN: u64 = 200;
/// XFS wants 300 MB.
const DISK_MIB: u64 = 400;
const LIMIT: Duration = Duration::from_mins(2);
