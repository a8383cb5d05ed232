//! The lock table against a model that keeps a flag for every byte, and the crossings as stories.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod deadlock;
mod lost;
mod model;
mod stories;
mod suspicions;

use std::net::IpAddr;

use super::*;
use crate::ending::Freed;
use crate::wire_v3::NlmVersion;

pub(super) const STAMP: Stamp = Stamp {
    epoch: 1,
    now: 100,
    in_grace: false,
};

pub(super) fn host(number: u8) -> HostKey {
    HostKey {
        service_address: IpAddr::from([10, 0, 0, 100]),
        address: IpAddr::from([10, 0, 0, number]),
        caller_name: format!("c{number}").into_bytes().into(),
    }
}

pub(super) fn owner(svid: i32) -> LockOwner {
    LockOwner {
        svid,
        oh: format!("{svid}@host").into_bytes().into(),
    }
}

pub(super) fn file(number: u8) -> FileKey {
    FileKey(Box::new([number; 12]))
}

pub(super) fn callback() -> Callback {
    Callback {
        version: NlmVersion::V4,
        udp: false,
        fh: Box::new([1; 20]),
        l_offset: 0,
        l_len: 0,
    }
}

pub(super) fn request(
    file_number: u8,
    svid: i32,
    range: ByteRange,
    exclusive: bool,
    blocking: bool,
) -> LockRequest {
    LockRequest {
        file: file(file_number),
        owner: owner(svid),
        range,
        exclusive,
        callback: blocking.then(callback),
        nsm_state: 0,
        monitored: true,
        reclaim: false,
    }
}

/// A notice from a host; all names behind its address are meant.
pub(super) fn reboot(table: &mut LockTable, number: u8, state: i32) -> Freed {
    reboot_in(table, number, state, STAMP)
}

pub(super) fn reboot_in(table: &mut LockTable, number: u8, state: i32, stamp: Stamp) -> Freed {
    let all = |names: &[&[u8]]| names.iter().map(|name| name.to_vec()).collect();
    table.rebooted(host(number).address, state, all, stamp)
}

pub(super) fn range(start: u64, last: u64) -> ByteRange {
    ByteRange::new(start, last).unwrap()
}

/// What must hold in every table, whatever was done to it.
pub(super) fn check(table: &LockTable) {
    let all: Vec<HeldRange> = table.locks().collect();
    for (at, one) in all.iter().enumerate() {
        for other in &all[at + 1..] {
            let conflict = one.file == other.file
                && one.range.overlaps(other.range)
                && (one.owner == other.owner || one.held.exclusive || other.held.exclusive);
            assert!(!conflict, "{one:?} and {other:?}");
        }
    }
    for (number, key, record) in table.hosts.iter() {
        let owners: Vec<OwnerNo> = table.owners_of(HostNo(number)).collect();
        let held = all.iter().filter(|held| owners.contains(&held.owner));
        let blocked = table.blocked.values();
        let blocked = blocked.filter(|blocked| owners.contains(&blocked.owner));
        let shares = table
            .shares
            .keys()
            .filter(|(_, owner)| owners.contains(owner));
        assert_eq!(record.held as usize, held.count() + shares.count(), "{key}");
        assert_eq!(record.blocked as usize, blocked.count(), "{key}");
        let idle = table
            .idle_hosts
            .contains(&(record.idle_order(), HostNo(number)));
        assert_eq!(idle, record.is_idle(), "{key}");
    }
    assert!(table.idle_hosts.len() <= table.hosts.len());
    let names = table.hosts.iter().map(|(_, key, _)| key.caller_name.len());
    let owners = table.owners.iter().map(|(_, key, ())| key.owner.oh.len());
    let bytes: usize = names.chain(owners).sum();
    assert_eq!(table.name_bytes, bytes as u64);
    let of_hosts = table.hosts.iter().map(|(_, _, host)| host.name_bytes);
    assert_eq!(of_hosts.sum::<u32>() as usize, bytes);
    assert_eq!(table.blocked.len(), table.blocked_of.len());
    for (number, _, ()) in table.owners.iter() {
        let owner = OwnerNo(number);
        let used = all.iter().any(|held| held.owner == owner)
            || table.blocked.values().any(|blocked| blocked.owner == owner)
            || !table.shares_by(owner).is_empty();
        assert!(used, "an owner without anything");
    }
    for (number, _, ()) in table.files.iter() {
        let file = FileNo(number);
        let used = all.iter().any(|held| held.file == file)
            || table.blocked.keys().any(|(of, _)| *of == file)
            || table.shares_on(file).next().is_some();
        assert!(used, "a file without anything");
    }
    for (file, no) in table.blocked.keys() {
        let blocked = table.blocked.get(&(*file, *no)).unwrap();
        let conflict =
            table
                .ranges
                .conflict(*file, Some(blocked.owner), blocked.range, blocked.exclusive);
        assert!(conflict.is_some(), "a request waits for nothing");
    }
    for (id, grant) in &table.grants {
        let marked = all.iter().any(|held| {
            held.held.grant == Some(*id) && (held.file, held.owner) == (grant.file, grant.owner)
        });
        assert!(marked, "a grant without a lock");
    }
    // Numbers are given again: what refers to one must be gone before it is.
    let held = all.iter().map(|held| (held.owner, held.file));
    let blocked = table.blocked.iter();
    let blocked = blocked.map(|((file, _), blocked)| (blocked.owner, *file));
    let shares = table.shares.keys().map(|(file, owner)| (*owner, *file));
    for (owner, file) in held.chain(blocked).chain(shares) {
        assert!(table.files.key(file.0).is_some(), "a file that is gone");
        let host = table.host_of(owner).unwrap();
        assert!(table.hosts.key(host.0).is_some(), "a host that is gone");
    }
    for (_, key, ()) in table.owners.iter() {
        let host = table.hosts.key(key.host.0);
        assert!(host.is_some(), "a host that is gone");
    }
    let mut copy = LockTable::default();
    for record in table.records() {
        copy.restore(record).unwrap();
    }
    copy.restored().unwrap();
    assert_eq!(copy, *table, "a snapshot restores the table");
    assert_eq!(copy.idle_hosts, table.idle_hosts);
    assert_eq!(copy.blocked_of, table.blocked_of);
    assert_eq!(copy.shares_of, table.shares_of);
}
