//! Whose turn it is.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;
use crate::cluster::command::{Assign, Renewal, StorageNote};
use crate::cluster::{ClusterCommand, Command, Origin};

const SERVICE: ServiceId = ServiceId::FIRST;
const NODES: [NodeId; 3] = [NodeId(1), NodeId(2), NodeId(3)];

fn at(ms: u64) -> Moment {
    Moment(ms * 1_000_000)
}

fn apply(state: &mut ClusterState, command: ClusterCommand) {
    // From the time before there were queues: nothing here is about copies.
    state
        .apply(&Origin::default(), &Command::Cluster(command))
        .unwrap();
}

fn renewal(node: NodeId) -> Renewal {
    Renewal {
        node,
        incarnation: 1,
        seq: 1,
        lease_ms: 1200,
    }
}

/// All nodes live; `active` serves.
fn state(active: Option<NodeId>) -> ClusterState {
    let mut state = ClusterState::default();
    apply(&mut state, ClusterCommand::Name { name: "a".into() });
    let service = state.service_named("a").unwrap();
    for node in NODES {
        apply(&mut state, ClusterCommand::Renew(renewal(node)));
    }
    if let Some(node) = active {
        let assign = Assign {
            service,
            expected_epoch: 0,
            after: None,
            renewal: renewal(node),
            unix_seconds: 0,
            recover: false,
        };
        apply(&mut state, ClusterCommand::Assign(assign));
    }
    state
}

fn seen(ms: u64) -> Seen {
    Seen {
        id: renewal(NODES[0]).id(),
        at: at(ms),
    }
}

/// What node `me` thinks, when the active node 1 was seen at 1000 and the others at `others`.
fn turn(state: &ClusterState, me: u64, others: u64, now: u64) -> Turn {
    let seen = |node| Some(seen(if node == NODES[0] { 1000 } else { others }));
    let service = state.service_named("a").unwrap();
    View {
        state,
        service,
        me: NodeId(me),
        incarnation: 1,
        candidates: &NODES,
        preferred: None,
        seen,
        free_since: at(5000),
        joined: at(0),
        not_before: at(0),
        is_stale: false,
    }
    .turn(at(now))
}

#[test]
fn the_first_in_rank_waits_for_the_lease_and_the_next_gives_it_time() {
    let state = state(Some(NODES[0]));
    let over = 1000 + 1200 + 50;
    let mine = Turn::Mine {
        after: Some(renewal(NODES[0]).id()),
    };
    assert_eq!(turn(&state, 2, over, over - 1), Turn::NotBefore(at(over)));
    assert_eq!(turn(&state, 2, over, over), mine);
    assert_eq!(turn(&state, 3, over, over), Turn::NotBefore(at(over + 300)));
    assert_eq!(turn(&state, 3, over, over + 300), mine);
    // Node 2 is silent as well: it is not waited for.
    assert_eq!(turn(&state, 3, 900, over), mine);
}

/// What was seen is an earlier renewal than the last one, or none at all: nothing can be told of
/// the last one, and the wait begins now.
#[test]
fn a_renewal_that_was_not_seen_is_waited_for_in_full() {
    let state = state(Some(NODES[0]));
    let earlier = Seen {
        id: RenewalId {
            incarnation: 1,
            seq: 0,
        },
        at: at(0),
    };
    for seen in [None, Some(earlier)] {
        let view = View {
            state: &state,
            service: state.service_named("a").unwrap(),
            me: NODES[1],
            incarnation: 1,
            candidates: &NODES,
            preferred: None,
            seen: |_| seen,
            free_since: at(0),
            joined: at(0),
            not_before: at(0),
            is_stale: false,
        };
        assert_eq!(view.turn(at(9000)), Turn::NotBefore(at(9000 + 1250)));
    }
}

#[test]
fn who_has_it_leaves_it_and_its_next_life_takes_it_at_once() {
    let state = state(Some(NODES[0]));
    assert_eq!(turn(&state, 1, 1000, 9000), Turn::Nobodys);
    let service = state.service_named("a").unwrap();
    let view = View {
        state: &state,
        service,
        me: NODES[0],
        incarnation: 2,
        candidates: &NODES,
        preferred: Some(NODES[1]),
        seen: |_| Some(seen(1000)),
        free_since: at(0),
        joined: at(1000),
        not_before: at(0),
        is_stale: false,
    };
    assert_eq!(view.turn(at(1001)), Turn::Mine { after: None });
    let failed = View {
        not_before: at(2000),
        ..view
    };
    assert_eq!(failed.turn(at(1001)), Turn::NotBefore(at(2000)));
}

#[test]
fn a_free_service_goes_where_it_is_wanted_or_preferred() {
    let mut state = state(None);
    let free = |node: u64, state: &ClusterState, preferred| {
        View {
            state,
            service: SERVICE,
            me: NodeId(node),
            incarnation: 1,
            candidates: &NODES,
            preferred,
            seen: |_| Some(seen(4900)),
            free_since: at(5000),
            joined: at(4000),
            not_before: at(0),
            is_stale: false,
        }
        .turn(at(5000))
    };
    let mine = Turn::Mine { after: None };
    assert_eq!(free(1, &state, None), mine);
    assert_eq!(free(3, &state, None), Turn::NotBefore(at(5600)));
    // At the first start ever the preferred node is given time.
    assert_eq!(free(3, &state, Some(NODES[2])), mine);
    assert_eq!(free(1, &state, Some(NODES[2])), Turn::NotBefore(at(6300)));
    let wanted = ClusterCommand::Move {
        service: SERVICE,
        to: NODES[1],
    };
    apply(&mut state, wanted);
    assert_eq!(free(2, &state, None), mine);
    assert_eq!(free(1, &state, None), Turn::NotBefore(at(5300)));
}

#[test]
fn a_node_without_the_data_never_has_a_turn() {
    let state = state(None);
    let view = View {
        state: &state,
        service: SERVICE,
        me: NodeId(9),
        incarnation: 1,
        candidates: &NODES,
        preferred: None,
        seen: |_| None,
        free_since: at(0),
        joined: at(0),
        not_before: at(0),
        is_stale: false,
    };
    assert_eq!(view.turn(at(99_999)), Turn::Nobodys);
}

/// Who can bring the addresses goes first, and a service with old ones is better than none.
#[test]
fn a_node_with_old_addresses_lets_all_others_go_first() {
    let state = state(Some(NODES[0]));
    let over = 1000 + 1200 + 50;
    let turn = |me: u64, is_stale: bool, now: u64| {
        let seen = |node| Some(seen(if node == NODES[0] { 1000 } else { over }));
        View {
            state: &state,
            service: state.service_named("a").unwrap(),
            me: NodeId(me),
            incarnation: 1,
            candidates: &NODES,
            preferred: None,
            seen,
            free_since: at(5000),
            joined: at(0),
            not_before: at(0),
            is_stale,
        }
        .turn(at(now))
    };
    let mine = Turn::Mine {
        after: Some(renewal(NODES[0]).id()),
    };
    assert_eq!(turn(2, true, over), Turn::NotBefore(at(over + 3000)));
    assert_eq!(turn(3, false, over + 300), mine, "the next in rank");
    assert_eq!(turn(2, true, over + 3000), mine);
}

#[test]
fn who_has_said_that_its_storage_fails_comes_last_and_is_not_waited_for() {
    let mut state = state(None);
    let service = state.service_named("a").unwrap();
    let note = StorageNote {
        service,
        node: NODES[1],
        fails: true,
    };
    apply(&mut state, ClusterCommand::NoteStorage(note));
    let mine = Turn::Mine { after: None };
    // Nobody has had it since 5000; node 1 is not seen to live.
    assert_eq!(turn(&state, 1, 5000, 5000), mine);
    assert_eq!(turn(&state, 3, 5000, 5000), mine);
    let last = Turn::NotBefore(at(5000 + 3000));
    assert_eq!(turn(&state, 2, 5000, 5000), last);
}
