//! What tests start in a lab: commands that end ([`Output`]) and processes that run beside the test
//! ([`Process`]).
//!
//! Invariant: a [`Process`] is gone when its guard is; it is ended by its own number, never by
//! name.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal};

/// What a command left behind.
#[derive(Clone, Debug)]
pub struct Output {
    /// The exit status; 128 plus the signal's number if a signal ended it.
    pub status: i32,
    /// Standard output; bytes that are no UTF-8 are replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
}

impl Output {
    /// The standard output if the status is 0; else an error that tells all, beginning with `what`.
    pub fn success(self, what: &str) -> Result<String> {
        ensure!(
            self.status == 0,
            "{what}\nexit status {}\n--- standard output\n{}\n--- standard error\n{}",
            self.status,
            last_lines(&self.stdout),
            last_lines(&self.stderr)
        );
        Ok(self.stdout)
    }
}

impl From<std::process::Output> for Output {
    fn from(output: std::process::Output) -> Self {
        let signal = || output.status.signal().map_or(-1, |number| 128 + number);
        Self {
            status: output.status.code().unwrap_or_else(signal),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// A process of the lab that runs beside the test; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    /// Where this process's output begins in the log.
    began: usize,
}

impl Process {
    pub(super) fn spawn(log: PathBuf, command: &mut Command) -> Result<Self> {
        Self::spawn_reading(log, command.stdin(Stdio::null()))
    }

    /// As [`Process::spawn`], with the standard input that `command` has been given.
    pub(super) fn spawn_reading(log: PathBuf, command: &mut Command) -> Result<Self> {
        // Appended: a second life of the same server continues its log.
        let file = File::options().create(true).append(true).open(&log)?;
        let began = file.metadata()?.len() as usize;
        let child = command
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self { child, log, began })
    }

    /// Waits until a line of the output contains `words`, and returns it.
    pub fn wait_for_line(&mut self, words: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            // Looked at before the log, so that a last line written before the end is seen.
            let ended = self.child.try_wait()?;
            let text = self.output()?;
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            if let Some(line) = whole.lines().find(|line| line.contains(words)) {
                return Ok(line.to_owned());
            }
            if let Some(status) = ended {
                bail!(
                    "ended ({status}) before it said `{words}`:\n{}",
                    tail(&self.log)
                );
            }
            if Instant::now() > deadline {
                bail!("no `{words}` after {limit:?}:\n{}", tail(&self.log));
            }
            thread::sleep(POLL);
        }
    }

    /// Sends a line to the standard input of a process that was started to read one.
    pub fn say(&self, line: &str) -> Result<()> {
        let input = self.child.stdin.as_ref();
        let mut input = input.context("this process reads nothing")?;
        input.write_all(format!("{line}\n").as_bytes())?;
        Ok(())
    }

    /// Everything that the process wrote so far, to standard output and standard error.
    pub fn output(&self) -> Result<String> {
        let log = fs::read(&self.log)?;
        let own = log.get(self.began..).unwrap_or_default();
        Ok(String::from_utf8_lossy(own).into_owned())
    }

    /// Sends a signal to the process itself.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        rustix::process::kill_process(self.inner_pid()?, signal)?;
        Ok(())
    }

    /// Ends the process at once, as `kill -9` does, and waits for its end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::KILL)?;
        Ok(self.child.wait()?)
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("still running after {limit:?}:\n{}", tail(&self.log));
            }
            thread::sleep(POLL);
        }
    }

    /// The process that works: `nsenter` forks to enter a process namespace, and it is its child
    /// that counts; what runs through `vmctl` is the process itself.
    fn inner_pid(&self) -> Result<Pid> {
        let outer = self.child.id();
        let name = fs::read_to_string(format!("/proc/{outer}/comm"))?;
        let mut pid = outer.to_string();
        if name.trim() == "nsenter" {
            let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"))?;
            if let Some(child) = children.split_whitespace().next() {
                child.clone_into(&mut pid);
            }
        }
        Pid::from_raw(pid.parse()?).ok_or_else(|| anyhow!("process {pid}"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.signal(Signal::KILL);
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The last lines of a file, for a message.
pub(super) fn tail(file: &Path) -> String {
    fs::read(file).map_or_else(
        |error| format!("{}: {error}", file.display()),
        |bytes| last_lines(&String::from_utf8_lossy(&bytes)),
    )
}

pub(super) fn last_lines(text: &str) -> String {
    let mut lines: VecDeque<&str> = VecDeque::new();
    for line in text.lines() {
        if lines.len() == TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }
    Vec::from(lines).join("\n")
}

/// How many lines of a log a failure shows.
const TAIL_LINES: usize = 40;
/// How often a condition is looked at.
pub(super) const POLL: Duration = Duration::from_millis(20);
