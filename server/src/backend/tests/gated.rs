//! What changes files asks the gate right before it does: behind a closed one nothing is changed,
//! and nothing is answered.
//!
//! Each change is also made with the gate open, where it must show: a change that would do nothing
//! in any case proves nothing.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tempfile::TempDir;

use super::super::file::File;
use super::super::files::Files;
use super::super::namespace::{Change, CreateHow, Special};
use super::super::setattr::{Changes, SetTime, setattr};
use super::super::{Failure, credential, data};
use super::{files_behind, look_up, root};
use crate::gate::Gate;
use crate::pool::{Job, Pool};

/// What can be seen of a file. Not the time of its last reading, which looking at it changes.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    attributes: [u64; 6],
    times: [(i64, i64); 2],
    content: Vec<u8>,
}

/// An exported directory behind a gate.
struct Tree {
    gate: Arc<Gate>,
    files: Files,
    root: Arc<File>,
    exported: TempDir,
    _state: TempDir,
}

impl Tree {
    fn new() -> Self {
        let (state, exported) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = exported.path();
        for name in ["file", "removed", "renamed", "replaced"] {
            std::fs::write(path.join(name), name).unwrap();
        }
        std::fs::create_dir(path.join("folder")).unwrap();
        symlink("file", path.join("link")).unwrap();
        let gate = Arc::new(Gate::open_for_good());
        let files = files_behind(state.path(), Arc::clone(&gate));
        let root = root(&files, path);
        Self {
            gate,
            files,
            root,
            exported,
            _state: state,
        }
    }

    fn file(&self) -> Arc<File> {
        look_up(&self.files, &self.root, "file", credential::own_caller())
    }

    fn change(&self) -> Change<'_> {
        Change {
            files: &self.files,
            caller: credential::own_caller(),
            durable: true,
        }
    }

    /// Everything in it, by path.
    fn seen(&self) -> BTreeMap<PathBuf, Seen> {
        let mut seen = BTreeMap::new();
        see(self.exported.path(), &mut seen);
        seen
    }
}

fn see(path: &Path, all: &mut BTreeMap<PathBuf, Seen>) {
    let found = std::fs::symlink_metadata(path).unwrap();
    let mut content = Vec::new();
    if found.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            see(&entry.unwrap().path(), all);
        }
    } else if found.is_file() {
        content = std::fs::read(path).unwrap();
    }
    let attributes = [
        found.ino(),
        found.nlink(),
        found.mode().into(),
        found.uid().into(),
        found.gid().into(),
        found.size(),
    ];
    let times = [
        (found.mtime(), found.mtime_nsec()),
        (found.ctime(), found.ctime_nsec()),
    ];
    let seen = Seen {
        attributes,
        times,
        content,
    };
    all.insert(path.to_owned(), seen);
}

const MODE: Changes = Changes {
    mode: Some(0o751),
    uid: None,
    gid: None,
    size: None,
    atime: None,
    mtime: None,
};

const SIZE: Changes = Changes {
    size: Some(1),
    mode: None,
    ..MODE
};

const TIMES: Changes = Changes {
    atime: Some(SetTime::Now),
    mtime: Some(SetTime::Now),
    mode: None,
    ..MODE
};

fn write(tree: &Tree, stable: bool) -> Result<(), Failure> {
    let (file, me) = (tree.file(), credential::own_caller());
    data::write(&tree.files, &file, me, 2, b"written", stable).map(drop)
}

fn set(tree: &Tree, changes: &Changes) -> Result<(), Failure> {
    let (file, me) = (tree.file(), credential::own_caller());
    setattr(&tree.files, &file, me, changes, true).map(drop)
}

fn create(tree: &Tree, name: &std::ffi::CStr, how: &CreateHow) -> Result<(), Failure> {
    let change = tree.change();
    change.create(&tree.root, name, how, |_| Ok(())).map(drop)
}

type Procedure = (&'static str, fn(&Tree) -> Result<(), Failure>);

/// Every way to change what is exported.
const CHANGING: [Procedure; 17] = [
    ("WRITE UNSTABLE", |tree| write(tree, false)),
    ("WRITE DATA_SYNC or FILE_SYNC", |tree| write(tree, true)),
    ("SETATTR of the mode", |tree| set(tree, &MODE)),
    ("SETATTR of the size", |tree| set(tree, &SIZE)),
    ("SETATTR of the times", |tree| set(tree, &TIMES)),
    ("CREATE UNCHECKED", |tree| {
        create(tree, c"new", &CreateHow::Unchecked(MODE))
    }),
    ("CREATE UNCHECKED of what is there", |tree| {
        create(tree, c"file", &CreateHow::Unchecked(SIZE))
    }),
    ("CREATE GUARDED", |tree| {
        create(tree, c"new", &CreateHow::Guarded(MODE))
    }),
    ("CREATE EXCLUSIVE", |tree| {
        create(tree, c"new", &CreateHow::Exclusive(*b"verifier"))
    }),
    ("MKDIR", |tree| {
        tree.change().mkdir(&tree.root, c"new", &MODE).map(drop)
    }),
    ("SYMLINK", |tree| {
        let change = tree.change();
        let made = change.symlink(&tree.root, c"new", c"file", &Changes::default());
        made.map(drop)
    }),
    ("MKNOD", |tree| {
        let change = tree.change();
        let made = change.mknod(&tree.root, c"new", Special::Fifo, &MODE);
        made.map(drop)
    }),
    ("REMOVE", |tree| {
        tree.change().remove(&tree.root, c"removed")
    }),
    ("RMDIR", |tree| tree.change().rmdir(&tree.root, c"folder")),
    ("RENAME", |tree| {
        let (from, to) = ((&tree.root, c"renamed"), (&tree.root, c"new"));
        tree.change().rename(from, to)
    }),
    ("RENAME over another", |tree| {
        let (from, to) = ((&tree.root, c"renamed"), (&tree.root, c"replaced"));
        tree.change().rename(from, to)
    }),
    ("LINK", |tree| {
        tree.change().link(&tree.file(), &tree.root, c"new")
    }),
];

#[test]
fn every_change_shows_while_the_gate_is_open() {
    for (name, change) in CHANGING {
        let tree = Tree::new();
        let before = tree.seen();
        assert_eq!(change(&tree), Ok(()), "{name}");
        assert_ne!(tree.seen(), before, "{name}");
    }
}

#[test]
fn behind_a_closed_gate_nothing_is_changed_and_nothing_answered() {
    for (name, change) in CHANGING {
        let tree = Tree::new();
        // Opened before, as by calls that came while it was open.
        tree.file();
        let before = tree.seen();
        tree.gate.close();
        assert_eq!(change(&tree), Err(Failure::NotServing), "{name}");
        assert_eq!(tree.seen(), before, "{name}");
        assert!(
            tree.gate.has_turned_away(),
            "{name}: its connection must end"
        );
    }
}

#[test]
fn a_change_that_waits_for_a_worker_is_not_made_when_the_gate_closes_meanwhile() {
    for (name, change) in CHANGING {
        let tree = Arc::new(Tree::new());
        tree.file();
        let before = tree.seen();
        let pool = Pool::start(1).unwrap();
        let ((free, stuck), (told, heard)) = (mpsc::channel::<()>(), mpsc::channel());
        let job = |work: Box<dyn FnOnce() + Send>| Job {
            kind: 0,
            group: 0,
            work: Box::new(move || {
                work();
                None
            }),
        };
        let wait = Box::new(move || {
            // It waits until the other end is gone.
            let _ = stuck.recv();
        });
        let own = Arc::clone(&tree);
        let carry_out = Box::new(move || told.send(change(&own)).unwrap());
        pool.submit(1, &mut vec![job(wait), job(carry_out)]);
        tree.gate.close();
        drop(free);
        assert_eq!(heard.recv().unwrap(), Err(Failure::NotServing), "{name}");
        assert_eq!(pool.finish(Duration::from_mins(1)), 0);
        assert_eq!(tree.seen(), before, "{name}");
    }
}

#[test]
fn commit_brings_nothing_to_disk_behind_a_closed_gate() {
    let (tree, me) = (Tree::new(), credential::own_caller());
    write(&tree, false).unwrap();
    let file = tree.file();
    assert!(file.is_dirty());
    tree.gate.close();
    let committed = data::commit(&tree.files, &file, me);
    assert_eq!(committed, Err(Failure::NotServing));
    assert!(file.is_dirty(), "it was synced");
    let tree = Tree::new();
    write(&tree, false).unwrap();
    data::commit(&tree.files, &tree.file(), me).unwrap();
    assert!(!tree.file().is_dirty());
}

#[test]
fn a_gate_that_closes_in_the_middle_of_a_create_stops_what_is_left_of_it() {
    let tree = Tree::new();
    let before = tree.seen();
    let change = tree.change();
    // It finds the file there, looks whether it may be cut, and only then cuts it.
    let may_cut = |_: &_| {
        tree.gate.close();
        Ok(())
    };
    let how = CreateHow::Unchecked(SIZE);
    let created = change.create(&tree.root, c"file", &how, may_cut);
    assert_eq!(created.unwrap_err(), Failure::NotServing);
    assert_eq!(tree.seen(), before);
}
