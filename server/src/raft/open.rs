//! In which epoch each service was opened, as its active node has said since this process began.
//!
//! The replicated state says to whom a service is assigned, not whether that one has opened it,
//! which may take as long as a fence. Each active node says in the log which definition is in force
//! when it has opened the service, so that whoever sees that entry applied knows. It is kept in
//! memory alone: what is older than this process, or came with a snapshot, is not known.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::cluster::{Command, ServiceCommand, ServiceId};

/// The last epoch of each service in which it was open.
#[derive(Debug, Default)]
pub(super) struct Open(Mutex<BTreeMap<ServiceId, u32>>);

impl Open {
    /// Looks at a command that is applied.
    pub(super) fn see(&self, command: &Command) {
        let Command::Service(service, ServiceCommand::InForce { epoch, .. }) = command else {
            return;
        };
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = known.entry(*service).or_default();
        // One that was lost on its way may come late.
        *last = (*last).max(*epoch);
    }

    /// Whether the service was opened in this epoch, as far as it is known here.
    pub(super) fn is_open_in(&self, service: ServiceId, epoch: u32) -> bool {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&service) == Some(&epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::definition::InForce;

    #[test]
    fn a_service_is_open_in_the_epoch_that_was_told_last() {
        let open = Open::default();
        let service = ServiceId(3);
        let tell = |epoch| {
            let in_force = InForce::default();
            let command = ServiceCommand::InForce { epoch, in_force };
            open.see(&Command::Service(service, command));
        };
        assert!(!open.is_open_in(service, 0) && !open.is_open_in(service, 4));
        tell(4);
        tell(3);
        assert!(open.is_open_in(service, 4));
        assert!(!open.is_open_in(service, 3) && !open.is_open_in(ServiceId(4), 4));
    }
}
