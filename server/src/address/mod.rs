//! The addresses of a service that are on its active node and on no other.
//!
//! Owns how an address comes to this node ([`Floating::raise`]) and how it goes
//! ([`Floating::withdraw`]). It decides nothing: the keeper of the service raises it when all is
//! ready to answer, and withdraws it before anything is closed.
//!
//! ```text
//!   raise:     drop what leaves from it - destroy old connections - address up - stop dropping
//!   withdraw:  drop what leaves from it - and what waits for a neighbour - address down - destroy
//!              connections - stop dropping
//! ```
//!
//! So no client ever hears an end, a reset or an error of a node that goes: to it the service is
//! silent for a moment, and then answers from the other node. A reset or a closed connection before
//! that node is ready would send Linux clients into a pause of seconds.
//!
//! # If the node dies here
//!
//! - Its process hangs: a thread of [`Addresses`] withdraws the address at the moment when the
//!   lease ends, whatever the rest of the process does.
//! - Its process is stopped: its [guard] withdraws it a moment later. If that is stopped as well,
//!   the kernel takes the address away when nobody has prolonged it for the seconds of a lease,
//!   rounded up. It is prolonged once for each renewal.
//! - The process is killed: its [guard] does what the process would have done, within milliseconds.
//! - Killed between the steps of either, and its guard too: at its next start it withdraws
//!   everything once more.
//! - The machine is frozen and goes on: the address is there for a moment, until the thread or the
//!   kernel sees the clock. Nothing is answered (the gate is closed), but neighbours may hear an
//!   answer to ARP; that is why the new node announces the address several times.
//!
//! # Links
//!
//! A node whose cable is out can't be reached by clients, and others may well be:
//! [`Floating::link`] says it, and the keeper gives the service away.

mod announce;
pub mod guard;
mod netlink;
mod sockets;
mod tickle;

use std::io;
use std::net::{IpAddr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use self::guard::Guard;
use self::netlink::{Link, Netlink};
use crate::backend::sys;
use crate::clock::boot_time;
use crate::cluster::connections::Connection;
use crate::cluster::lease::Moment;
use crate::config::floating::{FloatingAddress, FloatingConfig};
use crate::fault::{Fault, is_planted};
use crate::gate::Gate;

/// Why an address can't be moved.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// The kernel refuses a step.
    #[error("cannot {step} {address}: {source}\nhint: {}", hint(.source))]
    Refused {
        /// What was tried.
        step: &'static str,
        /// Which address.
        address: FloatingAddress,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// To take it away would cut the machine off.
    #[error(
        "{address} is an address of this machine already, and not one that moves along with a \
         service\nhint: a service has addresses of its own. If it was put there by hand: \
         ip address del {address} dev INTERFACE"
    )]
    OfMachine {
        /// Which address.
        address: FloatingAddress,
    },
    /// There is no such interface, or its cable is out.
    #[error("the interface `{interface}` is {state}, and clients can't reach this node")]
    NoLink {
        /// Its name.
        interface: String,
        /// What is wrong with it.
        state: &'static str,
    },
    /// The kernel can't be asked.
    #[error("cannot ask the kernel about its network: {source}\nhint: {}", hint(.source))]
    Kernel {
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// No socket for ARP.
    #[error("cannot open a socket to announce addresses: {source}\nhint: {}", hint(.source))]
    Frames {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The guard does not know whether the other process lives.
    #[error("the guard can't hear of the server: {source}; it ends, and touches nothing")]
    Guard {
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// A process that can't start a thread.
    #[error("cannot start the thread that prolongs addresses: {0}")]
    Thread(io::Error),
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "to move addresses needs CAP_NET_ADMIN and CAP_NET_RAW: run as root, or give both"
        }
        _ => "see the kernel's log; `ip address` and `ip rule` show what is there",
    }
}

/// The addresses of one service on this node.
#[derive(Debug)]
pub struct Floating {
    config: FloatingConfig,
    /// For how long the kernel keeps them unless they are prolonged; without end if none.
    seconds: Option<u32>,
    /// Locked while the kernel is asked.
    state: Mutex<State>,
    link: watch::Sender<bool>,
    /// How often the link was found in the other state, in a row.
    link_changed: AtomicU32,
    /// For frames; never closed, since that takes long.
    frames: OnceLock<OwnedFd>,
    /// Who withdraws them if this process can't, and the place that this service has there.
    guard: OnceLock<(Arc<Guard>, usize)>,
}

#[derive(Debug, Default)]
struct State {
    /// They are here.
    up: Option<Up>,
    /// The ways to the kernel, once they are open.
    route: Option<Netlink>,
    connections: Option<Netlink>,
}

#[derive(Debug)]
struct Up {
    gate: Arc<Gate>,
    link: Link,
    /// The end of the lease for which they were prolonged last, and when that was.
    until: Moment,
    prolonged: Moment,
}

impl Floating {
    /// Addresses that are not here yet. `lease`: how long a node serves after a renewal; none if it
    /// is alone.
    pub fn new(config: FloatingConfig, lease: Option<Duration>) -> Self {
        // The kernel counts whole seconds. Rounded up: a lease may come close to its end, as while
        // a leader is elected, and must not lose the address by that. The thread ends it in time.
        let seconds = lease.filter(|_| !is_planted(Fault::NoLease));
        let seconds = seconds.map(|lease| lease.as_millis().div_ceil(1000));
        Self {
            config,
            seconds: seconds.map(|seconds| u32::try_from(seconds).unwrap_or(u32::MAX)),
            state: Mutex::default(),
            link: watch::Sender::new(false),
            link_changed: AtomicU32::new(0),
            frames: OnceLock::new(),
            guard: OnceLock::new(),
        }
    }

    /// What is configured.
    pub const fn config(&self) -> &FloatingConfig {
        &self.config
    }

    /// Whether clients can reach this node through the interface; changes are told.
    pub fn link(&self) -> watch::Receiver<bool> {
        self.link.subscribe()
    }

    /// Whether the addresses are here.
    pub fn is_up(&self) -> bool {
        self.state().up.is_some()
    }

    /// Brings the addresses here, if the gate is open: says whether it was. Listeners must stand.
    pub fn raise(&self, gate: &Arc<Gate>) -> Result<bool, AddressError> {
        let mut state = self.state();
        // A call that comes late, since nobody waits for it any more, must not touch what a later
        // epoch has.
        let others = state.up.as_ref().filter(|up| !Arc::ptr_eq(&up.gate, gate));
        if !gate.admits() || others.is_some_and(|up| up.gate.is_open()) {
            return Ok(false);
        }
        let link = state
            .route()
            .and_then(|route| route.link(&self.config.interface));
        let down = |state| AddressError::NoLink {
            interface: self.config.interface.clone(),
            state,
        };
        let link = match link {
            Ok(link) if link.is_up => link,
            Ok(_) => return Err(down("down")),
            Err(error) if is_no_device(&error) => return Err(down("not there")),
            Err(source) => return Err(AddressError::Kernel { source }),
        };
        let raised = self.raise_on(&link, gate, &mut state);
        if !matches!(raised, Ok(true)) {
            self.take_down(&mut state);
        }
        raised
    }

    fn raise_on(
        &self,
        link: &Link,
        gate: &Arc<Gate>,
        state: &mut State,
    ) -> Result<bool, AddressError> {
        keep_secondaries(&self.config.interface);
        for address in &self.config.addresses {
            // An earlier epoch, or an earlier life of this process, may have left connections.
            let blocked = state.route().and_then(|route| route.block(address.ip));
            blocked.map_err(refused("drop packets of", *address))?;
            state.clear(*address);
        }
        // The last look before neighbours hear of it.
        if !gate.admits() {
            return Ok(false);
        }
        let until = gate.until();
        state.up = Some(Up {
            gate: Arc::clone(gate),
            link: link.clone(),
            until,
            prolonged: boot_time(),
        });
        // First, so that it does not take them away meanwhile.
        self.tell_guard(Some(until));
        self.prolong(link.index, state)?;
        for address in &self.config.addresses {
            wait_until_taken(address.ip);
            let opened = state.route().and_then(|route| route.unblock(address.ip));
            opened.map_err(refused("let packets pass of", *address))?;
        }
        Ok(true)
    }

    /// Takes the addresses away, and ends their connections without a word; nothing if they are not
    /// here. Returns when they are gone, if need be by the kernel's own time.
    pub fn withdraw(&self) {
        let is_gone = {
            let mut state = self.state();
            state.up.is_none() || self.take_down(&mut state)
        };
        if let Some(seconds) = self.seconds.filter(|_| !is_gone) {
            // Nobody may hear before that the service is free.
            std::thread::sleep(Duration::from_secs(u64::from(seconds) + 1));
        }
    }

    /// Takes away what an earlier life of this process may have left.
    ///
    /// # Errors
    /// If this process may not do that at all.
    fn clean(&self) -> Result<(), AddressError> {
        let mut state = self.state();
        for address in &self.config.addresses {
            let route = state.route().map_err(refused("look for", *address))?;
            let is_foreign = route.is_foreign(address.ip);
            if is_foreign.map_err(refused("look for", *address))? {
                return Err(AddressError::OfMachine { address: *address });
            }
            route
                .block(address.ip)
                .map_err(refused("drop packets of", *address))?;
            if let Ok(link) = route.link(&self.config.interface) {
                // Best effort, as all that is about packets.
                let _ = route.forget_waiting_packets(link.index, address.ip);
            }
            let removed = route.remove_address(address.ip);
            state.clear(*address);
            // Whatever failed: nobody else would end it.
            let opened = state.route().and_then(|route| route.unblock(address.ip));
            removed.map_err(refused("remove", *address))?;
            opened.map_err(refused("let packets pass of", *address))?;
        }
        Ok(())
    }

    /// Says where the addresses are, at once and again for some seconds, as long as they are here
    /// under this gate.
    pub async fn announce(self: Arc<Self>, gate: Arc<Gate>) {
        let start = tokio::time::Instant::now();
        for after in announce::SCHEDULE {
            tokio::time::sleep_until(start + after).await;
            let (floating, gate) = (Arc::clone(&self), Arc::clone(&gate));
            // The kernel may be asked for something else at the moment.
            let announcing = tokio::task::spawn_blocking(move || floating.announce_once(&gate));
            // A panic has ended the process already.
            let _ = announcing.await;
        }
    }

    fn announce_once(&self, gate: &Arc<Gate>) {
        let state = self.state();
        let held = state.up.as_ref().filter(|up| Arc::ptr_eq(&up.gate, gate));
        let Some((held, frames)) = held.zip(self.frames.get()) else {
            return;
        };
        for address in &self.config.addresses {
            // What can't be sent now is sent the next time.
            if gate.is_open()
                && let Err(error) = announce::announce(frames.as_fd(), &held.link, address.ip)
            {
                tracing::warn!(%address, %error, "cannot announce an address");
            }
        }
    }

    /// Wakes clients whose connections ended with the last active node, while the addresses are
    /// here.
    pub fn tickle(&self, gate: &Gate, connections: &[Connection]) {
        for address in &self.config.addresses {
            if gate.is_open()
                && let Err(error) = tickle::tickle(address.ip, connections)
            {
                tracing::debug!(%address, %error, "cannot wake all clients");
            }
        }
    }

    /// Prolongs the addresses if the lease was renewed, withdraws them if it is over, and looks at
    /// the link. Says when it must be called again at the latest.
    fn tend(&self) -> Moment {
        let mut state = self.state();
        let until = state.up.as_ref().map(|held| held.gate.until());
        let is_renewed = until != state.up.as_ref().map(|held| held.until);
        if is_renewed {
            // Before anything is asked of the kernel, which may take its time.
            self.tell_guard(until);
        }
        let link = state
            .route()
            .and_then(|route| route.link(&self.config.interface));
        let index = link.as_ref().map(|link| link.index).ok();
        match link {
            Ok(link) => self.note_link(link.is_up),
            Err(error) if is_no_device(&error) => self.note_link(false),
            // Says nothing about the link.
            Err(error) => tracing::warn!(%error, "cannot look at a link"),
        }
        let now = boot_time();
        let soon = now + TEND_EVERY;
        let (Some(held), Some(until)) = (state.up.as_mut(), until) else {
            return soon;
        };
        let gate = Arc::clone(&held.gate);
        // Without a lease nothing is renewed, and what somebody took away must come back all the
        // same; the only voter of a cluster has none either.
        let pause = self.seconds.map_or(PROLONG_EVERY, |_| PROLONG_SOON);
        let is_long_ago = until == Moment::NEVER && now > held.prolonged + pause;
        let is_due = is_renewed || is_long_ago;
        // It was made anew, and what was on the old one is gone.
        let is_other = index.is_some_and(|index| index != held.link.index);
        let mut is_over = !gate.is_open() || gate.has_turned_away() || is_other;
        if is_due && !is_over {
            (held.until, held.prolonged) = (until, now);
            let index = held.link.index;
            if let Err(error) = self.prolong(index, &mut state) {
                tracing::error!("{error}");
                is_over = true;
            }
        }
        if is_over {
            // In this order: whoever is turned away ends its connection, and nobody is to see it.
            self.take_down(&mut state);
            // The keeper sees it, and begins anew.
            gate.turn_away();
            return soon;
        }
        until.min(soon)
    }

    fn note_link(&self, is_up: bool) {
        if *self.link.borrow() == is_up {
            self.link_changed.store(0, Ordering::Relaxed);
            return;
        }
        let looks = self.link_changed.fetch_add(1, Ordering::Relaxed) + 1;
        let enough = if is_up { LOOKS_UP } else { LOOKS_DOWN };
        if looks >= enough {
            let interface = &self.config.interface;
            if is_up {
                tracing::info!(interface, "the link is up again");
            } else {
                tracing::warn!(interface, "the link is down: clients can't reach this node");
            }
            self.link_changed.store(0, Ordering::Relaxed);
            self.link.send_replace(is_up);
        }
    }

    /// Tells the guard until when they may be here.
    fn tell_guard(&self, until: Option<Moment>) {
        // Without an end there is nothing to wait for.
        let until = until.filter(|until| *until != Moment::NEVER);
        if let Some((guard, place)) = self.guard.get().filter(|_| !is_planted(Fault::NoLease)) {
            guard.lease(*place, until);
        }
    }

    fn prolong(&self, index: u32, state: &mut State) -> Result<(), AddressError> {
        let seconds = self.seconds.unwrap_or(u32::MAX);
        self.config.addresses.iter().try_for_each(|address| {
            let route = state.route();
            let set = route.and_then(|route| route.set_address(index, *address, seconds));
            set.map_err(refused("raise", *address))
        })
    }

    /// All of it, whatever fails on the way: what is left of the address the kernel takes away.
    /// Says whether they are gone for sure.
    fn take_down(&self, state: &mut State) -> bool {
        let index = state.up.take().map(|up| up.link.index);
        let mut are_gone = true;
        for address in &self.config.addresses {
            let ip = address.ip;
            let dropped = state.route().and_then(|route| route.block(ip));
            // While the address is here, so that what the kernel says of it stays here as well.
            let forgotten = index.map_or(Ok(()), |index| {
                let route = state.route();
                route.and_then(|route| route.forget_waiting_packets(index, ip))
            });
            let mut removed = state.route().and_then(|route| route.remove_address(ip));
            if removed.is_err() {
                // A list that changes while it is read, for one.
                removed = state.route().and_then(|route| route.remove_address(ip));
            }
            are_gone &= removed.is_ok();
            // Connections that the kernel can't destroy end when their owner closes them, and that
            // must not be heard.
            let opened = if state.clear(*address) {
                state.route().and_then(|route| route.unblock(ip))
            } else {
                Ok(())
            };
            if let Err(error) = dropped.and(forgotten).and(removed).and(opened) {
                tracing::error!(%address, %error, "cannot withdraw an address cleanly");
            }
        }
        if are_gone {
            // Only now: it is to act as long as something is left.
            self.tell_guard(None);
        }
        are_gone
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn route(&mut self) -> io::Result<&mut Netlink> {
        open_once(&mut self.route, Netlink::route)
    }

    /// Destroys the connections of an address; says whether it can be done.
    fn clear(&mut self, address: FloatingAddress) -> bool {
        let kernel = open_once(&mut self.connections, sockets::open);
        match kernel.and_then(|kernel| sockets::destroy(kernel, address.ip)) {
            Ok(0) => true,
            Ok(connections) => {
                tracing::debug!(%address, connections, "connections destroyed");
                true
            }
            Err(error) => {
                tracing::warn!(
                    %address, %error,
                    "cannot destroy connections: does the kernel lack CONFIG_INET_DIAG_DESTROY?"
                );
                false
            }
        }
    }
}

fn open_once(
    slot: &mut Option<Netlink>,
    open: fn() -> io::Result<Netlink>,
) -> io::Result<&mut Netlink> {
    match slot {
        Some(kernel) => Ok(kernel),
        None => Ok(slot.insert(open()?)),
    }
}

fn is_no_device(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENODEV)
}

/// The first address of a network that an interface has is its primary one, and the kernel takes
/// all others away with it: also the machine's own, if it came later than ours.
fn keep_secondaries(interface: &str) {
    let path = format!("/proc/sys/net/ipv4/conf/{interface}/promote_secondaries");
    if std::fs::read(&path).is_ok_and(|set| set.starts_with(b"1")) {
        return;
    }
    if let Err(error) = std::fs::write(&path, "1") {
        tracing::warn!(
            path, %error,
            "cannot set it to 1: when the service leaves, the machine's own addresses of the same \
             network may go as well"
        );
    }
}

/// Waits until the kernel takes packets that come for an address. In IPv6 it does so a little later
/// than the address is there, and much later when it is busy; the answers of the first neighbours
/// that are asked would be lost, and be asked for again after a second. In IPv4 it is at once.
fn wait_until_taken(ip: IpAddr) {
    if ip.is_ipv4() {
        return;
    }
    let is_taken = || {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
        // Sends nothing.
        socket.connect((ip, DISCARD_PORT))?;
        socket.local_addr()
    };
    let deadline = boot_time() + TAKEN_TIME_MAX;
    // What goes to an address of this machine comes from the same address.
    while !is_taken().is_ok_and(|own| own.ip() == ip) && boot_time() < deadline {
        std::thread::sleep(TAKEN_CHECK);
    }
}

fn refused(step: &'static str, address: FloatingAddress) -> impl FnOnce(io::Error) -> AddressError {
    move |source| AddressError::Refused {
        step,
        address,
        source,
    }
}

/// The threads that prolong the addresses of services, or withdraw them; they end when this is
/// dropped.
#[derive(Debug)]
pub struct Addresses {
    /// Keeps clients from seeing how this process dies.
    pub guard: Option<Arc<Guard>>,
    _stop: watch::Sender<()>,
}

impl Addresses {
    /// Clears away what an earlier life of this process left, and starts the threads and the guard;
    /// `lock` is what the next life waits for.
    ///
    /// # Errors
    /// If this process may not move addresses.
    pub fn start(floating: Vec<Arc<Floating>>, lock: BorrowedFd<'_>) -> Result<Self, AddressError> {
        for one in &floating {
            one.clean()?;
            let frames = sys::frame_socket().map_err(|error| AddressError::Frames {
                source: error.into(),
            })?;
            // Nobody else sets it.
            let _ = one.frames.set(frames);
            let link = one
                .state()
                .route()
                .and_then(|route| route.link(&one.config.interface));
            one.link.send_replace(link.is_ok_and(|link| link.is_up));
        }
        let guard = if floating.is_empty() {
            None
        } else {
            let guard = Guard::start(&floating, lock);
            let warn = |error: &io::Error| {
                tracing::warn!(
                    %error,
                    "no guard: if this process is killed, clients wait some seconds longer"
                );
            };
            guard.inspect_err(warn).ok()
        };
        for (place, one) in floating.iter().enumerate() {
            if let Some(guard) = &guard {
                // Nobody else sets it.
                let _ = one.guard.set((Arc::clone(guard), place));
            }
        }
        let (stop, stopped) = watch::channel(());
        for one in floating {
            let stopped = stopped.clone();
            let tend = move || {
                while stopped.has_changed().is_ok() {
                    std::thread::sleep(one.tend().since(boot_time()).min(TEND_EVERY));
                }
            };
            // One for each service: the kernel may let one of them wait.
            let thread = std::thread::Builder::new().name("addresses".to_owned());
            thread.spawn(tend).map_err(AddressError::Thread)?;
        }
        Ok(Self { guard, _stop: stop })
    }
}

const DISCARD_PORT: u16 = 9;
/// After that the address is announced all the same.
const TAKEN_TIME_MAX: Duration = Duration::from_millis(200);
const TAKEN_CHECK: Duration = Duration::from_millis(1);
/// How often the lease and the link are looked at; half a renewal.
const TEND_EVERY: Duration = Duration::from_millis(100);
/// How often addresses are prolonged where there is no lease.
const PROLONG_EVERY: Duration = Duration::from_secs(1);
/// The same, where the kernel takes them away after a second.
const PROLONG_SOON: Duration = Duration::from_millis(300);
/// How many looks in a row say that the link is down.
const LOOKS_DOWN: u32 = 2;
/// How many say that it is up: a cable that is put in bounces, and a switch takes its time.
const LOOKS_UP: u32 = 10;
