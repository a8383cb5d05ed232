//! What a node does about one service, step by step: takes it, opens it, serves it while its lease
//! holds, stops it and lets it go.
//!
//! Local and pure: [`Reconciler::poll`] says the next step from the replicated state, the clock and
//! the lease; whoever asks carries it out and tells what came of it, one step at a time. The truth
//! is the replicated state; what is kept here is only what this life of the node has done.
//!
//! ```text
//!             Take                   Open                    Silence, when the lease is over
//!   standby -------> assigned ------------------> serving <---------------------> silent
//!      ^  ^             |                           |   |  Speak, renewed: same epoch  |
//!      |  |             | can't be opened           |   |                              |
//!      |  |             v            Stop           |   |                              |
//!      |  +--Release-- stopped <--------------------+---|------------------------------+
//!      |                    a move, or the end          |
//!      +------------------------Drop--------------------+
//!                    another node has it
//! ```
//!
//! Storage that may be up on this node is let go before it stands by: `LetGo`.
//!
//! # If the node dies
//!
//! - In standby: it has nothing.
//! - Assigned or serving: its next life, or after its lease another node, takes the service in a
//!   new epoch. It takes it over from the replicated state, which has all that hosts were told.
//! - Stopped: the same. Nothing answers any more before the release is proposed, so it does not
//!   matter whether that is ever committed, nor when.

use std::time::Duration;

use super::command::RenewalId;
use super::failback::{FailBack, Return};
use super::lease::Moment;
use super::placement::{Seen, Turn, View};
use super::service::{Active, ServiceState};
use super::{NodeId, Wish};

/// The next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Propose to take the service; then [`Reconciler::taken`].
    Take {
        /// The epoch that the new one follows.
        expected_epoch: u32,
        /// See [`Assign::after`](super::command::Assign).
        after: Option<RenewalId>,
    },
    /// Open the service, with its listeners, and announce its address if the lease still holds
    /// then; then [`Reconciler::opened`].
    Open {
        /// The epoch that this node was given.
        epoch: u32,
    },
    /// Propose that the service goes back to the node that it prefers; then
    /// [`Reconciler::asked_back`].
    GoBack {
        /// The epoch that this node was given.
        epoch: u32,
        /// The preferred node.
        to: NodeId,
    },
    /// Close listeners and connections: the lease is over, or clients can't reach this node.
    Silence,
    /// Open the listeners again: the lease holds, and clients can reach this node.
    Speak,
    /// Close everything at once, since another node has the service: then [`Reconciler::dropped`].
    Drop,
    /// Finish what is under way, bring all to disk, close everything for good; then
    /// [`Reconciler::stopped`].
    Stop(Why),
    /// Propose the release of what is stopped; then [`Reconciler::released`].
    Release {
        /// The epoch that this node had.
        epoch: u32,
    },
    /// Let the storage go, if it is up, which it may be from an earlier life, or since it could not
    /// be let go when it was lost. Nothing else is to be done here before that has succeeded.
    LetGo,
    /// Nothing before this moment, unless the state or the lease change.
    Wait(Moment),
    /// Nothing any more: the process ends.
    End,
}

/// Why a node stops serving what it could go on serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It is wanted there.
    Moved(NodeId),
    /// An operator wants nobody to serve it.
    Withdrawn,
    /// Clients can't reach this node: its cable is out.
    Unreachable,
    /// Its storage does not work on this node.
    StorageFails,
    /// The process ends.
    Ends,
}

/// What this life of the node has of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    StandBy,
    Assigned { epoch: u32 },
    Serving { epoch: u32, speaks: bool },
    Stopped { epoch: u32 },
}

/// What is to be done about one service.
#[derive(Debug)]
pub struct Reconciler {
    phase: Phase,
    /// Since when nobody has it, as far as this node knows.
    free_since: Option<Moment>,
    /// It is not taken before this, since it failed here.
    not_before: Moment,
    failures: u32,
    /// Since when it is served without a failure, or was when it went elsewhere; none if it failed
    /// here last.
    well_since: Option<Moment>,
    ends: bool,
    /// The epoch whose release was proposed last.
    given_back: u32,
    fail_back: FailBack,
}

/// What the node knows, besides what the [`Reconciler`] does.
#[derive(Debug, Clone, Copy)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent thing that a node can know"
)]
pub struct Sight<'a, S> {
    /// The state, the node, the candidates; its moments are filled in here.
    pub view: View<'a, S>,
    /// When this life of the node began to renew its lease; none if it has not.
    pub joined: Option<Moment>,
    /// Until when the lease holds for the epoch that this node has.
    pub lease: Moment,
    /// Whether there are no other voters, so that nothing need be released.
    pub is_alone: bool,
    /// Whether clients can reach this node, as far as it can know, and by addresses that no other
    /// service has.
    pub is_reachable: bool,
    /// Whether the storage works on this node, as far as it can know.
    pub storage_works: bool,
    /// Whether it only hangs here, without an error, and no other node can know of its own: where
    /// commands make the storage ready, nobody tries it while standing by.
    pub hangs_unseen: bool,
    /// Whether the storage may be up on this node.
    pub may_be_up: bool,
    /// For how long the preferred node must have been able before the service goes back to it;
    /// none if it never does.
    pub fail_back: Option<Duration>,
}

impl Default for Reconciler {
    fn default() -> Self {
        Self {
            phase: Phase::StandBy,
            free_since: None,
            not_before: Moment::default(),
            failures: 0,
            well_since: None,
            ends: false,
            given_back: 0,
            fail_back: FailBack::default(),
        }
    }
}

impl Reconciler {
    /// The process is to end.
    pub const fn end(&mut self) {
        self.ends = true;
    }

    /// What came of [`Step::Take`]: the epoch; none if another node was faster, or it is not known.
    pub const fn taken(&mut self, epoch: Option<u32>) {
        if let Some(epoch) = epoch {
            self.free_since = None;
            self.phase = Phase::Assigned { epoch };
        }
    }

    /// What came of [`Step::Open`].
    pub fn opened(&mut self, now: Moment, is_open: bool) {
        let Phase::Assigned { epoch } = self.phase else {
            return;
        };
        if is_open {
            self.well_since = Some(now);
            let speaks = true;
            self.phase = Phase::Serving { epoch, speaks };
        } else {
            self.failed(now);
            self.phase = Phase::Stopped { epoch };
        }
    }

    /// It is left to others for longer than the last time, unless it went well for long since: so
    /// that two nodes on which it fails soon after it was opened don't pass it to and fro.
    fn failed(&mut self, now: Moment) {
        let well_since = self.well_since.take();
        if well_since.is_some_and(|since| now.since(since) >= WELL_TIME) {
            self.failures = 0;
        }
        let pause = FAILED_PAUSE.saturating_mul(1 << self.failures.min(FAILED_MAX));
        self.failures += 1;
        self.not_before = now + pause;
    }

    /// What came of [`Step::Silence`] and [`Step::Speak`].
    pub const fn speaks(&mut self, now: bool) {
        if let Phase::Serving { speaks, .. } = &mut self.phase {
            *speaks = now;
        }
    }

    /// [`Step::Drop`] is done.
    pub const fn dropped(&mut self) {
        self.phase = Phase::StandBy;
    }

    /// [`Step::Stop`] is done, or the listeners can't be opened again: nothing of that epoch
    /// answers here any more.
    pub const fn stopped(&mut self) {
        if let Phase::Serving { epoch, .. } | Phase::Assigned { epoch } = self.phase {
            self.phase = Phase::Stopped { epoch };
        }
    }

    /// [`Step::Release`] was proposed, whatever became of it.
    pub const fn released(&mut self) {
        if let Phase::Stopped { epoch } = self.phase {
            self.given_back = epoch;
        }
        self.phase = Phase::StandBy;
    }

    /// [`Step::GoBack`] was proposed, whatever became of it.
    pub fn asked_back(&mut self, now: Moment) {
        self.fail_back.asked(now);
    }

    /// The next step.
    pub fn poll<S: Fn(NodeId) -> Option<Seen>>(
        &mut self,
        now: Moment,
        sight: Sight<'_, S>,
    ) -> Step {
        if let Some(after) = sight.fail_back {
            self.fail_back.observe(now, &sight.view, after);
        }
        if let Phase::Assigned { epoch } = self.phase
            && self.ends
        {
            // Whatever was half open is closed, and nothing of it has answered.
            self.phase = Phase::Stopped { epoch };
        }
        let step = self.next(now, sight);
        if step == Step::Stop(Why::StorageFails) {
            self.failed(now);
        }
        step
    }

    fn next<S: Fn(NodeId) -> Option<Seen>>(&mut self, now: Moment, sight: Sight<'_, S>) -> Step {
        match self.phase {
            // It was assigned to this life, which has not heard of it yet.
            Phase::StandBy if self.ends && !sight.is_alone && sight.is_own() => {
                let epoch = sight.service().map_or(0, ServiceState::epoch);
                if self.given_back == epoch {
                    return Step::End;
                }
                self.phase = Phase::Stopped { epoch };
                Step::Release { epoch }
            }
            Phase::StandBy if self.ends => Step::End,
            Phase::StandBy => self.stand_by(now, sight),
            Phase::Assigned { epoch } if !sight.has(epoch) => Step::Drop,
            Phase::Assigned { .. } if sight.is_withdrawn() => Step::Stop(Why::Withdrawn),
            // It waits for a fence, which another node may be better at.
            Phase::Assigned { .. } if let Some(to) = sight.moves_to(now) => {
                Step::Stop(Why::Moved(to))
            }
            // Before anybody is fenced for it: another one may be reached.
            Phase::Assigned { .. } if let Some(why) = sight.is_better_off(now) => Step::Stop(why),
            // Another node may have it, which is not known here yet: to listen and to announce the
            // address now would take its hosts away from it.
            Phase::Assigned { .. } if sight.lease <= now || sight.is_stranded(now) => {
                Step::Wait(now + LEASE_LOOK)
            }
            Phase::Assigned { epoch } => Step::Open { epoch },
            Phase::Serving { epoch, .. } if !sight.has(epoch) => Step::Drop,
            Phase::Serving { .. } if self.ends => Step::Stop(Why::Ends),
            Phase::Serving { epoch, speaks } => match sight.serve(now, speaks) {
                Step::Wait(wake) if now < sight.lease => {
                    self.wait_or_go_back(now, wake, epoch, sight)
                }
                step => step,
            },
            Phase::Stopped { .. } if sight.is_alone => Step::End,
            Phase::Stopped { epoch } => Step::Release { epoch },
        }
    }

    /// It serves, and there is nothing else to be done.
    fn wait_or_go_back<S: Fn(NodeId) -> Option<Seen>>(
        &self,
        now: Moment,
        wake: Moment,
        epoch: u32,
        sight: Sight<'_, S>,
    ) -> Step {
        let after = sight.fail_back;
        let turn = after.map(|after| self.fail_back.turn(now, &sight.view, after));
        match turn {
            Some(Return::Now(to)) => Step::GoBack { epoch, to },
            Some(Return::NotBefore(moment)) => Step::Wait(wake.min(moment)),
            Some(Return::No) | None => Step::Wait(wake),
        }
    }

    fn stand_by<S: Fn(NodeId) -> Option<Seen>>(
        &mut self,
        now: Moment,
        sight: Sight<'_, S>,
    ) -> Step {
        let service = sight.service();
        let active = service.and_then(ServiceState::active);
        // What it has it takes again anyway. Alone there is nobody whom it could be in the way of.
        let is_mine = active.is_some_and(|active| active.node == sight.view.me);
        // What nobody is to serve is let go here and now, with as many tries as that takes.
        let is_kept = is_mine && !sight.is_withdrawn();
        if sight.may_be_up && !is_kept && !sight.is_alone {
            return Step::LetGo;
        }
        let Some(joined) = sight.joined else {
            return Step::Wait(now + JOIN_AGAIN);
        };
        let expected_epoch = service.map_or(0, ServiceState::epoch);
        match active {
            // This life has nothing open, so what it was given must be begun anew.
            Some(active) if active == sight.own() => {
                let after = None;
                return Step::Take {
                    expected_epoch,
                    after,
                };
            }
            Some(_) => self.free_since = None,
            // It is free when an operator wants it served again: then the nodes have their turns.
            None if sight.is_withdrawn() => self.free_since = None,
            None => {
                self.free_since.get_or_insert(now);
            }
        }
        // It would be given back at once. But what it has already only this node can give back: its
        // lease is not over, since this life of it renews that.
        let can_serve = sight.is_reachable && sight.storage_works;
        if !(can_serve || sight.is_alone || is_mine) {
            return Step::Wait(now + LOOK_AGAIN);
        }
        let view = View {
            free_since: self.free_since.unwrap_or(now),
            joined,
            not_before: self.not_before,
            ..sight.view
        };
        match view.turn(now) {
            Turn::Mine { after } => Step::Take {
                expected_epoch,
                after,
            },
            Turn::NotBefore(moment) => Step::Wait(moment.min(now + LOOK_AGAIN)),
            Turn::Nobodys => Step::Wait(now + LOOK_AGAIN),
        }
    }
}

impl<S: Fn(NodeId) -> Option<Seen>> Sight<'_, S> {
    fn own(&self) -> Active {
        Active {
            node: self.view.me,
            incarnation: self.view.incarnation,
        }
    }

    fn service(&self) -> Option<&ServiceState> {
        self.view.state.service(self.view.service)
    }

    /// Whether the service is assigned to this life of the node.
    fn is_own(&self) -> bool {
        let active = self.service().and_then(ServiceState::active);
        active == Some(self.own())
    }

    /// Whether this life of the node still has the service in that epoch.
    fn has(&self, epoch: u32) -> bool {
        self.service()
            .is_some_and(|service| service.epoch() == epoch && service.active() == Some(self.own()))
    }

    /// Whether nobody is to serve it.
    fn is_withdrawn(&self) -> bool {
        let wish = self.service().map(ServiceState::wish);
        // Alone there is nobody to release it to.
        wish == Some(Wish::Nobody) && !self.is_alone
    }

    /// Where it is wanted, if it can go there now.
    fn moves_to(&self, now: Moment) -> Option<NodeId> {
        let wanted = self.service()?.wish().node()?;
        (wanted != self.view.me && self.view.is_fit(wanted, now)).then_some(wanted)
    }

    /// Whether clients can't reach this node, and there is no other one that they might reach.
    fn is_stranded(&self, now: Moment) -> bool {
        !self.is_reachable && !self.is_another_there(now)
    }

    /// Why another node should have it.
    fn is_better_off(&self, now: Moment) -> Option<Why> {
        match (self.is_reachable, self.storage_works) {
            (true, true) => None,
            // Nobody is served here, so one whose storage failed once is worth a try.
            (false, _) => self.is_another_there(now).then_some(Why::Unreachable),
            // What hangs here may hang everywhere, and each node that tried it might be stuck with
            // it, with all its other services.
            (true, false) if self.hangs_unseen => None,
            (true, false) => self.is_another_able(now).then_some(Why::StorageFails),
        }
    }

    fn is_another_able(&self, now: Moment) -> bool {
        let mut candidates = self.view.candidates.iter();
        candidates.any(|node| *node != self.view.me && self.view.is_able(*node, now))
    }

    fn is_another_there(&self, now: Moment) -> bool {
        let mut candidates = self.view.candidates.iter();
        candidates.any(|node| *node != self.view.me && self.view.is_there(*node, now))
    }

    fn serve(&self, now: Moment, speaks: bool) -> Step {
        let holds = now < self.lease && self.is_reachable;
        match (self.moves_to(now), self.is_better_off(now)) {
            _ if self.is_withdrawn() => Step::Stop(Why::Withdrawn),
            (Some(to), _) => Step::Stop(Why::Moved(to)),
            // The others may be reached, or their storage may work, and they find it released
            // without a wait. If there is nobody to give it to, it stays: without a cable in
            // silence, and where its storage hangs those who don't need that are answered.
            (None, Some(why)) => Step::Stop(why),
            _ if holds && !speaks => Step::Speak,
            _ if !holds && speaks => Step::Silence,
            _ if holds => Step::Wait(self.lease.min(now + LOOK_AGAIN)),
            _ => Step::Wait(now + LEASE_LOOK),
        }
    }
}

/// While the lease of this node has not begun.
const JOIN_AGAIN: Duration = Duration::from_millis(20);
/// How often a node without a lease looks whether it has one.
const LEASE_LOOK: Duration = Duration::from_millis(20);
/// However quiet it is.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How long a node on which a service failed leaves it to others, doubled each time.
const FAILED_PAUSE: Duration = Duration::from_secs(1);
const FAILED_MAX: u32 = 5;
/// After so long without a failure the doubling begins anew.
const WELL_TIME: Duration = Duration::from_mins(1);

#[cfg(test)]
mod tests;
