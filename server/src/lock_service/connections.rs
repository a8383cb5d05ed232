//! The TCP connections over which hosts lock files, and whether their other ends still live.
//!
//! A notice that a host has rebooted proves nothing: anybody can send a datagram in its name, and
//! a status monitor that is started anew says the same without a reboot. But a host that did reboot
//! knows nothing of its old connections, and resets them when it is asked. So before a notice is
//! believed, the connections over which that very host (by `caller_name`) has locked are probed
//! with TCP's keep-alive: an answer says that the host lives on. A reset, or silence for
//! `ANSWER_TIME_MAX`, says nothing against the notice. Nor does a connection over which the host
//! locked with the very state that the notice tells: it is of the new life, and came first. A host
//! that tells no state in LOCK can't be judged so, and is believed.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

use crate::backend::sys;

/// All of them.
#[derive(Debug, Default)]
pub struct LockConnections {
    open: Mutex<Open>,
    waiting: AtomicUsize,
}

#[derive(Debug, Default)]
struct Open {
    last: u64,
    by_peer: BTreeMap<(SocketAddr, u64), Entry>,
}

#[derive(Debug)]
struct Entry {
    /// A second descriptor of the connection.
    socket: TcpStream,
    /// What the host called itself in LOCKs that came over it, and the last NSM state it told.
    lives: Vec<(Box<[u8]>, i32)>,
}

/// A connection's place in the list, for as long as it is open.
#[derive(Debug)]
pub struct Entered {
    list: Arc<LockConnections>,
    key: (SocketAddr, u64),
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.list.open().by_peer.remove(&self.key);
    }
}

/// See [`LockConnections::permit`].
#[derive(Debug)]
pub struct Permit<'a>(&'a AtomicUsize);

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What the probes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// A connection that is older than the question was answered.
    Lives,
    /// No connection of the host is left, or none answers.
    None,
    /// Too many are being asked already.
    Busy,
}

impl LockConnections {
    /// Enters a connection; `peer` in its plain form.
    ///
    /// # Errors
    /// There is no second descriptor to be had.
    pub fn enter(
        self: &Arc<Self>,
        peer: SocketAddr,
        stream: &TcpStream,
    ) -> std::io::Result<Entered> {
        let entry = Entry {
            socket: stream.try_clone()?,
            lives: Vec::new(),
        };
        let mut open = self.open();
        open.last += 1;
        let key = (peer, open.last);
        open.by_peer.insert(key, entry);
        drop(open);
        Ok(Entered {
            list: Arc::clone(self),
            key,
        })
    }

    /// Notes what the host at the other end calls itself, and the NSM state that it tells.
    pub fn locked(&self, peer: SocketAddr, caller_name: &[u8], state: i32) {
        let mut open = self.open();
        for (_, entry) in open.by_peer.range_mut((peer, 0)..=(peer, u64::MAX)) {
            let room = entry.lives.len() < NAMES_MAX;
            let mut lives = entry.lives.iter_mut();
            if let Some((_, told)) = lives.find(|(name, _)| **name == *caller_name) {
                *told = state;
            } else if room {
                entry.lives.push((caller_name.into(), state));
            }
        }
    }

    /// Whether a host with this address and one of these names has a connection from before the
    /// life with this state.
    pub fn has(&self, address: IpAddr, names: &[Vec<u8>], state: i32) -> bool {
        !self.keys_of(address, names, state).is_empty()
    }

    /// Asks such connections whether the host lives. Blocks the thread for up to
    /// `ANSWER_TIME_MAX`.
    pub fn probe(&self, address: IpAddr, names: &[Vec<u8>], state: i32) -> Sign {
        let started = Instant::now();
        let mut asked = self.keys_of(address, names, state);
        if asked.is_empty() {
            return Sign::None;
        }
        let Some(_permit) = self.permit() else {
            return Sign::Busy;
        };
        for key in &asked {
            self.with(*key, ask_now);
        }
        let sign = loop {
            let mut lives = false;
            asked.retain(|key| {
                // What is gone from the list was reset or closed.
                let heard = self.with(*key, |socket| heard_since(socket, started));
                lives |= heard == Some(Some(true));
                heard.flatten().is_some()
            });
            if lives {
                break Sign::Lives;
            }
            if asked.is_empty() || started.elapsed() > ANSWER_TIME_MAX {
                break Sign::None;
            }
            std::thread::sleep(LOOK_EVERY);
        };
        for key in &asked {
            self.with(*key, |socket| SockRef::from(socket).set_keepalive(false));
        }
        sign
    }

    /// The right to let a worker thread wait for what becomes of a notice; none while too many do.
    pub fn permit(&self) -> Option<Permit<'_>> {
        let permit = Permit(&self.waiting);
        (self.waiting.fetch_add(1, Ordering::AcqRel) < WAITING_MAX).then_some(permit)
    }

    fn keys_of(&self, address: IpAddr, names: &[Vec<u8>], state: i32) -> Vec<(SocketAddr, u64)> {
        let first = (SocketAddr::new(address, 0), 0);
        let last = (SocketAddr::new(address, u16::MAX), u64::MAX);
        let open = self.open();
        let of_host = open.by_peer.range(first..=last).filter(|(_, entry)| {
            entry.lives.iter().any(|(name, told)| {
                *told != 0 && *told != state && names.iter().any(|wanted| **wanted == **name)
            })
        });
        of_host.map(|(key, _)| *key).collect()
    }

    fn with<T>(&self, key: (SocketAddr, u64), use_it: impl FnOnce(&TcpStream) -> T) -> Option<T> {
        self.open()
            .by_peer
            .get(&key)
            .map(|entry| use_it(&entry.socket))
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has the kernel ask the other end at once, or as soon as it was silent for a second.
fn ask_now(socket: &TcpStream) {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(1))
        .with_interval(Duration::from_secs(1));
    // A connection that is gone meanwhile will say nothing, and that is all that a failure means.
    let _ = SockRef::from(socket).set_tcp_keepalive(&keepalive);
}

/// Whether something came after `started`; none if the connection is over.
fn heard_since(socket: &TcpStream, started: Instant) -> Option<bool> {
    let heard = sys::tcp_heard(socket.as_fd()).ok()??;
    // The kernel's clock is coarse; what came just before does not count.
    Some(heard + CLOCK_STEP < started.elapsed())
}

/// How long the other end may take to answer. It is asked after one second of silence.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(2500);
const LOOK_EVERY: Duration = Duration::from_millis(20);
const CLOCK_STEP: Duration = Duration::from_millis(12);
/// How many notices are looked into at a time: each takes one of the worker threads.
const WAITING_MAX: usize = 4;
/// Names of one connection: network namespaces of a machine share connections.
const NAMES_MAX: usize = 16;

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn connected() -> (TcpStream, TcpStream, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (here, peer) = listener.accept().unwrap();
        (here, there, peer)
    }

    #[test]
    fn a_host_that_answers_lives_and_others_do_not() {
        let list = Arc::new(LockConnections::default());
        let (here, there, peer) = connected();
        let entered = list.enter(peer, &here).unwrap();
        let probe = |address: IpAddr, name: &str, state| {
            let names = [name.as_bytes().to_vec()];
            assert_eq!(
                list.has(address, &names, state),
                list.probe(address, &names, state) != Sign::None
            );
            list.probe(address, &names, state)
        };
        assert_eq!(probe(peer.ip(), "c1", 7), Sign::None, "it has not locked");
        list.locked(peer, b"c1", 0);
        assert_eq!(probe(peer.ip(), "c1", 7), Sign::None, "it told no state");
        list.locked(peer, b"c1", 5);
        assert_eq!(probe(peer.ip(), "c1", 7), Sign::Lives);
        assert_eq!(probe(peer.ip(), "c2", 7), Sign::None);
        assert_eq!(probe(IpAddr::from([127, 0, 0, 2]), "c1", 7), Sign::None);
        list.locked(peer, b"c1", 7);
        assert_eq!(
            probe(peer.ip(), "c1", 7),
            Sign::None,
            "it is of the new life"
        );
        list.locked(peer, b"c1", 5);
        // The other end is gone, and says so.
        SockRef::from(&there)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(there);
        let names = [b"c1".to_vec()];
        assert_eq!(list.probe(peer.ip(), &names, 7), Sign::None);
        drop(entered);
        assert!(!list.has(peer.ip(), &names, 7));
    }
}
