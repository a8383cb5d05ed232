//! The TCP connections over which hosts lock files, and whether their other ends still live.
//!
//! A notice that a host has rebooted proves nothing: anybody can send a datagram in its name, and
//! a status monitor that is started anew says the same without a reboot. But a host that did reboot
//! knows nothing of its old connections, and resets them when it is asked. So before a notice is
//! believed, the connections over which that very host (by `caller_name`) has locked are probed
//! with TCP's keep-alive: an answer says that the host lives on. A reset, or silence for
//! `ANSWER_TIME_MAX`, says nothing against the notice. Nor does a connection whose first LOCK told
//! the very state that the notice tells: it is of the new life, and came first. What is told later
//! proves nothing, since a status monitor that is started anew raises the number of a host that
//! lives. A host that tells no state in LOCK can't be judged so, and is believed.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;

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
    /// Gone with the connection's task.
    socket: Weak<OwnedWriteHalf>,
    /// What the host called itself in LOCKs that came over it, and the first NSM state it told.
    lives: Vec<(Box<[u8]>, i32)>,
    /// How many probes use its keep-alive.
    asking: usize,
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
    pub fn enter(self: &Arc<Self>, peer: SocketAddr, socket: &Arc<OwnedWriteHalf>) -> Entered {
        let entry = Entry {
            socket: Arc::downgrade(socket),
            lives: Vec::new(),
            asking: 0,
        };
        let mut open = self.open();
        open.last += 1;
        let key = (peer, open.last);
        open.by_peer.insert(key, entry);
        drop(open);
        Entered {
            list: Arc::clone(self),
            key,
        }
    }

    /// Notes what the host at the other end calls itself, and the NSM state that it tells; 0 says
    /// nothing.
    pub fn locked(&self, peer: SocketAddr, caller_name: &[u8], state: i32) {
        if state == 0 {
            return;
        }
        let mut open = self.open();
        for (_, entry) in open.by_peer.range_mut((peer, 0)..=(peer, u64::MAX)) {
            let is_known = entry.lives.iter().any(|(name, _)| **name == *caller_name);
            if !is_known && entry.lives.len() < NAMES_MAX {
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
        let asked = self.keys_of(address, names, state);
        if asked.is_empty() {
            return Sign::None;
        }
        let Some(_permit) = self.permit() else {
            return Sign::Busy;
        };
        let mut asked: Vec<_> = asked
            .into_iter()
            .filter_map(|key| Some((key, self.with(key, Entry::ask)??)))
            .collect();
        let keys: Vec<_> = asked.iter().map(|(key, _)| *key).collect();
        let sign = loop {
            let mut lives = false;
            asked.retain(|(key, before)| {
                // What is gone from the list was reset or closed.
                let heard = self.with(*key, |entry| entry.heard_at()).flatten();
                lives |= heard.is_some_and(|heard| heard > *before + CLOCK_STEP);
                heard.is_some()
            });
            if lives {
                break Sign::Lives;
            }
            if asked.is_empty() || started.elapsed() > ANSWER_TIME_MAX {
                break Sign::None;
            }
            std::thread::sleep(LOOK_EVERY);
        };
        for key in keys {
            self.with(key, Entry::leave);
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
            entry
                .lives
                .iter()
                .any(|(name, told)| *told != state && names.iter().any(|wanted| **wanted == **name))
        });
        of_host.map(|(key, _)| *key).collect()
    }

    fn with<T>(&self, key: (SocketAddr, u64), use_it: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        self.open().by_peer.get_mut(&key).map(use_it)
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// Has the kernel ask the other end at once, or as soon as it was silent for a second. Returns
    /// when it was heard last; none if the connection is over.
    fn ask(&mut self) -> Option<Instant> {
        let heard = self.heard_at()?;
        let keepalive = TcpKeepalive::new()
            .with_time(Duration::from_secs(1))
            .with_interval(Duration::from_secs(1));
        self.on_socket(|socket| socket.set_tcp_keepalive(&keepalive).ok())??;
        self.asking += 1;
        Some(heard)
    }

    /// Takes a successful [`Entry::ask`] back. Others may still wait for the answer.
    fn leave(&mut self) {
        self.asking -= 1;
        if self.asking == 0 {
            // A connection that is over needs none either.
            self.on_socket(|socket| socket.set_keepalive(false));
        }
    }

    /// When the other end was heard last; none if the connection is over.
    fn heard_at(&self) -> Option<Instant> {
        let ago = self.on_socket(|socket| sys::tcp_heard(socket.as_fd()).ok()?)??;
        Instant::now().checked_sub(ago)
    }

    fn on_socket<T>(&self, use_it: impl FnOnce(SockRef<'_>) -> T) -> Option<T> {
        let socket = self.socket.upgrade()?;
        let stream: &TcpStream = (*socket).as_ref();
        Some(use_it(SockRef::from(stream)))
    }
}

/// How long the other end may take to answer. It is asked after one second of silence.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(2500);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The kernel's clock is coarse: what it says of one moment differs by so much.
const CLOCK_STEP: Duration = Duration::from_millis(12);
/// How many notices are looked into at a time: each takes one of the worker threads.
const WAITING_MAX: usize = 2;
/// Names of one connection: several hosts may be behind a machine that translates addresses.
const NAMES_MAX: usize = 4;

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    struct Connected {
        here: Arc<OwnedWriteHalf>,
        there: TcpStream,
        peer: SocketAddr,
    }

    async fn connect() -> Connected {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap()).await;
        let (here, peer) = listener.accept().await.unwrap();
        Connected {
            here: Arc::new(here.into_split().1),
            there: there.unwrap(),
            peer,
        }
    }

    #[tokio::test]
    async fn a_host_that_answers_lives_and_others_do_not() {
        let list = Arc::new(LockConnections::default());
        let Connected { here, there, peer } = connect().await;
        let entered = list.enter(peer, &here);
        let probe = |address: IpAddr, name: &str, state| {
            let names = [name.as_bytes().to_vec()];
            let sign = list.probe(address, &names, state);
            assert_eq!(list.has(address, &names, state), sign != Sign::None);
            sign
        };
        assert_eq!(probe(peer.ip(), "c1", 7), Sign::None, "it has not locked");
        list.locked(peer, b"c1", 0);
        assert_eq!(probe(peer.ip(), "c1", 7), Sign::None, "it told no state");
        list.locked(peer, b"c1", 5);
        assert_eq!(probe(peer.ip(), "c1", 7), Sign::Lives);
        assert_eq!(probe(peer.ip(), "c2", 7), Sign::None);
        assert_eq!(probe(IpAddr::from([127, 0, 0, 2]), "c1", 7), Sign::None);
        assert_eq!(probe(peer.ip(), "c1", 5), Sign::None, "it is of that life");
        // Its monitor was started anew; the machine was not.
        list.locked(peer, b"c1", 7);
        assert_eq!(probe(peer.ip(), "c1", 7), Sign::Lives);
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

    /// The end of one probe must not take the answer away from another.
    #[tokio::test]
    async fn probes_of_one_connection_do_not_disturb_each_other() {
        let list = Arc::new(LockConnections::default());
        let Connected { here, there, peer } = connect().await;
        let _entered = list.enter(peer, &here);
        list.locked(peer, b"c1", 5);
        let key = list.open().by_peer.keys().next().copied().unwrap();
        for _ in 0..2 {
            assert!(list.with(key, Entry::ask).flatten().is_some());
        }
        let stream: &TcpStream = (*here).as_ref();
        let is_asking = || SockRef::from(stream).keepalive().unwrap();
        list.with(key, Entry::leave);
        assert!(is_asking());
        list.with(key, Entry::leave);
        assert!(!is_asking());
        drop(there);
    }
}
