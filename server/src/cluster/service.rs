//! The replicated state of one service: its epoch, NSM state number, active node and lock table,
//! and [`ServiceState::apply`], the only function that changes what its hosts have.
//!
//! Every promise about locks rests on three things: a command is in the log, synced, before it is
//! applied; `apply` is total and deterministic, so that every node and every restart makes the
//! same state of the same log; and whatever a peer is told is an outcome of `apply`. So the answer
//! to "what if the node dies here?" is the same everywhere: before the sync nobody was told, and
//! after it the next assignment finds the change in the log.
//!
//! [`ServiceState::assign`] begins an epoch: a start, a restart, a takeover and a planned move are
//! this one change, of which `state` decides whether it is valid. What was accepted under an
//! earlier epoch changes nothing any more.
//!
//! ```text
//!                    assign                    release
//!   released ---------------------> active ----------------> released
//!   (nobody serves)  epoch + 1      (node n)  the node stopped
//!                    <------------------+      before it asked
//!                      assign, when the
//!                      lease of n is over
//! ```
//!
//! The table is *complete* if it has every lock that a host was ever told to have. Then an
//! assignment leaves all locks in force and nobody waits: a reclaim of a lock that is there changes
//! nothing, and a new lock that conflicts with none is granted. Only where the table may lack
//! locks, because the operator says that a state directory was lost or is old, is there the classic
//! grace: until it ends only reclaims are granted, and what was not reclaimed is gone then.
//!
//! A node that has the storage open, and loses the service without having released it, is
//! *unfenced*: it may still write. Whether anything but a fence keeps it from that is
//! configuration, which is not replicated and may differ between nodes for a while, and all nodes
//! must make the same of the log. So the log is told: a node whose storage needs a fence says so in
//! its epoch ([`ServiceCommand::NeedsFence`]), before it touches the storage. From then on it stays
//! on a list, across later assignments and whoever dies meanwhile, until a fence is known to have
//! succeeded ([`ServiceCommand::Fenced`]) or it releases the service itself; a release by another
//! node says nothing about it. While it has the service it need not be fenced.
//!
//! What a node is on the list for is therefore what it said itself: a node without a fence is
//! never on it, and can't take others off it, so that a configuration may change from one to the
//! other node by node. Those who fence do so for all that had the storage with a fence, and for
//! nobody who was lost long ago without one. But a node that has no fence yet waits for none.

mod handed;
pub mod running;
mod stored;

use std::net::IpAddr;
use std::sync::Arc;

use havenfs_nlm::keys::Stamp;
use havenfs_nlm::table::LockTable;
use havenfs_nsm::inbound;
use havenfs_nsm::nsm_state::NsmState;
use imbl::{OrdMap, OrdSet};
use serde::{Deserialize, Serialize};

use super::NodeId;
use super::command::{Activation, LockAction, LockCall, Outcome, ServiceCommand};
use super::connections::{self, Connection};
use super::definition::{Defined, Definition, Definitions, InForce};
use super::handles::HandleEntry;
use super::mounts::{self, Mount};
use super::replies::Handed;
use super::wish::{Placed, Wish};
use running::Runs;

/// Whether the table has every lock that a host was ever told to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Completeness {
    /// It has.
    Complete {
        /// Since this epoch.
        since_epoch: u32,
    },
    /// It may not: only reclaims are granted until grace ends.
    Incomplete {
        /// Since this epoch.
        since_epoch: u32,
    },
}

impl Default for Completeness {
    /// Before the first start nobody was told anything.
    fn default() -> Self {
        Self::Complete { since_epoch: 1 }
    }
}

/// The replicated state of a service. Cloning is cheap: all large parts are shared until they
/// change.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ServiceState {
    service: Service,
    /// Who may write to its storage, where a fence is needed: it has said so, and has neither
    /// released the service nor was it fenced since. In that order, each once.
    writers: Vec<NodeId>,
    table: LockTable,
    handles: OrdMap<u64, HandleEntry>,
    connections: OrdSet<Connection>,
    definitions: Definitions,
    mounts: OrdSet<Mount>,
    /// Whose storage does not work, as each says of itself.
    failing: Vec<NodeId>,
    /// What the last active node had answered.
    handed: Handed,
    placed: Placed,
    /// With which addresses the nodes run, as each says of itself.
    running: Vec<Runs>,
}

/// Who serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Active {
    /// The node.
    pub node: NodeId,
    /// Which life of its process.
    pub incarnation: u64,
}

/// What is known of a service besides its locks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Service {
    name: Box<str>,
    /// How often it was assigned; 0 if never.
    epoch: u32,
    /// The number that hosts see in notices.
    nsm_state: NsmState,
    /// Who serves; none if it was released, or never assigned.
    active: Option<Active>,
    /// Where it is wanted.
    wish: Wish,
    /// Whether locks may be missing.
    completeness: Completeness,
}

impl ServiceState {
    /// Carries out one command: total, deterministic, never waits.
    pub fn apply(&mut self, command: &ServiceCommand) -> Outcome {
        if command
            .epoch()
            .is_some_and(|epoch| epoch != self.service.epoch)
        {
            return Outcome::EarlierEpoch;
        }
        match command {
            ServiceCommand::Activate(activation) => self.activate(activation),
            ServiceCommand::SetHandle { id, entry, .. } => {
                let Some(entry) = entry else {
                    self.handles.remove(id);
                    return Outcome::Done;
                };
                if self.handles.len() >= HANDLES_MAX && !self.handles.contains_key(id) {
                    return Outcome::TooManyHandles;
                }
                self.handles.insert(*id, entry.clone());
                Outcome::Done
            }
            ServiceCommand::Call(call) => self.call(call),
            ServiceCommand::ConfirmGrant { grant, .. } => {
                self.table.confirm(*grant);
                Outcome::Done
            }
            ServiceCommand::RefuseGrant {
                grant,
                release,
                now,
                ..
            } => {
                self.table.refuse(*grant, *release, self.stamp(*now));
                Outcome::Done
            }
            ServiceCommand::Rebooted(notice) => {
                let meant = |names: &[&[u8]]| meant(&notice.mon_name, names);
                let (address, stamp) = (notice.address, self.stamp(notice.now));
                Outcome::Freed(self.table.rebooted(address, notice.state, meant, stamp))
            }
            ServiceCommand::DoubtfulNotice(notice) => {
                let meant = |names: &[&[u8]]| meant(&notice.mon_name, names);
                let (address, stamp) = (notice.address, self.stamp(notice.now));
                Outcome::Suspected(self.table.doubt(address, notice.state, meant, stamp))
            }
            ServiceCommand::FreeAll {
                address,
                name,
                call,
                now,
                ..
            } => {
                let stamp = self.stamp(*now);
                Outcome::Freed(self.table.free_all(*address, name, *call, stamp))
            }
            ServiceCommand::Break {
                address, file, now, ..
            } => {
                let stamp = self.stamp(*now);
                Outcome::Freed(self.table.break_locks(*address, file.as_ref(), stamp))
            }
            ServiceCommand::Expire { address, now, .. } => {
                let stamp = self.stamp(*now);
                Outcome::Freed(self.table.expire(*address, stamp))
            }
            ServiceCommand::EndGrace { now, .. } => self.end_grace(*now),
            ServiceCommand::SetLimits { limits, .. } => {
                self.table.set_limits(*limits);
                Outcome::Done
            }
            ServiceCommand::RefuseWrites {
                address,
                file,
                refused: true,
                ..
            } => {
                if self.table.refuse_writes(*address, file.clone()) {
                    Outcome::Refusals(1)
                } else {
                    Outcome::TooManyRefusals
                }
            }
            ServiceCommand::RefuseWrites { address, file, .. } => {
                Outcome::Refusals(self.table.allow_writes(*address, file.as_ref()))
            }
            ServiceCommand::RaiseNsmState { unix_seconds, .. } => {
                let service = &mut self.service;
                service.nsm_state = NsmState::next(service.nsm_state, *unix_seconds);
                Outcome::Done
            }
            ServiceCommand::Connections { came, went, .. } => {
                connections::change(&mut self.connections, came, went);
                Outcome::Done
            }
            ServiceCommand::Fenced { nodes, .. } => {
                let active = self.service.active.map(|active| active.node);
                self.writers
                    .retain(|node| !nodes.contains(node) || Some(*node) == active);
                Outcome::Done
            }
            ServiceCommand::Replies {
                epoch,
                replies,
                unix_seconds,
            } => {
                self.handed.add(*epoch, *unix_seconds, replies);
                Outcome::Done
            }
            ServiceCommand::NeedsFence { .. } => {
                // If it was released meanwhile, nothing of it is open.
                if let Some(active) = self.service.active
                    && !self.writers.contains(&active.node)
                {
                    self.writers.push(active.node);
                }
                Outcome::Done
            }
            ServiceCommand::SetReclaims { lenient, .. } => {
                self.table.set_lenient(*lenient);
                Outcome::Done
            }
            ServiceCommand::Mounts { came, went, .. } => {
                mounts::change(&mut self.mounts, came, went);
                Outcome::Done
            }
            ServiceCommand::InForce { in_force, .. } => {
                self.definitions.note(in_force);
                Outcome::Done
            }
        }
    }

    /// A service with a name, which nobody serves yet.
    pub(super) fn named(name: &str) -> Self {
        let mut state = Self::default();
        state.service.name = name.into();
        state
    }

    /// Begins an epoch. All locks and waiting requests stay as they are, also across a crash at
    /// this very place: the next assignment begins another one. The connections stay as well: they
    /// are over, and whom they were with is to be woken.
    pub(super) fn assign(&mut self, active: Active, unix_seconds: u64, recover: bool) -> Outcome {
        let service = &mut self.service;
        // Only who released it was asked for its replies after its last call.
        let is_released = service.active.is_none();
        self.handed.begin(service.epoch, is_released, unix_seconds);
        service.epoch = service.epoch.saturating_add(1);
        service.nsm_state = NsmState::next(service.nsm_state, unix_seconds);
        service.active = Some(active);
        service.wish = service.wish.after_assignment();
        self.placed.assigned_to(active.node);
        // What was reclaimed in an earlier part of the same grace stays so.
        if recover && matches!(service.completeness, Completeness::Complete { .. }) {
            service.completeness = Completeness::Incomplete {
                since_epoch: service.epoch,
            };
        }
        Outcome::Assigned(service.epoch)
    }

    /// Ends what the active node has stopped already. From anybody else, or late, it does nothing.
    pub(super) fn release(&mut self, epoch: u32, active: Active) -> Outcome {
        let service = &mut self.service;
        if service.epoch != epoch || service.active != Some(active) {
            return Outcome::EarlierEpoch;
        }
        service.active = None;
        self.writers.retain(|node| *node != active.node);
        Outcome::Done
    }

    /// Defines it anew.
    pub(super) fn define(&mut self, expected_version: u64, new: &Definition) -> Outcome {
        let defined = self.definitions.define(expected_version, new);
        defined.map_or_else(Outcome::NotDefined, Outcome::Defined)
    }

    /// Notes where an operator wants it.
    pub(super) fn want(&mut self, node: NodeId) -> Outcome {
        self.service.wish = Wish::On(node);
        self.placed = Placed(Some(node));
        Outcome::Done
    }

    /// Notes that nobody is to serve it.
    pub(super) fn withdraw(&mut self) -> Outcome {
        self.service.wish = Wish::Nobody;
        self.placed = Placed(None);
        Outcome::Done
    }

    /// Notes that it is to go back to the node that it prefers.
    pub(super) fn go_back(&mut self, epoch: u32, to: NodeId) -> Outcome {
        let service = &mut self.service;
        if service.epoch != epoch || service.wish != Wish::Anywhere || self.placed.0.is_some() {
            return Outcome::EarlierEpoch;
        }
        service.wish = Wish::On(to);
        Outcome::Done
    }

    /// Other nodes are lost for good and can't write to the storage. `is_incomplete`: with them may
    /// be what hosts were told, so that the next assignment begins with grace.
    pub(super) fn survive(&mut self, lost: &[NodeId], is_incomplete: bool) {
        let service = &mut self.service;
        if service
            .active
            .is_some_and(|active| lost.contains(&active.node))
        {
            service.active = None;
        }
        if matches!(service.wish, Wish::On(node) if lost.contains(&node)) {
            service.wish = Wish::Anywhere;
        }
        self.writers.retain(|node| !lost.contains(node));
        if is_incomplete && matches!(service.completeness, Completeness::Complete { .. }) {
            service.completeness = Completeness::Incomplete {
                since_epoch: service.epoch.saturating_add(1),
            };
        }
    }

    /// Gives it another name.
    pub(super) fn rename(&mut self, name: &str) {
        self.service.name = name.into();
    }

    /// Notes whether the storage of a node works.
    pub(super) fn note_storage(&mut self, node: NodeId, fails: bool) -> Outcome {
        self.failing.retain(|noted| *noted != node);
        if fails {
            self.failing.push(node);
        }
        Outcome::Done
    }

    /// What a log has from the time when there was one node.
    fn activate(&mut self, activation: &Activation) -> Outcome {
        let active = Active {
            node: NodeId::LONE,
            incarnation: activation.incarnation,
        };
        self.assign(active, activation.unix_seconds, activation.recover)
    }

    fn end_grace(&mut self, now: u32) -> Outcome {
        let Completeness::Incomplete { since_epoch } = self.service.completeness else {
            return Outcome::Done;
        };
        self.service.completeness = Completeness::Complete {
            since_epoch: self.service.epoch,
        };
        Outcome::Freed(self.table.lapse(since_epoch, self.stamp(now)))
    }

    fn call(&mut self, call: &LockCall) -> Outcome {
        let (stamp, in_grace) = (self.stamp(call.now), self.in_grace());
        let (host, digest, table) = (&call.host, call.call, &mut self.table);
        match &call.action {
            LockAction::Lock(request) if in_grace && !request.reclaim => Outcome::Grace,
            LockAction::Share(request) if in_grace && !request.reclaim => Outcome::Grace,
            LockAction::Share(request) => Outcome::Lock(table.share(host, digest, request, stamp)),
            LockAction::Unshare { file, oh } => {
                table.unshare(host, digest, file, oh);
                Outcome::Unlocked
            }
            LockAction::Lock(request) => Outcome::Lock(table.lock(host, digest, request, stamp)),
            LockAction::Unlock { file, owner, range } => {
                table.unlock(host, digest, file, owner, *range, stamp);
                Outcome::Unlocked
            }
            LockAction::Cancel {
                file,
                owner,
                range,
                exclusive,
            } => {
                let nothing_left =
                    table.cancel(host, digest, file, owner, *range, *exclusive, stamp);
                Outcome::Cancelled { nothing_left }
            }
        }
    }

    const fn stamp(&self, now: u32) -> Stamp {
        Stamp {
            epoch: self.service.epoch,
            now,
            in_grace: self.in_grace(),
        }
    }

    /// What clients and operators call it.
    pub fn name(&self) -> &str {
        &self.service.name
    }

    /// Who serves; none if it was released, or never assigned.
    pub const fn active(&self) -> Option<Active> {
        self.service.active
    }

    /// Nobody has it any more. Returns whether a fence is owed to its storage: then it is known of
    /// whom, as after a takeover.
    pub(super) fn leave_to_fence(&mut self) -> bool {
        if self.writers.is_empty() {
            return false;
        }
        self.service.active = None;
        true
    }

    /// The nodes that may still write to its storage, since nothing but a fence keeps them from it.
    pub fn unfenced(&self) -> impl Iterator<Item = NodeId> {
        let active = self.service.active.map(|active| active.node);
        let writers = self.writers.iter().copied();
        writers.filter(move |node| Some(*node) != active)
    }

    /// The nodes that have said that their storage of it does not work.
    pub fn failing(&self) -> &[NodeId] {
        &self.failing
    }

    /// Where it is wanted.
    pub const fn wish(&self) -> Wish {
        self.service.wish
    }

    /// The node that an operator has put it on, or wants it on; none if another one had it since.
    pub const fn placed(&self) -> Option<NodeId> {
        self.placed.0
    }

    /// The entries of the handle table, by number; empty where the kernel makes handles.
    pub const fn handles(&self) -> &OrdMap<u64, HandleEntry> {
        &self.handles
    }

    /// The connections that clients have, or had before the service was assigned; some may be
    /// missing or gone. Empty on a server without a cluster.
    pub const fn connections(&self) -> &OrdSet<Connection> {
        &self.connections
    }

    /// What it is; none on a server without a cluster, whose files say it at each start.
    pub const fn defined(&self) -> Option<&Arc<Defined>> {
        self.definitions.defined.as_ref()
    }

    /// How often it was defined.
    pub fn version(&self) -> u64 {
        self.definitions.version()
    }

    /// What the active node has made of its definitions.
    pub const fn in_force(&self) -> &Arc<InForce> {
        &self.definitions.in_force
    }

    /// Who mounted what, as far as it was told. Empty on a server without a cluster.
    pub const fn mounts(&self) -> &OrdSet<Mount> {
        &self.mounts
    }

    /// The count of assignments: what a call must have been accepted under.
    pub const fn epoch(&self) -> u32 {
        self.service.epoch
    }

    /// The service's NSM state number.
    pub const fn nsm_state(&self) -> NsmState {
        self.service.nsm_state
    }

    /// Whether only reclaims are granted.
    pub const fn in_grace(&self) -> bool {
        matches!(self.service.completeness, Completeness::Incomplete { .. })
    }

    /// Whether the table has every lock that a host was ever told to have.
    pub const fn completeness(&self) -> Completeness {
        self.service.completeness
    }

    /// The locks.
    pub const fn table(&self) -> &LockTable {
        &self.table
    }

    /// The names of the hosts behind an address that lose something if a notice of a reboot is
    /// believed.
    pub fn losing(&self, address: IpAddr, mon_name: &[u8], state: i32) -> Vec<Vec<u8>> {
        let meant = |names: &[&[u8]]| meant(mon_name, names);
        self.table.losing(address, state, meant)
    }
}

/// The hosts that a notice means, by their names.
fn meant(mon_name: &[u8], names: &[&[u8]]) -> Vec<Vec<u8>> {
    let meant = inbound::meant(mon_name, names.iter().copied());
    meant.into_iter().map(<[u8]>::to_vec).collect()
}

/// Entries of the handle table: each is some 200 bytes on every node.
const HANDLES_MAX: usize = 1_000_000;

#[cfg(test)]
mod tests;
