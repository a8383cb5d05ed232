//! Hosts, as Linux clients behave: lock owners that ask, wait, give up and give back; calls that
//! are sent again until they are answered, and whose copies may come at any later time; answers to
//! GRANTED that get lost; reboots; new addresses.
//!
//! Each owner keeps what it was told: that is what no two owners may have at once. A lock counts
//! from the moment at which the host takes it to the moment at which it begins to give it back.
//!
//! One owner has one file. It asks with `block` only for cells of which it has nothing, since after
//! a cancelled change of what it had neither side could say what it has.

use std::collections::BTreeMap;
use std::rc::Rc;

use havenfs_nlm::granter::GrantCookie;
use havenfs_nlm::wire::Nlm4Stats;
use havenfs_tests::lab::random::Random;

use crate::calls::{Asks, Call, Cells, Stat, address};
use crate::checks::Broken;
use crate::clock::MS;
use crate::granting::GrantAnswer;
use crate::node::NodeEvent;
use crate::plan::Plan;
use crate::world::{Event, World};

/// Cells of a file.
pub(crate) const CELLS: usize = 4;

/// GRANTED.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Told {
    pub(crate) service: usize,
    pub(crate) host_life: u64,
    pub(crate) owner: usize,
    pub(crate) cells: Cells,
    pub(crate) exclusive: bool,
    pub(crate) cookie: GrantCookie,
}

/// What happens at a host.
#[derive(Debug)]
pub(crate) enum HostEvent {
    /// It is up again after a reboot.
    Up,
    /// An owner does something.
    Act(usize),
    /// A call that may be unanswered.
    SendAgain(u64),
    Reply(u64, Stat),
    /// An owner has waited for a while: it asks again or gives up.
    Impatient(usize, u64),
    Granted(Told),
    /// A service has a new state.
    Notified(usize),
}

/// What an owner does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doing {
    Rests,
    /// A call of it is under way.
    Calls,
    /// LOCK is under way; whether GRANTED came meanwhile.
    Asks {
        want: Want,
        taken: bool,
    },
    /// It was told to wait: since this number.
    Waits {
        want: Want,
        number: u64,
    },
    Cancels(Want),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Want {
    cells: Cells,
    exclusive: bool,
    block: bool,
}

/// A lock owner.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) service: usize,
    pub(crate) file: u8,
    /// What it was told to have, and whether for itself alone.
    pub(crate) cells: [Option<bool>; CELLS],
    /// Counts changes of that.
    pub(crate) changes: u64,
    pub(crate) doing: Doing,
    /// It does nothing before this moment.
    rests_until: u64,
}

/// A host.
#[derive(Debug)]
pub(crate) struct Host {
    /// Counts reboots.
    pub(crate) life: u64,
    pub(crate) is_up: bool,
    pub(crate) address: u8,
    /// The addresses that it had before.
    pub(crate) old_addresses: Vec<u8>,
    pub(crate) state: i32,
    pub(crate) owners: Vec<Owner>,
    /// Calls that are not answered yet.
    pub(crate) calls: BTreeMap<u64, Rc<Call>>,
}

impl Host {
    pub(crate) fn new(h: usize, plan: &Plan, random: &mut Random) -> Self {
        let owner = |_| {
            let service = random.below(plan.services as u64) as usize;
            Owner {
                service,
                // A file belongs to a service.
                file: (2 * service as u64 + random.below(5) / 4) as u8,
                cells: [None; CELLS],
                changes: 0,
                doing: Doing::Rests,
                rests_until: 0,
            }
        };
        Self {
            life: 1,
            is_up: true,
            address: h as u8 + 1,
            old_addresses: Vec::new(),
            state: 2 * h as i32 + 1,
            owners: (0..plan.owners).map(owner).collect(),
            calls: BTreeMap::new(),
        }
    }

    /// Whether no owner has anything or wants anything.
    pub(crate) fn is_quiet(&self) -> bool {
        let rests = |owner: &Owner| owner.doing == Doing::Rests && owner.has_nothing();
        self.is_up && self.calls.is_empty() && self.owners.iter().all(rests)
    }
}

impl Host {
    /// Whether its owners have nothing, and at most wait for what may be their own lost lock.
    pub(crate) fn waits_only(&self) -> bool {
        self.is_up && self.owners.iter().all(Owner::has_nothing)
    }
}

impl Owner {
    /// What it counts on: while it asks to share what it has for itself alone, no more than that.
    pub(crate) fn counts_on(&self) -> [Option<bool>; CELLS] {
        let mut cells = self.cells;
        if let Doing::Asks { want, .. } = self.doing
            && !want.exclusive
        {
            for cell in want.cells.each() {
                cells[cell] = cells[cell].map(|_| false);
            }
        }
        cells
    }

    fn has_nothing(&self) -> bool {
        self.cells.iter().all(Option::is_none)
    }
}

impl World {
    pub(crate) fn begin_host(&mut self, h: usize) {
        for o in 0..self.hosts[h].owners.len() {
            let after = self.between(500, 2500) * MS;
            self.host_after(h, after, HostEvent::Act(o));
        }
    }

    pub(crate) fn host_event(&mut self, h: usize, event: HostEvent) {
        match event {
            HostEvent::Up => self.host_up(h),
            HostEvent::Act(o) => self.act(h, o),
            HostEvent::SendAgain(id) => {
                if let Some(call) = self.hosts[h].calls.get(&id).cloned() {
                    self.transmit(&call);
                }
            }
            HostEvent::Reply(id, stat) => self.replied(h, id, stat),
            HostEvent::Impatient(o, number) => self.impatient(h, o, number),
            HostEvent::Granted(told) => self.granted(h, told),
            HostEvent::Notified(s) => self.reclaim(h, s),
        }
    }

    fn act(&mut self, h: usize, o: usize) {
        let owner = &self.hosts[h].owners[o];
        let is_idle = owner.doing == Doing::Rests && owner.rests_until <= self.now;
        if !is_idle || !self.hosts[h].is_up {
            return;
        }
        let has_nothing = owner.has_nothing();
        if self.settles {
            if !has_nothing {
                let last = CELLS as u8 - 1;
                self.unlock(h, o, Cells { first: 0, last });
            }
            return;
        }
        let first = self.below(CELLS as u64) as u8;
        let mut last = (first + self.below(2) as u8).min(CELLS as u8 - 1);
        let held = self.hosts[h].owners[o].cells;
        if held[usize::from(first)].is_some() != held[usize::from(last)].is_some() {
            // Half of a change could be refused for the sake of the other half.
            last = first;
        }
        let cells = Cells { first, last };
        let exclusive = self.percent(65);
        let dice = self.below(100);
        if dice < 12 {
            self.hosts[h].owners[o].doing = Doing::Calls;
            self.begin_call(h, o, Asks::Write);
        } else if dice < 18 {
            self.hosts[h].owners[o].doing = Doing::Calls;
            self.begin_call(h, o, Asks::Test { cells, exclusive });
        } else if !has_nothing && dice < 55 {
            self.unlock(h, o, cells);
        } else {
            let has_some = held[usize::from(first)].is_some();
            let block = !has_some && self.percent(75);
            let want = Want {
                cells,
                exclusive,
                block,
            };
            self.ask(h, o, want);
        }
    }

    fn ask(&mut self, h: usize, o: usize, want: Want) {
        let owner = &mut self.hosts[h].owners[o];
        owner.doing = Doing::Asks { want, taken: false };
        owner.changes += 1;
        let Want {
            cells,
            exclusive,
            block,
        } = want;
        let asks = Asks::Lock {
            cells,
            exclusive,
            block,
            reclaim: false,
        };
        self.begin_call(h, o, asks);
    }

    fn unlock(&mut self, h: usize, o: usize, cells: Cells) {
        let owner = &mut self.hosts[h].owners[o];
        owner.changes += 1;
        for cell in cells.each() {
            owner.cells[cell] = None;
        }
        owner.doing = Doing::Calls;
        self.begin_call(h, o, Asks::Unlock(cells));
    }

    pub(crate) fn begin_call(&mut self, h: usize, o: usize, asks: Asks) {
        let id = self.number();
        let host = &mut self.hosts[h];
        let owner = &host.owners[o];
        let call = Rc::new(Call {
            id,
            host: h,
            host_life: host.life,
            address: host.address,
            nsm_state: host.state,
            owner: o,
            changes: owner.changes,
            service: owner.service,
            file: owner.file,
            asks,
        });
        host.calls.insert(id, Rc::clone(&call));
        self.say(|_| format!("h{h}.{o} calls {id}: {asks:?}"));
        self.transmit(&call);
    }

    /// Sends a call once, perhaps with a copy that comes much later; and again, until it is
    /// answered.
    fn transmit(&mut self, call: &Rc<Call>) {
        let to = self.network.address[call.service];
        if let Some(n) = to
            && self.nodes[n].is_up
            && let Some(after) = self.way_to_host(n)
        {
            self.node_after(n, after, NodeEvent::Call(Rc::clone(call)));
        }
        if self.percent(12) {
            let after = self.between(1, 3000) * MS;
            self.after(after, Event::Copy(Rc::clone(call)));
        }
        let again = self.between(200, 900) * MS;
        self.host_after(call.host, again, HostEvent::SendAgain(call.id));
    }

    fn replied(&mut self, h: usize, id: u64, stat: Stat) {
        let Some(call) = self.hosts[h].calls.remove(&id) else {
            return;
        };
        let o = call.owner;
        self.say(|_| format!("h{h}.{o} is answered {id}: {stat:?}"));
        match call.asks {
            Asks::Lock {
                reclaim: true,
                cells,
                ..
            } => return self.reclaimed(h, &call, cells, stat),
            Asks::Notify(_) => return,
            Asks::FreeAll => return self.freed_all(h, call.service),
            _ => {}
        }
        match self.hosts[h].owners[o].doing {
            Doing::Asks { want, taken } => match stat {
                _ if taken => self.rest(h, o),
                Stat::Granted => {
                    self.take_lock(h, o, want);
                    self.rest(h, o);
                }
                Stat::Blocked => {
                    let number = self.number();
                    self.hosts[h].owners[o].doing = Doing::Waits { want, number };
                    let after = self.between(300, 4000) * MS;
                    self.host_after(h, after, HostEvent::Impatient(o, number));
                }
                _ => self.rest(h, o),
            },
            Doing::Cancels(want) if stat == Stat::Cancelled(false) => {
                self.unlock(h, o, want.cells);
            }
            Doing::Calls | Doing::Cancels(_) => self.rest(h, o),
            Doing::Rests | Doing::Waits { .. } => {}
        }
    }

    /// The owner does nothing for a while: longer than a GRANTED may be on its way.
    pub(crate) fn rest(&mut self, h: usize, o: usize) {
        let after = self.between(400, 1600) * MS;
        let owner = &mut self.hosts[h].owners[o];
        owner.doing = Doing::Rests;
        owner.rests_until = self.now + after;
        self.host_after(h, after, HostEvent::Act(o));
    }

    fn impatient(&mut self, h: usize, o: usize, number: u64) {
        let Doing::Waits {
            want,
            number: since,
        } = self.hosts[h].owners[o].doing
        else {
            return;
        };
        if since != number {
            return;
        }
        // In the end who has something gives it back first: two may wait for each other.
        let has_some = !self.hosts[h].owners[o].has_nothing();
        let gives_up = if self.settles {
            has_some
        } else {
            self.percent(40)
        };
        if gives_up {
            let Want {
                cells, exclusive, ..
            } = want;
            self.hosts[h].owners[o].doing = Doing::Cancels(want);
            self.begin_call(h, o, Asks::Cancel { cells, exclusive });
        } else {
            self.ask(h, o, want);
        }
    }

    /// GRANTED: taken if the owner waits for just that, whatever request it was for.
    fn granted(&mut self, h: usize, told: Told) {
        let o = told.owner;
        let host = &mut self.hosts[h];
        let is_of_this_life = told.host_life == host.life;
        let owner = &mut host.owners[o];
        let is_meant = |want: &Want| {
            is_of_this_life
                && want.block
                && want.cells == told.cells
                && want.exclusive == told.exclusive
        };
        let stat = match owner.doing {
            Doing::Asks { want, taken: false } if is_meant(&want) => {
                owner.doing = Doing::Asks { want, taken: true };
                self.take_lock(h, o, want);
                Nlm4Stats::Granted
            }
            Doing::Waits { want, .. } if is_meant(&want) => {
                self.take_lock(h, o, want);
                self.rest(h, o);
                Nlm4Stats::Granted
            }
            _ => Nlm4Stats::Denied,
        };
        self.say(|_| format!("h{h}.{o} says {stat:?} to grant {}", told.cookie.id));
        // GRANTED_RES gets lost often, and then it comes late.
        let to = self.network.address[told.service];
        if let Some(n) = to
            && self.nodes[n].is_up
            && !self.percent(25)
            && let Some(after) = self.way_to_host(n)
        {
            let late = if self.percent(20) {
                self.below(3000) * MS
            } else {
                0
            };
            let from = address(self.hosts[h].address);
            let answer = GrantAnswer::Answered(told.cookie, from, stat);
            let event = NodeEvent::GrantAnswered(told.service, answer);
            self.node_after(n, after + late, event);
        }
    }

    fn take_lock(&mut self, h: usize, o: usize, want: Want) {
        let owner = &mut self.hosts[h].owners[o];
        owner.changes += 1;
        for cell in want.cells.each() {
            owner.cells[cell] = Some(want.exclusive);
        }
        self.say(|_| format!("h{h}.{o} has {want:?}"));
        self.check_held(h, o);
    }

    /// Claims again what was told before the service's restart.
    fn reclaim(&mut self, h: usize, s: usize) {
        if !self.hosts[h].is_up {
            return;
        }
        for o in 0..self.hosts[h].owners.len() {
            let owner = &self.hosts[h].owners[o];
            let held = owner.cells;
            if owner.service != s {
                continue;
            }
            for (cell, exclusive) in held.into_iter().enumerate() {
                let Some(exclusive) = exclusive else { continue };
                let cell = cell as u8;
                let cells = Cells {
                    first: cell,
                    last: cell,
                };
                self.count("reclaims");
                let asks = Asks::Lock {
                    cells,
                    exclusive,
                    block: false,
                    reclaim: true,
                };
                self.begin_call(h, o, asks);
            }
        }
    }

    fn reclaimed(&mut self, h: usize, call: &Call, cells: Cells, stat: Stat) {
        let host = &mut self.hosts[h];
        let is_new_address = !host.old_addresses.is_empty();
        let owner = &mut host.owners[call.owner];
        // If the owner has acted since, or is about to, the answer is about what was before.
        let acts = owner.changes != call.changes || matches!(owner.doing, Doing::Asks { .. });
        if stat != Stat::Denied || acts {
            return;
        }
        for cell in cells.each() {
            if owner.cells[cell].take().is_some() && !is_new_address {
                self.broken(Broken::ReclaimDenied, || {
                    format!("h{h} may not reclaim cell {cell}, which it was told to have")
                });
                return;
            }
        }
    }

    /// Faults have stopped: hosts give back what they have.
    pub(crate) fn settle_hosts(&mut self) {
        for h in 0..self.hosts.len() {
            for o in 0..self.hosts[h].owners.len() {
                let after = self.below(500) * MS;
                self.host_after(h, after, HostEvent::Act(o));
            }
        }
    }
}
