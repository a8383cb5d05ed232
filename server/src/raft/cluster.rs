//! Who is in the cluster, as this node sees it, and the way to change that.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use openraft::async_runtime::{Instant as _, WatchReceiver as _};

use super::Engine;
use super::change::{ChangeError, Changes, MemberChange, is_joint};
use super::log::Shared;
use super::peer::Applicant;
use crate::clock::boot_time;
use crate::cluster::lease::wait;
use crate::cluster::placement::Seen;
use crate::cluster::service::Active;
use crate::cluster::{ClusterState, NodeId, ServiceId};

/// The members, the leader, and this node. A handle: clones are alike.
#[derive(Clone)]
pub struct Cluster {
    engine: Engine,
    log: Arc<Shared>,
    own: Active,
    /// None without a cluster.
    changes: Option<Changes>,
}

/// A member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberSeen {
    /// Its number.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Where the others reach it.
    pub address: SocketAddr,
    /// Whether it only votes.
    pub witness: bool,
    /// Whether it votes already.
    pub votes: bool,
}

impl Cluster {
    pub(super) const fn new(
        engine: Engine,
        log: Arc<Shared>,
        own: Active,
        changes: Option<Changes>,
    ) -> Self {
        Self {
            engine,
            log,
            own,
            changes,
        }
    }

    /// Has another node lead, or changes the members; returns what to tell the operator.
    ///
    /// # Errors
    /// Why that was not done.
    pub async fn change(&self, change: &MemberChange) -> Result<String, ChangeError> {
        let changes = self.changes.as_ref().ok_or(ChangeError::Alone)?;
        changes.ask(change).await
    }

    /// Empty nodes that have asked this one for the cluster lately, and are not in it.
    pub fn applicants(&self) -> Vec<Applicant> {
        let changes = self.changes.as_ref();
        changes.map_or_else(Vec::new, |changes| changes.peers().applicants())
    }

    /// Whether this node is the only voter: it needs no lease as long as that is so, which is to be
    /// asked each time. Never without a cluster.
    pub fn sole(&self) -> Arc<AtomicBool> {
        self.log.sole.flag()
    }

    /// Whether this node is the only voter, and nobody is about to be another one.
    pub fn needs_no_lease(&self) -> bool {
        let metrics = self.engine.server_metrics();
        let members = metrics.borrow_watched().membership_config.nodes().count();
        members == 1 && self.sole().load(Ordering::Acquire)
    }

    /// Whether the voters are being changed, so that majorities of the old and the new ones are
    /// needed.
    pub fn is_joint(&self) -> bool {
        is_joint(&self.engine)
    }

    /// This life of this node.
    pub const fn own(&self) -> Active {
        self.own
    }

    /// Who leads, as far as this node knows; a leader that a majority has not answered lately leads
    /// nobody, and nor does one that was not heard of.
    pub fn leader(&self) -> Option<NodeId> {
        let leader = self.last_leader()?;
        if leader != self.own.node {
            let changes = self.changes.as_ref();
            let hears = changes.is_none_or(|one| one.peers().hears_leader(LEADER_SILENT_MAX));
            return hears.then_some(leader);
        }
        let metrics = self.engine.metrics();
        let metrics = metrics.borrow_watched();
        let heard = metrics.last_quorum_acked.map(|heard| heard.elapsed());
        // The only member is a majority, and asks nobody.
        let is_only = metrics.membership_config.voter_ids().count() == 1;
        (is_only || heard.is_none_or(|ago| ago < SILENT_MAX)).then_some(leader)
    }

    /// Who led when this node last knew of a leader.
    pub fn last_leader(&self) -> Option<NodeId> {
        let metrics = self.engine.server_metrics();
        let leader = metrics.borrow_watched().current_leader;
        leader.map(NodeId)
    }

    /// How often the cluster was begun anew by a sole survivor; never without a cluster.
    pub fn generation(&self) -> u32 {
        let changes = self.changes.as_ref();
        changes.map_or(0, |changes| changes.peers().generation())
    }

    /// The term of the leader that this node follows.
    pub fn term(&self) -> u64 {
        let metrics = self.engine.server_metrics();
        metrics.borrow_watched().vote.leader_id.term
    }

    /// All members, by number.
    pub fn members(&self) -> Vec<MemberSeen> {
        let metrics = self.engine.server_metrics();
        let membership = Arc::clone(&metrics.borrow_watched().membership_config);
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let seen = membership.nodes().map(|(node, member)| MemberSeen {
            node: NodeId(*node),
            name: member.name.to_string(),
            address: member.address,
            witness: member.witness,
            votes: voters.contains(node),
        });
        seen.collect()
    }

    /// The members that vote, have the data, and are not about to be removed. Not to be asked by
    /// whoever reads the state just now.
    pub fn data_nodes(&self) -> Vec<NodeId> {
        let Some(changes) = &self.changes else {
            return vec![self.own.node];
        };
        let members = self.members().into_iter();
        let with_data = members
            .filter(|member| member.votes && !member.witness && !changes.is_retired(member.node));
        with_data.map(|member| member.node).collect()
    }

    /// What people call a node: one word, since it is quoted in what they are told to type.
    pub fn name_of(&self, node: NodeId) -> String {
        let mut members = self.members().into_iter();
        let member = members.find(|member| member.node == node);
        member.map_or_else(|| format!("number-{node}"), |member| member.name)
    }

    /// A node by its name.
    pub fn node_of(&self, name: &str) -> Option<NodeId> {
        let mut members = self.members().into_iter();
        members
            .find(|member| member.name == name)
            .map(|member| member.node)
    }

    /// When this node first saw the last renewal of a node's lease.
    pub fn seen(&self, node: NodeId) -> Option<Seen> {
        self.log.seen(node)
    }

    /// Whether a service was opened in this epoch, as far as this node knows: what was said before
    /// its process began it does not.
    pub fn is_open_in(&self, service: ServiceId, epoch: u32) -> bool {
        self.log.open.is_open_in(service, epoch)
    }

    /// Whether a node has renewed its lease lately.
    pub fn lives(&self, node: NodeId, state: &ClusterState) -> bool {
        if node == self.own.node {
            return true;
        }
        let last = state.last_renewal(node).zip(self.seen(node));
        last.is_some_and(|(renewal, seen)| seen.at + wait(renewal) > boot_time())
    }

    /// Whether a member has been heard of lately; none if this node can't know: a witness has no
    /// lease, and talks to nobody but the leader.
    pub fn is_heard(&self, member: &MemberSeen, state: &ClusterState) -> Option<bool> {
        let node = member.node;
        if !member.witness || node == self.own.node {
            return Some(self.lives(node, state));
        }
        let leader = self.leader();
        if leader == Some(node) {
            return Some(true);
        }
        let metrics = self.engine.metrics();
        let metrics = metrics.borrow_watched();
        let heard = metrics.heartbeat.as_ref()?.get(&node.0)?;
        let is_recent = heard.is_some_and(|heard| heard.elapsed() < SILENT_MAX);
        (leader == Some(self.own.node)).then_some(is_recent)
    }
}

/// A leader that has heard of no majority for so long has none.
const SILENT_MAX: Duration = Duration::from_secs(1);
/// A leader that lives is heard of many times in this; another one is elected in less.
const LEADER_SILENT_MAX: Duration = Duration::from_secs(2);

impl std::fmt::Debug for Cluster {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Cluster")
            .field("own", &self.own)
            .finish_non_exhaustive()
    }
}
