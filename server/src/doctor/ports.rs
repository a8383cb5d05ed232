//! Our ports and who holds them; the portmapper; servers that would be in our way.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use havenfs_rpc::portmap::{List, Mapping, Protocol, VERSION_2, procedure};
use havenfs_rpc::program;
use havenfs_rpc::xdr::decode_all;
use socket2::{Domain, Socket, Type};

use super::Report;
use super::server::Running;
use crate::config::{NSM_PORT_UNPRIVILEGED, Settings};
use crate::register::{PortmapMode, free_port_hint, how_to_free, nfsd_runs, port_holder};
use crate::rpc_client::{NoArgs, Procedure, SourcePort, Target, call_once};

/// How long a portmapper has for its answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);

/// A port that `serve` uses.
struct Port {
    program: u32,
    name: &'static str,
    option: &'static str,
    number: u16,
    kinds: &'static [Type],
}

/// Why a port can't be bound.
enum Taken {
    /// Somebody has it.
    InUse,
    /// This process may not.
    NoRight,
    /// Something else, as the kernel says.
    Other(io::Error),
}

/// Looks at ports, portmapper and other servers.
pub(super) fn look(report: &mut Report, settings: &Settings, running: Option<&Running>) {
    let both: &[Type] = &[Type::STREAM, Type::DGRAM];
    let nfs = if settings.nfs_udp {
        both
    } else {
        &[Type::STREAM][..]
    };
    let port = |program, name, option, number, kinds| Port {
        program,
        name,
        option,
        number,
        kinds,
    };
    let (mount_port, nlm_port) = (settings.mount_port, settings.nlm_port);
    let nsm_port = nsm_port(settings);
    for port in [
        port(program::NFS, "NFS", "--nfs-port", settings.nfs_port, nfs),
        port(program::MOUNT, "MOUNT", "--mount-port", mount_port, both),
        port(program::NLM, "NLM", "--nlm-port", nlm_port, both),
        port(program::NSM, "NSM", "--nsm-port", nsm_port, both),
    ] {
        look_at_port(report, settings, &port, running);
    }
    look_at_metrics(report, settings, running);
    let entries = ask_portmapper(settings.portmap_port);
    look_at_portmapper(report, settings, entries.as_deref(), running);
    look_at_entries(report, entries.unwrap_or_default(), running);
    look_at_kernel(report);
}

/// The port of NSM as `serve` chooses it: another one where the usual one may not be bound.
fn nsm_port(settings: &Settings) -> u16 {
    let both = [Type::STREAM, Type::DGRAM];
    match settings.nsm_port {
        program::NSM_PORT => match try_bind(&settings.listen, program::NSM_PORT, &both) {
            Err(Taken::NoRight) => NSM_PORT_UNPRIVILEGED,
            _ => program::NSM_PORT,
        },
        other => other,
    }
}

fn look_at_port(report: &mut Report, settings: &Settings, port: &Port, running: Option<&Running>) {
    let Port {
        program,
        name,
        option,
        number,
        kinds,
    } = *port;
    let topic = "ports";
    if number == 0 {
        report.ok(topic, format!("{name}: any port that the kernel chooses"));
        return;
    }
    let transports = match kinds {
        [_] => "TCP",
        _ => "TCP and UDP",
    };
    let taken = match try_bind(&settings.listen, number, kinds) {
        Ok(()) => {
            report.ok(
                topic,
                format!("{name} port {number} is free ({transports})"),
            );
            return;
        }
        Err(taken) => taken,
    };
    let (text, hint) = match taken {
        Taken::InUse => {
            let holder = port_holder(number);
            if let Some(running) = running.filter(|running| running.is_holder(holder.as_deref())) {
                let pid = running.pid;
                report.ok(
                    topic,
                    format!("{name} port {number} is held by the running havenfs (process {pid})"),
                );
                return;
            }
            let hint = free_port_hint(program, holder.as_deref(), option);
            let holder = holder.unwrap_or_else(|| {
                "a process that this user may not look into (run this as root to see which)"
                    .to_owned()
            });
            (format!("{name} port {number} is held by {holder}"), hint)
        }
        Taken::NoRight => (
            format!("{name} port {number}: this user may not bind it"),
            format!(
                "run as root or with CAP_NET_BIND_SERVICE, or choose a port from {} on with \
                 {option}",
                first_free_port()
            ),
        ),
        Taken::Other(error) => (
            format!("{name} port {number} can't be bound: {error}"),
            "check the addresses given with --listen".to_owned(),
        ),
    };
    report.error(topic, text, hint);
}

/// The page of metrics is not worth refusing to serve files for: at most a warning.
fn look_at_metrics(report: &mut Report, settings: &Settings, running: Option<&Running>) {
    let Some(address) = settings.metrics else {
        return;
    };
    if running.is_some() || address.port() == 0 {
        return;
    }
    if let Err(error) = bind(address, Type::STREAM) {
        let who = port_holder(address.port())
            .map_or_else(String::new, |holder| format!(" ({holder} has the port)"));
        report.warning(
            "ports",
            format!("metrics can't be served on {address}: {error}{who}"),
            "choose another place with --metrics, or `--metrics off`",
        );
    }
}

/// Binds as `serve` would, and lets go again. Nothing listens, so that no client is ever let in.
fn try_bind(listen: &[IpAddr], port: u16, kinds: &[Type]) -> Result<(), Taken> {
    let every = [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ];
    let wildcard = listen.is_empty();
    for ip in if wildcard { &every[..] } else { listen } {
        for kind in kinds {
            match bind(SocketAddr::new(*ip, port), *kind) {
                Ok(()) => {}
                Err(error) => match error.raw_os_error() {
                    // A kernel without IPv6: `serve` goes on with IPv4 alone.
                    Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL) if wildcard && ip.is_ipv6() => {}
                    Some(libc::EADDRINUSE) => return Err(Taken::InUse),
                    Some(libc::EACCES | libc::EPERM) => return Err(Taken::NoRight),
                    _ => return Err(Taken::Other(error)),
                },
            }
        }
    }
    Ok(())
}

fn bind(address: SocketAddr, kind: Type) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())
}

/// The first port that needs no privilege.
fn first_free_port() -> u16 {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let first = text.ok().and_then(|text| text.trim().parse().ok());
    first.unwrap_or(1024)
}

/// All that a portmapper on loopback tells by its version 2, which every one of them speaks.
fn ask_portmapper(port: u16) -> Option<Vec<Mapping>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    let dump = Procedure {
        program: program::PORTMAP,
        version: VERSION_2,
        number: procedure::PMAP_DUMP,
    };
    let target = Target::Tcp(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
    let call = call_once(target, SourcePort::Any, ANSWER_TIME_MAX, dump, &NoArgs);
    let results = runtime.block_on(call).ok()?;
    let List(entries) = decode_all(&results).ok()?;
    Some(entries)
}

fn look_at_portmapper(
    report: &mut Report,
    settings: &Settings,
    entries: Option<&[Mapping]>,
    running: Option<&Running>,
) {
    let topic = "portmapper";
    let (mode, port) = (settings.portmap, settings.portmap_port);
    if mode == PortmapMode::Off {
        report.ok(
            topic,
            "off, as asked: clients must name both ports (see `havenfs mount-help`)",
        );
        return;
    }
    let both = [Type::STREAM, Type::DGRAM];
    let taken = match try_bind(&settings.listen, port, &both) {
        Ok(()) if mode == PortmapMode::Register => {
            report.error(
                topic,
                format!("--portmap register: no rpcbind answers on port {port}"),
                "start it (`systemctl start rpcbind`), or use `--portmap embedded`",
            );
            return;
        }
        Ok(()) => {
            report.ok(
                topic,
                format!("port {port} is free: havenfs will serve the portmapper itself"),
            );
            return;
        }
        Err(taken) => taken,
    };
    let holder = port_holder(port);
    if let Some(running) = running.filter(|running| running.is_holder(holder.as_deref())) {
        let pid = running.pid;
        report.ok(
            topic,
            format!("port {port} is served by the running havenfs (process {pid})"),
        );
        return;
    }
    let who = holder.map_or_else(String::new, |holder| format!(" ({holder})"));
    if mode == PortmapMode::Embedded {
        let text = match &taken {
            Taken::NoRight => format!("--portmap embedded: this user may not bind port {port}"),
            Taken::Other(error) => {
                format!("--portmap embedded: port {port} can't be bound: {error}")
            }
            Taken::InUse => format!("--portmap embedded: port {port} is taken{who}"),
        };
        let hint = match taken {
            Taken::NoRight => "run as root, or use `--portmap auto`",
            _ => {
                "use `--portmap register` if it is rpcbind, or stop it \
                 (`systemctl stop rpcbind.socket rpcbind.service`)"
            }
        };
        report.error(topic, text, hint);
        return;
    }
    if entries.is_some() {
        report.ok(
            topic,
            format!("an rpcbind answers on port {port}{who}: havenfs will register with it"),
        );
        if !rustix::process::geteuid().is_root() {
            report.warning(
                topic,
                "rpcbind lets only root register, as a rule",
                "if it refuses, havenfs serves without it, and clients must name both ports",
            );
        }
        return;
    }
    let (text, hint) = match taken {
        Taken::NoRight => (
            format!("no rpcbind answers, and this user may not bind port {port}"),
            "clients must name both ports (see `havenfs mount-help`); or run as root",
        ),
        _ => (
            format!("port {port} is taken{who} and does not answer as rpcbind"),
            "stop what holds it, or clients must name both ports (see `havenfs mount-help`)",
        ),
    };
    if mode == PortmapMode::Register {
        report.error(topic, text, hint);
    } else {
        report.warning(topic, text, hint);
    }
}

/// Judges what the portmapper lists and the running havenfs does not serve.
pub(super) fn look_at_entries(
    report: &mut Report,
    mut entries: Vec<Mapping>,
    running: Option<&Running>,
) {
    entries.retain(|entry| {
        running.is_none_or(|running| !running.serves(entry.program, entry.version, entry.port))
    });
    let listed = |number: u32| -> Vec<String> {
        let mut ports: Vec<String> = entries
            .iter()
            .filter(|entry| entry.program == number)
            .map(|entry| {
                let protocol = match Protocol::from_number(entry.protocol) {
                    Some(Protocol::Tcp) => "TCP",
                    Some(Protocol::Udp) => "UDP",
                    None => "another protocol's",
                };
                format!("{protocol} port {}", entry.port)
            })
            .collect();
        ports.sort();
        ports.dedup();
        ports
    };
    for (number, name) in [
        (program::NFS, "NFS"),
        (program::MOUNT, "MOUNT"),
        (program::NLM, "NLM"),
        (program::NSM, "NSM"),
    ] {
        let ports = listed(number);
        if !ports.is_empty() {
            let ports = ports.join(", ");
            report.warning(
                "portmapper",
                format!(
                    "{name} is registered by another server: {ports}; `serve` refuses to start \
                     while that one answers"
                ),
                format!(
                    "{}\nif nothing answers there any more, havenfs replaces the entry",
                    how_to_free(number)
                ),
            );
        }
    }
}

/// Says whether the kernel's NFS server runs, which needs no entry in rpcbind for NFSv4 alone.
fn look_at_kernel(report: &mut Report) {
    if nfsd_runs() {
        report.error(
            "kernel",
            "the kernel's NFS server (nfsd) runs",
            "`systemctl disable --now nfs-server.service`; its exports can be served by havenfs, \
             which reads /etc/exports too",
        );
    } else {
        report.ok("kernel", "no NFS server runs in the kernel");
    }
}
