//! The address of the service: seen to be on one node, to leave it, and to come to another one.
//!
//! Tells only what [`Sight`] has seen from outside, and nothing where all addresses are always
//! there.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::super::cluster::{Cluster, LOOK};
use super::super::interrupt;
use super::super::proof::broken;
use super::super::sight::{Seen, Sight};
use super::super::timeline::{Timeline, milliseconds};
use super::Scene;

/// How long after a node answers its address may have to be looked for.
const SEE_TIME_MAX: Duration = Duration::from_secs(5);

/// Waits until the address is on this node, and on no other one.
pub(super) fn is_with_its_node(
    cluster: &Cluster<'_>,
    timeline: &Timeline,
    node: &str,
) -> Result<()> {
    let Some(bridge) = cluster.bridge() else {
        return Ok(());
    };
    let address = cluster.site().service();
    let deadline = Instant::now() + SEE_TIME_MAX;
    while bridge.sight().holders() != [node] {
        bridge.sight().check()?;
        if Instant::now() > deadline {
            let others = bridge.sight().holders().join(", ");
            return broken(format!(
                "{address} is not on {node} alone, but on: {others}"
            ));
        }
        interrupt::sleep(LOOK)?;
    }
    let text = format!(
        "{address} is on {node}'s card and on no other: each node is on a network of its own"
    );
    timeline.step(None, &text);
    Ok(())
}

impl Scene<'_, '_> {
    /// No two nodes have had the address at the same time.
    pub(super) fn address_is_on_one_node(&self) -> Result<()> {
        self.sight().map_or(Ok(()), Sight::check)
    }

    /// What was seen of the address since `from`, when `node` got it.
    pub(super) fn address_has_moved(
        &self,
        from: Instant,
        node: &'static str,
        events: &mut Vec<(Instant, String)>,
    ) -> Result<()> {
        let address = self.cluster.site().service();
        for (at, seen) in self.see(from, node)? {
            events.push((at, words(seen, &address.to_string())));
        }
        Ok(())
    }

    /// Tells how the address came to `node` after a planned move was asked for at `from`.
    pub(super) fn address_has_come(&self, from: Instant, node: &'static str) -> Result<()> {
        let address = self.cluster.site().service();
        let mut left = None;
        for (at, seen) in self.see(from, node)? {
            let text = words(seen, &address.to_string());
            let text = match (seen, left) {
                (Seen::Come(_), Some(left)) => {
                    let without = milliseconds(at.saturating_duration_since(left));
                    format!("{text}, after {without} on no node")
                }
                _ => text,
            };
            if matches!(seen, Seen::Gone(_)) {
                left = Some(at);
            }
            self.timeline
                .step(at.saturating_duration_since(from), &text);
        }
        Ok(())
    }

    fn sight(&self) -> Option<&Sight> {
        self.cluster.bridge().map(|bridge| bridge.sight().as_ref())
    }

    /// Waits until the address was seen on `node` and announced; returns what was seen since
    /// `from`, the first of each.
    fn see(&self, from: Instant, node: &'static str) -> Result<Vec<(Instant, Seen)>> {
        let Some(sight) = self.sight() else {
            return Ok(Vec::new());
        };
        let deadline = Instant::now() + SEE_TIME_MAX;
        loop {
            sight.check()?;
            let mut events: Vec<(Instant, Seen)> = Vec::new();
            for (at, seen) in sight.since(from) {
                if events.iter().all(|(_, before)| *before != seen) {
                    events.push((at, seen));
                }
            }
            let has = |wanted| events.iter().any(|(_, seen)| *seen == wanted);
            if has(Seen::Come(node)) && has(Seen::Announced(node)) {
                return Ok(events);
            }
            if Instant::now() > deadline {
                let address = self.cluster.site().service();
                return broken(format!(
                    "{node} answers, but is not seen to have {address} and to announce it"
                ));
            }
            interrupt::sleep(LOOK)?;
        }
    }
}

fn words(seen: Seen, address: &str) -> String {
    match seen {
        Seen::Come(node) => format!("{address} is on {node}'s card"),
        Seen::Gone(node) => format!("{address} is no longer on {node}"),
        Seen::Announced(node) => format!("{node} announces by ARP that it has {address}"),
    }
}
