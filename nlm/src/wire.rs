//! The Network Lock Manager, version 4: arguments and results as they stand in messages.
//!
//! Owns the layout in both directions and its limits: the server reads calls and writes results,
//! but it also calls its callers back (GRANTED, the `_RES` procedures) and reads what they answer.
//! Names are those of the specification. Versions 1 and 3 are in [`crate::wire_v3`] and come out
//! as the types of this module.
//!
//! Decides nothing: a range is not looked at, and a cookie, owner, file handle or name is kept byte
//! for byte, since peers compare what comes back with what they sent.
//!
//! Invariants: every decoded value borrows from its message, so decoding takes no memory; every
//! variable-length read has one of the maxima below; a bool or enum of another value than the
//! specification's is an error, which the server answers with GARBAGE_ARGS.
//!
//! Source: RFC 1813 6 (version 4), XNFS chapter 10 (semantics, versions 1 and 3).

#![deny(clippy::indexing_slicing, clippy::as_conversions)]

use havenfs_rpc::xdr::{Decode, Encode, Reader, Writer, XdrError};

pub mod procedure;
mod share;

pub use share::{Fsh4Access, Fsh4Mode, Nlm4Share, Nlm4ShareArgs, Nlm4ShareRes};

/// The longest `netobj`, in bytes: cookies and owners (RFC 1813 6.1.4).
pub const MAXNETOBJ_SZ: usize = 1024;
/// The longest `caller_name`, in bytes (RFC 1813 6.1.4).
pub const LM_MAXSTRLEN: usize = 1024;
/// The longest name in the argument of FREE_ALL, in bytes (RFC 1813 6.1.4).
pub const LM_MAXNAMELEN: usize = LM_MAXSTRLEN + 1;
/// The longest file handle, in bytes. The specification says `netobj`, but what it holds is an
/// `nfs_fh3` (RFC 1813 2.4), so a longer one is of no server.
pub const NFS3_FHSIZE: usize = 64;
/// The longest name in the argument of NSM_NOTIFY, in bytes (XNFS chapter 11).
pub const SM_MAXSTRLEN: usize = 1024;
/// The length of the monitor's private bytes (XNFS chapter 11).
pub const SM_PRIV_SIZE: usize = 16;

/// `nlm4_stats`: what became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nlm4Stats {
    /// The call was carried out.
    Granted,
    /// A conflicting lock is in the way.
    Denied,
    /// The server lacks the means for another lock.
    DeniedNolocks,
    /// A conflicting lock is in the way; GRANTED will tell when it is gone.
    Blocked,
    /// The server is in grace and takes reclaims only.
    DeniedGracePeriod,
    /// Waiting for this lock would never end (version 4 only, as all that follow).
    Deadlck,
    /// The file system is read-only.
    Rofs,
    /// The file handle is not valid.
    StaleFh,
    /// Offset or length is beyond what the server can lock.
    Fbig,
    /// Any other failure.
    Failed,
}

impl Nlm4Stats {
    /// All statuses, at the places of their numbers.
    pub const ALL: [Self; 10] = [
        Self::Granted,
        Self::Denied,
        Self::DeniedNolocks,
        Self::Blocked,
        Self::DeniedGracePeriod,
        Self::Deadlck,
        Self::Rofs,
        Self::StaleFh,
        Self::Fbig,
        Self::Failed,
    ];

    /// The number on the wire.
    pub const fn number(self) -> u32 {
        match self {
            Self::Granted => 0,
            Self::Denied => 1,
            Self::DeniedNolocks => 2,
            Self::Blocked => 3,
            Self::DeniedGracePeriod => 4,
            Self::Deadlck => 5,
            Self::Rofs => 6,
            Self::StaleFh => 7,
            Self::Fbig => 8,
            Self::Failed => 9,
        }
    }
}

impl Decode<'_> for Nlm4Stats {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        numbered(&Self::ALL, reader.u32()?)
    }
}

impl Encode for Nlm4Stats {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.u32(self.number());
    }
}

/// The value at the place `number`.
fn numbered<T: Copy>(all: &[T], number: u32) -> Result<T, XdrError> {
    let place = usize::try_from(number).map_err(|_| XdrError::BadValue)?;
    all.get(place).copied().ok_or(XdrError::BadValue)
}

/// `nlm4_lock`: a range of a file, and whose it is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nlm4Lock<'a> {
    /// The host's name, at most [`LM_MAXSTRLEN`] bytes.
    pub caller_name: &'a [u8],
    /// The file's handle, at most [`NFS3_FHSIZE`] bytes.
    pub fh: &'a [u8],
    /// The owner within the host, at most [`MAXNETOBJ_SZ`] bytes.
    pub oh: &'a [u8],
    /// The process within the host, or what the host gives out as one.
    pub svid: i32,
    /// The first byte.
    pub l_offset: u64,
    /// The number of bytes; 0 for all to the end of the file.
    pub l_len: u64,
}

impl<'a> Decode<'a> for Nlm4Lock<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            caller_name: reader.opaque(LM_MAXSTRLEN)?,
            fh: reader.opaque(NFS3_FHSIZE)?,
            oh: reader.opaque(MAXNETOBJ_SZ)?,
            svid: reader.i32()?,
            l_offset: reader.u64()?,
            l_len: reader.u64()?,
        })
    }
}

impl Encode for Nlm4Lock<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.caller_name);
        writer.opaque(self.fh);
        writer.opaque(self.oh);
        writer.i32(self.svid);
        writer.u64(self.l_offset);
        writer.u64(self.l_len);
    }
}

/// `nlm4_holder`: who is in the way, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nlm4Holder<'a> {
    /// Whether the lock is exclusive.
    pub exclusive: bool,
    /// The holder's process.
    pub svid: i32,
    /// The holder within its host, at most [`MAXNETOBJ_SZ`] bytes.
    pub oh: &'a [u8],
    /// The first byte.
    pub l_offset: u64,
    /// The number of bytes; 0 for all to the end of the file.
    pub l_len: u64,
}

impl<'a> Decode<'a> for Nlm4Holder<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            exclusive: reader.bool()?,
            svid: reader.i32()?,
            oh: reader.opaque(MAXNETOBJ_SZ)?,
            l_offset: reader.u64()?,
            l_len: reader.u64()?,
        })
    }
}

impl Encode for Nlm4Holder<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.bool(self.exclusive);
        writer.i32(self.svid);
        writer.opaque(self.oh);
        writer.u64(self.l_offset);
        writer.u64(self.l_len);
    }
}

/// `nlm4_testargs`: argument of TEST and GRANTED and of their `_MSG` forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nlm4TestArgs<'a> {
    /// The caller's own bytes, to be repeated in the result; at most [`MAXNETOBJ_SZ`].
    pub cookie: &'a [u8],
    /// Whether the lock is exclusive.
    pub exclusive: bool,
    /// The lock.
    pub alock: Nlm4Lock<'a>,
}

impl<'a> Decode<'a> for Nlm4TestArgs<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            exclusive: reader.bool()?,
            alock: reader.value()?,
        })
    }
}

impl Encode for Nlm4TestArgs<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.cookie);
        writer.bool(self.exclusive);
        writer.value(&self.alock);
    }
}

/// `nlm4_lockargs`: argument of LOCK, LOCK_MSG and NM_LOCK.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nlm4LockArgs<'a> {
    /// The caller's own bytes, to be repeated in the result; at most [`MAXNETOBJ_SZ`].
    pub cookie: &'a [u8],
    /// Whether the caller waits for GRANTED if the lock can't be had now.
    pub block: bool,
    /// Whether the lock is exclusive.
    pub exclusive: bool,
    /// The lock.
    pub alock: Nlm4Lock<'a>,
    /// Whether the caller held the lock before the server's restart.
    pub reclaim: bool,
    /// The NSM state of the caller's host; 0 if it does not know.
    pub state: i32,
}

impl<'a> Decode<'a> for Nlm4LockArgs<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            block: reader.bool()?,
            exclusive: reader.bool()?,
            alock: reader.value()?,
            reclaim: reader.bool()?,
            state: reader.i32()?,
        })
    }
}

impl Encode for Nlm4LockArgs<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.cookie);
        writer.bool(self.block);
        writer.bool(self.exclusive);
        writer.value(&self.alock);
        writer.bool(self.reclaim);
        writer.i32(self.state);
    }
}

/// `nlm4_cancargs`: argument of CANCEL and CANCEL_MSG.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nlm4CancArgs<'a> {
    /// The caller's own bytes, to be repeated in the result; at most [`MAXNETOBJ_SZ`].
    pub cookie: &'a [u8],
    /// `block` of the LOCK that is taken back.
    pub block: bool,
    /// `exclusive` of that LOCK.
    pub exclusive: bool,
    /// The lock that it asked for.
    pub alock: Nlm4Lock<'a>,
}

impl<'a> Decode<'a> for Nlm4CancArgs<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            block: reader.bool()?,
            exclusive: reader.bool()?,
            alock: reader.value()?,
        })
    }
}

impl Encode for Nlm4CancArgs<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.cookie);
        writer.bool(self.block);
        writer.bool(self.exclusive);
        writer.value(&self.alock);
    }
}

/// `nlm4_unlockargs`: argument of UNLOCK and UNLOCK_MSG.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nlm4UnlockArgs<'a> {
    /// The caller's own bytes, to be repeated in the result; at most [`MAXNETOBJ_SZ`].
    pub cookie: &'a [u8],
    /// The range to release, and whose it is.
    pub alock: Nlm4Lock<'a>,
}

impl<'a> Decode<'a> for Nlm4UnlockArgs<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            alock: reader.value()?,
        })
    }
}

impl Encode for Nlm4UnlockArgs<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.cookie);
        writer.value(&self.alock);
    }
}

/// `nlm4_res`: result of LOCK, CANCEL, UNLOCK, GRANTED and NM_LOCK, argument of their `_RES` forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nlm4Res<'a> {
    /// The cookie of the call.
    pub cookie: &'a [u8],
    /// What became of it.
    pub stat: Nlm4Stats,
}

impl<'a> Decode<'a> for Nlm4Res<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            stat: reader.value()?,
        })
    }
}

impl Encode for Nlm4Res<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.cookie);
        writer.value(&self.stat);
    }
}

/// `nlm4_testrply`: the status of TEST.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nlm4TestRply<'a> {
    /// [`Nlm4Stats::Denied`]: this lock is in the way.
    Denied(Nlm4Holder<'a>),
    /// Any other status, never [`Nlm4Stats::Denied`], which comes with a holder.
    Other(Nlm4Stats),
}

impl<'a> Decode<'a> for Nlm4TestRply<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(match reader.value()? {
            Nlm4Stats::Denied => Self::Denied(reader.value()?),
            other => Self::Other(other),
        })
    }
}

impl Encode for Nlm4TestRply<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        match self {
            Self::Denied(holder) => {
                writer.value(&Nlm4Stats::Denied);
                writer.value(holder);
            }
            Self::Other(stat) => writer.value(stat),
        }
    }
}

/// `nlm4_testres`: result of TEST, argument of TEST_RES.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nlm4TestRes<'a> {
    /// The cookie of the call.
    pub cookie: &'a [u8],
    /// What became of it.
    pub stat: Nlm4TestRply<'a>,
}

impl<'a> Decode<'a> for Nlm4TestRes<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            stat: reader.value()?,
        })
    }
}

impl Encode for Nlm4TestRes<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.cookie);
        writer.value(&self.stat);
    }
}

/// `nlm4_notify`: argument of FREE_ALL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nlm4Notify<'a> {
    /// The host's `caller_name`, at most [`LM_MAXNAMELEN`] bytes.
    pub name: &'a [u8],
    /// The host's NSM state; callers that know none send 0. It has 32 bits, as Linux, FreeBSD and
    /// illumos read it.
    pub state: i32,
}

impl<'a> Decode<'a> for Nlm4Notify<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            name: reader.opaque(LM_MAXNAMELEN)?,
            state: reader.i32()?,
        })
    }
}

impl Encode for Nlm4Notify<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.name);
        writer.i32(self.state);
    }
}

/// Argument of NSM_NOTIFY, the `status` of XNFS chapter 11.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NsmNotifyArgs<'a> {
    /// The host whose state changed, at most [`SM_MAXSTRLEN`] bytes.
    pub mon_name: &'a [u8],
    /// Its new state.
    pub state: i32,
    /// `priv`: what the lock manager gave the monitor with SM_MON.
    pub private: [u8; SM_PRIV_SIZE],
}

impl<'a> Decode<'a> for NsmNotifyArgs<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            mon_name: reader.opaque(SM_MAXSTRLEN)?,
            state: reader.i32()?,
            private: reader.fixed()?,
        })
    }
}

impl Encode for NsmNotifyArgs<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.mon_name);
        writer.i32(self.state);
        writer.fixed(&self.private);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
