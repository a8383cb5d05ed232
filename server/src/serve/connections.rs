//! Tells the cluster which TCP connections clients have to a service, so that the next active node
//! can wake them.
//!
//! One task for as long as the service listens, in a cluster only. It looks at what is open every
//! `LOOK_EVERY` and proposes what has changed, one command at a time; while nothing changes it
//! proposes nothing. Best effort: what fails is seen again at the next look.
//!
//! Invariants: a connection is told when two looks one after the other saw it, so a short one is
//! never told. One that is closed because this node stops, or must not answer, is not told as gone:
//! it is those clients that the next active node has to wake.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use imbl::OrdSet;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::cluster::connections::{CONNECTIONS_MAX, Connection};
use crate::cluster::{Command, ServiceCommand, ServiceId, ServiceState};
use crate::net::tcp::Stop;
use crate::node::Node;
use crate::services::Services;

/// Runs until the service stops to listen; `listen` are the service's own addresses.
pub(super) async fn replicate_connections(
    node: Arc<Node>,
    services: Arc<Services>,
    service: ServiceId,
    listen: Vec<IpAddr>,
    stopped: watch::Receiver<Stop>,
) {
    let mut stopping = stopped.clone();
    tokio::select! {
        () = look_again(&node, &services, service, &listen, &stopped) => {}
        _ = stopping.wait_for(|stop| stop.is_stopped()) => {}
    }
}

/// Never returns.
async fn look_again(
    node: &Node,
    services: &Services,
    service: ServiceId,
    listen: &[IpAddr],
    stopped: &watch::Receiver<Stop>,
) {
    let epoch = node.gate.epoch();
    let begun = Instant::now();
    let mut looks = interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = BTreeSet::new();
    loop {
        looks.tick().await;
        let open = open_connections(node, listen);
        // Asked after the look: whatever closes connections says so before.
        if stopped.borrow().is_stopped() || node.gate.has_turned_away() {
            continue;
        }
        let known = services.state().service(service).map(known_connections);
        let known = known.unwrap_or_default();
        let may_forget = begun.elapsed() >= FORGET_AFTER;
        let (came, went) = difference([&before, &open], &known, may_forget);
        before = open;
        if came.is_empty() && went.is_empty() {
            continue;
        }
        let command = ServiceCommand::Connections { epoch, came, went };
        let command = Command::Service(service, command);
        if let Err(error) = services.proposer.ask(command).await {
            tracing::debug!(%error, "connections of clients are not told to the cluster");
        }
    }
}

/// Cheap: what it has in common with the state is shared.
fn known_connections(service: &ServiceState) -> OrdSet<Connection> {
    service.connections().clone()
}

/// The connections of hosts to the service's own addresses, for files and for locks. What comes by
/// other addresses, as from this machine itself, is not moved by a takeover.
fn open_connections(node: &Node, listen: &[IpAddr]) -> BTreeSet<Connection> {
    let clients = node.clients.list();
    let for_files = clients
        .iter()
        .map(|client| Connection::new(client.local, client.peer));
    let for_locks = node.lock_connections.list();
    let own = |connection: &Connection| {
        let mut listen = listen.iter();
        listen.any(|address| address.to_canonical() == connection.local().ip())
    };
    for_files.chain(for_locks).filter(own).collect()
}

/// What is to be told: which connections came, seen in both of two looks, and which are gone, seen
/// in neither. Not more than the state has room for, nor than a command may have.
fn difference(
    looks: [&BTreeSet<Connection>; 2],
    known: &OrdSet<Connection>,
    may_forget: bool,
) -> (Vec<Connection>, Vec<Connection>) {
    let [before, open] = looks;
    let is_gone = |connection: &&Connection| {
        may_forget && !open.contains(connection) && !before.contains(connection)
    };
    let went: Vec<_> = known.iter().filter(is_gone).take(CHANGES_MAX).collect();
    let room = (CONNECTIONS_MAX + went.len()).saturating_sub(known.len());
    let is_new = |connection: &&Connection| !known.contains(*connection);
    let came = before.intersection(open).filter(is_new);
    let came = came.take(room.min(CHANGES_MAX)).copied().collect();
    (came, went.into_iter().copied().collect())
}

/// How often open connections are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// How long clients of the last epoch may take to come back before they are forgotten: if this node
/// dies as well before they did, the next one has to wake them.
const FORGET_AFTER: Duration = Duration::from_secs(10);
/// How many connections of each kind a command has: some 20 kB, so that no lock waits long behind
/// it.
const CHANGES_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(port: u16) -> Connection {
        let ends = [(1, 2049), (7, port)];
        let [local, peer] = ends.map(|(host, port)| ([127, 0, 0, host], port).into());
        Connection::new(local, peer)
    }

    fn connections<T: FromIterator<Connection>>(ports: impl IntoIterator<Item = u16>) -> T {
        ports.into_iter().map(connection).collect()
    }

    /// The ports that came and that went.
    fn ports_of(
        before: &[u16],
        open: &[u16],
        known: &[u16],
        may_forget: bool,
    ) -> (Vec<u16>, Vec<u16>) {
        let looks = [before, open].map(|ports| connections(ports.iter().copied()));
        let known = connections(known.iter().copied());
        let (came, went) = difference([&looks[0], &looks[1]], &known, may_forget);
        let ports = |connections: Vec<Connection>| {
            let ports = connections
                .iter()
                .map(|connection| connection.peer().port());
            ports.collect()
        };
        (ports(came), ports(went))
    }

    #[test]
    fn what_two_looks_see_came_and_what_neither_sees_is_gone() {
        assert_eq!(ports_of(&[], &[1], &[], true), (vec![], vec![]));
        assert_eq!(ports_of(&[1], &[], &[], true), (vec![], vec![]));
        assert_eq!(ports_of(&[1, 2], &[2, 3], &[], true), (vec![2], vec![]));
        assert_eq!(ports_of(&[1], &[], &[1], true), (vec![], vec![]));
        assert_eq!(ports_of(&[], &[1], &[1], true), (vec![], vec![]));
        let told = ports_of(&[2, 3], &[2, 3], &[1, 2], true);
        assert_eq!(told, (vec![3], vec![1]));
        assert_eq!(ports_of(&[2, 3], &[2, 3], &[2, 3], true), (vec![], vec![]));
    }

    #[test]
    fn after_a_takeover_those_who_are_not_back_yet_are_not_forgotten() {
        assert_eq!(ports_of(&[], &[], &[1, 2], false), (vec![], vec![]));
        assert_eq!(ports_of(&[3], &[3], &[1, 2], false), (vec![3], vec![]));
        assert_eq!(ports_of(&[3], &[3], &[1, 2], true), (vec![3], vec![1, 2]));
    }

    #[test]
    fn a_command_has_its_bound_and_the_rest_follows() {
        let open: BTreeSet<_> = connections(1..=2500);
        let known: OrdSet<_> = connections(3001..=5500);
        let (came, went) = difference([&open, &open], &known, true);
        assert_eq!(came, connections::<Vec<_>>(1..=1000));
        assert_eq!(went, connections::<Vec<_>>(3001..=4000));
    }

    /// Otherwise the same would be proposed again and again.
    #[test]
    fn what_the_state_has_no_room_for_is_not_told() {
        let known: Vec<_> = connections(1..=20_000);
        let known = OrdSet::from(known);
        assert_eq!(known.len(), CONNECTIONS_MAX);
        let open: BTreeSet<_> = connections(1..=20_010);
        assert_eq!(difference([&open, &open], &known, true), (vec![], vec![]));
        let open: BTreeSet<_> = connections(3..=20_010);
        let (came, went) = difference([&open, &open], &known, true);
        assert_eq!(came, connections::<Vec<_>>(20_001..=20_002));
        assert_eq!(went, connections::<Vec<_>>(1..=2));
    }
}
