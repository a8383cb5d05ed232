//! The replicated state, and [`ClusterState::apply`], the only function that changes it.
//!
//! Every promise about locks rests on three things: a command is in the log, synced, before it is
//! applied; `apply` is total and deterministic, so that every node and every restart makes the
//! same state of the same log; and whatever a peer is told is an outcome of `apply`. So the answer
//! to "what if the node dies here?" is the same everywhere: before the sync nobody was told, and
//! after it the next activation finds the change in the log.
//!
//! [`Command::Activate`] begins an epoch: a start, a restart and a takeover are this one command.
//! What was accepted under an earlier epoch changes nothing any more.
//!
//! The table is *complete* if it has every lock that a host was ever told to have. Then an
//! activation leaves all locks in force and nobody waits: a reclaim of a lock that is there changes
//! nothing, and a new lock that conflicts with none is granted. Only where the table may lack
//! locks, because the operator says that a state directory was lost or is old, is there the classic
//! grace: until it ends only reclaims are granted, and what was not reclaimed is gone then.

use std::io::{self, Read, Write};
use std::net::IpAddr;

use havenfs_nlm::keys::Stamp;
use havenfs_nlm::records::Record;
use havenfs_nlm::table::LockTable;
use havenfs_nsm::inbound;
use havenfs_nsm::nsm_state::NsmState;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::command::{Command, LockAction, LockCall, Outcome};

/// How a node begins to serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activation {
    /// A random number of the process that will serve.
    pub incarnation: u64,
    /// The proposer's clock, in seconds since 1970.
    pub unix_seconds: u64,
    /// Whether locks may be missing in the table.
    pub recover: bool,
}

/// Whether the table has every lock that a host was ever told to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Completeness {
    /// It has.
    Complete {
        /// Since this epoch.
        since_epoch: u32,
    },
    /// It may not: only reclaims are granted until grace ends.
    Incomplete {
        /// Since this epoch.
        since_epoch: u32,
    },
}

impl Default for Completeness {
    /// Before the first start nobody was told anything.
    fn default() -> Self {
        Self::Complete { since_epoch: 1 }
    }
}

/// The replicated state. Cloning is cheap: all large parts are shared until they change.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ClusterState {
    service: Service,
    table: LockTable,
}

/// What is known of a service besides its locks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Service {
    /// How often a node has begun to serve; 0 if none has.
    epoch: u32,
    /// The number that hosts see in notices.
    nsm_state: NsmState,
    /// The process that serves.
    incarnation: u64,
    /// Whether locks may be missing.
    completeness: Completeness,
}

impl ClusterState {
    /// Carries out one command: total, deterministic, never waits.
    pub fn apply(&mut self, command: &Command) -> Outcome {
        if command
            .epoch()
            .is_some_and(|epoch| epoch != self.service.epoch)
        {
            return Outcome::EarlierEpoch;
        }
        match command {
            Command::Activate(activation) => self.activate(activation),
            Command::Call(call) => self.call(call),
            Command::ConfirmGrant { grant, .. } => {
                self.table.confirm(*grant);
                Outcome::Done
            }
            Command::RefuseGrant {
                grant,
                release,
                now,
                ..
            } => {
                self.table.refuse(*grant, *release, self.stamp(*now));
                Outcome::Done
            }
            Command::Rebooted(notice) => {
                let meant = |names: &[&[u8]]| meant(&notice.mon_name, names);
                let (address, stamp) = (notice.address, self.stamp(notice.now));
                Outcome::Freed(self.table.rebooted(address, notice.state, meant, stamp))
            }
            Command::DoubtfulNotice(notice) => {
                let meant = |names: &[&[u8]]| meant(&notice.mon_name, names);
                let (address, stamp) = (notice.address, self.stamp(notice.now));
                Outcome::Suspected(self.table.doubt(address, notice.state, meant, stamp))
            }
            Command::FreeAll {
                address,
                name,
                call,
                now,
                ..
            } => {
                let stamp = self.stamp(*now);
                Outcome::Freed(self.table.free_all(*address, name, *call, stamp))
            }
            Command::Break {
                address, file, now, ..
            } => {
                let stamp = self.stamp(*now);
                Outcome::Freed(self.table.break_locks(*address, file.as_ref(), stamp))
            }
            Command::Expire { address, now, .. } => {
                let stamp = self.stamp(*now);
                Outcome::Freed(self.table.expire(*address, stamp))
            }
            Command::EndGrace { now, .. } => self.end_grace(*now),
            Command::SetLimits { limits, .. } => {
                self.table.set_limits(*limits);
                Outcome::Done
            }
            Command::RefuseWrites {
                address,
                file,
                refused: true,
                ..
            } => {
                if self.table.refuse_writes(*address, file.clone()) {
                    Outcome::Refusals(1)
                } else {
                    Outcome::TooManyRefusals
                }
            }
            Command::RefuseWrites { address, file, .. } => {
                Outcome::Refusals(self.table.allow_writes(*address, file.as_ref()))
            }
            Command::RaiseNsmState { unix_seconds, .. } => {
                let service = &mut self.service;
                service.nsm_state = NsmState::next(service.nsm_state, *unix_seconds);
                Outcome::Done
            }
        }
    }

    /// All locks and waiting requests stay as they are, also across a crash at this very place: the
    /// next start activates again.
    fn activate(&mut self, activation: &Activation) -> Outcome {
        let service = &mut self.service;
        service.epoch = service.epoch.saturating_add(1);
        service.nsm_state = NsmState::next(service.nsm_state, activation.unix_seconds);
        service.incarnation = activation.incarnation;
        // What was reclaimed in an earlier part of the same grace stays so.
        if activation.recover && matches!(service.completeness, Completeness::Complete { .. }) {
            service.completeness = Completeness::Incomplete {
                since_epoch: service.epoch,
            };
        }
        Outcome::Activated
    }

    fn end_grace(&mut self, now: u32) -> Outcome {
        let Completeness::Incomplete { since_epoch } = self.service.completeness else {
            return Outcome::Done;
        };
        self.service.completeness = Completeness::Complete {
            since_epoch: self.service.epoch,
        };
        Outcome::Freed(self.table.lapse(since_epoch, self.stamp(now)))
    }

    fn call(&mut self, call: &LockCall) -> Outcome {
        let (stamp, in_grace) = (self.stamp(call.now), self.in_grace());
        let (host, digest, table) = (&call.host, call.call, &mut self.table);
        match &call.action {
            LockAction::Lock(request) if in_grace && !request.reclaim => Outcome::Grace,
            LockAction::Share(request) if in_grace && !request.reclaim => Outcome::Grace,
            LockAction::Share(request) => Outcome::Lock(table.share(host, digest, request, stamp)),
            LockAction::Unshare { file, oh } => {
                table.unshare(host, digest, file, oh);
                Outcome::Unlocked
            }
            LockAction::Lock(request) => Outcome::Lock(table.lock(host, digest, request, stamp)),
            LockAction::Unlock { file, owner, range } => {
                table.unlock(host, digest, file, owner, *range, stamp);
                Outcome::Unlocked
            }
            LockAction::Cancel {
                file,
                owner,
                range,
                exclusive,
            } => {
                let nothing_left =
                    table.cancel(host, digest, file, owner, *range, *exclusive, stamp);
                Outcome::Cancelled { nothing_left }
            }
        }
    }

    const fn stamp(&self, now: u32) -> Stamp {
        Stamp {
            epoch: self.service.epoch,
            now,
            in_grace: self.in_grace(),
        }
    }

    /// The count of activations: what a call must have been accepted under.
    pub const fn epoch(&self) -> u32 {
        self.service.epoch
    }

    /// The service's NSM state number.
    pub const fn nsm_state(&self) -> NsmState {
        self.service.nsm_state
    }

    /// Whether only reclaims are granted.
    pub const fn in_grace(&self) -> bool {
        matches!(self.service.completeness, Completeness::Incomplete { .. })
    }

    /// Whether the table has every lock that a host was ever told to have.
    pub const fn completeness(&self) -> Completeness {
        self.service.completeness
    }

    /// The locks.
    pub const fn table(&self) -> &LockTable {
        &self.table
    }

    /// The names of the hosts behind an address that lose something if a notice of a reboot is
    /// believed.
    pub fn losing(&self, address: IpAddr, mon_name: &[u8], state: i32) -> Vec<Vec<u8>> {
        let meant = |names: &[&[u8]]| meant(mon_name, names);
        self.table.losing(address, state, meant)
    }

    /// Writes the whole state as [`ClusterState::read`] reads it: a version, what is known of the
    /// service, and the rows of the lock table, each with its length in front.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(&[VERSION])?;
        let mut buffer = Vec::new();
        write_row(out, &mut buffer, &self.service)?;
        for record in self.table.records() {
            write_row(out, &mut buffer, &record)?;
        }
        out.write_all(&0u32.to_le_bytes())
    }

    /// Reads a state.
    ///
    /// # Errors
    /// `InvalidData` if it is not what was written, `Unsupported` if a newer program wrote it.
    pub fn read(input: &mut impl Read) -> io::Result<Self> {
        let mut version = [0];
        input.read_exact(&mut version)?;
        if version != [VERSION] {
            let kind = if version > [VERSION] {
                io::ErrorKind::Unsupported
            } else {
                io::ErrorKind::InvalidData
            };
            let [version] = version;
            let text = format!("state version {version}, and this program knows {VERSION}");
            return Err(io::Error::new(kind, text));
        }
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "a row is damaged");
        let mut buffer = Vec::new();
        let service = read_row(input, &mut buffer)?.ok_or_else(damaged)?;
        let mut table = LockTable::default();
        while let Some(record) = read_row::<Record>(input, &mut buffer)? {
            table.restore(record).map_err(|_| damaged())?;
        }
        table.restored().map_err(|_| damaged())?;
        Ok(Self { service, table })
    }
}

/// The hosts that a notice means, by their names.
fn meant(mon_name: &[u8], names: &[&[u8]]) -> Vec<Vec<u8>> {
    let meant = inbound::meant(mon_name, names.iter().copied());
    meant.into_iter().map(<[u8]>::to_vec).collect()
}

fn write_row(out: &mut impl Write, buffer: &mut Vec<u8>, row: &impl Serialize) -> io::Result<()> {
    buffer.clear();
    let bytes = postcard::to_extend(row, std::mem::take(buffer)).map_err(io::Error::other)?;
    *buffer = bytes;
    let len = u32::try_from(buffer.len()).map_err(io::Error::other)?;
    out.write_all(&len.to_le_bytes())?;
    out.write_all(buffer)
}

/// Reads one row; none if the end was written here.
fn read_row<T: DeserializeOwned>(
    input: &mut impl Read,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<T>> {
    let mut len = [0; 4];
    input.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len == 0 {
        return Ok(None);
    }
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "a row is damaged");
    if len > ROW_BYTES_MAX {
        return Err(damaged());
    }
    buffer.resize(len, 0);
    input.read_exact(buffer)?;
    match postcard::take_from_bytes(buffer) {
        Ok((row, [])) => Ok(Some(row)),
        _ => Err(damaged()),
    }
}

const VERSION: u8 = 1;
/// Above the longest row: a host with all that is remembered of it.
const ROW_BYTES_MAX: usize = 8 * 1024 * 1024;

#[cfg(test)]
mod tests;
