//! A well-behaved client beside an attack, and the judgement on both.
//!
//! Asserted are the server's memory, that the process is the same, that the good client got right
//! answers, and that it never waited ten times longer than the target; how long it waited is
//! printed.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::{Nfs, Peer, Sattr};
use havenfs_tests::server::V4;

use super::scene::{Scene, ok};

/// What the server may hold while it is attacked.
const MEMORY_KIB_MAX: u64 = 256 * 1024;
/// How long a good client should wait for an answer at most.
const WAIT_TARGET: Duration = Duration::from_millis(500);

/// A well-behaved client that works in a thread of its own, from an address of its own.
pub(crate) struct GoodClient {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<Result<Duration>>,
}

impl GoodClient {
    pub(crate) fn start(s: &mut Scene) -> Result<Self> {
        let data: Vec<u8> = (0..40_000u32).map(|at| at as u8).collect();
        let fh = s.file("good", &data)?;
        let dir = s.dir("good-dir")?;
        let own = SocketAddr::new(IpAddr::from([127, 0, 0, 200]), 0);
        let peer = Peer::connect_from(Transport::Tcp, own, s.server.nfs_at(V4))?;
        let mut nfs = Nfs::new(peer, s.cred());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let rounds = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&rounds);
        let thread = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            while !stopped.load(Ordering::Relaxed) {
                let began = Instant::now();
                nfs.attributes(&fh)?;
                longest = longest.max(began.elapsed());
                let began = Instant::now();
                let read = ok(nfs.read(&fh, 4096, 8192)?)?;
                ensure!(read.data.as_ref() == &data[4096..12_288], "wrong data");
                longest = longest.max(began.elapsed());
                let began = Instant::now();
                ok(nfs.symlink(&dir, b"l", &Sattr::default(), b"x")?)?;
                longest = longest.max(began.elapsed());
                let began = Instant::now();
                ok(nfs.remove(&dir, b"l")?)?;
                longest = longest.max(began.elapsed());
                counted.fetch_add(1, Ordering::Relaxed);
            }
            Ok(longest)
        });
        Ok(Self {
            stop,
            rounds,
            thread,
        })
    }

    /// Lets it work on while the attack stands, ends it and judges what it saw.
    pub(crate) fn judge(self, s: &mut Scene, what: &str) -> Result<()> {
        let enough = self.rounds.load(Ordering::Relaxed) + 30;
        let deadline = Instant::now() + 120 * WAIT_TARGET;
        while self.rounds.load(Ordering::Relaxed) < enough
            && Instant::now() < deadline
            && !self.thread.is_finished()
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.stop.store(true, Ordering::Relaxed);
        let rounds = self.rounds.load(Ordering::Relaxed);
        let seen = self
            .thread
            .join()
            .map_err(|_| anyhow!("the good client panicked"))?;
        let longest = seen.map_err(|error| error.context("the good client"))?;
        let (now, most) = (s.server.memory_kib("VmRSS")?, s.server.memory_kib("VmHWM")?);
        eprintln!(
            "{what}: memory {} MiB, at most {} MiB; good client: {rounds} rounds, longest wait \
             {longest:?} (target {WAIT_TARGET:?})",
            now >> 10,
            most >> 10
        );
        ensure!(
            s.server.is_running()?,
            "the server has ended:\n{}",
            s.server.log()?
        );
        ensure!(most < MEMORY_KIB_MAX, "{} MiB of memory", most >> 10);
        ensure!(
            rounds >= enough,
            "the good client was hardly served: {rounds} rounds"
        );
        ensure!(
            longest < 10 * WAIT_TARGET,
            "the good client waited {longest:?}"
        );
        ensure!(!s.server.log()?.contains("panicked"), "{}", s.server.log()?);
        s.client(s.cred())?.null()
    }
}
