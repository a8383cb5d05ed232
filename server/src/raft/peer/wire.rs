//! The messages between nodes, as bytes.
//!
//! Little-endian numbers behind a version byte and a kind, made of the pieces in `raft::codec`: an
//! entry goes as it is stored, and so does a snapshot's description. A message that is not whole,
//! contradicts itself or has more elements than a named limit is refused whole. What a member
//! vouches for and openraft takes for granted is checked here too, because a breach would end the
//! process there: entries and snapshots come from a leader that may have them, without gaps.

use std::collections::BTreeMap;
use std::sync::Arc;

use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderError,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::vote::RaftLeaderId;

use super::hello::{Configured, Hello, Standing};
use crate::raft::change::MemberChange;
use crate::raft::codec::{
    self, DecodeError, Input, Record, malformed, put_bare_vote, put_entry, put_member, put_option,
    put_text, put_u64,
};
use crate::raft::stored::MEMBERS_MAX;
use crate::raft::types::{
    Entry, LeaderId, LogId, NAME_BYTES_MAX, Payload, Proposed, SnapshotMeta, Types, Vote,
};

/// The most entries of a request.
pub(super) const ENTRIES_MAX: usize = 4096;
/// The most proposals of a message.
pub(super) const FORWARDS_MAX: usize = 1024;
/// The longest piece of a snapshot.
pub(super) const CHUNK_BYTES_MAX: usize = 1 << 20;
/// The longest reason of a refusal.
pub(super) const REASON_BYTES_MAX: usize = 1024;

/// The longest answer to a change of the members.
pub(super) const ANSWER_BYTES_MAX: usize = 8192;

/// The version of every message.
const VERSION: u8 = 1;

const KIND_HELLO: u8 = 1;
const KIND_REFUSED: u8 = 2;
const KIND_APPEND: u8 = 3;
const KIND_APPENDED: u8 = 4;
const KIND_VOTE: u8 = 5;
const KIND_PRE_VOTE: u8 = 6;
const KIND_VOTED: u8 = 7;
const KIND_SNAPSHOT: u8 = 8;
const KIND_CHUNK: u8 = 9;
const KIND_INSTALLED: u8 = 10;
const KIND_TRANSFER: u8 = 11;
const KIND_TRANSFERRED: u8 = 12;
const KIND_FORWARD: u8 = 13;
const KIND_NOT_LEADER: u8 = 14;
const KIND_REMOVED: u8 = 15;
const KIND_CHANGE: u8 = 16;
const KIND_CHANGED: u8 = 17;

const CHANGE_TRANSFER: u8 = 0;
const CHANGE_ADD: u8 = 1;
const CHANGE_REMOVE: u8 = 2;

const UNFORMED: u8 = 0;
const FORMED: u8 = 1;
/// With a generation other than 0.
const FORMED_AGAIN: u8 = 2;

const APPEND_SUCCESS: u8 = 0;
const APPEND_PARTIAL: u8 = 1;
const APPEND_CONFLICT: u8 = 2;
const APPEND_HIGHER_VOTE: u8 = 3;

const TRANSFER_DONE: u8 = 0;
const TRANSFER_VOTE_CHANGED: u8 = 1;
const TRANSFER_NOT_FLUSHED: u8 = 2;

/// A message.
#[derive(Debug, Clone)]
pub(super) enum Message {
    /// Who the sender is; the first message of both sides.
    Hello(Hello),
    /// Why the receiver gets nothing, in words; then the connection ends.
    Refused(String),
    /// Entries, or a heartbeat.
    Append(AppendEntriesRequest<Types>),
    /// What became of them.
    Appended(AppendEntriesResponse<Types>),
    /// A candidate asks for a vote.
    Vote(VoteRequest<Types>),
    /// One that would like to be a candidate asks whether it would get a vote.
    PreVote(VoteRequest<Types>),
    /// The answer to both.
    Voted(VoteResponse<Types>),
    /// A snapshot of so many bytes follows, in pieces.
    Snapshot(Announced),
    /// A piece of it.
    Chunk(Vec<u8>),
    /// The snapshot is installed, or was not needed.
    Installed(SnapshotResponse<Types>),
    /// A leader wants another one to lead.
    Transfer(TransferLeaderRequest<Types>),
    /// Whether that was heeded.
    Transferred(TransferLeaderResponse<Types>),
    /// Proposals for the leader's log, in order; there is no answer.
    Forward(Vec<Proposed>),
    /// One of the proposals was not taken, nor any after it; then the connection ends. Also the
    /// answer to a change that only the leader can make.
    NotLeader,
    /// The receiver was removed from the cluster, or given up as lost; then the connection ends.
    Removed(String),
    /// An operator wants the members changed, or another leader.
    Change(MemberChange),
    /// What became of it, in words.
    Changed(Result<String, String>),
}

/// What precedes a snapshot.
#[derive(Debug, Clone)]
pub(super) struct Announced {
    /// The leader's vote.
    pub(super) vote: Vote,
    /// What the snapshot says about itself.
    pub(super) meta: SnapshotMeta,
    /// Its length.
    pub(super) bytes: u64,
}

impl Message {
    /// Appends the bytes of [`Message::Append`] with as many entries as fit in `bytes_max`, and at
    /// least one; returns how many.
    pub(super) fn encode_append(
        out: &mut Vec<u8>,
        request: &AppendEntriesRequest<Types>,
        bytes_max: usize,
    ) -> usize {
        out.extend_from_slice(&[VERSION, KIND_APPEND]);
        put_append(out, request, bytes_max)
    }

    /// Appends the message's bytes.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.push(VERSION);
        match self {
            Self::Hello(hello) => {
                out.push(KIND_HELLO);
                put_hello(out, hello);
            }
            Self::Refused(reason) => {
                out.push(KIND_REFUSED);
                out.extend(reason.bytes().take(REASON_BYTES_MAX));
            }
            Self::Append(request) => {
                out.push(KIND_APPEND);
                put_append(out, request, usize::MAX);
            }
            Self::Appended(response) => {
                out.push(KIND_APPENDED);
                put_appended(out, response);
            }
            Self::Vote(request) => {
                out.push(KIND_VOTE);
                put_vote_request(out, request);
            }
            Self::PreVote(request) => {
                out.push(KIND_PRE_VOTE);
                put_vote_request(out, request);
            }
            Self::Voted(response) => {
                out.push(KIND_VOTED);
                put_bare_vote(out, &response.vote);
                out.push(u8::from(response.vote_granted));
                put_option(out, response.last_log_id);
            }
            Self::Snapshot(announced) => {
                out.push(KIND_SNAPSHOT);
                put_bare_vote(out, &announced.vote);
                put_u64(out, announced.bytes);
                out.extend_from_slice(&codec::snapshot_meta(&announced.meta));
            }
            Self::Chunk(bytes) => {
                out.push(KIND_CHUNK);
                out.extend_from_slice(bytes);
            }
            Self::Installed(response) => {
                out.push(KIND_INSTALLED);
                put_bare_vote(out, &response.vote);
            }
            Self::Transfer(request) => {
                out.push(KIND_TRANSFER);
                put_bare_vote(out, request.from_leader());
                put_u64(out, *request.to_node_id());
                put_option(out, request.last_log_id().copied());
            }
            Self::Transferred(response) => {
                out.push(KIND_TRANSFERRED);
                put_transferred(out, response);
            }
            Self::Forward(proposals) => {
                out.push(KIND_FORWARD);
                put_u64(out, proposals.len() as u64);
                for proposed in proposals {
                    // As an entry without a place, so that whatever can be stored can be sent.
                    let log_id = LogId::new(LeaderId::new(0, 0), 0);
                    let entry = Entry {
                        log_id,
                        payload: Payload::Normal(proposed.clone()),
                    };
                    put_sized(out, |out| put_entry(out, &entry));
                }
            }
            Self::NotLeader => out.push(KIND_NOT_LEADER),
            Self::Removed(reason) => {
                out.push(KIND_REMOVED);
                out.extend(reason.bytes().take(REASON_BYTES_MAX));
            }
            Self::Change(change) => {
                out.push(KIND_CHANGE);
                put_change(out, change);
            }
            Self::Changed(result) => {
                out.push(KIND_CHANGED);
                let (Ok(text) | Err(text)) = result;
                out.push(u8::from(result.is_ok()));
                out.extend(text.bytes().take(ANSWER_BYTES_MAX));
            }
        }
    }

    /// Reads what [`Message::encode`] wrote.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Input(bytes);
        match input.u8()? {
            VERSION => {}
            0 => return Err(malformed("message version 0")),
            newer => return Err(DecodeError::Newer(newer)),
        }
        let input = &mut input;
        let message = match input.u8()? {
            KIND_HELLO => Self::Hello(hello(input)?),
            KIND_REFUSED => Self::Refused(reason(input)?),
            KIND_APPEND => Self::Append(append(input)?),
            KIND_APPENDED => Self::Appended(appended(input)?),
            KIND_VOTE => Self::Vote(vote_request(input)?),
            KIND_PRE_VOTE => Self::PreVote(vote_request(input)?),
            KIND_VOTED => Self::Voted(VoteResponse {
                vote: input.vote()?,
                vote_granted: input.flag()?,
                last_log_id: input.option()?,
            }),
            KIND_SNAPSHOT => Self::Snapshot(announced(input)?),
            KIND_CHUNK => Self::Chunk(chunk(input)?),
            KIND_INSTALLED => Self::Installed(SnapshotResponse::new(input.vote()?)),
            KIND_TRANSFER => Self::Transfer(transfer(input)?),
            KIND_TRANSFERRED => Self::Transferred(transferred(input)?),
            KIND_FORWARD => Self::Forward(forward(input)?),
            KIND_NOT_LEADER => Self::NotLeader,
            KIND_REMOVED => Self::Removed(reason(input)?),
            KIND_CHANGE => Self::Change(change(input)?),
            KIND_CHANGED => Self::Changed(changed(input)?),
            _ => return Err(malformed("message of an unknown kind")),
        };
        input.end()?;
        Ok(message)
    }
}

/// Appends what `put` appends, with its length before it.
fn put_sized(out: &mut Vec<u8>, put: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    put_u64(out, 0);
    let begin = out.len();
    put(out);
    let bytes = (out.len() - begin) as u64;
    if let Some(length) = out.get_mut(at..begin) {
        length.copy_from_slice(&bytes.to_le_bytes());
    }
}

/// How many elements follow.
fn count(input: &mut Input<'_>, count_max: usize) -> Result<usize, DecodeError> {
    let count = input.u64()?;
    if count > count_max as u64 {
        return Err(malformed("it has too many elements"));
    }
    Ok(count as usize)
}

fn entry(input: &mut Input<'_>) -> Result<Entry, DecodeError> {
    let bytes = input.u64()?;
    let bytes = usize::try_from(bytes).map_err(|_| malformed("an entry is too long"))?;
    match codec::record(input.bytes(bytes)?)? {
        Record::Entry(entry) => Ok(entry),
        _ => Err(malformed("a record that is no entry")),
    }
}

fn put_append(out: &mut Vec<u8>, request: &AppendEntriesRequest<Types>, bytes_max: usize) -> usize {
    put_bare_vote(out, &request.vote);
    put_option(out, request.prev_log_id);
    put_option(out, request.leader_commit);
    let at = out.len();
    put_u64(out, 0);
    let begin = out.len();
    let mut count = 0;
    for entry in request.entries.iter().take(ENTRIES_MAX) {
        let end = out.len();
        put_sized(out, |out| put_entry(out, entry));
        if count > 0 && out.len() - begin > bytes_max {
            out.truncate(end);
            break;
        }
        count += 1;
    }
    if let Some(place) = out.get_mut(at..begin) {
        place.copy_from_slice(&(count as u64).to_le_bytes());
    }
    count
}

fn append(input: &mut Input<'_>) -> Result<AppendEntriesRequest<Types>, DecodeError> {
    let vote = input.vote()?;
    let prev_log_id = input.option()?;
    let leader_commit = input.option()?;
    if !vote.committed {
        return Err(malformed("entries from one that does not lead"));
    }
    // Not taken at once: the entries that have come are what takes memory.
    let mut entries = Vec::new();
    let mut last = prev_log_id;
    for _ in 0..count(input, ENTRIES_MAX)? {
        let entry = entry(input)?;
        let follows = last.map_or(Some(0), |last| last.index.checked_add(1));
        let in_order = last.is_none_or(|last| last.leader_id <= entry.log_id.leader_id);
        if follows != Some(entry.log_id.index) || !in_order {
            return Err(malformed("entries do not follow each other"));
        }
        last = Some(entry.log_id);
        entries.push(entry);
    }
    if last.is_some_and(|last| last.leader_id > vote.leader_id) {
        return Err(malformed("entries of a later leader"));
    }
    Ok(AppendEntriesRequest {
        vote,
        prev_log_id,
        entries,
        leader_commit,
    })
}

fn put_appended(out: &mut Vec<u8>, response: &AppendEntriesResponse<Types>) {
    match response {
        AppendEntriesResponse::Success => out.push(APPEND_SUCCESS),
        AppendEntriesResponse::PartialSuccess(last) => {
            out.push(APPEND_PARTIAL);
            put_option(out, *last);
        }
        AppendEntriesResponse::Conflict => out.push(APPEND_CONFLICT),
        AppendEntriesResponse::HigherVote(vote) => {
            out.push(APPEND_HIGHER_VOTE);
            put_bare_vote(out, vote);
        }
    }
}

fn appended(input: &mut Input<'_>) -> Result<AppendEntriesResponse<Types>, DecodeError> {
    Ok(match input.u8()? {
        APPEND_SUCCESS => AppendEntriesResponse::Success,
        APPEND_PARTIAL => AppendEntriesResponse::PartialSuccess(input.option()?),
        APPEND_CONFLICT => AppendEntriesResponse::Conflict,
        APPEND_HIGHER_VOTE => AppendEntriesResponse::HigherVote(input.vote()?),
        _ => return Err(malformed("an answer of an unknown kind")),
    })
}

fn put_vote_request(out: &mut Vec<u8>, request: &VoteRequest<Types>) {
    put_bare_vote(out, &request.vote);
    put_option(out, request.last_log_id);
    out.push(u8::from(request.leadership_transfer));
}

fn vote_request(input: &mut Input<'_>) -> Result<VoteRequest<Types>, DecodeError> {
    let vote = input.vote()?;
    if vote.committed {
        return Err(malformed("a candidate that leads already"));
    }
    let mut request = VoteRequest::new(vote, input.option()?);
    request.leadership_transfer = input.flag()?;
    Ok(request)
}

fn announced(input: &mut Input<'_>) -> Result<Announced, DecodeError> {
    let vote = input.vote()?;
    let bytes = input.u64()?;
    let meta = codec::read_snapshot_meta(std::mem::take(&mut input.0))?;
    let beyond = |last: LogId| last.leader_id > vote.leader_id;
    if !vote.committed || meta.last_log_id.is_some_and(beyond) {
        return Err(malformed("a snapshot from one that does not lead"));
    }
    Ok(Announced { vote, meta, bytes })
}

fn chunk(input: &mut Input<'_>) -> Result<Vec<u8>, DecodeError> {
    let bytes = std::mem::take(&mut input.0);
    if bytes.is_empty() || bytes.len() > CHUNK_BYTES_MAX {
        return Err(malformed("a piece of a snapshot has a wrong length"));
    }
    Ok(bytes.to_vec())
}

fn reason(input: &mut Input<'_>) -> Result<String, DecodeError> {
    let bytes = std::mem::take(&mut input.0);
    if bytes.len() > REASON_BYTES_MAX {
        return Err(malformed("a reason is too long"));
    }
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

fn put_change(out: &mut Vec<u8>, change: &MemberChange) {
    match change {
        MemberChange::Transfer { to } => {
            out.extend_from_slice(&[CHANGE_TRANSFER, u8::from(to.is_some())]);
            put_text(out, to.as_deref().unwrap_or_default());
        }
        MemberChange::Add {
            name,
            address,
            witness,
        } => {
            out.extend_from_slice(&[CHANGE_ADD, u8::from(*witness)]);
            put_text(out, name);
            put_text(out, &address.to_string());
        }
        MemberChange::Remove { name } => {
            out.push(CHANGE_REMOVE);
            put_text(out, name);
        }
    }
}

fn change(input: &mut Input<'_>) -> Result<MemberChange, DecodeError> {
    Ok(match input.u8()? {
        CHANGE_TRANSFER => {
            let is_there = input.flag()?;
            let to = input.text(NAME_BYTES_MAX)?;
            MemberChange::Transfer {
                to: is_there.then(|| to.into()),
            }
        }
        CHANGE_ADD => MemberChange::Add {
            witness: input.flag()?,
            name: input.text(NAME_BYTES_MAX)?.into(),
            address: input.address()?,
        },
        CHANGE_REMOVE => MemberChange::Remove {
            name: input.text(NAME_BYTES_MAX)?.into(),
        },
        _ => return Err(malformed("a change of an unknown kind")),
    })
}

fn changed(input: &mut Input<'_>) -> Result<Result<String, String>, DecodeError> {
    let is_done = input.flag()?;
    let bytes = std::mem::take(&mut input.0);
    if bytes.len() > ANSWER_BYTES_MAX {
        return Err(malformed("an answer is too long"));
    }
    let text = String::from_utf8_lossy(bytes).into_owned();
    Ok(if is_done { Ok(text) } else { Err(text) })
}

fn transfer(input: &mut Input<'_>) -> Result<TransferLeaderRequest<Types>, DecodeError> {
    let vote = input.vote()?;
    if !vote.committed {
        return Err(malformed("a transfer from one that does not lead"));
    }
    Ok(TransferLeaderRequest::new(
        vote,
        input.u64()?,
        input.option()?,
    ))
}

fn put_transferred(out: &mut Vec<u8>, response: &TransferLeaderResponse<Types>) {
    match response {
        Ok(()) => out.push(TRANSFER_DONE),
        Err(TransferLeaderError::VoteChanged { expected, actual }) => {
            out.push(TRANSFER_VOTE_CHANGED);
            put_bare_vote(out, expected);
            put_bare_vote(out, actual);
        }
        Err(TransferLeaderError::LogNotFlushed { expected, actual }) => {
            out.push(TRANSFER_NOT_FLUSHED);
            put_option(out, *expected);
            put_option(out, *actual);
        }
    }
}

fn transferred(input: &mut Input<'_>) -> Result<TransferLeaderResponse<Types>, DecodeError> {
    Ok(match input.u8()? {
        TRANSFER_DONE => Ok(()),
        TRANSFER_VOTE_CHANGED => Err(TransferLeaderError::VoteChanged {
            expected: input.vote()?,
            actual: input.vote()?,
        }),
        TRANSFER_NOT_FLUSHED => Err(TransferLeaderError::LogNotFlushed {
            expected: input.option()?,
            actual: input.option()?,
        }),
        _ => return Err(malformed("an answer of an unknown kind")),
    })
}

fn forward(input: &mut Input<'_>) -> Result<Vec<Proposed>, DecodeError> {
    let mut proposals = Vec::new();
    for _ in 0..count(input, FORWARDS_MAX)? {
        match entry(input)?.payload {
            Payload::Normal(proposed) => proposals.push(proposed),
            Payload::Blank | Payload::Membership(_) => {
                return Err(malformed("a proposal that is no command"));
            }
        }
    }
    Ok(proposals)
}

fn put_hello(out: &mut Vec<u8>, hello: &Hello) {
    put_text(out, &hello.name);
    put_u64(out, hello.store_id);
    match &hello.standing {
        Standing::Unformed { empty, configured } => {
            out.extend_from_slice(&[UNFORMED, u8::from(*empty)]);
            put_u64(out, configured.len() as u64);
            for member in configured.iter() {
                put_text(out, &member.name);
                put_text(out, &member.address.to_string());
                out.push(u8::from(member.witness));
            }
        }
        Standing::Formed {
            cluster_id,
            generation,
            node,
            members,
        } => {
            if *generation == 0 {
                out.push(FORMED);
            } else {
                out.push(FORMED_AGAIN);
                put_u64(out, (*generation).into());
            }
            put_u64(out, *cluster_id);
            put_u64(out, *node);
            put_u64(out, members.len() as u64);
            for (node, member) in members {
                put_u64(out, *node);
                put_member(out, member);
            }
        }
    }
}

fn hello(input: &mut Input<'_>) -> Result<Hello, DecodeError> {
    let name = input.text(NAME_BYTES_MAX)?.into();
    let store_id = input.u64()?;
    let standing = match input.u8()? {
        UNFORMED => {
            let empty = input.flag()?;
            let mut configured = Vec::new();
            for _ in 0..count(input, MEMBERS_MAX)? {
                configured.push(Configured {
                    name: input.text(NAME_BYTES_MAX)?.into(),
                    address: input.address()?,
                    witness: input.flag()?,
                });
            }
            let configured = Arc::from(configured);
            Standing::Unformed { empty, configured }
        }
        kind @ (FORMED | FORMED_AGAIN) => {
            let generation = if kind == FORMED { 0 } else { input.u64()? };
            let generation = u32::try_from(generation);
            let generation = generation.map_err(|_| malformed("a generation beyond all"))?;
            let cluster_id = input.u64()?;
            let node = input.u64()?;
            let mut members = BTreeMap::new();
            for _ in 0..count(input, MEMBERS_MAX)? {
                members.insert(input.u64()?, input.member()?);
            }
            Standing::Formed {
                cluster_id,
                generation,
                node,
                members,
            }
        }
        _ => return Err(malformed("a standing of an unknown kind")),
    };
    Ok(Hello {
        name,
        store_id,
        standing,
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
