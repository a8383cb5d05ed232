//! Who may serve, told as what the log says.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;
use crate::cluster::command::{Activation, ServiceCommand};

const SERVICE: ServiceId = ServiceId::FIRST;

/// A log, and what it makes.
#[derive(Default)]
struct Story {
    state: ClusterState,
    numbers: BTreeMap<(u64, u64), u64>,
}

impl Story {
    fn new() -> Self {
        let mut story = Self::default();
        let name = ClusterCommand::Name { name: "a".into() };
        assert_eq!(story.tell(1, 1, name), Outcome::Named(SERVICE));
        story
    }

    /// The next entry of a life of a node.
    fn origin(&mut self, node: u64, incarnation: u64) -> Origin {
        let number = self.numbers.entry((node, incarnation)).or_default();
        *number += 1;
        Origin {
            node: NodeId(node),
            incarnation,
            queue: Queue::Leases,
            number: *number,
        }
    }

    fn tell(&mut self, node: u64, incarnation: u64, command: ClusterCommand) -> Outcome {
        let origin = self.origin(node, incarnation);
        self.state
            .apply(&origin, &Command::Cluster(command))
            .unwrap()
    }

    fn renew(&mut self, node: u64, incarnation: u64, seq: u64) -> Outcome {
        self.tell(
            node,
            incarnation,
            ClusterCommand::Renew(renewal(node, incarnation, seq)),
        )
    }

    fn assign(
        &mut self,
        (node, incarnation, seq): (u64, u64, u64),
        epoch: u32,
        after: Option<(u64, u64)>,
    ) -> Outcome {
        let assign = Assign {
            service: SERVICE,
            expected_epoch: epoch,
            after: after.map(|(incarnation, seq)| RenewalId { incarnation, seq }),
            renewal: renewal(node, incarnation, seq),
            unix_seconds: 0,
            recover: false,
        };
        self.tell(node, incarnation, ClusterCommand::Assign(assign))
    }

    fn release(&mut self, node: u64, incarnation: u64, epoch: u32) -> Outcome {
        let release = Release {
            service: SERVICE,
            epoch,
            node: NodeId(node),
            incarnation,
        };
        self.tell(node, incarnation, ClusterCommand::Release(release))
    }

    fn active(&self) -> Option<(u64, u64)> {
        let active = self.state.service(SERVICE).unwrap().active()?;
        Some((active.node.0, active.incarnation))
    }
}

const fn renewal(node: u64, incarnation: u64, seq: u64) -> Renewal {
    Renewal {
        node: NodeId(node),
        incarnation,
        seq,
        lease_ms: 1200,
    }
}

#[test]
fn an_assignment_is_void_if_the_active_node_renewed_since() {
    let mut story = Story::new();
    assert_eq!(story.assign((1, 1, 1), 0, None), Outcome::Assigned(1));
    assert_eq!(story.renew(1, 1, 2), Outcome::Renewed(vec![(SERVICE, 1)]));
    for after in [None, Some((1, 1)), Some((2, 2))] {
        assert_eq!(story.assign((2, 1, 1), 1, after), Outcome::NotAssigned);
    }
    assert_eq!(
        story.assign((2, 1, 2), 1, Some((1, 2))),
        Outcome::Assigned(2)
    );
    // What the old one renews now is not for the service.
    assert_eq!(story.renew(1, 1, 3), Outcome::Renewed(vec![]));
    assert_eq!(story.renew(2, 1, 3), Outcome::Renewed(vec![(SERVICE, 2)]));
}

#[test]
fn of_two_assignments_one_is_valid() {
    let mut story = Story::new();
    story.assign((1, 1, 1), 0, None);
    assert_eq!(
        story.assign((2, 1, 1), 1, Some((1, 1))),
        Outcome::Assigned(2)
    );
    assert_eq!(
        story.assign((3, 1, 1), 1, Some((1, 1))),
        Outcome::NotAssigned
    );
    assert_eq!(story.active(), Some((2, 1)));
}

#[test]
fn an_assignment_is_itself_a_renewal_that_others_wait_for() {
    let mut story = Story::new();
    story.assign((1, 1, 1), 0, None);
    assert_eq!(story.assign((2, 1, 1), 1, None), Outcome::NotAssigned);
    assert_eq!(
        story.assign((2, 1, 2), 1, Some((1, 1))),
        Outcome::Assigned(2)
    );
}

#[test]
fn a_released_service_is_taken_without_waiting_and_late_releases_do_nothing() {
    let mut story = Story::new();
    story.assign((1, 1, 1), 0, None);
    assert_eq!(story.release(2, 1, 1), Outcome::EarlierEpoch);
    assert_eq!(story.release(1, 1, 1), Outcome::Done);
    assert_eq!(story.active(), None);
    // The move is aborted: the old node takes it again, with a higher epoch.
    assert_eq!(story.assign((1, 1, 2), 1, None), Outcome::Assigned(2));
    assert_eq!(story.release(1, 1, 1), Outcome::EarlierEpoch);
    assert_eq!(story.active(), Some((1, 1)));
    // And an assignment that counted on the first release is late as well.
    assert_eq!(story.assign((2, 1, 1), 1, None), Outcome::NotAssigned);
}

#[test]
fn a_node_takes_what_its_earlier_life_had_and_the_earlier_life_is_over() {
    let mut story = Story::new();
    story.assign((1, 1, 1), 0, None);
    assert_eq!(story.assign((1, 2, 1), 1, None), Outcome::Assigned(2));
    let late = Origin {
        node: NodeId(1),
        incarnation: 1,
        queue: Queue::Leases,
        number: 99,
    };
    let renew = Command::Cluster(ClusterCommand::Renew(renewal(1, 1, 9)));
    assert_eq!(story.state.apply(&late, &renew), None);
    assert_eq!(story.active(), Some((1, 2)));
}

#[test]
fn copies_of_a_proposal_do_nothing() {
    let mut story = Story::new();
    let origin = story.origin(1, 1);
    let name = Command::Cluster(ClusterCommand::Name { name: "b".into() });
    assert!(story.state.apply(&origin, &name).is_some());
    let before = story.state.clone();
    assert_eq!(story.state.apply(&origin, &name), None);
    assert_eq!(story.state, before);
    // The other queue has numbers of its own.
    let other = Origin {
        queue: Queue::Calls,
        number: 1,
        ..origin
    };
    assert!(story.state.apply(&other, &name).is_some());
    // One that comes without those before it waits for them: all are sent again.
    let next = |number| Origin { number, ..origin };
    assert_eq!(story.state.apply(&next(4), &name), None);
    assert!(story.state.apply(&next(3), &name).is_some());
    assert!(story.state.apply(&next(4), &name).is_some());
}

#[test]
fn services_are_named_once_and_apart() {
    let mut story = Story::new();
    for (name, id) in [("a", 1), ("b", 2), ("a", 1), ("c", 3)] {
        let name = ClusterCommand::Name { name: name.into() };
        assert_eq!(story.tell(1, 1, name), Outcome::Named(ServiceId(id)));
    }
    let unknown = Command::Service(ServiceId(9), ServiceCommand::EndGrace { epoch: 0, now: 0 });
    let origin = story.origin(1, 1);
    assert_eq!(
        story.state.apply(&origin, &unknown),
        Some(Outcome::NoSuchService)
    );
}

fn written(state: &ClusterState) -> Vec<u8> {
    let mut bytes = Vec::new();
    state.write(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_state_comes_back_and_damaged_and_newer_ones_are_refused() {
    let mut story = Story::new();
    story.assign((1, 1, 1), 0, None);
    story.tell(2, 1, ClusterCommand::Name { name: "b".into() });
    story.tell(
        2,
        1,
        ClusterCommand::Move {
            service: SERVICE,
            to: NodeId(2),
        },
    );
    story.renew(1, 1, 2);
    let needs_fence = ServiceCommand::NeedsFence { epoch: 1 };
    let needs_fence = Command::Service(SERVICE, needs_fence);
    story.state.apply(&Origin::default(), &needs_fence).unwrap();
    story.assign((2, 1, 1), 1, Some((1, 2)));
    let service = story.state.service(SERVICE).unwrap();
    assert!(service.unfenced().eq([NodeId(1)]));
    let mut bytes = written(&story.state);
    assert_eq!(
        ClusterState::read(&mut bytes.as_slice()).unwrap(),
        story.state
    );
    for cut in 0..bytes.len() {
        assert!(ClusterState::read(&mut &bytes[..cut]).is_err(), "{cut}");
    }
    bytes[0] = VERSION + 1;
    let error = ClusterState::read(&mut bytes.as_slice()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
}

/// What one node wrote: a version, what was known of its service, no locks.
#[test]
fn the_state_of_one_node_becomes_its_first_service() {
    // Epoch, NSM state, incarnation, complete, since epoch.
    let row = [3, 14, 9, 0, 1];
    let bytes = [&[LONE_VERSION, 5, 0, 0, 0], &row[..], &[0, 0, 0, 0]].concat();
    let state = ClusterState::read(&mut bytes.as_slice()).unwrap();
    let service = state.service(SERVICE).unwrap();
    assert_eq!((service.epoch(), service.nsm_state().0), (3, 7));
    assert_eq!(service.name(), LONE_NAME);
    assert_eq!(service.active().unwrap().node, NodeId::LONE);
}

/// What was written when nobody was fenced: the nodes, the numbers, a service, no locks.
#[test]
fn a_state_without_fences_and_connections_is_read() {
    let mut bytes = vec![EARLIER_VERSION];
    let out = &mut bytes;
    let mut buffer = Vec::new();
    write_end(out).unwrap();
    write_row(out, &mut buffer, &Numbers::default()).unwrap();
    write_row(out, &mut buffer, &SERVICE).unwrap();
    // Name, epoch, NSM state, node 1 in its life 9, wanted nowhere, complete since epoch 1.
    let row = [1, b'a', 3, 14, 1, 1, 9, 0, 0, 1];
    out.extend([&[10, 0, 0, 0], &row[..]].concat());
    for _ in ["locks", "handles", "services"] {
        write_end(out).unwrap();
    }
    let state = ClusterState::read(&mut bytes.as_slice()).unwrap();
    let service = state.service(SERVICE).unwrap();
    assert_eq!((service.name(), service.epoch()), ("a", 3));
    assert_eq!(service.active().unwrap().node, NodeId(1));
    assert_eq!(service.unfenced().count(), 0);
    let again = ClusterState::read(&mut written(&state).as_slice()).unwrap();
    assert_eq!(again, state);
}

/// What was written before nodes told of their storage and handed replies over.
#[test]
fn a_state_of_version_3_is_read() {
    let mut story = Story::new();
    story.assign((1, 1, 1), 0, None);
    let mut bytes = written(&story.state);
    let before = story.state.clone();
    // The last three rows are: nobody fails, replies for no epoch, and no further service.
    let new = [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    let end = [0, 0, 0, 0];
    assert!(bytes.ends_with(&[&new[..], &end[..]].concat()));
    bytes.truncate(bytes.len() - new.len() - end.len());
    bytes.extend(end);
    bytes[0] = 3;
    assert_eq!(ClusterState::read(&mut bytes.as_slice()).unwrap(), before);
}

#[test]
fn who_says_that_its_storage_fails_is_noted_until_it_says_otherwise() {
    let mut story = Story::new();
    let mut note = |node, fails| {
        let node = NodeId(node);
        let note = ClusterCommand::NoteStorage(StorageNote {
            service: SERVICE,
            node,
            fails,
        });
        assert_eq!(story.tell(node.0, 1, note), Outcome::Done);
        let read = ClusterState::read(&mut written(&story.state).as_slice()).unwrap();
        assert_eq!(read, story.state);
        story.state.service(SERVICE).unwrap().failing().to_vec()
    };
    assert_eq!(note(1, true), [NodeId(1)]);
    assert_eq!(note(1, true), [NodeId(1)]);
    assert_eq!(note(2, true), [NodeId(1), NodeId(2)]);
    assert_eq!(note(1, false), [NodeId(2)]);
}

#[test]
fn a_log_of_one_node_goes_on() {
    let mut state = ClusterState::default();
    let activation = Activation {
        incarnation: 77,
        unix_seconds: 0,
        recover: false,
    };
    let activate = Command::Service(SERVICE, ServiceCommand::Activate(activation));
    let outcome = state.apply(&Origin::default(), &activate);
    assert_eq!(outcome, Some(Outcome::Assigned(1)));
    let mut story = Story {
        state,
        ..Story::default()
    };
    assert_eq!(story.assign((1, 1, 1), 1, None), Outcome::Assigned(2));
}
