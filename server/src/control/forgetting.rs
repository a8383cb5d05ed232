//! Ends a service that is in the files of no node any more.
//!
//! Whether it is can't be known of a node that is off. Of those that live it is known what their
//! processes were started with, and as long as one of them has the service nothing is forgotten.

use std::sync::Arc;

use serde_json::{Value, json};

use super::cluster::ASK_TIME_MAX;
use crate::clock::boot_time;
use crate::cluster::command::RenewalId;
use crate::cluster::lease::wait;
use crate::cluster::{
    ClusterCommand, ClusterState, Command, NodeId, Outcome, ServiceId, ServiceState,
};
use crate::services::Services;

/// A service that may be forgotten.
struct Plan {
    id: ServiceId,
    /// The last renewal of the node that had it; its lease is over.
    after: Option<RenewalId>,
    /// What ends with it, for people.
    ends: String,
    /// The node that had it when it was lost.
    lost: Option<String>,
}

/// `would-forget SERVICE`: what `forget` would do.
pub(super) fn would_forget(services: &Services, name: &str) -> Result<Value, Value> {
    let plan = plan(services, name)?;
    let mut text = format!(
        "Service `{name}` will end on all nodes, for good: its definition and {}. Its clients are \
         not told. Its name, addresses and directories are free then. It must be out of the files \
         of all nodes first: one that still has it in there names it anew, without its locks, when \
         it starts.",
        plan.ends
    );
    if let Some(node) = plan.lost {
        text.push_str(" Make sure that node ");
        text.push_str(&node);
        text.push_str(", which had it last and does not answer, is off.");
    }
    Ok(json!({ "done": text }))
}

/// `forget SERVICE`.
pub(super) async fn forget(services: &Arc<Services>, name: &str) -> Result<Value, Value> {
    let Plan {
        id, after, ends, ..
    } = plan(services, name)?;
    let service = id;
    let command = Command::Cluster(ClusterCommand::Forget { service, after });
    let asked = tokio::time::timeout(ASK_TIME_MAX, services.proposer.ask(command)).await;
    match asked {
        Ok(Ok(Outcome::Done)) => {
            tracing::warn!(service = name, "an operator has it forgotten, with {ends}");
            Ok(json!({
                "done": format!("service `{name}` is forgotten, and {ends} with it"),
            }))
        }
        Ok(Ok(Outcome::NoSuchService)) => {
            Err(error(format!("service `{name}` is forgotten already")))
        }
        Ok(Ok(Outcome::AwaitsFence(_))) => Err(error(format!(
            "the node that had service `{name}` last may still write to its storage\nhint: make sure \
             that it is off, say so with `havenfs service confirm-fence {name} --node NODE`, and \
             forget the service then"
        ))),
        Ok(Ok(_)) => Err(error(format!(
            "a node has taken service `{name}` just now\nhint: see `havenfs service list`"
        ))),
        Ok(Err(problem)) => Err(error(problem.to_string())),
        Err(_) => Err(error(
            "the cluster has no majority now, so nothing can be forgotten\nhint: see `havenfs \
             cluster status`"
                .to_owned(),
        )),
    }
}

/// Looks whether a service may be forgotten.
fn plan(services: &Services, name: &str) -> Result<Plan, Value> {
    super::cluster::in_cluster(services)?;
    let cluster = &services.cluster;
    let (state, nodes) = {
        // Cheap to clone; names of nodes are looked up without it.
        let state = services.state().clone();
        let nodes = cluster.members();
        (state, nodes)
    };
    let name_of = |node: NodeId| {
        let mut members = nodes.iter();
        let member = members.find(|member| member.node == node);
        member.map_or_else(|| cluster.name_of(node), |member| member.name.clone())
    };
    let (id, service) = super::cluster::known(&state, name)?;
    if let Some(node) = configured_on(services, &state, service).next() {
        let node = name_of(node);
        return Err(error(format!(
            "node {node} has service `{name}` in its files\nhint: take it out of the files of all \
             nodes and restart them; then nothing is left of it but what the cluster remembers"
        )));
    }
    let unfenced: Vec<String> = service.unfenced().map(name_of).collect();
    if !unfenced.is_empty() {
        return Err(error(format!(
            "{} may still write to the storage of service `{name}`\nhint: make sure that it is \
             off, and say so with `havenfs service confirm-fence {name} --node {}`",
            unfenced.join(", "),
            unfenced[0]
        )));
    }
    let (mut after, mut lost) = (None, None);
    if let Some(active) = service.active() {
        let last = state.last_renewal(active.node);
        if last.is_none_or(|last| last.incarnation <= active.incarnation) {
            // An older renewal was seen before the last one was proposed.
            let seen = cluster.seen(active.node);
            let seen = seen.zip(last).filter(|(seen, last)| seen.id >= last.id());
            let is_over = seen.is_some_and(|(seen, last)| seen.at + wait(last) < boot_time());
            if !is_over {
                return Err(error(format!(
                    "service `{name}` is on node {}, whose lease is not over\nhint: take it out of \
                     the files of that node and restart it, or wait some seconds if it is dead",
                    name_of(active.node)
                )));
            }
            after = last.map(crate::cluster::command::Renewal::id);
            lost = Some(name_of(active.node));
        }
    }
    let table = service.table();
    let ends = format!(
        "{} locks and {} waiting requests",
        table.lock_count(),
        table.waiting_count()
    );
    Ok(Plan {
        id,
        after,
        ends,
        lost,
    })
}

/// The nodes that live, and whose processes were started with a service.
fn configured_on<'a>(
    services: &'a Services,
    state: &'a ClusterState,
    service: &'a ServiceState,
) -> impl Iterator<Item = NodeId> + 'a {
    let running = service.running().iter();
    let here = running.filter(move |runs| {
        let own = services.cluster.own();
        let life = if runs.node == own.node {
            Some(own.incarnation)
        } else {
            let last = state.last_renewal(runs.node);
            last.map(|last| last.incarnation)
        };
        life == Some(runs.incarnation) && services.cluster.lives(runs.node, state)
    });
    here.map(|runs| runs.node)
}

fn error(text: String) -> Value {
    json!({ "error": text })
}
