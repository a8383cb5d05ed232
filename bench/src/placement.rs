//! Which processors the server and the generator run on.
//!
//! With one connection the scheduler puts both sides on one processor or on two, as it happens,
//! and the figures of the same server then differ by a factor of three: on one processor they
//! alternate, with whole batches; on two they wake each other for every few calls, and on a
//! virtual machine each wake-up of an idle processor costs more than the call. A comparison has
//! to fix it.

use std::fs;

use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};

/// Where the two sides run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Placement {
    /// Wherever the scheduler puts them
    Free,
    /// All of the server and the generator on one processor
    Together,
    /// All of the server on one processor, the generator on another
    Apart,
}

impl Placement {
    /// How the tables say it.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Free => "on any processor",
            Self::Together => "server and generator on one processor",
            Self::Apart => "server on one processor, generator on another",
        }
    }
}

/// Puts everything back when it is dropped.
#[derive(Debug)]
pub(crate) struct Placed {
    before: CpuSet,
    pids: Vec<u32>,
}

impl Drop for Placed {
    fn drop(&mut self) {
        // At worst the next row runs on fewer processors than it could.
        let _ = place_server(&self.pids, &self.before);
        let _ = sched_setaffinity(None, &self.before);
    }
}

/// Places the calling thread and the processes `pids`.
pub(crate) fn place(placement: Placement, pids: &[u32]) -> anyhow::Result<Placed> {
    let before = sched_getaffinity(None)?;
    let allowed = |processor: &usize| before.is_set(*processor);
    let mut processors = (0..CpuSet::MAX_CPU).filter(allowed);
    let first = processors.next().unwrap_or(0);
    let second = processors.next();
    let only = |processor| {
        let mut set = CpuSet::new();
        set.set(processor);
        set
    };
    let (server, generator) = match placement {
        Placement::Free => (before, before),
        Placement::Together => (only(first), only(first)),
        Placement::Apart => {
            let second = second.ok_or_else(|| anyhow::anyhow!("there is only one processor"))?;
            (only(first), only(second))
        }
    };
    let placed = Placed {
        before,
        pids: pids.to_vec(),
    };
    place_server(pids, &server)?;
    sched_setaffinity(None, &generator)?;
    Ok(placed)
}

/// Every thread; those that start later inherit it from their makers.
fn place_server(pids: &[u32], set: &CpuSet) -> anyhow::Result<()> {
    for pid in pids {
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let name = task.file_name();
            let tid = name.to_str().and_then(|tid| tid.parse().ok());
            let Some(tid) = tid.and_then(Pid::from_raw) else {
                continue;
            };
            match sched_setaffinity(Some(tid), set) {
                // It has ended meanwhile.
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}
