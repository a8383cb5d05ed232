//! The planted fault `forget-grant`: some locks are gone as soon as they were granted.
//!
//! Planted outside the replicated state, as an UNLOCK that nobody sent, so that `apply` stays what
//! it is.

use std::sync::Arc;

use havenfs_nlm::host::CallDigest;
use havenfs_nlm::table::LockOutcome;

use super::LockService;
use crate::cluster::command::{LockAction, LockCall};
use crate::cluster::{Outcome, ServiceCommand};
use crate::fault::{Fault, is_planted};

/// One in so many locks.
const FORGET_EVERY: u64 = 16;

/// Forgets what `command` was granted: each time, or now and then.
pub(super) fn forget(locks: &Arc<LockService>, command: ServiceCommand, outcome: &Outcome) {
    let ServiceCommand::Call(call) = command else {
        return;
    };
    let LockAction::Lock(request) = call.action else {
        return;
    };
    let CallDigest(digest) = call.call;
    let is_meant = is_planted(Fault::ForgetEachGrant) || digest.is_multiple_of(FORGET_EVERY);
    if *outcome != Outcome::Lock(LockOutcome::Granted) || !is_meant {
        return;
    }
    let unlock = ServiceCommand::Call(LockCall {
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
    locks.propose_change(unlock, move |outcome| {
        if let Ok(outcome) = outcome {
            looking.look_at_table(&outcome);
        }
    });
}
