//! The Network Lock Manager, versions 1, 3 and 4: from a call to a change of the lock table, and
//! from its outcome to the answer.
//!
//! One function for each kind of call serves all versions and both forms. The versions differ in
//! [`NlmVersion`] alone, and a `_MSG` call in where its results go ([`results`]). What a call may
//! do is decided here: LOCK, TEST and SHARE look at the export and the file; UNLOCK, CANCEL and
//! UNSHARE look at the bytes of the handle alone, so that a lock comes off although its file was
//! deleted or its export removed. Who gets a lock is decided by the table.
//!
//! TEST, and a reclaim of a lock that the table has, are answered from the state that is applied;
//! everything else is a proposal, answered once it is on disk and carried out.
//!
//! Source: XNFS chapters 10 and 14; statuses and orders that these leave open are Linux's.

mod admission;
mod results;

use std::net::IpAddr;

use havenfs_nlm::granter::GrantCookie;
use havenfs_nlm::host::{CallDigest, HostKey};
use havenfs_nlm::keys::{FileKey, LockOwner};
use havenfs_nlm::listing::LockId;
use havenfs_nlm::range::ByteRange;
use havenfs_nlm::share::{ShareModes, ShareRequest};
use havenfs_nlm::table::{LockRequest, LockTable};
use havenfs_nlm::waiting::Callback;
use havenfs_nlm::wire::{
    Nlm4CancArgs, Nlm4Lock, Nlm4LockArgs, Nlm4Notify, Nlm4Res, Nlm4ShareArgs, Nlm4Stats,
    Nlm4TestArgs, Nlm4UnlockArgs, procedure,
};
use havenfs_nlm::wire_v3::NlmVersion;
use havenfs_rpc::message::{self, AcceptStat};
use havenfs_rpc::xdr::Writer;

use self::admission::Refused;
use self::results::{Answerer, Results};
use crate::call::{Proposal, Refusal, Request, Transport};
use crate::cluster::command::{LockAction, LockCall};
use crate::cluster::{Outcome, ServiceCommand};
use crate::export::Verdict;
use crate::lock_service::{Answer, LockService, unix_seconds};
use crate::node::Node;

/// Serves one call of NLM: the results are appended, or a change is proposed whose outcome makes
/// them.
///
/// # Errors
/// Why there are no results.
pub fn serve(
    node: &Node,
    request: &Request<'_>,
    writer: &mut Writer<'_>,
) -> Result<Option<Proposal>, Refusal> {
    let version = NlmVersion::from_number(request.version).ok_or(Refusal::ProcUnavail)?;
    if !version.has(request.procedure) {
        return Err(Refusal::ProcUnavail);
    }
    // While this node does not serve, silence: any answer could be taken for a final one.
    let locks = node.locks.get().ok_or(Refusal::Silence)?;
    let epoch = locks.epoch().ok_or(Refusal::Silence)?;
    let call = NlmCall {
        node,
        locks,
        request,
        version,
        epoch,
    };
    let number = procedure::of_msg(request.procedure).unwrap_or(request.procedure);
    let made = match number {
        procedure::TEST => call.test(),
        procedure::LOCK => call.lock(true),
        procedure::NM_LOCK => call.lock(false),
        procedure::CANCEL => call.cancel(),
        procedure::UNLOCK => call.unlock(),
        procedure::SHARE => call.share(),
        procedure::UNSHARE => call.unshare(),
        procedure::GRANTED_RES => return call.granted_res().map(|()| None),
        procedure::FREE_ALL => return call.free_all().map(Some),
        _ => return Err(Refusal::ProcUnavail),
    }?;
    let answerer = Answerer::new(locks, request, version);
    Ok(match made {
        Made::Now(results) => {
            answerer.answer(results, writer);
            None
        }
        Made::Later(later) => Some(later.propose(answerer)),
    })
}

/// What became of a call so far.
enum Made {
    /// These are its results.
    Now(Results),
    /// They follow from a change.
    Later(Later),
}

/// A change, and what its outcome is made into.
struct Later {
    command: ServiceCommand,
    cookie: Box<[u8]>,
    is_share: bool,
    /// Who reclaims, if the call says so, and whether grace runs.
    reclaims: Option<(HostKey, bool)>,
}

impl Later {
    fn propose(self, answerer: Answerer) -> Proposal {
        let Self {
            command,
            cookie,
            is_share,
            reclaims,
        } = self;
        let answer = move |outcome: Outcome, writer: &mut Writer<'_>| {
            let Some(stat) = results::stat_of(&outcome) else {
                return false;
            };
            if let Some((host, in_grace)) = reclaims {
                answerer.reclaimed(&host, stat, in_grace);
            }
            let results = if is_share {
                Results::Share { cookie, stat }
            } else {
                Results::Res { cookie, stat }
            };
            message::reply_accepted(writer, answerer.xid(), AcceptStat::Success);
            answerer.answer(results, writer);
            true
        };
        Proposal {
            command,
            answer: Box::new(answer),
        }
    }
}

/// One call with what all procedures need.
struct NlmCall<'a> {
    node: &'a Node,
    locks: &'a LockService,
    request: &'a Request<'a>,
    version: NlmVersion,
    epoch: u32,
}

/// What a call is about, in the table's terms.
struct Subject {
    host: HostKey,
    file: FileKey,
    owner: LockOwner,
    range: ByteRange,
}

impl NlmCall<'_> {
    /// NLM_TEST.
    fn test(&self) -> Result<Made, Refusal> {
        let args: Nlm4TestArgs<'_> = self.version.decode(self.request.args)?;
        let cookie = args.cookie.into();
        let subject = match self.admitted(&args.alock, args.exclusive) {
            Ok(subject) => subject,
            Err(refused) => {
                let stat = refused.stat()?;
                return Ok(Made::Now(Results::Test { cookie, stat }));
            }
        };
        let state = self.locks.state();
        if state.epoch() != self.epoch {
            return Err(Refusal::Silence);
        }
        if state.in_grace() {
            // What is not in the table may still be held.
            let stat = Nlm4Stats::DeniedGracePeriod;
            return Ok(Made::Now(Results::Test { cookie, stat }));
        }
        let (table, range) = (state.table(), subject.range);
        let Subject {
            host, file, owner, ..
        } = &subject;
        let holder = table.test(host, file, owner, range, args.exclusive);
        Ok(Made::Now(match holder {
            Some(holder) => Results::Conflict { cookie, holder },
            None => Results::Test {
                cookie,
                stat: Nlm4Stats::Granted,
            },
        }))
    }

    /// NLM_LOCK, and NLM_NM_LOCK, whose host is not called back and does not hear of restarts.
    fn lock(&self, monitored: bool) -> Result<Made, Refusal> {
        let args: Nlm4LockArgs<'_> = self.version.decode(self.request.args)?;
        let subject = match self.admitted(&args.alock, args.exclusive) {
            Ok(subject) => subject,
            Err(refused) => return refused.made(args.cookie),
        };
        let origin = self.request.origin;
        if origin.transport == Transport::Tcp {
            let caller_name = args.alock.caller_name;
            self.node
                .lock_connections
                .locked(origin.peer, caller_name, args.state);
        }
        let callback = (args.block && monitored && !args.reclaim).then(|| Callback {
            version: self.version,
            udp: self.request.origin.transport == Transport::Udp,
            fh: args.alock.fh.into(),
            l_offset: args.alock.l_offset,
            l_len: args.alock.l_len,
        });
        let asked = LockRequest {
            file: subject.file,
            owner: subject.owner,
            range: subject.range,
            exclusive: args.exclusive,
            callback,
            nsm_state: args.state,
            monitored,
            reclaim: args.reclaim,
        };
        let host = subject.host;
        if asked.reclaim && self.is_recorded(|table| table.holding(&host, &asked))? {
            return Ok(Made::Now(Results::Res {
                cookie: args.cookie.into(),
                stat: Nlm4Stats::Granted,
            }));
        }
        Ok(self.later(host, LockAction::Lock(asked), args.cookie))
    }

    /// NLM_CANCEL.
    fn cancel(&self) -> Result<Made, Refusal> {
        let args: Nlm4CancArgs<'_> = self.version.decode(self.request.args)?;
        match self.subject(&args.alock) {
            Err(refused) => refused.made_unlock(args.cookie),
            Ok(subject) => {
                let action = LockAction::Cancel {
                    file: subject.file,
                    owner: subject.owner,
                    range: subject.range,
                    exclusive: args.exclusive,
                };
                Ok(self.later(subject.host, action, args.cookie))
            }
        }
    }

    /// NLM_UNLOCK.
    fn unlock(&self) -> Result<Made, Refusal> {
        let args: Nlm4UnlockArgs<'_> = self.version.decode(self.request.args)?;
        match self.subject(&args.alock) {
            Err(refused) => refused.made_unlock(args.cookie),
            Ok(subject) => {
                let action = LockAction::Unlock {
                    file: subject.file,
                    owner: subject.owner,
                    range: subject.range,
                };
                Ok(self.later(subject.host, action, args.cookie))
            }
        }
    }

    /// NLM_SHARE.
    fn share(&self) -> Result<Made, Refusal> {
        let args: Nlm4ShareArgs<'_> = self.version.decode(self.request.args)?;
        let share = &args.share;
        let modes = ShareModes {
            deny: share.mode.number() as u8,
            access: share.access.number() as u8,
        };
        // A read-only export may be opened for reading whatever that denies to others: Windows
        // opens so.
        let writes = modes.access & 2 != 0;
        let file = self
            .file_key(share.fh)
            .and_then(|file| self.admit(share.fh, writes).map(|()| file));
        let file = match file {
            Ok(file) => file,
            Err(refused) => return refused.made_share(args.cookie),
        };
        let host = self.host(share.caller_name);
        let asked = ShareRequest {
            file,
            oh: share.oh.into(),
            modes,
            reclaim: args.reclaim,
        };
        let has = |table: &LockTable| table.has_share(&host, &asked).then(Vec::new);
        if asked.reclaim && self.is_recorded(has)? {
            return Ok(Made::Now(Results::Share {
                cookie: args.cookie.into(),
                stat: Nlm4Stats::Granted,
            }));
        }
        Ok(self.later(host, LockAction::Share(asked), args.cookie))
    }

    /// NLM_UNSHARE.
    fn unshare(&self) -> Result<Made, Refusal> {
        let args: Nlm4ShareArgs<'_> = self.version.decode(self.request.args)?;
        match self.file_key(args.share.fh) {
            Err(refused) => refused.made_share(args.cookie),
            Ok(file) => {
                let oh = args.share.oh.into();
                let host = self.host(args.share.caller_name);
                Ok(self.later(host, LockAction::Unshare { file, oh }, args.cookie))
            }
        }
    }

    /// NLM_GRANTED_RES: what a host says to GRANTED_MSG.
    fn granted_res(&self) -> Result<(), Refusal> {
        let res: Nlm4Res<'_> = self.version.decode(self.request.args)?;
        let from = self.request.origin.host();
        let cookie = GrantCookie::decode(res.cookie);
        // Whoever else answers costs nothing beyond this.
        let cookie = cookie.filter(|cookie| {
            let state = self.locks.state();
            state.table().has_grant_to(cookie.id, from)
        });
        if let Some(cookie) = cookie {
            self.locks.answered(Answer {
                cookie,
                from,
                stat: res.stat,
            });
        }
        Ok(())
    }

    /// NLM_FREE_ALL: from the host itself only.
    fn free_all(&self) -> Result<Proposal, Refusal> {
        let args: Nlm4Notify<'_> = self.version.decode(self.request.args)?;
        let address = self.request.origin.host();
        // It needs no handle, and so anybody can send one. A host that has nothing here and that no
        // export admits is not remembered for it.
        let is_known = self.locks.state().table().has_host_at(address);
        if !is_known && !self.is_admitted_somewhere(address) {
            return Err(Refusal::Silence);
        }
        let command = ServiceCommand::FreeAll {
            epoch: self.epoch,
            address,
            name: args.name.into(),
            call: self.digest(),
            now: unix_seconds(),
        };
        Ok(void_after(command, self.request.xid))
    }

    fn is_admitted_somewhere(&self, address: IpAddr) -> bool {
        let exports = self.node.exports.load();
        let mut exports = exports.exports().iter();
        exports.any(|export| {
            let verdict = export.policy(address, &self.node.names);
            !matches!(verdict, Verdict::Refused)
        })
    }

    /// Whether the table has what is reclaimed, so that there is nothing to write: thousands of
    /// reclaims come at once after a restart. Or whether it had it when the same call came first:
    /// then the answer is the same, and nothing comes of it. While grace runs each is noted, since
    /// what is not reclaimed then ends.
    fn is_recorded(
        &self,
        find: impl FnOnce(&LockTable) -> Option<Vec<LockId>>,
    ) -> Result<bool, Refusal> {
        let state = self.locks.state();
        if state.epoch() != self.epoch {
            return Err(Refusal::Silence);
        }
        if state.in_grace() {
            return Ok(false);
        }
        let call = self.digest();
        let Some(found) = find(state.table()) else {
            return Ok(self.locks.reclaims().has_seen(call));
        };
        self.locks.note_reclaim(call, &found, state.table());
        Ok(true)
    }

    /// Whom and what a call is about. Looks at nothing but its bytes.
    fn subject(&self, lock: &Nlm4Lock<'_>) -> Result<Subject, Refused> {
        let file = self.file_key(lock.fh)?;
        let range = ByteRange::from_wire(lock.l_offset, lock.l_len, self.version.offset_max())?;
        Ok(Subject {
            host: self.host(lock.caller_name),
            file,
            owner: LockOwner {
                svid: lock.svid,
                oh: lock.oh.into(),
            },
            range,
        })
    }

    /// The same, if exports and permissions let the caller have such a lock.
    fn admitted(&self, lock: &Nlm4Lock<'_>, exclusive: bool) -> Result<Subject, Refused> {
        let subject = self.subject(lock)?;
        self.admit(lock.fh, exclusive)?;
        Ok(subject)
    }

    fn host(&self, caller_name: &[u8]) -> HostKey {
        HostKey {
            service_address: self.request.origin.local.ip(),
            address: self.request.origin.host(),
            caller_name: caller_name.into(),
        }
    }

    /// A change whose outcome makes the results.
    fn later(&self, host: HostKey, action: LockAction, cookie: &[u8]) -> Made {
        let is_share = matches!(action, LockAction::Share(_) | LockAction::Unshare { .. });
        let reclaims = match &action {
            LockAction::Lock(asked) if asked.reclaim => Some(host.clone()),
            LockAction::Share(asked) if asked.reclaim => Some(host.clone()),
            _ => None,
        };
        let reclaims = reclaims.map(|host| (host, self.locks.state().in_grace()));
        let command = ServiceCommand::Call(LockCall {
            epoch: self.epoch,
            host,
            call: self.digest(),
            now: unix_seconds(),
            action,
        });
        Made::Later(Later {
            command,
            cookie: cookie.into(),
            is_share,
            reclaims,
        })
    }

    /// What tells this call from all others of its host, and is the same for a copy of it.
    fn digest(&self) -> CallDigest {
        use std::hash::Hasher as _;
        let mut hasher = siphasher::sip::SipHasher24::new();
        let Request {
            version,
            procedure,
            xid,
            args,
            ..
        } = self.request;
        for number in [version, procedure, xid] {
            hasher.write(&number.to_be_bytes());
        }
        hasher.write(args);
        CallDigest(hasher.finish())
    }
}

/// A change whose reply says only that it was carried out.
pub(super) fn void_after(command: ServiceCommand, xid: u32) -> Proposal {
    let answer = move |outcome: Outcome, writer: &mut Writer<'_>| {
        if outcome == Outcome::EarlierEpoch {
            return false;
        }
        message::reply_accepted(writer, xid, AcceptStat::Success);
        true
    };
    Proposal {
        command,
        answer: Box::new(answer),
    }
}
