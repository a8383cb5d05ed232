//! What a member of a cluster sees to by itself: that a witness does not lead longer than it must,
//! that no change of the voters stays half done, that a removed node ends, and that a configuration
//! that differs from the cluster is told of.
//!
//! A witness can win an election, because it may be the one with the longest log. It gives the
//! leadership to a node with data as soon as one has caught up. Those never give it back by
//! themselves, and a try that failed is not repeated at once, so it does not go to and fro.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use tokio::sync::watch;
use tokio::time::sleep;

use super::Engine;
use super::change::{Turn, heir_of_witness, keep_finished, transfer};
use super::differing::compare;
use super::peer::{Configured, Membership, Peers, Refusal};
use super::types::{Member, StoredMembership};
use crate::cluster::{ClusterState, NodeId};

/// How often a witness that leads looks for somebody else.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// After a try that failed, doubled each time.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// What the log says of members, for those who are let in.
pub(super) struct Log {
    metrics: openraft::alias::WatchReceiverOf<
        super::types::Types,
        openraft::metrics::RaftServerMetrics<super::types::Types>,
    >,
    settled: watch::Receiver<StoredMembership>,
    state: Arc<RwLock<ClusterState>>,
}

impl Log {
    /// Does not keep the engine alive.
    pub(super) fn new(
        engine: &Engine,
        settled: watch::Receiver<StoredMembership>,
        state: Arc<RwLock<ClusterState>>,
    ) -> Self {
        Self {
            metrics: engine.server_metrics(),
            settled,
            state,
        }
    }
}

pub(super) fn members(membership: &StoredMembership) -> BTreeMap<u64, Member> {
    let nodes = membership.nodes();
    nodes
        .map(|(node, member)| (*node, member.clone()))
        .collect()
}

impl Membership for Log {
    fn known(&self) -> BTreeMap<u64, Member> {
        members(&self.metrics.borrow_watched().membership_config)
    }

    fn settled(&self) -> BTreeMap<u64, Member> {
        members(&self.settled.borrow())
    }

    fn is_retired(&self, node: u64) -> bool {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.members().is_retired(NodeId(node))
    }
}

/// Runs as long as the engine.
pub(super) async fn see_to(
    engine: Engine,
    peers: Peers,
    configured: Vec<Configured>,
    settled: watch::Receiver<StoredMembership>,
    state: Arc<RwLock<ClusterState>>,
    turn: Turn,
) {
    tokio::join!(
        hand_over_to_data(&engine, &turn),
        keep_finished(&engine, &turn),
        note_removal(&engine, &peers, settled.clone(), &state),
        compare(*engine.node_id(), settled, &configured),
    );
}

/// A witness that leads has a node with data lead.
async fn hand_over_to_data(engine: &Engine, turn: &Turn) {
    let mut leadership = engine.server_metrics();
    let mut pause = PAUSE_MIN;
    loop {
        if !engine.is_leader() {
            pause = PAUSE_MIN;
            if leadership.changed().await.is_err() {
                return;
            }
            continue;
        }
        let Some((heir, name)) = heir_of_witness(engine) else {
            sleep(LOOK_EVERY).await;
            continue;
        };
        // The members are being changed: the step that is left would be nobody's.
        let Ok(held) = turn.try_lock() else {
            sleep(LOOK_EVERY).await;
            continue;
        };
        tracing::info!(
            name,
            "this witness leads, and has a node with data lead instead"
        );
        if transfer(engine, heir).await {
            continue;
        }
        tracing::warn!(name, "it did not take the leadership; trying again later");
        drop(held);
        sleep(pause).await;
        pause = PAUSE_MAX.min(pause * 2);
    }
}

/// Notes that this node is a member no more, if its own log says so. If the log ends before, the
/// others say so.
async fn note_removal(
    engine: &Engine,
    peers: &Peers,
    mut settled: watch::Receiver<StoredMembership>,
    state: &RwLock<ClusterState>,
) {
    let own = *engine.node_id();
    let is_removed = |membership: &StoredMembership| {
        let state = state.read().unwrap_or_else(PoisonError::into_inner);
        let is_retired = state.members().is_retired(NodeId(own));
        is_retired && membership.nodes().all(|(node, _)| *node != own)
    };
    // The state is locked while this is told, so it can't be asked for inside.
    loop {
        let now = settled.borrow_and_update().clone();
        if is_removed(&now) {
            let name = peers.name();
            let refusal = Refusal::Removed { name: name.into() };
            peers.set_removed(refusal.to_string());
            return;
        }
        if settled.changed().await.is_err() {
            return;
        }
    }
}
