//! From a message to its reply: header, program, version, credential, procedure, arguments.
//!
//! Owns the order of the checks (RFC 5531 9) and the RPC reply header. Does not know sockets, and
//! leaves every decision about a procedure to its program. Every message that has a transaction
//! id gets exactly one reply, unless the program says that silence is right.
//!
//! A call is first tried in the task that received it ([`Mode::Inline`]), which must never wait
//! for a disk. A procedure that may have to wait answers [`Refusal::Wait`] there; the caller then
//! runs the same call again on a worker thread ([`Mode::Worker`]), where it is carried out.

use std::time::Instant;

use havenfs_rpc::auth::{AuthStat, Credential, OpaqueAuth};
use havenfs_rpc::message::{self, AcceptStat, Call, CallError};
use havenfs_rpc::program;
use havenfs_rpc::xdr::Writer;

use crate::call::{Mode, Origin, Port, Refusal, Request, Served};
use crate::node::Node;
use crate::programs;

/// Answers a message that is no call which can be served; false if there is nobody to answer.
pub fn refuse(node: &Node, error: CallError, out: &mut Vec<u8>) -> bool {
    let mut writer = Writer::new(out);
    match error {
        CallError::NotACall => {
            node.metrics.malformed.add(1);
            return false;
        }
        CallError::RpcMismatch { xid } => message::reply_rpc_mismatch(&mut writer, xid),
        CallError::Garbage { xid } => {
            node.metrics.malformed.add(1);
            message::reply_accepted(&mut writer, xid, AcceptStat::GarbageArgs);
        }
    }
    true
}

/// Serves one call that arrived on `port`; appends the reply, without a record mark, to `out`.
///
/// `clock` is when the work on it began, and is set to when it ended.
pub fn serve(
    node: &Node,
    port: Port,
    origin: &Origin,
    mode: Mode,
    call: &Call<'_>,
    clock: &mut Instant,
    out: &mut Vec<u8>,
) -> Served {
    // Before its effect; before its reply is sent whoever sends it asks again (see `gate`). The
    // reply is made in between in any case, so that it is kept for a repeat.
    if !node.gate.admits() {
        return Served::Silent;
    }
    let mut writer = Writer::new(out);
    let xid = call.xid;
    let Some((low, high)) = versions(port, call.program) else {
        message::reply_accepted(&mut writer, xid, AcceptStat::ProgUnavail);
        return Served::Replied;
    };
    if call.version < low || call.version > high {
        message::reply_accepted(&mut writer, xid, AcceptStat::ProgMismatch { low, high });
        return Served::Replied;
    }
    if call.procedure == 0 {
        return serve_null(node, call, clock, &mut writer);
    }
    let credential = match Credential::decode(call.cred, call.verf) {
        Ok(credential @ (Credential::None | Credential::Sys(_))) => credential,
        // RFC 9289 4.1: AUTH_TLS is a probe and goes with the NULL procedure only.
        Ok(Credential::Tls) => {
            message::reply_auth_error(&mut writer, xid, AuthStat::BadCred);
            return Served::Replied;
        }
        Ok(Credential::Other(_)) => {
            message::reply_auth_error(&mut writer, xid, AuthStat::RejectedCred);
            return Served::Replied;
        }
        Err(stat) => {
            message::reply_auth_error(&mut writer, xid, stat);
            return Served::Replied;
        }
    };
    let request = Request {
        origin,
        mode,
        xid,
        version: call.version,
        procedure: call.procedure,
        credential,
        args: call.args,
    };
    let start = writer.position();
    message::reply_accepted(&mut writer, xid, AcceptStat::Success);
    let result = match call.program {
        program::NFS => programs::nfs3::serve(node, &request, &mut writer).map(|()| None),
        program::MOUNT => programs::mount::serve(node, &request, &mut writer).map(|()| None),
        program::NLM => programs::nlm::serve(node, &request, &mut writer),
        program::NSM => programs::nsm::serve(node, &request, &mut writer),
        _ => programs::portmap::serve(&node.ports, &request, &mut writer).map(|()| None),
    };
    let served = match result {
        Ok(None) => Served::Replied,
        Ok(Some(proposal)) => {
            writer.truncate(start);
            Served::Propose(proposal)
        }
        Err(refusal) => {
            writer.truncate(start);
            match refusal {
                Refusal::Wait => return Served::Wait,
                Refusal::Pending if mode == Mode::Inline => return Served::Pending,
                // Looked up for long enough: the client asks again.
                Refusal::Pending | Refusal::Silence => Served::Silent,
                Refusal::ProcUnavail => {
                    message::reply_accepted(&mut writer, xid, AcceptStat::ProcUnavail);
                    Served::Replied
                }
                Refusal::GarbageArgs => {
                    message::reply_accepted(&mut writer, xid, AcceptStat::GarbageArgs);
                    Served::Replied
                }
                Refusal::Auth(stat) => {
                    message::reply_auth_error(&mut writer, xid, stat);
                    Served::Replied
                }
            }
        }
    };
    note_time(node, call, clock);
    served
}

/// Answers a call of NFS, whose header is right, that it is to be made again later.
pub fn put_off(call: &Call<'_>, out: &mut Vec<u8>) {
    let mut writer = Writer::new(out);
    message::reply_accepted(&mut writer, call.xid, AcceptStat::Success);
    programs::nfs3::put_off(call.procedure, &mut writer);
}

fn note_time(node: &Node, call: &Call<'_>, clock: &mut Instant) {
    let now = Instant::now();
    let elapsed = now.duration_since(*clock);
    *clock = now;
    node.metrics.called(call.program, call.procedure, elapsed);
}

/// The versions of `program` that `port` serves, lowest and highest.
const fn versions(port: Port, program: u32) -> Option<(u32, u32)> {
    match (port, program) {
        // A quick mismatch is what makes a Linux client fall back from NFSv4.
        (Port::Nfs, program::NFS) => Some((program::NFS_VERSION, program::NFS_VERSION)),
        // Version 2 has MNT with the 32-byte handle of version 1; clients ask for 1 or 3.
        (Port::Mount, program::MOUNT) => Some((1, 3)),
        (Port::Portmap, program::PORTMAP) => Some((2, 4)),
        // Version 2 was never specified apart from version 1.
        (Port::Nlm, program::NLM) => Some((1, 4)),
        (Port::Nsm, program::NSM) => Some((1, 1)),
        _ => None,
    }
}

/// NULL accepts every flavor, since clients ping with whatever they have; the AUTH_TLS probe is
/// answered with an empty verifier, which says that there is no TLS (RFC 9289 4.1).
fn serve_null(
    node: &Node,
    call: &Call<'_>,
    clock: &mut Instant,
    writer: &mut Writer<'_>,
) -> Served {
    note_time(node, call, clock);
    match Credential::decode(call.cred, call.verf) {
        Err(stat) => message::reply_auth_error(writer, call.xid, stat),
        Ok(_) if !call.args.is_empty() => {
            message::reply_accepted(writer, call.xid, AcceptStat::GarbageArgs);
        }
        Ok(_) => {
            message::reply_verified(writer, call.xid, OpaqueAuth::NONE, AcceptStat::Success);
        }
    }
    Served::Replied
}
