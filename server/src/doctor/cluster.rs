//! What a member of a cluster needs on its machine: the key, its own address, the commands of its
//! services, their interfaces and addresses.
//!
//! `config check` tells of the key and the commands with the same words, and of nothing else here:
//! it does not look at the network.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;

use rustix::fs::{Access, access};

use super::Report;
use super::rights::effective_capabilities;
use super::server::Running;
use crate::config::cluster::{ClusterConfig, NodeConfig};
use crate::config::service::ServiceConfig;
use crate::raft;

/// Looks at all of it.
pub(super) fn look(report: &mut Report, config: &NodeConfig, running: Option<&Running>) {
    let Some(cluster) = &config.cluster else {
        for service in &config.services {
            look_at_commands(report, service, true);
        }
        return;
    };
    look_at_key(report, cluster);
    look_at_member(report, cluster);
    for service in &config.services {
        look_at_commands(report, service, true);
        look_at_addresses(report, service, running);
    }
    if config
        .services
        .iter()
        .any(|service| service.settings.floating.is_some())
    {
        look_at_rights(report);
    }
}

/// Whether the key is there, and nobody else's.
pub(super) fn look_at_key(report: &mut Report, cluster: &ClusterConfig) {
    let path = &cluster.key_file;
    match raft::check_key_file(path) {
        Ok(()) => report.ok(
            "key",
            format!(
                "cluster key `{}`: only its owner may read it",
                path.display()
            ),
        ),
        Err(problem) => {
            let (text, hint) = problem.split_once("\nhint: ").unwrap_or((&problem, ""));
            report.error("key", text, hint);
        }
    }
}

/// Whether the commands of a service can be run. Where it is not to be served (`is_here`), and for
/// the one that may lie on what is mounted before it, that they can't be is a warning.
pub(super) fn look_at_commands(report: &mut Report, service: &ServiceConfig, is_here: bool) {
    let (topic, name) = ("commands", &service.name);
    let seconds = service.hooks.time_max.as_secs();
    for (key, command) in service.hooks.all() {
        let program = &command.program;
        let shown = program.display();
        match runs(program) {
            Ok(()) => {
                let words = [shown.to_string()].into_iter();
                let words: Vec<String> = words.chain(command.arguments.clone()).collect();
                let words = words.join(" ");
                report.ok(
                    topic,
                    format!("`{name}`: {key} `{words}`, {seconds} s at most"),
                );
            }
            Err(problem) => {
                let text = format!("`{name}`: the {key} `{shown}` can't be run now: {problem}");
                let hint = "install it on every node with data, with mode 0755";
                if is_here && key != "release_command" {
                    report.error(topic, text, hint);
                } else {
                    report.warning(topic, text, hint);
                }
            }
        }
    }
}

fn runs(program: &Path) -> Result<(), String> {
    match std::fs::metadata(program) {
        Ok(found) if !found.is_file() => return Err("it is no file".to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err("there is no such file".to_owned());
        }
        Err(error) => return Err(error.to_string()),
    }
    access(program, Access::EXEC_OK).map_err(|errno| errno.to_string())
}

fn look_at_member(report: &mut Report, cluster: &ClusterConfig) {
    let topic = "members";
    let Some(own) = cluster.own() else {
        return;
    };
    let (node, address) = (&own.name, own.address);
    if is_own(address.ip()) {
        report.ok(
            topic,
            format!("{address}, where others reach `{node}`, is an address of this machine"),
        );
    } else {
        report.error(
            topic,
            format!("{address}, where others reach `{node}`, is no address of this machine"),
            "correct `node`, or the address of the [[cluster.member]]; add the address if it is \
             missing",
        );
    }
    for other in &cluster.members {
        if other.name != own.name && is_own(other.address.ip()) && !other.address.ip().is_loopback()
        {
            report.error(
                topic,
                format!(
                    "{}, the address of member `{}`, is one of this machine",
                    other.address, other.name
                ),
                "each member has a machine and an address of its own",
            );
        }
    }
}

fn look_at_addresses(report: &mut Report, service: &ServiceConfig, running: Option<&Running>) {
    let (topic, name) = ("addresses", &service.name);
    let Some(floating) = &service.settings.floating else {
        for address in &service.settings.listen {
            if is_own(*address) {
                report.ok(
                    topic,
                    format!("`{name}`: {address} is there, as it has to be"),
                );
            } else {
                report.error(
                    topic,
                    format!("`{name}`: the fixed address {address} is none of this machine"),
                    "add it on every node (to `lo`, behind a load balancer), or have it move along: \
                     interface = \"eth0\"",
                );
            }
        }
        return;
    };
    let interface = &floating.interface;
    if Path::new("/sys/class/net").join(interface).exists() {
        report.ok(topic, format!("`{name}`: interface {interface} is there"));
    } else {
        report.error(
            topic,
            format!("`{name}`: this machine has no interface {interface}"),
            "see `ip link` for those that it has; the name may differ from node to node",
        );
    }
    for address in &floating.addresses {
        let ip = address.ip;
        match (is_own(ip), running) {
            (false, _) => report.ok(topic, format!("`{name}`: {ip} is not on this machine now")),
            (true, Some(_)) => report.ok(
                topic,
                format!("`{name}`: {ip} is on this machine, as the havenfs that runs may want it"),
            ),
            (true, None) => report.error(
                topic,
                format!("`{name}`: {ip} is on this machine, and no havenfs runs that put it there"),
                format!("`ip address del {address} dev {interface}`, and see what else adds it"),
            ),
        }
    }
}

fn look_at_rights(report: &mut Report) {
    let Some(effective) = effective_capabilities() else {
        return;
    };
    for (name, bit) in [("CAP_NET_ADMIN", 12), ("CAP_NET_RAW", 13)] {
        if effective & (1 << bit) == 0 {
            report.error(
                "rights",
                format!("lacks {name}: it can't bring addresses to this node"),
                "run as root, or allow it: `CapabilityBoundingSet=` of the systemd unit",
            );
        }
    }
}

/// Whether an address is one of this machine. The port is the kernel's choice, and is closed at
/// once.
fn is_own(address: IpAddr) -> bool {
    UdpSocket::bind(SocketAddr::new(address, 0)).is_ok()
}
