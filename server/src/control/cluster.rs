//! The cluster and its services as the control socket shows them, and what an operator may do to
//! them.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::socket::unless_over;
use super::{acts, applicants, forgetting, moving};
use crate::cluster::definition::Defined;
use crate::cluster::{
    ClusterCommand, ClusterState, Command, NodeId, Outcome, ServiceCommand, ServiceId,
    ServiceState, Wish,
};
use crate::definitions;
use crate::raft::MemberChange;
use crate::services::{Health, Services, Slot, Takeover, total};

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
        // Only where nobody leads now.
        let led = services
            .cluster
            .last_leader()
            .filter(|led| leader.is_none() && *led != services.cluster.own().node);
        status["led"] = json!(led.map(|led| services.cluster.name_of(led)));
        status["term"] = json!(services.cluster.term());
        status["members"] = members(services);
        status["joint"] = json!(services.cluster.is_joint());
        status["waiting"] = applicants::waiting(services);
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
            "address": member.address.to_string(),
            "witness": member.witness,
            "votes": member.votes,
            "lives": services.cluster.is_heard(member, &state),
            "leaves": state.members().is_retired(member.node),
        })
    });
    members.collect()
}

/// Those that this node has in its configuration, and those that only the cluster knows.
fn services_known(services: &Services) -> Vec<Value> {
    // Before the state is read, since this may wait for the kernel, and changes of the state would
    // wait as well: renewals of leases among them.
    let here = services.slots.iter().map(|slot| {
        let floating = slot.floating.as_ref();
        floating.is_some_and(|floating| floating.is_up())
    });
    let here: Vec<bool> = here.collect();
    let state = services.state();
    let configured = services.slots.iter().zip(here).map(|(slot, is_here)| {
        let service = slot.id.get().copied();
        let service = service.and_then(|id| Some((id, state.service(id)?)));
        one(services, &slot.config.name, service, Some((slot, is_here)))
    });
    let is_configured = |name: &str| services.slots.iter().any(|slot| slot.config.name == name);
    let others = state.services();
    let others = others.filter(|(_, service)| !is_configured(service.name()));
    let others = others.map(|(id, service)| {
        let name = service.name();
        one(services, name, Some((id, service)), None)
    });
    configured.chain(others).collect()
}

fn one(
    services: &Services,
    name: &str,
    service: Option<(ServiceId, &ServiceState)>,
    slot: Option<(&Arc<Slot>, bool)>,
) -> Value {
    let (slot, is_here) = slot.unzip();
    let (id, service) = service.unzip();
    let active = service.and_then(ServiceState::active);
    let serving = slot.and_then(|slot| slot.serving());
    let takeover = slot.and_then(|slot| slot.takeover());
    let is_kept = services.config.cluster.is_some();
    let failing = service.map(|service| {
        let nodes = service.failing().iter();
        let names = nodes.map(|node| services.cluster.name_of(*node));
        names.collect::<Vec<_>>()
    });
    // Where nothing is fenced it is of no concern. A node without the service, such as a witness,
    // has no commands by which to know that, and shows what is noted in the log.
    let needs_fence = slot.is_none_or(|slot| slot.config.hooks.fence.is_some());
    // An active node that has no fence does not wait for one.
    let is_open = id
        .zip(service)
        .is_some_and(|(id, service)| services.cluster.is_open_in(id, service.epoch()));
    let awaits_fence = needs_fence && !is_open;
    let unfenced = service.filter(|_| awaits_fence).map(|service| {
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
            "addresses_here": is_here,
        })),
        "names": match (defined, slot) {
            (Some(defined), _) => Some(definitions::names_of(&defined.definition)),
            (None, slot) => slot.map(|slot| slot.config.settings.service_names.clone()),
        },
        "preferred": slot.and_then(|slot| slot.config.preferred.as_ref()),
        "active": active.map(|active| services.cluster.name_of(active.node)),
        // An operator's word; it may still be stopping.
        "released": service.is_some_and(|service| service.wish() == Wish::Nobody),
        "placed": service
            .and_then(ServiceState::placed)
            .map(|node| services.cluster.name_of(node)),
        "serving": serving.is_some_and(|node| node.gate.is_open()),
        "unfenced": unfenced.unwrap_or_default(),
        "storage": slot.filter(|slot| slot.config.storage_time_max.is_some()).map(health),
        "storage_fails_on": failing.unwrap_or_default(),
        "epoch": service.map(ServiceState::epoch),
        "nsm_state": service.map(|service| service.nsm_state().0),
        "complete": service.map(|service| !service.in_grace()),
        "locks": service.map(|service| service.table().lock_count()),
        "waiting": service.map(|service| service.table().waiting_count()),
        // Nobody takes over from a server without a cluster, so they are not kept.
        "connections": is_kept.then(|| service.map(|service| service.connections().len())),
        "mounts": is_kept.then(|| service.map(|service| service.mounts().len())),
        "last_takeover": takeover.map(|takeover| told(services, &takeover)),
        "last_departure": slot.and_then(|slot| slot.departure()).map(|departure| json!({
            "kind": departure.kind,
            "epoch": departure.epoch,
            "phases": phases(&departure.phases),
            "total_ms": ms(total(&departure.phases)),
        })),
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

/// What this node knows of its storage.
fn health(slot: &Arc<Slot>) -> Value {
    match &*slot.health.borrow() {
        Health::Untried => json!({ "works": null }),
        Health::Works(form) => json!({ "works": true, "probe": form.as_str() }),
        Health::Fails(problem) | Health::Hangs(problem) => {
            json!({ "works": false, "problem": problem })
        }
    }
}

fn phases(phases: &[(&str, Duration)]) -> Value {
    let phases = phases.iter();
    phases
        .map(|(name, took)| json!({ "name": name, "ms": ms(*took) }))
        .collect()
}

fn told(services: &Services, takeover: &Takeover) -> Value {
    json!({
        "kind": takeover.kind,
        "from": takeover.from.map(|node| services.cluster.name_of(node)),
        "epoch": takeover.epoch,
        "phases": phases(&takeover.phases),
        "total_ms": ms(total(&takeover.phases)),
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
        "move" | "take" => Some(moving::bring_as_said(services, word, rest).await),
        "release" => Some(release(services, rest).await),
        "announce" => Some(announce(services, rest).await),
        "forget" => Some(forgetting::forget(services, rest).await),
        "would-forget" => Some(forgetting::would_forget(services, rest)),
        "confirm-fence" => Some(confirm_fence(services, rest).await),
        "transfer" | "add" | "remove" => Some(change_members(services, word, rest).await),
        _ => None,
    }
}

/// `transfer [NODE]`, `add NAME ADDRESS [witness]` and `remove NAME`.
async fn change_members(services: &Services, word: &str, rest: &str) -> Result<Value, Value> {
    let error = |text: String| json!({ "error": text });
    let words: Vec<&str> = rest.split_whitespace().collect();
    let change = match (word, &words[..]) {
        ("transfer", []) => MemberChange::Transfer { to: None },
        ("transfer", [to]) => MemberChange::Transfer {
            to: Some((*to).into()),
        },
        ("add", [name, address, kind @ ..]) if matches!(kind, [] | ["witness"]) => {
            let address = address.parse().map_err(|_| {
                error(format!(
                    "`{address}` is no address with a port, as 192.0.2.4:7300"
                ))
            })?;
            MemberChange::Add {
                name: (*name).into(),
                address,
                witness: !kind.is_empty(),
            }
        }
        ("remove", [name]) => MemberChange::Remove {
            name: (*name).into(),
        },
        _ => return Err(error(format!("`{word}` is said with other words"))),
    };
    match services.cluster.change(&change).await {
        Ok(done) => Ok(json!({ "done": done })),
        Err(problem) => Err(error(problem.to_string())),
    }
}

/// `release SERVICE`: nobody serves it from now on.
async fn release(services: &Arc<Services>, name: &str) -> Result<Value, Value> {
    in_cluster(services)?;
    let (service, active, wish) = {
        let state = services.state();
        let (id, service) = known(&state, name)?;
        (id, service.active(), service.wish())
    };
    if wish == Wish::Nobody && active.is_none() {
        return Err(error(format!("service `{name}` is released already")));
    }
    let command = Command::Cluster(ClusterCommand::Withdraw { service });
    change(services, name, command, "released").await?;
    tracing::warn!(service = name, "an operator releases it");
    let from = active.map(|active| {
        let node = services.cluster.name_of(active.node);
        if services.cluster.lives(active.node, &services.state()) {
            format!(" as soon as node {node} has stopped it")
        } else {
            format!(
                ". Node {node}, which had it, does not answer: it lets the storage go when it is \
                 back"
            )
        }
    });
    Ok(json!({
        "done": format!(
            "service `{name}` is released: no node serves it{}; `havenfs service take {name}`, on \
             the node that is to have it, ends that",
            from.unwrap_or_default()
        ),
    }))
}

/// `announce SERVICE`: tells all its hosts again that it was restarted.
async fn announce(services: &Arc<Services>, name: &str) -> Result<Value, Value> {
    let node = services.open(Some(name)).map_err(error)?;
    let gate = Arc::clone(&node.gate);
    // It is not to keep the service from leaving.
    let announced = async move { acts::announce(&node, name).await };
    let announced = tokio::time::timeout(ASK_TIME_MAX, unless_over(&gate, announced));
    let mut done = announced.await.map_err(|_| {
        error(
            "the cluster has no majority now; hosts are told when it has one, or by a takeover"
                .to_owned(),
        )
    })??;
    if let Ok(slot) = services.slot(Some(name)) {
        done["names"] = json!(names_of(services, slot));
    }
    Ok(done)
}

/// What hosts are told that it is called.
fn names_of(services: &Services, slot: &Slot) -> Vec<String> {
    let state = services.state();
    let service = slot.id.get().and_then(|id| state.service(*id));
    let defined = service.and_then(ServiceState::defined);
    defined.map_or_else(
        || slot.config.settings.service_names.clone(),
        |defined| definitions::names_of(&defined.definition),
    )
}

pub(super) fn error(text: String) -> Value {
    json!({ "error": text })
}

/// Without other nodes there is nobody to give a service to, and none would take it.
pub(super) fn in_cluster(services: &Services) -> Result<(), Value> {
    if services.config.cluster.is_some() {
        return Ok(());
    }
    Err(error(
        "this server is not part of a cluster\nhint: to have it serve nothing, stop it".to_owned(),
    ))
}

pub(super) fn known<'a>(
    state: &'a ClusterState,
    name: &str,
) -> Result<(ServiceId, &'a ServiceState), Value> {
    let id = state.service_named(name);
    let found = id.and_then(|id| Some((id, state.service(id)?)));
    found.ok_or_else(|| {
        let names: Vec<&str> = state.services().map(|(_, one)| one.name()).collect();
        error(format!(
            "the cluster has no service `{name}`; there are: {}",
            names.join(", ")
        ))
    })
}

/// Has the log note what an operator wants.
pub(super) async fn change(
    services: &Services,
    name: &str,
    command: Command,
    what: &str,
) -> Result<(), Value> {
    let asked = tokio::time::timeout(ASK_TIME_MAX, services.proposer.ask(command)).await;
    match asked {
        Ok(Ok(Outcome::Done)) => Ok(()),
        Ok(Ok(_)) => Err(error(format!(
            "service `{name}` is not known to the cluster"
        ))),
        Ok(Err(problem)) => Err(error(problem.to_string())),
        Err(_) => Err(error(format!(
            "the cluster has no majority now, so nothing can be {what}"
        ))),
    }
}

/// `confirm-fence SERVICE [NODE]`: an operator has made sure that a node, or all that are waited
/// for, can't write to the storage any more. In the epoch that is asked about: if another node is
/// lost meanwhile, nothing is said of that one.
async fn confirm_fence(services: &Arc<Services>, words: &str) -> Result<Value, Value> {
    let (name, node) = match words.split_once(' ') {
        Some((name, node)) => (name, Some(node)),
        None => (words, None),
    };
    let name_of = |node: &NodeId| services.cluster.name_of(*node);
    let (id, epoch, nodes, all) = {
        let state = services.state();
        let (id, service) = known(&state, name)?;
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
pub(super) const ASK_TIME_MAX: Duration = Duration::from_secs(5);
