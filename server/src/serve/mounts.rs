//! Tells the cluster who mounted what from a service, so that `showmount -a` knows it after a
//! takeover.
//!
//! One task for as long as the service listens, in a cluster only. While this node serves, its own
//! list in memory is the one that counts; it begins as what the cluster has. Every [`LOOK_EVERY`]
//! the task proposes what has changed, one command at a time, and nothing while nothing changes.
//! Best effort: what fails is seen again at the next look, and what a crash loses is a line in
//! `showmount -a`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use imbl::OrdSet;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::cluster::mounts::{MOUNTS_MAX, Mount, PATH_BYTES_MAX};
use crate::cluster::{Command, ServiceCommand, ServiceId};
use crate::mount_list::{MountEntry, MountList};
use crate::net::tcp::Stop;
use crate::node::Node;
use crate::services::Services;

/// The list as the cluster has it.
pub(super) fn replicated_list(services: &Services, service: ServiceId) -> MountList {
    let mounts = known(services, service).into_iter();
    MountList::replicated(mounts.map(|mount| MountEntry {
        host: mount.host,
        path: mount.path.into_vec(),
    }))
}

/// Runs until the service stops to listen.
pub(super) async fn replicate_mounts(
    node: Arc<Node>,
    services: Arc<Services>,
    service: ServiceId,
    mut stopped: watch::Receiver<Stop>,
) {
    let looking = async {
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            tell(&node, &services, service).await;
        }
    };
    tokio::select! {
        () = looking => {}
        _ = stopped.wait_for(|stop| stop.is_stopped()) => {}
    }
}

/// Tells what has changed last, before the service goes elsewhere; not at any price.
pub(super) async fn tell_last(node: &Node, services: &Services, service: ServiceId) {
    // The next look of the next node has what is missing, if its host mounts again.
    let _ = timeout(LAST_TIME_MAX, tell(node, services, service)).await;
}

async fn tell(node: &Node, services: &Services, service: ServiceId) {
    let own = node.mounts.entries().into_iter();
    let own: BTreeSet<Mount> = own
        .map(|entry| Mount {
            host: entry.host,
            path: entry.path.into(),
        })
        .collect();
    let (came, went) = difference(&own, &known(services, service));
    if came.is_empty() && went.is_empty() {
        return;
    }
    let epoch = node.gate.epoch();
    let command = ServiceCommand::Mounts { epoch, came, went };
    let command = Command::Service(service, command);
    if let Err(error) = services.proposer.ask(command).await {
        tracing::debug!(%error, "mounts of clients are not told to the cluster");
    }
}

/// Cheap: what it has in common with the state is shared.
fn known(services: &Services, service: ServiceId) -> OrdSet<Mount> {
    let state = services.state();
    let mounts = state
        .service(service)
        .map(|service| service.mounts().clone());
    mounts.unwrap_or_default()
}

/// What is to be told: what came, and what is gone. Not more than a command may have, nor than the
/// state has room for.
fn difference(own: &BTreeSet<Mount>, known: &OrdSet<Mount>) -> (Vec<Mount>, Vec<Mount>) {
    let went = known.iter().filter(|mount| !own.contains(mount));
    let went: Vec<_> = went.take(CHANGES_MAX).cloned().collect();
    let room = (MOUNTS_MAX + went.len()).saturating_sub(known.len());
    let came = own.iter().filter(|mount| !known.contains(*mount));
    let came = came.filter(|mount| mount.path.len() <= PATH_BYTES_MAX);
    let came = came.take(room.min(CHANGES_MAX)).cloned().collect();
    (came, went)
}

/// How often the list is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How many mounts of each kind a command has: some 4 kB, and 100 kB with the longest paths, so
/// that no lock waits long behind it.
const CHANGES_MAX: usize = 100;
/// How long a service that goes elsewhere is held up for it.
const LAST_TIME_MAX: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts<T: FromIterator<Mount>>(numbers: impl IntoIterator<Item = u32>) -> T {
        let mounts = numbers.into_iter().map(|number| Mount {
            host: number.to_be_bytes().into(),
            path: b"/srv".as_slice().into(),
        });
        mounts.collect()
    }

    #[test]
    fn what_changed_is_told_and_no_more_than_a_command_may_have() {
        let told = |own: BTreeSet<Mount>, known: Vec<Mount>| {
            let known = OrdSet::from(known);
            difference(&own, &known)
        };
        let (came, went) = told(mounts([1, 2, 3]), mounts([2, 4]));
        assert_eq!((came, went), (mounts([1, 3]), mounts([4])));
        assert_eq!(told(mounts([1]), mounts([1])), (vec![], vec![]));
        let (came, went) = told(mounts(1..=150), mounts(1001..=1150));
        assert_eq!((came, went), (mounts(1..=100), mounts(1001..=1100)));
    }

    /// Otherwise the same would be proposed again and again.
    #[test]
    fn what_the_state_has_no_room_for_is_not_told() {
        let full = MOUNTS_MAX as u32;
        let known: Vec<Mount> = mounts(1..=full);
        let own: BTreeSet<Mount> = mounts(2..=full + 5);
        let (came, went) = difference(&own, &OrdSet::from(known));
        assert_eq!((came, went), (mounts([full + 1]), mounts([1])));
    }
}
