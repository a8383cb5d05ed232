//! How clients find our ports: `--portmap auto|embedded|register|off`.
//!
//! Owns the choice between serving the portmapper ourselves, registering with the rpcbind of this
//! machine ([`Registration`]) and neither. Does not bind the portmapper's port for good: for
//! [`Choice::Embedded`] the caller does.
//!
//! Choosing registers as well, since only then it is certain that registering works. The ports in
//! question are to be bound before, so that a client that finds them is queued and not refused.
//!
//! With `auto`, in order: the port is free: embedded; an rpcbind answers there: register; else
//! off. Whatever `auto` meets, it is no error, except another server of one of our programs that is
//! registered and answers: an NFS server, or a lock manager or status monitor, to which our
//! clients' locks would go.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use havenfs_rpc::program;
use socket2::{Domain, Socket, Type};
use tracing::warn;

pub(crate) use self::holder::{free_port_hint, nfsd_runs, port_holder};
use self::rpcbind::Rpcbind;
pub use self::rpcbind::{Checked, Registered, Registration};
use crate::net::listen::bind_early;
use crate::programs::portmap::PortEntry;
use crate::rpc_client::ClientError;

mod holder;
mod rpcbind;

/// rpcbind's local sockets: today's place and the older one.
const SOCKETS: [&str; 2] = ["/run/rpcbind.sock", "/var/run/rpcbind.sock"];
/// How long rpcbind has for each answer; systemd may have to start it first.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What the operator asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PortmapMode {
    /// Whatever fits.
    #[default]
    Auto,
    /// Serve the portmapper in this process.
    Embedded,
    /// Register with the rpcbind of this machine.
    Register,
    /// Neither.
    Off,
}

impl PortmapMode {
    /// All modes.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Embedded, Self::Register, Self::Off];

    /// The word on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Embedded => "embedded",
            Self::Register => "register",
            Self::Off => "off",
        }
    }
}

impl FromStr for PortmapMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.name() == text)
            .ok_or_else(|| "expected one of auto, embedded, register, off".to_owned())
    }
}

/// Where the portmapper is, ours or another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The portmapper's port.
    pub port: u16,
    /// The addresses that the embedded portmapper would listen on.
    pub listen: Vec<IpAddr>,
    /// The local sockets of rpcbind, in the order to try.
    pub sockets: Vec<PathBuf>,
    /// How long rpcbind has for each answer.
    pub timeout: Duration,
}

impl Settings {
    /// Makes settings with rpcbind's usual sockets; no `listen` address means all addresses.
    pub fn new(port: u16, listen: &[IpAddr]) -> Self {
        let everywhere = [
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        ];
        let listen = if listen.is_empty() {
            &everywhere
        } else {
            listen
        };
        Self {
            port,
            listen: listen.to_vec(),
            sockets: SOCKETS.map(PathBuf::from).to_vec(),
            timeout: TIMEOUT,
        }
    }
}

/// What was chosen.
#[derive(Debug)]
pub enum Choice {
    /// The portmapper is to be served by this process.
    Embedded,
    /// Our ports are registered; to be watched, and removed at the end.
    Registered(Registration),
    /// Clients can't ask for our ports.
    Off(OffReason),
}

/// Why there is no portmapper.
#[derive(Debug)]
pub enum OffReason {
    /// The operator wants none.
    Asked,
    /// This user may not bind the port, and no rpcbind answers.
    NoRight,
    /// Something that is no rpcbind has the port.
    Taken {
        /// Its description, if known.
        holder: Option<String>,
    },
    /// An rpcbind answers and does not take our ports.
    Refused(RegisterError),
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("embedded"),
            Self::Registered(registration) => {
                write!(f, "registered with rpcbind at {}", registration.address())
            }
            Self::Off(reason) => write!(f, "off ({reason})"),
        }
    }
}

impl fmt::Display for OffReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("as asked"),
            Self::NoRight => f.write_str("no right to bind its port"),
            Self::Taken { holder } => {
                let holder = holder.as_deref().unwrap_or("something");
                write!(f, "{holder} has its port and does not answer as rpcbind")
            }
            Self::Refused(_) => f.write_str("rpcbind did not take our ports"),
        }
    }
}

/// Why the operator's wish can't be met.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The embedded portmapper can't have its port.
    #[error(
        "cannot bind port {port} for the embedded portmapper{}\nhint: {}",
        held_by(holder.as_deref()),
        bind_hint(source)
    )]
    Bind {
        /// The port.
        port: u16,
        /// Who has it, if known.
        holder: Option<String>,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// There is no rpcbind to register with.
    #[error(
        "no rpcbind answers on port {port} of this network namespace\n\
         hint: start it (`systemctl start rpcbind`), or use `--portmap embedded`"
    )]
    NoRpcbind {
        /// The port.
        port: u16,
    },
    /// Another server is registered for a program of ours, and it answers.
    #[error(
        "another server is registered with rpcbind: {entry}\n\
         hint: {}\n\
         hint: or run havenfs in a network namespace of its own, or with `--portmap off`",
        how_to_free(entry.program)
    )]
    Conflict {
        /// The other's entry.
        entry: Registered,
    },
    /// Neither the local socket nor the loopback address lets us change entries.
    #[error(
        "rpcbind at {rpcbind} accepts no registration from us\n\
         hint: run havenfs as root, make rpcbind's socket (/run/rpcbind.sock) visible to it, or \
         use `--portmap off`"
    )]
    NoWayIn {
        /// rpcbind's address.
        rpcbind: SocketAddr,
        /// Why the last way failed, if it did not just refuse.
        #[source]
        source: Option<Box<ClientError>>,
    },
    /// rpcbind refuses one entry.
    #[error(
        "rpcbind refuses to register {entry}\n\
         hint: look with `rpcinfo` for an entry of another owner, and remove it as root with \
         `rpcinfo -d PROGRAM VERSION`"
    )]
    Refused {
        /// Our entry.
        entry: Registered,
    },
    /// rpcbind accepted an entry and does not show it.
    #[error("rpcbind does not show {entry} although it took it")]
    NotShown {
        /// Our entry.
        entry: Registered,
    },
    /// rpcbind does not answer.
    #[error("cannot talk to rpcbind")]
    Client(#[from] ClientError),
}

/// How the server that usually serves a program is made to give up its place.
pub(crate) const fn how_to_free(program: u32) -> &'static str {
    match program {
        program::NLM => {
            "the kernel's lock manager (lockd) ends once its NFS server is stopped (`systemctl \
             stop nfs-server`) and no NFSv3 file system is mounted on this machine with locks \
             (`umount -a -t nfs`, or mount them with nolock)"
        }
        program::NSM => {
            "stop the status monitor (`systemctl stop rpc-statd.service`), and mount NFSv3 file \
             systems on this machine with nolock"
        }
        _ => {
            "stop it (the kernel's: `systemctl stop nfs-server nfs-mountd`; Ganesha: `systemctl \
             stop nfs-ganesha`)"
        }
    }
}

fn held_by(holder: Option<&str>) -> String {
    holder
        .map(|holder| format!(": {holder} has it"))
        .unwrap_or_default()
}

fn bind_hint(source: &io::Error) -> &'static str {
    if source.kind() == io::ErrorKind::PermissionDenied {
        "run havenfs as root or with CAP_NET_BIND_SERVICE, or choose a port from 1024 on with \
         `--portmap-port`"
    } else {
        "use `--portmap register` if it is rpcbind, or stop it (`systemctl stop rpcbind.socket \
         rpcbind.service`)"
    }
}

/// Chooses, and registers `own` if that is the choice.
///
/// # Errors
/// When the mode asks for what can't be had, or another server of our programs is registered.
pub async fn choose(
    mode: PortmapMode,
    settings: &Settings,
    own: &[PortEntry],
) -> Result<Choice, RegisterError> {
    let port = settings.port;
    match mode {
        PortmapMode::Off => Ok(Choice::Off(OffReason::Asked)),
        PortmapMode::Embedded => match try_bind(settings) {
            Ok(()) => Ok(Choice::Embedded),
            Err(source) => {
                let holder = if source.kind() == io::ErrorKind::AddrInUse {
                    port_holder(port)
                } else {
                    None
                };
                Err(RegisterError::Bind {
                    port,
                    holder,
                    source,
                })
            }
        },
        PortmapMode::Register => match Rpcbind::find(settings).await {
            Some(rpcbind) => Ok(Choice::Registered(Registration::start(rpcbind, own).await?)),
            None => Err(RegisterError::NoRpcbind { port }),
        },
        PortmapMode::Auto => {
            let Err(error) = try_bind(settings) else {
                return Ok(Choice::Embedded);
            };
            let Some(rpcbind) = Rpcbind::find(settings).await else {
                return Ok(Choice::Off(
                    if error.kind() == io::ErrorKind::PermissionDenied {
                        OffReason::NoRight
                    } else {
                        OffReason::Taken {
                            holder: port_holder(port),
                        }
                    },
                ));
            };
            match Registration::start(rpcbind, own).await {
                Ok(registration) => Ok(Choice::Registered(registration)),
                Err(error @ RegisterError::Conflict { .. }) => Err(error),
                Err(error) => {
                    let chain = chain(&error);
                    warn!(error = chain, "rpcbind does not take our ports");
                    Ok(Choice::Off(OffReason::Refused(error)))
                }
            }
        }
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line.replace('\n', "; ")
}

/// Whether the portmapper's port can be bound on every address, over TCP and UDP. The sockets are
/// closed again, so that the caller binds them in its own way.
fn try_bind(settings: &Settings) -> io::Result<()> {
    let mut missing_family = None;
    let mut bound = Vec::new();
    for ip in &settings.listen {
        for kind in [Type::STREAM, Type::DGRAM] {
            match bind(SocketAddr::new(*ip, settings.port), kind) {
                Ok(socket) => bound.push(socket),
                Err(error) if is_missing_family(&error) && ip.is_unspecified() => {
                    missing_family = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
    }
    match missing_family {
        Some(error) if bound.is_empty() => Err(error),
        _ => Ok(()),
    }
}

/// Whether the machine has no IPv6 (or no IPv4), which is no reason against the other.
fn is_missing_family(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
    )
}

fn bind(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Whether the address is here already does not matter to who has the port.
    if !address.ip().is_unspecified() {
        bind_early(&socket, address.ip())?;
    }
    if kind == Type::STREAM {
        // Connections of the last run in TIME_WAIT don't count; a listener does.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    if kind == Type::STREAM {
        // With the option above, only listening tells another socket that is bound and idle.
        socket.listen(1)?;
    }
    Ok(socket)
}

#[cfg(test)]
mod tests;
