//! Calls that come once more, late, and to another node than the first time: they change nothing.

use anyhow::{Result, ensure};
use havenfs_tests::client::nlm::{Lock, procedure, stat};
use havenfs_tests::client::rpc::next_xid;
use havenfs_tests::cluster::Cluster;

use crate::scene::{ALPHA, HOLDER, ONE, Scene};

/// A call as it was sent: its bytes follow from these.
struct Sent {
    xid: u32,
    procedure: u32,
    lock: Lock,
}

/// Sends a call for the first time.
fn send(scene: &mut Scene, procedure: u32, l_offset: u64) -> Result<Sent> {
    let sent = Sent {
        xid: next_xid(),
        procedure,
        lock: scene.a.lock_of(&scene.fh, HOLDER, l_offset, 10),
    };
    ensure!(send_again(scene, &sent)? == stat::GRANTED);
    Ok(sent)
}

fn send_again(scene: &mut Scene, sent: &Sent) -> Result<u32> {
    scene.a.change(sent.xid, sent.procedure, &sent.lock)
}

#[test]
fn late_copies_change_nothing() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let mut scene = Scene::new(cluster)?;
        // Locked and given back.
        let lock = send(&mut scene, procedure::LOCK, 100)?;
        send(&mut scene, procedure::UNLOCK, 100)?;
        // Given back and locked once more.
        send(&mut scene, procedure::LOCK, 200)?;
        let unlock = send(&mut scene, procedure::UNLOCK, 200)?;
        send(&mut scene, procedure::LOCK, 200)?;
        // Locked, and still held.
        let held = send(&mut scene, procedure::LOCK, 300)?;

        let before = cluster.wait_serving(ALPHA, |_| true)?;
        for takeover in ["same node", "another node"] {
            if takeover == "another node" {
                cluster.kill(before.node)?;
                cluster.wait_serving(ALPHA, |serving| serving.node != before.node)?;
            }
            for sent in [&lock, &unlock, &held] {
                scene.a.nlm.disconnect();
                let stat = send_again(&mut scene, sent)?;
                // The first answer once more.
                ensure!(stat == stat::GRANTED, "{takeover}: answered {stat}");
            }
            for (l_offset, expected) in [(100, None), (200, Some(HOLDER)), (300, Some(HOLDER))] {
                let wanted = scene.c.lock_of(&scene.fh, 33, l_offset, 10);
                let holder = scene.c.holder(&wanted)?;
                ensure!(holder == expected, "{takeover}, {l_offset}: {holder:?}");
            }
        }
        // What is free is free indeed, and new calls are carried out.
        let wanted = scene.c.lock_of(&scene.fh, 33, 100, 10);
        ensure!(scene.c.lock(&wanted)? == stat::GRANTED);
        for l_offset in [200, 300] {
            send(&mut scene, procedure::UNLOCK, l_offset)?;
            let wanted = scene.c.lock_of(&scene.fh, 33, l_offset, 10);
            ensure!(scene.c.lock(&wanted)? == stat::GRANTED);
        }
        scene.machines_are_well()
    })
}
