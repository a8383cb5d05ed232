//! A node: a process that can be stopped at any moment, die and begin again, with a clock and a
//! disk that outlive it. What it decides is the product's own; what carries it out is modelled
//! here, step by step, with time passing between any two.

use std::cell::Cell;
use std::collections::BTreeMap;

use havenfs::cluster::command::Renewal;
use havenfs::cluster::lease::{Lease, Moment};
use havenfs::cluster::placement::Seen;
use havenfs::cluster::sole::Sole;
use havenfs::cluster::{ClusterCommand, ClusterState, Command, NodeId, Outcome, Queue};

use std::rc::Rc;

use crate::calls::{Call, ServedCall};
use crate::clock::{Clock, MS};
use crate::granting::GrantAnswer;
use crate::keeper::{Deed, Keeper};
use crate::members::Set;
use crate::pending::{Batch, Pending, Then};
use crate::plan::Plan;
use crate::raft::{Entry, Message, Raft};
use crate::replication::renewal_in;
use crate::sabotage::Sabotage;
use crate::world::World;

/// What happens at a node.
#[derive(Debug)]
pub(crate) enum NodeEvent {
    // Of the log.
    Election,
    Heartbeat(u64),
    Message(usize, Message),
    Refused,
    Synced(u64, u64),
    Apply,
    // Of its proposals.
    Drive,
    Forwarded(Batch),
    ConnectionLost(u64),
    LookAtWay(u64),
    // Of its lease.
    Renew,
    Propose(Renewal),
    // Of its services.
    Poll(usize, u64),
    Done(usize, u64, Deed),
    Probe(usize),
    // Of its hosts.
    Call(Rc<Call>),
    Submit(ServedCall),
    Work(ServedCall),
    Effect(ServedCall),
    Reply(ServedCall),
    Grants(usize, u32),
    GrantAnswered(usize, GrantAnswer),
}

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    /// Its process runs, or is stopped.
    pub(crate) is_up: bool,
    /// Its process is stopped: nothing happens there.
    pub(crate) is_stopped: bool,
    /// What happened meanwhile.
    pub(crate) held_up: Vec<NodeEvent>,
    /// Nobody lets it in: it was not added yet, it was removed, or its disk was lost.
    pub(crate) is_out: bool,
    pub(crate) clock: Clock,
    pub(crate) raft: Raft,
    /// How often its process was started; also in what it proposes.
    pub(crate) life: u64,
    /// Until when the disk of its log takes longer.
    pub(crate) log_slow_until: u64,
    /// Until when nothing is applied or renewed.
    pub(crate) stuck_until: u64,
    /// Until when the exported storage does not answer it.
    pub(crate) storage_hangs_until: u64,
    /// Until when it can't open a service.
    pub(crate) open_fails_until: u64,
    pub(crate) lease_ms: u32,
    // Of this life.
    pub(crate) state: ClusterState,
    pub(crate) seen: BTreeMap<NodeId, Seen>,
    pub(crate) pending: Pending,
    pub(crate) lease: Lease,
    pub(crate) sole: Sole,
    /// What follows from that, for its gates.
    pub(crate) is_sole: Rc<Cell<bool>>,
    /// In which life it last began to care for services.
    pub(crate) begun: u64,
    pub(crate) joined: Option<Moment>,
    pub(crate) keepers: Vec<Keeper>,
}

impl Node {
    pub(crate) fn new(n: usize, plan: &Plan) -> Self {
        let base = (n as u64 + 1) * 1_000_000 * MS;
        Self {
            is_up: false,
            is_stopped: false,
            held_up: Vec::new(),
            is_out: !plan.voters.has(n),
            clock: Clock::new(base, plan.drift_ppm[n]),
            raft: Raft::new(if plan.voters.has(n) {
                plan.voters
            } else {
                Set(0)
            }),
            life: 0,
            log_slow_until: 0,
            stuck_until: 0,
            storage_hangs_until: 0,
            open_fails_until: 0,
            lease_ms: plan.lease_ms[n],
            state: ClusterState::default(),
            seen: BTreeMap::new(),
            pending: Pending::new(),
            lease: Lease::new(node_id(n), 0, plan.lease_ms[n]),
            sole: Sole::default(),
            is_sole: Rc::default(),
            begun: 0,
            joined: None,
            keepers: Vec::new(),
        }
    }
}

/// How a node is called in the log.
pub(crate) const fn node_id(n: usize) -> NodeId {
    NodeId(n as u64 + 1)
}

impl World {
    /// What a node's clock shows.
    pub(crate) fn local(&self, n: usize) -> Moment {
        self.nodes[n].clock.read(self.now)
    }

    /// A process is started.
    pub(crate) fn start_node(&mut self, n: usize) {
        let services = self.plan.services;
        let node = &mut self.nodes[n];
        if node.is_up || node.is_out {
            return;
        }
        node.life += 1;
        let life = node.life;
        node.is_up = true;
        node.is_stopped = false;
        node.held_up.clear();
        let state = node.raft.snapshot.as_ref().map(|s| s.state.clone());
        node.state = state.unwrap_or_default();
        node.seen.clear();
        node.pending = Pending::new();
        node.lease = Lease::new(node_id(n), life, node.lease_ms);
        node.joined = None;
        self.see_all(n);
        let node = &mut self.nodes[n];
        node.keepers = (0..services).map(|_| Keeper::default()).collect();
        self.say(|_| format!("n{n} starts its life {life}"));
        self.begin_raft(n);
        self.read_members(n);
    }

    /// It is a member: what it knows of services by its own configuration it tells the others.
    pub(crate) fn begin_services(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        let is_new = node.begun != node.life;
        node.begun = node.life;
        if self.plan.data[n] && is_new {
            if self.sabotage == Some(Sabotage::ReplayedRenewals) {
                self.count_replayed_renewals(n);
            }
            self.node_after(n, 0, NodeEvent::Renew);
            for s in 0..self.plan.services {
                let name = format!("s{s}").into();
                let name = Command::Cluster(ClusterCommand::Name { name });
                self.propose(n, Queue::Calls, name, Then::Named { service: s });
            }
        }
    }

    /// A process dies.
    pub(crate) fn crash_node(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        if !node.is_up {
            return;
        }
        node.is_up = false;
        node.is_stopped = false;
        node.held_up.clear();
        node.raft.crash();
        node.keepers.clear();
        self.count("crashes");
        self.say(|_| format!("n{n} dies"));
    }

    /// A stopped process goes on: all that came meanwhile happens now.
    pub(crate) fn resume_node(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        if !node.is_up || !node.is_stopped {
            return;
        }
        node.is_stopped = false;
        let held_up = std::mem::take(&mut node.held_up);
        self.say(|_| format!("n{n} goes on"));
        let mut after = 0;
        for event in held_up {
            after += self.below(20_000);
            self.node_after(n, after, event);
        }
    }

    pub(crate) fn node_event(&mut self, n: usize, event: NodeEvent) {
        match event {
            NodeEvent::Election => self.election(n),
            NodeEvent::Heartbeat(term) => self.heartbeat(n, term),
            NodeEvent::Message(from, message) => self.message(n, from, message),
            NodeEvent::Refused => self.refused(n),
            NodeEvent::Synced(write, upto) => self.synced(n, write, upto),
            NodeEvent::Apply => self.apply(n),
            NodeEvent::Drive => self.drive(n),
            NodeEvent::Forwarded(batch) => self.forwarded(n, batch),
            NodeEvent::ConnectionLost(lost) => self.connection_lost(n, lost),
            NodeEvent::LookAtWay(connection) => self.look_at_way(n, connection),
            NodeEvent::Renew => self.renew(n),
            NodeEvent::Propose(renewal) => self.propose_renewal(n, renewal),
            NodeEvent::Poll(s, wake) => self.wake_keeper(n, s, wake),
            NodeEvent::Done(s, step, deed) => self.done(n, s, step, deed),
            NodeEvent::Probe(s) => self.probe(n, s),
            NodeEvent::Call(call) => self.call(n, &call),
            NodeEvent::Submit(call) => self.submit(n, call),
            NodeEvent::Work(call) => self.work(n, call),
            NodeEvent::Effect(call) => self.effect(n, call),
            NodeEvent::Reply(call) => self.reply_written(n, &call),
            NodeEvent::Grants(s, epoch) => self.deliver_grants(n, s, epoch),
            NodeEvent::GrantAnswered(s, answer) => self.grant_answered(n, s, answer),
        }
    }

    /// The clock is read; then, perhaps much later, the renewal is proposed.
    fn renew(&mut self, n: usize) {
        let now = self.local(n);
        let every = u64::from(self.nodes[n].lease_ms) * MS / 6;
        self.node_after(n, every, NodeEvent::Renew);
        let node = &mut self.nodes[n];
        if self.now < node.stuck_until {
            return;
        }
        if node.is_sole.get() && node.raft.members.1.all().len() == 1 {
            // Whoever is going to be a voter is a member before: the lease begins in time.
            if node.joined.is_none() {
                node.joined = Some(now);
                self.poll_all(n);
            }
            return;
        }
        if let Some(renewal) = self.nodes[n].lease.renew(now) {
            let after = self.short_time() / 20;
            self.node_after(n, after, NodeEvent::Propose(renewal));
        }
    }

    fn propose_renewal(&mut self, n: usize, renewal: Renewal) {
        let seq = renewal.seq;
        let command = Command::Cluster(ClusterCommand::Renew(renewal));
        self.propose(n, Queue::Leases, command, Then::Renewed { seq });
    }

    /// Applies a batch of entries, and then tells what came of those from here.
    pub(crate) fn apply_batch(&mut self, n: usize, batch: Vec<(u64, Entry)>) {
        let mut told = Vec::new();
        let (mut changes, mut assigned) = (false, Vec::new());
        for (index, entry) in batch {
            if let Some((node, seen)) = renewal_in(&entry, self.local(n)) {
                self.see(n, node, seen);
            }
            if let Some(proposed) = &entry.proposed {
                let (origin, command) = self.as_applied(n, proposed);
                let outcome = self.nodes[n].state.apply(&origin, &command);
                changes |= concerns_all(&command);
                if let (Command::Cluster(ClusterCommand::Assign(assign)), Some(outcome)) =
                    (&command, &outcome)
                    && matches!(outcome, Outcome::Assigned(_))
                {
                    assigned.push(assign.service);
                }
                self.check_entry(n, index, &entry, outcome.as_ref());
                if let Some(outcome) = outcome {
                    told.extend(self.applied_here(n, proposed, outcome));
                } else {
                    self.count("copies that did nothing");
                }
            } else {
                self.check_entry(n, index, &entry, None);
            }
            self.nodes[n].raft.applied = index;
            if let Some(members) = entry.members {
                self.membership_applied(n, index, members);
            }
        }
        assigned.sort_unstable();
        if assigned.windows(2).any(|pair| pair[0] == pair[1]) {
            self.count("epochs of a service in one batch");
        }
        self.check_state(n);
        for (then, outcome) in told {
            self.told(n, then, Some(outcome));
        }
        if changes {
            self.poll_all(n);
        }
        self.look_for_grants(n);
    }

    /// A renewal is seen otherwise than where it is appended: after a start, or in a snapshot.
    fn see(&mut self, n: usize, of: NodeId, seen: Seen) {
        let known = self.nodes[n].seen.get(&of);
        if known.is_none_or(|known| known.id < seen.id) {
            self.nodes[n].seen.insert(of, seen);
        }
    }

    /// What the state says of leases is seen now: when it was written can't be told.
    fn see_all(&mut self, n: usize) {
        let at = self.local(n);
        let renewals = self.nodes[n].state.renewals();
        let renewals = renewals.map(|renewal| (renewal.node, renewal.id()));
        for (node, id) in renewals.collect::<Vec<_>>() {
            self.see(n, node, Seen { id, at });
        }
    }

    /// A snapshot took the place of entries.
    pub(crate) fn snapshot_installed(&mut self, n: usize) {
        self.see_all(n);
        let node = &self.nodes[n];
        let mut passed = Vec::new();
        for queue in Queue::ALL {
            let number = node.state.applied(node_id(n), node.life, queue);
            passed.push((queue, number));
        }
        for (queue, number) in passed {
            for then in self.nodes[n].pending.passed_over(queue, number) {
                self.told(n, then, None);
            }
        }
        self.poll_all(n);
        self.look_for_grants(n);
    }

    /// The outcome of a proposal; none if it can't be known.
    fn told(&mut self, n: usize, then: Then, outcome: Option<Outcome>) {
        match then {
            Then::Nothing => {}
            Then::Named { service } => self.named(n, service),
            Then::Renewed { seq } => match outcome {
                Some(Outcome::Renewed(services)) => self.renewed(n, seq, &services),
                _ => self.nodes[n].lease.dropped(seq),
            },
            Then::Taken { service, step, seq } => self.taken(n, service, step, seq, outcome),
            Then::Released { service, step } => self.released(n, service, step, true),
            Then::NeedNoted { service, step } => {
                self.need_noted(n, service, step, outcome.as_ref());
            }
            Then::Answer(call) => self.answered(n, call, outcome),
        }
    }
}

/// Whether a command may change who serves what.
fn concerns_all(command: &Command) -> bool {
    matches!(command, Command::Cluster(command) if !matches!(command, ClusterCommand::Renew(_)))
}
