//! Random histories against a flag per byte, with copies of earlier calls mixed in.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const BYTES: u64 = 12;
const HOSTS: u8 = 3;
const SVIDS: i32 = 2;
const FILES: u8 = 2;

type Who = (u8, i32);

#[derive(Debug, Clone, PartialEq)]
struct Waiting {
    who: Who,
    file: u8,
    range: ByteRange,
    exclusive: bool,
}

/// Who has which byte, and who waits, in order.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    bytes: BTreeMap<(u8, u64, Who), bool>,
    waiting: Vec<Waiting>,
}

impl Model {
    fn conflict(&self, who: Who, file: u8, range: ByteRange, exclusive: bool) -> bool {
        self.bytes.iter().any(|((of, byte, other), theirs)| {
            *of == file
                && *other != who
                && range.start() <= *byte
                && *byte <= range.last()
                && (exclusive || *theirs)
        })
    }

    fn set(&mut self, who: Who, file: u8, range: ByteRange, exclusive: Option<bool>) {
        for byte in range.start()..=range.last() {
            match exclusive {
                Some(exclusive) => self.bytes.insert((file, byte, who), exclusive),
                None => self.bytes.remove(&(file, byte, who)),
            };
        }
        self.grant_waiters();
    }

    /// Again and again, since a grant may share what its owner had for itself.
    fn grant_waiters(&mut self) {
        loop {
            let before = self.waiting.len();
            for waiting in std::mem::take(&mut self.waiting) {
                let (file, range, exclusive) = (waiting.file, waiting.range, waiting.exclusive);
                if self.conflict(waiting.who, file, range, exclusive) {
                    self.waiting.push(waiting);
                    continue;
                }
                for byte in range.start()..=range.last() {
                    self.bytes.insert((file, byte, waiting.who), exclusive);
                }
            }
            if self.waiting.len() == before {
                return;
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Action {
    Lock {
        exclusive: bool,
        blocking: bool,
    },
    Unlock,
    Cancel {
        exclusive: bool,
    },
    Reboot,
    /// A copy of the call so many steps ago arrives.
    Copy(usize),
    /// The oldest unconfirmed grant is confirmed.
    Confirm,
}

#[derive(Debug, Clone)]
struct Step {
    who: Who,
    file: u8,
    range: ByteRange,
    action: Action,
}

fn step() -> impl Strategy<Value = Step> {
    let action = prop_oneof![
        6 => (any::<bool>(), any::<bool>())
            .prop_map(|(exclusive, blocking)| Action::Lock { exclusive, blocking }),
        4 => Just(Action::Unlock),
        2 => any::<bool>().prop_map(|exclusive| Action::Cancel { exclusive }),
        1 => Just(Action::Reboot),
        3 => (1usize..30).prop_map(Action::Copy),
        1 => Just(Action::Confirm),
    ];
    (0..HOSTS, 0..SVIDS, 0..FILES, 0..BYTES, 0..BYTES, action).prop_map(
        |(number, svid, file, a, b, action)| Step {
            who: (number, svid),
            file,
            range: range(a.min(b), a.max(b)),
            action,
        },
    )
}

/// Carries out a call with the number `call`; the model follows unless it is a copy.
fn carry_out(table: &mut LockTable, model: Option<&mut Model>, step: &Step, call: u64) {
    let (who, range, digest) = (step.who, step.range, CallDigest(call));
    let key = host(who.0);
    match step.action {
        Action::Lock {
            exclusive,
            blocking,
        } => {
            let asked = request(step.file, who.1, range, exclusive, blocking);
            let outcome = table.lock(&key, digest, &asked, STAMP);
            let Some(model) = model else { return };
            let same = Waiting {
                who,
                file: step.file,
                range,
                exclusive,
            };
            if model.conflict(who, step.file, range, exclusive) {
                match outcome {
                    LockOutcome::Blocked => {
                        assert!(blocking);
                        if !model.waiting.contains(&same) {
                            model.waiting.push(same);
                        }
                    }
                    LockOutcome::Denied => assert!(!blocking),
                    LockOutcome::Deadlock => assert!(blocking),
                    other => panic!("{other:?} for a conflict"),
                }
            } else {
                assert_eq!(outcome, LockOutcome::Granted);
                model.waiting.retain(|waiting| *waiting != same);
                model.set(who, step.file, range, Some(exclusive));
            }
        }
        Action::Unlock => {
            table.unlock(&key, digest, &file(step.file), &owner(who.1), range, STAMP);
            if let Some(model) = model {
                model.waiting.retain(|waiting| {
                    (waiting.who, waiting.file, waiting.range) != (who, step.file, range)
                });
                model.set(who, step.file, range, None);
            }
        }
        Action::Cancel { exclusive } => {
            let (file, owner) = (file(step.file), owner(who.1));
            let nothing_left = table.cancel(&key, digest, &file, &owner, range, exclusive, STAMP);
            let Some(model) = model else { return };
            let before = model.waiting.len();
            model.waiting.retain(|waiting| {
                let same = (waiting.who, waiting.file, waiting.range, waiting.exclusive);
                same != (who, step.file, range, exclusive)
            });
            let holds = model.bytes.keys().any(|(of, byte, other)| {
                let inside = range.start() <= *byte && *byte <= range.last();
                *of == step.file && *other == who && inside
            });
            if model.waiting.len() != before {
                assert!(nothing_left);
            } else if nothing_left && holds {
                // An unconfirmed grant of the very same request was released: the comparison of
                // the holdings sees to it that it was nothing else.
                model.set(who, step.file, range, None);
            } else {
                assert_eq!(nothing_left, !holds);
            }
        }
        Action::Reboot => {
            // Its state is a new one each time.
            let state = i32::try_from(call).unwrap() + 1;
            reboot(table, who.0, state);
            if let Some(model) = model {
                model.waiting.retain(|waiting| waiting.who.0 != who.0);
                model.bytes.retain(|(.., other), _| other.0 != who.0);
                model.grant_waiters();
            }
        }
        Action::Confirm => {
            let first = table.deliveries(0).next();
            if let Some(delivery) = first {
                table.confirm(delivery.id);
            }
        }
        Action::Copy(_) => {}
    }
}

fn holdings(table: &LockTable) -> BTreeMap<(u8, u64, Who), bool> {
    let mut bytes = BTreeMap::new();
    for held in table.locks() {
        let key = table.owners.key(held.owner.0).unwrap();
        let number = match table.hosts.key(key.host.0).unwrap().address {
            IpAddr::V4(address) => address.octets()[3],
            IpAddr::V6(_) => unreachable!("the model's hosts have IPv4 addresses"),
        };
        let file = table.files.key(held.file.0).unwrap().0[0];
        for byte in held.range.start()..=held.range.last() {
            bytes.insert((file, byte, (number, key.owner.svid)), held.held.exclusive);
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(768))]

    #[test]
    fn as_a_flag_per_byte(steps in prop::collection::vec(step(), 1..60)) {
        let (mut table, mut model) = (LockTable::default(), Model::default());
        let mut calls: Vec<(u64, Step)> = Vec::new();
        for (number, step) in (0u64..).zip(&steps) {
            if let Action::Copy(ago) = step.action {
                // A call that was final is never carried out again, however much happened since.
                if let Some((call, copied)) = calls.iter().nth_back(ago - 1) {
                    let rebooted = calls.iter().rev().take(ago).any(|(_, later)| {
                        matches!(later.action, Action::Reboot) && later.who.0 == copied.who.0
                    });
                    if !rebooted && !matches!(copied.action, Action::Reboot | Action::Confirm) {
                        let before = (table.ranges.clone(), table.blocked.clone());
                        carry_out(&mut table, None, copied, *call);
                        let after = (table.ranges.clone(), table.blocked.clone());
                        prop_assert!(before == after);
                    }
                }
            } else {
                carry_out(&mut table, Some(&mut model), step, number);
                calls.push((number, step.clone()));
            }
            check(&table);
            prop_assert_eq!(holdings(&table), model.bytes.clone());
            prop_assert_eq!(table.blocked.len(), model.waiting.len());
        }
    }
}
