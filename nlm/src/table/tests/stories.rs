//! The crossings on the wire, each with its only right end.

use super::LockOutcome::{Blocked, Deadlock, Denied, Granted};
use super::*;
use crate::listing::HeldEntry;
use crate::share::{ShareModes, ShareRequest};
use crate::waiting::Delivery;

/// Only what is reclaimed is given.
const GRACE: Stamp = Stamp {
    epoch: 2,
    now: 200,
    in_grace: true,
};

/// A table and a count of calls, so that each call is a new one unless it says otherwise.
#[derive(Default)]
struct Scene {
    table: LockTable,
    calls: u64,
}

impl Scene {
    fn call(&mut self) -> CallDigest {
        self.calls += 1;
        CallDigest(self.calls)
    }

    fn lock(&mut self, number: u8, exclusive: bool, blocking: bool) -> LockOutcome {
        self.lock_range(number, range(0, 9), exclusive, blocking)
    }

    fn lock_range(
        &mut self,
        number: u8,
        range: ByteRange,
        exclusive: bool,
        blocking: bool,
    ) -> LockOutcome {
        let call = self.call();
        let request = request(1, 1, range, exclusive, blocking);
        let outcome = self.table.lock(&host(number), call, &request, STAMP);
        check(&self.table);
        outcome
    }

    fn unlock(&mut self, number: u8) -> CallDigest {
        let call = self.call();
        self.unlock_again(number, call);
        call
    }

    fn unlock_again(&mut self, number: u8, call: CallDigest) {
        let (host, file, owner) = (host(number), file(1), owner(1));
        self.table
            .unlock(&host, call, &file, &owner, range(0, 9), STAMP);
        check(&self.table);
    }

    fn cancel(&mut self, number: u8) -> bool {
        let (call, host, file, owner) = (self.call(), host(number), file(1), owner(1));
        let range = range(0, 9);
        let done = self
            .table
            .cancel(&host, call, &file, &owner, range, true, STAMP);
        check(&self.table);
        done
    }

    /// Whether the host holds anything.
    fn holds(&self, number: u8) -> bool {
        self.table.locks().any(|held| {
            let key = self.table.owners.key(held.owner.0).unwrap();
            *self.table.hosts.key(key.host.0).unwrap() == host(number)
        })
    }

    fn grant(&self) -> Option<Delivery> {
        self.table.deliveries(0).next()
    }
}

#[test]
fn the_first_in_line_gets_it_and_is_told() {
    let mut scene = Scene::default();
    assert_eq!(scene.lock(1, true, false), Granted);
    assert_eq!(scene.lock(2, true, true), Blocked);
    assert_eq!(scene.lock(3, true, true), Blocked);
    assert_eq!(scene.lock(2, true, true), Blocked, "keeps its place");
    scene.unlock(1);
    let grant = scene.grant().unwrap();
    assert_eq!(grant.host, host(2));
    assert!(scene.holds(2));
    assert_eq!(scene.lock(1, true, false), Denied);
    scene.table.confirm(grant.id);
    assert_eq!(scene.grant(), None);
    assert!(scene.holds(2));
}

#[test]
fn a_late_copy_of_an_unlock_does_not_release_the_newer_lock() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    let unlock = scene.unlock(1);
    assert_eq!(scene.lock(1, true, false), Granted);
    scene.unlock_again(1, unlock);
    assert!(scene.holds(1));
    assert_eq!(scene.lock(2, true, false), Denied);
}

#[test]
fn a_late_copy_of_a_lock_does_not_take_what_was_unlocked() {
    let mut scene = Scene::default();
    let call = CallDigest(1000);
    let asked = request(1, 1, range(0, 9), true, true);
    assert_eq!(scene.table.lock(&host(1), call, &asked, STAMP), Granted);
    scene.unlock(1);
    // Its answer is what it was, and nothing comes of it.
    assert_eq!(scene.table.lock(&host(1), call, &asked, STAMP), Granted);
    assert_eq!(scene.lock(2, true, false), Granted);
}

#[test]
fn a_late_copy_of_a_blocked_lock_says_how_things_stand() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    let call = CallDigest(1000);
    let asked = request(1, 1, range(0, 9), true, true);
    let again = |scene: &mut Scene| scene.table.lock(&host(2), call, &asked, STAMP);
    assert_eq!(again(&mut scene), Blocked);
    assert_eq!(again(&mut scene), Blocked);
    assert_eq!(scene.table.blocked.len(), 1);
    scene.unlock(1);
    assert_eq!(again(&mut scene), Granted, "it was granted meanwhile");
    scene.unlock(2);
    assert_eq!(again(&mut scene), Denied, "and unlocked");
    assert_eq!(scene.table.lock_count(), 0);
    assert_eq!(scene.table.blocked.len(), 0);
}

#[test]
fn cancel_and_granted_cross() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    scene.lock(2, true, true);
    scene.lock(3, true, true);
    scene.unlock(1);
    // The GRANTED to 2 is on its way when its CANCEL comes.
    assert!(scene.cancel(2));
    assert!(!scene.holds(2));
    assert!(scene.holds(3), "the next in line has it");
}

#[test]
fn a_cancelled_upgrade_stays_since_nobody_knows_what_the_owner_believes() {
    let mut scene = Scene::default();
    scene.lock(1, false, false);
    scene.lock(2, false, false);
    assert_eq!(scene.lock(2, true, true), Blocked);
    scene.unlock(1);
    assert!(scene.holds(2));
    assert!(!scene.cancel(2), "it is told that it holds a lock");
    assert!(scene.holds(2));
    assert_eq!(scene.grant(), None, "the owner knows now");
    scene.unlock(2);
    assert!(!scene.holds(2));
}

#[test]
fn a_polling_lock_confirms_a_grant() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    scene.lock(2, true, true);
    scene.unlock(1);
    let late = scene.grant().unwrap();
    assert_eq!(scene.lock(2, true, true), Granted);
    assert_eq!(scene.grant(), None);
    // A refusal that was under way names a grant that is no more.
    scene.table.refuse(late.id, true, STAMP);
    assert!(scene.holds(2));
}

#[test]
fn a_refusal_of_the_first_telling_releases_and_no_other_does() {
    for first in [true, false] {
        let mut scene = Scene::default();
        scene.lock(1, true, false);
        scene.lock(2, true, true);
        scene.lock(3, true, true);
        scene.unlock(1);
        let grant = scene.grant().unwrap();
        scene.table.refuse(grant.id, first, STAMP);
        assert_eq!(scene.holds(2), !first);
        assert_eq!(scene.holds(3), first);
        assert!(scene.grant().is_none_or(|grant| grant.host == host(3)));
    }
}

#[test]
fn a_refusal_releases_nothing_that_a_repeated_lock_was_told() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    let (call, asked) = (scene.call(), request(1, 1, range(0, 9), true, true));
    let lock = |scene: &mut Scene| scene.table.lock(&host(2), call, &asked, STAMP);
    assert_eq!(lock(&mut scene), Blocked);
    scene.unlock(1);
    let grant = scene.grant().unwrap();
    // GRANTED is on its way, and the call comes again: its answer may be heard first.
    assert_eq!(lock(&mut scene), Granted);
    scene.table.refuse(grant.id, true, STAMP);
    assert!(scene.holds(2));
    // If nobody heard it, the owner still waits, and may cancel.
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    assert_eq!(lock(&mut scene), Blocked);
    scene.unlock(1);
    assert_eq!(lock(&mut scene), Granted);
    assert!(scene.grant().is_some(), "it is still told");
    assert!(scene.cancel(2));
    assert!(!scene.holds(2));
}

#[test]
fn a_late_copy_of_a_notice_does_not_forget_the_calls_of_the_life_it_tells_of() {
    let mut scene = Scene::default();
    // The host was not known when the notice came first.
    assert_eq!(reboot(&mut scene.table, 1, 5), Freed::default());
    let (call, mut asked) = (scene.call(), request(1, 1, range(0, 9), true, false));
    asked.nsm_state = 5;
    let lock = |scene: &mut Scene| scene.table.lock(&host(1), call, &asked, STAMP);
    assert_eq!(lock(&mut scene), Granted);
    reboot(&mut scene.table, 1, 5);
    assert!(scene.holds(1));
    scene.unlock(1);
    // A copy, which takes nothing.
    assert_eq!(lock(&mut scene), Granted);
    assert!(!scene.holds(1));
    // A notice of another life is about a new one.
    reboot(&mut scene.table, 1, 7);
    assert_eq!(lock(&mut scene), Granted);
    assert!(scene.holds(1));
}

#[test]
fn an_answer_to_an_old_grant_does_not_touch_a_newer_lock() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    scene.lock(2, true, true);
    scene.unlock(1);
    let old = scene.grant().unwrap();
    scene.unlock(2);
    scene.lock(1, true, false);
    scene.lock(2, true, true);
    scene.unlock(1);
    let new = scene.grant().unwrap();
    assert_ne!(old.id, new.id);
    scene.table.refuse(old.id, true, STAMP);
    assert!(scene.holds(2));
    scene.table.confirm(old.id);
    assert_eq!(scene.grant().map(|grant| grant.id), Some(new.id));
}

#[test]
fn unlock_of_the_range_ends_the_request_for_it() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    scene.lock(2, true, true);
    scene.unlock(2);
    scene.unlock(1);
    assert_eq!(scene.table.lock_count(), 0);
}

#[test]
fn who_waits_for_each_other_is_told() {
    let mut scene = Scene::default();
    let (left, right) = (range(0, 4), range(5, 9));
    scene.lock_range(1, left, true, false);
    scene.lock_range(2, right, true, false);
    assert_eq!(scene.lock_range(1, right, true, true), Blocked);
    assert_eq!(scene.lock_range(2, left, true, true), Deadlock);
    assert_eq!(scene.lock_range(2, left, true, false), Denied);
    // A third one that holds nothing may wait.
    assert_eq!(scene.lock_range(3, left, true, true), Blocked);
}

#[test]
fn two_upgrades_of_one_range_are_a_deadlock() {
    let mut scene = Scene::default();
    scene.lock(1, false, false);
    scene.lock(2, false, false);
    assert_eq!(scene.lock(1, true, true), Blocked);
    assert_eq!(scene.lock(2, true, true), Deadlock);
}

#[test]
fn a_reboot_lets_waiters_in_and_keeps_what_was_taken_since() {
    let mut scene = Scene::default();
    let lock = |scene: &mut Scene, start, state| {
        let call = scene.call();
        let mut asked = request(1, 1, range(start, start + 9), true, false);
        asked.nsm_state = state;
        scene.table.lock(&host(1), call, &asked, STAMP)
    };
    assert_eq!(lock(&mut scene, 0, 5), Granted);
    assert_eq!(lock(&mut scene, 10, 7), Granted, "after its reboot");
    assert_eq!(scene.lock(2, true, true), Blocked);
    let freed = |locks, hosts| Freed {
        hosts,
        locks,
        ..Freed::default()
    };
    assert_eq!(reboot(&mut scene.table, 1, 7), freed(1, 1));
    check(&scene.table);
    assert_eq!(reboot(&mut scene.table, 1, 7), freed(0, 0), "said twice");
    assert!(scene.holds(2));
    assert_eq!(scene.lock_range(3, range(15, 15), true, false), Denied);
}

#[test]
fn what_lapsed_is_not_given_back_and_a_reboot_forgets_that() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    scene.lock(2, true, true);
    let next = Stamp { epoch: 2, ..STAMP };
    assert_eq!(scene.table.lapse(2, next).locks, 1);
    check(&scene.table);
    assert!(scene.holds(2), "who waited has it");
    scene.unlock(2);
    let reclaim = |scene: &mut Scene| {
        let call = scene.call();
        let mut asked = request(1, 1, range(3, 3), true, false);
        asked.reclaim = true;
        scene.table.lock(&host(1), call, &asked, GRACE)
    };
    assert_eq!(reclaim(&mut scene), Denied);
    reboot(&mut scene.table, 1, 9);
    assert_eq!(reclaim(&mut scene), Granted);
}

#[test]
fn a_reclaim_never_waits_and_never_beats_a_conflict() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    let call = scene.call();
    let mut asked = request(1, 1, range(0, 9), true, true);
    asked.reclaim = true;
    assert_eq!(scene.table.lock(&host(2), call, &asked, STAMP), Denied);
    assert!(scene.table.blocked.is_empty());
    assert_eq!(
        scene.table.holding(&host(1), &asked).map(|ids| ids.len()),
        Some(1)
    );
    assert_eq!(scene.table.holding(&host(2), &asked), None);
}

#[test]
fn a_notice_is_for_the_hosts_that_it_names() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    let call = scene.call();
    let twin = HostKey {
        caller_name: b"twin".as_slice().into(),
        ..host(1)
    };
    let asked = request(1, 1, range(20, 29), true, false);
    scene.table.lock(&twin, call, &asked, STAMP);
    let twin_only = |_: &[&[u8]]| vec![b"twin".to_vec()];
    let freed = scene.table.rebooted(host(1).address, 3, twin_only, STAMP);
    assert_eq!((freed.hosts, freed.locks), (1, 1));
    assert!(scene.holds(1));
    let freed = scene
        .table
        .free_all(host(1).address, b"c1", CallDigest(900), STAMP);
    assert_eq!(freed.locks, 1);
    assert!(!scene.holds(1));
}

#[test]
fn two_hosts_of_one_name_are_two() {
    let mut scene = Scene::default();
    let call = scene.call();
    let mut other = host(2);
    other.caller_name = host(1).caller_name;
    scene.lock(1, true, false);
    let asked = request(1, 1, range(0, 9), true, false);
    assert_eq!(scene.table.lock(&other, call, &asked, STAMP), Denied);
    let call = scene.call();
    let all = ByteRange::ALL;
    scene
        .table
        .unlock(&other, call, &file(1), &owner(1), all, STAMP);
    assert!(scene.holds(1));
}

#[test]
fn idle_hosts_give_way_to_new_ones_and_others_do_not() {
    let mut table = LockTable::default();
    let key = |number: usize| HostKey {
        address: IpAddr::from((number as u128).to_be_bytes()),
        ..host(1)
    };
    let call = CallDigest(1);
    for number in 0..Limit::Hosts.default_value() as usize {
        let mut asked = request(1, 1, range(0, 0), true, false);
        asked.file = FileKey(number.to_be_bytes().into());
        assert_eq!(table.lock(&key(number), call, &asked, STAMP), Granted);
    }
    let asked = request(1, 1, range(0, 0), true, false);
    let one_more = key(Limit::Hosts.default_value() as usize);
    assert_eq!(
        table.lock(&one_more, call, &asked, STAMP),
        LockOutcome::TooMany(Limit::Hosts)
    );
    let (first, all) = (FileKey(0usize.to_be_bytes().into()), ByteRange::ALL);
    table.unlock(&key(0), CallDigest(2), &first, &owner(1), all, STAMP);
    assert_eq!(table.lock(&one_more, call, &asked, STAMP), Granted);
    assert_eq!(table.hosts.number(&key(0)), None);
}

/// A share of a host: what it does and what it denies, by bits.
fn share(scene: &mut Scene, number: u8, access: u8, deny: u8) -> LockOutcome {
    let call = scene.call();
    let asked = ShareRequest {
        file: file(1),
        oh: b"opener".as_slice().into(),
        modes: ShareModes { deny, access },
        reclaim: false,
    };
    let outcome = scene.table.share(&host(number), call, &asked, STAMP);
    check(&scene.table);
    outcome
}

#[test]
fn shares_conflict_as_their_modes_say() {
    for access in 0..4 {
        for deny in 0..4 {
            for other_access in 0..4 {
                for other_deny in 0..4 {
                    let mut scene = Scene::default();
                    assert_eq!(share(&mut scene, 1, access, deny), Granted);
                    let conflict = access & other_deny != 0 || deny & other_access != 0;
                    let expected = if conflict { Denied } else { Granted };
                    assert_eq!(share(&mut scene, 2, other_access, other_deny), expected);
                    assert_eq!(share(&mut scene, 1, other_access, other_deny), {
                        // Its own is replaced, against what the other one has.
                        let other = !conflict && (other_access & other_deny) != 0;
                        if other { Denied } else { Granted }
                    });
                }
            }
        }
    }
}

#[test]
fn a_share_ends_by_unshare_and_by_a_reboot_and_does_not_touch_locks() {
    let mut scene = Scene::default();
    assert_eq!(share(&mut scene, 1, 3, 3), Granted);
    assert_eq!(
        scene.lock(2, true, false),
        Granted,
        "locks are another matter"
    );
    assert_eq!(share(&mut scene, 2, 1, 0), Denied);
    let call = scene.call();
    scene
        .table
        .unshare(&host(1), call, &file(1), b"somebody else");
    assert_eq!(scene.table.share_count(), 1);
    scene.table.unshare(&host(1), call, &file(1), b"opener");
    assert_eq!(scene.table.share_count(), 1, "a copy of an earlier call");
    let call = scene.call();
    scene.table.unshare(&host(1), call, &file(1), b"opener");
    check(&scene.table);
    assert_eq!(share(&mut scene, 2, 1, 2), Granted);
    let freed = reboot(&mut scene.table, 2, 9);
    assert_eq!((freed.locks, freed.shares), (1, 1));
    check(&scene.table);
    assert_eq!((scene.table.files.len(), scene.table.owners.len()), (0, 0));
}

#[test]
fn what_is_broken_is_not_given_back() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    scene.lock(2, true, true);
    scene.lock_range(1, range(50, 59), true, false);
    let (address, other) = (host(1).address, file(2));
    let freed = scene.table.break_locks(address, Some(&other), STAMP);
    assert_eq!(freed, Freed::default(), "of another file");
    let freed = scene.table.break_locks(address, Some(&file(1)), STAMP);
    assert_eq!((freed.hosts, freed.locks), (1, 2));
    check(&scene.table);
    assert!(scene.holds(2), "who waited has it");
    assert!(!scene.holds(1));
    let call = scene.call();
    let mut asked = request(1, 1, range(50, 59), true, false);
    asked.reclaim = true;
    assert_eq!(scene.table.lock(&host(1), call, &asked, GRACE), Denied);
    assert_eq!(
        scene.lock_range(1, range(50, 59), true, false),
        Granted,
        "anew"
    );
    let freed = scene.table.break_locks(host(2).address, None, STAMP);
    assert_eq!(freed.locks, 1);
}

#[test]
fn people_see_who_holds_and_who_waits() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    scene.lock(2, true, true);
    let held: Vec<HeldEntry<'_>> = scene.table.held_entries().collect();
    let [held] = held[..] else { panic!("{held:?}") };
    assert_eq!((held.lock.host, held.lock.since), (&host(1), STAMP.now));
    assert_eq!((held.unconfirmed, held.epoch), (false, STAMP.epoch));
    let waits: Vec<_> = scene.table.waiting_entries().collect();
    assert_eq!(waits.len(), 1);
    assert_eq!((waits[0].host, waits[0].range), (&host(2), range(0, 9)));
    let hosts: Vec<_> = scene
        .table
        .host_entries()
        .map(|host| host.waiting)
        .collect();
    assert_eq!(hosts, [0, 1]);
    scene.unlock(1);
    assert!(scene.table.held_entries().all(|held| held.unconfirmed));
}

#[test]
fn who_waits_is_not_served_while_grace_runs() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    scene.lock(2, true, true);
    let (call, file, owner) = (scene.call(), file(1), owner(1));
    // What the table says may be old: the bytes may be somebody's who has not reclaimed yet.
    let all = ByteRange::ALL;
    scene
        .table
        .unlock(&host(1), call, &file, &owner, all, GRACE);
    assert!(!scene.holds(2));
    let call = scene.call();
    let mut asked = request(1, 1, range(0, 9), true, false);
    asked.reclaim = true;
    assert_eq!(scene.table.lock(&host(3), call, &asked, GRACE), Granted);
    let after = Stamp {
        in_grace: false,
        ..GRACE
    };
    scene.table.lapse(2, after);
    check(&scene.table);
    assert!(scene.holds(3) && !scene.holds(2));
    let (call, all) = (scene.call(), ByteRange::ALL);
    scene
        .table
        .unlock(&host(3), call, &file, &owner, all, after);
    check(&scene.table);
    assert!(scene.holds(2));
}

#[test]
fn the_end_of_grace_serves_who_waited_for_what_was_unlocked() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    scene.lock(2, true, true);
    reboot_in(&mut scene.table, 1, 7, GRACE);
    assert!(!scene.holds(2));
    let after = Stamp {
        in_grace: false,
        ..GRACE
    };
    scene.table.lapse(2, after);
    check(&scene.table);
    assert!(scene.holds(2));
}

#[test]
fn a_reclaim_of_a_part_does_not_save_the_rest() {
    let mut scene = Scene::default();
    scene.lock_range(1, range(0, 99), true, false);
    let call = scene.call();
    let mut asked = request(1, 1, range(0, 9), true, false);
    asked.reclaim = true;
    assert_eq!(scene.table.lock(&host(1), call, &asked, GRACE), Granted);
    let after = Stamp {
        in_grace: false,
        ..GRACE
    };
    assert_eq!(scene.table.lapse(2, after).locks, 1);
    check(&scene.table);
    assert_eq!(scene.lock_range(2, range(10, 99), true, false), Granted);
    assert_eq!(scene.lock_range(2, range(9, 9), true, false), Denied);
}

#[test]
fn a_late_copy_of_a_reclaim_does_not_take_what_was_unlocked() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    let mut asked = request(1, 1, range(0, 9), true, false);
    asked.reclaim = true;
    // The first one is answered from the table, without a change that could be remembered.
    assert!(scene.table.holding(&host(1), &asked).is_some());
    scene.unlock(1);
    let copy = CallDigest(1000);
    assert_eq!(scene.table.lock(&host(1), copy, &asked, STAMP), Denied);
    assert_eq!(scene.table.lock_count(), 0);
}

/// What a lenient table gives: never what somebody else has, nor what ended without its owner's
/// doing; and shares, which leave no mark when they end so, are as in a strict one.
#[test]
fn a_lenient_table_grants_what_it_does_not_know_if_nothing_is_in_the_way() {
    let mut scene = Scene::default();
    let reclaim = |scene: &mut Scene, number, first, last| {
        let mut asked = request(1, 1, range(first, last), true, true);
        asked.reclaim = true;
        let call = scene.call();
        let outcome = scene.table.lock(&host(number), call, &asked, STAMP);
        check(&scene.table);
        outcome
    };
    assert_eq!(reclaim(&mut scene, 1, 0, 9), Denied, "strict");
    scene.table.set_lenient(true);
    assert!(scene.table.is_lenient());
    assert_eq!(reclaim(&mut scene, 1, 0, 9), Granted);
    assert!(scene.holds(1));
    assert_eq!(
        reclaim(&mut scene, 2, 5, 15),
        Denied,
        "the bytes of another"
    );
    assert_eq!(reclaim(&mut scene, 1, 5, 15), Granted, "a part is its own");
    let (address, file) = (host(1).address, file(1));
    assert_eq!(
        scene.table.break_locks(address, Some(&file), STAMP).locks,
        1
    );
    assert_eq!(reclaim(&mut scene, 1, 0, 9), Denied, "it was broken");
    let share = ShareRequest {
        file,
        oh: b"oh".as_slice().into(),
        modes: ShareModes { deny: 0, access: 1 },
        reclaim: true,
    };
    let call = scene.call();
    assert_eq!(scene.table.share(&host(1), call, &share, STAMP), Denied);
    scene.table.set_lenient(false);
    assert_eq!(reclaim(&mut scene, 2, 50, 59), Denied, "strict again");
}

#[test]
fn late_copies_of_free_all_and_of_a_first_unlock_change_nothing() {
    let mut scene = Scene::default();
    scene.lock(1, true, false);
    let call = scene.call();
    let free_all = |scene: &mut Scene| {
        let address = host(1).address;
        scene.table.free_all(address, b"c1", call, STAMP).locks
    };
    assert_eq!(free_all(&mut scene), 1);
    assert_eq!(scene.lock(1, true, false), Granted);
    assert_eq!(free_all(&mut scene), 0);
    assert!(scene.holds(1));
    // A host that was not known when it sent its FREE_ALL.
    let second = |scene: &mut Scene| {
        let address = host(3).address;
        let call = CallDigest(900);
        scene.table.free_all(address, b"c3", call, STAMP).locks
    };
    assert_eq!(second(&mut scene), 0);
    scene.unlock(1);
    assert_eq!(scene.lock(3, true, false), Granted);
    assert_eq!(second(&mut scene), 0);
    assert!(scene.holds(3));
    scene.unlock(3);
    assert_eq!(scene.lock(1, true, false), Granted);
    // A host that was not known when it sent its first UNLOCK.
    let first = scene.unlock(2);
    scene.unlock(1);
    assert_eq!(scene.lock(2, true, false), Granted);
    scene.unlock_again(2, first);
    assert!(scene.holds(2));
}

#[test]
fn a_copy_of_a_lock_that_was_a_deadlock_is_one() {
    let mut scene = Scene::default();
    scene.lock(1, false, false);
    scene.lock(2, false, false);
    scene.lock(1, true, true);
    let call = CallDigest(1000);
    let asked = request(1, 1, range(0, 9), true, true);
    for _ in 0..2 {
        assert_eq!(scene.table.lock(&host(2), call, &asked, STAMP), Deadlock);
    }
}

#[test]
fn one_address_has_so_many_names_and_no_more() {
    let mut table = LockTable::default();
    let key = |number: usize| HostKey {
        caller_name: number.to_be_bytes().into(),
        ..host(1)
    };
    let lock = |table: &mut LockTable, key: &HostKey| {
        let mut asked = request(1, 1, range(0, 0), true, false);
        asked.file = FileKey(key.caller_name.clone());
        table.lock(key, CallDigest(1), &asked, STAMP)
    };
    for number in 0..Limit::HostsPerAddress.default_value() as usize {
        assert_eq!(lock(&mut table, &key(number)), Granted);
    }
    let one_more = key(Limit::HostsPerAddress.default_value() as usize);
    let limit = LockOutcome::TooMany(Limit::HostsPerAddress);
    assert_eq!(lock(&mut table, &one_more), limit);
    assert_eq!(lock(&mut table, &host(2)), Granted, "others are served");
    let (file, all) = (FileKey(key(7).caller_name), ByteRange::ALL);
    table.unlock(&key(7), CallDigest(2), &file, &owner(1), all, STAMP);
    assert_eq!(lock(&mut table, &one_more), Granted);
    check(&table);
}
