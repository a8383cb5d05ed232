//! The load: client A writes records, one after the other, as fast as they are answered.
//!
//! Owns a thread and a connection. Most records are written FILE_SYNC and so acknowledged at once;
//! every so often a run of them is written UNSTABLE and made stable by COMMIT. If the write
//! verifier changes in between, the server may have lost them, and they are written again, as
//! clients do.
//! What was acknowledged, and when, is in the [`Ledger`].
//!
//! Invariant: a record's place in the file is its number, and it is never changed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::client::nfs::{Nfs, READ_BYTES_MAX, Stable};
use super::client::rpc::Machine;
use super::interrupt::Interrupted;
use super::ledger::{BrokenPromise, Fault, Ledger, RECORD_BYTES, judge, record};

/// Records that are written FILE_SYNC before the next run of others.
const SYNCED_RUN: u64 = 16;
/// Records that are written UNSTABLE before a COMMIT.
const UNSTABLE_RUN: u64 = 8;
/// How often a run is written again before that is called a failure.
const TRIES: usize = 10;
/// Leaves the machine some air, which has three nodes to run.
const PAUSE: Duration = Duration::from_millis(1);

/// The load.
#[derive(Debug)]
pub(super) struct Load {
    machine: Arc<Machine>,
    resent: Arc<AtomicU32>,
    resends: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

struct Writer {
    nfs: Nfs,
    fh: Vec<u8>,
    run: u32,
    ledger: Arc<Ledger>,
    machine: Arc<Machine>,
    resent: Arc<AtomicU32>,
    resends: Arc<AtomicU32>,
}

impl Load {
    /// Begins to write into the file `fh`; `machine` is what `nfs` ends with.
    pub(super) fn start(
        nfs: Nfs,
        fh: Vec<u8>,
        run: u32,
        ledger: Arc<Ledger>,
        machine: Arc<Machine>,
    ) -> Self {
        let (resent, resends) = <(Arc<AtomicU32>, Arc<AtomicU32>)>::default();
        let mut writer = Writer {
            nfs,
            fh,
            run,
            ledger,
            machine: Arc::clone(&machine),
            resent: Arc::clone(&resent),
            resends: Arc::clone(&resends),
        };
        let thread = thread::spawn(move || {
            if let Err(error) = writer.write()
                && !error.is::<Interrupted>()
            {
                writer
                    .ledger
                    .broken(format!("client A cannot write: {error:#}"));
            }
        });
        Self {
            machine,
            resent,
            resends,
            thread: Some(thread),
        }
    }

    /// How many records were written again because the write verifier changed.
    pub(super) fn resent(&self) -> u32 {
        self.resent.load(Ordering::Relaxed)
    }

    /// How often a call was sent again because no answer came.
    pub(super) fn resends(&self) -> u32 {
        self.resends.load(Ordering::Relaxed)
    }

    /// Ends after the record that is under way.
    pub(super) fn stop(&mut self) {
        self.machine.end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.machine.close_all();
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Writer {
    fn write(&mut self) -> Result<()> {
        let mut next = 0;
        while !self.machine.has_ended() {
            for number in next..next + SYNCED_RUN {
                let (committed, _) = self.write_one(number, Stable::FileSync)?;
                ensure!(committed == Stable::FileSync, "FILE_SYNC was not done");
                self.ledger.acknowledged([number]);
                thread::sleep(PAUSE);
            }
            next += SYNCED_RUN;
            self.write_run(next)?;
            next += UNSTABLE_RUN;
        }
        Ok(())
    }

    /// Writes a run UNSTABLE and commits it, until no write verifier changed on the way.
    fn write_run(&mut self, first: u64) -> Result<()> {
        let run = first..first + UNSTABLE_RUN;
        for again in 0..TRIES {
            if again > 0 {
                self.resent
                    .fetch_add(UNSTABLE_RUN as u32, Ordering::Relaxed);
            }
            let mut verifiers = Vec::new();
            for number in run.clone() {
                let (committed, verifier) = self.write_one(number, Stable::Unstable)?;
                match committed {
                    Stable::FileSync => self.ledger.acknowledged([number]),
                    Stable::Unstable => verifiers.push(verifier),
                }
                thread::sleep(PAUSE);
            }
            let verifier = self.nfs.commit(&self.fh)?;
            if verifiers.iter().all(|of_write| *of_write == verifier) {
                self.ledger.acknowledged(run);
                return Ok(());
            }
        }
        bail!("the write verifier changes with every COMMIT");
    }

    fn write_one(&mut self, number: u64, stable: Stable) -> Result<(Stable, u64)> {
        let offset = number * RECORD_BYTES as u64;
        let bytes = record(self.run, number);
        let written = self.nfs.write(&self.fh, offset, stable, &bytes)?;
        self.ledger.answered(Instant::now());
        self.resends.store(self.nfs.resends(), Ordering::Relaxed);
        ensure!(
            written.count as usize == RECORD_BYTES,
            "a WRITE came out short"
        );
        Ok((written.committed, written.write_verifier))
    }
}

/// Reads all records back that are acknowledged by now, over `nfs`; returns how many.
///
/// # Errors
/// [`BrokenPromise`] if one is not there, or is not what was written.
pub(super) fn read_back(nfs: &mut Nfs, fh: &[u8], run: u32, ledger: &Ledger) -> Result<usize> {
    let stable = ledger.stable();
    let per_read = u64::from(READ_BYTES_MAX) / RECORD_BYTES as u64;
    let (mut page_number, mut page) = (u64::MAX, Vec::new());
    let (mut lost, mut damaged) = (Vec::new(), 0);
    for (number, acknowledged) in &stable {
        let wanted = number / per_read;
        if wanted != page_number {
            page = nfs.read(fh, wanted * u64::from(READ_BYTES_MAX), READ_BYTES_MAX)?;
            page_number = wanted;
        }
        let at = (number % per_read) as usize * RECORD_BYTES;
        match judge(run, *number, page.get(at..at + RECORD_BYTES)) {
            None => {}
            Some(Fault::Lost) => lost.push((*number, *acknowledged)),
            Some(Fault::Damaged) => damaged += 1,
        }
    }
    if let (Some((first, _)), count) = (lost.first(), lost.len()) {
        let text = format!("{count} acknowledged records are gone, from {first} on");
        return Err(BrokenPromise(text).into());
    }
    if damaged > 0 {
        let text = format!("{damaged} acknowledged records hold something else now");
        return Err(BrokenPromise(text).into());
    }
    Ok(stable.len())
}
