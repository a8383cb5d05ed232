//! The cluster and its services as the control socket shows them, and what an operator may do to
//! them.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cluster::definition::Defined;
use crate::cluster::{ClusterCommand, Command, NodeId, Outcome, ServiceCommand, ServiceState};
use crate::definitions;
use crate::services::{Services, Slot, Takeover};

/// What is so of the cluster and all services.
pub(super) fn status(services: &Services) -> Value {
    let listed = services_known(services);
    let leader = services.cluster.leader();
    let mut status = json!({
        "node": services.config.node_name(),
        "services": listed,
    });
    if services.config.cluster.is_some() {
        status["leader"] = json!(leader.map(|leader| services.cluster.name_of(leader)));
        status["term"] = json!(services.cluster.term());
        status["members"] = members(services);
    }
    status
}

fn members(services: &Services) -> Value {
    let members = services.cluster.members();
    let state = services.state();
    let members = members.iter().map(|member| {
        json!({
            "name": member.name,
            "number": member.node.0,
            "address": member.address,
            "witness": member.witness,
            "lives": services.cluster.is_heard(member, &state),
        })
    });
    members.collect()
}

/// Those that this node has in its configuration, and those that only the cluster knows.
fn services_known(services: &Services) -> Vec<Value> {
    let state = services.state();
    let configured = services.slots.iter().map(|slot| {
        let service = slot.id.get().and_then(|id| state.service(*id));
        one(services, &slot.config.name, service, Some(slot))
    });
    let is_configured = |name: &str| services.slots.iter().any(|slot| slot.config.name == name);
    let others = state.services();
    let others = others.filter(|(_, service)| !is_configured(service.name()));
    let others = others.map(|(_, service)| one(services, service.name(), Some(service), None));
    configured.chain(others).collect()
}

fn one(
    services: &Services,
    name: &str,
    service: Option<&ServiceState>,
    slot: Option<&Arc<Slot>>,
) -> Value {
    let active = service.and_then(ServiceState::active);
    let serving = slot.and_then(|slot| slot.serving());
    let takeover = slot.and_then(|slot| slot.takeover());
    let is_kept = services.config.cluster.is_some();
    let needs_fence = slot.is_some_and(|slot| slot.config.hooks.fence.is_some());
    // Where nothing is fenced it is of no concern.
    let unfenced = service.filter(|_| needs_fence).map(|service| {
        let nodes = service.unfenced();
        let names = nodes.map(|node| services.cluster.name_of(node));
        names.collect::<Vec<_>>()
    });
    let defined = service.and_then(ServiceState::defined);
    json!({
        "name": name,
        "definition": defined.zip(service).map(|(defined, service)| {
            definition(defined, service, slot)
        }),
        "addresses": slot.map(|slot| &slot.config.settings.listen),
        "interface": slot.and_then(|slot| slot.floating.as_ref()).map(|floating| json!({
            "name": floating.config().interface,
            "link": *floating.link().borrow(),
            "addresses_here": floating.is_up(),
        })),
        "names": match (defined, slot) {
            (Some(defined), _) => Some(definitions::names_of(&defined.definition)),
            (None, slot) => slot.map(|slot| slot.config.settings.service_names.clone()),
        },
        "preferred": slot.and_then(|slot| slot.config.preferred.as_ref()),
        "active": active.map(|active| services.cluster.name_of(active.node)),
        "serving": serving.is_some_and(|node| node.gate.is_open()),
        "unfenced": unfenced.unwrap_or_default(),
        "epoch": service.map(ServiceState::epoch),
        "nsm_state": service.map(|service| service.nsm_state().0),
        "complete": service.map(|service| !service.in_grace()),
        "locks": service.map(|service| service.table().lock_count()),
        "waiting": service.map(|service| service.table().waiting_count()),
        // Nobody takes over from a server without a cluster, so they are not kept.
        "connections": is_kept.then(|| service.map(|service| service.connections().len())),
        "mounts": is_kept.then(|| service.map(|service| service.mounts().len())),
        "last_takeover": takeover.map(|takeover| told(services, &takeover)),
    })
}

/// What the service is, and how this node stands to it.
fn definition(defined: &Defined, service: &ServiceState, slot: Option<&Arc<Slot>>) -> Value {
    let Defined {
        version,
        definition,
    } = defined;
    let files = slot.and_then(|slot| slot.files());
    let is_unread = slot.is_some() && files.is_none();
    let differs = files.map(|files| files.differences(definition));
    let in_force = service.in_force();
    let addresses = definition.addresses.iter();
    json!({
        "version": version,
        // The last one that the active node has made something of.
        "in_force": in_force.version,
        "addresses": addresses.map(ToString::to_string).collect::<Vec<_>>(),
        "exports": definition.exports.len(),
        "differs": differs.unwrap_or_default(),
        "unread": is_unread,
        "restart": slot.is_some_and(|slot| slot.runs_other_addresses(definition)),
        "refused": in_force.refused.then(|| json!({
            "version": in_force.version,
            "problem": in_force.said,
        })),
    })
}

fn told(services: &Services, takeover: &Takeover) -> Value {
    let phases: Vec<Value> = takeover
        .phases
        .iter()
        .map(|(name, took)| json!({ "name": name, "ms": ms(*took) }))
        .collect();
    json!({
        "kind": takeover.kind,
        "from": takeover.from.map(|node| services.cluster.name_of(node)),
        "epoch": takeover.epoch,
        "phases": phases,
        "total_ms": ms(takeover.total()),
    })
}

/// In tenths.
fn ms(took: Duration) -> f64 {
    (took.as_secs_f64() * 10_000.0).round() / 10.0
}

/// Answers a request that is about the cluster; none if it is not.
pub(super) async fn answer(
    services: &Arc<Services>,
    request: &str,
) -> Option<Result<Value, Value>> {
    let (word, rest) = request.split_once(' ').unwrap_or((request, ""));
    match word {
        "cluster" | "services" => Some(Ok(status(services))),
        "move" => Some(move_service(services, rest).await),
        "confirm-fence" => Some(confirm_fence(services, rest).await),
        _ => None,
    }
}

/// `move SERVICE NODE`.
async fn move_service(services: &Arc<Services>, words: &str) -> Result<Value, Value> {
    let error = |text: String| json!({ "error": text });
    let (name, to) = words
        .split_once(' ')
        .ok_or_else(|| error("say which service to move, and to which node".to_owned()))?;
    let (service, active) = {
        let state = services.state();
        let id = state
            .service_named(name)
            .ok_or_else(|| error(format!("the cluster has no service `{name}`")))?;
        (id, state.service(id).and_then(ServiceState::active))
    };
    let nodes = services.cluster.data_nodes();
    let node = services
        .cluster
        .node_of(to)
        .filter(|node| nodes.contains(node))
        .ok_or_else(|| {
            let names: Vec<String> = nodes
                .iter()
                .map(|node| services.cluster.name_of(*node))
                .collect();
            error(format!(
                "no node `{to}` can serve; there are: {}",
                names.join(", ")
            ))
        })?;
    if active.is_some_and(|active| active.node == node) {
        return Err(error(format!("service `{name}` is on node {to} already")));
    }
    if !services.cluster.lives(node, &services.state()) {
        return Err(error(format!(
            "node {to} has not renewed its lease lately, so it can't take service `{name}`"
        )));
    }
    let command = Command::Cluster(ClusterCommand::Move { service, to: node });
    let asked = tokio::time::timeout(ASK_TIME_MAX, services.proposer.ask(command)).await;
    match asked {
        Ok(Ok(Outcome::Done)) => Ok(json!({
            "done": format!("service `{name}` moves to node {to}; see `havenfs status`"),
        })),
        Ok(Ok(_)) => Err(error(format!(
            "service `{name}` is not known to the cluster"
        ))),
        Ok(Err(problem)) => Err(error(problem.to_string())),
        Err(_) => Err(error(
            "the cluster has no majority now, so nothing can be moved".to_owned(),
        )),
    }
}

/// `confirm-fence SERVICE [NODE]`: an operator has made sure that a node, or all that are waited
/// for, can't write to the storage any more. In the epoch that is asked about: if another node is
/// lost meanwhile, nothing is said of that one.
async fn confirm_fence(services: &Arc<Services>, words: &str) -> Result<Value, Value> {
    let error = |text: String| json!({ "error": text });
    let (name, node) = match words.split_once(' ') {
        Some((name, node)) => (name, Some(node)),
        None => (words, None),
    };
    let name_of = |node: &NodeId| services.cluster.name_of(*node);
    let (id, epoch, nodes, all) = {
        let state = services.state();
        let found = state.service_named(name);
        let service = found.and_then(|id| Some((id, state.service(id)?)));
        let (id, service) =
            service.ok_or_else(|| error(format!("the cluster has no service `{name}`")))?;
        let all: Vec<NodeId> = service.unfenced().collect();
        let mut nodes = all.clone();
        nodes.retain(|one| node.is_none_or(|node| name_of(one) == node));
        (id, service.epoch(), nodes, all)
    };
    let names = |nodes: &[NodeId]| nodes.iter().map(name_of).collect::<Vec<_>>().join(", ");
    if nodes.is_empty() {
        return Err(error(match node {
            Some(node) if !all.is_empty() => format!(
                "service `{name}` does not wait for a fence of {node}, but of {}",
                names(&all)
            ),
            _ => format!("service `{name}` waits for no fence"),
        }));
    }
    let confirmed = names(&nodes);
    let command = Command::Service(id, ServiceCommand::Fenced { epoch, nodes });
    let asked = tokio::time::timeout(ASK_TIME_MAX, services.proposer.ask(command)).await;
    match asked {
        Ok(Ok(Outcome::Done)) => {
            tracing::warn!(
                service = name,
                epoch,
                nodes = confirmed,
                "an operator confirms that they can't write any more"
            );
            Ok(json!({
                "done": format!("service `{name}` does not wait for a fence of {confirmed} any more"),
            }))
        }
        Ok(Ok(_)) => Err(error(format!(
            "another node has taken service `{name}` just now: see `havenfs service list`, and \
             confirm again"
        ))),
        Ok(Err(problem)) => Err(error(problem.to_string())),
        Err(_) => Err(error(
            "the cluster has no majority now, so nothing can be confirmed".to_owned(),
        )),
    }
}

/// How long an operator is kept waiting.
const ASK_TIME_MAX: Duration = Duration::from_secs(5);
