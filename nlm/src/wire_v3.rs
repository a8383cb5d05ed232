//! The Network Lock Manager, versions 1 and 3, as the types of version 4; and the choice between
//! the versions.
//!
//! Versions 1 and 3 have the layout of version 4 with offsets and lengths of 32 bits, and only the
//! first five statuses; version 1 lacks the procedures from SHARE on. Messages are widened when
//! they are read and narrowed when they are written, so that nothing behind [`NlmVersion`] needs to
//! know which version a peer speaks:
//!
//! - Reading changes no number: the range of a request goes back to its owner in GRANTED as it
//!   came, since owners compare it. What it means is told by [`NlmVersion::offset_max`].
//! - A holder that the asker has no numbers for is clipped: an offset above 2^32-1 becomes 2^32-1,
//!   and a range that reaches byte 2^32-1 goes "to the end" (length 0). So does illumos.
//! - A status that the version lacks becomes the nearest one that it has: DEADLCK becomes DENIED,
//!   all others DENIED_NOLOCKS. So does Linux.
//!
//! Version 2 is not served.
//!
//! Source: XNFS chapter 10.

#![deny(clippy::indexing_slicing, clippy::as_conversions)]

use havenfs_rpc::xdr::{Decode, Encode, Reader, Writer, XdrError, decode_all};
use serde::{Deserialize, Serialize};

use crate::range::{ByteRange, OFFSET_MAX, OFFSET_MAX_V3, TooFar};
use crate::wire::{
    LM_MAXSTRLEN, MAXNETOBJ_SZ, NFS3_FHSIZE, Nlm4CancArgs, Nlm4Holder, Nlm4Lock, Nlm4LockArgs,
    Nlm4Notify, Nlm4Res, Nlm4ShareArgs, Nlm4ShareRes, Nlm4Stats, Nlm4TestArgs, Nlm4TestRes,
    Nlm4TestRply, Nlm4UnlockArgs, procedure,
};

/// A version of the protocol that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum NlmVersion {
    /// Version 1.
    V1,
    /// Version 3: version 1 and the procedures from SHARE on.
    V3,
    /// Version 4: 64 bits, more statuses.
    V4,
}

impl NlmVersion {
    /// All versions that are served.
    pub const ALL: [Self; 3] = [Self::V1, Self::V3, Self::V4];

    /// The version's number.
    pub const fn number(self) -> u32 {
        match self {
            Self::V1 => 1,
            Self::V3 => 3,
            Self::V4 => 4,
        }
    }

    /// The version with this number, or `None` if it is not served.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::V1),
            3 => Some(Self::V3),
            4 => Some(Self::V4),
            _ => None,
        }
    }

    /// Whether the specification of this version has this procedure. NSM_NOTIFY is in none.
    pub const fn has(self, procedure: u32) -> bool {
        match procedure {
            procedure::NULL..=procedure::GRANTED_RES => true,
            procedure::SHARE..=procedure::FREE_ALL => !matches!(self, Self::V1),
            _ => false,
        }
    }

    /// Reads arguments or results: one value and nothing after it.
    pub fn decode<'a, T>(self, bytes: &'a [u8]) -> Result<T, XdrError>
    where
        T: Decode<'a>,
        Narrow<T>: Decode<'a>,
    {
        match self {
            Self::V4 => decode_all(bytes),
            Self::V1 | Self::V3 => decode_all(bytes).map(|Narrow(value)| value),
        }
    }

    /// Appends arguments or results.
    pub fn encode<T>(self, value: T, writer: &mut Writer<'_>)
    where
        T: Encode,
        Narrow<T>: Encode,
    {
        match self {
            Self::V4 => value.encode(writer),
            Self::V1 | Self::V3 => Narrow(value).encode(writer),
        }
    }

    /// The last byte that this version can name, for [`ByteRange::from_wire`].
    pub const fn offset_max(self) -> u64 {
        match self {
            Self::V1 | Self::V3 => OFFSET_MAX_V3,
            Self::V4 => OFFSET_MAX,
        }
    }
}

/// The bytes of a range that 32 bits can name, as offset and length.
fn clipped(l_offset: u64, l_len: u64) -> (u32, u32) {
    let (l_offset, l_len) = match ByteRange::from_wire(l_offset, l_len, OFFSET_MAX_V3) {
        Ok(range) => range.to_wire(),
        Err(TooFar) => (OFFSET_MAX_V3, 0),
    };
    let fit = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    (fit(l_offset), fit(l_len))
}

/// A value of versions 1 and 3, held as version 4's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Narrow<T>(pub T);

impl Decode<'_> for Narrow<Nlm4Stats> {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let stat = reader.value()?;
        if narrow_stat(stat) == stat {
            Ok(Self(stat))
        } else {
            Err(XdrError::BadValue)
        }
    }
}

impl Encode for Narrow<Nlm4Stats> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.value(&narrow_stat(self.0));
    }
}

/// The nearest status that versions 1 and 3 have.
const fn narrow_stat(stat: Nlm4Stats) -> Nlm4Stats {
    match stat {
        Nlm4Stats::Granted
        | Nlm4Stats::Denied
        | Nlm4Stats::DeniedNolocks
        | Nlm4Stats::Blocked
        | Nlm4Stats::DeniedGracePeriod => stat,
        Nlm4Stats::Deadlck => Nlm4Stats::Denied,
        Nlm4Stats::Rofs | Nlm4Stats::StaleFh | Nlm4Stats::Fbig | Nlm4Stats::Failed => {
            Nlm4Stats::DeniedNolocks
        }
    }
}

impl<'a> Decode<'a> for Narrow<Nlm4Lock<'a>> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self(Nlm4Lock {
            caller_name: reader.opaque(LM_MAXSTRLEN)?,
            fh: reader.opaque(NFS3_FHSIZE)?,
            oh: reader.opaque(MAXNETOBJ_SZ)?,
            svid: reader.i32()?,
            l_offset: reader.u32()?.into(),
            l_len: reader.u32()?.into(),
        }))
    }
}

impl Encode for Narrow<Nlm4Lock<'_>> {
    /// Offset and length that fit are written as they are, even where they reach the last byte:
    /// they are those of a request, and its owner compares them.
    fn encode(&self, writer: &mut Writer<'_>) {
        let Self(lock) = self;
        writer.opaque(lock.caller_name);
        writer.opaque(lock.fh);
        writer.opaque(lock.oh);
        writer.i32(lock.svid);
        let (l_offset, l_len) = match (u32::try_from(lock.l_offset), u32::try_from(lock.l_len)) {
            (Ok(l_offset), Ok(l_len)) => (l_offset, l_len),
            _ => clipped(lock.l_offset, lock.l_len),
        };
        writer.u32(l_offset);
        writer.u32(l_len);
    }
}

impl<'a> Decode<'a> for Narrow<Nlm4Holder<'a>> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self(Nlm4Holder {
            exclusive: reader.bool()?,
            svid: reader.i32()?,
            oh: reader.opaque(MAXNETOBJ_SZ)?,
            l_offset: reader.u32()?.into(),
            l_len: reader.u32()?.into(),
        }))
    }
}

impl Encode for Narrow<Nlm4Holder<'_>> {
    fn encode(&self, writer: &mut Writer<'_>) {
        let Self(holder) = self;
        writer.bool(holder.exclusive);
        writer.i32(holder.svid);
        writer.opaque(holder.oh);
        let (l_offset, l_len) = clipped(holder.l_offset, holder.l_len);
        writer.u32(l_offset);
        writer.u32(l_len);
    }
}

impl<'a> Decode<'a> for Narrow<Nlm4TestArgs<'a>> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self(Nlm4TestArgs {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            exclusive: reader.bool()?,
            alock: narrow(reader)?,
        }))
    }
}

impl Encode for Narrow<Nlm4TestArgs<'_>> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.0.cookie);
        writer.bool(self.0.exclusive);
        writer.value(&Narrow(self.0.alock));
    }
}

impl<'a> Decode<'a> for Narrow<Nlm4LockArgs<'a>> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self(Nlm4LockArgs {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            block: reader.bool()?,
            exclusive: reader.bool()?,
            alock: narrow(reader)?,
            reclaim: reader.bool()?,
            state: reader.i32()?,
        }))
    }
}

impl Encode for Narrow<Nlm4LockArgs<'_>> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.0.cookie);
        writer.bool(self.0.block);
        writer.bool(self.0.exclusive);
        writer.value(&Narrow(self.0.alock));
        writer.bool(self.0.reclaim);
        writer.i32(self.0.state);
    }
}

impl<'a> Decode<'a> for Narrow<Nlm4CancArgs<'a>> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self(Nlm4CancArgs {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            block: reader.bool()?,
            exclusive: reader.bool()?,
            alock: narrow(reader)?,
        }))
    }
}

impl Encode for Narrow<Nlm4CancArgs<'_>> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.0.cookie);
        writer.bool(self.0.block);
        writer.bool(self.0.exclusive);
        writer.value(&Narrow(self.0.alock));
    }
}

impl<'a> Decode<'a> for Narrow<Nlm4UnlockArgs<'a>> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self(Nlm4UnlockArgs {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            alock: narrow(reader)?,
        }))
    }
}

impl Encode for Narrow<Nlm4UnlockArgs<'_>> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.0.cookie);
        writer.value(&Narrow(self.0.alock));
    }
}

impl<'a> Decode<'a> for Narrow<Nlm4Res<'a>> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self(Nlm4Res {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            stat: narrow(reader)?,
        }))
    }
}

impl Encode for Narrow<Nlm4Res<'_>> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.0.cookie);
        writer.value(&Narrow(self.0.stat));
    }
}

impl<'a> Decode<'a> for Narrow<Nlm4TestRes<'a>> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self(Nlm4TestRes {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            stat: match narrow(reader)? {
                Nlm4Stats::Denied => Nlm4TestRply::Denied(narrow(reader)?),
                other => Nlm4TestRply::Other(other),
            },
        }))
    }
}

impl Encode for Narrow<Nlm4TestRes<'_>> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.0.cookie);
        match self.0.stat {
            Nlm4TestRply::Denied(holder) => {
                writer.value(&Nlm4Stats::Denied);
                writer.value(&Narrow(holder));
            }
            Nlm4TestRply::Other(stat) => match narrow_stat(stat) {
                // DENIED comes with a holder, and here is none.
                Nlm4Stats::Denied => writer.value(&Nlm4Stats::DeniedNolocks),
                stat => writer.value(&stat),
            },
        }
    }
}

impl<'a> Decode<'a> for Narrow<Nlm4ShareArgs<'a>> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        reader.value().map(Self)
    }
}

impl Encode for Narrow<Nlm4ShareArgs<'_>> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.value(&self.0);
    }
}

impl<'a> Decode<'a> for Narrow<Nlm4ShareRes<'a>> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self(Nlm4ShareRes {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            stat: narrow(reader)?,
            sequence: reader.i32()?,
        }))
    }
}

impl Encode for Narrow<Nlm4ShareRes<'_>> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.0.cookie);
        writer.value(&Narrow(self.0.stat));
        writer.i32(self.0.sequence);
    }
}

impl<'a> Decode<'a> for Narrow<Nlm4Notify<'a>> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        reader.value().map(Self)
    }
}

impl Encode for Narrow<Nlm4Notify<'_>> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.value(&self.0);
    }
}

/// Reads a part of a message of versions 1 and 3.
fn narrow<'a, T>(reader: &mut Reader<'a>) -> Result<T, XdrError>
where
    Narrow<T>: Decode<'a>,
{
    reader.value().map(|Narrow(value)| value)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
