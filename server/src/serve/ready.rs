//! What `serve` says when it is ready.

use std::io::Write as _;
use std::net::SocketAddr;

use havenfs_rpc::program;

use super::opening::Open;
use super::ports::Numbers;
use crate::backend::credential;
use crate::config::cluster::NodeConfig;
use crate::config::{self, Settings};
use crate::register::Choice;

/// One line with everything a user needs to mount.
pub(super) fn ready_line(open: &Open, settings: &Settings) -> String {
    let (node, choice) = (&open.node, &*open.choice);
    let Numbers {
        nfs,
        mount,
        nlm,
        nsm,
    } = open.numbers;
    let exports = node.exports.load();
    let mut shown = Vec::new();
    for export in exports.exports() {
        let path = export.spec.path.display();
        shown.push(if export.spec.is_read_only() {
            format!("{path} (read-only: add :*(rw))")
        } else {
            format!("{path} (rw)")
        });
    }
    let mut options = String::from("vers=3");
    // Without a portmapper the client must be told the ports, and can't find that of the locks.
    if matches!(choice, Choice::Off(_)) || settings.portmap_port != program::PORTMAP_PORT {
        options = format!("{options},nolock,tcp,port={nfs},mountport={mount},mountproto=tcp");
    } else if nfs != program::NFS_PORT {
        options = format!("{options},port={nfs}");
    }
    let host = settings
        .listen
        .first()
        .map(|ip| SocketAddr::new(*ip, 0))
        .filter(|address| !address.ip().is_unspecified())
        .map_or_else(config::host_name, |address| match address {
            SocketAddr::V4(v4) => v4.ip().to_string(),
            SocketAddr::V6(v6) => format!("[{}]", v6.ip()),
        });
    let path = exports
        .exports()
        .first()
        .map(|export| export.spec.path.display().to_string());
    let identity = if credential::can_switch() {
        String::new()
    } else {
        format!(
            "; all files belong to user {}",
            credential::own_caller().uid
        )
    };
    format!(
        "havenfs ready: NFS port {nfs}, MOUNT port {mount}, NLM port {nlm}, NSM port {nsm}, \
         portmapper {choice}; \
         exports {}{identity}; mount -t nfs -o {options} {host}:{} /mnt",
        shown.join(", "),
        path.unwrap_or_default()
    )
}

/// One line for a member of a cluster, which may or may not serve anything now.
pub(super) fn member_line(node: &str, config: &NodeConfig) -> String {
    let services: Vec<&str> = config
        .services
        .iter()
        .map(|one| one.name.as_str())
        .collect();
    let services = if config.is_witness() {
        "a witness".to_owned()
    } else {
        format!("services {}", services.join(", "))
    };
    format!(
        "havenfs ready: node {node}, {services}, control socket {}",
        config.settings.control.display()
    )
}

/// Tells whoever waits for this server to be ready.
pub(super) fn tell_ready(line: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody may be reading.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    // Not started by systemd: there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
}
