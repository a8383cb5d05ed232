//! The locks and hosts as the control socket shows them, and what an operator may do to them.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use havenfs_nlm::listing::LockEntry;
use havenfs_nlm::table::{FileKey, LockTable};
use serde_json::{Value, json};

use crate::node::Node;

/// The longest list; the rest is counted.
const ENTRIES_MAX: usize = 10_000;

/// The table as it is now. Cloning it costs nothing, and looking at the clone holds up nobody.
fn table_of(node: &Node) -> Option<(LockTable, u32)> {
    let locks = node.locks.get()?;
    let state = locks.state();
    Some((state.table().clone(), state.epoch()))
}

/// All locks that are held.
pub fn held(node: &Node) -> Value {
    let Some((table, epoch)) = table_of(node) else {
        return json!([]);
    };
    let entries = table.held_entries().take(ENTRIES_MAX).map(|held| {
        let mut entry = entry(node, &held.lock);
        entry["confirmed"] = json!(!held.unconfirmed);
        entry["set_in_this_epoch"] = json!(held.epoch == epoch);
        entry
    });
    entries.collect()
}

/// All requests that wait.
pub fn waiting(node: &Node) -> Value {
    let Some((table, _)) = table_of(node) else {
        return json!([]);
    };
    let entries = table.waiting_entries().take(ENTRIES_MAX);
    entries.map(|waits| entry(node, &waits)).collect()
}

/// All hosts.
pub fn hosts(node: &Node) -> Value {
    let Some((table, _)) = table_of(node) else {
        return json!([]);
    };
    let entries = table.host_entries().take(ENTRIES_MAX).map(|host| {
        json!({
            "address": host.host.address.to_string(),
            "name": host.host.caller_name.escape_ascii().to_string(),
            "service_address": host.host.service_address.to_string(),
            "held": host.held,
            "waiting": host.waiting,
            "monitored": host.monitored,
            "nsm_state": host.nsm_state,
            "lost": host.lost,
        })
    });
    entries.collect()
}

fn entry(node: &Node, lock: &LockEntry<'_>) -> Value {
    json!({
        "path": path(node, lock.file),
        "range": lock.range.to_string(),
        "kind": if lock.exclusive { "exclusive" } else { "shared" },
        "host": lock.host.address.to_string(),
        "name": lock.host.caller_name.escape_ascii().to_string(),
        "owner": lock.owner.svid,
        "oh": lock.owner.oh.escape_ascii().to_string(),
        "since": lock.since,
    })
}

/// The file's path for people.
fn path(node: &Node, file: &FileKey) -> String {
    let Some((export_id, path)) = node.files.path_of(file) else {
        return "(deleted, or no export shows it)".to_owned();
    };
    let exports = node.exports.load();
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

/// Ends what a host has: `HOST`, or `HOST PATH` for one file.
pub async fn break_locks(node: &Arc<Node>, what: &str) -> Value {
    let (host, file) = match what.split_once(' ') {
        Some((host, path)) => (host, Some(path.to_owned())),
        None => (what, None),
    };
    let Ok(address) = host.parse::<IpAddr>() else {
        return json!({ "error": format!("`{host}` is no address") });
    };
    let Some(locks) = node.locks.get() else {
        return json!({ "error": "locks are not served yet" });
    };
    let file = match file {
        None => None,
        Some(wanted) => match find(node, &wanted).await {
            Some(key) => Some(key),
            None => return json!({ "error": format!("nothing is locked on `{wanted}`") }),
        },
    };
    match locks.break_locks(address, file).await {
        Ok(freed) => json!({
            "done": format!(
                "{} locks, {} shares and {} waiting requests of {address} ended; its programs may \
                 still believe to have them, and can't reclaim them",
                freed.locks, freed.shares, freed.requests
            ),
        }),
        Err(error) => json!({ "error": error.to_string() }),
    }
}

/// What locks know a path by, if anything is locked or waited for there.
async fn find(node: &Arc<Node>, wanted: &str) -> Option<FileKey> {
    let (node, wanted) = (Arc::clone(node), wanted.to_owned());
    let looking = tokio::task::spawn_blocking(move || {
        let (table, _) = table_of(&node)?;
        let held = table.held_entries().map(|held| held.lock.file);
        let waits = table.waiting_entries().map(|waits| waits.file);
        let mut files: Vec<&FileKey> = held.chain(waits).collect();
        files.dedup();
        let is_wanted = |file: &&&FileKey| Path::new(&path(&node, file)) == Path::new(&wanted);
        files.iter().find(is_wanted).map(|file| (*file).clone())
    });
    looking.await.ok().flatten()
}
