//! When the active node gives a service back to the node that it prefers, where that is configured.
//!
//! Local and pure. The preferred node must have been able without a break, in one life of its
//! process, for as long as was configured, with the addresses that the service has now; an operator
//! must not have put the service where it is; and it must not have failed there lately. A service
//! never goes to and fro: if the preferred node does not keep what went back to it, each further
//! try waits twice as long, up to an hour.
//!
//! What is decided is only to ask: [`ClusterCommand::GoBack`](super::ClusterCommand) is void if an
//! operator was faster. How a try ended is seen by every node in the replicated state, so whoever
//! is active next knows of it, unless it starts anew: then it knows of no failure.

use std::time::Duration;

use super::lease::Moment;
use super::placement::{Seen, View};
use super::{NodeId, Wish};

/// What a node has seen of the preferred node of one service.
#[derive(Debug, Default)]
pub struct FailBack {
    /// Since when the preferred node is able, and in which life.
    able: Option<(u64, Moment)>,
    /// The service goes back, or has gone back not long ago.
    trial: Option<Trial>,
    failures: u32,
    not_before: Moment,
}

#[derive(Debug, Clone, Copy)]
struct Trial {
    /// The epoch in which it was asked for.
    epoch: u32,
    /// When the preferred node was first seen to have it.
    had_since: Option<Moment>,
}

/// Whether the service should go back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    /// Not as things are.
    No,
    /// Not before this, unless something changes.
    NotBefore(Moment),
    /// Now, to this node.
    Now(NodeId),
}

impl FailBack {
    /// Looks at the state; to be called whenever it has changed. `after`: for how long the
    /// preferred node must have been able.
    pub fn observe<S: Fn(NodeId) -> Option<Seen>>(
        &mut self,
        now: Moment,
        view: &View<'_, S>,
        after: Duration,
    ) {
        let (Some(preferred), Some(service)) = (view.preferred, view.state.service(view.service))
        else {
            return;
        };
        let life = view.state.last_renewal(preferred);
        let life = life.filter(|_| view.is_fit(preferred, now));
        self.able = life.map(|renewal| match self.able {
            Some((life, since)) if life == renewal.incarnation => (life, since),
            _ => (renewal.incarnation, now),
        });
        let epoch = service.epoch();
        if service.wish() == Wish::On(preferred) && service.placed().is_none() {
            self.trial = Some(Trial {
                epoch,
                had_since: None,
            });
        }
        let (Some(trial), Some(active)) = (&mut self.trial, service.active()) else {
            return;
        };
        if active.node == preferred {
            let had_since = *trial.had_since.get_or_insert(now);
            if now.since(had_since) >= SETTLED {
                (self.trial, self.failures) = (None, 0);
            }
        } else if service.placed().is_some() {
            self.trial = None;
        } else if epoch > trial.epoch {
            self.trial = None;
            self.failures += 1;
            let pause = after.saturating_mul(1 << self.failures.min(DOUBLED_MAX));
            self.not_before = now + pause.min(PAUSE_MAX);
        }
    }

    /// It was asked for, whatever became of it.
    pub fn asked(&mut self, now: Moment) {
        self.not_before = self.not_before.max(now + ASK_AGAIN);
    }

    /// Whether the active node should give it back now.
    pub fn turn<S>(&self, now: Moment, view: &View<'_, S>, after: Duration) -> Return {
        let (Some(preferred), Some(service)) = (view.preferred, view.state.service(view.service))
        else {
            return Return::No;
        };
        let is_free = service.wish() == Wish::Anywhere && service.placed().is_none();
        let Some((_, since)) = self.able.filter(|_| is_free && preferred != view.me) else {
            return Return::No;
        };
        let at = self.not_before.max(since + after);
        if now < at {
            Return::NotBefore(at)
        } else {
            Return::Now(preferred)
        }
    }
}

/// How long the preferred node must keep it, for the try to have been a good one.
const SETTLED: Duration = Duration::from_mins(10);
/// How long it is left alone at most.
const PAUSE_MAX: Duration = Duration::from_hours(1);
/// No more matters: that is a second, doubled, above the longest pause.
const DOUBLED_MAX: u32 = 12;
/// How long after it was asked for in vain.
const ASK_AGAIN: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
