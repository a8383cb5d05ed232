//! DEADLCK in random histories against a graph of who waits for whom.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const HOSTS: u8 = 4;
const FILES: u8 = 3;

/// Who would have to unlock before each owner that waits can go on: all holders of conflicting
/// locks that their hosts know of.
fn waits_for(table: &LockTable) -> BTreeMap<OwnerNo, BTreeSet<OwnerNo>> {
    let mut edges: BTreeMap<OwnerNo, BTreeSet<OwnerNo>> = BTreeMap::new();
    for ((file, _), waits) in &table.blocked {
        edges.entry(waits.owner).or_default().extend(holders(
            table,
            *file,
            waits.owner,
            waits.range,
            waits.exclusive,
        ));
    }
    edges
}

fn holders(
    table: &LockTable,
    file: FileNo,
    owner: OwnerNo,
    range: ByteRange,
    exclusive: bool,
) -> Vec<OwnerNo> {
    let in_the_way = table.ranges.on(file).filter(|held| {
        let conflicts = exclusive || held.held.exclusive;
        held.owner != owner && held.range.overlaps(range) && conflicts && held.held.grant.is_none()
    });
    in_the_way.map(|held| held.owner).collect()
}

/// Whether `from` leads back to `to`.
fn leads_to(edges: &BTreeMap<OwnerNo, BTreeSet<OwnerNo>>, from: Vec<OwnerNo>, to: OwnerNo) -> bool {
    let (mut seen, mut queue) = (BTreeSet::new(), from);
    while let Some(at) = queue.pop() {
        if at == to {
            return true;
        }
        if seen.insert(at) {
            queue.extend(edges.get(&at).into_iter().flatten());
        }
    }
    false
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn a_deadlock_is_told_where_there_is_one_and_nowhere_else(
        steps in prop::collection::vec(
            (0..HOSTS, 0..2i32, 0..FILES, 0..6u64, 0..6u64, any::<bool>(), 0..8u8), 1..80),
    ) {
        let mut table = LockTable::default();
        for (call, (number, svid, file_number, a, b, exclusive, action)) in (0u64..).zip(steps) {
            let (key, digest, range) = (host(number), CallDigest(call), range(a.min(b), a.max(b)));
            if action == 0 {
                let (file, owner) = (file(file_number), owner(svid));
                table.unlock(&key, digest, &file, &owner, range, STAMP);
                continue;
            }
            if action == 1 {
                let first = table.deliveries(0).next();
                if let Some(delivery) = first {
                    table.confirm(delivery.id);
                }
                continue;
            }
            let before = table.clone();
            let asked = request(file_number, svid, range, exclusive, true);
            let outcome = table.lock(&key, digest, &asked, STAMP);
            let known = before.hosts.number(&key).and_then(|host| {
                before.known(HostNo(host), &asked.owner, &asked.file)
            });
            // An owner or file that was not known holds nothing that anybody could wait for.
            let cycle = known.is_some_and(|(owner, file)| {
                let from = holders(&before, file, owner, range, exclusive);
                leads_to(&waits_for(&before), from, owner)
            });
            match outcome {
                LockOutcome::Deadlock => prop_assert!(cycle, "nobody waits in a circle"),
                LockOutcome::Blocked => {
                    // Asked again, it waits as it did; what came to be a circle through others
                    // since then was told to them.
                    let again = before.blocked.len() == table.blocked.len();
                    prop_assert!(again || !cycle, "they wait for each other");
                }
                _ => {}
            }
        }
    }
}
