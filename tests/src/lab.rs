//! A lab of real Linux clients, for one test: server hosts `s1` to `s3` (namespaces) and virtual
//! machines `c1` to `c4` (User Mode Linux) on one bridge.
//!
//! Owns the lab's life: [`Lab::up`] makes it, dropping the [`Lab`] ends every process in it, also
//! when the test panics. What really makes networks and machines are the scripts in `tests/lab`;
//! this module only calls them, so that a person can do by hand whatever a test does.
//!
//! The [`Lab`] itself does not know NFS; [`site`] starts the server in it and mounts its export.
//!
//! Invariants: each lab has its own namespaces (prefix `havenfs-`, then name, process and a count)
//! and its own directory under `target/lab/runs`; the directory's file `owner` stays locked while
//! the test lives, so that the next lab to start removes what a killed test left behind. Nothing
//! in a lab reaches the machine's own network.

pub mod acks;
pub mod capture;
pub mod clock;
pub mod cluster;
pub mod held;
pub mod locks;
mod process;
pub mod random;
pub mod records;
pub mod site;
pub mod traffic;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::FlockOperation;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use self::clock::Reading;
use self::process::tail;
pub use self::process::{Output, Process};

/// One test's network, hosts and virtual machines.
#[derive(Debug)]
pub struct Lab {
    /// Prefix of the namespaces, and name of the directory.
    name: String,
    run: PathBuf,
    /// Locked; see the module's invariants.
    _owner: File,
}

impl Lab {
    /// Makes a lab's network and its hosts; virtual machines start with [`Lab::client`].
    ///
    /// `name` shows up in namespaces, directories and messages; two labs may share it.
    pub fn up(name: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        ensure!(
            rustix::process::geteuid().is_root(),
            "the lab of real clients needs root: run ./test, or ./test --user to leave it out"
        );
        script_must_succeed(&mut script("fetch.sh"))?;
        let runs = lab_dir().join("runs");
        fs::create_dir_all(&runs)?;
        script_must_succeed(script("net.sh").arg("sweep").arg(&runs))?;

        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("havenfs-{name}-{}-{count}", std::process::id());
        let run = runs.join(&name);
        fs::create_dir_all(run.join("share"))?;
        // Locked before it gets the name that a sweep looks for.
        let owner = File::create(run.join("owner.new"))?;
        rustix::fs::flock(&owner, FlockOperation::NonBlockingLockExclusive)?;
        fs::rename(run.join("owner.new"), run.join("owner"))?;
        let lab = Self {
            name,
            run,
            _owner: owner,
        };
        script_must_succeed(lab.script("net.sh").arg("up"))?;
        Ok(lab)
    }

    /// The server host `name`: `s1`, `s2` or `s3`.
    #[must_use]
    pub fn host(&self, name: &str) -> Host<'_> {
        Host {
            lab: self,
            name: name.to_owned(),
        }
    }

    /// Boots the virtual machine `name` (`c1` to `c4`) as a client.
    pub fn client(&self, name: &str) -> Result<Vm<'_>> {
        self.boot(name, &Machine::default())
    }

    /// Boots the virtual machine `name` with the given memory and disk.
    pub fn boot(&self, name: &str, machine: &Machine) -> Result<Vm<'_>> {
        let vm = Vm {
            lab: self,
            name: name.to_owned(),
        };
        let mut start = self.script("vmctl");
        start.args(["start", name, "--mem", &machine.memory_mib.to_string()]);
        if machine.locks {
            start.arg("--locks");
        }
        if let Some(disk) = &machine.disk {
            start.arg("--disk").arg(disk);
        }
        script_must_succeed(&mut start).with_context(|| vm.console_tail())?;
        Ok(vm)
    }

    /// A directory of this lab that every virtual machine sees as `/share`.
    #[must_use]
    pub fn share(&self) -> PathBuf {
        self.run.join("share")
    }

    /// Makes an empty disk image, to be given to [`Lab::boot`]. It outlives its machine.
    pub fn disk(&self, name: &str, size_mib: u64) -> Result<PathBuf> {
        let path = self.run.join(name);
        File::create(&path)?.set_len(size_mib << 20)?;
        Ok(path)
    }

    /// Takes the cable of a host or virtual machine out.
    pub fn cut(&self, name: &str) -> Result<()> {
        script_must_succeed(self.script("net.sh").args(["cut", name]))
    }

    /// Puts the cable of a host or virtual machine back.
    pub fn heal(&self, name: &str) -> Result<()> {
        script_must_succeed(self.script("net.sh").args(["heal", name]))
    }

    /// Pulls the cable of a host out, which the host sees.
    pub fn unplug(&self, name: &str) -> Result<()> {
        script_must_succeed(self.script("net.sh").args(["unplug", name]))
    }

    /// Plugs the cable of a host in again.
    pub fn plug(&self, name: &str) -> Result<()> {
        script_must_succeed(self.script("net.sh").args(["plug", name]))
    }

    /// Takes the power of a host away, with all that runs on it.
    pub fn crash(&self, name: &str) -> Result<()> {
        script_must_succeed(self.script("net.sh").args(["crash", name]))
    }

    /// Boots a host whose power was taken away.
    pub fn boot_host(&self, name: &str) -> Result<()> {
        script_must_succeed(self.script("net.sh").args(["boot", name]))
    }

    fn script(&self, name: &str) -> Command {
        let mut command = script(name);
        command.env("LAB_RUN", &self.run).env("LAB_NS", &self.name);
        command
    }

    /// Where captures lie.
    fn captures(&self) -> PathBuf {
        self.run.join("captures")
    }

    /// Puts the logs where they outlive the lab; called when a test fails.
    fn keep_logs(&self) {
        let kept = lab_dir().join("failed").join(&self.name);
        let is_kept = |path: &PathBuf| {
            let kept = ["log", "pcap"].map(|extension| Some(OsStr::new(extension)));
            kept.contains(&path.extension())
        };
        let of_each = ["vms", "hosts"].map(|dir| read_dir(&self.run.join(dir)));
        for dir in of_each.into_iter().flatten().chain([self.captures()]) {
            for log in read_dir(&dir).filter(is_kept) {
                let to = kept.join(log.strip_prefix(&self.run).unwrap_or(&log));
                let made = to.parent().is_some_and(|d| fs::create_dir_all(d).is_ok());
                if made {
                    let _ = fs::copy(&log, to);
                }
            }
        }
        eprintln!("the lab's logs are kept in {}", kept.display());
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking() {
            self.keep_logs();
        }
        match script_must_succeed(self.script("net.sh").arg("down")) {
            Ok(()) => {
                let _ = fs::remove_dir_all(&self.run);
            }
            Err(error) => eprintln!("lab {} was not taken down: {error:#}", self.name),
        }
    }
}

/// What a virtual machine is made of.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// A raw image that becomes `/dev/ubda`. Writes reach it at once and stay when the machine is
    /// killed; the machine's page cache does not.
    pub disk: Option<PathBuf>,
    /// Whether it runs rpcbind and rpc.statd, which a client that locks needs. The latter tells
    /// servers of a reboot.
    pub locks: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            memory_mib: 256,
            disk: None,
            locks: false,
        }
    }
}

/// A server host: its own network, process and mount namespaces, `/run` and `/srv`.
#[derive(Debug)]
pub struct Host<'lab> {
    lab: &'lab Lab,
    name: String,
}

impl Host<'_> {
    /// A command that runs on this host.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let file = self.dir().join("pid");
        let pid = fs::read_to_string(&file).with_context(|| format!("{} is down", self.name))?;
        let mut command = Command::new("nsenter");
        command
            .args(["-t", pid.trim(), "-m", "-u", "-p", "-n", "--"])
            .arg(program)
            .stdin(Stdio::null());
        Ok(command)
    }

    /// Runs a shell command that must succeed; returns its standard output.
    pub fn sh(&self, line: &str) -> Result<String> {
        let output = self.command("bash")?.args(["-c", line]).output()?;
        let output = Output::from(output);
        output.success(&format!("{}: {line}", self.name))
    }

    /// Starts `command` (made by [`Host::command`]), its output going to `LABEL.log`.
    pub fn spawn(&self, label: &str, command: &mut Command) -> Result<Process> {
        Process::spawn(self.dir().join(format!("{label}.log")), command)
    }

    /// Calls `work` in a thread on this host's network, where the sockets that it makes stay.
    pub fn on_network<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = format!("/run/netns/{}-{}", self.lab.name, self.name);
        let network = File::open(&path).context(path)?;
        let enter = || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(network.as_fd(), kind)?;
            work()
        };
        let panicked = |panic| std::panic::resume_unwind(panic);
        thread::scope(|scope| scope.spawn(enter).join().unwrap_or_else(panicked))
    }

    /// This host's directory; it survives the host's crash.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.lab.run.join("hosts").join(&self.name)
    }
}

/// A virtual machine; commands in it run as root unless they say otherwise.
#[derive(Debug)]
pub struct Vm<'lab> {
    lab: &'lab Lab,
    name: String,
}

impl Vm<'_> {
    /// Its name, which is its host name too.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a shell command, for at most a minute.
    pub fn exec(&self, line: &str) -> Result<Output> {
        self.exec_within(Duration::from_mins(1), line)
    }

    /// Runs a shell command that is ended after `limit`; the status is then 124.
    pub fn exec_within(&self, limit: Duration, line: &str) -> Result<Output> {
        let output = self.exec_command(limit, line).output()?;
        let output = Output::from(output);
        if output.status == VM_LOST {
            let stderr = &output.stderr;
            bail!("{}: {line}\n{stderr}\n{}", self.name, self.console_tail());
        }
        Ok(output)
    }

    /// Runs a shell command that must succeed within a minute; returns its standard output.
    pub fn sh(&self, line: &str) -> Result<String> {
        self.sh_within(Duration::from_mins(1), line)
    }

    /// Runs a shell command that must succeed within `limit`; returns its standard output.
    pub fn sh_within(&self, limit: Duration, line: &str) -> Result<String> {
        self.exec_within(limit, line)?
            .success(&format!("{}: {line}", self.name))
            .with_context(|| self.console_tail())
    }

    /// Starts a shell command, its output going to `LABEL.log`; it ends with the guard.
    pub fn spawn(&self, label: &str, limit: Duration, line: &str) -> Result<Process> {
        let log = self.dir().join(format!("{label}.log"));
        Process::spawn(log, &mut self.exec_command(limit, line))
    }

    /// As [`Vm::spawn`], of a command that reads what is sent with [`Process::say`].
    pub fn spawn_reading(&self, label: &str, limit: Duration, line: &str) -> Result<Process> {
        let log = self.dir().join(format!("{label}.log"));
        let mut command = self.vmctl("exec");
        command
            .args(["-i", "-t", &limit.as_secs().max(1).to_string()])
            .arg(line)
            .stdin(Stdio::piped());
        Process::spawn_reading(log, &mut command)
    }

    /// Copies a file of the machine that runs the test to `path` in the virtual machine.
    pub fn put(&self, file: &Path, path: &str) -> Result<()> {
        let mut put = self.vmctl("put");
        script_must_succeed(put.arg(file).arg(path)).with_context(|| self.console_tail())
    }

    /// Takes the power away.
    pub fn kill(&self) -> Result<()> {
        script_must_succeed(&mut self.vmctl("kill"))
    }

    /// Takes the power away and boots again, with the same memory and disk.
    pub fn reset(&self) -> Result<()> {
        script_must_succeed(&mut self.vmctl("reset")).with_context(|| self.console_tail())
    }

    /// Compares the virtual machine's wall clock with this one's.
    pub fn clock(&self) -> Result<Reading> {
        let output = Output::from(self.vmctl("clock").output()?);
        output.success(&format!("clock of {}", self.name))?.parse()
    }

    /// The last lines that the virtual machine's kernel and first process wrote.
    #[must_use]
    pub fn console_tail(&self) -> String {
        format!(
            "console of {}:\n{}",
            self.name,
            tail(&self.dir().join("console.log"))
        )
    }

    fn dir(&self) -> PathBuf {
        self.lab.run.join("vms").join(&self.name)
    }

    fn vmctl(&self, verb: &str) -> Command {
        let mut command = self.lab.script("vmctl");
        command.args([verb, &self.name]);
        command
    }

    fn exec_command(&self, limit: Duration, line: &str) -> Command {
        let mut command = self.vmctl("exec");
        command
            .args(["-t", &limit.as_secs().max(1).to_string()])
            .arg(line);
        command
    }
}

/// The server's binary: `HAVENFS_BIN`, else the one that `cargo build` made beside this test.
pub fn havenfs_binary() -> Result<PathBuf> {
    binary("HAVENFS_BIN", "havenfs")
}

/// The server's binary with faults that can be planted: `HAVENFS_FAULT_BIN`, else `havenfs-fault`
/// beside the usual one, where `./test` puts it.
pub fn havenfs_fault_binary() -> Result<PathBuf> {
    binary("HAVENFS_FAULT_BIN", "havenfs-fault")
}

fn binary(variable: &str, name: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    // target/PROFILE/deps/TEST-HASH
    let test = std::env::current_exe()?;
    let profile = test.parent().and_then(Path::parent);
    let path = profile.unwrap_or(Path::new("/")).join(name);
    ensure!(
        path.is_file(),
        "{} is missing: ./test builds it, or set {variable}",
        path.display()
    );
    Ok(path)
}

fn lab_dir() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab");
    let dir = std::env::var_os("LAB_DIR").map_or_else(default, PathBuf::from);
    // The guests' kernel follows no symbolic link and knows no "..".
    fs::create_dir_all(&dir)
        .and_then(|()| dir.canonicalize())
        .unwrap_or(dir)
}

fn script(name: &str) -> Command {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab").join(name);
    let mut command = Command::new(path);
    command.env("LAB_DIR", lab_dir()).stdin(Stdio::null());
    command
}

fn script_must_succeed(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    Output::from(output).success(&format!("{command:?}"))?;
    Ok(())
}

fn read_dir(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.flatten().map(|entry| entry.path())
}

/// The exit status of `vmctl exec` when the virtual machine could not be asked.
const VM_LOST: i32 = 125;
