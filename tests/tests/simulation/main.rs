//! The promises about leases, takeovers, locks and hosts, in simulated clusters: thousands of
//! seeded runs in which nodes die, are stopped and cut off, clocks drift, messages get lost and
//! come twice, and hosts reboot.
//!
//! What decides is the product's own: `ClusterState::apply`, `Lease`, `Sole`, `Reconciler`, the
//! lock table, `Granter`. What carries it out is modelled here without a runtime, sockets or
//! clocks, one step at a time, so that anything may come between two steps. How to read it: `world`
//! has the time and what happens next; `raft`, `replication`, `members`, `pending` and `network`
//! the log; `node`, `keeper` and `gates` a process and its services; `calls`, `granting` and
//! `hosts` what hosts see; `faults` and `host_faults` what goes wrong; `checks` the promises;
//! `sabotage` shows that each rule is needed, by taking it out.
//!
//! A seed repeats a run. A broken promise prints it with the last lines of its story;
//! `HAVENFS_SEEDS=FROM..TO` runs more seeds.
//!
//! Not simulated: classic grace with an incomplete table, a sole survivor.

mod calls;
mod checks;
mod clock;
mod faults;
mod gates;
mod granting;
mod host_faults;
mod hosts;
mod keeper;
mod members;
mod network;
mod node;
mod pending;
mod plan;
mod raft;
mod replication;
mod sabotage;
mod world;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::world::World;

/// Runs seeds; every promise must hold in each.
fn must_hold(seeds: impl Iterator<Item = u64>) -> BTreeMap<&'static str, u64> {
    let mut counts = BTreeMap::new();
    for seed in seeds {
        let mut world = World::new(seed, false);
        world.run();
        for (what, count) in &world.counts {
            *counts.entry(*what).or_default() += count;
        }
        if world.checks.broken.is_some() {
            // Once more, to tell how it came.
            let mut world = World::new(seed, true);
            world.run();
            panic!("{}\nseed {seed}: {:?}", world.story(), world.checks.broken);
        }
    }
    counts
}

/// What must have happened, or the runs prove nothing.
const MUST_HAPPEN: [&str; 31] = [
    "answers held back by the gate",
    "batches refused",
    "calls of an earlier epoch",
    "changes that another leader finished",
    "clocks that jumped",
    "copies that did nothing",
    "disks lost",
    "effects held back by the fence",
    "effects held back by the gate",
    "entries taken back",
    "epochs of a service in one batch",
    "fences that failed",
    "grants refused",
    "host reboots",
    "hosts with a new address",
    "late copies",
    "nodes added",
    "nodes fenced",
    "nodes removed",
    "nodes that were left alone",
    "races lost",
    "removed nodes that were told so",
    "releases that took too long",
    "services dropped",
    "services given up for their storage",
    "services going back",
    "services moved away",
    "services not opened",
    "services withdrawn",
    "snapshots installed",
    "spoke again",
];

#[test]
fn all_promises_hold_and_all_that_should_happen_does() {
    let counts = must_hold(0..1000);
    for what in MUST_HAPPEN {
        assert!(counts.contains_key(what), "never: {what}; {counts:?}");
    }
    eprintln!("{counts:?}");
}

/// Seeds whose runs have broken a promise, each for another reason that was found so and mended. A
/// change of the simulation makes other runs of them: what each was about is kept by unit tests of
/// the rule, and these are a place to look first.
const FOUND: [(u64, &str); 5] = [
    (
        161,
        "a renewal in a snapshot was taken for an older one that was seen: two nodes served",
    ),
    (
        310,
        "a renewal read at the start was waited for without end: nobody served",
    ),
    (
        207,
        "a copy of the FREE_ALL of a host that was not known freed its later locks",
    ),
    (
        2518,
        "a refused GRANTED released what a repeated LOCK had been told",
    ),
    (
        2265,
        "a copy of a notice cleared the memory of calls: a late LOCK took what nobody had",
    ),
];

#[test]
fn what_was_found_stays_mended() {
    for (seed, what) in FOUND {
        eprintln!("{what}");
        must_hold(std::iter::once(seed));
    }
}

#[test]
fn all_promises_hold_in_further_runs() {
    must_hold(1000..2500);
}

#[test]
fn all_promises_hold_in_still_further_runs() {
    must_hold(2500..4000);
}

#[test]
fn all_promises_hold_in_the_seeds_that_were_asked_for() {
    let Ok(asked) = std::env::var("HAVENFS_SEEDS") else {
        return;
    };
    let number = |text: &str| text.parse::<u64>().ok();
    let range = asked.split_once("..");
    let range: Option<Range<u64>> = range.and_then(|(from, to)| Some(number(from)?..number(to)?));
    must_hold(range.unwrap_or_default());
}
