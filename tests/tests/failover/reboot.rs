//! A client that holds locks is rebooted while nobody serves: its locks end, and only then.

use std::thread;
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
        let (c1, cluster) = (scene.c1, &mut scene.cluster);
        let back = thread::scope(|scope| {
            let booting = scope.spawn(|| c1.reset());
            cluster.wait("the client says that it was rebooted", |_| {
                c1.has_told_reboot().is_ok_and(|told| told).then_some(())
            })?;
            cluster.restart(other)?;
            cluster.restart(active)?;
            cluster.wait_serving(ALPHA.name, |_| true)?;
            let back = Instant::now();
            let panicked = |panic| std::panic::resume_unwind(panic);
            booting.join().unwrap_or_else(panicked)?;
            Ok::<_, anyhow::Error>(back)
        })?;
        scene.waiter_is_served()?;
        eprintln!(
            "failover: the waiter was served {:?} after the service was back",
            back.elapsed()
        );
        scene.kernels_do_not_complain()
    })
}
