//! Where the demo lives: a directory, addresses, ports, the nodes' configuration files.
//!
//! Owns the directory and removes it when it is dropped, unless it is to be kept. Touches nothing
//! else of this machine: no file outside the directory, and on the machine's own network no address
//! but 127.A.B.x and no port below 1024. Starts nothing.

use std::fmt::Write as _;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use havenfs::random::random_u64;

use super::bridge::CARD;

/// The names of the nodes.
pub(super) const NODES: [&str; 3] = ["n1", "n2", "n3"];
/// The service's name in the configuration.
pub(super) const SERVICE: &str = "demo";
/// The numbers of the clients.
pub(super) const CLIENTS: [u8; 2] = [1, 2];
const GUEST_DIR: &str = "linux";
/// The number of the client in a virtual machine.
pub(super) const GUEST: u8 = 11;
/// How many bits of an address on the bridge name the network.
pub(super) const PREFIX_BITS: u8 = 24;
/// The last number of the service's address.
const SERVICE_HOST: u8 = 100;
/// The name that clients would mount.
pub(super) const SERVICE_NAME: &str = "nfs-service.example";
/// The longest path of a socket that the kernel takes, in bytes.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// How many ranges of addresses and ports are tried.
const TRIES: usize = 50;
/// The ports are chosen from here, below those that the kernel gives to callers.
const FIRST_PORT: u16 = 20_000;
const PORT_CHOICES: u64 = 1_200;
const PORTS_PER_CHOICE: u16 = 10;
const KEY_BYTES: usize = 32;

/// The ports, the same on every node.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ports {
    /// NFS.
    pub(super) nfs: u16,
    /// The service's portmapper.
    pub(super) portmap: u16,
    /// The clients' portmappers.
    pub(super) host_portmap: u16,
    mount: u16,
    nlm: u16,
    nsm: u16,
    peer: u16,
}

impl Ports {
    /// Where clients expect them.
    const USUAL: Self = Self {
        nfs: 2049,
        portmap: 111,
        host_portmap: 111,
        mount: 20_048,
        nlm: 32_803,
        nsm: 662,
        peer: 7300,
    };
}

/// Where nodes and clients have their addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Where {
    /// On the machine's own loopback device.
    Loopback,
    /// On a network of their own, where the service's address moves.
    Bridge,
}

/// The place.
#[derive(Debug)]
pub(super) struct Site {
    root: PathBuf,
    /// Whether the directory itself is ours, or only what is in it.
    made: bool,
    keep: bool,
    place: Where,
    network: [u8; 3],
    /// The ports.
    pub(super) ports: Ports,
}

impl Site {
    /// Makes the directory and chooses addresses and ports.
    pub(super) fn make(root: Option<&Path>, keep: bool, place: Where) -> Result<Self> {
        let (network, ports) = match place {
            Where::Loopback => free_network()?,
            // Nobody else is there. The addresses are those of examples.
            Where::Bridge => ([192, 0, 2], Ports::USUAL),
        };
        let (root, made) = make_root(root)?;
        let site = Self {
            root,
            made,
            keep,
            place,
            network,
            ports,
        };
        site.check_root()?;
        let key: Vec<u8> = (0..KEY_BYTES / 8)
            .flat_map(|_| random_u64().to_ne_bytes())
            .collect();
        let mut options = OpenOptions::new();
        let path = site.root.join("cluster.key");
        let file = options.write(true).create_new(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(&key))
            .with_context(|| format!("cannot write `{}`", path.display()))?;
        make_dir(&site.export())?;
        for node in NODES {
            make_dir(&site.node_dir(node))?;
            let path = site.config(node);
            fs::write(&path, site.config_text(node)?)
                .with_context(|| format!("cannot write `{}`", path.display()))?;
        }
        Ok(site)
    }

    /// The directory.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The exported directory.
    pub(super) fn export(&self) -> PathBuf {
        self.root.join("export")
    }

    /// The address of the service.
    pub(super) fn service(&self) -> IpAddr {
        self.address(SERVICE_HOST)
    }

    /// The address of a node.
    pub(super) fn node(&self, node: &str) -> IpAddr {
        let number = (1..).zip(NODES).find(|(_, name)| *name == node);
        self.address(number.map_or(0, |(number, _)| number))
    }

    /// The names of the service, the longest one first.
    pub(super) fn names() -> [&'static str; 2] {
        let (short, _) = SERVICE_NAME.split_once('.').unwrap_or((SERVICE_NAME, ""));
        [SERVICE_NAME, short]
    }

    /// The address of the client with this number, from 1.
    pub(super) fn client(&self, number: u8) -> IpAddr {
        self.address(200_u8.saturating_add(number))
    }

    /// The node's configuration file.
    pub(super) fn config(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("havenfs.toml")
    }

    /// The node's control socket.
    pub(super) fn control(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("control")
    }

    /// What the node writes to its standard error.
    pub(super) fn log(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("log")
    }

    /// What the node writes to its standard output.
    pub(super) fn output(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("output")
    }

    /// What the virtual machine writes outside of itself.
    pub(super) fn guest_dir(&self) -> PathBuf {
        self.root.join(GUEST_DIR)
    }

    fn node_dir(&self, node: &str) -> PathBuf {
        self.root.join(node)
    }

    fn address(&self, last: u8) -> IpAddr {
        address(self.network, last)
    }

    /// Names and socket paths have to be what the configuration can say.
    fn check_root(&self) -> Result<()> {
        let text = self
            .root
            .to_str()
            .context("the directory's name is no UTF-8")?;
        let plain = |c: char| c.is_alphanumeric() || "/._-+,@%~=".contains(c);
        ensure!(
            text.chars().all(plain),
            "the directory `{text}` has a character in its name that an export list would have to \
             quote\nhint: choose another with --root, or set TMPDIR"
        );
        let longest = self.control(NODES[0]);
        ensure!(
            longest.as_os_str().len() <= SOCKET_PATH_BYTES_MAX,
            "`{}` is too long for the name of a socket\nhint: choose a shorter directory with \
             --root, or set TMPDIR",
            longest.display()
        );
        Ok(())
    }

    fn config_text(&self, node: &str) -> Result<String> {
        let Ports {
            nfs,
            portmap,
            host_portmap,
            mount,
            nlm,
            nsm,
            peer,
        } = self.ports;
        let dir = self.node_dir(node);
        let state = quoted(&dir.join("state").to_string_lossy())?;
        let control = quoted(&self.control(node).to_string_lossy())?;
        let key = quoted(&self.root.join("cluster.key").to_string_lossy())?;
        let export = self.export();
        let export = format!("{}:*(rw,no_root_squash,insecure)", export.display());
        let export = quoted(&export)?;
        let mut text = format!(
            "# Made by `havenfs demo`.\n\
             node = \"{node}\"\n\
             state_dir = {state}\n\
             control = {control}\n\
             metrics = \"off\"\n\
             nfs_port = {nfs}\n\
             mount_port = {mount}\n\
             nlm_port = {nlm}\n\
             nsm_port = {nsm}\n\
             portmap = \"embedded\"\n\
             portmap_port = {portmap}\n\
             host_portmap_port = {host_portmap}\n\n\
             [cluster]\n\
             key_file = {key}\n"
        );
        for name in NODES {
            let address = SocketAddr::new(self.node(name), peer);
            write!(
                text,
                "\n[[cluster.member]]\nname = \"{name}\"\naddress = \"{address}\"\n"
            )?;
        }
        let service = self.service();
        let address = match self.place {
            Where::Loopback => format!("addresses = [\"{service}\"]\naddress_mode = \"fixed\""),
            Where::Bridge => {
                format!("addresses = [\"{service}/{PREFIX_BITS}\"]\ninterface = \"{CARD}\"")
            }
        };
        let [long, short] = Self::names();
        write!(
            text,
            "\n[[service]]\n\
             name = \"{SERVICE}\"\n\
             names = [\"{long}\", \"{short}\"]\n\
             {address}\n\
             exports = [{export}]\n\
             storage = \"cluster-fs\"\n\
             preferred = \"{}\"\n",
            NODES[0]
        )?;
        Ok(text)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // What can't be removed is left; there is nothing better to do.
        if self.made {
            let _ = fs::remove_dir_all(&self.root);
            return;
        }
        for dir in NODES.into_iter().chain(["export", GUEST_DIR]) {
            let _ = fs::remove_dir_all(self.root.join(dir));
        }
        let _ = fs::remove_file(self.root.join("cluster.key"));
    }
}

/// Makes the directory, or takes an empty one; returns its full name and whether it was made.
fn make_root(wanted: Option<&Path>) -> Result<(PathBuf, bool)> {
    let made;
    let root = if let Some(root) = wanted {
        match fs::read_dir(root) {
            Ok(mut entries) => {
                ensure!(
                    entries.next().is_none(),
                    "`{}` is not empty\nhint: name an empty directory with --root, or one that does \
                     not exist",
                    root.display()
                );
                made = false;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make_dir(root)?;
                made = true;
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot use `{}`", root.display()));
            }
        }
        root.to_path_buf()
    } else {
        let name = format!("havenfs-demo-{:08x}", random_u64() as u32);
        let root = std::env::temp_dir().join(name);
        let mut builder = DirBuilder::new();
        builder.mode(0o700).create(&root).map_err(|error| {
            anyhow!(
                "cannot make the directory `{}`: {error}\nhint: name another place with --root",
                root.display()
            )
        })?;
        made = true;
        root
    };
    let full = fs::canonicalize(&root);
    let full = full.with_context(|| format!("cannot use `{}`", root.display()))?;
    Ok((full, made))
}

/// For nobody else, whatever the directory that it is in allows: what is exported may hold files of
/// root that clients have made, set-user-id among them.
fn make_dir(path: &Path) -> Result<()> {
    let mut builder = DirBuilder::new();
    let made = builder.mode(0o700).create(path);
    made.with_context(|| format!("cannot make the directory `{}`", path.display()))
}

/// A string of TOML; those of JSON are.
fn quoted(text: &str) -> Result<String> {
    Ok(serde_json::to_string(text)?)
}

const fn address([a, b, c]: [u8; 3], last: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, last))
}

/// Addresses and ports that nobody has.
fn free_network() -> Result<([u8; 3], Ports)> {
    let mut problem = String::new();
    for _ in 0..TRIES {
        let chance = random_u64();
        let [a, b, ..] = chance.to_ne_bytes();
        // 127.0.x.x is where everybody is.
        let network = [127, a.max(1), b];
        let choice = (chance >> 16) % PORT_CHOICES;
        let first = FIRST_PORT + choice as u16 * PORTS_PER_CHOICE;
        let ports = Ports {
            nfs: first,
            mount: first + 1,
            nlm: first + 2,
            nsm: first + 3,
            portmap: first + 4,
            host_portmap: first + 5,
            peer: first + 6,
        };
        match probe(network, &ports) {
            Ok(()) => return Ok((network, ports)),
            Err(error) => problem = error.to_string(),
        }
    }
    bail!(
        "no loopback addresses 127.x.y.z can be listened on: {problem}\nhint: is the loopback device \
         up, with 127.0.0.1/8?"
    )
}

/// Whether everything that will listen could.
fn probe(network: [u8; 3], ports: &Ports) -> io::Result<()> {
    let on = |last, port| SocketAddr::new(address(network, last), port);
    for port in [ports.nfs, ports.mount, ports.nlm, ports.nsm, ports.portmap] {
        TcpListener::bind(on(SERVICE_HOST, port))?;
        UdpSocket::bind(on(SERVICE_HOST, port))?;
    }
    for last in [201, 202] {
        TcpListener::bind(on(last, ports.host_portmap))?;
        UdpSocket::bind(on(last, ports.host_portmap))?;
    }
    for last in [1, 2, 3] {
        TcpListener::bind(on(last, ports.peer))?;
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_not_empty_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine"), "").unwrap();
        let error = Site::make(Some(dir.path()), false, Where::Loopback)
            .unwrap_err()
            .to_string();
        assert!(error.contains("is not empty"), "{error}");
        assert!(dir.path().join("mine").exists());
    }

    #[test]
    fn an_empty_directory_is_empty_again_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let site = Site::make(Some(dir.path()), false, Where::Loopback).unwrap();
        let text = fs::read_to_string(site.config("n2")).unwrap();
        let config: toml::Table = text.parse().unwrap();
        assert_eq!(config["node"].as_str(), Some("n2"));
        assert_eq!(config["cluster"]["member"].as_array().unwrap().len(), 3);
        drop(site);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
