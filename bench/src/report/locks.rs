//! The tables of a comparison of locks.

use std::fmt::Write as _;

use super::{head, number, plural, ratio};
use crate::compare::Results;
use crate::load::{Figures, Latency};
use crate::measure::{LOCK_SHAPES, Row, Shape, lock_rows};
use crate::peers::Peer;
use crate::workload::Workload;

/// How long a call takes that waits for no other, in commits of the store.
const COMMITS: Goal = Goal::AtMost(1.3);
/// Calls per second with 64 of them under way.
const RATE: Goal = Goal::AtLeast(20_000.0);
/// Server time per call with 64 of them under way, in us.
const SERVER_US: Goal = Goal::AtMost(15.0);

/// One call at a time.
const ALONE: Shape = LOCK_SHAPES[0];

/// What we aim at.
#[derive(Debug, Clone, Copy)]
enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

impl Goal {
    fn text(self, value: Option<f64>) -> String {
        let (goal, met) = match self {
            Self::AtMost(goal) => (goal, value.is_some_and(|value| value <= goal)),
            Self::AtLeast(goal) => (goal, value.is_some_and(|value| value >= goal)),
        };
        format!("{goal}{}", if met { ", met" } else { "" })
    }
}

/// A line of a table: what it says of each server.
struct Line<'a> {
    title: String,
    of: Box<dyn Fn(Peer) -> Option<f64> + 'a>,
    goal: Option<Goal>,
}

/// Whether these are figures of locks.
pub(super) fn are_in(results: &Results) -> bool {
    !rows(results, ALONE).is_empty()
}

fn rows(results: &Results, shape: Shape) -> Vec<Row> {
    let mut rows = lock_rows();
    rows.retain(|row| row.shape == shape && !results.peers_of(&[*row]).is_empty());
    rows
}

/// Appends a table for each shape.
pub(super) fn tables(text: &mut String, results: &Results) -> anyhow::Result<()> {
    let peers = results.peers();
    let compared = peers.contains(&Peer::Havenfs) && peers.contains(&Peer::Ganesha);
    let mut columns: Vec<String> = peers.iter().map(|peer| peer.title().to_owned()).collect();
    if compared {
        columns.push("Ganesha / havenfs".to_owned());
    }
    columns.push("goal".to_owned());
    for shape in LOCK_SHAPES {
        let Shape {
            connections,
            outstanding,
            ..
        } = shape;
        writeln!(
            text,
            "\n### {connections} connection{} with {outstanding} call{} under way\n",
            plural(connections),
            plural(outstanding)
        )?;
        head(text, "call", &columns)?;
        for Line { title, of, goal } in lines(results, shape) {
            let mut cells: Vec<String> = peers.iter().map(|peer| number(of(*peer))).collect();
            if compared {
                cells.push(ratio(of(Peer::Ganesha), of(Peer::Havenfs)));
            }
            cells.push(goal.map_or_else(String::new, |goal| goal.text(of(Peer::Havenfs))));
            writeln!(text, "| {title} | {} |", cells.join(" | "))?;
        }
    }
    Ok(())
}

fn lines(results: &Results, shape: Shape) -> Vec<Line<'_>> {
    let mut lines = Vec::new();
    for row in rows(results, shape) {
        let mut add = |what: &str, of: fn(&Figures) -> Option<f64>, goal: Option<Goal>| {
            lines.push(Line {
                title: format!("{}: {what}", row.workload.title()),
                of: Box::new(move |peer| results.median_of(peer, row, of)),
                goal: goal.filter(|_| shape != ALONE),
            });
        };
        let is_call = row.workload.locks();
        if is_call {
            let server_us = |figures: &Figures| Some(figures.server_us());
            let rate = |figures: &Figures| Some(figures.rate());
            add("server time, us a call", server_us, Some(SERVER_US));
            add("calls per second", rate, Some(RATE));
        }
        add("median, us", |f| f.latency.map(|l: Latency| l.median), None);
        add(
            "99 % within, us",
            |f| f.latency.map(|l| l.percentile_99),
            None,
        );
        add("longest, us", |f| f.latency.map(|l| l.longest), None);
        if is_call && shape == ALONE {
            let title = row.workload.title();
            lines.push(Line {
                title: format!("{title}: median in such writes"),
                of: Box::new(move |peer| in_medians(results, peer, row, Workload::Commit)),
                goal: None,
            });
            lines.push(Line {
                title: format!("{title}: median in such commits"),
                of: Box::new(move |peer| in_medians(results, peer, row, Workload::StoreCommit)),
                goal: Some(COMMITS),
            });
        }
    }
    lines
}

/// How many times the median of `workload` a call takes.
fn in_medians(results: &Results, peer: Peer, row: Row, workload: Workload) -> Option<f64> {
    let median = |figures: &Figures| figures.latency.map(|latency| latency.median);
    let other = Row { workload, ..row };
    Some(results.median_of(peer, row, median)? / results.median_of(peer, other, median)?)
}
