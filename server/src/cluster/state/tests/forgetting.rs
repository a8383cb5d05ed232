//! When a service may be forgotten, and that nothing of it comes back.

use super::*;

fn forget(story: &mut Story, after: Option<(u64, u64)>) -> Outcome {
    let after = after.map(|(incarnation, seq)| RenewalId { incarnation, seq });
    let service = SERVICE;
    story.tell(3, 1, ClusterCommand::Forget { service, after })
}

#[test]
fn what_somebody_has_is_not_forgotten() {
    let mut story = Story::new();
    story.assign((1, 1, 1), 0, None);
    let refused = Outcome::StillServes(SERVICE);
    for after in [None, Some((1, 2))] {
        assert_eq!(forget(&mut story, after), refused);
    }
    story.renew(1, 1, 2);
    assert_eq!(forget(&mut story, Some((1, 1))), refused, "renewed since");
    assert_eq!(forget(&mut story, Some((1, 2))), Outcome::Done);

    // Its node is in a later life.
    let mut story = Story::new();
    story.assign((1, 1, 1), 0, None);
    story.renew(1, 2, 1);
    assert_eq!(forget(&mut story, None), Outcome::Done);
}

#[test]
fn what_a_lost_node_may_still_write_to_is_not_forgotten() {
    let mut story = Story::new();
    story.assign((1, 1, 1), 0, None);
    let of_service = |story: &mut Story, command| {
        let command = Command::Service(SERVICE, command);
        story.state.apply(&Origin::default(), &command).unwrap()
    };
    of_service(&mut story, ServiceCommand::NeedsFence { epoch: 1 });
    story.assign((2, 1, 1), 1, Some((1, 1)));
    story.release(2, 1, 2);
    assert_eq!(forget(&mut story, None), Outcome::AwaitsFence(SERVICE));
    let fenced = |epoch, node| ServiceCommand::Fenced {
        epoch,
        nodes: vec![NodeId(node)],
    };
    of_service(&mut story, fenced(2, 1));
    // Also if it is the one that had it last, and while that one is not known to be off.
    story.assign((2, 1, 2), 2, None);
    of_service(&mut story, ServiceCommand::NeedsFence { epoch: 3 });
    story.renew(2, 2, 1);
    for _ in 0..2 {
        assert_eq!(forget(&mut story, None), Outcome::AwaitsFence(SERVICE));
    }
    let service = story.state.service(SERVICE).unwrap();
    assert_eq!(service.unfenced().collect::<Vec<_>>(), [NodeId(2)]);
    of_service(&mut story, fenced(3, 2));
    assert_eq!(forget(&mut story, None), Outcome::Done);
}

#[test]
fn its_id_is_not_given_again_and_its_address_and_name_are_free() {
    let ip = [192, 0, 2, 1];
    let mut story = Story::new();
    assert_eq!(
        define(&mut story, 1, 0, definition("a", ip)),
        Outcome::Defined(1)
    );
    assert_eq!(forget(&mut story, None), Outcome::Done);
    assert_eq!(forget(&mut story, None), Outcome::NoSuchService);
    assert_eq!(story.state.services().count(), 0);
    let bytes = written(&story.state);
    story.state = ClusterState::read(&mut bytes.as_slice()).unwrap();
    // What comes late for it.
    assert_eq!(story.assign((1, 1, 1), 0, None), Outcome::NoSuchService);
    let release = story.release(1, 1, 0);
    assert_eq!(release, Outcome::NoSuchService);
    let name = ClusterCommand::Name { name: "a".into() };
    assert_eq!(story.tell(1, 1, name), Outcome::Named(ServiceId(2)));
    assert_eq!(
        define(&mut story, 2, 0, definition("b", ip)),
        Outcome::Defined(1)
    );
    let retire = ClusterCommand::Members(MemberCommand::Retire { node: NodeId(1) });
    assert_eq!(story.tell(1, 1, retire), Outcome::Done);
}
