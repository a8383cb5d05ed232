//! Answers that take long to get, looked up by threads and kept: the base of `names` and `groups`.
//!
//! A call asks and gets what is known at once; what is unknown or old is queued, and worker threads
//! look it up. Old answers are served while a new one is sought and when seeking fails, so that a
//! dead directory service neither stalls nor locks out clients that were known before.
//!
//! Bounds: `entries_max` answers (the least recently used of a sample goes) and as many queued
//! questions. Dropping the cache stops the workers after the lookup they are in; nobody waits
//! for them, since a resolver can take half a minute to give up.

use std::borrow::Borrow;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{io, thread};

use tokio::sync::watch;

/// Why a lookup has no answer; an answer of "there is none" is an empty list instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the lookup failed for now")]
pub struct NoAnswer;

/// How long answers live, and how many.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lifetime {
    /// An older answer is looked up again when somebody asks.
    pub(super) fresh: Duration,
    /// An answer that was not even tried again for so long is not believed any more.
    pub(super) idle_max: Duration,
    /// After a failure, when to try again.
    pub(super) retry: Duration,
    /// How many answers are kept.
    pub(super) entries_max: usize,
}

type Lookup<K, V> = Box<dyn Fn(&K) -> Result<Arc<[V]>, NoAnswer> + Send + Sync>;

/// Answers by question, found by threads of its own.
pub(super) struct BackgroundCache<K, V> {
    shared: Arc<Shared<K, V>>,
    thread_name: &'static str,
}

struct Shared<K, V> {
    state: Mutex<State<K, V>>,
    wake: Condvar,
    lookup: Lookup<K, V>,
    changes: Arc<watch::Sender<u64>>,
}

struct State<K, V> {
    lifetime: Lifetime,
    entries: HashMap<K, Entry<V>>,
    queue: VecDeque<K>,
    /// Counts questions; orders the entries by use.
    uses: u64,
    worker_count: usize,
    stopped: bool,
}

struct Entry<V> {
    answer: Option<Arc<[V]>>,
    tried_at: Option<Instant>,
    failures: u32,
    queued: bool,
    used: u64,
}

impl<K, V> BackgroundCache<K, V>
where
    K: Hash + Eq + Clone + Send + 'static,
    V: PartialEq + Send + Sync + 'static,
{
    /// Makes an empty cache; nothing is looked up before `start`.
    pub(super) fn new(
        thread_name: &'static str,
        lifetime: Lifetime,
        changes: Arc<watch::Sender<u64>>,
        lookup: Lookup<K, V>,
    ) -> Self {
        let state = State {
            lifetime,
            entries: HashMap::new(),
            queue: VecDeque::new(),
            uses: 0,
            worker_count: 0,
            stopped: false,
        };
        let (state, wake) = (Mutex::new(state), Condvar::new());
        Self {
            shared: Arc::new(Shared {
                state,
                wake,
                lookup,
                changes,
            }),
            thread_name,
        }
    }

    /// Sees to it that there are so many workers.
    ///
    /// Not done by `get`: a thread inherits the identity of the one that makes it, and calls are
    /// served by threads that act as their callers.
    pub(super) fn start(&self, workers: usize) -> io::Result<()> {
        while self.shared.lock().worker_count < workers {
            let shared = Arc::clone(&self.shared);
            let thread = thread::Builder::new().name(self.thread_name.into());
            thread.spawn(move || shared.work())?;
            self.shared.lock().worker_count += 1;
        }
        Ok(())
    }

    /// Returns what is known; queues a lookup if that is nothing or old.
    pub(super) fn get<Q>(&self, key: &Q) -> Option<Arc<[V]>>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
    {
        let mut state = self.shared.lock();
        let waiting = state.queue.len();
        let answer = state.ask(key, Instant::now());
        if state.queue.len() > waiting {
            self.shared.wake.notify_one();
        }
        answer
    }
}

impl<K, V> Drop for BackgroundCache<K, V> {
    fn drop(&mut self) {
        let mut state = self
            .shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        state.stopped = true;
        self.shared.wake.notify_all();
    }
}

impl<K: Hash + Eq + Clone, V: PartialEq> Shared<K, V> {
    fn lock(&self) -> MutexGuard<'_, State<K, V>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        loop {
            let mut state = self.lock();
            let key = loop {
                if state.stopped {
                    return;
                }
                if let Some(key) = state.queue.pop_front() {
                    break key;
                }
                state = self
                    .wake
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            let result = (self.lookup)(&key);
            if self.lock().settle(&key, result, Instant::now()) {
                self.changes.send_modify(|count| *count += 1);
            }
        }
    }
}

impl<K: Hash + Eq + Clone, V: PartialEq> State<K, V> {
    fn ask<Q>(&mut self, key: &Q, now: Instant) -> Option<Arc<[V]>>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
    {
        self.uses += 1;
        if !self.entries.contains_key(key) {
            if self.queue.len() >= self.lifetime.entries_max {
                return None;
            }
            self.make_room();
            let entry = Entry {
                answer: None,
                tried_at: None,
                failures: 0,
                queued: false,
                used: self.uses,
            };
            self.entries.insert(key.to_owned(), entry);
        }
        let entry = self.entries.get_mut(key)?;
        entry.used = self.uses;
        let age = entry
            .tried_at
            .map(|tried_at| now.saturating_duration_since(tried_at));
        let due = if entry.failures == 0 {
            self.lifetime.fresh
        } else {
            self.lifetime.retry
        };
        let full = self.queue.len() >= self.lifetime.entries_max;
        if !entry.queued && !full && age.is_none_or(|age| age >= due) {
            entry.queued = true;
            self.queue.push_back(key.to_owned());
        }
        let believed = age.is_some_and(|age| age < self.lifetime.idle_max);
        entry.answer.clone().filter(|_| believed)
    }

    /// Takes the result of a lookup; returns whether what is known changed.
    fn settle(&mut self, key: &K, result: Result<Arc<[V]>, NoAnswer>, now: Instant) -> bool {
        // It may have been dropped to make room while it was looked up.
        let Some(entry) = self.entries.get_mut(key) else {
            return false;
        };
        entry.queued = false;
        entry.tried_at = Some(now);
        let Ok(answer) = result else {
            entry.failures = entry.failures.saturating_add(1);
            // Waiting for ever would shut out the callers that a later rule admits.
            let gives_up = entry.answer.is_none() && entry.failures >= FAILURES_MAX;
            if gives_up {
                entry.answer = Some(Arc::new([]));
            }
            return gives_up;
        };
        entry.failures = 0;
        let changed = entry.answer.as_ref() != Some(&answer);
        entry.answer = Some(answer);
        changed
    }

    fn make_room(&mut self) {
        while self.entries.len() >= self.lifetime.entries_max {
            let sample = self.entries.iter().take(SAMPLE);
            let oldest = sample
                .min_by_key(|(_, entry)| entry.used)
                .map(|(key, _)| key.clone());
            let Some(oldest) = oldest else { return };
            self.entries.remove(&oldest);
        }
    }
}

/// So many failures in a row without any older answer count as "there is none".
const FAILURES_MAX: u32 = 3;
/// How many entries are compared to find one that was not used for long.
const SAMPLE: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    const LIFETIME: Lifetime = Lifetime {
        fresh: Duration::from_mins(1),
        idle_max: Duration::from_mins(10),
        retry: Duration::from_secs(5),
        entries_max: 4,
    };

    fn state() -> State<u32, u32> {
        let cache = BackgroundCache::new(
            "test",
            LIFETIME,
            Arc::new(watch::Sender::new(0)),
            Box::new(|key: &u32| Ok([*key].into())),
        );
        let shared = Arc::clone(&cache.shared);
        drop(cache);
        let Ok(shared) = Arc::try_unwrap(shared).map_err(|_| ()) else {
            panic!("one owner")
        };
        shared.state.into_inner().expect("not poisoned")
    }

    fn after(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn an_old_answer_is_served_while_a_new_one_is_sought() {
        let (mut state, start) = (state(), Instant::now());
        assert_eq!(state.ask(&1, start), None);
        assert_eq!(state.ask(&1, start), None);
        assert_eq!(state.queue, [1], "one question is queued once");
        state.queue.clear();
        assert!(state.settle(&1, Ok([10].into()), start));
        assert_eq!(
            state.ask(&1, after(start, 59)).as_deref(),
            Some([10].as_slice())
        );
        assert!(state.queue.is_empty());
        assert_eq!(
            state.ask(&1, after(start, 61)).as_deref(),
            Some([10].as_slice())
        );
        assert_eq!(state.queue, [1]);
        assert!(
            !state.settle(&1, Ok([10].into()), after(start, 62)),
            "nothing changed"
        );
    }

    #[test]
    fn failures_keep_the_old_answer_and_are_tried_again_soon() {
        let (mut state, start) = (state(), Instant::now());
        state.ask(&1, start);
        state.settle(&1, Ok([10].into()), start);
        for round in 1..20 {
            state.queue.clear();
            let now = after(start, 60 + round * 5);
            assert_eq!(state.ask(&1, now).as_deref(), Some([10].as_slice()));
            assert_eq!(state.queue, [1], "round {round}");
            assert!(!state.settle(&1, Err(NoAnswer), now));
        }
    }

    #[test]
    fn repeated_failures_without_an_answer_count_as_none() {
        let (mut state, start) = (state(), Instant::now());
        state.ask(&1, start);
        assert!(!state.settle(&1, Err(NoAnswer), start));
        assert!(!state.settle(&1, Err(NoAnswer), start));
        assert_eq!(state.ask(&1, start), None);
        assert!(state.settle(&1, Err(NoAnswer), start));
        assert_eq!(state.ask(&1, start).as_deref(), Some([].as_slice()));
    }

    #[test]
    fn an_answer_that_nobody_asked_for_in_long_is_not_believed() {
        let (mut state, start) = (state(), Instant::now());
        state.ask(&1, start);
        state.queue.clear();
        state.settle(&1, Ok([10].into()), start);
        assert_eq!(state.ask(&1, after(start, 601)), None);
        assert_eq!(state.queue, [1]);
    }

    #[test]
    fn entries_and_questions_are_bounded() {
        let (mut state, now) = (state(), Instant::now());
        for key in 0..100 {
            state.ask(&key, now);
        }
        assert!(state.queue.len() <= 4 && state.entries.len() <= 4);
        state.queue.clear();
        for key in 200..300 {
            state.ask(&key, now);
            state.queue.clear();
            state.settle(&key, Ok([key].into()), now);
        }
        assert_eq!(state.entries.len(), 4);
        assert!(state.entries.contains_key(&299));
    }

    #[test]
    fn workers_answer_and_tell() {
        let changes = Arc::new(watch::Sender::new(0));
        let lookup = Box::new(|key: &u32| Ok([*key + 1].into()));
        let cache = BackgroundCache::new("test", LIFETIME, Arc::clone(&changes), lookup);
        cache.start(2).expect("threads");
        let deadline = Instant::now() + Duration::from_mins(1);
        while cache.get(&7).is_none() {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
        assert_eq!(cache.get(&7).as_deref(), Some([8].as_slice()));
        while *watch::Sender::borrow(&changes) == 0 {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
    }
}
