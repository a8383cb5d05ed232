//! Calls of hosts at a node: accepted under an epoch while the gate is open, perhaps kept waiting
//! by a disk, carried out, answered; with a look at the gate before the effect and before the
//! answer.
//!
//! What changes locks is a proposal; TEST and a reclaim of what the table has are answered from the
//! applied state; a WRITE has its effect on a storage that both nodes reach, at a moment of true
//! time that the promises speak about.

use std::net::IpAddr;
use std::rc::Rc;

use havenfs::cluster::command::{LockAction, LockCall, Notice};
use havenfs::cluster::{Command, Outcome, Queue, ServiceCommand, ServiceState};
use havenfs_nlm::host::{CallDigest, HostKey};
use havenfs_nlm::keys::{FileKey, LockOwner};
use havenfs_nlm::range::ByteRange;
use havenfs_nlm::table::{LockOutcome, LockRequest};
use havenfs_nlm::waiting::Callback;
use havenfs_nlm::wire_v3::NlmVersion;

use crate::clock::MS;
use crate::gates::Gate;
use crate::hosts::HostEvent;
use crate::keeper::Serving;
use crate::node::NodeEvent;
use crate::pending::Then;
use crate::sabotage::Sabotage;
use crate::world::{Event, World};

/// Some cells of a file, of ten bytes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cells {
    pub(crate) first: u8,
    pub(crate) last: u8,
}

impl Cells {
    pub(crate) fn range(self) -> ByteRange {
        let (first, last) = (u64::from(self.first), u64::from(self.last));
        ByteRange::new(first * 10, last * 10 + 9).unwrap_or(ByteRange::ALL)
    }

    /// The cells of what GRANTED names.
    pub(crate) const fn of(l_offset: u64, l_len: u64) -> Self {
        Self {
            first: (l_offset / 10) as u8,
            last: ((l_offset + l_len - 1) / 10) as u8,
        }
    }

    pub(crate) fn each(self) -> impl Iterator<Item = usize> {
        usize::from(self.first)..=usize::from(self.last)
    }
}

/// What a call asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asks {
    Lock {
        cells: Cells,
        exclusive: bool,
        block: bool,
        reclaim: bool,
    },
    Unlock(Cells),
    Cancel {
        cells: Cells,
        exclusive: bool,
    },
    Test {
        cells: Cells,
        exclusive: bool,
    },
    Write,
    FreeAll,
    /// SM_NOTIFY: the host is in this state now.
    Notify(i32),
}

/// A call, the same however often it is sent.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) id: u64,
    pub(crate) host: usize,
    pub(crate) host_life: u64,
    /// The last byte of the host's address.
    pub(crate) address: u8,
    pub(crate) nsm_state: i32,
    pub(crate) owner: usize,
    /// How often what the owner has had changed when it called.
    pub(crate) changes: u64,
    pub(crate) service: usize,
    pub(crate) file: u8,
    pub(crate) asks: Asks,
}

/// The answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stat {
    Granted,
    Denied,
    Blocked,
    /// Whether nothing is left.
    Cancelled(bool),
    Done,
}

/// A call that a node has accepted.
#[derive(Debug, Clone)]
pub(crate) struct ServedCall {
    pub(crate) call: Rc<Call>,
    pub(crate) gate: Rc<Gate>,
}

/// The address of a host.
pub(crate) fn address(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

/// What a host calls itself.
pub(crate) fn name(host: usize) -> Box<[u8]> {
    format!("c{host}").into_bytes().into()
}

/// What a host calls an owner; the numbers of an earlier life don't come again.
pub(crate) const fn svid(host_life: u64, owner: usize) -> i32 {
    host_life as i32 * 100 + owner as i32
}

/// What locks know a file by.
pub(crate) fn file_key(file: u8) -> FileKey {
    FileKey(Box::new([file; 4]))
}

impl Call {
    fn host_key(&self) -> HostKey {
        HostKey {
            address: address(self.address),
            service_address: IpAddr::from([10, 0, 1, self.service as u8]),
            caller_name: name(self.host),
        }
    }

    fn lock_owner(&self) -> LockOwner {
        LockOwner {
            svid: svid(self.host_life, self.owner),
            oh: name(self.host),
        }
    }

    fn request(&self, cells: Cells, exclusive: bool, block: bool, reclaim: bool) -> LockRequest {
        let range = cells.range();
        let (l_offset, l_len) = range.to_wire();
        let callback = || Callback {
            version: NlmVersion::V4,
            udp: false,
            fh: Box::new([self.file]),
            l_offset,
            l_len,
        };
        LockRequest {
            file: file_key(self.file),
            owner: self.lock_owner(),
            range,
            exclusive,
            callback: block.then(callback),
            nsm_state: self.nsm_state,
            monitored: true,
            reclaim,
        }
    }

    fn action(&self) -> Option<LockAction> {
        let file = file_key(self.file);
        let owner = self.lock_owner();
        Some(match self.asks {
            Asks::Lock {
                cells,
                exclusive,
                block,
                reclaim,
            } => LockAction::Lock(self.request(cells, exclusive, block, reclaim)),
            Asks::Unlock(cells) => LockAction::Unlock {
                file,
                owner,
                range: cells.range(),
            },
            Asks::Cancel { cells, exclusive } => LockAction::Cancel {
                file,
                owner,
                range: cells.range(),
                exclusive,
            },
            _ => return None,
        })
    }
}

impl World {
    pub(crate) fn serving_mut(&mut self, n: usize, s: usize) -> Option<&mut Serving> {
        self.nodes[n].keepers.get_mut(s)?.serving.as_mut()
    }

    pub(crate) fn service_state(&self, n: usize, s: usize) -> Option<&ServiceState> {
        let node = &self.nodes[n];
        node.state.service(node.keepers.get(s)?.id?)
    }

    /// A call arrives.
    pub(crate) fn call(&mut self, n: usize, call: &Rc<Call>) {
        let now = self.local(n);
        let s = call.service;
        let Some(serving) = self.serving_mut(n, s) else {
            return;
        };
        if !serving.speaks || !serving.gate.is_open(now) {
            return;
        }
        let served = ServedCall {
            call: Rc::clone(call),
            gate: Rc::clone(&serving.gate),
        };
        match call.asks {
            Asks::Test { .. } => self.answer_from_state(n, &served, Stat::Done),
            Asks::Write => {
                let waits = self.storage_time(n);
                self.node_after(n, waits, NodeEvent::Work(served));
            }
            Asks::Lock {
                cells,
                exclusive,
                reclaim: true,
                ..
            } if self.has_recorded(n, call, cells, exclusive) => {
                self.answer_from_state(n, &served, Stat::Granted);
            }
            _ => {
                // Calls of a host are proposed in the order in which they came; a LOCK may have to
                // wait for its file.
                let waits = if matches!(call.asks, Asks::Lock { .. }) {
                    self.storage_time(n)
                } else {
                    0
                };
                let at = self.now + waits;
                let Some(serving) = self.serving_mut(n, s) else {
                    return;
                };
                let lane = serving.lanes.entry(call.host).or_default();
                *lane = at.max(*lane);
                let after = *lane - self.now;
                self.node_after(n, after, NodeEvent::Submit(served));
            }
        }
    }

    /// A copy of a call that lay somewhere comes late.
    pub(crate) fn late_copy(&mut self, call: &Rc<Call>) {
        let is_up = |n: &usize| self.nodes[*n].is_up && !self.nodes[*n].is_stopped;
        let to = self.network.address[call.service].filter(is_up);
        // Connections of a host that rebooted are gone.
        if let Some(n) = to
            && self.hosts[call.host].life == call.host_life
        {
            self.count("late copies");
            self.call(n, call);
        }
    }

    fn storage_time(&mut self, n: usize) -> u64 {
        let hangs = self.nodes[n].storage_hangs_until.saturating_sub(self.now);
        hangs + self.short_time()
    }

    fn has_recorded(&self, n: usize, call: &Call, cells: Cells, exclusive: bool) -> bool {
        let request = call.request(cells, exclusive, false, true);
        let state = self.service_state(n, call.service);
        state.is_some_and(|state| state.table().holding(&call.host_key(), &request).is_some())
    }

    fn answer_from_state(&mut self, n: usize, served: &ServedCall, stat: Stat) {
        let state = self.service_state(n, served.call.service);
        if state.is_some_and(|state| state.epoch() == served.gate.epoch) {
            self.answer(n, served, stat);
        }
    }

    /// A call that changes the state is proposed.
    pub(crate) fn submit(&mut self, n: usize, served: ServedCall) {
        let Some(id) = self.nodes[n].keepers[served.call.service].id else {
            return;
        };
        let (call, epoch) = (&served.call, served.gate.epoch);
        let number = if self.sabotage == Some(Sabotage::NewDigests) {
            self.number()
        } else {
            call.id
        };
        let now = self.unix_seconds();
        let command = match call.asks {
            Asks::Notify(state) => ServiceCommand::Rebooted(Notice {
                epoch,
                address: address(call.address),
                mon_name: name(call.host),
                state,
                now,
            }),
            Asks::FreeAll => ServiceCommand::FreeAll {
                epoch,
                address: address(call.address),
                name: name(call.host),
                call: CallDigest(number),
                now,
            },
            _ => {
                let Some(action) = call.action() else { return };
                ServiceCommand::Call(LockCall {
                    epoch,
                    host: call.host_key(),
                    call: CallDigest(number),
                    now,
                    action,
                })
            }
        };
        let command = Command::Service(id, command);
        self.propose(n, Queue::Calls, command, Then::Answer(served));
    }

    /// What a proposed call came to.
    pub(crate) fn answered(&mut self, n: usize, served: ServedCall, outcome: Option<Outcome>) {
        let stat = match outcome {
            Some(Outcome::Lock(LockOutcome::Granted)) => Stat::Granted,
            Some(Outcome::Lock(LockOutcome::Denied | LockOutcome::Deadlock)) => Stat::Denied,
            Some(Outcome::Lock(LockOutcome::Blocked)) => Stat::Blocked,
            Some(Outcome::Unlocked | Outcome::Freed(_)) => Stat::Done,
            Some(Outcome::Cancelled { nothing_left }) => Stat::Cancelled(nothing_left),
            _ => {
                self.count("calls of an earlier epoch");
                return;
            }
        };
        if self.may_answer(n, &served) {
            self.answer(n, &served, stat);
        } else {
            self.count("answers held back by the gate");
        }
    }

    /// The look at the gate before an answer.
    fn may_answer(&self, n: usize, served: &ServedCall) -> bool {
        self.sabotage == Some(Sabotage::NoGateBeforeReply) || served.gate.is_open(self.local(n))
    }

    fn answer(&mut self, n: usize, served: &ServedCall, stat: Stat) {
        self.check_answer(n, served);
        let call = &served.call;
        if let Some(after) = self.way_to_host(n) {
            let reply = HostEvent::Reply(call.id, stat);
            self.after(after, Event::Host(call.host, call.host_life, reply));
        }
    }

    /// A worker has come to a WRITE: it looks at the gate, and makes the system call.
    pub(crate) fn work(&mut self, n: usize, served: ServedCall) {
        let looks = self.sabotage != Some(Sabotage::NoGateBeforeEffect);
        if looks && !served.gate.is_open(self.local(n)) {
            self.count("effects held back by the gate");
            return;
        }
        if self.plan.fence {
            // The process may be stopped just here, or the kernel be in no hurry.
            let stalls = if self.percent(20) {
                self.below(3000) * MS
            } else {
                0
            };
            let waits = stalls + self.storage_time(n);
            self.node_after(n, waits, NodeEvent::Effect(served));
        } else {
            self.effect(n, served);
        }
    }

    /// The change reaches the storage.
    pub(crate) fn effect(&mut self, n: usize, served: ServedCall) {
        let fenced_below = self.network.fenced_below[served.call.service][n];
        if served.gate.epoch < fenced_below {
            self.count("effects held back by the fence");
            return;
        }
        self.check_effect(n, &served);
        let waits = self.storage_time(n);
        self.node_after(n, waits, NodeEvent::Reply(served));
    }

    pub(crate) fn reply_written(&mut self, n: usize, served: &ServedCall) {
        if self.may_answer(n, served) {
            self.answer(n, served, Stat::Done);
        } else {
            self.count("answers held back by the gate");
        }
    }
}
