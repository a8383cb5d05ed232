//! The worker threads: where calls run that may wait for a disk.
//!
//! A fixed number of threads take jobs from one queue. How many jobs can be queued is bounded by
//! the connections, each of which stops reading when it has too many outstanding. A hung disk
//! holds these threads and nothing else; the data runtime goes on. And the jobs of one group (a
//! disk) get two thirds of the threads at most, so that a disk that hangs leaves threads for the
//! others.
//!
//! Waking a thread costs more than a short job, so a batch of short jobs is left to one thread,
//! and a batch of long ones (they wait for a disk) is spread over all. Which is which the pool
//! learns: it keeps the mean time of each kind of job. Should a job that is usually short get
//! stuck, [`Pool::unstick`], called every few milliseconds while jobs are queued, wakes another
//! thread.
//!
//! A finished job returns whom to tell; a thread tells them when it has nothing short left to do,
//! so that the replies of a batch leave together.
//!
//! The threads are made at start, as the server itself: a thread inherits the identity of its
//! maker (see `backend::credential`).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// How often a queue that is not empty is looked at.
const UNSTICK_AFTER: Duration = Duration::from_millis(5);
/// A job whose kind takes less on average is short, in nanoseconds.
const SHORT_NS: u64 = 50_000;
/// One more thread is woken for so many short jobs.
const SHORT_JOBS_PER_THREAD: usize = 64;
/// For how many jobs, or how long, telling may be put off.
const TELL_AFTER_JOBS: usize = 32;
const TELL_AFTER: Duration = Duration::from_micros(100);
const FINISH_CHECK: Duration = Duration::from_millis(1);
/// How many kinds of jobs are told apart.
pub const KINDS: usize = 32;

/// Somebody who waits for a finished job.
pub trait Tell: Send + Sync {
    /// Wakes them.
    fn tell(&self);
}

/// Work for a worker thread.
pub struct Job {
    /// What kind of work it is, below [`KINDS`].
    pub kind: usize,
    /// The disk it may wait for, by device number; 0 if that is not known.
    pub group: u64,
    /// The work; returns whom to tell.
    pub work: Box<dyn FnOnce() -> Option<Arc<dyn Tell>> + Send>,
}

#[derive(Default)]
struct Queue {
    /// Jobs by source and group, which take turns: no source waits for all jobs of another, and a
    /// source's jobs for one disk don't wait for those for another.
    jobs: HashMap<(u64, u64), VecDeque<Job>>,
    turns: VecDeque<(u64, u64)>,
    len: usize,
    /// What is known of each group, and how many of its jobs may be under way.
    groups: HashMap<u64, Group>,
    running_max: usize,
    idle: usize,
    closed: bool,
    /// Jobs taken so far.
    taken: u64,
    /// Threads at work on a short job: they will be back soon. A hint: 0 if one of them is stuck.
    short_running: usize,
}

/// The jobs of one group.
#[derive(Debug, Clone, Copy, Default)]
struct Group {
    /// Under way.
    running: usize,
    /// So many have ended.
    ended: u64,
}

impl Queue {
    /// Puts a job before all others.
    fn push_first(&mut self, source: u64, job: Job) {
        self.len += 1;
        let key = (source, job.group);
        self.turns.retain(|turn| *turn != key);
        self.turns.push_front(key);
        self.jobs.entry(key).or_default().push_front(job);
    }

    fn push(&mut self, source: u64, jobs: &mut Vec<Job>) {
        self.len += jobs.len();
        for job in jobs.drain(..) {
            let key = (source, job.group);
            let queued = self.jobs.entry(key).or_default();
            if queued.is_empty() {
                self.turns.push_back(key);
            }
            queued.push_back(job);
        }
    }

    /// Whether a group may have another job under way.
    fn may_run(&self, group: u64) -> bool {
        self.groups
            .get(&group)
            .is_none_or(|group| group.running < self.running_max)
    }

    /// The next job that may run, and the place of its source among the turns.
    fn first(&self) -> Option<(usize, &Job)> {
        let fronts = self
            .turns
            .iter()
            .map(|source| self.jobs.get(source)?.front());
        fronts.enumerate().find_map(|(place, job)| {
            job.filter(|job| self.may_run(job.group))
                .map(|job| (place, job))
        })
    }

    fn pop(&mut self) -> Option<Job> {
        let (place, _) = self.first()?;
        let key = self.turns.remove(place)?;
        let queued = self.jobs.get_mut(&key)?;
        let job = queued.pop_front()?;
        if queued.is_empty() {
            self.jobs.remove(&key);
        } else {
            self.turns.push_back(key);
        }
        self.len -= 1;
        self.groups.entry(job.group).or_default().running += 1;
        Some(job)
    }

    fn running(&self) -> usize {
        self.groups.values().map(|group| group.running).sum()
    }

    /// Notes that a job of `group` has ended.
    fn ended(&mut self, group: u64) {
        // It stays: there are as many as there are disks.
        let group = self.groups.entry(group).or_default();
        group.running = group.running.saturating_sub(1);
        group.ended += 1;
    }
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    /// Mean time of a job by kind, in nanoseconds.
    mean_ns: [AtomicU64; KINDS],
    /// Whom to tell of finished jobs. Shared, so that a thread whose next job gets stuck does not
    /// keep it to itself.
    untold: Mutex<Vec<Arc<dyn Tell>>>,
    /// Set while somebody looks at the queue every few milliseconds.
    watched: AtomicBool,
    watch: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_short(&self, kind: usize) -> bool {
        self.mean_ns
            .get(kind)
            .is_some_and(|mean| mean.load(Ordering::Relaxed) < SHORT_NS)
    }

    fn note_time(&self, kind: usize, elapsed: Duration) {
        let Some(mean) = self.mean_ns.get(kind) else {
            return;
        };
        let before = mean.load(Ordering::Relaxed);
        // Bounded, so that a short job that lost its processor for a while does not count as long.
        let now = u64::try_from(elapsed.as_nanos())
            .unwrap_or(u64::MAX)
            .min(4 * SHORT_NS);
        // A lost update of another thread does no harm to a mean.
        mean.store(before - before / 8 + now / 8, Ordering::Relaxed);
    }

    fn untold(&self) -> MutexGuard<'_, Vec<Arc<dyn Tell>>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes somebody to be told.
    fn put_off(&self, waiting: Arc<dyn Tell>) {
        let mut untold = self.untold();
        if !untold.iter().any(|known| Arc::ptr_eq(known, &waiting)) {
            untold.push(waiting);
        }
    }

    /// Tells everybody who waits; false if there was nobody.
    fn tell(&self) -> bool {
        let untold = std::mem::take(&mut *self.untold());
        for waiting in &untold {
            waiting.tell();
        }
        !untold.is_empty()
    }

    /// Whether the jobs at the front of the queue are worth another thread.
    fn wants_thread(&self, queue: &Queue) -> bool {
        let Some((_, first)) = queue.first() else {
            return false;
        };
        let soon_taken = self.is_short(first.kind) && queue.short_running > 0;
        queue.idle > 0 && (!soon_taken || queue.len >= SHORT_JOBS_PER_THREAD)
    }
}

/// A fixed set of worker threads.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    count: usize,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("threads", &self.count)
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// Starts `count` workers.
    pub fn start(count: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                running_max: (count * 2).div_ceil(3),
                ..Queue::default()
            }),
            wake: Condvar::new(),
            mean_ns: std::array::from_fn(|_| AtomicU64::new(SHORT_NS)),
            untold: Mutex::new(Vec::new()),
            watched: AtomicBool::new(false),
            watch: Notify::new(),
        });
        let threads = (0..count)
            .map(|number| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("worker-{number}"))
                    .spawn(move || work(&shared))
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            shared,
            threads: Mutex::new(threads),
            count,
        })
    }

    /// Queues jobs of one source (a connection); `jobs` is empty afterwards. Sources take turns.
    pub fn submit(&self, source: u64, jobs: &mut Vec<Job>) {
        if jobs.is_empty() {
            return;
        }
        let mut queue = self.shared.lock();
        if queue.closed {
            drop(queue);
            // Nobody would ever take them.
            jobs.clear();
            return;
        }
        queue.push(source, jobs);
        self.begin(queue);
    }

    /// Queues a job that is taken before all others, as soon as its group may have another one
    /// under way.
    pub fn submit_first(&self, source: u64, job: Job) {
        let mut queue = self.shared.lock();
        // Else nobody would ever take it.
        if !queue.closed {
            queue.push_first(source, job);
            self.begin(queue);
        }
    }

    /// How many jobs of a group have ended so far.
    pub fn ended(&self, group: u64) -> u64 {
        let queue = self.shared.lock();
        queue.groups.get(&group).map_or(0, |group| group.ended)
    }

    /// Wakes a thread for what was queued, if it is worth that.
    fn begin(&self, queue: MutexGuard<'_, Queue>) {
        let wake = self.shared.wants_thread(&queue);
        drop(queue);
        if wake {
            self.shared.wake.notify_one();
        }
        if !self.shared.watched.swap(true, Ordering::AcqRel) {
            self.shared.watch.notify_one();
        }
    }

    /// How many jobs wait for a thread.
    pub fn queued(&self) -> usize {
        self.shared.lock().len
    }

    /// Wakes another thread whenever nothing was taken from a queue that is not empty. Runs for
    /// as long as the pool lives; sleeps while the queue is empty.
    pub async fn unstick(&self) {
        loop {
            let mut taken = None;
            loop {
                tokio::time::sleep(UNSTICK_AFTER).await;
                let mut queue = self.shared.lock();
                // Replies that a thread has put off when its next job got stuck.
                let told = self.shared.tell();
                if queue.len == 0 && !told {
                    // Under the queue's lock: a job that comes later starts the watch again.
                    self.shared.watched.store(false, Ordering::Release);
                    break;
                }
                let stuck = taken == Some(queue.taken) && queue.idle > 0;
                taken = Some(queue.taken);
                if stuck {
                    queue.short_running = 0;
                }
                drop(queue);
                if stuck {
                    self.shared.wake.notify_one();
                }
            }
            self.shared.watch.notified().await;
        }
    }

    /// Lets the workers finish what is queued and waits for them; returns how many jobs are still
    /// not done after `time_max`.
    pub fn finish(&self, time_max: Duration) -> usize {
        self.shared.lock().closed = true;
        self.shared.wake.notify_all();
        let deadline = Instant::now() + time_max;
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        while !threads.iter().all(JoinHandle::is_finished) {
            if Instant::now() >= deadline {
                let queue = self.shared.lock();
                return queue.len + queue.running();
            }
            std::thread::sleep(FINISH_CHECK);
        }
        0
    }
}

impl Drop for Pool {
    /// The threads end when they have done what is queued.
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake.notify_all();
    }
}

fn work(shared: &Shared) {
    // How many jobs were done, and since when, without telling.
    let (mut put_off, mut put_off_since) = (0, Instant::now());
    let mut queue = shared.lock();
    loop {
        let Some(job) = queue.pop() else {
            drop(queue);
            let told = shared.tell();
            put_off = 0;
            queue = shared.lock();
            if told || queue.first().is_some() {
                continue;
            }
            if queue.closed && queue.len == 0 {
                // Others may wait for jobs that are done now.
                shared.wake.notify_all();
                return;
            }
            queue.idle += 1;
            queue = shared
                .wake
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
            continue;
        };
        queue.taken += 1;
        let (kind, group) = (job.kind, job.group);
        let short = shared.is_short(kind);
        queue.short_running += usize::from(short);
        let wake = shared.wants_thread(&queue);
        drop(queue);
        if wake {
            shared.wake.notify_one();
        }
        let began = Instant::now();
        let overdue = put_off > 0 && began.duration_since(put_off_since) > TELL_AFTER;
        if overdue || put_off >= TELL_AFTER_JOBS || !short {
            shared.tell();
            put_off = 0;
        }
        if put_off == 0 {
            put_off_since = began;
        }
        if let Some(waiting) = (job.work)() {
            shared.put_off(waiting);
            put_off += 1;
        }
        shared.note_time(kind, began.elapsed());
        if !short {
            // Whoever waited for a long job has waited long enough.
            shared.tell();
            put_off = 0;
        }
        queue = shared.lock();
        queue.ended(group);
        queue.short_running = queue.short_running.saturating_sub(usize::from(short));
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;

    use super::*;

    fn job(work: impl FnOnce() + Send + 'static) -> Job {
        let work = move || {
            work();
            None
        };
        Job {
            kind: 0,
            group: 0,
            work: Box::new(work),
        }
    }

    #[test]
    fn finish_waits_for_every_job() {
        let pool = Pool::start(3).unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        for _ in 0..1000 {
            let done = Arc::clone(&done);
            pool.submit(
                1,
                &mut vec![job(move || {
                    done.fetch_add(1, Ordering::Relaxed);
                })],
            );
        }
        assert_eq!(pool.finish(Duration::from_mins(1)), 0);
        assert_eq!(done.load(Ordering::Relaxed), 1000);
        assert_eq!(pool.queued(), 0);
    }

    #[test]
    fn the_first_job_goes_before_those_of_all_sources() {
        let pool = Pool::start(1).unwrap();
        let (begin, begun) = mpsc::channel();
        let (order, seen) = mpsc::channel();
        pool.submit(0, &mut vec![job(move || begun.recv().unwrap())]);
        for source in 1..20 {
            let order = order.clone();
            pool.submit(source, &mut vec![job(move || order.send(source).unwrap())]);
        }
        pool.submit_first(99, job(move || order.send(99).unwrap()));
        begin.send(()).unwrap();
        assert_eq!(pool.finish(Duration::from_mins(1)), 0);
        assert_eq!(seen.iter().next(), Some(99));
        assert_eq!((pool.ended(0), pool.ended(1)), (21, 0));
    }

    #[test]
    fn the_stuck_jobs_of_one_group_leave_threads_for_others() {
        let pool = Pool::start(3).unwrap();
        let (free, stuck) = mpsc::channel::<()>();
        let stuck = Arc::new(Mutex::new(stuck));
        let mut jobs: Vec<Job> = std::iter::repeat_with(|| {
            let stuck = Arc::clone(&stuck);
            let wait = move || {
                let _ = stuck.lock().unwrap().recv();
            };
            Job {
                group: 7,
                ..job(wait)
            }
        })
        .take(10)
        .collect();
        pool.submit(1, &mut jobs);
        let (done, finished) = mpsc::channel();
        let other = job(move || {
            let _ = done.send(());
        });
        pool.submit(2, &mut vec![other]);
        finished.recv_timeout(Duration::from_mins(1)).unwrap();
        assert!(pool.queued() >= 8, "two of the ten are under way");
        drop(free);
        assert_eq!(pool.finish(Duration::from_mins(1)), 0);
    }

    #[test]
    fn sources_take_turns() {
        let mut queue = Queue {
            running_max: 100,
            ..Queue::default()
        };
        for (source, count) in [(1, 3), (2, 1), (3, 2)] {
            let kind = usize::try_from(source).unwrap();
            let make = || Job {
                kind,
                group: 0,
                work: Box::new(|| None),
            };
            queue.push(
                source,
                &mut std::iter::repeat_with(make).take(count).collect(),
            );
        }
        let order: Vec<usize> = std::iter::from_fn(|| queue.pop())
            .map(|job| job.kind)
            .collect();
        assert_eq!(order, [1, 2, 3, 1, 3, 1]);
        assert!(queue.len == 0 && queue.jobs.is_empty());
    }

    /// Says on a channel that it was told.
    struct Told(Mutex<mpsc::Sender<()>>);

    impl Tell for Told {
        fn tell(&self) {
            let _ = self.0.lock().unwrap().send(());
        }
    }

    #[tokio::test]
    async fn a_finished_job_is_told_although_the_next_one_is_stuck() {
        let pool = Pool::start(1).unwrap();
        for _ in 0..100 {
            pool.submit(1, &mut vec![job(|| {})]);
        }
        while pool.queued() > 0 {
            tokio::task::yield_now().await;
        }
        let (told, heard) = mpsc::channel();
        let (free, stuck) = mpsc::channel::<()>();
        let waiting: Arc<dyn Tell> = Arc::new(Told(Mutex::new(told)));
        let work = move || Some(waiting);
        let mut jobs = vec![
            Job {
                kind: 0,
                group: 0,
                work: Box::new(work),
            },
            job(move || {
                let _ = stuck.recv();
            }),
        ];
        pool.submit(1, &mut jobs);
        let hear = async {
            while heard.try_recv().is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = hear => {}
            () = pool.unstick() => {}
        }
        drop(free);
        assert_eq!(pool.finish(Duration::from_mins(1)), 0);
    }

    #[tokio::test]
    async fn a_short_kind_that_gets_stuck_does_not_hold_up_the_rest() {
        let pool = Pool::start(2).unwrap();
        // Make the kind known as short.
        for _ in 0..100 {
            pool.submit(1, &mut vec![job(|| {})]);
        }
        while pool.queued() > 0 {
            tokio::task::yield_now().await;
        }
        let (free, stuck) = mpsc::channel::<()>();
        let (done, finished) = tokio::sync::oneshot::channel();
        let mut jobs = vec![
            job(move || {
                let _ = stuck.recv();
            }),
            job(move || {
                let _ = done.send(());
            }),
        ];
        pool.submit(1, &mut jobs);
        tokio::select! {
            finished = finished => finished.unwrap(),
            () = pool.unstick() => {}
        }
        drop(free);
        assert_eq!(pool.finish(Duration::from_mins(1)), 0);
    }
}
