//! The table of registered ports.
//!
//! Owns the entries and the counters that GETSTAT shows. Knows no message: who may change what is
//! decided by its caller, except that the server's own entries are nobody else's to remove.
//!
//! Invariants: the server's own entries come first and are never removed; at most [`ENTRIES_MAX`]
//! entries; no two share program, version and network id; no lock is held while anything waits.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use havenfs_rpc::portmap::{self, Netid};

/// The most entries, the server's own included.
pub const ENTRIES_MAX: usize = 256;
/// Versions times procedures, as GETSTAT counts them.
const VERSIONS: usize = 3;
const PROCEDURES: usize = 13;

/// One registered port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortEntry {
    /// The program's number.
    pub program: u32,
    /// The program's version.
    pub version: u32,
    /// The transport.
    pub netid: Netid,
    /// Port and address; an unspecified address stands for every address of this machine.
    pub address: SocketAddr,
    /// Who registered it.
    pub owner: Owner,
}

impl PortEntry {
    /// An entry of this server for `port` on every address.
    pub const fn own(program: u32, version: u32, netid: Netid, port: u16) -> Self {
        let address = SocketAddr::new(netid.unspecified(), port);
        Self {
            program,
            version,
            netid,
            address,
            owner: Owner::Server,
        }
    }
}

/// Who registered an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// This server: nobody else removes it.
    Server,
    /// A process of this machine that may use reserved ports.
    Superuser,
}

impl Owner {
    /// The name that DUMP shows.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Server => "havenfs",
            Self::Superuser => "superuser",
        }
    }
}

/// The registered ports.
#[derive(Debug)]
pub struct PortTable {
    /// In the order of registration, the server's own first.
    entries: RwLock<Vec<PortEntry>>,
    pub(super) statistics: Statistics,
}

/// What was called since the start, by version.
#[derive(Debug, Default)]
pub(super) struct Statistics {
    /// Calls by procedure.
    pub(super) calls: [[AtomicU32; PROCEDURES]; VERSIONS],
    /// SET that succeeded.
    pub(super) sets: [AtomicU32; VERSIONS],
    /// UNSET that succeeded.
    pub(super) unsets: [AtomicU32; VERSIONS],
}

impl PortTable {
    /// Makes a table of the server's own entries.
    pub fn new(own: impl IntoIterator<Item = PortEntry>) -> Self {
        let table = Self {
            entries: RwLock::default(),
            statistics: Statistics::default(),
        };
        table.set_own(own);
        table
    }

    /// Replaces the server's own entries, of which the first [`ENTRIES_MAX`] count; the entry of
    /// another process in the place of one of them is dropped.
    pub fn set_own(&self, own: impl IntoIterator<Item = PortEntry>) {
        let mut entries = self.write();
        let before = std::mem::take(&mut *entries);
        let own = own.into_iter().map(|entry| PortEntry {
            owner: Owner::Server,
            ..entry
        });
        let foreign = before
            .into_iter()
            .filter(|entry| entry.owner != Owner::Server);
        for entry in own.chain(foreign) {
            let known = find_exact(&entries, entry.program, entry.version, entry.netid).is_some();
            if !known && entries.len() < ENTRIES_MAX {
                entries.push(entry);
            }
        }
    }

    /// A copy of all entries, the server's own first.
    pub fn entries(&self) -> Vec<PortEntry> {
        self.read().clone()
    }

    /// Registers a port for another process; `true` if it stands in the table now.
    pub fn set(&self, entry: PortEntry) -> bool {
        if entry.address.port() == 0 || entry.address.is_ipv6() != entry.netid.is_ipv6() {
            return false;
        }
        let mut entries = self.write();
        match find_exact(&entries, entry.program, entry.version, entry.netid) {
            Some(present) => present.address == entry.address,
            None if entries.len() >= ENTRIES_MAX => false,
            None => {
                entries.push(PortEntry {
                    owner: Owner::Superuser,
                    ..entry
                });
                true
            }
        }
    }

    /// Removes other processes' entries of a program's version, on the network ids for which
    /// `concerns` holds; `true` if there was one.
    pub fn unset(&self, program: u32, version: u32, concerns: impl Fn(Netid) -> bool) -> bool {
        let mut entries = self.write();
        let before = entries.len();
        entries.retain(|entry| {
            entry.owner == Owner::Server
                || entry.program != program
                || entry.version != version
                || !concerns(entry.netid)
        });
        entries.len() != before
    }

    /// The entry of this version, else the one of another version that was registered last.
    pub(super) fn find(&self, program: u32, version: u32, netid: Netid) -> Option<PortEntry> {
        let entries = self.read();
        find_exact(&entries, program, version, netid).or_else(|| {
            let other = |entry: &&PortEntry| entry.program == program && entry.netid == netid;
            entries.iter().rev().find(other).copied()
        })
    }

    /// The entry of exactly this version.
    pub(super) fn find_exact(&self, program: u32, version: u32, netid: Netid) -> Option<PortEntry> {
        find_exact(&self.read(), program, version, netid)
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<PortEntry>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<PortEntry>> {
        self.entries.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call; a procedure that no version has is not counted.
    pub(super) fn count(&self, version: u32, number: u32) {
        let row = version_index(version).and_then(|index| self.statistics.calls.get(index));
        if let Some(cell) = row.and_then(|row| row.get(number as usize)) {
            cell.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a SET if it was done.
    pub(super) fn count_set(&self, version: u32, done: bool) {
        count_if(done, &self.statistics.sets, version);
    }

    /// Counts an UNSET if it was done.
    pub(super) fn count_unset(&self, version: u32, done: bool) {
        count_if(done, &self.statistics.unsets, version);
    }
}

fn find_exact(
    entries: &[PortEntry],
    program: u32,
    version: u32,
    netid: Netid,
) -> Option<PortEntry> {
    let same = |entry: &&PortEntry| {
        entry.program == program && entry.version == version && entry.netid == netid
    };
    entries.iter().find(same).copied()
}

fn version_index(version: u32) -> Option<usize> {
    version
        .checked_sub(portmap::VERSION_2)
        .map(|index| index as usize)
}

fn count_if(done: bool, counters: &[AtomicU32; VERSIONS], version: u32) {
    let counter = version_index(version).and_then(|index| counters.get(index));
    if let (true, Some(counter)) = (done, counter) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
