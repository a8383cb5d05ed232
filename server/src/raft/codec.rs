//! How entries, votes and snapshot headers are stored: little-endian numbers behind a version byte.
//!
//! The encoding is our own, because what a library derives may change with the library. Every
//! record begins with [`VERSION`]; a record from a newer program is refused as such, so that it is
//! never misread. Commands bring an encoding and a version of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use openraft::vote::RaftLeaderId;

use super::error::StoreError;
use super::types::{
    Entry, LeaderId, LogId, Member, Membership, Payload, Proposed, SnapshotMeta, StoredMembership,
    Vote,
};
use crate::cluster::command::{Command, CommandError};
use crate::cluster::{NodeId, Origin, Queue};

/// The version of every record in this module.
pub(super) const VERSION: u8 = 1;

const KIND_ENTRY: u8 = 1;
const KIND_VOTE: u8 = 2;
const KIND_PURGED: u8 = 3;
const KIND_TRUNCATED: u8 = 4;
const KIND_PAST: u8 = 5;

const PAYLOAD_BLANK: u8 = 0;
const PAYLOAD_COMMAND: u8 = 1;
const PAYLOAD_MEMBERSHIP: u8 = 2;
/// A command with its origin. Those without are from the time when there was one node.
const PAYLOAD_PROPOSAL: u8 = 3;

/// Why stored bytes can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum DecodeError {
    /// A later version wrote them.
    #[error("record version {0}, and this program knows {VERSION}")]
    Newer(u8),
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
            Self::Newer(_) | Self::NewerCommand(_) => StoreError::Newer {
                path: path.to_path_buf(),
                problem: format!("{self}, at byte {offset}"),
            },
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
            out.push(PAYLOAD_MEMBERSHIP);
            put_membership(out, membership);
        }
    }
}

/// Appends a vote's record.
pub(super) fn put_vote(out: &mut Vec<u8>, vote: &Vote) {
    out.extend_from_slice(&[VERSION, KIND_VOTE]);
    put_leader(out, vote.leader_id);
    out.push(u8::from(vote.committed));
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
        put_leader(out, vote.leader_id);
        out.push(u8::from(vote.committed));
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
    let mut out = vec![VERSION];
    put_option(&mut out, meta.last_log_id);
    put_option(&mut out, *meta.last_membership.log_id());
    put_membership(&mut out, meta.last_membership.membership());
    out
}

/// Reads what [`snapshot_meta`] wrote.
pub(super) fn read_snapshot_meta(bytes: &[u8]) -> Result<SnapshotMeta, DecodeError> {
    let mut input = Input::new(bytes)?;
    let last_log_id = input.option()?;
    let membership_log_id = input.option()?;
    let membership = input.membership()?;
    input.end()?;
    Ok(SnapshotMeta {
        last_log_id,
        last_membership: StoredMembership::new(membership_log_id, membership),
    })
}

fn put_u64(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&number.to_le_bytes());
}

fn put_leader(out: &mut Vec<u8>, leader: LeaderId) {
    put_u64(out, leader.term);
    put_u64(out, leader.node_id);
}

fn put_log_id(out: &mut Vec<u8>, log_id: LogId) {
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

fn put_option(out: &mut Vec<u8>, log_id: Option<LogId>) {
    out.push(u8::from(log_id.is_some()));
    if let Some(log_id) = log_id {
        put_log_id(out, log_id);
    }
}

/// The configurations (two while members change), then all members with their stores.
fn put_membership(out: &mut Vec<u8>, membership: &Membership) {
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
        put_u64(out, member.store_id);
    }
}

/// What is left of the bytes of one record.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        match bytes.split_first() {
            Some((&VERSION, rest)) => Ok(Self(rest)),
            Some((&version, _)) if version > VERSION => Err(DecodeError::Newer(version)),
            Some(_) => Err(malformed("record version 0")),
            None => Err(malformed("empty record")),
        }
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        let (first, rest) = self.0.split_first().ok_or_else(short)?;
        self.0 = rest;
        Ok(*first)
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        let (number, rest) = self.0.split_first_chunk().ok_or_else(short)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*number))
    }

    fn flag(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(malformed("a flag is neither 0 nor 1")),
        }
    }

    fn leader(&mut self) -> Result<LeaderId, DecodeError> {
        Ok(LeaderId::new(self.u64()?, self.u64()?))
    }

    fn log_id(&mut self) -> Result<LogId, DecodeError> {
        let leader_id = self.leader()?;
        let index = self.u64()?;
        Ok(LogId { leader_id, index })
    }

    fn vote(&mut self) -> Result<Vote, DecodeError> {
        let leader_id = self.leader()?;
        let committed = self.flag()?;
        Ok(Vote {
            leader_id,
            committed,
        })
    }

    fn option(&mut self) -> Result<Option<LogId>, DecodeError> {
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
            PAYLOAD_MEMBERSHIP => self.membership().map(Payload::Membership),
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

    fn membership(&mut self) -> Result<Membership, DecodeError> {
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
            let store_id = self.u64()?;
            members.insert(node, Member { store_id });
        }
        Membership::new(configurations, members)
            .map_err(|error| DecodeError::Malformed(error.to_string()))
    }

    fn end(&self) -> Result<(), DecodeError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(malformed("bytes are left over"))
        }
    }
}

fn malformed(problem: &str) -> DecodeError {
    DecodeError::Malformed(problem.to_owned())
}

fn short() -> DecodeError {
    malformed("record ends too early")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
