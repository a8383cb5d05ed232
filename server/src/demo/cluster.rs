//! The three nodes: processes of this very program, and what they say of themselves.
//!
//! They run beside each other on this machine's loopback addresses, or each on a machine of its own
//! on a [`Bridge`].
//!
//! Owns the processes: starts, kills, pauses and ends them, by their own numbers, and leaves none
//! behind when it is dropped. Asks them over their control sockets and believes them nothing that
//! matters: whether the service keeps its promises is what the clients find out.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::Value;

use super::bridge::Bridge;
use super::interrupt;
use super::site::{NODES, SERVICE, Site};

/// How long nodes may take to find each other.
const START_TIME_MAX: Duration = Duration::from_secs(20);
/// How long a node may take to end when it is told to.
const STOP_TIME_MAX: Duration = Duration::from_secs(8);
/// How long a node may take to answer on its control socket; a paused one never does.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(500);
/// How often a condition is looked at.
pub(super) const LOOK: Duration = Duration::from_millis(5);
/// How many lines of a log a failure shows.
const TAIL_LINES: usize = 8;

/// What a node says of itself and of the service.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Status {
    /// The leader that it knows.
    pub(super) leader: Option<String>,
    /// All services.
    #[serde(default)]
    services: Vec<Service>,
}

impl Status {
    /// The service of the demo.
    pub(super) fn service(&self) -> Option<&Service> {
        self.services.iter().find(|service| service.name == SERVICE)
    }
}

/// What a node says of a service.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Service {
    name: String,
    /// Counts the assignments.
    pub(super) epoch: u64,
    /// The node that the service is assigned to.
    pub(super) active: Option<String>,
    /// Whether the node that says this answers for it.
    #[serde(default)]
    pub(super) serving: bool,
    /// The last change of the active node.
    #[serde(default)]
    pub(super) last_takeover: Option<Takeover>,
}

/// How the service came to a node.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Takeover {
    /// In which epoch.
    pub(super) epoch: u64,
    /// The steps, in order.
    #[serde(default)]
    pub(super) phases: Vec<Phase>,
    /// How long all of it took.
    #[serde(default)]
    pub(super) total_ms: f64,
}

/// A step of a takeover.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Phase {
    /// Which.
    pub(super) name: String,
    /// How long it took.
    pub(super) ms: f64,
}

/// Who answers for the service.
#[derive(Debug, Clone)]
pub(super) struct Active {
    /// The node.
    pub(super) node: &'static str,
    /// In which epoch.
    pub(super) epoch: u64,
    /// When that was seen.
    pub(super) at: Instant,
    /// How the service came there, as that node tells it.
    pub(super) takeover: Option<Takeover>,
}

struct Node {
    name: &'static str,
    child: Option<Child>,
    paused: bool,
}

/// The nodes.
pub(super) struct Cluster<'a> {
    site: &'a Site,
    /// What `serve` is told to break.
    plant: Option<&'static str>,
    nodes: Vec<Node>,
    /// What they are on, if that is not the loopback device.
    bridge: Option<Bridge>,
}

impl<'a> Cluster<'a> {
    /// A cluster of which no node runs yet.
    pub(super) fn new(site: &'a Site, plant: Option<&'static str>, bridge: Option<Bridge>) -> Self {
        let node = |name| Node {
            name,
            child: None,
            paused: false,
        };
        Self {
            site,
            plant,
            nodes: NODES.map(node).into(),
            bridge,
        }
    }

    /// The network of their own, if they have one.
    pub(super) const fn bridge(&self) -> Option<&Bridge> {
        self.bridge.as_ref()
    }

    /// The place.
    pub(super) const fn site(&self) -> &'a Site {
        self.site
    }

    /// Starts all nodes and waits until they know a leader; returns its name.
    pub(super) fn start(&mut self) -> Result<String> {
        for name in NODES {
            self.spawn(name)?;
        }
        let deadline = Instant::now() + START_TIME_MAX;
        for name in NODES {
            self.wait_ready(name, deadline)?;
        }
        self.wait_leader(NODES[0], deadline)
    }

    /// Starts a node again and waits until it has joined.
    pub(super) fn restart(&mut self, name: &'static str) -> Result<()> {
        self.spawn(name)?;
        let deadline = Instant::now() + START_TIME_MAX;
        self.wait_ready(name, deadline)?;
        self.wait_leader(name, deadline)?;
        Ok(())
    }

    /// Ends a node as power loss would, as far as a process can tell, and waits for its end. On a
    /// network of its own the cable goes first, and all its processes go at once.
    pub(super) fn kill(&mut self, name: &str) -> Result<()> {
        if let Some(bridge) = &self.bridge {
            bridge.cut(name)?;
        }
        self.node(name)?.end();
        Ok(())
    }

    /// The number of a node's process.
    pub(super) fn process(&mut self, name: &str) -> Result<u32> {
        let child = self.node(name)?.child.as_ref();
        Ok(child.context("the node does not run")?.id())
    }

    /// Stops a node in its tracks, and waits until it stands still.
    pub(super) fn pause(&mut self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        node.signal(Signal::STOP)?;
        node.paused = true;
        let number = node.child.as_ref().map_or(0, Child::id);
        let deadline = Instant::now() + ANSWER_TIME_MAX;
        while !stands_still(number) {
            if Instant::now() > deadline {
                bail!("{name} does not stop at SIGSTOP");
            }
            interrupt::sleep(Duration::from_millis(1))?;
        }
        Ok(())
    }

    /// Lets a paused node go on.
    pub(super) fn resume(&mut self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        node.paused = false;
        node.signal(Signal::CONT)
    }

    /// What a node says; none if it does not answer.
    pub(super) fn status(&self, name: &str) -> Option<Status> {
        let answer = self.ask(name, "status").ok()?;
        serde_json::from_value(answer).ok()
    }

    /// Asks a node over its control socket.
    pub(super) fn ask(&self, name: &str, request: &str) -> Result<Value> {
        let mut stream = UnixStream::connect(self.site.control(name))?;
        stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        stream.write_all(format!("{request}\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(serde_json::from_str(&answer)?)
    }

    /// The node that says that it answers for the service, if one does.
    pub(super) fn active(&self) -> Option<Active> {
        self.nodes
            .iter()
            .filter(|node| node.may_answer())
            .find_map(|node| {
                let status = self.status(node.name)?;
                let service = status.service()?;
                let takeover = service.last_takeover.clone();
                service.serving.then(|| Active {
                    node: node.name,
                    epoch: service.epoch,
                    at: Instant::now(),
                    takeover: takeover.filter(|takeover| takeover.epoch == service.epoch),
                })
            })
    }

    /// Waits until a node answers for the service that is `wanted`; none if none does in time.
    pub(super) fn wait_active(
        &mut self,
        limit: Duration,
        wanted: impl Fn(&Active) -> bool,
    ) -> Result<Option<Active>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(active) = self.active().filter(&wanted) {
                return Ok(Some(active));
            }
            self.check_alive()?;
            if Instant::now() > deadline {
                return Ok(None);
            }
            interrupt::sleep(LOOK)?;
        }
    }

    /// Waits until the nodes that can be asked say that the service is assigned to another node
    /// than `old`; returns that one and the epoch.
    pub(super) fn wait_assigned_away(
        &self,
        old: &str,
        limit: Duration,
    ) -> Result<Option<(String, u64)>> {
        let deadline = Instant::now() + limit;
        loop {
            for node in self.nodes.iter().filter(|node| node.may_answer()) {
                let status = self.status(node.name).unwrap_or_default();
                if let Some(service) = status.service()
                    && let Some(active) = service.active.as_deref().filter(|name| *name != old)
                {
                    return Ok(Some((active.to_owned(), service.epoch)));
                }
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            interrupt::sleep(LOOK)?;
        }
    }

    /// Asks for a planned move to a node; none of the nodes may know yet that it is back, so it is
    /// asked again for a while.
    pub(super) fn move_to(&self, name: &str, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let answer = self.ask(name, &format!("move {SERVICE} {name}"));
            let problem = match &answer {
                Ok(answer) => answer
                    .get("error")
                    .and_then(Value::as_str)
                    .map(str::to_owned),
                Err(error) => Some(error.to_string()),
            };
            let Some(problem) = problem else {
                return Ok(());
            };
            if Instant::now() > deadline {
                bail!("the service cannot be moved to {name}: {problem}");
            }
            interrupt::sleep(LOOK * 10)?;
        }
    }

    /// Tells all nodes to end and waits for them; returns those that had to be killed.
    pub(super) fn stop(&mut self) -> Result<Vec<&'static str>> {
        for node in &mut self.nodes {
            if node.child.is_some() {
                node.signal(Signal::TERM)?;
            }
        }
        let deadline = Instant::now() + STOP_TIME_MAX;
        let mut late = Vec::new();
        for node in &mut self.nodes {
            while let Some(child) = &mut node.child {
                if interrupt::has_ended(child).is_some() {
                    node.child = None;
                } else if Instant::now() > deadline {
                    late.push(node.name);
                    node.end();
                } else {
                    interrupt::sleep(LOOK)?;
                }
            }
        }
        Ok(late)
    }

    /// The last lines of what each node wrote.
    pub(super) fn logs(&self) -> String {
        let mut text = String::new();
        for name in NODES {
            let log = tail(&self.site.log(name));
            if !log.is_empty() {
                text.extend([
                    &format!("--- the end of the log of {name}\n"),
                    log.as_str(),
                    "\n",
                ]);
            }
        }
        text
    }

    fn spawn(&mut self, name: &'static str) -> Result<()> {
        let exe = std::env::current_exe().context("cannot find this program's own file")?;
        let open = |path| File::options().create(true).append(true).open(path);
        // The output of this life alone: it says when the node is ready.
        let output = File::create(self.site.output(name))?;
        let mut command = Command::new(&exe);
        command.args(["serve", "--config"]);
        command.arg(self.site.config(name));
        if let Some(fault) = self.plant {
            command.args(["--plant", fault]);
        }
        command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(open(self.site.log(name))?)
            // A Ctrl-C is for the demo alone, which ends its nodes itself.
            .process_group(0);
        let child = if let Some(bridge) = &self.bridge {
            bridge.switch_on(name, self.site.node(name), &mut command)?
        } else {
            command
                .arg("--with-parent")
                .spawn()
                .with_context(|| format!("cannot start `{}`", exe.display()))?
        };
        interrupt::note_child(&child);
        self.node(name)?.child = Some(child);
        Ok(())
    }

    fn wait_ready(&mut self, name: &str, deadline: Instant) -> Result<()> {
        let output = self.site.output(name);
        loop {
            let text = fs::read_to_string(&output).unwrap_or_default();
            if text.lines().any(|line| line.starts_with("havenfs ready")) {
                return Ok(());
            }
            self.check_alive()?;
            if Instant::now() > deadline {
                let seconds = START_TIME_MAX.as_secs();
                bail!("{name} is not ready after {seconds} s\nhint: its log may say why");
            }
            interrupt::sleep(LOOK)?;
        }
    }

    fn wait_leader(&mut self, name: &str, deadline: Instant) -> Result<String> {
        loop {
            if let Some(leader) = self.status(name).and_then(|status| status.leader) {
                return Ok(leader);
            }
            self.check_alive()?;
            if Instant::now() > deadline {
                bail!("the nodes do not find a leader\nhint: their logs may say why");
            }
            interrupt::sleep(LOOK)?;
        }
    }

    /// Fails if a node has ended that was not told to.
    fn check_alive(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            if let Some(child) = &mut node.child
                && let Some(status) = interrupt::has_ended(child)
            {
                node.child = None;
                bail!(
                    "{} has ended by itself ({status})\nhint: its log says why",
                    node.name
                );
            }
        }
        Ok(())
    }

    fn node(&mut self, name: &str) -> Result<&mut Node> {
        let node = self.nodes.iter_mut().find(|node| node.name == name);
        node.with_context(|| format!("there is no node `{name}`"))
    }
}

impl Node {
    const fn may_answer(&self) -> bool {
        self.child.is_some() && !self.paused
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().context("the node does not run")?;
        // Not waited for yet, so the number is still its own.
        kill_process(Pid::from_child(child), signal)?;
        Ok(())
    }

    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let deadline = Instant::now() + STOP_TIME_MAX;
            // The kernel may take a moment where a disk is slow; it is not waited for for ever.
            while interrupt::has_ended(&mut child).is_none() && Instant::now() < deadline {
                std::thread::sleep(LOOK);
            }
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.end();
    }
}

/// Whether all threads of a process are stopped.
fn stands_still(number: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{number}/task")) else {
        return false;
    };
    threads.flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // The state stands behind the name, which may contain anything.
        let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
        state.is_some_and(|state| state.starts_with(['T', 't']))
    })
}

fn tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(TAIL_LINES);
    lines.get(from..).unwrap_or_default().join("\n")
}
