//! The Network Lock Manager, versions 1, 3 and 4: calls of any shape, and what comes back.
//!
//! Arguments are laid out by hand from the specification, and results are read with the decoders
//! of `nfs3_types`, so nothing here shares its layout with the server's own code. A result must
//! repeat the cookie of its call. What the server calls back is received by
//! [`Host`](super::host::Host).
//!
//! Source: RFC 1813 6, XNFS chapter 10.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, anyhow, bail, ensure};
use havenfs_rpc::program;
use havenfs_rpc::xdr::Writer;
use nfs3_types::xdr_codec::{Opaque, Unpack};

use super::nfs::args;
use super::peer::Peer;
use super::rpc::{self, Cred, Header, Outcome};

/// The numbers of the procedures.
#[expect(missing_docs, reason = "named and explained in RFC 1813 6.3")]
pub mod procedure {
    pub const NULL: u32 = 0;
    pub const TEST: u32 = 1;
    pub const LOCK: u32 = 2;
    pub const CANCEL: u32 = 3;
    pub const UNLOCK: u32 = 4;
    pub const GRANTED: u32 = 5;
    pub const TEST_MSG: u32 = 6;
    pub const LOCK_MSG: u32 = 7;
    pub const CANCEL_MSG: u32 = 8;
    pub const UNLOCK_MSG: u32 = 9;
    pub const GRANTED_MSG: u32 = 10;
    pub const TEST_RES: u32 = 11;
    pub const LOCK_RES: u32 = 12;
    pub const CANCEL_RES: u32 = 13;
    pub const UNLOCK_RES: u32 = 14;
    pub const GRANTED_RES: u32 = 15;
    pub const NSM_NOTIFY: u32 = 16;
    pub const SHARE: u32 = 20;
    pub const UNSHARE: u32 = 21;
    pub const NM_LOCK: u32 = 22;
    pub const FREE_ALL: u32 = 23;
}

/// The numbers of the statuses.
#[expect(missing_docs, reason = "named and explained in RFC 1813 6.1.4")]
pub mod stat {
    pub const GRANTED: u32 = 0;
    pub const DENIED: u32 = 1;
    pub const DENIED_NOLOCKS: u32 = 2;
    pub const BLOCKED: u32 = 3;
    pub const DENIED_GRACE_PERIOD: u32 = 4;
    pub const DEADLCK: u32 = 5;
    pub const ROFS: u32 = 6;
    pub const STALE_FH: u32 = 7;
    pub const FBIG: u32 = 8;
    pub const FAILED: u32 = 9;
}

/// All that a call about a lock can carry; each procedure sends its part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lock {
    /// The cookie, which the result repeats.
    pub cookie: Vec<u8>,
    /// The host's name.
    pub caller_name: Vec<u8>,
    /// The file's handle.
    pub fh: Vec<u8>,
    /// The owner within the host.
    pub oh: Vec<u8>,
    /// The process within the host.
    pub svid: i32,
    /// The first byte; versions 1 and 3 send its lower 32 bits.
    pub l_offset: u64,
    /// The number of bytes, 0 for all to the end; versions 1 and 3 send its lower 32 bits.
    pub l_len: u64,
    /// Whether the lock is exclusive.
    pub exclusive: bool,
    /// Whether to wait for GRANTED.
    pub block: bool,
    /// Whether the lock was held before the server's restart.
    pub reclaim: bool,
    /// The host's NSM state.
    pub state: i32,
}

impl Lock {
    /// An exclusive lock of a whole file, as Linux asks for it: a new cookie of four bytes, and the
    /// owner as text. It does not wait, and tells no state.
    pub fn new(fh: &[u8], caller_name: &str, svid: i32) -> Self {
        Self {
            cookie: next_cookie(),
            caller_name: caller_name.into(),
            fh: fh.to_vec(),
            oh: format!("{svid}@{caller_name}").into_bytes(),
            svid,
            l_offset: 0,
            l_len: 0,
            exclusive: true,
            block: false,
            reclaim: false,
            state: 0,
        }
    }

    /// The same of a range, with a new cookie.
    #[must_use]
    pub fn range(&self, l_offset: u64, l_len: u64) -> Self {
        Self {
            cookie: next_cookie(),
            l_offset,
            l_len,
            ..self.clone()
        }
    }

    /// The arguments of a procedure, which is one of TEST, LOCK, CANCEL, UNLOCK, GRANTED, their
    /// `_MSG` forms and NM_LOCK. Any other gets those of LOCK.
    pub fn args(&self, version: u32, procedure: u32) -> Vec<u8> {
        use procedure::{
            CANCEL, CANCEL_MSG, GRANTED, GRANTED_MSG, TEST, TEST_MSG, UNLOCK, UNLOCK_MSG,
        };
        args(|w| {
            w.opaque(&self.cookie);
            match procedure {
                UNLOCK | UNLOCK_MSG => self.alock(version, w),
                TEST | TEST_MSG | GRANTED | GRANTED_MSG => {
                    w.bool(self.exclusive);
                    self.alock(version, w);
                }
                CANCEL | CANCEL_MSG => {
                    w.bool(self.block);
                    w.bool(self.exclusive);
                    self.alock(version, w);
                }
                _ => {
                    w.bool(self.block);
                    w.bool(self.exclusive);
                    self.alock(version, w);
                    w.bool(self.reclaim);
                    w.i32(self.state);
                }
            }
        })
    }

    fn alock(&self, version: u32, w: &mut Writer<'_>) {
        w.opaque(&self.caller_name);
        w.opaque(&self.fh);
        w.opaque(&self.oh);
        w.i32(self.svid);
        for value in [self.l_offset, self.l_len] {
            if version < 4 {
                w.u32(value as u32);
            } else {
                w.u64(value);
            }
        }
    }

    /// Reads the arguments of GRANTED or GRANTED_MSG; what they do not carry is false or 0.
    pub fn granted(version: u32, args: &[u8]) -> Result<Self> {
        let mut fields = Fields::new(args);
        let lock = Self {
            cookie: fields.opaque()?,
            exclusive: fields.field()?,
            caller_name: fields.opaque()?,
            fh: fields.opaque()?,
            oh: fields.opaque()?,
            svid: fields.signed()?,
            l_offset: fields.number(version)?,
            l_len: fields.number(version)?,
            block: false,
            reclaim: false,
            state: 0,
        };
        fields.finish()?;
        Ok(lock)
    }
}

/// A cookie of four bytes that this process has not used yet.
pub fn next_cookie() -> Vec<u8> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes().to_vec()
}

/// The arguments of SHARE and UNSHARE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The cookie, which the result repeats.
    pub cookie: Vec<u8>,
    /// The host's name.
    pub caller_name: Vec<u8>,
    /// The file's handle.
    pub fh: Vec<u8>,
    /// The owner within the host.
    pub oh: Vec<u8>,
    /// What others are kept from: bit 0 reading, bit 1 writing.
    pub mode: u32,
    /// What the file is opened for: bit 0 reading, bit 1 writing.
    pub access: u32,
    /// Whether the share was held before the server's restart.
    pub reclaim: bool,
}

impl Share {
    /// The encoded arguments.
    pub fn args(&self) -> Vec<u8> {
        args(|w| {
            for bytes in [&self.cookie, &self.caller_name, &self.fh, &self.oh] {
                w.opaque(bytes);
            }
            w.u32(self.mode);
            w.u32(self.access);
            w.bool(self.reclaim);
        })
    }
}

/// What TEST found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tested {
    /// DENIED, and who is in the way.
    Denied(Holder),
    /// Any other status.
    Other(u32),
}

/// Who is in the way, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Whether the lock is exclusive.
    pub exclusive: bool,
    /// The process within the host.
    pub svid: i32,
    /// The owner within the host.
    pub oh: Vec<u8>,
    /// The first byte.
    pub l_offset: u64,
    /// The number of bytes; 0 for all to the end.
    pub l_len: u64,
}

/// Reads `nlm_res` or `nlm4_res`: cookie and status.
pub fn read_res(results: &[u8]) -> Result<(Vec<u8>, u32)> {
    let mut fields = Fields::new(results);
    let res = (fields.opaque()?, fields.field()?);
    fields.finish()?;
    Ok(res)
}

/// Reads `nlm_testres` or `nlm4_testres`: cookie and what was found.
pub fn read_test_res(version: u32, results: &[u8]) -> Result<(Vec<u8>, Tested)> {
    let mut fields = Fields::new(results);
    let cookie = fields.opaque()?;
    let tested = match fields.field()? {
        stat::DENIED => Tested::Denied(Holder {
            exclusive: fields.field()?,
            svid: fields.signed()?,
            oh: fields.opaque()?,
            l_offset: fields.number(version)?,
            l_len: fields.number(version)?,
        }),
        other => Tested::Other(other),
    };
    fields.finish()?;
    Ok((cookie, tested))
}

/// A client of NLM on one connection.
#[derive(Debug)]
pub struct Nlm {
    /// The connection.
    pub peer: Peer,
    /// Whom it acts as.
    pub cred: Cred,
    /// The version; 4 unless a test says otherwise.
    pub version: u32,
}

impl Nlm {
    /// Takes a connection to the NLM port.
    pub const fn new(peer: Peer, cred: Cred) -> Self {
        Self {
            peer,
            cred,
            version: 4,
        }
    }

    /// Makes a call whose RPC outcome the test wants to see.
    pub fn outcome(&mut self, procedure: u32, args: &[u8]) -> Result<Outcome> {
        self.outcome_as(rpc::next_xid(), procedure, args)
    }

    /// The same with a transaction id of the test's choice: once more for a retransmission.
    pub fn outcome_as(&mut self, xid: u32, procedure: u32, args: &[u8]) -> Result<Outcome> {
        let header = Header::new(program::NLM, self.version, procedure, &self.cred);
        self.peer.exchange_as(xid, &header, args)
    }

    /// Makes a call about a lock, LOCK for instance, and returns its status.
    pub fn call(&mut self, procedure: u32, lock: &Lock) -> Result<u32> {
        self.call_as(rpc::next_xid(), procedure, lock)
    }

    /// The same with a transaction id of the test's choice: once more for a retransmission.
    pub fn call_as(&mut self, xid: u32, procedure: u32, lock: &Lock) -> Result<u32> {
        let args = lock.args(self.version, procedure);
        let results = self.outcome_as(xid, procedure, &args)?.results()?;
        let (cookie, stat) = read_res(&results)?;
        ensure!(cookie == lock.cookie, "cookie {cookie:02x?} for {lock:?}");
        Ok(stat)
    }

    /// Makes a call whose reply says nothing: a `_MSG` form or a `_RES` form.
    pub fn message(&mut self, procedure: u32, args: &[u8]) -> Result<()> {
        let results = self.outcome(procedure, args)?.results()?;
        ensure!(results.is_empty(), "procedure {procedure} has results");
        Ok(())
    }

    /// NULL.
    pub fn null(&mut self) -> Result<()> {
        self.message(procedure::NULL, &[])
    }

    /// TEST.
    pub fn test(&mut self, lock: &Lock) -> Result<Tested> {
        let args = lock.args(self.version, procedure::TEST);
        let results = self.outcome(procedure::TEST, &args)?.results()?;
        let (cookie, tested) = read_test_res(self.version, &results)?;
        ensure!(cookie == lock.cookie, "cookie {cookie:02x?} for {lock:?}");
        Ok(tested)
    }

    /// LOCK.
    pub fn lock(&mut self, lock: &Lock) -> Result<u32> {
        self.call(procedure::LOCK, lock)
    }

    /// CANCEL.
    pub fn cancel(&mut self, lock: &Lock) -> Result<u32> {
        self.call(procedure::CANCEL, lock)
    }

    /// UNLOCK.
    pub fn unlock(&mut self, lock: &Lock) -> Result<u32> {
        self.call(procedure::UNLOCK, lock)
    }

    /// GRANTED, which servers send and do not expect.
    pub fn granted(&mut self, lock: &Lock) -> Result<u32> {
        self.call(procedure::GRANTED, lock)
    }

    /// NM_LOCK.
    pub fn nm_lock(&mut self, lock: &Lock) -> Result<u32> {
        self.call(procedure::NM_LOCK, lock)
    }

    /// TEST_MSG.
    pub fn test_msg(&mut self, lock: &Lock) -> Result<()> {
        self.send_lock(procedure::TEST_MSG, lock)
    }

    /// LOCK_MSG.
    pub fn lock_msg(&mut self, lock: &Lock) -> Result<()> {
        self.send_lock(procedure::LOCK_MSG, lock)
    }

    /// CANCEL_MSG.
    pub fn cancel_msg(&mut self, lock: &Lock) -> Result<()> {
        self.send_lock(procedure::CANCEL_MSG, lock)
    }

    /// UNLOCK_MSG.
    pub fn unlock_msg(&mut self, lock: &Lock) -> Result<()> {
        self.send_lock(procedure::UNLOCK_MSG, lock)
    }

    /// GRANTED_MSG, which servers send and do not expect.
    pub fn granted_msg(&mut self, lock: &Lock) -> Result<()> {
        self.send_lock(procedure::GRANTED_MSG, lock)
    }

    /// GRANTED_RES: the answer to a GRANTED_MSG with this cookie.
    pub fn granted_res(&mut self, cookie: &[u8], stat: u32) -> Result<()> {
        self.message(procedure::GRANTED_RES, &res_args(cookie, stat))
    }

    /// SHARE: the status and the sequence number.
    pub fn share(&mut self, share: &Share) -> Result<(u32, i32)> {
        self.call_share(procedure::SHARE, share)
    }

    /// UNSHARE: the status and the sequence number.
    pub fn unshare(&mut self, share: &Share) -> Result<(u32, i32)> {
        self.call_share(procedure::UNSHARE, share)
    }

    /// FREE_ALL.
    pub fn free_all(&mut self, name: &[u8], state: i32) -> Result<()> {
        let args = args(|w| {
            w.opaque(name);
            w.i32(state);
        });
        self.message(procedure::FREE_ALL, &args)
    }

    fn send_lock(&mut self, procedure: u32, lock: &Lock) -> Result<()> {
        self.message(procedure, &lock.args(self.version, procedure))
    }

    fn call_share(&mut self, procedure: u32, share: &Share) -> Result<(u32, i32)> {
        let results = self.outcome(procedure, &share.args())?.results()?;
        let mut fields = Fields::new(&results);
        let cookie = fields.opaque()?;
        ensure!(cookie == share.cookie, "cookie {cookie:02x?} for {share:?}");
        let res = (fields.field()?, fields.signed()?);
        fields.finish()?;
        Ok(res)
    }
}

/// Encodes `nlm_res` or `nlm4_res`, which are the arguments of `_RES` procedures.
pub fn res_args(cookie: &[u8], stat: u32) -> Vec<u8> {
    args(|w| {
        w.opaque(cookie);
        w.u32(stat);
    })
}

/// Reads one field after the other with the decoders of `nfs3_types`.
pub(super) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next field, of any type.
    pub(super) fn field<T: Unpack>(&mut self) -> Result<T> {
        let (value, _) =
            T::unpack(&mut self.rest).map_err(|error| anyhow!("malformed field: {error}"))?;
        Ok(value)
    }

    /// The next field, a signed number.
    pub(super) fn signed(&mut self) -> Result<i32> {
        Ok(self.field::<u32>()?.cast_signed())
    }

    /// The next field, of opaque bytes or a string.
    pub(super) fn opaque(&mut self) -> Result<Vec<u8>> {
        Ok(self.field::<Opaque<'static>>()?.into_owned())
    }

    /// The next field, an offset or a length of this version.
    fn number(&mut self, version: u32) -> Result<u64> {
        if version < 4 {
            Ok(self.field::<u32>()?.into())
        } else {
            self.field()
        }
    }

    /// Succeeds when all was read.
    pub(super) fn finish(self) -> Result<()> {
        if !self.rest.is_empty() {
            bail!("{} bytes behind the last field", self.rest.len());
        }
        Ok(())
    }
}
