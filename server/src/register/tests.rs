//! The choice and the registration, against an rpcbind made of our own portmapper.
//!
//! Tests with the prefix `root_` need root; those in [`real`] also need Debian's rpcbind.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::time::Instant;

use havenfs_rpc::portmap::Netid;
use havenfs_rpc::program;

use self::fake::{FakeRpcbind, FakeServer, dead_port};
use super::*;
use crate::programs::portmap::{Owner, PortTable};

mod fake;
mod real;

const TIMEOUT: Duration = Duration::from_secs(20);

/// The entries of a server whose NFS port is `nfs_port`.
fn own(nfs_port: u16) -> Vec<PortEntry> {
    let mut own = Vec::new();
    for netid in Netid::ALL {
        own.push(PortEntry::own(program::NFS, 3, netid, nfs_port));
        for version in [1, 3] {
            own.push(PortEntry::own(program::MOUNT, version, netid, 20_048));
        }
    }
    own
}

fn foreign(program: u32, version: u32, netid: Netid, port: u16) -> PortEntry {
    PortEntry {
        owner: Owner::Superuser,
        ..PortEntry::own(program, version, netid, port)
    }
}

/// All entries as their DUMP line, sorted.
fn lines(entries: &[PortEntry]) -> Vec<String> {
    let mut lines: Vec<String> = entries
        .iter()
        .map(|entry| format!("{} {}", entry.program, Registered::from(entry)))
        .collect();
    lines.sort();
    lines
}

fn settings(port: u16, sockets: &[PathBuf]) -> Settings {
    Settings {
        port,
        listen: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
        sockets: sockets.to_vec(),
        timeout: TIMEOUT,
    }
}

async fn register(fake: &FakeRpcbind, nfs_port: u16) -> Result<Registration, RegisterError> {
    let settings = settings(fake.port(), &fake.sockets());
    match choose(PortmapMode::Auto, &settings, &own(nfs_port)).await? {
        Choice::Registered(registration) => Ok(registration),
        Choice::Off(OffReason::Refused(error)) => Err(error),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_free_port_is_embedded() {
    for mode in [PortmapMode::Auto, PortmapMode::Embedded] {
        let settings = Settings::new(0, &[]);
        let choice = choose(mode, &settings, &own(2049)).await.unwrap();
        assert!(matches!(choice, Choice::Embedded), "{choice}");
    }
}

#[tokio::test]
async fn off_is_off() {
    let choice = choose(PortmapMode::Off, &settings(0, &[]), &own(2049))
        .await
        .unwrap();
    assert_eq!(choice.to_string(), "off (as asked)");
}

#[tokio::test]
async fn embedded_with_a_taken_port_names_the_holder() {
    let holder = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let settings = settings(holder.local_addr().unwrap().port(), &[]);
    let error = choose(PortmapMode::Embedded, &settings, &own(2049))
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&format!("(pid {}) has it", std::process::id())),
        "{text}"
    );
    assert!(text.contains("hint: use `--portmap register`"), "{text}");
}

#[tokio::test]
async fn auto_without_rpcbind_is_off_and_register_is_an_error() {
    // Connections are queued and never answered.
    let holder = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = holder.local_addr().unwrap().port();
    let settings = Settings {
        timeout: Duration::from_millis(300),
        ..settings(port, &[])
    };
    let choice = choose(PortmapMode::Auto, &settings, &own(2049))
        .await
        .unwrap();
    assert!(
        matches!(choice, Choice::Off(OffReason::Taken { .. })),
        "{choice}"
    );
    let error = choose(PortmapMode::Register, &settings, &own(2049))
        .await
        .unwrap_err();
    assert!(matches!(error, RegisterError::NoRpcbind { .. }));
    assert!(error.to_string().contains("hint: start it"));
}

#[tokio::test]
async fn registers_everything_and_removes_it_again() {
    let fake = FakeRpcbind::start(2..=4);
    let neighbour = foreign(program::NLM, 4, Netid::Tcp, 4045);
    fake.table().set(neighbour);
    let registration = register(&fake, 2049).await.unwrap();
    let mut expected = own(2049);
    expected.push(neighbour);
    assert_eq!(lines(&fake.table().entries()), lines(&expected));
    assert_eq!(registration.check().await.unwrap(), Checked::Intact);
    assert_eq!(registration.remove().await.unwrap(), 12);
    assert_eq!(lines(&fake.table().entries()), lines(&[neighbour]));
    assert_eq!(registration.remove().await.unwrap(), 0);
}

#[tokio::test]
async fn version_3_is_enough() {
    let fake = FakeRpcbind::start(2..=3);
    register(&fake, 2049).await.unwrap();
    assert_eq!(lines(&fake.table().entries()), lines(&own(2049)));
}

#[tokio::test]
async fn version_2_knows_ipv4_only_and_removes_both_protocols() {
    let fake = FakeRpcbind::start(2..=2);
    fake.table()
        .set(foreign(program::NFS, 3, Netid::Udp, dead_port()));
    fake.table().set(foreign(program::NFS, 3, Netid::Tcp, 2049));
    let registration = register(&fake, 2049).await.unwrap();
    let expected: Vec<PortEntry> = own(2049)
        .into_iter()
        .filter(|entry| !entry.netid.is_ipv6())
        .collect();
    assert_eq!(lines(&fake.table().entries()), lines(&expected));
    registration.remove().await.unwrap();
    assert_eq!(fake.table().entries(), []);
}

#[tokio::test]
async fn stale_entries_are_replaced() {
    let fake = FakeRpcbind::start(2..=4);
    let dead = dead_port();
    for (version, netid, port) in [
        (3, Netid::Tcp, dead),
        (3, Netid::Udp6, dead),
        (4, Netid::Tcp6, dead),
        (4, Netid::Tcp, 2049),
    ] {
        assert!(
            fake.table()
                .set(foreign(program::NFS, version, netid, port))
        );
    }
    register(&fake, 2049).await.unwrap();
    assert_eq!(lines(&fake.table().entries()), lines(&own(2049)));
}

#[tokio::test]
async fn another_server_that_answers_is_a_conflict() {
    let other = FakeServer::start(program::MOUNT);
    let fake = FakeRpcbind::start(2..=4);
    let entry = foreign(program::MOUNT, 2, Netid::Tcp, other.port());
    fake.table().set(entry);
    let error = register(&fake, 2049).await.unwrap_err();
    assert!(matches!(error, RegisterError::Conflict { .. }), "{error}");
    let text = error.to_string();
    let named = format!("MOUNT version 2 on tcp port {}", other.port());
    assert!(
        text.contains(&named) && text.contains("systemctl stop nfs-server"),
        "{text}"
    );
    assert_eq!(lines(&fake.table().entries()), lines(&[entry]));
    // A server of another program has inherited the port: the entry is stale.
    let other = FakeServer::start(program::NLM);
    let fake = FakeRpcbind::start(2..=4);
    fake.table()
        .set(foreign(program::MOUNT, 2, Netid::Tcp, other.port()));
    register(&fake, 2049).await.unwrap();
    assert_eq!(lines(&fake.table().entries()), lines(&own(2049)));
}

#[tokio::test]
async fn another_lock_manager_or_monitor_is_a_conflict_and_the_way_out_is_named() {
    for (number, version, name, way_out) in [
        (program::NLM, 4, "NLM version 4", "`umount -a -t nfs`"),
        (
            program::NSM,
            1,
            "NSM version 1",
            "`systemctl stop rpc-statd.service`",
        ),
    ] {
        let other = FakeServer::start(number);
        let fake = FakeRpcbind::start(2..=4);
        let theirs = foreign(number, version, Netid::Tcp, other.port());
        fake.table().set(theirs);
        let own = [PortEntry::own(number, version, Netid::Tcp, 32_803)];
        let settings = settings(fake.port(), &fake.sockets());
        // Also with `auto`: with other locks than ours we must not go on.
        for mode in [PortmapMode::Auto, PortmapMode::Register] {
            let error = choose(mode, &settings, &own).await.unwrap_err();
            assert!(matches!(error, RegisterError::Conflict { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains(name) && text.contains(way_out), "{text}");
        }
        assert_eq!(lines(&fake.table().entries()), lines(&[theirs]));
    }
}

#[tokio::test]
async fn what_a_dead_lock_manager_left_is_replaced() {
    let fake = FakeRpcbind::start(2..=4);
    fake.table()
        .set(foreign(program::NLM, 4, Netid::Tcp, dead_port()));
    let own = [PortEntry::own(program::NLM, 4, Netid::Tcp, 32_803)];
    let settings = settings(fake.port(), &fake.sockets());
    let choice = choose(PortmapMode::Auto, &settings, &own).await.unwrap();
    assert!(matches!(choice, Choice::Registered(_)), "{choice}");
    assert_eq!(lines(&fake.table().entries()), lines(&own));
}

#[tokio::test]
async fn a_restarted_rpcbind_gets_the_entries_again() {
    let fake = FakeRpcbind::start(2..=4);
    let registration = register(&fake, 2049).await.unwrap();
    fake.replace_table();
    assert_eq!(registration.check().await.unwrap(), Checked::Renewed);
    assert_eq!(registration.check().await.unwrap(), Checked::Intact);
    fake.replace_table();
    assert_eq!(fake.table().entries(), []);
    let deadline = Instant::now() + TIMEOUT;
    let renewed = async {
        while fake.table().entries().len() < 12 {
            assert!(Instant::now() < deadline, "not registered again");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        () = registration.watch(Duration::from_millis(10)) => panic!("the watch ended"),
        () = renewed => {}
    }
    assert_eq!(lines(&fake.table().entries()), lines(&own(2049)));
}

#[tokio::test]
async fn the_socket_of_another_rpcbind_is_left_alone() {
    let (fake, elsewhere) = (FakeRpcbind::start(2..=4), FakeRpcbind::start(2..=4));
    let there = foreign(program::NFS, 3, Netid::Tcp, dead_port());
    elsewhere.table().set(there);
    // This one takes changes over loopback from nobody, so that there is no way in at all.
    let settings = settings(fake.port(), &elsewhere.sockets());
    let error = choose(PortmapMode::Register, &settings, &own(2049))
        .await
        .unwrap_err();
    assert!(matches!(error, RegisterError::NoWayIn { .. }), "{error}");
    assert_eq!(lines(&elsewhere.table().entries()), lines(&[there]));
    assert_eq!(fake.table().entries(), []);
    let choice = choose(PortmapMode::Auto, &settings, &own(2049))
        .await
        .unwrap();
    assert!(
        matches!(choice, Choice::Off(OffReason::Refused(_))),
        "{choice}"
    );
}

#[tokio::test]
async fn root_registers_over_loopback_when_the_socket_leads_elsewhere() {
    let (fake, elsewhere) = (
        FakeRpcbind::trusting_loopback(2..=4),
        FakeRpcbind::start(2..=4),
    );
    let there = foreign(program::NFS, 3, Netid::Tcp, dead_port());
    elsewhere.table().set(there);
    let settings = settings(fake.port(), &elsewhere.sockets());
    let choice = choose(PortmapMode::Auto, &settings, &own(2049))
        .await
        .unwrap();
    assert!(matches!(choice, Choice::Registered(_)), "{choice}");
    assert_eq!(lines(&fake.table().entries()), lines(&own(2049)));
    assert_eq!(lines(&elsewhere.table().entries()), lines(&[there]));
}

#[tokio::test]
async fn a_full_rpcbind_is_told() {
    let fake = FakeRpcbind::start(2..=4);
    for number in 0..crate::programs::portmap::ENTRIES_MAX - 5 {
        fake.table().set(foreign(number as u32, 1, Netid::Tcp, 1));
    }
    let error = register(&fake, 2049).await.unwrap_err();
    assert!(matches!(error, RegisterError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("hint: look with `rpcinfo`"));
}

#[tokio::test]
async fn all_of_it_can_run_in_a_task_of_its_own() {
    fn assert_send(_: &impl Send) {}
    let fake = FakeRpcbind::start(2..=4);
    let settings = settings(fake.port(), &fake.sockets());
    assert_send(&choose(PortmapMode::Auto, &settings, &[]));
    let registration = register(&fake, 2049).await.unwrap();
    assert_send(&registration.check());
    assert_send(&registration.watch(TIMEOUT));
    assert_send(&registration.remove());
}

#[test]
fn modes_are_spelled_as_on_the_command_line() {
    for mode in PortmapMode::ALL {
        assert_eq!(mode.name().parse(), Ok(mode));
    }
    assert!("Auto".parse::<PortmapMode>().is_err());
}
