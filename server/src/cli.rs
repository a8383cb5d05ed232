//! The command line.

mod asking;
mod cluster;
mod locks;
mod service;

use std::io::{IsTerminal as _, Write as _};
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use havenfs::address::guard;
use havenfs::config::cluster::{ConfigOrigin, NodeConfig};
use havenfs::config::floating::FloatingConfig;
use havenfs::config::{self, Announce, File, Reclaim};
use havenfs::doctor::{self, Severity};
use havenfs::fault::{self, Fault};
use havenfs::mount_help::{self, Served};
use havenfs::raft::StoreError;
use havenfs::serve::ServeError;
use havenfs::{export, serve};

use self::asking::{ask, ask_server};
use self::cluster::ClusterCommand;
use self::locks::{HostsCommand, LocksCommand, run_hosts, run_locks};
use self::service::{ServiceCommand, run_service};
use crate::demo;

/// NFSv3 service of a node in one process: NFS, MOUNT and portmapper.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  havenfs serve --export '/srv/data:*(rw)'
      Serve a directory to everybody, with user 0 mapped to nobody.
  havenfs serve --export '/srv/data:10.0.0.0/8(rw,no_root_squash) backup(ro)'
      Hosts and options as in exports(5).
  havenfs exports check /etc/exports
      Say what an export list means, and what is wrong with it.
  havenfs status
      Look at the running server.
  havenfs demo
      See a cluster of three nodes lose one, on this machine, in a few seconds.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve files until stopped; prints one line with `ready` when calls are answered
    Serve(Box<ServeArgs>),
    /// Show what the running server does
    Status(ControlArgs),
    /// Show the connections of NFS clients
    Clients(ControlArgs),
    /// Show, check or reload the exports
    Exports(ExportsArgs),
    /// Look at locks, and break them
    Locks {
        #[command(subcommand)]
        command: LocksCommand,
    },
    /// Deal with the machines that lock files
    Hosts {
        #[command(subcommand)]
        command: HostsCommand,
    },
    /// Look at the cluster, and change its members
    Cluster {
        #[command(subcommand)]
        command: ClusterCommand,
    },
    /// Vote in a cluster and serve nothing: the third voter beside two machines with data
    Witness {
        /// Configuration file (TOML)
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Outlive the server for a moment, to take its addresses away
    #[command(hide = true)]
    Guard {
        /// Interfaces with their addresses
        floating: Vec<FloatingConfig>,
    },
    /// Deal with services as a whole
    Service {
        #[command(subcommand)]
        command: ServiceCommand,
    },
    /// Look at the configuration file
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Say what would keep the server from serving well here; changes nothing
    Doctor {
        #[command(flatten)]
        serve: Box<ServeArgs>,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Show a cluster at work on this machine: three nodes, two clients with locks and data, a
    /// killed node and a planned move. Needs no root, but for --netns, and leaves nothing behind
    Demo(demo::DemoArgs),
    /// Be the Linux client of a demo, in its virtual machine
    #[command(hide = true)]
    DemoGuest {
        /// What the demo wants of it
        plan: PathBuf,
        /// What the kernel adds of its own to what it was told
        #[arg(hide = true)]
        rest: Vec<String>,
    },
    /// Print the mount commands for Linux, macOS, FreeBSD and Windows
    MountHelp {
        /// The server's name or address, as clients know it
        host: String,
        /// The exported directory [default: the first export]
        path: Option<String>,
        /// Control socket of the server
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// Directory to export: DIR or 'DIR:HOST(OPTIONS) HOST(OPTIONS)...', as in exports(5);
    /// DIR alone means *(ro). Adds to /etc/exports and /etc/exports.d
    #[arg(long, value_name = "SPEC")]
    export: Vec<String>,
    /// Export list to read in place of /etc/exports and /etc/exports.d
    #[arg(long, value_name = "FILE")]
    exports_file: Option<PathBuf>,
    /// Configuration file (TOML); the command line wins over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to keep what must outlive the process [default: /var/lib/havenfs, or
    /// $XDG_STATE_HOME/havenfs]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Address to listen on, repeatable [default: all]
    #[arg(long, value_name = "ADDR")]
    listen: Vec<IpAddr>,
    /// Port of NFS [default: 2049]
    #[arg(long, value_name = "N")]
    nfs_port: Option<u16>,
    /// Port of MOUNT [default: 20048]
    #[arg(long, value_name = "N")]
    mount_port: Option<u16>,
    /// Port of NLM, which locks files [default: 32803]
    #[arg(long, value_name = "N")]
    nlm_port: Option<u16>,
    /// Port of NSM, which hears of the hosts' reboots [default: 662, or 32662 without root]
    #[arg(long, value_name = "N")]
    nsm_port: Option<u16>,
    /// How clients find the ports: auto, embedded, register, off [default: auto]
    #[arg(long, value_name = "MODE")]
    portmap: Option<String>,
    /// Port of the portmapper [default: 111]
    #[arg(long, value_name = "N")]
    portmap_port: Option<u16>,
    /// Serve NFS over UDP too
    #[arg(long)]
    nfs_udp: bool,
    /// Where to serve metrics: ADDR:PORT or off [default: 127.0.0.1:9587]
    #[arg(long, value_name = "ADDR:PORT|off")]
    metrics: Option<String>,
    /// Control socket [default: /run/havenfs/control, or $XDG_RUNTIME_DIR/havenfs/control]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Name that clients mount from, repeatable: they hear of restarts under it [default: this
    /// machine's name]
    #[arg(long, value_name = "NAME")]
    service_name: Vec<String>,
    /// Which hosts hear of a restart [default: always]
    #[arg(long, value_name = "WHICH")]
    announce: Option<Announce>,
    /// How long only reclaims are granted where locks may be missing [default: 45]
    #[arg(long, value_name = "SECONDS")]
    grace: Option<u64>,
    /// What becomes of a reclaim of a lock that is not known [default: lenient]
    #[arg(long, value_name = "HOW")]
    reclaim: Option<Reclaim>,
    /// The state directory was lost, or is an old copy: hosts may hold locks that are not in it,
    /// so only what they reclaim is granted until grace is over
    #[arg(long)]
    recover: bool,
    /// Break a promise on purpose, for whoever wants to see that it would be noticed
    #[arg(long, value_name = "FAULT", hide = true)]
    plant: Option<String>,
    /// End when the process that started this one ends, however it ends
    #[arg(long, hide = true)]
    with_parent: bool,
}

#[derive(Debug, Args)]
struct ControlArgs {
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
    /// Control socket of the server
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Which service, where the node has several
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
struct ExportsArgs {
    #[command(subcommand)]
    command: Option<ExportsCommand>,
    #[command(flatten)]
    control: ControlArgs,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Say what `serve` will do with a configuration file, and what is wrong with it; contacts
    /// nobody and changes nothing
    Check {
        /// The file (TOML)
        file: PathBuf,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum ExportsCommand {
    /// Show the exports in force
    List(ControlArgs),
    /// Say what an export list means
    Check {
        /// The list
        file: PathBuf,
    },
    /// Read the export lists again; other clients notice nothing. In a cluster, on any node with
    /// data: all nodes serve what its files say, names and addresses included
    Reload {
        /// Only if the cluster has this version of the service, as `service list` shows it: nobody
        /// else has changed it meanwhile
        #[arg(long, value_name = "VERSION")]
        expect: Option<u64>,
        #[command(flatten)]
        control: ControlArgs,
    },
}

/// How the server ends if its node was removed from the cluster; the unit file knows it.
const STATUS_REMOVED: u8 = 3;

/// Runs the program.
pub(crate) fn run() -> ExitCode {
    let cli = Cli::parse();
    let done = |result: anyhow::Result<()>| result.map(|()| ExitCode::SUCCESS);
    let result = match cli.command {
        Command::Serve(args) => done(run_serve(*args)),
        Command::Status(args) => done(show(&args, "status")),
        Command::Clients(args) => done(show(&args, "clients")),
        Command::Exports(ExportsArgs {
            command: None,
            control,
        }) => done(show(&control, "exports")),
        Command::Exports(ExportsArgs {
            command: Some(command),
            ..
        }) => match command {
            ExportsCommand::List(args) => done(show(&args, "exports")),
            ExportsCommand::Check { file } => done(check(&file)),
            ExportsCommand::Reload { expect, control } => {
                let expect = expect.map(|version| format!(" {version}"));
                let request = format!("reload{}", expect.unwrap_or_default());
                done(show(&control, &request))
            }
        },
        Command::Locks { command } => done(run_locks(command)),
        Command::Hosts { command } => done(run_hosts(command)),
        Command::Cluster { command } => done(cluster::run(command)),
        Command::Witness { config } => done(run_witness(config)),
        Command::Guard { floating } => {
            done(guard::run(floating, std::io::stdin().as_fd()).map_err(Into::into))
        }
        Command::Service { command } => done(run_service(command)),
        Command::Config {
            command: ConfigCommand::Check { file, json },
        } => check_config(&file, json),
        Command::Doctor { serve, json } => run_doctor(*serve, json),
        Command::Demo(args) => Ok(demo::run(&args)),
        Command::DemoGuest { plan, .. } => Ok(demo::run_guest(&plan)),
        Command::MountHelp {
            host,
            path,
            control,
        } => done(help_to_mount(&host, path.as_deref(), control)),
        Command::Completions { shell } => {
            let mut command = Cli::command();
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut command, "havenfs", &mut text);
            // Whoever reads it may have seen enough.
            match std::io::stdout().write_all(&text) {
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
                _ => Ok(ExitCode::SUCCESS),
            }
        }
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            // Each cause is part of the sentence of the one above it, unless it says more.
            let mut text = error.to_string();
            for cause in error.chain().skip(1) {
                let cause = cause.to_string();
                if !text.contains(&cause) {
                    text = format!("{text}: {cause}");
                }
            }
            let _ = writeln!(std::io::stderr(), "error: {text}");
            match error.downcast_ref() {
                // To start it again and again would only knock at the others' doors.
                Some(ServeError::Store(StoreError::Removed(_))) => ExitCode::from(STATUS_REMOVED),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run_witness(config: PathBuf) -> anyhow::Result<()> {
    start_log();
    let config = config::cluster::plan(File::default(), File::read(&config)?)?;
    anyhow::ensure!(
        config.is_witness(),
        "node `{}` is not a witness\nhint: say `witness = true` at its [[cluster.member]] in the \
         configuration of all nodes, or start it with `havenfs serve`",
        config.node_name()
    );
    Ok(serve::run(&config)?)
}

fn run_serve(args: ServeArgs) -> anyhow::Result<()> {
    start_log();
    if args.with_parent {
        demo::end_with_parent()?;
    }
    match args
        .plant
        .as_deref()
        .map(|name| (name, Fault::from_name(name)))
    {
        Some((_, Some(fault))) => fault::plant(fault),
        Some((name, None)) => anyhow::bail!("no fault is called `{name}`"),
        None => fault::plant_from_environment(),
    }
    Ok(serve::run(&configuration(args)?)?)
}

/// The log goes to standard error. What the consensus engine says in passing is not for operators:
/// where it ends, its caller says why.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HAVENFS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,openraft=off"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

/// What the command line and the configuration file make together.
fn configuration(args: ServeArgs) -> anyhow::Result<NodeConfig> {
    let file = args
        .config
        .as_deref()
        .map_or_else(|| Ok(File::default()), File::read)?;
    let line = File {
        export: args.export,
        exports_file: args.exports_file,
        state_dir: args.state_dir,
        listen: (!args.listen.is_empty()).then_some(args.listen),
        nfs_port: args.nfs_port,
        mount_port: args.mount_port,
        nlm_port: args.nlm_port,
        nsm_port: args.nsm_port,
        portmap: args.portmap,
        portmap_port: args.portmap_port,
        nfs_udp: args.nfs_udp.then_some(true),
        metrics: args.metrics,
        control: args.control,
        service_names: (!args.service_name.is_empty()).then_some(args.service_name),
        announce: args.announce,
        grace_seconds: args.grace,
        reclaim: args.reclaim,
        recover: args.recover,
        ..File::default()
    };
    let mut config = config::cluster::plan(line.clone(), file)?;
    config.origin = args.config.map(|path| ConfigOrigin { line, path });
    Ok(config)
}

fn run_doctor(args: ServeArgs, json: bool) -> anyhow::Result<ExitCode> {
    tell(&doctor::run(&configuration(args)?), json)
}

/// `config check`: what `serve` would do with a file.
fn check_config(path: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let read = File::read(path).and_then(|file| config::cluster::plan(File::default(), file));
    let report = match read {
        Ok(config) => doctor::explain(&config, &config::host_name()),
        Err(error) => doctor::Report::of_error("config", &error.to_string()),
    };
    tell(&report, json)
}

fn tell(report: &doctor::Report, json: bool) -> anyhow::Result<ExitCode> {
    if json {
        print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
    } else {
        print(&report.to_string())?;
    }
    Ok(match report.worst() {
        Severity::Error => ExitCode::FAILURE,
        Severity::Ok | Severity::Warning => ExitCode::SUCCESS,
    })
}

fn help_to_mount(host: &str, path: Option<&str>, control: Option<PathBuf>) -> anyhow::Result<()> {
    let socket = control.unwrap_or_else(config::default_control);
    let running = ask(&socket, "status")
        .ok()
        .zip(ask(&socket, "exports").ok());
    let served = match running.and_then(|(status, exports)| Served::from_answers(&status, &exports))
    {
        Some(served) => served,
        // No server to ask: what it would do by default.
        None => Served::from_settings(&config::merge(File::default(), File::default())?),
    };
    print(&mount_help::text(host, path, &served))
}

fn check(file: &Path) -> anyhow::Result<()> {
    let loaded = export::load_file(file).map_err(|errors| {
        let lines: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
        anyhow::anyhow!("{}", lines.join("\n"))
    })?;
    print(&loaded.describe())
}

/// Asks the running server and prints its answer.
fn show(args: &ControlArgs, request: &str) -> anyhow::Result<()> {
    let answer = ask_server(args, request)?;
    if args.json {
        return print(&format!("{answer:#}\n"));
    }
    print(&havenfs::control::table::render(request, &answer))
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
