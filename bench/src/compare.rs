//! The comparison: every server in turn, in namespaces of its own, for several rounds.
//!
//! The command runs itself twice more. The first inner run has a mount and a process namespace
//! with a tmpfs of its own, where the data set lies; each round of a server has a network, mount
//! and process namespace inside of it. Whatever ends the command, the kernel then ends every
//! server, unmounts the tmpfs and drops the network: nothing is left to clean up.
//!
//! Rounds alternate between the servers, each starting with another one, so that a busy neighbour
//! of this machine meets all of them.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::load::Figures;
use crate::measure::{self, Row};
use crate::peers::{self, Peer, Setup};
use crate::session::Identity;
use crate::workload::Workload;
use crate::{cpu, dataset, report};

/// The caller of all calls and the owner of all files.
pub(crate) const WHO: Identity = Identity {
    uid: 1000,
    gid: 1000,
};

/// Where the tmpfs is mounted, in a mount namespace: a folder that every Linux has and that none
/// of the programs is kept in.
pub(crate) const BASE: &str = "/dev/shm";

/// What to compare and how long.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct CompareArgs {
    /// Servers, repeatable [default: all]
    #[arg(long, value_enum)]
    peer: Vec<Peer>,
    /// Workloads, repeatable [default: all]
    #[arg(long, value_enum)]
    workload: Vec<Workload>,
    /// Compare LOCK and UNLOCK, with a state directory on a disk, in place of all other calls
    #[arg(long, conflicts_with = "workload")]
    locks: bool,
    /// Where the servers keep their state while locks are compared: on a disk like that of a real
    /// server [default: a folder beside the programs]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// How long each row is measured
    #[arg(long, default_value_t = 0.6)]
    seconds: f64,
    /// Leave out directories with more files than this
    #[arg(long, default_value_t = 1_000_000)]
    entries_max: u32,
    /// Page whose figures are replaced
    #[arg(long, value_name = "FILE", default_value = "docs/benchmarks.md")]
    page: PathBuf,
    /// Where every single measurement is kept [default: target/bench.json, or
    /// target/bench-locks.json]
    #[arg(long, value_name = "FILE")]
    raw: Option<PathBuf>,
    /// The mount point of the tmpfs; set by the command itself
    #[arg(long, hide = true)]
    inside: Option<PathBuf>,
}

impl CompareArgs {
    fn servers(&self) -> Vec<Peer> {
        let able = |peer: &Peer| !self.locks || peer.locks();
        if self.peer.is_empty() {
            Peer::ALL.into_iter().filter(able).collect()
        } else {
            self.peer.clone()
        }
    }

    fn raw(&self) -> &Path {
        let default = if self.locks {
            "target/bench-locks.json"
        } else {
            "target/bench.json"
        };
        self.raw.as_deref().unwrap_or(Path::new(default))
    }

    fn rows(&self) -> Vec<Row> {
        if self.locks {
            return measure::lock_rows();
        }
        let mut rows = measure::rows(self.entries_max);
        if !self.workload.is_empty() {
            rows.retain(|row| self.workload.contains(&row.workload));
        }
        rows
    }

    /// Where the servers keep their state.
    fn state(&self, base: &Path) -> anyhow::Result<PathBuf> {
        if self.locks {
            state_directory(self.state.as_deref())
        } else {
            Ok(base.join("state"))
        }
    }
}

/// Where a measurement of our server alone takes place.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Site {
    /// Where the servers keep their state: on a disk like that of a real server [default: a folder
    /// beside the programs]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// The mount point of the tmpfs; set by the command itself
    #[arg(long, hide = true)]
    inside: Option<PathBuf>,
}

impl Site {
    /// Builds the server, and runs this very command again in namespaces of its own: there is
    /// nothing left to do then. There, it makes the files, and empty directories for the rest.
    pub(crate) fn enter(&self) -> anyhow::Result<Option<Setup>> {
        let Some(base) = &self.inside else {
            build(&[Peer::Havenfs])?;
            run_in_namespaces(&["--net"])?;
            return Ok(None);
        };
        enter_network()?;
        mount_tmpfs(base)?;
        let setup = Setup {
            export: base.join("export"),
            scratch: base.join("scratch"),
            state: state_directory(self.state.as_deref())?,
            havenfs: havenfs_binary(),
            nfsserve: PathBuf::new(),
            who: WHO,
            locks: true,
            grace: None,
        };
        dataset::make(&setup.export, WHO.uid, WHO.gid, 0)?;
        for directory in [&setup.scratch, &setup.state] {
            empty(directory)?;
        }
        Ok(Some(setup))
    }
}

/// A folder of our own, since it is emptied, in the one that was chosen or beside the programs.
pub(crate) fn state_directory(chosen: Option<&Path>) -> anyhow::Result<PathBuf> {
    let parent = chosen.map_or_else(target_directory, Path::to_path_buf);
    Ok(std::path::absolute(parent.join("bench-state"))?)
}

/// One server's round; the command runs itself with these.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RoundArgs {
    #[arg(long, value_enum)]
    peer: Peer,
    #[arg(long)]
    base: PathBuf,
    #[arg(long)]
    state: PathBuf,
    #[arg(long)]
    locks: bool,
    #[arg(long)]
    havenfs: PathBuf,
    #[arg(long)]
    nfsserve: PathBuf,
    /// The rows as JSON
    #[arg(long)]
    rows: String,
    #[arg(long)]
    seconds: f64,
}

/// What a round reports, line by line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Event {
    /// The server answers.
    Started {
        start_ms: f64,
        memory_kib: u64,
    },
    Measured {
        row: Row,
        figures: Figures,
    },
    Failed {
        row: Row,
        why: String,
    },
    /// Resident memory after the calls and before the directories are listed, and at the end.
    Memory {
        calls_kib: u64,
        peak_kib: u64,
    },
}

/// One event with its origin.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) peer: Peer,
    pub(crate) round: u32,
    pub(crate) event: Event,
}

/// All that a comparison found.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) rounds: u32,
    pub(crate) seconds: f64,
    pub(crate) versions: Vec<(Peer, String)>,
    pub(crate) kernel: String,
    pub(crate) processors: usize,
    pub(crate) records: Vec<Record>,
}

/// Compares, writes the page and prints the tables.
pub(crate) fn run(args: &CompareArgs) -> anyhow::Result<()> {
    let servers = args.servers();
    if let Some(base) = &args.inside {
        return run_inside(args, base, &servers);
    }
    for (program, package) in [
        ("unshare", "util-linux"),
        ("setpriv", "util-linux"),
        ("ip", "iproute2"),
    ] {
        require(program, package)?;
    }
    if servers.contains(&Peer::Ganesha) {
        require("ganesha.nfsd", "nfs-ganesha nfs-ganesha-vfs")?;
        require("rpcbind", "rpcbind")?;
        if args.locks {
            require("rpc.statd", "nfs-common")?;
        }
    }
    build(&servers)?;
    run_in_namespaces(&[])?;
    let results = fs::read(args.raw()).context("read the measurements")?;
    report::write(&serde_json::from_slice(&results)?, &args.page)
}

/// Runs this very command again, in a mount and process namespace of its own and in those that
/// `more` options of unshare name, and waits for its end.
pub(crate) fn run_in_namespaces(more: &[&str]) -> anyhow::Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "namespaces and a tmpfs need root: run this as root"
    );
    let own = programs().join("havenfs-bench");
    keep(&std::env::current_exe()?, &own)?;
    // Ended with this process, however that ends.
    let status = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare"])
        .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(more)
        .arg(own)
        .args(std::env::args_os().skip(1))
        .args(["--inside", BASE])
        .status()
        .context("run setpriv and unshare")?;
    ensure!(status.success(), "it failed in its namespaces");
    Ok(())
}

fn require(program: &str, package: &str) -> anyhow::Result<()> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).any(|folder| folder.join(program).exists());
    ensure!(
        found,
        "there is no `{program}`: apt-get install {package}, or choose the servers with --peer"
    );
    Ok(())
}

fn target_directory() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from)
}

/// Where the programs of a run are kept: they must stay the same while somebody builds.
fn programs() -> PathBuf {
    target_directory().join("bench-programs")
}

pub(crate) fn havenfs_binary() -> PathBuf {
    programs().join("havenfs")
}

fn nfsserve_binary() -> PathBuf {
    target_directory().join("bench-peers/release/nfsserve-peer")
}

/// Builds our server and the one on nfsserve's engine; runs in the project's directory.
pub(crate) fn build(servers: &[Peer]) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    if servers.contains(&Peer::Havenfs) {
        let status = Command::new(&cargo)
            .args(["build", "-q", "--release", "-p", "havenfs"])
            .status()?;
        ensure!(status.success(), "havenfs can't be built");
        keep(
            &target_directory().join("release/havenfs"),
            &havenfs_binary(),
        )?;
    }
    if servers.contains(&Peer::Nfsserve) {
        let status = Command::new(&cargo)
            .args(["build", "-q", "--release", "--locked", "--manifest-path"])
            .arg("bench/peers/nfsserve/Cargo.toml")
            .arg("--target-dir")
            .arg(target_directory().join("bench-peers"))
            .status()?;
        ensure!(status.success(), "the server on nfsserve can't be built");
    }
    Ok(())
}

/// Copies a program; one that is still running is replaced and not overwritten.
fn keep(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(programs())?;
    let part = to.with_extension("part");
    fs::copy(from, &part).with_context(|| format!("copy {}", from.display()))?;
    fs::rename(&part, to).with_context(|| format!("replace {}", to.display()))
}

fn run_inside(args: &CompareArgs, base: &Path, servers: &[Peer]) -> anyhow::Result<()> {
    mount_tmpfs(base)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "making the files")?;
    let entries_max = if args.locks { 0 } else { args.entries_max };
    dataset::make(&base.join("export"), WHO.uid, WHO.gid, entries_max)?;
    let rows = serde_json::to_string(&args.rows())?;
    let mut results = Results {
        rounds: args.rounds,
        seconds: args.seconds,
        versions: servers
            .iter()
            .map(|peer| (*peer, peers::version(*peer, &havenfs_binary())))
            .collect(),
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        processors: std::thread::available_parallelism()?.get(),
        records: Vec::new(),
    };
    for round in 0..args.rounds {
        for turn in 0..servers.len() {
            let peer = servers[(turn + round as usize) % servers.len()];
            writeln!(
                out,
                "round {} of {}: {}",
                round + 1,
                args.rounds,
                peer.word()
            )?;
            let events = run_server(args, base, peer, &rows)?;
            results.records.extend(
                events
                    .into_iter()
                    .map(|event| Record { peer, round, event }),
            );
            // Kept after every server: a run that is broken off is not lost.
            fs::write(args.raw(), serde_json::to_vec(&results)?)?;
        }
    }
    Ok(())
}

/// Runs one round of one server in namespaces of its own and collects what it reports.
fn run_server(
    args: &CompareArgs,
    base: &Path,
    peer: Peer,
    rows: &str,
) -> anyhow::Result<Vec<Event>> {
    let mut command = Command::new("unshare");
    command
        .args([
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .arg(std::env::current_exe()?)
        .arg("round")
        .args(["--peer", peer.word()])
        .arg("--base")
        .arg(base)
        .arg("--state")
        .arg(args.state(base)?)
        .arg("--havenfs")
        .arg(havenfs_binary())
        .arg("--nfsserve")
        .arg(nfsserve_binary())
        .args(["--rows", rows])
        .args(["--seconds", &args.seconds.to_string()]);
    if args.locks {
        command.arg("--locks");
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("run unshare")?;
    let stdout = child.stdout.take().context("no output")?;
    let mut events = Vec::new();
    for line in BufReader::new(stdout).lines() {
        events.push(serde_json::from_str(&line?)?);
    }
    let status = child.wait()?;
    ensure!(status.success(), "the round of {} failed", peer.word());
    Ok(events)
}

pub(crate) fn mount_tmpfs(place: &Path) -> anyhow::Result<()> {
    let status = Command::new("mount")
        .args([
            "-t",
            "tmpfs",
            "-o",
            "size=75%,nr_inodes=0,mode=755",
            "tmpfs",
        ])
        .arg(place)
        .status()?;
    ensure!(status.success(), "cannot mount a tmpfs");
    Ok(())
}

/// Brings up what a server needs in a network namespace of its own.
pub(crate) fn enter_network() -> anyhow::Result<()> {
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()?;
    ensure!(up.success(), "cannot bring loopback up");
    // Sockets and locks of daemons are to be nobody else's.
    mount_tmpfs(Path::new("/run"))?;
    Ok(fs::create_dir_all("/run/rpcbind")?)
}

/// Makes an empty directory, whatever was there.
pub(crate) fn empty(directory: &Path) -> anyhow::Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory)?;
    }
    Ok(fs::create_dir_all(directory)?)
}

/// Measures all rows of one server; it is process 1 of its namespaces.
pub(crate) fn run_round(args: &RoundArgs) -> anyhow::Result<()> {
    enter_network()?;
    let scratch = args.base.join("scratch");
    for directory in [&scratch, &args.state] {
        empty(directory)?;
    }
    let setup = Setup {
        export: args.base.join("export"),
        scratch,
        state: args.state.clone(),
        havenfs: args.havenfs.clone(),
        nfsserve: args.nfsserve.clone(),
        who: WHO,
        locks: args.locks,
        grace: None,
    };
    let rows: Vec<Row> = serde_json::from_str(&args.rows)?;
    let server = peers::start(args.peer, &setup)?;
    tell(&Event::Started {
        start_ms: server.start_ms,
        memory_kib: cpu::memory_kib(&server.pids).0,
    })?;
    let mut calls_kib = 0;
    let length = Duration::from_secs_f64(args.seconds);
    for row in rows {
        let lists = row.workload.listed().is_some();
        if lists && args.peer == Peer::Floor {
            continue;
        }
        if !lists {
            calls_kib = cpu::memory_kib(&server.pids).0;
        }
        tell(
            &match measure::measure(&server.place, row, &server.pids, length) {
                Ok(figures) => Event::Measured { row, figures },
                Err(error) => Event::Failed {
                    row,
                    why: format!("{error:#}"),
                },
            },
        )?;
    }
    let (now, peak_kib) = cpu::memory_kib(&server.pids);
    if now == 0 {
        bail!("{} ended while it was measured", args.peer.word());
    }
    tell(&Event::Memory {
        calls_kib,
        peak_kib,
    })
}

fn tell(event: &Event) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(event)?)?;
    Ok(out.flush()?)
}
