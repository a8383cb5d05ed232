//! A service, as the configuration file says it: `[[service]]`.
//!
//! Owns the keys of one service and what is wrong with them by themselves; that no two services
//! have the same name or address is [`cluster`](super::cluster)'s.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use havenfs_nsm::nsm_name;
use serde::Deserialize;

use super::cluster::{ClusterConfig, check_name, wrong, wrong_at};
use super::floating::{FloatingAddress, FloatingConfig, NoAddress, WrittenAddress};
use super::hooks::{FenceNeed, HookKeys, Hooks};
use super::{Announce, ConfigError, GRACE_SECONDS_MAX, Reclaim, Settings};
use crate::export::Sources;

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

/// `[[service]]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceFile {
    pub(super) name: String,
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

/// Checks one, in what file it may stand.
pub(super) fn check_service(
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

/// Longer than a disk that works lets anybody wait, also a busy one.
const STORAGE_SECONDS_DEFAULT: u64 = 10;
const STORAGE_SECONDS_MAX: u64 = 600;
/// How long a preferred node must live before a service goes back to it.
const FAILBACK_SECONDS_DEFAULT: u64 = 60;
/// A week.
const FAILBACK_SECONDS_MAX: u64 = 604_800;
/// What the kernel allows.
const INTERFACE_BYTES_MAX: usize = 15;
