//! A client that holds locks is rebooted while nobody serves: its locks end, and only then.

use std::time::Instant;

use anyhow::Result;

use crate::scene::{ALPHA, Setting, in_scene};

#[test]
fn client_reboots_while_nobody_serves() -> Result<()> {
    in_scene("reboot", &Setting::usual(true), |scene| {
        let active = scene.line_up()?;
        let other = scene.cluster.others(&[active])[0];
        scene.cluster.kill(active)?;
        scene.cluster.kill(other)?;
        scene.power_of_the_holder_goes()?;
        // Its lock is held whatever has become of it: nobody has heard of a reboot.
        scene.cluster.restart(other)?;
        scene.cluster.wait_serving(ALPHA.name, |_| true)?;
        scene.holder_still_has_its_lock()?;

        scene.cluster.kill(other)?;
        scene.c1.reset()?;
        let back = Instant::now();
        scene.cluster.restart(other)?;
        scene.cluster.restart(active)?;
        scene.cluster.wait_serving(ALPHA.name, |_| true)?;
        scene.waiter_is_served()?;
        eprintln!(
            "failover: the waiter was served {:?} after the holder's machine was back",
            back.elapsed()
        );
        scene.kernels_do_not_complain()
    })
}
