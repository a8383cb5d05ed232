//! The end of a service that no node has in its files any more: one that was renamed there, or
//! taken out, would keep its name, its addresses and its directories for ever.
//!
//! It takes its locks, its definition and its handles along. Its id is never given again, so that
//! what comes late for it finds no service.

use super::{ClusterState, Outcome, Renewal, RenewalId, ServiceId};

impl ClusterState {
    /// Forgets a service that nobody serves. That is so in the cases in which it may be assigned:
    /// nobody has it, an earlier life of its node has it, or the proposer has waited for the lease
    /// of that node and says after which renewal; and no node is left that could still write.
    pub(super) fn forget(&mut self, id: ServiceId, after: Option<RenewalId>) -> Outcome {
        let Some(service) = self.services.get(&id) else {
            return Outcome::NoSuchService;
        };
        let active = service.active();
        let is_over = active.is_none_or(|active| {
            let node = self.nodes.get(&active.node);
            let has_restarted = node.is_some_and(|node| node.incarnation > active.incarnation);
            let last = self.last_renewal(active.node);
            has_restarted || last.map(Renewal::id) == after
        });
        if !is_over {
            return Outcome::StillServes(id);
        }
        // The node that had it last may write as well, and is one of those from now on: whoever has
        // the storage next under another name would know of no fence.
        if let Some(service) = self.services.get_mut(&id)
            && service.leave_to_fence()
        {
            return Outcome::AwaitsFence(id);
        }
        self.services.remove(&id);
        self.last_forgotten = self.last_forgotten.max(id);
        Outcome::Done
    }

    /// The id of the next service that is named.
    pub(super) fn next_id(&self) -> ServiceId {
        let last = self.services.keys().next_back().copied();
        let last = last.unwrap_or_default().max(self.last_forgotten);
        ServiceId(last.0.saturating_add(1))
    }
}
