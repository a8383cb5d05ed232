//! The cluster and its services, as the configuration file says them.
//!
//! ```toml
//! node = "n1"
//! [cluster]
//! key_file = "/etc/havenfs/cluster.key"
//! [[cluster.member]]
//! name = "n1"
//! address = "192.0.2.1:7300"
//! [[service]]
//! name = "alpha"
//! names = ["nfs-service.example.com", "nfs-service"]
//! addresses = ["192.0.2.100/24"]
//! interface = "eth0"
//! exports = ["/srv/alpha:192.0.2.0/24(rw)"]
//! storage = "cluster-fs"
//! ```
//!
//! Without `[cluster]` this node is alone. Without `[[service]]` it has one service, which is what
//! the options and keys outside say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use havenfs_nsm::nsm_name;
use serde::Deserialize;

use super::floating::{FloatingAddress, FloatingConfig, NoAddress, WrittenAddress};
use super::hooks::{FenceNeed, HookKeys, Hooks};
use super::{Announce, ConfigError, File, GRACE_SECONDS_MAX, Reclaim, Settings, merge};
use crate::cluster::state::LONE_NAME;
use crate::export::Sources;

/// What `serve` needs to know.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// What is the same for all services, and what the one service has if there are no others.
    pub settings: Settings,
    /// The cluster; none if this node is alone.
    pub cluster: Option<ClusterConfig>,
    /// The services, in the order of the file.
    pub services: Vec<ServiceConfig>,
    /// Where all of it was read.
    pub origin: Option<ConfigOrigin>,
}

/// What a configuration was made of.
#[derive(Debug, Clone)]
pub struct ConfigOrigin {
    /// What the command line said.
    pub line: File,
    /// The file.
    pub path: PathBuf,
}

impl NodeConfig {
    /// The same with what the file says now. Waits for the disk.
    ///
    /// # Errors
    /// Mistakes in the file.
    pub fn read_again(&self) -> Result<Self, ConfigError> {
        match &self.origin {
            Some(ConfigOrigin { line, path }) => plan(line.clone(), File::read(path)?),
            None => Ok(self.clone()),
        }
    }

    /// Whether this node only votes.
    pub fn is_witness(&self) -> bool {
        self.cluster.as_ref().is_some_and(ClusterConfig::is_witness)
    }

    /// The services by name, with where each finds its exports.
    pub fn export_lists(&self) -> Vec<(&str, &Sources)> {
        let services = self.services.iter();
        services
            .map(|service| (service.name.as_str(), &service.settings.sources))
            .collect()
    }

    /// What people call this node.
    pub fn node_name(&self) -> &str {
        self.cluster
            .as_ref()
            .map_or("this node", |cluster| &cluster.node)
    }
}

/// The members of a cluster, and how they know each other.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// Which member this node is.
    pub node: String,
    /// The key that all members share.
    pub key_file: PathBuf,
    /// All members, by name.
    pub members: Vec<MemberConfig>,
    /// How long a node may serve after it has renewed its lease.
    pub lease_ms: u32,
}

impl ClusterConfig {
    /// The member that this node is.
    pub fn own(&self) -> Option<&MemberConfig> {
        self.members.iter().find(|one| one.name == self.node)
    }

    /// Whether this node only votes.
    fn is_witness(&self) -> bool {
        self.own().is_some_and(|own| own.witness)
    }
}

/// A member of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberConfig {
    /// Its name.
    pub name: String,
    /// Where the others reach it.
    pub address: SocketAddr,
    /// Whether it only votes.
    #[serde(default)]
    pub witness: bool,
}

/// A service.
#[derive(Debug, Clone)]
pub struct ServiceConfig {
    /// What operators call it.
    pub name: String,
    /// What keeps a node that lost it from writing; none without a cluster.
    pub storage: Option<Storage>,
    /// Addresses, ports, exports, names.
    pub settings: Settings,
    /// The node that should serve it if all is well.
    pub preferred: Option<String>,
    /// The commands that are run for its storage.
    pub hooks: Hooks,
    /// How long its storage may take to answer; none if nobody asks it.
    pub storage_time_max: Option<Duration>,
    /// For how long the preferred node must live before the service goes back to it; none if it
    /// stays where it is.
    pub fail_back: Option<Duration>,
}

/// `[cluster]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFile {
    key_file: PathBuf,
    lease_ms: Option<u32>,
    #[serde(default)]
    member: Vec<MemberConfig>,
}

/// `[[service]]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceFile {
    name: String,
    #[serde(default)]
    names: Vec<String>,
    #[serde(default)]
    addresses: Vec<String>,
    address_mode: Option<AddressMode>,
    interface: Option<String>,
    #[serde(default)]
    exports: Vec<String>,
    exports_file: Option<PathBuf>,
    storage: Option<Storage>,
    preferred: Option<String>,
    announce: Option<Announce>,
    grace_seconds: Option<u64>,
    reclaim: Option<Reclaim>,
    fence_command: Option<Vec<String>>,
    takeover_command: Option<Vec<String>>,
    release_command: Option<Vec<String>>,
    hook_seconds: Option<u64>,
    storage_seconds: Option<u64>,
    failback: Option<FailBackMode>,
    failback_seconds: Option<u64>,
}

/// How the addresses of a service come to its active node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum AddressMode {
    /// They are there already: loopback, or behind a load balancer.
    Fixed,
    /// They come and go with the service.
    Managed,
}

/// Whether a service goes back to its preferred node by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FailBackMode {
    /// It stays where it is until that node is lost, or an operator moves it.
    Never,
    /// When that node has lived for a while.
    Auto,
}

/// What keeps a node that lost a service from writing to its storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Storage {
    /// A cluster file system, which has a fence of its own.
    ClusterFs,
    /// Something below decides which node may write, as DRBD with quorum does.
    Arbitrated,
    /// Nothing: a fence command must succeed before another node opens it.
    Fence,
}

/// Makes the configuration of what the command line says and, where it says nothing, the file.
///
/// # Errors
/// What makes no sense, with its line if the file says it.
pub fn plan(line: File, mut file: File) -> Result<NodeConfig, ConfigError> {
    let places = std::mem::take(&mut file.places);
    plan_unplaced(line, file).map_err(|error| places.placed(error))
}

fn plan_unplaced(line: File, mut file: File) -> Result<NodeConfig, ConfigError> {
    let (node, cluster) = (file.node.take(), file.cluster.take());
    let services = std::mem::take(&mut file.service);
    let is_own = line.export.is_empty() && line.exports_file.is_none();
    let has_own = !file.export.is_empty() || file.exports_file.is_some() || !is_own;
    let settings = merge(line, file)?;
    let cluster = match (node, cluster) {
        (_, None) => None,
        (None, Some(_)) => {
            return Err(wrong(
                "node",
                "",
                "is missing: it says which member this node is",
            ));
        }
        (Some(node), Some(cluster)) => Some(check_cluster(node, cluster)?),
    };
    // It serves nothing, whatever the file says for the others.
    if cluster.as_ref().is_some_and(ClusterConfig::is_witness) {
        return Ok(NodeConfig {
            settings,
            cluster,
            services: Vec::new(),
            origin: None,
        });
    }
    if services.is_empty() {
        if cluster.is_some() {
            return Err(wrong(
                "service",
                "",
                "is missing: a cluster serves services",
            ));
        }
        let alone = ServiceConfig {
            name: LONE_NAME.to_owned(),
            storage: None,
            settings: settings.clone(),
            preferred: None,
            hooks: Hooks::default(),
            storage_time_max: None,
            fail_back: None,
        };
        return Ok(NodeConfig {
            settings,
            cluster,
            services: vec![alone],
            origin: None,
        });
    }
    if has_own {
        let problem = "is said outside of [[service]], and each export belongs to one service";
        return Err(wrong("export", "", problem));
    }
    let mut names = BTreeSet::new();
    let mut addresses = BTreeMap::new();
    let mut checked = Vec::new();
    for service in services {
        if !names.insert(service.name.clone()) {
            return Err(wrong("service.name", &service.name, "is there twice"));
        }
        let service = check_service(service, &settings, cluster.as_ref())?;
        for address in &service.settings.listen {
            if let Some(other) = addresses.insert(*address, service.name.clone()) {
                let problem = format!("has {address}, which `{other}` has already");
                return Err(wrong_at("addresses", &service.name, &problem));
            }
        }
        checked.push(service);
    }
    Ok(NodeConfig {
        settings,
        cluster,
        services: checked,
        origin: None,
    })
}

fn check_cluster(node: String, cluster: ClusterFile) -> Result<ClusterConfig, ConfigError> {
    let ClusterFile {
        key_file,
        lease_ms,
        mut member,
    } = cluster;
    member.sort_by(|a, b| a.name.cmp(&b.name));
    for pair in member.windows(2) {
        if let [one, other] = pair
            && one.name == other.name
        {
            return Err(wrong("cluster.member.name", &one.name, "is there twice"));
        }
    }
    for one in &member {
        check_name("cluster.member.name", &one.name)?;
        if one.address.port() == 0 || one.address.ip().is_unspecified() {
            let address = one.address.to_string();
            let problem = "is no address that others can reach";
            return Err(wrong("cluster.member.address", &address, problem));
        }
    }
    if !member.iter().any(|one| one.name == node) {
        return Err(wrong("node", &node, "is no [[cluster.member]]"));
    }
    if member.iter().all(|one| one.witness) {
        return Err(wrong(
            "cluster.member",
            "",
            "are all witnesses, which serve nothing",
        ));
    }
    let lease_ms = lease_ms.unwrap_or(LEASE_MS_DEFAULT);
    if !(LEASE_MS_MIN..=LEASE_MS_MAX).contains(&lease_ms) {
        let problem = "is not from 1000 to 60000";
        return Err(wrong("cluster.lease_ms", &lease_ms.to_string(), problem));
    }
    Ok(ClusterConfig {
        node,
        key_file,
        members: member,
        lease_ms,
    })
}

fn check_service(
    service: ServiceFile,
    common: &Settings,
    cluster: Option<&ClusterConfig>,
) -> Result<ServiceConfig, ConfigError> {
    let ServiceFile {
        name,
        names,
        addresses,
        address_mode,
        interface,
        exports,
        exports_file,
        storage,
        preferred,
        announce,
        grace_seconds,
        reclaim,
        fence_command,
        takeover_command,
        release_command,
        hook_seconds,
        storage_seconds,
        failback,
        failback_seconds,
    } = service;
    check_name("service.name", &name)?;
    for other in &names {
        nsm_name::judge(other.as_bytes())
            .map_err(|problem| wrong("service.names", other, &format!("is no name: {problem}")))?;
    }
    let (listen, floating) = check_addresses(&name, &addresses, address_mode, interface)?;
    if exports.is_empty() && exports_file.is_none() {
        return Err(wrong(
            "service",
            &name,
            "exports nothing: say exports or exports_file",
        ));
    }
    // As in an export list, where a blank is between them; here it would be part of the path.
    if let Some(export) = exports.iter().find(|export| is_line_of_list(export)) {
        let problem = "has a colon between the directory and its clients, as in /srv/data:*(rw)";
        return Err(wrong("service.exports", export, problem));
    }
    let need = match (cluster, storage) {
        (Some(_), None) => {
            let problem = "does not say what keeps a node that lost it from writing: storage = \
                           \"cluster-fs\", \"arbitrated\" or \"fence\"";
            return Err(wrong("service", &name, problem));
        }
        (None, _) => FenceNeed::Alone,
        (Some(_), Some(Storage::Fence)) => FenceNeed::Needed,
        (Some(_), Some(Storage::ClusterFs | Storage::Arbitrated)) => FenceNeed::Arbitrated,
    };
    let keys = HookKeys {
        fence_command,
        takeover_command,
        release_command,
        hook_seconds,
    };
    let hooks = keys
        .check(need)
        .map_err(|(key, problem)| wrong_at(key, &name, &problem))?;
    if let (Some(preferred), Some(cluster)) = (&preferred, cluster) {
        let mut members = cluster.members.iter();
        if !members.any(|one| one.name == *preferred && !one.witness) {
            return Err(wrong(
                "service.preferred",
                preferred,
                "is no member with data",
            ));
        }
    }
    let fail_back = check_fail_back(failback, failback_seconds, preferred.is_some(), cluster)
        .map_err(|(key, problem)| wrong_at(key, &name, &problem))?;
    if grace_seconds.is_some_and(|seconds| seconds > GRACE_SECONDS_MAX) {
        let problem = format!("has a grace_seconds of more than {GRACE_SECONDS_MAX}");
        return Err(wrong_at("grace_seconds", &name, &problem));
    }
    let storage_time_max = match (cluster, storage_seconds) {
        // There is no other node that it could be given to.
        (None, None) | (_, Some(0)) => None,
        (None, Some(_)) => {
            let problem = "has storage_seconds, but without [cluster] there is no other node to \
                           give it to: remove it";
            return Err(wrong("service", &name, problem));
        }
        (Some(_), seconds) => Some(seconds.unwrap_or(STORAGE_SECONDS_DEFAULT)),
    };
    if storage_time_max.is_some_and(|seconds| seconds > STORAGE_SECONDS_MAX) {
        let problem = format!(
            "has a storage_seconds of more than {STORAGE_SECONDS_MAX} (0: its storage is not asked)"
        );
        return Err(wrong("service", &name, &problem));
    }
    let sources = Sources {
        arguments: exports.into_iter().map(String::into_bytes).collect(),
        file: exports_file,
        directory: None,
    };
    let settings = Settings {
        sources,
        listen,
        floating,
        service_names: if names.is_empty() {
            vec![name.clone()]
        } else {
            names
        },
        announce: announce.unwrap_or(common.announce),
        grace: grace_seconds.map_or(common.grace, Duration::from_secs),
        reclaim: reclaim.unwrap_or(common.reclaim),
        ..common.clone()
    };
    Ok(ServiceConfig {
        name,
        storage: storage.filter(|_| cluster.is_some()),
        settings,
        preferred,
        hooks,
        storage_time_max: storage_time_max.map(Duration::from_secs),
        fail_back,
    })
}

/// For how long the preferred node must live before a service goes back to it, if it ever does; or
/// the key that makes no sense, and why.
fn check_fail_back(
    mode: Option<FailBackMode>,
    seconds: Option<u64>,
    has_preferred: bool,
    cluster: Option<&ClusterConfig>,
) -> Result<Option<Duration>, (&'static str, String)> {
    let range = 1..=FAILBACK_SECONDS_MAX;
    let (key, problem) = match (mode.unwrap_or(FailBackMode::Never), seconds) {
        (FailBackMode::Never, None) => return Ok(None),
        (FailBackMode::Never, Some(_)) => (
            "failback_seconds",
            "has failback_seconds, which are for failback = \"auto\": say that, or remove them",
        ),
        (FailBackMode::Auto, _) if cluster.is_none() => (
            "failback",
            "has failback = \"auto\", but without [cluster] there is no other node: remove it",
        ),
        (FailBackMode::Auto, _) if !has_preferred => (
            "failback",
            "has failback = \"auto\" and no preferred node to go back to: say preferred = \"NODE\"",
        ),
        (FailBackMode::Auto, Some(seconds)) if !range.contains(&seconds) => {
            let problem = format!(
                "has failback_seconds = {seconds}, which is not from 1 to {FAILBACK_SECONDS_MAX}"
            );
            return Err(("failback_seconds", problem));
        }
        (FailBackMode::Auto, seconds) => {
            let seconds = seconds.unwrap_or(FAILBACK_SECONDS_DEFAULT);
            return Ok(Some(Duration::from_secs(seconds)));
        }
    };
    Err((key, problem.to_owned()))
}

/// Whether it can be the name of a network interface.
fn is_interface(name: &str) -> bool {
    let is_good = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '"' | '=' | '\\');
    (1..=INTERFACE_BYTES_MAX).contains(&name.len()) && name.chars().all(is_good)
}

/// Whether an export is written as a line of an export list.
fn is_line_of_list(export: &str) -> bool {
    let directory = export.split_once('(').map_or("", |(before, _)| before);
    !directory.contains(':') && directory.contains(char::is_whitespace)
}

/// Where a service is reached, and how these addresses come to its active node.
fn check_addresses(
    service: &str,
    addresses: &[String],
    mode: Option<AddressMode>,
    interface: Option<String>,
) -> Result<(Vec<IpAddr>, Option<FloatingConfig>), ConfigError> {
    let wrong_here = |problem: &str| Err(wrong_at("addresses", service, problem));
    if addresses.is_empty() {
        return wrong_here("has no addresses: clients reach a service by its own address");
    }
    let mut written = Vec::new();
    for address in addresses {
        let one: WrittenAddress = address.parse().map_err(|problem: NoAddress| {
            wrong("service.addresses", address, &problem.to_string())
        })?;
        written.push(one);
    }
    let listen = written.iter().map(|one| one.ip).collect();
    let mode = mode.unwrap_or(if interface.is_some() {
        AddressMode::Managed
    } else {
        AddressMode::Fixed
    });
    let any_prefix = written.iter().any(|one| one.prefix.is_some());
    match (mode, interface) {
        (AddressMode::Fixed, None) if !any_prefix => Ok((listen, None)),
        (AddressMode::Fixed, None) => wrong_here(
            "has an address with a prefix, which is for addresses that move along: say on which \
             interface they go (interface = \"eth0\")",
        ),
        (AddressMode::Fixed, Some(_)) => {
            wrong_here("has fixed addresses and an interface, which is for those that move along")
        }
        (AddressMode::Managed, None) => {
            wrong_here("does not say on which interface its addresses go (interface = \"eth0\")")
        }
        (AddressMode::Managed, Some(interface)) => {
            if !is_interface(&interface) {
                return Err(wrong("service.interface", &interface, "is no interface"));
            }
            let mut floating = Vec::new();
            for WrittenAddress { ip, prefix } in written {
                let Some(prefix) = prefix else {
                    let problem = format!("has {ip} without a prefix, as in {ip}/24");
                    return wrong_here(&problem);
                };
                floating.push(FloatingAddress { ip, prefix });
            }
            let addresses = floating;
            let floating = FloatingConfig {
                interface,
                addresses,
            };
            Ok((listen, Some(floating)))
        }
    }
}

/// A name that operators type and that names a folder.
fn check_name(key: &'static str, name: &str) -> Result<(), ConfigError> {
    let is_good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(is_good) {
        let problem = "is no name: up to 64 letters, digits, `-`, `_` and `.`";
        return Err(wrong(key, name, problem));
    }
    if name.starts_with('.') {
        return Err(wrong(key, name, "begins with a dot"));
    }
    Ok(())
}

fn wrong(name: &'static str, value: &str, problem: &str) -> ConfigError {
    ConfigError::Value {
        name,
        value: value.to_owned(),
        problem: problem.to_owned(),
        within: None,
    }
}

/// The same of a service as a whole, whose line is that of a key of it.
fn wrong_at(key: &'static str, service: &str, problem: &str) -> ConfigError {
    ConfigError::Value {
        name: "service",
        value: service.to_owned(),
        problem: problem.to_owned(),
        within: Some(key),
    }
}

/// How long a node may serve after it has renewed its lease, unless configured otherwise.
pub const LEASE_MS_DEFAULT: u32 = 1200;
/// Below this an election of a leader, which takes up to 0.7 s, could end the leases of all.
const LEASE_MS_MIN: u32 = 1000;
const LEASE_MS_MAX: u32 = 60_000;
/// Longer than a disk that works lets anybody wait, also a busy one.
const STORAGE_SECONDS_DEFAULT: u64 = 10;
const STORAGE_SECONDS_MAX: u64 = 600;
/// How long a preferred node must live before a service goes back to it.
const FAILBACK_SECONDS_DEFAULT: u64 = 60;
/// A week.
const FAILBACK_SECONDS_MAX: u64 = 604_800;
const NAME_BYTES_MAX: usize = 64;
/// What the kernel allows.
const INTERFACE_BYTES_MAX: usize = 15;

#[cfg(test)]
mod tests;
