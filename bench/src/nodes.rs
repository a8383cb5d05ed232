//! Three nodes of a cluster on loopback, with one service or two, for measuring what a cluster
//! costs and how long a takeover takes.
//!
//! Owns their processes; dropping it ends them. Every node has a state directory of its own on the
//! disk that the caller names, and all export the same tmpfs, as a cluster file system would be.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use havenfs_rpc::program;
use serde_json::Value;

use crate::measure::Place;
use crate::peers::Setup;
use crate::session::Session;

/// Their names.
pub(crate) const NAMES: [&str; 3] = ["n1", "n2", "n3"];
/// The services; each has an address of its own, and exports a directory beside the others.
const SERVICES: [&str; 2] = ["alpha", "beta"];
const PEER_PORT: u16 = 7300;
/// How long the service may be unreachable, or the cluster without a leader.
const TIME_MAX: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(5);

/// The nodes.
#[derive(Debug)]
pub(crate) struct Nodes {
    havenfs: PathBuf,
    scratch: PathBuf,
    running: BTreeMap<&'static str, Child>,
    /// How each service is reached, whoever serves it.
    pub(crate) places: Vec<Place>,
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for child in self.running.values_mut() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Nodes {
    /// Starts all three and waits until the services answer. The first one exports the directory of
    /// `setup`, the second one that beside it which is called `other`.
    pub(crate) fn start(setup: &Setup, services: usize) -> anyhow::Result<Self> {
        let key = setup.scratch.join("cluster.key");
        fs::write(&key, [7; 32])?;
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        let places: Vec<Place> = (1..)
            .zip(SERVICES.iter().take(services))
            .map(|(number, name)| place(setup, number, name))
            .collect();
        for name in NAMES {
            let path = setup.scratch.join(format!("{name}.toml"));
            fs::write(path, config_text(setup, name, &places)?)?;
        }
        let mut nodes = Self {
            havenfs: setup.havenfs.clone(),
            scratch: setup.scratch.clone(),
            running: BTreeMap::new(),
            places,
        };
        for name in NAMES {
            nodes.start_node(name)?;
        }
        for place in &nodes.places {
            wait_for_service(place)?;
        }
        Ok(nodes)
    }

    /// Starts a node that does not run.
    pub(crate) fn start_node(&mut self, name: &'static str) -> anyhow::Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.scratch.join(format!("{name}.log")))?;
        let child = Command::new(&self.havenfs)
            .arg("serve")
            .arg("--config")
            .arg(self.scratch.join(format!("{name}.toml")))
            .env("HAVENFS_LOG", "warn,havenfs::serve=info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("start a node")?;
        self.running.insert(name, child);
        Ok(())
    }

    /// Waits until all nodes run, hear each other and have the whole log.
    pub(crate) fn wait_for_all(&self) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let heard = NAMES.iter().all(|name| {
                let Ok(told) = self.ask(name, "cluster") else {
                    return false;
                };
                let members = told["members"].as_array();
                members.is_some_and(|members| members.iter().all(|one| one["lives"] == true))
            });
            if heard {
                return Ok(());
            }
            ensure!(began.elapsed() < TIME_MAX, "not all nodes are there");
            std::thread::sleep(POLL);
        }
    }

    /// The node that serves a service, as its own word says.
    pub(crate) fn active(&self, service: usize) -> anyhow::Result<&'static str> {
        let began = Instant::now();
        loop {
            for name in self.running.keys() {
                let Ok(told) = self.ask(name, "cluster") else {
                    continue;
                };
                if told["services"][service]["serving"] == true {
                    return Ok(name);
                }
            }
            ensure!(began.elapsed() < TIME_MAX, "no node serves");
            std::thread::sleep(POLL);
        }
    }

    /// Has a node serve a service, if it does not yet.
    pub(crate) fn serve(&self, service: usize, name: &str) -> anyhow::Result<()> {
        let began = Instant::now();
        if self.active(service)? != name {
            self.move_to(service, name)?;
        }
        while self.active(service)? != name {
            ensure!(began.elapsed() < TIME_MAX, "it does not move");
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// What a node says on its control socket.
    pub(crate) fn ask(&self, name: &str, request: &str) -> anyhow::Result<Value> {
        let mut stream = UnixStream::connect(self.scratch.join(format!("{name}.control")))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(format!("{request}\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(serde_json::from_str(&answer)?)
    }

    /// Has a node lead the log.
    pub(crate) fn lead(&self, name: &str) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let told = self.ask(name, "cluster")?;
            if told["leader"] == *name {
                return Ok(());
            }
            // It may be that nobody leads right now.
            let answer = self.ask(name, &format!("transfer {name}"))?;
            if began.elapsed() >= TIME_MAX {
                bail!("{name} does not come to lead: {answer}");
            }
            std::thread::sleep(POLL);
        }
    }

    /// Ends a node as a crash of its process would.
    pub(crate) fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        let mut child = self.running.remove(name).context("it does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Asks for a planned move.
    pub(crate) fn move_to(&self, service: usize, name: &str) -> anyhow::Result<()> {
        // It knows for sure where the service is.
        let active = self.active(service)?;
        let service = SERVICES.get(service).context("no such service")?;
        let answer = self.ask(active, &format!("move {service} {name}"))?;
        ensure!(answer["error"].is_null(), "no move: {answer}");
        Ok(())
    }

    /// The process of a node.
    pub(crate) fn pid(&self, name: &str) -> anyhow::Result<u32> {
        Ok(self.running.get(name).context("it does not run")?.id())
    }

    /// The processes of all nodes that run.
    pub(crate) fn pids(&self) -> Vec<u32> {
        self.running.values().map(Child::id).collect()
    }
}

/// The nodes that are not this one.
pub(crate) fn others(name: &str) -> [&'static str; 2] {
    match NAMES {
        [one, two, three] if name == one => [two, three],
        [one, two, three] if name == two => [one, three],
        [one, two, _] => [one, two],
    }
}

fn place(setup: &Setup, number: u8, name: &str) -> Place {
    let address = IpAddr::V4(Ipv4Addr::new(127, 0, 2, number));
    let at = |port| SocketAddr::new(address, port);
    let path = if name == SERVICES[0] {
        setup.export.clone()
    } else {
        setup.export.with_file_name("other")
    };
    Place {
        nfs: at(program::NFS_PORT),
        mount: at(program::MOUNT_PORT),
        nlm: at(program::NLM_PORT),
        path: path.display().to_string(),
        who: setup.who,
        state: setup.state.clone(),
    }
}

/// Waits until the service can be mounted.
fn wait_for_service(place: &Place) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let mounted = Session::connect(place.mount, place.who)
            .and_then(|mut session| session.mount(&place.path));
        match mounted {
            Ok(_) => return Ok(()),
            Err(error) if began.elapsed() >= TIME_MAX => {
                return Err(error.context("nobody serves the service"));
            }
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

fn config_text(setup: &Setup, name: &str, places: &[Place]) -> anyhow::Result<String> {
    let mut text = format!(
        "node = \"{name}\"\n\
         state_dir = \"{}\"\n\
         control = \"{}\"\n\
         metrics = \"off\"\n\
         portmap = \"off\"\n\n\
         [cluster]\n\
         key_file = \"{}\"\n",
        setup.state.join(name).display(),
        setup.scratch.join(format!("{name}.control")).display(),
        setup.scratch.join("cluster.key").display(),
    );
    for (number, name) in (1..).zip(NAMES) {
        let address = SocketAddr::new(Ipv4Addr::new(127, 0, 1, number).into(), PEER_PORT);
        write!(
            text,
            "\n[[cluster.member]]\nname = \"{name}\"\naddress = \"{address}\"\n"
        )?;
    }
    for ((service, place), preferred) in SERVICES.iter().zip(places).zip(NAMES) {
        write!(
            text,
            "\n[[service]]\n\
             name = \"{service}\"\n\
             names = [\"{service}.example\"]\n\
             addresses = [\"{}\"]\n\
             exports = [\"{}:*(rw,no_root_squash,insecure)\"]\n\
             storage = \"cluster-fs\"\n\
             preferred = \"{preferred}\"\n",
            place.nfs.ip(),
            place.path,
        )?;
    }
    Ok(text)
}
