//! When a service goes back.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;
use crate::cluster::command::{Assign, Renewal};
use crate::cluster::definition::{Definition, ServiceAddress};
use crate::cluster::service::running::{RunningNote, Runs};
use crate::cluster::{ClusterCommand, ClusterState, Command, Origin, ServiceId};

const SERVICE: ServiceId = ServiceId::FIRST;
/// The preferred one, and the one that looks.
const NODES: [NodeId; 2] = [NodeId(1), NodeId(2)];
const AFTER: Duration = Duration::from_mins(1);

fn at(seconds: u64) -> Moment {
    Moment(seconds * 1_000_000_000)
}

struct Scene {
    state: ClusterState,
    fail_back: FailBack,
    /// Which life of the preferred node, and when its last renewal was seen.
    seen: (u64, Moment),
}

impl Scene {
    /// Node 2 serves.
    fn new() -> Self {
        let mut scene = Self {
            state: ClusterState::default(),
            fail_back: FailBack::default(),
            seen: (1, Moment::default()),
        };
        scene.log(ClusterCommand::Name { name: "a".into() });
        scene.assign(NODES[1]);
        scene
    }

    fn log(&mut self, command: ClusterCommand) {
        let command = Command::Cluster(command);
        self.state.apply(&Origin::default(), &command).unwrap();
    }

    fn renewal(&self, node: NodeId) -> Renewal {
        Renewal {
            node,
            incarnation: if node == NODES[0] { self.seen.0 } else { 1 },
            seq: 1,
            lease_ms: 1200,
        }
    }

    fn assign(&mut self, node: NodeId) {
        let service = self.state.service(SERVICE).unwrap();
        let after = service.active().map(|active| active.node);
        let after = after.and_then(|node| self.state.last_renewal(node));
        let assign = Assign {
            service: SERVICE,
            expected_epoch: service.epoch(),
            after: after.map(Renewal::id),
            renewal: self.renewal(node),
            unix_seconds: 0,
            recover: false,
        };
        let before = service.epoch();
        self.log(ClusterCommand::Assign(assign));
        assert_eq!(self.state.service(SERVICE).unwrap().epoch(), before + 1);
    }

    /// The preferred node renews its lease in one of its lives.
    fn lives(&mut self, life: u64, seconds: u64) {
        self.seen = (life, at(seconds));
        let renewal = self.renewal(NODES[0]);
        self.log(ClusterCommand::Renew(renewal));
    }

    fn look(&mut self, seconds: u64) -> Return {
        let (incarnation, seen_at) = self.seen;
        let view = View {
            state: &self.state,
            service: SERVICE,
            me: NODES[1],
            incarnation: 1,
            candidates: &NODES,
            preferred: Some(NODES[0]),
            seen: |_| {
                let seq = 1;
                Some(Seen {
                    id: crate::cluster::command::RenewalId { incarnation, seq },
                    at: seen_at,
                })
            },
            free_since: Moment::default(),
            joined: Moment::default(),
            not_before: Moment::default(),
            is_stale: false,
        };
        self.fail_back.observe(at(seconds), &view, AFTER);
        self.fail_back.turn(at(seconds), &view, AFTER)
    }

    fn go_back(&mut self) {
        let epoch = self.state.service(SERVICE).unwrap().epoch();
        self.log(ClusterCommand::GoBack {
            service: SERVICE,
            epoch,
            to: NODES[0],
        });
    }
}

#[test]
fn it_goes_back_when_the_preferred_node_has_lived_for_long_enough() {
    let mut scene = Scene::new();
    assert_eq!(scene.look(1000), Return::No);
    scene.lives(1, 1000);
    assert_eq!(scene.look(1000), Return::NotBefore(at(1060)));
    scene.lives(1, 1059);
    assert_eq!(scene.look(1059), Return::NotBefore(at(1060)));
    scene.lives(1, 1060);
    assert_eq!(scene.look(1060), Return::Now(NODES[0]));
}

#[test]
fn a_break_or_a_restart_begins_the_wait_anew() {
    let mut scene = Scene::new();
    scene.lives(1, 1000);
    scene.look(1000);
    assert_eq!(scene.look(1030), Return::No);
    scene.lives(1, 1040);
    assert_eq!(scene.look(1040), Return::NotBefore(at(1100)));
    // Too fast for its lease to end.
    scene.lives(2, 1041);
    assert_eq!(scene.look(1041), Return::NotBefore(at(1101)));
}

#[test]
fn where_an_operator_has_put_it_it_stays_until_that_node_is_lost() {
    let mut scene = Scene::new();
    scene.lives(1, 1000);
    scene.look(1000);
    let to = NODES[1];
    scene.log(ClusterCommand::Move {
        service: SERVICE,
        to,
    });
    scene.assign(NODES[1]);
    scene.lives(1, 2000);
    assert_eq!(scene.look(2000), Return::No);
    scene.log(ClusterCommand::Withdraw { service: SERVICE });
    assert_eq!(scene.look(2000), Return::No);
}

#[test]
fn who_fails_is_left_alone_for_longer_each_time_and_for_an_hour_at_most() {
    let mut scene = Scene::new();
    let mut now = 1000;
    for pause in [120, 240, 480, 960, 1920, 3600, 3600] {
        scene.lives(1, now);
        scene.look(now);
        scene.go_back();
        // It has it for a moment, which may not be seen.
        assert_eq!(scene.look(now), Return::No);
        scene.assign(NODES[0]);
        let is_seen = pause > 240;
        if is_seen {
            scene.look(now);
        }
        scene.assign(NODES[1]);
        let next = now + pause;
        assert_eq!(scene.look(now), Return::NotBefore(at(next)));
        now = next;
    }
    scene.lives(1, now);
    assert!(matches!(
        scene.look(now),
        Return::NotBefore(_) | Return::Now(_)
    ));
    // It keeps it for long: that is forgotten.
    scene.go_back();
    scene.look(now);
    scene.assign(NODES[0]);
    scene.lives(1, now);
    scene.look(now);
    scene.lives(1, now + 601);
    scene.look(now + 601);
    scene.assign(NODES[1]);
    scene.look(now + 602);
    scene.lives(1, now + 700);
    scene.look(now + 700);
    scene.lives(1, now + 760);
    assert_eq!(scene.look(now + 760), Return::Now(NODES[0]));
}

#[test]
fn what_was_asked_in_vain_is_not_asked_again_at_once() {
    let mut scene = Scene::new();
    scene.lives(1, 1000);
    scene.look(1000);
    scene.lives(1, 1060);
    assert_eq!(scene.look(1060), Return::Now(NODES[0]));
    scene.fail_back.asked(at(1060));
    assert_eq!(scene.look(1060), Return::NotBefore(at(1065)));
}

/// A node that is to be restarted for the addresses of the service is not given it.
#[test]
fn it_does_not_go_back_to_a_node_with_other_addresses() {
    let mut scene = Scene::new();
    let runs = |incarnation, last: u8| {
        let ip = [192, 0, 2, last].into();
        let addresses = vec![ServiceAddress { ip, prefix: None }];
        let node = NODES[0];
        ClusterCommand::NoteRunning(RunningNote {
            service: SERVICE,
            runs: Runs {
                node,
                incarnation,
                addresses,
            },
        })
    };
    scene.log(ClusterCommand::Define {
        service: SERVICE,
        expected_version: 0,
        definition: Definition {
            addresses: vec![ServiceAddress {
                ip: [192, 0, 2, 2].into(),
                prefix: None,
            }],
            ..Definition::default()
        },
    });
    scene.log(runs(1, 1));
    scene.lives(1, 1000);
    assert_eq!(scene.look(1000), Return::No);
    scene.lives(1, 1100);
    assert_eq!(scene.look(1100), Return::No);
    scene.log(runs(2, 2));
    scene.lives(2, 1200);
    assert_eq!(scene.look(1200), Return::NotBefore(at(1260)));
}
