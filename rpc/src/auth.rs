//! Credentials of a call: AUTH_NONE, AUTH_SYS and the probe AUTH_TLS.
//!
//! A flavor that is not known here is kept as [`Credential::Other`], and the dispatcher answers
//! AUTH_REJECTEDCRED; no unknown flavor ever becomes the anonymous user.
//!
//! Source: RFC 5531 8.2 and appendix A, RFC 9289 4.1. Limits that Linux applies are named.

use crate::xdr::{Reader, Writer, XdrError};

/// The longest body of a credential or verifier, in bytes (RFC 5531 8.2).
pub const AUTH_BODY_BYTES_MAX: usize = 400;
/// The longest machine name, in bytes: the RFC says 255, Linux accepts 256.
pub const MACHINE_NAME_BYTES_MAX: usize = 256;
/// The most supplementary groups in AUTH_SYS.
pub const GIDS_MAX: usize = 16;

/// AUTH_NONE.
pub const AUTH_NONE: u32 = 0;
/// AUTH_SYS.
pub const AUTH_SYS: u32 = 1;
/// AUTH_TLS, sent with NULL to ask whether the server speaks TLS.
pub const AUTH_TLS: u32 = 7;

/// `auth_stat`: why a credential or verifier is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum AuthStat {
    /// The credential is malformed.
    BadCred = 1,
    /// The flavor is not accepted.
    RejectedCred = 2,
    /// The verifier is malformed.
    BadVerf = 3,
    /// The flavor is too weak for this export, or the source port is not reserved.
    TooWeak = 5,
}

/// `opaque_auth` as it stands in the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpaqueAuth<'a> {
    /// The flavor's number.
    pub flavor: u32,
    /// The flavor's own bytes.
    pub body: &'a [u8],
}

impl<'a> OpaqueAuth<'a> {
    /// AUTH_NONE with an empty body.
    pub const NONE: OpaqueAuth<'static> = OpaqueAuth {
        flavor: AUTH_NONE,
        body: &[],
    };

    /// Reads flavor and body.
    pub fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            flavor: reader.u32()?,
            body: reader.opaque(AUTH_BODY_BYTES_MAX)?,
        })
    }

    /// Appends flavor and body.
    pub fn encode(&self, writer: &mut Writer<'_>) {
        writer.u32(self.flavor);
        writer.opaque(self.body);
    }
}

/// The supplementary groups of a caller, at most [`GIDS_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Gids {
    len: u8,
    gids: [u32; GIDS_MAX],
}

impl Gids {
    /// Takes the first [`GIDS_MAX`] of `gids`.
    pub fn new(gids: impl IntoIterator<Item = u32>) -> Self {
        let mut list = Self::default();
        for (place, gid) in list.gids.iter_mut().zip(gids) {
            *place = gid;
            list.len += 1;
        }
        list
    }

    /// The groups in the caller's order.
    pub fn as_slice(&self) -> &[u32] {
        self.gids.get(..usize::from(self.len)).unwrap_or_default()
    }
}

/// The body of an AUTH_SYS credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuthSys<'a> {
    /// A number of the caller's choice.
    pub stamp: u32,
    /// The caller's host name.
    pub machine_name: &'a [u8],
    /// The caller's user id.
    pub uid: u32,
    /// The caller's group id.
    pub gid: u32,
    /// The caller's supplementary groups.
    pub gids: Gids,
}

impl<'a> AuthSys<'a> {
    /// Reads the body of a credential, all of it.
    pub fn decode(body: &'a [u8]) -> Result<Self, XdrError> {
        let mut reader = Reader::new(body);
        let stamp = reader.u32()?;
        let machine_name = reader.opaque(MACHINE_NAME_BYTES_MAX)?;
        let uid = reader.u32()?;
        let gid = reader.u32()?;
        let count = reader.u32()?;
        if count as usize > GIDS_MAX {
            return Err(XdrError::TooLong);
        }
        let mut gids = Gids::default();
        for place in gids.gids.iter_mut().take(count as usize) {
            *place = reader.u32()?;
            gids.len += 1;
        }
        reader.finish()?;
        Ok(Self {
            stamp,
            machine_name,
            uid,
            gid,
            gids,
        })
    }

    /// Appends the body of a credential.
    pub fn encode(&self, writer: &mut Writer<'_>) {
        writer.u32(self.stamp);
        writer.opaque(self.machine_name);
        writer.u32(self.uid);
        writer.u32(self.gid);
        writer.u32(u32::from(self.gids.len));
        for gid in self.gids.as_slice() {
            writer.u32(*gid);
        }
    }
}

/// Who a call says it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential<'a> {
    /// AUTH_NONE: the anonymous user.
    None,
    /// AUTH_SYS.
    Sys(AuthSys<'a>),
    /// AUTH_TLS: only a probe.
    Tls,
    /// A flavor that is not served.
    Other(u32),
}

impl<'a> Credential<'a> {
    /// Reads a credential and checks that its verifier fits.
    ///
    /// # Errors
    /// The `auth_stat` to answer with. AUTH_NONE, AUTH_SYS and AUTH_TLS want the verifier
    /// AUTH_NONE of length 0, as Linux does.
    pub fn decode(cred: OpaqueAuth<'a>, verf: OpaqueAuth<'_>) -> Result<Self, AuthStat> {
        let credential = match cred.flavor {
            AUTH_NONE if cred.body.is_empty() => Self::None,
            AUTH_SYS => Self::Sys(AuthSys::decode(cred.body).map_err(|_| AuthStat::BadCred)?),
            AUTH_TLS if cred.body.is_empty() => Self::Tls,
            AUTH_NONE | AUTH_TLS => return Err(AuthStat::BadCred),
            // Its verifier has rules of its own, which nobody here knows.
            other => return Ok(Self::Other(other)),
        };
        if verf.flavor == AUTH_NONE && verf.body.is_empty() {
            Ok(credential)
        } else {
            Err(AuthStat::BadVerf)
        }
    }
}
