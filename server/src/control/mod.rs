//! The ways to look into a running server: the control socket and the metrics page.

mod acts;
mod applicants;
mod bringing;
mod cluster;
pub mod early;
mod forgetting;
pub mod locks;
pub mod metrics_page;
mod moving;
mod reload;
mod repaired;
pub mod socket;
pub mod table;

use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::sync::watch;

pub use self::reload::reload_in_background;
use crate::services::Services;

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
