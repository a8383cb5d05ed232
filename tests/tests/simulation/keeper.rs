//! Keeps one service on a node: carries out the steps of the product's `Reconciler`, as
//! `serve::keeper` and `serve::leases` do, with the gates that follow from the lease.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use havenfs::cluster::command::{Assign, Release, RenewalId, StorageNote};
use havenfs::cluster::lease::{Moment, wait};
use havenfs::cluster::placement::{Seen, View};
use havenfs::cluster::reconcile::{Reconciler, Sight, Step, Why};
use havenfs::cluster::{
    ClusterCommand, Command, NodeId, Outcome, Queue, ServiceCommand, ServiceId,
};
use havenfs_nlm::granter::Granter;

use crate::clock::MS;
use crate::gates::Gate;
use crate::node::{NodeEvent, node_id};
use crate::pending::Then;
use crate::sabotage::Sabotage;
use crate::world::World;

/// What is served in an epoch.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) gate: Rc<Gate>,
    /// Whether it listens.
    pub(crate) speaks: bool,
    pub(crate) granter: Granter,
    pub(crate) since: Moment,
    pub(crate) newest_grant: u64,
    /// When the granter is woken next, by true time.
    pub(crate) wakes_at: u64,
    /// When the last call of each host is proposed; also of those whose connections are closed.
    pub(crate) lanes: BTreeMap<usize, u64>,
}

/// What a step came to.
#[derive(Debug)]
pub(crate) enum Deed {
    TookNothing,
    NotFenced,
    Opened,
    Spoke,
    Dropped,
    Stopped,
    NotReleased,
}

/// A service on a node.
#[derive(Debug, Default)]
pub(crate) struct Keeper {
    reconciler: Reconciler,
    pub(crate) id: Option<ServiceId>,
    pub(crate) gate: Option<Rc<Gate>>,
    pub(crate) serving: Option<Serving>,
    /// Which step is carried out, or was last.
    step: u64,
    is_busy: bool,
    /// The last time it was put to sleep.
    wake: u64,
    /// When the storage last answered a probe.
    probed: u64,
    /// It did not, for too long; or an opening found out.
    fails: bool,
    /// When the log was last asked to note that, or that it works again.
    noted: u64,
}

impl World {
    /// Everything may be different now.
    pub(crate) fn poll_all(&mut self, n: usize) {
        if self.plan.data[n] {
            for s in 0..self.plan.services {
                let after = self.short_time() / 10;
                let wake = self.next_wake(n, s);
                self.node_after(n, after, NodeEvent::Poll(s, wake));
            }
        }
    }

    fn next_wake(&mut self, n: usize, s: usize) -> u64 {
        let keeper = &mut self.nodes[n].keepers[s];
        keeper.wake += 1;
        keeper.wake
    }

    pub(crate) fn wake_keeper(&mut self, n: usize, s: usize, wake: u64) {
        if self.nodes[n].keepers[s].wake == wake {
            self.poll_keeper(n, s);
        }
    }

    pub(crate) fn named(&mut self, n: usize, s: usize) {
        let id = self.nodes[n].state.service_named(&format!("s{s}"));
        let own = node_id(n);
        let state = id.and_then(|id| self.nodes[n].state.service(id));
        let fails = state.is_some_and(|service| service.failing().contains(&own));
        let keeper = &mut self.nodes[n].keepers[s];
        (keeper.id, keeper.probed, keeper.fails) = (id, self.now, fails);
        self.node_after(n, PROBE_EVERY, NodeEvent::Probe(s));
        self.poll_keeper(n, s);
    }

    /// The next step of a keeper that is not busy.
    pub(crate) fn poll_keeper(&mut self, n: usize, s: usize) {
        self.give_up_serving_again(n, s);
        let now = self.local(n);
        let Some(id) = self.nodes[n].keepers[s].id else {
            return;
        };
        if self.nodes[n].keepers[s].is_busy {
            return;
        }
        let step = self.next_step(n, s, id, now);
        if let Step::Wait(moment) = step {
            let after = self.nodes[n].clock.until(self.now, moment) + MS;
            let wake = self.next_wake(n, s);
            self.node_after(n, after, NodeEvent::Poll(s, wake));
            return;
        }
        let keeper = &mut self.nodes[n].keepers[s];
        keeper.is_busy = true;
        keeper.step += 1;
        if !matches!(step, Step::Take { .. }) {
            self.say(|_| format!("n{n} s{s}: {step:?}"));
        }
        self.carry_out(n, s, id, step);
    }

    fn next_step(&mut self, n: usize, s: usize, id: ServiceId, now: Moment) -> Step {
        let data = self.plan.data;
        let voters = self.nodes[n].raft.members.1.voters();
        let members = self.nodes[n].state.members();
        let candidates = voters.iter().filter(|n| data[*n]).map(node_id);
        let candidates: Vec<NodeId> = candidates.filter(|n| !members.is_retired(*n)).collect();
        let sabotage = self.sabotage;
        let node = &mut self.nodes[n];
        let mut reconciler = std::mem::take(&mut node.keepers[s].reconciler);
        let fails = node.keepers[s].fails;
        let (state, own_ms) = (&node.state, node.lease_ms);
        let seen_by_node = &node.seen;
        let seen = |of: NodeId| {
            let seen = seen_by_node.get(&of).copied()?;
            let earlier = sabotage
                .zip(state.last_renewal(of))
                .map_or(0, |(by, last)| {
                    by.waits_less(wait(last).as_nanos() as u64, own_ms, last.lease_ms)
                });
            let at = Moment(seen.at.0.saturating_sub(earlier));
            Some(Seen { at, ..seen })
        };
        let gate = node.keepers[s].gate.as_ref();
        let sight = Sight {
            view: View {
                state,
                service: id,
                me: node_id(n),
                incarnation: node.life,
                candidates: &candidates,
                preferred: (s == 0).then_some(NodeId(1)),
                seen,
                free_since: Moment::default(),
                joined: Moment::default(),
                not_before: Moment::default(),
                is_stale: false,
            },
            joined: node.joined,
            lease: gate.map_or(Moment::default(), |gate| gate.until()),
            is_alone: false,
            is_reachable: true,
            storage_works: !fails,
            hangs_unseen: false,
            may_be_up: false,
            // Soon enough to be in the way of everything else.
            fail_back: (s == 0).then_some(Duration::from_millis(1500)),
        };
        let step = reconciler.poll(now, sight);
        node.keepers[s].reconciler = reconciler;
        step
    }

    fn carry_out(&mut self, n: usize, s: usize, id: ServiceId, step: Step) {
        match step {
            Step::Take {
                expected_epoch,
                after,
            } => self.take(n, s, id, expected_epoch, after),
            Step::Open { epoch } => {
                if self.plan.fence && self.sabotage != Some(Sabotage::NoFence) {
                    let is_done = self.fence(n, s, id, epoch);
                    if !is_done {
                        let pause = self.between(1, 2000) * MS;
                        self.done_after(n, s, pause, Deed::NotFenced);
                        return;
                    }
                    // Before it may write anything, the log knows that it is to be fenced.
                    let need = Command::Service(id, ServiceCommand::NeedsFence { epoch });
                    let step = self.nodes[n].keepers[s].step;
                    let then = Then::NeedNoted { service: s, step };
                    self.propose(n, Queue::Leases, need, then);
                    self.done_after(n, s, NOTE_MAX, Deed::NotFenced);
                    return;
                }
                let took = MS + self.short_time();
                self.done_after(n, s, took, Deed::Opened);
            }
            Step::GoBack { epoch, to } => {
                self.count("services going back");
                let service = id;
                let command = Command::Cluster(ClusterCommand::GoBack { service, epoch, to });
                self.propose(n, Queue::Leases, command, Then::Nothing);
                let now = self.local(n);
                self.nodes[n].keepers[s].reconciler.asked_back(now);
                self.idle(n, s);
            }
            Step::Silence => {
                self.count("silences");
                self.hush(n, s);
                self.nodes[n].keepers[s].reconciler.speaks(false);
                self.idle(n, s);
            }
            Step::Speak => {
                let took = MS + self.short_time();
                self.done_after(n, s, took, Deed::Spoke);
            }
            Step::Drop => {
                self.count("services dropped");
                self.let_go(n, s);
                let took = self.short_time();
                self.done_after(n, s, took, Deed::Dropped);
            }
            Step::Stop(why) => {
                self.count(match why {
                    Why::StorageFails => "services given up for their storage",
                    Why::Withdrawn => "services withdrawn",
                    _ => "services moved away",
                });
                self.hush(n, s);
                let took = self.between(1, 100) * MS;
                self.done_after(n, s, took, Deed::Stopped);
            }
            Step::Release { epoch } => {
                let release = Command::Cluster(ClusterCommand::Release(Release {
                    service: id,
                    epoch,
                    node: node_id(n),
                    incarnation: self.nodes[n].life,
                }));
                let step = self.nodes[n].keepers[s].step;
                let then = Then::Released { service: s, step };
                self.propose(n, Queue::Leases, release, then);
                self.done_after(n, s, RELEASE_MAX, Deed::NotReleased);
            }
            Step::Wait(_) | Step::LetGo | Step::End => {}
        }
    }

    /// Fences whom the replicated state names, and nobody else who may still write. Who released
    /// the service had brought all to its end, and what this node itself wrote in an earlier epoch
    /// is in order with what it writes now: neither has effects any more.
    /// Returns whether that has succeeded.
    fn fence(&mut self, n: usize, s: usize, id: ServiceId, epoch: u32) -> bool {
        let service = self.nodes[n].state.service(id);
        let nodes = service.map_or_else(Vec::new, |service| service.unfenced().collect());
        // That is a fault as others are.
        if !nodes.is_empty() && !self.settles && self.percent(40) {
            self.count("fences that failed");
            self.say(|_| format!("n{n} s{s}: the fence of {nodes:?} fails"));
            return false;
        }
        for m in 0..self.nodes.len() {
            let is_named = nodes.contains(&node_id(m));
            if is_named || m == n || !self.checks.may_write(s, m) {
                let fenced = &mut self.network.fenced_below[s][m];
                *fenced = epoch.max(*fenced);
            }
        }
        if nodes.is_empty() {
            return true;
        }
        self.count("nodes fenced");
        let fenced = ServiceCommand::Fenced { epoch, nodes };
        let fenced = Command::Service(id, fenced);
        self.propose(n, Queue::Leases, fenced, Then::Nothing);
        true
    }

    fn take(
        &mut self,
        n: usize,
        s: usize,
        id: ServiceId,
        expected_epoch: u32,
        after: Option<RenewalId>,
    ) {
        let now = self.local(n);
        let Some(renewal) = self.nodes[n].lease.renew(now) else {
            self.done_after(n, s, TAKE_AGAIN, Deed::TookNothing);
            return;
        };
        let seq = renewal.seq;
        let assign = Assign {
            service: id,
            expected_epoch,
            after,
            renewal,
            unix_seconds: self.unix_seconds().into(),
            recover: false,
        };
        self.say(|_| format!("n{n} s{s}: wants it after {after:?}, epoch {expected_epoch}"));
        let command = Command::Cluster(ClusterCommand::Assign(assign));
        let step = self.nodes[n].keepers[s].step;
        let then = Then::Taken {
            service: s,
            step,
            seq,
        };
        self.propose(n, Queue::Leases, command, then);
    }

    pub(crate) fn taken(
        &mut self,
        n: usize,
        s: usize,
        step: u64,
        seq: u64,
        outcome: Option<Outcome>,
    ) {
        if self.nodes[n].keepers[s].step != step {
            return;
        }
        let Some(Outcome::Assigned(epoch)) = outcome else {
            self.count("races lost");
            self.nodes[n].lease.dropped(seq);
            self.done_after(n, s, TAKE_AGAIN, Deed::TookNothing);
            return;
        };
        self.count("services taken");
        self.say(|_| format!("n{n} s{s}: has it in epoch {epoch}"));
        let node = &mut self.nodes[n];
        let gate = Rc::new(Gate::new(epoch, Rc::clone(&node.is_sole)));
        let keeper = &mut node.keepers[s];
        if let Some(before) = keeper.gate.replace(gate) {
            before.is_over.set(true);
        }
        keeper.serving = None;
        keeper.reconciler.taken(Some(epoch));
        if let Some(id) = keeper.id {
            node.lease.renewed(seq, &[(id, epoch)]);
            self.open_gate(n, s, epoch);
        }
        self.idle(n, s);
    }

    fn done_after(&mut self, n: usize, s: usize, after: u64, deed: Deed) {
        let step = self.nodes[n].keepers[s].step;
        self.node_after(n, after, NodeEvent::Done(s, step, deed));
    }

    pub(crate) fn done(&mut self, n: usize, s: usize, step: u64, deed: Deed) {
        let keeper = &mut self.nodes[n].keepers[s];
        if keeper.step != step || !keeper.is_busy {
            return;
        }
        match deed {
            Deed::TookNothing => keeper.reconciler.taken(None),
            // It is tried again, if the service is still this node's then.
            Deed::NotFenced => {}
            Deed::Opened => self.opened(n, s),
            Deed::Spoke => {
                if let Some(serving) = &mut keeper.serving {
                    serving.speaks = true;
                }
                keeper.reconciler.speaks(true);
                self.count("spoke again");
                self.announce(n, s);
            }
            Deed::Dropped => keeper.reconciler.dropped(),
            Deed::Stopped => {
                if self.sabotage != Some(Sabotage::ServesAgain) {
                    self.let_go(n, s);
                }
                self.nodes[n].keepers[s].reconciler.stopped();
            }
            Deed::NotReleased => return self.released(n, s, step, false),
        }
        self.idle(n, s);
    }

    fn opened(&mut self, n: usize, s: usize) {
        let now = self.local(n);
        let secret = self.below(1 << 40).to_be_bytes();
        let [_, _, secret @ ..] = secret;
        let node = &mut self.nodes[n];
        let hangs = self.now < node.storage_hangs_until;
        let is_open = !hangs && self.now >= node.open_fails_until;
        let keeper = &mut node.keepers[s];
        keeper.reconciler.opened(now, is_open);
        // A probe is a part of the opening.
        keeper.fails |= hangs;
        let Some(gate) = keeper.gate.clone().filter(|_| is_open) else {
            self.count("services not opened");
            self.let_go(n, s);
            self.note_storage(n, s);
            return;
        };
        let epoch = gate.epoch;
        keeper.serving = Some(Serving {
            granter: Granter::new(epoch, secret),
            gate,
            speaks: true,
            since: now,
            newest_grant: 0,
            wakes_at: u64::MAX,
            lanes: BTreeMap::new(),
        });
        keeper.probed = self.now;
        self.announce(n, s);
        self.count("services opened");
        self.notify_hosts(n, s);
        self.look_for_grants(n);
    }

    /// Takes the service's address, unless the lease is over: another node may have it then, and
    /// would not get it back. Then it is silent until the lease holds.
    fn announce(&mut self, n: usize, s: usize) {
        let gate = self.nodes[n].keepers[s].gate.as_ref();
        if gate.is_some_and(|gate| gate.is_open(self.local(n))) {
            self.network.address[s] = Some(n);
        } else {
            self.hush(n, s);
            self.nodes[n].keepers[s].reconciler.speaks(false);
        }
    }

    /// The log was told that a node is to be fenced if it loses the service.
    pub(crate) fn need_noted(&mut self, n: usize, s: usize, step: u64, outcome: Option<&Outcome>) {
        if self.nodes[n].keepers[s].step == step {
            let took = MS + self.short_time();
            let deed = match outcome {
                Some(Outcome::Done) => Deed::Opened,
                _ => Deed::NotFenced,
            };
            self.done_after(n, s, took, deed);
        }
    }

    /// A release was proposed and carried out, or has taken too long.
    pub(crate) fn released(&mut self, n: usize, s: usize, step: u64, is_known: bool) {
        let keeper = &mut self.nodes[n].keepers[s];
        if keeper.step != step || !keeper.is_busy {
            return;
        }
        if !is_known {
            self.count("releases that took too long");
            if self.sabotage == Some(Sabotage::ServesAgain) {
                // It takes the move for failed, and goes on as before.
                if let Some(serving) = &mut self.nodes[n].keepers[s].serving {
                    serving.speaks = true;
                    self.network.address[s] = Some(n);
                }
                return;
            }
        }
        self.let_go(n, s);
        self.nodes[n].keepers[s].reconciler.released();
        self.idle(n, s);
    }

    /// Who wrongly went on ends when it sees that another node has the service.
    fn give_up_serving_again(&mut self, n: usize, s: usize) {
        let node = &self.nodes[n];
        let keeper = &node.keepers[s];
        if self.sabotage != Some(Sabotage::ServesAgain) || !keeper.is_busy {
            return;
        }
        let Some((serving, id)) = keeper.serving.as_ref().zip(keeper.id) else {
            return;
        };
        let state = node.state.service(id);
        let has_it = state.is_some_and(|service| {
            let active = service.active();
            service.epoch() == serving.gate.epoch && active.is_some_and(|a| a.node == node_id(n))
        });
        if serving.speaks && !has_it {
            self.let_go(n, s);
            self.nodes[n].keepers[s].reconciler.released();
            self.nodes[n].keepers[s].is_busy = false;
        }
    }

    fn idle(&mut self, n: usize, s: usize) {
        self.nodes[n].keepers[s].is_busy = false;
        let wake = self.next_wake(n, s);
        let after = self.short_time() / 10;
        self.node_after(n, after, NodeEvent::Poll(s, wake));
    }

    /// Closes listeners and connections.
    fn hush(&mut self, n: usize, s: usize) {
        if let Some(serving) = &mut self.nodes[n].keepers[s].serving {
            serving.speaks = false;
        }
        if self.network.address[s] == Some(n) {
            self.network.address[s] = None;
        }
    }

    /// Closes everything for good.
    fn let_go(&mut self, n: usize, s: usize) {
        self.hush(n, s);
        let keeper = &mut self.nodes[n].keepers[s];
        if let Some(gate) = keeper.gate.take() {
            gate.is_over.set(true);
        }
        keeper.serving = None;
    }

    /// Asks the storage whether it still answers, also while another node serves it.
    pub(crate) fn probe(&mut self, n: usize, s: usize) {
        let node = &mut self.nodes[n];
        let hangs = self.now < node.storage_hangs_until;
        let keeper = &mut node.keepers[s];
        let failed = keeper.fails;
        if !hangs {
            keeper.probed = self.now;
            keeper.fails = false;
        } else if self.now - keeper.probed > PROBE_MAX && self.sabotage != Some(Sabotage::NoProbe) {
            keeper.fails = true;
        }
        let fails = keeper.fails;
        self.node_after(n, PROBE_EVERY, NodeEvent::Probe(s));
        self.note_storage(n, s);
        if fails != failed {
            self.say(|_| format!("n{n} s{s}: the storage fails: {fails}"));
            self.poll_keeper(n, s);
        }
    }

    /// Has the log note whether the storage works, if it says otherwise.
    fn note_storage(&mut self, n: usize, s: usize) {
        let (own, now) = (node_id(n), self.now);
        let node = &mut self.nodes[n];
        let keeper = &mut node.keepers[s];
        let Some(service) = keeper.id else { return };
        let state = node.state.service(service);
        let is_noted = state.is_some_and(|state| state.failing().contains(&own));
        if keeper.fails == is_noted || now - keeper.noted < NOTE_AGAIN {
            return;
        }
        keeper.noted = now;
        let fails = keeper.fails;
        let note = Command::Cluster(ClusterCommand::NoteStorage(StorageNote {
            service,
            node: own,
            fails,
        }));
        self.propose(n, Queue::Leases, note, Then::Nothing);
    }

    /// The node that serves a service, and can.
    pub(crate) fn who_serves(&self, s: usize) -> Option<usize> {
        (0..self.nodes.len()).find(|n| {
            let node = &self.nodes[*n];
            let serving = node.keepers.get(s).and_then(|k| k.serving.as_ref());
            let can = node.is_up && !node.is_stopped && self.now >= node.storage_hangs_until;
            can && serving.is_some_and(|serving| {
                serving.speaks && serving.gate.is_open(node.clock.read(self.now))
            })
        })
    }

    /// A clock for people to read.
    pub(crate) const fn unix_seconds(&self) -> u32 {
        1_767_225_600 + (self.now / (1000 * MS)) as u32
    }
}

/// After a lost race, before the next look.
const TAKE_AGAIN: u64 = 20 * MS;
/// How long a release is waited for.
const RELEASE_MAX: u64 = 500 * MS;
/// How long it waits for a note in the log.
const NOTE_MAX: u64 = 5000 * MS;
/// When a note of the storage is taken for lost.
const NOTE_AGAIN: u64 = 1000 * MS;
const PROBE_EVERY: u64 = 200 * MS;
/// How long a storage may take to answer.
const PROBE_MAX: u64 = 1000 * MS;
