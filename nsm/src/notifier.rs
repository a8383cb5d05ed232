//! Telling hosts that a service was restarted or taken over: when to send SM_NOTIFY, to whom and
//! how often.
//!
//! Every host is told every name of the service, all with the same state number, since hosts know
//! the service by whatever they mounted it as and pass over what they don't know. They are told in
//! parallel, over UDP first and then over TCP and UDP in turn, until each name was answered or
//! [`GIVE_UP_MS`] are over. An answer says only that the notice was received.
//!
//! Local: nothing depends on it but how soon hosts check their locks, and whoever serves next
//! begins anew with a new number. The schedule is closer than that of Linux's sm-notify at its
//! start, because clients wait meanwhile.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

/// When tries begin, in milliseconds after the first one; after these every [`LATER_MS`].
const TRIES_MS: [u64; 7] = [0, 500, 1000, 2000, 4000, 8000, 16_000];
const LATER_MS: u64 = 30_000;
/// When a host is given up.
pub const GIVE_UP_MS: u64 = 15 * 60 * 1000;
/// From this try on, every other one goes over TCP.
const TCP_FROM_TRY: usize = 3;
/// Every so many tries the host is asked for its port anew.
const TRIES_PER_LOOKUP: usize = 4;
/// Tries under way at a time: each takes one of the few hundred reserved ports.
const UNDER_WAY_MAX: usize = 256;
/// How long a call of the first try of a host may take: many hosts may be gone for good, and those
/// that live must not wait for them.
const FIRST_CALL_MS_MAX: u64 = 600;

/// A host, and the address of ours that it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// The service's address, from which it is told.
    pub service_address: IpAddr,
    /// The host's address.
    pub address: IpAddr,
}

/// A notice to send: all that a try consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// To whom.
    pub target: Target,
    /// The names that were not answered yet, by their place in the list.
    pub names: Vec<usize>,
    /// Whether over TCP.
    pub tcp: bool,
    /// Whether to ask for the port anew.
    pub look_up: bool,
    /// How long each call may take, in milliseconds; as long as calls take if none.
    pub time_max_ms: Option<u64>,
}

/// How far a host was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Not all names were answered yet.
    Telling {
        /// Tries so far.
        tries: u32,
    },
    /// All names were answered.
    Told,
    /// It did not answer in time.
    GivenUp,
}

#[derive(Debug)]
struct Telling {
    unanswered: BTreeSet<usize>,
    since_ms: u64,
    tries: usize,
    under_way: bool,
    /// To be told anew when the try under way has ended.
    again: bool,
    given_up: bool,
    at_ms: u64,
}

/// Tells the hosts of one activation.
#[derive(Debug, Default)]
pub struct Notifier {
    names: usize,
    tellings: BTreeMap<Target, Telling>,
    due: BTreeSet<(u64, Target)>,
    under_way: usize,
    ready: VecDeque<Target>,
}

impl Notifier {
    /// Begins with nobody to tell; `names` is how many names the service has.
    pub fn new(names: usize) -> Self {
        Self {
            names,
            ..Self::default()
        }
    }

    /// The service has other names now, so many: hosts that are told from now on hear of these.
    pub const fn set_names(&mut self, names: usize) {
        self.names = names;
    }

    /// Begins to tell a host, or begins anew; `now_ms` never goes back.
    pub fn tell(&mut self, now_ms: u64, target: Target) {
        if let Some(before) = self.tellings.get(&target) {
            if before.under_way {
                if let Some(telling) = self.tellings.get_mut(&target) {
                    telling.again = true;
                }
                return;
            }
            self.due.remove(&(before.at_ms, target));
            self.ready.retain(|waiting| *waiting != target);
        }
        self.tellings.insert(
            target,
            Telling {
                unanswered: (0..self.names).collect(),
                since_ms: now_ms,
                tries: 0,
                under_way: false,
                again: false,
                given_up: false,
                at_ms: now_ms,
            },
        );
        self.due.insert((now_ms, target));
    }

    /// A try has ended, and these names were answered.
    pub fn tried(&mut self, now_ms: u64, target: Target, answered: &[usize]) {
        let Some(telling) = self.tellings.get_mut(&target) else {
            return;
        };
        if !std::mem::take(&mut telling.under_way) {
            return;
        }
        self.under_way -= 1;
        if std::mem::take(&mut telling.again) {
            self.tell(now_ms, target);
            return;
        }
        for name in answered {
            telling.unanswered.remove(name);
        }
        if telling.unanswered.is_empty() {
            return;
        }
        let next = telling.since_ms + time_of_try(telling.tries);
        if next > telling.since_ms + GIVE_UP_MS {
            telling.given_up = true;
            return;
        }
        telling.at_ms = next.max(now_ms);
        self.due.insert((telling.at_ms, target));
    }

    /// What to send next, if anything.
    pub fn poll(&mut self, now_ms: u64) -> Option<Notice> {
        while let Some((at_ms, target)) = self.due.first().copied()
            && at_ms <= now_ms
        {
            self.due.remove(&(at_ms, target));
            self.ready.push_back(target);
        }
        if self.under_way >= UNDER_WAY_MAX {
            return None;
        }
        let target = self.ready.pop_front()?;
        let telling = self.tellings.get_mut(&target)?;
        telling.under_way = true;
        self.under_way += 1;
        let number = telling.tries;
        telling.tries += 1;
        Some(Notice {
            target,
            names: telling.unanswered.iter().copied().collect(),
            tcp: number >= TCP_FROM_TRY && (number - TCP_FROM_TRY).is_multiple_of(2),
            look_up: number > 0 && number.is_multiple_of(TRIES_PER_LOOKUP),
            time_max_ms: (number == 0).then_some(FIRST_CALL_MS_MAX),
        })
    }

    /// When [`Notifier::poll`] has something to do by itself.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        self.due.first().map(|(at_ms, _)| *at_ms)
    }

    /// All hosts and how far they were told.
    pub fn progress(&self) -> impl Iterator<Item = (Target, Progress)> {
        self.tellings
            .iter()
            .map(|(target, telling)| (*target, telling.progress()))
    }

    /// How far a host was told, if it is to be told.
    pub fn progress_of(&self, target: Target) -> Option<Progress> {
        self.tellings.get(&target).map(Telling::progress)
    }
}

impl Telling {
    fn progress(&self) -> Progress {
        if self.unanswered.is_empty() {
            Progress::Told
        } else if self.given_up {
            Progress::GivenUp
        } else {
            Progress::Telling {
                tries: self.tries as u32,
            }
        }
    }
}

/// When a try begins, counted from the first one.
fn time_of_try(number: usize) -> u64 {
    TRIES_MS.get(number).copied().unwrap_or_else(|| {
        let last = TRIES_MS.last().copied().unwrap_or(0);
        last + LATER_MS * (number + 1 - TRIES_MS.len()) as u64
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    fn target(host: u16) -> Target {
        let [high, low] = host.to_be_bytes();
        Target {
            service_address: IpAddr::from([10, 0, 0, 100]),
            address: IpAddr::from([10, 1, high, low]),
        }
    }

    #[test]
    fn a_silent_host_is_told_more_and_more_seldom_and_given_up() {
        let mut notifier = Notifier::new(2);
        let mut now = 5000;
        notifier.tell(now, target(1));
        let mut tries = Vec::new();
        while let Some(at) = notifier.next_deadline_ms() {
            now = at;
            let notice = notifier.poll(now).unwrap();
            assert_eq!(notice.names, [0, 1]);
            tries.push((now - 5000, notice.tcp, notice.look_up));
            notifier.tried(now + 100, target(1), &[]);
        }
        let first: Vec<u64> = tries.iter().take(9).map(|(at, ..)| *at).collect();
        assert_eq!(
            first,
            [0, 500, 1000, 2000, 4000, 8000, 16_000, 46_000, 76_000]
        );
        let tcp: Vec<bool> = tries.iter().take(7).map(|(_, tcp, _)| *tcp).collect();
        assert_eq!(tcp, [false, false, false, true, false, true, false]);
        assert!(!tries[0].2 && tries[4].2 && !tries[1].2);
        let last = tries.last().unwrap().0;
        assert!(
            (GIVE_UP_MS - LATER_MS..=GIVE_UP_MS).contains(&last),
            "{last}"
        );
        let progress: Vec<_> = notifier.progress().collect();
        assert_eq!(progress, [(target(1), Progress::GivenUp)]);
    }

    #[test]
    fn who_is_told_from_now_on_hears_of_the_new_names() {
        let mut notifier = Notifier::new(1);
        notifier.tell(0, target(1));
        notifier.tell(0, target(2));
        let first = notifier.poll(0).unwrap();
        notifier.set_names(3);
        // One that is being told begins anew when its try has ended; the other has its old ones.
        notifier.tell(1, first.target);
        notifier.tried(2, first.target, &[0]);
        let names = |notice: Notice| (notice.target, notice.names);
        assert_eq!(names(notifier.poll(2).unwrap()), (target(2), vec![0]));
        assert_eq!(names(notifier.poll(2).unwrap()), (target(1), vec![0, 1, 2]));
    }

    #[test]
    fn only_names_that_were_not_answered_are_told_again() {
        let mut notifier = Notifier::new(3);
        notifier.tell(0, target(1));
        assert_eq!(notifier.poll(0).unwrap().names, [0, 1, 2]);
        notifier.tried(10, target(1), &[0, 2]);
        assert_eq!(notifier.poll(10), None);
        assert_eq!(notifier.poll(500).unwrap().names, [1]);
        notifier.tried(510, target(1), &[1]);
        assert_eq!(notifier.next_deadline_ms(), None);
        let progress: Vec<_> = notifier.progress().collect();
        assert_eq!(progress, [(target(1), Progress::Told)]);
    }

    #[test]
    fn ten_thousand_hosts_are_told_a_bounded_number_at_a_time() {
        let mut notifier = Notifier::new(1);
        for host in 0..10_000 {
            notifier.tell(0, target(host));
        }
        let mut told = 0;
        let mut under_way = VecDeque::new();
        loop {
            while let Some(notice) = notifier.poll(0) {
                under_way.push_back(notice.target);
            }
            assert!(under_way.len() <= UNDER_WAY_MAX);
            let Some(first) = under_way.pop_front() else {
                break;
            };
            notifier.tried(1, first, &[0]);
            told += 1;
        }
        assert_eq!(told, 10_000);
    }

    #[test]
    fn hosts_that_live_do_not_wait_long_for_those_that_are_gone() {
        let mut notifier = Notifier::new(1);
        for host in 0..10_000 {
            notifier.tell(0, target(host));
        }
        let gone: BTreeSet<Target> = (0..10_000).step_by(3).map(target).collect();
        let (mut now, mut left) = (0, 10_000 - gone.len());
        let mut ends = BTreeSet::new();
        while left > 0 {
            while let Some(notice) = notifier.poll(now) {
                let answers_after = if gone.contains(&notice.target) {
                    notice.time_max_ms.unwrap_or(2000)
                } else {
                    5
                };
                ends.insert((now + answers_after, notice.target));
            }
            let (at, one) = ends.pop_first().unwrap();
            now = at;
            if gone.contains(&one) {
                notifier.tried(now, one, &[]);
            } else {
                left -= 1;
                notifier.tried(now, one, &[0]);
            }
        }
        assert!(now < 10_000, "the last one is told after {now} ms");
    }

    #[test]
    fn a_host_can_be_told_anew() {
        let mut notifier = Notifier::new(1);
        notifier.tell(0, target(1));
        notifier.poll(0).unwrap();
        notifier.tell(1, target(1));
        assert_eq!(notifier.poll(1), None, "it is being told");
        notifier.tried(2, target(1), &[0]);
        assert_eq!(notifier.poll(2).unwrap().names, [0], "and then again");
        notifier.tried(3, target(1), &[0]);
        assert_eq!(notifier.poll(3), None);
        notifier.tell(4, target(1));
        assert_eq!(notifier.poll(4).unwrap().names, [0]);
    }
}
