//! Which hosts hear of a restart, and under which names: `announce` as it is configured.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::nlm::{procedure, stat};
use havenfs_tests::client::nsm;
use havenfs_tests::client::peer::Transport;
use havenfs_tests::server::V4;

use crate::locking::{Machine, Scene};
use crate::message::{READ, share};
use crate::scene::OPEN;

/// How soon a host is told that is told at all.
const TOLD_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a host hears nothing that is not told; the others have been by then.
const QUIET: Duration = Duration::from_secs(1);

const NAMES: [&str; 4] = [
    "--service-name",
    "nas.example.org",
    "--service-name",
    "files",
];

/// The hosts of a service, and what each is to it.
struct Hosts {
    /// Has a lock that it knows of.
    holder: Machine,
    /// Has a lock too, and has not said that it knows.
    granted: Machine,
    /// Has a lock, and does not want to hear of restarts.
    unmonitored: Machine,
    /// Had a lock.
    done: Machine,
    /// Has nothing but a file that it has opened: SHARE is its last call before the restart, and
    /// has put it on the list, or it is not on it.
    opener: Machine,
}

impl Hosts {
    fn new(scene: &Scene) -> Result<Self> {
        let hosts = Self {
            holder: Machine::start(1)?,
            granted: Machine::start(2)?,
            unmonitored: Machine::start(3)?,
            done: Machine::start(4)?,
            opener: Machine::start(5)?,
        };
        let nlm = |machine: &Machine| machine.nlm(scene, Transport::Tcp);
        let mut holder = nlm(&hosts.holder)?;
        for at in [0, 50] {
            let lock = scene.lock_of("holder", 1).range(at, 10);
            ensure!(holder.lock(&lock)? == stat::GRANTED);
        }
        let mut unmonitored = nlm(&hosts.unmonitored)?;
        let lock = scene.lock_of("unmonitored", 1).range(100, 10);
        ensure!(unmonitored.nm_lock(&lock)? == stat::GRANTED);
        let mut done = nlm(&hosts.done)?;
        let lock = scene.lock_of("done", 1).range(200, 10);
        ensure!(done.lock(&lock)? == stat::GRANTED);
        ensure!(done.unlock(&lock)? == stat::GRANTED);
        let waiting = scene.waiting("granted", 1).range(50, 10);
        ensure!(nlm(&hosts.granted)?.lock(&waiting)? == stat::BLOCKED);
        let lock = scene.lock_of("holder", 1).range(50, 10);
        ensure!(holder.unlock(&lock)? == stat::GRANTED);
        // It is told, and does not answer.
        let host = &hosts.granted.host;
        host.next_call_of(program::NLM, procedure::GRANTED_MSG)?;
        let opened = share(scene, "opener", READ, 0);
        ensure!(nlm(&hosts.opener)?.share(&opened)?.0 == stat::GRANTED);
        Ok(hosts)
    }

    fn all(&self) -> Vec<&Machine> {
        let Self {
            holder,
            granted,
            unmonitored,
            done,
            opener,
        } = self;
        vec![holder, granted, unmonitored, done, opener]
    }
}

/// Waits until the server has said what it has to say besides.
fn nobody(hosts: &Hosts) -> Vec<&Machine> {
    let host = &hosts.granted.host;
    let call = host.next_call_of(program::NLM, procedure::GRANTED_MSG);
    assert!(call.is_ok(), "{call:?}");
    Vec::new()
}

/// Under which names a host is told of a restart, until those are all or the time is over. Always
/// with the same odd number.
fn told(machine: &Machine, all: usize, time_max: Duration) -> Result<BTreeSet<String>> {
    let deadline = Instant::now() + time_max;
    let (mut names, mut states) = (BTreeSet::new(), BTreeSet::new());
    while names.len() < all {
        let left = deadline.saturating_duration_since(Instant::now());
        let Some(call) = machine.host.next_call_within(left)? else {
            break;
        };
        if (call.program, call.procedure) == (program::NSM, nsm::procedure::SM_NOTIFY) {
            let (name, state) = call.notified()?;
            call.reply(&[])?;
            names.insert(String::from_utf8(name)?);
            states.insert(state);
        }
    }
    ensure!(states.len() <= 1, "{states:?}");
    ensure!(states.iter().all(|state| state % 2 == 1), "{states:?}");
    Ok(names)
}

/// Every name that is configured, each without its domain, and the address.
fn all_names() -> BTreeSet<String> {
    let address = V4.to_string();
    let names = ["nas.example.org", "nas", "files", address.as_str()];
    names.into_iter().map(str::to_owned).collect()
}

/// Kills a server and starts it again; then each host of `telling` is told under every name, and
/// none of the others under any.
fn restart(
    more: &[&str],
    telling: impl Fn(&Hosts) -> Vec<&Machine>,
    is_quiet: impl Fn(&Hosts) -> Vec<&Machine>,
) -> Result<()> {
    let scene = Scene::with(OPEN, &NAMES)?;
    let hosts = Hosts::new(&scene)?;
    let _scene = scene.restart_with(OPEN, &[&NAMES[..], more].concat())?;
    let names = all_names();
    for machine in telling(&hosts) {
        let told = told(machine, names.len(), TOLD_TIME_MAX)?;
        ensure!(told == names, "{} was told {told:?}", machine.address);
    }
    for machine in is_quiet(&hosts) {
        let told = told(machine, 1, QUIET)?;
        ensure!(told.is_empty(), "{} was told {told:?}", machine.address);
    }
    Ok(())
}

#[test]
fn needs_root_announce_never_tells_nobody() -> Result<()> {
    restart(&["--announce", "never"], nobody, Hosts::all)
}

#[test]
fn needs_root_announce_auto_tells_hosts_with_unconfirmed_grants() -> Result<()> {
    restart(
        &["--announce", "auto"],
        |hosts| vec![&hosts.granted],
        |hosts| {
            vec![
                &hosts.holder,
                &hosts.unmonitored,
                &hosts.done,
                &hosts.opener,
            ]
        },
    )
}

#[test]
fn needs_root_announce_auto_tells_all_hosts_where_locks_may_be_missing() -> Result<()> {
    restart(
        &["--announce", "auto", "--recover"],
        |hosts| vec![&hosts.holder, &hosts.granted, &hosts.done, &hosts.opener],
        |hosts| vec![&hosts.unmonitored],
    )
}

#[test]
fn needs_root_announce_always_tells_all_hosts() -> Result<()> {
    restart(
        &["--announce", "always"],
        |hosts| vec![&hosts.holder, &hosts.granted, &hosts.opener],
        |hosts| vec![&hosts.unmonitored, &hosts.done],
    )
}
