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
//! - Its process is stopped or hangs: the kernel takes the address away when nobody has
//!   prolonged it for the whole seconds of a lease, which is about when the lease ends. The thread
//!   of [`Addresses`] prolongs it once for each renewal of the lease, and withdraws it at the moment
//!   when the lease ends, whatever the rest of the process does.
//! - The process is killed: its [guard] does what the process would have done, within milliseconds.
//! - Killed between the steps of either, and its guard too: at its next start it withdraws everything once more.
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
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use self::guard::Guard;
use self::netlink::Link;
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
    /// There is no such interface, or its cable is out.
    #[error("the interface `{interface}` is {state}, and clients can't reach this node")]
    NoLink {
        /// Its name.
        interface: String,
        /// What is wrong with it.
        state: &'static str,
    },
    /// No socket for ARP.
    #[error("cannot open a socket to announce addresses: {source}\nhint: {}", hint(.source))]
    Frames {
        /// What the kernel said.
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
    up: Mutex<Option<Up>>,
    link: watch::Sender<bool>,
    /// How often the link was found in the other state, in a row.
    link_changed: AtomicU32,
    /// For frames; never closed, since that takes long.
    frames: OnceLock<OwnedFd>,
}

/// They are here.
#[derive(Debug)]
struct Up {
    gate: Arc<Gate>,
    link: Link,
    /// The end of the lease for which they were prolonged last.
    until: Moment,
}

impl Floating {
    /// Addresses that are not here yet. `lease`: how long a node serves after a renewal; none if it
    /// is alone.
    pub fn new(config: FloatingConfig, lease: Option<Duration>) -> Self {
        let is_up = netlink::link(&config.interface).is_ok_and(|link| link.is_up);
        Self {
            config,
            // The kernel counts whole seconds; rounded down, since the lease may end first.
            seconds: lease
                .filter(|_| !is_planted(Fault::NoLease))
                .map(|lease| u32::try_from(lease.as_secs()).unwrap_or(u32::MAX).max(1)),
            up: Mutex::new(None),
            link: watch::Sender::new(is_up),
            link_changed: AtomicU32::new(0),
            frames: OnceLock::new(),
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
        self.up().is_some()
    }

    /// Brings the addresses here, if the gate is open: says whether it was. Listeners must stand.
    pub fn raise(&self, gate: &Arc<Gate>) -> Result<bool, AddressError> {
        let mut up = self.up();
        let no_link = |state| AddressError::NoLink {
            interface: self.config.interface.clone(),
            state,
        };
        let link = netlink::link(&self.config.interface).map_err(|_| no_link("not there"))?;
        if !link.is_up {
            return Err(no_link("down"));
        }
        let raised = self.raise_on(&link, gate, &mut up);
        if !matches!(raised, Ok(true)) {
            self.take_down_from(link.index, &mut up);
        }
        raised
    }

    fn raise_on(
        &self,
        link: &Link,
        gate: &Arc<Gate>,
        up: &mut Option<Up>,
    ) -> Result<bool, AddressError> {
        for address in &self.config.addresses {
            // An earlier epoch, or an earlier life of this process, may have left connections.
            netlink::block(address.ip).map_err(refused("drop packets of", *address))?;
            clear(*address);
        }
        // The last look before neighbours hear of it.
        if !gate.admits() {
            return Ok(false);
        }
        *up = Some(Up {
            gate: Arc::clone(gate),
            link: link.clone(),
            until: gate.until(),
        });
        self.prolong(link.index)?;
        for address in &self.config.addresses {
            wait_until_taken(address.ip);
            netlink::unblock(address.ip).map_err(refused("let packets pass of", *address))?;
        }
        Ok(true)
    }

    /// Takes the addresses away, and ends their connections without a word; nothing if they are not
    /// here.
    pub fn withdraw(&self) {
        self.take_down(&mut self.up());
    }

    /// What an earlier life of this process may have left.
    ///
    /// # Errors
    /// If this process may not do that at all.
    fn clean(&self) -> Result<(), AddressError> {
        for address in &self.config.addresses {
            netlink::block(address.ip).map_err(refused("drop packets of", *address))?;
            if let Ok(link) = netlink::link(&self.config.interface) {
                netlink::remove_address(link.index, *address)
                    .map_err(refused("remove", *address))?;
            }
            clear(*address);
            netlink::unblock(address.ip).map_err(refused("let packets pass of", *address))?;
        }
        Ok(())
    }

    /// Says where the addresses are, at once and again for some seconds, as long as they are here
    /// under this gate.
    pub async fn announce(self: Arc<Self>, gate: Arc<Gate>) {
        let start = tokio::time::Instant::now();
        for after in announce::SCHEDULE {
            tokio::time::sleep_until(start + after).await;
            self.announce_once(&gate);
        }
    }

    fn announce_once(&self, gate: &Arc<Gate>) {
        let up = self.up();
        let held = up.as_ref().filter(|up| Arc::ptr_eq(&up.gate, gate));
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
        let link = netlink::link(&self.config.interface);
        self.note_link(link.is_ok_and(|link| link.is_up));
        let soon = boot_time() + TEND_EVERY;
        let mut up = self.up();
        let Some(held) = up.as_mut() else {
            return soon;
        };
        if !held.gate.admits() {
            self.take_down(&mut up);
            return soon;
        }
        let until = held.gate.until();
        if until != held.until {
            held.until = until;
            let index = held.link.index;
            if let Err(error) = self.prolong(index) {
                tracing::error!("{error}");
            }
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

    fn prolong(&self, index: u32) -> Result<(), AddressError> {
        let seconds = self.seconds.unwrap_or(u32::MAX);
        self.config.addresses.iter().try_for_each(|address| {
            netlink::set_address(index, *address, seconds).map_err(refused("raise", *address))
        })
    }

    /// All of it, whatever fails on the way: what is left of the address the kernel takes away.
    fn take_down(&self, up: &mut Option<Up>) {
        if let Some(held) = up {
            let index = held.link.index;
            self.take_down_from(index, up);
        }
    }

    fn take_down_from(&self, index: u32, up: &mut Option<Up>) {
        *up = None;
        for address in &self.config.addresses {
            let dropped = netlink::block(address.ip);
            // While the address is here, so that what the kernel says of it stays here as well.
            let forgotten = netlink::forget_waiting_packets(index, address.ip);
            let removed = netlink::remove_address(index, *address);
            let is_clear = clear(*address);
            // Connections that the kernel can't destroy end when their owner closes them, and that
            // must not be heard.
            let opened = if is_clear {
                netlink::unblock(address.ip)
            } else {
                Ok(())
            };
            if let Err(error) = dropped.and(forgotten).and(removed).and(opened) {
                tracing::error!(%address, %error, "cannot withdraw an address cleanly");
            }
        }
    }

    fn up(&self) -> MutexGuard<'_, Option<Up>> {
        self.up.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Destroys the connections of an address; says whether it can be done.
fn clear(address: FloatingAddress) -> bool {
    match sockets::destroy(address.ip) {
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

/// The thread that prolongs the addresses of all services, or withdraws them; it ends when this is
/// dropped.
#[derive(Debug)]
pub struct Addresses {
    /// Keeps clients from seeing how this process dies.
    pub guard: Option<Arc<Guard>>,
    _stop: oneshot::Sender<()>,
    _thread: JoinHandle<()>,
}

impl Addresses {
    /// Clears away what an earlier life of this process left, and starts the thread and the guard;
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
        let (stop, mut stopped) = oneshot::channel::<()>();
        let tend = move || {
            while stopped.try_recv() == Err(oneshot::error::TryRecvError::Empty) {
                let now = boot_time();
                let next = floating.iter().map(|one| one.tend()).min();
                let next = next.unwrap_or(now + TEND_EVERY);
                std::thread::sleep(next.since(boot_time()).min(TEND_EVERY));
            }
        };
        let thread = std::thread::Builder::new().name("addresses".to_owned());
        Ok(Self {
            guard,
            _stop: stop,
            _thread: thread.spawn(tend).map_err(AddressError::Thread)?,
        })
    }
}

const DISCARD_PORT: u16 = 9;
/// After that the address is announced all the same.
const TAKEN_TIME_MAX: Duration = Duration::from_millis(200);
const TAKEN_CHECK: Duration = Duration::from_millis(1);
/// How often the lease and the link are looked at; half a renewal.
const TEND_EVERY: Duration = Duration::from_millis(100);
/// How many looks in a row say that the link is down.
const LOOKS_DOWN: u32 = 2;
/// How many say that it is up: a cable that is put in bounces, and a switch takes its time.
const LOOKS_UP: u32 = 10;
