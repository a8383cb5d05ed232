//! The TCP connections over which hosts lock files, and whether their other ends still live.
//!
//! A notice that a host has rebooted proves nothing: anybody can send a datagram in its name, and
//! a status monitor that is started anew says the same without a reboot. But a host that did reboot
//! knows nothing of its old connections, and resets them when it is asked. So before a notice is
//! believed, the connections over which that very host (by `caller_name`) has locked are probed
//! with TCP's keep-alive: an answer says that the host lives on. A reset, or silence for
//! `ANSWER_TIME_MAX`, says nothing against the notice. Nor does a connection over which all LOCKs
//! told the very state that the notice tells: it is of the new life, and came first. If they told
//! several states the host lived through the change, as when its status monitor is started anew. A
//! host that tells no state in LOCK can't be judged so, and is believed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;

use crate::backend::sys;
use crate::call::Origin;
use crate::cluster::connections::Connection;

/// All of them.
#[derive(Debug, Default)]
pub struct LockConnections {
    open: Mutex<Open>,
    /// Hosts that are being asked.
    probing: Mutex<BTreeSet<IpAddr>>,
}

#[derive(Debug, Default)]
struct Open {
    last: u64,
    by_peer: BTreeMap<(SocketAddr, u64), Entry>,
}

#[derive(Debug)]
struct Entry {
    /// The address and port of ours that it uses.
    local: SocketAddr,
    /// Gone with the connection's task.
    socket: Weak<OwnedWriteHalf>,
    /// Whom the LOCKs were from that came over it.
    lives: Vec<Life>,
    /// How many probes use its keep-alive.
    asking: usize,
}

/// A host as its LOCKs on one connection show it.
#[derive(Debug)]
struct Life {
    /// What it called itself.
    caller_name: Box<[u8]>,
    /// The one NSM state that it told; none if it told several.
    state: Option<i32>,
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

/// A host that is being asked, until it is dropped.
struct Probing<'a>(&'a LockConnections, IpAddr);

impl Drop for Probing<'_> {
    fn drop(&mut self) {
        self.0.probing().remove(&self.1);
    }
}

/// What the probes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// A connection that is older than the question was answered.
    Lives,
    /// No connection of the host is left, or none answers.
    None,
    /// It is being asked already, or too many others are.
    Busy,
}

impl LockConnections {
    /// Enters a connection.
    pub fn enter(self: &Arc<Self>, origin: &Origin, socket: &Arc<OwnedWriteHalf>) -> Entered {
        let entry = Entry {
            local: origin.local,
            socket: Arc::downgrade(socket),
            lives: Vec::new(),
            asking: 0,
        };
        let mut open = self.open();
        open.last += 1;
        let key = (origin.peer, open.last);
        open.by_peer.insert(key, entry);
        drop(open);
        Entered {
            list: Arc::clone(self),
            key,
        }
    }

    /// The open connections.
    pub fn list(&self) -> Vec<Connection> {
        let open = self.open();
        let ends = open.by_peer.iter();
        ends.map(|((peer, _), entry)| Connection::new(entry.local, *peer))
            .collect()
    }

    /// Notes what the host at the other end calls itself, and the NSM state that it tells; 0 says
    /// nothing.
    pub fn locked(&self, peer: SocketAddr, caller_name: &[u8], state: i32) {
        if state == 0 {
            return;
        }
        let mut open = self.open();
        for (_, entry) in open.by_peer.range_mut((peer, 0)..=(peer, u64::MAX)) {
            let room = entry.lives.len() < NAMES_MAX;
            let mut lives = entry.lives.iter_mut();
            if let Some(life) = lives.find(|life| *life.caller_name == *caller_name) {
                life.state = life.state.filter(|told| *told == state);
            } else if room {
                entry.lives.push(Life {
                    caller_name: caller_name.into(),
                    state: Some(state),
                });
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
        let Some(_probing) = self.begin(address) else {
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
                lives |= heard
                    .as_ref()
                    .is_some_and(|heard| heard.start > *before + CLOCK_STEP);
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

    /// Begins to ask a host, if it is not being asked already and not too many others are.
    fn begin(&self, address: IpAddr) -> Option<Probing<'_>> {
        let mut probing = self.probing();
        let may = probing.len() < PROBING_MAX && probing.insert(address);
        drop(probing);
        may.then(|| Probing(self, address))
    }

    fn probing(&self) -> MutexGuard<'_, BTreeSet<IpAddr>> {
        self.probing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keys_of(&self, address: IpAddr, names: &[Vec<u8>], state: i32) -> Vec<(SocketAddr, u64)> {
        let first = (SocketAddr::new(address, 0), 0);
        let last = (SocketAddr::new(address, u16::MAX), u64::MAX);
        let open = self.open();
        let of_host = open.by_peer.range(first..=last).filter(|(_, entry)| {
            entry.lives.iter().any(|life| {
                life.state != Some(state)
                    && names.iter().any(|wanted| **wanted == *life.caller_name)
            })
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
        let heard = self.heard_at()?.end;
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

    /// Between when and when the other end was heard last: a thread may stand still between its
    /// looks at the clock and at the socket. None if the connection is over.
    fn heard_at(&self) -> Option<Range<Instant>> {
        let before = Instant::now();
        let ago = self.on_socket(|socket| sys::tcp_heard(socket.as_fd()).ok()?)??;
        Some(before.checked_sub(ago)?..Instant::now().checked_sub(ago)?)
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
/// How many hosts are asked at a time: each takes one of the worker threads.
const PROBING_MAX: usize = 4;
/// Names of one connection: several hosts may be behind a machine that translates addresses.
const NAMES_MAX: usize = 4;

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::call::Transport;

    struct Connected {
        here: Arc<OwnedWriteHalf>,
        there: TcpStream,
        origin: Origin,
    }

    async fn connect() -> Connected {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap()).await;
        let (here, peer) = listener.accept().await.unwrap();
        let origin = Origin::new(peer, here.local_addr().unwrap(), Transport::Tcp);
        Connected {
            here: Arc::new(here.into_split().1),
            there: there.unwrap(),
            origin,
        }
    }

    #[tokio::test]
    async fn a_host_that_answers_lives_and_others_do_not() {
        let list = Arc::new(LockConnections::default());
        let Connected {
            here,
            there,
            origin,
        } = connect().await;
        let peer = origin.peer;
        let entered = list.enter(&origin, &here);
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
        for state in [5, 7] {
            assert_eq!(probe(peer.ip(), "c1", state), Sign::Lives);
        }
        // The other end is gone, and says so.
        SockRef::from(&there)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(there);
        let names = [b"c1".to_vec()];
        assert_eq!(list.probe(peer.ip(), &names, 7), Sign::None);
        let connection = Connection::new(origin.local, peer);
        assert_eq!(list.list(), [connection]);
        drop(entered);
        assert!(!list.has(peer.ip(), &names, 7));
        assert!(list.list().is_empty());
    }

    /// The end of one probe must not take the answer away from another.
    #[tokio::test]
    async fn probes_of_one_connection_do_not_disturb_each_other() {
        let list = Arc::new(LockConnections::default());
        let Connected {
            here,
            there,
            origin,
        } = connect().await;
        let peer = origin.peer;
        let _entered = list.enter(&origin, &here);
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
