//! Two ends of a connection, and what comes between them.

use tokio::net::TcpListener;

use super::*;
use crate::raft::peer::wire::{CHUNK_BYTES_MAX, REASON_BYTES_MAX};

fn key() -> ClusterKey {
    ClusterKey::of(b"a key for tests")
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (opened, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (opened.unwrap(), accepted.unwrap().0)
}

async fn links() -> (Link, Link) {
    let (opened, accepted) = pair().await;
    let (one, other) = (key(), key());
    let (one, other) = tokio::join!(Link::open(opened, &one), Link::accept(accepted, &other));
    (one.unwrap(), other.unwrap())
}

fn chunk(byte: u8) -> Message {
    Message::Chunk(vec![byte; CHUNK_BYTES_MAX])
}

fn is_chunk(message: &Message, byte: u8) -> bool {
    matches!(message, Message::Chunk(bytes)
        if bytes.len() == CHUNK_BYTES_MAX && bytes.iter().all(|found| *found == byte))
}

#[tokio::test]
async fn messages_of_any_length_arrive_in_order_both_ways() {
    let (mut one, mut other) = links().await;
    one.receiver.admit();
    other.receiver.admit();
    let send = async {
        for byte in 0..3 {
            one.sender.send(&chunk(byte)).await.unwrap();
            one.sender.send(&Message::NotLeader).await.unwrap();
        }
        one.receiver.receive().await.unwrap()
    };
    let receive = async {
        for byte in 0..3 {
            let message = other.receiver.receive().await.unwrap();
            assert!(is_chunk(&message, byte));
            let message = other.receiver.receive().await.unwrap();
            assert!(matches!(message, Message::NotLeader));
        }
        other.sender.send(&chunk(9)).await.unwrap();
    };
    let (answer, ()) = tokio::join!(send, receive);
    assert!(is_chunk(&answer, 9));
}

#[tokio::test]
async fn receiving_may_be_given_up_and_begun_again() {
    let (mut one, mut other) = links().await;
    other.receiver.admit();
    one.sender.add(&chunk(5)).unwrap();
    let sealed = std::mem::take(&mut one.sender.sealed);
    for part in sealed.chunks(sealed.len() / 50) {
        one.sender.stream.write_all(part).await.unwrap();
        // Polled once at each piece, and dropped.
        tokio::select! {
            biased;
            message = other.receiver.receive() => {
                assert!(is_chunk(&message.unwrap(), 5));
                return;
            }
            () = tokio::task::yield_now() => {}
        }
    }
    assert!(is_chunk(&other.receiver.receive().await.unwrap(), 5));
}

#[tokio::test]
async fn frames_that_are_changed_repeated_or_out_of_order_end_it() {
    type Change = fn(&mut Vec<u8>);
    let changes: [Change; 5] = [
        |sealed| *sealed.last_mut().unwrap() ^= 1,
        |sealed| sealed.extend_from_within(..),
        |sealed| {
            let half = sealed.len() / 2;
            sealed.rotate_left(half);
        },
        |sealed| {
            let half = sealed.len() / 2;
            sealed.drain(..half);
        },
        |sealed| sealed[..2].copy_from_slice(&5_u16.to_be_bytes()),
    ];
    for change in changes {
        let (mut one, mut other) = links().await;
        // Two frames of the same length.
        one.sender.add(&Message::NotLeader).unwrap();
        one.sender.add(&Message::NotLeader).unwrap();
        change(&mut one.sender.sealed);
        one.sender.flush().await.unwrap();
        let error = loop {
            if let Err(error) = other.receiver.receive().await {
                break error;
            }
        };
        assert!(matches!(error, LinkError::Forged), "{error}");
    }
}

#[tokio::test]
async fn what_one_connection_sealed_does_not_open_on_another() {
    let (mut one, _other) = links().await;
    one.sender.add(&Message::NotLeader).unwrap();
    let (mut second, mut receiving) = links().await;
    second.sender.sealed = std::mem::take(&mut one.sender.sealed);
    second.sender.flush().await.unwrap();
    let error = receiving.receiver.receive().await.err().unwrap();
    assert!(matches!(error, LinkError::Forged), "{error}");
}

#[tokio::test]
async fn lengths_are_checked_before_anything_is_kept() {
    // Who has not said who it is gets little room.
    let (mut one, mut other) = links().await;
    one.sender.add(&chunk(1)).unwrap();
    one.sender.flush().await.unwrap();
    let error = other.receiver.receive().await.err().unwrap();
    assert!(matches!(error, LinkError::TooLong { .. }), "{error}");
    assert!(other.receiver.message.capacity() <= 2 * FRAME_BYTES_MAX);
    // A message that says it is short and goes on.
    let (mut one, mut other) = links().await;
    one.sender.seal(&[1, 0, 0, 0, 1, 2]).unwrap();
    one.sender.flush().await.unwrap();
    let error = other.receiver.receive().await.err().unwrap();
    assert!(matches!(error, LinkError::Forged), "{error}");
    // One that is too short for a length, and one that is none.
    for (plain, damaged) in [(&[1, 0][..], false), (&[2, 0, 0, 0, 1, 99], true)] {
        let (mut one, mut other) = links().await;
        one.sender.seal(plain).unwrap();
        one.sender.flush().await.unwrap();
        let error = other.receiver.receive().await.err().unwrap();
        assert_eq!(matches!(error, LinkError::Damaged(_)), damaged, "{error}");
    }
    // The longest that is allowed.
    let (mut one, mut other) = links().await;
    let reason = Message::Refused("x".repeat(REASON_BYTES_MAX));
    one.sender.send(&reason).await.unwrap();
    assert!(matches!(
        other.receiver.receive().await.unwrap(),
        Message::Refused(_)
    ));
}

#[tokio::test]
async fn without_the_key_there_is_no_answer() {
    let (opened, accepted) = pair().await;
    let (wrong, right) = (ClusterKey::of(b"another key for tests"), key());
    let (one, other) = tokio::join!(Link::open(opened, &wrong), Link::accept(accepted, &right));
    assert!(matches!(one.err(), Some(LinkError::NotWelcome)));
    assert!(matches!(other.err(), Some(LinkError::Stranger)));
    for (bytes, version) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], None),
        (b"havenfs\x02", Some(2)),
        (b"havenfs\x01\xff\xff", None),
        (
            &[&b"havenfs\x01\x00\x30"[..], &[7; HANDSHAKE_BYTES]].concat(),
            None,
        ),
    ] {
        let (mut opened, accepted) = pair().await;
        opened.write_all(bytes).await.unwrap();
        let error = Link::accept(accepted, &right).await.err().unwrap();
        let found = match error {
            LinkError::OtherVersion(version) => Some(version),
            LinkError::Stranger => None,
            error => panic!("{error}"),
        };
        assert_eq!(found, version);
        let mut answer = Vec::new();
        // A reset is fine as well.
        let _ = opened.read_to_end(&mut answer).await;
        assert!(answer.is_empty());
    }
}
