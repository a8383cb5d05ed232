//! The metrics page: one HTTP answer in Prometheus' text form, whatever is asked.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::node::Node;

/// The longest request that is read.
const REQUEST_BYTES_MAX: usize = 4096;
/// How long a request may take.
const TIME_MAX: Duration = Duration::from_secs(5);

/// Serves the page until `stopped` is true.
pub async fn serve(node: Arc<Node>, listener: TcpListener, mut stopped: watch::Receiver<bool>) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopped.wait_for(|stopped| *stopped) => return,
        };
        if let Ok((stream, _)) = accepted {
            // One at a time: a page is made in microseconds, and a slow reader is cut off.
            let _ = tokio::time::timeout(TIME_MAX, answer(&node, stream)).await;
        }
    }
}

async fn answer(node: &Node, mut stream: TcpStream) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() > REQUEST_BYTES_MAX || stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let body = page(node);
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
        // Writing to a string can\'t fail.
        let _ = write!(
            text,
            "# HELP havenfs_{name} {help}\n# TYPE havenfs_{name} gauge\nhavenfs_{name} {value}\n"
        );
    }
    text
}
