//! What an operator may do to locks and hosts: the requests of the control socket, and what is
//! said about them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use havenfs_nlm::ending::Freed;
use havenfs_nlm::table::FileKey;
use serde_json::{Value, json};

use super::locks::View;
use crate::lock_service::LockService;
use crate::node::Node;
use crate::raft::Unavailable;

/// Whom and what a request is about: `HOST` or `HOST PATH`.
struct Subject {
    address: IpAddr,
    path: Option<String>,
}

impl Subject {
    fn parse(words: &str) -> Result<Self, Value> {
        let (host, path) = match words.split_once(' ') {
            Some((host, path)) => (host, Some(path.to_owned())),
            None => (words, None),
        };
        let address = address(host)?;
        Ok(Self { address, path })
    }

    /// The file as locks know it; an error if nothing is locked or refused there.
    async fn file(&self, node: &Arc<Node>) -> Result<Option<FileKey>, Value> {
        let Some(wanted) = &self.path else {
            return Ok(None);
        };
        match find(node, wanted).await {
            Some(key) => Ok(Some(key)),
            None => Err(error(format!("nothing is locked on `{wanted}`"))),
        }
    }

    fn what(&self) -> String {
        self.path
            .as_ref()
            .map_or_else(|| "all files".to_owned(), |path| format!("`{path}`"))
    }
}

/// Reads an address.
pub(super) fn address(text: &str) -> Result<IpAddr, Value> {
    let address: IpAddr = text
        .parse()
        .map_err(|_| error(format!("`{text}` is no address; see `havenfs hosts list`")))?;
    Ok(address.to_canonical())
}

fn error(text: String) -> Value {
    json!({ "error": text })
}

fn service(node: &Node) -> Result<&Arc<LockService>, Value> {
    let locks = node.locks.get();
    locks.ok_or_else(|| error("locks are not served yet".to_owned()))
}

fn unavailable(problem: Unavailable) -> Value {
    error(problem.to_string())
}

/// `end-grace`.
pub(super) async fn end_grace(node: &Node) -> Result<Value, Value> {
    let done = service(node)?.end_grace("an operator said so").await;
    done.map(|done| json!({ "done": done }))
        .map_err(unavailable)
}

/// `would-break HOST [PATH]`: what `break` would do.
pub(super) async fn would_break(node: &Arc<Node>, words: &str) -> Result<Value, Value> {
    let subject = Subject::parse(words)?;
    let file = subject.file(node).await?;
    let Some(view) = View::of(node) else {
        return Err(error("locks are not served yet".to_owned()));
    };
    let address = subject.address;
    let is_meant = |of: &FileKey| file.as_ref().is_none_or(|file| file == of);
    let (mut locks, mut files) = (0, BTreeSet::new());
    for held in view.table.held_entries() {
        if held.lock.host.address == address && is_meant(held.lock.file) {
            locks += 1;
            files.insert(held.lock.file);
        }
    }
    let others = view.table.waiting_entries();
    let others = others.filter(|waits| waits.host.address != address && files.contains(waits.file));
    let text = format!(
        "{locks} locks of {address} on {} will end, and {} requests of other hosts that wait for \
         these files may be granted at once. Programs on {address} are not told, may go on writing \
         as if they had their locks, and can't reclaim them.",
        subject.what(),
        others.count()
    );
    Ok(json!({ "done": text, "locks": locks }))
}

/// `break HOST [PATH]`.
pub(super) async fn break_locks(node: &Arc<Node>, words: &str) -> Result<Value, Value> {
    let subject = Subject::parse(words)?;
    let file = subject.file(node).await?;
    let freed = service(node)?.break_locks(subject.address, file).await;
    let freed = freed.map_err(unavailable)?;
    Ok(json!({ "done": ended(subject.address, &freed) }))
}

/// `expire HOST`.
pub(super) async fn expire(node: &Arc<Node>, words: &str) -> Result<Value, Value> {
    let address = address(words)?;
    let freed = service(node)?.expire(address).await;
    let freed = freed.map_err(unavailable)?;
    if freed.hosts == 0 {
        return Err(error(format!(
            "no host with the address {address} is known"
        )));
    }
    Ok(json!({
        "done": format!("{}; it is told of no restart any more", ended(address, &freed)),
    }))
}

fn ended(address: IpAddr, freed: &Freed) -> String {
    format!(
        "{} locks, {} shares and {} waiting requests of {address} ended; its programs may still \
         believe to have them, and can't reclaim them",
        freed.locks, freed.shares, freed.requests
    )
}

/// `refuse HOST [PATH]` and `allow HOST [PATH]`.
pub(super) async fn refuse_writes(
    node: &Arc<Node>,
    words: &str,
    refused: bool,
) -> Result<Value, Value> {
    let subject = Subject::parse(words)?;
    let file = subject.file(node).await?;
    let (address, what) = (subject.address, subject.what());
    let done = service(node)?.refuse_writes(address, file, refused).await;
    match done.map_err(unavailable)? {
        Some(0) => Err(error(format!(
            "no write of {address} to {what} is refused; see `havenfs locks refused`"
        ))),
        Some(_) if refused => Ok(json!({
            "done": format!(
                "writes of {address} to {what} are refused until `havenfs locks allow`"
            ),
        })),
        Some(_) => Ok(json!({ "done": format!("{address} may write to {what} again") })),
        None => Err(error(
            "too many refusals of writes; take some back with `havenfs locks allow`".to_owned(),
        )),
    }
}

/// `notify HOST`.
pub(super) async fn notify(node: &Arc<Node>, words: &str) -> Result<Value, Value> {
    let address = address(words)?;
    let told = service(node)?.notify(address).await;
    match told.map_err(unavailable)? {
        0 => Err(not_monitored(address)),
        _ => Ok(json!({
            "done": format!("telling {address} that the service was restarted"),
        })),
    }
}

/// `verify HOST`.
pub(super) async fn verify(node: &Arc<Node>, words: &str) -> Result<Value, Value> {
    let address = address(words)?;
    let locks = service(node)?;
    if locks.state().in_grace() {
        return Err(error(
            "grace runs: all hosts are reclaiming now, and what they do not reclaim ends with it"
                .to_owned(),
        ));
    }
    let verified = locks.verify(address).await;
    let verified = verified.map_err(unavailable)?;
    if verified.told == 0 {
        return Err(not_monitored(address));
    }
    let (held, missing) = (verified.held, verified.missing.len());
    let node = Arc::clone(node);
    let entries = tokio::task::spawn_blocking(move || {
        View::of(&node).map_or_else(Vec::new, |view| view.entries(&verified.missing))
    });
    let entries = entries
        .await
        .map_err(|problem| error(problem.to_string()))?;
    Ok(json!({
        "host": address.to_string(),
        "held": held,
        "reclaimed": held - missing,
        "missing": { "entries": entries, "not_shown": 0 },
    }))
}

fn not_monitored(address: IpAddr) -> Value {
    error(format!(
        "no host with the address {address} wants to hear of restarts; see `havenfs hosts list`"
    ))
}

/// What locks know a path by, if anything is locked, waited for or refused there.
async fn find(node: &Arc<Node>, wanted: &str) -> Option<FileKey> {
    let (node, wanted) = (Arc::clone(node), wanted.to_owned());
    let looking = tokio::task::spawn_blocking(move || {
        let view = View::of(&node)?;
        let held = view.table.held_entries().map(|held| held.lock.file);
        let waits = view.table.waiting_entries().map(|waits| waits.file);
        let refused = view.table.refused_writers();
        let refused = refused.filter_map(|(_, file)| file.as_ref());
        let files: BTreeSet<&FileKey> = held.chain(waits).chain(refused).collect();
        let is_wanted = |file: &&FileKey| Path::new(&view.path(file)) == Path::new(&wanted);
        files.into_iter().find(is_wanted).cloned()
    });
    looking.await.ok().flatten()
}
