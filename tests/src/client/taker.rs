//! A host that takes and drops locks at random and remembers what it was told.
//!
//! Owns the account of one lock owner on one file: which locks the server said it has. It never
//! reclaims, so a lock that the server has lost stays lost, and [`Taker::judge`] lets another host
//! see it.
//!
//! Invariant: of at most one lock the account is unsure, the one whose call was not answered.

use std::collections::BTreeSet;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};

use super::nlm::{Lock, stat};
use super::{Nlm, Peer};
use crate::lab::random::Random;

/// A lock owner and what it was told.
#[derive(Debug)]
pub struct Taker {
    /// Of the whole file.
    lock: Lock,
    /// The number of each lock that it has.
    held: BTreeSet<u64>,
    /// The lock that it may have or not have.
    unsure: Option<u64>,
}

impl Taker {
    /// Makes an owner that has nothing yet.
    pub fn new(fh: &[u8], caller_name: &str, svid: i32) -> Self {
        Self {
            lock: Lock::new(fh, caller_name, svid),
            held: BTreeSet::new(),
            unsure: None,
        }
    }

    /// Takes and drops locks until a call is not answered, and counts the `answers`.
    fn work(&mut self, nlm: &mut Nlm, random: &mut Random, answers: &AtomicUsize) -> Result<()> {
        loop {
            let number = random.below(LOCKS);
            let lock = self.lock.range(number * LOCK_BYTES, LOCK_BYTES);
            self.unsure = Some(number);
            let answer = if self.held.contains(&number) {
                nlm.unlock(&lock)
            } else {
                nlm.lock(&lock)
            };
            let Ok(stat) = answer else { return Ok(()) };
            ensure!(stat == stat::GRANTED, "status {stat} for {lock:?}");
            if !self.held.remove(&number) {
                self.held.insert(number);
            }
            self.unsure = None;
            answers.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Tries each lock in the name of another owner on another host, and says where what that one
    /// gets is not what this one was told. Afterwards the account is sure of all.
    pub fn judge(&mut self, other: &mut Nlm, caller_name: &str) -> Result<Vec<String>> {
        let stranger = Lock::new(&self.lock.fh, caller_name, self.lock.svid);
        let mut wrong = Vec::new();
        for number in 0..LOCKS {
            let lock = stranger.range(number * LOCK_BYTES, LOCK_BYTES);
            let is_held = match other.lock(&lock)? {
                stat::DENIED => true,
                stat::GRANTED => {
                    ensure!(other.unlock(&lock)? == stat::GRANTED, "not unlocked");
                    false
                }
                stat => bail!("status {stat} for {lock:?}"),
            };
            if self.unsure == Some(number) {
                self.held.remove(&number);
                self.held.extend(is_held.then_some(number));
            } else if self.held.contains(&number) != is_held {
                let what = if is_held { "came back" } else { "is lost" };
                wrong.push(format!("lock {number} of owner {} {what}", self.lock.svid));
            }
        }
        self.unsure = None;
        Ok(wrong)
    }
}

/// Lets owners take and drop locks, each on a connection of its own over TCP, until `cut` ends the
/// server after `answers_min` answers and a random number of further ones.
///
/// # Errors
/// The server did not answer before, or refused a lock that nobody else asks for.
pub fn work_until(
    takers: &mut [Taker],
    mut connections: Vec<Nlm>,
    random: &mut Random,
    answers_min: u64,
    cut: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let (is_over, answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let sockets: Result<Vec<_>> = connections.iter().map(socket).collect();
    let sockets = sockets?;
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (taker, nlm) in takers.iter_mut().zip(&mut connections) {
            let mut choices = Random::with_seed(random.below(1 << 32));
            let (is_over, answers) = (&is_over, &answers);
            threads.push(scope.spawn(move || {
                taker.work(nlm, &mut choices, answers)?;
                ensure!(is_over.load(Ordering::SeqCst), "a call is not answered");
                Ok(())
            }));
        }
        let wanted = answers_min + random.below(answers_min * 4);
        let waited = wait_for(&answers, wanted);
        is_over.store(true, Ordering::SeqCst);
        let cut = waited.and_then(|()| cut());
        for socket in &sockets {
            // A machine without power does not end its connections; a killed process has.
            let _ = socket.shutdown(Shutdown::Both);
        }
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a taker panicked"))??;
        }
        cut
    })?;
    let held: usize = takers.iter().map(|taker| taker.held.len()).sum();
    let answers = answers.load(Ordering::Relaxed);
    eprintln!("{answers} calls were answered, {held} locks are held");
    Ok(())
}

/// What a test ends a connection with while its owner waits for an answer.
fn socket(nlm: &Nlm) -> Result<TcpStream> {
    match &nlm.peer {
        Peer::Tcp(socket) => Ok(socket.try_clone()?),
        Peer::Udp(_) => bail!("UDP has no connections"),
    }
}

fn wait_for(answers: &AtomicUsize, wanted: u64) -> Result<()> {
    let deadline = Instant::now() + ANSWERS_TIME_MAX;
    loop {
        let count = answers.load(Ordering::Relaxed);
        if count as u64 >= wanted {
            return Ok(());
        }
        let is_late = Instant::now() > deadline;
        ensure!(!is_late, "{count} answers in {ANSWERS_TIME_MAX:?}");
        thread::sleep(POLL);
    }
}

/// How many locks an owner takes and drops; about half of them are held at a time.
const LOCKS: u64 = 64;
/// One begins where another ends, so that the server joins and splits what the owner has.
const LOCK_BYTES: u64 = 10;
/// Much longer than they take.
const ANSWERS_TIME_MAX: Duration = Duration::from_mins(1);
const POLL: Duration = Duration::from_millis(1);
