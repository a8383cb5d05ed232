//! Hosts that ask for more than there is: what they get, that it costs bounded memory, and that
//! nobody else loses anything by it.

use std::fs;
use std::net::IpAddr;

use anyhow::{Result, ensure};
use havenfs_tests::client::nlm::{Lock, stat};

use crate::locking::{A, B, Scene};
use crate::scene::OPEN;

/// Low, so that a test comes to them soon.
const LIMITS: &str = "[lock_limits]\nhosts = 100\nhosts_per_address = 50\nwaiting_per_host = 400\n\
                      waiting_per_file = 1000\nname_bytes = 200000\nname_bytes_per_host = 60000\n";
/// What a flood may cost; without limits each of these would cost a multiple of it.
const GROWTH_KIB_MAX: u64 = 12 * 1024;
const STRANGER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 15));

/// A server with low limits, on which host A has a lock.
fn flooded(flood: impl FnOnce(&Scene) -> Result<()>) -> Result<()> {
    let config = tempfile::NamedTempFile::new()?;
    fs::write(config.path(), LIMITS)?;
    let config = config.path().display().to_string();
    let scene = Scene::with(OPEN, &["--config", &config])?;
    let mut a = scene.server.nlm(A)?;
    ensure!(a.lock(&scene.lock_of("a", 1).range(0, 10))? == stat::GRANTED);
    let before = scene.server.memory_kib("VmRSS")?;
    flood(&scene)?;
    let grown = scene.server.memory_kib("VmRSS")?.saturating_sub(before);
    ensure!(grown < GROWTH_KIB_MAX, "{grown} KiB more");
    let mut c = scene.server.nlm(STRANGER)?;
    ensure!(c.lock(&scene.lock_of("c", 1).range(5, 1))? == stat::DENIED);
    ensure!(c.lock(&scene.lock_of("c", 1).range(1 << 40, 1))? == stat::GRANTED);
    ensure!(a.unlock(&scene.lock_of("a", 1).range(0, 10))? == stat::GRANTED);
    Ok(())
}

/// How often a limit was hit.
fn hits(scene: &Scene, limit: &str) -> Result<u64> {
    let status = scene.site.ask("status")?;
    Ok(status["limits_hit"][limit].as_u64().unwrap_or(0))
}

#[test]
fn hosts_that_make_up_names() -> Result<()> {
    flooded(|scene| {
        let mut b = scene.server.nlm(B)?;
        let mut granted = 0;
        for number in 0..2000u32 {
            let name = format!("{number:0>900}");
            let lock = scene.lock_of(&name, 1).range(1000 + u64::from(number), 1);
            match b.lock(&lock)? {
                stat::GRANTED => granted += 1,
                other => ensure!(other == stat::DENIED_NOLOCKS, "{other}"),
            }
        }
        ensure!(granted == 50, "{granted}");
        ensure!(hits(scene, "hosts_per_address")? == 1950);
        Ok(())
    })
}

#[test]
fn a_host_that_makes_up_owners() -> Result<()> {
    flooded(|scene| {
        let mut b = scene.server.nlm(B)?;
        let mut granted = 0;
        for number in 0..2000u32 {
            let oh = format!("{number:0>1000}").into_bytes();
            let lock = Lock {
                oh,
                ..scene.lock_of("b", 1)
            };
            match b.lock(&lock.range(1000 + u64::from(number), 1))? {
                stat::GRANTED => granted += 1,
                other => ensure!(other == stat::DENIED_NOLOCKS, "{other}"),
            }
        }
        ensure!(granted == 59, "{granted}");
        ensure!(hits(scene, "name_bytes_per_host")? == 1941);
        Ok(())
    })
}

#[test]
fn a_host_that_waits_for_everything() -> Result<()> {
    flooded(|scene| {
        let mut b = scene.server.nlm(B)?;
        for number in 0..2000 {
            let stat = b.lock(&scene.waiting("b", number).range(0, 10))?;
            let wanted = if number < 400 {
                stat::BLOCKED
            } else {
                stat::DENIED_NOLOCKS
            };
            ensure!(stat == wanted, "{number}: {stat}");
        }
        ensure!(hits(scene, "waiting_per_host")? == 1600);
        // It gives up, and nothing is left.
        for number in 0..400 {
            ensure!(b.cancel(&scene.waiting("b", number).range(0, 10))? == stat::GRANTED);
        }
        ensure!(scene.site.ask("status")?["locking"]["waiting"] == 0);
        Ok(())
    })
}
