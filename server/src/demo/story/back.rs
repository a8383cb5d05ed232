//! The way back: the lost node is started again and gets the service by a planned move; and the end.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::super::proof::{broken, is_granted, promised};
use super::super::timeline::milliseconds;
use super::{GRANT_TIME_MAX, SERVE_TIME_MAX, Scene};

impl Scene<'_, '_> {
    /// Starts the dead node again and moves the service back to it; returns the longest time
    /// without an answer to a WRITE, and how many records were acknowledged in all.
    pub(super) fn bring_back(&mut self, dead: &'static str) -> Result<(Duration, usize)> {
        self.timeline.section("The way back", "how long it took");
        let began = Instant::now();
        self.cluster.restart(dead)?;
        let text = format!("{dead} is started again and has joined as a standby");
        self.timeline.step(began.elapsed(), &text);
        let asked = Instant::now();
        let now = self.cluster.active();
        if now.is_none_or(|active| active.node != dead) {
            let moved = self.cluster.move_to(dead, GRANT_TIME_MAX);
            promised(moved, "a planned move was promised")?;
        }
        let active = self
            .cluster
            .wait_active(SERVE_TIME_MAX, |active| active.node == dead)?;
        let Some(active) = active else {
            return broken(format!(
                "the service does not come to {dead} by a planned move"
            ));
        };
        self.address_has_come(asked, dead)?;
        let took = active.at.saturating_duration_since(asked);
        self.wait_for_writes(active.at)?;
        let mut of_linux = Vec::new();
        self.linux_goes_on(asked, active.at, &mut of_linux)?;
        let (gap, _) = self.ledger.longest_gap(asked);
        let text = format!(
            "planned move to {dead}, while A writes; the longest gap is {}",
            milliseconds(gap)
        );
        self.timeline.step(took, &text);
        for (at, text) in of_linux {
            self.timeline
                .step(at.saturating_duration_since(asked), &text);
        }
        let new = self.a.lock(3, 6000, 100);
        let asked = Instant::now();
        let stat = promised(self.a.locks.lock(new, false), "a new lock is not granted")?;
        is_granted(stat, new)?;
        self.timeline.step(
            asked.elapsed(),
            &format!("a new lock, {} for A: GRANTED", new.bytes),
        );
        self.active = active;
        self.load.stop();
        self.linux_stops()?;
        self.locks_are_held()?;
        let records = self.records_are_there()?;
        Ok((gap, records))
    }

    pub(super) fn end(&mut self) -> Result<()> {
        self.timeline.section("The end", "how long it took");
        let began = Instant::now();
        let (resends, resent) = (self.load.resends(), self.load.resent());
        self.timeline.detail(&format!(
            "A sent calls again {resends} times, and wrote {resent} records again because the \
             write verifier had changed"
        ));
        self.linux_leaves()?;
        for lock in self.ledger.held() {
            let client = if lock.owner.client == self.a.name {
                &self.a
            } else {
                &self.b
            };
            promised(client.locks.unlock(lock), "a lock cannot be given back")?;
        }
        self.ledger.check()?;
        self.a.unmount();
        self.b.unmount();
        let late = self.cluster.stop()?;
        let text = if late.is_empty() {
            "all locks are given back, and the nodes have ended".to_owned()
        } else {
            format!(
                "all locks are given back; {} had to be killed",
                late.join(", ")
            )
        };
        self.timeline.step(began.elapsed(), &text);
        Ok(())
    }
}
