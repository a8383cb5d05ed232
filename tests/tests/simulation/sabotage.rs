//! Rules that are taken out, one at a time, to see that a run notices: in the model of what carries
//! out the product's decisions, never in the product.

use std::rc::Rc;

use havenfs::cluster::command::{Assign, Renewal};
use havenfs::cluster::lease::margin;
use havenfs::cluster::{ClusterCommand, Command, Origin, ServiceCommand, ServiceState};

use crate::checks::Broken;
use crate::clock::MS;
use crate::members::Set;
use crate::node::Node;
use crate::plan::{Calamity, NODES, Plan, Theme};
use crate::raft::{Proposed, Raft};
use crate::world::World;

/// A rule that is taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sabotage {
    /// After a release that took too long a node serves again, in the same epoch.
    ServesAgain,
    /// Renewals of an earlier life count for the next one, which reads them in its log.
    ReplayedRenewals,
    /// Who waits takes its own lease's length for that of the other.
    OwnLeaseLength,
    /// The clock is read after the renewal was committed, not before it was proposed.
    ClockAfterCommit,
    /// Who waits adds no margin.
    NoMargin,
    /// An assignment is valid whatever was renewed since.
    IgnoresAfter,
    /// The gate is not looked at before an answer.
    NoGateBeforeReply,
    /// The gate is not looked at before an effect, only when a call comes and before its answer.
    NoGateBeforeEffect,
    /// A call that comes again is a new one.
    NewDigests,
    /// Any refusal of a grant releases it.
    ReleaseOnRefusal,
    /// A node with an empty disk votes under its old number.
    WipedVoter,
    /// A membership counts where it is applied, not where it is appended.
    LateMembers,
    /// A call is carried out in whatever epoch is in force.
    NoEpochInCalls,
    /// A proposal that is sent again is a new one.
    NoOrigins,
    /// Nobody asks the storage whether it still answers.
    NoProbe,
    /// The storage takes changes from whoever sends them.
    NoFence,
}

impl Sabotage {
    /// Makes the runs fit, so that what the rule is for happens soon enough. Nothing here may break
    /// a promise by itself.
    pub(crate) fn bend(self, plan: &mut Plan) {
        plan.calamity = None;
        if self != Self::LateMembers {
            (plan.voters, plan.changes) = (Set(0b111), Vec::new());
        }
        match self {
            Self::WipedVoter => plan.calamity = Some(Calamity::DiskLost),
            Self::NoProbe => plan.calamity = Some(Calamity::StorageHangs),
            Self::OwnLeaseLength => plan.lease_ms = [1200, 600, 600, 600, 600],
            Self::NoMargin => {
                plan.lease_ms = [1200; NODES];
                plan.drift_ppm = [-20_000, 20_000, 20_000, 20_000, 20_000];
            }
            Self::NoFence => plan.fence = true,
            // A fence would hold back what the gate lets through.
            Self::NoGateBeforeEffect => plan.fence = false,
            _ => {}
        }
        if matches!(self, Self::NoMargin | Self::OwnLeaseLength) {
            plan.services = 1;
        }
    }

    /// Where it shows soonest.
    pub(crate) const fn theme(self) -> Option<Theme> {
        Some(match self {
            Self::ServesAgain => Theme::Moves,
            Self::ReplayedRenewals => Theme::Crashes,
            Self::OwnLeaseLength | Self::NoMargin | Self::IgnoresAfter => Theme::Partitions,
            Self::ClockAfterCommit
            | Self::NoGateBeforeReply
            | Self::NoGateBeforeEffect
            | Self::NoFence => Theme::Pauses,
            Self::NewDigests | Self::ReleaseOnRefusal => Theme::Hosts,
            Self::LateMembers => Theme::Members,
            _ => return None,
        })
    }

    /// By how much the wait for the lease of a node begins too early.
    pub(crate) fn waits_less(self, right: u64, own_ms: u32, lease_ms: u32) -> u64 {
        let ns = |ms: u32| u64::from(ms) * MS;
        let margin = |ms: u32| margin(ms).as_nanos() as u64;
        match self {
            Self::OwnLeaseLength => right.saturating_sub(ns(own_ms) + margin(own_ms)),
            Self::NoMargin => margin(lease_ms),
            _ => 0,
        }
    }
}

impl World {
    /// What a node makes of a proposal in its log.
    pub(crate) fn as_applied(&self, n: usize, proposed: &Rc<Proposed>) -> (Origin, Command) {
        let Proposed {
            mut origin,
            mut command,
            ..
        } = Proposed {
            id: proposed.id,
            origin: proposed.origin,
            command: proposed.command.clone(),
        };
        let state = &self.nodes[n].state;
        match (self.sabotage, &mut command) {
            (Some(Sabotage::NoOrigins), _) => {
                let applied = state.applied(origin.node, origin.incarnation, origin.queue);
                origin.number = applied + 1;
            }
            (
                Some(Sabotage::IgnoresAfter),
                Command::Cluster(ClusterCommand::Assign(Assign { service, after, .. })),
            ) => {
                let active = state.service(*service).and_then(ServiceState::active);
                let last = active.and_then(|active| state.last_renewal(active.node));
                *after = last.map(Renewal::id);
            }
            (Some(Sabotage::NoEpochInCalls), Command::Service(id, command)) => {
                let now = state.service(*id).map_or(0, ServiceState::epoch);
                match command {
                    ServiceCommand::Call(call) => call.epoch = now,
                    ServiceCommand::Rebooted(notice) => notice.epoch = now,
                    _ => {}
                }
            }
            _ => {}
        }
        (origin, command)
    }

    /// The disk of a node is lost. Its number is known, so it is not let in again with an empty
    /// one.
    pub(crate) fn lose_disk(&mut self, n: usize) {
        let node: &mut Node = &mut self.nodes[n];
        node.raft = Raft::new(self.plan.voters);
        if self.sabotage == Some(Sabotage::WipedVoter) {
            (node.life, node.begun) = (0, 0);
        } else {
            node.is_out = true;
        }
    }
}

/// What a run with a rule taken out must come to, sooner or later.
const fn signs(sabotage: Sabotage) -> &'static [Broken] {
    match sabotage {
        Sabotage::ServesAgain
        | Sabotage::ReplayedRenewals
        | Sabotage::OwnLeaseLength
        | Sabotage::ClockAfterCommit
        | Sabotage::NoMargin
        | Sabotage::LateMembers
        | Sabotage::IgnoresAfter => &[Broken::TwoServe],
        Sabotage::NoGateBeforeReply => &[Broken::LateAnswer],
        Sabotage::NewDigests => &[Broken::LockLost, Broken::TwoHold, Broken::NotGranted],
        Sabotage::ReleaseOnRefusal => &[Broken::LockLost, Broken::TwoHold],
        Sabotage::WipedVoter => &[Broken::LogsDiffer, Broken::LockLost, Broken::Twice],
        Sabotage::NoEpochInCalls => &[Broken::OtherEpoch],
        Sabotage::NoOrigins => &[Broken::Twice],
        Sabotage::NoProbe => &[Broken::NotServed],
        Sabotage::NoFence | Sabotage::NoGateBeforeEffect => &[Broken::LateEffect],
    }
}

/// Runs seeds with a rule taken out until a promise is broken, in the way that the rule prevents;
/// the same seed must hold with the rule in force.
fn must_be_noticed(sabotage: Sabotage) {
    for seed in 0..SEEDS_MAX {
        let mut world = World::around(seed, sabotage, true);
        world.run();
        let Some((broken, how)) = &world.checks.broken else {
            continue;
        };
        assert!(
            signs(sabotage).contains(broken),
            "seed {seed} without the rule {sabotage:?} breaks {broken:?}: {how}"
        );
        let mut world = World::around(seed, sabotage, false);
        world.run();
        let broken = &world.checks.broken;
        assert!(
            broken.is_none(),
            "seed {seed} with the rule {sabotage:?}: {broken:?}"
        );
        return;
    }
    panic!("{SEEDS_MAX} runs hold without the rule {sabotage:?}");
}

/// So many seeds may hold without the rule, before it must be noticed.
const SEEDS_MAX: u64 = 400;

macro_rules! without {
    ($($name:ident: $sabotage:ident,)*) => {
        $(
            #[test]
            fn $name() {
                must_be_noticed(Sabotage::$sabotage);
            }
        )*
    };
}

without! {
    without_a_final_release_two_nodes_serve: ServesAgain,
    with_renewals_of_an_earlier_life_two_nodes_serve: ReplayedRenewals,
    with_its_own_leases_length_a_node_comes_too_early: OwnLeaseLength,
    with_the_clock_read_after_the_commit_two_nodes_serve: ClockAfterCommit,
    without_the_margin_drifting_clocks_let_two_nodes_serve: NoMargin,
    without_the_last_renewal_in_assignments_two_nodes_serve: IgnoresAfter,
    without_the_gate_before_the_reply_answers_come_late: NoGateBeforeReply,
    without_the_gate_before_the_effect_effects_come_late: NoGateBeforeEffect,
    without_digests_copies_of_calls_change_locks: NewDigests,
    with_every_refusal_a_release_locks_are_lost: ReleaseOnRefusal,
    with_a_wiped_voter_the_log_forks: WipedVoter,
    with_members_that_count_late_two_nodes_serve: LateMembers,
    without_epochs_in_calls_late_ones_are_carried_out: NoEpochInCalls,
    without_origins_proposals_are_carried_out_twice: NoOrigins,
    without_a_probe_a_hung_storage_is_served_for_ever: NoProbe,
    without_a_fence_effects_come_late: NoFence,
}
