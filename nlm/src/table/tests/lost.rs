//! Locks that ended without their owner's doing, when there are more of them than are remembered.

use super::*;
use crate::host::TOMBSTONES_MAX;
use crate::limits::Limit;
use LockOutcome::{Denied, Granted};

#[derive(Default)]
struct Calls(u64);

impl Calls {
    fn lock(&mut self, table: &mut LockTable, number: u8, at: u64, reclaim: bool) -> LockOutcome {
        self.0 += 1;
        let mut asked = request(1, 1, range(2 * at, 2 * at), true, false);
        asked.reclaim = reclaim;
        table.lock(&host(number), CallDigest(self.0), &asked, STAMP)
    }

    fn unlock(&mut self, table: &mut LockTable, number: u8) {
        self.0 += 1;
        let (call, all) = (CallDigest(self.0), ByteRange::ALL);
        table.unlock(&host(number), call, &file(1), &owner(1), all, STAMP);
    }
}

/// A host has some locks broken; others had the bytes since.
fn broken(count: usize) -> (LockTable, Calls) {
    let (mut table, mut calls) = (LockTable::default(), Calls::default());
    table.set_lenient(true);
    for at in 0..count as u64 {
        assert_eq!(calls.lock(&mut table, 1, at, false), Granted);
    }
    let freed = table.break_locks(host(1).address, None, STAMP);
    assert_eq!(freed.locks, count);
    (table, calls)
}

#[test]
fn none_of_many_broken_locks_is_reclaimed_before_the_host_reboots() {
    let count = TOMBSTONES_MAX + 3;
    let (mut table, mut calls) = broken(count);
    check(&table);
    for at in [0, 2, 3, count as u64 - 1, count as u64 + 5] {
        assert_eq!(calls.lock(&mut table, 1, at, true), Denied, "{at}");
    }
    // By right, and then known.
    assert_eq!(calls.lock(&mut table, 1, 0, false), Granted);
    assert_eq!(calls.lock(&mut table, 1, 0, true), Granted);
    assert_eq!(calls.lock(&mut table, 1, 1, true), Denied);
    reboot(&mut table, 1, 7);
    assert_eq!(calls.lock(&mut table, 1, 1, true), Granted);
    check(&table);
}

#[test]
fn as_many_as_are_remembered_deny_nothing_else() {
    let (mut table, mut calls) = broken(TOMBSTONES_MAX);
    check(&table);
    assert_eq!(calls.lock(&mut table, 1, 0, true), Denied);
    let other = TOMBSTONES_MAX as u64 + 5;
    assert_eq!(calls.lock(&mut table, 1, other, true), Granted);
}

#[test]
fn a_host_that_has_lost_locks_gives_way_last() {
    let (mut table, mut calls) = broken(1);
    let mut limits = *table.limits();
    limits.set(Limit::Hosts, 2);
    table.set_limits(limits);
    for number in 2..5 {
        assert_eq!(calls.lock(&mut table, number, 0, false), Granted);
        calls.unlock(&mut table, number);
        check(&table);
    }
    assert_eq!(calls.lock(&mut table, 1, 0, true), Denied);
    // Where there is no other it does.
    assert_eq!(calls.lock(&mut table, 5, 0, false), Granted);
    assert_eq!(calls.lock(&mut table, 6, 9, false), Granted);
    assert!(!table.has_host_at(host(1).address));
}
