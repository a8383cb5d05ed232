//! The world of a run: true time, what happens next, chance, and the story that is told when a
//! promise is broken.
//!
//! Everything that happens is an event at a moment of true time; events of one moment happen in the
//! order in which they were made. Nothing else orders anything, so a seed repeats a run. What is
//! meant for a node that is stopped waits until it goes on, and is lost if its process ends.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use havenfs_tests::lab::random::Random;

use crate::calls::Call;
use crate::checks::{Broken, Checks};
use crate::clock::MS;
use crate::faults::Fault;
use crate::hosts::{Host, HostEvent};
use crate::members::Change;
use crate::network::Network;
use crate::node::{Node, NodeEvent};
use crate::plan::{NODES, Plan};
use crate::sabotage::Sabotage;

/// What happens next.
#[derive(Debug)]
pub(crate) enum Event {
    /// To one life of a node's process.
    Node(usize, u64, NodeEvent),
    /// To one life of a host.
    Host(usize, u64, HostEvent),
    /// Something goes wrong, or comes right.
    Fault(Fault),
    /// A copy of a call comes to whoever has the address now.
    Copy(Rc<Call>),
    /// An operator looks how far a change of the members is.
    Operate,
    /// A look at how things stand.
    Tick,
}

/// A run.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) random: Random,
    pub(crate) plan: Plan,
    pub(crate) sabotage: Option<Sabotage>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) network: Network,
    pub(crate) checks: Checks,
    /// What an operator still wants, and which leader has begun the first of it.
    pub(crate) changes: VecDeque<Change>,
    pub(crate) begun_change: Option<usize>,
    /// Faults have stopped, and hosts give back what they have.
    pub(crate) settles: bool,
    /// Numbers that must not come twice: of proposals, calls and connections.
    numbers: u64,
    queue: BTreeMap<(u64, u64), Event>,
    queued: u64,
    is_done: bool,
    /// How often what happened: tells whether a run was worth anything.
    pub(crate) counts: BTreeMap<&'static str, u64>,
    /// The last lines of the story, if it is told.
    story: Option<VecDeque<String>>,
}

impl World {
    /// A run of a seed; `told`: its story is kept.
    pub(crate) fn new(seed: u64, told: bool) -> Self {
        let mut random = random_of(seed);
        let plan = Plan::of(&mut random, None);
        Self::with_plan(plan, random, told)
    }

    /// A run of a seed in which much happens that a rule is for; whether the rule is taken out too.
    pub(crate) fn around(seed: u64, rule: Sabotage, is_out: bool) -> Self {
        let mut random = random_of(seed);
        let mut plan = Plan::of(&mut random, rule.theme());
        rule.bend(&mut plan);
        let mut world = Self::with_plan(plan, random, false);
        world.sabotage = is_out.then_some(rule);
        world
    }

    fn with_plan(plan: Plan, mut random: Random, told: bool) -> Self {
        let nodes = (0..NODES).map(|n| Node::new(n, &plan)).collect();
        let hosts = (0..plan.hosts)
            .map(|h| Host::new(h, &plan, &mut random))
            .collect();
        Self {
            now: 0,
            random,
            sabotage: None,
            nodes,
            hosts,
            network: Network::new(plan.services),
            checks: Checks::new(plan.services),
            changes: plan.changes.iter().copied().collect(),
            begun_change: None,
            settles: false,
            numbers: 0,
            queue: BTreeMap::new(),
            queued: 0,
            is_done: false,
            counts: BTreeMap::new(),
            story: told.then(VecDeque::new),
            plan,
        }
    }

    /// Runs to the end, or to the first broken promise.
    pub(crate) fn run(&mut self) {
        self.say(|world| format!("{:?}", world.plan));
        for n in 0..NODES {
            let after = self.below(200) * MS;
            self.after(after, Event::Fault(Fault::Start(n)));
        }
        self.plan_faults();
        for h in 0..self.hosts.len() {
            self.begin_host(h);
        }
        if !self.changes.is_empty() {
            let after = self.between(500, 2000) * MS;
            self.after(after, Event::Operate);
        }
        self.after(TICK, Event::Tick);
        while !self.is_done
            && self.checks.broken.is_none()
            && let Some(((at, _), event)) = self.queue.pop_first()
        {
            self.now = at;
            self.handle(event);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Node(n, life, event) => {
                let node = &mut self.nodes[n];
                if !node.is_up || node.life != life {
                    return;
                }
                if node.is_stopped {
                    node.held_up.push(event);
                } else {
                    self.node_event(n, event);
                }
            }
            Event::Host(h, life, event) => {
                if self.hosts[h].life == life {
                    self.host_event(h, event);
                }
            }
            Event::Fault(fault) => self.fault(fault),
            Event::Copy(call) => self.late_copy(&call),
            Event::Operate => self.operate(),
            Event::Tick => {
                self.tick();
                self.after(TICK, Event::Tick);
            }
        }
    }

    /// Once faults have stopped, all must come right in bounded time.
    fn tick(&mut self) {
        let since = self.now.saturating_sub(self.plan.faults_until);
        if since == 0 {
            return;
        }
        if !self.settles {
            self.say(|_| "faults stop".to_owned());
            self.settle();
        }
        let unserved = (0..self.plan.services).find(|s| self.who_serves(*s).is_none());
        let late = since > SERVED_WITHIN;
        if let Some(s) = unserved {
            self.want_again(s);
            if late {
                self.broken(Broken::NotServed, || {
                    format!("nobody serves service {s} so long after faults have stopped")
                });
            }
            return;
        }
        self.break_what_nobody_knows();
        match self.unfinished() {
            None => self.is_done = true,
            Some(text) if since > FINISHED_WITHIN => {
                self.broken(Broken::NotGranted, || text);
            }
            Some(_) => {}
        }
    }

    /// Makes something happen later.
    pub(crate) fn after(&mut self, after: u64, event: Event) {
        self.queued += 1;
        self.queue.insert((self.now + after, self.queued), event);
    }

    /// The same for the present life of a node.
    pub(crate) fn node_after(&mut self, n: usize, after: u64, event: NodeEvent) {
        let life = self.nodes[n].life;
        self.after(after, Event::Node(n, life, event));
    }

    /// The same for the present life of a host.
    pub(crate) fn host_after(&mut self, h: usize, after: u64, event: HostEvent) {
        let life = self.hosts[h].life;
        self.after(after, Event::Host(h, life, event));
    }

    /// A number that comes once.
    pub(crate) const fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.random.below(end.max(1))
    }

    pub(crate) fn between(&mut self, start: u64, end: u64) -> u64 {
        start + self.below(end - start)
    }

    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Microseconds most of the time, and now and then much longer.
    pub(crate) fn short_time(&mut self) -> u64 {
        let us = match self.below(20) {
            0 => self.below(30_000),
            1..4 => self.below(3000),
            _ => self.below(300),
        };
        us * 1000
    }

    pub(crate) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Adds a line to the story, if anybody listens.
    pub(crate) fn say(&mut self, line: impl FnOnce(&Self) -> String) {
        if self.story.is_none() {
            return;
        }
        let ms = self.now / MS;
        let line = format!("{ms:>6}.{:03} {}", self.now / 1000 % 1000, line(self));
        if let Some(story) = &mut self.story {
            if story.len() == STORY_LINES {
                story.pop_front();
            }
            story.push_back(line);
        }
    }

    /// A promise is broken. The first one counts.
    pub(crate) fn broken(&mut self, what: Broken, how: impl FnOnce() -> String) {
        if self.checks.broken.is_none() {
            let how = how();
            self.say(|_| format!("BROKEN {what:?}: {how}"));
            self.checks.broken = Some((what, how));
        }
    }

    /// The story so far.
    pub(crate) fn story(&self) -> String {
        let lines = self.story.iter().flatten();
        lines.fold(String::new(), |text, line| text + line + "\n")
    }
}

/// Seeds that stand beside each other must have nothing in common.
const fn random_of(seed: u64) -> Random {
    Random::with_seed(seed.wrapping_mul(0x2545_f491_4f6c_dd1d))
}

/// Lines of the story that are kept.
const STORY_LINES: usize = 60;
/// How often the end is looked for.
const TICK: u64 = 100 * MS;
/// Somebody serves each service so soon after faults have stopped: an election, the longest lease,
/// and the pauses of a node that failed to open it a few times.
const SERVED_WITHIN: u64 = 9000 * MS;
/// All requests are granted and given back so soon: GRANTED is told again after 10 s at most.
const FINISHED_WITHIN: u64 = 30_000 * MS;
