//! A node that finds its name in a cluster, with another store: it may be that member with a new
//! disk, or another machine that was given a name that is in use.

use std::collections::BTreeMap;

use super::Hindrance;
use crate::raft::change::go_alone;
use crate::raft::peer::Peers;
use crate::raft::types::Member;

/// What to do about it. Of a cluster of two nothing is left that could remove anybody.
pub(super) fn hint(
    own: &str,
    peer: &str,
    members: &BTreeMap<u64, Member>,
    command: &str,
) -> String {
    let replace = if members.len() == 2 {
        let alone = go_alone(&[own]);
        format!(
            "node `{peer}` is the only one that is left, and has no majority by itself: stop it, \
             say there {alone}, start it, and say there `{command}`"
        )
    } else {
        format!(
            "remove this node from the cluster and add it anew, on one of its members: `havenfs \
             cluster remove {own}`, then `{command}`; until then its old self counts as down"
        )
    };
    format!(
        "if the state directory of this node was lost, {replace}. If `{own}` is another machine, \
         give this one another name"
    )
}

/// A member that has this node's name may live elsewhere, and would be removed for nothing: it is
/// asked whether it does.
pub(super) async fn look_for(peers: &Peers, hindrances: Vec<Hindrance>) -> Vec<Hindrance> {
    let mut seen: Vec<Hindrance> = Vec::new();
    for hindrance in hindrances {
        let seen_now = match &hindrance {
            Hindrance::OtherStore { name, member, .. } => {
                peers.is_there(member).await.then(|| Hindrance::Lives {
                    name: name.clone(),
                    address: member.address,
                })
            }
            _ => None,
        };
        let hindrance = seen_now.unwrap_or(hindrance);
        // Each member tells of the same one.
        if !seen.contains(&hindrance) {
            seen.push(hindrance);
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_cluster_of_two_the_other_one_can_remove_nobody() {
        let members = |count: u64| -> BTreeMap<u64, Member> {
            (0..count).map(|node| (node, Member::alone(node))).collect()
        };
        let said = |count| hint("n2", "n1", &members(count), "havenfs cluster add n2");
        assert!(said(3).contains("`havenfs cluster remove n2`, then `havenfs cluster add n2`"));
        let two = said(2);
        assert!(!two.contains("cluster remove"), "{two}");
        assert!(
            two.contains("--i-fenced n2`, start it, and say there"),
            "{two}"
        );
    }
}
