//! The replicated state of the whole cluster, and [`ClusterState::apply`], the only function that
//! changes it: total, deterministic, without clock or I/O.
//!
//! It decides who serves. Three rules make sure that at most one node does at a time, without ever
//! comparing the clocks of two machines:
//!
//! 1. *A node serves only while a renewal of its lease holds*: at its place in the log the service
//!    is assigned to that very life of the node (this is what [`Outcome::Renewed`] lists), and the
//!    node's own clock, read before it proposed that renewal, plus the lease has not passed.
//! 2. *Who takes a service over waits* lease plus margin by its own clock since it first saw the
//!    last renewal of the active node, and says in its [`Assign`] which one that was. The
//!    assignment is void if a later one is in the log before it. So when it is valid, every renewal
//!    that rule 1 may count was proposed before the wait began, and is over.
//! 3. *A released service* was stopped by its node before it proposed the release, in that epoch
//!    for good, whatever becomes of the proposal. So its assignment need not wait. A release that
//!    comes late, when the epoch has moved on, does nothing.
//!
//! An assignment is itself a renewal of its node's lease. What if a node dies, or its clock stands
//! still? Rule 1 reads its own clock and asks nobody; rule 2 reads the clock of a node that lives.
//!
//! Entries may be in the log twice, since proposals are sent again when a leader is lost. The
//! second one is recognised by its [`Origin`] and does nothing.

mod addresses;
mod forgetting;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::command::{
    Assign, ClusterCommand, Command, Outcome, Release, Renewal, RenewalId, StorageNote,
};
use super::members::{MemberCommand, Members};
use super::numbers::{Allot, Numbers};
use super::rows::{damaged, read_row, write_end, write_row};
use super::service::running::RunningNote;
use super::service::{Active, ServiceState};
use super::{NodeId, Origin, Queue, ServiceId, Wish};

/// The replicated state. Cloning is cheap: all large parts are shared until they change.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ClusterState {
    nodes: BTreeMap<NodeId, NodeState>,
    services: BTreeMap<ServiceId, ServiceState>,
    numbers: Arc<Numbers>,
    members: Members,
    /// The highest id of a service that was forgotten.
    last_forgotten: ServiceId,
}

/// What is known of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct NodeState {
    /// The latest life of its process that has entries in the log.
    incarnation: u64,
    /// How far its queues are applied.
    applied: [u64; Queue::ALL.len()],
    /// The last renewal of its lease.
    renewal: Option<Renewal>,
}

impl ClusterState {
    /// Carries out one command. None: it is a copy of one that was carried out, or comes from an
    /// earlier life of its node, and did nothing.
    pub fn apply(&mut self, origin: &Origin, command: &Command) -> Option<Outcome> {
        if !self.is_next(origin) {
            return None;
        }
        Some(match command {
            Command::Service(id, command) => match self.services.get_mut(id) {
                Some(service) => service.apply(command),
                None => Outcome::NoSuchService,
            },
            Command::Cluster(command) => self.apply_to_cluster(command),
        })
    }

    /// Whether a command is neither a copy nor from an earlier life; notes it then.
    fn is_next(&mut self, origin: &Origin) -> bool {
        if origin.number == 0 {
            // From the time when there was one node, which proposed nothing twice. Its service was
            // there from the beginning.
            let lone = || ServiceState::named(LONE_NAME);
            self.services.entry(ServiceId::FIRST).or_insert_with(lone);
            return true;
        }
        let node = self.nodes.entry(origin.node).or_default();
        if origin.incarnation < node.incarnation {
            return false;
        }
        if origin.incarnation > node.incarnation {
            node.incarnation = origin.incarnation;
            node.applied = Default::default();
        }
        let applied = &mut node.applied[origin.queue.place()];
        // One that comes without those before it does nothing either: all are sent again then.
        let is_next = origin.number == *applied + 1;
        if is_next {
            *applied = origin.number;
        }
        is_next
    }

    fn apply_to_cluster(&mut self, command: &ClusterCommand) -> Outcome {
        match command {
            ClusterCommand::Renew(renewal) => self.renew(renewal),
            ClusterCommand::Assign(assign) => self.assign(assign),
            ClusterCommand::Release(Release {
                service,
                epoch,
                node,
                incarnation,
            }) => {
                let active = Active {
                    node: *node,
                    incarnation: *incarnation,
                };
                let service = self.services.get_mut(service);
                service.map_or(Outcome::NoSuchService, |service| {
                    service.release(*epoch, active)
                })
            }
            ClusterCommand::Move { service, to } => {
                let service = self.services.get_mut(service);
                service.map_or(Outcome::NoSuchService, |service| service.want(*to))
            }
            ClusterCommand::NoteStorage(StorageNote {
                service,
                node,
                fails,
            }) => {
                let service = self.services.get_mut(service);
                service.map_or(Outcome::NoSuchService, |service| {
                    service.note_storage(*node, *fails)
                })
            }
            ClusterCommand::Withdraw { service } => {
                let service = self.services.get_mut(service);
                service.map_or(Outcome::NoSuchService, ServiceState::withdraw)
            }
            ClusterCommand::GoBack { service, epoch, to } => {
                let service = self.services.get_mut(service);
                service.map_or(Outcome::NoSuchService, |service| {
                    service.go_back(*epoch, *to)
                })
            }
            ClusterCommand::Name { name } => Outcome::Named(self.name(name)),
            ClusterCommand::Allot(Allot::FileSystem { service, epoch, .. })
                if self
                    .services
                    .get(service)
                    .is_none_or(|service| service.epoch() != *epoch) =>
            {
                Outcome::EarlierEpoch
            }
            ClusterCommand::Allot(asked) => {
                Arc::make_mut(&mut self.numbers).allot(asked);
                Outcome::Done
            }
            ClusterCommand::Define {
                service,
                expected_version,
                definition,
            } => self.define(*service, *expected_version, definition),
            ClusterCommand::Members(command) => self.change_members(command),
            ClusterCommand::Forget { service, after } => self.forget(*service, *after),
            ClusterCommand::NoteRunning(RunningNote { service, runs }) => {
                let service = self.services.get_mut(service);
                service.map_or(Outcome::NoSuchService, |service| service.note_running(runs))
            }
        }
    }

    fn change_members(&mut self, command: &MemberCommand) -> Outcome {
        match command {
            MemberCommand::Retire { node } => {
                let serves = |service: &ServiceState| {
                    let active = service.active();
                    active.is_some_and(|active| active.node == *node)
                };
                let mut services = self.services.iter();
                if let Some((id, _)) = services.find(|(_, service)| serves(service)) {
                    return Outcome::StillServes(*id);
                }
                let awaits = |service: &ServiceState| service.unfenced().any(|one| one == *node);
                let mut services = self.services.iter();
                if let Some((id, _)) = services.find(|(_, service)| awaits(service)) {
                    return Outcome::AwaitsFence(*id);
                }
                self.members.retire(*node);
            }
            MemberCommand::SoleSurvivor {
                lost,
                is_incomplete,
            } => {
                for service in self.services.values_mut() {
                    service.survive(lost, *is_incomplete);
                }
                for node in lost {
                    self.members.retire(*node);
                }
                if *is_incomplete {
                    self.members.force();
                }
            }
            MemberCommand::Begin {
                renamed,
                handle_keys,
            } => {
                if let Some((from, to)) = renamed
                    && self.service_named(to).is_none()
                    && let Some(id) = self.service_named(from)
                    && let Some(service) = self.services.get_mut(&id)
                {
                    service.rename(to);
                }
                self.members.add_keys(handle_keys);
            }
        }
        Outcome::Done
    }

    /// Rule 1: what a renewal is worth is decided by its place in the log.
    fn renew(&mut self, renewal: &Renewal) -> Outcome {
        self.note(renewal);
        let active = renewal.active();
        let services = self.services.iter();
        let of_node = services.filter(|(_, service)| service.active() == Some(active));
        Outcome::Renewed(
            of_node
                .map(|(id, service)| (*id, service.epoch()))
                .collect(),
        )
    }

    /// Rules 2 and 3.
    fn assign(&mut self, assign: &Assign) -> Outcome {
        let Some(service) = self.services.get(&assign.service) else {
            return Outcome::NoSuchService;
        };
        let node = assign.renewal.node;
        if service.epoch() != assign.expected_epoch || self.members.is_retired(node) {
            return Outcome::NotAssigned;
        }
        let may = match service.active() {
            None => service.wish() != Wish::Nobody,
            // Its own earlier life is over, since the state directory has one process; and who
            // takes what it has already has stopped.
            Some(active) if active.node == assign.renewal.node => true,
            // Who has it already takes it to let it go.
            _ if service.wish() == Wish::Nobody => false,
            Some(active) => self.last_renewal(active.node).map(Renewal::id) == assign.after,
        };
        if !may {
            return Outcome::NotAssigned;
        }
        self.note(&assign.renewal);
        let service = self.services.get_mut(&assign.service);
        service.map_or(Outcome::NoSuchService, |service| {
            let active = assign.renewal.active();
            service.assign(active, assign.unix_seconds, assign.recover)
        })
    }

    fn note(&mut self, renewal: &Renewal) {
        self.nodes.entry(renewal.node).or_default().renewal = Some(renewal.clone());
    }

    fn name(&mut self, name: &str) -> ServiceId {
        if let Some(id) = self.service_named(name) {
            return id;
        }
        let id = self.next_id();
        let mut service = ServiceState::named(name);
        if self.members.is_forced() {
            // What is not known may have been known to those who are lost.
            service.survive(&[], true);
        }
        self.services.insert(id, service);
        id
    }

    /// A service, if it has been named.
    pub fn service(&self, id: ServiceId) -> Option<&ServiceState> {
        self.services.get(&id)
    }

    /// A service by its name.
    pub fn service_named(&self, name: &str) -> Option<ServiceId> {
        let mut services = self.services.iter();
        services.find_map(|(id, service)| (service.name() == name).then_some(*id))
    }

    /// All services.
    pub fn services(&self) -> impl Iterator<Item = (ServiceId, &ServiceState)> {
        self.services.iter().map(|(id, service)| (*id, service))
    }

    /// The highest number of a node that has proposed something.
    pub fn last_node(&self) -> Option<NodeId> {
        self.nodes.keys().next_back().copied()
    }

    /// The last renewal of a node's lease.
    pub fn last_renewal(&self, node: NodeId) -> Option<&Renewal> {
        self.nodes.get(&node)?.renewal.as_ref()
    }

    /// The last renewals of all nodes.
    pub fn renewals(&self) -> impl Iterator<Item = &Renewal> {
        self.nodes.values().filter_map(|node| node.renewal.as_ref())
    }

    /// How far the proposals of a life of a node are applied.
    pub fn applied(&self, node: NodeId, incarnation: u64, queue: Queue) -> u64 {
        let node = self.nodes.get(&node);
        let node = node.filter(|node| node.incarnation == incarnation);
        node.map_or(0, |node| node.applied[queue.place()])
    }

    /// The numbers of exports and file systems.
    pub fn numbers(&self) -> &Numbers {
        &self.numbers
    }

    /// What is known of members beyond who they are.
    pub const fn members(&self) -> &Members {
        &self.members
    }

    /// Writes the whole state as [`ClusterState::read`] reads it: a version, the nodes, the
    /// numbers, the members, the last service that was forgotten, and the services, each with its
    /// rows.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(&[VERSION])?;
        let mut buffer = Vec::new();
        for node in &self.nodes {
            write_row(out, &mut buffer, &node)?;
        }
        write_end(out)?;
        write_row(out, &mut buffer, &*self.numbers)?;
        write_row(out, &mut buffer, &self.members)?;
        write_row(out, &mut buffer, &self.last_forgotten)?;
        for (id, service) in &self.services {
            write_row(out, &mut buffer, id)?;
            service.write(out)?;
        }
        write_end(out)
    }

    /// Reads a state.
    ///
    /// # Errors
    /// `InvalidData` if it is not what was written, `Unsupported` if a newer program wrote it.
    pub fn read(input: &mut impl Read) -> io::Result<Self> {
        let mut version = [0];
        input.read_exact(&mut version)?;
        match version {
            [LONE_VERSION] => {
                let service = ServiceState::read_lone(input, LONE_NAME)?;
                Ok(Self {
                    services: BTreeMap::from([(ServiceId::FIRST, service)]),
                    ..Self::default()
                })
            }
            [version @ EARLIER_VERSION..=VERSION] => Self::read_current(input, version),
            [version] => {
                let kind = if version > VERSION {
                    io::ErrorKind::Unsupported
                } else {
                    io::ErrorKind::InvalidData
                };
                let text = format!("state version {version}, and this program knows {VERSION}");
                Err(io::Error::new(kind, text))
            }
        }
    }

    fn read_current(input: &mut impl Read, version: u8) -> io::Result<Self> {
        let mut buffer = Vec::new();
        let mut state = Self::default();
        while let Some((id, node)) = read_row(input, &mut buffer)? {
            state.nodes.insert(id, node);
        }
        state.numbers = Arc::new(read_row(input, &mut buffer)?.ok_or_else(damaged)?);
        if version >= DEFINED_VERSION {
            state.members = read_row(input, &mut buffer)?.ok_or_else(damaged)?;
            state.last_forgotten = read_row(input, &mut buffer)?.ok_or_else(damaged)?;
        }
        while let Some(id) = read_row(input, &mut buffer)? {
            let service = ServiceState::read(input, version)?;
            state.services.insert(id, service);
        }
        Ok(state)
    }
}

impl Renewal {
    /// Who it is from, as a service names it.
    pub const fn active(&self) -> Active {
        Active {
            node: self.node,
            incarnation: self.incarnation,
        }
    }

    /// What tells it from all others of its node.
    pub const fn id(&self) -> RenewalId {
        RenewalId {
            incarnation: self.incarnation,
            seq: self.seq,
        }
    }
}

/// The name of the one service of a server without a cluster.
pub const LONE_NAME: &str = "default";
/// Version 1 had one service and one node.
const LONE_VERSION: u8 = 1;
/// Version 2 did not know which nodes are to be fenced, nor the connections of clients.
const EARLIER_VERSION: u8 = 2;
/// From here on it does.
pub(super) const WRITERS_VERSION: u8 = 3;
/// From here on members change and services are defined in it; and it knows of mounts, of storage
/// that fails, of replies that are handed over, and where an operator has put a service.
pub(super) const DEFINED_VERSION: u8 = 4;
pub(super) const VERSION: u8 = 4;

#[cfg(test)]
mod tests;
