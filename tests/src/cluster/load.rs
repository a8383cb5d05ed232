//! Work that goes on in the background while a test breaks something.
//!
//! Owns a thread. The work asks its [`Go`] before each round whether to go on, and counts what was
//! done, so that the test can wait until something more was. What the work has seen is what
//! [`Load::finish`] returns.
//!
//! A load that is dropped is told to end and not waited for: its cluster may be gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use super::{POLL, TIME_MAX};

/// The pause between two rounds of work that takes one.
const AIR: Duration = Duration::from_millis(2);

/// Work in the background.
#[derive(Debug)]
pub struct Load<T> {
    go: Go,
    thread: Option<JoinHandle<Result<T>>>,
}

/// What the work asks and tells.
#[derive(Debug, Clone, Default)]
pub struct Go {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
}

impl Go {
    /// Whether to go on.
    pub fn on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Leaves the machine some air, which has three nodes to run.
    pub fn breathe(&self) {
        thread::park_timeout(AIR);
    }

    /// Something more is done.
    pub fn count(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }
}

impl<T: Send + 'static> Load<T> {
    /// Starts to work.
    pub fn start(work: impl FnOnce(&Go) -> Result<T> + Send + 'static) -> Self {
        let go = Go::default();
        let own = go.clone();
        Self {
            go,
            thread: Some(thread::spawn(move || work(&own))),
        }
    }

    /// How much is done.
    pub fn done(&self) -> usize {
        self.go.done.load(Ordering::Relaxed)
    }

    /// Waits until `more` is done than now.
    pub fn wait_more(&self, more: usize) -> Result<()> {
        let wanted = self.done() + more;
        let deadline = Instant::now() + TIME_MAX;
        while self.done() < wanted {
            let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            // What went wrong is what `finish` returns.
            ensure!(!ended, "the load has ended by itself");
            ensure!(Instant::now() < deadline, "the load does not get on");
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Lets the work end, and returns what it has seen.
    pub fn finish(mut self) -> Result<T> {
        self.go.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it has ended")?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => match panic.downcast_ref::<String>() {
                Some(text) => Err(anyhow!("the load panics: {text}")),
                None => bail!("the load panics"),
            },
        }
    }
}

impl<T> Drop for Load<T> {
    fn drop(&mut self) {
        self.go.stop.store(true, Ordering::Relaxed);
    }
}
