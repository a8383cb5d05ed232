//! Lock traffic in several virtual machines at once.
//!
//! Owns the processes and the readings of the machines' clocks; [`super::held`] judges what they
//! said.
//!
//! Invariant: the processes end with their guard.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::clock::Clock;
use super::held::Traffic;
use super::process::POLL;
use super::{Process, Vm};

/// Workers in several virtual machines, all on the same file.
#[derive(Debug)]
pub struct Workers<'lab> {
    parts: Vec<(&'lab Vm<'lab>, Process, Clock)>,
}

impl<'lab> Workers<'lab> {
    /// Starts so many in each client, on a file of the mounted export.
    pub fn start(clients: &'lab [Vm<'lab>], workers: usize, seed: u64) -> Result<Self> {
        let mut parts = Vec::new();
        for client in clients {
            // While the machine has nothing to do, its clock is read most exactly.
            let mut clock = Clock::default();
            clock.note(client.clock()?);
            let process = client.spawn_traffic(FILE, workers, seed)?;
            parts.push((client, process, clock));
        }
        Ok(Self { parts })
    }

    /// Compares the clocks once more, so that times are known better.
    pub fn read_clocks(&mut self) -> Result<()> {
        for (client, _, clock) in &mut self.parts {
            clock.note(client.clock()?);
        }
        Ok(())
    }

    /// Waits until every client has had that many more locks.
    pub fn wait_for_locks(&self, more: usize) -> Result<()> {
        for (client, process, _) in &self.parts {
            let locks = || Ok::<_, anyhow::Error>(process.output()?.matches(" held ").count());
            let deadline = Instant::now() + TRAFFIC_TIME_MAX;
            let before = locks()?;
            loop {
                let now = locks()?;
                if now >= before + more {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "{} got {} locks in {TRAFFIC_TIME_MAX:?}",
                    client.name(),
                    now - before
                );
                std::thread::sleep(POLL);
            }
        }
        Ok(())
    }

    /// Lets the workers come to their ends; returns what they said.
    pub fn end(mut self) -> Result<Vec<Traffic>> {
        for (_, process, _) in &self.parts {
            process.say("stop")?;
        }
        for (client, process, _) in &mut self.parts {
            let status = process.wait(TRAFFIC_TIME_MAX)?;
            let said = process.output()?;
            ensure!(status.success(), "{}: {status}\n{said}", client.name());
        }
        self.read_clocks()?;
        let mut traffic = Vec::new();
        for (client, process, clock) in &self.parts {
            let part = Traffic::parse(client.name(), &process.output()?, clock)?;
            eprintln!(
                "{}: {} locks held, {} denied, {} waits interrupted; longest wait {} us, clock +-{} us",
                client.name(),
                part.held.len(),
                part.denied,
                part.interrupted,
                part.held.iter().map(|held| held.waited).max().unwrap_or(0),
                part.held.iter().map(|held| held.error).max().unwrap_or(0)
            );
            traffic.push(part);
        }
        Ok(traffic)
    }
}

/// The name is `traffic` in the export, too.
const FILE: &str = "/mnt/traffic";
/// For some dozens of locks, with a restart of the server in between.
const TRAFFIC_TIME_MAX: Duration = Duration::from_mins(1);
