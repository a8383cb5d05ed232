//! The locks and hosts as the control socket shows them.
//!
//! Everything is read from a clone of the table, which costs nothing to make and holds up nobody,
//! on a thread that may wait for a disk: files are shown by their paths.

use std::collections::BTreeSet;
use std::net::IpAddr;

use havenfs_nlm::keys::FileKey;
use havenfs_nlm::listing::{HeldEntry, HostEntry, LockEntry, LockId};
use havenfs_nlm::suspicion::Suspicion;
use havenfs_nlm::table::LockTable;
use havenfs_nsm::notifier::{Progress, Target};
use serde_json::{Value, json};

use crate::cluster::service::Completeness;
use crate::lock_service::{LockService, unix_seconds};
use crate::node::Node;

/// The longest list; the rest is counted.
const ENTRIES_MAX: usize = 10_000;

/// What is shown: the table as it was at one moment.
pub(super) struct View<'a> {
    node: &'a Node,
    locks: &'a LockService,
    pub(super) table: LockTable,
    epoch: u32,
    now: u32,
}

impl<'a> View<'a> {
    /// Of nothing while locks are not served yet.
    pub(super) fn of(node: &'a Node) -> Option<Self> {
        let locks = node.locks.get()?;
        let state = locks.state();
        Some(Self {
            node,
            locks,
            table: state.table().clone(),
            epoch: state.epoch(),
            now: unix_seconds(),
        })
    }

    fn lock(&self, lock: &LockEntry<'_>) -> Value {
        json!({
            "path": self.path(lock.file),
            "range": lock.range.to_string(),
            "kind": if lock.exclusive { "exclusive" } else { "shared" },
            "host": lock.host.address.to_string(),
            "name": lock.host.caller_name.escape_ascii().to_string(),
            "owner": lock.owner.svid,
            "oh": lock.owner.oh.escape_ascii().to_string(),
            "since": lock.since,
            "age_seconds": self.now.saturating_sub(lock.since),
        })
    }

    fn held(&self, held: &HeldEntry<'_>) -> Value {
        let reclaimed = self.is_reclaimed(held);
        let suspect = self.suspicion(held).map(words);
        let notes = [
            held.unconfirmed.then_some("not confirmed"),
            (reclaimed == Some(false)).then_some("not reclaimed"),
            suspect,
        ];
        let notes: Vec<&str> = notes.into_iter().flatten().collect();
        let mut entry = self.lock(&held.lock);
        entry["confirmed"] = json!(!held.unconfirmed);
        entry["reclaimed"] = json!(reclaimed);
        entry["suspect"] = json!(suspect);
        entry["notes"] = json!(notes);
        entry
    }

    /// Why a lock is suspect. What its host reclaimed after a doubtful notice is not.
    fn suspicion(&self, held: &HeldEntry<'_>) -> Option<Suspicion> {
        held.suspicion.filter(|suspicion| {
            let Suspicion::DoubtfulNotice { since } = *suspicion else {
                return true;
            };
            let reclaimed = self.locks.reclaims().last(held.id);
            let ago = reclaimed.map(|at| at.elapsed().as_secs());
            ago.is_none_or(|ago| u64::from(self.now).saturating_sub(ago) < u64::from(since))
        })
    }

    /// Whether a host spoke of its lock again since the last restart; none if it took it since.
    fn is_reclaimed(&self, held: &HeldEntry<'_>) -> Option<bool> {
        (held.epoch < self.epoch).then(|| self.locks.reclaims().last(held.id).is_some())
    }

    /// Locks by what names them.
    pub(super) fn entries(&self, ids: &[LockId]) -> Vec<Value> {
        let ids: BTreeSet<LockId> = ids.iter().copied().collect();
        let held = self.table.held_entries();
        held.filter(|held| ids.contains(&held.id))
            .map(|held| self.held(&held))
            .take(ENTRIES_MAX)
            .collect()
    }

    /// A file's path for people.
    pub(super) fn path(&self, file: &FileKey) -> String {
        // Who holds the node keeps its storage in use, and each file may take a while.
        if self.node.gate.is_over() {
            return "(not looked up: the service is leaving this node)".to_owned();
        }
        let Some((export_id, path)) = self.node.files.path_of(file) else {
            return "(deleted, or no export shows it)".to_owned();
        };
        let exports = self.node.exports.load();
        let root = exports.by_id(export_id).map(|export| &export.spec.path);
        match root {
            // Seen through a private copy of the mount, paths begin at the export.
            Some(root) if !path.starts_with(root) => {
                let inside = path.strip_prefix("/").unwrap_or(&path);
                root.join(inside).display().to_string()
            }
            _ => path.display().to_string(),
        }
    }
}

fn host_entry(host: &HostEntry<'_>, told: &[(Target, Progress)]) -> Value {
    let of_host = |target: &Target| {
        (target.address, target.service_address) == (host.host.address, host.host.service_address)
    };
    let told = told.iter().find(|(target, _)| of_host(target));
    let told = told.map(|(_, progress)| match progress {
        Progress::Telling { tries } => format!("being told, try {tries}"),
        Progress::Told => "told".to_owned(),
        Progress::GivenUp => "not reached".to_owned(),
    });
    json!({
        "address": host.host.address.to_string(),
        "name": host.host.caller_name.escape_ascii().to_string(),
        "service_address": host.host.service_address.to_string(),
        "held": host.held,
        "waiting": host.waiting,
        "monitored": host.monitored,
        "nsm_state": host.nsm_state,
        "lost": host.lost,
        "restart": told,
    })
}

/// As many entries as are shown, and how many there are beyond.
fn list<T>(entries: impl Iterator<Item = T>, show: impl FnMut(T) -> Value) -> Value {
    let mut entries = entries.fuse();
    let shown: Vec<Value> = entries.by_ref().take(ENTRIES_MAX).map(show).collect();
    json!({ "entries": shown, "not_shown": entries.count() })
}

/// What `make` lists; nothing while locks are not served yet.
fn listed(node: &Node, make: impl FnOnce(&View<'_>) -> Value) -> Value {
    let nothing = || list(std::iter::empty(), |value| value);
    View::of(node).map_or_else(nothing, |view| make(&view))
}

/// All locks that are held.
pub fn held(node: &Node) -> Value {
    listed(node, |view| {
        list(view.table.held_entries(), |held| view.held(&held))
    })
}

/// All requests that wait.
pub fn waiting(node: &Node) -> Value {
    listed(node, |view| {
        list(view.table.waiting_entries(), |waits| view.lock(&waits))
    })
}

/// All hosts.
pub fn hosts(node: &Node) -> Value {
    listed(node, |view| {
        let told = view.locks.announcements();
        list(view.table.host_entries(), |host| host_entry(&host, &told))
    })
}

/// All refusals of writes.
pub fn refused(node: &Node) -> Value {
    listed(node, |view| {
        list(view.table.refused_writers(), |(address, file)| {
            let path = file.as_ref().map(|file| view.path(file));
            json!({ "host": address.to_string(), "path": path })
        })
    })
}

/// All about the hosts behind an address.
pub fn host(node: &Node, address: IpAddr) -> Value {
    let none = || json!({ "error": format!("no host with the address {address} is known") });
    let Some(view) = View::of(node) else {
        return none();
    };
    let told = view.locks.announcements();
    let hosts = view.table.host_entries();
    let hosts: Vec<Value> = hosts
        .filter(|host| host.host.address == address)
        .map(|host| host_entry(&host, &told))
        .collect();
    if hosts.is_empty() {
        return none();
    }
    let held = view.table.held_entries();
    let held = held.filter(|held| held.lock.host.address == address);
    let waits = view.table.waiting_entries();
    let waits = waits.filter(|waits| waits.host.address == address);
    let refused = view.table.refused_writers();
    let refused = refused.filter(|(of, _)| *of == address);
    json!({
        "hosts": hosts,
        "locks": list(held, |held| view.held(&held)),
        "waiting": list(waits, |waits| view.lock(&waits)),
        "writes_refused": list(refused, |(_, file)| match file {
            Some(file) => json!(view.path(file)),
            None => json!("all files"),
        }),
    })
}

/// What is so of the locks, for people who wonder whether all is well.
pub fn status(node: &Node) -> Value {
    let Some(view) = View::of(node) else {
        return Value::Null;
    };
    let told = view.locks.announcements();
    let count = |wanted: fn(&Progress) -> bool| {
        told.iter().filter(|(_, progress)| wanted(progress)).count()
    };
    let (mut from_before, mut not_reclaimed, mut suspect) = (0, 0, 0);
    for held in view.table.held_entries() {
        let reclaimed = view.is_reclaimed(&held);
        from_before += usize::from(reclaimed.is_some());
        not_reclaimed += usize::from(reclaimed == Some(false));
        suspect += usize::from(view.suspicion(&held).is_some());
    }
    let (completeness, nsm_state) = {
        let state = view.locks.state();
        (state.completeness(), state.nsm_state())
    };
    let (complete, since) = match completeness {
        Completeness::Complete { since_epoch } => (true, since_epoch),
        Completeness::Incomplete { since_epoch } => (false, since_epoch),
    };
    json!({
        "epoch": view.epoch,
        "nsm_state": nsm_state.0,
        "complete": complete,
        "since_epoch": since,
        "in_grace": !complete,
        "locks": view.table.lock_count(),
        "shares": view.table.share_count(),
        "from_before": from_before,
        "not_reclaimed": not_reclaimed,
        "suspect": suspect,
        "waiting": view.table.waiting_count(),
        "unconfirmed_grants": view.table.grant_count(),
        "hosts": view.table.host_count(),
        "hosts_told": count(|progress| *progress == Progress::Told),
        "hosts_being_told": count(|progress| matches!(progress, Progress::Telling { .. })),
        "hosts_not_reached": count(|progress| *progress == Progress::GivenUp),
        "writes_refused": view.table.refused_writers().count(),
    })
}

const fn words(suspicion: Suspicion) -> &'static str {
    match suspicion {
        Suspicion::OlderLife => "suspect: its host told a higher state since",
        Suspicion::OtherAddress => "suspect: its owner has another address now",
        Suspicion::DoubtfulNotice { .. } => "suspect: a notice of a reboot was not believed",
    }
}
