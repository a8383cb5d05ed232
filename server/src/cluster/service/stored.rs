//! How the state of a service is stored: rows, each with its length in front, in a fixed order.
//!
//! What came with a later version is at the end; an earlier version is read without it. What is
//! above a bound, or no row of that kind, is damage: nothing is guessed.

use std::io::{self, Read, Write};

use havenfs_nlm::records::Record;
use havenfs_nlm::table::LockTable;
use havenfs_nsm::nsm_state::NsmState;
use imbl::{OrdMap, OrdSet};
use serde::Deserialize;

use super::{Active, Completeness, Service, ServiceState};
use crate::cluster::definition::{Defined, Definitions, InForce};
use crate::cluster::replies::Handed;
use crate::cluster::rows::{damaged, read_row, write_end, write_row};
use crate::cluster::state::{DEFINED_VERSION, WRITERS_VERSION};
use crate::cluster::wish::{Placed, Wish};
use crate::cluster::{NodeId, connections, mounts};

/// [`Service`] as it was stored when there was one service and one node.
#[derive(Deserialize)]
struct LoneService {
    epoch: u32,
    nsm_state: NsmState,
    incarnation: u64,
    completeness: Completeness,
}

impl ServiceState {
    /// Writes the state as [`ServiceState::read`] reads it: what is known of the service, which
    /// nodes may write, the rows of the lock table, those of the handle table, the connections,
    /// the definition with what became of it, the mounts, whose storage fails, the replies,
    /// where it was put, and with which addresses nodes run, each with its length in front.
    pub(in crate::cluster) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut buffer = Vec::new();
        write_row(out, &mut buffer, &self.service)?;
        write_row(out, &mut buffer, &self.writers)?;
        for record in self.table.records() {
            write_row(out, &mut buffer, &record)?;
        }
        write_end(out)?;
        for row in &self.handles {
            write_row(out, &mut buffer, &row)?;
        }
        write_end(out)?;
        connections::write(&self.connections, out, &mut buffer)?;
        let Definitions { defined, in_force } = &self.definitions;
        write_row(out, &mut buffer, &(defined.as_deref(), &**in_force))?;
        mounts::write(&self.mounts, out, &mut buffer)?;
        write_row(out, &mut buffer, &self.failing)?;
        self.handed.write(out, &mut buffer)?;
        write_row(out, &mut buffer, &self.placed)?;
        write_row(out, &mut buffer, &self.running)
    }

    /// Reads what [`ServiceState::write`] wrote, or an earlier version of it, which has less.
    pub(in crate::cluster) fn read(input: &mut impl Read, version: u8) -> io::Result<Self> {
        let mut buffer = Vec::new();
        let service = read_row(input, &mut buffer)?.ok_or_else(damaged)?;
        let writers = if version >= WRITERS_VERSION {
            read_row(input, &mut buffer)?.ok_or_else(damaged)?
        } else {
            Vec::new()
        };
        let table = read_table(input, &mut buffer)?;
        let mut handles = OrdMap::new();
        while let Some((id, entry)) = read_row(input, &mut buffer)? {
            handles.insert(id, entry);
        }
        let connections = if version >= WRITERS_VERSION {
            connections::read(input, &mut buffer)?
        } else {
            OrdSet::new()
        };
        let (mut definitions, mut mounts) = (Definitions::default(), OrdSet::new());
        let (mut failing, mut handed) = (Vec::new(), Handed::default());
        let (mut placed, mut running) = (Placed::default(), Vec::new());
        if version >= DEFINED_VERSION {
            let row: (Option<Defined>, InForce) =
                read_row(input, &mut buffer)?.ok_or_else(damaged)?;
            definitions = Definitions::restored(row.0, row.1).ok_or_else(damaged)?;
            mounts = mounts::read(input, &mut buffer)?;
            failing = read_row(input, &mut buffer)?.ok_or_else(damaged)?;
            handed = Handed::read(input, &mut buffer)?;
            placed = read_row(input, &mut buffer)?.ok_or_else(damaged)?;
            running = read_row(input, &mut buffer)?.ok_or_else(damaged)?;
        }
        Ok(Self {
            service,
            writers,
            table,
            handles,
            connections,
            definitions,
            mounts,
            failing,
            handed,
            placed,
            running,
        })
    }

    /// Reads the state of a store from the time when there was one service and one node.
    pub(in crate::cluster) fn read_lone(input: &mut impl Read, name: &str) -> io::Result<Self> {
        let mut buffer = Vec::new();
        let lone: LoneService = read_row(input, &mut buffer)?.ok_or_else(damaged)?;
        let active = Active {
            node: NodeId::LONE,
            incarnation: lone.incarnation,
        };
        Ok(Self {
            service: Service {
                name: name.into(),
                epoch: lone.epoch,
                nsm_state: lone.nsm_state,
                active: (lone.epoch > 0).then_some(active),
                wish: Wish::Anywhere,
                completeness: lone.completeness,
            },
            table: read_table(input, &mut buffer)?,
            ..Self::default()
        })
    }
}

fn read_table(input: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<LockTable> {
    let mut table = LockTable::default();
    while let Some(record) = read_row::<Record>(input, buffer)? {
        table.restore(record).map_err(|_| damaged())?;
    }
    table.restored().map_err(|_| damaged())?;
    Ok(table)
}
