//! What a node of a cluster says on its control socket, and how it is asked.
//!
//! Owns the question, the reading of the answer about a service, and who of several nodes serves
//! it; whether a node is right is what the tests find out by other means.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{POLL, TIME_MAX};

/// How long a node may take to answer on its control socket; a paused one never does.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);

/// What a node says of a service.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceStatus {
    /// The node that it is assigned to.
    pub active: Option<String>,
    /// Whether the node that says this answers for it.
    pub serving: bool,
    /// Counts the assignments.
    pub epoch: u64,
    /// The service's NSM state.
    pub nsm_state: i64,
    /// How many locks its table has.
    pub locks: u64,
    /// How many requests wait.
    pub waiting: u64,
    /// How many connections of clients are known.
    pub connections: u64,
    /// What each phase of the last takeover by this node took, in milliseconds.
    pub phases: Vec<(String, f64)>,
}

/// Who answers for a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Serving {
    /// The node.
    pub node: &'static str,
    /// In which epoch.
    pub epoch: u64,
    /// With which NSM state.
    pub nsm_state: i64,
}

impl ServiceStatus {
    /// What a node's answer to `cluster` says of a service; none if it does not know it.
    #[must_use]
    pub fn find(status: &Value, service: &str) -> Option<Self> {
        let mut services = status["services"].as_array()?.iter();
        let told = services.find(|told| told["name"] == *service)?;
        let phases = told["last_takeover"]["phases"].as_array();
        let phases = phases.into_iter().flatten().map(|phase| {
            let name = phase["name"].as_str().unwrap_or_default().to_owned();
            (name, phase["ms"].as_f64().unwrap_or_default())
        });
        Some(Self {
            active: told["active"].as_str().map(str::to_owned),
            serving: told["serving"] == true,
            epoch: told["epoch"].as_u64().unwrap_or_default(),
            nsm_state: told["nsm_state"].as_i64().unwrap_or_default(),
            locks: told["locks"].as_u64().unwrap_or_default(),
            waiting: told["waiting"].as_u64().unwrap_or_default(),
            connections: told["connections"].as_u64().unwrap_or_default(),
            phases: phases.collect(),
        })
    }
}

/// The node that says that it answers for a service, of what all nodes say.
///
/// # Errors
/// Two say so for the same epoch.
pub fn who_serves(
    service: &str,
    told: impl Iterator<Item = (&'static str, ServiceStatus)>,
) -> Result<Option<Serving>> {
    let mut found: Option<Serving> = None;
    for (node, told) in told.filter(|(_, told)| told.serving) {
        let serving = Serving {
            node,
            epoch: told.epoch,
            nsm_state: told.nsm_state,
        };
        // Asked one after the other, so a move may have come between; not so in one epoch.
        if let Some(other) = found
            && other.epoch == serving.epoch
        {
            bail!("two nodes answer for {service}: {other:?} and {serving:?}");
        }
        if found.is_none_or(|other| other.epoch < serving.epoch) {
            found = Some(serving);
        }
    }
    Ok(found)
}

/// Waits until a service is served as it is `wanted`.
pub fn wait_serving(
    service: &str,
    serving: impl Fn() -> Result<Option<Serving>>,
    wanted: impl Fn(&Serving) -> bool,
) -> Result<Serving> {
    let deadline = Instant::now() + TIME_MAX;
    loop {
        let serving = serving()?;
        if let Some(serving) = serving.filter(&wanted) {
            return Ok(serving);
        }
        ensure!(
            Instant::now() < deadline,
            "{service} is not served as wanted, but: {serving:?}"
        );
        thread::sleep(POLL);
    }
}

/// Asks a node over its control socket.
pub fn ask(socket: &Path, request: &str) -> Result<Value> {
    let mut stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}
