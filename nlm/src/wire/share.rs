//! SHARE and UNSHARE: how PC clients open files (versions 3 and 4, with the same layout).
//!
//! Source: RFC 1813 6.3.20 and 6.3.21, XNFS chapter 10.

use havenfs_rpc::xdr::{Decode, Encode, Reader, Writer, XdrError};

use super::{LM_MAXSTRLEN, MAXNETOBJ_SZ, NFS3_FHSIZE, Nlm4Stats, numbered};

/// `nlm4_share`: how a file is opened, and by whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nlm4Share<'a> {
    /// The host's name, at most [`LM_MAXSTRLEN`] bytes.
    pub caller_name: &'a [u8],
    /// The file's handle, at most [`NFS3_FHSIZE`] bytes.
    pub fh: &'a [u8],
    /// The owner within the host, at most [`MAXNETOBJ_SZ`] bytes.
    pub oh: &'a [u8],
    /// What others are kept from: `fsh_mode` in the text of XNFS.
    pub mode: Fsh4Mode,
    /// What the file is opened for: `fsh_access` in the text of XNFS.
    pub access: Fsh4Access,
}

impl<'a> Decode<'a> for Nlm4Share<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            caller_name: reader.opaque(LM_MAXSTRLEN)?,
            fh: reader.opaque(NFS3_FHSIZE)?,
            oh: reader.opaque(MAXNETOBJ_SZ)?,
            mode: reader.value()?,
            access: reader.value()?,
        })
    }
}

impl Encode for Nlm4Share<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.caller_name);
        writer.opaque(self.fh);
        writer.opaque(self.oh);
        writer.value(&self.mode);
        writer.value(&self.access);
    }
}

/// `nlm4_shareargs`: argument of SHARE and UNSHARE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nlm4ShareArgs<'a> {
    /// The caller's own bytes, to be repeated in the result; at most [`MAXNETOBJ_SZ`].
    pub cookie: &'a [u8],
    /// The share.
    pub share: Nlm4Share<'a>,
    /// Whether the caller held the share before the server's restart.
    pub reclaim: bool,
}

impl<'a> Decode<'a> for Nlm4ShareArgs<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            share: reader.value()?,
            reclaim: reader.bool()?,
        })
    }
}

impl Encode for Nlm4ShareArgs<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.cookie);
        writer.value(&self.share);
        writer.bool(self.reclaim);
    }
}

/// `nlm4_shareres`: result of SHARE and UNSHARE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nlm4ShareRes<'a> {
    /// The cookie of the call.
    pub cookie: &'a [u8],
    /// What became of it.
    pub stat: Nlm4Stats,
    /// A number without a meaning that anybody uses; 0 will do.
    pub sequence: i32,
}

impl<'a> Decode<'a> for Nlm4ShareRes<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            cookie: reader.opaque(MAXNETOBJ_SZ)?,
            stat: reader.value()?,
            sequence: reader.i32()?,
        })
    }
}

impl Encode for Nlm4ShareRes<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.cookie);
        writer.value(&self.stat);
        writer.i32(self.sequence);
    }
}

/// `fsh4_mode`: what others are kept from while a file is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fsh4Mode {
    /// Deny none.
    Dn,
    /// Deny read.
    Dr,
    /// Deny write.
    Dw,
    /// Deny read and write.
    Drw,
}

impl Fsh4Mode {
    /// All modes, at the places of their numbers.
    pub const ALL: [Self; 4] = [Self::Dn, Self::Dr, Self::Dw, Self::Drw];

    /// The number on the wire: bit 0 denies reading, bit 1 writing.
    pub const fn number(self) -> u32 {
        match self {
            Self::Dn => 0,
            Self::Dr => 1,
            Self::Dw => 2,
            Self::Drw => 3,
        }
    }
}

impl Decode<'_> for Fsh4Mode {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        numbered(&Self::ALL, reader.u32()?)
    }
}

impl Encode for Fsh4Mode {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.u32(self.number());
    }
}

/// `fsh4_access`: what a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fsh4Access {
    /// Nothing.
    None,
    /// Reading.
    R,
    /// Writing.
    W,
    /// Reading and writing.
    Rw,
}

impl Fsh4Access {
    /// All kinds of access, at the places of their numbers.
    pub const ALL: [Self; 4] = [Self::None, Self::R, Self::W, Self::Rw];

    /// The number on the wire: bit 0 is reading, bit 1 writing.
    pub const fn number(self) -> u32 {
        match self {
            Self::None => 0,
            Self::R => 1,
            Self::W => 2,
            Self::Rw => 3,
        }
    }
}

impl Decode<'_> for Fsh4Access {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        numbered(&Self::ALL, reader.u32()?)
    }
}

impl Encode for Fsh4Access {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.u32(self.number());
    }
}
