//! What waits: blocked requests, and grants that their hosts have not confirmed.
//!
//! A request that meets a conflict and wants to wait stays in line, first come first served. When
//! what it waits for goes away it is granted in the same command, and from then on its owner holds
//! the lock: a message that tells the host may be lost, and a lock that may have been told is never
//! given to somebody else. So the grant stays, unconfirmed, until the owner acts on that range
//! (LOCK, UNLOCK, CANCEL, GRANTED_RES) or the host reboots. Only what the host refuses at the very
//! first telling is known to be unknown to it, and released ([`LockTable::refuse`]).
//!
//! Crossings, each of which is a test:
//! - GRANTED and CANCEL: the cancel releases the grant if the owner had nothing of the range before
//!   (else it can't be told what the owner believes to have, and the lock stays).
//! - GRANTED and a polling LOCK of the same request: the LOCK is granted and confirms.
//! - GRANTED and a repeated LOCK, which is answered that it is granted: that confirms nothing,
//!   since nobody may hear the answer; but a refusal of the GRANTED does not release either.
//! - GRANTED and UNLOCK: the unlock releases, and ends a request for the very same range.
//! - GRANTED_RES that comes late: it names the grant, not the range, so it can't hit a newer lock.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::host::{CallDigest, HostKey, Settled};
use crate::keys::{FileKey, FileNo, HostNo, LockOwner, OwnerNo, Stamp};
use crate::limits::Limit;
use crate::range::ByteRange;
use crate::range_set::{GrantId, Held};
use crate::table::{LockOutcome, LockRequest, LockTable};
use crate::wire_v3::NlmVersion;

/// The number of a blocked request: its place in line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockedNo(pub(crate) u64);

/// How to tell a host about its lock: what GRANTED must repeat byte for byte, since clients
/// compare it with what they sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Callback {
    /// The version of NLM that the host spoke.
    pub version: NlmVersion,
    /// Whether it came over UDP.
    pub udp: bool,
    /// The file handle.
    pub fh: Box<[u8]>,
    /// The offset as it was sent.
    pub l_offset: u64,
    /// The length as it was sent.
    pub l_len: u64,
}

/// A LOCK that was answered NLM4_BLOCKED.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocked {
    /// Who waits.
    pub(crate) owner: OwnerNo,
    /// For what.
    pub(crate) range: ByteRange,
    /// Whether for itself alone.
    pub(crate) exclusive: bool,
    /// The NSM state that the host told.
    pub(crate) nsm_state: i32,
    /// Since when, in seconds since 1970.
    pub(crate) since: u32,
    /// How to tell the host.
    pub(crate) callback: Callback,
}

/// A lock that was granted while its host waited, and is not confirmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// On which file.
    pub(crate) file: FileNo,
    /// To whom.
    pub(crate) owner: OwnerNo,
    /// What.
    pub(crate) range: ByteRange,
    /// Whether for itself alone.
    pub(crate) exclusive: bool,
    /// Whether the owner had a part of it before, shared or exclusive.
    pub(crate) replaced: bool,
    /// The epoch in which it was granted; [`EPOCH_TOLD`] once the host may have been told otherwise
    /// than by GRANTED in that epoch.
    pub(crate) epoch: u32,
    /// How to tell the host.
    pub(crate) callback: Callback,
}

/// A [`Grant`] with all that its delivery needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// Its number.
    pub id: GrantId,
    /// Whom to tell, and from which address.
    pub host: HostKey,
    /// The owner within the host.
    pub owner: LockOwner,
    /// Whether for itself alone.
    pub exclusive: bool,
    /// The epoch in which it was granted.
    pub epoch: u32,
    /// What to repeat.
    pub callback: Callback,
}

impl LockTable {
    /// A LOCK met a conflict.
    pub(crate) fn block(
        &mut self,
        host: HostNo,
        file: FileNo,
        owner: OwnerNo,
        request: &LockRequest,
        stamp: Stamp,
    ) -> LockOutcome {
        let Some(callback) = &request.callback else {
            return LockOutcome::Denied;
        };
        if let Some(no) = self.blocked_same(owner, file, request.range, Some(request.exclusive)) {
            // It asks again and keeps its place.
            if let Some(blocked) = self.blocked.get_mut(&(file, no)) {
                blocked.callback.clone_from(callback);
                // Of the life in which it waits now.
                blocked.nsm_state = request.nsm_state;
            }
            return LockOutcome::Blocked;
        }
        let of_host = self.hosts.value(host.0).map_or(0, |record| record.blocked);
        let enough = self.limits.get(Limit::WaitingPerFile) as usize;
        let of_file = self.waiting_for(file).take(enough).count();
        let limits = &self.limits;
        let limit = limits
            .reached(Limit::Waiting, self.blocked.len())
            .or_else(|| limits.reached(Limit::WaitingPerHost, of_host as usize))
            .or_else(|| limits.reached(Limit::WaitingPerFile, of_file));
        if let Some(limit) = limit {
            return LockOutcome::TooMany(limit);
        }
        // Versions 1 and 3 have no status for it, and would take another one for a passing state.
        if callback.version == NlmVersion::V4
            && self.would_deadlock(file, owner, request.range, request.exclusive)
        {
            return LockOutcome::Deadlock;
        }
        self.last_blocked += 1;
        let no = BlockedNo(self.last_blocked);
        self.blocked.insert(
            (file, no),
            Blocked {
                owner,
                range: request.range,
                exclusive: request.exclusive,
                nsm_state: request.nsm_state,
                since: stamp.now,
                callback: callback.clone(),
            },
        );
        self.blocked_of.insert((owner, file, no));
        self.update_host(host, |record| record.blocked += 1);
        LockOutcome::Blocked
    }

    /// The same call as one that was blocked came again: says how things stand and begins nothing,
    /// since it may be a copy that was overtaken by all that followed.
    pub(crate) fn blocked_again(&mut self, host: &HostKey, request: &LockRequest) -> LockOutcome {
        let Some((owner, file)) = self.known_to(host, &request.owner, &request.file) else {
            return LockOutcome::Denied;
        };
        let (range, exclusive) = (request.range, request.exclusive);
        if self
            .blocked_same(owner, file, range, Some(exclusive))
            .is_some()
        {
            LockOutcome::Blocked
        } else if self.has_all(file, owner, range, exclusive) {
            // The host may learn of the grant from this answer, and deny the GRANTED that comes
            // after it; or nobody may hear it, so that it must still be told.
            for own in self.ranges.own(file, owner, range) {
                if let Some(grant) = own.held.grant.and_then(|id| self.grants.get_mut(&id)) {
                    grant.epoch = EPOCH_TOLD;
                }
            }
            LockOutcome::Granted
        } else {
            LockOutcome::Denied
        }
    }

    /// Whether an owner holds every byte of a range in one way.
    pub(crate) fn has_all(
        &self,
        file: FileNo,
        owner: OwnerNo,
        range: ByteRange,
        exclusive: bool,
    ) -> bool {
        let mut next = Some(range.start());
        for own in self.ranges.own_overlapping(file, owner, range) {
            if own.held.exclusive == exclusive && next.is_some_and(|next| own.range.start() <= next)
            {
                next = own.range.last().checked_add(1);
            }
        }
        next.is_none_or(|next| next > range.last())
    }

    /// CANCEL: ends a request that waits. Returns whether the owner has nothing of it now; false
    /// means that it holds the lock, and must unlock it.
    #[expect(
        clippy::too_many_arguments,
        reason = "the call's fields, as XNFS lists them"
    )]
    pub fn cancel(
        &mut self,
        host: &HostKey,
        call: CallDigest,
        file: &FileKey,
        owner: &LockOwner,
        range: ByteRange,
        exclusive: bool,
        stamp: Stamp,
    ) -> bool {
        let Ok(host) = self.enter_host(host) else {
            return true;
        };
        let record = self.hosts.value(host.0);
        if let Some(settled) = record.and_then(|record| record.repeats.answer(call)) {
            return settled == Settled::Granted;
        }
        let mut nothing_left = true;
        if let Some((owner, file)) = self.known(host, owner, file) {
            if !self.unblock_same(owner, file, range, Some(exclusive)) {
                let own = self.ranges.own(file, owner, range);
                let granted = own
                    .iter()
                    .find(|own| own.range == range && own.held.exclusive == exclusive)
                    .and_then(|own| self.grants.get(&own.held.grant?));
                if granted.is_some_and(|grant| !grant.replaced) {
                    self.release(host, file, owner, range, stamp);
                } else {
                    nothing_left = own.is_empty();
                    // The owner has acted: it knows of what it holds here, and will unlock it.
                    self.settle(file, owner, range);
                }
            }
            self.release_owner(owner);
            self.release_file(file);
        }
        let settled = if nothing_left {
            Settled::Granted
        } else {
            Settled::Denied
        };
        self.remember(host, call, Some(settled));
        nothing_left
    }

    /// The host says that it has taken the lock.
    pub fn confirm(&mut self, id: GrantId) {
        if let Some(grant) = self.grants.remove(&id) {
            self.unmark(grant.file, grant.owner, grant.range, Some(id));
        }
    }

    /// The host says that nobody waits there for this lock. If `release`, this was the answer to
    /// the first telling of it, so that no earlier one can have been taken: the lock goes to the
    /// next in line, unless the owner had a part of the range before. Otherwise it stays until its
    /// owner acts, and is not told any more.
    pub fn refuse(&mut self, id: GrantId, release: bool, stamp: Stamp) {
        let Some(grant) = self.grants.remove(&id) else {
            return;
        };
        if !release || grant.replaced || grant.epoch != stamp.epoch {
            return;
        }
        let Some(host) = self.host_of(grant.owner) else {
            return;
        };
        for own in self.ranges.own(grant.file, grant.owner, grant.range) {
            if own.held.grant == Some(id) {
                self.release(host, grant.file, grant.owner, own.range, stamp);
            }
        }
        self.release_owner(grant.owner);
        self.release_file(grant.file);
    }

    /// The grants whose number is above `after`, oldest first.
    pub fn deliveries(&self, after: u64) -> impl Iterator<Item = Delivery> {
        let first = GrantId::MIN.saturating_add(after);
        self.grants
            .range(first..)
            .filter_map(|(id, _)| self.delivery(*id))
    }

    /// How many grants are still to be confirmed.
    pub fn grant_count(&self) -> usize {
        self.grants.len()
    }

    /// Whether a grant is still to be confirmed.
    pub fn has_grant(&self, id: GrantId) -> bool {
        self.grants.contains_key(&id)
    }

    /// Whether a grant is still to be confirmed by a host with this address.
    pub fn has_grant_to(&self, id: GrantId, address: IpAddr) -> bool {
        let grant = self.grants.get(&id);
        let host = grant.and_then(|grant| self.host_of(grant.owner));
        host.and_then(|host| self.hosts.key(host.0))
            .is_some_and(|host| host.address == address)
    }

    /// A grant with what its delivery needs, if it is still to be confirmed.
    pub fn delivery(&self, id: GrantId) -> Option<Delivery> {
        let grant = self.grants.get(&id)?;
        let key = self.owners.key(grant.owner.0)?;
        Some(Delivery {
            id,
            host: self.hosts.key(key.host.0)?.clone(),
            owner: key.owner.clone(),
            exclusive: grant.exclusive,
            epoch: grant.epoch,
            callback: grant.callback.clone(),
        })
    }

    /// The owner acts on a range: it knows what it holds there.
    pub(crate) fn settle(&mut self, file: FileNo, owner: OwnerNo, range: ByteRange) {
        self.unmark(file, owner, range, None);
    }

    /// Makes unconfirmed locks (those of one grant, if one is named) ordinary ones.
    fn unmark(&mut self, file: FileNo, owner: OwnerNo, range: ByteRange, only: Option<GrantId>) {
        for own in self.ranges.own(file, owner, range) {
            let Some(id) = own.held.grant else { continue };
            if only.is_some_and(|only| only != id) {
                continue;
            }
            self.grants.remove(&id);
            let confirmed = Held {
                grant: None,
                ..own.held
            };
            if let Some(host) = self.host_of(owner) {
                self.change(host, file, |ranges| {
                    ranges.set(file, owner, own.range, confirmed);
                });
            }
        }
    }

    /// Grants what waits for a file and can be had now that `range` was released, in order.
    ///
    /// Nothing while grace runs: what looks free may belong to a host that has not reclaimed yet.
    pub(crate) fn grant_waiters(&mut self, file: FileNo, range: ByteRange, stamp: Stamp) {
        if stamp.in_grace {
            return;
        }
        let mut released = Some(range);
        // A grant that shares what its owner had for itself alone lets others in, whose turn may
        // have been before.
        while let Some(range) = released.take() {
            let waiting: Vec<BlockedNo> = self
                .waiting_for(file)
                .filter(|(_, blocked)| blocked.range.overlaps(range))
                .map(|(no, _)| no)
                .collect();
            for no in waiting {
                if let Some(shared) = self.grant_waiter(file, no, stamp) {
                    released = Some(released.map_or(shared, |range| range.join(shared)));
                }
            }
        }
    }

    /// Grants a request that waits, if it can be had; returns its range if others may have more
    /// of it now than before.
    fn grant_waiter(&mut self, file: FileNo, no: BlockedNo, stamp: Stamp) -> Option<ByteRange> {
        let blocked = self.blocked.get(&(file, no))?;
        let (owner, wanted, exclusive) = (blocked.owner, blocked.range, blocked.exclusive);
        let conflict = self.ranges.conflict(file, Some(owner), wanted, exclusive);
        if conflict.is_some() {
            return None;
        }
        let host = self.host_of(owner)?;
        let blocked = self.unblock(owner, file, no)?;
        // What its owner had of the range is a lock like any other from now on.
        self.settle(file, owner, wanted);
        let had = self.ranges.own(file, owner, wanted);
        self.last_grant += 1;
        let id = GrantId::MIN.saturating_add(self.last_grant - 1);
        let held = Held {
            last: wanted.last(),
            grant: Some(id),
            since: stamp.now,
            epoch: stamp.epoch,
            nsm_state: blocked.nsm_state,
            exclusive,
            suspect: false,
        };
        self.change(host, file, |ranges| ranges.set(file, owner, wanted, held));
        let grant = Grant {
            file,
            owner,
            range: wanted,
            exclusive,
            replaced: !had.is_empty(),
            epoch: stamp.epoch,
            callback: blocked.callback,
        };
        self.grants.insert(id, grant);
        let shares = !exclusive && had.iter().any(|had| had.held.exclusive);
        shares.then_some(wanted)
    }

    /// The requests that wait for a file, in order.
    pub(crate) fn waiting_for(&self, file: FileNo) -> impl Iterator<Item = (BlockedNo, &Blocked)> {
        self.blocked
            .range((file, BlockedNo(0))..=(file, BlockedNo(u64::MAX)))
            .map(|((_, no), blocked)| (*no, blocked))
    }

    /// The request of an owner for the very same range, of one kind or of any.
    fn blocked_same(
        &self,
        owner: OwnerNo,
        file: FileNo,
        range: ByteRange,
        exclusive: Option<bool>,
    ) -> Option<BlockedNo> {
        self.blocked_of
            .range((owner, file, BlockedNo(0))..=(owner, file, BlockedNo(u64::MAX)))
            .map(|(.., no)| *no)
            .find(|no| {
                self.blocked.get(&(file, *no)).is_some_and(|blocked| {
                    blocked.range == range
                        && exclusive.is_none_or(|exclusive| exclusive == blocked.exclusive)
                })
            })
    }

    /// Ends the requests of an owner for the very same range; returns whether there was one.
    pub(crate) fn unblock_same(
        &mut self,
        owner: OwnerNo,
        file: FileNo,
        range: ByteRange,
        exclusive: Option<bool>,
    ) -> bool {
        let mut found = false;
        while let Some(no) = self.blocked_same(owner, file, range, exclusive) {
            self.unblock(owner, file, no);
            found = true;
        }
        found
    }

    /// Ends the requests of an owner that are `meant`; returns how many.
    pub(crate) fn unblock_where(
        &mut self,
        owner: OwnerNo,
        meant: impl Fn(FileNo, &Blocked) -> bool,
    ) -> usize {
        let ended: Vec<(FileNo, BlockedNo)> = self
            .blocked_of
            .range((owner, FileNo(0), BlockedNo(0))..)
            .take_while(|(of, ..)| *of == owner)
            .map(|(_, file, no)| (*file, *no))
            .filter(|key| {
                let blocked = self.blocked.get(key);
                blocked.is_some_and(|blocked| meant(key.0, blocked))
            })
            .collect();
        for (file, no) in &ended {
            self.unblock(owner, *file, *no);
            self.release_file(*file);
        }
        ended.len()
    }

    fn unblock(&mut self, owner: OwnerNo, file: FileNo, no: BlockedNo) -> Option<Blocked> {
        let blocked = self.blocked.remove(&(file, no))?;
        self.blocked_of.remove(&(owner, file, no));
        if let Some(host) = self.host_of(owner) {
            self.update_host(host, |record| {
                record.blocked = record.blocked.saturating_sub(1);
            });
        }
        Some(blocked)
    }

    /// Whether somebody who would have to unlock first waits, directly or through others, for a
    /// lock of `owner`. Only locks that their hosts know of count; what can't be told in a bounded
    /// number of steps is no deadlock: a wrong DEADLCK breaks an application, a missing one leaves
    /// it to the signal that would have ended it anyway.
    fn would_deadlock(
        &self,
        file: FileNo,
        owner: OwnerNo,
        range: ByteRange,
        exclusive: bool,
    ) -> bool {
        let holds = |of: OwnerNo, file, range, exclusive| {
            let own = self.ranges.own_overlapping(file, of, range);
            own.take(RANGES_LOOKED_AT_MAX)
                .any(|own| own.held.grant.is_none() && (exclusive || own.held.exclusive))
        };
        let (mut seen, mut queue) = (BTreeSet::from([owner]), vec![owner]);
        let mut steps = 0;
        while let Some(waited_for) = queue.pop() {
            for held_file in self.ranges.files_of(waited_for) {
                steps += 1;
                if steps > DEADLOCK_STEPS_MAX {
                    return false;
                }
                for (_, blocked) in self.waiting_for(held_file) {
                    steps += 1;
                    if steps > DEADLOCK_STEPS_MAX {
                        return false;
                    }
                    let waits = !seen.contains(&blocked.owner)
                        && holds(waited_for, held_file, blocked.range, blocked.exclusive);
                    if !waits {
                        continue;
                    }
                    if holds(blocked.owner, file, range, exclusive) {
                        return true;
                    }
                    seen.insert(blocked.owner);
                    queue.push(blocked.owner);
                }
            }
        }
        false
    }
}

/// No service has this epoch.
const EPOCH_TOLD: u32 = 0;
/// How many ranges of an owner are looked at to see whether it is in the way.
const RANGES_LOOKED_AT_MAX: usize = 100;
/// How many files and waiting requests a search for a deadlock looks at.
const DEADLOCK_STEPS_MAX: usize = 10_000;
