//! One workload against one server, and the rows of a comparison.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::load::{Extent, Figures, Load};
use crate::locks;
use crate::placement::{self, Placement};
use crate::session::{Identity, Session};
use crate::work::Work;
use crate::workload::Workload;

/// The longest time for one pass through a directory.
const PASS_TIME_MAX: Duration = Duration::from_mins(1);

/// Where a server is and what it exports.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) nfs: SocketAddr,
    pub(crate) mount: SocketAddr,
    pub(crate) nlm: SocketAddr,
    pub(crate) path: String,
    pub(crate) who: Identity,
    /// A directory of the file system that the server keeps its state on.
    pub(crate) state: PathBuf,
}

/// How calls are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shape {
    pub(crate) connections: usize,
    pub(crate) outstanding: usize,
    pub(crate) placement: Placement,
}

/// A row of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) workload: Workload,
    pub(crate) shape: Shape,
    /// From the first call to a server that never saw the directory, once through it.
    pub(crate) first_pass: bool,
}

/// The shapes that every call is measured in.
pub(crate) const SHAPES: [Shape; 4] = [
    Shape {
        connections: 8,
        outstanding: 8,
        placement: Placement::Free,
    },
    Shape {
        connections: 1,
        outstanding: 16,
        placement: Placement::Together,
    },
    Shape {
        connections: 1,
        outstanding: 1,
        placement: Placement::Together,
    },
    Shape {
        connections: 1,
        outstanding: 1,
        placement: Placement::Apart,
    },
];
/// The shapes that locks are measured in.
pub(crate) const LOCK_SHAPES: [Shape; 2] = [
    Shape {
        connections: 1,
        outstanding: 1,
        placement: Placement::Free,
    },
    SHAPES[0],
];
/// A client reads a directory page by page, so each connection has one call under way.
pub(crate) const LIST_SHAPE: Shape = Shape {
    connections: 8,
    outstanding: 1,
    placement: Placement::Free,
};
/// One reader, to see a directory that the server never saw.
pub(crate) const FIRST_PASS_SHAPE: Shape = Shape {
    connections: 1,
    outstanding: 1,
    placement: Placement::Free,
};

/// All rows for directories of at most `entries_max` files, in the order of measuring.
pub(crate) fn rows(entries_max: u32) -> Vec<Row> {
    let mut rows = Vec::new();
    for shape in SHAPES {
        for workload in Workload::CALLS {
            rows.push(Row {
                workload,
                shape,
                first_pass: false,
            });
        }
    }
    for workload in Workload::LISTS {
        if workload.listed().is_some_and(|size| size <= entries_max) {
            rows.push(Row {
                workload,
                shape: FIRST_PASS_SHAPE,
                first_pass: true,
            });
            rows.push(Row {
                workload,
                shape: LIST_SHAPE,
                first_pass: false,
            });
        }
    }
    rows
}

/// The rows of a comparison of locks, in the order of measuring.
pub(crate) fn lock_rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for shape in LOCK_SHAPES {
        for workload in Workload::LOCKS {
            // What a commit costs alone.
            if workload.locks() || shape == LOCK_SHAPES[0] {
                rows.push(Row {
                    workload,
                    shape,
                    first_pass: false,
                });
            }
        }
    }
    rows
}

/// Mounts and measures one row.
pub(crate) fn measure(
    place: &Place,
    row: Row,
    pids: &[u32],
    length: Duration,
) -> anyhow::Result<Figures> {
    match row.workload {
        Workload::Commit => return locks::commits(&place.state, length),
        Workload::StoreCommit => return locks::store_commits(&place.state, length),
        _ => {}
    }
    let root = Session::connect(place.mount, place.who)?.mount(&place.path)?;
    let mut session = Session::connect(place.nfs, place.who)?;
    let Shape {
        connections,
        outstanding,
        placement,
    } = row.shape;
    let slots = connections * outstanding;
    let work = Work::prepare(row.workload, &mut session, &root, place.who, slots)?;
    let mut address = place.nfs;
    if row.workload.locks() {
        locks::make_ready(row.workload, place, &mut session, &root)?;
        address = place.nlm;
    }
    drop(session);
    let extent = if row.first_pass {
        Extent::OnePass(PASS_TIME_MAX)
    } else {
        Extent::Time(length)
    };
    let load = Load::open(address, work, connections, outstanding)?;
    let _placed = placement::place(placement, pids)?;
    load.run(pids, extent)
}
