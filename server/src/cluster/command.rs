//! What the log holds: commands, and the outcomes of applying them.
//!
//! A command carries everything that it depends on, also the proposer's clock and random numbers,
//! so that every node makes the same of it. Its first byte is a version; new commands and new
//! fields are added at the end, and a change of what is there makes a new version. Versions 1 and 2
//! are from the time when there was one service, and had commands for it alone.

use std::net::IpAddr;

use havenfs_nlm::ending::Freed;
use havenfs_nlm::host::{CallDigest, HostKey};
use havenfs_nlm::keys::{FileKey, LockOwner};
use havenfs_nlm::limits::Limits;
use havenfs_nlm::range::ByteRange;
use havenfs_nlm::range_set::GrantId;
use havenfs_nlm::share::ShareRequest;
use havenfs_nlm::table::{LockOutcome, LockRequest};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::connections::Connection;
use super::definition::{Definition, InForce, Undefined};
use super::handles::HandleEntry;
use super::members::MemberCommand;
use super::mounts::Mount;
use super::numbers::Allot;
use super::replies::KeptReply;
use super::service::running::RunningNote;
use super::{NodeId, ServiceId};

/// One change of the replicated state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Of what concerns all of it.
    Cluster(ClusterCommand),
    /// Of what one service's hosts have.
    Service(ServiceId, ServiceCommand),
}

/// A change of who serves what. New ones are added at the end: their order is their number in the
/// log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClusterCommand {
    /// A node renews its lease.
    Renew(Renewal),
    /// A node takes a service.
    Assign(Assign),
    /// The active node of a service has stopped serving it.
    Release(Release),
    /// An operator wants a service elsewhere.
    Move {
        /// Which one.
        service: ServiceId,
        /// Where to.
        to: NodeId,
    },
    /// A service gets an id, if it has none yet.
    Name {
        /// What the configuration calls it.
        name: Box<str>,
    },
    /// An export or a file system gets a number.
    Allot(Allot),
    /// A service is defined anew.
    Define {
        /// Which one.
        service: ServiceId,
        /// The version that it has now; 0 if it has none.
        expected_version: u64,
        /// As what.
        definition: Definition,
    },
    /// The members change.
    Members(MemberCommand),
    /// A node tells whether its storage of a service works.
    NoteStorage(StorageNote),
    /// An operator wants nobody to serve a service, until it is moved again.
    Withdraw {
        /// Which one.
        service: ServiceId,
    },
    /// The active node gives a service back to the node that it prefers. Void if it has been
    /// assigned since, if something else is wanted, or if an operator has put it where it is.
    GoBack {
        /// Which one.
        service: ServiceId,
        /// In which epoch.
        epoch: u32,
        /// Where to.
        to: NodeId,
    },
    /// A node tells with which addresses it runs.
    NoteRunning(RunningNote),
    /// An operator ends a service that no node has in its files any more. Void if somebody has it.
    Forget {
        /// Which one.
        service: ServiceId,
        /// The last renewal of the active node, after which the proposer waited; none if there is
        /// no active node, or it has been started anew since.
        after: Option<RenewalId>,
    },
}

/// A node says that it lives. It serves no longer than `lease_ms` after it has proposed this,
/// unless a later one is committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// Whose lease it is.
    pub node: NodeId,
    /// Which life of its process; rises with each.
    pub incarnation: u64,
    /// Which renewal of that life; rises with each.
    pub seq: u64,
    /// For how long; others wait for this long and a margin, whatever their own configuration says.
    pub lease_ms: u32,
}

/// Which renewal of a node; later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RenewalId {
    /// Which life of its process.
    pub incarnation: u64,
    /// Which renewal of that life.
    pub seq: u64,
}

/// A node takes a service. Valid if nobody has it, if the node has it already, or if the lease of
/// the node that has it is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assign {
    /// Which service.
    pub service: ServiceId,
    /// The epoch that this one follows.
    pub expected_epoch: u32,
    /// The last renewal of the active node, after which the proposer waited; none if there is no
    /// active node, or it is the same one.
    pub after: Option<RenewalId>,
    /// Who takes it; its lease begins with this.
    pub renewal: Renewal,
    /// The proposer's clock, in seconds since 1970.
    pub unix_seconds: u64,
    /// Whether locks may be missing in the table.
    pub recover: bool,
}

/// The active node has stopped, before it proposed this, and never serves in that epoch again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Which service.
    pub service: ServiceId,
    /// In which epoch.
    pub epoch: u32,
    /// Which node.
    pub node: NodeId,
    /// Which life of its process.
    pub incarnation: u64,
}

/// What a node found when it tried the storage of a service. It stays noted until the same node
/// says otherwise, over its death too: what was dead is not believed to work again unseen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageNote {
    /// Which service.
    pub service: ServiceId,
    /// Whose storage.
    pub node: NodeId,
    /// Whether it fails.
    pub fails: bool,
}

/// How a node began to serve when there was one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activation {
    /// A random number of the process that will serve.
    pub incarnation: u64,
    /// The proposer's clock, in seconds since 1970.
    pub unix_seconds: u64,
    /// Whether locks may be missing.
    pub recover: bool,
}

/// A change of what a service's hosts have. New ones are added at the end: their order is their
/// number in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceCommand {
    /// A node begins to serve: from the time when there was one node.
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
    /// A file gets an entry in the handle table, or loses it.
    SetHandle {
        /// The epoch in which it was seen.
        epoch: u32,
        /// The entry's number.
        id: u64,
        /// Where the file is; none if its last name is gone.
        entry: Option<HandleEntry>,
    },
    /// Clients have connected, or are gone.
    Connections {
        /// The epoch in which it was seen.
        epoch: u32,
        /// Connections that are open now.
        came: Vec<Connection>,
        /// Connections that are open no more.
        went: Vec<Connection>,
    },
    /// These nodes can't write to the service's storage any more: the fence has succeeded, or an
    /// operator has made sure.
    Fenced {
        /// The epoch in which that was so.
        epoch: u32,
        /// Which nodes.
        nodes: Vec<NodeId>,
    },
    /// Nothing but a fence keeps the active node from writing to the service's storage, which it
    /// has not touched yet.
    NeedsFence {
        /// Its epoch.
        epoch: u32,
    },
    /// The configuration says what becomes of a reclaim of something that the table does not have.
    SetReclaims {
        /// The epoch in which it was read.
        epoch: u32,
        /// Whether it is granted, if nothing is in its way.
        lenient: bool,
    },
    /// Clients have mounted something, or unmounted it.
    Mounts {
        /// The epoch in which it was seen.
        epoch: u32,
        /// What is mounted now.
        came: Vec<Mount>,
        /// What is mounted no more.
        went: Vec<Mount>,
    },
    /// The active node has brought a definition into force, or could not.
    InForce {
        /// Its epoch.
        epoch: u32,
        /// Which one, and what became of it.
        in_force: InForce,
    },
    /// The active node hands replies over to the one that comes next: see
    /// [`replies`](super::replies).
    Replies {
        /// Its epoch.
        epoch: u32,
        /// Some of them; further commands have more.
        replies: Vec<KeptReply>,
        /// The proposer's clock, in seconds since 1970.
        unix_seconds: u64,
    },
}

impl ServiceCommand {
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
            | Self::SetHandle { epoch, .. }
            | Self::Connections { epoch, .. }
            | Self::Fenced { epoch, .. }
            | Self::NeedsFence { epoch }
            | Self::SetReclaims { epoch, .. }
            | Self::Mounts { epoch, .. }
            | Self::InForce { epoch, .. }
            | Self::Replies { epoch, .. }
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
    /// The service is assigned, in this epoch.
    Assigned(u32),
    /// It is not: somebody else was faster, or the active node lives.
    NotAssigned,
    /// The lease is renewed: of these services, in these epochs.
    Renewed(Vec<(ServiceId, u32)>),
    /// The service has this id.
    Named(ServiceId),
    /// No service has that id.
    NoSuchService,
    /// The service is defined, with this version.
    Defined(u64),
    /// It is not.
    NotDefined(Undefined),
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
    /// There are as many entries in the handle table as there may be.
    TooManyHandles,
    /// The node has this service, so it can't be removed.
    StillServes(ServiceId),
    /// Carried out, and there is nothing to say.
    Done,
    /// The command is from an earlier epoch: it changed nothing, and is not answered.
    EarlierEpoch,
    /// The node has still to be fenced for this service, so it can't be removed.
    AwaitsFence(ServiceId),
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
        let (version, body) = bytes.split_first().ok_or(CommandError::Damaged)?;
        match *version {
            VERSION => whole(body),
            LONE_VERSION_MIN..=LONE_VERSION_MAX => {
                whole(body).map(|command| Self::Service(ServiceId::FIRST, command))
            }
            0 => Err(CommandError::Damaged),
            newer => Err(CommandError::Newer(newer)),
        }
    }
}

fn whole<T: DeserializeOwned>(body: &[u8]) -> Result<T, CommandError> {
    match postcard::take_from_bytes(body) {
        Ok((command, [])) => Ok(command),
        _ => Err(CommandError::Damaged),
    }
}

/// Versions 1 and 2 are a [`ServiceCommand`].
const LONE_VERSION_MIN: u8 = 1;
const LONE_VERSION_MAX: u8 = 2;
const VERSION: u8 = 3;

#[cfg(test)]
mod tests;
