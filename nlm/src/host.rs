//! Hosts: client machines as NLM knows them, and the calls of theirs that may come again.
//!
//! A host is told apart by the service address that it uses, its own address and its
//! `caller_name`, never by the name alone: names like "localhost" are common, and names are not
//! proved by anything. Clients number their lock owners for each server address anew, which is why
//! the service address is a part.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::keys::{FileKey, LockOwner};
use crate::range::ByteRange;

/// What tells hosts apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HostKey {
    /// The host's own address; IPv4 where IPv6 only wraps it. First, so that the hosts behind an
    /// address stand together.
    pub address: IpAddr,
    /// The address of the service that the host uses, as configured: the same on every node.
    pub service_address: IpAddr,
    /// What the host calls itself.
    pub caller_name: Box<[u8]>,
}

impl std::fmt::Display for HostKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.address, self.caller_name.escape_ascii())
    }
}

/// A digest of everything that a call consists of: procedure, transaction id and arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallDigest(pub u64);

/// The answer to a call that changes locks and is final.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Settled {
    /// NLM4_GRANTED.
    Granted,
    /// NLM4_DENIED.
    Denied,
    /// NLM4_BLOCKED: the answer is looked up when the call is repeated, and nothing begins anew.
    Blocked,
    /// NLM4_DEADLCK.
    Deadlock,
}

/// A lock that ended without its owner's doing: it was broken, or its host did not reclaim it in
/// time. The owner may still believe to have it, and must not get it back by reclaiming it after
/// somebody else had it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tombstone {
    pub(crate) file: FileKey,
    pub(crate) owner: LockOwner,
    pub(crate) range: ByteRange,
}

impl Tombstone {
    /// Whether the lock was an owner's, on a part of a range.
    pub(crate) fn is_on(&self, file: &FileKey, owner: &LockOwner, range: ByteRange) -> bool {
        self.range.overlaps(range) && self.owner == *owner && self.file == *file
    }
}

/// A notice that was not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Doubt {
    /// The state that it told: locks taken under it are of the new life in any case.
    pub(crate) state: i32,
    /// When it came, in seconds since 1970.
    pub(crate) since: u32,
}

/// What is known of a host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostRecord {
    /// The NSM state that its last LOCK told, 0 if none did.
    pub(crate) nsm_state: i32,
    /// How many ranges it holds.
    pub(crate) held: u32,
    /// How many of its requests wait.
    pub(crate) blocked: u32,
    /// Bytes of its name and of its owners' names; follows from the rows of a snapshot.
    #[serde(skip)]
    pub(crate) name_bytes: u32,
    /// When it was last heard of, by the table's count of calls.
    pub(crate) used: u64,
    /// Its last calls, oldest first.
    pub(crate) repeats: Arc<Repeats>,
    /// Whether it wants to hear of our restarts: it took a lock by a call that says so.
    pub(crate) monitored: bool,
    /// The last state numbers that it announced, newest first.
    pub(crate) reboots: [i32; REBOOTS_MAX],
    /// Its locks that ended without its doing, oldest first; forgotten when it reboots.
    pub(crate) tombstones: Arc<VecDeque<Tombstone>>,
    /// Whether there were more of them than are remembered: then nothing that the table does not
    /// have is believed to be its lock, until it reboots. A row of its own in a snapshot.
    #[serde(skip)]
    pub(crate) lost_more: bool,
    /// A notice of a reboot that was not believed.
    pub(crate) doubt: Option<Doubt>,
}

impl HostRecord {
    /// Whether it announced this state number before.
    pub(crate) fn has_announced(&self, state: i32) -> bool {
        state != 0 && self.reboots.contains(&state)
    }

    /// Whether a notice with this state number was not believed.
    pub(crate) fn doubts(&self, state: i32) -> bool {
        self.doubt.is_some_and(|doubt| doubt.state == state)
    }

    /// Notes that it begins a new life: what was remembered of the old one is of no use.
    pub(crate) fn reboot(&mut self, state: i32) {
        // A notice may come after the first calls of the life that it tells of, or as a copy of one
        // that came before the host was known: then those calls may come again too.
        if state == 0 || self.nsm_state != state {
            self.repeats = Arc::default();
        }
        self.tombstones = Arc::default();
        self.lost_more = false;
        self.doubt = None;
        self.reboots.rotate_right(1);
        self.reboots[0] = state;
    }

    /// Forgets what is remembered of lost locks on a range that the owner has been given since.
    pub(crate) fn unbury(&mut self, file: &FileKey, owner: &LockOwner, range: ByteRange) {
        let is_meant = |tombstone: &Tombstone| tombstone.is_on(file, owner, range);
        if !self.tombstones.iter().any(is_meant) {
            return;
        }
        let kept = self.tombstones.iter().flat_map(|tombstone| {
            let parts = if is_meant(tombstone) {
                tombstone.range.without(range)
            } else {
                [Some(tombstone.range), None]
            };
            let part = |range| Tombstone {
                range,
                ..tombstone.clone()
            };
            parts.into_iter().flatten().map(part)
        });
        self.tombstones = Arc::new(kept.collect());
        // What was one may be two now.
        self.forget_oldest(TOMBSTONES_MAX);
    }

    /// Remembers a lock that ended without its owner's doing; the oldest one is forgotten, but not
    /// that there was one.
    pub(crate) fn bury(&mut self, tombstone: Tombstone) {
        self.forget_oldest(TOMBSTONES_MAX - 1);
        Arc::make_mut(&mut self.tombstones).push_back(tombstone);
    }

    /// Leaves so many lost locks.
    fn forget_oldest(&mut self, left: usize) {
        if self.tombstones.len() <= left {
            return;
        }
        let tombstones = Arc::make_mut(&mut self.tombstones);
        tombstones.drain(..tombstones.len() - left);
        self.lost_more = true;
    }

    /// The order in which idle hosts give way: those that have lost locks come last, since they
    /// could reclaim them afterwards.
    pub(crate) fn idle_order(&self) -> IdleOrder {
        (self.lost_more || !self.tombstones.is_empty(), self.used)
    }

    /// Whether nothing would be lost with it but the memory of its calls.
    pub(crate) const fn is_idle(&self) -> bool {
        self.held == 0 && self.blocked == 0
    }
}

/// Whether a host has lost locks, and when it was last heard of.
pub(crate) type IdleOrder = (bool, u64);

/// The last calls of a host and their answers.
///
/// A connection that died may still deliver what it had buffered, after the client has sent the
/// same call again elsewhere and gone on: an UNLOCK would then release the lock that was taken
/// since, and a LOCK would take one that nobody knows of. So a call that is known here gets its
/// first answer again and changes nothing. The memory is part of the replicated state, since the
/// copy may arrive after a takeover, and is cleared when the host reboots.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Repeats {
    calls: VecDeque<CallDigest>,
    /// As many; apart from the calls, since each would take as much room as its call otherwise.
    answers: VecDeque<Settled>,
}

impl Repeats {
    /// The first answer to a call.
    pub(crate) fn answer(&self, call: CallDigest) -> Option<Settled> {
        let at = self.calls.iter().rposition(|known| *known == call)?;
        self.answers.get(at).copied()
    }

    /// Remembers an answer; the oldest one is forgotten.
    pub(crate) fn remember(&mut self, call: CallDigest, settled: Settled) {
        while self.calls.len() >= REPEATS_MAX {
            self.calls.pop_front();
            self.answers.pop_front();
        }
        self.calls.push_back(call);
        self.answers.push_back(settled);
    }
}

/// How many announced state numbers of a host are remembered: it repeats each several times.
const REBOOTS_MAX: usize = 4;
/// How many locks of a host that ended without its doing are remembered.
pub const TOMBSTONES_MAX: usize = 1024;
/// How many calls of a host are remembered: more than a client has under way at a time.
pub const REPEATS_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_call_is_forgotten() {
        let mut repeats = Repeats::default();
        for call in 0..=REPEATS_MAX as u64 {
            repeats.remember(CallDigest(call), Settled::Granted);
        }
        assert_eq!(repeats.answer(CallDigest(0)), None);
        assert_eq!(repeats.answer(CallDigest(1)), Some(Settled::Granted));
        assert_eq!(repeats.calls.len(), REPEATS_MAX);
        assert_eq!(repeats.answers.len(), REPEATS_MAX);
    }
}
