//! Moves a service where an operator wants it: says why it can't go there, or has the log note the
//! wish. What comes of it is for [`Bringing`].

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use super::bringing::{Bringing, WAIT};
use super::cluster::{error, in_cluster, known};
use super::repaired;
use crate::cluster::Wish;
use crate::services::Services;

/// `move SERVICE NODE` and `take SERVICE`, to the node that is asked; with `wait` behind it the
/// answer says what came of it.
pub(super) async fn bring_as_said(
    services: &Arc<Services>,
    word: &str,
    rest: &str,
) -> Result<Value, Value> {
    let mut words: Vec<&str> = rest.split_whitespace().collect();
    let waits = words.pop_if(|last| *last == WAIT).is_some();
    match (word, &words[..]) {
        ("move", [name, to]) => bring(services, name, to, waits).await,
        ("take", [name]) => {
            in_cluster(services)?;
            let own = services.config.node_name();
            if services.config.is_witness() {
                return Err(error(format!(
                    "node {own} is a witness, which serves nothing\nhint: say it on the node that \
                     is to serve `{name}`"
                )));
            }
            bring(services, name, own, waits).await
        }
        ("take", _) => Err(error("say which service to take".to_owned())),
        _ => Err(error(
            "say which service to move, and to which node".to_owned(),
        )),
    }
}

/// Has a node serve a service, wherever it is now.
async fn bring(
    services: &Arc<Services>,
    name: &str,
    to: &str,
    waits: bool,
) -> Result<Value, Value> {
    let (service, active, wish, epoch) = {
        let state = services.state();
        let (id, service) = known(&state, name)?;
        (id, service.active(), service.wish(), service.epoch())
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
    // Else that is what is not wanted any more.
    let stays = wish == Wish::Anywhere || wish == Wish::On(node);
    if stays && active.is_some_and(|active| active.node == node) {
        return Err(error(format!("service `{name}` is on node {to} already")));
    }
    if !services.cluster.lives(node, &services.state()) {
        return Err(error(format!(
            "node {to} has not renewed its lease lately, so it can't take service `{name}`"
        )));
    }
    let fails = {
        let state = services.state();
        let service = state.service(service);
        service.is_some_and(|service| service.failing().contains(&node))
    };
    if fails
        && !(to == services.config.node_name() && repaired::believe(services, name, service).await)
    {
        return Err(error(format!(
            "the storage of service `{name}` does not work on node {to}, as that node says: see \
             `havenfs service list` there\nhint: where commands make it ready, the node can't try \
             it; once it is repaired, say `havenfs service take {name}` on that node"
        )));
    }
    let is_stale = {
        let state = services.state();
        let service = state.service(service);
        service.is_some_and(|service| service.is_stale_on(node))
    };
    if is_stale {
        return Err(error(format!(
            "node {to} runs with other addresses than service `{name}` has now\nhint: restart node \
             {to} first"
        )));
    }
    let bringing = Bringing {
        services,
        name,
        service,
        to: node,
        from: active.map(|active| active.node),
    };
    let asked = Instant::now();
    bringing.ask().await?;
    if waits {
        return bringing.wait(epoch, asked).await;
    }
    let began = if wish == Wish::Nobody {
        "is not released any more, and begins on"
    } else {
        "moves to"
    };
    Ok(json!({
        "done": format!("service `{name}` {began} node {to}; see `havenfs status`"),
    }))
}
