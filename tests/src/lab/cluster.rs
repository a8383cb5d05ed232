//! A cluster of three nodes, one on each host of a lab, for real clients.
//!
//! Owns the nodes' processes and what they read: key and configuration. Nodes `n1` to `n3` live on
//! hosts `s1` to `s3`, talk over the hosts' own network, and export what [`Storage`] says. Their
//! state lies where it survives a power loss of the host.
//!
//! It asks nodes over their control sockets who serves what, to wait for it; whether promises are
//! kept is what clients find out.
//!
//! Invariant: the processes end with their guards, at the latest with the lab.

mod storage;

use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

pub use self::storage::{Step, Storage};
use super::{Host, Lab, Process, havenfs_binary, havenfs_fault_binary};
pub use crate::cluster::{NODES, Serving};
use crate::cluster::{POLL, ServiceStatus, TIME_MAX, status};

/// A service that the cluster is to have.
#[derive(Clone, Copy, Debug)]
pub struct Service {
    /// What operators call it.
    pub name: &'static str,
    /// What clients mount from.
    pub names: &'static [&'static str],
    /// Its addresses, with the lengths of their prefixes.
    pub addresses: &'static [&'static str],
    /// What it exports; the directory is made.
    pub export: &'static str,
    /// The node that serves it first.
    pub preferred: &'static str,
}

/// What a cluster is made of.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Its services.
    pub services: Vec<Service>,
    /// Whether the third node only votes.
    pub has_witness: bool,
    /// Where their files lie.
    pub storage: Storage,
    /// What promise all nodes break, so that a test can see whether that would be noticed.
    pub fault: Option<&'static str>,
}

/// Three nodes in a lab.
#[derive(Debug)]
pub struct Cluster<'lab> {
    lab: &'lab Lab,
    plan: Plan,
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    name: &'static str,
    /// None if it does not run.
    process: Option<Process>,
    paused: bool,
}

impl<'lab> Cluster<'lab> {
    /// Writes what the nodes need; none of them runs yet.
    pub fn new(lab: &'lab Lab, plan: Plan) -> Result<Self> {
        let node = |name| Node {
            name,
            process: None,
            paused: false,
        };
        let cluster = Self {
            lab,
            plan,
            nodes: NODES.map(node).into(),
        };
        cluster.make_storage()?;
        for name in NODES {
            let dir = cluster.host(name).dir();
            let key = dir.join("cluster.key");
            fs::write(&key, "the key of all nodes of this cluster")?;
            fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
            fs::write(dir.join("havenfs.toml"), cluster.config_text(name)?)?;
            cluster.mount_storage(name)?;
        }
        Ok(cluster)
    }

    /// Starts all nodes; see [`Cluster::wait_started`].
    pub fn spawn_all(&mut self) -> Result<()> {
        NODES.into_iter().try_for_each(|name| self.spawn(name))
    }

    /// Waits until every service is served by the node that it prefers.
    pub fn wait_started(&mut self) -> Result<()> {
        for name in NODES {
            self.wait_joined(name)?;
        }
        for service in self.plan.services.clone() {
            self.wait_serving(service.name, |serving| serving.node == service.preferred)?;
        }
        Ok(())
    }

    /// Starts a node, which need not be ready yet.
    pub fn spawn(&mut self, name: &str) -> Result<()> {
        let verb = if self.is_witness(name) {
            "witness"
        } else {
            "serve"
        };
        let host = self.host(name);
        let mut command = if let Some(fault) = self.plan.fault {
            let mut command = host.command(havenfs_fault_binary()?)?;
            command.env("HAVENFS_FAULT", fault);
            command
        } else {
            host.command(havenfs_binary()?)?
        };
        command.args([verb, "--config"]);
        command.arg(host.dir().join("havenfs.toml"));
        let process = host.spawn("havenfs", &mut command)?;
        let node = self.node(name)?;
        ensure!(node.process.is_none(), "{name} runs already");
        node.process = Some(process);
        node.paused = false;
        Ok(())
    }

    /// Starts a node again and waits until all that run know that it lives.
    pub fn restart(&mut self, name: &str) -> Result<()> {
        self.spawn(name)?;
        self.wait_joined(name)
    }

    /// Ends a node's process as `kill -9` does.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        let process = self.node(name)?.process.take();
        process.context("the node does not run")?.kill()?;
        Ok(())
    }

    /// Asks a node's process to end, and waits until it has.
    pub fn stop(&mut self, name: &str) -> Result<()> {
        let process = self.node(name)?.process.take();
        let mut process = process.context("the node does not run")?;
        process.signal(Signal::TERM)?;
        process.wait(TIME_MAX)?;
        Ok(())
    }

    /// Stops a node's process in its tracks.
    pub fn pause(&mut self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        node.paused = true;
        let process = node.process.as_ref().context("the node does not run")?;
        process.signal(Signal::STOP)
    }

    /// Lets a paused node go on.
    pub fn resume(&mut self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        node.paused = false;
        let process = node.process.as_ref().context("the node does not run")?;
        process.signal(Signal::CONT)
    }

    /// Takes the power away from a node's host.
    pub fn power_off(&mut self, name: &str) -> Result<()> {
        self.cut_storage(name)?;
        self.lab.crash(host_of(name))?;
        drop(self.node(name)?.process.take());
        Ok(())
    }

    /// Boots a node's host again and starts the node, which has no cable to the clients and may not
    /// be ready yet.
    pub fn power_on_without_clients(&mut self, name: &str) -> Result<()> {
        self.lab.boot_host(host_of(name))?;
        self.lab.unplug(host_of(name))?;
        self.mount_storage(name)?;
        self.spawn(name)
    }

    /// Boots a node's host again, starts the node and waits until all that run know that it lives.
    pub fn power_on(&mut self, name: &str) -> Result<()> {
        self.lab.boot_host(host_of(name))?;
        self.mount_storage(name)?;
        self.restart(name)
    }

    /// Cuts a node off from the other nodes, but not from clients.
    pub fn cut_from_peers(&self, name: &str) -> Result<()> {
        self.lab.cut(&format!("{}p", host_of(name)))
    }

    /// Puts right what [`Cluster::cut_from_peers`] broke.
    pub fn heal_to_peers(&self, name: &str) -> Result<()> {
        self.lab.heal(&format!("{}p", host_of(name)))
    }

    /// Waits until a node is ready and all that run know that it lives.
    pub fn wait_joined(&mut self, name: &str) -> Result<()> {
        let process = self.node(name)?.process.as_mut();
        let process = process.context("the node does not run")?;
        process.wait_for_line("havenfs ready", TIME_MAX)?;
        self.wait(&format!("{name} has joined"), |cluster| {
            // A witness renews no lease that others could see.
            if cluster.is_witness(name) {
                let status = cluster.ask(name, "cluster").ok()?;
                return status["leader"].is_string().then_some(());
            }
            let mut seen = cluster.running().map(|node| cluster.lives(node, name));
            seen.all(|lives| lives).then_some(())
        })
    }

    /// Whether a node says that another one, or itself, lives.
    #[must_use]
    pub fn lives(&self, asked: &str, name: &str) -> bool {
        let Ok(status) = self.ask(asked, "cluster") else {
            return false;
        };
        let mut members = status["members"].as_array().into_iter().flatten();
        members.any(|member| member["name"] == *name && member["lives"] == true)
    }

    /// The nodes that run and are not paused.
    pub fn running(&self) -> impl Iterator<Item = &'static str> {
        let nodes = self.nodes.iter();
        nodes
            .filter(|node| node.process.is_some() && !node.paused)
            .map(|node| node.name)
    }

    /// The nodes that can serve and are not among these.
    #[must_use]
    pub fn others(&self, than: &[&str]) -> Vec<&'static str> {
        let mut nodes = NODES.to_vec();
        nodes.retain(|name| !than.contains(name) && !self.is_witness(name));
        nodes
    }

    /// What a node's process, which runs, wrote so far.
    pub fn output(&self, name: &str) -> Result<String> {
        let node = self.nodes.iter().find(|node| node.name == name);
        let process = node.and_then(|node| node.process.as_ref());
        process.context("the node does not run")?.output()
    }

    /// Asks a node over its control socket.
    pub fn ask(&self, name: &str, request: &str) -> Result<Value> {
        status::ask(&self.host(name).dir().join("control"), request)
    }

    /// What a node says of a service; none if it can't be asked.
    #[must_use]
    pub fn service(&self, name: &str, service: &str) -> Option<ServiceStatus> {
        ServiceStatus::find(&self.ask(name, "cluster").ok()?, service)
    }

    /// The node that says that it answers for a service, if any.
    ///
    /// # Errors
    /// Two say so for the same epoch.
    pub fn serving(&self, service: &str) -> Result<Option<Serving>> {
        let told = self.running().filter_map(|node| {
            let told = self.service(node, service)?;
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
        self.wait("the nodes agree on a leader", |cluster| {
            let running: Vec<_> = cluster.running().collect();
            let mut leaders = running.iter().map(|node| {
                let status = cluster.ask(node, "cluster").ok()?;
                status["leader"].as_str().map(str::to_owned)
            });
            let first = leaders.next()??;
            let agreed = leaders.all(|leader| leader.as_ref() == Some(&first));
            let leader = running.iter().find(|node| **node == first)?;
            agreed.then_some(*leader)
        })
    }

    /// Tells the cluster to move a service; it may take a moment until that is accepted.
    pub fn order_move(&self, service: &str, node: &str) -> Result<()> {
        self.wait(&format!("{service} can be moved to {node}"), |cluster| {
            let answer = cluster.ask(node, &format!("move {service} {node}")).ok()?;
            answer["error"].is_null().then_some(())
        })
    }

    /// Moves a service to a node that lives, and waits until it is served there.
    pub fn move_to(&self, service: &str, node: &str) -> Result<Serving> {
        self.order_move(service, node)?;
        self.wait_serving(service, |serving| serving.node == node)
    }

    /// A counter of the metrics page of a node.
    pub fn counter(&self, name: &str, counter: &str) -> Result<u64> {
        let page = self.host(name).on_network(|| {
            let at = SocketAddr::from((Ipv4Addr::LOCALHOST, METRICS_PORT));
            let mut stream = TcpStream::connect(at)?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
            let mut page = String::new();
            stream.read_to_string(&mut page)?;
            Ok(page)
        })?;
        let mut lines = page.lines().filter_map(|line| line.split_once(' '));
        let value = lines.find(|(name, _)| *name == counter);
        let (_, value) = value.with_context(|| format!("{name} has no {counter}"))?;
        Ok(value.parse()?)
    }

    /// The host of a node.
    #[must_use]
    pub fn host(&self, name: &str) -> Host<'lab> {
        self.lab.host(host_of(name))
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

    fn is_witness(&self, name: &str) -> bool {
        self.plan.has_witness && name == NODES[2]
    }

    fn config_text(&self, node: &str) -> Result<String> {
        let dir = self.host(node).dir();
        let dir = dir.display();
        let mut text = format!(
            "node = \"{node}\"\n\
             state_dir = \"{dir}/state\"\n\
             control = \"{dir}/control\"\n\
             metrics = \"127.0.0.1:{METRICS_PORT}\"\n\
             portmap = \"embedded\"\n\n\
             [cluster]\n\
             key_file = \"{dir}/cluster.key\"\n",
        );
        for (number, name) in (1..).zip(NODES) {
            let witness = self.is_witness(name);
            write!(
                text,
                "\n[[cluster.member]]\n\
                 name = \"{name}\"\n\
                 address = \"{PEER_NETWORK}.{number}:7300\"\n\
                 witness = {witness}\n"
            )?;
        }
        for service in &self.plan.services {
            write!(
                text,
                "\n[[service]]\n\
                 name = \"{}\"\n\
                 names = {:?}\n\
                 addresses = {:?}\n\
                 address_mode = \"managed\"\n\
                 interface = \"eth0\"\n\
                 exports = [\"{}:*(rw,no_root_squash)\"]\n\
                 preferred = \"{}\"\n{}",
                service.name,
                service.names,
                service.addresses,
                service.export,
                service.preferred,
                self.storage_text(service),
            )?;
        }
        Ok(text)
    }

    fn node(&mut self, name: &str) -> Result<&mut Node> {
        let node = self.nodes.iter_mut().find(|node| node.name == name);
        node.with_context(|| format!("there is no node `{name}`"))
    }
}

/// The host that a node lives on: `s1` for `n1`.
#[must_use]
pub fn host_of(node: &str) -> &'static str {
    match node {
        "n1" => "s1",
        "n2" => "s2",
        _ => "s3",
    }
}

/// As `tests/lab/common.sh` has it.
const PEER_NETWORK: &str = "10.79.0";
const METRICS_PORT: u16 = 9587;
