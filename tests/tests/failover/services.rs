//! Two services beside each other, and a service in IPv6.

use anyhow::{Result, ensure};
use havenfs_tests::lab::cluster::{Plan, Service};
use havenfs_tests::lab::records::{Records, wait_for_records};

use crate::scene::{ALPHA, Expected, RECONNECT_TIME_MAX, SOME, Scene, Setting, in_scene};

const BETA: Service = Service {
    name: "beta",
    names: &["nfs-service2"],
    addresses: &["10.77.0.101/24"],
    export: "/srv/export2",
    preferred: "n2",
};

#[test]
fn active_active() -> Result<()> {
    two_services("two-services", true)
}

#[test]
fn active_active_without_notices() -> Result<()> {
    two_services("two-services-quiet", false)
}

fn two_services(name: &str, has_notices: bool) -> Result<()> {
    let setting = Setting {
        plan: Plan {
            services: vec![ALPHA, BETA],
            ..Plan::default()
        },
        ..Setting::usual(has_notices)
    };
    in_scene(name, &setting, |scene| {
        let (c2, export) = (scene.c2, BETA.export);
        c2.sh(&format!(
            "mkdir /tmp/beta && mount -t nfs -o vers=3 nfs-service2:{export} /tmp/beta"
        ))?;
        let writer = c2.spawn_writer("/tmp/beta/journal")?;
        wait_for_records(&writer, SOME, RECONNECT_TIME_MAX)?;
        let before = scene.cluster.wait_serving(BETA.name, |_| true)?;
        let from = Records::of(&writer)?.count();
        scene.case(
            "the active node of one of two services is killed",
            Expected::Takeover,
            |cluster, before| cluster.kill(before.node),
            |cluster, before| cluster.restart(before.node),
        )?;
        let gap = Records::of(&writer)?.longest_gap(from);
        eprintln!("failover: longest gap of the other service's writes {gap:?}");
        let after = scene.cluster.wait_serving(BETA.name, |_| true)?;
        ensure!(before == after, "{before:?}, {after:?}");

        scene.cluster.move_to(ALPHA.name, after.node)?;
        scene.case(
            "the active node of both services loses its power",
            Expected::Takeover,
            |cluster, before| cluster.power_off(before.node),
            |cluster, before| cluster.power_on(before.node),
        )?;
        let last = scene.cluster.wait_serving(BETA.name, |_| true)?;
        ensure!(last.epoch == after.epoch + 1, "{after:?}, {last:?}");
        wait_for_records(&writer, SOME, RECONNECT_TIME_MAX)?;
        let records = Records::of(&writer)?;
        let file = scene.cluster.file_in_the_end(BETA.name, "journal")?;
        let losses = records.losses(&file);
        ensure!(losses.is_empty(), "acknowledged, but lost: {losses:#?}");
        drop(writer);
        c2.sh("umount /tmp/beta")?;
        Ok(())
    })
}

#[test]
fn over_ipv6() -> Result<()> {
    in_scene("ipv6", &with_ipv6(true), in_ipv6)
}

#[test]
fn over_ipv6_without_notices() -> Result<()> {
    in_scene("ipv6-quiet", &with_ipv6(false), in_ipv6)
}

fn with_ipv6(has_notices: bool) -> Setting {
    const BOTH: Service = Service {
        names: &["nfs-service", "nfs-service6"],
        addresses: &["10.77.0.100/24", "fd77::100/64"],
        ..ALPHA
    };
    Setting {
        plan: Plan {
            services: vec![BOTH],
            ..Plan::default()
        },
        mounted: "nfs-service6",
        options: "vers=3,proto=tcp6,mountproto=tcp6",
        ..Setting::usual(has_notices)
    }
}

fn in_ipv6(scene: &mut Scene<'_>) -> Result<()> {
    scene.case(
        "power loss, IPv6",
        Expected::Takeover,
        |cluster, before| cluster.power_off(before.node),
        |cluster, before| cluster.power_on(before.node),
    )?;
    scene.case(
        "killed, IPv6",
        Expected::Takeover,
        |cluster, before| cluster.kill(before.node),
        |cluster, before| cluster.restart(before.node),
    )?;
    scene.case(
        "moved, IPv6",
        Expected::Move,
        |cluster, before| {
            let to = cluster.others(&[before.node])[0];
            cluster.order_move(ALPHA.name, to)
        },
        |_, _| Ok(()),
    )
}
