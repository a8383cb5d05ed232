//! Delivers grants to hosts that waited: carries out what [`Granter`] says.
//!
//! What is to be told is read from the table whenever that has new grants, so nothing is lost if
//! this task, the process or the node dies: the next activation finds the grants there and tells
//! them again.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use havenfs_nlm::granter::{GrantCookie, Granter, Input, Output, Tried};
use havenfs_nlm::range_set::GrantId;
use havenfs_nlm::waiting::Delivery;
use havenfs_nlm::wire::{Nlm4Lock, Nlm4Res, Nlm4Stats, Nlm4TestArgs, procedure};
use havenfs_rpc::portmap::Protocol;
use havenfs_rpc::program;
use havenfs_rpc::xdr::Writer;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::{LockService, unix_seconds};
use crate::cluster::ServiceCommand;
use crate::fault::{Fault, is_planted};
use crate::host_calls::{CallError, Callee, EncodedArgs, HostCalls};
use crate::random::random_u64;

/// A host's answer to GRANTED_MSG.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// What it answers.
    pub cookie: GrantCookie,
    /// Where it came from.
    pub from: IpAddr,
    /// What it says.
    pub stat: Nlm4Stats,
}

/// Delivers the grants of an epoch, until it is dropped.
pub(super) async fn run(
    locks: Arc<LockService>,
    calls: Arc<HostCalls>,
    epoch: u32,
    mut answers: mpsc::Receiver<Answer>,
) {
    let start = Instant::now();
    let mut granter = Granter::new(epoch, secret());
    let mut seen = 0;
    let mut tries = JoinSet::new();
    loop {
        let now_ms = start.elapsed().as_millis() as u64;
        seen = look(&locks, &mut granter, now_ms, seen);
        while let Some(output) = granter.poll(now_ms) {
            match output {
                Output::Deliver {
                    delivery,
                    cookie,
                    by_message,
                    look_up,
                } => {
                    let (locks, calls) = (Arc::clone(&locks), Arc::clone(&calls));
                    tries.spawn(async move {
                        deliver(&locks, &calls, &delivery, cookie, by_message, look_up).await
                    });
                }
                Output::Confirm(grant) => {
                    locks.counters.grants_confirmed.add(1);
                    propose(&locks, ServiceCommand::ConfirmGrant { epoch, grant });
                }
                Output::Refuse { id, release } => {
                    let release = release || is_planted(Fault::ReleaseOnLostGrantedRes);
                    tracing::info!(grant = %id, release, "a host does not want its lock");
                    locks.counters.grants_refused.add(1);
                    let refuse = ServiceCommand::RefuseGrant {
                        epoch,
                        grant: id,
                        release,
                        now: unix_seconds(),
                    };
                    propose(&locks, refuse);
                }
            }
        }
        let deadline = granter.next_deadline_ms();
        let wake = start + Duration::from_millis(deadline.unwrap_or(0));
        let input = tokio::select! {
            () = locks.granted() => None,
            Some(answer) = answers.recv() => Some(answered(answer)),
            Some(done) = tries.join_next() => match done {
                Ok((cookie, tried, answer)) => {
                    let now_ms = start.elapsed().as_millis() as u64;
                    match tried {
                        Tried::Sent => locks.counters.grants_told.add(1),
                        Tried::Unsent | Tried::NoSuchForm => locks.counters.grants_untold.add(1),
                    }
                    granter.handle(now_ms, Input::Tried { cookie, tried });
                    answer.map(answered)
                }
                // A panic has ended the process already.
                Err(_) => None,
            },
            () = sleep_until(wake), if deadline.is_some() => None,
        };
        if let Some(input) = input {
            granter.handle(start.elapsed().as_millis() as u64, input);
        }
    }
}

const fn answered(answer: Answer) -> Input {
    Input::Answered {
        cookie: answer.cookie,
        from: answer.from,
        stat: answer.stat,
    }
}

/// Tells the granter what the table has to tell, and what it has not any more; returns the newest
/// grant that was seen.
fn look(locks: &LockService, granter: &mut Granter, now_ms: u64, seen: u64) -> u64 {
    let state = locks.state();
    let table = state.table();
    let settled: Vec<GrantId> = granter.known().filter(|id| !table.has_grant(*id)).collect();
    let new: Vec<Delivery> = table.deliveries(seen).collect();
    let newest = table.last_grant();
    drop(state);
    for id in settled {
        granter.handle(now_ms, Input::Settled(id));
    }
    for delivery in new {
        granter.handle(now_ms, Input::Granted(delivery));
    }
    newest
}

fn secret() -> [u8; 6] {
    let [_, _, secret @ ..] = random_u64().to_ne_bytes();
    secret
}

/// Proposes what follows from an answer. If it is not carried out, the grant is still in the table
/// and unconfirmed, which is safe.
fn propose(locks: &Arc<LockService>, command: ServiceCommand) {
    let applied = Arc::clone(locks);
    locks.propose_change(command, move |outcome| match outcome {
        Ok(outcome) => applied.look_at_table(&outcome),
        Err(error) => tracing::warn!(%error, "a host's answer to GRANTED is not noted"),
    });
}

/// Tells a host once.
async fn deliver(
    locks: &LockService,
    calls: &HostCalls,
    delivery: &Delivery,
    cookie: GrantCookie,
    by_message: bool,
    look_up: bool,
) -> (GrantCookie, Tried, Option<Answer>) {
    let callback = &delivery.callback;
    let callee = Callee {
        address: delivery.host.address,
        from: delivery.host.service_address,
        program: (program::NLM, callback.version.number()),
        protocol: if callback.udp {
            Protocol::Udp
        } else {
            Protocol::Tcp
        },
    };
    let number = if by_message {
        procedure::GRANTED_MSG
    } else {
        procedure::GRANTED
    };
    let args = EncodedArgs(args(delivery, cookie));
    // Hosts match it by file, owner and bytes: after an UNLOCK it would be taken for the answer to
    // a later LOCK of the same bytes.
    let is_there = || {
        let state = locks.state();
        state.table().has_grant_to(cookie.id, callee.address)
    };
    let sending = calls.call_while(callee, number, &args, look_up, is_there);
    let result = sending.await;
    let host = &delivery.host;
    match result {
        Ok(_) if by_message => {
            tracing::debug!(%host, grant = %cookie.id, "told of its lock");
            (cookie, Tried::Sent, None)
        }
        Ok(results) => {
            let version = callback.version;
            let answer = version.decode::<Nlm4Res<'_>>(&results).ok();
            let answer = answer.map(|res| Answer {
                cookie,
                from: callee.address,
                stat: res.stat,
            });
            (cookie, Tried::Sent, answer)
        }
        Err(error) => {
            tracing::debug!(%host, grant = %cookie.id, %error, "cannot tell of its lock");
            let tried = match &error {
                CallError::NoPort | CallError::Unsent(_) => Tried::Unsent,
                CallError::Sent(_) if by_message && error.is_no_such_procedure() => {
                    Tried::NoSuchForm
                }
                // Another node may tell it by now; "sent" is what keeps the lock.
                CallError::Sent(_) | CallError::NotWanted => Tried::Sent,
            };
            (cookie, tried, None)
        }
    }
}

/// The arguments of GRANTED: what the host sent, byte for byte, since that is what it compares.
fn args(delivery: &Delivery, cookie: GrantCookie) -> Vec<u8> {
    let callback = &delivery.callback;
    let args = Nlm4TestArgs {
        cookie: &cookie.encode(),
        exclusive: delivery.exclusive,
        alock: Nlm4Lock {
            caller_name: &delivery.host.caller_name,
            fh: &callback.fh,
            oh: &delivery.owner.oh,
            svid: delivery.owner.svid,
            l_offset: callback.l_offset,
            l_len: callback.l_len,
        },
    };
    let mut out = Vec::new();
    callback.version.encode(args, &mut Writer::new(&mut out));
    out
}
