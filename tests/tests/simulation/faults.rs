//! What goes wrong in a run, and when; and how it comes right in the end.

use havenfs::cluster::{ClusterCommand, Command, Queue, ServiceCommand, ServiceId, Wish};

use crate::calls::address;
use crate::checks::SERVICES;
use crate::clock::MS;
use crate::members::Change;
use crate::node::node_id;
use crate::pending::Then;
use crate::plan::{Calamity, FIRST, NODES, Theme};
use crate::raft::Role;
use crate::world::{Event, World};

/// Something goes wrong, or comes right.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    Start(usize),
    Crash(usize),
    Stop(usize),
    Resume(usize),
    /// A node is cut off; from the hosts too, or from hosts alone.
    CutOff(usize),
    /// One way between two nodes is cut.
    OneWay(usize, usize),
    /// Writes of its log take long.
    SlowLog(usize),
    /// A node neither applies nor renews anything, while its log goes on.
    Stuck(usize),
    /// The exported storage does not answer a node.
    StorageHangs(usize),
    /// The same, for good.
    StorageHangsForGood(usize),
    /// A node can't open services.
    OpenFails(usize),
    /// An operator moves a service.
    Move(usize, usize),
    /// An operator wants nobody to serve a service, for a while.
    Withdraw(usize, usize),
    RebootHost(usize),
    FreeAll(usize),
    MoveHost(usize),
    /// A node's disk is lost, and it is started with an empty one.
    Wipe(usize),
}

impl World {
    /// Draws all faults of the run.
    pub(crate) fn plan_faults(&mut self) {
        for _ in 0..self.plan.faults {
            let fault = self.draw_fault();
            let at = self.between(self.plan.quiet_until, self.plan.faults_until);
            self.after(at, Event::Fault(fault));
        }
        let (until, n) = (self.plan.faults_until, self.below(2) as usize);
        let at = self.between(1000 * MS, until);
        if self.plan.calamity == Some(Calamity::StorageHangs) {
            self.after(at, Event::Fault(Fault::StorageHangsForGood(n)));
        }
        if self.plan.calamity == Some(Calamity::DiskLost) {
            let n = self.below(FIRST as u64) as usize;
            self.after(at, Event::Fault(Fault::Wipe(n)));
        }
    }

    fn draw_fault(&mut self) -> Fault {
        let themed_by_members = self.plan.theme == Theme::Members;
        let nodes = if themed_by_members { NODES } else { FIRST };
        let n = self.below(nodes as u64) as usize;
        let (data, s) = (self.below(2) as usize, self.below(2) as usize);
        let s = s.min(self.plan.services - 1);
        let h = self.below(self.plan.hosts as u64) as usize;
        let is_themed = self.percent(70);
        match self.plan.theme {
            Theme::Moves if is_themed => Fault::Move(s, data),
            Theme::Crashes if is_themed => Fault::Crash(n),
            Theme::Pauses if is_themed => Fault::Stop(n),
            Theme::Partitions | Theme::Behind if is_themed => Fault::CutOff(n),
            Theme::Disks if is_themed => match self.below(3) {
                0 => Fault::StorageHangs(data),
                _ => Fault::SlowLog(n),
            },
            Theme::Members if is_themed => match self.below(4) {
                0 => Fault::Crash(n),
                1 => Fault::Stop(n),
                2 => Fault::CutOff(n),
                _ => Fault::Stuck(n),
            },
            Theme::Hosts if is_themed => match self.below(4) {
                0 => Fault::FreeAll(h),
                1 => Fault::MoveHost(h),
                _ => Fault::RebootHost(h),
            },
            _ => match self.below(16) {
                0..2 => Fault::Crash(n),
                2..4 => Fault::Stop(n),
                4..6 => Fault::CutOff(n),
                6 => Fault::OneWay(n, data),
                7 => Fault::SlowLog(n),
                8 => Fault::StorageHangs(data),
                9 => Fault::OpenFails(data),
                10..12 => Fault::Move(s, data),
                12 => Fault::RebootHost(h),
                13 => Fault::Withdraw(s, data),
                14 => Fault::Stuck(n),
                _ => Fault::MoveHost(h),
            },
        }
    }

    /// Mostly about as long as a lease, since that is where it matters; now and then for an instant
    /// or long.
    fn fault_time(&mut self) -> u64 {
        let ms = match self.below(4) {
            0 => self.between(5, 200),
            1 => self.between(2500, 4000),
            _ => self.between(200, 2500),
        };
        ms * MS
    }

    pub(crate) fn fault(&mut self, fault: Fault) {
        if let Fault::Start(n) = fault {
            return self.start_node(n);
        }
        if let Fault::Resume(n) = fault {
            return self.resume_node(n);
        }
        if self.settles {
            return;
        }
        self.say(|_| format!("fault: {fault:?}"));
        let time = self.fault_time();
        let until = self.now + time;
        match fault {
            Fault::Start(_) | Fault::Resume(_) => {}
            Fault::Crash(n) => {
                self.crash_node(n);
                self.after(time, Event::Fault(Fault::Start(n)));
            }
            Fault::Stop(n) => {
                self.nodes[n].is_stopped = self.nodes[n].is_up;
                self.count("stops");
                if self.percent(25) && self.may_jump(n) {
                    let by = self.below(3000) * MS;
                    self.nodes[n].clock.jump(by);
                    self.count("clocks that jumped");
                }
                self.after(time, Event::Fault(Fault::Resume(n)));
            }
            Fault::CutOff(n) => {
                let from_nodes = !self.percent(15);
                for to in (0..NODES).filter(|to| from_nodes && *to != n) {
                    self.network.cut(n, to, until);
                    self.network.cut(to, n, until);
                }
                if !from_nodes || self.percent(40) {
                    self.network.cut_from_hosts(n, until);
                }
            }
            Fault::OneWay(from, to) => self.network.cut(from, to, until),
            Fault::Stuck(n) => self.nodes[n].stuck_until = until,
            Fault::SlowLog(n) => self.nodes[n].log_slow_until = until,
            Fault::StorageHangs(n) => {
                let hangs = &mut self.nodes[n].storage_hangs_until;
                *hangs = until.max(*hangs);
            }
            Fault::StorageHangsForGood(n) => self.nodes[n].storage_hangs_until = FOR_GOOD,
            Fault::OpenFails(n) => self.nodes[n].open_fails_until = until,
            Fault::Move(s, to) => self.ask_to_move(s, to),
            Fault::Withdraw(s, to) => {
                self.operator_asks(s, |service| ClusterCommand::Withdraw { service });
                self.after(time, Event::Fault(Fault::Move(s, to)));
            }
            Fault::RebootHost(h) => self.reboot_host(h),
            Fault::FreeAll(h) => self.free_all(h),
            Fault::MoveHost(h) => self.move_host(h),
            Fault::Wipe(n) => {
                self.crash_node(n);
                self.count("disks lost");
                self.lose_disk(n);
                self.after(time, Event::Fault(Fault::Start(n)));
                if self.plan.is_replaced {
                    self.changes = [Change::Remove(n), Change::Add(FIRST)].into();
                    self.after(time, Event::Operate);
                }
            }
        }
    }

    /// A clock that jumps ahead ends this node's own lease early, which is harmless; it would end
    /// its wait for another's early too. So it may jump only while nobody else has anything, as far
    /// as any log says.
    fn may_jump(&self, n: usize) -> bool {
        let of_others = |state: &havenfs::cluster::ClusterState| {
            let mut services = state.services();
            services.any(|(_, service)| {
                service
                    .active()
                    .is_none_or(|active| active.node != node_id(n))
            })
        };
        let may_change = |node: &crate::node::Node| node.raft.applied != node.raft.last();
        let mut up = self.nodes.iter().filter(|node| node.is_up);
        !up.any(|node| of_others(&node.state) || may_change(node))
    }

    fn ask_to_move(&mut self, s: usize, to: usize) {
        let to = node_id(to);
        self.operator_asks(s, |service| ClusterCommand::Move { service, to });
    }

    /// An operator asks any node that lives for something.
    fn operator_asks(&mut self, s: usize, command: impl FnOnce(ServiceId) -> ClusterCommand) {
        let lives = |n: &usize| {
            let node = &self.nodes[*n];
            let is_member = node.raft.members.1.all().has(*n);
            node.is_up && !node.is_stopped && is_member
        };
        let Some(n) = (0..NODES).find(lives) else {
            return;
        };
        if let Some(service) = self.nodes[n].state.service_named(SERVICES[s]) {
            let command = Command::Cluster(command(service));
            self.propose(n, Queue::Calls, command, Then::Nothing);
        }
    }

    /// A service that is withdrawn when faults stop is wanted again.
    pub(crate) fn want_again(&mut self, s: usize) {
        let of = |node: &crate::node::Node| {
            let id = node.state.service_named(SERVICES[s])?;
            Some(node.state.service(id)?.wish())
        };
        let leads = |n: &usize| self.nodes[*n].raft.role == Role::Leader && self.nodes[*n].is_up;
        let Some(n) = (0..NODES).find(leads) else {
            return;
        };
        if of(&self.nodes[n]) == Some(Wish::Nobody) {
            self.ask_to_move(s, n);
        }
    }

    /// Faults stop, all nodes but the lost ones run, and hosts give back what they have.
    pub(crate) fn settle(&mut self) {
        self.settles = true;
        self.network.heal();
        self.plan.loss_percent = 0;
        let dead = self.below(2) as usize;
        let stays_dead = self.plan.calamity == Some(Calamity::StaysDead);
        for n in 0..NODES {
            let node = &mut self.nodes[n];
            node.log_slow_until = 0;
            node.stuck_until = 0;
            node.open_fails_until = 0;
            if node.storage_hangs_until < FOR_GOOD {
                node.storage_hangs_until = 0;
            }
            if stays_dead && n == dead {
                self.crash_node(n);
                self.say(|_| format!("n{n} stays dead"));
                continue;
            }
            self.start_node(n);
            self.resume_node(n);
        }
        self.settle_hosts();
    }

    /// An operator breaks the locks of addresses that hosts no longer have, once their owners have
    /// nothing any more.
    pub(crate) fn break_what_nobody_knows(&mut self) {
        for h in 0..self.hosts.len() {
            if !self.hosts[h].is_quiet() && !self.hosts[h].waits_only() {
                continue;
            }
            for old in self.hosts[h].old_addresses.clone() {
                for s in 0..self.plan.services {
                    self.break_locks(s, old);
                }
            }
        }
    }

    fn break_locks(&mut self, s: usize, old: u8) {
        let Some(n) = self.who_serves(s) else { return };
        let Some(state) = self.service_state(n, s) else {
            return;
        };
        let address = address(old);
        let mut hosts = state.table().host_entries();
        let epoch = state.epoch();
        if !hosts.any(|host| host.host.address == address && host.held + host.waiting > 0) {
            return;
        }
        drop(hosts);
        let now = self.unix_seconds();
        let file = None;
        let command = ServiceCommand::Break {
            epoch,
            address,
            file,
            now,
        };
        if let Some(id) = self.nodes[n].keepers[s].id {
            let command = Command::Service(id, command);
            self.propose(n, Queue::Calls, command, Then::Nothing);
        }
    }
}

const FOR_GOOD: u64 = u64::MAX / 2;
