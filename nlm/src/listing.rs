//! The table as people look at it: who holds what, who waits for what, which hosts there are.

use std::net::IpAddr;

use crate::host::HostKey;
use crate::keys::{FileKey, FileNo, LockOwner, OwnerNo};
use crate::range::ByteRange;
use crate::range_set::HeldRange;
use crate::suspicion::Suspicion;
use crate::table::{LockRequest, LockTable};

/// What names a held range for as long as it is held in this form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LockId(FileNo, OwnerNo, u64);

/// A lock, or a request that waits for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockEntry<'a> {
    /// The machine.
    pub host: &'a HostKey,
    /// Who on that machine.
    pub owner: &'a LockOwner,
    /// Which file.
    pub file: &'a FileKey,
    /// Which bytes.
    pub range: ByteRange,
    /// Whether for itself alone.
    pub exclusive: bool,
    /// Since when, in seconds since 1970.
    pub since: u32,
}

/// What more is known of a lock that is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldEntry<'a> {
    /// What every lock has.
    pub lock: LockEntry<'a>,
    /// What names it.
    pub id: LockId,
    /// Whether its host has not said yet that it knows of it: it waited and was told.
    pub unconfirmed: bool,
    /// The epoch in which its owner last set it.
    pub epoch: u32,
    /// Why it is suspect, if it is.
    pub suspicion: Option<Suspicion>,
}

/// A machine that locks or has locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostEntry<'a> {
    /// What tells it from others.
    pub host: &'a HostKey,
    /// Ranges and shares that it holds.
    pub held: u32,
    /// Its requests that wait.
    pub waiting: u32,
    /// Whether it hears of our restarts.
    pub monitored: bool,
    /// The NSM state that it told last, 0 if it never did.
    pub nsm_state: i32,
    /// Its locks that ended without its doing and that it may not reclaim.
    pub lost: usize,
}

impl LockTable {
    /// All locks, by file.
    pub fn held_entries(&self) -> impl Iterator<Item = HeldEntry<'_>> {
        self.locks().filter_map(|held| self.held_entry(&held))
    }

    fn held_entry(&self, found: &HeldRange) -> Option<HeldEntry<'_>> {
        let held = &found.held;
        Some(HeldEntry {
            lock: self.entry(
                found.file,
                found.owner,
                found.range,
                held.exclusive,
                held.since,
            )?,
            id: LockId(found.file, found.owner, found.range.start()),
            unconfirmed: held.grant.is_some(),
            epoch: held.epoch,
            suspicion: self.suspicion_of(found.owner, held),
        })
    }

    /// Whether a lock is still held.
    pub fn has_lock(&self, id: LockId) -> bool {
        self.ranges.get(id.0, id.1, id.2).is_some()
    }

    /// Since when a host behind an address holds a lock, in seconds since 1970, if it still does.
    pub fn held_since(&self, id: LockId, address: IpAddr) -> Option<u32> {
        let host = self.hosts.key(self.host_of(id.1)?.0)?;
        let held = self.ranges.get(id.0, id.1, id.2)?;
        (host.address == address).then_some(held.since)
    }

    /// All requests that wait, by file and in line.
    pub fn waiting_entries(&self) -> impl Iterator<Item = LockEntry<'_>> {
        self.blocked.iter().filter_map(|((file, _), waits)| {
            self.entry(
                *file,
                waits.owner,
                waits.range,
                waits.exclusive,
                waits.since,
            )
        })
    }

    /// All hosts.
    pub fn host_entries(&self) -> impl Iterator<Item = HostEntry<'_>> {
        self.hosts.iter().map(|(_, host, record)| HostEntry {
            host,
            held: record.held,
            waiting: record.blocked,
            monitored: record.monitored,
            nsm_state: record.nsm_state,
            lost: record.tombstones.len(),
        })
    }

    /// The locks that make up a range that an owner says it holds, none if it does not hold all of
    /// it in this way: a reclaim of it changes nothing.
    pub fn holding(&self, host: &HostKey, request: &LockRequest) -> Option<Vec<LockId>> {
        let (owner, file) = self.known_to(host, &request.owner, &request.file)?;
        if !self.has_all(file, owner, request.range, request.exclusive) {
            return None;
        }
        let own = self.ranges.own_overlapping(file, owner, request.range);
        Some(
            own.map(|held| LockId(file, owner, held.range.start()))
                .collect(),
        )
    }

    fn entry(
        &self,
        file: FileNo,
        owner: OwnerNo,
        range: ByteRange,
        exclusive: bool,
        since: u32,
    ) -> Option<LockEntry<'_>> {
        let key = self.owners.key(owner.0)?;
        Some(LockEntry {
            host: self.hosts.key(key.host.0)?,
            owner: &key.owner,
            file: self.files.key(file.0)?,
            range,
            exclusive,
            since,
        })
    }
}
