//! Settings of `serve`: from the command line and a TOML file, parsed once into valid values.
//!
//! The command line wins over the file, the file over the defaults. Unknown keys are refused with
//! their line.

pub mod cluster;
pub mod floating;
pub mod hooks;
mod lock_limits;
mod places;
pub mod service;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use havenfs_nlm::limits::Limits;
use havenfs_nsm::nsm_name;
use havenfs_rpc::program;
use serde::Deserialize;

use self::cluster::ClusterFile;
use self::floating::FloatingConfig;
use self::lock_limits::LockLimits;
use self::places::{Places, line_of};
use self::service::ServiceFile;
use crate::export::{self, Sources};
use crate::register::PortmapMode;

/// Where metrics are served unless configured otherwise.
pub const METRICS_DEFAULT: &str = "127.0.0.1:9587";

/// What `serve` needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where exports are listed.
    pub sources: Sources,
    /// What must outlive the process.
    pub state_dir: PathBuf,
    /// Addresses to listen on; none means all.
    pub listen: Vec<IpAddr>,
    /// How these addresses come and go with the service; none if they are always there.
    pub floating: Option<FloatingConfig>,
    /// The port of NFS; 0 lets the kernel choose.
    pub nfs_port: u16,
    /// The port of MOUNT; 0 lets the kernel choose.
    pub mount_port: u16,
    /// The port of NLM; 0 lets the kernel choose.
    pub nlm_port: u16,
    /// The port of NSM; 0 lets the kernel choose.
    pub nsm_port: u16,
    /// How clients find the ports.
    pub portmap: PortmapMode,
    /// The portmapper's port.
    pub portmap_port: u16,
    /// Whether NFS is served over UDP as well.
    pub nfs_udp: bool,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// The control socket.
    pub control: PathBuf,
    /// The port on which the portmapper of a host is asked for the ports of its lock manager and
    /// its status monitor.
    pub host_portmap_port: u16,
    /// What hosts know this service as: they hear of a restart under each of these names.
    pub service_names: Vec<String>,
    /// Which hosts hear of a restart.
    pub announce: Announce,
    /// How long only reclaims are granted where locks may be missing.
    pub grace: Duration,
    /// What becomes of a reclaim of a lock that is not known.
    pub reclaim: Reclaim,
    /// What the lock table may hold.
    pub lock_limits: Limits,
    /// Whether locks may be missing: the state directory was lost, or is an old copy.
    pub recover: bool,
}

/// Which hosts hear of a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Announce {
    /// All that hold or wait for a lock.
    #[default]
    Always,
    /// Only where something is gained by it: hosts that may not know of a lock of theirs, and all
    /// of them if locks may be missing.
    Auto,
    /// None.
    Never,
}

/// What becomes of a reclaim of a lock that is not known, where no locks are missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Reclaim {
    /// It is granted, if nothing is in its way, and counted.
    #[default]
    Lenient,
    /// It is denied: it may be a late copy of an earlier call.
    Strict,
}

/// How long only reclaims are granted where locks may be missing, unless configured otherwise:
/// clients need up to half a minute to hear of a restart, and some ask every 30 seconds.
pub const GRACE_SECONDS_DEFAULT: u64 = 45;
/// The longest grace that is taken: nobody can lock anything meanwhile.
pub const GRACE_SECONDS_MAX: u64 = 3600;

/// The configuration file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Exports as on the command line.
    #[serde(default)]
    pub export: Vec<String>,
    /// The file to read in place of /etc/exports and its folder.
    pub exports_file: Option<PathBuf>,
    /// See [`Settings::state_dir`].
    pub state_dir: Option<PathBuf>,
    /// See [`Settings::listen`].
    pub listen: Option<Vec<IpAddr>>,
    /// See [`Settings::nfs_port`].
    pub nfs_port: Option<u16>,
    /// See [`Settings::mount_port`].
    pub mount_port: Option<u16>,
    /// See [`Settings::nlm_port`].
    pub nlm_port: Option<u16>,
    /// See [`Settings::nsm_port`].
    pub nsm_port: Option<u16>,
    /// See [`Settings::portmap`].
    pub portmap: Option<String>,
    /// See [`Settings::portmap_port`].
    pub portmap_port: Option<u16>,
    /// See [`Settings::nfs_udp`].
    pub nfs_udp: Option<bool>,
    /// `ADDR:PORT` or `off`.
    pub metrics: Option<String>,
    /// See [`Settings::control`].
    pub control: Option<PathBuf>,
    /// See [`Settings::service_names`].
    pub service_names: Option<Vec<String>>,
    /// See [`Settings::announce`].
    pub announce: Option<Announce>,
    /// See [`Settings::grace`].
    pub grace_seconds: Option<u64>,
    /// See [`Settings::reclaim`].
    pub reclaim: Option<Reclaim>,
    /// See [`Settings::lock_limits`].
    pub lock_limits: Option<LockLimits>,
    /// See [`Settings::host_portmap_port`].
    pub host_portmap_port: Option<u16>,
    /// Which member of the cluster this node is.
    pub node: Option<String>,
    /// See [`cluster`].
    pub cluster: Option<ClusterFile>,
    /// See [`cluster`].
    #[serde(default)]
    pub service: Vec<ServiceFile>,
    /// See [`Settings::recover`]; on the command line only, since it is said once.
    #[serde(skip)]
    pub recover: bool,
    /// Where all this is said.
    #[serde(skip)]
    pub places: Places,
}

/// Why the settings can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read configuration file `{}`: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The file says something that is not understood.
    #[error("{}:{line}: {problem}", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A value makes no sense.
    #[error("{name}: {}{problem}", quoted(.value))]
    Value {
        /// The option.
        name: &'static str,
        /// What was given.
        value: String,
        /// What is wrong with it.
        problem: String,
        /// If the option is a table, the key of it that is meant.
        within: Option<&'static str>,
    },
    /// A value of the file makes no sense.
    #[error("{}:{line}: {error}", .path.display())]
    Placed {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        error: Box<ConfigError>,
    },
}

/// A value for people, if there is one.
fn quoted(value: &str) -> String {
    match value {
        "" => String::new(),
        value => format!("`{value}` "),
    }
}

/// What is wrong with a file, with what belongs there.
fn in_words(problem: &str) -> String {
    let wanted = if problem.contains("invalid socket address syntax") {
        ": it is an IP address, no name, and a port, as in \"192.0.2.1:7300\""
    } else if problem.contains("invalid type: string") && problem.contains("expected a sequence") {
        ": write it as a list, as in [\"word\", \"word\"]"
    } else {
        ""
    };
    with_nearest(problem) + wanted
}

impl File {
    /// Reads a configuration file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        let read = toml::from_str(&text).map_err(|error| ConfigError::Parse {
            path: path.to_path_buf(),
            line: line_of(&text, error.span().map_or(0, |span| span.start)),
            problem: in_words(error.message()),
        })?;
        Ok(Self {
            places: Places {
                path: path.to_path_buf(),
                text,
            },
            ..read
        })
    }
}

/// In place of all words that are known, the one that was meant, if one is like it.
fn with_nearest(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let Some(word) = quoted.next().filter(|_| message.starts_with("unknown ")) else {
        return message.to_owned();
    };
    match export::nearest(word.as_bytes(), quoted) {
        Some(nearest) => {
            let what = message.split('`').next().unwrap_or_default();
            format!("{what}`{word}`\nhint: did you mean `{nearest}`?")
        }
        None => message.to_owned(),
    }
}

/// Makes settings of what the command line says and, where it says nothing, the file.
pub fn merge(line: File, file: File) -> Result<Settings, ConfigError> {
    let portmap = line
        .portmap
        .or(file.portmap)
        .map_or(Ok(PortmapMode::default()), |word| {
            word.parse().map_err(|problem| ConfigError::Value {
                name: "portmap",
                value: word,
                problem,
                within: None,
            })
        })?;
    let metrics = line
        .metrics
        .or(file.metrics)
        .unwrap_or_else(|| METRICS_DEFAULT.to_owned());
    let metrics = if metrics == "off" {
        None
    } else {
        Some(metrics.parse().map_err(|_| ConfigError::Value {
            name: "metrics",
            value: metrics,
            problem: "is neither ADDR:PORT nor `off`".to_owned(),
            within: None,
        })?)
    };
    let mut sources = Sources::default();
    if let Some(path) = line.exports_file.or(file.exports_file) {
        sources.file = Some(path);
        sources.directory = None;
    }
    let exports = if line.export.is_empty() {
        file.export
    } else {
        line.export
    };
    sources.arguments = exports.into_iter().map(String::into_bytes).collect();
    let port = |line: Option<u16>, file: Option<u16>, default| line.or(file).unwrap_or(default);
    let nsm_port_default = if is_root() {
        program::NSM_PORT
    } else {
        NSM_PORT_UNPRIVILEGED
    };
    let service_names = line.service_names.or(file.service_names);
    let service_names = service_names.unwrap_or_else(|| vec![host_name()]);
    for name in &service_names {
        nsm_name::judge(name.as_bytes()).map_err(|problem| ConfigError::Value {
            name: "service-name",
            value: name.clone(),
            problem: format!("is no name for a service: {problem}"),
            within: None,
        })?;
    }
    let grace_seconds = line.grace_seconds.or(file.grace_seconds);
    let grace_seconds = grace_seconds.unwrap_or(GRACE_SECONDS_DEFAULT);
    if grace_seconds > GRACE_SECONDS_MAX {
        return Err(ConfigError::Value {
            name: "grace",
            value: grace_seconds.to_string(),
            problem: format!("is more than {GRACE_SECONDS_MAX} seconds"),
            within: None,
        });
    }
    Ok(Settings {
        sources,
        state_dir: line
            .state_dir
            .or(file.state_dir)
            .unwrap_or_else(default_state_dir),
        listen: line.listen.or(file.listen).unwrap_or_default(),
        floating: None,
        nfs_port: port(line.nfs_port, file.nfs_port, program::NFS_PORT),
        mount_port: port(line.mount_port, file.mount_port, program::MOUNT_PORT),
        nlm_port: port(line.nlm_port, file.nlm_port, program::NLM_PORT),
        nsm_port: port(line.nsm_port, file.nsm_port, nsm_port_default),
        portmap,
        portmap_port: port(line.portmap_port, file.portmap_port, program::PORTMAP_PORT),
        nfs_udp: line.nfs_udp.or(file.nfs_udp).unwrap_or(false),
        host_portmap_port: port(
            line.host_portmap_port,
            file.host_portmap_port,
            program::PORTMAP_PORT,
        ),
        metrics,
        control: line
            .control
            .or(file.control)
            .unwrap_or_else(default_control),
        service_names,
        announce: line.announce.or(file.announce).unwrap_or_default(),
        grace: Duration::from_secs(grace_seconds),
        reclaim: line.reclaim.or(file.reclaim).unwrap_or_default(),
        lock_limits: line.lock_limits.or(file.lock_limits).unwrap_or_default().0,
        recover: line.recover,
    })
}

/// The port of NSM where the usual one is out of reach; the portmapper tells it to whoever asks.
pub const NSM_PORT_UNPRIVILEGED: u16 = 32_662;

/// What this machine calls itself.
pub fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// `/var/lib/havenfs` for root, else a folder of the user's own.
pub fn default_state_dir() -> PathBuf {
    if is_root() {
        return PathBuf::from("/var/lib/havenfs");
    }
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
    std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .or_else(home)
        .unwrap_or_else(std::env::temp_dir)
        .join("havenfs")
}

/// `/run/havenfs/control` for root, else a socket of the user's own.
pub fn default_control() -> PathBuf {
    if is_root() {
        return PathBuf::from("/run/havenfs/control");
    }
    std::env::var_os("XDG_RUNTIME_DIR")
        .map_or_else(default_state_dir, |dir| PathBuf::from(dir).join("havenfs"))
        .join("control")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<File, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("havenfs.toml");
        std::fs::write(&path, text).unwrap();
        File::read(&path)
    }

    #[test]
    fn the_line_wins_over_the_file_and_the_file_over_the_defaults() {
        let file = parse("nfs_port = 1\nmount_port = 2\nexport = ['/a']\n").unwrap();
        let line = File {
            nfs_port: Some(3),
            ..File::default()
        };
        let settings = merge(line, file).unwrap();
        assert_eq!(
            (
                settings.nfs_port,
                settings.mount_port,
                settings.portmap_port
            ),
            (3, 2, 111)
        );
        assert_eq!(settings.sources.arguments, [b"/a".to_vec()]);
        assert_eq!(settings.metrics, Some(METRICS_DEFAULT.parse().unwrap()));
    }

    #[test]
    fn unknown_locks_are_reclaimed_unless_it_is_said_otherwise() {
        let of = |text: &str| {
            let planned = cluster::plan(File::default(), parse(text).unwrap()).unwrap();
            planned.services[0].settings.reclaim
        };
        let service = "[[service]]\nname = 'a'\naddresses = ['192.0.2.1']\nexports = ['/a']\n";
        assert_eq!(of(""), Reclaim::Lenient);
        assert_eq!(of("reclaim = 'strict'\n"), Reclaim::Strict);
        assert_eq!(
            of(&format!("reclaim = 'strict'\n{service}")),
            Reclaim::Strict
        );
        let own = format!("reclaim = 'strict'\n{service}reclaim = 'lenient'\n");
        assert_eq!(of(&own), Reclaim::Lenient);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let error = parse("nfs_port = 1\nnfs_prot = 2\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(":2: unknown field `nfs_prot`\nhint: did you mean `nfs_port`?"),
            "{error}"
        );
        let error = parse("[lock_limits]\nhosts = 1\nlock = 2\n").unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains(":3: unknown field `lock`\nhint: did you mean `locks`?"),
            "{error}"
        );
        let error = parse("\n\nnfs_port = 70000\n").unwrap_err().to_string();
        assert!(error.contains(":3: "), "{error}");
        let line = File {
            metrics: Some("here".into()),
            ..File::default()
        };
        let error = merge(line, File::default()).unwrap_err().to_string();
        assert_eq!(error, "metrics: `here` is neither ADDR:PORT nor `off`");
    }
}
