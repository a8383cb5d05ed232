//! The hosts, owners and files that the lock table refers to: each is entered when something first
//! needs it, within the limits, and forgotten when nothing does any more.
//!
//! A host stays as long as there is room, since its last calls are remembered with it; when there
//! is none, the one that has had nothing for longest gives way; one that has lost locks without its
//! doing only if there is no other, since it is to be denied them.

use std::net::{IpAddr, Ipv4Addr};

use crate::host::{HostKey, HostRecord, IdleOrder};
use crate::keys::{FileKey, FileNo, HostNo, LockOwner, OwnerKey, OwnerNo};
use crate::limits::Limit;
use crate::table::LockTable;
use crate::waiting::BlockedNo;

impl LockTable {
    pub(crate) fn enter_host(&mut self, host: &HostKey) -> Result<HostNo, Limit> {
        if let Some(number) = self.hosts.number(host) {
            return Ok(HostNo(number));
        }
        let behind = self.hosts_behind(host.address);
        if let Some(limit) = self.limits.reached(Limit::HostsPerAddress, behind.len()) {
            let idle = behind.into_iter().filter_map(|host| {
                let record = self.hosts.value(host.0)?;
                record.is_idle().then_some((record.idle_order(), host))
            });
            self.forget_host(idle.min().ok_or(limit)?);
        }
        while let Some(limit) = self.limits.reached(Limit::Hosts, self.hosts.len()) {
            // The one that has been idle longest gives way, of those that have lost no lock.
            self.forget_host(self.idle_hosts.get_min().copied().ok_or(limit)?);
        }
        let bytes = host.caller_name.len() as u32;
        self.must_have_room(bytes)?;
        let number = HostNo(self.hosts.enter(host, HostRecord::default));
        self.count_name(number, bytes);
        self.idle_hosts.insert(((false, 0), number));
        Ok(number)
    }

    fn forget_host(&mut self, idle: (IdleOrder, HostNo)) {
        self.idle_hosts.remove(&idle);
        let record = self.hosts.value(idle.1.0);
        self.name_bytes -= record.map_or(0, |record| u64::from(record.name_bytes));
        self.hosts.remove(idle.1.0);
    }

    /// The number of an owner, which is given one if there is room for its name.
    pub(crate) fn enter_owner(&mut self, host: HostNo, owner: LockOwner) -> Result<OwnerNo, Limit> {
        let bytes = owner.oh.len() as u32;
        let key = OwnerKey { host, owner };
        if let Some(number) = self.owners.number(&key) {
            return Ok(OwnerNo(number));
        }
        let of_host = self.hosts.value(host.0).map_or(0, |host| host.name_bytes);
        if of_host.saturating_add(bytes) > self.limits.get(Limit::NameBytesPerHost) {
            return Err(Limit::NameBytesPerHost);
        }
        self.must_have_room(bytes)?;
        let number = OwnerNo(self.owners.enter(&key, || ()));
        self.count_name(host, bytes);
        Ok(number)
    }

    fn must_have_room(&self, bytes: u32) -> Result<(), Limit> {
        let limit = Limit::NameBytes;
        let fits = self.name_bytes + u64::from(bytes) <= u64::from(self.limits.get(limit));
        fits.then_some(()).ok_or(limit)
    }

    /// Counts the name of a host, or of an owner of it.
    pub(crate) fn count_name(&mut self, host: HostNo, bytes: u32) {
        self.name_bytes += u64::from(bytes);
        if let Some(record) = self.hosts.value_mut(host.0) {
            record.name_bytes += bytes;
        }
    }

    /// Forgets an owner that has nothing any more.
    pub(crate) fn release_owner(&mut self, owner: OwnerNo) {
        let waits = self
            .blocked_of
            .range((owner, FileNo(0), BlockedNo(0))..)
            .next()
            .is_some_and(|(of, ..)| *of == owner);
        let shares = !self.shares_by(owner).is_empty();
        if waits || shares || self.ranges.files_of(owner).next().is_some() {
            return;
        }
        if let Some(key) = self.owners.key(owner.0) {
            let (host, bytes) = (key.host, key.owner.oh.len() as u32);
            self.name_bytes -= u64::from(bytes);
            if let Some(record) = self.hosts.value_mut(host.0) {
                record.name_bytes -= bytes;
            }
            self.owners.remove(owner.0);
        }
    }

    /// Forgets a file that nothing refers to any more.
    pub(crate) fn release_file(&mut self, file: FileNo) {
        let waited_for = self.waiting_for(file).next().is_some();
        let shared = self.shares_on(file).next().is_some();
        if !waited_for && !shared && self.ranges.count_on(file) == 0 {
            self.files.remove(file.0);
        }
    }

    /// The numbers of an owner and of a file, if the table has both.
    pub(crate) fn known(
        &self,
        host: HostNo,
        owner: &LockOwner,
        file: &FileKey,
    ) -> Option<(OwnerNo, FileNo)> {
        let owner = owner.clone();
        let owner = self.owners.number(&OwnerKey { host, owner })?;
        Some((OwnerNo(owner), FileNo(self.files.number(file)?)))
    }

    /// The same of a host that may not be known.
    pub(crate) fn known_to(
        &self,
        host: &HostKey,
        owner: &LockOwner,
        file: &FileKey,
    ) -> Option<(OwnerNo, FileNo)> {
        self.known(HostNo(self.hosts.number(host)?), owner, file)
    }

    /// Whether any host behind an address is known.
    pub fn has_host_at(&self, address: IpAddr) -> bool {
        !self.hosts_behind(address).is_empty()
    }

    /// The hosts behind an address.
    pub(crate) fn hosts_behind(&self, address: IpAddr) -> Vec<HostNo> {
        let first = HostKey {
            address,
            service_address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            caller_name: Box::default(),
        };
        let behind = |number: &u32| {
            let key = self.hosts.key(*number);
            key.is_some_and(|key| key.address == address)
        };
        self.hosts
            .numbers_in(first..)
            .take_while(behind)
            .map(HostNo)
            .collect()
    }

    /// The owners of a host that hold or wait for something.
    pub(crate) fn owners_of(&self, host: HostNo) -> impl Iterator<Item = OwnerNo> {
        let first = |host| OwnerKey {
            host,
            owner: LockOwner {
                svid: i32::MIN,
                oh: Box::default(),
            },
        };
        // No host has the highest number: there are far fewer of them.
        let next = HostNo(host.0.saturating_add(1));
        self.owners
            .numbers_in(first(host)..first(next))
            .map(OwnerNo)
    }

    /// The host of an owner.
    pub(crate) fn host_of(&self, owner: OwnerNo) -> Option<HostNo> {
        self.owners.key(owner.0).map(|key| key.host)
    }
}
