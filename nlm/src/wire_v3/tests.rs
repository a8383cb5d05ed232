//! What versions 1 and 3 change on the wire, and what they leave alone.
//!
//! The messages here are built from the specification, not captured.

use proptest::prelude::*;

use super::*;
use crate::wire::{Fsh4Access, Fsh4Mode, Nlm4Share};

const OLD: [NlmVersion; 2] = [NlmVersion::V1, NlmVersion::V3];

fn message<T>(version: NlmVersion, value: T) -> Vec<u8>
where
    T: Encode,
    Narrow<T>: Encode,
{
    let mut out = Vec::new();
    version.encode(value, &mut Writer::new(&mut out));
    out
}

fn encoded(value: &impl Encode) -> Vec<u8> {
    let mut out = Vec::new();
    value.encode(&mut Writer::new(&mut out));
    out
}

fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..=max)
}

/// Asserts that a value is read back as it was written, in all of `versions`.
macro_rules! round_trips {
    ($versions:expr, $value:expr) => {
        for version in $versions {
            let value = $value;
            let message = message(version, value);
            prop_assert_eq!(version.decode(&message), Ok(value));
        }
    };
}

fn lock() -> Nlm4Lock<'static> {
    Nlm4Lock {
        caller_name: b"old",
        fh: &[0xf1; 32],
        oh: b"oh",
        svid: 7,
        l_offset: 0xffff_ff00,
        l_len: 0x100,
    }
}

#[test]
fn a_lock_of_version_3_has_32_bits() {
    let args = Nlm4LockArgs {
        cookie: b"cook",
        block: false,
        exclusive: true,
        alock: Nlm4Lock {
            fh: b"fh",
            ..lock()
        },
        reclaim: true,
        state: 9,
    };
    let expected = b"\0\0\0\x04cook\0\0\0\0\0\0\0\x01\
        \0\0\0\x03old\0\0\0\0\x02fh\0\0\0\0\0\x02oh\0\0\
        \0\0\0\x07\xff\xff\xff\0\0\0\x01\0\
        \0\0\0\x01\0\0\0\x09";
    for version in OLD {
        assert_eq!(message(version, args), expected);
        assert_eq!(version.decode(expected), Ok(args));
    }
    let wide = message(NlmVersion::V4, args);
    assert_eq!(wide.len(), expected.len() + 8);
    assert_eq!(NlmVersion::V4.decode(&wide), Ok(args));
    // Neither version takes the other's message.
    assert!(NlmVersion::V3.decode::<Nlm4LockArgs<'_>>(&wide).is_err());
    assert!(NlmVersion::V4.decode::<Nlm4LockArgs<'_>>(expected).is_err());
}

#[test]
fn granted_repeats_the_range_of_the_request() {
    for (l_offset, l_len) in [
        (0, 0),
        (0xffff_ff00, 0x100),
        (5, 0xffff_ffff),
        (0xffff_ffff, 1),
    ] {
        let alock = Nlm4Lock {
            l_offset,
            l_len,
            ..lock()
        };
        let unlock = message(NlmVersion::V3, Nlm4UnlockArgs { cookie: b"", alock });
        let asked: Nlm4UnlockArgs<'_> = NlmVersion::V3.decode(&unlock).unwrap();
        let granted = Nlm4TestArgs {
            cookie: b"grant",
            exclusive: true,
            alock: asked.alock,
        };
        let granted = message(NlmVersion::V1, granted);
        let range = [l_offset, l_len].map(|value| u32::try_from(value).unwrap().to_be_bytes());
        assert!(granted.ends_with(&range.concat()), "{l_offset} {l_len}");
    }
}

#[test]
fn holders_are_clipped_to_32_bits() {
    let cases = [
        ((10, 20), (10, 20)),
        ((10, 0), (10, 0)),
        ((0, 0xffff_ffff), (0, 0xffff_ffff)),
        ((0, 0x1_0000_0000), (0, 0)),
        ((0xffff_fffe, 1), (0xffff_fffe, 1)),
        ((0xffff_fffe, 2), (0xffff_fffe, 0)),
        ((0xffff_ffff, 1), (0xffff_ffff, 0)),
        ((0x1_0000_0000, 1), (0xffff_ffff, 0)),
        ((7, u64::MAX), (7, 0)),
        ((u64::MAX, u64::MAX), (0xffff_ffff, 0)),
    ];
    for ((l_offset, l_len), (clipped_offset, clipped_len)) in cases {
        let holder = Nlm4Holder {
            exclusive: false,
            svid: 1,
            oh: b"",
            l_offset,
            l_len,
        };
        let res = |holder| Nlm4TestRes {
            cookie: b"",
            stat: Nlm4TestRply::Denied(holder),
        };
        for version in OLD {
            let message = message(version, res(holder));
            let seen = res(Nlm4Holder {
                l_offset: clipped_offset,
                l_len: clipped_len,
                ..holder
            });
            assert_eq!(version.decode(&message), Ok(seen), "{l_offset} {l_len}");
        }
        let wide = message(NlmVersion::V4, res(holder));
        assert_eq!(NlmVersion::V4.decode(&wide), Ok(res(holder)));
    }
}

#[test]
fn statuses_become_those_that_the_version_has() {
    use Nlm4Stats::{
        Blocked, Deadlck, Denied, DeniedGracePeriod, DeniedNolocks, Failed, Fbig, Granted, Rofs,
        StaleFh,
    };
    let cases = [
        (Granted, Granted),
        (Denied, Denied),
        (DeniedNolocks, DeniedNolocks),
        (Blocked, Blocked),
        (DeniedGracePeriod, DeniedGracePeriod),
        (Deadlck, Denied),
        (Rofs, DeniedNolocks),
        (StaleFh, DeniedNolocks),
        (Fbig, DeniedNolocks),
        (Failed, DeniedNolocks),
    ];
    assert_eq!(cases.map(|(stat, _)| stat), Nlm4Stats::ALL);
    for (stat, narrow) in cases {
        let cookie = b"c";
        let (res, seen) = (
            Nlm4Res { cookie, stat },
            Nlm4Res {
                cookie,
                stat: narrow,
            },
        );
        let share = Nlm4ShareRes {
            cookie,
            stat,
            sequence: 3,
        };
        for version in OLD {
            assert_eq!(version.decode(&message(version, res)), Ok(seen));
            let share_seen = Nlm4ShareRes {
                stat: narrow,
                ..share
            };
            assert_eq!(version.decode(&message(version, share)), Ok(share_seen));
            // Written by somebody else, a status of version 4 is an error.
            let foreign = encoded(&res);
            let expected = if stat == narrow {
                Ok(res)
            } else {
                Err(XdrError::BadValue)
            };
            assert_eq!(version.decode(&foreign), expected);
        }
        assert_eq!(
            NlmVersion::V4.decode(&message(NlmVersion::V4, res)),
            Ok(res)
        );
    }
    // DENIED needs a holder; a TEST that has none to show says something else.
    for (stat, expected) in [(Deadlck, 2), (Denied, 2), (StaleFh, 2), (Granted, 0)] {
        let res = Nlm4TestRes {
            cookie: b"",
            stat: Nlm4TestRply::Other(stat),
        };
        assert_eq!(
            message(NlmVersion::V3, res),
            [0, 0, 0, 0, 0, 0, 0, expected]
        );
    }
}

#[test]
fn versions_and_their_procedures() {
    for version in NlmVersion::ALL {
        assert_eq!(NlmVersion::from_number(version.number()), Some(version));
        for procedure in 0..30 {
            let expected = match procedure {
                0..=15 => true,
                20..=23 => version != NlmVersion::V1,
                _ => false,
            };
            assert_eq!(version.has(procedure), expected, "{version:?} {procedure}");
        }
        assert!(!version.has(u32::MAX));
    }
    for number in [0, 2, 5, u32::MAX] {
        assert_eq!(NlmVersion::from_number(number), None);
    }
}

proptest! {
    #[test]
    fn everything_round_trips(
        (cookie, oh) in (bytes(MAXNETOBJ_SZ), bytes(MAXNETOBJ_SZ)),
        (caller_name, fh) in (bytes(LM_MAXSTRLEN), bytes(NFS3_FHSIZE)),
        (block, exclusive, reclaim) in any::<(bool, bool, bool)>(),
        (svid, state) in any::<(i32, i32)>(),
        (l_offset, l_len) in any::<(u32, u32)>(),
        stat in prop::sample::select(&Nlm4Stats::ALL[..5]),
        mode in prop::sample::select(&Fsh4Mode::ALL[..]),
        access in prop::sample::select(&Fsh4Access::ALL[..]),
    ) {
        let cookie = &cookie[..];
        let (caller_name, fh, oh) = (&caller_name[..], &fh[..], &oh[..]);
        let (l_offset, l_len) = (l_offset.into(), l_len.into());
        let alock = Nlm4Lock { caller_name, fh, oh, svid, l_offset, l_len };
        round_trips!(NlmVersion::ALL, Nlm4TestArgs { cookie, exclusive, alock });
        round_trips!(
            NlmVersion::ALL,
            Nlm4LockArgs { cookie, block, exclusive, alock, reclaim, state }
        );
        round_trips!(NlmVersion::ALL, Nlm4CancArgs { cookie, block, exclusive, alock });
        round_trips!(NlmVersion::ALL, Nlm4UnlockArgs { cookie, alock });
        round_trips!(NlmVersion::ALL, Nlm4Res { cookie, stat });
        let share = Nlm4Share { caller_name, fh, oh, mode, access };
        round_trips!(NlmVersion::ALL, Nlm4ShareArgs { cookie, share, reclaim });
        round_trips!(NlmVersion::ALL, Nlm4ShareRes { cookie, stat, sequence: state });
        round_trips!(NlmVersion::ALL, Nlm4Notify { name: caller_name, state });
        if stat != Nlm4Stats::Denied {
            let stat = Nlm4TestRply::Other(stat);
            round_trips!(NlmVersion::ALL, Nlm4TestRes { cookie, stat });
        }
    }

    /// A holder that is clipped still covers every byte that 32 bits can name, and no other.
    #[test]
    fn clipped_ranges_cover_the_same_bytes(
        l_offset in prop_oneof![any::<u64>(), 0..0x2_0000_0000u64],
        l_len in prop_oneof![Just(0), any::<u64>(), 0..0x2_0000_0000u64],
        byte in 0..=0xffff_ffffu64,
    ) {
        let covers = |l_offset: u64, l_len: u64, byte: u64| {
            byte >= l_offset && (l_len == 0 || byte - l_offset < l_len)
        };
        let (clipped_offset, clipped_len) = clipped(l_offset, l_len);
        let after = covers(clipped_offset.into(), clipped_len.into(), byte);
        if l_offset <= OFFSET_MAX_V3 {
            prop_assert_eq!(covers(l_offset, l_len, byte), after);
        } else {
            prop_assert_eq!(byte == OFFSET_MAX_V3, after);
        }
    }

    #[test]
    fn mutated_messages_never_panic(
        oh in bytes(40), at: prop::sample::Index, byte: u8, cut: prop::sample::Index,
        noise in bytes(300),
    ) {
        let args = Nlm4LockArgs {
            cookie: &oh,
            block: true,
            exclusive: false,
            alock: Nlm4Lock { oh: &oh, ..lock() },
            reclaim: false,
            state: 1,
        };
        let mut mutated = message(NlmVersion::V3, args);
        *at.get_mut(&mut mutated) = byte;
        mutated.truncate(cut.index(mutated.len() + 1));
        for bytes in [mutated, noise] {
            for version in NlmVersion::ALL {
                let _ = version.decode::<Nlm4TestArgs<'_>>(&bytes);
                let _ = version.decode::<Nlm4LockArgs<'_>>(&bytes);
                let _ = version.decode::<Nlm4CancArgs<'_>>(&bytes);
                let _ = version.decode::<Nlm4UnlockArgs<'_>>(&bytes);
                let _ = version.decode::<Nlm4Res<'_>>(&bytes);
                let _ = version.decode::<Nlm4TestRes<'_>>(&bytes);
                let _ = version.decode::<Nlm4ShareArgs<'_>>(&bytes);
                let _ = version.decode::<Nlm4ShareRes<'_>>(&bytes);
                let _ = version.decode::<Nlm4Notify<'_>>(&bytes);
            }
        }
    }
}
