//! What runs in the virtual machine of the demo, as its process 1: makes a Linux client of it, and
//! does what the demo says.
//!
//! The machine's root is the host's own, read-only; what has to be written lies in memory, mounted
//! over it. All files of the service are reached through the kernel's NFS client and its lock
//! manager, so what is seen is what any program on any Linux machine would see.
//!
//! Says `ok` or `failed WHY` to each line that it is told, with lines of text before it where there
//! is something to say, and `wrote N` for each record that the kernel says is stable.
//!
//! Refuses to run anywhere else: it mounts over system directories, and ends by switching off.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use havenfs::backend::sys;
use rustix::fs::{OFlags, SeekFrom, statfs};
use rustix::io::Errno;
use rustix::system::{RebootCommand, finit_module, reboot, uname};
use serde::{Deserialize, Serialize};

use super::ledger::{RECORD_BYTES, record};
use super::stage::check_end;

/// What a line begins with that tells a stable record.
pub(super) const WROTE: &str = "wrote ";
/// The file that records are written into.
pub(super) const JOURNAL: &str = "linux.txt";
/// The file that has locks.
pub(super) const LOCKED: &str = "account.dat";
/// Where the export is mounted.
const MOUNTED: &str = "/run/nfs";
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// In the order in which they are needed; what they need themselves is found.
const MODULES: [&str; 3] = ["ipv6", "nfsv3", "lockd"];
/// Leaves the machine some air.
const PAUSE: Duration = Duration::from_millis(2);
/// The type of a root that is the host's.
const HOSTFS_MAGIC: i64 = 0x00c0_ffee;
const KERNEL_LINE_BYTES_MAX: usize = 8192;

/// What the machine is to become.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// Its address, with the length of the prefix.
    pub(super) address: String,
    /// Where the demo waits for it.
    pub(super) demo: SocketAddr,
    /// What it calls itself.
    pub(super) hostname: String,
    /// Its /etc/hosts.
    pub(super) hosts: String,
    /// Where the kernel's modules are.
    pub(super) modules: PathBuf,
    /// What it mounts.
    pub(super) export: String,
}

/// Runs as process 1 of the machine; `plan` is a file.
pub(crate) fn run(plan: &Path) -> ExitCode {
    if let Err(error) = check_place() {
        super::tell(&format!("error: {error:#}"));
        return ExitCode::FAILURE;
    }
    if let Err(error) = live(plan) {
        super::tell(&format!("the demo's guest: {error:#}"));
    }
    // It has nothing on a disk.
    let _ = reboot(RebootCommand::PowerOff);
    ExitCode::FAILURE
}

/// Makes sure that this is a virtual machine of the demo, and no real one: nothing else has its
/// host's files as its root.
fn check_place() -> Result<()> {
    const REFUSED: &str = "this is a part of `havenfs demo --netns`, for its virtual machine only";
    let is_hostfs = statfs("/").is_ok_and(|root| root.f_type == HOSTFS_MAGIC);
    ensure!(std::process::id() == 1 && is_hostfs, "{REFUSED}");
    Ok(())
}

fn live(plan: &Path) -> Result<()> {
    let text = fs::read_to_string(plan).context("cannot read the plan")?;
    let plan: Plan = serde_json::from_str(&text).context("cannot read the plan")?;
    set_up(&plan)?;
    let stream = TcpStream::connect(plan.demo).context("cannot reach the demo")?;
    stream.set_nodelay(true)?;
    let lines = BufReader::new(stream.try_clone()?);
    let mut guest = Guest {
        plan,
        out: Arc::new(Mutex::new(stream)),
        kernel: None,
        locked: None,
        writing: None,
        stop: Arc::default(),
    };
    for line in lines.lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match guest.act(&words) {
            Ok(()) => "ok".to_owned(),
            Err(error) => format!("failed {error:#}"),
        };
        say(&guest.out, &answer)?;
        if words == ["end"] {
            break;
        }
    }
    Ok(())
}

/// Makes a machine of the kernel: directories that can be written, names, network, modules, and the
/// programs that locks need.
fn set_up(plan: &Plan) -> Result<()> {
    // Until then these are the host's.
    command("mount", &["-t", "proc", "proc", "/proc"])?;
    let mounts = fs::read_to_string("/proc/mounts")?;
    if !mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some("/dev"))
    {
        command("mount", &["-t", "devtmpfs", "dev", "/dev"])?;
    }
    for dir in ["/run", "/var/lib/nfs"] {
        command("mount", &["-t", "tmpfs", "-o", "mode=755", "tmpfs", dir])?;
    }
    for dir in [MOUNTED, "/run/lock", "/run/rpcbind", "/run/sendsigs.omit.d"] {
        fs::create_dir(dir)?;
    }
    for dir in ["/var/lib/nfs/sm", "/var/lib/nfs/sm.bak"] {
        fs::create_dir(dir)?;
    }
    fs::write("/proc/sys/kernel/hostname", &plan.hostname)?;
    fs::write("/run/hosts", &plan.hosts)?;
    command("mount", &["--bind", "/run/hosts", "/etc/hosts"])?;
    for name in MODULES {
        load(&plan.modules, name)?;
    }
    command("ip", &["link", "set", "lo", "up"])?;
    command("ip", &["link", "set", "vec0", "up"])?;
    command("ip", &["address", "add", &plan.address, "dev", "vec0"])?;
    command("rpcbind", &[])?;
    command("rpc.statd", &["--no-notify"])
}

struct Guest {
    plan: Plan,
    out: Arc<Mutex<TcpStream>>,
    /// The kernel's log, from the mount on.
    kernel: Option<File>,
    locked: Option<File>,
    writing: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Guest {
    fn act(&mut self, words: &[&str]) -> Result<()> {
        match *words {
            ["hello"] => {
                let uname = uname();
                let release = uname.release().to_string_lossy();
                self.say(&format!("is Linux {release}"))
            }
            ["mount"] => self.mount(),
            ["lock", first, count] => self.lock(first, count, false),
            ["unlock", first, count] => self.lock(first, count, true),
            ["write", run] => self.write(run.parse()?),
            ["stop"] => {
                self.stop.store(true, Ordering::SeqCst);
                if let Some(thread) = self.writing.take() {
                    let _ = thread.join();
                }
                Ok(())
            }
            ["log"] => self.tell_log(),
            ["end"] => {
                self.locked = None;
                command("umount", &[MOUNTED])
            }
            _ => bail!("this guest does not know `{}`", words.join(" ")),
        }
    }

    fn mount(&mut self) -> Result<()> {
        let mut options = OpenOptions::new();
        let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
        let kernel = options.read(true).custom_flags(nonblocking);
        let kernel = kernel.open("/dev/kmsg").context("no kernel log")?;
        rustix::fs::seek(&kernel, SeekFrom::End(0))?;
        self.kernel = Some(kernel);
        let export = self.plan.export.clone();
        command(
            "mount",
            &["-t", "nfs", "-o", "vers=3,hard", &export, MOUNTED],
        )?;
        let path = Path::new(MOUNTED).join(LOCKED);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).open(path);
        self.locked = Some(file.context("cannot open a file of the export")?);
        Ok(())
    }

    fn lock(&self, first: &str, count: &str, release: bool) -> Result<()> {
        let file = self.locked.as_ref().context("nothing is mounted")?;
        match sys::lock_bytes(file.as_fd(), first.parse()?, count.parse()?, release) {
            Ok(()) => Ok(()),
            Err(Errno::AGAIN | Errno::ACCESS) => bail!("somebody else has the lock"),
            Err(error) => Err(anyhow!("fcntl(2) fails: {error}")),
        }
    }

    fn write(&mut self, run: u32) -> Result<()> {
        let mut options = OpenOptions::new();
        // A record goes to the server alone and at once, and is stable when the call returns.
        let flags = (OFlags::DSYNC | OFlags::DIRECT).bits().cast_signed();
        let options = options.write(true).create(true).custom_flags(flags);
        let file = options.open(Path::new(MOUNTED).join(JOURNAL))?;
        let (out, stop) = (Arc::clone(&self.out), Arc::clone(&self.stop));
        self.writing = Some(thread::spawn(move || {
            for number in 0.. {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let offset = number * RECORD_BYTES as u64;
                let line = match file.write_all_at(&record(run, number), offset) {
                    Ok(()) => format!("{WROTE}{number}"),
                    Err(error) => format!("broken {error}"),
                };
                if say(&out, &line).is_err() || line.starts_with("broken") {
                    return;
                }
                thread::sleep(PAUSE);
            }
        }));
        Ok(())
    }

    /// Tells what the kernel has said since the mount.
    fn tell_log(&mut self) -> Result<()> {
        let mut record = [0; KERNEL_LINE_BYTES_MAX];
        // One read is one record; at the end of the log it says EAGAIN.
        while let Some(Ok(count)) = self.kernel.as_mut().map(|log| log.read(&mut record)) {
            let text = String::from_utf8_lossy(record.get(..count).unwrap_or_default());
            let first = text.lines().next().unwrap_or_default();
            if let Some((_, message)) = first.split_once(';') {
                self.say(&format!("kernel {message}"))?;
            }
        }
        Ok(())
    }

    fn say(&self, line: &str) -> Result<()> {
        say(&self.out, line)
    }
}

/// One write, so that lines of several threads do not mix.
fn say(out: &Mutex<TcpStream>, line: &str) -> Result<()> {
    let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
    out.write_all(format!("{line}\n").as_bytes())?;
    Ok(())
}

/// Loads a module of the kernel and all that it needs.
fn load(modules: &Path, name: &str) -> Result<()> {
    let uname = uname();
    let dir = modules.join(uname.release().to_string_lossy().as_ref());
    let list = fs::read_to_string(dir.join("modules.dep"))
        .with_context(|| format!("no modules in `{}`", dir.display()))?;
    // One that is not in the list is a part of the kernel.
    for path in files_of_module(&list, name) {
        let file = File::open(dir.join(path)).with_context(|| format!("no module `{path}`"))?;
        match finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => bail!("cannot load the module `{path}`: {error}"),
        }
    }
    Ok(())
}

/// The files of a module, those first that others need.
fn files_of_module<'l>(list: &'l str, name: &str) -> Vec<&'l str> {
    let of_module = |line: &&str| {
        let (path, _) = line.split_once(':').unwrap_or_default();
        let (_, file) = path.rsplit_once('/').unwrap_or(("", path));
        file.split_once('.').is_some_and(|(stem, _)| stem == name)
    };
    let Some((path, needed)) = list.lines().find(of_module).and_then(|l| l.split_once(':')) else {
        return Vec::new();
    };
    let mut files: Vec<&str> = needed.split_whitespace().rev().collect();
    files.push(path);
    files
}

/// Runs a program to its end, which must be a good one. What it starts goes on.
fn command(program: &str, args: &[&str]) -> Result<()> {
    let mut command = Command::new(program);
    command.env("PATH", PATH).args(args).stdin(Stdio::null());
    let output = command.output();
    let output = output.with_context(|| format!("cannot start `{program}`"))?;
    check_end(program, args, &output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_those_that_they_need() {
        let list = "kernel/fs/nfs/nfs.ko: kernel/fs/lockd/lockd.ko kernel/net/sunrpc/sunrpc.ko\n\
                    kernel/net/sunrpc/sunrpc.ko:\n";
        assert_eq!(
            files_of_module(list, "nfs"),
            [
                "kernel/net/sunrpc/sunrpc.ko",
                "kernel/fs/lockd/lockd.ko",
                "kernel/fs/nfs/nfs.ko"
            ]
        );
        assert_eq!(
            files_of_module(list, "sunrpc"),
            ["kernel/net/sunrpc/sunrpc.ko"]
        );
        assert!(files_of_module(list, "nf").is_empty());
    }
}
