//! A change of the voters that nobody is at.

use std::collections::BTreeSet;

use super::*;
use crate::raft::change::is_joint;
use crate::raft::types::{Membership, Payload};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leads_finishes_a_change_of_the_voters_that_was_left_half_done() {
    let parent = tempfile::tempdir().unwrap();
    let (nodes, _) = three(&parent, patient).await;
    write(&nodes, 0, 5).await;
    let at = leader(&nodes).await;
    let engine = &nodes[at].engine;
    // The first step of a removal, whose leader was lost then.
    let gone = nodes[(at + 1) % 3].formed.node;
    let old = BTreeSet::from([1, 2, 3]);
    let mut new = old.clone();
    new.remove(&gone);
    let members = nodes[at].formed.members.clone();
    let joint = Membership::new(vec![old, new.clone()], members).unwrap();
    let joint = engine.append_membership(joint, Payload::Blank, []);
    joint.await.unwrap();
    until("it is finished", || (!is_joint(engine)).then_some(())).await;
    let metrics = engine.server_metrics();
    let membership = Arc::clone(&metrics.borrow_watched().membership_config);
    assert_eq!(membership.voter_ids().collect::<BTreeSet<_>>(), new);
    assert!(membership.nodes().all(|(node, _)| *node != gone));
    for node in nodes {
        node.stop().await;
    }
}
