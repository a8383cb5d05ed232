//! The lock table of a service: who holds what, who waits for what.
//!
//! ```text
//!                 LOCK, no conflict
//!      (nothing) ------------------------------------------> held <----------------+
//!          |                                                  | ^                  |
//!          | LOCK with block, conflict                UNLOCK, | | LOCK, UNLOCK of  | GRANTED_RES
//!          v                                        FREE_ALL, | | a part, CANCEL   | says so
//!       blocked --- the conflict goes away -----> granted ----|-+ by the owner     |
//!          |                                      unconfirmed-|------------------- +
//!          | CANCEL, UNLOCK, reboot                   |       v
//!          +---------------------------------------> end <----+ reboot, break
//!                              the first GRANTED was refused, or CANCEL
//! ```
//!
//! Owns hosts, lock owners and files (as numbers, each for as long as something refers to it), the
//! held ranges, what waits ([`waiting`](crate::waiting)) and shares ([`share`](crate::share)).
//! Does not know exports, addresses of our own, grace, time or the wire: a replicated value,
//! changed by one caller (the `apply` of the cluster's state), total and deterministic.
//!
//! Invariants: a lock that was told GRANTED ends only in the ways of the picture; time and lost
//! messages end nothing. A call that is repeated changes nothing ([`Repeats`]). What a host may
//! make us hold is bounded by [`Limits`].
//!
//! Source: XNFS chapter 10 and 14; where it is silent, what Linux's lockd does.
//!
//! [`Repeats`]: crate::host::Repeats

use std::net::IpAddr;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use serde::{Deserialize, Serialize};

use crate::host::{CallDigest, HostKey, HostRecord, IdleOrder, Settled};
use crate::keys::{FileKey, FileNo, HostNo, LockOwner, OwnerKey, OwnerNo, Stamp};
use crate::limits::{Limit, Limits};
use crate::numbered::Numbered;
use crate::range::ByteRange;
use crate::range_set::{GrantId, Held, HeldRange, RangeSet};
use crate::share::Share;
use crate::suspicion::Suspicions;
use crate::waiting::{Blocked, BlockedNo, Callback, Grant};

/// A lock that a host asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockRequest {
    /// The file.
    pub file: FileKey,
    /// Who asks.
    pub owner: LockOwner,
    /// The bytes.
    pub range: ByteRange,
    /// Whether nobody else may have them.
    pub exclusive: bool,
    /// How to tell the host later, if it wants to wait.
    pub callback: Option<Callback>,
    /// The NSM state that the host says it has, 0 if it does not say.
    pub nsm_state: i32,
    /// Whether the host wants to hear of our restarts.
    pub monitored: bool,
    /// Whether the host says that it had the lock before our restart.
    pub reclaim: bool,
}

/// What became of a LOCK.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockOutcome {
    /// The owner holds the range.
    Granted,
    /// Somebody else holds a part of it.
    Denied,
    /// The same, and the request waits.
    Blocked,
    /// It would wait for somebody who waits for it.
    Deadlock,
    /// The table may not hold more.
    TooMany(Limit),
}

impl LockOutcome {
    /// What is remembered of it for when the call comes again, if it is final.
    pub(crate) const fn settled(self) -> Option<Settled> {
        match self {
            Self::Granted => Some(Settled::Granted),
            Self::Denied => Some(Settled::Denied),
            Self::Blocked => Some(Settled::Blocked),
            Self::Deadlock => Some(Settled::Deadlock),
            // The host comes again when there may be room.
            Self::TooMany(_) => None,
        }
    }
}

/// Who keeps a request from being granted (`nlm4_holder`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The owner.
    pub owner: LockOwner,
    /// The bytes that it holds.
    pub range: ByteRange,
    /// Whether it shares them with nobody.
    pub exclusive: bool,
}

/// All locks of a service.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LockTable {
    pub(crate) hosts: Numbered<HostKey, HostRecord>,
    pub(crate) owners: Numbered<OwnerKey, ()>,
    pub(crate) files: Numbered<FileKey, ()>,
    pub(crate) ranges: RangeSet,
    pub(crate) blocked: OrdMap<(FileNo, BlockedNo), Blocked>,
    pub(crate) blocked_of: OrdSet<(OwnerNo, FileNo, BlockedNo)>,
    pub(crate) grants: OrdMap<GrantId, Grant>,
    pub(crate) shares: OrdMap<(FileNo, OwnerNo), Share>,
    pub(crate) shares_of: OrdSet<(OwnerNo, FileNo)>,
    /// Hosts that hold nothing, in the order in which they give way.
    pub(crate) idle_hosts: OrdSet<(IdleOrder, HostNo)>,
    /// Calls so far.
    pub(crate) calls: u64,
    /// The number of the last blocked request.
    pub(crate) last_blocked: u64,
    /// The number of the last grant.
    pub(crate) last_grant: u64,
    /// Bytes of the names of hosts and owners.
    pub(crate) name_bytes: u64,
    /// What it may hold.
    pub(crate) limits: Limits,
    /// Whether a reclaim of what it does not have is granted, if nothing is in its way. Not so from
    /// the beginning: that is what the first entries of a log were carried out with.
    pub(crate) lenient: bool,
    /// How often something hinted at locks whose owners are gone.
    pub(crate) suspicions: Suspicions,
    /// Who may not write, to which file or to any.
    pub(crate) refused: OrdSet<(IpAddr, Option<FileKey>)>,
}

impl LockTable {
    /// LOCK. A repeated call gets its first answer.
    pub fn lock(
        &mut self,
        host: &HostKey,
        call: CallDigest,
        request: &LockRequest,
        stamp: Stamp,
    ) -> LockOutcome {
        if let Some(settled) = self.repeated(host, call) {
            return match settled {
                Settled::Granted => LockOutcome::Granted,
                Settled::Denied => LockOutcome::Denied,
                Settled::Blocked => self.blocked_again(host, request),
                Settled::Deadlock => LockOutcome::Deadlock,
            };
        }
        let host = match self.enter_host(host) {
            Ok(host) => host,
            Err(limit) => return LockOutcome::TooMany(limit),
        };
        if let Some(record) = self.hosts.value_mut(host.0) {
            // In the same command as the lock: there is no lock whose host would not be told.
            record.monitored |= request.monitored;
        }
        self.note_state(host, request.nsm_state);
        let outcome = self.lock_afresh(host, request, stamp);
        self.remember(host, call, outcome.settled());
        outcome
    }

    fn lock_afresh(&mut self, host: HostNo, request: &LockRequest, stamp: Stamp) -> LockOutcome {
        let owner = match self.enter_owner(host, request.owner.clone()) {
            Ok(owner) => owner,
            Err(limit) => return LockOutcome::TooMany(limit),
        };
        let file = FileNo(self.files.enter(&request.file, || ()));
        let conflict = self
            .ranges
            .conflict(file, Some(owner), request.range, request.exclusive);
        if let Some(conflict) = &conflict {
            self.suspect_same_owner(host, &request.owner, conflict);
        }
        // Outside grace the table has every lock that was told to a host. A reclaim of another one
        // is a late copy of an earlier call, whose owner has unlocked since; or the host knows of
        // a lock that it got elsewhere, as from a server that this one has replaced. Which of the
        // two is the lesser evil to get wrong is the operator's to say.
        let may_reclaim = || {
            conflict.is_none()
                && !self.is_buried(host, request)
                && ((stamp.in_grace || self.lenient) && !self.has_lost_more(host)
                    || self.has_all(file, owner, request.range, request.exclusive))
        };
        let outcome = if request.reclaim && !may_reclaim() {
            LockOutcome::Denied
        } else if conflict.is_some() {
            self.block(host, file, owner, request, stamp)
        } else if let Some(limit) = self
            .too_many(host, file)
            .filter(|_| !self.ranges.is_made_of_own(file, owner, request.range))
        {
            LockOutcome::TooMany(limit)
        } else {
            self.unblock_same(owner, file, request.range, Some(request.exclusive));
            let held = Held {
                last: request.range.last(),
                grant: None,
                since: stamp.now,
                epoch: stamp.epoch,
                nsm_state: request.nsm_state,
                exclusive: request.exclusive,
                suspect: false,
            };
            self.settle(file, owner, request.range);
            self.change(host, file, |ranges| {
                ranges.set(file, owner, request.range, held);
            });
            self.update_host(host, |record| {
                // From now on it has the lock by right, whatever became of an earlier one.
                record.unbury(&request.file, &request.owner, request.range);
            });
            // A downgrade lets others in.
            self.grant_waiters(file, request.range, stamp);
            LockOutcome::Granted
        };
        self.release_owner(owner);
        self.release_file(file);
        outcome
    }

    pub(crate) fn too_many(&self, host: HostNo, file: FileNo) -> Option<Limit> {
        let of_host = self.hosts.value(host.0).map_or(0, |record| record.held);
        let of_file = self.ranges.count_on(file);
        let in_all = self.ranges.len() + self.shares.len();
        self.limits
            .reached(Limit::Locks, in_all)
            .or_else(|| self.limits.reached(Limit::LocksPerHost, of_host as usize))
            .or_else(|| self.limits.reached(Limit::LocksPerFile, of_file as usize))
    }

    /// UNLOCK: always succeeds, also where nothing was held; ends a request of the same owner that
    /// waits for the very same range.
    pub fn unlock(
        &mut self,
        host: &HostKey,
        call: CallDigest,
        file: &FileKey,
        owner: &LockOwner,
        range: ByteRange,
        stamp: Stamp,
    ) {
        if self.repeated(host, call).is_some() {
            return;
        }
        // Also of a host that is not known: a copy of this very call may come after its first LOCK.
        let Ok(host) = self.enter_host(host) else {
            return;
        };
        let mut had_some = false;
        if let Some((owner, file)) = self.known(host, owner, file) {
            self.unblock_same(owner, file, range, None);
            had_some = self.release(host, file, owner, range, stamp);
            self.release_owner(owner);
            self.release_file(file);
        }
        if !had_some && let Some(file) = self.files.number(file) {
            self.look_for_same_owner(host, owner, FileNo(file), range);
        }
        self.remember(host, call, Some(Settled::Granted));
    }

    /// TEST: who keeps the owner from having the range. Changes nothing.
    pub fn test(
        &self,
        host: &HostKey,
        file: &FileKey,
        owner: &LockOwner,
        range: ByteRange,
        exclusive: bool,
    ) -> Option<Holder> {
        let file = FileNo(self.files.number(file)?);
        let owner = self.hosts.number(host).and_then(|host| {
            let host = HostNo(host);
            let owner = owner.clone();
            self.owners.number(&OwnerKey { host, owner })
        });
        let found = self
            .ranges
            .conflict(file, owner.map(OwnerNo), range, exclusive)?;
        Some(Holder {
            owner: self.owners.key(found.owner.0)?.owner.clone(),
            range: found.range,
            exclusive: found.held.exclusive,
        })
    }

    /// Whether a lock that the host reclaims ended without its doing.
    fn is_buried(&self, host: HostNo, request: &LockRequest) -> bool {
        self.hosts.value(host.0).is_some_and(|record| {
            let mut lost = record.tombstones.iter();
            lost.any(|lost| lost.is_on(&request.file, &request.owner, request.range))
        })
    }

    /// Whether more locks of a host ended without its doing than are remembered: what it reclaims
    /// may be one of them.
    fn has_lost_more(&self, host: HostNo) -> bool {
        let record = self.hosts.value(host.0);
        record.is_some_and(|record| record.lost_more)
    }

    /// The hosts that want to hear of our restarts and have something to lose; all that want to, if
    /// `all`.
    pub fn monitored_hosts(&self, all: bool) -> impl Iterator<Item = &HostKey> {
        let hosts = self.hosts.iter();
        hosts
            .filter(move |(_, _, record)| record.monitored && (all || !record.is_idle()))
            .map(|(_, key, _)| key)
    }

    /// Takes a range from its owner and gives it to those who wait for it; returns whether the
    /// owner had something of it.
    pub(crate) fn release(
        &mut self,
        host: HostNo,
        file: FileNo,
        owner: OwnerNo,
        range: ByteRange,
        stamp: Stamp,
    ) -> bool {
        self.settle(file, owner, range);
        let had = self.change(host, file, |ranges| ranges.clear(file, owner, range));
        if !had.is_empty() {
            self.grant_waiters(file, range, stamp);
        }
        !had.is_empty()
    }

    /// Changes ranges of one owner on one file, and counts.
    pub(crate) fn change<T>(
        &mut self,
        host: HostNo,
        file: FileNo,
        change: impl FnOnce(&mut RangeSet) -> T,
    ) -> T {
        let before = self.ranges.count_on(file);
        let result = change(&mut self.ranges);
        let after = self.ranges.count_on(file);
        self.update_host(host, |record| {
            record.held = (record.held + after).saturating_sub(before);
        });
        result
    }

    /// Changes what is known of a host, and keeps the list of idle ones right.
    pub(crate) fn update_host(&mut self, host: HostNo, update: impl FnOnce(&mut HostRecord)) {
        if let Some(record) = self.hosts.value_mut(host.0) {
            let (was_idle, order) = (record.is_idle(), record.idle_order());
            update(record);
            if was_idle {
                self.idle_hosts.remove(&(order, host));
            }
            if record.is_idle() {
                self.idle_hosts.insert((record.idle_order(), host));
            }
        }
    }

    /// The answer that this call got before.
    pub(crate) fn repeated(&self, host: &HostKey, call: CallDigest) -> Option<Settled> {
        let host = self.hosts.number(host)?;
        self.hosts.value(host)?.repeats.answer(call)
    }

    pub(crate) fn remember(&mut self, host: HostNo, call: CallDigest, settled: Option<Settled>) {
        self.calls += 1;
        let now = self.calls;
        self.update_host(host, |record| {
            record.used = now;
            if let Some(settled) = settled {
                Arc::make_mut(&mut record.repeats).remember(call, settled);
            }
        });
    }

    /// Whether a file whose key begins so is locked or waited for.
    pub fn has_files_from(&self, prefix: &[u8]) -> bool {
        let first = FileKey(prefix.into());
        let number = self.files.numbers_in(first..).next();
        number
            .and_then(|number| self.files.key(number))
            .is_some_and(|key| key.0.starts_with(prefix))
    }

    /// The number of the newest grant to a host that waited; 0 if there never was one.
    pub const fn last_grant(&self) -> u64 {
        self.last_grant
    }

    /// What the table may hold.
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Sets what the table may hold. What it holds already stays.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Sets whether a reclaim of a lock that the table does not have is granted, if nothing is in
    /// its way.
    pub fn set_lenient(&mut self, lenient: bool) {
        self.lenient = lenient;
    }

    /// Whether it is.
    pub const fn is_lenient(&self) -> bool {
        self.lenient
    }

    /// How many ranges are held.
    pub fn lock_count(&self) -> usize {
        self.ranges.len()
    }

    /// How many requests wait.
    pub fn waiting_count(&self) -> usize {
        self.blocked.len()
    }

    /// How many hosts are known.
    pub fn host_count(&self) -> usize {
        self.hosts.len()
    }

    /// All held ranges, by file.
    pub fn locks(&self) -> impl Iterator<Item = HeldRange> {
        self.ranges.iter()
    }
}

#[cfg(test)]
mod tests;
