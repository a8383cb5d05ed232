//! The Network Status Monitor of the service, version 1: hears of the hosts' reboots.
//!
//! Monitoring itself happens with the first lock of a host, in the same change; who is to be told
//! of our own restarts, and how, is in `lock_service`.
//!
//! To believe a notice means to release locks, and nothing in it proves anything. So it counts for
//! hosts with the address that it came from, only from a port that a machine gives to nobody but
//! its superuser, and not while an older connection of that host lives ([`LockConnections`]).
//! SM_MON and its kin are for the superuser of this machine; anyone else is told that it did not
//! work.
//!
//! Source: XNFS chapter 11.
//!
//! [`LockConnections`]: crate::lock_service::LockConnections

use std::net::IpAddr;
use std::sync::Arc;

use havenfs_nsm::inbound::same_name;
use havenfs_nsm::nsm_name;
use havenfs_nsm::wire::{Mon, MonId, SmName, SmRes, SmStat, SmStatRes, StatChge, procedure};
use havenfs_rpc::auth::AuthStat;
use havenfs_rpc::message::{self, AcceptStat};
use havenfs_rpc::xdr::{Writer, decode_all};

use super::nlm::void_after;
use crate::call::{Mode, Proposal, Refusal, Request};
use crate::cluster::command::Notice;
use crate::cluster::{Outcome, ServiceCommand};
use crate::lock_service::{LockService, Sign, unix_seconds};
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
            notify(node, locks, epoch, request, &args)
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

/// SM_NOTIFY: a host says that it has rebooted.
fn notify(
    node: &Node,
    locks: &Arc<LockService>,
    epoch: u32,
    request: &Request<'_>,
    args: &StatChge<'_>,
) -> Result<Option<Proposal>, Refusal> {
    let (peer, state) = (request.origin.peer, args.state);
    if !request.origin.from_reserved_port() {
        tracing::warn!(%peer, "notice of a reboot refused: not from a reserved port");
        locks.counters().notices_refused.add(1);
        return Err(Refusal::Auth(AuthStat::TooWeak));
    }
    if let Err(problem) = nsm_name::judge(args.mon_name) {
        tracing::warn!(%peer, %problem, "notice of a reboot with a bad name");
        locks.counters().notices_refused.add(1);
        return Ok(None);
    }
    let host = known_as(node, locks, request, args)?;
    let losing = locks.state().losing(host, args.mon_name, state);
    let connections = &node.lock_connections;
    let sign = match (connections.has(host, &losing, state), request.mode) {
        (false, _) => Sign::None,
        (true, Mode::Inline) => return Err(Refusal::Wait),
        (true, Mode::Worker) => connections.probe(host, &losing, state),
    };
    let mon_name = Box::<[u8]>::from(args.mon_name);
    let notice = Notice {
        epoch,
        address: host,
        mon_name: mon_name.clone(),
        state,
        now: unix_seconds(),
    };
    let command = match sign {
        Sign::None => ServiceCommand::Rebooted(notice),
        Sign::Lives => ServiceCommand::DoubtfulNotice(notice),
        // It comes again.
        Sign::Busy => return Err(Refusal::Silence),
    };
    let mut proposal = void_after(command, request.xid);
    let locks = Arc::clone(locks);
    let reply = proposal.answer;
    proposal.answer = Box::new(move |outcome, writer| {
        let counters = locks.counters();
        match &outcome {
            Outcome::Freed(freed) if freed.hosts > 0 => {
                tracing::info!(
                    %host,
                    nsm_state = state,
                    locks = freed.locks,
                    shares = freed.shares,
                    requests = freed.requests,
                    "a host has rebooted: what it had is free"
                );
                counters.reboots.add(1);
                counters.locks_rebooted.add(freed.locks as u64);
                // Only what was believed here: the name alone proves nothing.
                locks.pass_on(&mon_name, host, state);
            }
            Outcome::Freed(_) => counters.notices_ignored.add(1),
            _ => {}
        }
        reply(outcome, writer)
    });
    Ok(Some(proposal))
}

/// The address under which the host of a notice is known: that from which it came, if a host there
/// loses something by it; or that of the one host with the name in the notice, if the name under
/// which *we* know that host has both addresses. (Whoever sends a notice can have any name resolve
/// to any address that is under its control.) If that can't be found out there is no answer, and
/// the notice comes again.
fn known_as(
    node: &Node,
    locks: &LockService,
    request: &Request<'_>,
    args: &StatChge<'_>,
) -> Result<IpAddr, Refusal> {
    let from = request.origin.host();
    let named = {
        let state = locks.state();
        if !state.losing(from, args.mon_name, args.state).is_empty() {
            return Ok(from);
        }
        let table = state.table();
        table.named_elsewhere(from, |name| same_name(name, args.mon_name))
    };
    let Some((known, name)) = named else {
        return Ok(from);
    };
    let has_both = match node.names.has_addresses(&name, [known, from]) {
        None if request.mode == Mode::Inline => return Err(Refusal::Wait),
        None => node.names.wait_for_addresses(&name, [known, from]),
        told => told,
    };
    match has_both {
        Some(true) => Ok(known),
        Some(false) => Ok(from),
        None => Err(Refusal::Silence),
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
