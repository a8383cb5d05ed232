//! How often the same thing is said in the log.
//!
//! Strangers and broken peers come back many times a second; what they do is counted each time and
//! said now and then.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long the same is not said again about a subject.
const PAUSE: Duration = Duration::from_mins(1);
/// How long nothing else is said about it: two reasons may take turns.
const PAUSE_OTHERWISE: Duration = Duration::from_secs(5);
/// How many subjects are told apart; of further ones only what is new is said.
const SUBJECTS_MAX: usize = 64;

/// What was said last about each subject.
#[derive(Debug, Default)]
pub(super) struct Pace(Mutex<BTreeMap<u64, (String, Instant)>>);

impl Pace {
    /// Whether `text` is to be said about `subject` now: nothing was lately, or something else was
    /// a while ago.
    pub(super) fn says(&self, subject: u64, text: &str) -> bool {
        let now = Instant::now();
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, when)) = said.get_mut(&subject) {
            let pause = if last == text { PAUSE } else { PAUSE_OTHERWISE };
            let due = now.duration_since(*when) >= pause;
            if due {
                (*last, *when) = (text.to_owned(), now);
            }
            return due;
        }
        if said.len() < SUBJECTS_MAX {
            said.insert(subject, (text.to_owned(), now));
        }
        true
    }

    /// All is well with `subject`; the next complaint is said at once. Returns whether there was
    /// one before.
    pub(super) fn settle(&self, subject: u64) -> bool {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.remove(&subject).is_some()
    }
}
