//! The metrics page: one HTTP answer in Prometheus' text form, whatever is asked.

mod cluster;

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use havenfs_nsm::notifier::Progress;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::lock_service::LockService;
use crate::node::Node;
use crate::services::Services;

/// The longest request that is read.
const REQUEST_BYTES_MAX: usize = 4096;
/// How long a request may take.
const TIME_MAX: Duration = Duration::from_secs(5);

/// Serves the page until `stopped` is true.
pub async fn serve(
    services: Arc<Services>,
    listener: TcpListener,
    mut stopped: watch::Receiver<bool>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopped.wait_for(|stopped| *stopped) => return,
        };
        if let Ok((stream, _)) = accepted {
            // One at a time: a page is made in microseconds, and a slow reader is cut off.
            let _ = tokio::time::timeout(TIME_MAX, answer(&services, stream)).await;
        }
    }
}

async fn answer(services: &Services, mut stream: TcpStream) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() > REQUEST_BYTES_MAX || stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    // Of the first service that is open here.
    let open = services.slots.iter().find_map(|slot| slot.serving());
    let mut body = open.map_or_else(String::new, |node| page(&node));
    if services.config.cluster.is_some() {
        cluster::put(&mut body, services);
    }
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// The counters, and what is so right now.
pub fn page(node: &Node) -> String {
    let mut text = node.metrics.render();
    for (name, help, value) in [
        (
            "connections_open",
            "Connections open now.",
            node.connections.all(),
        ),
        (
            "held_bytes",
            "Bytes held for calls and replies.",
            node.budget.used(),
        ),
        (
            "files_open",
            "Files in the cache of opened files.",
            node.files.opened_count(),
        ),
        (
            "calls_queued",
            "Calls that wait for a worker thread.",
            node.pool.queued(),
        ),
        (
            "replies_kept",
            "Replies in the duplicate request cache.",
            node.reply_cache.len(),
        ),
    ] {
        put_gauge(&mut text, name, help, value as u64);
    }
    if let Some(locks) = node.locks.get() {
        text.push_str(&locks.counters().render());
        put_locks(&mut text, locks);
    }
    text
}

/// What is so of the locks right now. Looks only at what is counted anyway.
fn put_locks(text: &mut String, locks: &LockService) {
    let told = locks.announcements();
    let told = |wanted: fn(&Progress) -> bool| {
        told.iter().filter(|(_, progress)| wanted(progress)).count()
    };
    let state = locks.state();
    let (table, hints) = (state.table(), state.table().suspicions());
    let gauges = [
        (
            "epoch",
            "How often a node began to serve.",
            u64::from(state.epoch()),
        ),
        (
            "nsm_state",
            "The NSM state number.",
            state.nsm_state().0.unsigned_abs().into(),
        ),
        (
            "lock_table_complete",
            "1 if the table has every lock that was granted.",
            u64::from(!state.in_grace()),
        ),
        (
            "locks_held",
            "Ranges that are locked.",
            table.lock_count() as u64,
        ),
        (
            "locks_waiting",
            "Requests that wait.",
            table.waiting_count() as u64,
        ),
        (
            "grants_unconfirmed",
            "Grants not confirmed.",
            table.grant_count() as u64,
        ),
        ("shares_held", "Shares.", table.share_count() as u64),
        (
            "hosts_known",
            "Hosts that lock or have locked.",
            table.host_count() as u64,
        ),
        (
            "hosts_told",
            "Hosts that heard of the last restart.",
            told(|progress| *progress == Progress::Told) as u64,
        ),
        (
            "hosts_being_told",
            "Hosts that are being told of it.",
            told(|progress| matches!(progress, Progress::Telling { .. })) as u64,
        ),
        (
            "hosts_not_reached",
            "Hosts that did not answer in time.",
            told(|progress| *progress == Progress::GivenUp) as u64,
        ),
        (
            "writers_refused",
            "Refusals of writes in force.",
            table.refused_writers().count() as u64,
        ),
        (
            "suspicions_older_life",
            "Locks with a raised state.",
            hints.older_life,
        ),
        (
            "suspicions_other_address",
            "Owners with another address.",
            hints.other_address,
        ),
        (
            "suspicions_doubtful_notice",
            "Notices not believed.",
            hints.doubtful_notice,
        ),
    ];
    drop(state);
    for (name, help, value) in gauges {
        put_gauge(text, name, help, value);
    }
}

fn put_gauge(text: &mut String, name: &str, help: &str, value: u64) {
    // Writing to a string can't fail.
    let _ = write!(
        text,
        "# HELP havenfs_{name} {help}\n# TYPE havenfs_{name} gauge\nhavenfs_{name} {value}\n"
    );
}
