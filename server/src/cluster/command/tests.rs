//! What commands look like in the log.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;

const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

fn of_service(command: ServiceCommand) -> Command {
    Command::Service(ServiceId(5), command)
}

#[test]
fn commands_keep_their_numbers() {
    let (epoch, now, grant) = (1, 2, GrantId::MIN);
    for (number, command) in [
        (2, ServiceCommand::ConfirmGrant { epoch, grant }),
        (6, ServiceCommand::EndGrace { epoch, now }),
        (
            7,
            ServiceCommand::Break {
                epoch,
                address: ADDRESS,
                file: None,
                now,
            },
        ),
        (
            12,
            ServiceCommand::RaiseNsmState {
                epoch,
                unix_seconds: 3,
            },
        ),
        (
            13,
            ServiceCommand::SetHandle {
                epoch,
                id: 9,
                entry: None,
            },
        ),
        (
            14,
            ServiceCommand::Connections {
                epoch,
                came: Vec::new(),
                went: Vec::new(),
            },
        ),
        (
            15,
            ServiceCommand::Fenced {
                epoch,
                nodes: vec![NodeId(3)],
            },
        ),
        (16, ServiceCommand::NeedsFence { epoch }),
        (
            20,
            ServiceCommand::Replies {
                epoch,
                replies: Vec::new(),
                unix_seconds: 3,
            },
        ),
    ] {
        let bytes = of_service(command.clone()).encode();
        assert_eq!(bytes[..4], [VERSION, 1, 5, number], "{command:?}");
    }
    for (number, command) in [
        (
            0,
            ClusterCommand::Renew(Renewal {
                node: NodeId(1),
                incarnation: 2,
                seq: 3,
                lease_ms: 4,
            }),
        ),
        (
            3,
            ClusterCommand::Move {
                service: ServiceId(1),
                to: NodeId(2),
            },
        ),
        (4, ClusterCommand::Name { name: "a".into() }),
        (5, ClusterCommand::Allot(Allot::Import(Vec::new()))),
        (
            8,
            ClusterCommand::NoteStorage(StorageNote {
                service: ServiceId(1),
                node: NodeId(2),
                fails: true,
            }),
        ),
    ] {
        let bytes = Command::Cluster(command.clone()).encode();
        assert_eq!(bytes[..3], [VERSION, 0, number], "{command:?}");
    }
}

#[test]
fn a_notice_is_written_field_by_field() {
    let notice = of_service(ServiceCommand::Rebooted(Notice {
        epoch: 1,
        address: IpAddr::from([10, 0, 0, 7]),
        mon_name: b"a".as_slice().into(),
        state: 5,
        now: 2,
    }));
    // Version, service, command; epoch, kind of address and address, length and name, state, clock.
    let bytes = [VERSION, 1, 5, 4, 1, 0, 10, 0, 0, 7, 1, b'a', 10, 2];
    assert_eq!(notice.encode(), bytes);
}

#[test]
fn connections_are_written_end_by_end() {
    let [local, peer] = ["10.0.0.1:2049", "10.0.0.7:700"].map(|end| end.parse().unwrap());
    let connections = of_service(ServiceCommand::Connections {
        epoch: 1,
        came: vec![Connection::new(local, peer)],
        went: Vec::new(),
    });
    // Version, service, command; epoch, one that came, kind of address, address and port, twice;
    // none that went.
    let bytes = [
        VERSION, 1, 5, 14, 1, 1, 0, 10, 0, 0, 1, 129, 16, 0, 10, 0, 0, 7, 188, 5, 0,
    ];
    assert_eq!(connections.encode(), bytes);
    assert_eq!(Command::decode(&bytes), Ok(connections));
}

#[test]
fn commands_come_back_and_others_are_refused() {
    let command = of_service(ServiceCommand::RefuseGrant {
        epoch: 3,
        grant: GrantId::MIN,
        release: true,
        now: 1_800_000_000,
    });
    let bytes = command.encode();
    assert_eq!(Command::decode(&bytes), Ok(command));
    let newer = [&[VERSION + 1], &bytes[1..]].concat();
    assert_eq!(
        Command::decode(&newer),
        Err(CommandError::Newer(VERSION + 1))
    );
    let longer = [&bytes[..], &[0]].concat();
    let zero = [&[0], &bytes[1..]].concat();
    for damaged in [&[][..], &bytes[..bytes.len() - 1], &longer, &zero] {
        assert_eq!(Command::decode(damaged), Err(CommandError::Damaged));
    }
}

/// Versions 1 and 2 had commands of one service, without its id.
#[test]
fn what_one_node_wrote_is_of_the_first_service() {
    let confirm = ServiceCommand::ConfirmGrant {
        epoch: 3,
        grant: GrantId::MIN,
    };
    let bytes = of_service(confirm.clone()).encode();
    for version in [1, 2] {
        let old = [&[version], &bytes[3..]].concat();
        let command = Command::Service(ServiceId::FIRST, confirm.clone());
        assert_eq!(Command::decode(&old), Ok(command));
    }
}
