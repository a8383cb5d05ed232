//! The control socket while a node waits for its cluster: says what is missing.
//!
//! There are no services yet to ask about. When the store is open the socket goes on to the
//! [server's own](super::socket), without a moment in which nobody answers.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::socket::{listen, read_request, reply};

/// The open socket of a node that waits.
#[derive(Debug)]
pub struct EarlySocket {
    path: PathBuf,
    stop: watch::Sender<bool>,
    task: JoinHandle<UnixListener>,
}

impl EarlySocket {
    /// Opens the socket at `path`, and says what is `missing` on node `name`.
    pub fn open(
        path: &Path,
        name: &str,
        missing: watch::Receiver<Vec<String>>,
    ) -> io::Result<Self> {
        let listener = listen(path)?;
        let (stop, mut stopped) = watch::channel(false);
        let name = name.to_owned();
        let serve = async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    _ = stopped.wait_for(|stopped| *stopped) => return listener,
                };
                if let Ok((stream, _)) = accepted {
                    let (name, missing) = (name.clone(), missing.clone());
                    tokio::spawn(async move {
                        if let Err(error) = answer(&name, &missing, stream).await {
                            tracing::debug!(%error, "control request failed");
                        }
                    });
                }
            }
        };
        Ok(Self {
            path: path.to_path_buf(),
            stop,
            task: tokio::spawn(serve),
        })
    }

    /// The socket, for the server.
    pub async fn hand_over(self) -> io::Result<UnixListener> {
        // Nobody may be left to listen.
        let _ = self.stop.send(true);
        self.task.await.map_err(io::Error::other)
    }

    /// The server does not start.
    pub fn remove(self) {
        self.task.abort();
        // It is replaced by the next start if it stays.
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn answer(
    name: &str,
    missing: &watch::Receiver<Vec<String>>,
    mut stream: UnixStream,
) -> io::Result<()> {
    let request = read_request(&mut stream).await?;
    let request = request.map(|request| said(name, &missing.borrow(), &request));
    let answer = request.unwrap_or_else(|error| error);
    reply(&mut stream, &answer).await
}

fn said(name: &str, missing: &[String], request: &str) -> Value {
    match request {
        "status" | "cluster" => {
            json!({ "node": name, "pid": std::process::id(), "missing": missing })
        }
        _ => json!({
            "error": "this node waits for its cluster and serves nothing yet\nhint: see `havenfs \
                      cluster status`",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_is_missing_and_nothing_else() {
        let missing = ["node `n2` is silent".to_owned()];
        for request in ["status", "cluster"] {
            let answer = said("n1", &missing, request);
            assert_eq!(answer["missing"][0], "node `n2` is silent");
        }
        let error = said("n1", &missing, "locks");
        assert!(
            error["error"]
                .as_str()
                .is_some_and(|text| text.contains("waits"))
        );
    }
}
