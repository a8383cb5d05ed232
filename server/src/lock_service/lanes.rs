//! The order in which calls that change locks are proposed: that of their arrival, host by host.
//!
//! A LOCK may have to wait until its file is opened, and the UNLOCK that the host sent right behind
//! it must not overtake it: the lock would be taken after it was given back, and stay for ever. So
//! a call that waits for a worker holds a place in its host's lane, and what comes behind it waits
//! too. A call whose disk does not answer for [`WAIT_MAX`] loses its place and is never proposed;
//! its host sends it again.
//!
//! Hosts are told apart by address here, so that the transport and the connection make no
//! difference.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::LockService;
use crate::call::Proposal;
use crate::net::mailbox::Sink;

/// How long a call may wait for its file while others wait for it.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// What stands in a lane.
#[derive(Debug)]
enum Place {
    /// A worker has the call, since then.
    Waiting(u64, Instant),
    /// It can be proposed once those before it are.
    Ready(Box<(Proposal, Sink)>),
}

#[derive(Debug, Default)]
struct Inner {
    /// Hosts of which a call waits; all others need no lane.
    lanes: HashMap<IpAddr, VecDeque<Place>>,
    last: u64,
}

/// The lanes of all hosts.
#[derive(Debug, Default)]
pub(super) struct Lanes(Mutex<Inner>);

/// The place of a call that a worker has. Dropping it gives it up.
#[derive(Debug)]
pub struct Lane {
    locks: Arc<LockService>,
    host: IpAddr,
    number: u64,
}

impl LockService {
    /// Proposes a call as soon as all earlier ones of its host are.
    pub fn submit(self: &Arc<Self>, host: IpAddr, proposal: Proposal, sink: Sink) {
        let mut inner = self.lanes.lock();
        if let Some(lane) = inner.lanes.get_mut(&host) {
            lane.push_back(Place::Ready(Box::new((proposal, sink))));
            inner.advance(self, host);
        } else {
            // Under the lock, so that the next call of this host comes after this one.
            self.propose(proposal, sink);
        }
    }

    /// Takes the next place in a host's lane for a call that a worker gets.
    pub fn enter(self: &Arc<Self>, host: IpAddr) -> Lane {
        let mut inner = self.lanes.lock();
        inner.last += 1;
        let number = inner.last;
        let lane = inner.lanes.entry(host).or_default();
        lane.push_back(Place::Waiting(number, Instant::now()));
        Lane {
            locks: Arc::clone(self),
            host,
            number,
        }
    }

    /// Lets go of calls that have waited for too long.
    pub fn tidy_lanes(self: &Arc<Self>) {
        let mut inner = self.lanes.lock();
        let hosts: Vec<IpAddr> = inner.lanes.keys().copied().collect();
        for host in hosts {
            inner.advance(self, host);
        }
    }
}

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Proposes what has come to the front.
    fn advance(&mut self, locks: &Arc<LockService>, host: IpAddr) {
        let Some(lane) = self.lanes.get_mut(&host) else {
            return;
        };
        loop {
            match lane.front() {
                Some(Place::Ready(_)) => {
                    if let Some(Place::Ready(ready)) = lane.pop_front() {
                        locks.propose(ready.0, ready.1);
                    }
                }
                // Nobody waits for the last one.
                Some(Place::Waiting(_, since)) if lane.len() > 1 && since.elapsed() > WAIT_MAX => {
                    lane.pop_front();
                }
                Some(Place::Waiting(..)) => return,
                None => {
                    self.lanes.remove(&host);
                    return;
                }
            }
        }
    }

    /// Takes a waiting call out of its place, if it has not lost it, and puts there what became of
    /// it.
    fn replace(&mut self, lane: &Lane, ready: Option<(Proposal, Sink)>) {
        let Some(places) = self.lanes.get_mut(&lane.host) else {
            return;
        };
        let own = |place: &Place| matches!(place, Place::Waiting(of, _) if *of == lane.number);
        if let Some(at) = places.iter().position(own) {
            places.remove(at);
            if let Some(ready) = ready {
                places.insert(at, Place::Ready(Box::new(ready)));
            }
        }
    }
}

impl Lane {
    /// The worker is done: the call is proposed in its turn. If it has lost its place, it is
    /// dropped without an answer.
    pub fn fill(self, proposal: Proposal, sink: Sink) {
        let mut inner = self.locks.lanes.lock();
        inner.replace(&self, Some((proposal, sink)));
        drop(inner);
        // Dropping the lane lets those behind it go on.
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let mut inner = self.locks.lanes.lock();
        inner.replace(self, None);
        inner.advance(&self.locks, self.host);
    }
}
