//! The lock table as a sequence of records, for snapshots: one record a row, each of which refers
//! only to earlier ones.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::host::{HostKey, HostRecord};
use crate::keys::{FileKey, FileNo, HostNo, OwnerKey, OwnerNo};
use crate::limits::Limits;
use crate::range_set::{GrantId, HeldRange};
use crate::share::Share;
use crate::suspicion::Suspicions;
use crate::table::LockTable;
use crate::waiting::{Blocked, BlockedNo, Grant};

/// One row of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record(Row);

/// New kinds are added at the end, since their order is their number in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Row {
    Counts(Counts),
    Host(u32, HostKey, HostRecord),
    Owner(u32, OwnerKey),
    File(u32, FileKey),
    Held(HeldRange),
    Blocked(FileNo, BlockedNo, Blocked),
    Grant(GrantId, Grant),
    Share(FileNo, OwnerNo, Share),
    Limits(Limits),
    Refused(IpAddr, Option<FileKey>),
    Lenient,
    /// See [`HostRecord`]: more of its locks ended than are remembered.
    LostMore(HostNo),
}

/// How many there were so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Counts {
    calls: u64,
    blocked: u64,
    grant: u64,
    suspicions: Suspicions,
}

/// No table has so many of anything; a larger number is none that was written.
const NUMBERS_MAX: u32 = 1 << 24;

/// A record that refers to something that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inconsistent;

impl LockTable {
    /// The whole table, row by row.
    pub fn records(&self) -> impl Iterator<Item = Record> {
        let counts = Counts {
            calls: self.calls,
            blocked: self.last_blocked,
            grant: self.last_grant,
            suspicions: self.suspicions,
        };
        let refused = self.refused.iter();
        let lost_more = self.hosts.iter().filter(|(.., host)| host.lost_more);
        let hosts = self.hosts.iter();
        let owners = self.owners.iter();
        let files = self.files.iter();
        let blocked = self.blocked.iter();
        let shares = self.shares.iter();
        std::iter::once(Row::Counts(counts))
            .chain(
                hosts.map(|(number, key, record)| Row::Host(number, key.clone(), record.clone())),
            )
            .chain(owners.map(|(number, key, ())| Row::Owner(number, key.clone())))
            .chain(files.map(|(number, key, ())| Row::File(number, key.clone())))
            .chain(self.ranges.iter().map(Row::Held))
            .chain(blocked.map(|((file, no), row)| Row::Blocked(*file, *no, row.clone())))
            .chain(
                self.grants
                    .iter()
                    .map(|(id, row)| Row::Grant(*id, row.clone())),
            )
            .chain(shares.map(|((file, owner), share)| Row::Share(*file, *owner, *share)))
            .chain(std::iter::once(Row::Limits(self.limits)))
            .chain(refused.map(|(address, file)| Row::Refused(*address, file.clone())))
            .chain(self.lenient.then_some(Row::Lenient))
            .chain(lost_more.map(|(number, ..)| Row::LostMore(HostNo(number))))
            .map(Record)
    }

    /// Puts a row back; rows come in the order of [`LockTable::records`], and
    /// [`LockTable::restored`] after the last one.
    ///
    /// # Errors
    /// The row refers to a host, owner or file that no earlier row holds, or its lock conflicts
    /// with an earlier one, or its number is none that a table gives: the snapshot is not what was
    /// written.
    pub fn restore(&mut self, record: Record) -> Result<(), Inconsistent> {
        let known = |owner: OwnerNo, file: FileNo| {
            let both = self.owners.key(owner.0).is_some() && self.files.key(file.0).is_some();
            both.then_some(()).ok_or(Inconsistent)
        };
        if let Row::Host(number, ..) | Row::Owner(number, ..) | Row::File(number, ..) = &record.0
            && *number >= NUMBERS_MAX
        {
            return Err(Inconsistent);
        }
        match record.0 {
            Row::Counts(counts) => {
                self.calls = counts.calls;
                self.last_blocked = counts.blocked;
                self.last_grant = counts.grant;
                self.suspicions = counts.suspicions;
            }
            Row::Limits(limits) => self.limits = limits,
            Row::Lenient => self.lenient = true,
            Row::LostMore(host) => {
                self.hosts.key(host.0).ok_or(Inconsistent)?;
                self.update_host(host, |record| record.lost_more = true);
            }
            Row::Refused(address, file) => {
                self.refused.insert((address, file));
            }
            Row::Host(number, key, record) => {
                let idle = record
                    .is_idle()
                    .then_some((record.idle_order(), HostNo(number)));
                let bytes = key.caller_name.len() as u32;
                let record = HostRecord {
                    name_bytes: 0,
                    ..record
                };
                if !self.hosts.restore(number, key, record) {
                    return Err(Inconsistent);
                }
                self.count_name(HostNo(number), bytes);
                self.idle_hosts.extend(idle);
            }
            Row::Owner(number, key) => {
                self.hosts.key(key.host.0).ok_or(Inconsistent)?;
                self.count_name(key.host, key.owner.oh.len() as u32);
                if !self.owners.restore(number, key, ()) {
                    return Err(Inconsistent);
                }
            }
            Row::File(number, key) => {
                if !self.files.restore(number, key, ()) {
                    return Err(Inconsistent);
                }
            }
            Row::Held(held) => {
                known(held.owner, held.file)?;
                if !self.ranges.restore(&held) {
                    return Err(Inconsistent);
                }
            }
            Row::Blocked(file, no, blocked) => {
                known(blocked.owner, file)?;
                self.blocked_of.insert((blocked.owner, file, no));
                self.blocked.insert((file, no), blocked);
            }
            Row::Grant(id, grant) => {
                known(grant.owner, grant.file)?;
                self.grants.insert(id, grant);
            }
            Row::Share(file, owner, share) => {
                known(owner, file)?;
                self.shares_of.insert((owner, file));
                self.shares.insert((file, owner), share);
            }
        }
        Ok(())
    }

    /// Makes a table that can be used of the rows that were put back.
    ///
    /// # Errors
    /// A host, owner or file came twice.
    pub fn restored(&mut self) -> Result<(), Inconsistent> {
        let unique = [self.hosts.index(), self.owners.index(), self.files.index()];
        let is_table = unique.into_iter().all(|unique| unique);
        is_table.then_some(()).ok_or(Inconsistent)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::keys::LockOwner;
    use crate::range::ByteRange;
    use crate::range_set::Held;

    #[test]
    fn ranges_in_any_order_are_put_back_and_a_conflict_is_refused() {
        let mut table = LockTable::default();
        let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let key = HostKey {
            address,
            service_address: address,
            caller_name: Box::default(),
        };
        let rows = std::iter::once(Row::Host(0, key, HostRecord::default()));
        let owners = (0..2).map(|svid| {
            let owner = LockOwner {
                svid: svid as i32,
                oh: Box::default(),
            };
            let host = HostNo(0);
            Row::Owner(svid, OwnerKey { host, owner })
        });
        let files = (0..2).map(|file| Row::File(file, FileKey(Box::from([file as u8]))));
        for row in rows.chain(owners).chain(files) {
            assert_eq!(table.restore(Record(row)), Ok(()));
        }
        let held = |file, owner, start: u64, last: u64| {
            let held = Held {
                last,
                grant: None,
                since: 0,
                epoch: 1,
                nsm_state: 0,
                exclusive: true,
                suspect: false,
            };
            Record(Row::Held(HeldRange {
                file: FileNo(file),
                owner: OwnerNo(owner),
                range: ByteRange::new(start, last).unwrap_or(ByteRange::ALL),
                held,
            }))
        };
        assert_eq!(table.restore(held(1, 0, 0, 9)), Ok(()));
        assert_eq!(table.restore(held(1, 1, 9, 9)), Err(Inconsistent));
        assert_eq!(table.restore(held(1, 1, 10, 19)), Ok(()));
        // Of a file that stands before the last one.
        assert_eq!(table.restore(held(0, 0, 0, 9)), Ok(()));
        assert_eq!(table.restore(held(0, 1, 0, 0)), Err(Inconsistent));
        assert_eq!(table.restore(held(1, 0, 19, 30)), Err(Inconsistent));
        assert_eq!(table.lock_count(), 3);
    }

    #[test]
    fn what_no_table_writes_is_refused() {
        let file = || FileKey(Box::from(*b"file"));
        let mut table = LockTable::default();
        let with_number = |number| Record(Row::File(number, file()));
        assert_eq!(table.restore(with_number(NUMBERS_MAX)), Err(Inconsistent));
        assert_eq!(table, LockTable::default());
        assert_eq!(table.restore(with_number(0)), Ok(()));
        assert_eq!(table.restored(), Ok(()));
        assert_eq!(table.restore(with_number(1)), Ok(()));
        assert_eq!(table.restored(), Err(Inconsistent));
    }
}
