//! The Network Status Monitor, version 1: arguments and results as they stand in messages.
//!
//! Owns the layout in both directions and its limits: the server answers calls, and calls the
//! monitors of its hosts. Names are those of the specification.
//!
//! Decides nothing: what a name may look like is [`crate::nsm_name`], what a state number means is
//! [`crate::nsm_state`].
//!
//! Invariants: every decoded value borrows from its message, so decoding takes no memory; every
//! string has the maximum [`SM_MAXSTRLEN`]; an unknown value of an enum is an error, which the
//! server answers with GARBAGE_ARGS.
//!
//! Source: XNFS chapter 11.

#![deny(clippy::indexing_slicing, clippy::as_conversions)]

use havenfs_rpc::xdr::{Decode, Encode, Reader, Writer, XdrError};

/// The version of the protocol.
pub const VERSION: u32 = 1;
/// The longest name, in bytes (XNFS chapter 11).
pub const SM_MAXSTRLEN: usize = 1024;
/// The length of the bytes that a monitor keeps for its caller (XNFS chapter 11).
pub const SM_PRIV_SIZE: usize = 16;

/// The numbers of the procedures.
pub mod procedure {
    /// Does nothing.
    pub const NULL: u32 = 0;
    /// Asks whether a host can be monitored, and for the monitor's own state.
    pub const SM_STAT: u32 = 1;
    /// Has a host monitored.
    pub const SM_MON: u32 = 2;
    /// Ends that.
    pub const SM_UNMON: u32 = 3;
    /// Ends it for all hosts.
    pub const SM_UNMON_ALL: u32 = 4;
    /// Acts as if the machine had restarted.
    pub const SM_SIMU_CRASH: u32 = 5;
    /// Tells that a host's state has changed.
    pub const SM_NOTIFY: u32 = 6;
}

/// `sm_name`: argument of SM_STAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmName<'a> {
    /// The host that is asked about, at most [`SM_MAXSTRLEN`] bytes.
    pub mon_name: &'a [u8],
}

impl<'a> Decode<'a> for SmName<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            mon_name: reader.opaque(SM_MAXSTRLEN)?,
        })
    }
}

impl Encode for SmName<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.mon_name);
    }
}

/// `my_id`: argument of SM_UNMON_ALL; which procedure of the local machine is to be called when a
/// monitored host changes its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MyId<'a> {
    /// The machine, at most [`SM_MAXSTRLEN`] bytes.
    pub my_name: &'a [u8],
    /// The program.
    pub my_prog: u32,
    /// Its version.
    pub my_vers: u32,
    /// The procedure.
    pub my_proc: u32,
}

impl<'a> Decode<'a> for MyId<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            my_name: reader.opaque(SM_MAXSTRLEN)?,
            my_prog: reader.u32()?,
            my_vers: reader.u32()?,
            my_proc: reader.u32()?,
        })
    }
}

impl Encode for MyId<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.my_name);
        writer.u32(self.my_prog);
        writer.u32(self.my_vers);
        writer.u32(self.my_proc);
    }
}

/// `mon_id`: argument of SM_UNMON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MonId<'a> {
    /// The monitored host, at most [`SM_MAXSTRLEN`] bytes.
    pub mon_name: &'a [u8],
    /// Whom to tell.
    pub my_id: MyId<'a>,
}

impl<'a> Decode<'a> for MonId<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            mon_name: reader.opaque(SM_MAXSTRLEN)?,
            my_id: reader.value()?,
        })
    }
}

impl Encode for MonId<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.mon_name);
        writer.value(&self.my_id);
    }
}

/// `mon`: argument of SM_MON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mon<'a> {
    /// The host to monitor, and whom to tell.
    pub mon_id: MonId<'a>,
    /// `priv`: the caller's own bytes, given back when the host's state changes.
    pub private: [u8; SM_PRIV_SIZE],
}

impl<'a> Decode<'a> for Mon<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            mon_id: reader.value()?,
            private: reader.fixed()?,
        })
    }
}

impl Encode for Mon<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.value(&self.mon_id);
        writer.fixed(&self.private);
    }
}

/// `res`: whether a host is or can be monitored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SmRes {
    /// It is.
    StatSucc,
    /// It is not.
    StatFail,
}

impl SmRes {
    /// The number on the wire.
    pub const fn number(self) -> u32 {
        match self {
            Self::StatSucc => 0,
            Self::StatFail => 1,
        }
    }
}

impl Decode<'_> for SmRes {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        match reader.u32()? {
            0 => Ok(Self::StatSucc),
            1 => Ok(Self::StatFail),
            _ => Err(XdrError::BadValue),
        }
    }
}

impl Encode for SmRes {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.u32(self.number());
    }
}

/// `sm_stat_res`: result of SM_STAT and SM_MON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmStatRes {
    /// Whether the host is or can be monitored.
    pub res_stat: SmRes,
    /// The state number of the monitor that answers.
    pub state: i32,
}

impl Decode<'_> for SmStatRes {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            res_stat: reader.value()?,
            state: reader.i32()?,
        })
    }
}

impl Encode for SmStatRes {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.value(&self.res_stat);
        writer.i32(self.state);
    }
}

/// `sm_stat`: result of SM_UNMON and SM_UNMON_ALL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmStat {
    /// The state number of the monitor that answers.
    pub state: i32,
}

impl Decode<'_> for SmStat {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            state: reader.i32()?,
        })
    }
}

impl Encode for SmStat {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.i32(self.state);
    }
}

/// `stat_chge`: argument of SM_NOTIFY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatChge<'a> {
    /// The host whose state has changed, at most [`SM_MAXSTRLEN`] bytes.
    pub mon_name: &'a [u8],
    /// Its new state.
    pub state: i32,
}

impl<'a> Decode<'a> for StatChge<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            mon_name: reader.opaque(SM_MAXSTRLEN)?,
            state: reader.i32()?,
        })
    }
}

impl Encode for StatChge<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.mon_name);
        writer.i32(self.state);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
