//! Calls as bytes, and what a reply says, as `onc-rpc` reads it.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, anyhow, bail, ensure};
use havenfs_rpc::xdr::Writer;
use onc_rpc::{AcceptedStatus, AuthError, RejectedReply, ReplyBody, RpcMessage};

/// The record mark's bit for the last fragment.
pub const LAST_FRAGMENT: u32 = 1 << 31;

/// A credential as it is sent; nothing about it is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cred {
    /// AUTH_NONE.
    None,
    /// AUTH_SYS.
    Sys {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
        /// The supplementary groups; more than 16 are sent as they are.
        gids: Vec<u32>,
    },
    /// Any flavor with any body.
    Raw {
        /// The flavor.
        flavor: u32,
        /// The body.
        body: Vec<u8>,
    },
}

impl Cred {
    /// AUTH_SYS without supplementary groups.
    pub const fn user(uid: u32, gid: u32) -> Self {
        Self::Sys {
            uid,
            gid,
            gids: Vec::new(),
        }
    }

    /// AUTH_SYS of the superuser.
    pub const fn root() -> Self {
        Self::user(0, 0)
    }

    fn encode(&self, writer: &mut Writer<'_>) {
        match self {
            Self::None => {
                writer.u32(0);
                writer.opaque(&[]);
            }
            Self::Sys { uid, gid, gids } => {
                let mut body = Vec::new();
                let mut inner = Writer::new(&mut body);
                inner.u32(0);
                inner.opaque(b"test-client");
                inner.u32(*uid);
                inner.u32(*gid);
                inner.u32(gids.len() as u32);
                for gid in gids {
                    inner.u32(*gid);
                }
                writer.u32(1);
                writer.opaque(&body);
            }
            Self::Raw { flavor, body } => {
                writer.u32(*flavor);
                writer.opaque(body);
            }
        }
    }
}

/// The header of a call; nothing about it is checked.
#[derive(Debug, Clone)]
pub struct Header {
    /// The version of RPC; 2 is right.
    pub rpc_version: u32,
    /// The program.
    pub program: u32,
    /// Its version.
    pub version: u32,
    /// The procedure.
    pub procedure: u32,
    /// The credential.
    pub cred: Cred,
    /// The verifier; [`Cred::None`] is right.
    pub verifier: Cred,
}

impl Header {
    /// A proper header.
    pub fn new(program: u32, version: u32, procedure: u32, cred: &Cred) -> Self {
        Self {
            rpc_version: 2,
            program,
            version,
            procedure,
            cred: cred.clone(),
            verifier: Cred::None,
        }
    }

    /// The whole message.
    pub fn message(&self, xid: u32, args: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(args.len() + 128);
        let mut writer = Writer::new(&mut out);
        writer.u32(xid);
        writer.u32(0);
        writer.u32(self.rpc_version);
        writer.u32(self.program);
        writer.u32(self.version);
        writer.u32(self.procedure);
        self.cred.encode(&mut writer);
        self.verifier.encode(&mut writer);
        out.extend_from_slice(args);
        out
    }
}

/// What became of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// SUCCESS, with the results.
    Success(Vec<u8>),
    /// PROG_UNAVAIL.
    ProgUnavail,
    /// PROG_MISMATCH, with the lowest and highest version served.
    ProgMismatch(u32, u32),
    /// PROC_UNAVAIL.
    ProcUnavail,
    /// GARBAGE_ARGS.
    GarbageArgs,
    /// SYSTEM_ERR.
    SystemErr,
    /// RPC_MISMATCH, with the lowest and highest version served.
    RpcMismatch(u32, u32),
    /// AUTH_ERROR, with the `auth_stat` as a number.
    AuthError(u32),
}

impl Outcome {
    /// The results of a call that must have succeeded.
    pub fn results(self) -> Result<Vec<u8>> {
        match self {
            Self::Success(results) => Ok(results),
            other => bail!("the call was answered {other:?}"),
        }
    }
}

/// A transaction id that this process has not used yet.
pub fn next_xid() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0x0100_0000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Puts a record mark in front of a message.
pub fn record(message: &[u8]) -> Vec<u8> {
    let mark = LAST_FRAGMENT | message.len() as u32;
    [&mark.to_be_bytes(), message].concat()
}

/// The transaction id of a message.
pub fn xid_of(message: &[u8]) -> Result<u32> {
    let bytes = message
        .first_chunk()
        .ok_or_else(|| anyhow!("short message"))?;
    Ok(u32::from_be_bytes(*bytes))
}

/// Reads the header of the reply to `xid`. A server without TLS and RPCSEC_GSS has nothing to say
/// in a verifier, so it must be AUTH_NONE without a body.
pub fn open_reply(xid: u32, message: &[u8]) -> Result<Outcome> {
    let record = record(message);
    let reply = RpcMessage::<&[u8], &[u8]>::try_from(record.as_slice())
        .map_err(|error| anyhow!("reply is no RPC message: {error}: {message:02x?}"))?;
    ensure!(reply.xid() == xid, "reply to {}, not {xid}", reply.xid());
    let body = reply
        .reply_body()
        .ok_or_else(|| anyhow!("a call instead of a reply"))?;
    Ok(match body {
        ReplyBody::Accepted(accepted) => {
            let verifier = accepted.auth_verifier();
            ensure!(
                verifier.id() == 0 && verifier.associated_data_len() == 0,
                "verifier of the reply is {verifier:?}"
            );
            match accepted.status() {
                AcceptedStatus::Success(results) => Outcome::Success(results.to_vec()),
                AcceptedStatus::ProgramUnavailable => Outcome::ProgUnavail,
                AcceptedStatus::ProgramMismatch { low, high } => Outcome::ProgMismatch(*low, *high),
                AcceptedStatus::ProcedureUnavailable => Outcome::ProcUnavail,
                AcceptedStatus::GarbageArgs => Outcome::GarbageArgs,
                AcceptedStatus::SystemError => Outcome::SystemErr,
            }
        }
        ReplyBody::Denied(RejectedReply::RpcVersionMismatch { low, high }) => {
            Outcome::RpcMismatch(*low, *high)
        }
        ReplyBody::Denied(RejectedReply::AuthError(error)) => Outcome::AuthError(match error {
            AuthError::Success => 0,
            AuthError::BadCredentials => 1,
            AuthError::RejectedCredentials => 2,
            AuthError::BadVerifier => 3,
            AuthError::RejectedVerifier => 4,
            AuthError::TooWeak => 5,
            AuthError::InvalidResponseVerifier => 6,
            AuthError::Failed => 7,
        }),
    })
}
