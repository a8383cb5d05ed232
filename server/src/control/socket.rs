//! The control socket: a request is one line, the answer one JSON document.
//!
//! Requests: `status`, `clients`, `exports`, `reload`, `hosts`, `locks`, `waiting`, `end-grace`,
//! `notify ADDRESS`, `break ADDRESS [PATH]`. The socket belongs to the server's user and to nobody
//! else. A socket that is left over from a dead server is replaced.

use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use havenfs_nsm::notifier::Progress;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use super::locks;
use crate::clients::unix_seconds;
use crate::cluster::state::Completeness;
use crate::config::Settings;
use crate::node::Node;

/// The longest request.
const REQUEST_BYTES_MAX: usize = 4096;
/// How long a request may take to arrive.
const TIME_MAX: Duration = Duration::from_secs(5);

/// The open control socket.
#[derive(Debug)]
pub struct ControlSocket {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl ControlSocket {
    /// Opens the socket and serves it until `stopped` is true.
    pub fn open(
        settings: Settings,
        node: Arc<Node>,
        mut stopped: watch::Receiver<bool>,
    ) -> io::Result<Self> {
        let path = settings.control.clone();
        let listener = listen(&path)?;
        let task = tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    _ = stopped.wait_for(|stopped| *stopped) => return,
                };
                if let Ok((stream, _)) = accepted {
                    let (settings, node) = (settings.clone(), Arc::clone(&node));
                    tokio::spawn(async move {
                        if let Err(error) = answer(&settings, &node, stream).await {
                            tracing::debug!(%error, "control request failed");
                        }
                    });
                }
            }
        });
        Ok(Self { path, task })
    }

    /// Waits for the end of the service and removes the socket.
    pub async fn close(self) {
        // The task ends by itself once the server stops.
        let _ = self.task.await;
        let _ = std::fs::remove_file(&self.path);
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    // The state directory's lock has made sure that no other server of ours is alive on it; a
    // server on another one would answer here.
    if path.exists() {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!(
                    "another server answers on `{}`; give this one a socket of its own with \
                     --control",
                    path.display()
                ),
            ));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn answer(settings: &Settings, node: &Arc<Node>, mut stream: UnixStream) -> io::Result<()> {
    let mut request = Vec::new();
    let read = async {
        while !request.contains(&b'\n') && request.len() < REQUEST_BYTES_MAX {
            if stream.read_buf(&mut request).await? == 0 {
                break;
            }
        }
        Ok::<(), io::Error>(())
    };
    tokio::time::timeout(TIME_MAX, read).await??;
    let answer = match request.trim_ascii() {
        b"status" => status(settings, node),
        b"clients" => clients(node),
        b"exports" => exports(node),
        b"reload" => match super::reload(settings, node).await {
            Ok(done) => json!({ "done": done }),
            Err(error) => json!({ "error": error }),
        },
        b"end-grace" => end_grace(node).await,
        b"hosts" => locks::hosts(node),
        b"locks" => listed(node, locks::held).await,
        b"waiting" => listed(node, locks::waiting).await,
        request => match String::from_utf8_lossy(request).split_once(' ') {
            Some(("notify", host)) => notify(node, host),
            Some(("break", what)) => locks::break_locks(node, what).await,
            _ => json!({ "error": format!("unknown request `{}`", request.escape_ascii()) }),
        },
    };
    stream.write_all(answer.to_string().as_bytes()).await?;
    stream.shutdown().await
}

fn status(settings: &Settings, node: &Node) -> Value {
    let ports: Vec<Value> = node
        .ports
        .entries()
        .iter()
        .map(|entry| {
            json!({
                "program": entry.program,
                "version": entry.version,
                "netid": entry.netid.name(),
                "port": entry.address.port(),
            })
        })
        .collect();
    let limits: serde_json::Map<String, Value> = node
        .metrics
        .limits()
        .iter()
        .map(|(name, counter)| ((*name).to_owned(), counter.get().into()))
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "state_dir": settings.state_dir.display().to_string(),
        "starts": node.state.starts(),
        "exports": node.exports.load().exports().len(),
        "connections": node.connections.all(),
        "calls": node.metrics.calls(),
        "files_open": node.files.opened_count(),
        "held_bytes": node.budget.used(),
        "portmapper": node.portmapper.get(),
        "ports": ports,
        "limits_hit": limits,
        "locking": lock_status(node),
    })
}

/// Makes a list on a thread that may wait for a disk.
async fn listed(node: &Arc<Node>, list: fn(&Node) -> Value) -> Value {
    let node = Arc::clone(node);
    let made = tokio::task::spawn_blocking(move || list(&node)).await;
    made.unwrap_or_else(|error| json!({ "error": error.to_string() }))
}

async fn end_grace(node: &Node) -> Value {
    let Some(locks) = node.locks.get() else {
        return json!({ "error": "locks are not served yet" });
    };
    match locks.end_grace("an operator said so").await {
        Ok(done) => json!({ "done": done }),
        Err(error) => json!({ "error": error.to_string() }),
    }
}

fn notify(node: &Node, host: &str) -> Value {
    let Ok(address) = host.parse::<IpAddr>() else {
        return json!({ "error": format!("`{host}` is no address") });
    };
    match node
        .locks
        .get()
        .map_or(0, |locks| locks.tell_again(address))
    {
        0 => json!({ "error": format!("no host with the address {address} has locked anything") }),
        _ => json!({ "done": format!("telling {address} of the last restart") }),
    }
}

/// What is so of the locks, for people who wonder whether all is well.
fn lock_status(node: &Node) -> Value {
    let Some(locks) = node.locks.get() else {
        return Value::Null;
    };
    let told = locks.announcements();
    let count = |wanted: fn(&Progress) -> bool| {
        told.iter().filter(|(_, progress)| wanted(progress)).count()
    };
    let state = locks.state();
    let table = state.table();
    let (complete, since) = match state.completeness() {
        Completeness::Complete { since_epoch } => (true, since_epoch),
        Completeness::Incomplete { since_epoch } => (false, since_epoch),
    };
    json!({
        "epoch": state.epoch(),
        "nsm_state": state.nsm_state().0,
        "complete": complete,
        "since_epoch": since,
        "in_grace": state.in_grace(),
        "locks": table.lock_count(),
        "waiting": table.waiting_count(),
        "unconfirmed_grants": table.deliveries(0).count(),
        "hosts": table.host_count(),
        "hosts_told": count(|progress| *progress == Progress::Told),
        "hosts_being_told": count(|progress| matches!(progress, Progress::Telling { .. })),
        "hosts_not_reached": count(|progress| *progress == Progress::GivenUp),
    })
}

fn clients(node: &Node) -> Value {
    let now = unix_seconds();
    let mounts = node.mounts.entries();
    node.clients
        .list()
        .iter()
        .map(|client| {
            let traffic = client.traffic();
            let idle = (traffic.last_call > 0).then(|| now.saturating_sub(traffic.last_call));
            let mounted: Vec<String> = mounts
                .iter()
                .filter(|entry| entry.host == client.peer.ip())
                .map(|entry| entry.path.escape_ascii().to_string())
                .collect();
            json!({
                "peer": client.peer.to_string(),
                "local": client.local.to_string(),
                "exports": mounted,
                "connected_seconds": now.saturating_sub(client.since),
                "calls": traffic.calls,
                "bytes_received": traffic.bytes_received,
                "bytes_sent": traffic.bytes_sent,
                "idle_seconds": idle,
            })
        })
        .collect()
}

fn exports(node: &Node) -> Value {
    node.exports
        .load()
        .exports()
        .iter()
        .map(|export| {
            let volume = node.files.volume(export.id, 0);
            let rules: Vec<Value> = export
                .rules()
                .iter()
                .map(|rule| {
                    json!({ "client": rule.client.to_string(), "options": rule.options.words() })
                })
                .collect();
            json!({
                "path": export.spec.path.display().to_string(),
                "id": export.id,
                "open": volume.is_some(),
                "kernel_handles": volume.as_ref().is_some_and(|volume| volume.has_handles),
                "fsid": volume.map(|volume| format!("{:016x}", volume.fsid)),
                "rules": rules,
            })
        })
        .collect()
}
