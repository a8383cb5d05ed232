//! What happens to whole hosts: reboots, with their notices; FREE_ALL; new addresses.

use crate::calls::Asks;
use crate::clock::MS;
use crate::hosts::{CELLS, Doing, HostEvent, Owner};
use crate::world::World;

impl World {
    /// A host reboots: it has nothing any more, and says so when it is up again.
    pub(crate) fn reboot_host(&mut self, h: usize) {
        let host = &mut self.hosts[h];
        host.life += 1;
        host.is_up = false;
        host.calls.clear();
        for owner in &mut host.owners {
            owner.cells = [None; CELLS];
            owner.doing = Doing::Rests;
        }
        self.count("host reboots");
        self.say(|_| format!("h{h} reboots"));
        let after = self.between(200, 1500) * MS;
        self.host_after(h, after, HostEvent::Up);
    }

    pub(crate) fn host_up(&mut self, h: usize) {
        let host = &mut self.hosts[h];
        host.is_up = true;
        host.state += 2;
        let state = host.state;
        let mut services: Vec<usize> = host.owners.iter().map(|owner| owner.service).collect();
        services.dedup();
        for s in services {
            if let Some(o) = self.hosts[h]
                .owners
                .iter()
                .position(|owner| owner.service == s)
            {
                self.begin_call(h, o, Asks::Notify(state));
            }
        }
        self.begin_host(h);
    }

    /// A host gives back all that it has, in one call to each service.
    pub(crate) fn free_all(&mut self, h: usize) {
        let host = &mut self.hosts[h];
        let rests = |owner: &Owner| owner.doing == Doing::Rests;
        if !host.is_up || !host.calls.is_empty() || !host.owners.iter().all(rests) {
            return;
        }
        let mut told = Vec::new();
        for o in 0..self.hosts[h].owners.len() {
            let owner = &mut self.hosts[h].owners[o];
            owner.cells = [None; CELLS];
            owner.changes += 1;
            owner.doing = Doing::Calls;
            if !told.contains(&owner.service) {
                told.push(owner.service);
                self.begin_call(h, o, Asks::FreeAll);
            }
        }
    }

    pub(crate) fn freed_all(&mut self, h: usize, s: usize) {
        for o in 0..self.hosts[h].owners.len() {
            let owner = &self.hosts[h].owners[o];
            if owner.service == s && owner.doing == Doing::Calls {
                self.rest(h, o);
            }
        }
    }

    /// A host has another address from now on, and its locks are another host's.
    pub(crate) fn move_host(&mut self, h: usize) {
        let host = &mut self.hosts[h];
        let rests = |owner: &Owner| owner.doing == Doing::Rests;
        if host.is_up && host.calls.is_empty() && host.owners.iter().all(rests) {
            host.old_addresses.push(host.address);
            host.address += 20;
            self.count("hosts with a new address");
            self.say(|_| format!("h{h} has a new address"));
        }
    }
}
