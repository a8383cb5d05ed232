//! Brings the replies of a service to the node that serves it next, when it is given away.
//!
//! Through the log, since who is next is not known before it has taken the service, and what is
//! in the log every node has by then: no further message is to be waited for, nor lost, and it
//! costs the time of one commit, in which all commands travel together. A message to the next node
//! would cost about as much, as it must be there before that node answers its first call.
//!
//! Called when the last call is carried out and all is on disk, before the release is proposed.
//! Best effort: after [`TIME_MAX`] the release is proposed all the same. What comes later than the
//! next assignment is of an earlier epoch then, and does nothing. In another queue than leases, so
//! that no renewal waits behind it.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::cluster::replies::{HANDED_BYTES_MAX, KeptReply};
use crate::cluster::{ClusterState, Command, ServiceCommand, ServiceId};
use crate::lock_service::unix_seconds;
use crate::node::Node;
use crate::raft::Proposer;

/// Hands over what `node` has answered lately.
pub(super) async fn hand_over(proposer: &Proposer, service: ServiceId, node: &Node) {
    let begun = Instant::now();
    let epoch = node.gate.epoch();
    let replies = node.reply_cache.newest(HANDED_BYTES_MAX);
    let count = replies.len();
    let mut asked = JoinSet::new();
    for replies in in_parts(replies) {
        let command = ServiceCommand::Replies {
            epoch,
            replies,
            unix_seconds: unix_seconds().into(),
        };
        let proposer = proposer.clone();
        asked.spawn(async move { proposer.ask(Command::Service(service, command)).await });
    }
    let all = async {
        while let Some(done) = asked.join_next().await {
            if let Ok(Err(error)) = done {
                tracing::debug!(%error, "replies are not handed over");
            }
        }
    };
    let is_done = timeout(TIME_MAX, all).await.is_ok();
    tracing::debug!(count, is_done, elapsed = ?begun.elapsed(), "replies are handed over");
}

/// Has `node` know what the last active node handed over to its epoch.
pub(super) fn take_over(state: &ClusterState, service: ServiceId, node: &Node) {
    if let Some(service) = state.service(service) {
        let replies = service.handed_to(node.gate.epoch());
        // A fence may have taken long, or nobody had the service for a while.
        let age = service.handed_age(unix_seconds().into());
        node.reply_cache.adopt(replies, age);
    }
}

/// In commands of a size that no lock waits long behind.
fn in_parts(replies: Vec<KeptReply>) -> Vec<Vec<KeptReply>> {
    let mut parts: Vec<Vec<KeptReply>> = Vec::new();
    let mut room = 0;
    for reply in replies {
        if parts.is_empty() || reply.cost() > room {
            parts.push(Vec::new());
            room = PART_BYTES;
        }
        room = room.saturating_sub(reply.cost());
        if let Some(part) = parts.last_mut() {
            part.push(reply);
        }
    }
    parts
}

/// How long a service waits for it that is about to be given away.
const TIME_MAX: Duration = Duration::from_millis(150);
const PART_BYTES: usize = 64 * 1024;
