//! Locks whose owner may be gone: what hints at it, and which locks it makes suspect.
//!
//! A hint never ends a lock, since it may be wrong and the owner may still write: it is counted,
//! and shown beside the lock, so that an operator who knows better can break it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::host::Doubt;
use crate::keys::{FileNo, HostNo, LockOwner, OwnerNo, Stamp};
use crate::range::ByteRange;
use crate::range_set::{Held, HeldRange};
use crate::table::LockTable;

/// Why a lock is suspect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suspicion {
    /// The host told a higher NSM state in a later LOCK: it may have rebooted without a notice that
    /// reached us. Linux keeps one number for all its network namespaces, so it may also not have.
    OlderLife,
    /// A lock owner with the same names came from another address: the host may have a new one, and
    /// can't unlock what it locked under the old one.
    OtherAddress,
    /// A notice said that the host has rebooted while a connection of it was older and lived on: it
    /// may be forged, or the host's status monitor alone was started anew.
    DoubtfulNotice {
        /// When it came, in seconds since 1970. What the host reclaims later clears the doubt.
        since: u32,
    },
}

/// How often each hint came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspicions {
    /// See [`Suspicion::OlderLife`].
    pub older_life: u64,
    /// See [`Suspicion::OtherAddress`].
    pub other_address: u64,
    /// See [`Suspicion::DoubtfulNotice`].
    pub doubtful_notice: u64,
}

impl LockTable {
    /// A notice of a reboot that is not believed ([`Suspicion::DoubtfulNotice`]); `meant` as in
    /// [`LockTable::rebooted`]. Returns of how many hosts all older locks are suspect now.
    ///
    /// It stays so for this very state: copies of the notice come for a quarter of an hour, and
    /// that the connection is gone by then proves nothing. A host that reboots raises its state.
    pub fn doubt(
        &mut self,
        address: IpAddr,
        state: i32,
        meant: impl FnOnce(&[&[u8]]) -> Vec<Vec<u8>>,
        stamp: Stamp,
    ) -> usize {
        let hosts = self.losers(address, state, meant);
        for host in &hosts {
            self.suspicions.doubtful_notice += 1;
            let since = stamp.now;
            self.update_host(*host, |record| record.doubt = Some(Doubt { state, since }));
        }
        hosts.len()
    }

    /// Notes the NSM state that a host tells in a LOCK; 0 says nothing.
    pub(crate) fn note_state(&mut self, host: HostNo, state: i32) {
        let Some(record) = self.hosts.value_mut(host.0) else {
            return;
        };
        if state == 0 {
            return;
        }
        if record.held > 0 && is_later_life(state, record.nsm_state) {
            self.suspicions.older_life += 1;
        }
        record.nsm_state = state;
    }

    /// A lock owner of a host met a lock of somebody else: marks that if it is the same owner with
    /// the host under another address.
    pub(crate) fn suspect_same_owner(
        &mut self,
        host: HostNo,
        owner: &LockOwner,
        found: &HeldRange,
    ) {
        let is_same = || {
            let there = self.owners.key(found.owner.0)?;
            let here = self.hosts.key(host.0)?;
            let host_there = self.hosts.key(there.host.0)?;
            let same_names = there.owner == *owner && host_there.caller_name == here.caller_name;
            Some(same_names && host_there.address != here.address)
        };
        if is_same() == Some(true) && !found.held.suspect {
            self.suspicions.other_address += 1;
            self.ranges.suspect(found);
        }
    }

    /// An owner unlocks what it does not hold: perhaps it locked it under another address.
    pub(crate) fn look_for_same_owner(
        &mut self,
        host: HostNo,
        owner: &LockOwner,
        file: FileNo,
        range: ByteRange,
    ) {
        if let Some(found) = self.ranges.conflict(file, None, range, true) {
            self.suspect_same_owner(host, owner, &found);
        }
    }

    /// How often each hint came.
    pub const fn suspicions(&self) -> Suspicions {
        self.suspicions
    }

    /// Why a lock is suspect, if it is.
    pub(crate) fn suspicion_of(&self, owner: OwnerNo, held: &Held) -> Option<Suspicion> {
        let record = self.hosts.value(self.host_of(owner)?.0)?;
        if held.suspect {
            Some(Suspicion::OtherAddress)
        } else if let Some(doubt) = record.doubt.filter(|doubt| is_about(*doubt, held)) {
            Some(Suspicion::DoubtfulNotice { since: doubt.since })
        } else if is_later_life(record.nsm_state, held.nsm_state) {
            Some(Suspicion::OlderLife)
        } else {
            None
        }
    }
}

const fn is_about(doubt: Doubt, held: &Held) -> bool {
    held.nsm_state != doubt.state && held.since <= doubt.since
}

/// Whether a state number tells of a later life than another one. Never 0, which says nothing, and
/// never an even number, which no host has while it is up.
const fn is_later_life(state: i32, than: i32) -> bool {
    than != 0 && state > than && state % 2 != 0
}
