//! Calls over TCP as a client makes them that never gives up: over one connection as long as it
//! lasts, and again, with the same transaction id, over a new one when it has ended.
//!
//! Owns one connection to one port, and the record of every answer: tests judge by it how long a
//! service was away, and whether a connection outlived what happened. It knows no program.
//!
//! A call whose connection stands is waited for with patience, since a server owes an answer over
//! it or its end. One that is owed for [`STALL_TIME`] is counted as a stall and sent again. A
//! paused server stalls for good reason, any other does not.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::{POLL, TIME_MAX};
use crate::client::rpc::{self, Cred, Header};
use crate::client::{Peer, peer::Transport};

/// How long a call waits for its answer over a connection that stands.
pub const STALL_TIME: Duration = Duration::from_secs(4);

/// A client of one port of a service.
#[derive(Debug)]
pub struct Caller {
    own: IpAddr,
    at: SocketAddr,
    /// Whom it acts as.
    pub cred: Cred,
    peer: Option<Peer>,
    /// Every answer, in order.
    pub answers: Vec<Answered>,
    /// How many connections it has made.
    pub connections: usize,
    /// How often a connection stood and an answer did not come.
    pub stalls: usize,
}

/// When a call was asked and answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answered {
    /// When it was sent for the first time.
    pub asked: Instant,
    /// When its answer came.
    pub at: Instant,
}

impl Caller {
    /// A client at an address of its own; it connects when it is used.
    pub const fn new(own: IpAddr, at: SocketAddr) -> Self {
        Self {
            own,
            at,
            cred: Cred::root(),
            peer: None,
            answers: Vec::new(),
            connections: 0,
            stalls: 0,
        }
    }

    /// Makes a call and returns its results, however long the service is away, up to a limit. An
    /// answer that is no success is an error.
    pub fn call(&mut self, version: (u32, u32), procedure: u32, args: &[u8]) -> Result<Vec<u8>> {
        self.call_as(rpc::next_xid(), version, procedure, args)
    }

    /// The same with a transaction id of the test's choice: once more for a repetition.
    pub fn call_as(
        &mut self,
        xid: u32,
        (program, version): (u32, u32),
        procedure: u32,
        args: &[u8],
    ) -> Result<Vec<u8>> {
        let header = Header::new(program, version, procedure, &self.cred);
        let message = header.message(xid, args);
        let asked = Instant::now();
        let deadline = asked + TIME_MAX;
        loop {
            let lost = match self.exchange(&message) {
                Ok(reply) => {
                    let at = Instant::now();
                    self.answers.push(Answered { asked, at });
                    return rpc::open_reply(xid, &reply)?.results();
                }
                Err(lost) => lost,
            };
            self.peer = None;
            if Instant::now() > deadline {
                bail!("nobody answers at {}: {lost:#}", self.at);
            }
            thread::sleep(POLL);
        }
    }

    /// Makes the next call over a new connection.
    pub fn disconnect(&mut self) {
        self.peer = None;
    }

    fn exchange(&mut self, message: &[u8]) -> Result<Vec<u8>> {
        let peer = match &mut self.peer {
            Some(peer) => peer,
            none => {
                let own = SocketAddr::new(self.own, 0);
                let peer = Peer::connect_from(Transport::Tcp, own, self.at)?;
                peer.set_answer_time(STALL_TIME)?;
                self.connections += 1;
                none.insert(peer)
            }
        };
        peer.send(message)?;
        let sent = Instant::now();
        let received = peer.receive();
        if received.is_err() && sent.elapsed() >= STALL_TIME {
            self.stalls += 1;
        }
        received
    }

    /// The longest time without an answer that was over after `from`, and when it was over. Who
    /// calls all the time measures so how long the service was away.
    pub fn longest_gap(&self, from: Instant) -> Duration {
        longest_gap(&self.answers, from)
    }
}

/// See [`Caller::longest_gap`].
pub fn longest_gap(answers: &[Answered], from: Instant) -> Duration {
    let gaps = answers.windows(2).filter_map(|pair| match pair {
        [before, after] if after.at > from => Some(after.at - before.at),
        _ => None,
    });
    gaps.max().unwrap_or_default()
}
