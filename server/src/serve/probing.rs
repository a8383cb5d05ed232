//! Asks the storage of a service, all the time, whether it still answers on this node: a lease
//! vouches for the data path too.
//!
//! One task for each service, for as long as the process runs, in a cluster only. It makes one
//! round after the other; a round [tries](crate::backend::probe) each exported file system once.
//! While the service is served here the round goes through the same threads as its calls, so that
//! it finds out about them as well. While it is not, the task tries the exported directories of the
//! service's definition by itself, unless commands make the storage ready: then it must not be
//! touched. So a node that stands by is known to be no better off before the service is given to
//! it; and a node that gave it away takes it only when its storage works again. Does not decide
//! what follows: it tells the slot, and the [keeper](super::keeper) tells the log, and asks
//! `cluster::reconcile`.
//!
//! ```text
//!   disk hangs      round begins             deadline            calls end
//!       |---- pause ----|------ storage_seconds ----|-- the keeper is woken --|
//! ```
//!
//! So a node whose disk hangs answers nothing later than one pause, a sixth of the deadline and two
//! seconds at most, and the deadline after that, if another node is able. One that stands by has
//! two thirds of the deadline: when the storage hangs for all nodes, the others have said so before
//! the active one judges, and it stays where it is.
//!
//! A disk that is busy is not dead. While clients' syncs come back, a round may take as long as it
//! takes; it goes before all that clients want; until it has its thread, every call counts that
//! gives one back; and only time in which this process ran counts, since one that was stopped would
//! else take its own absence for that of the disk. The cost is a sync of 4 KiB in every pause: 36 a
//! minute with the default deadline, on each node that may touch the storage.

mod round;

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::{Instant, sleep};

use self::round::{Progress, Round};
use super::ServeError;
use crate::backend::probe::{Expected, Form, probe};
use crate::cluster::definition::Defined;
use crate::definitions;
use crate::export::{self, ExportSpec};
use crate::fault::{Fault, is_planted};
use crate::node::Node;
use crate::services::{Health, Services, Slot, Writable};

/// Runs as long as the process. `time_max`: how long the storage may take.
pub(super) async fn watch(services: Arc<Services>, slot: Arc<Slot>, time_max: Duration) {
    let may_touch = slot.config.hooks.all().next().is_none();
    let mut failed_at: Option<Instant> = None;
    loop {
        sleep(pause(time_max)).await;
        if let Some(node) = slot.serving() {
            serving_round(&slot, &node, time_max).await;
        } else if may_touch {
            standby_round(&services, &slot, time_max * 2 / 3).await;
        } else if slot.health.borrow().fails() {
            // Nothing can be tried here but by an opening. Not at once, since two nodes whose
            // storage is dead would pass the service to and fro.
            let since = failed_at.get_or_insert_with(Instant::now);
            if since.elapsed() >= TRY_AGAIN_AFTER {
                tell(&slot, Health::Untried);
            }
            continue;
        } else {
            tell(&slot, Health::Untried);
        }
        failed_at = None;
    }
}

/// One try before the service is opened, which is not to be opened on storage that is dead.
///
/// # Errors
/// If it is.
pub(super) async fn try_once(
    slot: &Arc<Slot>,
    node: &Arc<Node>,
    time_max: Duration,
) -> Result<(), ServeError> {
    let mut round = Round::through_pool(slot, node);
    let health = loop {
        match round.go_on(time_max).await {
            Progress::Late(health) | Progress::Done(health) => break health,
            Progress::Waits => {}
        }
    };
    tell(slot, health.clone());
    match health {
        Health::Fails(problem) | Health::Hangs(problem) => Err(ServeError::DeadStorage(problem)),
        Health::Works(_) | Health::Untried => Ok(()),
    }
}

/// A round through the threads of the service; ends early if that is not served here any more.
async fn serving_round(slot: &Arc<Slot>, node: &Arc<Node>, time_max: Duration) {
    let mut round = Round::through_pool(slot, node);
    loop {
        match round.go_on(time_max).await {
            Progress::Done(health) => return tell(slot, health),
            // It is waited for all the same: if it comes, the storage works.
            Progress::Late(health) => tell(slot, health),
            Progress::Waits => {}
        }
        let serving = slot.serving();
        if !serving.is_some_and(|serving| Arc::ptr_eq(&serving, node)) {
            return;
        }
        round.forget_gone(&node.files.volumes());
    }
}

/// A round of a node that stands by. If it hangs, nothing else is tried here before it comes back,
/// or the service is defined anew: what hangs may not be its storage any more.
async fn standby_round(services: &Services, slot: &Arc<Slot>, time_max: Duration) {
    let defined = defined(services, slot);
    let version = defined.as_ref().map(|defined| defined.version);
    let sources = slot.config.settings.sources.clone();
    let name = slot.config.name.clone();
    let mut round = Round::new([(name.clone().into(), Vec::new())]);
    let tell_it = round.tell.clone();
    let trying = Arc::clone(slot);
    tokio::task::spawn_blocking(move || {
        // What this node's files say counts only before there is a definition.
        let specs = match defined {
            Some(defined) => definitions::specs_of(&name, &defined.definition).ok(),
            None => export::load(&sources).ok().map(|loaded| loaded.specs),
        };
        let found = specs.map_or(Ok(Form::Look), |specs| try_specs(&trying.writable, &specs));
        // Whoever waited may have gone.
        let _ = tell_it.try_send((0, found));
    });
    loop {
        match round.go_on(time_max).await {
            Progress::Done(health) => {
                // It may have been opened here meanwhile, which tells more.
                if slot.serving().is_none() {
                    tell(slot, health);
                }
                return;
            }
            Progress::Late(_) if slot.serving().is_some() => return,
            Progress::Late(health) => tell(slot, health),
            Progress::Waits => {}
        }
        if self::defined(services, slot).map(|defined| defined.version) != version {
            return;
        }
    }
}

/// What the service is, as far as this node knows.
fn defined(services: &Services, slot: &Slot) -> Option<Arc<Defined>> {
    let id = *slot.id.get()?;
    let state = services.state();
    state.service(id)?.defined().cloned()
}

fn try_specs(writable: &Writable, specs: &[ExportSpec]) -> Result<Form, (PathBuf, Errno)> {
    let mut form = Form::Write;
    for spec in specs {
        let tried = try_path(&spec.path, writable.expected_of(spec))?;
        if tried == Form::Write {
            writable.note(spec.path.clone());
        }
        form = form.min(tried);
    }
    Ok(form)
}

fn try_path(path: &Path, expected: Expected) -> Result<Form, (PathBuf, Errno)> {
    planted()
        .and_then(|()| match File::open(path) {
            Ok(directory) => probe(directory.as_fd(), expected),
            // Not there, or not to be had: an opening says more about it.
            Err(error) => match Errno::from_io_error(&error) {
                Some(errno @ (Errno::IO | Errno::STALE | Errno::SHUTDOWN | Errno::NOTCONN)) => {
                    Err(errno)
                }
                _ => Ok(Form::Look),
            },
        })
        .map_err(|errno| (path.to_path_buf(), errno))
}

/// Says what is known, and tells people if that is news.
fn tell(slot: &Slot, health: Health) {
    let service = &slot.config.name;
    slot.health.send_if_modified(|known| {
        let is_news = known.fails() != health.fails();
        match &health {
            Health::Fails(problem) | Health::Hangs(problem) if is_news => {
                let what_follows = what_follows(slot, &health);
                tracing::error!(
                    service,
                    "the storage of service `{service}` does not work on this node: {problem}; \
                     {what_follows}"
                );
            }
            Health::Works(_) if is_news => {
                tracing::warn!(service, "its storage works again on this node");
            }
            _ => {}
        }
        let differs = *known != health;
        *known = health;
        differs
    });
}

/// For people: what becomes of a service whose storage does not work here.
fn what_follows(slot: &Slot, health: &Health) -> String {
    let name = &slot.config.name;
    let has_commands = slot.config.hooks.all().next().is_some();
    match (slot.serving(), health) {
        (None, _) => "the service is not taken here before it works\nhint: see the kernel's log \
                      (`dmesg`) for the disk"
            .to_owned(),
        (Some(_), Health::Hangs(_)) if has_commands => format!(
            "IT STAYS HERE, since no other node can know whether it hangs there as well; what \
             needs the disk is put off until it answers, or says that it is dead\nhint: if only \
             this node has lost its way to the disk, say `havenfs service move {name} --to NODE`, or \
             stop this machine: another node takes the service"
        ),
        (Some(_), _) => {
            "it is given to another node, if there is one on which it works\nhint: see \
                         the kernel's log (`dmesg`) for the disk"
                .to_owned()
        }
    }
}

/// The planted faults of tests.
fn planted() -> Result<(), Errno> {
    if is_planted(Fault::DeadStorage) {
        return Err(Errno::IO);
    }
    Ok(())
}

/// How long to wait before the next round.
fn pause(time_max: Duration) -> Duration {
    (time_max / 6).min(PAUSE_MAX)
}

/// The longest pause between two rounds.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// How long a node leaves the service to others after its storage failed, where only an opening can
/// find out whether it works again.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(30);

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use crate::cluster::definition::Definition;

    #[test]
    fn what_is_exported_for_reading_only_is_only_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let found = |options: &str, path: &Path| {
            let definition = Definition {
                exports: vec![format!("{} *({options})", path.display()).into()],
                ..Definition::default()
            };
            try_specs(
                &Writable::default(),
                &definitions::specs_of("a", &definition).unwrap(),
            )
        };
        assert_eq!(found("rw", dir.path()), Ok(Form::Write));
        assert_eq!(found("ro", dir.path()), Ok(Form::Look));
        // An opening says more about it.
        assert_eq!(found("rw", &dir.path().join("none")), Ok(Form::Look));
    }
}
