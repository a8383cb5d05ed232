//! Host names and addresses of clients, without DNS in the path of a call.
//!
//! A configured name is resolved forward, and a peer is that host if its address is among the
//! answers. For wildcards a peer's name is sought in reverse and believed only if it resolves back
//! to the peer, since whoever runs a reverse zone can write any name into it. What is not known
//! yet is `None`; old answers stay while a resolver fails (see `background`).
//!
//! Not considered: aliases of a host (only the name that the reverse lookup gives is compared with
//! wildcards), and IPv6 scopes.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::ExportTable;
use super::background::{BackgroundCache, Lifetime, NoAnswer};
use super::collect::RULES_MAX;

/// Names and addresses as far as they are known.
pub struct Names {
    forward: BackgroundCache<String, IpAddr>,
    reverse: BackgroundCache<IpAddr, String>,
    /// The names in notices of reboots, apart from those that the exports need.
    noticed: BackgroundCache<String, IpAddr>,
    /// Threads that wait for one of those.
    waiting: AtomicUsize,
    changes: Arc<watch::Sender<u64>>,
}

type Forward = dyn Fn(&str) -> Result<Vec<IpAddr>, NoAnswer> + Send + Sync;
type Reverse = dyn Fn(IpAddr) -> Result<Vec<String>, NoAnswer> + Send + Sync;

/// How names are looked up; blocking, and called on threads made for it.
///
/// An empty list says that there is none; [`NoAnswer`] says to ask again.
pub struct Resolver {
    /// Returns the addresses of a host.
    pub forward: Box<Forward>,
    /// Returns the names of an address, unconfirmed.
    pub reverse: Box<Reverse>,
}

impl Resolver {
    /// Asks the system: hosts file, DNS, or what nsswitch.conf says.
    pub fn system() -> Self {
        Self {
            forward: Box::new(system_forward),
            reverse: Box::new(system_reverse),
        }
    }
}

impl Names {
    /// Makes an empty store of names; `prepare` starts it.
    pub fn new(resolver: Resolver) -> Self {
        let changes = Arc::new(watch::Sender::new(0));
        let resolver = Arc::new(resolver);
        let (ask, noticing) = (Arc::clone(&resolver), Arc::clone(&resolver));
        let forward = BackgroundCache::new(
            "names-forward",
            FORWARD,
            Arc::clone(&changes),
            Box::new(move |name: &String| resolve(&ask, name).map(Into::into)),
        );
        let reverse = BackgroundCache::new(
            "names-reverse",
            REVERSE,
            Arc::clone(&changes),
            Box::new(move |peer: &IpAddr| confirmed_names(&resolver, *peer).map(Into::into)),
        );
        let noticed = BackgroundCache::new(
            "names-noticed",
            NOTICED,
            Arc::new(watch::Sender::new(0)),
            Box::new(move |name: &String| resolve(&noticing, name).map(Into::into)),
        );
        Self {
            forward,
            reverse,
            noticed,
            waiting: AtomicUsize::new(0),
            changes,
        }
    }

    /// Gets ready for a table: starts what it needs and looks its names up ahead of the calls.
    ///
    /// # Errors
    /// A thread cannot be made.
    pub fn prepare(&self, table: &ExportTable) -> io::Result<()> {
        let mut any = false;
        for name in table.host_names() {
            any = true;
            self.addresses_of(name);
        }
        if any {
            self.forward.start(FORWARD_WORKERS)?;
        }
        self.noticed.start(NOTICED_WORKERS)?;
        if table.has_wildcards() {
            self.reverse.start(REVERSE_WORKERS)?;
        }
        Ok(())
    }

    /// Counts the answers that changed what is known.
    ///
    /// A verdict may be kept for a connection while table and count stay the same, but for no
    /// longer than 30 s: answers are refreshed when they are asked for.
    pub fn generation(&self) -> u64 {
        *self.changes.borrow()
    }

    /// Follows `generation`, so that a pending call can wait for its answer.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Whether a host has both addresses; `None` if that is not known yet, or if no address of it
    /// is: the resolver may have failed.
    pub fn has_addresses(&self, name: &str, both: [IpAddr; 2]) -> Option<bool> {
        let addresses = self.noticed.get(name).filter(|found| !found.is_empty())?;
        Some(both.iter().all(|address| addresses.contains(address)))
    }

    /// The same; blocks the thread for a moment if need be, and if not too many wait already.
    pub fn wait_for_addresses(&self, name: &str, both: [IpAddr; 2]) -> Option<bool> {
        let before = self.waiting.fetch_add(1, Ordering::AcqRel);
        let _waiting = Waiting(&self.waiting);
        if before >= WAITING_MAX {
            return None;
        }
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            let known = self.has_addresses(name, both);
            if known.is_some() || Instant::now() >= deadline {
                return known;
            }
            std::thread::sleep(WAIT_STEP);
        }
    }

    /// Returns the canonical addresses of a host; `None` if they are not known yet.
    pub(super) fn addresses_of(&self, name: &str) -> Option<Arc<[IpAddr]>> {
        self.forward.get(name)
    }

    /// Returns the confirmed names of a peer; `None` if they are not known yet.
    pub(super) fn names_of(&self, peer: IpAddr) -> Option<Arc<[String]>> {
        self.reverse.get(&peer)
    }
}

/// A thread that waits, until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl std::fmt::Debug for Names {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Names")
            .field("generation", &self.generation())
            .finish_non_exhaustive()
    }
}

fn resolve(resolver: &Resolver, name: &str) -> Result<Vec<IpAddr>, NoAnswer> {
    let mut addresses = (resolver.forward)(name)?;
    for address in &mut addresses {
        *address = address.to_canonical();
    }
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(ANSWERS_MAX);
    Ok(addresses)
}

/// Keeps those names of a peer that lead back to it.
fn confirmed_names(resolver: &Resolver, peer: IpAddr) -> Result<Vec<String>, NoAnswer> {
    let mut confirmed = Vec::new();
    for mut name in (resolver.reverse)(peer)?.into_iter().take(ANSWERS_MAX) {
        if name.ends_with('.') {
            name.pop();
        }
        name.make_ascii_lowercase();
        // A name that is an address would confirm itself.
        if name.parse::<IpAddr>().is_err() && resolve(resolver, &name)?.contains(&peer) {
            confirmed.push(name);
        }
    }
    Ok(confirmed)
}

fn system_forward(name: &str) -> Result<Vec<IpAddr>, NoAnswer> {
    use dns_lookup::{AddrInfoHints, SockType, getaddrinfo};
    let hints = AddrInfoHints {
        socktype: SockType::Stream.into(),
        ..AddrInfoHints::default()
    };
    match getaddrinfo(Some(name), None, Some(hints)) {
        // An entry of a family that we do not know is an error of its own and is passed over.
        Ok(found) => Ok(found.flatten().map(|found| found.sockaddr.ip()).collect()),
        Err(error) => none_or_failure(&error).map(|()| Vec::new()),
    }
}

fn system_reverse(peer: IpAddr) -> Result<Vec<String>, NoAnswer> {
    let flags = libc::NI_NAMEREQD | libc::NI_NUMERICSERV;
    match dns_lookup::getnameinfo(&(peer, 0).into(), flags) {
        Ok((name, _)) => Ok(vec![name]),
        Err(error) => none_or_failure(&error).map(|()| Vec::new()),
    }
}

/// Tells "there is none" (`Ok`) from "nobody could say".
fn none_or_failure(error: &dns_lookup::LookupError) -> Result<(), NoAnswer> {
    match error.kind() {
        dns_lookup::LookupErrorKind::NoName | dns_lookup::LookupErrorKind::NoData => Ok(()),
        _ => Err(NoAnswer),
    }
}

/// Hosts of the export list: few, and their addresses should follow DNS within a minute.
const FORWARD: Lifetime = Lifetime {
    fresh: Duration::from_mins(1),
    idle_max: Duration::from_hours(1),
    retry: Duration::from_secs(5),
    // The names of the table in force and of the one before it.
    entries_max: 2 * RULES_MAX,
};
/// Peers: anybody who connects makes an entry.
const REVERSE: Lifetime = Lifetime {
    fresh: Duration::from_mins(5),
    idle_max: Duration::from_hours(1),
    retry: Duration::from_secs(5),
    entries_max: 4096,
};
/// Hosts that lock files and send notices from another address: few, and seldom.
const NOTICED: Lifetime = Lifetime {
    fresh: Duration::from_mins(1),
    idle_max: Duration::from_mins(5),
    retry: Duration::from_secs(5),
    entries_max: 256,
};
/// One dead name server must not hold up all other names.
const FORWARD_WORKERS: usize = 2;
const NOTICED_WORKERS: usize = 1;
const REVERSE_WORKERS: usize = 4;
const WAITING_MAX: usize = 2;
const WAIT_MAX: Duration = Duration::from_millis(500);
const WAIT_STEP: Duration = Duration::from_millis(10);
/// Addresses of a name, and names of an address, that are looked at.
const ANSWERS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_is_asked_in_the_background() {
        let names = Names::new(Resolver::system());
        let mut changes = names.subscribe();
        // An address as a name needs no name server.
        assert_eq!(names.addresses_of("127.0.0.1"), None);
        names.forward.start(1).expect("a thread");
        let deadline = Instant::now() + Duration::from_mins(1);
        while !changes.has_changed().expect("the sender lives") {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        let found = names.addresses_of("127.0.0.1").expect("an answer");
        assert_eq!(found.to_vec(), [IpAddr::from([127, 0, 0, 1])]);
        assert!(names.generation() > 0);
        changes.mark_unchanged();
    }

    #[test]
    fn addresses_are_canonical_and_a_name_cannot_be_an_address() {
        let resolver = Resolver {
            forward: Box::new(|_| Ok(vec![[10, 0, 0, 1].into(), [10, 0, 0, 1].into()])),
            reverse: Box::new(|_| Ok(vec!["10.0.0.1".into(), "A.Example.".into()])),
        };
        let peer = IpAddr::from([10, 0, 0, 1]);
        assert_eq!(resolve(&resolver, "a").expect("an answer"), [peer]);
        assert_eq!(
            confirmed_names(&resolver, peer).expect("an answer"),
            ["a.example"]
        );
        let stranger = IpAddr::from([10, 0, 0, 2]);
        assert!(
            confirmed_names(&resolver, stranger)
                .expect("an answer")
                .is_empty()
        );
    }
}
