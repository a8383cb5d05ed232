//! How calls are cut into records, how many are sent at once, and what is no call at all.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::nfs::{args, procedure};
use havenfs_tests::client::rpc::{LAST_FRAGMENT, next_xid, open_reply, record, xid_of};
use havenfs_tests::client::{Cred, Header, Outcome, Peer};
use havenfs_tests::server::V4;

use super::scene::Scene;

fn nfs_header(procedure: u32, cred: &Cred) -> Header {
    Header::new(program::NFS, 3, procedure, cred)
}

#[test]
fn records_may_come_in_any_pieces() -> Result<()> {
    let s = Scene::new()?;
    let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
    let call = args(|w| w.opaque(&s.root));
    let header = nfs_header(procedure::GETATTR, &Cred::root());
    let good = |peer: &mut Peer, bytes: &dyn Fn(&[u8]) -> Vec<Vec<u8>>, what: &str| {
        let xid = next_xid();
        for part in bytes(&header.message(xid, &call)) {
            peer.send_raw(&part)?;
        }
        let outcome = open_reply(xid, &peer.receive()?)?;
        ensure!(
            matches!(outcome, Outcome::Success(_)),
            "{what}: {outcome:?}"
        );
        Ok(())
    };
    let fragments = |message: &[u8], size: usize, empty: usize| {
        let mut bytes = Vec::new();
        let count = message.len().div_ceil(size);
        for (number, part) in message.chunks(size).enumerate() {
            for _ in 0..empty {
                bytes.extend(0u32.to_be_bytes());
            }
            let last = if number + 1 == count {
                LAST_FRAGMENT
            } else {
                0
            };
            bytes.extend((last | part.len() as u32).to_be_bytes());
            bytes.extend(part);
        }
        bytes
    };
    good(
        &mut peer,
        &|m| record(m).chunks(1).map(<[u8]>::to_vec).collect(),
        "byte by byte",
    )?;
    good(
        &mut peer,
        &|m| vec![fragments(m, 1, 0)],
        "fragments of a byte",
    )?;
    good(
        &mut peer,
        &|m| vec![fragments(m, 7, 3)],
        "empty fragments between",
    )?;
    good(
        &mut peer,
        &|m| fragments(m, 5, 1).chunks(3).map(<[u8]>::to_vec).collect(),
        "both",
    )?;
    good(
        &mut peer,
        &|m| {
            let mut bytes = fragments(m, m.len(), 0);
            bytes[0] &= 0x7f;
            bytes.extend(LAST_FRAGMENT.to_be_bytes());
            vec![bytes]
        },
        "an empty last fragment",
    )?;
    Ok(())
}

#[test]
fn pipelined_calls_get_one_answer_each() -> Result<()> {
    const CALLS: usize = 600;
    let mut s = Scene::new()?;
    let fh = s.file("f", &vec![7; 100_000])?;
    let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
    let mut bytes = Vec::new();
    let mut waiting = BTreeSet::new();
    for number in 0..CALLS {
        let xid = next_xid();
        waiting.insert(xid);
        let (procedure, call) = match number % 4 {
            0 => (procedure::NULL, Vec::new()),
            1 => (procedure::GETATTR, args(|w| w.opaque(&fh))),
            2 => (
                procedure::READ,
                args(|w| {
                    w.opaque(&fh);
                    w.u64(number as u64);
                    w.u32(10_000);
                }),
            ),
            _ => (
                procedure::WRITE,
                havenfs_tests::client::nfs::write_args(&fh, 100, 3, 0, b"xyz"),
            ),
        };
        bytes.extend(record(
            &nfs_header(procedure, &s.cred()).message(xid, &call),
        ));
    }
    peer.send_raw(&bytes)?;
    while !waiting.is_empty() {
        let reply = peer.receive()?;
        let xid = xid_of(&reply)?;
        ensure!(waiting.remove(&xid), "a second answer to {xid}");
        let outcome = open_reply(xid, &reply)?;
        ensure!(matches!(outcome, Outcome::Success(_)), "{outcome:?}");
    }
    Ok(())
}

/// The client has sent all it will and shut its side down: the answers are still owed.
#[test]
fn calls_before_the_end_of_the_stream_are_answered() -> Result<()> {
    let s = Scene::new()?;
    let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
    let call = args(|w| {
        w.opaque(&s.root);
        w.opaque(b"made-at-the-end");
        w.u32(1);
        w.u32(0o755);
        for _ in 0..5 {
            w.u32(0);
        }
    });
    let header = nfs_header(procedure::MKDIR, &s.cred());
    let xid = next_xid();
    peer.send(&header.message(xid, &call))?;
    peer.finish_sending()?;
    let outcome = open_reply(xid, &peer.receive()?)?;
    ensure!(matches!(outcome, Outcome::Success(_)), "{outcome:?}");
    ensure!(peer.is_closed()?);
    Ok(())
}

#[test]
fn what_is_no_call_gets_no_answer_and_does_no_harm() -> Result<()> {
    let s = Scene::new()?;
    let null = nfs_header(0, &Cred::None);
    // A reply, and records too short for a header.
    let reply = [&7u32.to_be_bytes()[..], &1u32.to_be_bytes(), &[0; 16]].concat();
    for junk in [&reply[..], b"", b"abc", b"abcdefg"] {
        let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
        peer.send(junk)?;
        // Served or closed, but never answered.
        match peer.exchange(&null, &[]) {
            Ok(outcome) => ensure!(outcome == Outcome::Success(Vec::new())),
            Err(_) => ensure!(peer.is_closed()?),
        }
    }
    // A call whose header ends early still has a transaction id to answer.
    for len in [8, 12, 20, 24, 30, 39] {
        let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
        let message = null.message(9, &[]);
        peer.send(&message[..len])?;
        let outcome = open_reply(9, &peer.receive()?)?;
        ensure!(outcome == Outcome::GarbageArgs, "{len} bytes: {outcome:?}");
    }
    Ok(())
}

#[test]
fn a_record_above_the_limit_closes_the_connection() -> Result<()> {
    let s = Scene::new()?;
    for len in [2 << 20, u32::MAX >> 1] {
        for last in [0, LAST_FRAGMENT] {
            let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
            peer.send_raw(&(last | len).to_be_bytes())?;
            ensure!(peer.is_closed()?, "{len}");
        }
    }
    // The sum counts, not the single fragment.
    let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
    let part = [&(512u32 << 10).to_be_bytes()[..], &vec![0; 512 << 10]].concat();
    for _ in 0..5 {
        if peer.send_raw(&part).is_err() {
            return Ok(());
        }
    }
    ensure!(peer.is_closed()?);
    Ok(())
}
