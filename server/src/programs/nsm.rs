//! The Network Status Monitor of the service, version 1: hears of the hosts' reboots.
//!
//! Monitoring itself happens with the first lock of a host, in the same change; who is to be told
//! of our own restarts, and how, is in `lock_service`.
//!
//! To believe a notice means to release locks, and nothing in it proves anything. So it counts for
//! hosts with the address that it came from, and only from a port that a machine gives to nobody
//! but its superuser. SM_MON and its kin are for the superuser of this machine; anyone else is told
//! that it did not work.
//!
//! Source: XNFS chapter 11.

use std::sync::Arc;

use havenfs_nsm::nsm_name;
use havenfs_nsm::wire::{Mon, MonId, SmName, SmRes, SmStat, SmStatRes, StatChge, procedure};
use havenfs_rpc::auth::AuthStat;
use havenfs_rpc::message::{self, AcceptStat};
use havenfs_rpc::xdr::{Writer, decode_all};

use super::nlm::void_after;
use crate::call::{Proposal, Refusal, Request};
use crate::cluster::{Command, Outcome};
use crate::lock_service::{LockService, unix_seconds};
use crate::node::Node;

/// Serves one call of NSM: the results are appended, or a change is proposed.
///
/// # Errors
/// Why there are no results.
pub fn serve(
    node: &Node,
    request: &Request<'_>,
    writer: &mut Writer<'_>,
) -> Result<Option<Proposal>, Refusal> {
    let locks = node.locks.get().ok_or(Refusal::Silence)?;
    let epoch = locks.epoch().ok_or(Refusal::Silence)?;
    match request.procedure {
        procedure::SM_STAT => {
            decode_all::<SmName<'_>>(request.args)?;
            let state = locks.state().nsm_state().0;
            let res_stat = SmRes::StatSucc;
            writer.value(&SmStatRes { res_stat, state });
            Ok(None)
        }
        procedure::SM_NOTIFY => {
            let args: StatChge<'_> = decode_all(request.args)?;
            let peer = request.origin.peer;
            if !request.origin.from_reserved_port() {
                tracing::warn!(%peer, "notice of a reboot refused: not from a reserved port");
                return Err(Refusal::Auth(AuthStat::TooWeak));
            }
            if let Err(problem) = nsm_name::judge(args.mon_name) {
                tracing::warn!(%peer, %problem, "notice of a reboot with a bad name");
                return Ok(None);
            }
            let command = Command::Rebooted {
                epoch,
                address: request.origin.host(),
                mon_name: args.mon_name.into(),
                state: args.state,
                now: unix_seconds(),
            };
            let mut proposal = void_after(command, request.xid);
            let (locks, host, state) = (Arc::clone(locks), request.origin.host(), args.state);
            let mon_name = Box::<[u8]>::from(args.mon_name);
            let reply = proposal.answer;
            proposal.answer = Box::new(move |outcome, writer| {
                // Only what was believed here: the name alone proves nothing.
                if matches!(&outcome, Outcome::Freed(freed) if freed.hosts > 0) {
                    locks.pass_on(&mon_name, host, state);
                }
                reply(outcome, writer)
            });
            Ok(Some(proposal))
        }
        procedure::SM_MON => {
            let args: Mon<'_> = decode_all(request.args)?;
            let added = is_local(request)
                && nsm_name::judge(args.mon_id.mon_name).is_ok()
                && locks.monitors().add(&args);
            let res_stat = if added {
                SmRes::StatSucc
            } else {
                SmRes::StatFail
            };
            let state = locks.state().nsm_state().0;
            writer.value(&SmStatRes { res_stat, state });
            Ok(None)
        }
        procedure::SM_UNMON | procedure::SM_UNMON_ALL | procedure::SM_SIMU_CRASH
            if !is_local(request) =>
        {
            Err(Refusal::Auth(AuthStat::TooWeak))
        }
        procedure::SM_UNMON => {
            let args: MonId<'_> = decode_all(request.args)?;
            locks.monitors().remove(args.mon_name, &args.my_id);
            put_state(locks, writer);
            Ok(None)
        }
        procedure::SM_UNMON_ALL => {
            locks.monitors().remove_all(&decode_all(request.args)?);
            put_state(locks, writer);
            Ok(None)
        }
        procedure::SM_SIMU_CRASH => {
            decode_all::<()>(request.args)?;
            let xid = request.xid;
            let reply = move |writer: &mut Writer<'_>| {
                message::reply_accepted(writer, xid, AcceptStat::Success);
            };
            Ok(Some(locks.simulated_crash(reply)))
        }
        _ => Err(Refusal::ProcUnavail),
    }
}

/// Whether the superuser of this machine calls.
const fn is_local(request: &Request<'_>) -> bool {
    request.origin.is_loopback() && request.origin.from_reserved_port()
}

fn put_state(locks: &LockService, writer: &mut Writer<'_>) {
    let state = locks.state().nsm_state().0;
    writer.value(&SmStat { state });
}
