//! Measures NFSv3 servers: processor time per call of the server's process, calls per second and
//! memory, with every answer checked.
//!
//! `run` measures one server that is running, `prepare` makes the files for it, `compare` starts
//! our server and its peers in turn and writes the tables of docs/benchmarks.md, `locks-at-scale`
//! fills our server with locks, `cluster` measures three nodes, and `failover` what clients notice
//! when a server is lost.
//!
//! Owns: the load generator ([`load`], [`work`]), the data set ([`dataset`], [`pattern`]) and the
//! comparison ([`compare`], [`report`]). Measures latencies only of what waits for a disk, and no
//! client of a kernel.

#![expect(
    clippy::cast_precision_loss,
    reason = "counts and nanoseconds of a short run are far below 2^52"
)]

mod cluster;
mod compare;
mod cpu;
mod dataset;
mod failover;
mod floor;
mod load;
mod locks;
mod measure;
mod nodes;
mod notices;
mod outage;
mod pattern;
mod peers;
mod placement;
mod report;
mod scale;
mod session;
mod work;
mod workload;

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use cluster::ClusterArgs;
use compare::{CompareArgs, RoundArgs};
use failover::FailoverArgs;
use measure::{Place, Row, Shape};
use placement::Placement;
use scale::ScaleArgs;
use session::Identity;
use workload::Workload;

#[derive(Debug, Parser)]
#[command(about = "Measures NFSv3 servers", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the servers in turn, measure all rows and write docs/benchmarks.md
    Compare(CompareArgs),
    /// One server's round of `compare`
    #[command(hide = true)]
    Round(RoundArgs),
    /// Fill our server with locks and print what they cost
    LocksAtScale(ScaleArgs),
    /// Measure locks of a cluster of three nodes, and its takeovers with an empty and a full table
    Cluster(ClusterArgs),
    /// Kill a server that clients use, and print what they notice
    Failover(FailoverArgs),
    /// Write the page again from the kept measurements
    Report {
        /// The measurements
        #[arg(default_value = "target/bench.json")]
        raw: PathBuf,
        /// The page whose figures are replaced
        #[arg(long, value_name = "FILE", default_value = "docs/benchmarks.md")]
        page: PathBuf,
    },
    /// Measure a running server that exports a directory made with `prepare`
    Run(RunArgs),
    /// Serve a directory with the least that a server can do, as a yardstick
    Floor {
        /// The directory
        directory: PathBuf,
        /// The port of NFS and MOUNT on loopback
        #[arg(long, default_value_t = 2049)]
        port: u16,
    },
    /// Make the files that the workloads use
    Prepare {
        /// The directory; a tmpfs gives the steadiest figures
        directory: PathBuf,
        /// Leave out directories with more files than this
        #[arg(long, default_value_t = 1_000_000)]
        entries_max: u32,
        /// Owner of the files
        #[arg(long, default_value_t = 1000)]
        uid: u32,
    },
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// Address of the server
    #[arg(long, default_value = "127.0.0.1")]
    server: IpAddr,
    #[arg(long, default_value_t = 2049)]
    nfs_port: u16,
    #[arg(long, default_value_t = 20_048)]
    mount_port: u16,
    #[arg(long, default_value_t = 32_803)]
    nlm_port: u16,
    /// The path to mount
    #[arg(long)]
    path: String,
    /// A directory of the file system that the server keeps its state on, for `commit`
    #[arg(long, default_value = ".")]
    state: PathBuf,
    /// A process of the server, repeatable; without it no processor time is shown
    #[arg(long)]
    pid: Vec<u32>,
    /// What to call, repeatable [default: all but the lists]
    #[arg(long, value_enum)]
    workload: Vec<Workload>,
    #[arg(long, default_value_t = 8)]
    connections: usize,
    /// Calls under way on each connection
    #[arg(long, default_value_t = 8)]
    outstanding: usize,
    /// Where the server and this program run
    #[arg(long, value_enum, default_value = "free")]
    placement: Placement,
    /// How long each workload is measured, after a warm-up
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Go once through each directory from the first call on, instead of measuring a time
    #[arg(long)]
    one_pass: bool,
    /// The caller (AUTH_SYS), who must own the files
    #[arg(long, default_value_t = 1000)]
    uid: u32,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Compare(args) => compare::run(&args),
        Command::Round(args) => compare::run_round(&args),
        Command::LocksAtScale(args) => scale::run(&args),
        Command::Cluster(args) => cluster::run(&args),
        Command::Failover(args) => failover::run(&args),
        Command::Report { raw, page } => {
            report::write(&serde_json::from_slice(&std::fs::read(raw)?)?, &page)
        }
        Command::Run(args) => run(&args),
        Command::Floor { directory, port } => floor::run(&directory, port),
        Command::Prepare {
            directory,
            entries_max,
            uid,
        } => dataset::make(&directory, uid, uid, entries_max),
    }
}

fn run(args: &RunArgs) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let workloads = if args.workload.is_empty() {
        Workload::CALLS.as_slice()
    } else {
        &args.workload
    };
    writeln!(
        out,
        "{:36} {:>10} {:>10} {:>12} {:>10}",
        "call", "server us", "own us", "calls/s", "checked"
    )?;
    let place = Place {
        nfs: SocketAddr::new(args.server, args.nfs_port),
        mount: SocketAddr::new(args.server, args.mount_port),
        nlm: SocketAddr::new(args.server, args.nlm_port),
        state: args.state.clone(),
        path: args.path.clone(),
        who: Identity {
            uid: args.uid,
            gid: args.uid,
        },
    };
    for workload in workloads {
        let row = Row {
            workload: *workload,
            shape: Shape {
                connections: args.connections,
                outstanding: args.outstanding,
                placement: args.placement,
            },
            first_pass: args.one_pass && workload.listed().is_some(),
        };
        let length = Duration::from_secs_f64(args.seconds);
        let figures = measure::measure(&place, row, &args.pid, length)?;
        writeln!(
            out,
            "{:36} {:>10.2} {:>10.2} {:>12.0} {:>10}",
            workload.title(),
            figures.server_us(),
            figures.generator_us(),
            figures.rate(),
            figures.checked
        )?;
        if let Some(latency) = figures.latency {
            writeln!(
                out,
                "{:36} median {:.0} us, 99 % within {:.0} us, longest {:.0} us",
                "", latency.median, latency.percentile_99, latency.longest
            )?;
        }
    }
    let (now, peak) = cpu::memory_kib(&args.pid);
    if now > 0 {
        writeln!(out, "resident memory {now} KiB, at most {peak} KiB")?;
    }
    Ok(())
}
