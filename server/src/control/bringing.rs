//! What comes of a move: who has moved a service waits here until it is served, or is known not to
//! come.
//!
//! Looks at the replicated state alone, so that any node may be asked. The node that the service
//! comes to says in the log that it has opened it; if it can't, it gives the service away, and the
//! next one says so.
//!
//! ```text
//!   wanted there --+-- assigned to it --+-- opened --> served
//!                  |                    +-- released, opened elsewhere --> it did not come
//!                  +-- a third node took it just then: the wish is gone, and is said again
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::time::timeout;

use super::cluster::{change, error};
use crate::cluster::{ClusterCommand, Command, NodeId, ServiceId, ServiceState, Wish};
use crate::services::Services;

/// The word behind a request whose answer says what came of it.
pub(super) const WAIT: &str = "wait";

/// A service that is to come to a node.
pub(super) struct Bringing<'a> {
    pub(super) services: &'a Arc<Services>,
    pub(super) name: &'a str,
    pub(super) service: ServiceId,
    /// Where it is wanted.
    pub(super) to: NodeId,
    /// Where it was.
    pub(super) from: Option<NodeId>,
}

/// What one look at the state shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Look {
    epoch: u32,
    active: Option<NodeId>,
    wish: Wish,
    /// Whether the active node has opened it.
    is_open: bool,
    /// Whether this node serves it, if it is the one that is to have it.
    serves: Option<bool>,
}

/// What is known of it by now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Course {
    /// Nothing is decided.
    Open,
    /// It is served where it was wanted.
    Served,
    /// Another node took it just when it was moved, which nobody wants any more.
    Overtaken,
    /// It is served by another node.
    Elsewhere(NodeId),
    /// Somebody wants it there by now.
    Redirected(NodeId),
    /// Somebody wants it nowhere by now.
    Withdrawn,
}

/// Follows a service.
#[derive(Debug)]
struct Watching {
    to: NodeId,
    /// The epoch in which it was when it was moved.
    before: u32,
    /// It was assigned to the node.
    was_there: bool,
    /// A node that was about to release it and has not done so by then goes on.
    stays_after: Duration,
}

impl Watching {
    fn judge(&mut self, look: Look, waited: Duration) -> Course {
        let Look { epoch, active, .. } = look;
        let is_later = epoch > self.before;
        let is_there = active == Some(self.to);
        self.was_there |= is_later && is_there;
        match look.wish {
            Wish::Nobody => return Course::Withdrawn,
            Wish::On(node) if node != self.to => return Course::Redirected(node),
            Wish::On(_) | Wish::Anywhere => {}
        }
        match active {
            // It was about to release it, and may go on, or do so and begin anew.
            Some(_) if is_there && !is_later => {
                let stays = match look.serves {
                    Some(serves) => serves && waited >= STAYS_AFTER,
                    None => waited >= self.stays_after,
                };
                if stays { Course::Served } else { Course::Open }
            }
            Some(_) if is_there && look.is_open => Course::Served,
            Some(_) if is_there => Course::Open,
            // It is moved from there as well.
            Some(_) if look.wish == Wish::On(self.to) || !is_later => Course::Open,
            Some(_) if !self.was_there && epoch == self.before.saturating_add(1) => {
                Course::Overtaken
            }
            Some(node) if look.is_open => Course::Elsewhere(node),
            Some(_) | None => Course::Open,
        }
    }
}

impl Bringing<'_> {
    /// Has the log note where it is wanted.
    pub(super) async fn ask(&self) -> Result<(), Value> {
        let command = ClusterCommand::Move {
            service: self.service,
            to: self.to,
        };
        change(self.services, self.name, Command::Cluster(command), "moved").await
    }

    /// Says what comes of it. `before` is the epoch in which it was `asked` for.
    pub(super) async fn wait(&self, before: u32, asked: Instant) -> Result<Value, Value> {
        let mut changes = self.services.changes.clone();
        let deadline = asked + WAIT_MAX + self.commands();
        let mut watching = Watching {
            to: self.to,
            before,
            was_there: false,
            stays_after: STOP_MAX + self.commands(),
        };
        let mut is_said_again = false;
        loop {
            changes.borrow_and_update();
            let look = self.look()?;
            let course = watching.judge(look, asked.elapsed());
            match course {
                Course::Open => {}
                // Whoever gave it away and took it again would only do the same once more.
                Course::Overtaken if !is_said_again && look.active != self.from => {
                    is_said_again = true;
                    watching.before = look.epoch;
                    self.ask().await?;
                    continue;
                }
                course => return self.told(course, look, asked.elapsed()),
            }
            if Instant::now() >= deadline {
                return Err(self.late(look, asked.elapsed()));
            }
            // The sender ends with the store, and then the process.
            let _ = timeout(LOOK_AGAIN, changes.changed()).await;
        }
    }

    fn look(&self) -> Result<Look, Value> {
        let is_own = self.to == self.services.cluster.own().node;
        let slot = self.services.slot(Some(self.name)).ok();
        let serves = slot.filter(|_| is_own).map(|slot| slot.serving().is_some());
        let state = self.services.state();
        let service = state.service(self.service);
        let found = service.map(|service| Look {
            serves,
            epoch: service.epoch(),
            active: service.active().map(|active| active.node),
            wish: service.wish(),
            is_open: self
                .services
                .cluster
                .is_open_in(self.service, service.epoch()),
        });
        let name = self.name;
        found.ok_or_else(|| error(format!("service `{name}` was forgotten meanwhile")))
    }

    /// How long its commands may take.
    fn commands(&self) -> Duration {
        let mut slots = self.services.slots.iter();
        let slot = slots.find(|slot| slot.config.name == *self.name);
        slot.map_or(Duration::ZERO, |slot| {
            let hooks = &slot.config.hooks;
            let count = [&hooks.release, &hooks.takeover].into_iter().flatten();
            hooks.time_max * u32::try_from(count.count()).unwrap_or_default()
        })
    }

    fn told(&self, course: Course, look: Look, waited: Duration) -> Result<Value, Value> {
        let (name, after) = (self.name, seconds(waited));
        let name_of = |node| self.services.cluster.name_of(node);
        let to = name_of(self.to);
        Err(error(match course {
            Course::Served => {
                return Ok(json!({
                    "done": format!(
                        "service `{name}` is served by node {to}, {after} after this was asked for"
                    ),
                }));
            }
            Course::Elsewhere(node) => {
                let again = if self.from == Some(node) {
                    " again"
                } else {
                    ""
                };
                format!(
                    "service `{name}` did not come to node {to}, and is on node {}{again}, {after} \
                     after this was asked for\nhint: see the log of node {to} for why",
                    name_of(node)
                )
            }
            Course::Overtaken | Course::Open if look.active == self.from => format!(
                "service `{name}` is on node {} again, {after} after this was asked for: node {to} \
                 did not take it in its turn\nhint: see the log of node {to}; where a service has \
                 just failed, a node leaves it to others for 1 to 32 s",
                look.active.map_or_else(String::new, name_of)
            ),
            Course::Overtaken | Course::Open => format!(
                "service `{name}` did not come to node {to}: another one, node {}, took it just \
                 when it was moved\nhint: see `havenfs service list`, and say it again",
                look.active.map_or_else(String::new, name_of)
            ),
            Course::Redirected(node) => format!(
                "service `{name}` is wanted on node {} by now, since somebody has moved it there",
                name_of(node)
            ),
            Course::Withdrawn => {
                format!("service `{name}` is to be served by no node by now: somebody releases it")
            }
        }))
    }

    /// Nothing is decided in time.
    fn late(&self, look: Look, waited: Duration) -> Value {
        let (name, after) = (self.name, seconds(waited));
        let name_of = |node| self.services.cluster.name_of(node);
        let to = name_of(self.to);
        let unfenced: Vec<NodeId> = {
            let state = self.services.state();
            let service = state.service(self.service);
            service.map_or_else(Vec::new, |service| {
                ServiceState::unfenced(service).collect()
            })
        };
        let unfenced: Vec<String> = unfenced.into_iter().map(name_of).collect();
        error(match look.active {
            Some(node) if node == self.to && !unfenced.is_empty() => format!(
                "service `{name}` is on node {to}, and waits for the fence of {} {after} after this \
                 was asked for\nhint: see `havenfs service list`",
                unfenced.join(", ")
            ),
            Some(node) if node == self.to => format!(
                "service `{name}` is on node {to}, which has not opened it {after} after this was \
                 asked for\nhint: see the log of node {to}"
            ),
            Some(node) => format!(
                "service `{name}` is on node {} {after} after this was asked for; it moves as soon \
                 as node {to} can take it\nhint: see the logs of both; to have it stay: `havenfs \
                 service move {name} --to {}`",
                name_of(node),
                name_of(node)
            ),
            None => format!(
                "service `{name}` is on no node {after} after this was asked for\nhint: see \
                 `havenfs service list`, and the log of node {to}"
            ),
        })
    }
}

/// In words; a move takes hundredths.
fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

/// How long it is waited for, besides the commands for the storage.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// However quiet it is.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// This node serves what it was about to stop, and would have begun to by then.
const STAYS_AFTER: Duration = Duration::from_secs(1);
/// How long another node may take to stop, besides its commands: to finish calls, and to bring all
/// to disk.
const STOP_MAX: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: NodeId = NodeId(1);
    const TWO: NodeId = NodeId(2);
    const THREE: NodeId = NodeId(3);

    fn watching() -> Watching {
        Watching {
            to: TWO,
            before: 5,
            was_there: false,
            stays_after: STOP_MAX,
        }
    }

    fn look(epoch: u32, active: Option<NodeId>, wish: Wish, is_open: bool) -> Look {
        Look {
            epoch,
            active,
            wish,
            is_open,
            serves: None,
        }
    }

    /// What is said of the last of several looks.
    fn course(looks: &[Look]) -> Course {
        let mut watching = watching();
        let courses = looks
            .iter()
            .map(|look| watching.judge(*look, Duration::ZERO));
        courses.last().unwrap_or(Course::Open)
    }

    #[test]
    fn it_is_served_when_the_node_says_that_it_is_open() {
        let moves = [
            look(5, Some(ONE), Wish::On(TWO), true),
            look(5, None, Wish::On(TWO), true),
            look(6, Some(TWO), Wish::Anywhere, false),
            look(6, Some(TWO), Wish::Anywhere, true),
        ];
        assert_eq!(course(&moves[..3]), Course::Open);
        assert_eq!(course(&moves), Course::Served);
    }

    #[test]
    fn a_node_that_cannot_open_it_gives_it_to_others() {
        let back = [
            look(6, Some(TWO), Wish::Anywhere, false),
            look(6, None, Wish::Anywhere, false),
            look(7, Some(ONE), Wish::Anywhere, false),
            look(7, Some(ONE), Wish::Anywhere, true),
        ];
        assert_eq!(course(&back[..3]), Course::Open);
        assert_eq!(course(&back), Course::Elsewhere(ONE));
        // Not seen on the way.
        assert_eq!(course(&back[3..]), Course::Elsewhere(ONE));
    }

    #[test]
    fn who_took_it_at_that_moment_did_not_hear_of_the_wish() {
        let taken = |wish| look(6, Some(THREE), wish, false);
        assert_eq!(course(&[taken(Wish::Anywhere)]), Course::Overtaken);
        // It was taken before the wish was noted, which stands.
        assert_eq!(course(&[taken(Wish::On(TWO))]), Course::Open);
        let there = look(6, Some(TWO), Wish::Anywhere, false);
        let lost = look(7, Some(THREE), Wish::Anywhere, false);
        assert_eq!(course(&[there, lost]), Course::Open);
    }

    #[test]
    fn another_word_of_an_operator_counts() {
        let redirected = look(5, Some(ONE), Wish::On(THREE), true);
        assert_eq!(course(&[redirected]), Course::Redirected(THREE));
        let withdrawn = look(5, Some(ONE), Wish::Nobody, true);
        assert_eq!(course(&[withdrawn]), Course::Withdrawn);
    }

    #[test]
    fn a_node_that_was_about_to_release_it_may_go_on() {
        let mut watching = watching();
        let kept = look(5, Some(TWO), Wish::On(TWO), true);
        assert_eq!(watching.judge(kept, STAYS_AFTER), Course::Open);
        assert_eq!(watching.judge(kept, STOP_MAX), Course::Served);
        // This node knows of itself.
        let own = |serves| Look {
            serves: Some(serves),
            ..kept
        };
        assert_eq!(watching.judge(own(true), Duration::ZERO), Course::Open);
        assert_eq!(watching.judge(own(true), STAYS_AFTER), Course::Served);
        assert_eq!(watching.judge(own(false), STOP_MAX), Course::Open);
    }
}
