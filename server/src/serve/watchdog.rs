//! Tells systemd's watchdog that this process is well: sd_watchdog_enabled(3).
//!
//! The task runs on the control runtime, which keeps the services, and says so only if the thread
//! of the lease gets its turns too. So a process in which one of the two stands still is killed,
//! and what it serves is taken over, also if its kernel still answers for it. Disks are no concern
//! here: neither thread waits for one, and what becomes of a service whose disk hangs is
//! `probing`'s and the keeper's.
//!
//! Does nothing where nobody watches. Tells also while the process ends, which may take long.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::fault::{Fault, is_planted};

/// Begins to tell, until what is returned is dropped.
pub(super) fn start(is_well: impl Fn() -> bool + Send + 'static) -> JoinSet<()> {
    let mut telling = JoinSet::new();
    if let Some(time_max) = sd_notify::watchdog_enabled() {
        let every = (time_max / TELLS_PER_TIME).max(EVERY_MIN);
        telling.spawn(tell(every, is_well));
    }
    if is_planted(Fault::ControlHangs) {
        telling.spawn(hang());
    }
    telling
}

async fn tell(every: Duration, is_well: impl Fn() -> bool) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut was_well = true;
    loop {
        ticks.tick().await;
        let is_well = is_well();
        if is_well {
            // If it can't be told, nothing else would help either.
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        } else if was_well {
            tracing::error!("the thread of the lease does not run: the watchdog is told nothing");
        }
        was_well = is_well;
    }
}

/// The planted fault `control-hangs`.
async fn hang() {
    tokio::time::sleep(HANGS_AFTER).await;
    loop {
        std::thread::park();
    }
}

/// How often it is told in the time in which it must be.
const TELLS_PER_TIME: u32 = 4;
const EVERY_MIN: Duration = Duration::from_millis(1);
const HANGS_AFTER: Duration = Duration::from_secs(3);
