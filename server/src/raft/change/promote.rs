//! How a node that is sent the log becomes one that votes.

use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::time::Duration;

use openraft::ChangeMembers;
use tokio::time::{Instant, sleep};

use super::error::{ChangeError, changed, refused};
use super::sight::{BEHIND_MAX, Sight, sight};
use super::{Changes, POLL};
use crate::cluster::NodeId;
use crate::cluster::command::{Renewal, RenewalId};

impl Changes {
    /// The last renewal of this node's lease.
    fn last_renewal(&self) -> Option<RenewalId> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let own = NodeId(*self.engine.node_id());
        state.last_renewal(own).map(Renewal::id)
    }

    /// Waits until a learner has the log, and makes it a voter.
    pub(super) async fn promote(&self, node: u64, name: &str) -> Result<String, ChangeError> {
        self.wait_for_log(node, name).await?;
        self.wait_for_lease(name).await?;
        let voters = BTreeSet::from([node]);
        let promoted = self
            .engine
            .change_membership(ChangeMembers::AddVoterIds(voters), true);
        changed("making a node a voter", promoted).await?;
        tracing::info!(node, name, "a node was added to the cluster");
        Ok(added(&sight(&self.engine), node))
    }

    async fn wait_for_log(&self, node: u64, name: &str) -> Result<(), ChangeError> {
        let begun = Instant::now();
        loop {
            let sight = sight(&self.engine);
            if !self.engine.is_leader() {
                return Err(ChangeError::NotLeader);
            }
            let has_log = sight
                .behind(node)
                .is_some_and(|behind| behind <= BEHIND_MAX);
            if has_log && sight.heard.contains(&node) {
                return Ok(());
            }
            if begun.elapsed() > CATCH_UP_MAX {
                let seconds = CATCH_UP_MAX.as_secs();
                let matched = sight.matched.get(&node).copied().unwrap_or_default();
                let last = sight.last;
                return Err(refused(format!(
                    "node `{name}` has {matched} of {last} entries of the log after {seconds} s, \
                     and does not vote yet\nhint: see its log; when it is well, the same command \
                     goes on where it was"
                )));
            }
            sleep(POLL).await;
        }
    }

    /// The only voter has no lease. It must have one before it is not the only one, or its services
    /// would be silent, and somebody else would take them because a node was added.
    async fn wait_for_lease(&self, name: &str) -> Result<(), ChangeError> {
        let begun = Instant::now();
        // It renews since there is a learner, but what was renewed before this may be long ago.
        let before = self.last_renewal();
        loop {
            let sight = sight(&self.engine);
            if !self.engine.is_leader() {
                return Err(ChangeError::NotLeader);
            }
            let is_witness = sight.members.get(&sight.own).is_some_and(|own| own.witness);
            if sight.voters.len() > 1 || is_witness {
                return Ok(());
            }
            if self.last_renewal() != before {
                // Until the gates have heard of the renewal.
                sleep(POLL).await;
                return Ok(());
            }
            if begun.elapsed() > LEASE_WAIT_MAX {
                let seconds = LEASE_WAIT_MAX.as_secs();
                let own = sight.name(sight.own);
                return Err(refused(format!(
                    "node `{own}` could not renew its lease within {seconds} s, and its services \
                     would move if `{name}` voted; it does not vote yet\nhint: see the disk of the \
                     state directory of `{own}`, and its log; when it is well, the same command \
                     goes on where it was"
                )));
            }
            sleep(POLL).await;
        }
    }
}

/// What to tell people of a node that votes.
pub(super) fn added(sight: &Sight, node: u64) -> String {
    let name = sight.name(node);
    let (count, names) = (sight.voters.len(), sight.names(&sight.voters));
    let majority = count / 2 + 1;
    let even = if count.is_multiple_of(2) {
        "\nhint: an even number of voters bears no more losses than one less; add another one, a \
         witness will do"
    } else {
        ""
    };
    format!(
        "node `{name}` is a member now, number {node}; {count} vote ({names}), and {majority} of \
         them must live{even}"
    )
}

/// How long the only voter may take to have a lease: the longest lease is a minute, and is renewed
/// six times in it.
const LEASE_WAIT_MAX: Duration = Duration::from_secs(20);
/// How long an added node may take to have the log.
const CATCH_UP_MAX: Duration = Duration::from_mins(1);
