//! `havenfs cluster`: looks at the cluster, changes its members, and two repairs of a stopped node.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Subcommand;
use havenfs::config::{self, File};
use havenfs::serve::offline;

use super::{ControlArgs, print, show};

#[derive(Debug, Subcommand)]
pub(super) enum ClusterCommand {
    /// Show the members, who leads, and where each service is
    Status(ControlArgs),
    /// Have another node lead the cluster: no service moves, no client notices
    Transfer {
        /// The node; any that has the data if left out
        #[arg(long, value_name = "NODE")]
        to: Option<String>,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Add a node that was started with an empty state directory and waits
    Add {
        /// Its name, as its configuration says it
        name: String,
        /// Where the members reach it
        #[arg(long, value_name = "IP:PORT")]
        address: SocketAddr,
        /// It only votes
        #[arg(long)]
        witness: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Remove a node: it stops, and the others don't wait for it any more
    Remove {
        /// Its name
        name: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Make a cluster of this node alone, whose server is stopped. The locks and handles of a
    /// server without a cluster stay valid; the other nodes are added later
    Init {
        /// Configuration file with the cluster (TOML)
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Another member of the configuration that can't be asked, and of which you know that it
        /// belongs to no cluster; say it for each of them
        #[arg(long, value_name = "NODE")]
        absent: Vec<String>,
    },
    /// When all other voters are lost for good: make a cluster of this node alone, whose server is
    /// stopped. If one of the others still runs, files will be damaged
    SoleSurvivor {
        /// Configuration file with the cluster (TOML)
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// A voter that you have made sure is off, and stays off; say it for each of them
        #[arg(long, value_name = "NODE")]
        i_fenced: Vec<String>,
        /// You know that no other node has gone on alone after this one ended, made a sole survivor
        /// itself. Without it locks count as missing, and services begin with grace
        #[arg(long)]
        none_went_on_alone: bool,
    },
}

pub(super) fn run(command: ClusterCommand) -> anyhow::Result<()> {
    match command {
        ClusterCommand::Status(control) => show(&control, "cluster"),
        ClusterCommand::Transfer { to, control } => {
            let words = ["transfer".to_owned()].into_iter().chain(to);
            show(&control, &words.collect::<Vec<_>>().join(" "))
        }
        ClusterCommand::Add {
            name,
            address,
            witness,
            control,
        } => {
            let witness = if witness { " witness" } else { "" };
            show(&control, &format!("add {name} {address}{witness}"))
        }
        ClusterCommand::Remove { name, control } => show(&control, &format!("remove {name}")),
        ClusterCommand::Init { config, absent } => {
            let config = config::cluster::plan(File::default(), File::read(&config)?)?;
            print(&format!("{}\n", offline::init(&config, &absent)?))
        }
        ClusterCommand::SoleSurvivor {
            config,
            i_fenced,
            none_went_on_alone,
        } => {
            let config = config::cluster::plan(File::default(), File::read(&config)?)?;
            print(&format!(
                "{}\n",
                offline::sole_survivor(&config, &i_fenced, none_went_on_alone)?
            ))
        }
    }
}
