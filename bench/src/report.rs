//! Medians over the rounds as tables in Markdown.
//!
//! The page holds text by hand as well: only what stands between two marker lines is replaced.

mod locks;

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;

use crate::compare::{Event, Results};
use crate::load::Figures;
use crate::measure::{self, Row, Shape};
use crate::peers::Peer;
use crate::workload::Workload;

/// Between these lines stands what is replaced.
const FIGURES: [&str; 2] = [
    "<!-- figures: written by `havenfs-bench compare` -->\n",
    "<!-- end of figures -->\n",
];
/// The same for a comparison of locks.
const LOCK_FIGURES: [&str; 2] = [
    "<!-- figures: written by `havenfs-bench compare --locks` -->\n",
    "<!-- end of figures of locks -->\n",
];

/// What we aim at with 8 connections x 8 calls, in us of server time per call; for the lists an
/// entry at any size.
const fn goal(workload: Workload) -> f64 {
    match workload {
        Workload::Null => 0.6,
        Workload::Getattr | Workload::Access => 1.5,
        Workload::Lookup | Workload::Read4k => 2.5,
        Workload::Write4k => 5.0,
        Workload::CreateRemove => 11.0,
        Workload::List1k | Workload::List100k | Workload::List1m => 1.0,
        Workload::Read1m => 300.0,
        Workload::Write1m => 350.0,
        // Locks have tables of their own.
        Workload::LockUnlock
        | Workload::LockUnlockCrowded
        | Workload::Commit
        | Workload::StoreCommit => 0.0,
    }
}

impl Results {
    /// The median over the rounds of what `of` says about each measurement of this row.
    fn median(&self, peer: Peer, row: Row, of: impl Fn(&Figures) -> f64) -> Option<f64> {
        self.median_of(peer, row, |figures| Some(of(figures)))
    }

    /// The same where a measurement may not say it.
    fn median_of(&self, peer: Peer, row: Row, of: impl Fn(&Figures) -> Option<f64>) -> Option<f64> {
        let values = self
            .records
            .iter()
            .filter_map(|record| match &record.event {
                Event::Measured { row: at, figures } if record.peer == peer && *at == row => {
                    of(figures)
                }
                _ => None,
            });
        median(values.collect())
    }

    fn server_us(&self, peer: Peer, row: Row) -> Option<f64> {
        self.median(peer, row, Figures::server_us)
    }

    /// Those with a figure in one of `rows`.
    fn peers_of(&self, rows: &[Row]) -> Vec<Peer> {
        let mut peers = self.peers();
        peers.retain(|peer| rows.iter().any(|row| self.server_us(*peer, *row).is_some()));
        peers
    }

    /// The servers that were measured, in the order of the tables.
    fn peers(&self) -> Vec<Peer> {
        let measured = |peer: &Peer| self.records.iter().any(|record| record.peer == *peer);
        Peer::ALL.into_iter().filter(measured).collect()
    }

    fn rows(&self, shape: Shape, wanted: impl Fn(&Row) -> bool) -> Vec<Row> {
        let mut rows = measure::rows(u32::MAX);
        rows.retain(|row| {
            let measured = |peer: &Peer| self.server_us(*peer, *row).is_some();
            row.shape == shape && wanted(row) && Peer::ALL.iter().any(measured)
        });
        rows
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get((values.len() - 1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

/// Three significant digits; a dash for what was not measured.
fn number(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

fn ratio(of: Option<f64>, to: Option<f64>) -> String {
    number(of.zip(to).map(|(of, to)| of / to))
}

/// Prints the tables and puts them into the page.
pub(crate) fn write(results: &Results, page: &Path) -> anyhow::Result<()> {
    let text = render(results)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    let [begin, end] = if locks::are_in(results) {
        LOCK_FIGURES
    } else {
        FIGURES
    };
    let old = fs::read_to_string(page).unwrap_or_else(|_| format!("# Benchmarks\n\n{begin}{end}"));
    let (before, rest) = old
        .split_once(begin)
        .with_context(|| format!("{} lacks the line {begin}", page.display()))?;
    let (_, after) = rest
        .split_once(end)
        .with_context(|| format!("{} lacks the line {end}", page.display()))?;
    fs::write(page, format!("{before}{begin}\n{text}\n{end}{after}"))
        .with_context(|| format!("write {}", page.display()))?;
    writeln!(out, "written to {}", page.display())?;
    Ok(())
}

fn render(results: &Results) -> anyhow::Result<String> {
    let mut text = String::new();
    writeln!(text, "Measured were:\n")?;
    for (peer, version) in &results.versions {
        writeln!(text, "- {}: {version}", peer.title())?;
    }
    writeln!(
        text,
        "\n{} rounds, alternating; {} s for each row; Linux {}, {} processors, shared with other \
         work.",
        results.rounds,
        results.seconds,
        kernel_series(&results.kernel),
        results.processors
    )?;
    if locks::are_in(results) {
        locks::tables(&mut text, results)?;
        failures(&mut text, results)?;
        return Ok(text);
    }
    for shape in measure::SHAPES {
        let rows = results.rows(shape, |row| row.workload.listed().is_none());
        if rows.is_empty() {
            continue;
        }
        let Shape {
            connections,
            outstanding,
            placement,
        } = shape;
        let goals = shape == measure::SHAPES[0];
        writeln!(
            text,
            "\n## {connections} x {outstanding}: {connections} connection{} with {outstanding} \
             call{} under way, {}\n",
            plural(connections),
            plural(outstanding),
            placement.title()
        )?;
        writeln!(text, "Server processor time in us per call:\n")?;
        cost_table(&mut text, results, &rows, goals)?;
        writeln!(text, "\nCalls per second:\n")?;
        rate_table(&mut text, results, &rows)?;
    }
    let first = results.rows(measure::FIRST_PASS_SHAPE, |row| row.first_pass);
    let again = results.rows(measure::LIST_SHAPE, |row| row.workload.listed().is_some());
    if !again.is_empty() {
        writeln!(text, "\n## Directories\n")?;
        writeln!(
            text,
            "Server processor time in us per entry of READDIRPLUS, once through a directory that \
             the server has not seen since its start, with 1 connection:\n"
        )?;
        cost_table(&mut text, results, &first, false)?;
        writeln!(
            text,
            "\nAgain and again, 8 connections, each with one call under way:\n"
        )?;
        cost_table(&mut text, results, &again, true)?;
        writeln!(text, "\nEntries per second, again and again:\n")?;
        rate_table(&mut text, results, &again)?;
    }
    memory_table(&mut text, results)?;
    generator_note(&mut text, results)?;
    failures(&mut text, results)?;
    Ok(text)
}

/// Only the series: the rest of the name belongs to a machine.
fn kernel_series(release: &str) -> String {
    release.split('.').take(2).collect::<Vec<_>>().join(".")
}

const fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

fn head(text: &mut String, first: &str, columns: &[String]) -> anyhow::Result<()> {
    writeln!(text, "| {first} | {} |", columns.join(" | "))?;
    writeln!(text, "|---|{}", "---:|".repeat(columns.len()))?;
    Ok(())
}

fn cost_table(
    text: &mut String,
    results: &Results,
    rows: &[Row],
    goals: bool,
) -> anyhow::Result<()> {
    let peers = results.peers_of(rows);
    let mut columns: Vec<String> = peers.iter().map(|peer| peer.title().to_owned()).collect();
    let others: Vec<Peer> = peers
        .iter()
        .copied()
        .filter(|peer| *peer != Peer::Havenfs && peers.contains(&Peer::Havenfs))
        .collect();
    columns.extend(others.iter().map(|peer| match peer {
        Peer::Floor => "havenfs / floor".to_owned(),
        _ => format!("{} / havenfs", peer.title()),
    }));
    if goals {
        columns.push("goal".to_owned());
    }
    head(text, "call", &columns)?;
    for row in rows {
        let ours = results.server_us(Peer::Havenfs, *row);
        let costs = peers
            .iter()
            .map(|peer| number(results.server_us(*peer, *row)));
        let ratios = others.iter().map(|peer| {
            let theirs = results.server_us(*peer, *row);
            match peer {
                Peer::Floor => ratio(ours, theirs),
                _ => ratio(theirs, ours),
            }
        });
        let mut cells: Vec<String> = costs.chain(ratios).collect();
        if goals {
            let goal = goal(row.workload);
            let met = ours.is_some_and(|ours| ours <= goal);
            cells.push(format!("{goal}{}", if met { ", met" } else { "" }));
        }
        writeln!(text, "| {} | {} |", row.workload.title(), cells.join(" | "))?;
    }
    Ok(())
}

fn rate_table(text: &mut String, results: &Results, rows: &[Row]) -> anyhow::Result<()> {
    let peers = results.peers_of(rows);
    let columns: Vec<String> = peers.iter().map(|peer| peer.title().to_owned()).collect();
    head(text, "call", &columns)?;
    for row in rows {
        let rates = peers
            .iter()
            .map(|peer| number(results.median(*peer, *row, Figures::rate)));
        let cells: Vec<String> = rates.collect();
        writeln!(text, "| {} | {} |", row.workload.title(), cells.join(" | "))?;
    }
    Ok(())
}

fn memory_table(text: &mut String, results: &Results) -> anyhow::Result<()> {
    writeln!(text, "\n## Memory and start\n")?;
    let columns = [
        "idle, MiB",
        "after the calls, MiB",
        "peak with directories, MiB",
        "start to first answer, ms",
    ];
    head(text, "server", &columns.map(str::to_owned))?;
    for peer in results.peers() {
        let collect = |of: &dyn Fn(&Event) -> Option<f64>| {
            let records = results.records.iter().filter(|record| record.peer == peer);
            number(median(
                records.filter_map(|record| of(&record.event)).collect(),
            ))
        };
        let cells = [
            collect(&|event| match event {
                Event::Started { memory_kib, .. } => Some(*memory_kib as f64 / 1024.0),
                _ => None,
            }),
            collect(&|event| match event {
                Event::Memory { calls_kib, .. } => Some(*calls_kib as f64 / 1024.0),
                _ => None,
            }),
            collect(&|event| match event {
                Event::Memory { peak_kib, .. } => Some(*peak_kib as f64 / 1024.0),
                _ => None,
            }),
            collect(&|event| match event {
                Event::Started { start_ms, .. } => Some(*start_ms),
                _ => None,
            }),
        ];
        writeln!(text, "| {} | {} |", peer.title(), cells.join(" | "))?;
    }
    Ok(())
}

/// The generator's own cost beside that of the cheapest server, to show that it is no bottleneck.
fn generator_note(text: &mut String, results: &Results) -> anyhow::Result<()> {
    writeln!(text, "\n## The generator's own cost\n")?;
    writeln!(
        text,
        "Processor time of the load generator in us per call, every answer checked, while it \
         drove each server with 8 x 8:\n"
    )?;
    let peers = results.peers();
    let columns: Vec<String> = peers.iter().map(|peer| peer.title().to_owned()).collect();
    head(text, "call", &columns)?;
    for row in results.rows(measure::SHAPES[0], |_| true) {
        let costs = peers.iter().map(|peer| {
            let own = results.median(*peer, row, Figures::generator_us);
            number(own)
        });
        let cells: Vec<String> = costs.collect();
        writeln!(text, "| {} | {} |", row.workload.title(), cells.join(" | "))?;
    }
    let checked: u64 = results
        .records
        .iter()
        .map(|record| match &record.event {
            Event::Measured { figures, .. } => figures.checked,
            _ => 0,
        })
        .sum();
    writeln!(text, "\nAnswers checked in this run: {checked}.")?;
    Ok(())
}

fn failures(text: &mut String, results: &Results) -> anyhow::Result<()> {
    let mut lines: Vec<String> = results
        .records
        .iter()
        .filter_map(|record| match &record.event {
            Event::Failed { row, why } => Some(format!(
                "- {}, {}, {} x {}, {}: {why}",
                record.peer.title(),
                row.workload.title(),
                row.shape.connections,
                row.shape.outstanding,
                row.shape.placement.title()
            )),
            _ => None,
        })
        .collect();
    lines.sort();
    lines.dedup();
    if !lines.is_empty() {
        writeln!(
            text,
            "\nRows without a figure, and why:\n\n{}",
            lines.join("\n")
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_is_the_middle() {
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(Vec::new()), None);
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(number(Some(1234.5)), "1234");
        assert_eq!(number(Some(12.34)), "12.3");
        assert_eq!(number(Some(0.567)), "0.57");
        assert_eq!(number(None), "-");
    }
}
