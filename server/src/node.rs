//! A node: everything that the programs share, put together once at start.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::backend::files::Files;
use crate::clients::Clients;
use crate::export::{ExportTable, Groups, Names};
use crate::metrics::Metrics;
use crate::mount_list::MountList;
use crate::net::limits::{Budget, ConnectionCounts};
use crate::pool::Pool;
use crate::programs::portmap::PortTable;
use crate::reply_cache::ReplyCache;
use crate::state::State;

/// What the programs share.
#[derive(Debug)]
pub struct Node {
    /// The state directory.
    pub state: State,
    /// The exports in force; a reload swaps the table whole.
    pub exports: ArcSwap<ExportTable>,
    /// The names of hosts that the exports mention.
    pub names: Names,
    /// The groups of users, for `manage-gids`.
    pub groups: Groups,
    /// The files behind the exports.
    pub files: Files,
    /// Who mounted what.
    pub mounts: MountList,
    /// The programs and ports that the portmapper tells.
    pub ports: PortTable,
    /// How clients find the ports, for people; set once at start.
    pub portmapper: std::sync::OnceLock<String>,
    /// The answers that may be asked for again.
    pub reply_cache: ReplyCache,
    /// The worker threads.
    pub pool: Pool,
    /// The counters.
    pub metrics: Metrics,
    /// The bytes that all connections hold.
    pub budget: Arc<Budget>,
    /// The open connections, by peer.
    pub connections: Arc<ConnectionCounts>,
    /// The open connections of NFS clients.
    pub clients: Arc<Clients>,
}
