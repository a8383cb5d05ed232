//! The replies that a service's active node hands over when it gives the service away, so that a
//! client that sends a call again after a planned move gets the first answer.
//!
//! They go through the log and are kept in the service's state for the very next epoch, if that
//! follows a release: who released the service had carried out its last call before. After a
//! takeover there are none, since nobody was there to hand them over; nor is a later epoch given
//! them. Which replies, and how many, is `serve::handing`'s; what a node does with them is
//! `reply_cache`'s.
//!
//! Best effort: one that is missing costs its client what a takeover costs. Bounded by bytes,
//! whatever a command brings.

use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::time::Duration;

use imbl::Vector;
use serde::{Deserialize, Serialize};

use super::rows::{damaged, read_row, write_end, write_row};

/// A call that was answered, and its answer. What tells calls apart means the same on every node:
/// the addresses are the client's and the service's, and the checksum is made with a secret that
/// all nodes have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptReply {
    /// The client's address.
    pub peer: IpAddr,
    /// The address that it called.
    pub local: IpAddr,
    /// The transaction id.
    pub xid: u32,
    /// The procedure of NFS.
    pub procedure: u32,
    /// How many bytes the arguments have.
    pub args_bytes: u32,
    /// Of the credential and both ends of the arguments.
    pub checksum: u64,
    /// How long ago it was answered when it was handed over.
    pub age_ms: u32,
    /// The whole reply, with its record mark.
    pub reply: Box<[u8]>,
}

impl KeptReply {
    /// What it takes of [`HANDED_BYTES_MAX`].
    pub fn cost(&self) -> usize {
        self.reply.len() + ENTRY_BYTES
    }
}

/// What was handed over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Handed {
    /// The epoch that they are for.
    epoch: u32,
    /// When, by the clock of who handed them over, in seconds since 1970: their ages are of then.
    unix_seconds: u64,
    bytes: usize,
    replies: Vector<KeptReply>,
}

impl Handed {
    /// The active node of an epoch hands some over.
    pub(super) fn add(&mut self, by_epoch: u32, unix_seconds: u64, replies: &[KeptReply]) {
        let epoch = by_epoch.saturating_add(1);
        if self.epoch != epoch {
            // What it was given itself is among its own, or too old.
            *self = Self {
                epoch,
                unix_seconds,
                ..Self::default()
            };
        }
        for reply in replies {
            self.push(reply.clone());
        }
    }

    fn push(&mut self, reply: KeptReply) {
        let bytes = self.bytes.saturating_add(reply.cost());
        if bytes <= HANDED_BYTES_MAX {
            self.bytes = bytes;
            self.replies.push_back(reply);
        }
    }

    /// The epoch after this one begins; `is_released`: its active node gave the service away.
    /// `unix_seconds`: when, by the clock of the next one. Nobody had it in between, which may have
    /// been for long, and hosts use transaction ids again.
    pub(super) fn begin(&mut self, after: u32, is_released: bool, unix_seconds: u64) {
        let is_old = unix_seconds.saturating_sub(self.unix_seconds) > TIME_MAX.as_secs();
        if !is_released || is_old || self.epoch != after.saturating_add(1) {
            *self = Self::default();
        }
    }

    /// How long ago it was handed over, by the clock of who asks.
    pub(super) fn age(&self, unix_seconds: u64) -> Duration {
        Duration::from_secs(unix_seconds.saturating_sub(self.unix_seconds))
    }

    /// What was handed over to an epoch.
    pub(super) fn to(&self, epoch: u32) -> impl Iterator<Item = &KeptReply> {
        let is_for_it = self.epoch == epoch;
        self.replies.iter().filter(move |_| is_for_it)
    }

    /// Writes them as [`Handed::read`] reads them.
    pub(super) fn write(&self, out: &mut impl Write, buffer: &mut Vec<u8>) -> io::Result<()> {
        write_row(out, buffer, &(self.epoch, self.unix_seconds))?;
        for reply in &self.replies {
            write_row(out, buffer, reply)?;
        }
        write_end(out)
    }

    /// Reads what [`Handed::write`] wrote.
    pub(super) fn read(input: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<Self> {
        let (epoch, unix_seconds) = read_row(input, buffer)?.ok_or_else(damaged)?;
        let mut handed = Self {
            epoch,
            unix_seconds,
            ..Self::default()
        };
        while let Some(reply) = read_row(input, buffer)? {
            handed.push(reply);
        }
        Ok(handed)
    }
}

/// How much is handed over at most, in bytes: some thousand replies, and on every node as much
/// memory for as long as the epoch lasts. It is a matter of time: twice as much took 0.15 s of each
/// move in a debug build on a busy machine, and a hundred replies 0.02 s.
pub const HANDED_BYTES_MAX: usize = 256 * 1024;
/// How long a reply is kept: longer than clients repeat a call, and shorter than the time after
/// which they use a transaction id again.
pub const TIME_MAX: Duration = Duration::from_mins(2);
/// What a reply costs besides its bytes.
const ENTRY_BYTES: usize = 100;

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    fn reply(xid: u32, bytes: usize) -> KeptReply {
        KeptReply {
            peer: [10, 0, 0, 7].into(),
            local: [10, 0, 0, 1].into(),
            xid,
            procedure: 12,
            args_bytes: 40,
            checksum: 9,
            age_ms: 5,
            reply: vec![1; bytes].into(),
        }
    }

    fn xids(handed: &Handed, epoch: u32) -> Vec<u32> {
        handed.to(epoch).map(|reply| reply.xid).collect()
    }

    #[test]
    fn the_next_epoch_has_them_after_a_release_and_no_other() {
        let mut handed = Handed::default();
        handed.add(3, 1000, &[reply(1, 100)]);
        handed.add(3, 1000, &[reply(2, 100)]);
        handed.begin(3, true, 1010);
        assert_eq!(xids(&handed, 4), [1, 2]);
        assert!(xids(&handed, 3).is_empty() && xids(&handed, 5).is_empty());
        // It was given away again, and nothing was handed over.
        let mut again = handed.clone();
        again.begin(4, true, 1010);
        assert_eq!(again, Handed::default());
        handed.add(4, 1000, &[reply(3, 100)]);
        handed.begin(4, true, 1010);
        assert_eq!(xids(&handed, 5), [3]);
    }

    #[test]
    fn a_takeover_has_none() {
        let mut handed = Handed::default();
        handed.add(3, 1000, &[reply(1, 100)]);
        handed.begin(3, false, 1010);
        assert_eq!(handed, Handed::default());
    }

    #[test]
    fn they_grow_old_while_nobody_has_the_service() {
        let mut handed = Handed::default();
        handed.add(3, 1000, &[reply(1, 100)]);
        let mut late = handed.clone();
        handed.begin(3, true, 1120);
        assert_eq!(xids(&handed, 4), [1]);
        assert_eq!(handed.age(1130), Duration::from_secs(130));
        late.begin(3, true, 1121);
        assert_eq!(late, Handed::default());
    }

    #[test]
    fn they_are_bounded_by_bytes_and_come_back() {
        let mut handed = Handed::default();
        for xid in 0..100 {
            handed.add(1, 1000, &[reply(xid, 10_000)]);
        }
        assert_eq!(handed.replies.len(), HANDED_BYTES_MAX / 10_100);
        handed.begin(1, true, 1010);
        let (mut bytes, mut buffer) = (Vec::new(), Vec::new());
        handed.write(&mut bytes, &mut buffer).unwrap();
        assert!(bytes.len() < HANDED_BYTES_MAX);
        let read = Handed::read(&mut bytes.as_slice(), &mut buffer).unwrap();
        assert_eq!(read, handed);
    }
}
