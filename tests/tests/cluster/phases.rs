//! How long each phase of a takeover and of a move took: one line in the log, the status and the
//! metrics say the same, on the node that the service comes to and on the one that it leaves.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::cluster::{Cluster, LEASE_TIME, NODES};
use serde_json::Value;

use crate::scene::{ALPHA, ONE, Scene, ms};

/// By how much two of them may differ, in milliseconds: they are rounded to tenths.
const ROUNDED_MS: f64 = 0.11;
/// What is done with no hooks to run, besides steps that may be added.
const TAKING: [&str; 2] = ["assign", "exports"];
const LEAVING: [&str; 7] = [
    "drain", "address", "leave", "sync", "replies", "storage", "release",
];

/// Phases by name, in milliseconds.
type Phases = Vec<(String, f64)>;

/// Where a node's metrics are.
fn metrics_at(cluster: &Cluster, node: &str) -> Result<SocketAddr> {
    let mut at = cluster.site.member(node)?;
    // The one behind it is free, as the site leaves some between those of two tests.
    at.set_port(at.port() + 1);
    Ok(at)
}

fn of_metrics(cluster: &Cluster, node: &str, family: &str, kind: &str) -> Result<Phases> {
    let mut stream = TcpStream::connect(metrics_at(cluster, node)?)?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    let start = format!("havenfs_{family}{{service=\"{ALPHA}\",kind=\"{kind}\",phase=\"");
    let lines = page.lines().filter_map(|line| line.strip_prefix(&start));
    let phase = |line: &str| {
        let (name, microseconds) = line.split_once("\"} ").context("a value")?;
        Ok((name.to_owned(), microseconds.parse::<f64>()? / 1000.0))
    };
    lines.map(phase).collect()
}

fn of_status(cluster: &Cluster, node: &str, last: &str, kind: &str) -> Result<(Phases, f64)> {
    let status = cluster.status(node)?;
    let last = &status["services"][0][last];
    ensure!(last["kind"] == kind, "{last}");
    let phases = last["phases"].as_array().context("phases")?;
    let phase = |phase: &Value| {
        let name = phase["name"].as_str().context("a name")?;
        Ok((name.to_owned(), phase["ms"].as_f64().context("a time")?))
    };
    let phases: Result<Phases> = phases.iter().map(phase).collect();
    Ok((phases?, last["total_ms"].as_f64().context("a total")?))
}

/// Of the last line that says this of a move or takeover.
fn of_log(cluster: &Cluster, node: &str, says: &str, kind: &str) -> Result<Phases> {
    let log = cluster.log(node)?;
    let kind = format!("kind=\"{kind}\"");
    let is_it = |line: &&str| line.contains(says) && line.contains(&kind);
    let line = log.lines().rfind(is_it).context(log.clone())?;
    let (_, phases) = line.split_once("phases_ms=\"").context("no phases")?;
    let (phases, _) = phases.split_once('"').context("no end")?;
    let phase = |phase: &str| {
        let (name, took) = phase.split_once(' ').context("no time")?;
        Ok((name.to_owned(), took.parse()?))
    };
    phases.split(", ").map(phase).collect()
}

/// All three say the same; returns the phases and how long they took together.
fn agreed(cluster: &Cluster, node: &str, is_taking: bool, kind: &str) -> Result<(Phases, f64)> {
    let (last, family, says) = if is_taking {
        ("last_takeover", "takeover_phase_microseconds", " serving ")
    } else {
        (
            "last_departure",
            "departure_phase_microseconds",
            " released ",
        )
    };
    let (status, total_ms) = of_status(cluster, node, last, kind)?;
    let metrics = of_metrics(cluster, node, family, kind)?;
    let log = of_log(cluster, node, says, kind)?;
    for (place, told) in [("the metrics", &metrics), ("the log", &log)] {
        let is_same = told.len() == status.len()
            && told
                .iter()
                .zip(&status)
                .all(|((name, took), (other, also))| {
                    name == other && (took - also).abs() < ROUNDED_MS
                });
        ensure!(is_same, "{place}: {told:?}; the status: {status:?}");
    }
    let sum: f64 = status.iter().map(|(_, took)| took).sum();
    let may_differ = status.iter().fold(ROUNDED_MS, |all, _| all + ROUNDED_MS);
    ensure!(
        (sum - total_ms).abs() < may_differ,
        "{total_ms}: {status:?}"
    );
    ensure!(status.iter().all(|(_, took)| *took >= 0.0), "{status:?}");
    println!("{node}, {kind}, {last}: {total_ms} ms: {status:?}");
    Ok((status, total_ms))
}

fn has(phases: &Phases, names: &[&str]) -> Result<()> {
    for name in names {
        let count = phases.iter().filter(|(other, _)| other == name).count();
        ensure!(count == 1, "{name}: {phases:?}");
    }
    Ok(())
}

fn in_ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[test]
fn each_phase_is_in_the_log_in_the_status_and_in_the_metrics() -> Result<()> {
    let mut cluster = Cluster::new(&ONE)?;
    for node in NODES {
        let config = cluster.site.config(node);
        let at = metrics_at(&cluster, node)?;
        let text = fs::read_to_string(&config)?;
        let text = text.replace("metrics = \"off\"", &format!("metrics = \"{at}\""));
        fs::write(config, text)?;
    }
    let result = cluster.start().and_then(|()| phases(&mut cluster));
    if result.is_err() {
        cluster.show_logs();
    }
    result
}

fn phases(cluster: &mut Cluster) -> Result<()> {
    let mut scene = Scene::new(cluster)?;
    scene.lock_and_wait()?;

    // A takeover: the old node is dead, and says nothing.
    let killed = Instant::now();
    cluster.kill("n1")?;
    let after = cluster.wait_serving(ALPHA, |serving| serving.node != "n1")?;
    let took = killed.elapsed();
    let (taking, total_ms) = agreed(cluster, after.node, true, "takeover")?;
    has(&taking, &TAKING)?;
    ensure!(taking[0].0 == "lease", "{taking:?}");
    // It counts from when the dead node was heard of last, which is before it was killed.
    let lease_ms = taking[0].1;
    ensure!(lease_ms >= in_ms(LEASE_TIME), "{lease_ms}");
    ensure!(
        total_ms <= in_ms(took + LEASE_TIME),
        "{total_ms}: {}",
        ms(took)
    );
    scene.is_held()?;

    // A move: both sides have their part of the time that it took, one after the other.
    let to = cluster.others(&["n1", after.node])[0];
    let asked = Instant::now();
    cluster.move_to(ALPHA, to)?;
    let took = asked.elapsed();
    let (taking, taking_ms) = agreed(cluster, to, true, "move")?;
    has(&taking, &TAKING)?;
    ensure!(taking.iter().all(|(name, _)| name != "lease"), "{taking:?}");
    cluster.wait("the old node has noted it", |cluster| {
        let status = cluster.status(after.node).ok()?;
        status["services"][0]["last_departure"]
            .as_object()
            .map(drop)
    })?;
    let (leaving, leaving_ms) = agreed(cluster, after.node, false, "move")?;
    let names: Vec<&str> = leaving.iter().map(|(name, _)| name.as_str()).collect();
    ensure!(names == LEAVING, "{names:?}");
    // The other node may have seen the release before the one that asked for it was told.
    let release_ms = leaving[leaving.len() - 1].1;
    let at_least = leaving_ms + taking_ms - release_ms;
    ensure!(
        at_least <= in_ms(took) + ROUNDED_MS,
        "{at_least}: {}",
        ms(took)
    );
    scene.is_held()?;
    scene.machines_are_well()
}
