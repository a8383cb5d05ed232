//! A change of the voters that was left half done is finished by whoever leads.
//!
//! Voters change in two steps: to a *joint* membership, which needs a majority of the old voters
//! and one of the new ones, and from there to the new ones alone. The leader that began it makes
//! the second step as well. If it dies, is not the leader any more, or is too slow, that step is
//! nobody's; and the cluster would bear fewer losses than people think for as long as that is so.

use std::collections::BTreeSet;
use std::time::Duration;

use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver as _;
use tokio::time::sleep;

use super::Turn;
use super::error::{ChangeError, changed};
use crate::raft::Engine;

/// Whether the voters are being changed, by somebody or nobody.
pub(in crate::raft) fn is_joint(engine: &Engine) -> bool {
    let metrics = engine.server_metrics();
    let metrics = metrics.borrow_watched();
    let membership = metrics.membership_config.membership();
    membership.get_joint_config().len() > 1
}

/// Makes the second step of a change that was left half done, if there is one; only the leader can.
/// The caller has the turn.
pub(super) async fn finish(engine: &Engine) -> Result<(), ChangeError> {
    if !is_joint(engine) {
        return Ok(());
    }
    // Nobody more than those that the first step has; who goes is no member any more. One that
    // comes is in the newer half, so that it stays.
    let nobody = ChangeMembers::AddVoterIds(BTreeSet::new());
    let finished = engine.change_membership(nobody, false);
    changed("finishing a change of the voters", finished).await?;
    tracing::info!("a change of the voters that was left half done is finished");
    Ok(())
}

/// Finishes whatever nobody is at; ends with the engine.
pub(in crate::raft) async fn keep_finished(engine: &Engine, turn: &Turn) {
    let mut members = engine.server_metrics();
    loop {
        if !engine.is_leader() || !is_joint(engine) {
            if members.changed().await.is_err() {
                return;
            }
            continue;
        }
        // Whoever has it is at it.
        if let Ok(_turn) = turn.try_lock()
            && let Err(error) = finish(engine).await
        {
            tracing::warn!("a change of the voters is half done, and is tried again: {error}");
        }
        sleep(LOOK_EVERY).await;
    }
}

/// How often it is looked whether a change that is under way is somebody's.
const LOOK_EVERY: Duration = Duration::from_millis(500);
