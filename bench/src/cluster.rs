//! What three nodes cost and how fast they are: LOCK and UNLOCK in one round trip more, and a
//! takeover with an empty table beside one with a million locks.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use havenfs_rpc::program::NFS;

use crate::compare::{Site, WHO};
use crate::dataset;
use crate::measure::{self, LOCK_SHAPES, Place, Row};
use crate::nodes::{Nodes, others};
use crate::notices::Hosts;
use crate::scale::{LOCKED, Locks};
use crate::session::Session;
use crate::workload::Workload;

/// How much of what.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ClusterArgs {
    /// Locks in the full table, 100 of each host
    #[arg(long, default_value_t = 1_000_000)]
    locks: usize,
    /// Locks on each file
    #[arg(long, default_value_t = 10)]
    per_file: usize,
    /// Takeovers with each table
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each row of calls is measured
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    #[command(flatten)]
    site: Site,
}

const NOTICE_TIME_MAX: Duration = Duration::from_mins(2);
const POLL: Duration = Duration::from_millis(1);

/// Measures, and prints each figure when it is there.
pub(crate) fn run(args: &ClusterArgs) -> anyhow::Result<()> {
    let Some(setup) = args.site.enter()? else {
        return Ok(());
    };
    let files = args.locks.div_ceil(args.per_file);
    dataset::fill_empty(&setup.export, LOCKED, files, WHO.uid, WHO.gid)?;
    let mut out = std::io::stdout().lock();
    let mut nodes = Nodes::start(&setup, 1)?;
    rates(&nodes, Duration::from_secs_f64(args.seconds), &mut out)?;
    let empty = Locks::find(&nodes.places[0], 0, 0)?;
    takeovers(
        &mut nodes,
        "empty table",
        &empty,
        None,
        args.rounds,
        &mut out,
    )?;
    let full = Locks::find(&nodes.places[0], args.locks, files)?;
    let hosts = Hosts::start(full.hosts())?;
    let began = Instant::now();
    full.take(&nodes.places[0])?;
    let rate = args.locks as f64 / began.elapsed().as_secs_f64();
    writeln!(
        out,
        "{} locks taken by {rate:.0} calls a second",
        args.locks
    )?;
    let what = format!("{} locks, {} hosts", args.locks, full.hosts());
    takeovers(
        &mut nodes,
        &what,
        &full,
        Some(&hosts),
        args.rounds,
        &mut out,
    )
}

/// LOCK and UNLOCK, by the node that leads and by one that does not.
fn rates(nodes: &Nodes, length: Duration, out: &mut impl Write) -> anyhow::Result<()> {
    let active = nodes.active(0)?;
    let [other, _] = others(active);
    for (leader, says) in [(active, "leads"), (other, "follows")] {
        nodes.lead(leader)?;
        for shape in LOCK_SHAPES {
            let row = Row {
                workload: Workload::LockUnlock,
                shape,
                first_pass: false,
            };
            let all = measure::measure(&nodes.places[0], row, &nodes.pids(), length)?;
            let own = measure::measure(&nodes.places[0], row, &[nodes.pid(active)?], length)?;
            let latency = own.latency.context("no latency")?;
            writeln!(
                out,
                "active node {says}, {} x {}: {:.0} calls a second, median {:.0} us, 99 % within \
                 {:.0} us, {:.1} us of the active node a call, {:.1} us of all three",
                shape.connections,
                shape.outstanding,
                own.rate(),
                latency.median,
                latency.percentile_99,
                own.server_us(),
                all.server_us(),
            )?;
        }
    }
    Ok(())
}

/// Kills the active node again and again, and tells how long it takes until NFS and NLM answer, and
/// until all hosts have been told.
fn takeovers(
    nodes: &mut Nodes,
    what: &str,
    locks: &Locks,
    hosts: Option<&Hosts>,
    rounds: usize,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    for _ in 0..rounds {
        nodes.wait_for_all()?;
        let active = nodes.active(0)?;
        let broken = Instant::now();
        nodes.kill(active)?;
        let nfs = first(&nodes.places[0], broken, |place| {
            Session::connect(place.nfs, place.who)?.call((NFS, 3, 0), |_| {})?;
            Ok(())
        });
        let nlm = first(&nodes.places[0], broken, |place| {
            locks.check(&mut Session::connect(place.nlm, place.who)?)
        });
        write!(
            out,
            "{what}: NFS answers after {} ms, NLM with its locks after {} ms",
            nfs.as_millis(),
            nlm.as_millis()
        )?;
        if let Some(hosts) = hosts {
            let told = hosts.wait_for_all(broken + nlm, NOTICE_TIME_MAX)?;
            write!(out, ", all hosts told {:.1} s later", told.as_secs_f64())?;
        }
        let phases = &nodes.ask(nodes.active(0)?, "cluster")?["services"][0]["last_takeover"];
        let phases = phases["phases"].as_array();
        let phases: Vec<String> = phases
            .into_iter()
            .flatten()
            .map(|phase| format!("{} {}", phase["name"].as_str().unwrap_or(""), phase["ms"]))
            .collect();
        writeln!(out, "; {}", phases.join(", "))?;
        nodes.start_node(active)?;
    }
    Ok(())
}

/// When something works for the first time.
fn first(place: &Place, since: Instant, works: impl Fn(&Place) -> anyhow::Result<()>) -> Duration {
    while works(place).is_err() {
        std::thread::sleep(POLL);
    }
    since.elapsed()
}
