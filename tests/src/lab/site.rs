//! The usual scene of a lab: the server on a host, its export mounted by a virtual machine.
//!
//! Owns how the server is started and how its export is mounted in tests; what is then done with
//! the files is the tests' business.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::{Host, Lab, Process, Vm, havenfs_binary, havenfs_fault_binary};

/// What [`Host::serve`] exports unless told otherwise: a directory of the host's own `/srv`.
pub const EXPORT: &str = "/srv/export";

/// Where [`Vm::mount`] mounts.
pub const MOUNT_POINT: &str = "/mnt";

/// Runs a test in a lab of its own, whose logs are kept if the test fails.
pub fn in_lab(name: &str, test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    let lab = Lab::up(name)?;
    let outcome = test(&lab);
    if outcome.is_err() {
        lab.keep_logs();
    }
    outcome
}

impl Host<'_> {
    /// Makes [`EXPORT`] if need be and serves it to everyone, root included.
    pub fn serve(&self) -> Result<Process> {
        self.serve_export(self.command(havenfs_binary()?)?)
    }

    /// As [`Host::serve`], by a server with a planted fault.
    pub fn serve_with_fault(&self, fault: &str) -> Result<Process> {
        let mut server = self.command(havenfs_fault_binary()?)?;
        server.env("HAVENFS_FAULT", fault);
        self.serve_export(server)
    }

    /// Starts the server and waits until it can answer.
    pub fn serve_exports(&self, exports: &[&str]) -> Result<Process> {
        self.start(self.command(havenfs_binary()?)?, exports)
    }

    fn serve_export(&self, server: Command) -> Result<Process> {
        self.sh(&format!("mkdir -p {EXPORT}"))?;
        self.start(server, &[&format!("{EXPORT}:*(rw,no_root_squash)")])
    }

    /// Its state directory is this host's, so that a second start continues the first.
    fn start(&self, mut server: Command, exports: &[&str]) -> Result<Process> {
        server.args(["serve", "--portmap", "embedded", "--state-dir"]);
        server.arg(self.dir().join("state"));
        for export in exports {
            server.args(["--export", export]);
        }
        let mut server = self.spawn("havenfs", &mut server)?;
        server.wait_for_line("havenfs ready", START_LIMIT)?;
        Ok(server)
    }
}

impl Vm<'_> {
    /// Mounts a server's export at [`MOUNT_POINT`], as the documentation tells users to.
    pub fn mount(&self, server: &str, export: &str) -> Result<()> {
        self.sh(&format!(
            "mount -t nfs -o vers=3,nolock {server}:{export} {MOUNT_POINT}"
        ))?;
        Ok(())
    }

    /// As [`Vm::mount`], with locks that the server knows of. The machine needs
    /// [`Machine::locks`](super::Machine).
    pub fn mount_with_locks(&self, server: &str, export: &str) -> Result<()> {
        self.sh(&format!(
            "mount -t nfs -o vers=3 {server}:{export} {MOUNT_POINT}"
        ))?;
        Ok(())
    }

    /// Unmounts [`MOUNT_POINT`].
    pub fn unmount(&self) -> Result<()> {
        self.sh(&format!("umount {MOUNT_POINT}"))?;
        Ok(())
    }

    /// Starts `lab-acklog` on the mounted export; see [`super::acks`].
    pub fn spawn_worker(&self, worker: &str, seed: u64) -> Result<Process> {
        let line = format!("lab-acklog {MOUNT_POINT} {worker} {seed}");
        self.spawn(&format!("acks-{worker}"), WORKER_LIMIT, &line)
    }
}

/// Copies a tree of the host that runs the test to a place where the test may read it.
pub fn copy_out(host: &Host<'_>, from: &str, to: &Path) -> Result<()> {
    host.sh(&format!("rm -rf {0} && cp -a {from} {0}", to.display()))?;
    Ok(())
}

/// A debug build of the server on a busy machine needs a moment.
const START_LIMIT: Duration = Duration::from_secs(30);
const WORKER_LIMIT: Duration = Duration::from_mins(10);
