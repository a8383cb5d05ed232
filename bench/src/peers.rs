//! Starts each server that is compared, in the namespaces that the caller has made.
//!
//! Every server gets loopback, the standard ports, a fresh state directory and the same export;
//! logging is as quiet as it gets. A server that ends early or never answers is an error with the
//! end of its log.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use havenfs_rpc::program;
use serde::{Deserialize, Serialize};

use crate::measure::Place;
use crate::session::{Identity, Session};

/// How long a server may take to answer its first call.
const START_TIME_MAX: Duration = Duration::from_mins(1);
const POLL: Duration = Duration::from_millis(1);

/// A server that is compared.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Peer {
    Havenfs,
    Ganesha,
    Nfsserve,
    Floor,
}

impl Peer {
    /// All of them, in the order of the tables.
    pub(crate) const ALL: [Self; 4] = [Self::Havenfs, Self::Ganesha, Self::Nfsserve, Self::Floor];

    /// Whether it has a lock manager.
    pub(crate) const fn locks(self) -> bool {
        matches!(self, Self::Havenfs | Self::Ganesha)
    }

    /// The name on the command line.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Havenfs => "havenfs",
            Self::Ganesha => "ganesha",
            Self::Nfsserve => "nfsserve",
            Self::Floor => "floor",
        }
    }

    /// The name in the tables.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Havenfs => "havenfs",
            Self::Ganesha => "Ganesha",
            Self::Nfsserve => "nfsserve",
            Self::Floor => "floor",
        }
    }
}

/// Where the servers and their files are.
#[derive(Debug)]
pub(crate) struct Setup {
    /// The directory that is exported.
    pub(crate) export: PathBuf,
    /// Where a server may keep what nobody needs later.
    pub(crate) scratch: PathBuf,
    /// Where a server keeps what is to outlive it.
    pub(crate) state: PathBuf,
    pub(crate) havenfs: PathBuf,
    pub(crate) nfsserve: PathBuf,
    pub(crate) who: Identity,
    /// Whether locks are measured.
    pub(crate) locks: bool,
    /// For how many seconds Ganesha grants only reclaims after its start; none: it is not asked to.
    pub(crate) grace: Option<u32>,
}

/// A server that answers. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Running {
    children: Vec<Child>,
    pub(crate) pids: Vec<u32>,
    pub(crate) place: Place,
    /// From the start of the process to the first answered NULL.
    pub(crate) start_ms: f64,
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts `peer` and waits until it answers.
pub(crate) fn start(peer: Peer, setup: &Setup) -> anyhow::Result<Running> {
    let mut children = Vec::new();
    let mut path = setup.export.display().to_string();
    let mut mount_port = program::MOUNT_PORT;
    let mut command = match peer {
        Peer::Havenfs => {
            let mut command = Command::new(&setup.havenfs);
            command
                .args(["serve", "--portmap", "off", "--metrics", "off"])
                .args(["--exports-file", "/dev/null"])
                .arg("--export")
                .arg(format!("{path}:*(rw,no_root_squash,insecure)"))
                .arg("--state-dir")
                .arg(setup.state.join("havenfs"))
                .arg("--control")
                .arg(setup.scratch.join("control"))
                .env("HAVENFS_LOG", "warn");
            command
        }
        Peer::Ganesha => {
            children.push(start_rpcbind(setup)?);
            if setup.locks {
                children.push(start_statd(setup)?);
            }
            let config = setup.scratch.join("ganesha.conf");
            fs::create_dir_all(setup.state.join("recovery"))?;
            fs::write(&config, ganesha_config(setup))?;
            let mut command = Command::new("ganesha.nfsd");
            command
                .arg("-F")
                .args(["-N", "NIV_CRIT", "-L", "STDERR"])
                .arg("-f")
                .arg(config)
                .arg("-p")
                .arg(setup.scratch.join("ganesha.pid"));
            command
        }
        Peer::Nfsserve => {
            "/".clone_into(&mut path);
            mount_port = program::NFS_PORT;
            let mut command = Command::new(&setup.nfsserve);
            command
                .arg(&setup.export)
                .arg(program::NFS_PORT.to_string());
            command
        }
        Peer::Floor => {
            mount_port = program::NFS_PORT;
            let mut command = Command::new(std::env::current_exe()?);
            command.arg("floor").arg(&setup.export);
            command
        }
    };
    let log = setup.scratch.join("log");
    let output = File::create(&log)?;
    let began = Instant::now();
    let child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("start {}", peer.word()))?;
    let mut pids = vec![child.id()];
    if peer == Peer::Ganesha && setup.locks {
        // Without it there are no locks: what it does for them counts.
        pids.extend(children.last().map(Child::id));
    }
    children.push(child);
    let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let mut running = Running {
        children,
        pids,
        place: Place {
            nfs: SocketAddr::new(local, program::NFS_PORT),
            mount: SocketAddr::new(local, mount_port),
            nlm: SocketAddr::new(local, program::NLM_PORT),
            state: setup.state.clone(),
            path,
            who: setup.who,
        },
        start_ms: 0.0,
    };
    wait_for_answer(&mut running, began).with_context(|| {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let skip = text.lines().count().saturating_sub(10);
        let end: Vec<&str> = text.lines().skip(skip).collect();
        format!(
            "{} did not start; its log ends:\n{}",
            peer.word(),
            end.join("\n")
        )
    })?;
    Ok(running)
}

fn wait_for_answer(running: &mut Running, began: Instant) -> anyhow::Result<()> {
    let place = &running.place;
    loop {
        // The first answered NULL ends the start; exports may be ready a little later.
        let answered = Session::connect(place.nfs, place.who)
            .and_then(|mut session| session.call((program::NFS, 3, 0), |_| {}));
        if answered.is_ok() {
            running.start_ms = began.elapsed().as_secs_f64() * 1e3;
            break;
        }
        if let Some(child) = running.children.last_mut()
            && let Some(status) = child.try_wait()?
        {
            bail!("it ended with {status}");
        }
        ensure!(began.elapsed() < START_TIME_MAX, "no answer");
        std::thread::sleep(POLL);
    }
    loop {
        let mounted = Session::connect(place.mount, place.who)
            .and_then(|mut session| session.mount(&place.path));
        match mounted {
            Ok(_) => return Ok(()),
            Err(error) if began.elapsed() >= START_TIME_MAX => return Err(error),
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

/// Ganesha registers its ports and refuses to start when it can't.
fn start_rpcbind(setup: &Setup) -> anyhow::Result<Child> {
    let mut child = Command::new("rpcbind")
        .args(["-f", "-w"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start rpcbind")?;
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), program::PORTMAP_PORT);
    let began = Instant::now();
    while Session::connect(address, setup.who).is_err() {
        if let Some(status) = child.try_wait()? {
            bail!("rpcbind ended with {status}");
        }
        ensure!(began.elapsed() < START_TIME_MAX, "rpcbind does not listen");
        std::thread::sleep(POLL);
    }
    Ok(child)
}

/// Ganesha asks it to monitor the hosts that lock.
fn start_statd(setup: &Setup) -> anyhow::Result<Child> {
    let directory = setup.state.join("statd");
    for part in ["sm", "sm.bak"] {
        fs::create_dir_all(directory.join(part))?;
    }
    Command::new("rpc.statd")
        .args(["-F", "-L", "-P"])
        .arg(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start rpc.statd")
}

/// Caches large enough for the whole data set, attributes that stay valid for the whole run,
/// payloads of a mebibyte, no programs beside those that are measured, no statistics. Four threads
/// for answers: with the default of 200, and with 16, a call costs up to three times as much.
fn ganesha_config(setup: &Setup) -> String {
    format!(
        "NFS_CORE_PARAM {{ Protocols = 3; NFS_Port = {}; MNT_Port = {}; NLM_Port = {};\n\
         \x20 Enable_NLM = {}; Enable_RQUOTA = false; Enable_NFS_Stats = false;\n\
         \x20 Enable_Fast_Stats = false; RPC_Ioq_ThrdMax = 4; }}\n\
         NFSv4 {{ RecoveryBackend = fs; RecoveryRoot = {}; {} }}\n\
         MDCACHE {{ Entries_HWMark = 2000000; Chunks_HWMark = 200000; NParts = 17;\n\
         \x20 Cache_Size = 200003; }}\n\
         EXPORT {{ Export_Id = 1; Path = {}; Pseudo = /export; Protocols = 3; Transports = TCP;\n\
         \x20 Access_Type = RW; Squash = No_Root_Squash; SecType = sys;\n\
         \x20 Attr_Expiration_Time = 600; MaxRead = 1048576; MaxWrite = 1048576;\n\
         \x20 PrefReadDir = 65536; FSAL {{ Name = VFS; }} }}\n\
         LOG {{ Default_Log_Level = CRIT; }}\n",
        program::NFS_PORT,
        program::MOUNT_PORT,
        program::NLM_PORT,
        setup.locks,
        setup.state.join("recovery").display(),
        setup.grace.map_or_else(
            || "Graceless = true;".to_owned(),
            |seconds| format!(
                "Grace_Period = {seconds}; Lease_Lifetime = {};",
                seconds / 2
            ),
        ),
        setup.export.display()
    )
}

/// What `peer` says of its version.
pub(crate) fn version(peer: Peer, havenfs: &Path) -> String {
    let first_line = |command: &mut Command| {
        let output = command.output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().next().map(str::trim).map(str::to_owned)
    };
    match peer {
        Peer::Havenfs => first_line(Command::new(havenfs).arg("--version")),
        Peer::Ganesha => first_line(Command::new("dpkg-query").args([
            "-W",
            "-f",
            "NFS-Ganesha ${Version} (Debian's nfs-ganesha and nfs-ganesha-vfs)",
            "nfs-ganesha",
        ])),
        Peer::Nfsserve => Some("nfsserve 0.11.0, with a plain pass-through file system".to_owned()),
        Peer::Floor => Some("single-threaded epoll loop, one system call per NFS call".to_owned()),
    }
    .unwrap_or_else(|| "unknown version".to_owned())
}
