//! An address is one service's: in the definitions, and on the interfaces of the nodes, which run
//! with what the definitions were when they started.
//!
//! So a definition is refused if another service has one of its addresses, or is served with it.
//! And a node that would serve with an address that another service has got since must not: by the
//! same address clients of the one would reach the other, which knows nothing of their files and
//! locks. Both are needed. The active node may change after the one is asked, and then the other
//! holds.

use std::net::IpAddr;

use super::{ClusterState, Outcome, ServiceState};
use crate::cluster::definition::{Definition, Undefined};
use crate::cluster::{NodeId, ServiceId};

impl ClusterState {
    /// A definition is new, or follows the one that its proposer knew.
    pub(super) fn define(
        &mut self,
        id: ServiceId,
        expected_version: u64,
        new: &Definition,
    ) -> Outcome {
        if let Some(service) = self.services.get(&id)
            && service.version() == expected_version
            && let Some(problem) = self.in_the_way(id, new)
        {
            return Outcome::NotDefined(problem);
        }
        let service = self.services.get_mut(&id);
        service.map_or(Outcome::NoSuchService, |service| {
            service.define(expected_version, new)
        })
    }

    /// Why a service can't have the addresses of a definition.
    fn in_the_way(&self, id: ServiceId, new: &Definition) -> Option<Undefined> {
        let is_wanted = |ip: IpAddr| new.addresses.iter().any(|wanted| wanted.ip == ip);
        let others = || self.services.iter().filter(|(other, _)| **other != id);
        let taken = others().find_map(|(_, other)| {
            let ip = defined_ips(other).find(|ip| is_wanted(*ip))?;
            let by = other.name().into();
            Some(Undefined::AddressTaken { ip, by })
        });
        taken.or_else(|| {
            others().find_map(|(_, other)| {
                let runs = other.runs_on(other.active()?.node)?;
                let mut ips = runs.addresses.iter().map(|address| address.ip);
                Some(Undefined::AddressInUse {
                    ip: ips.find(|ip| is_wanted(*ip))?,
                    by: other.name().into(),
                    node: runs.node,
                })
            })
        })
    }

    /// The service that has an address by now with which a node would serve another one.
    pub fn clash(&self, id: ServiceId, node: NodeId) -> Option<&ServiceState> {
        let service = self.services.get(&id)?;
        // Definitions have no address in common.
        let stale = service
            .runs_on(node)
            .filter(|_| service.is_stale_on(node))?;
        let mut others = self.services.iter().filter(|(other, _)| **other != id);
        let clashes = |other: &ServiceState| {
            defined_ips(other).any(|ip| stale.addresses.iter().any(|own| own.ip == ip))
        };
        others.find_map(|(_, other)| clashes(other).then_some(other))
    }
}

fn defined_ips(service: &ServiceState) -> impl Iterator<Item = IpAddr> {
    let addresses = service
        .defined()
        .map(|defined| &defined.definition.addresses);
    addresses.into_iter().flatten().map(|address| address.ip)
}
