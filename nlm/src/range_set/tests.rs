//! The set of ranges against a model that keeps a flag for every byte.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const FILE: FileNo = FileNo(1);
const BYTES: u64 = 48;

fn held(exclusive: bool) -> Held {
    Held {
        last: 0,
        grant: None,
        since: 1,
        epoch: 1,
        nsm_state: 0,
        exclusive,
        suspect: false,
    }
}

fn range(start: u64, last: u64) -> ByteRange {
    ByteRange::new(start, last).unwrap()
}

/// For each owner what it holds of each byte. The last byte stands for all that follow it.
#[derive(Debug, Default)]
struct Model {
    bytes: BTreeMap<(u32, u64), bool>,
}

impl Model {
    fn conflict(&self, owner: u32, range: ByteRange, exclusive: bool) -> bool {
        self.bytes.iter().any(|((other, byte), theirs)| {
            *other != owner && inside(*byte, range) && (exclusive || *theirs)
        })
    }

    fn set(&mut self, owner: u32, range: ByteRange, exclusive: Option<bool>) {
        for byte in (0..BYTES).filter(|byte| inside(*byte, range)) {
            match exclusive {
                Some(exclusive) => self.bytes.insert((owner, byte), exclusive),
                None => self.bytes.remove(&(owner, byte)),
            };
        }
    }

    /// What an owner holds, as few ranges as possible.
    fn ranges(&self, owner: u32) -> Vec<(u64, u64, bool)> {
        let mut ranges: Vec<(u64, u64, bool)> = Vec::new();
        for ((_, byte), exclusive) in self.bytes.range((owner, 0)..=(owner, BYTES)) {
            match ranges.last_mut() {
                Some((_, last, kind)) if *last + 1 == *byte && kind == exclusive => *last = *byte,
                _ => ranges.push((*byte, *byte, *exclusive)),
            }
        }
        ranges
    }
}

/// Steps name the model's last byte as the end of the file, so that this is all there is to it.
const fn inside(byte: u64, range: ByteRange) -> bool {
    range.start() <= byte && byte <= range.last()
}

fn of_owner(set: &RangeSet, owner: u32) -> Vec<(u64, u64, bool)> {
    set.on(FILE)
        .filter(|found| found.owner == OwnerNo(owner))
        .map(|found| {
            let last = found.range.last().min(BYTES - 1);
            (found.range.start(), last, found.held.exclusive)
        })
        .collect()
}

#[derive(Debug, Clone, Copy)]
struct Step {
    owner: u32,
    start: u64,
    last: u64,
    action: u8,
}

fn step(owners: u32) -> impl Strategy<Value = Step> {
    (0..owners, 0..BYTES, 0..BYTES, 0u8..5).prop_map(|(owner, a, b, action)| {
        let (start, last) = (a.min(b), a.max(b));
        let last = if last == BYTES - 1 {
            crate::range::OFFSET_MAX
        } else {
            last
        };
        Step {
            owner,
            start,
            last,
            action,
        }
    })
}

fn run(steps: &[Step], owners: u32) -> Result<(), TestCaseError> {
    let (mut set, mut model) = (RangeSet::default(), Model::default());
    for step in steps {
        let range = range(step.start, step.last);
        let owner = OwnerNo(step.owner);
        if step.action < 2 {
            let before: Vec<_> = model.ranges(step.owner);
            let had = set.clear(FILE, owner, range);
            model.set(step.owner, range, None);
            prop_assert_eq!(had.is_empty(), before == model.ranges(step.owner));
        } else {
            let exclusive = step.action == 2;
            let conflict = set.conflict(FILE, Some(owner), range, exclusive);
            prop_assert_eq!(
                conflict.is_some(),
                model.conflict(step.owner, range, exclusive)
            );
            if conflict.is_none() {
                set.set(FILE, owner, range, held(exclusive));
                model.set(step.owner, range, Some(exclusive));
            }
        }
        for owner in 0..owners {
            prop_assert_eq!(of_owner(&set, owner), model.ranges(owner));
        }
        prop_assert_eq!(set.on(FILE).count(), set.count_on(FILE) as usize);
        for owner in 0..owners {
            let on = set.files_of(OwnerNo(owner)).count();
            prop_assert_eq!(on == 1, !model.ranges(owner).is_empty());
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn few_owners_as_a_flag_per_byte(steps in prop::collection::vec(step(3), 1..80)) {
        run(&steps, 3)?;
    }

    #[test]
    fn crowded_files_as_a_flag_per_byte(steps in prop::collection::vec(step(24), 1..250)) {
        run(&steps, 24)?;
    }
}

#[test]
fn an_unconfirmed_grant_stays_a_lock_of_its_own() {
    let mut set = RangeSet::default();
    let owner = OwnerNo(1);
    set.set(FILE, owner, range(0, 9), held(true));
    let granted = Held {
        grant: GrantId::new(7),
        ..held(true)
    };
    set.set(FILE, owner, range(10, 19), granted);
    assert_eq!(set.on(FILE).count(), 2);
    // Its owner acts: now it is known to have it, and the two are one.
    set.set(FILE, owner, range(10, 19), held(true));
    assert_eq!(of_owner(&set, 1), [(0, 19, true)]);
}

#[test]
fn one_owner_with_many_ranges_on_many_files() {
    let mut set = RangeSet::default();
    for file in 0..100 {
        for start in 0..50 {
            set.set(
                FileNo(file),
                OwnerNo(file % 7),
                range(start * 10, start * 10 + 4),
                held(start % 2 == 0),
            );
        }
    }
    assert_eq!(set.len(), 5000);
    assert_eq!(set.files_of(OwnerNo(3)).count(), 14);
    for file in 0..100 {
        set.clear(FileNo(file), OwnerNo(file % 7), ByteRange::ALL);
    }
    assert_eq!((set.len(), set.crowds.len(), set.files_of.len()), (0, 0, 0));
}
