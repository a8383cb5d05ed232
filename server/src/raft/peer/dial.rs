//! Reaching other nodes: who this node is, whom it knows, and connections to them.
//!
//! Owns what both directions need: the key, this node's standing, the membership to compare with,
//! the counters, and who waits to be added. Does not keep connections; whoever asked for one does.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

use super::applicants::{Applicant, Applicants};
use super::hello::{ClusterName, Configured, Hello, Refusal, Standing, admit, confirm};
use super::key::ClusterKey;
use super::link::{Link, LinkError};
use super::pace::Pace;
use super::wire::Message;
use crate::metrics::Counter;
use crate::raft::change::MemberChange;
use crate::raft::stored::{Formed, Stored};
use crate::raft::types::Member;

/// How long making a connection may take, handshake and all. Short, since a lost first packet is
/// sent again only after a second, and a new connection sends a new one.
pub(super) const DIAL_MAX: Duration = Duration::from_millis(500);

/// Why a node can't be asked.
#[derive(Debug, thiserror::Error)]
pub(in crate::raft) enum PeerError {
    /// There is no connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// It is not the node that was meant.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It says that this node is not the one that it takes it for.
    #[error("it refuses this node: {0}")]
    RefusedBy(String),
    /// It says that this node was removed, or given up as lost.
    #[error("it says: {0}")]
    Removed(String),
    /// This node belongs to no cluster.
    #[error("this node belongs to no cluster yet")]
    Unformed,
}

impl From<std::io::Error> for PeerError {
    fn from(error: std::io::Error) -> Self {
        Self::Link(error.into())
    }
}

/// Asks the leader, to which the link goes, for a change; none if it does not lead.
pub(in crate::raft) async fn ask_for(
    mut link: Link,
    change: MemberChange,
    within: Duration,
) -> Result<Option<Result<String, String>>, PeerError> {
    let answer = timeout(within, link.ask(&Message::Change(change))).await;
    match answer.map_err(|_| LinkError::TimedOut)?? {
        Message::Changed(result) => Ok(Some(result)),
        Message::NotLeader => Ok(None),
        Message::Refused(reason) => Err(PeerError::RefusedBy(reason)),
        _ => Err(LinkError::OutOfPlace.into()),
    }
}

/// What the log says of members.
pub(in crate::raft) trait Membership: Send + Sync {
    /// The members as this node knows them; empty before it has read or been told any.
    fn known(&self) -> BTreeMap<u64, Member>;
    /// Those of them that a majority has in its logs, so that nobody else can be in their place.
    fn settled(&self) -> BTreeMap<u64, Member>;
    /// Whether the number is that of a removed node.
    fn is_retired(&self, node: u64) -> bool;
}

/// The other nodes, and what this one is to them. A handle: clones are alike.
#[derive(Clone)]
pub(in crate::raft) struct Peers(Arc<Shared>);

struct Shared {
    key: ClusterKey,
    name: Box<str>,
    store_id: u64,
    standing: RwLock<Standing>,
    membership: OnceLock<Box<dyn Membership>>,
    applicants: Applicants,
    /// Set when a member says that this node was removed; why.
    removed: watch::Sender<Option<String>>,
    counters: Counters,
    pace: Pace,
    /// When the leader, if that is another node, was heard of last.
    leader_heard: Mutex<Option<Instant>>,
}

/// What came to the members' port.
#[derive(Debug, Default)]
pub(in crate::raft) struct Counters {
    /// Connections of members.
    pub(in crate::raft) accepted: Counter,
    /// Connections closed because the key was wrong, the handshake none or too slow.
    pub(in crate::raft) strangers: Counter,
    /// Connections closed because too many had not shown the key.
    pub(in crate::raft) limit_handshakes: Counter,
    /// Connections closed because there were too many.
    pub(in crate::raft) limit_connections: Counter,
    /// Connections refused to nodes with the key.
    pub(in crate::raft) refused: Counter,
}

impl Peers {
    /// `name` is this node's, `stored` what its store says of itself; `empty` says whether its log
    /// holds nothing, and `configured` are the members that the configuration names. These two
    /// matter only as long as the store belongs to no cluster.
    pub(in crate::raft) fn new(
        key: ClusterKey,
        name: &str,
        stored: &Stored,
        empty: bool,
        configured: &[Configured],
    ) -> Self {
        let mut configured = configured.to_vec();
        configured.sort();
        let unformed = Standing::Unformed {
            empty,
            configured: configured.into(),
        };
        let peers = Self(Arc::new(Shared {
            key,
            name: name.into(),
            store_id: stored.store_id,
            standing: RwLock::new(unformed),
            membership: OnceLock::new(),
            applicants: Applicants::default(),
            removed: watch::Sender::new(None),
            counters: Counters::default(),
            pace: Pace::default(),
            leader_heard: Mutex::default(),
        }));
        if let Some(formed) = &stored.formed {
            peers.join(formed);
        }
        peers
    }

    /// From now on this node belongs to a cluster.
    pub(super) fn join(&self, formed: &Formed) {
        let standing = &self.0.standing;
        *standing.write().unwrap_or_else(PoisonError::into_inner) = Standing::Formed {
            cluster_id: formed.cluster_id,
            generation: formed.generation,
            node: formed.node,
            members: formed.members.clone(),
        };
    }

    /// From now on `membership` says who is a member, whenever it names any; until then those do
    /// that the cluster was formed of. Only the first call counts.
    pub(in crate::raft) fn follow(&self, membership: impl Membership + 'static) {
        // A second one would be a second engine.
        let _ = self.0.membership.set(Box::new(membership));
    }

    /// What came to the members' port.
    pub(in crate::raft) fn counters(&self) -> &Counters {
        &self.0.counters
    }

    /// Empty nodes that have asked for a cluster lately, and are not in it.
    pub(in crate::raft) fn applicants(&self) -> Vec<Applicant> {
        match self.standing() {
            Standing::Formed { members, .. } => self.0.applicants.list(&members),
            Standing::Unformed { .. } => Vec::new(),
        }
    }

    /// The leader has asked something of this node.
    pub(super) fn note_leader(&self) {
        let heard = self.0.leader_heard.lock();
        *heard.unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether the leader, if that is another node, was heard of within that time.
    pub(in crate::raft) fn hears_leader(&self, within: Duration) -> bool {
        let heard = self.0.leader_heard.lock();
        let heard = *heard.unwrap_or_else(PoisonError::into_inner);
        heard.is_some_and(|heard| heard.elapsed() < within)
    }

    /// Notes an empty node that asks who is there, if there is a cluster here.
    pub(super) fn note_applicant(&self, hello: &Hello) {
        if let Standing::Formed { members, .. } = self.standing() {
            self.0.applicants.note(&members, hello);
        }
    }

    /// Why this node is a member no more, once that is known.
    pub(in crate::raft) fn watch_removed(&self) -> watch::Receiver<Option<String>> {
        self.0.removed.subscribe()
    }

    /// This node is a member no more.
    pub(in crate::raft) fn set_removed(&self, reason: String) {
        self.0.removed.send_if_modified(|removed| {
            let is_news = removed.is_none();
            removed.get_or_insert(reason);
            is_news
        });
    }

    /// Whether a member has this address.
    pub(super) fn has_member_at(&self, address: IpAddr) -> bool {
        match self.standing() {
            Standing::Formed { members, .. } => {
                let mut members = members.values();
                members.any(|member| member.address.ip() == address)
            }
            Standing::Unformed { configured, .. } => {
                let mut configured = configured.iter();
                configured.any(|member| member.address.ip() == address)
            }
        }
    }

    pub(super) fn key(&self) -> &ClusterKey {
        &self.0.key
    }

    pub(super) fn pace(&self) -> &Pace {
        &self.0.pace
    }

    pub(in crate::raft) fn name(&self) -> &str {
        &self.0.name
    }

    pub(super) fn store_id(&self) -> u64 {
        self.0.store_id
    }

    /// Which cluster this node belongs to, with the members as they are now.
    pub(super) fn standing(&self) -> Standing {
        let standing = &self.0.standing;
        let standing = standing.read().unwrap_or_else(PoisonError::into_inner);
        let mut standing = standing.clone();
        if let Standing::Formed { members, .. } = &mut standing
            && let Some(membership) = self.0.membership.get()
        {
            let now = membership.known();
            if !now.is_empty() {
                *members = now;
            }
        }
        standing
    }

    /// How often the cluster was begun anew by a sole survivor.
    pub(in crate::raft) fn generation(&self) -> u32 {
        match self.standing() {
            Standing::Formed { generation, .. } => generation,
            Standing::Unformed { .. } => 0,
        }
    }

    /// What this node says first, to a node that belongs to a cluster or to one that does not.
    pub(super) fn hello(&self, to_formed: bool) -> Hello {
        let mut standing = self.standing();
        if let Standing::Formed { members, .. } = &mut standing {
            if to_formed {
                members.clear();
            } else if let Some(membership) = self.0.membership.get() {
                // An empty node becomes what it is told here, for good.
                let settled = membership.settled();
                if !settled.is_empty() {
                    *members = settled;
                }
            }
        }
        Hello {
            name: self.0.name.clone(),
            store_id: self.0.store_id,
            standing,
        }
    }

    /// Whether whoever says `hello` may ask more than that; returns its number.
    pub(super) fn admit(&self, hello: &Hello) -> Result<u64, Refusal> {
        match self.standing() {
            Standing::Formed {
                cluster_id: id,
                generation,
                members,
                ..
            } => {
                let membership = self.0.membership.get();
                let is_retired =
                    |node| membership.is_some_and(|membership| membership.is_retired(node));
                admit(ClusterName { id, generation }, &members, is_retired, hello)
            }
            Standing::Unformed { .. } => Err(Refusal::Unformed {
                name: self.0.name.clone(),
            }),
        }
    }

    /// Connects to a member and makes sure that it is the one.
    pub(in crate::raft) async fn dial(
        &self,
        node: u64,
        member: &Member,
    ) -> Result<Link, PeerError> {
        let own = self.hello(true);
        let Standing::Formed {
            cluster_id: id,
            generation,
            ..
        } = own.standing
        else {
            return Err(PeerError::Unformed);
        };
        let dialed = timeout(DIAL_MAX, self.greet(member.address, own));
        let (mut link, hello) = dialed.await.map_err(|_| LinkError::TimedOut)??;
        confirm(ClusterName { id, generation }, node, member, &hello)?;
        link.receiver.admit();
        Ok(link)
    }

    /// Asks whoever is at `address` who it is.
    pub(in crate::raft) async fn ask(&self, address: SocketAddr) -> Result<Hello, PeerError> {
        let asked = timeout(DIAL_MAX, self.greet(address, self.hello(false)));
        let (_, hello) = asked.await.map_err(|_| LinkError::TimedOut)??;
        Ok(hello)
    }

    /// Whether a member answers where it is reached, with the store that the log knows.
    pub(in crate::raft) async fn is_there(&self, member: &Member) -> bool {
        let asked = self.ask(member.address).await;
        asked.is_ok_and(|hello| hello.store_id == member.store_id)
    }

    pub(super) async fn greet(
        &self,
        address: SocketAddr,
        own: Hello,
    ) -> Result<(Link, Hello), PeerError> {
        let stream = TcpStream::connect(address).await?;
        let mut link = Link::open(stream, &self.0.key).await?;
        match link.ask(&Message::Hello(own)).await? {
            Message::Hello(hello) => Ok((link, hello)),
            Message::Refused(reason) => Err(PeerError::RefusedBy(reason)),
            Message::Removed(reason) => {
                self.set_removed(reason.clone());
                Err(PeerError::Removed(reason))
            }
            _ => Err(LinkError::OutOfPlace.into()),
        }
    }

    /// Says in the log why a member can't be asked, unless that was said of it just now.
    pub(super) fn complain(&self, node: u64, member: &Member, error: &PeerError) {
        let text = error.to_string();
        if !self.0.pace.says(node, &text) {
            return;
        }
        let (name, address) = (&member.name, member.address);
        match error {
            // So it is at the first start, for a moment.
            PeerError::Refused(Refusal::Unformed { .. }) => {
                tracing::info!(node, %name, %address, "a member is not there yet: {text}");
            }
            PeerError::Refused(_) | PeerError::RefusedBy(_) | PeerError::Removed(_) => {
                tracing::error!(node, %name, %address, "cannot use a member: {text}");
            }
            PeerError::Link(_) | PeerError::Unformed => {
                tracing::warn!(node, %name, %address, "cannot reach a member: {text}");
            }
        }
    }

    /// A member answers; says so if it did not before.
    pub(super) fn settle(&self, node: u64, member: &Member) {
        if self.0.pace.settle(node) {
            let (name, address) = (&member.name, member.address);
            tracing::info!(node, %name, %address, "a member answers again");
        }
    }
}
