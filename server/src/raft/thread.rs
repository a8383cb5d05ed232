//! The thread that consensus runs on.
//!
//! It is a runtime of its own, so that whoever runs there may wait for the disk and hold up nobody
//! but those who wait for the log anyway: on a node that is alone a lone proposal is written there
//! and not handed to the log's thread, which would cost two wake-ups. Such a node has no network
//! here, and so the thread sleeps and wakes by one system call each.

use std::io;
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// Ends, with all tasks on it, when it is dropped.
#[derive(Debug)]
pub(super) struct EngineThread {
    handle: Handle,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl EngineThread {
    /// Starts it; `with_network`: there are other nodes.
    pub(super) fn start(with_network: bool) -> io::Result<Self> {
        let mut builder = Builder::new_current_thread();
        builder.enable_time();
        if with_network {
            builder.enable_io();
        }
        let runtime = builder.build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let run = move || {
            // An error says that the sender is gone, which means stop as well.
            let _ = runtime.block_on(stopped);
        };
        let thread = std::thread::Builder::new().name("raft".to_owned());
        Ok(Self {
            handle,
            stop,
            thread: thread.spawn(run)?,
        })
    }

    /// Where its tasks are started.
    pub(super) const fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Drops all its tasks. Waits for the thread.
    pub(super) fn finish(self) {
        drop(self.stop);
        // A panic has ended the process already.
        let _ = self.thread.join();
    }
}

/// Runs what waits for the disk on a thread that may.
pub(super) async fn blocking<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> io::Result<T>
where
    T: Send + 'static,
    E: Into<io::Error> + Send + 'static,
{
    let result = tokio::task::spawn_blocking(work).await;
    result.map_err(io::Error::other)?.map_err(Into::into)
}
