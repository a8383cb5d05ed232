//! Results of calls, and the two ways in which they go back: as the reply, or, for a `_MSG` call,
//! as a call of the `_RES` procedure of the caller's own NLM behind an empty reply.

use std::sync::Arc;

use havenfs_nlm::host::HostKey;
use havenfs_nlm::table::{Holder, LockOutcome};
use havenfs_nlm::wire::{
    Nlm4Holder, Nlm4Res, Nlm4ShareRes, Nlm4Stats, Nlm4TestRes, Nlm4TestRply, procedure,
};
use havenfs_nlm::wire_v3::NlmVersion;
use havenfs_rpc::portmap::Protocol;
use havenfs_rpc::program;
use havenfs_rpc::xdr::Writer;

use super::Made;
use super::admission::Refused;
use crate::call::{Refusal, Request, Transport};
use crate::cluster::Outcome;
use crate::lock_service::{Callee, LockCounters, LockService, ResultCall, ResultCalls};

/// What a call comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Results {
    /// `nlm4_res`.
    Res { cookie: Box<[u8]>, stat: Nlm4Stats },
    /// `nlm4_testres` without a holder.
    Test { cookie: Box<[u8]>, stat: Nlm4Stats },
    /// `nlm4_testres` with the one who is in the way.
    Conflict { cookie: Box<[u8]>, holder: Holder },
    /// `nlm4_shareres`.
    Share { cookie: Box<[u8]>, stat: Nlm4Stats },
}

impl Results {
    const fn stat(&self) -> Nlm4Stats {
        match self {
            Self::Res { stat, .. } | Self::Test { stat, .. } | Self::Share { stat, .. } => *stat,
            Self::Conflict { .. } => Nlm4Stats::Denied,
        }
    }

    fn encode(&self, version: NlmVersion, writer: &mut Writer<'_>) {
        match self {
            Self::Res { cookie, stat } => {
                let (cookie, stat) = (&**cookie, *stat);
                version.encode(Nlm4Res { cookie, stat }, writer);
            }
            Self::Test { cookie, stat } => {
                let (cookie, stat) = (&**cookie, Nlm4TestRply::Other(*stat));
                version.encode(Nlm4TestRes { cookie, stat }, writer);
            }
            Self::Conflict { cookie, holder } => {
                let (l_offset, l_len) = holder.range.to_wire();
                let stat = Nlm4TestRply::Denied(Nlm4Holder {
                    exclusive: holder.exclusive,
                    svid: holder.owner.svid,
                    oh: &holder.owner.oh,
                    l_offset,
                    l_len,
                });
                version.encode(Nlm4TestRes { cookie, stat }, writer);
            }
            Self::Share { cookie, stat } => {
                let res = Nlm4ShareRes {
                    cookie,
                    stat: *stat,
                    sequence: 0,
                };
                version.encode(res, writer);
            }
        }
    }
}

/// Where the results of a call go.
#[derive(Debug)]
pub(super) struct Answerer {
    xid: u32,
    version: NlmVersion,
    /// The procedure, whatever its form.
    procedure: u32,
    counters: Arc<LockCounters>,
    /// For a `_MSG` call: whom to call back, by which procedure.
    call_back: Option<(Callee, u32, ResultCalls)>,
}

impl Answerer {
    pub(super) fn new(locks: &LockService, request: &Request<'_>, version: NlmVersion) -> Self {
        let callee = Callee {
            address: request.origin.host(),
            from: request.origin.local.ip(),
            program: (program::NLM, version.number()),
            protocol: match request.origin.transport {
                Transport::Tcp => Protocol::Tcp,
                Transport::Udp => Protocol::Udp,
            },
        };
        let res = procedure::res_of_msg(request.procedure);
        Self {
            xid: request.xid,
            version,
            procedure: procedure::of_msg(request.procedure).unwrap_or(request.procedure),
            counters: Arc::clone(locks.counters()),
            call_back: res.map(|res| (callee, res, locks.result_calls())),
        }
    }

    /// The transaction id of the call.
    pub(super) const fn xid(&self) -> u32 {
        self.xid
    }

    /// Counts what became of a reclaim that went through the log.
    pub(super) fn reclaimed(&self, host: &HostKey, stat: Nlm4Stats, in_grace: bool) {
        match stat {
            Nlm4Stats::Granted => {
                self.counters.reclaims_granted.add(1);
                // Of what the table had: answered from there, unless it is noted for the end of
                // grace.
                if !in_grace {
                    self.counters.reclaims_unknown.add(1);
                }
            }
            // A Linux client drops the lock then, with a line in its own log and no more.
            Nlm4Stats::Denied if self.counters.reclaim_refused() => {
                tracing::warn!(
                    %host,
                    "a lock that a host reclaims is refused: somebody else has it, it ended without \
                     the host's doing, or it is not known and `reclaim = \"strict\"`; a program there \
                     works on without its lock"
                );
            }
            _ => {}
        }
    }

    /// Appends the results behind a reply header, or sends them and appends nothing.
    pub(super) fn answer(&self, results: Results, writer: &mut Writer<'_>) {
        self.counters.answered(self.procedure, results.stat());
        let Some((callee, number, calls)) = &self.call_back else {
            results.encode(self.version, writer);
            return;
        };
        let mut args = Vec::new();
        results.encode(self.version, &mut Writer::new(&mut args));
        calls.send(ResultCall {
            callee: *callee,
            number: *number,
            args,
        });
    }
}

impl Refused {
    /// The results of a call that changes nothing.
    pub(super) fn made(&self, cookie: &[u8]) -> Result<Made, Refusal> {
        let (stat, cookie) = (self.stat()?, cookie.into());
        Ok(Made::Now(Results::Res { cookie, stat }))
    }

    /// The same of UNLOCK and CANCEL: nothing is held behind the last byte that a file can have.
    pub(super) fn made_unlock(&self, cookie: &[u8]) -> Result<Made, Refusal> {
        let stat = match self.stat()? {
            Nlm4Stats::Fbig => Nlm4Stats::Granted,
            stat => stat,
        };
        let cookie = cookie.into();
        Ok(Made::Now(Results::Res { cookie, stat }))
    }

    /// The same of a call about a share.
    pub(super) fn made_share(&self, cookie: &[u8]) -> Result<Made, Refusal> {
        let (stat, cookie) = (self.stat()?, cookie.into());
        Ok(Made::Now(Results::Share { cookie, stat }))
    }
}

/// The status that says what became of a change; none where silence is right.
pub(super) const fn stat_of(outcome: &Outcome) -> Option<Nlm4Stats> {
    Some(match outcome {
        Outcome::Lock(LockOutcome::Granted)
        | Outcome::Unlocked
        | Outcome::Cancelled { nothing_left: true } => Nlm4Stats::Granted,
        Outcome::Lock(LockOutcome::Denied)
        | Outcome::Cancelled {
            nothing_left: false,
        } => Nlm4Stats::Denied,
        Outcome::Lock(LockOutcome::Blocked) => Nlm4Stats::Blocked,
        Outcome::Lock(LockOutcome::Deadlock) => Nlm4Stats::Deadlck,
        Outcome::Lock(LockOutcome::TooMany(_)) => Nlm4Stats::DeniedNolocks,
        Outcome::Grace => Nlm4Stats::DeniedGracePeriod,
        // Another node, or a later life of this one, has the locks now.
        Outcome::EarlierEpoch
        | Outcome::Assigned(_)
        | Outcome::NotAssigned
        | Outcome::Renewed(_)
        | Outcome::Named(_)
        | Outcome::NoSuchService
        | Outcome::Defined(_)
        | Outcome::NotDefined(_)
        | Outcome::Freed(_)
        | Outcome::Suspected(_)
        | Outcome::Refusals(_)
        | Outcome::TooManyRefusals
        | Outcome::TooManyHandles
        | Outcome::StillServes(_)
        | Outcome::AwaitsFence(_)
        | Outcome::Done => return None,
    })
}
