//! What was handed over to the node that serves now.

use std::time::Duration;

use super::ServiceState;
use crate::cluster::replies::KeptReply;

impl ServiceState {
    /// The replies that the last active node handed over to that of an epoch.
    pub fn handed_to(&self, epoch: u32) -> impl Iterator<Item = &KeptReply> {
        self.handed.to(epoch)
    }

    /// How long ago that was, by the clock of who asks, in seconds since 1970.
    pub fn handed_age(&self, unix_seconds: u64) -> Duration {
        self.handed.age(unix_seconds)
    }
}
