//! The ways to look into a running server: the control socket and the metrics page.

mod acts;
pub mod locks;
pub mod metrics_page;
pub mod socket;
pub mod table;

use std::sync::Arc;

use tokio::sync::watch;

use crate::config::Settings;
use crate::node::Node;
use crate::volumes;

/// Opens the control socket and the metrics page.
pub async fn start(
    settings: &Settings,
    node: Arc<Node>,
    stopped: watch::Receiver<bool>,
) -> std::io::Result<socket::ControlSocket> {
    if let Some(address) = settings.metrics {
        match tokio::net::TcpListener::bind(address).await {
            Ok(listener) => {
                let node = Arc::clone(&node);
                tokio::spawn(metrics_page::serve(node, listener, stopped.clone()));
            }
            // Not worth refusing to serve files for.
            Err(error) => tracing::warn!(%address, %error, "no metrics: cannot listen"),
        }
    }
    socket::ControlSocket::open(settings.clone(), node, stopped)
}

/// Reads the export lists again without holding up the control runtime.
pub async fn reload_in_background(settings: &Settings, node: &Arc<Node>) {
    if let Err(error) = reload(settings, node).await {
        tracing::error!("export lists not reloaded: {error}");
    }
}

/// Reads the export lists again on a thread that may wait for a disk.
pub async fn reload(settings: &Settings, node: &Arc<Node>) -> Result<String, String> {
    let (sources, node) = (settings.sources.clone(), Arc::clone(node));
    let work = move || volumes::reload(&sources, &node).map_err(|error| error.to_string());
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| error.to_string())?
}
