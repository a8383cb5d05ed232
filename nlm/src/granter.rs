//! Telling hosts what they were granted while they waited: when to send GRANTED, and what its
//! answer means.
//!
//! ```text
//!            Deliver                       Answered: GRANTED
//!   known ------------> under way -------+--------------------> Confirm
//!     ^                     |            | Answered: DENIED
//!     |   again, later      | no answer  +--------------------> Refuse, released only if that was
//!     +---------------------+                                   the one telling there ever was
//! ```
//!
//! Local and rebuilt from the table: whoever serves in an epoch tells all grants that are in it. A
//! lock whose telling may have arrived is never released for want of an answer: the telling is
//! repeated after 1, 2, 4 and 8 s and then every 10 s until the owner acts. What may be released is
//! decided by counting what was sent:
//!
//! - DENIED to a grant of this epoch that was sent once says that the host does not know of it.
//!   After a second sending the answer may be to a copy, and the first one may have been taken.
//! - Where nothing could be sent at all (no port, connection refused) for four tries, the host does
//!   not know of it either.
//!
//! A grant of an earlier epoch was perhaps sent by somebody else, so nothing releases it.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use crate::range_set::GrantId;
use crate::waiting::Delivery;
use crate::wire::Nlm4Stats;

/// How long to wait for an answer before telling again, in milliseconds; then always the last.
const AGAIN_MS: [u64; 5] = [1000, 2000, 4000, 8000, 10_000];
/// A try that was begun and did not end counts as lost.
const TRY_MS_MAX: u64 = 5000;
/// Tries under way to one host: one that does not answer must not keep others waiting.
const PER_HOST_MAX: u32 = 8;
/// How long a grant waits while too many are under way to its host.
const CROWDED_MS: u64 = 50;
/// How long to wait when the host asks for it.
const LATER_MS: u64 = 10_000;
/// How long to wait before what was decided is proposed again.
const DECIDED_AGAIN_MS: u64 = 1000;
/// Every so many tries the host is asked for its port anew.
const TRIES_PER_LOOKUP: u16 = 4;
/// Tries that could not send anything before the grant goes to the next in line.
const TRIES_UNSENT_MAX: u16 = 4;

/// What names one telling of a grant: comes back in the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrantCookie {
    /// The grant.
    pub id: GrantId,
    /// Which telling, from 1; the last number stands for all later ones.
    pub attempt: u16,
    /// What only this activation and the host know: whoever could guess a cookie could refuse a
    /// lock in the host's name.
    pub secret: [u8; 6],
}

impl GrantCookie {
    /// 16 bytes: macOS takes any of 8 bytes for one of its own.
    pub fn encode(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        let (id, rest) = bytes.split_at_mut(8);
        id.copy_from_slice(&self.id.get().to_be_bytes());
        let (attempt, secret) = rest.split_at_mut(2);
        attempt.copy_from_slice(&self.attempt.to_be_bytes());
        secret.copy_from_slice(&self.secret);
        bytes
    }

    /// Reads a cookie; `None` if it is none of ours.
    pub fn decode(cookie: &[u8]) -> Option<Self> {
        let (id, rest) = cookie.split_first_chunk()?;
        let (attempt, secret) = rest.split_first_chunk()?;
        Some(Self {
            id: GrantId::new(u64::from_be_bytes(*id))?,
            attempt: u16::from_be_bytes(*attempt),
            secret: secret.try_into().ok()?,
        })
    }
}

/// What happens to the granter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The table has this grant, and its host is to be told.
    Granted(Delivery),
    /// The table does not have the grant any more: its owner has acted.
    Settled(GrantId),
    /// A try has ended.
    Tried {
        /// Which.
        cookie: GrantCookie,
        /// How.
        tried: Tried,
    },
    /// The host has answered.
    Answered {
        /// What.
        cookie: GrantCookie,
        /// The address that the answer came from.
        from: IpAddr,
        /// How.
        stat: Nlm4Stats,
    },
}

/// How a try to tell a host ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tried {
    /// Something was sent, whatever became of it.
    Sent,
    /// Nothing was sent: no port, or nobody listens there.
    Unsent,
    /// The host does not know GRANTED_MSG and wants GRANTED.
    NoSuchForm,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Tell the host.
    Deliver {
        /// What.
        delivery: Delivery,
        /// With this cookie.
        cookie: GrantCookie,
        /// By a call that is answered by a call, as most hosts expect; else by one with a result.
        by_message: bool,
        /// Whether to ask for the port anew.
        look_up: bool,
    },
    /// Propose that the host has the lock.
    Confirm(GrantId),
    /// Propose that the host does not want the lock.
    Refuse {
        /// Which.
        id: GrantId,
        /// Whether the next in line may have it.
        release: bool,
    },
}

/// One grant that is being told.
#[derive(Debug)]
struct Telling {
    delivery: Delivery,
    /// Whether all tellings that there ever were are ours.
    ours: bool,
    attempts: u16,
    /// How many of them may have left this machine.
    sent: u32,
    by_message: bool,
    under_way: bool,
    /// What follows from the host's answer: proposed again until the table has it, since a store
    /// that is too busy takes no proposals.
    decided: Option<Output>,
    /// When to try (again), or to count the try under way as lost.
    at_ms: u64,
}

/// Tells hosts what they were granted, in one epoch.
#[derive(Debug)]
pub struct Granter {
    epoch: u32,
    secret: [u8; 6],
    tellings: BTreeMap<GrantId, Telling>,
    /// The same by time.
    due: BTreeSet<(u64, GrantId)>,
    /// Tries under way, by host.
    hosts: BTreeMap<IpAddr, u32>,
    outputs: VecDeque<Output>,
}

impl Granter {
    /// Begins in `epoch` with nothing to tell; `secret` is random and for this activation alone.
    pub const fn new(epoch: u32, secret: [u8; 6]) -> Self {
        Self {
            epoch,
            secret,
            tellings: BTreeMap::new(),
            due: BTreeSet::new(),
            hosts: BTreeMap::new(),
            outputs: VecDeque::new(),
        }
    }

    /// The grants that are being told.
    pub fn known(&self) -> impl Iterator<Item = GrantId> {
        self.tellings.keys().copied()
    }

    /// Takes what has happened; `now_ms` never goes back.
    pub fn handle(&mut self, now_ms: u64, input: Input) {
        match input {
            Input::Granted(delivery) => {
                let id = delivery.id;
                if let Entry::Vacant(place) = self.tellings.entry(id) {
                    place.insert(Telling {
                        ours: delivery.epoch == self.epoch,
                        delivery,
                        attempts: 0,
                        sent: 0,
                        by_message: true,
                        under_way: false,
                        decided: None,
                        at_ms: now_ms,
                    });
                    self.due.insert((now_ms, id));
                }
            }
            Input::Settled(id) => self.forget(id),
            Input::Tried { cookie, tried } => self.tried(now_ms, cookie, tried),
            Input::Answered { cookie, from, stat } => self.answered(now_ms, cookie, from, stat),
        }
    }

    /// What to do next, if anything.
    pub fn poll(&mut self, now_ms: u64) -> Option<Output> {
        while self.outputs.is_empty()
            && let Some((at_ms, id)) = self.due.first().copied()
            && at_ms <= now_ms
        {
            self.try_now(now_ms, id);
        }
        self.outputs.pop_front()
    }

    /// When [`Granter::poll`] has something to do by itself.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        self.due.first().map(|(at_ms, _)| *at_ms)
    }

    fn try_now(&mut self, now_ms: u64, id: GrantId) {
        let Some(telling) = self.tellings.get_mut(&id) else {
            return;
        };
        if telling.under_way {
            // It was begun and not heard of since, so it may have been sent.
            telling.sent += 1;
            self.end_try(id);
        }
        let Some(telling) = self.tellings.get_mut(&id) else {
            return;
        };
        if let Some(decided) = telling.decided.clone() {
            self.outputs.push_back(decided);
            self.put_off(id, now_ms + DECIDED_AGAIN_MS);
            return;
        }
        let under_way = self.hosts.entry(telling.delivery.host.address).or_default();
        if *under_way >= PER_HOST_MAX {
            self.put_off(id, now_ms + CROWDED_MS);
            return;
        }
        *under_way += 1;
        telling.under_way = true;
        telling.attempts = telling.attempts.saturating_add(1);
        self.outputs.push_back(Output::Deliver {
            delivery: telling.delivery.clone(),
            cookie: GrantCookie {
                id,
                attempt: telling.attempts,
                secret: self.secret,
            },
            by_message: telling.by_message,
            look_up: telling.attempts > 1 && telling.attempts % TRIES_PER_LOOKUP == 1,
        });
        self.put_off(id, now_ms + TRY_MS_MAX);
    }

    /// The telling that a cookie names.
    fn telling(&mut self, cookie: GrantCookie) -> Option<&mut Telling> {
        let own = cookie.secret == self.secret;
        let telling = self.tellings.get_mut(&cookie.id).filter(|_| own)?;
        let open = telling.decided.is_none() && cookie.attempt <= telling.attempts;
        open.then_some(telling)
    }

    fn tried(&mut self, now_ms: u64, cookie: GrantCookie, tried: Tried) {
        let Some(telling) = self.telling(cookie) else {
            return;
        };
        if !telling.under_way || telling.attempts != cookie.attempt {
            return;
        }
        let again = AGAIN_MS.get(telling.attempts as usize - 1);
        let mut at_ms = now_ms + again.or(AGAIN_MS.last()).copied().unwrap_or(0);
        match tried {
            Tried::Sent => telling.sent += 1,
            Tried::Unsent => {}
            Tried::NoSuchForm => {
                telling.by_message = false;
                at_ms = now_ms;
            }
        }
        let give_up = telling.ours && telling.sent == 0 && telling.attempts >= TRIES_UNSENT_MAX;
        self.end_try(cookie.id);
        if give_up {
            self.refuse(now_ms, cookie.id, true);
        } else {
            self.put_off(cookie.id, at_ms);
        }
    }

    fn answered(&mut self, now_ms: u64, cookie: GrantCookie, from: IpAddr, stat: Nlm4Stats) {
        let Some(telling) = self.telling(cookie) else {
            return;
        };
        if telling.delivery.host.address != from {
            return;
        }
        match stat {
            Nlm4Stats::Granted => self.decide(now_ms, cookie.id, Output::Confirm(cookie.id)),
            Nlm4Stats::Denied => {
                // The answer may overtake the end of the try that it answers.
                let sent = telling.sent + u32::from(telling.under_way);
                let release = telling.ours && sent <= 1;
                self.refuse(now_ms, cookie.id, release);
            }
            // The host recovers itself, or knows no better: later.
            _ => {
                let at_ms = telling.at_ms.max(now_ms + LATER_MS);
                self.put_off(cookie.id, at_ms);
            }
        }
    }

    fn refuse(&mut self, now_ms: u64, id: GrantId, release: bool) {
        self.decide(now_ms, id, Output::Refuse { id, release });
    }

    /// The answer is known; the telling ends when the table has it.
    fn decide(&mut self, now_ms: u64, id: GrantId, decided: Output) {
        self.end_try(id);
        if let Some(telling) = self.tellings.get_mut(&id) {
            telling.decided = Some(decided.clone());
            self.outputs.push_back(decided);
            self.put_off(id, now_ms + DECIDED_AGAIN_MS);
        }
    }

    fn forget(&mut self, id: GrantId) {
        self.end_try(id);
        if let Some(telling) = self.tellings.remove(&id) {
            self.due.remove(&(telling.at_ms, id));
        }
    }

    fn put_off(&mut self, id: GrantId, at_ms: u64) {
        if let Some(telling) = self.tellings.get_mut(&id) {
            self.due.remove(&(telling.at_ms, id));
            telling.at_ms = at_ms;
            self.due.insert((at_ms, id));
        }
    }

    /// Makes room for another try to the host, if one of this grant was under way.
    fn end_try(&mut self, id: GrantId) {
        let Some(telling) = self.tellings.get_mut(&id) else {
            return;
        };
        if !std::mem::take(&mut telling.under_way) {
            return;
        }
        let host = telling.delivery.host.address;
        if let Some(count) = self.hosts.get_mut(&host) {
            *count -= 1;
            if *count == 0 {
                self.hosts.remove(&host);
            }
        }
    }
}

#[cfg(test)]
mod tests;
