//! The built server as a child process on loopback: what the wire tests talk to.
//!
//! [`Site`] is a test's directory: what is exported, the state directory, the log. [`Server`] is
//! one life of a server in it; a site may have several lives, one after the other. Ports are the
//! kernel's choice and read from the ready line.
//!
//! Invariant: a [`Server`] is gone when its guard is, ended by its own process number.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::client::peer::Transport;
use crate::client::{Cred, Nfs, Nlm, Peer, mount::Mount, portmap::Portmap};
use crate::lab::{havenfs_binary, havenfs_fault_binary};

/// IPv4's loopback.
pub const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// IPv6's loopback.
pub const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// A test's directory.
#[derive(Debug)]
pub struct Site {
    dir: TempDir,
    /// Shell commands run before the server, as root in a mount namespace of its own.
    prelude: Option<String>,
    /// The fault that the server has.
    fault: Option<&'static str>,
}

impl Site {
    /// Makes the directory with an empty `export` in it, which everyone may write to.
    pub fn new() -> Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::Builder::new().prefix("havenfs-wire-").tempdir()?;
        let export = dir.path().join("export");
        fs::create_dir(&export)?;
        fs::set_permissions(&export, fs::Permissions::from_mode(0o777))?;
        Ok(Self {
            dir,
            prelude: None,
            fault: None,
        })
    }

    /// Runs shell commands before the server starts, in a mount namespace that the server shares
    /// and nobody else sees. Needs root.
    #[must_use]
    pub fn with_mounts(mut self, commands: &str) -> Self {
        self.prelude = Some(commands.to_owned());
        self
    }

    /// Plants a fault in the servers that start from now on, or takes it out of them.
    pub const fn set_fault(&mut self, fault: Option<&'static str>) {
        self.fault = fault;
    }

    /// The site's directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The directory that is usually exported.
    pub fn export(&self) -> PathBuf {
        self.dir.path().join("export")
    }

    /// Asks the running server through its control socket.
    pub fn ask(&self, request: &str) -> Result<serde_json::Value> {
        use std::io::{Read as _, Write as _};
        let mut stream = std::os::unix::net::UnixStream::connect(self.path().join("control"))?;
        stream.set_read_timeout(Some(START_TIME_MAX))?;
        stream.write_all(format!("{request}\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(serde_json::from_str(&answer)?)
    }

    /// Exports [`Site::export`] to all with the given options, and starts a server.
    pub fn serve(&self, options: &str) -> Result<Server> {
        self.serve_exports(&[&format!("{}:*({options})", self.export().display())], &[])
    }

    /// Starts a server on both loopbacks with these exports and further arguments.
    pub fn serve_exports(&self, exports: &[&str], more: &[&str]) -> Result<Server> {
        let mut args: Vec<&OsStr> = Vec::new();
        for export in exports {
            args.extend([OsStr::new("--export"), OsStr::new(export)]);
        }
        args.extend(more.iter().map(OsStr::new));
        if !more.contains(&"--listen") {
            args.extend(["--listen", "127.0.0.1", "--listen", "::1"].map(OsStr::new));
        }
        if !more.contains(&"--portmap") {
            args.extend(["--portmap", "off"].map(OsStr::new));
        }
        self.start(&args)
    }

    /// As [`Site::serve_exports`], with a portmapper of its own on a free port.
    pub fn serve_with_portmapper(&self, exports: &[&str], more: &[&str]) -> Result<Server> {
        // Free now; somebody else may take it before the server does, so try again.
        let mut last = anyhow!("no port is free");
        for _ in 0..TRIES {
            let port = free_port()?;
            let text = port.to_string();
            let mut args = vec!["--portmap", "embedded", "--portmap-port", &text];
            args.extend(more);
            match self.serve_exports(exports, &args) {
                Ok(mut server) => {
                    server.portmap_port = port;
                    return Ok(server);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn start(&self, args: &[&OsStr]) -> Result<Server> {
        // With port 0 the kernel chooses for the first address; the others may be taken there.
        let mut last = anyhow!("not tried");
        for _ in 0..TRIES {
            match self.start_once(args) {
                Err(error) if format!("{error:#}").contains("cannot listen") => last = error,
                other => return other,
            }
        }
        Err(last)
    }

    fn start_once(&self, args: &[&OsStr]) -> Result<Server> {
        let binary = match self.fault {
            None => havenfs_binary()?,
            Some(_) => havenfs_fault_binary()?,
        };
        let path = |name: &str| self.path().join(name).into_os_string();
        let log_path = self.path().join("log");
        let log = File::options().create(true).append(true).open(&log_path)?;
        let began = log.metadata()?.len() as usize;
        let mut words: Vec<OsString> = vec![binary.into_os_string(), "serve".into()];
        for (option, value) in [
            ("--state-dir", path("state")),
            ("--control", path("control")),
            ("--nfs-port", "0".into()),
            ("--mount-port", "0".into()),
            ("--nlm-port", "0".into()),
            ("--nsm-port", "0".into()),
        ] {
            words.extend([option.into(), value]);
        }
        if !args.iter().any(|arg| *arg == "--metrics") {
            words.extend(["--metrics".into(), "off".into()]);
        }
        if !args.iter().any(|arg| *arg == "--exports-file") {
            // Not the machine's own list.
            fs::write(self.path().join("no-exports"), "")?;
            words.extend(["--exports-file".into(), path("no-exports")]);
        }
        words.extend(args.iter().map(OsString::from));
        let mut command = match &self.prelude {
            None => Command::new(&words[0]),
            Some(prelude) => {
                let mut command = Command::new("unshare");
                command
                    .args(["--mount", "--propagation", "private", "bash", "-c"])
                    .arg(format!("set -e; cd \"$0\"; {prelude}; exec \"$@\""))
                    .arg(self.path())
                    .arg(&words[0]);
                command
            }
        };
        if let Some(fault) = self.fault {
            command.env("HAVENFS_FAULT", fault);
        }
        let child = command
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start the server")?;
        let mut server = Server {
            child,
            log_path,
            began,
            nfs_port: 0,
            mount_port: 0,
            nlm_port: 0,
            nsm_port: 0,
            portmap_port: 0,
        };
        let line = server.wait_for_line("havenfs ready")?;
        server.nfs_port = port_after(&line, "NFS port ")?;
        server.mount_port = port_after(&line, "MOUNT port ")?;
        server.nlm_port = port_after(&line, "NLM port ")?;
        server.nsm_port = port_after(&line, "NSM port ")?;
        Ok(server)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // A normal user can't remove what is in a directory that a test has closed.
        open_directories(self.dir.path());
    }
}

/// Gives the owner all rights to every directory of a tree.
fn open_directories(dir: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    let _ = fs::set_permissions(dir, fs::Permissions::from_mode(0o755));
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_directories(&entry.path());
        }
    }
}

/// A running server; killed when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    log_path: PathBuf,
    began: usize,
    /// The port of NFS.
    pub nfs_port: u16,
    /// The port of MOUNT.
    pub mount_port: u16,
    /// The port of NLM.
    pub nlm_port: u16,
    /// The port of NSM.
    pub nsm_port: u16,
    /// The port of the portmapper, if there is one.
    pub portmap_port: u16,
}

impl Server {
    /// The NFS port at an address.
    pub const fn nfs_at(&self, ip: IpAddr) -> SocketAddr {
        SocketAddr::new(ip, self.nfs_port)
    }

    /// A client of NFS over IPv4 and TCP.
    pub fn nfs(&self, cred: Cred) -> Result<Nfs> {
        Ok(Nfs::new(Peer::tcp(self.nfs_at(V4))?, cred))
    }

    /// A client of MOUNT over IPv4 and TCP, that says it is root.
    pub fn mount(&self) -> Result<Mount> {
        self.mount_at(V4, Transport::Tcp)
    }

    /// A client of MOUNT that says it is root.
    pub fn mount_at(&self, ip: IpAddr, transport: Transport) -> Result<Mount> {
        let peer = Peer::connect(transport, SocketAddr::new(ip, self.mount_port))?;
        Ok(Mount::new(peer, Cred::root()))
    }

    /// A client of NLM version 4 over TCP, that says it is root of the host `from`.
    pub fn nlm(&self, from: IpAddr) -> Result<Nlm> {
        self.nlm_at(from, Transport::Tcp)
    }

    /// A client of NLM version 4 that says it is root of the host `from`.
    pub fn nlm_at(&self, from: IpAddr, transport: Transport) -> Result<Nlm> {
        let server = SocketAddr::new(V4, self.nlm_port);
        let peer = Peer::connect_from(transport, SocketAddr::new(from, 0), server)?;
        Ok(Nlm::new(peer, Cred::root()))
    }

    /// A client of the portmapper.
    pub fn portmap_at(&self, ip: IpAddr, transport: Transport) -> Result<Portmap> {
        let peer = Peer::connect(transport, SocketAddr::new(ip, self.portmap_port))?;
        Ok(Portmap { peer })
    }

    /// The handle of a path that can be mounted.
    pub fn handle(&self, path: &Path) -> Result<Vec<u8>> {
        use std::os::unix::ffi::OsStrExt as _;
        self.mount()?
            .mnt(path.as_os_str().as_bytes())?
            .map_err(|status| anyhow!("MNT of {}: status {status}", path.display()))
    }

    /// The process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where the server's own view of a path is, which its mounts are part of. Needs root.
    pub fn inside(&self, path: &Path) -> PathBuf {
        let root = format!("/proc/{}/root", self.pid());
        Path::new(&root).join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A number of `/proc/PID/status`, in KiB.
    pub fn memory_kib(&self, field: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
            .ok_or_else(|| anyhow!("no {field} in the status"))?;
        let number = line.trim().trim_end_matches(" kB");
        Ok(number.parse()?)
    }

    /// How many descriptors the server has open.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count())
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// What it wrote in this life.
    pub fn log(&self) -> Result<String> {
        let bytes = fs::read(&self.log_path)?;
        let own = bytes.get(self.began..).unwrap_or_default();
        Ok(String::from_utf8_lossy(own).into_owned())
    }

    /// Waits for a line of the log.
    pub fn wait_for_line(&mut self, words: &str) -> Result<String> {
        let deadline = Instant::now() + START_TIME_MAX;
        loop {
            // Looked at before the log, so that a last line is seen.
            let ended = self.child.try_wait()?;
            let log = self.log()?;
            let whole = log.rfind('\n').map_or("", |end| &log[..end]);
            if let Some(line) = whole.lines().find(|line| line.contains(words)) {
                return Ok(line.to_owned());
            }
            if let Some(status) = ended {
                bail!("the server ended ({status}) before it said `{words}`:\n{log}");
            }
            ensure!(Instant::now() < deadline, "no `{words}`:\n{log}");
            std::thread::sleep(POLL);
        }
    }

    /// Ends it with SIGTERM, as an administrator does, and waits for its end.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        let deadline = Instant::now() + START_TIME_MAX;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "does not stop:\n{}", self.log()?);
            std::thread::sleep(POLL);
        }
    }

    /// Ends it as `kill -9` does.
    pub fn kill(mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.child.wait()?;
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.pid() as i32).ok_or_else(|| anyhow!("no process"))?;
        rustix::process::kill_process(pid, signal)?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("the server's log:\n{}", self.log().unwrap_or_default());
        }
    }
}

fn port_after(line: &str, words: &str) -> Result<u16> {
    let digits: String = line
        .split_once(words)
        .map(|(_, rest)| rest.chars().take_while(char::is_ascii_digit).collect())
        .unwrap_or_default();
    digits
        .parse()
        .with_context(|| format!("no `{words}` in the ready line: {line}"))
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}

const TRIES: usize = 5;
/// A debug build on a busy machine needs a moment.
const START_TIME_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);
