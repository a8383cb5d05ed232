//! The steps of a service's life on a node, as they follow from what the log says.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;
use crate::cluster::command::{Assign, Release, Renewal, StorageNote};
use crate::cluster::{ClusterCommand, ClusterState, Command, Origin, ServiceId};

const NODES: [NodeId; 2] = [NodeId(1), NodeId(2)];

fn at(ms: u64) -> Moment {
    Moment(ms * 1_000_000)
}

fn renewal(node: u64) -> Renewal {
    Renewal {
        node: NodeId(node),
        incarnation: 1,
        seq: 1,
        lease_ms: 1200,
    }
}

/// Node 1, a log, and when node 2 was seen last.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent thing that a node can know"
)]
struct Scene {
    state: ClusterState,
    reconciler: Reconciler,
    /// Which renewal of the other node was seen last, and when.
    other_seen: Option<(u64, Moment)>,
    lease: Moment,
    is_reachable: bool,
    storage_works: bool,
    hangs_unseen: bool,
    may_be_up: bool,
}

impl Scene {
    fn new() -> Self {
        let mut scene = Self {
            state: ClusterState::default(),
            reconciler: Reconciler::default(),
            other_seen: Some((1, Moment::default())),
            lease: Moment::default(),
            is_reachable: true,
            storage_works: true,
            hangs_unseen: false,
            may_be_up: false,
        };
        scene.log(ClusterCommand::Name { name: "a".into() });
        scene.log(ClusterCommand::Renew(renewal(2)));
        scene
    }

    fn log(&mut self, command: ClusterCommand) {
        let command = Command::Cluster(command);
        // From the time before there were queues: nothing here is about copies.
        self.state.apply(&Origin::default(), &command).unwrap();
    }

    fn assign(&mut self, node: u64, expected_epoch: u32, after: Option<RenewalId>) {
        self.log(ClusterCommand::Assign(Assign {
            service: self.service(),
            expected_epoch,
            after,
            renewal: renewal(node),
            unix_seconds: 0,
            recover: false,
        }));
    }

    fn release(&mut self, epoch: u32) {
        self.log(ClusterCommand::Release(Release {
            service: self.service(),
            epoch,
            node: NODES[0],
            incarnation: 1,
        }));
        self.reconciler.released();
    }

    /// A node says whether its storage fails.
    fn note(&mut self, node: NodeId, fails: bool) {
        self.log(ClusterCommand::NoteStorage(StorageNote {
            service: self.service(),
            node,
            fails,
        }));
    }

    fn service(&self) -> ServiceId {
        self.state.service_named("a").unwrap()
    }

    fn poll(&mut self, ms: u64) -> Step {
        let other = self.other_seen.map(|(seq, at)| Seen {
            id: RenewalId {
                incarnation: 1,
                seq,
            },
            at,
        });
        let sight = Sight {
            view: View {
                state: &self.state,
                service: self.service(),
                me: NODES[0],
                incarnation: 1,
                candidates: &NODES,
                preferred: None,
                seen: |node| other.filter(|_| node == NODES[1]),
                free_since: Moment::default(),
                joined: Moment::default(),
                not_before: Moment::default(),
                is_stale: false,
            },
            joined: Some(at(0)),
            lease: self.lease,
            is_alone: false,
            is_reachable: self.is_reachable,
            storage_works: self.storage_works,
            hangs_unseen: self.hangs_unseen,
            may_be_up: self.may_be_up,
            fail_back: None,
        };
        self.reconciler.poll(at(ms), sight)
    }

    /// Takes and opens the service in epoch 1, with a lease until 1200.
    fn serving() -> Self {
        let mut scene = Self::new();
        let take = Step::Take {
            expected_epoch: 0,
            after: None,
        };
        assert_eq!(scene.poll(5000), take);
        scene.assign(1, 0, None);
        scene.reconciler.taken(Some(1));
        scene.lease = at(6200);
        assert_eq!(scene.poll(5001), Step::Open { epoch: 1 });
        scene.reconciler.opened(at(5002), true);
        assert_eq!(scene.poll(5003), Step::Wait(at(6003)));
        scene
    }
}

#[test]
fn without_a_lease_it_is_silent_and_with_one_it_speaks_in_the_same_epoch() {
    let mut scene = Scene::serving();
    assert_eq!(scene.poll(6199), Step::Wait(at(6200)));
    assert_eq!(scene.poll(6200), Step::Silence);
    scene.reconciler.speaks(false);
    assert_eq!(scene.poll(6300), Step::Wait(at(6320)));
    scene.lease = at(7500);
    assert_eq!(scene.poll(6320), Step::Speak);
    scene.reconciler.speaks(true);
    assert_eq!(scene.poll(6330), Step::Wait(at(7330)));
}

#[test]
fn what_another_node_has_is_dropped_also_before_it_was_opened() {
    let mut scene = Scene::serving();
    scene.assign(2, 1, Some(renewal(1).id()));
    assert_eq!(scene.poll(6000), Step::Drop);
    scene.reconciler.dropped();
    scene.other_seen = Some((1, at(5990)));
    assert!(matches!(scene.poll(6001), Step::Wait(_)));
    let mut scene = Scene::new();
    scene.assign(1, 0, None);
    scene.reconciler.taken(Some(1));
    scene.assign(2, 1, Some(renewal(1).id()));
    assert_eq!(scene.poll(1), Step::Drop);
}

#[test]
fn a_move_stops_first_and_releases_then() {
    let mut scene = Scene::serving();
    let (service, to) = (scene.service(), NODES[1]);
    scene.log(ClusterCommand::Move { service, to });
    // Node 2 does not live: it could not take it.
    assert!(matches!(scene.poll(5500), Step::Wait(_)));
    scene.other_seen = Some((1, at(5400)));
    assert_eq!(scene.poll(5500), Step::Stop(Why::Moved(to)));
    scene.reconciler.stopped();
    // Whatever the lease says: it never serves in that epoch again.
    assert_eq!(scene.poll(5501), Step::Release { epoch: 1 });
    scene.log(ClusterCommand::Release(Release {
        service,
        epoch: 1,
        node: NODES[0],
        incarnation: 1,
    }));
    scene.reconciler.released();
    // The other one is given time; if it does not come, this node takes it again.
    assert_eq!(scene.poll(5600), Step::Wait(at(5900)));
    let take = Step::Take {
        expected_epoch: 1,
        after: None,
    };
    assert_eq!(scene.poll(5900), take);
}

#[test]
fn a_release_that_got_lost_is_followed_by_a_higher_epoch() {
    let mut scene = Scene::serving();
    scene.reconciler.stopped();
    assert_eq!(scene.poll(5501), Step::Release { epoch: 1 });
    scene.reconciler.released();
    // The log still gives it to this life, which serves nothing: it is begun anew.
    let take = Step::Take {
        expected_epoch: 1,
        after: None,
    };
    assert_eq!(scene.poll(5600), take);
}

#[test]
fn what_cannot_be_opened_is_released_and_left_to_others_for_longer_each_time() {
    let mut scene = Scene::new();
    let mut now = 5000;
    for (round, pause) in [1000, 2000, 4000].into_iter().enumerate() {
        let epoch = round as u32 + 1;
        scene.assign(1, round as u32, None);
        scene.reconciler.taken(Some(epoch));
        scene.lease = at(now + 1200);
        assert_eq!(scene.poll(now), Step::Open { epoch });
        scene.reconciler.opened(at(now), false);
        assert_eq!(scene.poll(now), Step::Release { epoch });
        let service = scene.service();
        scene.log(ClusterCommand::Release(Release {
            service,
            epoch,
            node: NODES[0],
            incarnation: 1,
        }));
        scene.reconciler.released();
        assert!(matches!(scene.poll(now + pause - 1), Step::Wait(_)));
        now += pause;
        assert!(matches!(scene.poll(now), Step::Take { .. }));
    }
}

#[test]
fn a_node_that_clients_can_not_reach_gives_it_away_and_takes_nothing() {
    let mut scene = Scene::serving();
    scene.is_reachable = false;
    scene.other_seen = Some((1, at(5000)));
    assert_eq!(scene.poll(5100), Step::Stop(Why::Unreachable));
    scene.reconciler.stopped();
    assert_eq!(scene.poll(5101), Step::Release { epoch: 1 });
    let service = scene.service();
    scene.log(ClusterCommand::Release(Release {
        service,
        epoch: 1,
        node: NODES[0],
        incarnation: 1,
    }));
    scene.reconciler.released();
    assert_eq!(scene.poll(9000), Step::Wait(at(10_000)));
    scene.is_reachable = true;
    assert!(matches!(scene.poll(9001), Step::Take { .. }));
}

#[test]
fn what_an_earlier_life_had_is_given_back_by_a_node_that_clients_can_not_reach() {
    let mut scene = Scene::new();
    // Another life than that of the scene.
    let mut earlier = renewal(1);
    earlier.incarnation = 0;
    scene.log(ClusterCommand::Assign(Assign {
        service: scene.service(),
        expected_epoch: 0,
        after: None,
        renewal: earlier,
        unix_seconds: 0,
        recover: false,
    }));
    scene.is_reachable = false;
    scene.other_seen = Some((1, at(5000)));
    let take = Step::Take {
        expected_epoch: 1,
        after: None,
    };
    assert_eq!(scene.poll(5100), take);
    scene.assign(1, 1, None);
    scene.reconciler.taken(Some(2));
    scene.lease = at(6300);
    // Nothing is opened, and nobody fenced.
    assert_eq!(scene.poll(5101), Step::Stop(Why::Unreachable));
    scene.reconciler.stopped();
    assert_eq!(scene.poll(5102), Step::Release { epoch: 2 });
}

#[test]
fn without_a_cable_a_node_whose_storage_failed_once_is_worth_a_try() {
    let mut scene = Scene::serving();
    scene.note(NODES[1], true);
    scene.is_reachable = false;
    scene.other_seen = Some((1, at(5000)));
    assert_eq!(scene.poll(5100), Step::Stop(Why::Unreachable));
}

#[test]
fn with_nobody_to_give_it_to_it_stays_in_silence_until_the_cable_is_back() {
    let mut scene = Scene::serving();
    scene.is_reachable = false;
    assert_eq!(scene.poll(8000), Step::Silence);
    scene.reconciler.speaks(false);
    scene.lease = at(9500);
    assert_eq!(scene.poll(8300), Step::Wait(at(8320)));
    scene.is_reachable = true;
    assert_eq!(scene.poll(8400), Step::Speak);
}

#[test]
fn what_is_assigned_is_not_opened_without_a_cable_if_there_is_nobody_else() {
    let mut scene = Scene::new();
    scene.assign(1, 0, None);
    scene.reconciler.taken(Some(1));
    scene.lease = at(9000);
    scene.is_reachable = false;
    assert_eq!(scene.poll(8000), Step::Wait(at(8020)));
    scene.is_reachable = true;
    assert_eq!(scene.poll(8020), Step::Open { epoch: 1 });
}

#[test]
fn at_the_end_it_stops_releases_and_ends() {
    let mut scene = Scene::serving();
    scene.reconciler.end();
    assert_eq!(scene.poll(5100), Step::Stop(Why::Ends));
    scene.reconciler.stopped();
    assert_eq!(scene.poll(5101), Step::Release { epoch: 1 });
    scene.reconciler.released();
    assert_eq!(scene.poll(5102), Step::End);
}

#[test]
fn at_the_end_what_was_not_opened_yet_is_released() {
    let mut scene = Scene::new();
    scene.assign(1, 0, None);
    scene.reconciler.taken(Some(1));
    scene.reconciler.end();
    assert_eq!(scene.poll(1), Step::Release { epoch: 1 });
    scene.reconciler.released();
    assert_eq!(scene.poll(2), Step::End);
}

#[test]
fn nothing_is_opened_without_a_lease() {
    let mut scene = Scene::new();
    scene.assign(1, 0, None);
    scene.reconciler.taken(Some(1));
    scene.lease = at(5000);
    assert_eq!(scene.poll(5000), Step::Wait(at(5020)));
    scene.lease = at(6000);
    assert_eq!(scene.poll(5020), Step::Open { epoch: 1 });
}

#[test]
fn a_move_is_obeyed_also_while_it_is_not_open_yet() {
    let mut scene = Scene::new();
    scene.assign(1, 0, None);
    scene.reconciler.taken(Some(1));
    scene.lease = at(6200);
    assert_eq!(scene.poll(5001), Step::Open { epoch: 1 });
    let (service, to) = (scene.service(), NODES[1]);
    scene.log(ClusterCommand::Move { service, to });
    // Node 2 does not live.
    assert_eq!(scene.poll(5500), Step::Open { epoch: 1 });
    scene.other_seen = Some((1, at(5400)));
    assert_eq!(scene.poll(5500), Step::Stop(Why::Moved(to)));
    scene.reconciler.stopped();
    assert_eq!(scene.poll(5501), Step::Release { epoch: 1 });
}

#[test]
fn what_may_be_up_is_let_go_before_anything_else_unless_it_is_its_own() {
    let mut scene = Scene::new();
    scene.may_be_up = true;
    assert_eq!(scene.poll(5000), Step::LetGo);
    scene.may_be_up = false;
    assert!(matches!(scene.poll(5000), Step::Take { .. }));
    // Another node has it, and this one could not let it go when it lost it.
    let mut scene = Scene::serving();
    scene.may_be_up = true;
    assert_eq!(scene.poll(5100), Step::Wait(at(6100)));
    scene.assign(2, 1, Some(renewal(1).id()));
    assert_eq!(scene.poll(6000), Step::Drop);
    scene.reconciler.dropped();
    assert_eq!(scene.poll(6001), Step::LetGo);
    scene.reconciler.end();
    assert_eq!(scene.poll(6001), Step::End);
    // An earlier life of this node has it.
    let mut scene = Scene::new();
    scene.may_be_up = true;
    scene.log(ClusterCommand::Assign(Assign {
        service: scene.service(),
        expected_epoch: 0,
        after: None,
        renewal: Renewal {
            incarnation: 0,
            ..renewal(1)
        },
        unix_seconds: 0,
        recover: false,
    }));
    assert!(matches!(scene.poll(5000), Step::Take { .. }));
}

#[test]
fn a_node_whose_storage_fails_gives_it_away_and_takes_it_when_the_storage_works_again() {
    let mut scene = Scene::serving();
    scene.storage_works = false;
    scene.other_seen = Some((1, at(5000)));
    assert_eq!(scene.poll(5100), Step::Stop(Why::StorageFails));
    scene.reconciler.stopped();
    assert_eq!(scene.poll(5101), Step::Release { epoch: 1 });
    scene.release(1);
    // The other one does not come, and still it is not taken here.
    assert_eq!(scene.poll(9000), Step::Wait(at(10_000)));
    scene.storage_works = true;
    assert!(matches!(scene.poll(9001), Step::Take { .. }));
}

#[test]
fn it_is_not_taken_back_at_once_and_later_each_time_it_fails_soon() {
    let mut scene = Scene::serving();
    let mut now = 5100;
    for (round, pause) in [1000, 2000, 4000].into_iter().enumerate() {
        let epoch = round as u32 + 1;
        scene.storage_works = false;
        scene.other_seen = Some((1, at(now)));
        assert_eq!(scene.poll(now), Step::Stop(Why::StorageFails));
        scene.reconciler.stopped();
        assert_eq!(scene.poll(now), Step::Release { epoch });
        scene.release(epoch);
        scene.storage_works = true;
        assert!(matches!(scene.poll(now + pause - 1), Step::Wait(_)));
        now += pause;
        assert!(matches!(scene.poll(now), Step::Take { .. }));
        scene.assign(1, epoch, None);
        scene.reconciler.taken(Some(epoch + 1));
        scene.lease = at(now + 1200);
        assert_eq!(scene.poll(now), Step::Open { epoch: epoch + 1 });
        scene.reconciler.opened(at(now), true);
    }
    // A minute without a failure: it begins anew.
    now += 60_000;
    scene.storage_works = false;
    scene.other_seen = Some((1, at(now)));
    assert_eq!(scene.poll(now), Step::Stop(Why::StorageFails));
    scene.reconciler.stopped();
    scene.release(4);
    scene.storage_works = true;
    assert!(matches!(scene.poll(now + 999), Step::Wait(_)));
    assert!(matches!(scene.poll(now + 1000), Step::Take { .. }));
}

#[test]
fn where_the_storage_fails_for_all_it_stays_and_goes_on_to_answer() {
    let mut scene = Scene::serving();
    scene.storage_works = false;
    scene.other_seen = Some((1, at(5000)));
    scene.note(NODES[1], true);
    assert_eq!(scene.poll(5100), Step::Wait(at(6100)));
    // Nor is it moved there.
    let (service, to) = (scene.service(), NODES[1]);
    scene.log(ClusterCommand::Move { service, to });
    assert_eq!(scene.poll(5101), Step::Wait(at(6101)));
    scene.note(NODES[1], false);
    assert_eq!(scene.poll(5102), Step::Stop(Why::Moved(to)));
}

#[test]
fn what_hangs_is_not_given_to_nodes_that_cannot_know_whether_it_hangs_there() {
    let mut scene = Scene::serving();
    (scene.storage_works, scene.hangs_unseen) = (false, true);
    scene.other_seen = Some((1, at(5000)));
    assert_eq!(scene.poll(5100), Step::Wait(at(6100)));
    // It says that it is dead, or clients can't reach this node at all.
    scene.hangs_unseen = false;
    assert_eq!(scene.poll(5101), Step::Stop(Why::StorageFails));
    let mut scene = Scene::serving();
    (scene.storage_works, scene.hangs_unseen) = (false, true);
    (scene.is_reachable, scene.other_seen) = (false, Some((1, at(5000))));
    assert_eq!(scene.poll(5100), Step::Stop(Why::Unreachable));
}

#[test]
fn nobody_is_fenced_for_a_node_whose_storage_fails() {
    let mut scene = Scene::new();
    scene.assign(1, 0, None);
    scene.reconciler.taken(Some(1));
    scene.lease = at(6300);
    scene.storage_works = false;
    scene.other_seen = Some((1, at(5000)));
    assert_eq!(scene.poll(5101), Step::Stop(Why::StorageFails));
    // There is nobody else: it may work by now.
    scene.note(NODES[1], true);
    assert_eq!(scene.poll(5101), Step::Open { epoch: 1 });
}

/// Two nodes, on each of which the service opens and fails a moment later, and which believe at
/// once that their storage works again: as bad as it can be.
#[test]
fn two_nodes_do_not_pass_it_to_and_fro_in_a_tight_loop() {
    const FAILS_AFTER_MS: u64 = 50;
    let mut scene = Scene::new();
    scene.other_seen = Some((1, Moment::NEVER));
    let mut nodes = [Reconciler::default(), Reconciler::default()];
    let mut opened_at = [None; 2];
    for ms in 5000..25_000 {
        for n in 0..2 {
            let me = NODES[n];
            let renewal = renewal(me.0);
            let is_bad = opened_at[n].is_some_and(|opened| ms > opened + FAILS_AFTER_MS);
            let sight = Sight {
                view: View {
                    state: &scene.state,
                    service: scene.service(),
                    me,
                    incarnation: 1,
                    candidates: &NODES,
                    preferred: None,
                    seen: |_| {
                        let id = renewal.id();
                        Some(Seen { id, at: at(ms) })
                    },
                    free_since: Moment::default(),
                    joined: Moment::default(),
                    not_before: Moment::default(),
                    is_stale: false,
                },
                joined: Some(at(0)),
                lease: at(ms + 1200),
                is_alone: false,
                is_reachable: true,
                storage_works: !is_bad,
                hangs_unseen: false,
                fail_back: None,
                may_be_up: false,
            };
            match nodes[n].poll(at(ms), sight) {
                Step::Take { expected_epoch, .. } => {
                    scene.assign(me.0, expected_epoch, None);
                    nodes[n].taken(Some(expected_epoch + 1));
                }
                Step::Open { .. } => {
                    nodes[n].opened(at(ms), true);
                    opened_at[n] = Some(ms);
                }
                Step::Stop(why) => {
                    assert_eq!(why, Why::StorageFails);
                    opened_at[n] = None;
                    nodes[n].stopped();
                }
                Step::Release { epoch } => {
                    let service = scene.service();
                    scene.log(ClusterCommand::Release(Release {
                        service,
                        epoch,
                        node: me,
                        incarnation: 1,
                    }));
                    nodes[n].released();
                }
                step => assert!(matches!(step, Step::Wait(_)), "{step:?}"),
            }
        }
    }
    let service = scene.state.service(scene.service()).unwrap();
    // Five pauses of each node: 1, 2, 4, 8 and the rest of 20 seconds.
    assert!((4..=10).contains(&service.epoch()), "{}", service.epoch());
}

#[test]
fn what_nobody_is_to_serve_is_stopped_released_and_left_alone() {
    let mut scene = Scene::serving();
    let service = scene.service();
    scene.log(ClusterCommand::Withdraw { service });
    // Whether there is another one to take it does not matter.
    assert_eq!(scene.poll(5500), Step::Stop(Why::Withdrawn));
    scene.reconciler.stopped();
    assert_eq!(scene.poll(5501), Step::Release { epoch: 1 });
    scene.log(ClusterCommand::Release(Release {
        service,
        epoch: 1,
        node: NODES[0],
        incarnation: 1,
    }));
    scene.reconciler.released();
    assert_eq!(scene.poll(9000), Step::Wait(at(10_000)));
    // The end of the process changes nothing.
    scene.reconciler.end();
    assert_eq!(scene.poll(9001), Step::End);
    scene.reconciler = Reconciler::default();
    assert_eq!(scene.poll(20_000), Step::Wait(at(21_000)));
    // The one that is wanted has its turn first, also after a long time.
    let to = NODES[1];
    scene.other_seen = Some((1, at(20_000)));
    scene.log(ClusterCommand::Move { service, to });
    assert_eq!(scene.poll(20_001), Step::Wait(at(20_301)));
    let to = NODES[0];
    scene.log(ClusterCommand::Move { service, to });
    let take = Step::Take {
        expected_epoch: 1,
        after: None,
    };
    assert_eq!(scene.poll(20_002), take);
}

#[test]
fn what_an_earlier_life_did_not_release_is_let_go_taken_and_released() {
    let mut scene = Scene::new();
    let service = scene.service();
    let earlier = Renewal {
        incarnation: 0,
        ..renewal(1)
    };
    scene.log(ClusterCommand::Assign(Assign {
        service,
        expected_epoch: 0,
        after: None,
        renewal: earlier,
        unix_seconds: 0,
        recover: false,
    }));
    scene.log(ClusterCommand::Withdraw { service });
    scene.may_be_up = true;
    assert_eq!(scene.poll(5000), Step::LetGo);
    scene.may_be_up = false;
    let take = Step::Take {
        expected_epoch: 1,
        after: None,
    };
    assert_eq!(scene.poll(5001), take);
    scene.assign(1, 1, None);
    scene.reconciler.taken(Some(2));
    scene.lease = at(6200);
    // Nothing is opened, and nobody fenced.
    assert_eq!(scene.poll(5002), Step::Stop(Why::Withdrawn));
    scene.reconciler.stopped();
    assert_eq!(scene.poll(5003), Step::Release { epoch: 2 });
}
