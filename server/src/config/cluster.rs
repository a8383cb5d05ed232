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
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

use super::hooks::Hooks;
use super::service::{ServiceConfig, check_service};
use super::{ConfigError, File, Settings, merge};
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

/// `[cluster]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFile {
    key_file: PathBuf,
    lease_ms: Option<u32>,
    #[serde(default)]
    member: Vec<MemberConfig>,
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
    let mut addresses = BTreeMap::new();
    for one in &member {
        if let Some(other) = addresses.insert(one.address, &one.name) {
            let problem = format!("is that of two: `{other}` and `{}` both have it", one.name);
            let address = one.address.to_string();
            return Err(wrong("cluster.member.address", &address, &problem));
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

/// A name that operators type and that names a folder.
pub(super) fn check_name(key: &'static str, name: &str) -> Result<(), ConfigError> {
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

pub(super) fn wrong(name: &'static str, value: &str, problem: &str) -> ConfigError {
    ConfigError::Value {
        name,
        value: value.to_owned(),
        problem: problem.to_owned(),
        within: None,
    }
}

/// The same of a service as a whole, whose line is that of a key of it.
pub(super) fn wrong_at(key: &'static str, service: &str, problem: &str) -> ConfigError {
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
const NAME_BYTES_MAX: usize = 64;

#[cfg(test)]
mod tests;
