//! The ways to look into a running server: the control socket and the metrics page.

mod acts;
mod cluster;
pub mod early;
pub mod locks;
pub mod metrics_page;
pub mod socket;
pub mod table;

use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::node::Node;
use crate::services::{Services, Slot};
use crate::volumes;

/// Opens the control socket, or goes on with the one that is open, and the metrics page.
pub async fn start(
    services: Arc<Services>,
    open: Option<UnixListener>,
    stopped: watch::Receiver<bool>,
) -> std::io::Result<socket::ControlSocket> {
    if let Some(address) = services.config.settings.metrics {
        match tokio::net::TcpListener::bind(address).await {
            Ok(listener) => {
                let services = Arc::clone(&services);
                tokio::spawn(metrics_page::serve(services, listener, stopped.clone()));
            }
            // Not worth refusing to serve files for.
            Err(error) => tracing::warn!(%address, %error, "no metrics: cannot listen"),
        }
    }
    socket::ControlSocket::open(services, open, stopped)
}

/// Reads the export lists of all services that are open here again, without holding up the control
/// runtime.
pub async fn reload_in_background(services: &Arc<Services>) {
    for slot in &services.slots {
        if let Some(node) = slot.serving()
            && let Err(error) = reload(services, slot, &node).await
        {
            tracing::error!("export lists not reloaded: {error}");
        }
    }
}

/// Reads the export lists again on a thread that may wait for a disk.
pub async fn reload(
    services: &Arc<Services>,
    slot: &Slot,
    node: &Arc<Node>,
) -> Result<String, String> {
    let (services, node) = (Arc::clone(services), Arc::clone(node));
    let sources = slot.config.settings.sources.clone();
    let work = move || {
        let checked = volumes::check_overlap(&services.config.export_lists());
        let done = checked.and_then(|()| volumes::reload(&sources, &node));
        done.map_err(|error| error.to_string())
    };
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| error.to_string())?
}
