//! Who founds, who joins, and who waits for what.

use std::sync::Arc;

use super::*;

fn configured(names: &[&str]) -> Vec<Configured> {
    let members = names.iter().map(|name| Configured {
        name: (*name).into(),
        address: address(name),
        witness: *name == "n3",
    });
    members.collect()
}

fn address(name: &str) -> SocketAddr {
    let last = name.bytes().last().unwrap() - b'0';
    SocketAddr::from(([127, 0, 0, last], 7300))
}

fn store_of(name: &str) -> u64 {
    u64::from(name.bytes().last().unwrap()) << 32
}

fn ready(name: &str) -> Hello {
    Hello {
        name: name.into(),
        store_id: store_of(name),
        standing: Standing::Unformed {
            empty: true,
            configured: Arc::from(configured(&["n1", "n2", "n3"])),
        },
    }
}

fn empty(name: &str) -> Answer {
    changed(name, |_| {})
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "a node that was asked may also be silent"
)]
fn changed(name: &str, change: impl FnOnce(&mut Hello)) -> Answer {
    let mut hello = ready(name);
    change(&mut hello);
    Ok(hello)
}

fn members() -> BTreeMap<u64, Member> {
    let members = configured(&["n1", "n2", "n3"]).into_iter();
    let members = members.map(|member| Member {
        store_id: store_of(&member.name),
        name: member.name,
        address: member.address,
        witness: member.witness,
    });
    (1..).zip(members).collect()
}

/// A node that belongs to cluster `cluster_id`, which has `members`.
fn formed(name: &str, cluster_id: u64, members: BTreeMap<u64, Member>) -> Answer {
    changed(name, |hello| {
        hello.standing = Standing::Formed {
            cluster_id,
            generation: 0,
            node: 1,
            members,
        };
    })
}

fn decide_as(name: &str, answers: &[Answer]) -> Decision {
    let configured = configured(&["n1", "n2", "n3"]);
    let own = Own {
        name,
        store_id: store_of(name),
        configured: &configured,
    };
    decide(&own, answers)
}

fn hindrance(name: &str, answers: &[Answer]) -> Hindrance {
    match decide_as(name, answers) {
        Decision::Wait(mut hindrances) => {
            assert_eq!(hindrances.len(), 1, "{hindrances:?}");
            hindrances.remove(0)
        }
        decision => panic!("{decision:?}"),
    }
}

#[test]
fn the_first_by_name_founds_when_all_are_there() {
    let answers = ["n1", "n2", "n3"].map(empty);
    assert_eq!(decide_as("n1", &answers), Decision::Found(members()));
    let waits = hindrance("n2", &answers);
    assert_eq!(waits, Hindrance::Founder("n1".into()));
}

#[test]
fn nothing_is_formed_without_a_member_or_with_one_that_differs() {
    let silent = [empty("n1"), empty("n2"), Err("no route".to_owned())];
    let text = hindrance("n1", &silent).to_string();
    assert!(text.contains("`n3` at 127.0.0.3:7300 can't be asked: no route"));

    let other_name = [empty("n1"), empty("n3"), empty("n3")];
    let found = hindrance("n1", &other_name);
    assert!(matches!(found, Hindrance::OtherName { .. }), "{found}");

    let other_machine = [
        changed("n1", |hello| hello.store_id += 1),
        empty("n2"),
        empty("n3"),
    ];
    let found = hindrance("n1", &other_machine);
    assert!(matches!(found, Hindrance::OtherMachine { .. }), "{found}");

    let used = changed("n2", |hello| {
        hello.standing = Standing::Unformed {
            empty: false,
            configured: Arc::from(configured(&["n1", "n2", "n3"])),
        };
    });
    let found = hindrance("n1", &[empty("n1"), used, empty("n3")]);
    assert!(matches!(found, Hindrance::NotEmpty { .. }), "{found}");
}

#[test]
fn lists_that_differ_are_told_apart() {
    let with = |list: Vec<Configured>| {
        let other = changed("n2", |hello| {
            hello.standing = Standing::Unformed {
                empty: true,
                configured: Arc::from(list),
            };
        });
        hindrance("n1", &[empty("n1"), other, empty("n3")]).to_string()
    };
    let text = with(configured(&["n1", "n2"]));
    assert!(
        text.contains("it lacks `n3` at 127.0.0.3:7300, a witness"),
        "{text}"
    );
    let text = with(configured(&["n1", "n2", "n3", "n4"]));
    let more = "it has `n4` at 127.0.0.4:7300, which this node's file lacks";
    assert!(text.contains(more), "{text}");
    let mut list = configured(&["n1", "n2", "n3"]);
    list[2].witness = false;
    let text = with(list);
    assert!(
        text.contains("it has `n3` at 127.0.0.3:7300, and this node's file has `n3`"),
        "{text}"
    );
}

#[test]
fn a_founder_that_died_half_way_is_followed() {
    // One that was told is enough.
    let answers = [
        Err("down".to_owned()),
        formed("n2", 9, members()),
        empty("n3"),
    ];
    let expected = Formed {
        cluster_id: 9,
        generation: 0,
        node: 3,
        members: members(),
    };
    assert!(!expected.is_founder());
    assert_eq!(decide_as("n3", &answers), Decision::Join(expected));
}

#[test]
fn a_wiped_or_strange_node_waits_and_says_what_to_do() {
    let mut old = members();
    old.get_mut(&3).unwrap().store_id += 1;
    let answers = [formed("n1", 9, old), Err("down".to_owned()), empty("n3")];
    let Decision::Wait(found) = decide_as("n3", &answers) else {
        panic!("a wiped node joins nothing");
    };
    let text = found[0].to_string();
    assert!(
        text.contains("`havenfs cluster remove n3`, then `havenfs cluster add n3"),
        "{text}"
    );

    // Added anew under another number while the old self is still listed.
    let mut readmitted = members();
    readmitted.get_mut(&3).unwrap().store_id += 1;
    readmitted.insert(4, members().remove(&3).unwrap());
    let joined = decide_as(
        "n3",
        &[formed("n1", 9, readmitted), empty("n2"), empty("n3")],
    );
    assert!(
        matches!(joined, Decision::Join(Formed { node: 4, .. })),
        "{joined:?}"
    );

    let mut others = members();
    others.remove(&3);
    let found = hindrance("n3", &[formed("n1", 9, others), empty("n2"), empty("n3")]);
    assert!(matches!(found, Hindrance::NotAdmitted { .. }), "{found}");

    let answers = [
        formed("n1", 9, members()),
        formed("n2", 8, members()),
        empty("n3"),
    ];
    let found = hindrance("n3", &answers);
    assert!(matches!(found, Hindrance::TwoClusters { .. }), "{found}");
}

#[test]
fn a_configuration_that_is_none_is_refused() {
    let good = configured(&["n1", "n2"]);
    check("n2", &good).unwrap();
    check("n1", &good[..1]).unwrap();
    let refused = |own: &str, list: &[Configured]| check(own, list).unwrap_err();
    assert!(refused("n3", &good).contains("`n3`, is not among them"));
    assert!(refused("n1", &configured(&["n1", "n1"])).contains("two are called `n1`"));
    let mut same = good.clone();
    same[1].address = same[0].address;
    assert!(refused("n1", &same).contains("both have 127.0.0.1:7300"));
    let mut nameless = good;
    nameless[1].name = "".into();
    assert!(refused("n1", &nameless).contains("bytes"));
    let many: Vec<String> = (0..=MEMBERS_MAX)
        .map(|number| format!("n{number}"))
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert!(refused("n1", &configured(&many)).contains("more than"));
}
