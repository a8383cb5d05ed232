//! SHARE and UNSHARE: how a file may be opened while others have it open.
//!
//! A share says what its owner does with the file (`access`) and what it lets nobody else do
//! (`mode`). It is for a whole file, is not merged or split, never waits, and conflicts only with
//! other shares. Windows opens every file with one.
//!
//! Source: XNFS chapter 10, NLM_SHARE; the owner is (host, `oh`), as with Linux's lockd.

use serde::{Deserialize, Serialize};

use crate::host::{CallDigest, HostKey, Settled};
use crate::keys::{FileKey, FileNo, HostNo, LockOwner, OwnerNo, Stamp};
use crate::limits::Limit;
use crate::table::{LockOutcome, LockTable};

/// What an owner does with a file, and what it denies others: bit 0 reading, bit 1 writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareModes {
    /// What others may not do.
    pub deny: u8,
    /// What the owner does.
    pub access: u8,
}

impl ShareModes {
    /// Whether two owners can't have these at a time.
    const fn conflicts(self, other: Self) -> bool {
        self.access & other.deny != 0 || self.deny & other.access != 0
    }
}

/// A share that a host asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareRequest {
    /// The file.
    pub file: FileKey,
    /// The owner within the host.
    pub oh: Box<[u8]>,
    /// How.
    pub modes: ShareModes,
    /// Whether the host says that it had the share before our restart.
    pub reclaim: bool,
}

/// What is known of a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    pub(crate) modes: ShareModes,
    /// The epoch in which its owner last set it.
    pub(crate) epoch: u32,
    /// The NSM state that its host was known to have then, 0 if none was.
    pub(crate) nsm_state: i32,
}

impl LockTable {
    /// SHARE: sets what the owner has, in place of what it had; never [`LockOutcome::Blocked`].
    pub fn share(
        &mut self,
        host: &HostKey,
        call: CallDigest,
        request: &ShareRequest,
        stamp: Stamp,
    ) -> LockOutcome {
        match self.repeated(host, call) {
            Some(Settled::Granted) => return LockOutcome::Granted,
            Some(_) => return LockOutcome::Denied,
            None => {}
        }
        let host = match self.enter_host(host) {
            Ok(host) => host,
            Err(limit) => return LockOutcome::TooMany(limit),
        };
        let nsm_state = self.hosts.value_mut(host.0).map_or(0, |record| {
            record.monitored = true;
            record.nsm_state
        });
        let owner = match self.enter_owner(host, share_owner(&request.oh)) {
            Ok(owner) => owner,
            Err(limit) => return LockOutcome::TooMany(limit),
        };
        let file = FileNo(self.files.enter(&request.file, || ()));
        let had = self.shares.get(&(file, owner));
        let known = stamp.in_grace || had.is_some_and(|share| share.modes == request.modes);
        let crowded = self.crowded(file);
        let outcome = if request.reclaim && !known {
            // The table has every share. Unlike a lock, one that was broken leaves no mark that
            // would deny its reclaim, so none comes back in this way, however lenient the table is.
            LockOutcome::Denied
        } else if self.share_conflicts(file, owner, request.modes) {
            LockOutcome::Denied
        } else if let Some(limit) = crowded.filter(|_| had.is_none()) {
            LockOutcome::TooMany(limit)
        } else if let Some(limit) = self.too_many(host, file).filter(|_| had.is_none()) {
            LockOutcome::TooMany(limit)
        } else {
            let share = Share {
                modes: request.modes,
                epoch: stamp.epoch,
                nsm_state,
            };
            if self.shares.insert((file, owner), share).is_none() {
                self.shares_of.insert((owner, file));
                self.update_host(host, |record| record.held += 1);
            }
            LockOutcome::Granted
        };
        self.release_owner(owner);
        self.release_file(file);
        self.remember(host, call, outcome.settled());
        outcome
    }

    /// UNSHARE: always succeeds, also where nothing was shared.
    pub fn unshare(&mut self, host: &HostKey, call: CallDigest, file: &FileKey, oh: &[u8]) {
        if self.repeated(host, call).is_some() {
            return;
        }
        let Ok(host) = self.enter_host(host) else {
            return;
        };
        if let Some((owner, file)) = self.known(host, &share_owner(oh), file) {
            self.end_share(host, file, owner);
            self.release_owner(owner);
            self.release_file(file);
        }
        self.remember(host, call, Some(Settled::Granted));
    }

    /// Whether the table has a share just so: a reclaim of it changes nothing.
    pub fn has_share(&self, host: &HostKey, request: &ShareRequest) -> bool {
        let known = self.known_to(host, &share_owner(&request.oh), &request.file);
        known.is_some_and(|(owner, file)| {
            let share = self.shares.get(&(file, owner));
            share.is_some_and(|share| share.modes == request.modes)
        })
    }

    /// How many shares there are.
    pub fn share_count(&self) -> usize {
        self.shares.len()
    }

    fn crowded(&self, file: FileNo) -> Option<Limit> {
        let limit = Limit::SharesPerFile;
        let enough = self.limits.get(limit) as usize;
        self.limits
            .reached(limit, self.shares_on(file).take(enough).count())
    }

    fn share_conflicts(&self, file: FileNo, owner: OwnerNo, modes: ShareModes) -> bool {
        self.shares_on(file)
            .any(|(other, share)| other != owner && modes.conflicts(share.modes))
    }

    pub(crate) fn shares_on(&self, file: FileNo) -> impl Iterator<Item = (OwnerNo, &Share)> {
        self.shares
            .range((file, OwnerNo(0))..=(file, OwnerNo(u32::MAX)))
            .map(|((_, owner), share)| (*owner, share))
    }

    /// The shares of an owner.
    pub(crate) fn shares_by(&self, owner: OwnerNo) -> Vec<(FileNo, Share)> {
        self.shares_of
            .range((owner, FileNo(0))..=(owner, FileNo(u32::MAX)))
            .filter_map(|(_, file)| Some((*file, *self.shares.get(&(*file, owner))?)))
            .collect()
    }

    pub(crate) fn end_share(&mut self, host: HostNo, file: FileNo, owner: OwnerNo) {
        if self.shares.remove(&(file, owner)).is_some() {
            self.shares_of.remove(&(owner, file));
            self.update_host(host, |record| record.held = record.held.saturating_sub(1));
        }
    }
}

/// Shares have no `svid`.
fn share_owner(oh: &[u8]) -> LockOwner {
    LockOwner {
        svid: 0,
        oh: oh.into(),
    }
}
