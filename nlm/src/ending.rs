//! How locks end without a call of their owner: a reboot of the host, FREE_ALL, the end of grace.
//!
//! All of it goes through one function for a host and one for a lock, and whoever waited is served
//! in the same command.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use crate::host::{CallDigest, HostKey, Settled, Tombstone};
use crate::keys::{FileKey, FileNo, HostNo, OwnerNo, Stamp};
use crate::range::ByteRange;
use crate::range_set::HeldRange;
use crate::table::LockTable;

/// How much ended at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    /// Of so many hosts.
    pub hosts: usize,
    /// Locks.
    pub locks: usize,
    /// Requests that waited.
    pub requests: usize,
    /// Shares.
    pub shares: usize,
}

impl LockTable {
    /// A notice says that a host behind `address` has rebooted and is in `state` now: ends what the
    /// hosts that are meant by `mon_name` had in earlier lives, and lets others have it.
    ///
    /// `meant` chooses among the names of all hosts behind the address. A notice that was seen
    /// before changes nothing; locks taken in the very state that it tells of are of the new life.
    pub fn rebooted(
        &mut self,
        address: IpAddr,
        state: i32,
        meant: impl FnOnce(&[&[u8]]) -> Vec<Vec<u8>>,
        stamp: Stamp,
    ) -> Freed {
        let mut freed = Freed::default();
        for host in self.announcing(address, state, meant) {
            freed.hosts += 1;
            // 0 says nothing about a life.
            let keep = (state != 0).then_some(state);
            self.free(host, keep, stamp, &mut freed);
            self.update_host(host, |record| record.reboot(state));
        }
        freed
    }

    /// The names of the hosts behind an address that lose locks or waiting requests if a notice is
    /// believed; `meant` as in [`LockTable::rebooted`].
    pub fn losing(
        &self,
        address: IpAddr,
        state: i32,
        meant: impl FnOnce(&[&[u8]]) -> Vec<Vec<u8>>,
    ) -> Vec<Vec<u8>> {
        let hosts = self.losers(address, state, meant).into_iter();
        let mut names: Vec<Vec<u8>> = hosts
            .filter_map(|host| Some(self.hosts.key(host.0)?.caller_name.to_vec()))
            .collect();
        names.dedup();
        names
    }

    /// The hosts whose names [`LockTable::losing`] tells.
    pub(crate) fn losers(
        &self,
        address: IpAddr,
        state: i32,
        meant: impl FnOnce(&[&[u8]]) -> Vec<Vec<u8>>,
    ) -> Vec<HostNo> {
        let mut hosts = self.announcing(address, state, meant);
        hosts.retain(|host| {
            let record = self.hosts.value(host.0);
            record.is_some_and(|record| !record.is_idle())
        });
        hosts
    }

    /// The address and the name of the one host that has something, is not behind `address` and
    /// whose name is meant; none if there are several. Looks at every host.
    pub fn named_elsewhere(
        &self,
        address: IpAddr,
        is_meant: impl Fn(&[u8]) -> bool,
    ) -> Option<(IpAddr, String)> {
        let hosts = self.hosts.iter();
        let mut named = hosts
            .filter(|(_, key, record)| !record.is_idle() && is_meant(&key.caller_name))
            .map(|(_, key, _)| key)
            .filter(|key| key.address != address);
        let first = named.next()?;
        if named.any(|other| other.address != first.address) {
            return None;
        }
        let name = String::from_utf8(first.caller_name.to_vec()).ok()?;
        Some((first.address, name))
    }

    /// The hosts behind an address that a notice means, and that have not announced its state
    /// before, nor was that doubted.
    fn announcing(
        &self,
        address: IpAddr,
        state: i32,
        meant: impl FnOnce(&[&[u8]]) -> Vec<Vec<u8>>,
    ) -> Vec<HostNo> {
        let mut hosts = self.hosts_behind(address);
        let name_of = |host: &HostNo| self.hosts.key(host.0).map(|key| &*key.caller_name);
        let names: Vec<&[u8]> = hosts.iter().filter_map(name_of).collect();
        let names = meant(&names);
        hosts.retain(|host| {
            let record = self.hosts.value(host.0);
            record.is_some_and(|record| !record.has_announced(state) && !record.doubts(state))
                && name_of(host).is_some_and(|name| names.iter().any(|meant| *meant == name))
        });
        hosts
    }

    /// FREE_ALL: a host gives back all that it has. A copy of the call changes nothing.
    pub fn free_all(
        &mut self,
        address: IpAddr,
        name: &[u8],
        call: CallDigest,
        stamp: Stamp,
    ) -> Freed {
        let named = |host: &HostNo| {
            let key = self.hosts.key(host.0);
            key.is_some_and(|key| *key.caller_name == *name)
        };
        let mut meant = self.hosts_behind(address);
        meant.retain(named);
        let mut freed = Freed::default();
        let has_it = |host: &HostNo| {
            let record = self.hosts.value(host.0);
            record.is_some_and(|record| record.repeats.answer(call).is_some())
        };
        // That one of them remembers it is enough: another one, with another of our addresses, may
        // be new since.
        if meant.iter().any(has_it) {
            return freed;
        }
        if meant.is_empty() {
            // Also of a host that is not known: a copy of this very call may come after its first
            // LOCK. The call does not say which of our addresses that will be for.
            let host = HostKey {
                address,
                service_address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                caller_name: name.into(),
            };
            if let Ok(host) = self.enter_host(&host) {
                self.remember(host, call, Some(Settled::Granted));
            }
            return freed;
        }
        for host in meant {
            freed.hosts += 1;
            self.free(host, None, stamp, &mut freed);
            self.remember(host, call, Some(Settled::Granted));
        }
        freed
    }

    /// An administrator ends locks that nobody will unlock: those of a host, of one file or of all.
    /// Their owners may still believe to have them, and can't reclaim them. Requests of the host
    /// that wait for the same end as well.
    pub fn break_locks(&mut self, address: IpAddr, file: Option<&FileKey>, stamp: Stamp) -> Freed {
        let file = match file.map(|file| self.files.number(file)) {
            None => None,
            Some(Some(number)) => Some(FileNo(number)),
            // Nothing is locked there.
            Some(None) => return Freed::default(),
        };
        let mut freed = Freed::default();
        let mut ranges: BTreeMap<FileNo, ByteRange> = BTreeMap::new();
        let meant = |of, _| file.is_none_or(|file| file == of);
        for host in self.hosts_behind(address) {
            freed.hosts += 1;
            self.end_of_host(host, meant, true, &mut freed, &mut ranges);
        }
        self.grant_in(ranges, stamp);
        freed
    }

    /// An administrator says that the hosts behind an address are gone for good: what they have is
    /// broken, and they hear of no restart any more until they lock again.
    pub fn expire(&mut self, address: IpAddr, stamp: Stamp) -> Freed {
        let freed = self.break_locks(address, None, stamp);
        for host in self.hosts_behind(address) {
            self.update_host(host, |record| record.monitored = false);
        }
        freed
    }

    /// Grace is over: what was not reclaimed since the epoch in which it began ends, since the
    /// table may have missed that it was unlocked, and is not given back later. Whoever waited is
    /// served.
    pub fn lapse(&mut self, since_epoch: u32, stamp: Stamp) -> Freed {
        let mut freed = Freed::default();
        let mut ranges: BTreeMap<FileNo, ByteRange> = BTreeMap::new();
        let old: Vec<HeldRange> = self
            .locks()
            .filter(|held| held.held.epoch < since_epoch)
            .collect();
        for held in old {
            let Some(key) = self.owners.key(held.owner.0).cloned() else {
                continue;
            };
            self.bury(key.host, &held);
            self.end_lock(key.host, &held, &mut freed, &mut ranges);
            self.release_owner(held.owner);
        }
        let shares: Vec<(FileNo, OwnerNo)> = self
            .shares
            .iter()
            .filter(|(_, share)| share.epoch < since_epoch)
            .map(|(key, _)| *key)
            .collect();
        for (file, owner) in shares {
            if let Some(host) = self.host_of(owner) {
                freed.shares += 1;
                self.end_share(host, file, owner);
                self.release_owner(owner);
                self.release_file(file);
            }
        }
        self.grant_in(ranges, stamp);
        // Also what was unlocked while nobody could be served.
        let mut files: Vec<FileNo> = self.blocked.keys().map(|(file, _)| *file).collect();
        files.dedup();
        for file in files {
            self.grant_waiters(file, ByteRange::ALL, stamp);
        }
        freed
    }

    /// Ends everything that a host has, but what it took under `keep_state`, and lets others have
    /// it.
    fn free(&mut self, host: HostNo, keep_state: Option<i32>, stamp: Stamp, freed: &mut Freed) {
        let mut ranges: BTreeMap<FileNo, ByteRange> = BTreeMap::new();
        let not_kept = |_, state| keep_state != Some(state);
        self.end_of_host(host, not_kept, false, freed, &mut ranges);
        self.grant_in(ranges, stamp);
    }

    /// Ends what a host has and waits for, where file and NSM state are `meant`; locks are `buried`
    /// if the host does not know that they ended. Nobody is served yet.
    fn end_of_host(
        &mut self,
        host: HostNo,
        meant: impl Fn(FileNo, i32) -> bool,
        buried: bool,
        freed: &mut Freed,
        ranges: &mut BTreeMap<FileNo, ByteRange>,
    ) {
        for owner in self.owners_of(host).collect::<Vec<_>>() {
            freed.requests += self.unblock_where(owner, |of, blocked| meant(of, blocked.nsm_state));
            for file in self.ranges.files_of(owner).collect::<Vec<_>>() {
                for held in self.ranges.own(file, owner, ByteRange::ALL) {
                    if meant(file, held.held.nsm_state) {
                        if buried {
                            self.bury(host, &held);
                        }
                        self.end_lock(host, &held, freed, ranges);
                    }
                }
            }
            for (file, share) in self.shares_by(owner) {
                if meant(file, share.nsm_state) {
                    freed.shares += 1;
                    self.end_share(host, file, owner);
                    self.release_file(file);
                }
            }
            self.release_owner(owner);
        }
    }

    /// Remembers that a lock ended without its owner's doing.
    fn bury(&mut self, host: HostNo, held: &HeldRange) {
        let key = self.owners.key(held.owner.0);
        let both = key.cloned().zip(self.files.key(held.file.0).cloned());
        if let Some((key, file)) = both {
            let tombstone = Tombstone {
                file,
                owner: key.owner,
                range: held.range,
            };
            self.update_host(host, |record| record.bury(tombstone));
        }
    }

    fn end_lock(
        &mut self,
        host: HostNo,
        held: &HeldRange,
        freed: &mut Freed,
        ranges: &mut BTreeMap<FileNo, ByteRange>,
    ) {
        let (file, owner, range) = (held.file, held.owner, held.range);
        freed.locks += 1;
        self.settle(file, owner, range);
        self.change(host, file, |ranges| ranges.clear(file, owner, range));
        // In one piece for each file, so that those who wait stay in line.
        ranges
            .entry(file)
            .and_modify(|all| *all = all.join(range))
            .or_insert(range);
    }

    fn grant_in(&mut self, ranges: BTreeMap<FileNo, ByteRange>, stamp: Stamp) {
        for (file, range) in ranges {
            self.grant_waiters(file, range, stamp);
            self.release_file(file);
        }
    }
}
