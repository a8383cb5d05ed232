//! The rule, and thousands of random runs of a cluster that grows from one voter to two and shrinks
//! again: never do both serve. With the rule taken out they must.

use std::collections::{BTreeMap, BTreeSet};

use super::super::types::Member;
use super::*;
use crate::cluster::command::{Assign, Renewal};
use crate::cluster::lease::{Lease, Moment};
use crate::cluster::members::MemberCommand;
use crate::cluster::placement::{Seen, Turn, View};
use crate::cluster::service::Active;
use crate::cluster::{ClusterCommand, ClusterState, Command, NodeId, Origin, Outcome, ServiceId};

fn membership(configs: &[&[u64]]) -> Membership {
    with_learners(configs, &[])
}

fn with_learners(configs: &[&[u64]], learners: &[u64]) -> Membership {
    let configs: Vec<BTreeSet<u64>> = configs
        .iter()
        .map(|voters| voters.iter().copied().collect())
        .collect();
    let nodes = configs.iter().flatten().chain(learners);
    let nodes: BTreeMap<u64, Member> = nodes.map(|node| (*node, Member::alone(*node))).collect();
    Membership::new(configs, nodes).unwrap_or_default()
}

fn is_sole(sole: &Sole) -> bool {
    sole.flag().load(Ordering::Acquire)
}

#[test]
fn a_lease_is_needed_from_append_to_apply() {
    let sole = Sole::default();
    sole.begin(1, None);
    assert!(!is_sole(&sole));
    sole.appended(1, &membership(&[&[1]]));
    assert!(!is_sole(&sole), "not applied yet");
    sole.applied(1, &membership(&[&[1]]));
    assert!(is_sole(&sole));
    sole.appended(5, &membership(&[&[1], &[1, 2]]));
    assert!(!is_sole(&sole), "appended");
    sole.appended(6, &membership(&[&[1, 2]]));
    sole.applied(5, &membership(&[&[1], &[1, 2]]));
    sole.appended(8, &membership(&[&[1, 2], &[1]]));
    sole.appended(9, &membership(&[&[1]]));
    assert!(!is_sole(&sole), "not applied yet");
    sole.applied(9, &membership(&[&[1]]));
    assert!(is_sole(&sole));
}

#[test]
fn after_a_start_an_older_membership_does_not_count() {
    let sole = Sole::default();
    sole.applied(1, &membership(&[&[1]]));
    assert!(!is_sole(&sole), "the log was not read yet");
    let last = membership(&[&[1], &[1, 2]]);
    sole.begin(1, Some((5, &last)));
    assert!(!is_sole(&sole));
    sole.applied(1, &membership(&[&[1]]));
    assert!(!is_sole(&sole));
    let other = Sole::default();
    other.begin(2, None);
    other.applied(1, &membership(&[&[1]]));
    assert!(!is_sole(&other), "it is another node");
}

const SERVICE: ServiceId = ServiceId::FIRST;
const LEASE_MS: u32 = 1200;
const STEPS: usize = 3000;
const RUNS: u64 = 300;

/// What the log of the simulated cluster holds.
#[derive(Clone)]
enum Item {
    Command(Command),
    Members(Membership),
}

/// A node, in its only life. Node 1 leads.
struct Node {
    id: u64,
    sole: Sole,
    lease: Lease,
    state: ClusterState,
    /// How many entries of the log it has, and has applied.
    appended: usize,
    applied: usize,
    /// The membership that it has appended last.
    members: Membership,
    seen: BTreeMap<NodeId, Seen>,
    /// Until when it does not apply or renew anything.
    stalled: u64,
}

impl Node {
    fn new(id: u64) -> Self {
        let sole = Sole::default();
        sole.begin(id, None);
        Self {
            id,
            sole,
            lease: Lease::new(NodeId(id), 1, LEASE_MS),
            state: ClusterState::default(),
            appended: 0,
            applied: 0,
            members: Membership::default(),
            seen: BTreeMap::new(),
            stalled: 0,
        }
    }

    fn may_serve(&self, now: u64) -> bool {
        let own = Active {
            node: NodeId(self.id),
            incarnation: 1,
        };
        let service = self.state.service(SERVICE);
        let service = service.filter(|service| service.active() == Some(own));
        service.is_some_and(|service| {
            let until = self.lease.until(SERVICE, service.epoch());
            is_sole(&self.sole) || until.is_some_and(|until| until > at(now))
        })
    }
}

const fn at(ms: u64) -> Moment {
    Moment(ms * 1_000_000)
}

/// What an operator does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Add,
    Promote,
    Settle,
    Retire,
    Remove,
    Finish,
    Done,
}

struct World {
    random: u64,
    now: u64,
    log: Vec<Item>,
    committed: usize,
    nodes: [Node; 2],
    /// What node 2 has proposed and the leader has not got yet.
    under_way: Vec<Command>,
    next: Next,
    /// The rule is broken: a membership counts when it is applied.
    is_late: bool,
    /// How often each node was seen serving.
    served: [usize; 2],
}

impl World {
    fn new(seed: u64, is_late: bool) -> Self {
        let mut world = Self {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            now: 1000,
            log: Vec::new(),
            committed: 0,
            nodes: [Node::new(1), Node::new(2)],
            under_way: Vec::new(),
            next: Next::Add,
            is_late,
            served: [0; 2],
        };
        world.append(Item::Members(membership(&[&[1]])));
        let name = ClusterCommand::Name { name: "a".into() };
        world.append(Item::Command(Command::Cluster(name)));
        world.take(0, None);
        world
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % bound
    }

    fn append(&mut self, item: Item) {
        self.log.push(item);
        self.receive(0);
    }

    /// A node appends the next entry of the log.
    fn receive(&mut self, n: usize) {
        let (now, is_late, node) = (self.now, self.is_late, &mut self.nodes[n]);
        let index = node.appended;
        let renewal = match &self.log[index] {
            Item::Members(members) => {
                if !is_late {
                    node.sole.appended(index as u64, members);
                }
                node.members = members.clone();
                None
            }
            Item::Command(Command::Cluster(ClusterCommand::Renew(renewal))) => Some(renewal),
            Item::Command(Command::Cluster(ClusterCommand::Assign(assign))) => {
                Some(&assign.renewal)
            }
            Item::Command(_) => None,
        };
        if let Some(renewal) = renewal {
            let (id, at) = (renewal.id(), at(now));
            node.seen.insert(renewal.node, Seen { id, at });
        }
        node.appended += 1;
    }

    fn commit(&mut self) {
        let appended: Vec<usize> = self.nodes.iter().map(|node| node.appended).collect();
        let mut joint = self.nodes[0].members.get_joint_config().iter();
        let has = |voters: &BTreeSet<u64>| {
            let with = |voter: &&u64| appended[**voter as usize - 1] > self.committed;
            voters.iter().filter(with).count() > voters.len() / 2
        };
        if self.committed < self.log.len() && joint.all(has) {
            self.committed += 1;
        }
    }

    /// A node applies the next entry; the leader hears what became of a retirement.
    fn apply(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        if node.applied >= self.committed.min(node.appended) || node.stalled > self.now {
            return;
        }
        let index = node.applied;
        node.applied += 1;
        match &self.log[index] {
            Item::Members(members) => {
                node.sole.appended(index as u64, members);
                node.sole.applied(index as u64, members);
            }
            Item::Command(command) => {
                let outcome = node.state.apply(&Origin::default(), command);
                match (command, outcome) {
                    (
                        Command::Cluster(ClusterCommand::Renew(renewal)),
                        Some(Outcome::Renewed(services)),
                    ) if renewal.node.0 == node.id => {
                        node.lease.renewed(renewal.seq, &services);
                    }
                    (
                        Command::Cluster(ClusterCommand::Assign(assign)),
                        Some(Outcome::Assigned(epoch)),
                    ) if assign.renewal.node.0 == node.id => {
                        let seq = assign.renewal.seq;
                        node.lease.renewed(seq, &[(SERVICE, epoch)]);
                    }
                    (Command::Cluster(ClusterCommand::Members(_)), Some(outcome)) if n == 0 => {
                        self.next = match outcome {
                            Outcome::Done => Next::Remove,
                            _ => Next::Retire,
                        };
                    }
                    _ => {}
                }
            }
        }
    }

    fn propose(&mut self, n: usize, command: ClusterCommand) {
        let command = Command::Cluster(command);
        if n == 0 {
            self.append(Item::Command(command));
        } else {
            self.under_way.push(command);
        }
    }

    fn renewal(&mut self, n: usize) -> Option<Renewal> {
        let now = at(self.now);
        self.nodes[n].lease.renew(now)
    }

    fn take(&mut self, n: usize, after: Option<crate::cluster::command::RenewalId>) {
        let service = self.nodes[n].state.service(SERVICE);
        let expected_epoch = service.map_or(0, crate::cluster::ServiceState::epoch);
        if let Some(renewal) = self.renewal(n) {
            let assign = Assign {
                service: SERVICE,
                expected_epoch,
                after,
                renewal,
                unix_seconds: 0,
                recover: false,
            };
            self.propose(n, ClusterCommand::Assign(assign));
        }
    }

    /// A node looks whether it is its turn to take the service.
    fn look(&mut self, n: usize) {
        let node = &self.nodes[n];
        let candidates: Vec<NodeId> = node.members.voter_ids().map(NodeId).collect();
        let view = View {
            state: &node.state,
            service: SERVICE,
            me: NodeId(node.id),
            incarnation: 1,
            candidates: &candidates,
            preferred: None,
            seen: |of| node.seen.get(&of).copied(),
            free_since: Moment::default(),
            joined: Moment::default(),
            not_before: Moment::default(),
            is_stale: false,
        };
        if let Turn::Mine { after } = view.turn(at(self.now)) {
            self.take(n, after);
        }
    }

    /// The next membership, when the one before is committed.
    fn operate(&mut self) {
        let last = self
            .log
            .iter()
            .rposition(|item| matches!(item, Item::Members(_)));
        if last.is_some_and(|last| last >= self.committed) {
            return;
        }
        let (members, next) = match self.next {
            Next::Add => (with_learners(&[&[1]], &[2]), Next::Promote),
            Next::Promote => (membership(&[&[1], &[1, 2]]), Next::Settle),
            Next::Settle => (membership(&[&[1, 2]]), Next::Retire),
            Next::Retire => {
                self.next = Next::Done;
                let retire = MemberCommand::Retire { node: NodeId(2) };
                return self.propose(0, ClusterCommand::Members(retire));
            }
            Next::Remove => (membership(&[&[1, 2], &[1]]), Next::Finish),
            Next::Finish => (membership(&[&[1]]), Next::Done),
            Next::Done => return,
        };
        self.append(Item::Members(members));
        self.next = next;
    }

    /// Something happens.
    fn step(&mut self) {
        let n = self.below(2) as usize;
        let is_awake = self.nodes[n].stalled <= self.now;
        let is_member = self.nodes[0].members.get_node(&2).is_some();
        match self.below(100) {
            0..20 => self.now += 1 + self.below(120),
            20..40 => self.apply(n),
            40..55 if is_member && self.nodes[1].appended < self.log.len() => self.receive(1),
            55..70 => self.commit(),
            70..80 if is_awake && self.nodes[n].members.nodes().count() > 1 => {
                if let Some(renewal) = self.renewal(n) {
                    self.propose(n, ClusterCommand::Renew(renewal));
                }
            }
            80..88 if is_awake => self.look(n),
            88..94 if !self.under_way.is_empty() => {
                let command = self.under_way.remove(0);
                self.append(Item::Command(command));
            }
            94 if self.below(3) == 0 => self.nodes[n].stalled = self.now + self.below(4000),
            95 => self.operate(),
            _ => {}
        }
    }

    /// Runs to the end; whether at no time both nodes may serve.
    fn run(&mut self) -> bool {
        for _ in 0..STEPS {
            self.step();
            let serve = [0, 1].map(|n: usize| self.nodes[n].may_serve(self.now));
            for (count, serves) in self.served.iter_mut().zip(serve) {
                *count += usize::from(serves);
            }
            if serve == [true, true] {
                return false;
            }
        }
        true
    }
}

#[test]
fn of_one_two_and_one_voters_never_two_serve() {
    let (mut moved, mut back) = (0, 0);
    for seed in 1..=RUNS {
        let mut world = World::new(seed, false);
        assert!(world.run(), "two serve with seed {seed}");
        moved += usize::from(world.served[1] > 0);
        let only = world.nodes[0].members.nodes().count() == 1;
        back += usize::from(world.next == Next::Done && only && is_sole(&world.nodes[0].sole));
    }
    // Otherwise nothing was shown.
    assert!(moved > 20 && back > 20, "{moved}, {back}");
}

#[test]
fn without_the_rule_two_serve() {
    let caught = (1..=RUNS)
        .filter(|seed| !World::new(*seed, true).run())
        .count();
    assert!(caught > 0);
}
