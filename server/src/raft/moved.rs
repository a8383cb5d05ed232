//! A member whose address is another than the one that it was admitted with.
//!
//! The others reach it at the address in the log, so that it listens there, whatever the
//! configuration says. But the only member is reached by nobody, and could never start again if its
//! machine has another address: it takes that of the configuration. `store.json` gets it first, and
//! the log when this node leads, now or after the next start.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver as _;
use tokio::time::{Duration, sleep};

use super::Engine;
use super::change::Turn;
use super::error::StoreError;
use super::offline::Whole;
use super::opened::Opened;
use super::stored;
use super::types::Member;

/// Where this node listens, which the configuration has at `configured`.
pub(super) async fn settle(
    dir: &Path,
    opened: &mut Opened,
    configured: SocketAddr,
) -> Result<SocketAddr, StoreError> {
    let Some(formed) = opened.stored.formed.clone() else {
        return Ok(configured);
    };
    let Some(own) = formed.members.get(&formed.node).cloned() else {
        return Ok(configured);
    };
    if own.address == configured {
        return Ok(configured);
    }
    let whole = Whole::read(opened).await?;
    let mut known = whole.membership.nodes().map(|(node, _)| *node).peekable();
    let is_only = if known.peek().is_some() {
        known.eq([formed.node])
    } else {
        formed.members.len() == 1
    };
    if !is_only {
        return Ok(own.address);
    }
    tracing::warn!(
        before = %own.address,
        now = %configured,
        "this node is the only member of its cluster, and takes the address of its configuration"
    );
    let address = configured;
    let mut stored = opened.stored.clone();
    if let Some(formed) = &mut stored.formed {
        formed.members = BTreeMap::from([(formed.node, Member { address, ..own })]);
    }
    stored::write(dir, &stored)?;
    opened.stored = stored;
    Ok(address)
}

/// Has the log say where this node is, if it is the only member and the log says otherwise; ends
/// when that is so, or others have come. Whoever started it ends it with the engine.
pub(super) async fn correct(engine: &Engine, turn: &Turn, address: SocketAddr) {
    let own = *engine.node_id();
    let known = engine.server_metrics();
    loop {
        let membership = known.borrow_watched().membership_config.clone();
        let members: Vec<(u64, Member)> = membership
            .nodes()
            .map(|(node, member)| (*node, member.clone()))
            .collect();
        match members.as_slice() {
            [(node, member)] if *node == own && member.address != address => {
                let _turn = turn.lock().await;
                let member = Member {
                    address,
                    ..member.clone()
                };
                let moved = ChangeMembers::SetNodes(BTreeMap::from([(own, member)]));
                if engine.is_leader() && engine.change_membership(moved, true).await.is_ok() {
                    return;
                }
            }
            [] => {}
            _ => return,
        }
        sleep(RETRY).await;
    }
}

/// After a try that came too early.
const RETRY: Duration = Duration::from_millis(500);
