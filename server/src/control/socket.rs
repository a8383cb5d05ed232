//! The control socket: a request is one line, the answer one JSON document.
//!
//! Requests: `status`, `clients`, `exports`, `reload [VERSION]`, `hosts`, `locks`, `waiting`,
//! `refused`, `end-grace`, `host ADDRESS`, `notify ADDRESS`, `verify ADDRESS`, `expire ADDRESS`,
//! and with `ADDRESS [PATH]` behind them `would-break`, `break`, `refuse` and `allow`; `cluster`,
//! `services`, `move SERVICE NODE [wait]`, `take SERVICE [wait]`, `confirm-fence SERVICE [NODE]`,
//! and with a `SERVICE` behind them `release`, `announce`, `would-forget` and `forget`;
//! `transfer [NODE]`, `add NAME ADDRESS [witness]` and `remove NAME`. `@NAME ` in front of a
//! request names the service that it is about, if there are several. With `wait` the answer says
//! what came of it; empty lines before it say that the server is still there. The socket belongs to
//! the server's user and to nobody else. A socket that is left over from a dead server is replaced.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::sleep;

use super::{acts, cluster, locks};
use crate::clock::unix_seconds;
use crate::gate::Gate;
use crate::node::Node;
use crate::services::Services;

/// The longest request.
const REQUEST_BYTES_MAX: usize = 4096;
/// How long a request may take to arrive.
const TIME_MAX: Duration = Duration::from_secs(5);
/// How often whoever waits long for an answer hears that it is to come.
const STILL_THERE: Duration = Duration::from_secs(5);
/// How often it is looked whether a service leaves, while somebody asks something of it.
const OVER_CHECK: Duration = Duration::from_millis(100);

/// The open control socket.
#[derive(Debug)]
pub struct ControlSocket {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl ControlSocket {
    /// Opens the socket, unless it is `open`, and serves it until `stopped` is true.
    pub fn open(
        services: Arc<Services>,
        open: Option<UnixListener>,
        mut stopped: watch::Receiver<bool>,
    ) -> io::Result<Self> {
        let path = services.config.settings.control.clone();
        let listener = open.map_or_else(|| listen(&path), Ok)?;
        let task = tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    _ = stopped.wait_for(|stopped| *stopped) => return,
                };
                if let Ok((stream, _)) = accepted {
                    let services = Arc::clone(&services);
                    tokio::spawn(async move {
                        if let Err(error) = answer(&services, stream).await {
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

pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
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

async fn answer(services: &Arc<Services>, mut stream: UnixStream) -> io::Result<()> {
    let answer = match read_request(&mut stream).await? {
        Ok(request) => {
            let (name, request) = match request.strip_prefix('@') {
                Some(named) => named
                    .split_once(' ')
                    .map_or((None, &*request), |(name, rest)| (Some(name), rest)),
                None => (None, &*request),
            };
            let answering = answer_of(services, name, request);
            let answer = if request.ends_with(" wait") {
                answer_patiently(&mut stream, answering).await?
            } else {
                answering.await
            };
            answer.unwrap_or_else(|error| error)
        }
        Err(error) => error,
    };
    reply(&mut stream, &answer).await
}

/// Waits for an answer that may take long, and lets whoever asked know that somebody is there;
/// fails when that one has left.
async fn answer_patiently(
    stream: &mut UnixStream,
    answering: impl Future<Output = Result<Value, Value>>,
) -> io::Result<Result<Value, Value>> {
    let mut answering = std::pin::pin!(answering);
    loop {
        match tokio::time::timeout(STILL_THERE, &mut answering).await {
            Ok(answer) => return Ok(answer),
            Err(_) => stream.write_all(b"\n").await?,
        }
    }
}

/// Reads a request; the inner error is the answer to one that is none.
pub(super) async fn read_request(stream: &mut UnixStream) -> io::Result<Result<String, Value>> {
    let (mut request, mut is_long) = (Vec::new(), false);
    let read = async {
        while request.last() != Some(&b'\n') && stream.read_buf(&mut request).await? > 0 {
            if request.len() > REQUEST_BYTES_MAX {
                // Read on all the same, or the answer would not arrive.
                is_long = true;
                request.drain(..REQUEST_BYTES_MAX);
            }
        }
        Ok::<(), io::Error>(())
    };
    tokio::time::timeout(TIME_MAX, read).await??;
    // A request that was cut could mean something else, such as all files in place of one.
    let request = request.strip_suffix(b"\n").filter(|_| !is_long);
    let request = request.map(|request| String::from_utf8_lossy(request).into_owned());
    Ok(request.ok_or_else(|| json!({ "error": "the request is too long, or has no end" })))
}

/// Sends the answer; there is nothing after it.
pub(super) async fn reply(stream: &mut UnixStream, answer: &Value) -> io::Result<()> {
    stream.write_all(answer.to_string().as_bytes()).await?;
    stream.shutdown().await
}

/// Both outcomes are answers.
async fn answer_of(
    services: &Arc<Services>,
    name: Option<&str>,
    request: &str,
) -> Result<Value, Value> {
    let error = |text: String| json!({ "error": text });
    if request == "status" {
        return Ok(status_of_all(services, name).await);
    }
    if let Some(answer) = cluster::answer(services, request).await {
        return answer;
    }
    if let Some(expected) = request.strip_prefix("reload") {
        let expected = match expected.trim() {
            "" => None,
            version => Some(
                version
                    .parse()
                    .map_err(|_| error(format!("`{}` is no version", version.escape_debug())))?,
            ),
        };
        let slot = services.slot(name).map_err(error)?;
        let done = super::reload::reload(services, slot, expected).await;
        return done.map(|done| json!({ "done": done })).map_err(error);
    }
    let node = services.open(name).map_err(error)?;
    let gate = Arc::clone(&node.gate);
    // Nobody who asks for something keeps the service from leaving: whoever holds the node keeps
    // its storage in use.
    unless_over(&gate, of_service(node, request)).await
}

/// Asks something of a service, for as long as it is open here.
pub(super) async fn unless_over(
    gate: &Gate,
    answer: impl Future<Output = Result<Value, Value>>,
) -> Result<Value, Value> {
    tokio::select! {
        answer = answer => answer,
        () = over(gate) => Err(json!({
            "error": "the service is leaving this node\nhint: see `havenfs service list` for where \
                      it is, and look there what became of this"
        })),
    }
}

async fn of_service(node: Arc<Node>, request: &str) -> Result<Value, Value> {
    let node = &node;
    Ok(match request {
        "clients" => clients(node),
        "exports" => exports(node),
        "hosts" => listed(node, locks::hosts).await,
        "locks" => looked_up(node, locks::held).await?,
        "waiting" => looked_up(node, locks::waiting).await?,
        "refused" => looked_up(node, locks::refused).await?,
        request => act(node, request).await?,
    })
}

/// Waits until the service is closed here for good.
async fn over(gate: &Gate) {
    while !gate.is_over() {
        sleep(OVER_CHECK).await;
    }
}

/// The node, the cluster and its services; and the service that is meant, if it is open here.
async fn status_of_all(services: &Arc<Services>, name: Option<&str>) -> Value {
    let mut all = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "state_dir": services.config.settings.state_dir.display().to_string(),
        "starts": services.starts,
    });
    let parts = [
        cluster::status(services),
        match services.open(name) {
            Ok(node) => {
                let mut status = status(&node);
                let mut locking = listed(&node, locks::status).await;
                if locking["complete"] == false {
                    locking["cause"] = json!(cause(services, name));
                }
                status["locking"] = locking;
                status
            }
            Err(_) => json!({}),
        },
    ];
    if let Some(all) = all.as_object_mut() {
        for part in parts {
            all.extend(part.as_object().cloned().unwrap_or_default());
        }
    }
    all
}

/// Why locks may be missing.
fn cause(services: &Services, name: Option<&str>) -> &'static str {
    let slot = services.slot(name);
    let is_told = slot.is_ok_and(|slot| slot.config.settings.recover);
    if is_told || services.cluster.generation() == 0 {
        "started with --recover"
    } else {
        "a sole survivor goes on, who may not have had all of them"
    }
}

fn status(node: &Node) -> Value {
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
        .chain(lock_limits(node))
        .collect();
    json!({
        "exports": node.exports.load().exports().len(),
        "connections": node.connections.all(),
        "calls": node.metrics.calls(),
        "files_open": node.files.opened_count(),
        "held_bytes": node.budget.used(),
        "portmapper": node.portmapper.get(),
        "ports": ports,
        "limits_hit": limits,
    })
}

/// How often each limit of the lock table was hit.
fn lock_limits(node: &Node) -> Vec<(String, Value)> {
    let limits = node.locks.get().map(|locks| locks.counters().limits());
    let limits = limits.into_iter().flatten();
    limits
        .map(|(limit, count)| (limit.name().to_owned(), count.into()))
        .collect()
}

/// Makes a list of files, whose paths may have to be read from a disk.
async fn looked_up(
    node: &Arc<Node>,
    list: impl FnOnce(&Node) -> Value + Send + 'static,
) -> Result<Value, Value> {
    let listed = Arc::clone(node);
    let made = node
        .looks
        .look(move || Ok::<_, String>(list(&listed)))
        .await;
    made.map_err(|problem| json!({ "error": problem }))
}

/// Makes a list that may be long where it holds nobody up; it waits for nothing.
async fn listed(node: &Arc<Node>, list: impl FnOnce(&Node) -> Value + Send + 'static) -> Value {
    let node = Arc::clone(node);
    let made = tokio::task::spawn_blocking(move || list(&node)).await;
    made.unwrap_or_else(|error| json!({ "error": error.to_string() }))
}

/// Does what an operator asks for; both outcomes are answers.
async fn act(node: &Arc<Node>, request: &str) -> Result<Value, Value> {
    let (word, rest) = request.split_once(' ').unwrap_or((request, ""));
    match word {
        "end-grace" => acts::end_grace(node).await,
        "host" => {
            let address = acts::address(rest)?;
            looked_up(node, move |node| locks::host(node, address)).await
        }
        "notify" => acts::notify(node, rest).await,
        "verify" => acts::verify(node, rest).await,
        "would-break" => acts::would_break(node, rest).await,
        "break" => acts::break_locks(node, rest).await,
        "expire" => acts::expire(node, rest).await,
        "refuse" => acts::refuse_writes(node, rest, true).await,
        "allow" => acts::refuse_writes(node, rest, false).await,
        _ => Err(json!({ "error": format!("unknown request `{}`", request.escape_debug()) })),
    }
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
