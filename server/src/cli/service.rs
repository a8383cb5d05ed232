//! `havenfs service`: where the services of a cluster are, and where they are to be.

use clap::Subcommand;

use super::locks::agree;
use super::{ControlArgs, show};

#[derive(Debug, Subcommand)]
pub(super) enum ServiceCommand {
    /// Show where each service is
    List(ControlArgs),
    /// Move a service to another node: clients notice a short pause. Waits until it is served there
    Move {
        /// The service
        name: String,
        /// The node that is to serve it
        #[arg(long, value_name = "NODE")]
        to: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Have the node that you are on serve a service, also if it was released. If another node has
    /// it, it is moved: clients notice a short pause
    Take {
        /// The service
        name: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Stop a service and have no node serve it, over restarts of all nodes, until `take` or
    /// `move`: to work on its storage. Locks are kept
    Release {
        /// The service
        name: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Tell all machines that lock files of a service that it was restarted, so that they reclaim
    /// their locks. To be said on the node that serves it
    Announce {
        /// The service
        name: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Say that you have made sure that a lost node is off, where its fence fails: the service is
    /// opened without it. If the node can still write, files will be damaged
    ConfirmFence {
        /// The service
        name: String,
        /// The node that is off
        #[arg(long, value_name = "NODE")]
        node: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// End a service that is in the files of no node any more, as after it was renamed there: its
    /// locks are gone, and its addresses and directories are free for others
    Forget {
        /// The service
        name: String,
        /// Don't ask
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// End grace now: locks that were not reclaimed are gone
    EndGrace(ControlArgs),
}

pub(super) fn run_service(command: ServiceCommand) -> anyhow::Result<()> {
    match command {
        ServiceCommand::EndGrace(control) => show(&control, "end-grace"),
        ServiceCommand::List(control) => show(&control, "services"),
        ServiceCommand::ConfirmFence {
            name,
            node,
            control,
        } => show(&control, &format!("confirm-fence {name} {node}")),
        ServiceCommand::Forget { name, yes, control } => {
            agree(yes, &control, &format!("would-forget {name}"))?;
            show(&control, &format!("forget {name}"))
        }
        ServiceCommand::Take { name, control } => show(&control, &format!("take {name} wait")),
        ServiceCommand::Release { name, control } => show(&control, &format!("release {name}")),
        ServiceCommand::Announce { name, control } => show(&control, &format!("announce {name}")),
        ServiceCommand::Move { name, to, control } => {
            show(&control, &format!("move {name} {to} wait"))
        }
    }
}
