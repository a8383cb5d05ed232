//! Between nodes, and between them and hosts: messages are late, overtake each other and get lost;
//! nodes are cut off. And who has a service's address, and which storage refuses whom.

use crate::plan::NODES;
use crate::world::World;

/// What lies between the machines.
#[derive(Debug)]
pub(crate) struct Network {
    /// Until when nothing gets from one node to another, by true time.
    cut: [[u64; NODES]; NODES],
    /// The same between a node and all hosts.
    cut_from_hosts: [u64; NODES],
    /// Who has each service's address: whoever announced it last.
    pub(crate) address: Vec<Option<usize>>,
    /// Below this epoch each service's storage refuses the changes of each node, if there is a
    /// fence.
    pub(crate) fenced_below: Vec<[u32; NODES]>,
}

impl Network {
    pub(crate) fn new(services: usize) -> Self {
        Self {
            cut: [[0; NODES]; NODES],
            cut_from_hosts: [0; NODES],
            address: vec![None; services],
            fenced_below: vec![[0; NODES]; services],
        }
    }

    /// Cuts one way between two nodes.
    pub(crate) const fn cut(&mut self, from: usize, to: usize, until: u64) {
        self.cut[from][to] = until;
    }

    /// Cuts a node off from the hosts.
    pub(crate) const fn cut_from_hosts(&mut self, n: usize, until: u64) {
        self.cut_from_hosts[n] = until;
    }

    /// All is well again.
    pub(crate) const fn heal(&mut self) {
        self.cut = [[0; NODES]; NODES];
        self.cut_from_hosts = [0; NODES];
    }
}

impl World {
    /// How long a message takes from one node to another; none if it gets lost.
    pub(crate) fn way(&mut self, from: usize, to: usize) -> Option<u64> {
        if self.now < self.network.cut[from][to] {
            return None;
        }
        let loss = self.plan.loss_percent;
        if self.percent(loss) {
            return None;
        }
        Some(50_000 + self.short_time())
    }

    /// The same between a node and a host.
    pub(crate) fn way_to_host(&mut self, n: usize) -> Option<u64> {
        if self.now < self.network.cut_from_hosts[n] || self.percent(3) {
            return None;
        }
        Some(100_000 + self.short_time())
    }
}
