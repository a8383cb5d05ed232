//! An operator's word that storage which failed on this node was repaired, where the node can't
//! find out by itself: commands make it ready, so nothing of it is touched before the service is
//! here.

use super::cluster::ASK_TIME_MAX;
use crate::cluster::command::StorageNote;
use crate::cluster::{ClusterCommand, Command, Outcome, ServiceId};
use crate::services::{Health, Services};

/// Has the log forget what this node said of its storage, if it can't try it; says whether it has.
pub(super) async fn believe(services: &Services, name: &str, service: ServiceId) -> bool {
    let mut slots = services.slots.iter();
    let Some(slot) = slots.find(|slot| slot.config.name == name) else {
        return false;
    };
    let has_commands = slot.config.hooks.all().next().is_some();
    if !has_commands || slot.serving().is_some() {
        return false;
    }
    slot.health.send_replace(Health::Untried);
    let note = Command::Cluster(ClusterCommand::NoteStorage(StorageNote {
        service,
        node: services.cluster.own().node,
        fails: false,
    }));
    let asked = tokio::time::timeout(ASK_TIME_MAX, services.proposer.ask(note)).await;
    matches!(asked, Ok(Ok(Outcome::Done)))
}
