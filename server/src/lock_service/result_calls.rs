//! Sends the results of asynchronous calls (`_MSG`) to the hosts that made them, as calls of their
//! `_RES` procedures. Each is sent once: a host that misses one asks again.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::host_calls::{Callee, EncodedArgs, HostCalls};

/// How many may wait to be sent.
const WAITING_MAX: usize = 4096;
/// How many are under way at a time.
const UNDER_WAY_MAX: usize = 256;

/// Results to be sent.
#[derive(Debug)]
pub struct ResultCall {
    /// To whom.
    pub callee: Callee,
    /// The procedure.
    pub number: u32,
    /// The encoded results.
    pub args: Vec<u8>,
}

/// The way to send results, from any thread.
#[derive(Debug, Clone)]
pub struct ResultCalls(mpsc::Sender<ResultCall>);

impl ResultCalls {
    /// Starts sending, on the current runtime.
    pub(super) fn start(calls: Arc<HostCalls>) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        tokio::spawn(run(calls, receiver));
        Self(sender)
    }

    /// Sends results a little later; what is too much is lost, as a datagram may be.
    pub fn send(&self, call: ResultCall) {
        let _ = self.0.try_send(call);
    }
}

/// Sends what comes, until all ways to it are gone.
async fn run(calls: Arc<HostCalls>, mut waiting: mpsc::Receiver<ResultCall>) {
    let mut under_way = JoinSet::new();
    loop {
        tokio::select! {
            Some(call) = waiting.recv(), if under_way.len() < UNDER_WAY_MAX => {
                let calls = Arc::clone(&calls);
                under_way.spawn(async move {
                    let (callee, number) = (call.callee, call.number);
                    let args = EncodedArgs(call.args);
                    if let Err(error) = calls.call(callee, number, &args, false).await {
                        tracing::debug!(host = %callee.address, %error, "cannot send results");
                    }
                });
            }
            Some(_) = under_way.join_next() => {}
            else => return,
        }
    }
}
