//! The usual scene of a cluster test: a service, a file that has locks, a file that is written, and
//! three hosts.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_tests::client::nlm::{Lock, stat};
use havenfs_tests::cluster::client::Client;
use havenfs_tests::cluster::load::{Go, Load};
use havenfs_tests::cluster::machine::Machine;
use havenfs_tests::cluster::site::Plan;
use havenfs_tests::cluster::{Cluster, LEASE_TIME, Serving};

/// The first service.
pub(crate) const ALPHA: &str = "alpha";
/// The second service.
pub(crate) const BETA: &str = "beta";
/// A cluster with one service.
pub(crate) const ONE: [Plan; 1] = [Plan {
    name: ALPHA,
    preferred: "n1",
}];
/// A cluster whose services prefer different nodes.
pub(crate) const TWO: [Plan; 2] = [
    Plan {
        name: ALPHA,
        preferred: "n1",
    },
    Plan {
        name: BETA,
        preferred: "n2",
    },
];

/// The file with locks.
const LOCKED: &str = "locked";
/// The file that is written.
const JOURNAL: &str = "journal";
/// The size of a record of the journal.
const RECORD_BYTES: usize = 64;
/// What a host's process has who holds the lock that all is about.
pub(crate) const HOLDER: i32 = 11;

/// How long a change may wait for a new leader: 0.4 s at most until a node stands, as long again if
/// the votes are split, and a busy machine.
pub(crate) const ELECTION_TIME_MAX: Duration = Duration::from_secs(5);
/// How long the service may be away when its node dies: the lease, the margin, the turn of a node
/// that dies or sleeps, an election that begins late, and a busy machine.
pub(crate) const TAKEOVER_TIME_MAX: Duration = Duration::from_secs(15);
/// How long a node may answer that has lost the majority, from the last moment when it was there:
/// the lease, and the time that a killed node's last messages and a busy machine take.
pub(crate) const LEASE_AND_MORE: Duration = LEASE_TIME.saturating_add(Duration::from_secs(1));

/// A service with hosts.
pub(crate) struct Scene {
    pub(crate) service: &'static str,
    /// Holds the lock.
    pub(crate) a: Client,
    pub(crate) machine_a: Machine,
    /// Waits for it.
    pub(crate) b: Client,
    pub(crate) machine_b: Machine,
    /// Looks on.
    pub(crate) c: Client,
    /// The file with locks.
    pub(crate) fh: Vec<u8>,
    /// The file that is written.
    pub(crate) journal: Vec<u8>,
}

impl Scene {
    pub(crate) fn new(cluster: &Cluster) -> Result<Self> {
        Self::of(cluster, ALPHA, 1)
    }

    /// The same of another service, with clients from this number on.
    pub(crate) fn of(cluster: &Cluster, service: &'static str, number: u8) -> Result<Self> {
        let site = &cluster.site;
        for name in [LOCKED, JOURNAL] {
            fs::write(site.export(service).join(name), "")?;
        }
        let [mut a, b, c] = [("a", 0), ("b", 1), ("c", 2)]
            .map(|(name, more)| Client::new(site, name, number + more, service));
        Ok(Self {
            service,
            fh: a.find(site, service, LOCKED)?,
            journal: a.find(site, service, JOURNAL)?,
            machine_a: Machine::start(site, number)?,
            machine_b: Machine::start(site, number + 1)?,
            a,
            b,
            c,
        })
    }

    /// The lock that all is about: A's.
    pub(crate) fn held(&self) -> Lock {
        self.a.lock_of(&self.fh, HOLDER, 0, 100)
    }

    /// B's request for the same.
    pub(crate) fn waiting(&self) -> Lock {
        Lock {
            block: true,
            ..self.b.lock_of(&self.fh, 22, 0, 100)
        }
    }

    /// C's request for the same.
    pub(crate) fn wanted(&self) -> Lock {
        self.c.lock_of(&self.fh, 33, 0, 100)
    }

    /// A gets its lock, and B waits for it.
    pub(crate) fn lock_and_wait(&mut self) -> Result<()> {
        let (held, waiting) = (self.held(), self.waiting());
        ensure!(self.a.lock(&held)? == stat::GRANTED);
        ensure!(self.b.lock(&waiting)? == stat::BLOCKED);
        Ok(())
    }

    /// A's lock is held: TEST names A, and LOCK is denied.
    pub(crate) fn is_held(&mut self) -> Result<()> {
        let wanted = self.wanted();
        let holder = self.c.holder(&wanted)?;
        ensure!(holder == Some(HOLDER), "held by {holder:?}");
        let wanted = self.wanted();
        let stat = self.c.lock(&wanted)?;
        ensure!(stat == stat::DENIED, "LOCK is answered {stat}");
        Ok(())
    }

    /// A unlocks, and B is told that it has the lock now; not before. Returns how long it took.
    pub(crate) fn unlock_for_b(&mut self) -> Result<Duration> {
        let (held, waiting) = (self.held(), self.waiting());
        let before = self.machine_b.granted(&waiting);
        ensure!(before.is_none(), "granted while A has it");
        let asked = Instant::now();
        ensure!(self.a.unlock(&held)? == stat::GRANTED);
        let told = self.machine_b.wait_granted(&waiting)?;
        let wanted = self.wanted();
        let holder = self.c.holder(&wanted)?;
        ensure!(holder == Some(waiting.svid), "held by {holder:?}");
        Ok(told.saturating_duration_since(asked))
    }

    /// Nothing came to the machines that should not.
    pub(crate) fn machines_are_well(&self) -> Result<()> {
        for machine in [&self.machine_a, &self.machine_b] {
            let problems = machine.heard().problems;
            ensure!(problems.is_empty(), "{problems:?}");
        }
        Ok(())
    }

    /// A host writes records into the journal all the time.
    pub(crate) fn writer(&self, cluster: &Cluster) -> Load<Written> {
        let mut client = self.a.another(&cluster.site);
        let journal = self.journal.clone();
        Load::start(move |go: &Go| {
            let mut verifiers = Vec::new();
            while go.on() {
                let number = verifiers.len();
                let at = (number * RECORD_BYTES) as u64;
                verifiers.push(client.write(&journal, at, &record(number))?);
                go.count();
                go.breathe();
            }
            Ok(Written { client, verifiers })
        })
    }

    /// A host locks and unlocks a range all the time.
    pub(crate) fn locker(&self, cluster: &Cluster, of: &Client, svid: i32) -> Load<Locked> {
        let mut client = of.another(&cluster.site);
        let fh = self.fh.clone();
        Load::start(move |go: &Go| {
            let mut locked = Vec::new();
            while go.on() {
                let lock = client.lock_of(&fh, svid, 5000, 10);
                match client.lock(&lock)? {
                    stat::GRANTED => {
                        let from = Instant::now();
                        go.breathe();
                        let to = Instant::now();
                        let stat = client.unlock(&lock)?;
                        ensure!(stat == stat::GRANTED, "UNLOCK is answered {stat}");
                        locked.push((from, to));
                    }
                    stat::DENIED => {}
                    stat => anyhow::bail!("LOCK is answered {stat}"),
                }
                go.count();
                go.breathe();
            }
            Ok(Locked { client, locked })
        })
    }

    /// Every acknowledged record is there, as C reads it.
    pub(crate) fn check_written(&mut self, written: &Written) -> Result<()> {
        let (client, journal) = (&mut self.c, &self.journal);
        for number in 0..written.verifiers.len() {
            let at = (number * RECORD_BYTES) as u64;
            let read = client.read(journal, at, RECORD_BYTES as u32)?;
            ensure!(read == record(number), "record {number} is {read:02x?}");
        }
        Ok(())
    }
}

/// The bytes of a record.
fn record(number: usize) -> Vec<u8> {
    let mut record = format!("record {number}\n").into_bytes();
    record.resize(RECORD_BYTES, b'.');
    record
}

/// What a writer was told.
pub(crate) struct Written {
    pub(crate) client: Client,
    /// The write verifier of each record.
    verifiers: Vec<[u8; 8]>,
}

impl Written {
    pub(crate) fn count(&self) -> usize {
        self.verifiers.len()
    }

    /// The different write verifiers in their order; an error if one comes back, since then two
    /// nodes have answered in turns.
    pub(crate) fn verifiers(&self) -> Result<Vec<[u8; 8]>> {
        let mut verifiers = self.verifiers.clone();
        verifiers.dedup();
        let mut sorted = verifiers.clone();
        sorted.sort_unstable();
        sorted.dedup();
        ensure!(sorted.len() == verifiers.len(), "{verifiers:02x?}");
        Ok(verifiers)
    }
}

/// What a locker was told.
pub(crate) struct Locked {
    pub(crate) client: Client,
    /// From the answer to LOCK until UNLOCK was sent.
    pub(crate) locked: Vec<(Instant, Instant)>,
}

impl Locked {
    /// No two had the lock at a time.
    pub(crate) fn exclude_each_other(one: &Self, other: &Self) -> Result<()> {
        let mut all = [&one.locked[..], &other.locked[..]].concat();
        all.sort_unstable();
        for pair in all.windows(2) {
            if let [(_, to), (from, _)] = pair {
                ensure!(to <= from, "two hosts have the lock at a time: {pair:?}");
            }
        }
        Ok(())
    }
}

/// For people, who read milliseconds better than fractions.
pub(crate) fn ms(time: Duration) -> String {
    format!("{} ms", time.as_millis())
}

/// The service is in its next epoch, and with its NSM state it tells hosts of a restart.
pub(crate) fn rises_by_one(before: Serving, after: Serving) -> Result<()> {
    ensure!(after.epoch == before.epoch + 1, "{before:?}, {after:?}");
    let state = after.nsm_state;
    ensure!(
        state > before.nsm_state && state % 2 == 1,
        "{before:?}, {after:?}"
    );
    Ok(())
}
