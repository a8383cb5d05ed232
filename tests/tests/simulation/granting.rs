//! Tells hosts what they were granted while they waited, as `lock_service::granting` does around
//! the product's `Granter`; and tells them of a takeover.

use std::net::IpAddr;

use havenfs::cluster::{Command, Queue, ServiceCommand};
use havenfs_nlm::granter::{GrantCookie, Input, Output, Tried};
use havenfs_nlm::range_set::GrantId;
use havenfs_nlm::waiting::Delivery;
use havenfs_nlm::wire::Nlm4Stats;

use crate::calls::{Cells, address};
use crate::clock::MS;
use crate::hosts::{HostEvent, Told};
use crate::keeper::Serving;
use crate::node::NodeEvent;
use crate::pending::Then;
use crate::sabotage::Sabotage;
use crate::world::World;

/// What comes back to a granter.
#[derive(Debug)]
pub(crate) enum GrantAnswer {
    Tried(GrantCookie, Tried),
    Answered(GrantCookie, IpAddr, Nlm4Stats),
}

impl World {
    /// The table may have new grants, or lack old ones.
    pub(crate) fn look_for_grants(&mut self, n: usize) {
        for s in 0..self.plan.services {
            let Some(state) = self.service_state(n, s) else {
                continue;
            };
            let (newest, count) = (state.table().last_grant(), state.table().grant_count());
            let Some(serving) = self.serving_mut(n, s) else {
                continue;
            };
            if serving.newest_grant != newest || serving.granter.known().count() != count {
                let after = self.short_time() / 10;
                self.wake_granter(n, s, after);
            }
        }
    }

    fn wake_granter(&mut self, n: usize, s: usize, after: u64) {
        let at = self.now + after;
        let now = self.now;
        let Some(serving) = self.serving_mut(n, s) else {
            return;
        };
        if serving.wakes_at <= now || at < serving.wakes_at {
            serving.wakes_at = at;
            let epoch = serving.gate.epoch;
            self.node_after(n, after, NodeEvent::Grants(s, epoch));
        }
    }

    /// The task of the granter runs.
    pub(crate) fn deliver_grants(&mut self, n: usize, s: usize, epoch: u32) {
        let is_current = |serving: &mut Serving| serving.gate.epoch == epoch;
        if !self.serving_mut(n, s).is_some_and(is_current) {
            return;
        }
        let Some(state) = self.service_state(n, s) else {
            return;
        };
        let serving = self.nodes[n].keepers[s].serving.as_ref();
        let Some(serving) = serving else { return };
        let (granter, table) = (&serving.granter, state.table());
        let settled: Vec<GrantId> = granter.known().filter(|id| !table.has_grant(*id)).collect();
        let new: Vec<Delivery> = table.deliveries(serving.newest_grant).collect();
        let newest = table.last_grant();
        let now_ms = self.granter_ms(n, s);
        let Some(serving) = self.serving_mut(n, s) else {
            return;
        };
        serving.newest_grant = newest;
        for id in settled {
            serving.granter.handle(now_ms, Input::Settled(id));
        }
        for delivery in new {
            serving.granter.handle(now_ms, Input::Granted(delivery));
        }
        while let Some(output) = self
            .serving_mut(n, s)
            .and_then(|serving| serving.granter.poll(now_ms))
        {
            self.grant_output(n, s, epoch, output);
        }
        let next_ms = self
            .serving_mut(n, s)
            .and_then(|serving| serving.granter.next_deadline_ms());
        if let Some(next_ms) = next_ms {
            let after = (next_ms.saturating_sub(now_ms) + 1) * MS;
            if let Some(serving) = self.serving_mut(n, s) {
                serving.wakes_at = u64::MAX;
            }
            self.wake_granter(n, s, after);
        }
    }

    fn granter_ms(&self, n: usize, s: usize) -> u64 {
        let serving = self.nodes[n].keepers[s].serving.as_ref();
        let since = serving.map(|serving| self.local(n).since(serving.since));
        since.unwrap_or_default().as_millis() as u64
    }

    fn grant_output(&mut self, n: usize, s: usize, epoch: u32, output: Output) {
        let command = match output {
            Output::Deliver {
                delivery, cookie, ..
            } => return self.deliver(n, s, &delivery, cookie),
            Output::Confirm(grant) => ServiceCommand::ConfirmGrant { epoch, grant },
            Output::Refuse { id, release } => {
                self.count("grants refused");
                let release = release || self.sabotage == Some(Sabotage::ReleaseOnRefusal);
                self.say(|_| format!("n{n} s{s}: grant {id} is refused, released: {release}"));
                ServiceCommand::RefuseGrant {
                    epoch,
                    grant: id,
                    release,
                    now: self.unix_seconds(),
                }
            }
        };
        if let Some(id) = self.nodes[n].keepers[s].id {
            let command = Command::Service(id, command);
            self.propose(n, Queue::Calls, command, Then::Nothing);
        }
    }

    /// Tells a host once. The look at the gate and the sending are one step: a host that gets
    /// GRANTED late can't tell it from one for a later request, so a message is on its way for less
    /// than the pause that hosts make before they ask for the same again.
    fn deliver(&mut self, n: usize, s: usize, delivery: &Delivery, cookie: GrantCookie) {
        let now = self.local(n);
        let gate_open = self
            .serving_mut(n, s)
            .is_some_and(|serving| serving.gate.is_open(now));
        let mut tried = Tried::Sent;
        if gate_open {
            let hosts = self.hosts.iter();
            let to = hosts
                .enumerate()
                .find(|(_, host)| address(host.address) == delivery.host.address)
                .filter(|(_, host)| host.is_up)
                .map(|(h, _)| h);
            if let Some(h) = to {
                let callback = &delivery.callback;
                let told = Told {
                    service: s,
                    host_life: delivery.owner.svid as u64 / 100,
                    owner: delivery.owner.svid as usize % 100,
                    cells: Cells::of(callback.l_offset, callback.l_len),
                    exclusive: delivery.exclusive,
                    cookie,
                };
                self.say(|_| format!("n{n} s{s}: tells h{h} of grant {} in {told:?}", cookie.id));
                if !self.percent(15)
                    && let Some(after) = self.way_to_host(n)
                {
                    self.host_after(h, after, HostEvent::Granted(told));
                }
            } else {
                tried = Tried::Unsent;
            }
        }
        let after = self.short_time();
        let answer = GrantAnswer::Tried(cookie, tried);
        self.node_after(n, after, NodeEvent::GrantAnswered(s, answer));
    }

    pub(crate) fn grant_answered(&mut self, n: usize, s: usize, answer: GrantAnswer) {
        let input = match answer {
            GrantAnswer::Tried(cookie, tried) => Input::Tried { cookie, tried },
            GrantAnswer::Answered(cookie, from, stat) => {
                let state = self.service_state(n, s);
                if !state.is_some_and(|state| state.table().has_grant_to(cookie.id, from)) {
                    return;
                }
                Input::Answered { cookie, from, stat }
            }
        };
        let now_ms = self.granter_ms(n, s);
        if let Some(serving) = self.serving_mut(n, s) {
            serving.granter.handle(now_ms, input);
            self.wake_granter(n, s, 0);
        }
    }

    /// Tells the hosts of a takeover; most notices arrive, and nothing depends on it.
    pub(crate) fn notify_hosts(&mut self, n: usize, s: usize) {
        for h in 0..self.hosts.len() {
            if self.percent(60)
                && let Some(after) = self.way_to_host(n)
            {
                self.host_after(h, after, HostEvent::Notified(s));
            }
        }
    }
}
