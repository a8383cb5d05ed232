//! What makes locks suspect, what does not, and that nothing of it ends a lock; and the bounds on
//! the bytes of names.

use super::LockOutcome::{Denied, Granted, TooMany};
use super::*;
use crate::suspicion::{Suspicion, Suspicions};

/// A table, and a count of calls that makes each a new one.
#[derive(Default)]
struct Scene {
    table: LockTable,
    calls: u64,
}

impl Scene {
    fn lock(&mut self, host: &HostKey, first: u64, nsm_state: i32) -> LockOutcome {
        self.calls += 1;
        let mut asked = request(1, 1, range(first, first + 9), true, false);
        asked.nsm_state = nsm_state;
        self.table.lock(host, CallDigest(self.calls), &asked, STAMP)
    }

    fn unlock(&mut self, host: &HostKey, first: u64) {
        self.calls += 1;
        let (call, range) = (CallDigest(self.calls), range(first, first + 9));
        self.table
            .unlock(host, call, &file(1), &owner(1), range, STAMP);
    }

    /// First byte and suspicion of all locks.
    fn suspicions(&self) -> Vec<(u64, Option<Suspicion>)> {
        let entries = self.table.held_entries();
        let mut all: Vec<_> = entries
            .map(|held| (held.lock.range.start(), held.suspicion))
            .collect();
        all.sort_by_key(|(first, _)| *first);
        check(&self.table);
        all
    }
}

/// The same machine under another address.
fn moved(host: &HostKey) -> HostKey {
    HostKey {
        address: IpAddr::from([10, 9, 9, 9]),
        ..host.clone()
    }
}

#[test]
fn a_raised_state_makes_older_locks_suspect() {
    let mut scene = Scene::default();
    for (state, first) in [(5, 0), (7, 100), (0, 200)] {
        assert_eq!(scene.lock(&host(1), first, state), Granted);
    }
    let older = Some(Suspicion::OlderLife);
    assert_eq!(scene.suspicions(), [(0, older), (100, None), (200, None)]);
    assert_eq!(scene.table.suspicions().older_life, 1);
    // The owner takes it again: it is of this life now.
    assert_eq!(scene.lock(&host(1), 0, 7), Granted);
    assert_eq!(scene.suspicions()[0], (0, None));
}

#[test]
fn a_lower_or_even_state_and_other_hosts_say_nothing() {
    let mut scene = Scene::default();
    scene.lock(&host(1), 0, 5);
    for state in [3, 6] {
        scene.lock(&host(1), 100, state);
        assert_eq!(scene.suspicions()[0], (0, None), "{state}");
    }
    scene.lock(&host(2), 200, 9);
    let renamed = HostKey {
        caller_name: Box::from(*b"other"),
        ..host(1)
    };
    scene.lock(&renamed, 300, 9);
    assert!(scene.suspicions().iter().all(|(_, why)| why.is_none()));
    assert_eq!(scene.table.suspicions(), Suspicions::default());
}

#[test]
fn an_owner_with_another_address_makes_its_old_lock_suspect() {
    let other_address = Some(Suspicion::OtherAddress);
    let mut scene = Scene::default();
    scene.lock(&host(1), 0, 0);
    scene.lock(&host(1), 100, 0);
    // Its UNLOCK finds nothing under the new address, its LOCK meets itself.
    scene.unlock(&moved(&host(1)), 0);
    assert_eq!(scene.suspicions(), [(0, other_address), (100, None)]);
    assert_eq!(scene.lock(&moved(&host(1)), 100, 0), Denied);
    assert_eq!(scene.suspicions()[1], (100, other_address));
    assert_eq!(scene.table.suspicions().other_address, 2);
    // It is not counted again, and the owner itself clears the mark.
    scene.unlock(&moved(&host(1)), 0);
    scene.lock(&host(1), 0, 0);
    assert_eq!(scene.suspicions()[0], (0, None));
    assert_eq!(scene.table.suspicions().other_address, 2);
}

#[test]
fn somebody_else_at_another_address_makes_nothing_suspect() {
    let mut scene = Scene::default();
    scene.lock(&host(1), 0, 0);
    scene.unlock(&host(2), 0);
    assert_eq!(scene.lock(&host(2), 0, 0), Denied);
    // Another name of the service, but the same host and owner: it may well hold both.
    let elsewhere = HostKey {
        service_address: IpAddr::from([10, 0, 0, 101]),
        ..host(1)
    };
    assert_eq!(scene.lock(&elsewhere, 0, 0), Denied);
    assert_eq!(scene.suspicions(), [(0, None)]);
}

#[test]
fn a_notice_that_is_not_believed_ends_nothing_however_often_it_comes() {
    let all = |names: &[&[u8]]| names.iter().map(|name| name.to_vec()).collect();
    let mut scene = Scene::default();
    scene.lock(&host(1), 0, 5);
    scene.lock(&host(1), 100, 7);
    scene.lock(&host(2), 200, 5);
    assert_eq!(scene.table.doubt(host(1).address, 7, all, STAMP), 1);
    let since = STAMP.now;
    let doubtful = Some(Suspicion::DoubtfulNotice { since });
    assert_eq!(
        scene.suspicions(),
        [(0, doubtful), (100, None), (200, None)]
    );
    // Copies of it are no news, whatever became of the connection meanwhile.
    assert_eq!(scene.table.doubt(host(1).address, 7, all, STAMP), 0);
    assert_eq!(reboot(&mut scene.table, 1, 7), Freed::default());
    assert_eq!(scene.table.suspicions().doubtful_notice, 1);
    // Another one is, and here it is believed.
    assert_eq!(reboot(&mut scene.table, 1, 9).locks, 2);
    assert_eq!(scene.suspicions(), [(200, None)]);
    assert_eq!(scene.table.doubt(host(1).address, 9, all, STAMP), 0);
    assert_eq!(scene.table.doubt(host(3).address, 7, all, STAMP), 0);
}

#[test]
fn a_host_that_expired_is_told_nothing_more_and_reclaims_nothing() {
    let mut scene = Scene::default();
    scene.lock(&host(1), 0, 5);
    scene.lock(&host(2), 100, 5);
    assert_eq!(scene.table.expire(host(1).address, STAMP).locks, 1);
    let told: Vec<&HostKey> = scene.table.monitored_hosts(true).collect();
    assert_eq!(told, [&host(2)]);
    let mut again = request(1, 1, range(0, 9), true, false);
    again.reclaim = true;
    let call = CallDigest(100);
    assert_eq!(scene.table.lock(&host(1), call, &again, STAMP), Denied);
    // It was not gone after all.
    assert_eq!(scene.lock(&host(1), 0, 5), Granted);
    assert_eq!(scene.table.monitored_hosts(true).count(), 2);
}

#[test]
fn names_take_only_so_many_bytes() {
    let mut scene = Scene::default();
    let mut limits = *scene.table.limits();
    let name_bytes = host(1).caller_name.len() + owner(1).oh.len();
    limits.set(Limit::NameBytesPerHost, name_bytes as u32);
    scene.table.set_limits(limits);
    assert_eq!(scene.lock(&host(1), 0, 0), Granted);
    let second = request(1, 2, range(100, 109), true, false);
    let limit = TooMany(Limit::NameBytesPerHost);
    let call = CallDigest(100);
    assert_eq!(scene.table.lock(&host(1), call, &second, STAMP), limit);
    assert_eq!(scene.suspicions(), [(0, None)]);
    // What is given back makes room.
    scene.unlock(&host(1), 0);
    assert_eq!(scene.table.lock(&host(1), call, &second, STAMP), Granted);

    limits.set(Limit::NameBytes, name_bytes as u32);
    scene.table.set_limits(limits);
    assert_eq!(scene.lock(&host(2), 0, 0), TooMany(Limit::NameBytes));
    assert_eq!(scene.suspicions(), [(100, None)]);
}

/// A host may set anew what it has, also where there is no room for more.
#[test]
fn a_limit_takes_nothing_away() {
    const GRACE: Stamp = Stamp {
        epoch: 2,
        now: 200,
        in_grace: true,
    };
    let mut scene = Scene::default();
    for first in [0, 100] {
        assert_eq!(scene.lock(&host(1), first, 0), Granted);
    }
    let mut limits = *scene.table.limits();
    limits.set(Limit::LocksPerHost, 1);
    scene.table.set_limits(limits);
    let limit = TooMany(Limit::LocksPerHost);
    assert_eq!(scene.lock(&host(1), 200, 0), limit);
    let mut asked = request(1, 1, range(0, 9), false, false);
    let downgraded = scene.table.lock(&host(1), CallDigest(50), &asked, STAMP);
    assert_eq!(downgraded, Granted);
    // A part of it would be one more.
    asked = request(1, 1, range(102, 103), false, false);
    assert_eq!(
        scene.table.lock(&host(1), CallDigest(51), &asked, STAMP),
        limit
    );
    // Reclaims in grace renew what is there, and so it does not lapse.
    for (call, first, exclusive) in [(60, 0, false), (61, 100, true)] {
        asked = request(1, 1, range(first, first + 9), exclusive, false);
        asked.reclaim = true;
        let outcome = scene.table.lock(&host(1), CallDigest(call), &asked, GRACE);
        assert_eq!(outcome, Granted);
    }
    assert_eq!(scene.table.lapse(2, GRACE).locks, 0);
    check(&scene.table);
}
