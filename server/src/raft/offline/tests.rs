//! Who may go on alone, and what is left of a repair that was cut short.

use std::collections::BTreeSet;

use super::*;
use crate::cluster::ServiceId;
use crate::raft::tests::{Node, folder};

fn membership(configs: &[&[u64]]) -> Membership {
    let configs: Vec<BTreeSet<u64>> = configs
        .iter()
        .map(|voters| voters.iter().copied().collect())
        .collect();
    let nodes: BTreeMap<u64, Member> = configs
        .iter()
        .flatten()
        .map(|node| {
            let name = format!("n{node}").into();
            let member = Member {
                name,
                ..Member::alone(*node)
            };
            (*node, member)
        })
        .collect();
    Membership::new(configs, nodes).unwrap_or_default()
}

fn judged(configs: &[&[u64]], fenced: &[&str]) -> Result<bool, String> {
    let fenced: Vec<String> = fenced.iter().map(|name| (*name).to_owned()).collect();
    judge(&membership(configs), 1, &fenced)
}

#[test]
fn all_others_must_be_named_and_of_two_nothing_is_missing() {
    assert_eq!(judged(&[&[1, 2]], &["n2"]), Ok(false));
    assert_eq!(judged(&[&[1, 2, 3]], &["n2", "n3"]), Ok(true));
    // One was being removed: it may have acknowledged what this one lacks.
    assert_eq!(judged(&[&[1, 2, 3], &[1, 2]], &["n2", "n3"]), Ok(true));
    assert_eq!(judged(&[&[1], &[1, 2]], &["n2"]), Ok(false));
    let error = judged(&[&[1, 2, 3]], &["n3"]).unwrap_err();
    assert!(error.contains("to be off: n2\n"), "{error}");
    assert!(error.contains("--i-fenced n2 --i-fenced n3`"), "{error}");
    assert!(
        judged(&[&[1, 2]], &["n2", "n4"])
            .unwrap_err()
            .contains("`n4`")
    );
    assert!(judged(&[&[1]], &[]).unwrap_err().contains("only voter"));
    assert!(
        judged(&[&[2, 3]], &["n2"])
            .unwrap_err()
            .contains("does not vote")
    );
}

const ADDRESS: ([u8; 4], u16) = ([127, 0, 0, 1], 7300);

/// A store of a server without a cluster, with a life behind it.
fn used() -> (tempfile::TempDir, std::path::PathBuf) {
    let (parent, dir) = folder();
    let node = Node::open(&dir).unwrap();
    node.activate(0, 5);
    node.close();
    (parent, dir)
}

fn whole(dir: &Path) -> Whole {
    run(dir, async |opened| Ok(Whole::read(opened).await?)).unwrap()
}

fn begin_as(dir: &Path, name: &str) -> Result<u64, OfflineError> {
    let command = MemberCommand::Begin {
        renamed: Some(("default".into(), name.into())),
        handle_keys: Vec::new(),
    };
    let commands = |state: &ClusterState| {
        // As it was before, also when it is said again.
        assert!(state.service_named("default").is_some());
        Ok(vec![Command::Cluster(ClusterCommand::Members(command))])
    };
    begin(dir, ("n1", SocketAddr::from(ADDRESS)), commands)
}

/// As if the process had died before it could write that it is done.
fn half_done(dir: &Path, before: Stored, pending: u64) {
    let pending = Some(pending);
    stored::write(dir, &Stored { pending, ..before }).unwrap();
    let error = Node::open(dir).err().unwrap();
    assert!(matches!(error, StoreError::HalfDone { .. }), "{error}");
}

#[test]
fn what_is_half_done_is_served_by_nobody_and_is_done_when_it_is_said_again() {
    let (_parent, dir) = used();
    let before = stored::read(&dir).unwrap().unwrap();
    let first = whole(&dir).first();
    begin_as(&dir, "alpha").unwrap();
    half_done(&dir, before.clone(), first);
    begin_as(&dir, "alpha").unwrap();
    let after = whole(&dir);
    assert_eq!(after.state.services().count(), 1);
    let id = after.state.service_named("alpha");
    assert_eq!(id, Some(ServiceId::FIRST));
    // It becomes one of two, and the other one is lost.
    let two = membership(&[&[1, 2]]);
    let mut members: BTreeMap<u64, Member> = two
        .nodes()
        .map(|(node, member)| (*node, member.clone()))
        .collect();
    let store_id = before.store_id;
    members.insert(
        1,
        Member {
            store_id,
            ..members[&1].clone()
        },
    );
    let forced = async |opened: &mut Opened| {
        let whole = Whole::read(opened).await?;
        whole.force(opened, 1, &members, Vec::new()).await
    };
    run(&dir, forced).unwrap();
    let before = stored::read(&dir).unwrap().unwrap();
    let first = whole(&dir).first();
    let survive = || survive(&dir, &["n2".to_owned()], true);
    let survived = survive().unwrap();
    assert_eq!((survived.generation, survived.is_incomplete), (1, false));
    half_done(&dir, before, first);
    assert_eq!(survive().unwrap(), survived);
    let stored = stored::read(&dir).unwrap().unwrap();
    assert_eq!(stored.pending, None);
    assert_eq!(stored.formed.map(|formed| formed.generation), Some(1));
    let after = whole(&dir);
    assert!(after.membership.voter_ids().eq([1]));
    assert!(after.state.members().is_retired(NodeId(2)));
}
