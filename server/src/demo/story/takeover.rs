//! A takeover as others tell it: the new node with its phases, and the clients that hear of it.

use std::time::{Duration, Instant};

use super::super::cluster::Takeover;
use super::super::proof::Heard;
use super::Scene;

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
