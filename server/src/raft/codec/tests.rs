//! What is stored comes back, and nothing else is taken for it.

use proptest::prelude::*;

use super::*;
use crate::raft::tests::command;

fn log_id(term: u64, index: u64) -> LogId {
    LogId {
        leader_id: LeaderId::new(term, 7),
        index,
    }
}

fn membership() -> Membership {
    let members = BTreeMap::from([
        (1, Member::alone(11)),
        (
            2,
            Member {
                store_id: u64::MAX,
                name: "n".repeat(NAME_BYTES_MAX).into(),
                address: "[fe80::1%4294967295]:65535".parse().unwrap(),
                witness: true,
            },
        ),
    ]);
    let configurations = vec![BTreeSet::from([1]), BTreeSet::from([1, 2])];
    Membership::new(configurations, members).unwrap()
}

fn records() -> Vec<Record> {
    let payloads = [
        Payload::Blank,
        Payload::Normal(Proposed {
            origin: Origin {
                node: NodeId(2),
                incarnation: 7,
                queue: Queue::Leases,
                number: 9,
            },
            command: Arc::new(command(3)),
        }),
        Payload::Membership(membership()),
    ];
    let entries = payloads.into_iter().enumerate().map(|(index, payload)| {
        Record::Entry(Entry {
            log_id: log_id(2, index as u64),
            payload,
        })
    });
    entries
        .chain([
            Record::Vote(Vote::new_committed(5, 6)),
            Record::Purged(log_id(1, 9)),
            Record::Truncated(None),
            Record::Past(Past::default()),
            Record::Past(Past {
                vote: Some(Vote::new(3, 4)),
                purged: Some(log_id(1, 9)),
                last: Some(log_id(2, 10)),
            }),
            Record::Truncated(Some(log_id(3, 8))),
        ])
        .collect()
}

fn encoded(record: &Record) -> Vec<u8> {
    let mut out = Vec::new();
    match record {
        Record::Entry(entry) => put_entry(&mut out, entry),
        Record::Vote(vote) => put_vote(&mut out, vote),
        Record::Purged(log_id) => put_purged(&mut out, *log_id),
        Record::Truncated(last) => put_truncated(&mut out, *last),
        Record::Past(past) => put_past(&mut out, past),
    }
    out
}

#[test]
fn every_record_is_read_back() {
    for expected in records() {
        let bytes = encoded(&expected);
        assert_eq!(record(&bytes).unwrap(), expected);
        outline(&bytes).unwrap();
    }
    let meta = SnapshotMeta {
        last_log_id: Some(log_id(1, 2)),
        last_membership: StoredMembership::new(Some(log_id(1, 1)), membership()),
    };
    assert_eq!(read_snapshot_meta(&snapshot_meta(&meta)).unwrap(), meta);
    let none = SnapshotMeta::default();
    assert_eq!(read_snapshot_meta(&snapshot_meta(&none)).unwrap(), none);
}

#[test]
fn a_newer_record_is_called_newer() {
    for expected in records() {
        let mut bytes = encoded(&expected);
        bytes[0] = VERSION + 1;
        assert_eq!(record(&bytes), Err(DecodeError::Newer(2)));
        assert_eq!(outline(&bytes), Err(DecodeError::Newer(2)));
    }
}

#[test]
fn a_shortened_record_is_refused() {
    for expected in records() {
        let bytes = encoded(&expected);
        for length in 0..bytes.len() {
            assert!(record(&bytes[..length]).is_err(), "{expected:?} {length}");
        }
    }
}

/// The members as version 1 of all records had them: their stores alone.
fn stores() -> (Vec<u8>, Membership) {
    let mut bytes = Vec::new();
    for number in [2, 1, 1, 2, 1, 2, 2, 1, 11, 2, 12] {
        put_u64(&mut bytes, number);
    }
    let members = BTreeMap::from([(1, Member::alone(11)), (2, Member::alone(12))]);
    let configurations = vec![BTreeSet::from([1]), BTreeSet::from([1, 2])];
    (bytes, Membership::new(configurations, members).unwrap())
}

#[test]
fn members_of_older_programs_are_read() {
    let (stores, membership) = stores();
    let mut entry = vec![VERSION, KIND_ENTRY];
    put_log_id(&mut entry, log_id(2, 3));
    entry.push(PAYLOAD_STORES);
    entry.extend_from_slice(&stores);
    let expected = Record::Entry(Entry {
        log_id: log_id(2, 3),
        payload: Payload::Membership(membership.clone()),
    });
    assert_eq!(record(&entry).unwrap(), expected);
    let mut meta = vec![1];
    put_option(&mut meta, Some(log_id(2, 3)));
    put_option(&mut meta, Some(log_id(1, 0)));
    meta.extend_from_slice(&stores);
    let expected = SnapshotMeta {
        last_log_id: Some(log_id(2, 3)),
        last_membership: StoredMembership::new(Some(log_id(1, 0)), membership),
    };
    assert_eq!(read_snapshot_meta(&meta).unwrap(), expected);
}

#[test]
fn newer_members_are_called_newer() {
    let mut meta = snapshot_meta(&SnapshotMeta::default());
    meta[0] = META_VERSION + 1;
    let newer = DecodeError::NewerMeta(META_VERSION + 1);
    assert_eq!(read_snapshot_meta(&meta), Err(newer));
    let payload = Payload::Membership(membership());
    let mut entry = encoded(&Record::Entry(Entry {
        log_id: log_id(1, 1),
        payload,
    }));
    entry[2 + 24 + 1] = MEMBERS_VERSION + 1;
    let newer = DecodeError::NewerMembers(MEMBERS_VERSION + 1);
    assert_eq!(record(&entry), Err(newer));
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_without_a_panic(bytes: Vec<u8>, kind in 0_u8..7, payload in 0_u8..6) {
        // Refusing is fine; random bytes are rarely records.
        let _ = record(&bytes);
        let mut entry = vec![VERSION, kind];
        entry.extend_from_slice(&[0; 24]);
        entry.push(payload);
        entry.extend_from_slice(&bytes);
        let _ = record(&entry);
        let _ = outline(&entry);
        let _ = read_snapshot_meta(&entry[1..]);
    }
}
