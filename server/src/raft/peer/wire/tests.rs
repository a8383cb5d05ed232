//! What is sent comes back, and nothing else is taken for it.

use std::net::SocketAddr;

use proptest::prelude::*;

use super::*;
use crate::raft::tests::proposed;
use crate::raft::types::Member;

fn log_id(term: u64, index: u64) -> LogId {
    LogId {
        leader_id: LeaderId::new(term, 7),
        index,
    }
}

fn append_of(committed: bool, indexes: &[u64]) -> Message {
    let entries = indexes.iter().map(|index| Entry {
        log_id: log_id(3, *index),
        payload: Payload::Normal(proposed(*index)),
    });
    let leader_id = LeaderId::new(3, 7);
    Message::Append(AppendEntriesRequest {
        vote: Vote {
            leader_id,
            committed,
        },
        prev_log_id: Some(log_id(2, 9)),
        entries: entries.collect(),
        leader_commit: Some(log_id(2, 8)),
    })
}

fn messages() -> Vec<Message> {
    let vote = Vote::new_committed(4, 2);
    let address = "[fe80::1%3]:7300".parse().unwrap();
    let member = Member {
        store_id: 77,
        name: "n2".into(),
        address,
        witness: true,
    };
    let configured = Configured {
        name: "n1".into(),
        address,
        witness: false,
    };
    let hello = |standing| {
        Message::Hello(Hello {
            name: "n1".into(),
            store_id: u64::MAX,
            standing,
        })
    };
    let request = VoteRequest {
        vote: Vote::new(9, 1),
        last_log_id: None,
        leadership_transfer: true,
    };
    let meta = SnapshotMeta {
        last_log_id: Some(log_id(2, 5)),
        ..SnapshotMeta::default()
    };
    let bytes = 12;
    vec![
        hello(Standing::Unformed {
            empty: true,
            configured: Arc::new([configured]),
        }),
        hello(Standing::Formed {
            cluster_id: 5,
            generation: 0,
            node: 1,
            members: BTreeMap::from([(1, Member::alone(4)), (2, member)]),
        }),
        Message::Refused("because".to_owned()),
        append_of(true, &[10, 11]),
        append_of(true, &[]),
        Message::Appended(AppendEntriesResponse::Success),
        Message::Appended(AppendEntriesResponse::PartialSuccess(Some(log_id(1, 2)))),
        Message::Appended(AppendEntriesResponse::Conflict),
        Message::Appended(AppendEntriesResponse::HigherVote(vote)),
        Message::Vote(request.clone()),
        Message::PreVote(request),
        Message::Voted(VoteResponse::new(vote, Some(log_id(1, 1)), true)),
        Message::Snapshot(Announced { vote, meta, bytes }),
        Message::Chunk(vec![1, 2, 3]),
        Message::Installed(SnapshotResponse::new(vote)),
        Message::Transfer(TransferLeaderRequest::new(vote, 3, Some(log_id(4, 4)))),
        Message::Transferred(Ok(())),
        Message::Transferred(Err(TransferLeaderError::VoteChanged {
            expected: vote,
            actual: Vote::new(5, 3),
        })),
        Message::Transferred(Err(TransferLeaderError::LogNotFlushed {
            expected: Some(log_id(4, 4)),
            actual: None,
        })),
        Message::Forward(vec![proposed(1), proposed(2)]),
        Message::NotLeader,
        Message::Removed("because".to_owned()),
        Message::Change(MemberChange::Transfer { to: None }),
        Message::Change(MemberChange::Transfer {
            to: Some("n2".into()),
        }),
        Message::Change(MemberChange::Add {
            name: "n4".into(),
            address: SocketAddr::from(([192, 0, 2, 4], 7300)),
            witness: true,
        }),
        Message::Change(MemberChange::Remove { name: "n4".into() }),
        Message::Changed(Ok("done".to_owned())),
        Message::Changed(Err("not done".to_owned())),
    ]
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

#[test]
fn every_message_is_read_back() {
    for message in messages() {
        let bytes = encoded(&message);
        let read = Message::decode(&bytes).unwrap();
        assert_eq!(format!("{read:?}"), format!("{message:?}"));
        assert_eq!(encoded(&read), bytes);
    }
}

#[test]
fn a_shortened_or_newer_message_is_refused() {
    for message in messages() {
        let mut bytes = encoded(&message);
        let any_length = matches!(
            message,
            Message::Refused(_) | Message::Chunk(_) | Message::Removed(_) | Message::Changed(_)
        );
        for length in 0..bytes.len() {
            let read = Message::decode(&bytes[..length]);
            assert!(read.is_err() || any_length, "{message:?} {length}");
        }
        bytes[0] = VERSION + 1;
        let read = Message::decode(&bytes);
        assert_eq!(read.err(), Some(DecodeError::Newer(VERSION + 1)));
    }
}

#[test]
fn what_would_end_openraft_is_refused() {
    let refused = |message: Message| Message::decode(&encoded(&message)).unwrap_err();
    refused(append_of(false, &[10]));
    refused(append_of(true, &[11]));
    refused(append_of(true, &[10, 12]));
    let Message::Append(mut later) = append_of(true, &[10]) else {
        return;
    };
    later.vote = Vote::new_committed(2, 7);
    refused(Message::Append(later));
    let leads = Vote::new_committed(4, 7);
    refused(Message::Vote(VoteRequest::new(leads, None)));
    refused(Message::PreVote(VoteRequest::new(leads, None)));
    let candidate = Vote::new(4, 7);
    refused(Message::Transfer(TransferLeaderRequest::new(
        candidate, 1, None,
    )));
    let meta = SnapshotMeta {
        last_log_id: Some(log_id(5, 5)),
        ..SnapshotMeta::default()
    };
    let announced = |vote| Announced {
        vote,
        meta: meta.clone(),
        bytes: 1,
    };
    refused(Message::Snapshot(announced(Vote::new_committed(4, 7))));
    refused(Message::Snapshot(announced(Vote::new(6, 7))));
}

#[test]
fn entries_that_do_not_fit_go_next_time() {
    let Message::Append(request) = append_of(true, &[10, 11, 12]) else {
        return;
    };
    let whole = encoded(&Message::Append(request.clone())).len();
    for (bytes_max, expected) in [(0, 1), (1, 1), (whole / 2, 2), (whole, 3)] {
        let mut out = Vec::new();
        let count = Message::encode_append(&mut out, &request, bytes_max);
        assert_eq!(count, expected, "{bytes_max}");
        let Message::Append(read) = Message::decode(&out).unwrap() else {
            return;
        };
        assert_eq!(read.entries, request.entries[..count]);
    }
}

#[test]
fn counts_are_bounded_before_memory_is_taken() {
    let mut forward = encoded(&Message::Forward(Vec::new()));
    forward[2..10].copy_from_slice(&(FORWARDS_MAX as u64 + 1).to_le_bytes());
    let error = Message::decode(&forward).unwrap_err().to_string();
    assert!(error.contains("too many"), "{error}");
    let mut append = encoded(&append_of(true, &[]));
    let at = append.len() - 8;
    append[at..].copy_from_slice(&u64::MAX.to_le_bytes());
    let error = Message::decode(&append).unwrap_err().to_string();
    assert!(error.contains("too many"), "{error}");
    let long = vec![0; CHUNK_BYTES_MAX + 1];
    Message::decode(&encoded(&Message::Chunk(long))).unwrap_err();
    let long = "x".repeat(REASON_BYTES_MAX + 9);
    let cut = Message::decode(&encoded(&Message::Refused(long))).unwrap();
    assert!(matches!(cut, Message::Refused(reason) if reason.len() == REASON_BYTES_MAX));
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_without_a_panic(bytes: Vec<u8>, kind in 0_u8..16) {
        let mut message = vec![VERSION, kind];
        message.extend_from_slice(&bytes);
        // Refusing is fine; random bytes are rarely messages.
        let _ = Message::decode(&message);
    }

    #[test]
    fn a_flipped_bit_never_panics(which in 0_usize..21, at: prop::sample::Index, bit in 0_u8..8) {
        let mut bytes = messages().get(which).map(encoded).unwrap_or_default();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let _ = Message::decode(&bytes);
    }
}
