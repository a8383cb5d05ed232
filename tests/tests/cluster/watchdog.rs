//! What systemd's watchdog hears of a node: that it is well, and nothing from one whose control
//! runtime stands still.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::cluster::site::Site;
use havenfs_tests::cluster::{Cluster, NODES, TIME_MAX};

use crate::scene::{ALPHA, ONE};

/// What the node is told: how often it has to be heard.
const WATCHDOG_USEC: u64 = 400_000;
/// Longer than a node that is well is silent, on a busy machine.
const SILENT_MAX: Duration = Duration::from_secs(3);

fn socket(site: &Site, node: &str) -> PathBuf {
    site.path().join(format!("notify-{node}"))
}

/// As systemd starts a service.
fn within(site: &Site, node: &str) -> Vec<String> {
    vec![
        "env".to_owned(),
        format!("NOTIFY_SOCKET={}", socket(site, node).display()),
        format!("WATCHDOG_USEC={WATCHDOG_USEC}"),
    ]
}

/// The next thing that a node says; none if it is silent for too long.
fn hear(systemd: &UnixDatagram) -> Option<String> {
    let mut bytes = [0; 4096];
    let len = systemd.recv(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes[..len]).into_owned())
}

/// Waits until a node has said that it is well so many times.
fn is_well(systemd: &UnixDatagram, times: usize) -> Result<()> {
    for _ in 0..times {
        let deadline = Instant::now() + TIME_MAX;
        while !hear(systemd).is_some_and(|said| said.contains("WATCHDOG=1")) {
            ensure!(Instant::now() < deadline, "the watchdog hears nothing");
        }
    }
    Ok(())
}

#[test]
fn a_node_tells_the_watchdog_that_it_is_well_until_its_control_runtime_hangs() -> Result<()> {
    let mut cluster = Cluster::new(&ONE)?;
    let mut sockets = Vec::new();
    for node in NODES {
        let systemd = UnixDatagram::bind(socket(&cluster.site, node))?;
        systemd.set_read_timeout(Some(SILENT_MAX))?;
        sockets.push(systemd);
    }
    let [one, _, three] = &sockets[..] else {
        anyhow::bail!("three nodes");
    };
    cluster.within = Some(within);
    cluster.start()?;
    let said = hear(one).context("it says something")?;
    ensure!(
        said.contains("WATCHDOG=1") || said.contains("READY=1"),
        "{said}"
    );
    is_well(one, 10)?;

    cluster.kill("n3")?;
    cluster.plant = Some("control-hangs");
    cluster.spawn("n3")?;
    // What was said before is read, then it is silent, and runs on.
    is_well(three, 10)?;
    let deadline = Instant::now() + TIME_MAX;
    while hear(three).is_some() {
        ensure!(Instant::now() < deadline, "it says that it is well");
    }
    ensure!(cluster.is_running("n3")?, "it has ended");
    // The others are.
    is_well(one, 3)?;
    cluster.wait_serving(ALPHA, |serving| serving.node == "n1")?;
    Ok(())
}
