//! Call and reply headers, and the order in which a call is checked.
//!
//! [`Call::decode`] reads a header; the caller then checks program, version, credential,
//! procedure and arguments in this order and answers with one of the `reply_*` functions. Every
//! call that has a readable transaction id gets exactly one reply: a dropped call costs a Linux
//! client 60 seconds.
//!
//! Source: RFC 5531 9.

use crate::auth::{AuthStat, OpaqueAuth};
use crate::xdr::{Decode, Reader, Writer, XdrError};

const CALL: u32 = 0;
const REPLY: u32 = 1;
const MSG_ACCEPTED: u32 = 0;
const MSG_DENIED: u32 = 1;
const RPC_MISMATCH: u32 = 0;
const AUTH_ERROR: u32 = 1;
/// The version of ONC RPC.
pub const RPC_VERSION: u32 = 2;

/// The header of a call, with its arguments still encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call<'a> {
    /// The transaction id, which the reply repeats.
    pub xid: u32,
    /// The program's number.
    pub program: u32,
    /// The program's version.
    pub version: u32,
    /// The procedure's number.
    pub procedure: u32,
    /// The credential, not looked at yet.
    pub cred: OpaqueAuth<'a>,
    /// The verifier, not looked at yet.
    pub verf: OpaqueAuth<'a>,
    /// The encoded arguments: all that follows the header.
    pub args: &'a [u8],
}

/// Why a message is no call that can be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallError {
    /// Too short for a transaction id, or a reply: nobody to answer.
    NotACall,
    /// A version of RPC other than 2: answer with [`reply_rpc_mismatch`].
    RpcMismatch {
        /// The transaction id.
        xid: u32,
    },
    /// The header is malformed: answer with [`AcceptStat::GarbageArgs`].
    Garbage {
        /// The transaction id.
        xid: u32,
    },
}

impl<'a> Call<'a> {
    /// Reads the header of a call.
    pub fn decode(message: &'a [u8]) -> Result<Self, CallError> {
        let mut reader = Reader::new(message);
        let (Ok(xid), Ok(CALL)) = (reader.u32(), reader.u32()) else {
            return Err(CallError::NotACall);
        };
        match reader.u32() {
            Ok(RPC_VERSION) => {}
            Ok(_) => return Err(CallError::RpcMismatch { xid }),
            Err(_) => return Err(CallError::Garbage { xid }),
        }
        Self::decode_body(xid, reader).map_err(|_| CallError::Garbage { xid })
    }

    fn decode_body(xid: u32, mut reader: Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            xid,
            program: reader.u32()?,
            version: reader.u32()?,
            procedure: reader.u32()?,
            cred: OpaqueAuth::decode(&mut reader)?,
            verf: OpaqueAuth::decode(&mut reader)?,
            args: reader.rest(),
        })
    }

    /// Appends the header of a call and its encoded arguments.
    pub fn encode(&self, writer: &mut Writer<'_>) {
        for value in [
            self.xid,
            CALL,
            RPC_VERSION,
            self.program,
            self.version,
            self.procedure,
        ] {
            writer.u32(value);
        }
        self.cred.encode(writer);
        self.verf.encode(writer);
        writer.buffer().extend_from_slice(self.args);
    }
}

/// `accept_stat`: what became of an accepted call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AcceptStat {
    /// The results follow.
    Success,
    /// The program is not served here.
    ProgUnavail,
    /// The version is not served here.
    ProgMismatch {
        /// The lowest version served.
        low: u32,
        /// The highest version served.
        high: u32,
    },
    /// The program has no such procedure.
    ProcUnavail,
    /// The arguments can't be decoded.
    GarbageArgs,
    /// The server can't serve the call for a reason of its own.
    SystemErr,
}

/// Appends the header of an accepted reply; after [`AcceptStat::Success`] the results follow.
pub fn reply_accepted(writer: &mut Writer<'_>, xid: u32, stat: AcceptStat) {
    reply_verified(writer, xid, OpaqueAuth::NONE, stat);
}

/// Appends the header of an accepted reply with a verifier of its own (AUTH_TLS has one).
pub fn reply_verified(writer: &mut Writer<'_>, xid: u32, verf: OpaqueAuth<'_>, stat: AcceptStat) {
    for value in [xid, REPLY, MSG_ACCEPTED] {
        writer.u32(value);
    }
    verf.encode(writer);
    match stat {
        AcceptStat::Success => writer.u32(0),
        AcceptStat::ProgUnavail => writer.u32(1),
        AcceptStat::ProgMismatch { low, high } => {
            writer.u32(2);
            writer.u32(low);
            writer.u32(high);
        }
        AcceptStat::ProcUnavail => writer.u32(3),
        AcceptStat::GarbageArgs => writer.u32(4),
        AcceptStat::SystemErr => writer.u32(5),
    }
}

/// Appends the denial of a call whose RPC version is not 2.
pub fn reply_rpc_mismatch(writer: &mut Writer<'_>, xid: u32) {
    for value in [
        xid,
        REPLY,
        MSG_DENIED,
        RPC_MISMATCH,
        RPC_VERSION,
        RPC_VERSION,
    ] {
        writer.u32(value);
    }
}

/// Appends the denial of a call whose credential or verifier is refused.
pub fn reply_auth_error(writer: &mut Writer<'_>, xid: u32, stat: AuthStat) {
    for value in [xid, REPLY, MSG_DENIED, AUTH_ERROR, stat as u32] {
        writer.u32(value);
    }
}

/// A reply that a peer sent us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply<'a> {
    /// The transaction id of the call it answers.
    pub xid: u32,
    /// What became of the call.
    pub outcome: ReplyOutcome,
    /// The encoded results, empty unless the call succeeded.
    pub results: &'a [u8],
}

/// What became of a call of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyOutcome {
    /// The peer accepted the call.
    Accepted(AcceptStat),
    /// The peer denied the call because of the RPC version.
    RpcMismatch,
    /// The peer denied the call because of the credential; the `auth_stat` as a number.
    AuthError(u32),
}

impl<'a> Decode<'a> for Reply<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        let xid = reader.u32()?;
        if reader.u32()? != REPLY {
            return Err(XdrError::BadValue);
        }
        let outcome = match reader.u32()? {
            MSG_ACCEPTED => {
                OpaqueAuth::decode(reader)?;
                ReplyOutcome::Accepted(match reader.u32()? {
                    0 => AcceptStat::Success,
                    1 => AcceptStat::ProgUnavail,
                    2 => AcceptStat::ProgMismatch {
                        low: reader.u32()?,
                        high: reader.u32()?,
                    },
                    3 => AcceptStat::ProcUnavail,
                    4 => AcceptStat::GarbageArgs,
                    5 => AcceptStat::SystemErr,
                    _ => return Err(XdrError::BadValue),
                })
            }
            MSG_DENIED => match reader.u32()? {
                RPC_MISMATCH => {
                    reader.u64()?;
                    ReplyOutcome::RpcMismatch
                }
                AUTH_ERROR => ReplyOutcome::AuthError(reader.u32()?),
                _ => return Err(XdrError::BadValue),
            },
            _ => return Err(XdrError::BadValue),
        };
        let results = reader.rest();
        *reader = Reader::new(&[]);
        Ok(Self {
            xid,
            outcome,
            results,
        })
    }
}
