//! What an operator may do to locks and hosts: the requests of the control socket, and what is
//! said about them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use havenfs_nlm::ending::Freed;
use havenfs_nlm::keys::FileKey;
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
            // It would be taken for all files by whoever left a variable empty.
            Some((_, "")) => return Err(error("the path is empty".to_owned())),
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
        find(node, wanted).await.map(Some)
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
    let (address, what) = (subject.address, subject.what());
    let counted = counted(node, move |view| {
        let is_meant = |of: &FileKey| file.as_ref().is_none_or(|file| file == of);
        let (mut locks, mut files) = (0, BTreeSet::new());
        for held in view.table.held_entries() {
            if held.lock.host.address == address && is_meant(held.lock.file) {
                locks += 1;
                files.insert(held.lock.file);
            }
        }
        let waits = view.table.waiting_entries();
        let others = waits.filter(|waits| waits.host.address != address);
        (
            locks,
            others.filter(|waits| files.contains(waits.file)).count(),
        )
    });
    let (locks, others) = counted.await?;
    let text = format!(
        "{locks} locks of {address} on {what} will end, and {others} requests of other hosts that \
         wait for these files may be granted at once. Programs on {address} are not told, may go \
         on writing as if they had their locks, and can't reclaim them."
    );
    Ok(json!({ "done": text, "locks": locks }))
}

/// Looks at the locks, and at no file, where that holds nobody up.
async fn counted<T: Send + 'static>(
    node: &Arc<Node>,
    look: impl FnOnce(&View<'_>) -> T + Send + 'static,
) -> Result<T, Value> {
    let node = Arc::clone(node);
    let looking = tokio::task::spawn_blocking(move || View::of(&node).map(|view| look(&view)));
    let looked = looking
        .await
        .map_err(|problem| error(problem.to_string()))?;
    looked.ok_or_else(|| error("locks are not served yet".to_owned()))
}

/// Looks at the locks on a thread that may wait for a disk.
async fn viewed<T: Send + 'static>(
    node: &Arc<Node>,
    look: impl FnOnce(&View<'_>) -> T + Send + 'static,
) -> Result<T, Value> {
    let viewed = Arc::clone(node);
    let looking = node.looks.look(move || {
        let view = View::of(&viewed).ok_or("locks are not served yet")?;
        Ok::<_, &str>(look(&view))
    });
    looking.await.map_err(error)
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
        "done": format!("{}; it is told of no later restart", ended(address, &freed)),
    }))
}

fn ended(address: IpAddr, freed: &Freed) -> String {
    if freed.locks + freed.shares + freed.requests == 0 {
        return format!("{address} had nothing there that could end");
    }
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
            "there is no refusal of what {address} writes to {what}; see `havenfs locks refused`"
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

/// `announce SERVICE`.
pub(super) async fn announce(node: &Arc<Node>, name: &str) -> Result<Value, Value> {
    let locks = service(node)?;
    let hosts = locks.notify_all().await.map_err(unavailable)?;
    let text = if hosts == 0 {
        format!("service `{name}` has no hosts that want to hear of restarts; none is told")
    } else {
        format!(
            "telling {hosts} hosts that service `{name}` was restarted; `havenfs hosts list` shows \
             who was reached"
        )
    };
    let nsm_state = locks.state().nsm_state().0;
    Ok(json!({ "done": text, "hosts": hosts, "nsm_state": nsm_state }))
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
    let entries = viewed(node, move |view| view.entries(&verified.missing)).await?;
    Ok(json!({
        "host": address.to_string(),
        "held": held,
        "reclaimed": held - missing,
        "missing": { "entries": entries, "not_shown": missing - entries.len().min(missing) },
    }))
}

fn not_monitored(address: IpAddr) -> Value {
    error(format!(
        "no host with the address {address} wants to hear of restarts; see `havenfs hosts list`"
    ))
}

/// What locks know a path by, if anything is locked, waited for or refused there.
async fn find(node: &Arc<Node>, wanted: &str) -> Result<FileKey, Value> {
    let path = wanted.to_owned();
    let found = viewed(node, move |view| {
        let held = view.table.held_entries().map(|held| held.lock.file);
        let waits = view.table.waiting_entries().map(|waits| waits.file);
        let refused = view.table.refused_writers();
        let refused = refused.filter_map(|(_, file)| file.as_ref());
        let files: BTreeSet<&FileKey> = held.chain(waits).chain(refused).collect();
        let is_wanted = |file: &&FileKey| Path::new(&view.path(file)) == Path::new(&path);
        let found = files.into_iter().filter(is_wanted).take(2);
        found.cloned().collect::<Vec<_>>()
    });
    match &found.await?[..] {
        [key] => Ok(key.clone()),
        [] => Err(error(format!("nothing is locked on `{wanted}`"))),
        _ => Err(error(format!(
            "several files are shown as `{wanted}`, and it can't be told which one is meant"
        ))),
    }
}
