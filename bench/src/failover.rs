//! What clients notice when the process of a server is killed: three nodes of ours, and Ganesha,
//! which is started again at once on the same state, as the best cluster manager would do it.
//!
//! The generator's clients reclaim nothing. Both servers get the kill of the process, which closes
//! its connections; of a machine that loses its power, its clients hear nothing, and ours takes as
//! long as with the kill, while the other one's manager has to find out first.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::compare::{self, Site, WHO};
use crate::dataset;
use crate::nodes::{Nodes, others};
use crate::outage::{self, Outage};
use crate::peers::{self, Peer, Setup};

/// How long it is watched whether the held lock is given away, once new locks are granted.
const SETTLE: Duration = Duration::from_secs(2);
const TIME_MAX: Duration = Duration::from_mins(3);

/// What is killed, and how often.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct FailoverArgs {
    /// How often each of ours
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How often Ganesha with each grace; a round takes as long as that
    #[arg(long, default_value_t = 2)]
    peer_rounds: usize,
    #[command(flatten)]
    site: Site,
}

/// Prints a line for each round, and the medians as a table.
pub(crate) fn run(args: &FailoverArgs) -> anyhow::Result<()> {
    let Some(mut setup) = args.site.enter()? else {
        return Ok(());
    };
    dataset::make(&setup.export.with_file_name("other"), WHO.uid, WHO.gid, 0)?;
    let mut lines = ours(&mut setup, args.rounds)?;
    for grace in [90, 20] {
        setup.grace = Some(grace);
        let mut outages = Vec::new();
        for _ in 0..args.peer_rounds {
            outages.push(ganesha(&setup)?);
        }
        lines.push((format!("Ganesha, grace of {grace} s"), outages));
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "| what | longest write gap, ms | of a service on another node, ms | first new lock, ms | held \
         lock given away, of rounds (after s) |\n|---|---:|---:|---:|---:|"
    )?;
    for (what, outages) in lines {
        let ms = |of: fn(&Outage) -> Duration| median_ms(&outages, of);
        let given = outages.iter().filter_map(|outage| outage.given_away);
        let after: Vec<String> = given
            .map(|after| format!("{:.0}", after.as_secs_f64()))
            .collect();
        let given = if after.is_empty() {
            format!("0 of {}", outages.len())
        } else {
            let rounds = outages.len();
            format!("{} of {rounds} ({})", after.len(), after.join(", "))
        };
        writeln!(
            out,
            "| {what} | {} | {} | {} | {given} |",
            ms(|outage| outage.write_gap),
            ms(|outage| outage.other_gap.unwrap_or_default()),
            ms(|outage| outage.new_lock)
        )?;
    }
    Ok(())
}

/// What is done to a service.
#[derive(Debug, Clone, Copy)]
enum Act {
    Nothing,
    Kill,
    Move,
}

/// The active node killed while it leads the log and while it follows, and planned moves; and
/// nothing, to see what the machine does by itself.
fn ours(setup: &mut Setup, rounds: usize) -> anyhow::Result<Vec<(String, Vec<Outage>)>> {
    for directory in [&setup.scratch, &setup.state] {
        compare::empty(directory)?;
    }
    let mut nodes = Nodes::start(setup, 2)?;
    let (place, beside) = (nodes.places[0].clone(), nodes.places[1].clone());
    let mut lines = Vec::new();
    for (what, leads, act) in [
        ("havenfs, nothing", true, Act::Nothing),
        (
            "havenfs, active node killed that leads the log",
            true,
            Act::Kill,
        ),
        ("havenfs, active node killed that follows", false, Act::Kill),
        ("havenfs, planned move", true, Act::Move),
    ] {
        let mut outages = Vec::new();
        for _ in 0..rounds {
            nodes.wait_for_all()?;
            let active = nodes.active(0)?;
            let [one, two] = others(active);
            nodes.serve(1, one)?;
            // The node that is left serves nothing.
            nodes.lead(if leads { active } else { two })?;
            outages.push(outage::watch(
                &place,
                Some(&beside),
                SETTLE,
                TIME_MAX,
                || match act {
                    Act::Nothing => Ok(()),
                    Act::Kill => nodes.kill(active),
                    Act::Move => nodes.move_to(0, two),
                },
            )?);
            match act {
                Act::Nothing => {}
                Act::Kill => nodes.start_node(active)?,
                Act::Move => ensure!(nodes.active(0)? == two, "it did not move"),
            }
        }
        lines.push((what.to_owned(), outages));
    }
    Ok(lines)
}

fn ganesha(setup: &Setup) -> anyhow::Result<Outage> {
    for directory in [&setup.scratch, &setup.state] {
        compare::empty(directory)?;
    }
    let mut server = Some(peers::start(Peer::Ganesha, setup)?);
    let place = server.as_ref().context("it runs")?.place.clone();
    // Its first start has a grace as well.
    outage::wait_for_locks(&place, TIME_MAX)?;
    outage::watch(&place, None, SETTLE, TIME_MAX, || {
        drop(server.take());
        server = Some(peers::start(Peer::Ganesha, setup)?);
        Ok(())
    })
}

fn median_ms(outages: &[Outage], of: fn(&Outage) -> Duration) -> u128 {
    let mut values: Vec<Duration> = outages.iter().map(of).collect();
    values.sort_unstable();
    values.get(values.len() / 2).map_or(0, Duration::as_millis)
}
