//! What messages of version 4 look like, that they survive both directions, and that no bytes hurt.
//!
//! The messages of real clients here are built from what is documented of them (their cookies,
//! owners and names), not captured.

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
    let _ = decode_all::<Nlm4TestArgs<'_>>(bytes);
    let _ = decode_all::<Nlm4LockArgs<'_>>(bytes);
    let _ = decode_all::<Nlm4CancArgs<'_>>(bytes);
    let _ = decode_all::<Nlm4UnlockArgs<'_>>(bytes);
    let _ = decode_all::<Nlm4Res<'_>>(bytes);
    let _ = decode_all::<Nlm4TestRes<'_>>(bytes);
    let _ = decode_all::<Nlm4ShareArgs<'_>>(bytes);
    let _ = decode_all::<Nlm4ShareRes<'_>>(bytes);
    let _ = decode_all::<Nlm4Notify<'_>>(bytes);
    let _ = decode_all::<NsmNotifyArgs<'_>>(bytes);
}

fn lock() -> Nlm4Lock<'static> {
    Nlm4Lock {
        caller_name: b"client1",
        fh: &[0xf1; 8],
        oh: b"1@client1",
        svid: 1,
        l_offset: 0x1_0000_0000,
        l_len: 0,
    }
}

#[test]
fn lock_of_linux() {
    let args = Nlm4LockArgs {
        cookie: &[0, 0, 0, 0x2a],
        block: true,
        exclusive: true,
        alock: lock(),
        reclaim: false,
        state: 3,
    };
    let expected = b"\0\0\0\x04\0\0\0\x2a\
        \0\0\0\x01\
        \0\0\0\x01\
        \0\0\0\x07client1\0\
        \0\0\0\x08\xf1\xf1\xf1\xf1\xf1\xf1\xf1\xf1\
        \0\0\0\x091@client1\0\0\0\
        \0\0\0\x01\
        \0\0\0\x01\0\0\0\0\
        \0\0\0\0\0\0\0\0\
        \0\0\0\0\
        \0\0\0\x03";
    assert_eq!(encoded(&args), expected);
    assert_eq!(decode_all(expected), Ok(args));
}

/// macOS sends a transaction id of eight bytes as cookie, and as owner what tells its lock daemon's
/// life: a process id and a start time, the same for all its processes.
#[test]
fn lock_msg_of_macos() {
    let expected = b"\0\0\0\x08\x01\x02\x03\x04\x05\x06\x07\x08\
        \0\0\0\0\
        \0\0\0\0\
        \0\0\0\x09mac.local\0\0\0\
        \0\0\0\x04\xf1\xf1\xf1\xf1\
        \0\0\0\x0c\0\0\x01\x43\x68\0\0\0\0\0\0\x09\
        \0\0\x02\x9a\
        \0\0\0\0\0\0\0\x64\
        \0\0\0\0\0\0\0\x0a\
        \0\0\0\x01\
        \0\0\0\0";
    let args: Nlm4LockArgs<'_> = decode_all(expected).unwrap();
    assert_eq!(args.cookie, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(args.alock.oh.len(), 12);
    assert_eq!((args.alock.svid, args.alock.l_offset), (666, 100));
    assert!(!args.block && !args.exclusive && args.reclaim);
    assert_eq!((args.alock.l_len, args.state), (10, 0));
    assert_eq!(encoded(&args), expected);
}

/// HP-UX may send a cookie of no bytes, and gets it back.
#[test]
fn unlock_and_its_result_with_an_empty_cookie() {
    let args = Nlm4UnlockArgs {
        cookie: b"",
        alock: lock(),
    };
    let message = encoded(&args);
    assert!(message.starts_with(b"\0\0\0\0\0\0\0\x07client1\0"));
    assert_eq!(decode_all(&message), Ok(args));
    let res = Nlm4Res {
        cookie: args.cookie,
        stat: Nlm4Stats::Granted,
    };
    assert_eq!(encoded(&res), [0; 8]);
}

#[test]
fn a_denied_test_has_a_holder_and_no_other_has() {
    let denied = Nlm4TestRes {
        cookie: b"abcd",
        stat: Nlm4TestRply::Denied(Nlm4Holder {
            exclusive: true,
            svid: -2,
            oh: b"me",
            l_offset: 5,
            l_len: 0,
        }),
    };
    let expected = b"\0\0\0\x04abcd\0\0\0\x01\
        \0\0\0\x01\xff\xff\xff\xfe\0\0\0\x02me\0\0\
        \0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\0";
    assert_eq!(encoded(&denied), expected);
    assert_eq!(decode_all(expected), Ok(denied));
    let granted = b"\0\0\0\x04abcd\0\0\0\0";
    assert_eq!(
        decode_all(granted),
        Ok(Nlm4TestRes {
            cookie: b"abcd",
            stat: Nlm4TestRply::Other(Nlm4Stats::Granted),
        })
    );
    let without = expected.get(..12).unwrap();
    assert_eq!(decode_all::<Nlm4TestRes<'_>>(without), Err(XdrError::Short));
}

#[test]
fn share_and_its_result() {
    let args = Nlm4ShareArgs {
        cookie: b"c",
        share: Nlm4Share {
            caller_name: b"pc",
            fh: b"file",
            oh: b"o",
            mode: Fsh4Mode::Dw,
            access: Fsh4Access::Rw,
        },
        reclaim: true,
    };
    let expected = b"\0\0\0\x01c\0\0\0\
        \0\0\0\x02pc\0\0\0\0\0\x04file\0\0\0\x01o\0\0\0\
        \0\0\0\x02\0\0\0\x03\
        \0\0\0\x01";
    assert_eq!(encoded(&args), expected);
    assert_eq!(decode_all(expected), Ok(args));
    let res = Nlm4ShareRes {
        cookie: b"c",
        stat: Nlm4Stats::Denied,
        sequence: 7,
    };
    assert_eq!(encoded(&res), *b"\0\0\0\x01c\0\0\0\0\0\0\x01\0\0\0\x07");
}

#[test]
fn what_the_monitor_tells() {
    let args = NsmNotifyArgs {
        mon_name: b"host",
        state: 5,
        private: *b"0123456789abcdef",
    };
    let expected = b"\0\0\0\x04host\0\0\0\x050123456789abcdef";
    assert_eq!(encoded(&args), expected);
    assert_eq!(decode_all(expected), Ok(args));
    let notify = Nlm4Notify {
        name: b"host",
        state: -1,
    };
    assert_eq!(encoded(&notify), *b"\0\0\0\x04host\xff\xff\xff\xff");
}

#[test]
fn undefined_values_are_refused() {
    for (number, stat) in (0..).zip(Nlm4Stats::ALL) {
        assert_eq!(stat.number(), number);
        assert_eq!(decode_all(&number.to_be_bytes()), Ok(stat));
    }
    for number in [10, 11, 0x7fff_ffff, u32::MAX] {
        let result = decode_all::<Nlm4Stats>(&number.to_be_bytes());
        assert_eq!(result, Err(XdrError::BadValue));
    }
    for (number, (mode, access)) in (0..).zip(Fsh4Mode::ALL.into_iter().zip(Fsh4Access::ALL)) {
        assert_eq!((mode.number(), access.number()), (number, number));
        assert_eq!(decode_all(&number.to_be_bytes()), Ok(mode));
        assert_eq!(decode_all(&number.to_be_bytes()), Ok(access));
    }
    let four = [0, 0, 0, 4];
    assert_eq!(decode_all::<Fsh4Mode>(&four), Err(XdrError::BadValue));
    assert_eq!(decode_all::<Fsh4Access>(&four), Err(XdrError::BadValue));
    // `block` of 2.
    let mut message = encoded(&Nlm4CancArgs {
        cookie: b"",
        block: true,
        exclusive: true,
        alock: lock(),
    });
    *message.get_mut(7).unwrap() = 2;
    assert_eq!(
        decode_all::<Nlm4CancArgs<'_>>(&message),
        Err(XdrError::BadValue)
    );
    message.extend([0; 4]);
    *message.get_mut(7).unwrap() = 1;
    assert_eq!(
        decode_all::<Nlm4CancArgs<'_>>(&message),
        Err(XdrError::Leftover)
    );
}

/// A field of this length; every maximum is below 1100.
fn long(len: usize) -> &'static [u8] {
    static BYTES: [u8; 1100] = [b'x'; 1100];
    BYTES.get(..len).unwrap()
}

#[test]
fn each_field_has_its_maximum() {
    type Set = fn(&mut Nlm4UnlockArgs<'static>, &'static [u8]);
    let fields: [(usize, Set); 4] = [
        (MAXNETOBJ_SZ, |args, value| args.cookie = value),
        (LM_MAXSTRLEN, |args, value| args.alock.caller_name = value),
        (NFS3_FHSIZE, |args, value| args.alock.fh = value),
        (MAXNETOBJ_SZ, |args, value| args.alock.oh = value),
    ];
    for (max, set) in fields {
        for (len, outcome) in [(max, None), (max + 1, Some(XdrError::TooLong))] {
            let (cookie, alock) = (&b""[..], lock());
            let mut args = Nlm4UnlockArgs { cookie, alock };
            set(&mut args, long(len));
            let message = encoded(&args);
            assert_eq!(decode_all::<Nlm4UnlockArgs<'_>>(&message).err(), outcome);
        }
    }
    for (len, outcome) in [(1025, None), (1026, Some(XdrError::TooLong))] {
        let (name, state) = (long(len), 0);
        let message = encoded(&Nlm4Notify { name, state });
        assert_eq!(decode_all::<Nlm4Notify<'_>>(&message).err(), outcome);
    }
    let message = encoded(&NsmNotifyArgs {
        mon_name: long(1025),
        state: 0,
        private: [0; 16],
    });
    let outcome = decode_all::<NsmNotifyArgs<'_>>(&message);
    assert_eq!(outcome, Err(XdrError::TooLong));
}

#[test]
fn the_three_forms_of_a_procedure() {
    use procedure::*;
    let forms = [
        (TEST, TEST_MSG, TEST_RES),
        (LOCK, LOCK_MSG, LOCK_RES),
        (CANCEL, CANCEL_MSG, CANCEL_RES),
        (UNLOCK, UNLOCK_MSG, UNLOCK_RES),
        (GRANTED, GRANTED_MSG, GRANTED_RES),
    ];
    for (plain, msg, res) in forms {
        assert_eq!((of_msg(msg), res_of_msg(msg)), (Some(plain), Some(res)));
    }
    for other in [NULL, LOCK, GRANTED, TEST_RES, NSM_NOTIFY, SHARE, u32::MAX] {
        assert_eq!((of_msg(other), res_of_msg(other)), (None, None));
    }
}

proptest! {
    #[test]
    fn everything_round_trips(
        (cookie, oh) in (bytes(MAXNETOBJ_SZ), bytes(MAXNETOBJ_SZ)),
        (caller_name, fh) in (bytes(LM_MAXSTRLEN), bytes(NFS3_FHSIZE)),
        (block, exclusive, reclaim) in any::<(bool, bool, bool)>(),
        (svid, state) in any::<(i32, i32)>(),
        (l_offset, l_len) in any::<(u64, u64)>(),
        stat in prop::sample::select(&Nlm4Stats::ALL[..]),
        mode in prop::sample::select(&Fsh4Mode::ALL[..]),
        access in prop::sample::select(&Fsh4Access::ALL[..]),
        private: [u8; SM_PRIV_SIZE],
    ) {
        let cookie = &cookie[..];
        let (caller_name, fh, oh) = (&caller_name[..], &fh[..], &oh[..]);
        let alock = Nlm4Lock { caller_name, fh, oh, svid, l_offset, l_len };
        round_trips!(Nlm4TestArgs { cookie, exclusive, alock });
        round_trips!(Nlm4LockArgs { cookie, block, exclusive, alock, reclaim, state });
        round_trips!(Nlm4CancArgs { cookie, block, exclusive, alock });
        round_trips!(Nlm4UnlockArgs { cookie, alock });
        round_trips!(Nlm4Res { cookie, stat });
        let holder = Nlm4Holder { exclusive, svid, oh, l_offset, l_len };
        round_trips!(Nlm4TestRes { cookie, stat: Nlm4TestRply::Denied(holder) });
        if stat != Nlm4Stats::Denied {
            round_trips!(Nlm4TestRes { cookie, stat: Nlm4TestRply::Other(stat) });
        }
        let share = Nlm4Share { caller_name, fh, oh, mode, access };
        round_trips!(Nlm4ShareArgs { cookie, share, reclaim });
        round_trips!(Nlm4ShareRes { cookie, stat, sequence: state });
        round_trips!(Nlm4Notify { name: caller_name, state });
        round_trips!(NsmNotifyArgs { mon_name: caller_name, state, private });
    }

    #[test]
    fn random_bytes_never_panic(bytes in bytes(300)) {
        decode_everything(&bytes);
    }

    #[test]
    fn mutated_messages_never_panic(
        oh in bytes(40), at: prop::sample::Index, byte: u8, cut: prop::sample::Index,
    ) {
        let args = Nlm4LockArgs {
            cookie: &oh,
            block: true,
            exclusive: false,
            alock: Nlm4Lock { oh: &oh, ..lock() },
            reclaim: false,
            state: 1,
        };
        let mut message = encoded(&args);
        *at.get_mut(&mut message) = byte;
        message.truncate(cut.index(message.len() + 1));
        decode_everything(&message);
    }

    /// Cut anywhere, a message is refused.
    #[test]
    fn truncated_messages_are_refused(oh in bytes(40), cut: prop::sample::Index) {
        let args = Nlm4TestArgs { cookie: b"cook", exclusive: false, alock: Nlm4Lock { oh: &oh, ..lock() } };
        let message = encoded(&args);
        let cut = message.get(..cut.index(message.len())).unwrap();
        prop_assert_eq!(decode_all::<Nlm4TestArgs<'_>>(cut), Err(XdrError::Short));
    }
}
