//! The Network Lock Manager without input or output: its messages, byte ranges, the lock table.
//!
//! How to read it: [`wire`] and [`wire_v3`] turn bytes into calls and answers into bytes;
//! [`range`] says which bytes are meant; [`keys`] names files and owners and [`host`] hosts;
//! `range_set` holds the ranges and `spans` finds conflicts in crowded files. [`table`] is the lock
//! table, whose header draws the life of a lock; its parts are [`waiting`] for requests that wait,
//! [`share`], [`ending`] for locks that end otherwise than by UNLOCK, [`suspicion`] and
//! [`refused_writers`]; `entries` is what they refer to, [`limits`] how much there may be,
//! [`listing`] what people see of it and [`records`] how it is written down.
//!
//! Does not know Raft, exports, sockets, files, clocks or randomness, and does not know NSM: the
//! table is a plain value that the replicated state of the server owns and changes.

#![forbid(unsafe_code)]

pub mod ending;
mod entries;
pub mod granter;
pub mod host;
pub mod keys;
pub mod limits;
pub mod listing;
mod numbered;
pub mod range;
pub mod range_set;
pub mod records;
pub mod refused_writers;
pub mod share;
mod spans;
pub mod suspicion;
pub mod table;
pub mod waiting;
pub mod wire;
pub mod wire_v3;
