//! The log against openraft's own suite, and against crashes and damage.

use std::fs;
use std::path::PathBuf;
use std::thread::JoinHandle;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt as _;
use proptest::prelude::*;
use tempfile::TempDir;

use super::super::machine::{Machine, Snapshots};
use super::super::pending::Pending;
use super::super::recover::{Recovered, create, recover};
use super::super::segment::{FrameBuilder, HEADER_BYTES, Header, Step, step};
use super::super::tests::{command, proposed};
use super::super::types::{LeaderId, Payload, SnapshotMeta};
use super::*;

const STORE: u64 = 0x1234_5678_9abc_def0;

fn options() -> Options {
    Options {
        segment_bytes: 4096,
        ..Options::default()
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(future)
}

/// A folder with an empty log.
fn born() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let header = Header {
        store_id: STORE,
        number: 1,
        first_sequence: 1,
    };
    create(dir.path(), &header, 4096).unwrap();
    dir
}

fn open(dir: &TempDir) -> (Log, JoinHandle<()>) {
    Log::open(dir.path(), STORE, None, pending(), options()).unwrap()
}

fn pending() -> Arc<Pending> {
    Arc::new(Pending::new(1))
}

fn close((log, thread): (Log, JoinHandle<()>)) {
    drop(log);
    thread.join().unwrap();
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId {
        leader_id: LeaderId { term, node_id: 1 },
        index,
    }
}

fn entry(term: u64, index: u64) -> Entry {
    Entry {
        log_id: log_id(term, index),
        payload: Payload::Normal(proposed(index)),
    }
}

/// Appends and waits until it is durable.
async fn append(log: &mut Log, entries: Vec<Entry>) -> io::Result<()> {
    let (told, waiting) = Types::oneshot();
    log.append(entries, IOFlushed::signal(told)).await?;
    waiting.await.unwrap()
}

async fn entries(log: &mut Log) -> Vec<Entry> {
    let mut reader = log.get_log_reader().await;
    reader.try_get_log_entries(..).await.unwrap()
}

/// A log of `count` entries, each in a frame of its own; returns where the frames begin and end.
fn small_log(count: u64) -> (TempDir, PathBuf, Vec<usize>) {
    let dir = born();
    let mut log = open(&dir);
    run(async {
        for index in 0..count {
            append(&mut log.0, vec![entry(1, index)]).await.unwrap();
        }
    });
    close(log);
    let path = recover::path(dir.path(), 1);
    let bounds = bounds(&path);
    assert_eq!(bounds.len() as u64, count + 1);
    (dir, path, bounds)
}

/// Where the frames of a file begin, and where the last one ends.
fn bounds(path: &Path) -> Vec<usize> {
    let bytes = fs::read(path).unwrap();
    let key = Header::decode(path, &bytes).unwrap().key();
    let mut bounds = vec![HEADER_BYTES];
    while let Step::Frame(frame) = step(&bytes, bounds[bounds.len() - 1], key) {
        bounds.push(frame.end);
    }
    bounds
}

fn last_index(recovered: &Recovered) -> Option<u64> {
    recovered.past.last.map(|last| last.index)
}

struct Builder;

impl StoreBuilder<Types, Log, Machine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, Log, Machine), StorageError<Types>> {
        let dir = born();
        // The suite needs no more than that the thread ends when the log is dropped.
        let (log, _thread) = open(&dir);
        let path = dir.path().to_path_buf();
        let snapshots = Snapshots::new(path, STORE, log.shared(), u64::MAX, None);
        let machine = Machine::new(
            Arc::default(),
            SnapshotMeta::default(),
            Arc::new(snapshots),
            pending(),
        );
        Ok((dir, log, machine))
    }
}

#[test]
fn openraft_finds_nothing_wrong() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(Suite::test_all(Builder)).unwrap();
}

#[test]
fn a_write_cut_at_any_byte_is_cleared_and_the_log_goes_on() {
    let (dir, path, bounds) = small_log(4);
    let whole = fs::read(&path).unwrap();
    let (start, end) = (bounds[3], bounds[4]);
    for cut in start..end {
        fs::write(&path, &whole[..cut]).unwrap();
        let recovered = recover(dir.path(), STORE, None).unwrap();
        assert_eq!(last_index(&recovered), Some(2), "cut at {cut}");
        drop(recovered);
        let mut log = open(&dir);
        run(async {
            append(&mut log.0, vec![entry(2, 3)]).await.unwrap();
            let expected = [entry(1, 0), entry(1, 1), entry(1, 2), entry(2, 3)];
            assert_eq!(entries(&mut log.0).await, expected);
        });
        close(log);
        let recovered = recover(dir.path(), STORE, None).unwrap();
        assert_eq!(recovered.past.last, Some(log_id(2, 3)));
        // The shortened file may have had no room.
        if recover::numbers(dir.path()).unwrap().len() > 1 {
            fs::remove_file(recover::path(dir.path(), 2)).unwrap();
        }
    }
}

#[test]
fn sectors_that_were_not_written_are_a_crash() {
    let dir = born();
    let mut log = open(&dir);
    run(async {
        append(&mut log.0, vec![entry(1, 0)]).await.unwrap();
        // One frame of several sectors.
        let many = (1..40).map(|index| entry(1, index)).collect();
        append(&mut log.0, many).await.unwrap();
    });
    close(log);
    let path = recover::path(dir.path(), 1);
    let whole = fs::read(&path).unwrap();
    let bounds = bounds(&path);
    let (start, end) = (bounds[1], bounds[2]);
    assert!(end > 4 * 512);
    for left_out in 1_u32..1 << (end.div_ceil(512)) {
        let mut torn = whole.clone();
        for sector in (0..32).filter(|sector| left_out & 1 << sector != 0) {
            let (from, to) = (sector * 512, (sector + 1) * 512);
            torn[from.clamp(start, end)..to.clamp(start, end)].fill(0);
        }
        if torn == whole {
            continue;
        }
        fs::write(&path, &torn).unwrap();
        let recovered = recover(dir.path(), STORE, None).unwrap();
        assert_eq!(last_index(&recovered), Some(0), "sectors {left_out:b}");
        drop(recovered);
        let cleared = fs::read(&path).unwrap();
        assert_eq!(cleared.len(), whole.len());
        assert_eq!(cleared[..start], whole[..start]);
        assert!(cleared[start..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_flipped_bit_never_takes_an_entry_away() {
    let (dir, path, bounds) = small_log(3);
    let whole = fs::read(&path).unwrap();
    let mut refused = 0;
    // Free space after the frames too.
    for at in 0..bounds[3] + 64 {
        for bit in 0..8 {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << bit;
            fs::write(&path, &damaged).unwrap();
            match recover(dir.path(), STORE, None) {
                Ok(recovered) => assert_eq!(last_index(&recovered), Some(2), "byte {at} bit {bit}"),
                Err(error) => {
                    refused += 1;
                    assert_eq!(fs::read(&path).unwrap(), damaged, "left as it is");
                    let text = error.to_string();
                    assert!(text.contains("log-0000000000000001"), "{text}");
                    assert!(text.contains("hint: "), "{text}");
                }
            }
        }
    }
    // Only padding and free space may change unnoticed.
    assert!(refused > 8 * (bounds[3] - HEADER_BYTES) * 3 / 4);
}

#[test]
fn a_bad_write_before_a_good_one_is_damage_and_says_where() {
    let (dir, path, bounds) = small_log(4);
    let mut bytes = fs::read(&path).unwrap();
    bytes[bounds[2]..bounds[3]].fill(0);
    fs::write(&path, &bytes).unwrap();
    let error = recover(dir.path(), STORE, None).unwrap_err().to_string();
    assert!(
        error.contains(&format!("damaged at byte {}", bounds[2])),
        "{error}"
    );
}

#[test]
fn what_a_newer_program_wrote_is_refused_and_left_alone() {
    let (dir, path, bounds) = small_log(2);
    let whole = fs::read(&path).unwrap();
    let header = Header::decode(&path, &whole).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = Log::open(dir.path(), STORE, None, pending(), options())
            .err()
            .unwrap();
        assert!(matches!(error, StoreError::Newer { .. }), "{error}");
        assert!(error.to_string().contains("newer havenfs"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
    };
    // The file.
    let mut newer = whole.clone();
    newer[8] = 2;
    newer[12..16].fill(0);
    let checksum = crc32fast::hash(&newer[..HEADER_BYTES]);
    newer[12..16].copy_from_slice(&checksum.to_le_bytes());
    refused(&newer);
    // A frame.
    let mut newer = whole.clone();
    let frame = &mut newer[bounds[1]..bounds[1] + 32];
    frame[4] = 2;
    let mut hasher = crc32fast::Hasher::new_with_initial(header.key());
    hasher.update(&frame[4..]);
    frame[..4].copy_from_slice(&hasher.finalize().to_le_bytes());
    refused(&newer);
    // A record.
    let mut records = Vec::new();
    put_record(&mut records, |out| {
        codec::put_entry(out, &entry(1, 2));
        out[4] = 2;
    });
    let mut builder = FrameBuilder::new(Vec::new());
    builder.push(&records, 1);
    let frame = builder.finish(header.key(), 3);
    let mut newer = whole;
    newer[bounds[2]..bounds[2] + frame.len()].copy_from_slice(&frame);
    refused(&newer);
}

#[test]
fn a_newer_command_is_called_newer_when_it_is_read() {
    let dir = born();
    let log = open(&dir);
    run(async {
        let mut records = Vec::new();
        put_record(&mut records, |out| {
            codec::put_entry(out, &entry(1, 0));
            let command = out.len() - command(0).encode().len();
            out[command] = 99;
        });
        let change = Change::Entries {
            first: 0,
            last: log_id(1, 0),
        };
        log.0.give_and_wait(records, change).await.unwrap();
    });
    close(log);
    let mut log = open(&dir);
    run(async {
        let mut reader = log.0.get_log_reader().await;
        reader.try_get_log_entries(0..1).await.unwrap_err();
        let error = log.0.shared.failure().unwrap();
        assert!(matches!(error, StoreError::Newer { .. }), "{error}");
    });
    close(log);
}

#[test]
fn another_stores_file_and_missing_files_are_noticed() {
    let dir = born();
    let mut log = open(&dir);
    run(async {
        for index in 0..400 {
            append(&mut log.0, vec![entry(1, index)]).await.unwrap();
        }
    });
    close(log);
    let numbers = recover::numbers(dir.path()).unwrap();
    assert!(numbers.len() > 3, "{numbers:?}");
    assert_eq!(
        last_index(&recover(dir.path(), STORE, None).unwrap()),
        Some(399)
    );
    let other = recover(dir.path(), STORE + 1, None).unwrap_err();
    assert!(matches!(other, StoreError::Damaged { .. }), "{other}");
    for missing in [numbers[0], numbers[1]] {
        let path = recover::path(dir.path(), missing);
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let error = recover(dir.path(), STORE, None).unwrap_err();
        assert!(matches!(error, StoreError::Missing { .. }), "{error}");
        fs::write(&path, bytes).unwrap();
    }
    // A file that lacks its last write.
    let path = recover::path(dir.path(), numbers[1]);
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[end / 32 * 32 - 64..].fill(0);
    fs::write(&path, bytes).unwrap();
    let error = recover(dir.path(), STORE, None).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
}

#[derive(Debug, Clone)]
enum Move {
    Append(u64),
    Truncate(u64),
    Purge(u64),
    Vote(u64),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Move>> {
    let step = prop_oneof![
        4 => (1_u64..30).prop_map(Move::Append),
        2 => (0_u64..40).prop_map(Move::Truncate),
        2 => (0_u64..40).prop_map(Move::Purge),
        1 => (1_u64..9).prop_map(Move::Vote),
        2 => Just(Move::Reopen),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against a list in memory.
    #[test]
    fn a_log_is_a_list(steps in steps()) {
        let dir = born();
        let mut log = open(&dir);
        let mut list: Vec<Entry> = Vec::new();
        let (mut purged, mut next, mut term, mut vote) = (None::<LogId>, 0, 1, None);
        for step in steps {
            match step {
                Move::Append(count) => {
                    let new = (next..next + count).map(|index| entry(term, index));
                    let new: Vec<_> = new.collect();
                    next += count;
                    list.extend(new.iter().cloned());
                    run(append(&mut log.0, new)).unwrap();
                }
                Move::Truncate(back) => {
                    let keep = list.len().saturating_sub(back as usize);
                    let last = list[..keep].last().map(|entry| entry.log_id);
                    let last = last.or(purged);
                    list.truncate(keep);
                    next = next_index(last);
                    term += 1;
                    run(log.0.truncate_after(last)).unwrap();
                }
                Move::Purge(count) => {
                    let count = (count as usize).min(list.len());
                    if let Some(entry) = list.drain(..count).next_back() {
                        purged = Some(entry.log_id);
                        run(log.0.purge(entry.log_id)).unwrap();
                    }
                }
                Move::Vote(number) => {
                    vote = Some(Vote::new(number, 1));
                    run(log.0.save_vote(&Vote::new(number, 1))).unwrap();
                }
                Move::Reopen => {
                    close(log);
                    log = open(&dir);
                }
            }
            run(async {
                assert_eq!(entries(&mut log.0).await, list);
                let state = log.0.get_log_state().await.unwrap();
                assert_eq!(state.last_purged_log_id, purged);
                let last = list.last().map(|entry| entry.log_id);
                assert_eq!(state.last_log_id, last.or(purged));
                let mut reader = log.0.get_log_reader().await;
                assert_eq!(reader.read_vote().await.unwrap(), vote);
                let streamed = reader.entries_stream(0..u64::MAX).await;
                let streamed: Vec<_> = streamed.map(Result::unwrap).collect().await;
                assert_eq!(streamed, list);
            });
        }
        close(log);
    }
}
