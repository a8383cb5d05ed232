//! Ctrl-C, and processes that must not be left behind.
//!
//! Owns the list of the children that this process has started and not waited for yet, and the
//! wish to stop. The first SIGINT, SIGTERM or SIGHUP only sets a flag: every loop of the demo asks
//! for it, so that everything is taken down by its own guard. A second one, and a panic (which
//! aborts the process and so runs no guards), kill the children at once.
//!
//! Invariant: a number is on the list only as long as its process was not waited for, so it can't
//! be that of somebody else's process.

use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};
use tokio::signal::unix::{SignalKind, signal};

static WANTED: AtomicBool = AtomicBool::new(false);
static CHILDREN: Mutex<Vec<Pid>> = Mutex::new(Vec::new());
/// What a shell tells of a process that was ended by Ctrl-C.
pub(super) const EXIT_CODE: u8 = 130;
/// How long stopping may take where nobody is there any more to stop it again.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);
/// How often a long pause asks whether to stop.
const LOOK: Duration = Duration::from_millis(20);

/// Somebody wants the demo to stop.
#[derive(Debug, thiserror::Error)]
#[error("stopped")]
pub(super) struct Interrupted;

/// Begins to listen to signals, and makes a panic end the children.
pub(super) fn watch() -> Result<()> {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        kill_children();
        report(panic);
    }));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot listen to signals")?;
    let mut signals = {
        let _inside = runtime.enter();
        [
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ]
    };
    // Ends with the process: there is nothing to wait for.
    std::thread::spawn(move || {
        runtime.block_on(async {
            let [interrupt, terminate, hangup] = &mut signals;
            for again in [false, true] {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
                WANTED.store(true, Ordering::SeqCst);
                if again {
                    kill_children();
                    std::process::exit(EXIT_CODE.into());
                }
            }
        });
    });
    Ok(())
}

/// Has the demo stop when its standard input ends, and end when it does not stop then.
pub(super) fn stop_at_end_of_input() {
    // Ends with the process: there is nothing to wait for.
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        WANTED.store(true, Ordering::SeqCst);
        std::thread::sleep(STOP_TIME_MAX);
        std::process::exit(EXIT_CODE.into());
    });
}

/// Fails with [`Interrupted`] if the demo is to stop.
pub(super) fn check() -> Result<()> {
    if WANTED.load(Ordering::SeqCst) {
        return Err(Interrupted.into());
    }
    Ok(())
}

/// Sleeps, unless the demo is to stop.
pub(super) fn sleep(pause: Duration) -> Result<()> {
    let mut left = pause;
    loop {
        check()?;
        if left.is_zero() {
            return Ok(());
        }
        let step = left.min(LOOK);
        std::thread::sleep(step);
        left -= step;
    }
}

/// Notes a child that was started.
pub(super) fn note_child(child: &Child) {
    children().push(Pid::from_child(child));
}

/// Asks whether a child has ended; from then on its number is not on the list.
pub(super) fn has_ended(child: &mut Child) -> Option<std::process::ExitStatus> {
    let mut list = children();
    let status = child.try_wait().ok().flatten();
    if status.is_some() {
        list.retain(|pid| *pid != Pid::from_child(child));
    }
    status
}

fn kill_children() {
    for pid in children().drain(..) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

fn children() -> MutexGuard<'static, Vec<Pid>> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the kernel end this process when its parent ends, even by SIGKILL: called by a node that
/// the demo starts.
pub(crate) fn end_with_parent() -> Result<()> {
    let parent = getppid();
    set_parent_process_death_signal(Some(Signal::KILL)).context("cannot follow the parent")?;
    // It may have ended just before; then process 1 or a reaper is the parent.
    anyhow::ensure!(
        getppid() == parent,
        "the process that started this one has ended"
    );
    Ok(())
}
