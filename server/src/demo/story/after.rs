//! After the loss: how the new node tells its takeover and what the clients hear of it, the way
//! back of the lost node by a planned move, and the end.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::super::cluster::Takeover;
use super::super::proof::{Heard, broken, is_granted, promised};
use super::super::timeline::milliseconds;
use super::{GRANT_TIME_MAX, SERVE_TIME_MAX, Scene};

impl Scene<'_, '_> {
    /// How the new node tells the takeover.
    pub(super) fn takeover(&self) {
        let Some(Takeover {
            phases, total_ms, ..
        }) = &self.active.takeover
        else {
            return;
        };
        let heading = format!("How {} tells it", self.active.node);
        self.timeline.section(&heading, "how long it took");
        let time = |ms: f64| Duration::from_secs_f64((ms / 1000.0).max(0.0));
        for phase in phases {
            self.timeline.step(time(phase.ms), &in_words(&phase.name));
        }
        self.timeline.step(time(*total_ms), "in all");
    }

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

/// What a step of a takeover is, for a person.
fn in_words(name: &str) -> String {
    let words = match name {
        "detect" => "to notice that the old node says nothing any more",
        "lease" => "to be sure that the old node's lease has run out",
        "fence" => "to have the old node fenced",
        "assign" => "to have the service assigned by the cluster",
        "storage" => "to have the storage",
        "exports" => "to open the exports",
        "table" | "apply" => "to have all locks in the table",
        "listen" => "to listen",
        "address" => "to have the address",
        "announce" | "notify" => "to begin to tell the clients",
        "release" | "drain" => "to have the old node let go",
        _ => return name.to_owned(),
    };
    format!("{name}: {words}")
}

/// What a client has heard, and when.
pub(super) fn note_notice(client: &str, heard: &Heard, events: &mut Vec<(Instant, String)>) {
    let text = format!("client {client} hears of it (SM_NOTIFY from the service's address)");
    events.push((heard.notice_at, text));
    let text = format!(
        "client {client} has reclaimed its {} locks: GRANTED",
        heard.reclaimed
    );
    events.push((heard.reclaimed_at, text));
}
