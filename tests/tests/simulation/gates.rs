//! Until when nodes may serve what: gates, which follow from the product's `Lease`, as in `gate`
//! and `serve::leases`.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use havenfs::cluster::ServiceId;
use havenfs::cluster::lease::Moment;

use crate::node::node_id;
use crate::sabotage::Sabotage;
use crate::world::World;

/// Until when a node may serve, in one epoch: as the product's gate.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(crate) epoch: u32,
    until: Cell<Moment>,
    /// Its node needs no lease.
    is_sole: Rc<Cell<bool>>,
    pub(crate) is_over: Cell<bool>,
}

impl Gate {
    pub(crate) const fn new(epoch: u32, is_sole: Rc<Cell<bool>>) -> Self {
        Self {
            epoch,
            until: Cell::new(Moment(0)),
            is_sole,
            is_over: Cell::new(false),
        }
    }

    pub(crate) fn until(&self) -> Moment {
        if self.is_sole.get() {
            return Moment::NEVER;
        }
        self.until.get()
    }

    pub(crate) fn is_open(&self, now: Moment) -> bool {
        !self.is_over.get() && now < self.until()
    }
}

impl World {
    /// A renewal of this life is in the log.
    pub(crate) fn renewed(&mut self, n: usize, seq: u64, services: &[(ServiceId, u32)]) {
        let now = self.local(n);
        let node = &mut self.nodes[n];
        node.lease.renewed(seq, services);
        node.joined.get_or_insert(now);
        for (id, epoch) in services {
            let keepers = &self.nodes[n].keepers;
            if let Some(s) = keepers.iter().position(|keeper| keeper.id == Some(*id)) {
                self.open_gate(n, s, *epoch);
            }
        }
    }

    /// The lease holds until some moment: so long is the gate open.
    pub(crate) fn open_gate(&mut self, n: usize, s: usize, epoch: u32) {
        let now = self.local(n);
        let node = &self.nodes[n];
        let keeper = &node.keepers[s];
        let Some((id, gate)) = keeper.id.zip(keeper.gate.as_ref()) else {
            return;
        };
        let mut until = node.lease.until(id, epoch);
        if self.sabotage == Some(Sabotage::ClockAfterCommit) {
            until = until.map(|_| now + Duration::from_millis(node.lease_ms.into()));
        }
        if let Some(until) = until
            && gate.epoch == epoch
        {
            gate.until.set(gate.until.get().max(until));
        }
        self.check_gates(s);
    }

    /// How many nodes may serve a service now, by their own clocks.
    pub(crate) fn open_gates(&self, s: usize) -> Vec<(usize, u32)> {
        let nodes = self.nodes.iter().enumerate();
        let gates = nodes.filter_map(|(n, node)| {
            let gate = node.keepers.get(s)?.gate.as_ref()?;
            let is_open = node.is_up && gate.is_open(node.clock.read(self.now));
            is_open.then_some((n, gate.epoch))
        });
        gates.collect()
    }

    /// Rule out: renewals of earlier lives count, when the log is read at the start.
    pub(crate) fn count_replayed_renewals(&mut self, n: usize) {
        let now = self.local(n);
        let node = &mut self.nodes[n];
        let mut state = node.state.clone();
        for entry in node.raft.durable() {
            if let Some(proposed) = &entry.proposed {
                state.apply(&proposed.origin, &proposed.command);
            }
        }
        let lease = Duration::from_millis(node.lease_ms.into());
        for s in 0..self.plan.services {
            let id = state.service_named(&format!("s{s}"));
            let service = id.and_then(|id| state.service(id));
            let Some(service) = service else { continue };
            if service
                .active()
                .is_some_and(|active| active.node == node_id(n))
            {
                let gate = Gate::new(service.epoch(), Rc::default());
                gate.until.set(now + lease);
                self.nodes[n].keepers[s].gate = Some(Rc::new(gate));
                self.check_gates(s);
            }
        }
    }
}
