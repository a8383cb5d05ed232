//! How empty nodes become a cluster, once.
//!
//! ```text
//!   unformed --> asks all members --+-- all there, empty, of one list; first by name --> founds
//!      ^                            +-- somebody's cluster has this node and its store --> joins
//!      +------- after a pause ------+-- anything else, with the reason in the log
//! ```
//!
//! Nodes are numbered in the order of their names. The first one founds: it draws the cluster's
//! id, writes down who the members are, stores and all, and begins the log with them. The others
//! keep asking, and so they find it: a cluster that has written down their store is theirs.
//! Nothing is ever formed without a member that the configuration names, since that one may be of
//! a cluster whose disk this node has lost. A store with locks of its own founds and joins nothing.
//!
//! # If the process dies
//!
//! What was settled is written before anybody hears of it. A founder that dies before is none; one
//! that dies after it founds the same cluster when it starts again, and begins the log if that is
//! still empty (see [`Formed::is_founder`]). The others need it only until they have asked it.
//! Should the founder's disk be lost before the log has begun, no other node begins it: stop all,
//! move their (empty) stores away, and they form anew.

mod namesake;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::applicants::{Applicant, lives};
use super::dial::{PeerError, Peers};
use super::hello::{Configured, Hello, Standing};
use crate::raft::error::StoreError;
use crate::raft::stored::{self, FOUNDER, Formed, MEMBERS_MAX, Stored};
use crate::raft::types::{Member, NAME_BYTES_MAX};
use crate::random::random_u64;

/// After a round of asking that settled nothing.
const ASK_PAUSE: Duration = Duration::from_millis(200);
/// How often the log says what is missing.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// Why no cluster can be formed, ever.
#[derive(Debug, thiserror::Error)]
pub(in crate::raft) enum FormError {
    /// The configured members can't be those of a cluster.
    #[error("the members in the configuration are of no use: {0}")]
    Members(String),
    /// The store was used without a cluster.
    #[error(
        "this node's store belongs to no cluster and is not empty: it has the locks of a node on \
         its own\nhint: `havenfs cluster init --config FILE` makes it the first node of a cluster, \
         and its locks stay; to make it a member of another one, stop it when no client has a \
         lock, and move its state directory away"
    )]
    NotEmpty,
    /// The configuration calls this node otherwise than its store.
    #[error(
        "this node's store is that of node `{stored}`, and the configuration calls it \
         `{configured}`\nhint: give it its name back; a store can't be another node's"
    )]
    OtherName {
        /// What it was when it became a member.
        stored: Box<str>,
        /// What it is called now.
        configured: Box<str>,
    },
    /// What was settled can't be written down.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Becomes a member of a cluster and returns what was settled: at once if it is written down in
/// `dir` already, else when the members have found each other. The port must be served meanwhile.
/// Says to `missing` what it waits for.
pub(in crate::raft) async fn form(
    peers: &Peers,
    dir: &Path,
    missing: &watch::Sender<Vec<String>>,
) -> Result<Formed, FormError> {
    let configured = match peers.standing() {
        Standing::Formed {
            cluster_id,
            generation,
            node,
            members,
        } => {
            let formed = Formed {
                cluster_id,
                generation,
                node,
                members,
            };
            check_name(peers.name(), Some(&formed))?;
            return Ok(formed);
        }
        Standing::Unformed { empty: false, .. } => return Err(FormError::NotEmpty),
        Standing::Unformed { configured, .. } => configured,
    };
    check(peers.name(), &configured).map_err(FormError::Members)?;
    let own = Own {
        name: peers.name(),
        store_id: peers.store_id(),
        configured: &configured,
    };
    let mut reported: Option<Instant> = None;
    loop {
        let formed = match decide(&own, &ask_all(peers, &configured).await) {
            Decision::Found(members) => Formed {
                cluster_id: random_u64(),
                generation: 0,
                node: FOUNDER,
                members,
            },
            Decision::Join(formed) => formed,
            Decision::Wait(hindrances) => {
                let hindrances = namesake::look_for(peers, hindrances).await;
                missing.send_replace(hindrances.iter().map(ToString::to_string).collect());
                if reported.is_none_or(|last| last.elapsed() >= REPORT_EVERY) {
                    reported = Some(Instant::now());
                    for hindrance in hindrances {
                        tracing::warn!(node = own.name, "no cluster yet: {hindrance}");
                    }
                }
                tokio::time::sleep(ASK_PAUSE).await;
                continue;
            }
        };
        let stored = Stored {
            store_id: own.store_id,
            formed: Some(formed.clone()),
            pending: None,
        };
        let dir = dir.to_path_buf();
        let written = tokio::task::spawn_blocking(move || stored::write(&dir, &stored)).await;
        written.map_err(|error| StoreError::Stopped {
            step: "write down the cluster",
            problem: error.to_string(),
        })??;
        peers.join(&formed);
        let (node, members) = (formed.node, formed.members.len());
        let cluster_id = format_args!("{:016x}", formed.cluster_id);
        tracing::info!(%cluster_id, node, members, "this node is a member of a cluster now");
        return Ok(formed);
    }
}

/// Makes sure that the store, of which `formed` was settled, is that of the node `name`.
pub(in crate::raft) fn check_name(name: &str, formed: Option<&Formed>) -> Result<(), FormError> {
    let own = formed.and_then(|formed| formed.members.get(&formed.node));
    let stored = own.map(|own| own.name.clone());
    match stored.filter(|stored| **stored != *name) {
        Some(stored) => Err(FormError::OtherName {
            stored,
            configured: name.into(),
        }),
        None => Ok(()),
    }
}

/// Whether these can be the members of a cluster of which `own` is one.
fn check(own: &str, configured: &[Configured]) -> Result<(), String> {
    if configured.len() > MEMBERS_MAX {
        return Err(format!("there are more than {MEMBERS_MAX}"));
    }
    let mut names = BTreeSet::new();
    let mut addresses = BTreeMap::new();
    for member in configured {
        let name = &member.name;
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(format!("`{name}` has not 1 to {NAME_BYTES_MAX} bytes"));
        }
        if !names.insert(name) {
            return Err(format!("two are called `{name}`"));
        }
        if let Some(other) = addresses.insert(member.address, name) {
            let address = member.address;
            return Err(format!("`{other}` and `{name}` both have {address}"));
        }
    }
    if !names.iter().any(|name| ***name == *own) {
        return Err(format!("this node, `{own}`, is not among them"));
    }
    Ok(())
}

/// Asks all members who they are, this node as well: another machine may have its name.
async fn ask_all(peers: &Peers, configured: &[Configured]) -> Vec<Answer> {
    let mut asking = JoinSet::new();
    for (place, member) in configured.iter().enumerate() {
        let (peers, address) = (peers.clone(), member.address);
        asking.spawn(async move { (place, peers.ask(address).await) });
    }
    let mut answers: BTreeMap<usize, Answer> = BTreeMap::new();
    while let Some(answer) = asking.join_next().await {
        // A panic has ended the process already.
        if let Ok((place, answer)) = answer {
            answers.insert(place, answer.map_err(|error: PeerError| error.to_string()));
        }
    }
    answers.into_values().collect()
}

/// What a member said, or why it said nothing.
type Answer = Result<Hello, String>;

/// This node.
struct Own<'a> {
    name: &'a str,
    store_id: u64,
    /// By name.
    configured: &'a [Configured],
}

impl Own<'_> {
    /// What adds it to a cluster.
    fn command(&self) -> String {
        let mut configured = self.configured.iter();
        let own = configured.find(|member| *member.name == *self.name);
        let applicant = own.map(|own| Applicant {
            name: own.name.to_string(),
            address: own.address,
            witness: own.witness,
            replaces: false,
        });
        applicant.map_or_else(String::new, |applicant| applicant.command())
    }
}

/// What a round of asking comes to.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    /// This node founds a cluster of these.
    Found(BTreeMap<u64, Member>),
    /// There is a cluster that has this node.
    Join(Formed),
    /// Not now.
    Wait(Vec<Hindrance>),
}

/// Why there is no cluster yet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Hindrance {
    #[error("node `{name}` at {address} can't be asked: {problem}")]
    Silent {
        name: Box<str>,
        address: SocketAddr,
        problem: String,
    },
    #[error(
        "at {address}, where node `{name}` should be, is node `{found}`\nhint: compare the \
         members in the configuration of all nodes"
    )]
    OtherName {
        name: Box<str>,
        address: SocketAddr,
        found: Box<str>,
    },
    #[error(
        "at {address}, this node's own address, another machine answers to the name `{name}`\n\
         hint: give one of them another name and address"
    )]
    OtherMachine { name: Box<str>, address: SocketAddr },
    #[error(
        "node `{name}` belongs to no cluster and has locks of its own\nhint: `havenfs cluster init` \
         on it makes it the first node of this cluster; or stop it and move its state directory \
         away"
    )]
    NotEmpty { name: Box<str> },
    #[error(
        "node `{name}` has other members in its configuration: {difference}\nhint: all nodes need \
         the same list of names, addresses and witnesses"
    )]
    OtherList { name: Box<str>, difference: String },
    #[error(
        "the cluster of node `{peer}` has this node with another store, as `{name}` at {}\nhint: \
         {hint}", member.address
    )]
    OtherStore {
        peer: Box<str>,
        name: Box<str>,
        /// What the cluster has under that name.
        member: Member,
        hint: String,
    },
    #[error("{}", lives(name, *address, "this machine"))]
    Lives { name: Box<str>, address: SocketAddr },
    #[error(
        "node `{peer}` belongs to a cluster that does not have this node\nhint: add this node to \
         it on one of its members: `{command}`; if the cluster is not the one that was meant, \
         correct the addresses"
    )]
    NotAdmitted { peer: Box<str>, command: String },
    #[error(
        "nodes `{one}` and `{other}` belong to different clusters that both have this node\nhint: \
         stop the nodes of the wrong one and move their stores away"
    )]
    TwoClusters { one: Box<str>, other: Box<str> },
    #[error("node `{0}` is the one that founds it, and has not done so yet")]
    Founder(Box<str>),
}

/// Decides by what all configured members said, in the order of the configuration.
fn decide(own: &Own<'_>, answers: &[Answer]) -> Decision {
    let mut hindrances = Vec::new();
    let mut joined: Option<(Formed, Box<str>)> = None;
    let mut found = BTreeMap::new();
    for (number, (member, answer)) in (FOUNDER..).zip(own.configured.iter().zip(answers)) {
        let hello = match answer {
            Ok(hello) => hello,
            Err(problem) => {
                hindrances.push(Hindrance::Silent {
                    name: member.name.clone(),
                    address: member.address,
                    problem: problem.clone(),
                });
                continue;
            }
        };
        let seen = match &hello.standing {
            Standing::Formed { .. } => cluster_of(own, hello).and_then(|formed| {
                let peer = hello.name.clone();
                match &joined {
                    Some((first, one)) if first.cluster_id != formed.cluster_id => {
                        let one = one.clone();
                        Err(Hindrance::TwoClusters { one, other: peer })
                    }
                    Some(_) => Ok(()),
                    None => {
                        joined = Some((formed, peer));
                        Ok(())
                    }
                }
            }),
            Standing::Unformed { empty, configured } => {
                unformed(own, member, hello, *empty, configured)
            }
        };
        hindrances.extend(seen.err());
        let admitted = Member {
            store_id: hello.store_id,
            name: member.name.clone(),
            address: member.address,
            witness: member.witness,
        };
        found.insert(number, admitted);
    }
    let is_two = |hindrance: &Hindrance| matches!(hindrance, Hindrance::TwoClusters { .. });
    match joined {
        Some(_) if hindrances.iter().any(is_two) => Decision::Wait(hindrances),
        Some((formed, _)) => Decision::Join(formed),
        None if !hindrances.is_empty() => Decision::Wait(hindrances),
        None => match own.configured.first() {
            Some(first) if *first.name != *own.name => {
                Decision::Wait(vec![Hindrance::Founder(first.name.clone())])
            }
            _ => Decision::Found(found),
        },
    }
}

/// The cluster of which `hello` speaks, if this node is a member of it.
fn cluster_of(own: &Own<'_>, hello: &Hello) -> Result<Formed, Hindrance> {
    let peer = || hello.name.clone();
    let not_admitted = || Hindrance::NotAdmitted {
        peer: peer(),
        command: own.command(),
    };
    let Standing::Formed {
        cluster_id,
        generation,
        members,
        ..
    } = &hello.standing
    else {
        return Err(not_admitted());
    };
    let mut named = members
        .iter()
        .filter(|(_, member)| *member.name == *own.name)
        .peekable();
    let Some((_, namesake)) = named.peek().copied() else {
        return Err(not_admitted());
    };
    let found = named.find(|(_, member)| member.store_id == own.store_id);
    match found {
        Some((node, _)) => Ok(Formed {
            cluster_id: *cluster_id,
            generation: *generation,
            node: *node,
            members: members.clone(),
        }),
        None => Err(Hindrance::OtherStore {
            peer: peer(),
            name: own.name.into(),
            member: namesake.clone(),
            hint: namesake::hint(own.name, &peer(), members, &own.command()),
        }),
    }
}

/// Whether a member that belongs to no cluster is ready to be of one.
fn unformed(
    own: &Own<'_>,
    member: &Configured,
    hello: &Hello,
    empty: bool,
    configured: &[Configured],
) -> Result<(), Hindrance> {
    let name = member.name.clone();
    let address = member.address;
    if hello.name != member.name {
        let found = hello.name.clone();
        return Err(Hindrance::OtherName {
            name,
            address,
            found,
        });
    }
    if *name == *own.name && hello.store_id != own.store_id {
        return Err(Hindrance::OtherMachine { name, address });
    }
    if !empty {
        return Err(Hindrance::NotEmpty { name });
    }
    match difference(own.configured, configured) {
        Some(difference) => Err(Hindrance::OtherList { name, difference }),
        None => Ok(()),
    }
}

/// What the lists differ in, in words.
pub(in crate::raft) fn difference(ours: &[Configured], theirs: &[Configured]) -> Option<String> {
    let text = |member: &Configured| {
        let witness = if member.witness { ", a witness" } else { "" };
        format!("`{}` at {}{witness}", member.name, member.address)
    };
    let only = |these: &[Configured], those: &[Configured]| {
        let only = these.iter().filter(|member| !those.contains(member));
        only.map(text).collect::<Vec<_>>().join(" and ")
    };
    match (only(theirs, ours), only(ours, theirs)) {
        (more, less) if more.is_empty() && less.is_empty() => None,
        (more, less) if less.is_empty() => {
            Some(format!("it has {more}, which this node's file lacks"))
        }
        (more, less) if more.is_empty() => {
            Some(format!("it lacks {less}, which this node's file has"))
        }
        (more, less) => Some(format!("it has {more}, and this node's file has {less}")),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
