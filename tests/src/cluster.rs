//! A cluster of three processes of the built server on loopback: what the cluster tests break.
//!
//! Owns the processes: starts, kills, pauses and ends them by their own numbers. Asks them over
//! their control sockets who serves what, and believes them nothing that matters: whether promises
//! are kept is what the [clients](machine) find out.
//!
//! Invariants: a node is gone when its [`Cluster`] is, however the test ends; processes are started
//! by the test's own thread alone, with whose end they end as well. A test that runs in
//! [`Cluster::run`] shows the nodes' logs if it fails.

pub mod caller;
pub mod client;
pub mod load;
pub mod machine;
pub mod site;
pub mod status;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use self::site::{Plan, Site};
pub use self::status::{ServiceStatus, Serving};
use crate::lab::havenfs_binary;

/// The names of the nodes.
pub const NODES: [&str; 3] = ["n1", "n2", "n3"];
/// How long a node may serve after it has renewed its lease: what is configured by default.
pub const LEASE_TIME: Duration = Duration::from_millis(1200);
/// How long anything may take that has to happen: a debug build on a busy machine needs a moment.
pub const TIME_MAX: Duration = Duration::from_secs(30);
/// How long a node may take that can't start, and has to say so.
const END_TIME_MAX: Duration = Duration::from_secs(10);
/// How often a condition is looked at.
pub const POLL: Duration = Duration::from_millis(5);
/// How many lines of a log a failure shows.
const TAIL_LINES: usize = 60;

/// Three nodes.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    /// What the nodes that start from now on are told to break.
    pub plant: Option<&'static str>,
    /// What stands before the command that starts a node, and takes it as its last arguments.
    pub within: Option<fn(&Site, &str) -> Vec<String>>,
    /// Where they live; removed after they have ended.
    pub site: Site,
}

#[derive(Debug)]
struct Node {
    name: &'static str,
    child: Option<Child>,
    paused: bool,
    /// How long the log was when this life of the node began.
    log_from: usize,
}

impl Cluster {
    /// Makes the place of a cluster; no node runs yet.
    pub fn new(services: &[Plan]) -> Result<Self> {
        let node = |name| Node {
            name,
            child: None,
            paused: false,
            log_from: 0,
        };
        Ok(Self {
            nodes: NODES.map(node).into(),
            plant: None,
            within: None,
            site: Site::new(services)?,
        })
    }

    /// Starts a cluster, waits until every service is served by the node that it prefers, and runs
    /// a test, whose failure shows the nodes' logs.
    pub fn run(services: &[Plan], test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let mut cluster = Self::new(services)?;
        let result = cluster.start().and_then(|()| test(&mut cluster));
        if result.is_err() {
            cluster.show_logs();
        }
        result
    }

    /// Starts all nodes and waits until every service is served by the node that it prefers.
    pub fn start(&mut self) -> Result<()> {
        for name in NODES {
            self.spawn(name)?;
        }
        for name in NODES {
            self.wait_joined(name)?;
        }
        for plan in self.site.services.clone() {
            self.wait_serving(plan.name, |serving| serving.node == plan.preferred)?;
        }
        Ok(())
    }

    /// Starts a node.
    pub fn spawn(&mut self, name: &str) -> Result<()> {
        let site = &self.site;
        let mut log = File::options();
        let log = log.create(true).append(true).open(site.log(name))?;
        let log_from = log.metadata()?.len() as usize;
        let mut words = self
            .within
            .map_or_else(Vec::new, |within| within(site, name));
        words.push(havenfs_binary()?.to_string_lossy().into_owned());
        let (program, before) = words.split_first().context("there is a command")?;
        let child = Command::new(program)
            .args(before)
            .args(["serve", "--with-parent", "--config"])
            .arg(site.config(name))
            .args(self.plant.iter().flat_map(|fault| ["--plant", fault]))
            .stdin(Stdio::null())
            // Of this life alone: it says when the node is ready.
            .stdout(File::create(site.output(name))?)
            .stderr(log)
            .spawn()?;
        let node = self.node(name)?;
        ensure!(node.child.is_none(), "{name} runs already");
        node.child = Some(child);
        node.log_from = log_from;
        Ok(())
    }

    /// Starts a node again and waits until all that run know that it lives.
    pub fn restart(&mut self, name: &str) -> Result<()> {
        self.spawn(name)?;
        self.wait_joined(name)
    }

    /// Waits until a node is ready and all that run know that it lives.
    pub fn wait_joined(&mut self, name: &str) -> Result<()> {
        let what = format!("{name} has joined");
        self.wait(&what, |cluster| {
            if !cluster.is_ready(name) {
                return None;
            }
            let mut seen = cluster.running().map(|node| cluster.lives(node, name));
            seen.all(|lives| lives).then_some(())
        })
    }

    /// Whether the node has said in this life that it is ready.
    pub fn is_ready(&self, name: &str) -> bool {
        let output = fs::read_to_string(self.site.output(name)).unwrap_or_default();
        output.lines().any(|line| line.starts_with("havenfs ready"))
    }

    fn lives(&self, asked: &str, name: &str) -> bool {
        let Ok(status) = self.status(asked) else {
            return false;
        };
        let members = status["members"].as_array();
        members.is_some_and(|members| {
            let mut members = members.iter();
            members.any(|member| member["name"] == *name && member["lives"] == true)
        })
    }

    /// Ends a node as power loss would, as far as a process can tell, and waits for its end.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        node.signal(Signal::KILL)?;
        node.end();
        Ok(())
    }

    /// Ends a node as an operator would, and waits for its end, which has to be a good one.
    pub fn stop(&mut self, name: &str) -> Result<()> {
        self.node(name)?.signal(Signal::TERM)?;
        let status = self.wait_ended(name)?;
        ensure!(status.success(), "{name} ends with {status}");
        Ok(())
    }

    /// Has a node read its files again.
    pub fn hang_up(&mut self, name: &str) -> Result<()> {
        self.node(name)?.signal(Signal::HUP)
    }

    /// Ends several nodes at once.
    pub fn kill_all(&mut self, names: &[&str]) -> Result<()> {
        for name in names {
            self.node(name)?.signal(Signal::KILL)?;
        }
        for name in names {
            self.node(name)?.end();
        }
        Ok(())
    }

    /// Stops a node in its tracks, and waits until all its threads stand still.
    pub fn pause(&mut self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        node.signal(Signal::STOP)?;
        node.paused = true;
        let number = node.child.as_ref().map_or(0, Child::id);
        self.wait("a paused node stands still", |_| {
            stands_still(number).then_some(())
        })
    }

    /// Lets a paused node go on.
    pub fn resume(&mut self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        node.paused = false;
        node.signal(Signal::CONT)
    }

    /// Whether the node's process runs.
    pub fn is_running(&mut self, name: &str) -> Result<bool> {
        let child = &mut self.node(name)?.child;
        Ok(match child {
            Some(child) => child.try_wait()?.is_none(),
            None => false,
        })
    }

    /// Waits for the end of a node that ends by itself.
    pub fn wait_ended(&mut self, name: &str) -> Result<ExitStatus> {
        let deadline = Instant::now() + END_TIME_MAX;
        loop {
            let child = &mut self.node(name)?.child;
            let running = child.as_mut().context("the node does not run")?;
            if let Some(status) = running.try_wait()? {
                *child = None;
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{name} does not end; its log:\n{}", self.log(name)?);
            }
            thread::sleep(POLL);
        }
    }

    /// The nodes that run and are not paused.
    pub fn running(&self) -> impl Iterator<Item = &'static str> {
        let nodes = self.nodes.iter();
        nodes
            .filter(|node| node.child.is_some() && !node.paused)
            .map(|node| node.name)
    }

    /// The nodes that are not among these.
    pub fn others(&self, than: &[&str]) -> Vec<&'static str> {
        let mut nodes = NODES.to_vec();
        nodes.retain(|name| !than.contains(name));
        nodes
    }

    /// Runs the program as an operator would; returns what it says, as an error if it fails.
    pub fn command(&self, args: &[&str]) -> Result<String> {
        let output = Command::new(havenfs_binary()?).args(args).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let problem = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{problem}");
        Ok(said)
    }

    /// The same of `havenfs cluster`, said to a node that runs.
    pub fn operate(&self, name: &str, args: &[&str]) -> Result<String> {
        let control = self.site.control(name);
        let control = ["--control", &control.to_string_lossy()].map(str::to_owned);
        let words = ["cluster"].into_iter().chain(args.iter().copied());
        let words: Vec<&str> = words.chain(control.iter().map(String::as_str)).collect();
        self.command(&words)
    }

    /// The same, of a node that is stopped.
    pub fn repair(&self, name: &str, args: &[&str]) -> Result<String> {
        let config = self.site.config(name);
        let config = ["--config", &config.to_string_lossy()].map(str::to_owned);
        let words = ["cluster"].into_iter().chain(args.iter().copied());
        let words: Vec<&str> = words.chain(config.iter().map(String::as_str)).collect();
        self.command(&words)
    }

    /// Adds an empty node that was started: waits until another one shows it, and how to add it.
    pub fn add(&mut self, asked: &str, name: &str) -> Result<String> {
        let address = self.site.member(name)?.to_string();
        let shown = format!("havenfs cluster add {name} --address {address}");
        self.wait(&format!("{asked} shows that {name} waits"), |cluster| {
            let status = cluster.status(asked).ok()?;
            let waiting = status["waiting"].as_array()?;
            let is_shown = waiting.iter().any(|one| one["command"] == *shown);
            is_shown.then_some(())
        })?;
        let said = self.operate(asked, &["add", name, "--address", &address])?;
        self.wait_joined(name)?;
        Ok(said)
    }

    /// Asks a node over its control socket.
    pub fn ask(&self, name: &str, request: &str) -> Result<Value> {
        status::ask(&self.site.control(name), request)
    }

    /// What a node says of the cluster and all services.
    pub fn status(&self, name: &str) -> Result<Value> {
        self.ask(name, "cluster")
    }

    /// What a node says of a service.
    pub fn service(&self, name: &str, service: &str) -> Result<ServiceStatus> {
        let status = self.status(name)?;
        let told = ServiceStatus::find(&status, service);
        told.ok_or_else(|| anyhow!("{name} knows no service {service}: {status}"))
    }

    /// The node that says that it answers for a service; an error if two say so.
    pub fn serving(&self, service: &str) -> Result<Option<Serving>> {
        // A node that starts has no socket yet.
        let told = self.running().filter_map(|node| {
            let told = self.service(node, service).ok()?;
            Some((node, told))
        });
        status::who_serves(service, told)
    }

    /// Waits until a service is served as it is `wanted`.
    pub fn wait_serving(
        &self,
        service: &str,
        wanted: impl Fn(&Serving) -> bool,
    ) -> Result<Serving> {
        status::wait_serving(service, || self.serving(service), wanted)
    }

    /// Waits until the nodes that run and are not paused agree on a leader that runs.
    pub fn wait_leader(&self) -> Result<&'static str> {
        let running: Vec<_> = self.running().collect();
        self.wait("a leader", |cluster| {
            let leaders: Vec<_> = running
                .iter()
                .map(|node| {
                    cluster.status(node).ok()?["leader"]
                        .as_str()
                        .map(str::to_owned)
                })
                .collect();
            let first = leaders.first()?.as_deref()?;
            let agreed = leaders
                .iter()
                .all(|leader| leader.as_deref() == Some(first));
            let leader = running.iter().find(|node| **node == first)?;
            agreed.then_some(*leader)
        })
    }

    /// Moves a service to a node that lives, and waits until it is served there.
    pub fn move_to(&self, service: &str, node: &str) -> Result<Serving> {
        self.wait(&format!("{service} can be moved to {node}"), |cluster| {
            let answer = cluster.ask(node, &format!("move {service} {node}")).ok()?;
            // A leader may be missing just now.
            answer["error"].is_null().then_some(())
        })?;
        self.wait_serving(service, |serving| serving.node == node)
    }

    /// Waits until `condition` has something, and fails if it has nothing in time.
    pub fn wait<T>(&self, what: &str, condition: impl Fn(&Self) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + TIME_MAX;
        loop {
            if let Some(found) = condition(self) {
                return Ok(found);
            }
            ensure!(Instant::now() < deadline, "waited in vain until {what}");
            thread::sleep(POLL);
        }
    }

    /// What a node wrote in its last life.
    pub fn log(&self, name: &str) -> Result<String> {
        let node = self.nodes.iter().find(|node| node.name == name);
        let from = node.map_or(0, |node| node.log_from);
        let bytes = fs::read(self.site.log(name))?;
        let own = bytes.get(from..).unwrap_or_default();
        Ok(String::from_utf8_lossy(own).into_owned())
    }

    /// Shows the ends of the nodes' logs.
    pub fn show_logs(&self) {
        for name in NODES {
            let log = tail(&self.site.log(name));
            eprintln!("--- the end of the log of {name}\n{log}");
        }
    }

    fn node(&mut self, name: &str) -> Result<&mut Node> {
        let node = self.nodes.iter_mut().find(|node| node.name == name);
        node.with_context(|| format!("there is no node `{name}`"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            let _ = node.signal(Signal::KILL);
        }
        for node in &mut self.nodes {
            node.end();
        }
        if thread::panicking() {
            self.show_logs();
        }
    }
}

impl Node {
    fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().context("the node does not run")?;
        // Not waited for yet, so the number is still its own.
        kill_process(Pid::from_child(child), signal)?;
        Ok(())
    }

    fn end(&mut self) {
        self.paused = false;
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
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
