//! Every call that a peer can send, carried out in process on real directories: none panics, each
//! gets the one reply that its header and arguments deserve, and no reply is longer than its call
//! can ask for.
//!
//! [`Scene::ask`] judges every message of every test here; the tests differ in what they send:
//! proper calls, proper calls cut short, calls with one byte or word changed, random ones. What
//! goes through sockets has tests of its own.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

pub(crate) mod samples;
pub(crate) mod scene;

use havenfs_rpc::message::{AcceptStat, ReplyOutcome};
use havenfs_rpc::program;
use havenfs_rpc::xdr::Reader;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use self::samples::{args, message, mount_call};
use self::scene::Scene;
use super::mount::wire::procedure as mount;
use crate::call::{Port, Transport};

/// Values that length fields, bools, enums and numbers are changed to.
const WORDS: [u32; 9] = [0, 1, 2, 3, 65, 256, 4097, 0x7fff_ffff, u32::MAX];
/// Lengths below, at and above the limits of names, handles, addresses, paths and texts.
const LENGTHS: [usize; 16] = [
    0, 1, 2, 15, 64, 65, 255, 256, 257, 400, 1024, 1025, 4096, 4097, 8192, 8193,
];
const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];

#[test]
fn every_proper_call_is_carried_out() {
    let scene = Scene::new();
    for sample in scene.samples() {
        if sample.call_is_forwarded() {
            assert_eq!(scene.outcome(&sample, &sample.message()), None);
            continue;
        }
        let results = scene.results(&sample);
        if sample.program == program::NFS && sample.procedure != 0 {
            let status = Reader::new(&results).u32();
            assert_eq!(status, Ok(sample.status as u32), "{sample:?}");
        }
    }
}

#[test]
fn calls_cut_short_or_too_long_are_garbage() {
    let scene = Scene::new();
    let garbage = Some(ReplyOutcome::Accepted(AcceptStat::GarbageArgs));
    for sample in scene.samples() {
        let mut message = sample.message();
        let header_bytes = message.len() - sample.args.len();
        for len in 0..message.len() {
            let silent = len < 8 || len >= header_bytes && sample.call_is_forwarded();
            let expected = if silent { None } else { garbage };
            let outcome = scene.outcome(&sample, &message[..len]);
            assert_eq!(outcome, expected, "{len} bytes of {sample:?}");
        }
        message.extend([0; 4]);
        if !sample.call_is_forwarded() {
            assert_eq!(scene.outcome(&sample, &message), garbage, "{sample:?}");
        }
    }
}

#[test]
fn calls_with_one_word_or_byte_changed_are_answered() {
    let scene = Scene::new();
    for sample in scene.samples() {
        let message = sample.message();
        for at in (0..message.len()).step_by(4) {
            for word in WORDS {
                let mut changed = message.clone();
                changed[at..at + 4].copy_from_slice(&word.to_be_bytes());
                for transport in TRANSPORTS {
                    scene.ask(sample.port, transport, &changed);
                }
            }
        }
        for at in 0..message.len() {
            for flipped in [0x01, 0x80, 0xff] {
                let mut changed = message.clone();
                changed[at] ^= flipped;
                scene.ask(sample.port, Transport::Tcp, &changed);
            }
        }
    }
    still_serves(&scene);
}

#[test]
fn calls_with_one_field_longer_or_shorter_are_answered() {
    let scene = Scene::new();
    for sample in scene.samples() {
        let message = sample.message();
        for (at, word) in message.as_chunks().0.iter().enumerate() {
            // Any word may be the length of an opaque; where it is none, this is noise.
            let (before, from_word) = message.split_at(4 * at);
            let end = (u32::from_be_bytes(*word) as usize).checked_next_multiple_of(4);
            let Some(after) = end.and_then(|end| from_word.get(4 + end..)) else {
                continue;
            };
            for len in LENGTHS {
                let field = args(|w| w.opaque(&vec![b'x'; len]));
                let changed = [before, &field, after].concat();
                scene.ask(sample.port, Transport::Tcp, &changed);
            }
        }
    }
    still_serves(&scene);
}

fn still_serves(scene: &Scene) {
    let root = scene.results(&mount_call(3, mount::MNT, scene.dirpath()));
    assert_eq!(root.first_chunk(), Some(&[0; 4]));
}

fn any_port() -> impl Strategy<Value = Port> {
    prop::sample::select(vec![Port::Nfs, Port::Mount, Port::Portmap])
}

fn any_transport() -> impl Strategy<Value = Transport> {
    prop::sample::select(TRANSPORTS.to_vec())
}

#[test]
fn random_messages_are_answered() {
    let scene = Scene::new();
    let bytes = prop::collection::vec(any::<u8>(), 0..300);
    // A call's first two words make it more than noise.
    let strategy = (any_port(), any_transport(), bytes, any::<bool>());
    let judge = |(port, transport, mut bytes, is_call): (_, _, Vec<u8>, _)| {
        if let Some(head) = bytes.get_mut(4..12).filter(|_| is_call) {
            head.copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 2]);
        }
        scene.ask(port, transport, &bytes);
        Ok(())
    };
    let config = ProptestConfig::with_cases(5000);
    TestRunner::new(config).run(&strategy, judge).unwrap();
}

#[test]
fn random_procedures_with_random_arguments_are_answered() {
    let scene = Scene::new();
    let programs = vec![program::NFS, program::MOUNT, program::PORTMAP, program::NLM];
    let handles = [&scene.root, &scene.file, &scene.large, &scene.link].map(Vec::clone);
    let opaque = |bytes: Vec<u8>| args(|w| w.opaque(&bytes));
    let piece = prop_oneof![
        3 => prop::sample::select(handles.to_vec()).prop_map(opaque),
        2 => prop::collection::vec(any::<u8>(), 0..12).prop_map(opaque),
        4 => prop::sample::select(WORDS.to_vec()).prop_map(|word| word.to_be_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ];
    let strategy = (
        (any_port(), any_transport(), prop::sample::select(programs)),
        (0u32..6, prop_oneof![9 => 0u32..24, 1 => any::<u32>()]),
        prop::collection::vec(piece, 0..12),
    );
    let judge =
        |((port, transport, program), (version, procedure), pieces): (_, _, Vec<Vec<u8>>)| {
            let message = message(program, version, procedure, &pieces.concat());
            scene.ask(port, transport, &message);
            Ok(())
        };
    let config = ProptestConfig::with_cases(10_000);
    TestRunner::new(config).run(&strategy, judge).unwrap();
}
