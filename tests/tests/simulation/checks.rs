//! The promises, looked at while a run goes on. What is compared is what somebody outside could
//! see: moments of true time, the answers that hosts were given, the effects on the storage; and
//! the replicated state on all nodes, entry by entry.

use std::collections::{BTreeMap, BTreeSet};

use havenfs::cluster::{
    ClusterCommand, ClusterState, Command, NodeId, Outcome, Queue, ServiceCommand, ServiceState,
    Wish,
};
use havenfs_nlm::table::LockTable;

use crate::calls::{ServedCall, file_key, name, svid};
use crate::hosts::CELLS;
use crate::members::Members;
use crate::node::node_id;
use crate::raft::{Entry, place};
use crate::world::World;

/// Which promise is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Broken {
    /// Two nodes may serve a service at a time.
    TwoServe,
    /// A call had its effect after another node had begun to answer.
    LateEffect,
    /// A node answered after another one had begun to, or when its lease was over.
    LateAnswer,
    /// A call changed something in a later epoch than the one it was accepted under.
    OtherEpoch,
    /// Two owners were told to have what only one can have.
    TwoHold,
    /// The table lacks a lock that its owner was told to have.
    LockLost,
    /// An owner may not reclaim what it was told to have.
    ReclaimDenied,
    /// A request that waits stands there twice, or was granted without having waited.
    WaitsTwice,
    /// Two nodes made different states of the same log.
    StatesDiffer,
    /// Two nodes applied different entries at one place, or committed ones were taken back.
    LogsDiffer,
    /// A number that only rises did not.
    Fell,
    /// A proposal was carried out twice, or out of its order.
    Twice,
    /// A node got a service that an operator had withdrawn.
    Withdrawn,
    /// Nobody serves though nothing goes wrong any more.
    NotServed,
    /// A request is not granted, or a lock is left that nobody has.
    NotGranted,
}

/// What is known of an entry that some node has applied.
#[derive(Debug, PartialEq, Eq)]
struct Applied {
    term: u64,
    id: u64,
    members: Option<Members>,
}

/// A request in the terms of the table's listing.
type Request = (Vec<u8>, i32, Vec<u8>, u64, u64, bool);

/// What was seen so far.
#[derive(Debug)]
pub(crate) struct Checks {
    pub(crate) broken: Option<(Broken, String)>,
    /// All entries that were applied anywhere, by index from 1.
    applied: Vec<Applied>,
    /// The state after some of the last ones.
    states: BTreeMap<u64, ClusterState>,
    /// Which proposals were carried out.
    carried_out: BTreeSet<u64>,
    /// The last of each queue of each life.
    last_of_queue: BTreeMap<(u64, u64, usize), u64>,
    /// In which epoch each service was last seen to be served, and by whom.
    begun: Vec<(u32, usize)>,
    /// Epoch, NSM state and last grant of each service.
    last: Vec<(u32, i32, u64)>,
    waiting: Vec<Vec<Request>>,
    /// The node that the log gives each service to, and those that lost it without a release and
    /// have not had it since: they may still write to its storage.
    active: Vec<Option<NodeId>>,
    lost: Vec<BTreeSet<NodeId>>,
}

impl Checks {
    pub(crate) fn new(services: usize) -> Self {
        Self {
            broken: None,
            applied: Vec::new(),
            states: BTreeMap::new(),
            carried_out: BTreeSet::new(),
            last_of_queue: BTreeMap::new(),
            begun: vec![(0, 0); services],
            last: vec![(0, 0, 0); services],
            waiting: vec![Vec::new(); services],
            active: vec![None; services],
            lost: vec![BTreeSet::new(); services],
        }
    }

    /// Whether a node may still write to a service's storage if nobody fences it.
    pub(crate) fn may_write(&self, s: usize, n: usize) -> bool {
        self.lost[s].contains(&node_id(n))
    }
}

impl World {
    /// Called whenever a gate was opened for longer.
    pub(crate) fn check_gates(&mut self, s: usize) {
        let open = self.open_gates(s);
        if open.len() > 1 {
            self.broken(Broken::TwoServe, || {
                format!("of service {s} the gates of these nodes and epochs are open: {open:?}")
            });
        }
    }

    /// A node answers, or changes the storage, in an epoch.
    fn check_begun(&mut self, n: usize, served: &ServedCall, broken: Broken) {
        let (s, epoch) = (served.call.service, served.gate.epoch);
        let (begun, by) = self.checks.begun[s];
        if begun > epoch {
            let id = served.call.id;
            self.broken(broken, || {
                format!("call {id} at n{n} in epoch {epoch}, after n{by} began epoch {begun}")
            });
        } else {
            self.checks.begun[s] = (epoch, n);
        }
    }

    pub(crate) fn check_effect(&mut self, n: usize, served: &ServedCall) {
        self.check_begun(n, served, Broken::LateEffect);
    }

    pub(crate) fn check_answer(&mut self, n: usize, served: &ServedCall) {
        let now = self.local(n);
        if !served.gate.is_open(now) {
            let id = served.call.id;
            self.broken(Broken::LateAnswer, || {
                format!("call {id} is answered by n{n}, whose lease is over")
            });
        }
        self.check_begun(n, served, Broken::LateAnswer);
    }

    /// A node has applied an entry.
    pub(crate) fn check_entry(
        &mut self,
        n: usize,
        index: u64,
        entry: &Entry,
        outcome: Option<&Outcome>,
    ) {
        let id = entry.proposed.as_ref().map_or(0, |proposed| proposed.id);
        let applied = Applied {
            term: entry.term,
            id,
            members: entry.members,
        };
        if let Some(known) = self.checks.applied.get(index as usize - 1) {
            if *known != applied {
                self.broken(Broken::LogsDiffer, || {
                    format!("n{n} applies proposal {id} at {index}, and another node another one")
                });
            }
            return;
        }
        if index != self.checks.applied.len() as u64 + 1 {
            self.broken(Broken::LogsDiffer, || {
                format!("n{n} leaves out some before {index}")
            });
            return;
        }
        self.checks.applied.push(applied);
        let Some(proposed) = &entry.proposed else {
            return;
        };
        if let Some(outcome) = outcome {
            self.check_carried_out(proposed.id, &proposed.origin);
            self.check_epoch(n, &proposed.command, outcome);
            self.note_loss(n, &proposed.command, outcome);
        }
        self.check_numbers(n);
    }

    fn check_carried_out(&mut self, id: u64, origin: &havenfs::cluster::Origin) {
        let is_new = self.checks.carried_out.insert(id);
        let key = (origin.node.0, origin.incarnation, place(origin.queue));
        let last = self.checks.last_of_queue.insert(key, origin.number);
        let in_order = origin.number == last.unwrap_or(0) + 1;
        if !is_new || !in_order {
            let queue: Queue = origin.queue;
            self.broken(Broken::Twice, || {
                format!(
                    "proposal {id}, number {} of {queue:?}, after {last:?}",
                    origin.number
                )
            });
        }
    }

    /// What was accepted in another epoch changes nothing.
    fn check_epoch(&mut self, n: usize, command: &Command, outcome: &Outcome) {
        let Command::Service(id, command) = command else {
            return;
        };
        let accepted: Option<u32> = ServiceCommand::epoch(command);
        let now = self.nodes[n].state.service(*id).map(ServiceState::epoch);
        if accepted != now && *outcome != Outcome::EarlierEpoch {
            self.broken(Broken::OtherEpoch, || {
                format!("a call of epoch {accepted:?} is carried out in {now:?}: {outcome:?}")
            });
        }
    }

    /// Who has each service and who lost it, as the log says.
    fn note_loss(&mut self, n: usize, command: &Command, outcome: &Outcome) {
        let (id, to) = match (command, outcome) {
            (Command::Cluster(ClusterCommand::Assign(assign)), Outcome::Assigned(_)) => {
                (assign.service, Some(assign.renewal.node))
            }
            (Command::Cluster(ClusterCommand::Release(release)), Outcome::Done) => {
                (release.service, None)
            }
            _ => return,
        };
        let name = self.nodes[n].state.service(id).map(ServiceState::name);
        let Some(s) = SERVICES.iter().position(|one| Some(*one) == name) else {
            return;
        };
        let before = std::mem::replace(&mut self.checks.active[s], to);
        let Some(to) = to else {
            return;
        };
        let wish = self.nodes[n].state.service(id).map(ServiceState::wish);
        if wish == Some(Wish::Nobody) && before != Some(to) {
            self.broken(Broken::Withdrawn, || {
                format!(
                    "service {s} is given to node {to}, and an operator wants nobody to have it"
                )
            });
        }
        let lost = &mut self.checks.lost[s];
        lost.extend(before);
        lost.remove(&to);
    }

    /// What rises, and what waits, after an entry that no node had applied before.
    fn check_numbers(&mut self, n: usize) {
        for (s, name) in SERVICES.iter().enumerate().take(self.plan.services) {
            let state = &self.nodes[n].state;
            let id = state.service_named(name);
            let Some(service) = id.and_then(|id| state.service(id)) else {
                continue;
            };
            let table = service.table();
            let (epoch, nsm_state) = (service.epoch(), service.nsm_state().0);
            let (last_epoch, last_state, last_grant) = self.checks.last[s];
            let grants = table.last_grant() - last_grant;
            let fell = epoch < last_epoch || epoch > last_epoch && nsm_state <= last_state;
            let is_same = table.waiting_count() == 0 && self.checks.waiting[s].is_empty();
            let waiting = if is_same { Vec::new() } else { waiting(table) };
            self.checks.last[s] = (epoch, nsm_state, table.last_grant());
            let before = std::mem::replace(&mut self.checks.waiting[s], waiting);
            if fell {
                self.broken(Broken::Fell, || {
                    format!("service {s}: {last_epoch}, {last_state} to {epoch}, {nsm_state}")
                });
            }
            let waiting = &self.checks.waiting[s];
            let stands_twice = waiting.windows(2).any(|pair| pair[0] == pair[1]);
            let gone = before.iter().filter(|request| !waiting.contains(request));
            if gone.count() < grants as usize || stands_twice {
                self.broken(Broken::WaitsTwice, || {
                    format!("service {s}: {grants} grants, of requests that waited: {before:?}")
                });
            }
        }
    }

    /// A node has applied a batch, or taken a snapshot.
    pub(crate) fn check_state(&mut self, n: usize) {
        let node = &self.nodes[n];
        let index = node.raft.applied;
        if let Some(state) = self.checks.states.get(&index) {
            if *state != node.state {
                self.broken(Broken::StatesDiffer, || {
                    format!("n{n} and another node differ after entry {index}")
                });
            }
            return;
        }
        self.checks.states.insert(index, node.state.clone());
        if self.checks.states.len() > STATES_KEPT {
            self.checks.states.pop_first();
        }
        if index == self.checks.applied.len() as u64 {
            self.check_table(n);
        }
    }

    /// The table of the node that is furthest has all that any owner was told to have.
    fn check_table(&mut self, n: usize) {
        let mut lost = None;
        for (h, host) in self.hosts.iter().enumerate() {
            for (o, owner) in host.owners.iter().enumerate() {
                let cells = owner.counts_on();
                if cells.iter().all(Option::is_none) {
                    continue;
                }
                let state = &self.nodes[n].state;
                let id = state.service_named(SERVICES[owner.service]);
                let Some(service) = id.and_then(|id| state.service(id)) else {
                    continue;
                };
                for (cell, exclusive) in cells.iter().enumerate() {
                    let Some(exclusive) = *exclusive else {
                        continue;
                    };
                    let first = cell as u64 * 10;
                    let has = service.table().held_entries().any(|entry| {
                        let lock = &entry.lock;
                        lock.host.caller_name == name(h)
                            && lock.owner.svid == svid(host.life, o)
                            && *lock.file == file_key(owner.file)
                            && lock.range.start() <= first
                            && lock.range.last() >= first + 9
                            && (lock.exclusive || !exclusive)
                    });
                    if !has {
                        lost = Some((h, o, cell));
                    }
                }
            }
        }
        if let Some((h, o, cell)) = lost {
            self.broken(Broken::LockLost, || {
                format!("h{h}.{o} was told to have cell {cell}, and the table of n{n} lacks it")
            });
        }
    }

    /// An owner has taken a lock: nobody else may have it.
    pub(crate) fn check_held(&mut self, h: usize, o: usize) {
        let own = &self.hosts[h].owners[o];
        let cells = own.counts_on();
        let mut other = None;
        for (at, host) in self.hosts.iter().enumerate() {
            for (no, owner) in host.owners.iter().enumerate() {
                let same_file = (owner.service, owner.file) == (own.service, own.file);
                if (at, no) == (h, o) || !same_file {
                    continue;
                }
                let theirs = owner.counts_on();
                let both = cells.iter().zip(&theirs);
                let conflict = |(one, other): (&Option<bool>, &Option<bool>)| matches!((one, other), (Some(one), Some(other)) if *one || *other);
                if both.into_iter().any(conflict) {
                    other = Some((at, no));
                }
            }
        }
        if let Some((at, no)) = other {
            self.broken(Broken::TwoHold, || {
                format!("h{h}.{o} and h{at}.{no} were told to have the same cells")
            });
        }
        let furthest = (0..self.nodes.len())
            .find(|n| self.nodes[*n].raft.applied == self.checks.applied.len() as u64);
        if let Some(n) = furthest.filter(|n| self.nodes[*n].is_up) {
            self.check_table(n);
        }
    }

    /// What keeps the run from its good end, if something does.
    pub(crate) fn unfinished(&self) -> Option<String> {
        if let Some(change) = self.changes.front() {
            return Some(format!("{change:?} is not done"));
        }
        if let Some(h) = self.hosts.iter().position(|host| !host.is_quiet()) {
            return Some(format!(
                "h{h} still has something or waits: {:?}",
                self.hosts[h]
            ));
        }
        for (s, name) in SERVICES.iter().enumerate().take(self.plan.services) {
            let n = self.who_serves(s)?;
            let state = &self.nodes[n].state;
            let service = state.service(state.service_named(name)?)?;
            let table = service.table();
            if table.lock_count() + table.waiting_count() + table.grant_count() > 0 {
                let held: Vec<_> = table.held_entries().map(|entry| entry.lock).collect();
                return Some(format!("service {s} has locks of nobody: {held:?}"));
            }
            if service.active().map(|active| active.node) != Some(node_id(n)) {
                return Some(format!(
                    "n{n} serves service {s}, and is not its active node"
                ));
            }
        }
        None
    }
}

fn waiting(table: &LockTable) -> Vec<Request> {
    let entries = table.waiting_entries();
    let mut waiting: Vec<Request> = entries
        .map(|entry| {
            (
                entry.host.caller_name.to_vec(),
                entry.owner.svid,
                entry.file.0.to_vec(),
                entry.range.start(),
                entry.range.last(),
                entry.exclusive,
            )
        })
        .collect();
    waiting.sort_unstable();
    waiting
}

/// The names of services.
pub(crate) const SERVICES: [&str; 2] = ["s0", "s1"];
/// States that are kept for comparison with nodes that are behind.
const STATES_KEPT: usize = 400;
const _: () = assert!(
    CELLS < 10,
    "a cell is ten bytes, and a file's range is small"
);
