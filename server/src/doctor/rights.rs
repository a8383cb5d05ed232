//! What this process may do, and what each right that it lacks costs.

use std::fs;

use rustix::process::{Resource, getrlimit};

use super::Report;
use crate::backend::credential;
use crate::config::Settings;
use crate::net::limits::CONNECTIONS_MAX;
use crate::register::PortmapMode;

/// Descriptors that allow every connection and a large cache of opened files.
const DESCRIPTORS_WANTED: u64 = 65_536;
/// Descriptors that are enough for an office.
const DESCRIPTORS_ENOUGH: u64 = 4096;

/// A right that the file service uses.
struct Right {
    name: &'static str,
    /// Its bit in the kernel's sets.
    bit: u32,
    /// What does not work without it.
    cost: &'static str,
}

/// Source: linux/capability.h for the numbers; `backend` for the uses. Those from CAP_CHOWN on
/// concern only callers who are root here, since the kernel takes them from every other caller.
const RIGHTS: [Right; 9] = [
    Right {
        name: "CAP_SETUID",
        bit: 7,
        cost: "calls can't run as their callers: all files belong to the server's own user",
    },
    Right {
        name: "CAP_SETGID",
        bit: 6,
        cost: "calls can't run as their callers: all files belong to the server's own user",
    },
    Right {
        name: "CAP_DAC_READ_SEARCH",
        bit: 2,
        cost: "kernel file handles can't be opened: the handle table in the state directory stands \
               in, and files that are moved locally go stale",
    },
    Right {
        name: "CAP_DAC_OVERRIDE",
        bit: 1,
        cost: "files that root's own permission bits don't cover can't be read or written, \
               whatever rights their owners have",
    },
    Right {
        name: "CAP_SYS_ADMIN",
        bit: 21,
        cost: "a directory that something is mounted on can't be shown as it is underneath; \
               exports with crossmnt don't need that",
    },
    Right {
        name: "CAP_CHOWN",
        bit: 0,
        cost: "clients' root users (no_root_squash) can't give files away",
    },
    Right {
        name: "CAP_FOWNER",
        bit: 3,
        cost: "a write that must take a file's set-id bits away fails; clients' root users can't \
               change modes of others' files",
    },
    Right {
        name: "CAP_FSETID",
        bit: 4,
        cost: "clients' root users lose set-group-id bits of files in foreign groups",
    },
    Right {
        name: "CAP_MKNOD",
        bit: 27,
        cost: "clients' root users (no_root_squash) can't make device files",
    },
];

const CAP_NET_BIND_SERVICE: u32 = 10;

/// Looks at identity, capabilities, user namespace and limits.
pub(super) fn look(report: &mut Report, settings: &Settings) {
    let effective = effective_capabilities();
    let own_namespace = !is_whole_map(fs::read_to_string("/proc/self/uid_map").ok().as_deref());
    look_at_identity(report, own_namespace);
    look_at_capabilities(report, settings, effective);
    look_at_descriptors(report);
}

fn look_at_identity(report: &mut Report, own_namespace: bool) {
    let topic = "rights";
    let uid = rustix::process::geteuid();
    if credential::can_switch() {
        report.ok(topic, "runs as root: every call runs as its caller");
    } else {
        report.warning(
            topic,
            format!(
                "can't take on callers' identities: every call runs as user {}, and all files \
                 belong to that user",
                uid.as_raw()
            ),
            "fine for one user's own files; else run as root with CAP_SETUID and CAP_SETGID",
        );
    }
    if own_namespace {
        report.warning(
            topic,
            "runs in a user namespace: most kernels open no file handles here, and callers whose \
             ids are not mapped are refused",
            "look at /proc/self/uid_map for the ids that are mapped; run outside of the namespace \
             if others are needed",
        );
    }
}

fn look_at_capabilities(report: &mut Report, settings: &Settings, effective: Option<u64>) {
    let topic = "rights";
    let Some(effective) = effective else {
        report.warning(
            topic,
            "capabilities are unknown: /proc/self/status can't be read",
            "mount /proc",
        );
        return;
    };
    let has = |bit: u32| effective & (1 << bit) != 0;
    let needs_low_ports = [settings.nfs_port, settings.mount_port, settings.nsm_port]
        .iter()
        .any(|port| (1..1024).contains(port))
        || (settings.portmap_port < 1024 && settings.portmap != PortmapMode::Off);
    let mut lacks: Vec<(&str, &str)> = RIGHTS
        .iter()
        .filter(|right| !has(right.bit))
        .map(|right| (right.name, right.cost))
        .collect();
    if needs_low_ports && !has(CAP_NET_BIND_SERVICE) {
        lacks.push((
            "CAP_NET_BIND_SERVICE",
            "ports below 1024 can't be bound (portmapper 111, NSM 662), and rpcbind can't be asked \
             from a reserved port",
        ));
    }
    if lacks.is_empty() {
        report.ok(topic, "has every capability that the file service uses");
        return;
    }
    if !rustix::process::geteuid().is_root() && effective == 0 {
        // What each of them is for makes no difference to a user without any.
        report.warning(
            topic,
            "has no capabilities: a handle table in the state directory stands in for the \
             kernel's handles (files that are moved locally go stale), and ports below 1024 are \
             out of reach",
            "fine for one user's own files; else run as root",
        );
        return;
    }
    for (name, cost) in lacks {
        let short = name.trim_start_matches("CAP_");
        report.warning(
            topic,
            format!("lacks {name}: {cost}"),
            format!(
                "allow it: `CapabilityBoundingSet=` of the systemd unit, `--cap-add {short}` of \
                 the container"
            ),
        );
    }
}

/// The effective capabilities of this process, if the kernel says them.
pub(super) fn effective_capabilities() -> Option<u64> {
    effective_set(&fs::read_to_string("/proc/self/status").ok()?)
}

/// The effective capabilities in the text of `/proc/self/status`.
fn effective_set(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// Whether a map of user ids is the initial namespace's, which maps every id to itself.
fn is_whole_map(map: Option<&str>) -> bool {
    let Some(map) = map else {
        // A kernel without user namespaces has no such file.
        return true;
    };
    let words: Vec<&str> = map.split_whitespace().collect();
    words == ["0", "0", "4294967295"]
}

fn look_at_descriptors(report: &mut Report) {
    let topic = "limits";
    // `serve` raises its own limit to the hard one; no limit at all counts as what Linux allows.
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(1 << 20);
    let connections = (hard / 3).min(CONNECTIONS_MAX as u64);
    let files = (hard / 6).clamp(64, 65_536);
    let text = format!(
        "{hard} descriptors may be open: {connections} connections, {files} files in the cache"
    );
    if hard >= DESCRIPTORS_ENOUGH {
        report.ok(topic, text);
    } else {
        report.warning(
            topic,
            text,
            format!("raise the hard limit: `LimitNOFILE={DESCRIPTORS_WANTED}` or `ulimit -Hn`"),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_set_is_read_from_its_line() {
        let status = "Name:\tx\nCapPrm:\tffffffffffffffff\nCapEff:\t0000000000000404\n";
        assert_eq!(effective_set(status), Some(0x404));
        assert_eq!(effective_set("CapEff:\tnothing\n"), None);
        assert_eq!(effective_set(""), None);
    }

    #[test]
    fn only_a_whole_map_is_the_initial_namespace() {
        assert!(is_whole_map(Some("         0          0 4294967295\n")));
        assert!(!is_whole_map(Some("0 1000 1\n")));
        assert!(!is_whole_map(Some("")));
        assert!(is_whole_map(None));
    }
}
