//! What activations, epochs and grace do to locks, and that a state survives being written.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::io;
use std::net::IpAddr;

use havenfs_nlm::host::{CallDigest, HostKey};
use havenfs_nlm::keys::{FileKey, LockOwner};
use havenfs_nlm::range::ByteRange;
use havenfs_nlm::table::{LockOutcome, LockRequest};

use super::connections::CONNECTIONS_MAX;
use super::*;
use crate::cluster::command::Notice;
use crate::cluster::state::VERSION;

fn activate(unix_seconds: u64) -> ServiceCommand {
    ServiceCommand::Activate(Activation {
        incarnation: unix_seconds,
        unix_seconds,
        recover: false,
    })
}

fn lock(epoch: u32, call: u64, host: u8, range: (u64, u64)) -> ServiceCommand {
    lock_or_reclaim(epoch, call, host, range, false)
}

fn lock_or_reclaim(
    epoch: u32,
    call: u64,
    host: u8,
    range: (u64, u64),
    reclaim: bool,
) -> ServiceCommand {
    ServiceCommand::Call(LockCall {
        epoch,
        host: HostKey {
            service_address: IpAddr::from([127, 0, 0, 1]),
            address: IpAddr::from([127, 0, 0, host]),
            caller_name: b"host".as_slice().into(),
        },
        call: CallDigest(call),
        now: 5,
        action: LockAction::Lock(LockRequest {
            file: FileKey(b"file".as_slice().into()),
            owner: LockOwner {
                svid: 1,
                oh: b"1@host".as_slice().into(),
            },
            range: ByteRange::new(range.0, range.1).unwrap(),
            exclusive: true,
            callback: None,
            nsm_state: 3,
            monitored: true,
            reclaim,
        }),
    })
}

fn copy_of(state: &ServiceState) -> io::Result<ServiceState> {
    let mut bytes = Vec::new();
    state.write(&mut bytes)?;
    ServiceState::read(&mut bytes.as_slice(), VERSION)
}

#[test]
fn each_activation_raises_epoch_and_nsm_state() {
    let mut state = ServiceState::default();
    for (seconds, epoch, nsm_state) in [(1000, 1, 1001), (1000, 2, 1003), (500, 3, 1005)] {
        assert_eq!(state.apply(&activate(seconds)), Outcome::Assigned(epoch));
        assert_eq!((state.epoch(), state.nsm_state().0), (epoch, nsm_state));
    }
}

#[test]
fn what_was_accepted_in_an_earlier_epoch_changes_nothing() {
    let mut state = ServiceState::default();
    state.apply(&activate(1));
    let granted = Outcome::Lock(LockOutcome::Granted);
    assert_eq!(state.apply(&lock(1, 1, 1, (0, 9))), granted);
    state.apply(&activate(2));
    let before = state.clone();
    for epoch in [0, 1, 3] {
        assert_eq!(
            state.apply(&lock(epoch, 2, 1, (10, 19))),
            Outcome::EarlierEpoch
        );
    }
    assert_eq!(state, before);
    let denied = Outcome::Lock(LockOutcome::Denied);
    assert_eq!(state.apply(&lock(2, 3, 2, (9, 9))), denied);
}

#[test]
fn with_a_complete_table_nothing_waits() {
    let mut state = ServiceState::default();
    state.apply(&activate(1));
    state.apply(&lock(1, 1, 1, (0, 9)));
    state.apply(&activate(2));
    assert!(!state.in_grace());
    let outcome = |outcome| Outcome::Lock(outcome);
    let reclaim = lock_or_reclaim(2, 2, 1, (0, 9), true);
    assert_eq!(state.apply(&reclaim), outcome(LockOutcome::Granted));
    let new = lock(2, 3, 2, (10, 19));
    assert_eq!(state.apply(&new), outcome(LockOutcome::Granted));
    let unknown = lock_or_reclaim(2, 4, 3, (100, 109), true);
    assert_eq!(
        state.apply(&unknown),
        outcome(LockOutcome::Denied),
        "nobody had it"
    );
    let conflicting = lock_or_reclaim(2, 5, 3, (0, 0), true);
    assert_eq!(state.apply(&conflicting), outcome(LockOutcome::Denied));
    assert_eq!(
        state.apply(&ServiceCommand::EndGrace { epoch: 2, now: 0 }),
        Outcome::Done
    );
    assert_eq!(state.table().lock_count(), 2);
}

#[test]
fn with_an_incomplete_table_only_reclaims_are_granted_until_grace_ends() {
    let mut state = ServiceState::default();
    state.apply(&activate(1));
    for host in 1..=2 {
        state.apply(&lock(
            1,
            1,
            host,
            (u64::from(host) * 100, u64::from(host) * 100 + 9),
        ));
    }
    state.apply(&ServiceCommand::Activate(Activation {
        incarnation: 2,
        unix_seconds: 2,
        recover: true,
    }));
    assert_eq!(state.apply(&lock(2, 2, 3, (500, 509))), Outcome::Grace);
    let granted = Outcome::Lock(LockOutcome::Granted);
    for (host, range) in [(1, (100, 109)), (4, (300, 309))] {
        let reclaim = lock_or_reclaim(2, 3, host, range, true);
        assert_eq!(state.apply(&reclaim), granted, "known or not");
    }
    // A crash neither ends grace nor what was reclaimed before it.
    state.apply(&activate(3));
    assert!(state.in_grace());
    let Outcome::Freed(freed) = state.apply(&ServiceCommand::EndGrace { epoch: 3, now: 9 }) else {
        panic!("grace was on");
    };
    assert_eq!(freed.locks, 1, "host 2 did not reclaim");
    let complete = Completeness::Complete { since_epoch: 3 };
    assert_eq!(state.completeness(), complete);
    assert_eq!(state.apply(&lock(3, 4, 3, (200, 209))), granted);
    let too_late = lock_or_reclaim(3, 5, 2, (200, 200), true);
    let denied = Outcome::Lock(LockOutcome::Denied);
    assert_eq!(state.apply(&too_late), denied);
}

#[test]
fn a_snapshot_and_the_rest_of_the_log_make_the_same_state() {
    let log: Vec<ServiceCommand> = (0..200)
        .map(|number: u64| match number % 40 {
            0 => activate(number),
            _ => lock(
                u32::try_from(number / 40 + 1).unwrap(),
                number,
                u8::try_from(number % 5).unwrap(),
                (number % 13 * 10, number % 13 * 10 + number % 7),
            ),
        })
        .collect();
    let mut whole = ServiceState::default();
    for (at, command) in log.iter().enumerate() {
        if at % 17 == 0 {
            let mut again = copy_of(&whole).unwrap();
            assert_eq!(again, whole);
            for command in &log[at..] {
                again.apply(command);
            }
            let mut direct = whole.clone();
            for command in &log[at..] {
                direct.apply(command);
            }
            assert_eq!(again, direct);
        }
        whole.apply(command);
    }
    assert!(whole.table().lock_count() > 10);
}

/// A state that serves, with a lock of host 1.
fn locked() -> ServiceState {
    let mut state = ServiceState::default();
    state.apply(&activate(1000));
    state.apply(&lock(1, 1, 1, (0, 9)));
    state
}

const HOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

#[test]
fn a_doubtful_notice_marks_and_a_believed_one_ends() {
    let mut state = locked();
    let notice = |doubtful, state| {
        let (epoch, address, now) = (1, HOST, 6);
        let notice = Notice {
            epoch,
            address,
            mon_name: b"any".as_slice().into(),
            state,
            now,
        };
        if doubtful {
            ServiceCommand::DoubtfulNotice(notice)
        } else {
            ServiceCommand::Rebooted(notice)
        }
    };
    assert_eq!(state.losing(HOST, b"any", 5), [b"host".to_vec()]);
    assert_eq!(state.apply(&notice(true, 5)), Outcome::Suspected(1));
    assert_eq!(state.table().lock_count(), 1);
    let suspect = |state: &ServiceState| {
        let mut held = state.table().held_entries();
        held.all(|held| held.suspicion.is_some())
    };
    assert!(suspect(&state) && suspect(&copy_of(&state).unwrap()));
    assert!(state.losing(HOST, b"any", 5).is_empty());
    let outcome = state.apply(&notice(false, 7));
    assert!(matches!(outcome, Outcome::Freed(freed) if freed.locks == 1));
    assert!(state.losing(HOST, b"any", 9).is_empty());
}

#[test]
fn limits_and_refusals_are_part_of_the_state() {
    use havenfs_nlm::limits::{Limit, Limits};

    let mut state = locked();
    let mut limits = Limits::default();
    limits.set(Limit::Locks, 1);
    let set = ServiceCommand::SetLimits { epoch: 1, limits };
    assert_eq!(state.apply(&set), Outcome::Done);
    let too_many = Outcome::Lock(LockOutcome::TooMany(Limit::Locks));
    assert_eq!(state.apply(&lock(1, 2, 1, (20, 29))), too_many);
    let refusal = |refused| ServiceCommand::RefuseWrites {
        epoch: 1,
        address: HOST,
        file: None,
        refused,
    };
    assert_eq!(state.apply(&refusal(true)), Outcome::Refusals(1));
    let copy = copy_of(&state).unwrap();
    assert_eq!(copy, state);
    let file = FileKey(Box::default());
    assert!(copy.table().refuses_writes(HOST, Some(&file)));
    assert_eq!(copy.table().limits(), &limits);
    assert_eq!(state.apply(&refusal(false)), Outcome::Refusals(1));
    assert_eq!(state.apply(&refusal(false)), Outcome::Refusals(0));
}

#[test]
fn the_nsm_state_rises_without_a_new_epoch() {
    let mut state = locked();
    let raise = ServiceCommand::RaiseNsmState {
        epoch: 1,
        unix_seconds: 500,
    };
    assert_eq!(state.apply(&raise), Outcome::Done);
    assert_eq!((state.epoch(), state.nsm_state().0), (1, 1003));
    assert_eq!(state.table().lock_count(), 1);
    let expire = ServiceCommand::Expire {
        epoch: 1,
        address: HOST,
        now: 7,
    };
    let outcome = state.apply(&expire);
    assert!(matches!(outcome, Outcome::Freed(freed) if freed.locks == 1));
    assert_eq!(state.table().monitored_hosts(true).count(), 0);
}

/// The connection of a client with this number.
fn connection(number: u32) -> Connection {
    let client = IpAddr::from((0x0a00_0000 + number).to_be_bytes());
    Connection::new((HOST, 2049).into(), (client, 700).into())
}

fn connections(
    epoch: u32,
    came: impl IntoIterator<Item = u32>,
    went: impl IntoIterator<Item = u32>,
) -> ServiceCommand {
    ServiceCommand::Connections {
        epoch,
        came: came.into_iter().map(connection).collect(),
        went: went.into_iter().map(connection).collect(),
    }
}

fn numbers_of(state: &ServiceState) -> Vec<u32> {
    let peers = state.connections().iter().map(Connection::peer);
    peers
        .map(|peer| match peer.ip() {
            IpAddr::V4(address) => u32::from(address) - 0x0a00_0000,
            IpAddr::V6(_) => panic!("{peer}"),
        })
        .collect()
}

#[test]
fn connections_come_and_go_and_outlast_the_epoch() {
    let mut state = locked();
    assert_eq!(state.apply(&connections(1, [3, 1, 2], [])), Outcome::Done);
    assert_eq!(state.apply(&connections(1, [4], [2, 9])), Outcome::Done);
    // A copy changes nothing, nor does what comes and goes in one command.
    assert_eq!(state.apply(&connections(1, [4, 1], [1])), Outcome::Done);
    assert_eq!(numbers_of(&state), [1, 3, 4]);
    assert_eq!(copy_of(&state).unwrap(), state);
    state.apply(&activate(2));
    assert_eq!(numbers_of(&state), [1, 3, 4]);
    for epoch in [1, 3] {
        let late = connections(epoch, [5], [1]);
        assert_eq!(state.apply(&late), Outcome::EarlierEpoch);
    }
    assert_eq!(numbers_of(&state), [1, 3, 4]);
    assert_eq!(state.apply(&connections(2, [5], [1])), Outcome::Done);
    assert_eq!(numbers_of(&state), [3, 4, 5]);
}

#[test]
fn no_more_connections_are_kept_than_there_is_room_for() {
    let mut state = locked();
    let max = u32::try_from(CONNECTIONS_MAX).unwrap();
    for from in (0..max + 5000).step_by(1000) {
        state.apply(&connections(1, from..from + 1000, []));
    }
    assert_eq!(numbers_of(&state), (0..max).collect::<Vec<_>>());
    assert_eq!(copy_of(&state).unwrap(), state);
    // Who goes makes room for who comes.
    state.apply(&connections(1, [max, max + 1], [7]));
    assert_eq!(state.connections().len(), CONNECTIONS_MAX);
    assert!(state.connections().contains(&connection(max)));
}

#[test]
fn of_an_end_only_address_and_port_count() {
    use std::net::{Ipv6Addr, SocketAddrV6};

    let peer = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
    let of = |flow, scope| {
        let peer = SocketAddrV6::new(peer, 700, flow, scope);
        Connection::new((HOST, 2049).into(), peer.into())
    };
    assert_eq!(of(1, 2), of(3, 4));
    let mut state = locked();
    state.apply(&ServiceCommand::Connections {
        epoch: 1,
        came: vec![of(1, 2)],
        went: Vec::new(),
    });
    // What is written is what is there.
    assert_eq!(copy_of(&state).unwrap(), state);
    let mapped = Ipv6Addr::from([0, 0, 0, 0, 0, 0xffff, 0x7f00, 1]);
    let own = Connection::new((mapped, 2049).into(), (mapped, 700).into());
    assert_eq!(own.local(), (HOST, 2049).into());
    assert_eq!(own.peer(), (HOST, 700).into());
}

fn take(state: &mut ServiceState, node: u64) -> u32 {
    let active = Active {
        node: NodeId(node),
        incarnation: 1,
    };
    let Outcome::Assigned(epoch) = state.assign(active, 0, false) else {
        panic!("an assignment");
    };
    epoch
}

fn give_back(state: &mut ServiceState) {
    let (epoch, active) = (state.epoch(), state.active().unwrap());
    assert_eq!(state.release(epoch, active), Outcome::Done);
}

fn fenced(epoch: u32, nodes: &[u64]) -> ServiceCommand {
    ServiceCommand::Fenced {
        epoch,
        nodes: nodes.iter().map(|node| NodeId(*node)).collect(),
    }
}

/// The same by a node whose storage needs a fence.
fn take_with_fence(state: &mut ServiceState, node: u64) -> u32 {
    let epoch = take(state, node);
    let needs_fence = ServiceCommand::NeedsFence { epoch };
    assert_eq!(state.apply(&needs_fence), Outcome::Done);
    epoch
}

fn unfenced(state: &ServiceState) -> Vec<u64> {
    state.unfenced().map(|node| node.0).collect()
}

#[test]
fn who_loses_a_service_is_unfenced_until_a_fence_succeeds() {
    let mut state = ServiceState::default();
    take_with_fence(&mut state, 1);
    assert_eq!(unfenced(&state), [0; 0], "nobody had it");
    take_with_fence(&mut state, 1);
    assert_eq!(unfenced(&state), [0; 0], "its own earlier life");
    take_with_fence(&mut state, 2);
    assert_eq!(unfenced(&state), [1]);
    // It dies as well before its fence succeeds.
    let late = fenced(state.epoch(), &[1]);
    take_with_fence(&mut state, 3);
    assert_eq!(unfenced(&state), [1, 2]);
    assert_eq!(state.apply(&late), Outcome::EarlierEpoch);
    assert_eq!(copy_of(&state).unwrap(), state);
    let epoch = state.epoch();
    assert_eq!(state.apply(&fenced(epoch, &[2, 3, 7])), Outcome::Done);
    assert_eq!(unfenced(&state), [1]);
    assert_eq!(state.apply(&fenced(epoch, &[1])), Outcome::Done);
    assert_eq!(unfenced(&state), [0; 0]);
    take(&mut state, 1);
    assert_eq!(unfenced(&state), [3], "the active node can't be taken off");
}

#[test]
fn a_release_says_nothing_about_those_who_did_not_release() {
    let mut state = ServiceState::default();
    let epoch = take_with_fence(&mut state, 1);
    give_back(&mut state);
    let late = ServiceCommand::NeedsFence { epoch };
    assert_eq!(state.apply(&late), Outcome::Done);
    take_with_fence(&mut state, 2);
    assert_eq!(unfenced(&state), [0; 0], "it was released");
    take_with_fence(&mut state, 3);
    give_back(&mut state);
    assert_eq!(unfenced(&state), [2]);
    take_with_fence(&mut state, 1);
    assert_eq!(unfenced(&state), [2]);
}

#[test]
fn a_node_that_has_it_again_need_not_be_fenced_meanwhile() {
    let mut state = ServiceState::default();
    for node in [1, 2, 1] {
        take_with_fence(&mut state, node);
    }
    assert_eq!(unfenced(&state), [2]);
    take(&mut state, 2);
    assert_eq!(unfenced(&state), [1]);
    // It is lost before it could say anything; what its earlier life wrote may still be there.
    take(&mut state, 3);
    take(&mut state, 3);
    assert_eq!(unfenced(&state), [1, 2], "each once");
}

/// While the configuration changes from one kind of storage to the other, node by node.
#[test]
fn a_node_without_a_fence_is_not_fenced_and_takes_nobody_off_the_list() {
    let mut state = ServiceState::default();
    take(&mut state, 1);
    take(&mut state, 2);
    assert_eq!(unfenced(&state), [0; 0], "it had no fence");
    take_with_fence(&mut state, 3);
    assert_eq!(unfenced(&state), [0; 0]);
    take(&mut state, 1);
    assert_eq!(unfenced(&state), [3]);
    give_back(&mut state);
    take(&mut state, 2);
    assert_eq!(unfenced(&state), [3], "the next who has a fence runs it");
}
