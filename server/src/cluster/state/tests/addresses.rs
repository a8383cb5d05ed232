//! An address is one service's, whatever processes run with.

use super::*;
use crate::cluster::service::running::Runs;

const OTHER: ServiceId = ServiceId(2);
const X: [u8; 4] = [192, 0, 2, 1];
const Y: [u8; 4] = [192, 0, 2, 2];
const Z: [u8; 4] = [192, 0, 2, 3];

/// A node has started with an address.
fn runs(story: &mut Story, (node, incarnation): (u64, u64), service: ServiceId, ip: [u8; 4]) {
    let runs = Runs {
        node: NodeId(node),
        incarnation,
        addresses: definition("", ip).addresses,
    };
    let note = ClusterCommand::NoteRunning(RunningNote { service, runs });
    let encoded = Command::Cluster(note.clone()).encode();
    assert_eq!(
        Command::decode(&encoded),
        Ok(Command::Cluster(note.clone()))
    );
    assert_eq!(story.tell(node, incarnation, note), Outcome::Done);
}

fn defined(story: &mut Story, service: ServiceId, version: u64, ip: [u8; 4]) -> Outcome {
    define(story, service.0, version, definition("x", ip))
}

fn clash(story: &Story, node: u64) -> [Option<&str>; 2] {
    [SERVICE, OTHER].map(|service| {
        let other = story.state.clash(service, NodeId(node));
        other.map(ServiceState::name)
    })
}

/// `a` has X and `b` has Y on both nodes; node 1 serves `a`.
fn two_services() -> Story {
    let mut story = Story::new();
    story.tell(1, 1, ClusterCommand::Name { name: "b".into() });
    assert_eq!(defined(&mut story, SERVICE, 0, X), Outcome::Defined(1));
    assert_eq!(defined(&mut story, OTHER, 0, Y), Outcome::Defined(1));
    for node in [1, 2] {
        runs(&mut story, (node, 1), SERVICE, X);
        runs(&mut story, (node, 1), OTHER, Y);
    }
    assert_eq!(story.assign((1, 1, 1), 0, None), Outcome::Assigned(1));
    story
}

/// The restart of a cluster node by node, after one service got what another one had.
#[test]
fn an_address_goes_to_another_service_only_when_nobody_serves_with_it() {
    let mut story = two_services();
    assert_eq!(defined(&mut story, SERVICE, 1, Z), Outcome::Defined(2));
    let in_use = |node| {
        Outcome::NotDefined(Undefined::AddressInUse {
            ip: X.into(),
            by: "a".into(),
            node: NodeId(node),
        })
    };
    assert_eq!(defined(&mut story, OTHER, 1, X), in_use(1));
    // Another node that runs with the old one takes it.
    assert_eq!(
        story.assign((2, 1, 1), 1, Some((1, 1))),
        Outcome::Assigned(2)
    );
    assert_eq!(defined(&mut story, OTHER, 1, X), in_use(2));
    // It comes back with the new one. Node 1 still runs with the old one, and serves nothing.
    runs(&mut story, (2, 2), SERVICE, Z);
    runs(&mut story, (2, 2), OTHER, Y);
    assert_eq!(story.assign((2, 2, 1), 2, None), Outcome::Assigned(3));
    assert_eq!(defined(&mut story, OTHER, 1, X), Outcome::Defined(2));
    assert_eq!(clash(&story, 1), [Some("b"), None]);
    assert_eq!(clash(&story, 2), [None, None], "Y is nobody's now");
    let stale = |story: &Story, node| {
        let service = |id| story.state.service(id).unwrap();
        [SERVICE, OTHER].map(|id| service(id).is_stale_on(NodeId(node)))
    };
    assert_eq!(stale(&story, 1), [true, true]);
    assert_eq!(stale(&story, 2), [false, true]);
    runs(&mut story, (1, 2), SERVICE, Z);
    runs(&mut story, (1, 2), OTHER, X);
    assert_eq!(clash(&story, 1), [None, None]);
    assert_eq!(stale(&story, 1), [false, false]);
    let bytes = written(&story.state);
    let again = ClusterState::read(&mut bytes.as_slice()).unwrap();
    assert_eq!(again, story.state);
}

#[test]
fn what_is_wrong_with_a_definition_is_said_with_names_and_a_way_out() {
    let taken = Undefined::AddressTaken {
        ip: X.into(),
        by: "alhpa".into(),
    };
    let said = taken.told(|_| String::new());
    assert!(said.contains("hint: ") && said.contains("service forget alhpa"));
    let in_use = Undefined::AddressInUse {
        ip: X.into(),
        by: "a".into(),
        node: NodeId(2),
    };
    let said = in_use.told(|node| format!("n{}", node.0));
    assert!(said.contains("hint: restart node n2 first"), "{said}");
}
