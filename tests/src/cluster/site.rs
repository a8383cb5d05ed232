//! Where a cluster lives: a directory, a range of loopback addresses, ports, configuration files.
//!
//! Owns the directory and removes it when it is dropped. Touches nothing else of the machine: no
//! address but 127.A.B.x, no port below 1024. Starts nothing.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, anyhow};
use tempfile::TempDir;

use super::NODES;
use crate::lab::random::Random;

/// How many ranges of addresses and ports are tried.
const TRIES: u64 = 50;
/// The ports are chosen from here, below those that the kernel gives to callers.
const FIRST_PORT: u64 = 20_000;
const PORT_CHOICES: u64 = 1_200;
const PORTS_PER_CHOICE: u64 = 10;
/// The last byte of the first service's address; the others follow.
const SERVICES_FROM: u8 = 100;
/// The last byte of the address of client 0.
const CLIENTS_FROM: u8 = 200;
/// How many clients a site has room for.
const CLIENTS_MAX: u8 = 8;

/// A service that the cluster is to have.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Its name.
    pub name: &'static str,
    /// The node that should serve it if all is well.
    pub preferred: &'static str,
}

/// The ports, the same on every node.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    /// NFS.
    pub nfs: u16,
    /// MOUNT.
    pub mount: u16,
    /// NLM.
    pub nlm: u16,
    /// NSM.
    pub nsm: u16,
    /// The service's portmapper.
    pub portmap: u16,
    /// The clients' portmappers.
    pub host_portmap: u16,
    /// The nodes among each other.
    pub peer: u16,
}

/// The place.
#[derive(Debug)]
pub struct Site {
    dir: TempDir,
    network: [u8; 2],
    /// The services, in the order of their addresses.
    pub services: Vec<Plan>,
    /// The ports.
    pub ports: Ports,
}

impl Site {
    /// Makes the directory, chooses addresses and ports, and writes what each node needs.
    pub fn new(services: &[Plan]) -> Result<Self> {
        let (network, ports) = free_network(services.len())?;
        let dir = tempfile::Builder::new().prefix("havenfs-ct-").tempdir()?;
        let site = Self {
            dir,
            network,
            services: services.to_vec(),
            ports,
        };
        site.write_key("cluster.key", "the key of all nodes of this cluster")?;
        for service in services {
            let export = site.export(service.name);
            fs::create_dir(&export)?;
            fs::set_permissions(&export, fs::Permissions::from_mode(0o777))?;
        }
        for node in NODES {
            fs::create_dir(site.node_dir(node))?;
            fs::write(site.config(node), site.config_text(node)?)?;
        }
        Ok(site)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The exported directory of a service.
    pub fn export(&self, service: &str) -> PathBuf {
        self.path().join(format!("export-{service}"))
    }

    /// The address of a service.
    pub fn service(&self, name: &str) -> IpAddr {
        let place = self.services.iter().position(|plan| plan.name == name);
        self.address(SERVICES_FROM + place.unwrap_or(usize::from(CLIENTS_MAX)) as u8)
    }

    /// The address of the client with this number, below 8.
    pub fn client(&self, number: u8) -> IpAddr {
        self.address(CLIENTS_FROM + number)
    }

    /// Where a client's portmapper is asked.
    pub fn host_portmap(&self, number: u8) -> SocketAddr {
        SocketAddr::new(self.client(number), self.ports.host_portmap)
    }

    /// Where the other nodes reach a node.
    pub fn member(&self, node: &str) -> Result<SocketAddr> {
        let place = NODES.iter().position(|name| *name == node);
        let place = place.with_context(|| format!("there is no node `{node}`"))?;
        Ok(SocketAddr::new(
            self.address(1 + place as u8),
            self.ports.peer,
        ))
    }

    /// The node's configuration file.
    pub fn config(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("havenfs.toml")
    }

    /// The node's state directory.
    pub fn state(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("state")
    }

    /// The node's control socket.
    pub fn control(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("control")
    }

    /// What the node writes to its standard error.
    pub fn log(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("log")
    }

    /// What the node writes to its standard output.
    pub fn output(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("output")
    }

    /// Writes a key file that only its owner may read.
    pub fn write_key(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.path().join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(path)
    }

    /// What a node's configuration file says.
    pub fn config_text(&self, node: &str) -> Result<String> {
        let Ports {
            nfs,
            mount,
            nlm,
            nsm,
            portmap,
            host_portmap,
            peer: _,
        } = self.ports;
        let quoted = |path: PathBuf| format!("\"{}\"", path.display());
        let mut text = format!(
            "node = \"{node}\"\n\
             state_dir = {}\n\
             control = {}\n\
             metrics = \"off\"\n\
             nfs_port = {nfs}\n\
             mount_port = {mount}\n\
             nlm_port = {nlm}\n\
             nsm_port = {nsm}\n\
             portmap = \"embedded\"\n\
             portmap_port = {portmap}\n\
             host_portmap_port = {host_portmap}\n\n\
             [cluster]\n\
             key_file = {}\n",
            quoted(self.state(node)),
            quoted(self.control(node)),
            quoted(self.path().join("cluster.key")),
        );
        for name in NODES {
            let address = self.member(name)?;
            write!(
                text,
                "\n[[cluster.member]]\nname = \"{name}\"\naddress = \"{address}\"\n"
            )?;
        }
        for Plan { name, preferred } in &self.services {
            write!(
                text,
                "\n[[service]]\n\
                 name = \"{name}\"\n\
                 names = [\"{name}.example\"]\n\
                 addresses = [\"{}\"]\n\
                 address_mode = \"fixed\"\n\
                 exports = [\"{}:*(rw,no_root_squash,insecure)\"]\n\
                 storage = \"cluster-fs\"\n\
                 preferred = \"{preferred}\"\n",
                self.service(name),
                self.export(name).display(),
            )?;
        }
        Ok(text)
    }

    fn node_dir(&self, node: &str) -> PathBuf {
        self.path().join(node)
    }

    fn address(&self, last: u8) -> IpAddr {
        address(self.network, last)
    }
}

const fn address([a, b]: [u8; 2], last: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, a, b, last))
}

/// Addresses and ports that nobody has. Tests of one run differ in their process numbers, and in
/// a count where they share a process.
fn free_network(services: usize) -> Result<([u8; 2], Ports)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let seed = u64::from(std::process::id()) << 8 | u64::from(count & 0xff);
    let mut random = Random::with_seed(seed);
    let mut last = anyhow!("not tried");
    for _ in 0..TRIES {
        // 127.0.x.x is where everybody is.
        let network = [1 + random.below(255) as u8, random.below(256) as u8];
        let first = (FIRST_PORT + random.below(PORT_CHOICES) * PORTS_PER_CHOICE) as u16;
        let ports = Ports {
            nfs: first,
            mount: first + 1,
            nlm: first + 2,
            nsm: first + 3,
            portmap: first + 4,
            host_portmap: first + 5,
            peer: first + 6,
        };
        match probe(network, services, &ports) {
            Ok(()) => return Ok((network, ports)),
            Err(error) => last = error.into(),
        }
    }
    Err(last).context("no loopback addresses 127.x.y.z can be listened on")
}

/// Whether everything that will listen could.
fn probe(network: [u8; 2], services: usize, ports: &Ports) -> std::io::Result<()> {
    let on = |last, port| SocketAddr::new(address(network, last), port);
    let both = |last, port| {
        TcpListener::bind(on(last, port))?;
        UdpSocket::bind(on(last, port)).map(drop)
    };
    for service in 0..services as u8 {
        for port in [ports.nfs, ports.mount, ports.nlm, ports.nsm, ports.portmap] {
            both(SERVICES_FROM + service, port)?;
        }
    }
    for client in 0..CLIENTS_MAX {
        both(CLIENTS_FROM + client, ports.host_portmap)?;
    }
    for node in 1..=NODES.len() as u8 {
        TcpListener::bind(on(node, ports.peer))?;
    }
    Ok(())
}
