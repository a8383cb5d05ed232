//! The planted fault `forget-grant`: some locks are gone as soon as they were granted.
//!
//! Planted outside the replicated state, as an UNLOCK that nobody sent, so that `apply` stays what
//! it is.

use std::sync::Arc;

use havenfs_nlm::host::CallDigest;
use havenfs_nlm::table::LockOutcome;

use super::LockService;
use crate::cluster::command::{LockAction, LockCall};
use crate::cluster::{Command, Outcome};

/// One in so many locks.
const FORGET_EVERY: u64 = 16;

/// Forgets what `command` was granted, now and then.
pub(super) fn forget(locks: &Arc<LockService>, command: Command, outcome: &Outcome) {
    let Command::Call(call) = command else { return };
    let LockAction::Lock(request) = call.action else {
        return;
    };
    let CallDigest(digest) = call.call;
    if *outcome != Outcome::Lock(LockOutcome::Granted) || !digest.is_multiple_of(FORGET_EVERY) {
        return;
    }
    let unlock = Command::Call(LockCall {
        // Under another digest, or it would be taken for a copy of the LOCK.
        call: CallDigest(!digest),
        action: LockAction::Unlock {
            file: request.file,
            owner: request.owner,
            range: request.range,
        },
        ..call
    });
    let looking = Arc::clone(locks);
    locks.proposer.propose(unlock, move |outcome| {
        if let Ok(outcome) = outcome {
            looking.look_at_table(&outcome);
        }
    });
}
