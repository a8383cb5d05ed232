//! What is done to the store of a server that is stopped: a cluster is begun with it, or begun anew
//! when all other voters are lost.
//!
//! Both make this node the only voter by appending to its log what a leader would: the membership,
//! and commands that say what follows from it, in a term of their own. Whoever starts the server
//! then has a log that looks as if it had been so. The caller holds the lock of the state
//! directory.
//!
//! A cluster that is begun anew has a new *generation*, by which peers of the one before are told
//! and refused. Their logs may have entries that this one lacks, in the same places.
//!
//! # Whether the log is the whole one
//!
//! Every entry that was acknowledged is on a majority of the voters of its membership. Where there
//! were two, or one, this node has them all: a majority of two is both. Otherwise entries may be
//! missing, and with them locks that hosts were told to have. Then all tables are marked, and grace
//! comes before new locks. And so if another node may have gone on alone, made a sole survivor
//! itself: nothing here shows what it acknowledged then. That it has not the operator must say. Of
//! a membership that was being changed, each half is looked at: an entry
//! may have been acknowledged under the older one.
//!
//! # If the process dies
//!
//! Before anything is appended, `store.json` says that a repair is *pending*, and where in the log
//! it begins; when all of it is durable, the file is written without that, and with what the node
//! has become. While it is pending no server starts. So a part of a repair is served by nobody, nor
//! is anybody told of a generation that has not begun. The command said again sees the log as it
//! was before the first try, and appends all of it once more, which does nothing new.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::PoisonError;

use openraft::storage::{
    IOFlushed, RaftLogReader as _, RaftLogStorage as _, RaftStateMachine as _,
};
use openraft::type_config::TypeConfigExt as _;
use openraft::vote::RaftLeaderId as _;

use super::error::StoreError;
use super::opened::Opened;
use super::peer::Configured;
use super::stored::{self, FOUNDER, Formed, Stored};
use super::types::{Entry, LeaderId, LogId, Member, Membership, Payload, Proposed, Types, Vote};
use super::wal::Options;
use crate::cluster::members::MemberCommand;
use crate::cluster::{ClusterCommand, ClusterState, Command, NodeId, Origin, Queue};
use crate::random::random_u64;

/// How many entries are read or written at a time.
const ENTRIES_MAX: u64 = 1024;

/// Why nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// See [`StoreError`].
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It makes no sense here.
    #[error("{0}")]
    Refused(String),
}

fn refused(text: impl Into<String>) -> OfflineError {
    OfflineError::Refused(text.into())
}

/// What a survivor has become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survived {
    /// The generation that begins.
    pub generation: u32,
    /// The members that are given up.
    pub lost: Vec<String>,
    /// Whether locks may be missing.
    pub is_incomplete: bool,
}

/// Makes the store in `dir` that of the first and only member of a cluster. `commands` makes, of
/// the state that the store has, what is to be added to its log, or says why it can't be.
///
/// # Errors
/// If the store belongs to a cluster already, or can't be read or written.
pub fn begin(
    dir: &Path,
    (name, address): (&str, SocketAddr),
    commands: impl FnOnce(&ClusterState) -> Result<Vec<Command>, String>,
) -> Result<u64, OfflineError> {
    run(dir, async |opened| {
        if opened.stored.formed.is_some() {
            return Err(refused(
                "the store belongs to a cluster already\nhint: start the server; `havenfs cluster \
                 status` shows the others",
            ));
        }
        let member = Member {
            store_id: opened.stored.store_id,
            name: name.into(),
            address,
            witness: false,
        };
        let members = BTreeMap::from([(FOUNDER, member)]);
        let whole = Whole::read(opened).await?;
        let commands = commands(&whole.state).map_err(refused)?;
        // An empty log is begun by its founder, as always.
        if !opened.is_empty {
            whole.announce(dir, opened)?;
            whole.force(opened, FOUNDER, &members, commands).await?;
        }
        let cluster_id = random_u64();
        let formed = Formed {
            cluster_id,
            generation: 0,
            node: FOUNDER,
            members,
        };
        write(dir, opened, formed)?;
        Ok(cluster_id)
    })
}

/// Makes the store in `dir` that of the only member of its cluster, in a new generation. `fenced`
/// are the voters that an operator has made sure to be off; `none_went_on` says that it is known
/// that none of them has served without this node.
///
/// # Errors
/// If there are other voters than those, the store belongs to no cluster, or can't be read or
/// written.
pub fn survive(
    dir: &Path,
    fenced: &[String],
    none_went_on: bool,
) -> Result<Survived, OfflineError> {
    let is_there = stored::path(dir).exists();
    if !is_there {
        let dir = dir.display();
        return Err(refused(format!(
            "there is no store in `{dir}`\nhint: name the configuration of the node that survives"
        )));
    }
    run(dir, async |opened| {
        let Some(formed) = opened.stored.formed.clone() else {
            return Err(refused("the store belongs to no cluster"));
        };
        let whole = Whole::read(opened).await?;
        let own = formed.node;
        let may_lack = judge(&whole.membership, own, fenced).map_err(refused)?;
        let is_incomplete = may_lack || !none_went_on;
        let others = whole.membership.nodes().filter(|(node, _)| **node != own);
        let (numbers, lost): (Vec<NodeId>, Vec<String>) = others
            .map(|(node, member)| (NodeId(*node), member.name.to_string()))
            .unzip();
        let Some(member) = whole.membership.get_node(&own).cloned() else {
            return Err(refused("this node is no member of its cluster"));
        };
        let members = BTreeMap::from([(own, member)]);
        let generation = formed.generation.saturating_add(1);
        let next = Formed {
            generation,
            members: members.clone(),
            ..formed
        };
        let command = MemberCommand::SoleSurvivor {
            lost: numbers,
            is_incomplete,
        };
        let commands = vec![Command::Cluster(ClusterCommand::Members(command))];
        whole.announce(dir, opened)?;
        whole.force(opened, own, &members, commands).await?;
        write(dir, opened, next)?;
        Ok(Survived {
            generation,
            lost,
            is_incomplete,
        })
    })
}

/// The members as the last membership in the log of a store has them.
///
/// # Errors
/// If the store can't be read.
pub(super) fn members(dir: &Path) -> Result<Vec<Configured>, OfflineError> {
    run(dir, async |opened| {
        let whole = Whole::read(opened).await?;
        let members = whole.membership.nodes();
        Ok(members.map(|(_, member)| Configured::of(member)).collect())
    })
}

/// Whether entries may be missing, if `own` is to go on alone.
fn judge(membership: &Membership, own: u64, fenced: &[String]) -> Result<bool, String> {
    let name = |node: u64| {
        let member = membership.get_node(&node);
        member.map_or_else(
            || format!("number-{node}"),
            |member| member.name.to_string(),
        )
    };
    if membership.voter_ids().all(|voter| voter != own) {
        return Err(
            "this node does not vote, so its log may lack anything\nhint: use a node that voted"
                .to_owned(),
        );
    }
    let others: Vec<String> = membership
        .voter_ids()
        .filter(|voter| *voter != own)
        .map(name)
        .collect();
    if others.is_empty() {
        return Err("this node is the only voter already\nhint: start its server".to_owned());
    }
    if let Some(unknown) = fenced.iter().find(|name| !others.contains(name)) {
        let others = others.join(", ");
        return Err(format!(
            "there is no other voter `{unknown}`; there are: {others}"
        ));
    }
    let missing: Vec<&str> = others
        .iter()
        .filter(|other| !fenced.contains(other))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        let words: Vec<String> = others
            .iter()
            .map(|other| format!("--i-fenced {other}"))
            .collect();
        return Err(format!(
            "not all other voters are said to be off: {}\nhint: make sure that none of them can \
             write to the storage or come back by itself, and say `havenfs cluster sole-survivor {}`",
            missing.join(", "),
            words.join(" ")
        ));
    }
    let mut halves = membership.get_joint_config().iter();
    Ok(halves.any(|voters| !voters.contains(&own) || voters.len() > 2))
}

fn write(dir: &Path, opened: &Opened, formed: Formed) -> Result<(), StoreError> {
    let stored = Stored {
        store_id: opened.stored.store_id,
        formed: Some(formed),
        pending: None,
    };
    stored::write(dir, &stored)
}

/// Opens a store, works on it, and closes it again.
fn run<T>(
    dir: &Path,
    work: impl AsyncFnOnce(&mut Opened) -> Result<T, OfflineError>,
) -> Result<T, OfflineError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .map_err(StoreError::io("start a runtime for", dir))?;
    let mut opened = Opened::open(dir.to_path_buf(), Options::default())?;
    let failure = opened.log.shared().watch_failure();
    let thread = opened.log_thread.take();
    let result = runtime.block_on(work(&mut opened));
    drop(opened);
    if let Some(thread) = thread {
        // A panic was seen already.
        let _ = thread.join();
    }
    // It says more than what was made of it on the way.
    match failure.borrow().clone() {
        Some(error) => Err(error.into()),
        None => result,
    }
}

/// All that a store has, as if all of it were committed.
pub(super) struct Whole {
    state: ClusterState,
    pub(super) membership: Membership,
    last: Option<LogId>,
    term: u64,
    /// What comes from here on in the log is of a try that is not known to be done, and is left
    /// out.
    end: u64,
}

impl Whole {
    pub(super) async fn read(opened: &mut Opened) -> Result<Self, StoreError> {
        let failed = StoreError::io("read the log of", Path::new("the store"));
        let read = async {
            let state = opened.machine.state();
            let state = state.read().unwrap_or_else(PoisonError::into_inner).clone();
            let (applied, membership) = opened.machine.applied_state().await?;
            let mut whole = Self {
                state,
                membership: membership.membership().clone(),
                last: opened.log.get_log_state().await?.last_log_id,
                term: 0,
                end: 0,
            };
            whole.end = opened.stored.pending.unwrap_or_else(|| whole.first());
            let mut reader = opened.log.get_log_reader().await;
            let vote = reader.read_vote().await?;
            let terms = [
                vote.map(|vote| vote.leader_id.term),
                whole.last.map(term_of),
            ];
            whole.term = terms.into_iter().flatten().max().unwrap_or_default();
            let mut at = applied.map_or(0, |applied| applied.index + 1);
            loop {
                let entries = reader.try_get_log_entries(at..at + ENTRIES_MAX).await?;
                let Some(last) = entries.last() else { break };
                at = last.log_id.index + 1;
                for entry in &entries {
                    if entry.log_id.index < whole.end {
                        whole.take(entry);
                    }
                }
            }
            Ok(whole)
        };
        read.await.map_err(failed)
    }

    fn take(&mut self, entry: &Entry) {
        match &entry.payload {
            Payload::Blank => {}
            Payload::Normal(Proposed { origin, command }) => {
                let _ = self.state.apply(origin, command);
            }
            Payload::Membership(membership) => self.membership = membership.clone(),
        }
    }

    /// Where the next entry comes.
    fn first(&self) -> u64 {
        self.last.map_or(0, |last| last.index + 1)
    }

    /// Writes down that entries are going to be appended.
    fn announce(&self, dir: &Path, opened: &Opened) -> Result<(), StoreError> {
        let stored = Stored {
            pending: Some(self.end),
            ..opened.stored.clone()
        };
        stored::write(dir, &stored)
    }

    /// Appends what makes `own` the only voter, and `commands`. Returns when it is durable.
    async fn force(
        &self,
        opened: &mut Opened,
        own: u64,
        members: &BTreeMap<u64, Member>,
        commands: Vec<Command>,
    ) -> Result<(), OfflineError> {
        let failed = StoreError::io("write the log of", Path::new("the store"));
        let term = self.term.saturating_add(1);
        let voters = members.keys().copied().collect();
        let membership = Membership::new(vec![voters], members.clone());
        let membership = membership.map_err(|error| refused(error.to_string()))?;
        let origin = Origin {
            node: NodeId(own),
            incarnation: opened.pending.origin().incarnation,
            queue: Queue::Calls,
            number: 0,
        };
        let commands = (1..).zip(commands).map(|(number, command)| {
            Payload::Normal(Proposed {
                origin: Origin { number, ..origin },
                command: command.into(),
            })
        });
        let payloads = [Payload::Membership(membership)]
            .into_iter()
            .chain(commands);
        let first = self.first();
        let entries: Vec<Entry> = (first..)
            .zip(payloads)
            .map(|(index, payload)| Entry {
                log_id: LogId {
                    leader_id: LeaderId::new(term, own),
                    index,
                },
                payload,
            })
            .collect();
        let write = async {
            opened.log.save_vote(&Vote::new(term, own)).await?;
            for part in entries.chunks(ENTRIES_MAX as usize) {
                let (told, durable) = Types::oneshot();
                let part = part.to_vec();
                opened.log.append(part, IOFlushed::signal(told)).await?;
                durable.await.map_err(std::io::Error::other)??;
            }
            Ok(())
        };
        Ok(write.await.map_err(failed)?)
    }
}

const fn term_of(log_id: LogId) -> u64 {
    log_id.leader_id.term
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
