//! What writes nothing to the store: a reclaim of what its owner has, and TEST. Thousands of hosts
//! reclaim at once after a restart.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_tests::client::nlm::{Lock, Share, Tested, stat};

use crate::locking::{A, B, Scene};
use crate::message::{READ, share};
use crate::scene::OPEN;

/// How long a server may be busy that has just started.
const BUSY_TIME_MAX: Duration = Duration::from_secs(20);
/// For so long nothing is written by a server that nobody calls.
const QUIET: Duration = Duration::from_millis(500);

type Stored = BTreeMap<PathBuf, Vec<u8>>;

/// All bytes of all files of a directory.
fn stored(dir: &Path, all: &mut Stored) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            stored(&entry.path(), all)?;
        } else if kind.is_file() {
            all.insert(entry.path(), fs::read(entry.path())?);
        }
    }
    Ok(())
}

/// What the server has on disk.
fn store(scene: &Scene) -> Result<Stored> {
    let mut all = Stored::new();
    stored(&scene.site.path().join("state"), &mut all)?;
    ensure!(all.len() > 1, "no log in {:?}", all.keys());
    Ok(all)
}

/// The same once it has been so for a while.
fn settled(scene: &Scene) -> Result<Stored> {
    let deadline = Instant::now() + BUSY_TIME_MAX;
    let mut last = store(scene)?;
    let mut since = Instant::now();
    while since.elapsed() < QUIET {
        ensure!(Instant::now() < deadline, "it writes all the time");
        thread::sleep(Duration::from_millis(20));
        let now = store(scene)?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(last)
}

fn is_unchanged(scene: &Scene, before: &Stored) -> Result<bool> {
    Ok(settled(scene)? == *before)
}

#[test]
fn a_reclaim_of_what_is_held_writes_nothing_to_the_store() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let lock = scene.lock_of("a", 1).range(0, 100);
    let mut a = scene.server.nlm(A)?;
    ensure!(a.lock(&lock)? == stat::GRANTED);
    ensure!(a.share(&share(&scene, "a", READ, 0))?.0 == stat::GRANTED);
    let scene = scene.restart(OPEN)?;
    let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
    let before = settled(&scene)?;
    // All of it, parts of it, and all once more.
    for range in [(0, 100), (0, 10), (90, 10), (0, 100)] {
        let reclaim = Lock {
            reclaim: true,
            ..lock.range(range.0, range.1)
        };
        ensure!(a.lock(&reclaim)? == stat::GRANTED, "{range:?}");
    }
    let reclaim = Share {
        reclaim: true,
        ..share(&scene, "a", READ, 0)
    };
    ensure!(a.share(&reclaim)?.0 == stat::GRANTED);
    let held = b.test(&scene.lock_of("b", 1).range(0, 1))?;
    ensure!(matches!(held, Tested::Denied(_)), "{held:?}");
    ensure!(is_unchanged(&scene, &before)?, "a reclaim was written");
    // What is not held is written, as far as it is granted.
    let reclaim = Lock {
        reclaim: true,
        ..lock.range(200, 10)
    };
    ensure!(a.lock(&reclaim)? == stat::GRANTED);
    ensure!(!is_unchanged(&scene, &before)?, "nothing of it is on disk");
    Ok(())
}
