//! Runs a command of an operator as a child process, and says what became of it.
//!
//! Owns the child and whatever it has started, until it ends by itself or its time is over. Does
//! not decide when a command is run, nor what its end means: that is [`storage`](super::storage).
//! Blocks its thread, so it is called where waiting is allowed.
//!
//! Invariants:
//! - No command outlives its time limit, and nothing of its process group does: first SIGTERM, a
//!   second later SIGKILL, to the whole group. The group's number can't be somebody else's then,
//!   since the child is waited for only afterwards. (What a command that has ended by itself left
//!   running is left alone: it may have started a daemon on purpose.)
//! - What the command says is bounded, and its pipe never fills up while it runs.
//! - One that can't be killed, because the kernel waits for a disk or it runs as somebody else, is
//!   left after a while, as a [`Remnant`] that knows whether it still runs. Its number stays its
//!   own until then, since it is not waited for before all of its group have ended.
//! - A child dies with this process. What the child has started does not: the kernel tells nobody
//!   but the child.

use std::fmt;
use std::fs;
use std::io::{self, PipeReader, Read as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use crate::backend::sys;
use crate::config::hooks::HookCommand;

/// A command that is to be run.
#[derive(Debug)]
pub(super) struct Hook {
    /// What people call it, as in "fence hook for node `n2`".
    pub(super) title: String,
    /// The program and its arguments.
    pub(super) command: HookCommand,
    /// What is added to this process's environment; without a value it is taken out.
    pub(super) environment: Vec<(&'static str, Option<String>)>,
    /// How long it may take.
    pub(super) time_max: Duration,
}

/// Why a command has not done its work.
#[derive(Debug, thiserror::Error)]
pub(super) enum HookError {
    /// It never ran, or what became of it is not known.
    #[error("{title} can't be run: cannot {step} `{}`: {source}", program.display())]
    System {
        /// Which command.
        title: String,
        /// What was tried.
        step: &'static str,
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It says that it failed.
    #[error("{title} exited with status {status}{}", said.last_line())]
    Exited {
        /// Which command.
        title: String,
        /// Its status.
        status: i32,
        /// What it said.
        said: Said,
    },
    /// It was killed, and not by this program.
    #[error("{title} was killed by signal {signal}{}", said.last_line())]
    Killed {
        /// Which command.
        title: String,
        /// By which signal.
        signal: i32,
        /// What it said.
        said: Said,
    },
    /// Its time was over, and it was killed.
    #[error("{title} did not end within {} s{}", time_max.as_secs(), said.last_line())]
    TooSlow {
        /// Which command.
        title: String,
        /// Its time.
        time_max: Duration,
        /// What it said.
        said: Said,
    },
    /// It was not needed any more, and was killed.
    #[error("{0} was ended early, since it was not needed any more")]
    CutShort(String),
    /// It was to end, and can't be killed: it may still do what it was told to do.
    #[error("{0}")]
    StillRuns(Arc<Remnant>),
}

impl HookError {
    /// The end of what the command said.
    pub(super) const fn said(&self) -> Option<&Said> {
        match self {
            Self::Exited { said, .. } | Self::Killed { said, .. } | Self::TooSlow { said, .. } => {
                Some(said)
            }
            Self::System { .. } | Self::CutShort(_) | Self::StillRuns(_) => None,
        }
    }
}

/// The end of what a command wrote to its standard output and error.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Said(Vec<u8>);

impl Said {
    fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        let more = self.0.len().saturating_sub(SAID_BYTES_MAX);
        self.0.drain(..more);
    }

    /// The last line that is not empty, after a colon; nothing if there is none.
    fn last_line(&self) -> String {
        let text = self.to_string();
        let line = text.lines().rev().map(str::trim).find(|l| !l.is_empty());
        let line: String = line
            .into_iter()
            .flat_map(str::chars)
            .take(LINE_CHARS_MAX)
            .collect();
        if line.is_empty() {
            line
        } else {
            format!(": {line}")
        }
    }
}

impl fmt::Display for Said {
    /// Without what could make a terminal or a log look like something else.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy(&self.0);
        let is_shown = |c: &char| *c == '\n' || !c.is_control();
        let text: String = text.trim_end().chars().filter(is_shown).collect();
        f.write_str(&text)
    }
}

/// A command that could not be ended.
#[derive(Debug)]
pub(super) struct Remnant {
    title: String,
    id: Pid,
    /// None: it has ended.
    running: Mutex<Option<Running>>,
}

impl Remnant {
    /// Whether it has ended meanwhile, with all that it had started.
    pub(super) fn has_ended(&self) -> bool {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let has_ended = running.as_mut().is_none_or(Running::is_gone);
        if let Some(mut ended) = running.take_if(|_| has_ended) {
            // It has ended, so this neither waits nor tells anything.
            let _ = ended.child.wait();
        }
        has_ended
    }
}

impl fmt::Display for Remnant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (title, id) = (&self.title, self.id.as_raw_pid());
        write!(
            f,
            "{title} was to be ended and can't be killed: process {id}, or what it has started, \
             still runs"
        )
    }
}

/// Runs a command to its end, which comes early if `cut_short` becomes true.
///
/// # Errors
/// If it has not succeeded.
pub(super) fn run(hook: &Hook, cut_short: &AtomicBool) -> Result<Said, HookError> {
    run_with(hook, cut_short, kill_process_group)
}

/// The same, with something that sends a signal to a process group.
fn run_with(
    hook: &Hook,
    cut_short: &AtomicBool,
    signal: impl Fn(Pid, Signal) -> Result<(), Errno>,
) -> Result<Said, HookError> {
    let failed = |step| {
        move |source| HookError::System {
            title: hook.title.clone(),
            step,
            program: hook.command.program.clone(),
            source,
        }
    };
    let mut running = Running::start(hook).map_err(failed("start"))?;
    let deadline = Instant::now() + hook.time_max;
    let is_over = || cut_short.load(Ordering::Acquire) || Instant::now() >= deadline;
    let ended = running.wait(is_over);
    if !matches!(ended, Ok(true)) && !running.end_all(signal) {
        return Err(HookError::StillRuns(Arc::new(Remnant {
            title: hook.title.clone(),
            id: running.id,
            running: Mutex::new(Some(running)),
        })));
    }
    let ended = ended.map_err(failed("wait for"))?;
    let status = running.child.wait().map_err(failed("wait for"))?;
    let (title, said) = (hook.title.clone(), running.said);
    if !ended {
        let time_max = hook.time_max;
        return Err(if cut_short.load(Ordering::Acquire) {
            HookError::CutShort(title)
        } else {
            HookError::TooSlow {
                title,
                time_max,
                said,
            }
        });
    }
    match (status.code(), status.signal()) {
        _ if status.success() => Ok(said),
        (Some(status), _) => Err(HookError::Exited {
            title,
            status,
            said,
        }),
        (None, signal) => Err(HookError::Killed {
            title,
            signal: signal.unwrap_or_default(),
            said,
        }),
    }
}

/// A command that runs, or has ended and was not waited for yet.
#[derive(Debug)]
struct Running {
    child: Child,
    /// Its number, and that of its process group.
    id: Pid,
    output: PipeReader,
    said: Said,
}

impl Running {
    fn start(hook: &Hook) -> io::Result<Self> {
        let (output, input) = io::pipe()?;
        rustix::io::ioctl_fionbio(&output, true)?;
        let mut command = Command::new(&hook.command.program);
        command
            .args(&hook.command.arguments)
            .stdin(Stdio::null())
            .stdout(input.try_clone()?)
            .stderr(input)
            .process_group(0);
        for (name, value) in &hook.environment {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        // The server's own mask is empty, for the modes that clients ask for.
        sys::set_umask_of_child(&mut command, CHILD_UMASK);
        // A fence of a server that is not there any more must not go on beside the next server's.
        // The child dies with the thread that starts it: that is the one that waits for it here, so
        // it is there as long as it is to live. A remnant is not: it was to die anyway.
        sys::end_child_with_parent(&mut command);
        let child = command.spawn()?;
        Ok(Self {
            id: Pid::from_child(&child),
            child,
            output,
            said: Said::default(),
        })
    }

    /// Waits until the child has ended, or `is_over` says that it need not be waited for any more.
    /// Returns whether it has ended; it keeps its number.
    fn wait(&mut self, is_over: impl Fn() -> bool) -> io::Result<bool> {
        let mut pause = PAUSE_MIN;
        loop {
            self.hear();
            // Asked before the clock is, so that an end in time counts.
            let is_over = is_over();
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            if waitid(WaitId::Pid(self.id), options)?.is_some() {
                self.hear();
                return Ok(true);
            }
            if is_over {
                return Ok(false);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Ends the child and all that is in its process group; returns whether they have ended. The
    /// child keeps its number. If a signal can't be sent, that shows in those who go on.
    fn end_all(&mut self, signal: impl Fn(Pid, Signal) -> Result<(), Errno>) -> bool {
        let _ = signal(self.id, Signal::TERM);
        let deadline = Instant::now() + TERM_TIME;
        let _ = self.wait(|| Instant::now() >= deadline);
        // Also if the child has ended: others of its group may not have.
        let _ = signal(self.id, Signal::KILL);
        let deadline = Instant::now() + END_TIME_MAX;
        loop {
            if self.is_gone() {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(PAUSE_MAX);
        }
    }

    /// Whether the child has ended, and all of its process group. What can't be found out counts
    /// as no.
    fn is_gone(&mut self) -> bool {
        matches!(self.wait(|| true), Ok(true)) && is_group_gone(self.id).unwrap_or_default()
    }

    /// Takes what the command has said. Bounded, so that one that never stops talking is not heard
    /// beyond its time.
    fn hear(&mut self) {
        let mut buffer = [0; SAID_BYTES_MAX];
        for _ in 0..READS_MAX {
            match self.output.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => self.said.add(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing now. Any other failure costs no more than what it said.
                Err(_) => return,
            }
        }
    }
}

/// Whether nobody of a process group lives. Who has ended counts as gone, whether or not anybody
/// has waited for it: where the first process of a container does not, it stays like that.
fn is_group_gone(group: Pid) -> io::Result<bool> {
    let group = group.as_raw_pid().to_string();
    let lives = |entry: &fs::DirEntry| {
        // Not a process, or one that has ended since.
        let stat = fs::read(entry.path().join("stat")).unwrap_or_default();
        let stat = String::from_utf8_lossy(&stat);
        // Its name stands in brackets and may be anything; then: state, parent, group.
        let after_name = stat.rsplit_once(')').unwrap_or_default().1;
        let mut fields = after_name.split_ascii_whitespace();
        let has_ended = matches!(fields.next(), Some("Z" | "X") | None);
        !has_ended && fields.nth(1) == Some(&group)
    };
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let name = entry.file_name();
        let is_process = name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
        if is_process && lives(&entry) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// How much of what a command says is kept.
const SAID_BYTES_MAX: usize = 4096;
/// How much of it an error shows.
const LINE_CHARS_MAX: usize = 300;
/// How often the pipe is read before the clock is looked at again; it holds 64 KiB.
const READS_MAX: usize = 32;
/// Files that a hook makes are not for everybody to write.
const CHILD_UMASK: u32 = 0o022;
/// A takeover waits for hooks, so a quick one is seen to end quickly.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(20);
/// Between SIGTERM and SIGKILL.
const TERM_TIME: Duration = Duration::from_secs(1);
/// How long those who were killed may take to end.
const END_TIME_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
