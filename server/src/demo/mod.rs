//! `havenfs demo`: a cluster on this machine loses a node while two clients lock and write.
//!
//! Three nodes are started as processes of this program, on loopback addresses of their own, or
//! with `--netns` each on a network of its own, with an address that moves between them. Two
//! clients in this process, which share no code with the server but the wire formats, keep a ledger
//! of what they were told; then the active node is killed, and the ledger is held against what the
//! others answer. Needs no root (but for `--netns`), no other software and no home directory, and
//! takes its directory and its processes away again.
//!
//! An edge like `cli`: errors are sentences for a person, so `anyhow` is right here. Nothing of the
//! server knows this module.
//!
//! - `site`: directory, addresses, ports, configuration.  - `cluster`: the nodes.
//! - `stage`: namespaces for all of it.  - `bridge`: the nodes' network.  - `sight`: who has the
//!   address.  - `linux`: a kernel as a client, in a virtual machine.  - `guest`: what runs there.
//! - `client`: a client's machine.  - `writer`: the load.  - `ledger`: what was told.
//! - `story`: what happens, in order.  - `proof`: the checks.
//! - `timeline`: what is shown.  - `interrupt`: Ctrl-C, and no process left behind.
//!
//! Exit status: 0 if all promises were kept, 1 if one was broken (also where a fault was planted),
//! 2 if the demo could not be carried out or did not notice the fault, 130 after Ctrl-C.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};

mod bridge;
mod client;
mod cluster;
mod guest;
mod interrupt;
mod ledger;
mod linux;
mod proof;
mod sight;
mod site;
mod stage;
mod story;
mod timeline;
mod writer;

pub(crate) use self::guest::run as run_guest;
pub(crate) use self::interrupt::end_with_parent;

use self::bridge::Bridge;
use self::cluster::Cluster;
use self::interrupt::Interrupted;
use self::ledger::BrokenPromise;
use self::site::{Site, Where};
use self::story::Ending;
use self::timeline::Timeline;

const EXIT_BROKEN: u8 = 1;
const EXIT_FAILED: u8 = 2;
/// What the second process of `--netns` is started with.
const ON_STAGE: &str = "--on-stage";

/// What the demo is to do.
#[derive(Debug, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the command line"
)]
pub(crate) struct DemoArgs {
    /// Keep the directory with the nodes' logs, and say where it is
    #[arg(long)]
    keep: bool,
    /// Directory to work in, empty or new [default: a new one in the temporary directory]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Plant a fault in the nodes, to see that the demo notices it: ends with a broken promise
    #[arg(long = "break", value_name = "FAULT")]
    fault: Option<Fault>,
    /// Pause the active node instead of killing it, and see that it does not answer when it wakes
    #[arg(long, conflicts_with = "fault")]
    pause: bool,
    /// Give each node a network of its own, with an address that moves, and cut the power of one;
    /// with a real Linux client if User Mode Linux is installed. Needs root
    #[arg(long, conflicts_with = "pause")]
    netns: bool,
    /// This is the process in the namespaces that `--netns` makes
    #[arg(long, hide = true, requires = "netns")]
    on_stage: bool,
    /// Show details
    #[arg(long)]
    verbose: bool,
}

/// A fault that can be planted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Fault {
    /// A granted lock is forgotten
    Grant,
    /// A node goes on answering after its lease has run out
    Lease,
    /// Acknowledged data is not on stable storage
    Fsync,
}

impl Fault {
    /// What `serve --plant` calls it.
    const fn name(self) -> &'static str {
        match self {
            Self::Grant => "grant",
            Self::Lease => "lease",
            Self::Fsync => "fsync",
        }
    }

    const fn words(self) -> &'static str {
        match self {
            Self::Grant => "the nodes forget locks that they have granted",
            Self::Lease => "the nodes answer although their lease has run out",
            Self::Fsync => "the nodes acknowledge data that they only have in memory",
        }
    }
}

/// Runs the demo.
pub(crate) fn run(args: &DemoArgs) -> ExitCode {
    if args.netns && !args.on_stage {
        if args.fault == Some(Fault::Lease) {
            tell(
                "error: a node whose lease is over cannot answer where its address moves: the \
                 guard takes the address away\nhint: plant this fault without --netns",
            );
            return ExitCode::from(EXIT_FAILED);
        }
        return stage::raise().unwrap_or_else(|error| {
            tell(&format!("error: {error:#}"));
            ExitCode::from(EXIT_FAILED)
        });
    }
    let timeline = Timeline::new(args.verbose);
    match play(args, &timeline) {
        Ok(verdict) if args.fault.is_none() => {
            timeline.verdict(true, &format!("OK: {verdict}"));
            ExitCode::SUCCESS
        }
        Ok(_) => {
            let text = "NOT NOTICED: a fault was planted, and every check has passed";
            timeline.verdict(false, text);
            ExitCode::from(EXIT_FAILED)
        }
        Err(error) if error.is::<Interrupted>() => {
            tell(if args.keep {
                "stopped"
            } else {
                "stopped; nothing is left behind"
            });
            ExitCode::from(interrupt::EXIT_CODE)
        }
        Err(error) => {
            if let Some(promise) = error.downcast_ref::<BrokenPromise>() {
                timeline.verdict(false, &format!("BROKEN PROMISE: {promise}"));
                return ExitCode::from(EXIT_BROKEN);
            }
            tell(&format!(
                "error: the demo could not be carried out: {error:#}"
            ));
            ExitCode::from(EXIT_FAILED)
        }
    }
}

/// Tells the story; everything that was started or made is gone when this returns.
fn play(args: &DemoArgs, timeline: &Timeline) -> Result<String> {
    interrupt::watch()?;
    let place = if args.netns {
        stage::enter()?;
        timeline.title("havenfs demo: three machines, and one of them loses its power");
        Where::Bridge
    } else {
        timeline.title("havenfs demo: three nodes, two clients, one of the nodes dies");
        Where::Loopback
    };
    let site = Site::make(args.root.as_deref(), args.keep, place)?;
    if let Some(fault) = args.fault {
        timeline.section("Planted fault", "");
        timeline.step(None, &format!("{}: this must be noticed", fault.words()));
    }
    let bridge = match place {
        Where::Loopback => None,
        Where::Bridge => Some(Bridge::make(&site)?),
    };
    let mut cluster = Cluster::new(&site, args.fault.map(Fault::name), bridge);
    let ending = if args.pause || args.fault == Some(Fault::Lease) {
        Ending::Pause
    } else {
        Ending::Kill
    };
    let result = story::tell(&mut cluster, timeline, ending);
    if let Err(error) = &result {
        let wanted = error.is::<Interrupted>() || args.fault.is_some();
        let logs = cluster.logs();
        if !wanted && !logs.is_empty() {
            tell(logs.trim_end());
            if !args.keep {
                tell("--- to keep the whole logs, run it again with --keep");
            }
        }
    }
    drop(cluster);
    if args.keep {
        timeline.gap();
        timeline.step(None, &format!("kept: {}", site.root().display()));
    }
    result
}

fn tell(text: &str) {
    if !text.is_empty() {
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}
