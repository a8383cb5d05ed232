//! How entries, votes and snapshot headers are stored: little-endian numbers behind a version byte.
//!
//! The encoding is our own, because what a library derives may change with the library. Every
//! record begins with [`VERSION`]; a record from a newer program is refused as such, so that it is
//! never misread. Commands bring an encoding and a version of their own, and so do lists of
//! members, which have names and addresses; what older programs wrote are store ids alone.
//!
//! What goes between nodes is made of the same pieces, see `peer::wire`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use openraft::vote::RaftLeaderId;

use super::error::StoreError;
use super::types::{
    Entry, LeaderId, LogId, Member, Membership, NAME_BYTES_MAX, Payload, Proposed, SnapshotMeta,
    StoredMembership, Vote,
};
use crate::cluster::command::{Command, CommandError};
use crate::cluster::{NodeId, Origin, Queue};

/// The version of every record in this module.
pub(super) const VERSION: u8 = 1;
/// The version of what a snapshot says about itself. Version 1 had store ids for members.
const META_VERSION: u8 = 2;
/// The version of a list of members.
const MEMBERS_VERSION: u8 = 1;

const KIND_ENTRY: u8 = 1;
const KIND_VOTE: u8 = 2;
const KIND_PURGED: u8 = 3;
const KIND_TRUNCATED: u8 = 4;
const KIND_PAST: u8 = 5;

const PAYLOAD_BLANK: u8 = 0;
const PAYLOAD_COMMAND: u8 = 1;
/// Store ids alone; read, and not written any more.
const PAYLOAD_STORES: u8 = 2;
/// A command with its origin. Those without are from the time when there was one node.
const PAYLOAD_PROPOSAL: u8 = 3;
const PAYLOAD_MEMBERS: u8 = 4;

/// The longest text of an address: IPv6 with a scope, brackets and a port.
const ADDRESS_BYTES_MAX: usize = 64;
const FLAG_WITNESS: u8 = 1;

/// Why stored bytes can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum DecodeError {
    /// A later version wrote them.
    #[error("record version {0}, and this program knows {VERSION}")]
    Newer(u8),
    /// A later version wrote what a snapshot says about itself.
    #[error("snapshot record version {0}, and this program knows {META_VERSION}")]
    NewerMeta(u8),
    /// A later version wrote the members in them.
    #[error("member list version {0}, and this program knows {MEMBERS_VERSION}")]
    NewerMembers(u8),
    /// A later version wrote the command in them.
    #[error("a command in it: {0}")]
    NewerCommand(CommandError),
    /// They are not what was written.
    #[error("{0}")]
    Malformed(String),
}

impl DecodeError {
    /// As an error of the file at `path`; the record is at `offset`.
    pub(super) fn at(self, path: &Path, offset: u64) -> StoreError {
        match self {
            Self::Newer(_) | Self::NewerMeta(_) | Self::NewerMembers(_) | Self::NewerCommand(_) => {
                StoreError::Newer {
                    path: path.to_path_buf(),
                    problem: format!("{self}, at byte {offset}"),
                }
            }
            Self::Malformed(problem) => StoreError::damaged(path, offset, problem),
        }
    }
}

/// One record of the log.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Record {
    /// An entry.
    Entry(Entry),
    /// The vote, which replaces the one before.
    Vote(Vote),
    /// All entries up to this one are gone.
    Purged(LogId),
    /// All entries after this one are gone.
    Truncated(Option<LogId>),
    /// What the files before this one amount to.
    Past(Past),
}

/// What a log file repeats at its beginning, so that it is understood without those before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Past {
    /// The vote.
    pub(super) vote: Option<Vote>,
    /// The last entry that is purged.
    pub(super) purged: Option<LogId>,
    /// The last entry.
    pub(super) last: Option<LogId>,
}

impl Past {
    /// Entries up to `upto` are gone.
    pub(super) fn purge(&mut self, upto: LogId) {
        if self.last.is_none_or(|last| last.index < upto.index) {
            self.last = Some(upto);
        }
        self.purged = Some(upto);
    }
}

/// What a scan needs to know of a record without decoding commands.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Outline {
    /// An entry.
    Entry(LogId),
    /// See [`Record::Vote`].
    Vote(Vote),
    /// See [`Record::Purged`].
    Purged(LogId),
    /// See [`Record::Truncated`].
    Truncated(Option<LogId>),
    /// See [`Record::Past`].
    Past(Past),
}

/// Appends an entry's record.
pub(super) fn put_entry(out: &mut Vec<u8>, entry: &Entry) {
    out.extend_from_slice(&[VERSION, KIND_ENTRY]);
    put_log_id(out, entry.log_id);
    match &entry.payload {
        Payload::Blank => out.push(PAYLOAD_BLANK),
        Payload::Normal(Proposed { origin, command }) => {
            out.push(PAYLOAD_PROPOSAL);
            put_origin(out, origin);
            out.extend_from_slice(&command.encode());
        }
        Payload::Membership(membership) => {
            out.push(PAYLOAD_MEMBERS);
            put_membership(out, membership);
        }
    }
}

/// Appends a vote's record.
pub(super) fn put_vote(out: &mut Vec<u8>, vote: &Vote) {
    out.extend_from_slice(&[VERSION, KIND_VOTE]);
    put_bare_vote(out, vote);
}

/// Appends the record that says up to where entries are purged.
pub(super) fn put_purged(out: &mut Vec<u8>, upto: LogId) {
    out.extend_from_slice(&[VERSION, KIND_PURGED]);
    put_log_id(out, upto);
}

/// Appends the record that takes all entries after `last` back.
pub(super) fn put_truncated(out: &mut Vec<u8>, last: Option<LogId>) {
    out.extend_from_slice(&[VERSION, KIND_TRUNCATED]);
    put_option(out, last);
}

/// Appends the record that a log file begins with.
pub(super) fn put_past(out: &mut Vec<u8>, past: &Past) {
    out.extend_from_slice(&[VERSION, KIND_PAST, u8::from(past.vote.is_some())]);
    if let Some(vote) = &past.vote {
        put_bare_vote(out, vote);
    }
    put_option(out, past.purged);
    put_option(out, past.last);
}

/// Reads a record whole.
pub(super) fn record(bytes: &[u8]) -> Result<Record, DecodeError> {
    let mut input = Input::new(bytes)?;
    let record = match input.u8()? {
        KIND_ENTRY => Record::Entry(Entry {
            log_id: input.log_id()?,
            payload: input.payload()?,
        }),
        kind => match input.control(kind)? {
            Outline::Vote(vote) => Record::Vote(vote),
            Outline::Purged(log_id) => Record::Purged(log_id),
            Outline::Truncated(last) => Record::Truncated(last),
            Outline::Past(past) => Record::Past(past),
            Outline::Entry(_) => return Err(malformed("record of an unknown kind")),
        },
    };
    input.end()?;
    Ok(record)
}

/// Reads what a scan of the log needs of a record.
pub(super) fn outline(bytes: &[u8]) -> Result<Outline, DecodeError> {
    let mut input = Input::new(bytes)?;
    match input.u8()? {
        KIND_ENTRY => Ok(Outline::Entry(input.log_id()?)),
        kind => {
            let outline = input.control(kind)?;
            input.end()?;
            Ok(outline)
        }
    }
}

/// The stored form of what a snapshot says about itself.
pub(super) fn snapshot_meta(meta: &SnapshotMeta) -> Vec<u8> {
    let mut out = vec![META_VERSION];
    put_option(&mut out, meta.last_log_id);
    put_option(&mut out, *meta.last_membership.log_id());
    put_membership(&mut out, meta.last_membership.membership());
    out
}

/// Reads what [`snapshot_meta`] wrote.
pub(super) fn read_snapshot_meta(bytes: &[u8]) -> Result<SnapshotMeta, DecodeError> {
    let mut input = Input(bytes);
    let version = input.u8()?;
    let last_log_id = input.option()?;
    let membership_log_id = input.option()?;
    let membership = match version {
        1 => input.membership(Input::store)?,
        META_VERSION => input.members()?,
        0 => return Err(malformed("record version 0")),
        newer => return Err(DecodeError::NewerMeta(newer)),
    };
    input.end()?;
    Ok(SnapshotMeta {
        last_log_id,
        last_membership: StoredMembership::new(membership_log_id, membership),
    })
}

/// Appends a number.
pub(super) fn put_u64(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&number.to_le_bytes());
}

fn put_leader(out: &mut Vec<u8>, leader: LeaderId) {
    put_u64(out, leader.term);
    put_u64(out, leader.node_id);
}

/// Appends a vote within a record.
pub(super) fn put_bare_vote(out: &mut Vec<u8>, vote: &Vote) {
    put_leader(out, vote.leader_id);
    out.push(u8::from(vote.committed));
}

/// Appends the place of an entry.
pub(super) fn put_log_id(out: &mut Vec<u8>, log_id: LogId) {
    put_leader(out, log_id.leader_id);
    put_u64(out, log_id.index);
}

fn put_origin(out: &mut Vec<u8>, origin: &Origin) {
    put_u64(out, origin.node.0);
    put_u64(out, origin.incarnation);
    out.push(match origin.queue {
        Queue::Calls => 0,
        Queue::Leases => 1,
    });
    put_u64(out, origin.number);
}

/// Appends the place of an entry, or that there is none.
pub(super) fn put_option(out: &mut Vec<u8>, log_id: Option<LogId>) {
    out.push(u8::from(log_id.is_some()));
    if let Some(log_id) = log_id {
        put_log_id(out, log_id);
    }
}

/// The configurations (two while members change), then all members.
fn put_membership(out: &mut Vec<u8>, membership: &Membership) {
    out.push(MEMBERS_VERSION);
    let configurations = membership.get_joint_config();
    put_u64(out, configurations.len() as u64);
    for voters in configurations {
        put_u64(out, voters.len() as u64);
        for voter in voters {
            put_u64(out, *voter);
        }
    }
    put_u64(out, membership.nodes().count() as u64);
    for (node, member) in membership.nodes() {
        put_u64(out, *node);
        put_member(out, member);
    }
}

/// Appends a member. Its version is that of the list that it is in.
pub(super) fn put_member(out: &mut Vec<u8>, member: &Member) {
    put_u64(out, member.store_id);
    out.push(if member.witness { FLAG_WITNESS } else { 0 });
    put_text(out, &member.name);
    put_text(out, &member.address.to_string());
}

/// Appends a text of at most 255 bytes; a longer one is cut, and none of ours is longer.
pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    let length = u8::try_from(text.len()).unwrap_or(u8::MAX);
    out.push(length);
    out.extend(text.bytes().take(usize::from(length)));
}

/// What is left of the bytes of one record, or of a message between nodes.
pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl<'a> Input<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        match bytes.split_first() {
            Some((&VERSION, rest)) => Ok(Self(rest)),
            Some((&version, _)) if version > VERSION => Err(DecodeError::Newer(version)),
            Some(_) => Err(malformed("record version 0")),
            None => Err(malformed("empty record")),
        }
    }

    /// The next byte.
    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        let (first, rest) = self.0.split_first().ok_or_else(short)?;
        self.0 = rest;
        Ok(*first)
    }

    /// The next number.
    pub(super) fn u64(&mut self) -> Result<u64, DecodeError> {
        let (number, rest) = self.0.split_first_chunk().ok_or_else(short)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*number))
    }

    /// The next byte as yes or no.
    pub(super) fn flag(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(malformed("a flag is neither 0 nor 1")),
        }
    }

    fn leader(&mut self) -> Result<LeaderId, DecodeError> {
        Ok(LeaderId::new(self.u64()?, self.u64()?))
    }

    /// The place of an entry.
    pub(super) fn log_id(&mut self) -> Result<LogId, DecodeError> {
        let leader_id = self.leader()?;
        let index = self.u64()?;
        Ok(LogId { leader_id, index })
    }

    /// A vote.
    pub(super) fn vote(&mut self) -> Result<Vote, DecodeError> {
        let leader_id = self.leader()?;
        let committed = self.flag()?;
        Ok(Vote {
            leader_id,
            committed,
        })
    }

    /// The place of an entry, if there is one.
    pub(super) fn option(&mut self) -> Result<Option<LogId>, DecodeError> {
        if self.flag()? {
            self.log_id().map(Some)
        } else {
            Ok(None)
        }
    }

    /// Any record but an entry.
    fn control(&mut self, kind: u8) -> Result<Outline, DecodeError> {
        match kind {
            KIND_VOTE => self.vote().map(Outline::Vote),
            KIND_PURGED => self.log_id().map(Outline::Purged),
            KIND_TRUNCATED => self.option().map(Outline::Truncated),
            KIND_PAST => {
                let vote = if self.flag()? {
                    Some(self.vote()?)
                } else {
                    None
                };
                let purged = self.option()?;
                let last = self.option()?;
                Ok(Outline::Past(Past { vote, purged, last }))
            }
            _ => Err(malformed("record of an unknown kind")),
        }
    }

    fn payload(&mut self) -> Result<Payload, DecodeError> {
        match self.u8()? {
            PAYLOAD_BLANK => Ok(Payload::Blank),
            PAYLOAD_COMMAND => self.proposed(Origin::default()),
            PAYLOAD_PROPOSAL => {
                let origin = self.origin()?;
                self.proposed(origin)
            }
            PAYLOAD_STORES => self.membership(Self::store).map(Payload::Membership),
            PAYLOAD_MEMBERS => self.members().map(Payload::Membership),
            _ => Err(malformed("entry of an unknown kind")),
        }
    }

    fn origin(&mut self) -> Result<Origin, DecodeError> {
        Ok(Origin {
            node: NodeId(self.u64()?),
            incarnation: self.u64()?,
            queue: if self.flag()? {
                Queue::Leases
            } else {
                Queue::Calls
            },
            number: self.u64()?,
        })
    }

    fn proposed(&mut self, origin: Origin) -> Result<Payload, DecodeError> {
        let bytes = std::mem::take(&mut self.0);
        let command = Command::decode(bytes).map_err(|error| match error {
            CommandError::Newer(_) => DecodeError::NewerCommand(error),
            CommandError::Damaged => malformed("its command can't be read"),
        })?;
        let command = Arc::new(command);
        Ok(Payload::Normal(Proposed { origin, command }))
    }

    fn members(&mut self) -> Result<Membership, DecodeError> {
        match self.u8()? {
            MEMBERS_VERSION => self.membership(Self::member),
            0 => Err(malformed("member list version 0")),
            newer => Err(DecodeError::NewerMembers(newer)),
        }
    }

    /// `read` takes what is known of one member.
    fn membership(
        &mut self,
        read: impl Fn(&mut Self) -> Result<Member, DecodeError>,
    ) -> Result<Membership, DecodeError> {
        let mut configurations = Vec::new();
        for _ in 0..self.u64()? {
            let mut voters = BTreeSet::new();
            for _ in 0..self.u64()? {
                voters.insert(self.u64()?);
            }
            configurations.push(voters);
        }
        let mut members = BTreeMap::new();
        for _ in 0..self.u64()? {
            let node = self.u64()?;
            members.insert(node, read(self)?);
        }
        Membership::new(configurations, members)
            .map_err(|error| DecodeError::Malformed(error.to_string()))
    }

    /// A member of which only the store is told.
    fn store(&mut self) -> Result<Member, DecodeError> {
        self.u64().map(Member::alone)
    }

    /// What [`put_member`] wrote.
    pub(super) fn member(&mut self) -> Result<Member, DecodeError> {
        let store_id = self.u64()?;
        let witness = match self.u8()? {
            0 => false,
            FLAG_WITNESS => true,
            _ => return Err(malformed("a member has unknown flags")),
        };
        Ok(Member {
            store_id,
            witness,
            name: self.text(NAME_BYTES_MAX)?.into(),
            address: self.address()?,
        })
    }

    /// An address with a port, as text.
    pub(super) fn address(&mut self) -> Result<SocketAddr, DecodeError> {
        let text = self.text(ADDRESS_BYTES_MAX)?;
        text.parse()
            .map_err(|_| malformed("an address is none with a port"))
    }

    /// What [`put_text`] wrote, of at most `bytes_max` bytes.
    pub(super) fn text(&mut self, bytes_max: usize) -> Result<&'a str, DecodeError> {
        let length = usize::from(self.u8()?);
        if length > bytes_max {
            return Err(malformed("a text is too long"));
        }
        let text = self.bytes(length)?;
        std::str::from_utf8(text).map_err(|_| malformed("a text is not UTF-8"))
    }

    /// The next `length` bytes.
    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let (bytes, rest) = self.0.split_at_checked(length).ok_or_else(short)?;
        self.0 = rest;
        Ok(bytes)
    }

    /// Refuses what is left over.
    pub(super) fn end(&self) -> Result<(), DecodeError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(malformed("bytes are left over"))
        }
    }
}

/// What is read is not what was written.
pub(super) fn malformed(problem: &str) -> DecodeError {
    DecodeError::Malformed(problem.to_owned())
}

fn short() -> DecodeError {
    malformed("record ends too early")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
