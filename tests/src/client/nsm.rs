//! The Network Status Monitor: notifications as hosts send them, and the procedures that are for
//! lock managers on the server's own machine.
//!
//! What the server sends to a host's monitor is received by [`Host`](super::host::Host).
//!
//! Source: XNFS chapter 11.

use anyhow::{Result, ensure};
use havenfs_rpc::program;
use havenfs_rpc::xdr::Writer;

use super::nfs::args;
use super::nlm::Fields;
use super::peer::Peer;
use super::rpc::{self, Cred, Header, Outcome};

/// The numbers of the procedures.
#[expect(missing_docs, reason = "named and explained in XNFS chapter 11")]
pub mod procedure {
    pub const NULL: u32 = 0;
    pub const SM_STAT: u32 = 1;
    pub const SM_MON: u32 = 2;
    pub const SM_UNMON: u32 = 3;
    pub const SM_UNMON_ALL: u32 = 4;
    pub const SM_SIMU_CRASH: u32 = 5;
    pub const SM_NOTIFY: u32 = 6;
}

/// `STAT_SUCC`.
pub const STAT_SUCC: u32 = 0;
/// `STAT_FAIL`.
pub const STAT_FAIL: u32 = 1;

/// Who is to be told of a change: `my_id`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MyId<'a> {
    /// The machine.
    pub my_name: &'a [u8],
    /// The program.
    pub my_prog: u32,
    /// Its version.
    pub my_vers: u32,
    /// The procedure.
    pub my_proc: u32,
}

impl MyId<'_> {
    fn encode(&self, w: &mut Writer<'_>) {
        w.opaque(self.my_name);
        for value in [self.my_prog, self.my_vers, self.my_proc] {
            w.u32(value);
        }
    }
}

/// A client of NSM on one connection.
#[derive(Debug)]
pub struct Nsm {
    /// The connection.
    pub peer: Peer,
    /// Whom it acts as; monitors send AUTH_NONE.
    pub cred: Cred,
}

impl Nsm {
    /// Takes a connection to the NSM port.
    pub const fn new(peer: Peer) -> Self {
        Self {
            peer,
            cred: Cred::None,
        }
    }

    /// Makes a call whose RPC outcome the test wants to see.
    pub fn outcome(&mut self, procedure: u32, args: &[u8]) -> Result<Outcome> {
        self.outcome_as(rpc::next_xid(), procedure, args)
    }

    /// The same with a transaction id of the test's choice: once more for a retransmission.
    pub fn outcome_as(&mut self, xid: u32, procedure: u32, args: &[u8]) -> Result<Outcome> {
        let header = Header::new(program::NSM, 1, procedure, &self.cred);
        self.peer.exchange_as(xid, &header, args)
    }

    /// SM_STAT: `STAT_SUCC` or `STAT_FAIL`, and the server's state.
    pub fn stat(&mut self, mon_name: &[u8]) -> Result<(u32, i32)> {
        let args = args(|w| w.opaque(mon_name));
        read_stat_res(&self.outcome(procedure::SM_STAT, &args)?.results()?)
    }

    /// SM_MON: `STAT_SUCC` or `STAT_FAIL`, and the server's state.
    pub fn mon(&mut self, mon_name: &[u8], id: MyId<'_>, private: [u8; 16]) -> Result<(u32, i32)> {
        let args = args(|w| {
            w.opaque(mon_name);
            id.encode(w);
            w.fixed(&private);
        });
        read_stat_res(&self.outcome(procedure::SM_MON, &args)?.results()?)
    }

    /// SM_UNMON: the server's state.
    pub fn unmon(&mut self, mon_name: &[u8], id: MyId<'_>) -> Result<i32> {
        let args = args(|w| {
            w.opaque(mon_name);
            id.encode(w);
        });
        read_state(&self.outcome(procedure::SM_UNMON, &args)?.results()?)
    }

    /// SM_UNMON_ALL: the server's state.
    pub fn unmon_all(&mut self, id: MyId<'_>) -> Result<i32> {
        let args = args(|w| id.encode(w));
        read_state(&self.outcome(procedure::SM_UNMON_ALL, &args)?.results()?)
    }

    /// SM_SIMU_CRASH.
    pub fn simu_crash(&mut self) -> Result<()> {
        let results = self.outcome(procedure::SM_SIMU_CRASH, &[])?.results()?;
        ensure!(results.is_empty(), "SM_SIMU_CRASH has results");
        Ok(())
    }

    /// SM_NOTIFY: the host `mon_name` has the new `state`.
    pub fn notify(&mut self, mon_name: &[u8], state: i32) -> Result<()> {
        let args = notify_args(mon_name, state);
        let results = self.outcome(procedure::SM_NOTIFY, &args)?.results()?;
        ensure!(results.is_empty(), "SM_NOTIFY has results");
        Ok(())
    }
}

/// Encodes `stat_chge`, the argument of SM_NOTIFY.
pub fn notify_args(mon_name: &[u8], state: i32) -> Vec<u8> {
    args(|w| {
        w.opaque(mon_name);
        w.i32(state);
    })
}

/// Reads `stat_chge`: the host's name and its state.
pub fn read_notify(args: &[u8]) -> Result<(Vec<u8>, i32)> {
    let mut fields = Fields::new(args);
    let change = (fields.opaque()?, fields.signed()?);
    fields.finish()?;
    Ok(change)
}

fn read_stat_res(results: &[u8]) -> Result<(u32, i32)> {
    let mut fields = Fields::new(results);
    let res = (fields.field()?, fields.signed()?);
    fields.finish()?;
    Ok(res)
}

fn read_state(results: &[u8]) -> Result<i32> {
    let mut fields = Fields::new(results);
    let state = fields.signed()?;
    fields.finish()?;
    Ok(state)
}
