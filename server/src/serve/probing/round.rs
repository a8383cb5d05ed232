//! One try of all file systems of a service, each of which answers for itself, or does not.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::planted;
use crate::backend::probe::{Expected, Form, probe};
use crate::backend::volume::Volume;
use crate::node::Node;
use crate::pool::{self, Job, Pool};
use crate::services::{Health, Slot};

/// What a try found; else where, and what the kernel said.
pub(super) type Found = Result<Form, (PathBuf, Errno)>;

/// A try of several file systems, each of which answers for itself.
pub(super) struct Round {
    pub(super) tell: mpsc::Sender<(usize, Found)>,
    told: mpsc::Receiver<(usize, Found)>,
    waiting: Vec<Waiting>,
    health: Health,
    looked: Instant,
    /// Whose threads it goes through.
    node: Option<Weak<Node>>,
}

/// A file system that has not answered yet.
struct Waiting {
    place: usize,
    path: PathBuf,
    /// Its volumes, which count what clients bring to disk there. They may go meanwhile: nothing of
    /// them is kept open by who waits.
    volumes: Vec<Weak<Volume>>,
    /// Among the jobs of the service's threads.
    group: u64,
    /// Of the service's open volumes those that are on it; none while it stands by.
    superblock: Option<u64>,
    /// What showed last that it lives: see [`Waiting::signs`].
    signs: u64,
    /// The try has got its thread.
    begun: Arc<AtomicBool>,
    /// For how long it has not, while this process ran.
    silent: Duration,
}

impl Waiting {
    fn volumes(&self) -> impl Iterator<Item = Arc<Volume>> {
        self.volumes.iter().filter_map(Weak::upgrade)
    }

    fn set_hangs(&self, hangs: bool) {
        for volume in self.volumes() {
            volume.set_hangs(hangs);
        }
    }

    /// Grows as long as the disk lives: with each sync, and, while the try waits for a thread, with
    /// each job that gives one back. Later ones may have been answered from memory.
    fn signs(&self, pool: Option<&Pool>) -> u64 {
        let syncs: u64 = self.volumes().map(|volume| volume.syncs()).sum();
        match pool {
            Some(pool) if !self.begun.load(Ordering::Acquire) => syncs + pool.ended(self.group),
            _ => syncs,
        }
    }
}

/// How far a round is.
pub(super) enum Progress {
    /// All have answered.
    Done(Health),
    /// One has not for too long.
    Late(Health),
    /// Not all have.
    Waits,
}

impl Round {
    pub(super) fn new(disks: impl IntoIterator<Item = (PathBuf, Vec<Weak<Volume>>)>) -> Self {
        let waiting = disks.into_iter().enumerate();
        let waiting: Vec<_> = waiting
            .map(|(place, (path, volumes))| Waiting {
                place,
                path,
                volumes,
                group: 0,
                superblock: None,
                signs: 0,
                begun: Arc::default(),
                silent: Duration::ZERO,
            })
            .collect();
        let (tell, told) = mpsc::channel(waiting.len().max(1));
        Self {
            tell,
            told,
            waiting,
            health: Health::Works(Form::Write),
            looked: Instant::now(),
            node: None,
        }
    }

    /// Begins a round on the threads of a service.
    pub(super) fn through_pool(slot: &Arc<Slot>, node: &Arc<Node>) -> Self {
        let disks = disks(slot, node);
        let names = disks.iter().map(|disk| {
            let volumes = disk.volumes.iter().map(Arc::downgrade);
            (disk.path.clone(), volumes.collect())
        });
        let mut round = Self::new(names);
        round.node = Some(Arc::downgrade(node));
        for (disk, waiting) in disks.into_iter().zip(&mut round.waiting) {
            let Disk {
                path,
                tried: volume,
                expected,
                ..
            } = disk;
            let (place, begun) = (waiting.place, Arc::clone(&waiting.begun));
            let slot = Arc::clone(slot);
            let (tell, in_use) = (round.tell.clone(), Arc::clone(&node.storage_use));
            let group = volume.dev;
            (waiting.group, waiting.superblock) = (group, Some(volume.superblock));
            let probes = Arc::clone(&node.probes);
            probes.fetch_add(1, Ordering::AcqRel);
            let work = move || {
                begun.store(true, Ordering::Release);
                let found = planted().and_then(|()| probe(volume.root(), expected));
                if found == Ok(Form::Write) {
                    slot.writable.note(path.clone());
                }
                // Nothing of it is open any more when somebody hears of it.
                drop((volume, in_use));
                probes.fetch_sub(1, Ordering::AcqRel);
                // Whoever waited may have gone.
                let _ = tell.try_send((place, found.map_err(|errno| (path, errno))));
                None
            };
            // Before all that clients want, of which a busy disk may have more than it can answer
            // in the time that it has.
            let job = Job {
                kind: pool::KINDS - 1,
                group,
                work: Box::new(work),
            };
            node.pool.submit_first(SOURCE, job);
        }
        round
    }

    /// What is not exported any more is not waited for. A disk that is still exported stays the one
    /// that is waited for, also if a reload has opened it anew.
    pub(super) fn forget_gone(&mut self, volumes: &[Arc<Volume>]) {
        self.waiting.retain_mut(|waiting| {
            let on_it = volumes.iter();
            let on_it = on_it.filter(|volume| Some(volume.superblock) == waiting.superblock);
            let on_it: Vec<Weak<Volume>> = on_it.map(Arc::downgrade).collect();
            let is_there = !on_it.is_empty();
            waiting.volumes = on_it;
            is_there
        });
    }

    /// Waits for the next answer, for a moment.
    pub(super) async fn go_on(&mut self, time_max: Duration) -> Progress {
        let look = (time_max / 20).min(LOOK_MAX);
        tokio::select! {
            // An answer that is there counts, however late anybody comes to look.
            biased;
            Some((place, found)) = self.told.recv(), if !self.waiting.is_empty() => {
                // Else it was forgotten.
                if let Some(at) = self.waiting.iter().position(|one| one.place == place) {
                    self.waiting.swap_remove(at).set_hangs(false);
                    self.note(found);
                }
            }
            () = sleep(look), if !self.waiting.is_empty() => {}
            else => {}
        }
        if self.waiting.is_empty() {
            return Progress::Done(self.health.clone());
        }
        // Not the time in which this process was stopped.
        let passed = self.looked.elapsed().min(look + LAG_MAX);
        self.looked = Instant::now();
        let node = self.node.as_ref().and_then(Weak::upgrade);
        let pool = node.as_ref().map(|node| &node.pool);
        let mut late_at = None;
        for waiting in &mut self.waiting {
            waiting.silent += passed;
            let signs = waiting.signs(pool);
            // Fewer say that a volume was opened anew, or that the try has its thread.
            if signs > waiting.signs {
                waiting.silent = Duration::ZERO;
            }
            waiting.signs = signs;
            if waiting.silent > time_max {
                waiting.set_hangs(true);
                late_at.get_or_insert(&waiting.path);
            }
        }
        late_at.map_or(Progress::Waits, |path| {
            Progress::Late(match &self.health {
                // An error says more than silence.
                Health::Fails(_) => self.health.clone(),
                _ => Health::Hangs(late(path, time_max)),
            })
        })
    }

    fn note(&mut self, found: Found) {
        self.health = match (&self.health, found) {
            (Health::Fails(_) | Health::Hangs(_), _) => return,
            (_, Err((path, Errno::ROFS))) => Health::Fails(format!(
                "`{}` is exported for writing, and its file system was writable and is read-only \
                 now, as the kernel makes it after an error; if that is meant, export it `ro`",
                path.display()
            )),
            (_, Err((path, errno))) => Health::Fails(format!("`{}`: {errno}", path.display())),
            (Health::Works(known), Ok(form)) => Health::Works(form.min(*known)),
            (Health::Untried, Ok(form)) => Health::Works(form),
        };
    }
}

/// A file system of a service that is open.
struct Disk {
    /// The path of an export on it.
    path: PathBuf,
    /// What is tried.
    tried: Arc<Volume>,
    expected: Expected,
    /// All that is on it.
    volumes: Vec<Arc<Volume>>,
}

/// The file systems of a service that is open. If one is exported twice, whoever may write counts.
fn disks(slot: &Slot, node: &Node) -> Vec<Disk> {
    let exports = node.exports.load();
    let mut disks: Vec<Disk> = Vec::new();
    for volume in node.files.volumes() {
        let Some(export) = exports.by_id(volume.export_id) else {
            continue;
        };
        let expected = match (slot.writable.expected_of(&export.spec), volume.fs_id) {
            // What is mounted inside an export may be read-only on purpose.
            (Expected::Writable, 1..) => Expected::MaybeWritable,
            (expected, _) => expected,
        };
        let path = export.spec.path.clone();
        let mut same = disks.iter_mut();
        let same = same.find(|known| known.tried.superblock == volume.superblock);
        let Some(known) = same else {
            disks.push(Disk {
                path,
                tried: Arc::clone(&volume),
                expected,
                volumes: vec![volume],
            });
            continue;
        };
        known.volumes.push(Arc::clone(&volume));
        if rank(expected) > rank(known.expected) {
            (known.path, known.tried, known.expected) = (path, volume, expected);
        }
    }
    disks
}

const fn rank(expected: Expected) -> u8 {
    match expected {
        Expected::Readable => 0,
        Expected::MaybeWritable => 1,
        Expected::Writable => 2,
    }
}

fn late(path: &Path, time_max: Duration) -> String {
    format!(
        "`{}` does not answer a write for {:.0} s",
        path.display(),
        time_max.as_secs_f64().ceil()
    )
}

/// How often a round that waits is looked at, at least.
const LOOK_MAX: Duration = Duration::from_millis(250);
/// By how much a look may come late and count all the same: a busy machine, and not one that was
/// stopped.
const LAG_MAX: Duration = Duration::from_secs(1);
/// Whose jobs these are, for the turns of the pool: no connection has this number.
const SOURCE: u64 = u64::MAX;

#[cfg(test)]
mod tests;
