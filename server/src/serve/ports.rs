//! The bound sockets of the programs, and what the portmapper tells of them.

use std::net::TcpListener;

use havenfs_rpc::portmap::Netid;
use havenfs_rpc::program;

use super::ServeError;
use crate::call::Port;
use crate::config::{NSM_PORT_UNPRIVILEGED, Settings};
use crate::net::listen::{self, Bound, ListenError, Place};
use crate::programs::portmap::PortEntry;
use crate::register::{free_port_hint, port_holder};

/// The bound sockets.
pub(super) struct Ports {
    nfs: Bound,
    mount: Bound,
    nlm: Bound,
    nsm: Bound,
    nfs_udp: bool,
}

/// The numbers of the ports.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Numbers {
    pub(super) nfs: u16,
    pub(super) mount: u16,
    pub(super) nlm: u16,
    pub(super) nsm: u16,
}

impl Ports {
    pub(super) fn bind(settings: &Settings) -> Result<Self, ServeError> {
        let nfs_udp = settings.nfs_udp;
        Ok(Self {
            nfs: bind(settings, &NFS, settings.nfs_port, nfs_udp)?,
            mount: bind(settings, &MOUNT, settings.mount_port, true)?,
            nlm: bind(settings, &NLM, settings.nlm_port, true)?,
            nsm: bind_nsm(settings)?,
            nfs_udp,
        })
    }

    pub(super) const fn numbers(&self) -> Numbers {
        Numbers {
            nfs: self.nfs.port,
            mount: self.mount.port,
            nlm: self.nlm.port,
            nsm: self.nsm.port,
        }
    }

    /// What the portmapper tells.
    pub(super) fn entries(&self) -> Vec<PortEntry> {
        let mut entries = Vec::new();
        for netid in self.netids() {
            if self.nfs_udp || matches!(netid, Netid::Tcp | Netid::Tcp6) {
                entries.push(PortEntry::own(program::NFS, 3, *netid, self.nfs.port));
            }
            for (program, versions, port) in [
                (program::MOUNT, &[1, 2, 3][..], self.mount.port),
                (program::NLM, &[1, 3, 4], self.nlm.port),
                (program::NSM, &[1], self.nsm.port),
            ] {
                let of_program = versions.iter();
                entries.extend(
                    of_program.map(|version| PortEntry::own(program, *version, *netid, port)),
                );
            }
        }
        entries
    }

    /// The transports that all programs are served on.
    fn netids(&self) -> &'static [Netid] {
        let mut addresses = self.nfs.tcp.iter().map(TcpListener::local_addr);
        if addresses.any(|address| address.is_ok_and(|address| address.is_ipv6())) {
            &[Netid::Tcp, Netid::Udp, Netid::Tcp6, Netid::Udp6]
        } else {
            &[Netid::Tcp, Netid::Udp]
        }
    }

    /// What the portmapper tells when it is ours: also itself.
    pub(super) fn entries_with_portmap(&self, port: u16) -> Vec<PortEntry> {
        let own = self.netids().iter().flat_map(|netid| {
            [2, 3, 4].map(|version| PortEntry::own(program::PORTMAP, version, *netid, port))
        });
        self.entries().into_iter().chain(own).collect()
    }

    /// The sockets of each port.
    pub(super) fn into_sockets(self) -> [(Port, Bound); 4] {
        [
            (Port::Nfs, self.nfs),
            (Port::Mount, self.mount),
            (Port::Nlm, self.nlm),
            (Port::Nsm, self.nsm),
        ]
    }
}

/// Binds the portmapper's port.
pub(super) fn bind_portmap(settings: &Settings) -> Result<Bound, ServeError> {
    bind(settings, &PORTMAP, settings.portmap_port, true)
}

/// Root of a user namespace is root, and may not have the usual port all the same.
fn bind_nsm(settings: &Settings) -> Result<Bound, ServeError> {
    let usual = bind(settings, &NSM, settings.nsm_port, true);
    match usual {
        Err(ServeError::Listen { error, .. })
            if settings.nsm_port == program::NSM_PORT
                && error.source.kind() == std::io::ErrorKind::PermissionDenied =>
        {
            bind(settings, &NSM, NSM_PORT_UNPRIVILEGED, true)
        }
        usual => usual,
    }
}

/// What a port is for, and the option that moves it.
struct Purpose {
    program: u32,
    name: &'static str,
    option: &'static str,
}

impl Purpose {
    const fn new(program: u32, name: &'static str, option: &'static str) -> Self {
        Self {
            program,
            name,
            option,
        }
    }
}

const NFS: Purpose = Purpose::new(program::NFS, "NFS", "--nfs-port");
const MOUNT: Purpose = Purpose::new(program::MOUNT, "MOUNT", "--mount-port");
const NLM: Purpose = Purpose::new(program::NLM, "NLM", "--nlm-port");
const NSM: Purpose = Purpose::new(program::NSM, "NSM", "--nsm-port");
const PORTMAP: Purpose = Purpose::new(program::PORTMAP, "the portmapper", "--portmap-port");

fn bind(settings: &Settings, purpose: &Purpose, port: u16, udp: bool) -> Result<Bound, ServeError> {
    let place = Place {
        addresses: &settings.listen,
        port,
        is_early: settings.floating.is_some(),
    };
    let bound = listen::bind(purpose.name, place, udp);
    bound.map_err(|error| ServeError::Listen {
        hint: taken_hint(&error, purpose),
        error,
    })
}

/// What to do about a port that can't be bound.
fn taken_hint(error: &ListenError, purpose: &Purpose) -> String {
    let option = purpose.option;
    match error.source.kind() {
        std::io::ErrorKind::PermissionDenied => {
            format!("ports below 1024 need root; choose another with {option}")
        }
        std::io::ErrorKind::AddrInUse => {
            let port = error.address.port();
            let holder = port_holder(port);
            let hint = free_port_hint(purpose.program, holder.as_deref(), option);
            let holder = holder.unwrap_or_else(|| "something else".to_owned());
            format!("{holder} has port {port}: {hint}")
        }
        _ => format!("choose another port with {option}, or another address with --listen"),
    }
}
