//! Tellings and their answers, with every message that may get lost or come late.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;
use crate::host::HostKey;
use crate::keys::LockOwner;
use crate::waiting::Callback;
use crate::wire_v3::NlmVersion;

const EPOCH: u32 = 5;
const SECRET: [u8; 6] = *b"secret";

fn delivery(id: u64, host: u8, epoch: u32) -> Delivery {
    Delivery {
        id: GrantId::new(id).unwrap(),
        host: HostKey {
            service_address: IpAddr::from([10, 0, 0, 100]),
            address: IpAddr::from([10, 0, 0, host]),
            caller_name: b"host".as_slice().into(),
        },
        owner: LockOwner {
            svid: 1,
            oh: b"1@host".as_slice().into(),
        },
        exclusive: true,
        epoch,
        callback: Callback {
            version: NlmVersion::V4,
            udp: false,
            fh: Box::new([1; 20]),
            l_offset: 0,
            l_len: 0,
        },
    }
}

/// A granter with one grant, told once.
struct Scene {
    granter: Granter,
    now_ms: u64,
}

impl Scene {
    fn new(epoch_of_grant: u32) -> Self {
        let mut scene = Self {
            granter: Granter::new(EPOCH, SECRET),
            now_ms: 1_000_000,
        };
        scene.input(Input::Granted(delivery(1, 1, epoch_of_grant)));
        scene
    }

    fn input(&mut self, input: Input) {
        self.granter.handle(self.now_ms, input);
    }

    fn poll(&mut self) -> Option<Output> {
        self.granter.poll(self.now_ms)
    }

    /// Waits until something is to be sent.
    fn sent(&mut self) -> (GrantCookie, bool, bool) {
        loop {
            match self.poll() {
                Some(Output::Deliver {
                    cookie,
                    by_message,
                    look_up,
                    ..
                }) => return (cookie, by_message, look_up),
                None => self.now_ms = self.granter.next_deadline_ms().unwrap(),
                other => panic!("{other:?}"),
            }
        }
    }

    fn tried(&mut self, cookie: GrantCookie, tried: Tried) {
        self.input(Input::Tried { cookie, tried });
    }

    fn answer(&mut self, cookie: GrantCookie, stat: Nlm4Stats) {
        let from = IpAddr::from([10, 0, 0, 1]);
        self.input(Input::Answered { cookie, from, stat });
    }
}

fn refuse(release: bool) -> Output {
    let id = GrantId::new(1).unwrap();
    Output::Refuse { id, release }
}

#[test]
fn cookies_come_back_and_others_are_none() {
    let cookie = GrantCookie {
        id: GrantId::new(0x0102_0304_0506_0708).unwrap(),
        attempt: 3,
        secret: SECRET,
    };
    let bytes = cookie.encode();
    assert_eq!(GrantCookie::decode(&bytes), Some(cookie));
    for other in [&[][..], &[0; 16], &bytes[..15], &[1; 17], &[1; 8]] {
        assert_eq!(GrantCookie::decode(other), None);
    }
}

#[test]
fn told_again_with_growing_pauses_until_the_owner_acts() {
    let mut scene = Scene::new(EPOCH);
    let mut last = scene.now_ms;
    let mut pauses = Vec::new();
    let mut look_ups = Vec::new();
    for _ in 0..9 {
        let (cookie, by_message, look_up) = scene.sent();
        assert!(by_message);
        pauses.push(scene.now_ms - last);
        look_ups.push(look_up);
        last = scene.now_ms;
        scene.tried(cookie, Tried::Sent);
    }
    let expected = [0, 1000, 2000, 4000, 8000, 10_000, 10_000, 10_000, 10_000];
    assert_eq!(pauses, expected);
    let every_fourth = [false, false, false, false, true, false, false, false, true];
    assert_eq!(look_ups, every_fourth);
    scene.input(Input::Settled(GrantId::new(1).unwrap()));
    assert_eq!(scene.granter.next_deadline_ms(), None);
}

#[test]
fn granted_confirms() {
    let mut scene = Scene::new(EPOCH);
    let (cookie, ..) = scene.sent();
    scene.tried(cookie, Tried::Sent);
    scene.answer(cookie, Nlm4Stats::Granted);
    assert_eq!(scene.poll(), Some(Output::Confirm(cookie.id)));
    scene.answer(cookie, Nlm4Stats::Denied);
    assert_eq!(scene.poll(), None, "a second answer is to a copy");
}

#[test]
fn denied_releases_only_what_was_told_once() {
    let mut scene = Scene::new(EPOCH);
    let (cookie, ..) = scene.sent();
    // The answer may overtake the news that the call was sent.
    scene.answer(cookie, Nlm4Stats::Denied);
    assert_eq!(scene.poll(), Some(refuse(true)));

    let mut scene = Scene::new(EPOCH);
    let (first, ..) = scene.sent();
    scene.tried(first, Tried::Sent);
    let (second, ..) = scene.sent();
    scene.tried(second, Tried::Sent);
    scene.answer(first, Nlm4Stats::Denied);
    assert_eq!(
        scene.poll(),
        Some(refuse(false)),
        "the second may have been taken"
    );

    let mut scene = Scene::new(EPOCH - 1);
    let (cookie, ..) = scene.sent();
    scene.tried(cookie, Tried::Sent);
    scene.answer(cookie, Nlm4Stats::Denied);
    assert_eq!(
        scene.poll(),
        Some(refuse(false)),
        "somebody else may have told it"
    );
}

#[test]
fn a_try_that_is_not_heard_of_counts_as_sent() {
    let mut scene = Scene::new(EPOCH);
    let (first, ..) = scene.sent();
    let (second, ..) = scene.sent();
    assert_eq!(second.attempt, 2);
    scene.answer(second, Nlm4Stats::Denied);
    assert_eq!(scene.poll(), Some(refuse(false)));
    scene.tried(first, Tried::Unsent);
    assert_eq!(scene.poll(), None);
}

#[test]
fn what_could_never_be_sent_goes_to_the_next_in_line() {
    for (epoch, gives_up) in [(EPOCH, true), (EPOCH - 1, false)] {
        let mut scene = Scene::new(epoch);
        for _ in 0..4 {
            let (cookie, ..) = scene.sent();
            scene.tried(cookie, Tried::Unsent);
        }
        assert_eq!(scene.poll(), gives_up.then_some(refuse(true)));
    }
    let mut scene = Scene::new(EPOCH);
    for number in 0..10 {
        let (cookie, ..) = scene.sent();
        let sent_once = number == 2;
        scene.tried(
            cookie,
            if sent_once {
                Tried::Sent
            } else {
                Tried::Unsent
            },
        );
    }
    assert_eq!(scene.poll(), None, "it was sent once");
}

#[test]
fn answers_from_elsewhere_and_guessed_ones_are_no_answers() {
    let mut scene = Scene::new(EPOCH);
    let (cookie, ..) = scene.sent();
    scene.tried(cookie, Tried::Sent);
    let from = IpAddr::from([10, 0, 0, 2]);
    let stat = Nlm4Stats::Denied;
    scene.input(Input::Answered { cookie, from, stat });
    let old = GrantCookie {
        secret: *b"guess!",
        ..cookie
    };
    scene.answer(old, Nlm4Stats::Denied);
    let never_sent = GrantCookie {
        attempt: 2,
        ..cookie
    };
    scene.answer(never_sent, Nlm4Stats::Denied);
    assert_eq!(scene.poll(), None);
}

#[test]
fn a_host_without_the_message_form_is_called_at_once() {
    let mut scene = Scene::new(EPOCH);
    let (cookie, ..) = scene.sent();
    let before = scene.now_ms;
    scene.tried(cookie, Tried::NoSuchForm);
    let (cookie, by_message, _) = scene.sent();
    assert!(!by_message);
    assert_eq!(scene.now_ms, before);
    // The host did not take the first: this is the only one that it may have taken.
    scene.answer(cookie, Nlm4Stats::Denied);
    assert_eq!(scene.poll(), Some(refuse(true)));
}

#[test]
fn a_host_that_recovers_is_told_later() {
    let mut scene = Scene::new(EPOCH);
    let (cookie, ..) = scene.sent();
    scene.tried(cookie, Tried::Sent);
    let before = scene.now_ms;
    scene.answer(cookie, Nlm4Stats::DeniedGracePeriod);
    scene.sent();
    assert_eq!(scene.now_ms - before, LATER_MS);
}

#[test]
fn one_host_does_not_keep_others_waiting() {
    let mut granter = Granter::new(EPOCH, SECRET);
    for id in 1..=100 {
        granter.handle(0, Input::Granted(delivery(id, 1, EPOCH)));
    }
    granter.handle(0, Input::Granted(delivery(101, 2, EPOCH)));
    let mut told = Vec::new();
    while let Some(Output::Deliver { cookie, .. }) = granter.poll(0) {
        told.push(cookie);
    }
    assert_eq!(told.len() as u32, PER_HOST_MAX + 1);
    assert!(told.iter().any(|cookie| cookie.id.get() == 101));
    // As soon as one is done, another one gets its turn.
    let (cookie, tried) = (told[0], Tried::Sent);
    granter.handle(CROWDED_MS, Input::Tried { cookie, tried });
    assert!(matches!(
        granter.poll(CROWDED_MS),
        Some(Output::Deliver { .. })
    ));
    assert_eq!(granter.known().count(), 101);
}

#[test]
fn what_was_decided_is_proposed_until_the_table_has_it() {
    let mut scene = Scene::new(EPOCH);
    let (cookie, ..) = scene.sent();
    scene.answer(cookie, Nlm4Stats::Denied);
    for _ in 0..3 {
        assert_eq!(scene.poll(), Some(refuse(true)));
        assert_eq!(scene.poll(), None, "not at once");
        scene.now_ms = scene.granter.next_deadline_ms().unwrap();
        // What comes late changes nothing any more.
        scene.answer(cookie, Nlm4Stats::Granted);
        scene.tried(cookie, Tried::Sent);
    }
    scene.input(Input::Settled(cookie.id));
    assert_eq!(scene.granter.next_deadline_ms(), None);
}
