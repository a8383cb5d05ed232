//! What a configuration means, in words: `havenfs config check`.
//!
//! Owns the words for what `serve` will do with a configuration that it accepts, and the warnings
//! about what works and will surprise. Contacts nobody and changes nothing; of this machine it
//! looks at no more than its name, the files that the configuration names, and where they lie.
//! What depends on the machine, such as who holds a port, is the rest of the doctor's.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use super::{Report, cluster, storage, tell};
use crate::cluster::lease::margin;
use crate::config::cluster::{ClusterConfig, NodeConfig};
use crate::config::service::{ServiceConfig, Storage};
use crate::config::{Announce, Settings};
use crate::export;
use crate::register::PortmapMode;
use crate::volumes;

/// Says what `serve` will do. `host_name`: what this machine calls itself.
pub fn explain(config: &NodeConfig, host_name: &str) -> Report {
    let mut report = Report::default();
    match &config.cluster {
        Some(cluster) => {
            tell_node(&mut report, cluster, host_name);
            tell_voters(&mut report, cluster);
            cluster::look_at_key(&mut report, cluster);
            tell_lease(&mut report, cluster);
        }
        None => report.ok(
            "node",
            "this server is alone: nobody takes over from it. A cluster has a [cluster]",
        ),
    }
    // Mistakes in a list are told with its service.
    let lists = config.export_lists().into_iter();
    let lists: Vec<_> = lists
        .filter_map(|(name, sources)| Some((name, export::load(sources).ok()?.specs)))
        .collect();
    let lists: Vec<_> = lists
        .iter()
        .map(|(name, list)| (*name, &list[..]))
        .collect();
    if let Err(error) = volumes::check_overlap(&lists) {
        let text = error.to_string();
        let (text, hint) = text.split_once("\nhint: ").unwrap_or((&text, ""));
        report.error("service", text, hint);
    }
    for service in &config.services {
        tell_service(&mut report, config, service);
    }
    tell_ports(&mut report, config);
    tell_state(&mut report, config);
    report
}

fn tell_node(report: &mut Report, cluster: &ClusterConfig, host_name: &str) {
    let topic = "node";
    let own = cluster.own();
    let address = own.map_or_else(String::new, |own| format!(" at {}", own.address));
    let node = &cluster.node;
    let what = if own.is_some_and(|own| own.witness) {
        ": a witness, which votes and serves nothing"
    } else {
        ""
    };
    report.ok(topic, format!("this node is `{node}`{address}{what}"));
    let is_called = |name: &str| {
        let short = host_name.split('.').next().unwrap_or_default();
        [host_name, short].contains(&name)
    };
    if cluster.members.iter().any(|one| is_called(&one.name)) {
        if !is_called(node) {
            report.warning(
                topic,
                format!(
                    "this machine is called `{host_name}`, which is another member than `{node}`"
                ),
                "if this is the file of another node, correct `node`",
            );
        }
    } else {
        report.warning(
            topic,
            format!("this machine is called `{host_name}`, which is the name of no member"),
            "fine, if whoever reads the logs can tell which machine is which member",
        );
    }
    if cluster.members.iter().filter(|one| !one.witness).count() < 2 {
        report.warning(
            topic,
            "only one member has data: no other node can take its services",
            "add a node that sees the same data",
        );
    }
}

fn tell_voters(report: &mut Report, cluster: &ClusterConfig) {
    let topic = "voters";
    let names = cluster.members.iter().map(|one| {
        if one.witness {
            format!("{} (witness)", one.name)
        } else {
            one.name.clone()
        }
    });
    let names = names.collect::<Vec<_>>().join(", ");
    let count = cluster.members.len();
    let majority = count / 2 + 1;
    let lost = match count - majority {
        0 => "none may be lost".to_owned(),
        1 => "one may be lost".to_owned(),
        more => format!("{more} may be lost"),
    };
    let text = format!("{names}: {majority} of {count} must live, so {lost}");
    match count {
        1 => report.warning(
            topic,
            text,
            "add members: a cluster of one takes nothing over",
        ),
        2 => report.warning(
            topic,
            format!("{text}: without either of the two nobody serves"),
            "add a witness, a small machine that only votes: `witness = true`",
        ),
        even if even.is_multiple_of(2) => report.warning(
            topic,
            text,
            format!(
                "no more than of {} members; add a witness, or remove one",
                even - 1
            ),
        ),
        _ => report.ok(topic, text),
    }
}

fn tell_lease(report: &mut Report, cluster: &ClusterConfig) {
    let lease = Duration::from_millis(cluster.lease_ms.into());
    let wait = lease + margin(cluster.lease_ms);
    report.ok(
        "lease",
        format!(
            "a node that is cut off falls silent within {}, and others take its services after {}",
            seconds(lease),
            seconds(wait)
        ),
    );
}

fn tell_service(report: &mut Report, config: &NodeConfig, service: &ServiceConfig) {
    if config.cluster.is_some() || service.settings.listen != config.settings.listen {
        tell_names(report, service);
        tell_addresses(report, config, service);
    }
    tell_exports(report, service);
    tell_storage(report, config, service);
    cluster::look_at_commands(report, service, false);
    if let Some(cluster) = &config.cluster {
        tell_takeover(report, cluster, service);
        tell_place(report, service);
    }
    tell_restart(report, service);
}

fn tell_names(report: &mut Report, service: &ServiceConfig) {
    let name = &service.name;
    let names = &service.settings.service_names;
    if names == std::slice::from_ref(name) {
        report.warning(
            "service",
            format!(
                "`{name}` has no names: clients that mount from another name than `{name}` or its \
                 addresses don't hear of a takeover"
            ),
            "names = [\"nfs.example.org\"], all that clients mount from",
        );
    } else {
        let names = names.join(", ");
        report.ok("service", format!("`{name}`: clients mount from {names}"));
    }
}

fn tell_addresses(report: &mut Report, config: &NodeConfig, service: &ServiceConfig) {
    let (topic, name) = ("addresses", &service.name);
    match &service.settings.floating {
        Some(floating) => {
            let addresses: Vec<String> =
                floating.addresses.iter().map(ToString::to_string).collect();
            report.ok(
                topic,
                format!(
                    "`{name}`: {} on {}: come and go with the service, and nothing else may put \
                     them there",
                    addresses.join(", "),
                    floating.interface
                ),
            );
        }
        None => report.ok(
            topic,
            format!(
                "`{name}`: {}: fixed, so all nodes have them already, or a load balancer brings \
                 clients to the active one",
                list(&service.settings.listen)
            ),
        ),
    }
    let members = config.cluster.iter().flat_map(|cluster| &cluster.members);
    for member in members {
        let own = member.address.ip();
        if service.settings.listen.contains(&own) && service.settings.floating.is_some() {
            report.error(
                topic,
                format!(
                    "`{name}`: {own} is the address of member `{}`, which keeps it",
                    member.name
                ),
                "give the service an address of its own",
            );
        }
    }
}

fn tell_exports(report: &mut Report, service: &ServiceConfig) {
    let (topic, name) = ("exports", &service.name);
    match export::load(&service.settings.sources) {
        Ok(loaded) => {
            for problem in &loaded.warnings {
                tell_problem(report, name, problem);
            }
            if loaded.specs.is_empty() {
                report.error(
                    topic,
                    format!("`{name}` exports nothing"),
                    "name directories: exports = [\"/srv/data:192.0.2.0/24(rw)\"]",
                );
                return;
            }
            let mut text = format!("`{name}`:");
            for line in loaded.describe().lines().filter(|line| !line.is_empty()) {
                // Writing to a string can't fail.
                let _ = write!(text, "\n{}", line.replace(ARGUMENT, ENTRY));
            }
            report.ok(topic, text);
        }
        Err(errors) => {
            for problem in &errors.0 {
                tell_problem(report, name, problem);
            }
        }
    }
}

fn tell_problem(report: &mut Report, name: &str, problem: &export::Problem) {
    let before = report.findings.len();
    tell(report, problem);
    for told in report.findings.iter_mut().skip(before) {
        told.text = format!("`{name}`: {}", told.text.replace(ARGUMENT, ENTRY));
    }
}

fn tell_storage(report: &mut Report, config: &NodeConfig, service: &ServiceConfig) {
    let (topic, name) = ("storage", &service.name);
    let Some(storage) = service.storage else {
        return;
    };
    report.ok(
        topic,
        format!(
            "`{name}`: a node that lost it is kept from writing by {}",
            match storage {
                Storage::ClusterFs => "the cluster file system (cluster-fs)",
                Storage::Arbitrated => "what lies below the file system (arbitrated)",
                Storage::Fence => "the fence_command, which must succeed before others begin",
            }
        ),
    );
    let hooks = &service.hooks;
    match (storage, &hooks.takeover) {
        (Storage::ClusterFs, Some(_)) => report.warning(
            topic,
            format!(
                "`{name}`: storage = \"cluster-fs\" and a takeover_command: if that mounts a file \
                 system which only one node may have, nothing keeps a lost node from damaging it"
            ),
            "say \"fence\" or \"arbitrated\", unless all nodes may have it mounted at a time",
        ),
        (Storage::Fence, _) if config.services.len() > 1 => {
            let others = config.services.iter().filter(|other| other.name != *name);
            let others: Vec<&str> = others.map(|other| other.name.as_str()).collect();
            report.warning(
                topic,
                format!(
                    "`{name}`: if its fence cuts a node's power, the other services of that node \
                     end as well: {}",
                    others.join(", ")
                ),
                "fence no more than the way to the storage of the service, where that is possible",
            );
        }
        _ => {}
    }
    if hooks.takeover.is_some() && hooks.release.is_none() {
        report.warning(
            topic,
            format!("`{name}`: a takeover_command and no release_command: nothing unmounts it"),
            "say a release_command that undoes what the other one did",
        );
    }
    if hooks.fence.is_some() && hooks.release.is_none() {
        report.warning(
            topic,
            format!(
                "`{name}`: a fence and no release_command: after a move or a stop nothing but \
                     this program keeps the node from writing"
            ),
            "the storage must not be mounted on a node that does not serve it",
        );
    }
}

fn tell_takeover(report: &mut Report, cluster: &ClusterConfig, service: &ServiceConfig) {
    let hooks = &service.hooks;
    let mut parts = vec![
        ("lease", Duration::from_millis(cluster.lease_ms.into())),
        ("margin", margin(cluster.lease_ms)),
    ];
    for (key, _) in hooks.all().filter(|(key, _)| *key != "release_command") {
        parts.push((key, hooks.time_max));
    }
    let most: Duration = parts.iter().map(|(_, most)| *most).sum();
    let parts: Vec<String> = parts
        .iter()
        .map(|(what, most)| format!("{what} {}", seconds(*most)))
        .collect();
    let again = if hooks.fence.is_some() {
        "; a fence that fails is tried again, and the service is down until it succeeds"
    } else {
        ""
    };
    report.ok(
        "takeover",
        format!(
            "`{}`: from a lost node in {} and a moment, at most ({}){again}",
            service.name,
            seconds(most),
            parts.join(", ")
        ),
    );
}

fn tell_place(report: &mut Report, service: &ServiceConfig) {
    let (topic, name) = ("place", &service.name);
    let text = match (&service.preferred, service.fail_back) {
        (None, _) => format!("`{name}` begins on any node, and stays where it is"),
        (Some(preferred), None) => format!(
            "`{name}` begins on {preferred} the first time; it stays where it is (failback = never)"
        ),
        (Some(preferred), Some(after)) => format!(
            "`{name}` begins on {preferred} the first time, and goes back there when {preferred} \
             has lived for {}, unless an operator has put it elsewhere",
            seconds(after)
        ),
    };
    report.ok(topic, text);
}

fn tell_restart(report: &mut Report, service: &ServiceConfig) {
    let settings = &service.settings;
    let announce = match settings.announce {
        Announce::Always => "all hosts with locks hear of a restart or takeover",
        Announce::Auto => "hosts hear of a restart or takeover where they gain by it",
        Announce::Never => "no host hears of a restart or takeover",
    };
    report.ok(
        "restart",
        format!(
            "`{}`: {announce}; where locks may be missing, {} of grace",
            service.name,
            seconds(settings.grace)
        ),
    );
}

fn tell_ports(report: &mut Report, config: &NodeConfig) {
    let Settings {
        nfs_port,
        mount_port,
        nlm_port,
        nsm_port,
        portmap,
        portmap_port,
        ..
    } = &config.settings;
    let mut text = format!("NFS {nfs_port}, MOUNT {mount_port}, NLM {nlm_port}, NSM {nsm_port}");
    // Writing to a string can't fail.
    let _ = match portmap {
        PortmapMode::Off => write!(text, ", no portmapper"),
        _ => write!(text, ", portmapper {portmap_port} ({})", portmap.name()),
    };
    if let Some(own) = config.cluster.as_ref().and_then(ClusterConfig::own) {
        let _ = write!(
            text,
            ", other nodes {}; all nodes must have the same",
            own.address.port()
        );
    }
    report.ok("ports", text);
}

/// The state directory, which clients must not be able to fill or to read.
fn tell_state(report: &mut Report, config: &NodeConfig) {
    let dir = &config.settings.state_dir;
    report.ok("state", format!("kept in `{}`", dir.display()));
    let specs = config.services.iter().filter_map(|service| {
        let loaded = export::load(&service.settings.sources).ok()?;
        Some(loaded.specs)
    });
    let specs: Vec<_> = specs.flatten().collect();
    let place: &Path = storage::existing(dir);
    storage::look_at_neighbours(report, place, dir, &specs);
}

/// How the origin of an export is told that is an argument, and what it is in a service.
const ARGUMENT: &str = "--export #";
const ENTRY: &str = "exports, entry ";

fn list(addresses: &[IpAddr]) -> String {
    let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
    addresses.join(", ")
}

fn seconds(time: Duration) -> String {
    let text = format!("{:.3}", time.as_secs_f64());
    format!("{} s", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests;
