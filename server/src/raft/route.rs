//! Where the proposals of this node go: to the engine here while it leads, or to the node that
//! does.
//!
//! What is sent on one route is bound to one leadership, and what gets into the log of it is a
//! beginning of what was sent: never a later proposal without the earlier ones. When a route is
//! lost the caller sends everything again on the next one that [`Route::find`] finds.

use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::Engine;
use super::peer::{Forwarder, Peers};
use super::types::{LeaderId, Proposed, Reply, Types};

/// How soon a leader that did not take proposals is asked again, if nobody else leads meanwhile.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// The engine has ended; `Store::failed` says why.
#[derive(Debug)]
pub(super) struct EngineEnded;

type Leadership =
    openraft::alias::WatchReceiverOf<Types, openraft::metrics::RaftServerMetrics<Types>>;

/// The way to the leader.
pub(super) struct Route {
    engine: Engine,
    peers: Option<Peers>,
    /// Not the metrics of every entry.
    leadership: Leadership,
    way: Way,
    /// Who led when the way was chosen.
    leader: Option<(LeaderId, Option<u64>)>,
    /// A way was lost: the next is not looked for before this.
    not_before: Option<Instant>,
    /// Told when the engine here does not take a proposal.
    refused: Arc<Notify>,
}

enum Way {
    /// Nobody leads, as far as is known.
    Nowhere,
    /// This node leads.
    Here(LeaderId),
    /// Another one does.
    There(Box<Forwarder>),
}

impl Route {
    pub(super) fn new(engine: Engine, peers: Option<Peers>) -> Self {
        Self {
            leadership: engine.server_metrics(),
            engine,
            peers,
            way: Way::Nowhere,
            leader: None,
            not_before: None,
            refused: Arc::default(),
        }
    }

    pub(super) const fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Whether proposals can be sent.
    pub(super) const fn leads_somewhere(&self) -> bool {
        !matches!(self.way, Way::Nowhere)
    }

    /// Finds the way anew if the leader is another or the way was lost; returns whether it did.
    pub(super) async fn find(&mut self) -> bool {
        let (now, member) = {
            let metrics = self.leadership.borrow_watched();
            let leader = metrics.current_leader;
            let members = metrics.membership_config.membership();
            let member = leader.and_then(|leader| members.get_node(&leader).cloned());
            ((metrics.vote.leader_id, leader), member)
        };
        let is_lost = matches!(self.way, Way::Nowhere)
            && now.1.is_some()
            && self
                .not_before
                .is_none_or(|moment| moment <= Instant::now());
        if !is_lost && self.leader == Some(now) {
            return false;
        }
        self.leader = Some(now);
        // A refusal of the way before says nothing about the next.
        self.refused = Arc::default();
        self.way = match (now.1, member, &self.peers) {
            (Some(leader), _, _) if leader == *self.engine.node_id() => Way::Here(now.0),
            (Some(leader), Some(member), Some(peers)) => {
                tokio::select! {
                    biased;
                    connected = Forwarder::connect(peers, leader, &member) => match connected {
                        Ok(forwarder) => Way::There(Box::new(forwarder)),
                        // It was told to the log.
                        Err(_) => Way::Nowhere,
                    },
                    // Not to wait for one that leads no more.
                    _ = self.leadership.changed() => Way::Nowhere,
                }
            }
            _ => Way::Nowhere,
        };
        if let Way::Nowhere = self.way {
            self.lose();
        }
        true
    }

    fn lose(&mut self) {
        self.way = Way::Nowhere;
        self.not_before = Some(Instant::now() + ASK_AGAIN);
    }

    /// Sends proposals, in order; leaves the batch empty.
    pub(super) async fn send(&mut self, batch: &mut Vec<Proposed>) -> Result<(), EngineEnded> {
        match &mut self.way {
            Way::Nowhere => batch.clear(),
            Way::Here(leader) => {
                let leader = *leader;
                for proposed in batch.drain(..) {
                    let refused = Arc::clone(&self.refused);
                    let reply = Reply::new(move |result| {
                        // Its outcome is told where it is applied.
                        if !matches!(result, Ok(Ok(_))) {
                            refused.notify_one();
                        }
                    });
                    let write = self.engine.write(proposed).with_leader(leader);
                    write.responder(reply).await.map_err(|_| EngineEnded)?;
                }
            }
            Way::There(forwarder) => {
                let is_sent = batch.is_empty()
                    || tokio::select! {
                        biased;
                        sent = forwarder.send(batch) => sent.is_ok(),
                        // Whoever leads no more may not read any more either.
                        _ = self.leadership.changed() => false,
                    };
                if !is_sent {
                    self.lose();
                }
                batch.clear();
            }
        }
        Ok(())
    }

    /// Returns when the way is lost or another may be found. May be dropped and called again.
    pub(super) async fn changed(&mut self) -> Result<(), EngineEnded> {
        // While nobody leads there is nothing to look for again.
        let leads = self.leadership.borrow_watched().current_leader.is_some();
        let is_lost = leads && matches!(self.way, Way::Nowhere);
        let again = self.not_before.filter(|_| is_lost);
        let waiting = async {
            match again {
                Some(moment) => sleep_until(moment).await,
                None => std::future::pending().await,
            }
        };
        let lost = async {
            match &mut self.way {
                Way::Nowhere => std::future::pending().await,
                Way::Here(_) => self.refused.notified().await,
                Way::There(forwarder) => drop(forwarder.ended().await),
            }
        };
        let is_lost = tokio::select! {
            changed = self.leadership.changed() => {
                changed.map_err(|_| EngineEnded)?;
                false
            }
            () = lost => true,
            () = waiting => false,
        };
        if is_lost {
            self.lose();
        }
        Ok(())
    }
}
