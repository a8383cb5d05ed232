//! What operators ask for: another leader, a member more or less.
//!
//! Any node may be asked; the leader does it, since consensus has it so. Owns the order of the
//! steps, and what is refused because it would leave a cluster that can't go on. Who is a member is
//! the log's to say, and what an assignment is worth [`ClusterState::apply`]'s.
//!
//! ```text
//!   add:     ask it who it is -> learner (its name and store) -> wait: it has the log -> voter
//!   remove:  retire (void while it serves or awaits its fence) -> voter no more, by joint
//!            consensus -> no member
//! ```
//!
//! Who can lead, vote or go is judged in `sight`.
//!
//! # If the process dies
//!
//! The same command, said again, goes on where it was: a learner stays one until it is made a
//! voter, and a retired node that is still a member serves nothing. What the change of voters lacks
//! the next leader does, see `joint`.

mod error;
mod joint;
mod majority;
mod namesake;
mod promote;
mod sight;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver as _;
use tokio::time::{Instant, sleep, timeout};

use self::error::{CHANGE_MAX, changed, refused, too_long};
use self::sight::{SILENT_MAX, Sight, may_go, sight, sight_within, unknown};
use super::peer::{PeerError, Peers, ask_for};
use super::proposer::{Proposer, Unavailable};
use super::types::{Member, NAME_BYTES_MAX};
use super::{Engine, stored};
use crate::cluster::members::MemberCommand;
use crate::cluster::{ClusterCommand, ClusterState, Command, NodeId, Outcome, ServiceState};

/// What an operator asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberChange {
    /// Another node is to lead.
    Transfer {
        /// Which one; any that has the data if none.
        to: Option<Box<str>>,
    },
    /// A node becomes a member.
    Add {
        /// Its name.
        name: Box<str>,
        /// Where it is reached.
        address: SocketAddr,
        /// Whether it only votes.
        witness: bool,
    },
    /// A node is a member no more.
    Remove {
        /// Its name.
        name: Box<str>,
    },
}

pub use self::error::ChangeError;
pub(super) use self::joint::{is_joint, keep_finished};
pub use self::majority::go_alone;
pub(super) use self::sight::heir_of_witness;

/// Who changes the members, or the leader, has it: one at a time.
pub(super) type Turn = Arc<tokio::sync::Mutex<()>>;

/// Makes the changes on this node, or has the leader make them. A handle: clones are alike.
#[derive(Clone)]
pub(super) struct Changes {
    engine: Engine,
    peers: Peers,
    state: Arc<RwLock<ClusterState>>,
    proposer: Proposer,
    turn: Turn,
}

/// Has another node lead; whether it does in time.
pub(super) async fn transfer(engine: &Engine, to: u64) -> bool {
    // An error says that the engine has ended.
    if engine.trigger().transfer_leader(to).await.is_err() {
        return false;
    }
    let mut leadership = engine.server_metrics();
    let led = async {
        while leadership.borrow_watched().current_leader != Some(to) {
            if leadership.changed().await.is_err() {
                return;
            }
        }
    };
    timeout(TRANSFER_MAX, led).await.is_ok()
}

impl Changes {
    pub(super) fn new(
        engine: Engine,
        peers: Peers,
        state: Arc<RwLock<ClusterState>>,
        proposer: Proposer,
    ) -> Self {
        Self {
            engine,
            peers,
            state,
            proposer,
            turn: Arc::default(),
        }
    }

    /// For whoever has the leader changed.
    pub(super) fn turns(&self) -> Turn {
        Arc::clone(&self.turn)
    }

    pub(super) const fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Whether a node was removed, or is about to be.
    pub(super) fn is_retired(&self, node: NodeId) -> bool {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.members().is_retired(node)
    }

    /// Has the change made, by whoever leads.
    pub(super) async fn ask(&self, change: &MemberChange) -> Result<String, ChangeError> {
        let begun = Instant::now();
        let mut deadline = begun + LEADER_MAX;
        // It may have been made by a leader that could not say so any more.
        let mut may_be_made = false;
        let was_member = self.is_member(change);
        loop {
            let asked = Instant::now();
            let result = self.ask_once(change).await;
            match result {
                // One that dies is replaced soon.
                Err(
                    error @ (ChangeError::NotLeader
                    | ChangeError::NoLeader
                    | ChangeError::Unreachable { .. }),
                ) => {
                    let was_asked = match &error {
                        ChangeError::Unreachable { was_asked, .. } => *was_asked,
                        error => *error == ChangeError::NotLeader,
                    };
                    may_be_made |= was_asked;
                    // It led until now, and whoever follows it has as long as anybody.
                    if was_asked && asked.elapsed() > POLL && begun.elapsed() < ASK_MAX {
                        deadline = Instant::now() + LEADER_MAX;
                    }
                    if Instant::now() < deadline {
                        sleep(POLL).await;
                        continue;
                    }
                    return Err(match error {
                        ChangeError::NotLeader => ChangeError::NoLeader,
                        // It led, and nobody does now.
                        ChangeError::Unreachable { was_asked, .. }
                            if !was_asked && !self.peers.hears_leader(LEADER_MAX) =>
                        {
                            ChangeError::NoLeader
                        }
                        error => error,
                    });
                }
                Err(ChangeError::Refused(_))
                    if may_be_made && was_member && self.is_gone(change).await =>
                {
                    return Ok(
                        "the node is a member no more; the leader was lost meanwhile".to_owned(),
                    );
                }
                result => return result,
            }
        }
    }

    async fn ask_once(&self, change: &MemberChange) -> Result<String, ChangeError> {
        let leader = self.engine.server_metrics().borrow_watched().current_leader;
        let member = sight(&self.engine)
            .members
            .remove(&leader.unwrap_or_default());
        match (leader, member) {
            (Some(leader), _) if leader == *self.engine.node_id() => self.carry_out(change).await,
            (Some(leader), Some(member)) => {
                let unreachable = |error: PeerError, was_asked| ChangeError::Unreachable {
                    leader: member.name.to_string(),
                    problem: error.to_string(),
                    was_asked,
                };
                let link = self.peers.dial(leader, &member).await;
                let link = link.map_err(|error| unreachable(error, false))?;
                match ask_for(link, change.clone(), ASK_MAX).await {
                    Ok(Some(result)) => result.map_err(ChangeError::Refused),
                    Ok(None) => Err(ChangeError::NotLeader),
                    Err(error) => Err(unreachable(error, true)),
                }
            }
            _ => Err(ChangeError::NoLeader),
        }
    }

    /// Whether the node that is to be removed is a member, as far as this node knows.
    fn is_member(&self, change: &MemberChange) -> bool {
        match change {
            MemberChange::Remove { name } => sight(&self.engine).find(name).is_some(),
            MemberChange::Transfer { .. } | MemberChange::Add { .. } => false,
        }
    }

    /// Whether this node hears that the node that was to be removed is a member no more.
    async fn is_gone(&self, change: &MemberChange) -> bool {
        let begun = Instant::now();
        while self.is_member(change) {
            if begun.elapsed() > SILENT_MAX {
                return false;
            }
            sleep(POLL).await;
        }
        true
    }

    /// Makes the change, if this node leads.
    pub(super) async fn carry_out(&self, change: &MemberChange) -> Result<String, ChangeError> {
        if !self.engine.is_leader() {
            return Err(ChangeError::NotLeader);
        }
        match change {
            // A leader that goes in the midst of a change leaves it half done.
            MemberChange::Transfer { to } => {
                let _turn = self.turn()?;
                self.transfer(to.as_deref()).await
            }
            MemberChange::Add {
                name,
                address,
                witness,
            } => {
                let _turn = self.turn()?;
                self.add(name, *address, *witness).await
            }
            MemberChange::Remove { name } => {
                let _turn = self.turn()?;
                self.remove(name).await
            }
        }
    }

    fn turn(&self) -> Result<tokio::sync::OwnedMutexGuard<()>, ChangeError> {
        let turn = Arc::clone(&self.turn).try_lock_owned();
        turn.map_err(|_| {
            refused("another change of the members is under way\nhint: wait until it is done")
        })
    }

    async fn transfer(&self, to: Option<&str>) -> Result<String, ChangeError> {
        let sight = sight(&self.engine);
        let heir = match to {
            Some(name) => {
                let (node, _) = sight.find(name).ok_or_else(|| unknown(&sight, name))?;
                if node == sight.own {
                    return Ok(format!("node `{name}` leads already"));
                }
                if let Some(hindrance) = sight.hindrance(node) {
                    return Err(refused(format!(
                        "node `{name}` can't lead now: {hindrance}"
                    )));
                }
                node
            }
            None => sight.heir().ok_or_else(|| {
                let others = sight.voters.iter().filter(|node| **node != sight.own);
                let why: Vec<_> = others.filter_map(|node| sight.hindrance(*node)).collect();
                let why = if why.is_empty() {
                    "there is no other".to_owned()
                } else {
                    why.join("; ")
                };
                refused(format!("no other node can lead now: {why}"))
            })?,
        };
        let name = sight.name(heir);
        if transfer(&self.engine, heir).await {
            return Ok(format!("node `{name}` leads now"));
        }
        Err(refused(format!(
            "node `{name}` did not take the leadership\nhint: see `havenfs cluster status` for who \
             leads now, and try again"
        )))
    }

    async fn add(
        &self,
        name: &str,
        address: SocketAddr,
        witness: bool,
    ) -> Result<String, ChangeError> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(refused(format!(
                "the name of a node has 1 to {NAME_BYTES_MAX} bytes"
            )));
        }
        self.wait_for_majority().await?;
        joint::finish(&self.engine).await?;
        let before = sight(&self.engine);
        if let Some((node, _)) = before.find(name)
            && self.is_retired(NodeId(node))
        {
            return Err(refused(format!(
                "the removal of node `{name}` was begun and is not done\nhint: say `havenfs \
                 cluster remove {name}` again first"
            )));
        }
        let asked = self.peers.ask(address).await;
        let store_id = match before.find(name) {
            Some((node, member)) if before.voters.contains(&node) => {
                let is_wiped = asked.is_ok_and(|hello| {
                    hello.is_empty_node() && hello.store_id() != member.store_id
                });
                if is_wiped {
                    return Err(self.has_namesake(name, member, address).await);
                }
                // What an earlier try has done, perhaps that of a leader that is gone.
                if member.address == address && member.witness == witness {
                    return Ok(promote::added(&before, node));
                }
                return Err(refused(format!(
                    "node `{name}` is a member already, with another address or kind, at {}",
                    member.address
                )));
            }
            Some((node, member)) => {
                // A learner, of an earlier try.
                if member.address != address || member.witness != witness {
                    return Err(refused(format!(
                        "node `{name}` was begun to be added with another address or kind, at {}\n\
                         hint: say `havenfs cluster remove {name}` first",
                        member.address
                    )));
                }
                return self.promote(node, name).await;
            }
            None => {
                let hello = asked.map_err(|error| {
                    refused(format!(
                        "node `{name}` at {address} can't be asked: {error}\nhint: start it first, \
                         with an empty state directory and the cluster's key; it waits to be added"
                    ))
                })?;
                hello
                    .may_be_added((name, address, witness))
                    .map_err(refused)?
            }
        };
        if let Some(other) = before.members.values().find(|one| one.address == address) {
            let other = &other.name;
            return Err(refused(format!("node `{other}` has the address {address}")));
        }
        if before.members.len() >= stored::MEMBERS_MAX {
            let most = stored::MEMBERS_MAX;
            return Err(refused(format!("a cluster has {most} members at most")));
        }
        let node = self.next_number(&before);
        let member = Member {
            store_id,
            name: name.into(),
            address,
            witness,
        };
        let added = self.engine.add_learner(node, member, false);
        changed("adding a node", added).await?;
        self.promote(node, name).await
    }

    /// Numbers are never given twice.
    fn next_number(&self, sight: &Sight) -> u64 {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let retired = state.members().last_retired().map(|node| node.0);
        let proposed = state.last_node().map(|node| node.0);
        let known = sight.members.keys().next_back().copied();
        let last = known.max(retired).max(proposed);
        last.unwrap_or_default().saturating_add(1)
    }

    async fn remove(&self, name: &str) -> Result<String, ChangeError> {
        self.wait_for_majority().await?;
        joint::finish(&self.engine).await?;
        let sight = sight(&self.engine);
        let (node, member) = sight.find(name).ok_or_else(|| unknown(&sight, name))?;
        let is_voter = sight.voters.contains(&node);
        if is_voter {
            self.wait_until_it_may_go(node).await?;
        }
        if node == sight.own {
            // The next leader removes it.
            let others = sight.voters.iter().filter(|other| **other != node);
            let any = others.filter(|other| sight.heard.contains(other)).min();
            let heir = sight.heir().or(any.copied());
            return match heir {
                Some(heir) if transfer(&self.engine, heir).await => Err(ChangeError::NotLeader),
                _ => Err(refused(format!(
                    "node `{name}` leads, and no other node took the leadership\nhint: try again"
                ))),
            };
        }
        let retire = Command::Cluster(ClusterCommand::Members(MemberCommand::Retire {
            node: NodeId(node),
        }));
        let retired = timeout(CHANGE_MAX, self.proposer.ask(retire)).await;
        match retired {
            Ok(Ok(Outcome::StillServes(id))) => {
                let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
                let service = state.service(id).map_or("?", ServiceState::name);
                return Err(refused(format!(
                    "node `{name}` has service `{service}`\nhint: say `havenfs service move \
                     {service} --to NODE` first, or `havenfs service forget {service}` if it is in \
                     the files of no node any more"
                )));
            }
            Ok(Ok(Outcome::AwaitsFence(id))) => {
                let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
                let service = state.service(id).map_or("?", ServiceState::name);
                return Err(refused(format!(
                    "service `{service}` waits for the fence of node `{name}`\nhint: make sure that \
                     `{name}` is off, and say `havenfs service confirm-fence {service} --node \
                     {name}` first"
                )));
            }
            Ok(Ok(_)) => {}
            Ok(Err(Unavailable::Busy)) => return Err(refused(Unavailable::Busy.to_string())),
            Ok(Err(_)) | Err(_) => return Err(too_long("removing a node")),
        }
        let nodes = BTreeSet::from([node]);
        let change = if is_voter {
            ChangeMembers::RemoveVoters(nodes)
        } else {
            ChangeMembers::RemoveNodes(nodes)
        };
        let removed = self.engine.change_membership(change, false);
        changed("removing a node", removed).await?;
        tracing::info!(node, name, "a node was removed from the cluster");
        let mut left = sight.voters.clone();
        left.remove(&node);
        let (count, names) = (left.len(), sight.names(&left));
        let majority = count / 2 + 1;
        let witness = if member.witness { " --witness" } else { "" };
        let address = member.address;
        Ok(format!(
            "node `{name}` is a member no more; {count} vote ({names}), and {majority} of them must \
             live\nhint: it can come back: stop it, move its state directory away, start it, and \
             say `havenfs cluster add {name} --address {address}{witness}`"
        ))
    }
}

impl Changes {
    /// Asks whether a voter can go of those who answer after this was asked: one that died a moment
    /// ago would be needed, and nobody could undo that.
    async fn wait_until_it_may_go(&self, node: u64) -> Result<(), ChangeError> {
        let begun = Instant::now();
        loop {
            let sight = sight_within(&self.engine, begun.elapsed());
            match may_go(&sight, node) {
                Err(_) if begun.elapsed() < SILENT_MAX => sleep(POLL).await,
                result => return result,
            }
        }
    }
}

/// How long it may take until another one leads.
const TRANSFER_MAX: Duration = Duration::from_secs(2);
/// How long an operator waits for a leader.
const LEADER_MAX: Duration = Duration::from_secs(5);
/// How long the leader may take for all of it.
const ASK_MAX: Duration = Duration::from_mins(2);
const POLL: Duration = Duration::from_millis(50);
