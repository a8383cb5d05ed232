//! What the log holds: commands, and the outcomes of applying them.
//!
//! A command carries everything that it depends on, also the proposer's clock and random numbers,
//! so that every node makes the same of it. Its first byte is a version; new commands and new
//! fields are added at the end, and a change of what is there makes a new version.

use std::net::IpAddr;

use havenfs_nlm::ending::Freed;
use havenfs_nlm::host::{CallDigest, HostKey};
use havenfs_nlm::keys::{FileKey, LockOwner};
use havenfs_nlm::limits::Limits;
use havenfs_nlm::range::ByteRange;
use havenfs_nlm::range_set::GrantId;
use havenfs_nlm::share::ShareRequest;
use havenfs_nlm::table::{LockOutcome, LockRequest};
use serde::{Deserialize, Serialize};

use super::state::Activation;

/// One change of the replicated state. New ones are added at the end: their order is their number
/// in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// A node begins to serve.
    Activate(Activation),
    /// A host asks for a lock, releases or cancels one.
    Call(LockCall),
    /// A host answered GRANTED: it has the lock.
    ConfirmGrant {
        /// The epoch in which it was told.
        epoch: u32,
        /// Which grant.
        grant: GrantId,
    },
    /// A host answered GRANTED: nobody there waits for the lock.
    RefuseGrant {
        /// The epoch in which it was told.
        epoch: u32,
        /// Which grant.
        grant: GrantId,
        /// Whether that was the first telling, so that the lock may go to others.
        release: bool,
        /// The proposer's clock, in seconds since 1970.
        now: u32,
    },
    /// SM_NOTIFY: a host is in another life than before.
    Rebooted(Notice),
    /// NLM_FREE_ALL: a host gives back all that it has.
    FreeAll {
        /// The epoch in which the call came.
        epoch: u32,
        /// Where it came from.
        address: IpAddr,
        /// What the host calls itself.
        name: Box<[u8]>,
        /// What tells it from all other calls.
        call: CallDigest,
        /// The proposer's clock, in seconds since 1970.
        now: u32,
    },
    /// Grace is over, by its timer or by an operator's word: what was not reclaimed ends.
    EndGrace {
        /// The epoch whose grace it is.
        epoch: u32,
        /// The proposer's clock, in seconds since 1970.
        now: u32,
    },
    /// An administrator ends what a host has, on one file or on all.
    Break {
        /// The epoch in which it was asked for.
        epoch: u32,
        /// The host's address.
        address: IpAddr,
        /// The file; all of them if none.
        file: Option<FileKey>,
        /// The proposer's clock, in seconds since 1970.
        now: u32,
    },
    /// The configuration says what the lock table may hold.
    SetLimits {
        /// The epoch in which it was read.
        epoch: u32,
        /// The bounds.
        limits: Limits,
    },
    /// SM_NOTIFY that is not believed: the locks that it would end are suspect.
    DoubtfulNotice(Notice),
    /// An administrator says that a host is gone for good.
    Expire {
        /// The epoch in which it was said.
        epoch: u32,
        /// The host's address.
        address: IpAddr,
        /// The proposer's clock, in seconds since 1970.
        now: u32,
    },
    /// An administrator has the writes of a host refused, or allowed again.
    RefuseWrites {
        /// The epoch in which it was asked for.
        epoch: u32,
        /// The host's address.
        address: IpAddr,
        /// The file; all of them if none.
        file: Option<FileKey>,
        /// False: they are allowed again.
        refused: bool,
    },
    /// The NSM state number rises, so that a host that is told of it takes it for news.
    RaiseNsmState {
        /// The epoch in which it was asked for.
        epoch: u32,
        /// The proposer's clock, in seconds since 1970.
        unix_seconds: u64,
    },
}

impl Command {
    /// The epoch in which it was proposed; none for what begins one.
    pub const fn epoch(&self) -> Option<u32> {
        match self {
            Self::Activate(_) => None,
            Self::Call(LockCall { epoch, .. })
            | Self::ConfirmGrant { epoch, .. }
            | Self::RefuseGrant { epoch, .. }
            | Self::Rebooted(Notice { epoch, .. })
            | Self::FreeAll { epoch, .. }
            | Self::Break { epoch, .. }
            | Self::SetLimits { epoch, .. }
            | Self::DoubtfulNotice(Notice { epoch, .. })
            | Self::Expire { epoch, .. }
            | Self::RefuseWrites { epoch, .. }
            | Self::RaiseNsmState { epoch, .. }
            | Self::EndGrace { epoch, .. } => Some(*epoch),
        }
    }
}

/// A notice that a host has rebooted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// The epoch in which it came.
    pub epoch: u32,
    /// The host's address.
    pub address: IpAddr,
    /// The host's name, as the notice says it.
    pub mon_name: Box<[u8]>,
    /// The host's new state.
    pub state: i32,
    /// The proposer's clock, in seconds since 1970.
    pub now: u32,
}

/// A call of NLM that changes locks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockCall {
    /// The epoch in which it was accepted.
    pub epoch: u32,
    /// Who calls.
    pub host: HostKey,
    /// What tells it from all other calls.
    pub call: CallDigest,
    /// The proposer's clock, in seconds since 1970.
    pub now: u32,
    /// What it asks.
    pub action: LockAction,
}

/// What a [`LockCall`] asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockAction {
    /// LOCK.
    Lock(LockRequest),
    /// UNLOCK.
    Unlock {
        /// The file.
        file: FileKey,
        /// Who unlocks.
        owner: LockOwner,
        /// The bytes.
        range: ByteRange,
    },
    /// CANCEL.
    Cancel {
        /// The file.
        file: FileKey,
        /// Who waits no more.
        owner: LockOwner,
        /// For these bytes.
        range: ByteRange,
        /// Whether it wanted them for itself alone.
        exclusive: bool,
    },
    /// SHARE.
    Share(ShareRequest),
    /// UNSHARE.
    Unshare {
        /// The file.
        file: FileKey,
        /// Who closes it.
        oh: Box<[u8]>,
    },
}

/// What became of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The service is active.
    Activated,
    /// What became of a LOCK or SHARE.
    Lock(LockOutcome),
    /// It is unlocked.
    Unlocked,
    /// The request waits no more; whether the owner holds nothing of the range.
    Cancelled {
        /// False: the owner holds a part of it and must unlock it.
        nothing_left: bool,
    },
    /// So much ended.
    Freed(Freed),
    /// Only what hosts held before may be locked now.
    Grace,
    /// So many hosts have suspect locks now.
    Suspected(usize),
    /// So many refusals of writes came or went.
    Refusals(usize),
    /// There are as many refusals of writes as there may be.
    TooManyRefusals,
    /// Carried out, and there is nothing to say.
    Done,
    /// The command is from an earlier epoch: it changed nothing, and is not answered.
    EarlierEpoch,
}

/// Why bytes are no command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// A newer program wrote it.
    #[error("it has version {0}, and this program knows {VERSION}")]
    Newer(u8),
    /// It is not what was written.
    #[error("it is damaged")]
    Damaged,
}

impl Command {
    /// Version byte and encoding.
    pub fn encode(&self) -> Vec<u8> {
        // It fails only where the sink does.
        postcard::to_extend(self, vec![VERSION]).unwrap_or_default()
    }

    /// Reads what [`Command::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, CommandError> {
        match bytes.split_first() {
            Some((1..=VERSION, body)) => match postcard::take_from_bytes(body) {
                Ok((command, [])) => Ok(command),
                _ => Err(CommandError::Damaged),
            },
            Some((version, _)) if *version > VERSION => Err(CommandError::Newer(*version)),
            _ => Err(CommandError::Damaged),
        }
    }
}

/// Version 1 had no commands after `Break`.
const VERSION: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_keep_their_numbers() {
        let (epoch, now) = (1, 2);
        let address = IpAddr::from([127, 0, 0, 1]);
        let numbered = [
            (
                2,
                Command::ConfirmGrant {
                    epoch,
                    grant: GrantId::MIN,
                },
            ),
            (6, Command::EndGrace { epoch, now }),
            (
                7,
                Command::Break {
                    epoch,
                    address,
                    file: None,
                    now,
                },
            ),
        ];
        let last = Command::RaiseNsmState {
            epoch,
            unix_seconds: 3,
        };
        let numbered = numbered.into_iter().chain([(12, last)]);
        for (number, command) in numbered {
            assert_eq!(command.encode()[..2], [VERSION, number], "{command:?}");
        }
    }

    #[test]
    fn a_notice_is_written_field_by_field() {
        let notice = Command::Rebooted(Notice {
            epoch: 1,
            address: IpAddr::from([10, 0, 0, 7]),
            mon_name: b"a".as_slice().into(),
            state: 5,
            now: 2,
        });
        // Version, command; epoch, kind of address and address, length and name, state, clock.
        let bytes = [VERSION, 4, 1, 0, 10, 0, 0, 7, 1, b'a', 10, 2];
        assert_eq!(notice.encode(), bytes);
    }

    #[test]
    fn commands_come_back_and_others_are_refused() {
        let command = Command::RefuseGrant {
            epoch: 3,
            grant: GrantId::MIN,
            release: true,
            now: 1_800_000_000,
        };
        let bytes = command.encode();
        assert_eq!(Command::decode(&bytes), Ok(command));
        let newer = [&[VERSION + 1], &bytes[1..]].concat();
        assert_eq!(
            Command::decode(&newer),
            Err(CommandError::Newer(VERSION + 1))
        );
        let older = [&[1], &bytes[1..]].concat();
        assert!(Command::decode(&older).is_ok());
        let longer = [&bytes[..], &[0]].concat();
        for damaged in [&[][..], &bytes[..bytes.len() - 1], &longer] {
            assert_eq!(Command::decode(damaged), Err(CommandError::Damaged));
        }
    }
}
