//! Compares what a server answered as durable with what is on its disk afterwards.
//!
//! Owns the model of the files that `lab-acklog` (`tests/lab/guest/acklog.py`) changes in a
//! virtual machine: its log says which changes were begun and which were answered. A change that
//! was begun but not answered when the power went may be there, be missing, or be there in part;
//! everything before it must be there whole, and nothing that was removed may come back.
//!
//! It reads a copy of the server's files; how that copy is made is the caller's business.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::process::{POLL, Process, last_lines};

/// What one worker's log promises about its directory.
#[derive(Debug, Default)]
pub struct Answered {
    paths: BTreeMap<String, Node>,
    changes: usize,
}

/// Waits until a worker has got that many more answers.
pub fn wait_for_changes(worker: &Process, more: usize, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    let before = Answered::parse(&worker.output()?)?.changes();
    loop {
        let log = worker.output()?;
        let now = Answered::parse(&log)?.changes();
        if now >= before + more {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "the worker got {} answers in {limit:?}; its log ends:\n{}",
            now - before,
            last_lines(&log)
        );
        thread::sleep(POLL);
    }
}

/// What must be found under one path.
#[derive(Clone, Debug)]
struct Node {
    kind: Kind,
    /// It may also be missing: its creation, removal or renaming was not answered.
    may_be_missing: bool,
}

#[derive(Clone, Debug)]
enum Kind {
    Directory,
    /// Bytes that must be read; `None` where an unanswered write may or may not have reached.
    /// The file may end anywhere from `size_min` on.
    File {
        bytes: Vec<Option<u8>>,
        size_min: usize,
    },
}

impl Answered {
    /// Reads a worker's log. The last line may be cut short; it is then ignored.
    pub fn parse(log: &str) -> Result<Self> {
        let mut answered = Self::default();
        let mut pending = None;
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        for line in whole.lines() {
            if let Some(begun) = line.strip_prefix("? ") {
                pending = Some(begun);
            } else if pending.take() == Some(line) {
                answered.change(line, true)?;
                answered.changes += 1;
            } else {
                bail!("the worker said: {line}");
            }
        }
        if let Some(begun) = pending {
            answered.change(begun, false)?;
        }
        Ok(answered)
    }

    /// How many changes were answered.
    #[must_use]
    pub fn changes(&self) -> usize {
        self.changes
    }

    /// Applies one change; if not `certain`, the state before and after it are both allowed.
    fn change(&mut self, line: &str, certain: bool) -> Result<()> {
        let words: Vec<&str> = line.split(' ').collect();
        match *words.as_slice() {
            ["N", name] => self.make(name, Kind::empty(), certain),
            ["M", name] => self.make(name, Kind::Directory, certain),
            ["D" | "X", name] => {
                if certain {
                    self.paths.remove(name);
                } else {
                    self.node(name)?.may_be_missing = true;
                }
            }
            ["R", old, new] => {
                let mut node = self.node(old)?.clone();
                if certain {
                    self.paths.remove(old);
                } else {
                    // Either name is right. Both or none would be wrong, and is let pass.
                    self.node(old)?.may_be_missing = true;
                    node.may_be_missing = true;
                }
                self.paths.insert(new.to_owned(), node);
            }
            ["W" | "C", name, offset, length, byte] => {
                let (offset, length) = (offset.parse()?, length.parse()?);
                let byte = certain.then_some(byte.parse()?);
                self.node(name)?.write(offset, length, byte)?;
            }
            _ => bail!("not a change: {line}"),
        }
        Ok(())
    }

    fn make(&mut self, name: &str, kind: Kind, certain: bool) {
        let node = Node {
            kind,
            may_be_missing: !certain,
        };
        self.paths.insert(name.to_owned(), node);
    }

    fn node(&mut self, name: &str) -> Result<&mut Node> {
        let node = self.paths.get_mut(name);
        node.with_context(|| format!("the log changes {name} before it makes it"))
    }

    /// Compares with the files under `root`; each string names one broken promise.
    ///
    /// `worker` is the worker's directory there.
    #[must_use]
    pub fn losses(&self, root: &Path, worker: &str) -> Vec<String> {
        let mut losses = Vec::new();
        for (name, node) in &self.paths {
            let found = node.compare(&root.join(name));
            losses.extend(found.err().map(|what| format!("{name}: {what}")));
        }
        let found = fs::read_dir(root.join(worker)).into_iter().flatten();
        for entry in found.flatten() {
            let name = format!("{worker}/{}", entry.file_name().to_string_lossy());
            if !self.paths.contains_key(&name) {
                losses.push(format!("{name}: is there, but was removed or renamed"));
            }
        }
        losses
    }
}

impl Kind {
    fn empty() -> Self {
        Self::File {
            bytes: Vec::new(),
            size_min: 0,
        }
    }
}

impl Node {
    /// Notes a write of `byte`, or of nobody knows how much if there is none.
    fn write(&mut self, offset: usize, length: usize, byte: Option<u8>) -> Result<()> {
        let Kind::File { bytes, size_min } = &mut self.kind else {
            bail!("a write to a directory");
        };
        let end = offset + length;
        if bytes.len() < end {
            bytes.resize(end, Some(0));
        }
        if byte.is_some() {
            *size_min = end.max(*size_min);
        }
        bytes[offset..end].fill(byte);
        Ok(())
    }

    fn compare(&self, path: &Path) -> std::result::Result<(), String> {
        let Ok(metadata) = fs::symlink_metadata(path) else {
            let missing = Err("is missing".to_owned());
            return if self.may_be_missing { Ok(()) } else { missing };
        };
        match &self.kind {
            Kind::Directory if metadata.is_dir() => Ok(()),
            Kind::File { bytes, size_min } if metadata.is_file() => {
                let found = fs::read(path).map_err(|error| error.to_string())?;
                let (size, size_max) = (found.len(), bytes.len());
                if size < *size_min || size > size_max {
                    return Err(format!("{size} bytes, not {size_min} to {size_max}"));
                }
                let wrong = |(found, right): (&u8, &Option<u8>)| right.is_some_and(|r| r != *found);
                match found.iter().zip(bytes).position(wrong) {
                    Some(at) => Err(format!("byte {at} is {}, not {:?}", found[at], bytes[at])),
                    None => Ok(()),
                }
            }
            _ => Err("is of another kind".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The losses of a worker `w` whose directory holds these files.
    fn losses(log: &str, files: &[(&str, &[u8])]) -> Vec<String> {
        let root = tempfile::tempdir().expect("a directory");
        let home = root.path().join("w");
        fs::create_dir(&home).expect("a directory");
        for (name, bytes) in files {
            fs::write(home.join(name), bytes).expect("a file");
        }
        let answered = Answered::parse(log).expect("a log");
        answered.losses(root.path(), "w")
    }

    const CREATED: &str = "? N w/a\nN w/a\n? W w/a 1 2 7\nW w/a 1 2 7\n";
    const NONE: [&str; 0] = [];

    #[test]
    fn whole_files_lose_nothing() {
        assert_eq!(losses(CREATED, &[("a", &[0, 7, 7])]), NONE);
    }

    #[test]
    fn missing_short_and_changed_files_are_losses() {
        assert_eq!(losses(CREATED, &[]), ["w/a: is missing"]);
        assert_eq!(
            losses(CREATED, &[("a", &[0, 7])]),
            ["w/a: 2 bytes, not 3 to 3"]
        );
        assert_eq!(
            losses(CREATED, &[("a", &[0; 3])]),
            ["w/a: byte 1 is 0, not Some(7)"]
        );
    }

    #[test]
    fn an_unanswered_write_may_be_there_in_part() {
        let log = format!("{CREATED}? C w/a 2 3 9\n");
        for right in [&[0, 7, 7][..], &[0, 7, 9, 9], &[0, 7, 9, 9, 9]] {
            assert_eq!(losses(&log, &[("a", right)]), NONE);
        }
    }

    #[test]
    fn a_removed_name_must_not_come_back() {
        let log = format!("{CREATED}? R w/a w/b\nR w/a w/b\n? D w/b\nD w/b\n? N w/c\n");
        assert_eq!(losses(&log, &[]), NONE);
        let found = losses(&log, &[("b", &[0, 7, 7])]);
        assert_eq!(found, ["w/b: is there, but was removed or renamed"]);
    }

    #[test]
    fn a_worker_that_complains_is_no_log() {
        assert!(Answered::parse("? N w/a\nTraceback: Stale file handle\n").is_err());
    }
}
