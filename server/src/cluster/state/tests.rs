//! Who may serve, told as what the log says.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod addresses;
mod forgetting;

use super::*;
use crate::cluster::command::{Activation, ServiceCommand};
use crate::cluster::definition::{Definition, InForce, ServiceAddress, Undefined};
use crate::cluster::members::HandleSecret;
use crate::cluster::mounts::Mount;

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

fn definition(name: &str, ip: [u8; 4]) -> Definition {
    Definition {
        names: vec![name.into()],
        addresses: vec![ServiceAddress {
            ip: ip.into(),
            prefix: Some(24),
        }],
        exports: vec!["/srv *(rw)".into()],
    }
}

fn define(story: &mut Story, service: u32, expected_version: u64, new: Definition) -> Outcome {
    let define = ClusterCommand::Define {
        service: ServiceId(service),
        expected_version,
        definition: new,
    };
    story.tell(1, 1, define)
}

#[test]
fn a_service_is_defined_by_who_knew_what_it_was_and_addresses_are_of_one_service() {
    let mut story = Story::new();
    story.tell(1, 1, ClusterCommand::Name { name: "b".into() });
    let [one, two] = [[192, 0, 2, 1], [192, 0, 2, 2]];
    assert_eq!(
        define(&mut story, 1, 0, definition("a", one)),
        Outcome::Defined(1)
    );
    let before = story.state.service(SERVICE).unwrap().clone();
    let refused = Outcome::NotDefined(Undefined::OtherVersion(1));
    assert_eq!(define(&mut story, 1, 0, definition("x", two)), refused);
    let refused = Outcome::NotDefined(Undefined::AddressTaken {
        ip: one.into(),
        by: "a".into(),
    });
    assert_eq!(define(&mut story, 2, 0, definition("b", one)), refused);
    assert_eq!(*story.state.service(SERVICE).unwrap(), before);
    assert_eq!(
        define(&mut story, 2, 0, definition("b", two)),
        Outcome::Defined(1)
    );
    assert_eq!(
        define(&mut story, 1, 1, definition("a2", one)),
        Outcome::Defined(2)
    );
    let unknown = define(&mut story, 9, 0, definition("c", [192, 0, 2, 3]));
    assert_eq!(unknown, Outcome::NoSuchService);
}

/// What version 4 brought of services.
#[test]
fn definitions_mounts_and_lenience_come_back() {
    let mut story = Story::new();
    story.assign((1, 1, 1), 0, None);
    define(&mut story, 1, 0, definition("a", [192, 0, 2, 1]));
    let mount = Mount {
        host: [192, 0, 2, 9].into(),
        path: b"/srv".as_slice().into(),
    };
    let in_force = InForce {
        version: 1,
        refused: false,
        said: "1 exports in force".into(),
    };
    for command in [
        ServiceCommand::SetReclaims {
            epoch: 1,
            lenient: true,
        },
        ServiceCommand::Mounts {
            epoch: 1,
            came: vec![mount.clone()],
            went: Vec::new(),
        },
        ServiceCommand::InForce { epoch: 1, in_force },
    ] {
        let command = Command::Service(SERVICE, command);
        let encoded = Command::decode(&command.encode());
        assert_eq!(encoded, Ok(command.clone()));
        let outcome = story.state.apply(&Origin::default(), &command);
        assert_eq!(outcome, Some(Outcome::Done));
    }
    let service = story.state.service(SERVICE).unwrap();
    assert!(service.table().is_lenient() && service.mounts().contains(&mount));
    assert_eq!(service.in_force().version, service.version());
    let bytes = written(&story.state);
    let again = ClusterState::read(&mut bytes.as_slice()).unwrap();
    assert_eq!(again, story.state);
}

/// What was written when members, names, addresses and exports were for good: the nodes, the
/// numbers, a service, no writers, no locks, handles and connections.
#[test]
fn a_state_of_version_3_is_read() {
    let mut bytes = vec![WRITERS_VERSION];
    let out = &mut bytes;
    let mut buffer = Vec::new();
    write_end(out).unwrap();
    write_row(out, &mut buffer, &Numbers::default()).unwrap();
    write_row(out, &mut buffer, &SERVICE).unwrap();
    // Name, epoch, NSM state, node 1 in its life 9, wanted on node 2, complete since epoch 1.
    let row = [1, b'a', 3, 14, 1, 1, 9, 1, 2, 0, 1];
    out.extend([&[11, 0, 0, 0], &row[..]].concat());
    write_row(out, &mut buffer, &vec![NodeId(2)]).unwrap();
    for _ in ["locks", "handles", "connections", "services"] {
        write_end(out).unwrap();
    }
    let state = ClusterState::read(&mut bytes.as_slice()).unwrap();
    let service = state.service(SERVICE).unwrap();
    assert_eq!((service.name(), service.epoch()), ("a", 3));
    assert_eq!(service.wish(), Wish::On(NodeId(2)));
    assert_eq!(service.unfenced().collect::<Vec<_>>(), [NodeId(2)]);
    assert_eq!((service.version(), service.mounts().len()), (0, 0));
    assert!(!service.table().is_lenient());
    assert_eq!(*state.members(), Members::default());
    let again = ClusterState::read(&mut written(&state).as_slice()).unwrap();
    assert_eq!(again, state);
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

fn members(command: MemberCommand) -> ClusterCommand {
    ClusterCommand::Members(command)
}

#[test]
fn who_is_retired_is_given_nothing_and_who_serves_is_not_retired() {
    let mut story = Story::new();
    story.assign((2, 1, 1), 0, None);
    let retire = || members(MemberCommand::Retire { node: NodeId(2) });
    assert_eq!(story.tell(1, 1, retire()), Outcome::StillServes(SERVICE));
    assert!(!story.state.members().is_retired(NodeId(2)));
    story.release(2, 1, 1);
    assert_eq!(story.tell(1, 1, retire()), Outcome::Done);
    // What it had proposed before it heard of it.
    assert_eq!(story.assign((2, 1, 2), 1, None), Outcome::NotAssigned);
    assert_eq!(story.assign((1, 1, 1), 1, None), Outcome::Assigned(2));
    assert_eq!(story.state.members().last_retired(), Some(NodeId(2)));
    let again = ClusterState::read(&mut written(&story.state).as_slice()).unwrap();
    assert_eq!(again, story.state);
}

#[test]
fn who_has_still_to_be_fenced_is_not_retired() {
    let mut story = Story::new();
    story.assign((1, 1, 1), 0, None);
    story.renew(1, 1, 2);
    let needs_fence = Command::Service(SERVICE, ServiceCommand::NeedsFence { epoch: 1 });
    story.state.apply(&Origin::default(), &needs_fence).unwrap();
    story.assign((2, 1, 1), 1, Some((1, 2)));
    let retire = || members(MemberCommand::Retire { node: NodeId(1) });
    assert_eq!(story.tell(2, 1, retire()), Outcome::AwaitsFence(SERVICE));
    assert!(!story.state.members().is_retired(NodeId(1)));
    let fenced = ServiceCommand::Fenced {
        epoch: 2,
        nodes: vec![NodeId(1)],
    };
    let fenced = Command::Service(SERVICE, fenced);
    story.state.apply(&Origin::default(), &fenced).unwrap();
    assert_eq!(story.tell(2, 1, retire()), Outcome::Done);
}

#[test]
fn a_survivor_has_what_the_lost_ones_had_with_grace_if_locks_may_be_missing() {
    for is_incomplete in [false, true] {
        let mut story = Story::new();
        story.assign((2, 1, 1), 0, None);
        let survivor = MemberCommand::SoleSurvivor {
            lost: vec![NodeId(2), NodeId(3)],
            is_incomplete,
        };
        story.tell(1, 1, members(survivor));
        let service = story.state.service(SERVICE).unwrap();
        assert_eq!(service.active(), None);
        assert_eq!(service.in_grace(), is_incomplete);
        assert_eq!(story.assign((3, 1, 1), 1, None), Outcome::NotAssigned);
        assert_eq!(story.assign((1, 1, 1), 1, None), Outcome::Assigned(2));
        // The log may not even know which services there were.
        let name = ClusterCommand::Name { name: "b".into() };
        let Outcome::Named(other) = story.tell(1, 1, name) else {
            panic!("it is named");
        };
        let service = story.state.service(other).unwrap();
        assert_eq!(service.in_grace(), is_incomplete);
    }
}

#[test]
fn the_first_node_brings_its_service_and_its_keys_along() {
    let mut story = Story::new();
    let key = |id, byte| HandleSecret {
        id,
        secret: [byte; 16],
    };
    let begin = |from: &str, to: &str, keys: &[HandleSecret]| {
        members(MemberCommand::Begin {
            renamed: Some((from.into(), to.into())),
            handle_keys: keys.to_vec(),
        })
    };
    story.tell(1, 1, begin("a", "alpha", &[key(1, 7)]));
    assert_eq!(story.state.service_named("alpha"), Some(SERVICE));
    // A key is never another one, and no service takes another's name.
    story.tell(1, 1, ClusterCommand::Name { name: "b".into() });
    story.tell(1, 1, begin("b", "alpha", &[key(1, 8), key(2, 9)]));
    assert_eq!(story.state.service_named("alpha"), Some(SERVICE));
    let keys = story.state.members().handle_keys();
    assert_eq!(keys, [key(1, 7), key(2, 9)]);
}

#[test]
fn what_nobody_is_to_serve_is_assigned_to_nobody_but_who_has_it() {
    let mut story = Story::new();
    let withdraw = || ClusterCommand::Withdraw { service: SERVICE };
    let to = NodeId(2);
    let go = || ClusterCommand::Move {
        service: SERVICE,
        to,
    };
    assert_eq!(story.assign((1, 1, 1), 0, None), Outcome::Assigned(1));
    assert_eq!(story.tell(2, 1, withdraw()), Outcome::Done);
    // Neither after the wait nor by a release.
    let refused = story.assign((2, 1, 1), 1, Some((1, 1)));
    assert_eq!(refused, Outcome::NotAssigned);
    assert_eq!(story.assign((1, 2, 1), 1, None), Outcome::Assigned(2));
    let wish = |story: &Story| story.state.service(SERVICE).unwrap().wish();
    assert_eq!(wish(&story), Wish::Nobody);
    let release = Release {
        service: SERVICE,
        epoch: 2,
        node: NodeId(1),
        incarnation: 2,
    };
    let outcome = story.tell(1, 2, ClusterCommand::Release(release));
    assert_eq!(outcome, Outcome::Done);
    assert_eq!(story.assign((1, 2, 2), 2, None), Outcome::NotAssigned);
    let again = ClusterState::read(&mut written(&story.state).as_slice()).unwrap();
    assert_eq!(again, story.state);
    assert_eq!(story.tell(1, 2, go()), Outcome::Done);
    assert_eq!(story.assign((2, 1, 2), 2, None), Outcome::Assigned(3));
    assert_eq!(wish(&story), Wish::Anywhere);
}

#[test]
fn a_service_goes_back_only_if_no_operator_has_put_it_where_it_is() {
    let mut story = Story::new();
    assert_eq!(story.assign((2, 1, 1), 0, None), Outcome::Assigned(1));
    let back = |epoch| ClusterCommand::GoBack {
        service: SERVICE,
        epoch,
        to: NodeId(1),
    };
    let service = |story: &Story| {
        let service = story.state.service(SERVICE).unwrap();
        (service.wish(), service.placed())
    };
    assert_eq!(story.tell(2, 1, back(0)), Outcome::EarlierEpoch);
    assert_eq!(story.tell(2, 1, back(1)), Outcome::Done);
    assert_eq!(service(&story), (Wish::On(NodeId(1)), None));
    // An operator's word is the last one.
    let to = NodeId(3);
    let go = ClusterCommand::Move {
        service: SERVICE,
        to,
    };
    story.tell(1, 1, go);
    assert_eq!(story.tell(2, 1, back(1)), Outcome::EarlierEpoch);
    let after = Some((1, 1));
    assert_eq!(story.assign((3, 1, 1), 1, after), Outcome::Assigned(2));
    assert_eq!(service(&story), (Wish::Anywhere, Some(to)));
    // Also after a restart of the node, until another one has it.
    assert_eq!(story.assign((3, 2, 1), 2, None), Outcome::Assigned(3));
    assert_eq!(story.tell(3, 2, back(3)), Outcome::EarlierEpoch);
    let again = ClusterState::read(&mut written(&story.state).as_slice()).unwrap();
    assert_eq!(again, story.state);
    let after = Some((2, 1));
    assert_eq!(story.assign((2, 1, 2), 3, after), Outcome::Assigned(4));
    assert_eq!(service(&story), (Wish::Anywhere, None));
    assert_eq!(story.tell(2, 1, back(4)), Outcome::Done);
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
