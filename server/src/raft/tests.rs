//! The store as a whole: proposals, restarts, failures.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, mpsc};

use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::planted::Planted;
use super::segment::Header;
use super::types::Proposed;
use super::*;
use crate::cluster::command::Activation;
use crate::cluster::{
    ClusterCommand, ClusterState, Command, Origin, Outcome, ServiceCommand, ServiceId, ServiceState,
};

/// A store on a control runtime of its own.
pub(super) struct Node {
    runtime: Runtime,
    store: Store,
    planted: Arc<Planted>,
}

impl Node {
    pub(super) fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(dir, Options::default())
    }

    pub(super) fn open_with(dir: &Path, options: Options) -> Result<Self, StoreError> {
        let planted = Arc::clone(&options.planted);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let store = runtime.block_on(Store::open_with(dir, None, options))?;
        let node = Self {
            runtime,
            store,
            planted,
        };
        if node
            .store
            .state
            .read()
            .unwrap()
            .service(ServiceId::FIRST)
            .is_none()
        {
            let name = "default".into();
            let named = node.ask(Command::Cluster(ClusterCommand::Name { name }));
            assert_eq!(named, Ok(Outcome::Named(ServiceId::FIRST)));
        }
        Ok(node)
    }

    fn ask(&self, command: Command) -> Result<Outcome, Unavailable> {
        self.runtime.block_on(self.store.proposer.ask(command))
    }

    pub(super) fn activate(&self, from: u64, to: u64) {
        for number in from..to {
            assert_eq!(
                self.ask(command(number)),
                Ok(Outcome::Assigned(number as u32 + 1))
            );
        }
    }

    pub(super) fn state(&self) -> ServiceState {
        let state = self.store.state.read().unwrap();
        state.service(ServiceId::FIRST).unwrap().clone()
    }

    /// Keeps the engine from running until what is returned is dropped.
    fn hold(&self) -> mpsc::Sender<()> {
        let (release, released) = mpsc::channel();
        let (tell, held) = mpsc::channel();
        self.store.thread.handle().spawn(async move {
            tell.send(()).unwrap();
            released.recv().unwrap_err();
        });
        held.recv().unwrap();
        release
    }

    pub(super) fn close(self) {
        self.runtime.block_on(self.store.close());
    }

    /// Ends it as a kill would: what is not written yet is never written.
    pub(super) fn kill(self) {
        self.planted.dead.store(true, Ordering::SeqCst);
        let Store {
            engine,
            driver,
            thread,
            log_thread,
            ..
        } = self.store;
        drop((engine, driver));
        // Drops all tasks, and with them the log.
        thread.finish();
        log_thread.join().unwrap();
    }
}

pub(super) fn command(number: u64) -> Command {
    let activation = Activation {
        incarnation: number,
        unix_seconds: 1_700_000_000 + number,
        recover: false,
    };
    Command::Service(ServiceId::FIRST, ServiceCommand::Activate(activation))
}

/// That command without an origin, so that it may come any number of times.
pub(super) fn proposed(number: u64) -> Proposed {
    Proposed {
        origin: Origin::default(),
        command: Arc::new(command(number)),
    }
}

/// The state after the commands below `count`.
pub(super) fn expected(count: u64) -> ServiceState {
    let mut state = ClusterState::default();
    let name = Command::Cluster(ClusterCommand::Name {
        name: "default".into(),
    });
    state.apply(&Origin::default(), &name);
    for number in 0..count {
        state.apply(&Origin::default(), &command(number));
    }
    state.service(ServiceId::FIRST).unwrap().clone()
}

fn options(segment_bytes: u64, snapshot_after_bytes: u64) -> Options {
    Options {
        segment_bytes,
        snapshot_after_bytes,
        ..Options::default()
    }
}

pub(super) fn folder() -> (TempDir, PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("state").join("store");
    (parent, dir)
}

#[test]
fn what_was_answered_is_there_after_a_close_and_after_a_kill() {
    let (_parent, dir) = folder();
    let mut count = 0;
    for round in 0..6 {
        let node = Node::open(&dir).unwrap();
        assert_eq!(node.state(), expected(count), "round {round}");
        node.activate(count, count + 20);
        count += 20;
        assert_eq!(node.state(), expected(count));
        if round % 2 == 0 {
            node.close();
        } else {
            node.kill();
        }
    }
}

#[test]
fn proposals_of_several_threads_are_answered_in_the_order_of_the_log() {
    const THREADS: u64 = 4;
    const EACH: u64 = 2500;
    let (_parent, dir) = folder();
    let node = Node::open(&dir).unwrap();
    let answered = Arc::new(Mutex::new(Vec::new()));
    let (tell, told) = tokio::sync::oneshot::channel();
    let tell = Arc::new(Mutex::new(Some(tell)));
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let proposer = node.store.proposer();
            let (answered, tell) = (Arc::clone(&answered), Arc::clone(&tell));
            std::thread::spawn(move || {
                for number in 0..EACH {
                    let number = thread * EACH + number;
                    let (answered, tell) = (Arc::clone(&answered), Arc::clone(&tell));
                    proposer.propose(command(number), move |result| {
                        assert!(matches!(result, Ok(Outcome::Assigned(_))));
                        let mut answered = answered.lock().unwrap();
                        answered.push(number);
                        if answered.len() as u64 == THREADS * EACH {
                            tell.lock().unwrap().take().unwrap().send(()).unwrap();
                        }
                    });
                }
            })
        })
        .collect();
    node.runtime.block_on(told).unwrap();
    for thread in threads {
        thread.join().unwrap();
    }
    let answered = answered.lock().unwrap();
    let mut next: Vec<u64> = (0..THREADS).map(|thread| thread * EACH).collect();
    let mut state = expected(0);
    for number in answered.iter() {
        let thread = (number / EACH) as usize;
        assert_eq!(
            *number, next[thread],
            "a thread's proposals keep their order"
        );
        next[thread] += 1;
        let Command::Service(_, command) = command(*number) else {
            panic!("a command of the service");
        };
        state.apply(&command);
    }
    assert_eq!(node.state(), state);
    node.kill();
    assert_eq!(Node::open(&dir).unwrap().state(), state);
}

#[test]
fn a_snapshot_and_the_rest_of_the_log_equal_the_whole_log() {
    let (_parent, dir) = folder();
    // Files of 16 KiB, a snapshot after 20 KiB of log.
    let small = || options(16 << 10, 20 << 10);
    let node = Node::open_with(&dir, small()).unwrap();
    node.activate(0, 3000);
    node.close();
    assert!(snapshot::path(&dir).exists());
    let numbers = recover::numbers(&dir).unwrap();
    assert!(numbers[0] > 1, "purged files are removed: {numbers:?}");
    let node = Node::open_with(&dir, small()).unwrap();
    assert_eq!(node.state(), expected(3000));
    node.activate(3000, 3100);
    node.kill();
    let node = Node::open_with(&dir, small()).unwrap();
    assert_eq!(node.state(), expected(3100));
    node.close();
}

#[test]
fn a_full_disk_ends_the_store_loudly_and_loses_nothing() {
    let (_parent, dir) = folder();
    let small = options(8 << 10, u64::MAX);
    let planted = Arc::clone(&small.planted);
    let node = Node::open_with(&dir, small).unwrap();
    node.activate(0, 20);
    planted.full.store(true, Ordering::SeqCst);
    let mut done = 20;
    while node.ask(command(done)).is_ok() {
        done += 1;
    }
    let error = node.runtime.block_on(node.store.failed());
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("log-") && text.contains("hint: free space"),
        "{text}"
    );
    // Space alone does not bring it back.
    planted.full.store(false, Ordering::SeqCst);
    node.ask(command(done)).unwrap_err();
    node.kill();
    assert_eq!(Node::open(&dir).unwrap().state(), expected(done));
}

#[test]
fn a_failed_sync_is_final() {
    let (_parent, dir) = folder();
    let node = Node::open(&dir).unwrap();
    node.activate(0, 5);
    node.planted.broken.store(true, Ordering::SeqCst);
    assert_eq!(node.ask(command(5)), Err(Unavailable::Unknown));
    node.planted.broken.store(false, Ordering::SeqCst);
    node.ask(command(6)).unwrap_err();
    let error = node.runtime.block_on(node.store.failed());
    assert!(
        matches!(error, StoreError::Io { step: "sync", .. }),
        "{error}"
    );
    node.close();
    // The write of which nobody knows may be there.
    let state = Node::open(&dir).unwrap().state();
    assert!(state == expected(5) || state == expected(6));
}

#[test]
fn a_close_answers_what_was_taken_and_refuses_the_rest() {
    let (_parent, dir) = folder();
    let node = Node::open(&dir).unwrap();
    let proposer = node.store.proposer();
    let answered = Arc::new(Mutex::new(Vec::new()));
    let propose = |number| {
        let answered = Arc::clone(&answered);
        proposer.propose(command(number), move |result| {
            answered.lock().unwrap().push(result);
        });
    };
    let held = node.hold();
    (0..1000).for_each(propose);
    assert!(answered.lock().unwrap().is_empty());
    drop(held);
    node.close();
    assert_eq!(
        *answered.lock().unwrap(),
        (1..=1000)
            .map(|epoch| Ok(Outcome::Assigned(epoch)))
            .collect::<Vec<_>>()
    );
    propose(1000);
    assert_eq!(answered.lock().unwrap()[1000], Err(Unavailable::Stopped));
    assert_eq!(Node::open(&dir).unwrap().state(), expected(1000));
}

#[test]
fn proposals_beyond_the_limit_are_refused_at_once() {
    let (_parent, dir) = folder();
    let node = Node::open(&dir).unwrap();
    let proposer = node.store.proposer();
    let held = node.hold();
    for number in 1..PROPOSALS_MAX as u64 {
        proposer.propose(command(number - 1), move |result| {
            assert_eq!(result, Ok(Outcome::Assigned(number as u32)));
        });
    }
    let (tell, told) = tokio::sync::oneshot::channel();
    let last = PROPOSALS_MAX as u64 - 1;
    proposer.propose(command(last), move |result| tell.send(result).unwrap());
    let refused = Arc::new(Mutex::new(None));
    let tell = Arc::clone(&refused);
    proposer.propose(command(last + 1), move |result| {
        *tell.lock().unwrap() = Some(result);
    });
    assert_eq!(*refused.lock().unwrap(), Some(Err(Unavailable::Busy)));
    drop(held);
    assert_eq!(
        node.runtime.block_on(told),
        Ok(Ok(Outcome::Assigned(PROPOSALS_MAX as u32)))
    );
    assert_eq!(node.state(), expected(PROPOSALS_MAX as u64));
    node.activate(last + 1, last + 2);
    // Those that a kill leaves unanswered are told so.
    let last = Arc::new(Mutex::new(None));
    let told = Arc::clone(&last);
    let held = node.hold();
    node.store.proposer.propose(command(0), move |result| {
        *told.lock().unwrap() = Some(result);
    });
    node.planted.dead.store(true, Ordering::SeqCst);
    drop(held);
    node.kill();
    assert_eq!(*last.lock().unwrap(), Some(Err(Unavailable::Unknown)));
}

/// A store of 100 commands with a snapshot and purged log files.
fn with_snapshot(dir: &Path) {
    let small = options(8 << 10, 4 << 10);
    let node = Node::open_with(dir, small).unwrap();
    node.activate(0, 1500);
    node.close();
    assert!(recover::numbers(dir).unwrap()[0] > 1);
}

#[test]
fn a_damaged_snapshot_is_named_and_never_taken_for_an_empty_one() {
    let (_parent, dir) = folder();
    with_snapshot(&dir);
    let path = snapshot::path(&dir);
    let whole = std::fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let error = Node::open(&dir).err().unwrap();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("snapshot"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "left as it is");
    };
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        refused(&damaged);
    }
    for length in 0..whole.len() {
        refused(&whole[..length]);
    }
    std::fs::remove_file(&path).unwrap();
    let error = Node::open(&dir).err().unwrap();
    assert!(matches!(error, StoreError::Missing { .. }), "{error}");
    std::fs::write(&path, &whole).unwrap();
    assert_eq!(Node::open(&dir).unwrap().state(), expected(1500));
}

#[test]
fn a_snapshot_of_another_version_is_called_so() {
    let (_parent, dir) = folder();
    with_snapshot(&dir);
    let path = snapshot::path(&dir);
    let mut bytes = std::fs::read(&path).unwrap();
    let mut open_as = |version| {
        bytes[8..12].copy_from_slice(&u32::to_le_bytes(version));
        let end = bytes.len() - 4;
        let checksum = crc32fast::hash(&bytes[..end - 8]);
        bytes[end..].copy_from_slice(&checksum.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let error = Node::open(&dir).err().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "it is left as it is");
        error
    };
    let (older, newer) = (
        open_as(snapshot::VERSION - 1),
        open_as(snapshot::VERSION + 1),
    );
    assert!(matches!(older, StoreError::Older { .. }), "{older}");
    assert!(matches!(newer, StoreError::Newer { .. }), "{newer}");
}

#[test]
fn a_snapshot_that_cannot_be_written_stops_nothing() {
    let (_parent, dir) = folder();
    let small = || options(8 << 10, 4 << 10);
    let node = Node::open_with(&dir, small()).unwrap();
    // A folder is in the way.
    std::fs::create_dir(dir.join("snapshot.new")).unwrap();
    node.activate(0, 500);
    assert!(!snapshot::path(&dir).exists());
    std::fs::remove_dir(dir.join("snapshot.new")).unwrap();
    node.activate(500, 1500);
    node.close();
    assert!(snapshot::path(&dir).exists());
    assert_eq!(Node::open(&dir).unwrap().state(), expected(1500));
}

#[test]
fn a_store_without_its_id_is_no_new_store() {
    let (_parent, dir) = folder();
    let node = Node::open(&dir).unwrap();
    node.activate(0, 3);
    node.close();
    let id = dir.join("store.json");
    let text = std::fs::read_to_string(&id).unwrap();
    let open = || Node::open(&dir).err().unwrap();
    std::fs::remove_file(&id).unwrap();
    assert!(matches!(open(), StoreError::Missing { .. }));
    for (text, newer) in [
        ("", false),
        ("{\"version\": 1", false),
        ("{\"version\": 5}", true),
    ] {
        std::fs::write(&id, text).unwrap();
        let error = open();
        assert_eq!(matches!(error, StoreError::Newer { .. }), newer, "{error}");
        assert_eq!(std::fs::read_to_string(&id).unwrap(), text);
    }
    // Another store's id does not fit either.
    let other = text.replace(|c: char| c.is_ascii_hexdigit() && c != '1', "0");
    std::fs::write(&id, other).unwrap();
    assert!(matches!(open(), StoreError::Damaged { .. }));
    std::fs::write(&id, text).unwrap();
    assert_eq!(Node::open(&dir).unwrap().state(), expected(3));
    // And an id without a log is a lost log.
    for number in recover::numbers(&dir).unwrap() {
        std::fs::remove_file(recover::path(&dir, number)).unwrap();
    }
    assert!(matches!(open(), StoreError::Missing { .. }));
}

#[test]
fn a_birth_that_a_crash_cut_short_begins_anew() {
    let (_parent, dir) = folder();
    std::fs::create_dir_all(&dir).unwrap();
    let header = Header {
        store_id: 7,
        number: 1,
        first_sequence: 1,
    };
    recover::create(&dir, &header, 4096).unwrap();
    std::fs::write(dir.join("log.new"), "half").unwrap();
    let node = Node::open(&dir).unwrap();
    node.activate(0, 1);
    node.close();
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let (parent, _) = folder();
    let file = parent.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = Node::open(&file.join("store")).err().unwrap();
    assert!(matches!(error, StoreError::Io { .. }), "{error}");
    assert!(error.to_string().contains("file/store"), "{error}");
}
