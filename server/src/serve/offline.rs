//! What an operator does to a node whose server is stopped: makes a cluster of it, or goes on with
//! it when all others are lost.
//!
//! Owns the lock of the state directory meanwhile, so that no server runs on it, and what besides
//! the log has to come along: the keys and the table of file handles. What is written into the log
//! is decided in [`raft`](crate::raft).

use crate::backend::handle::HandleKey;
use crate::backend::table::HandleTable;
use crate::cluster::handles::HandleEntry;
use crate::cluster::members::{HandleSecret, MemberCommand};
use crate::cluster::state::LONE_NAME;
use crate::cluster::{ClusterCommand, ClusterState, Command, ServiceCommand};
use crate::config::cluster::{ClusterConfig, NodeConfig};
use crate::raft::{self, OfflineError};
use crate::serve::ServeError;
use crate::serve::opening::replicated;
use crate::state::State;

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// See [`ServeError`].
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// See [`OfflineError`].
    #[error(transparent)]
    Offline(#[from] OfflineError),
    /// Nothing says what the cluster is.
    #[error(
        "the configuration has no [cluster]\nhint: say in it which members there are, this node \
         among them, and start the server with it afterwards"
    )]
    NoCluster,
    /// A witness has no services.
    #[error("this node is a witness, which can't be the first node of a cluster")]
    Witness,
}

fn cluster_of(config: &NodeConfig) -> Result<&ClusterConfig, RepairError> {
    config.cluster.as_ref().ok_or(RepairError::NoCluster)
}

fn open(config: &NodeConfig) -> Result<State, RepairError> {
    let state = State::open(&config.settings.state_dir);
    Ok(state.map_err(ServeError::from)?)
}

/// Makes the node the first and only one of a cluster; returns what to tell the operator.
///
/// # Errors
/// If it or another member belongs to a cluster already, or one that is not in `absent` does not
/// say; if a server runs on it, or its store can't be used.
pub fn init(config: &NodeConfig, absent: &[String]) -> Result<String, RepairError> {
    let cluster = cluster_of(config)?;
    if config.is_witness() {
        return Err(RepairError::Witness);
    }
    let own = cluster
        .members
        .iter()
        .find(|member| member.name == cluster.node);
    let own = own.ok_or(RepairError::NoCluster)?;
    let state = open(config)?;
    raft::check_none_formed(cluster, absent)?;
    let handles = HandleTable::load(state.dir()).map_err(ServeError::from)?;
    let handles: Vec<(u64, HandleEntry)> = handles
        .entries()
        .into_iter()
        .map(|(id, entry)| (id, replicated(&entry)))
        .collect();
    let services: Vec<&str> = config
        .services
        .iter()
        .map(|one| one.name.as_str())
        .collect();
    let keys = state.handle_keys();
    let commands = |whole: &ClusterState| begin(whole, &services, &keys, handles);
    let dir = state.dir().join("store");
    let id = raft::begin(&dir, (&own.name, own.address), commands)?;
    let others: Vec<String> = cluster
        .members
        .iter()
        .filter(|member| member.name != cluster.node)
        .map(|member| {
            let witness = if member.witness { " --witness" } else { "" };
            let (name, address) = (&member.name, member.address);
            format!("\nhint: `havenfs cluster add {name} --address {address}{witness}`")
        })
        .collect();
    Ok(format!(
        "node `{}` is the only member of cluster {id:016x} now; start its server, then the others \
         with empty state directories, and add them one by one{}",
        own.name,
        others.join("")
    ))
}

/// What is to be added to the log of a server without a cluster, which has this state.
fn begin(
    whole: &ClusterState,
    services: &[&str],
    keys: &[HandleKey],
    handles: Vec<(u64, HandleEntry)>,
) -> Result<Vec<Command>, String> {
    let is_known = |name: &str| services.contains(&name);
    // What has no name of its own takes that of the only one.
    let renamed: Option<(Box<str>, Box<str>)> = match services {
        [only] if !is_known(LONE_NAME) && whole.service_named(only).is_none() => {
            Some((LONE_NAME.into(), Box::from(*only)))
        }
        _ => None,
    };
    let becomes = |name: &str| match &renamed {
        Some((from, to)) if **from == *name => is_known(to),
        _ => is_known(name),
    };
    for (_, service) in whole.services() {
        let locks = service.table().lock_count();
        if !becomes(service.name()) && (locks > 0 || service.epoch() > 0) {
            let name = service.name();
            return Err(format!(
                "service `{name}`, which has {locks} locks, is not in the configuration\nhint: give \
                 the [[service]] that is to have them the name `{name}`"
            ));
        }
    }
    let handle_keys = keys.iter().map(|key| HandleSecret {
        id: key.id,
        secret: key.secret,
    });
    let begin = MemberCommand::Begin {
        renamed,
        handle_keys: handle_keys.collect(),
    };
    let mut commands = vec![Command::Cluster(ClusterCommand::Members(begin))];
    // They lie in one file for all services of the node.
    for (service, state) in whole.services() {
        let epoch = state.epoch();
        commands.extend(handles.iter().map(|(id, entry)| {
            let (id, entry) = (*id, Some(entry.clone()));
            Command::Service(service, ServiceCommand::SetHandle { epoch, id, entry })
        }));
    }
    Ok(commands)
}

/// Makes the node the only one of its cluster; returns what to tell the operator.
///
/// # Errors
/// If not all other voters are named or one of them answers, a server runs on it, or its store
/// can't be used.
pub fn sole_survivor(
    config: &NodeConfig,
    fenced: &[String],
    none_went_on: bool,
) -> Result<String, RepairError> {
    let cluster = cluster_of(config)?;
    let state = open(config)?;
    let store = state.dir().join("store");
    raft::check_none_lives(cluster, &store)?;
    let survived = raft::survive(&store, fenced, none_went_on)?;
    let tables = if survived.is_incomplete {
        "locks may be missing that hosts were told to have, so that each service begins with \
         grace, in which hosts reclaim theirs"
    } else {
        "all locks are there"
    };
    Ok(format!(
        "this node is the only member of the cluster now, in its generation {}; {tables}\nhint: \
         start its server. To have another node back ({}), move its state directory away before \
         you start it, and say `havenfs cluster add`",
        survived.generation,
        survived.lost.join(", ")
    ))
}
