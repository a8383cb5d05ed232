//! `havenfs locks` and `havenfs hosts`: looks at locks and the machines that have them, and ends
//! what will not end by itself.

use std::net::IpAddr;

use clap::Subcommand;
use serde_json::Value;

use super::{ControlArgs, ask_server, print, show};

#[derive(Debug, Subcommand)]
pub(super) enum LocksCommand {
    /// Show who holds what
    List(ControlArgs),
    /// Show who waits for what
    Waiting(ControlArgs),
    /// Have a host reclaim its locks now, and show those that it does not know of
    Verify {
        /// The host's address
        host: IpAddr,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// End the locks of a host that will not unlock them itself: whoever waits gets them. Programs
    /// on that host may still write as if they had them
    Break {
        /// The host's address
        host: IpAddr,
        /// Only those on this file, as `locks list` shows it
        #[arg(value_parser = clap::builder::NonEmptyStringValueParser::new())]
        path: Option<String>,
        /// Refuse what the host writes to that file, or to any, until `locks allow`
        #[arg(long)]
        refuse_writes: bool,
        /// Don't ask
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Show whose writes are refused
    Refused(ControlArgs),
    /// Let a host write again
    Allow {
        /// The host's address
        host: IpAddr,
        /// Only to this file
        #[arg(value_parser = clap::builder::NonEmptyStringValueParser::new())]
        path: Option<String>,
        #[command(flatten)]
        control: ControlArgs,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum HostsCommand {
    /// Show the machines that lock files
    List(ControlArgs),
    /// Show all about a host: what it holds and waits for, and whether it heard of the last restart
    Show {
        /// The host's address
        host: IpAddr,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Tell a host that the service was restarted, so that it reclaims its locks
    Notify {
        /// The host's address
        host: IpAddr,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// End all that a host has, since it is gone for good, and tell it of restarts no more
    Expire {
        /// The host's address
        host: IpAddr,
        /// Don't ask
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
}

pub(super) fn run_locks(command: LocksCommand) -> anyhow::Result<()> {
    match command {
        LocksCommand::List(control) => show(&control, "locks"),
        LocksCommand::Waiting(control) => show(&control, "waiting"),
        LocksCommand::Verify { host, control } => show(&control, &format!("verify {host}")),
        LocksCommand::Break {
            host,
            path,
            refuse_writes,
            yes,
            control,
        } => {
            let what = subject(host, path.as_deref());
            agree(yes, &control, &format!("would-break {what}"))?;
            // First, so that no write comes between.
            if refuse_writes {
                show(&control, &format!("refuse {what}"))?;
            }
            show(&control, &format!("break {what}"))
        }
        LocksCommand::Refused(control) => show(&control, "refused"),
        LocksCommand::Allow {
            host,
            path,
            control,
        } => show(
            &control,
            &format!("allow {}", subject(host, path.as_deref())),
        ),
    }
}

pub(super) fn run_hosts(command: HostsCommand) -> anyhow::Result<()> {
    match command {
        HostsCommand::List(control) => show(&control, "hosts"),
        HostsCommand::Show { host, control } => show(&control, &format!("host {host}")),
        HostsCommand::Notify { host, control } => show(&control, &format!("notify {host}")),
        HostsCommand::Expire { host, yes, control } => {
            agree(yes, &control, &format!("would-break {host}"))?;
            show(&control, &format!("expire {host}"))
        }
    }
}

fn subject(host: IpAddr, path: Option<&str>) -> String {
    path.map_or_else(|| host.to_string(), |path| format!("{host} {path}"))
}

/// Has the server say what would be done, and asks, unless `yes` was said already.
pub(super) fn agree(yes: bool, control: &ControlArgs, request: &str) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    let answer = ask_server(control, request)?;
    let plan = answer.get("done").and_then(Value::as_str);
    let question = format!("{}\nGo on? [y/N] ", plan.unwrap_or_default());
    anyhow::ensure!(confirmed(&question)?, "nothing was changed");
    Ok(())
}

/// Asks a question and reads the answer; anything but yes is no.
fn confirmed(question: &str) -> anyhow::Result<bool> {
    print(question)?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
}
