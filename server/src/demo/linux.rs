//! A real Linux client: its kernel mounts, locks and writes, in a virtual machine (User Mode
//! Linux).
//!
//! Owns the machine's process and the connection to what runs in it, which is this program once
//! more ([`super::guest`]); the machine's root is this machine's own, read-only. Says what it is to
//! do, line by line, and keeps a ledger of the records that its kernel was told are stable. Where
//! User Mode Linux is not installed, or does not start, the demo goes on without it and says why.
//!
//! Limits: a line of [`LINE_BYTES_MAX`], [`LINES_MAX`] lines that nobody has asked for.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::fs::statvfs;

use super::bridge::{GUEST_CABLE, mac};
use super::client::nlm::caller_name;
use super::cluster::LOOK;
use super::guest::{Plan, WROTE};
use super::interrupt;
use super::ledger::{Bytes, KERNEL, Ledger, Lock, Owner};
use super::site::{GUEST, PREFIX_BITS, Site};
use super::stage::find;

/// Its name in the story.
pub(super) const NAME: &str = "K";
/// Its memory, in MiB: more than it needs for this program and the pages that it keeps.
const MEMORY_MIB: u64 = 256;
/// Where this demo waits for it, on an address that is in no other network.
const PORT: u16 = 7;
const BOOT_TIME_MAX: Duration = Duration::from_secs(25);
/// How long it may take for what it is told.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(25);
const END_TIME_MAX: Duration = Duration::from_secs(5);
const LINE_BYTES_MAX: u64 = 4096;
const LINES_MAX: usize = 1024;
/// Where Debian has the kernel's modules.
const MODULES: &str = "/usr/lib/uml/modules";
/// What has to be there, and the Debian package that has it.
const PROGRAMS: [(&str, &str); 4] = [
    ("linux.uml", "user-mode-linux"),
    ("mount.nfs", "nfs-common"),
    ("rpc.statd", "nfs-common"),
    ("rpcbind", "rpcbind"),
];

/// The machine.
#[derive(Debug)]
pub(super) struct Linux {
    child: Child,
    listener: TcpListener,
    console: PathBuf,
    wire: Option<Wire>,
    /// The records that it was told are stable, and when.
    pub(super) ledger: Arc<Ledger>,
}

/// The connection to what runs in it.
#[derive(Debug)]
struct Wire {
    stream: TcpStream,
    answers: Mutex<Receiver<String>>,
}

/// Why there can't be one here; none if there can.
pub(super) fn what_is_missing() -> Option<String> {
    let missing = PROGRAMS.iter().find(|(name, _)| find(name).is_none());
    if let Some((name, package)) = missing {
        return Some(format!(
            "`{name}` of the Debian package {package} is not installed"
        ));
    }
    if !Path::new(MODULES).is_dir() {
        return Some(format!("there are no kernel modules in {MODULES}"));
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("/dev/net/tun is not there".to_owned());
    }
    // It hands over a smaller state of the processor than the kernel below it wants then.
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if flags.contains(" amx_tile") {
        return Some("User Mode Linux does not run on processors with AMX".to_owned());
    }
    None
}

impl Linux {
    /// Switches the machine on; it boots while the demo does other things.
    pub(super) fn switch_on(site: &Site) -> Result<Self> {
        let at = SocketAddr::new(site.client(1), PORT);
        let listener = TcpListener::bind(at).context("cannot listen to a virtual machine")?;
        listener.set_nonblocking(true)?;
        let plan = Plan {
            address: format!("{}/{PREFIX_BITS}", site.client(GUEST)),
            demo: at,
            hostname: caller_name(NAME),
            hosts: hosts(site),
            modules: MODULES.into(),
            export: format!("{}:{}", Site::names()[1], site.export().display()),
        };
        let dir = site.guest_dir();
        fs::create_dir(&dir).context("cannot make a directory")?;
        let file = dir.join("plan.json");
        fs::write(&file, serde_json::to_string(&plan)?)?;
        let exe = std::env::current_exe().context("cannot find this program's own file")?;
        let console = dir.join("log");
        let log = File::create(&console)?;
        let child = machine(&exe, &file, &dir)?
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("cannot start User Mode Linux")?;
        interrupt::note_child(&child);
        Ok(Self {
            child,
            listener,
            console,
            wire: None,
            ledger: Arc::default(),
        })
    }

    /// Waits until it has booted; returns what its kernel is.
    ///
    /// # Errors
    /// It does not start here; the demo can do without.
    pub(super) fn wait_up(&mut self) -> Result<String> {
        let deadline = Instant::now() + BOOT_TIME_MAX;
        let stream = loop {
            match self.listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if interrupt::has_ended(&mut self.child).is_some() {
                bail!("User Mode Linux has ended{}", self.last_words());
            }
            if Instant::now() > deadline {
                let seconds = BOOT_TIME_MAX.as_secs();
                bail!(
                    "User Mode Linux has not started after {seconds} s{}",
                    self.last_words()
                );
            }
            interrupt::sleep(LOOK)?;
        };
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        let (out, answers) = sync_channel(LINES_MAX);
        let (lines, ledger) = (stream.try_clone()?, Arc::clone(&self.ledger));
        // Ends with the machine.
        thread::spawn(move || hear(lines, &out, &ledger));
        self.wire = Some(Wire {
            stream,
            answers: Mutex::new(answers),
        });
        let said = self.ask("hello")?;
        said.into_iter()
            .next()
            .context("it does not say what it is")
    }

    /// Has its kernel mount the export.
    pub(super) fn mount(&self) -> Result<()> {
        self.ask("mount").map(drop)
    }

    /// Has its kernel take a lock, which nobody may have.
    pub(super) fn lock(&self, lock: Lock) -> Result<()> {
        let Bytes { first, count } = lock.bytes;
        self.ask(&format!("lock {first} {count}")).map(drop)
    }

    /// Has its kernel give a lock back.
    pub(super) fn unlock(&self, lock: Lock) -> Result<()> {
        let Bytes { first, count } = lock.bytes;
        self.ask(&format!("unlock {first} {count}")).map(drop)
    }

    /// Begins to write records, until it is told to stop.
    pub(super) fn write(&self, run: u32) -> Result<()> {
        self.ask(&format!("write {run}")).map(drop)
    }

    /// Stops writing after the record that is under way.
    pub(super) fn stop(&self) -> Result<()> {
        self.ask("stop").map(drop)
    }

    /// What its kernel has said since the mount.
    pub(super) fn kernel_log(&self) -> Result<Vec<String>> {
        self.ask("log")
    }

    /// Unmounts and switches it off.
    pub(super) fn switch_off(&mut self) -> Result<()> {
        self.ask("end")?;
        let deadline = Instant::now() + END_TIME_MAX;
        while interrupt::has_ended(&mut self.child).is_none() && Instant::now() < deadline {
            interrupt::sleep(LOOK)?;
        }
        Ok(())
    }

    /// A lock of its kernel, which numbers the owners itself.
    pub(super) const fn owns(first: u64, count: u64) -> Lock {
        let owner = Owner {
            client: NAME,
            svid: KERNEL,
        };
        Lock {
            owner,
            bytes: Bytes { first, count },
        }
    }

    /// Tells it to do something, and waits until it is done; returns what it says.
    fn ask(&self, what: &str) -> Result<Vec<String>> {
        let wire = self.wire.as_ref().context("it does not run")?;
        let answers = wire.answers.lock().unwrap_or_else(PoisonError::into_inner);
        (&wire.stream).write_all(format!("{what}\n").as_bytes())?;
        let deadline = Instant::now() + ANSWER_TIME_MAX;
        let mut said = Vec::new();
        loop {
            interrupt::check()?;
            match answers.recv_timeout(LOOK) {
                Ok(line) => match line.split_once(' ').unwrap_or((&line, "")) {
                    ("ok", _) => return Ok(said),
                    ("failed", why) => bail!("{}", why.to_owned()),
                    (_, text) => said.push(text.to_owned()),
                },
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the virtual machine has ended{}", self.last_words())
                }
            }
            if Instant::now() > deadline {
                bail!("no answer to `{what}` for {} s", ANSWER_TIME_MAX.as_secs());
            }
        }
    }

    /// The end of what it has written on its console.
    fn last_words(&self) -> String {
        let console = fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        // After its panic there is only its stack.
        let said = console.lines().filter(|line| !line.trim().is_empty());
        let last = said
            .take_while(|line| !line.contains("Kernel panic"))
            .last();
        last.map(|line| format!(" (its last words: {})", line.trim()))
            .unwrap_or_default()
    }
}

impl Drop for Linux {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let deadline = Instant::now() + END_TIME_MAX;
        while interrupt::has_ended(&mut self.child).is_none() && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
    }
}

/// The virtual machine, whose process 1 is this program.
fn machine(exe: &Path, plan: &Path, home: &Path) -> Result<Command> {
    let exe = exe.to_str().unwrap_or_default();
    // The kernel's command line has words, and no way to write a space in one.
    if exe.is_empty() || exe.contains(|c: char| c.is_whitespace() || ",\"".contains(c)) {
        bail!("the name of this program's file, `{exe}`, is none for a kernel's command line");
    }
    let kernel = find("linux.uml").context("`linux.uml` is not there")?;
    let mut command = Command::new(kernel);
    command
        .env_clear()
        .env("HOME", home)
        .env("TMPDIR", memory_dir(home))
        .args(["umid=linux", "root=/dev/root", "rootfstype=hostfs"])
        .args(["rootflags=/", "ro", "quiet"])
        .arg(format!("mem={MEMORY_MIB}M"))
        .arg(format!("init={exe}"))
        // gro=1: without it the machine drops the large frames that come from a virtual cable.
        .arg(format!(
            "vec0:transport=tap,ifname={GUEST_CABLE},depth=128,gro=1,mac={}",
            mac(GUEST)
        ))
        .args(["con=null", "con0=null,fd:1", "ssl=null"])
        .args(["--", "demo-guest"])
        .arg(plan);
    Ok(command)
}

/// Where its memory lies: in memory if there is room, else where the demo's files are.
fn memory_dir(home: &Path) -> PathBuf {
    let shm = Path::new("/dev/shm");
    let needed_bytes = (MEMORY_MIB + 64) << 20;
    let has_room = |space: rustix::fs::StatVfs| space.f_bavail * space.f_frsize > needed_bytes;
    if statvfs(shm).is_ok_and(has_room) {
        shm.into()
    } else {
        home.into()
    }
}

/// Its /etc/hosts.
fn hosts(site: &Site) -> String {
    format!(
        "127.0.0.1 localhost\n{} {}\n{} {}\n{} {}\n{} {}\n",
        site.service(),
        Site::names().join(" "),
        site.client(1),
        caller_name("A"),
        site.client(2),
        caller_name("B"),
        site.client(GUEST),
        caller_name(NAME),
    )
}

/// Hears what the machine says, until it ends.
fn hear(stream: TcpStream, out: &SyncSender<String>, ledger: &Ledger) {
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = String::new();
        match (&mut lines).take(LINE_BYTES_MAX).read_line(&mut line) {
            Ok(count) if count > 0 => {}
            _ => return,
        }
        let line = line.trim_end();
        if let Some(number) = line.strip_prefix(WROTE) {
            if let Ok(number) = number.trim().parse() {
                ledger.answered(Instant::now());
                ledger.acknowledged([number]);
            }
        } else if let Some(why) = line.strip_prefix("broken ") {
            ledger.broken(format!("client {NAME} cannot write: {why}"));
        } else if let Err(TrySendError::Disconnected(_)) = out.try_send(line.to_owned()) {
            return;
        }
    }
}
