//! Asking the members that the configuration names who they are, as somebody who belongs to no
//! cluster: everybody answers that, of whichever cluster, and nothing follows from it for anybody.

use std::sync::Arc;

use tokio::task::JoinSet;
use tokio::time::timeout;

use super::dial::{DIAL_MAX, PeerError, Peers};
use super::hello::{Configured, Hello, Standing};
use super::link::LinkError;
use crate::raft::stored::Formed;

impl Peers {
    /// Asks all of them but this node.
    pub(in crate::raft) async fn look(
        &self,
        configured: &[Configured],
    ) -> Vec<(Configured, Result<Hello, PeerError>)> {
        let mut asking = JoinSet::new();
        let others = configured.iter().filter(|one| *one.name != *self.name());
        for other in others.cloned() {
            let peers = self.clone();
            asking.spawn(async move {
                let own = Hello {
                    name: peers.name().into(),
                    store_id: peers.store_id(),
                    // Not one that waits to be added.
                    standing: Standing::Unformed {
                        empty: false,
                        configured: Arc::new([]),
                    },
                };
                let asked = timeout(DIAL_MAX, peers.greet(other.address, own)).await;
                let said = asked.unwrap_or_else(|_| Err(LinkError::TimedOut.into()));
                (other, said.map(|(_, hello)| hello))
            });
        }
        // A panic has ended the process already.
        let mut said: Vec<_> = asking.join_all().await;
        said.sort_by(|(one, _), (other, _)| one.cmp(other));
        said
    }
}

impl Hello {
    /// The number of the cluster that it belongs to.
    pub(in crate::raft) const fn cluster_id(&self) -> Option<u64> {
        match &self.standing {
            Standing::Formed { cluster_id, .. } => Some(*cluster_id),
            Standing::Unformed { .. } => None,
        }
    }

    /// Whether it belongs to what has become of that cluster without the node that `own` is: a
    /// later generation, or members among whom it is not.
    pub(in crate::raft) fn went_on_without(&self, own: &Formed, store_id: u64) -> bool {
        let Standing::Formed {
            cluster_id,
            generation,
            members,
            ..
        } = &self.standing
        else {
            return false;
        };
        let has_own = members
            .get(&own.node)
            .is_some_and(|member| member.store_id == store_id);
        *cluster_id == own.cluster_id && (*generation > own.generation || !has_own)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::raft::types::Member;

    #[test]
    fn who_has_a_later_generation_or_other_members_went_on_without_this_node() {
        let members = |nodes: &[u64]| -> BTreeMap<u64, Member> {
            nodes
                .iter()
                .map(|node| (*node, Member::alone(*node)))
                .collect()
        };
        let own = Formed {
            cluster_id: 7,
            generation: 1,
            node: 2,
            members: members(&[2]),
        };
        let went_on = |cluster_id, generation, nodes: &[u64]| {
            let hello = Hello {
                name: "n1".into(),
                store_id: 1,
                standing: Standing::Formed {
                    cluster_id,
                    generation,
                    node: 1,
                    members: members(nodes),
                },
            };
            hello.went_on_without(&own, 2)
        };
        // It was lost, and does not know of it yet: alone it can do nothing.
        assert!(!went_on(7, 0, &[1, 2]));
        // It was made a sole survivor as well.
        assert!(went_on(7, 1, &[1]));
        assert!(went_on(7, 2, &[1, 2]));
        assert!(!went_on(8, 2, &[1]));
    }
}
