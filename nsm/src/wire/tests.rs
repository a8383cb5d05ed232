//! What messages look like, that they survive both directions, and that no bytes hurt.
//!
//! The messages of real peers here are built from what is documented of them, not captured.

use havenfs_rpc::xdr::decode_all;
use proptest::prelude::*;

use super::*;

fn encoded(value: &impl Encode) -> Vec<u8> {
    let mut out = Vec::new();
    value.encode(&mut Writer::new(&mut out));
    out
}

/// Asserts that a value is read back as it was written.
macro_rules! round_trips {
    ($value:expr) => {
        let value = $value;
        let message = encoded(&value);
        prop_assert_eq!(decode_all(&message), Ok(value));
    };
}

fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..=max)
}

/// Reads `bytes` as every type; the results do not matter, that they come does.
fn decode_everything(bytes: &[u8]) {
    let _ = decode_all::<SmName<'_>>(bytes);
    let _ = decode_all::<MyId<'_>>(bytes);
    let _ = decode_all::<MonId<'_>>(bytes);
    let _ = decode_all::<Mon<'_>>(bytes);
    let _ = decode_all::<SmStatRes>(bytes);
    let _ = decode_all::<SmStat>(bytes);
    let _ = decode_all::<StatChge<'_>>(bytes);
}

/// What Linux's sm-notify sends after a restart: the full name, then its first part.
#[test]
fn notifications_of_linux() {
    let full = StatChge {
        mon_name: b"client1.example",
        state: 5,
    };
    let expected = b"\0\0\0\x0fclient1.example\0\0\0\0\x05";
    assert_eq!(encoded(&full), expected);
    assert_eq!(decode_all(expected), Ok(full));
    let short = b"\0\0\0\x07client1\0\0\0\0\x05";
    let mon_name = b"client1";
    assert_eq!(decode_all(short), Ok(StatChge { mon_name, ..full }));
}

/// What a lock manager of Linux asks of the monitor on its machine: program 100021, version 4,
/// procedure 16.
#[test]
fn monitoring_for_a_lock_manager() {
    let mon = Mon {
        mon_id: MonId {
            mon_name: b"192.0.2.9",
            my_id: MyId {
                my_name: b"me",
                my_prog: 100_021,
                my_vers: 4,
                my_proc: 16,
            },
        },
        private: *b"0123456789abcdef",
    };
    let expected = b"\0\0\0\x09192.0.2.9\0\0\0\
        \0\0\0\x02me\0\0\0\x01\x86\xb5\0\0\0\x04\0\0\0\x10\
        0123456789abcdef";
    assert_eq!(encoded(&mon), expected);
    assert_eq!(decode_all(expected), Ok(mon));
    let answer = SmStatRes {
        res_stat: SmRes::StatFail,
        state: 3,
    };
    assert_eq!(encoded(&answer), [0, 0, 0, 1, 0, 0, 0, 3]);
    assert_eq!(encoded(&SmStat { state: -1 }), [0xff; 4]);
}

#[test]
fn undefined_values_and_long_names_are_refused() {
    let two = [0, 0, 0, 2, 0, 0, 0, 1];
    assert_eq!(decode_all::<SmStatRes>(&two), Err(XdrError::BadValue));
    let long = [b'x'; SM_MAXSTRLEN + 1];
    let longest = SmName {
        mon_name: long.get(1..).unwrap(),
    };
    assert_eq!(decode_all(&encoded(&longest)), Ok(longest));
    let id = |my_name| MyId {
        my_name,
        my_prog: 1,
        my_vers: 1,
        my_proc: 1,
    };
    let (mon_name, state) = (&long[..], 1);
    let too_long = Err(XdrError::TooLong);
    let message = encoded(&SmName { mon_name });
    assert_eq!(decode_all::<SmName<'_>>(&message), too_long);
    let message = encoded(&StatChge { mon_name, state });
    assert_eq!(decode_all::<StatChge<'_>>(&message).err(), too_long.err());
    let message = encoded(&id(mon_name));
    assert_eq!(decode_all::<MyId<'_>>(&message).err(), too_long.err());
    let my_id = id(b"");
    let message = encoded(&MonId { mon_name, my_id });
    assert_eq!(decode_all::<MonId<'_>>(&message).err(), too_long.err());
}

proptest! {
    #[test]
    fn everything_round_trips(
        mon_name in bytes(SM_MAXSTRLEN),
        my_name in bytes(SM_MAXSTRLEN),
        (my_prog, my_vers, my_proc) in any::<(u32, u32, u32)>(),
        state: i32,
        private: [u8; SM_PRIV_SIZE],
        res_stat in prop::sample::select(&[SmRes::StatSucc, SmRes::StatFail][..]),
    ) {
        let (mon_name, my_name) = (&mon_name[..], &my_name[..]);
        let my_id = MyId { my_name, my_prog, my_vers, my_proc };
        let mon_id = MonId { mon_name, my_id };
        round_trips!(SmName { mon_name });
        round_trips!(my_id);
        round_trips!(mon_id);
        round_trips!(Mon { mon_id, private });
        round_trips!(SmStatRes { res_stat, state });
        round_trips!(SmStat { state });
        round_trips!(StatChge { mon_name, state });
    }

    #[test]
    fn random_bytes_never_panic(bytes in bytes(300)) {
        decode_everything(&bytes);
    }

    #[test]
    fn mutated_messages_never_panic(
        mon_name in bytes(40), at: prop::sample::Index, byte: u8, cut: prop::sample::Index,
    ) {
        let my_id = MyId { my_name: &mon_name, my_prog: 1, my_vers: 2, my_proc: 3 };
        let mon_id = MonId { mon_name: &mon_name, my_id };
        let mut message = encoded(&Mon { mon_id, private: [0; SM_PRIV_SIZE] });
        *at.get_mut(&mut message) = byte;
        message.truncate(cut.index(message.len() + 1));
        decode_everything(&message);
    }
}
