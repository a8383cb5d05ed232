//! What can be seen of the service's address from outside: which machine has it, and which one says
//! so by ARP.
//!
//! Owns two threads. One reads the kernel's own list of addresses of each node's network, so it
//! believes no node; the other hears the announcements on the bridge. Judges one thing: at no time
//! have two nodes the address.
//!
//! Invariant: events are in the order in which they were seen.

use std::fs;
use std::io::Read as _;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};

use super::bridge::MAC;
use super::ledger::BrokenPromise;
use super::site::NODES;

/// How often addresses are looked at.
const LOOK: Duration = Duration::from_millis(3);
/// How soon the listener notices that it is to end.
const LISTEN: Duration = Duration::from_millis(200);
const ETHERTYPE_ARP: u16 = 0x0806;
const FRAME_BYTES_MAX: usize = 2048;
/// Where an ARP frame over Ethernet has the sender's hardware address, its IPv4 address, and the
/// one that is asked for.
const SENDER_MAC_AT: usize = 22;
const SENDER_IP_AT: usize = 28;
const TARGET_IP_AT: usize = 38;

/// Something that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// A node has the address from now on.
    Come(&'static str),
    /// A node has it no more.
    Gone(&'static str),
    /// A node says by ARP that it has it.
    Announced(&'static str),
}

/// The view.
#[derive(Debug)]
pub(super) struct Sight {
    service: IpAddr,
    /// A process in each node's network, where the node has power.
    processes: Mutex<[Option<u32>; NODES.len()]>,
    events: Mutex<Vec<(Instant, Seen)>>,
    both: Mutex<Option<String>>,
    quit: AtomicBool,
}

impl Sight {
    /// Begins to look.
    pub(super) fn open(service: IpAddr) -> Result<Arc<Self>> {
        let sight = Arc::new(Self {
            service,
            processes: Mutex::default(),
            events: Mutex::default(),
            both: Mutex::default(),
            quit: AtomicBool::new(false),
        });
        let protocol = Protocol::from(i32::from(ETHERTYPE_ARP.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))
            .and_then(|socket| socket.set_read_timeout(Some(LISTEN)).map(|()| socket))
            .context("cannot listen to ARP")?;
        // Both end when the last other one who knows the view has left.
        let (looking, listening) = (Arc::downgrade(&sight), Arc::downgrade(&sight));
        thread::spawn(move || {
            let mut had = [false; NODES.len()];
            while let Some(sight) = looking.upgrade().filter(|sight| !sight.has_ended()) {
                sight.look(&mut had);
                drop(sight);
                thread::sleep(LOOK);
            }
        });
        thread::spawn(move || {
            let mut frame = [0; FRAME_BYTES_MAX];
            loop {
                let read = (&socket).read(&mut frame);
                let Some(sight) = listening.upgrade().filter(|sight| !sight.has_ended()) else {
                    return;
                };
                if let Ok(count) = read {
                    sight.hear(frame.get(..count).unwrap_or_default());
                }
            }
        });
        Ok(sight)
    }

    /// Ends both threads.
    pub(super) fn close(&self) {
        self.quit.store(true, Ordering::SeqCst);
    }

    /// A node has power; `process` is in its network.
    pub(super) fn on(&self, node: &str, process: u32) {
        self.set(node, Some(process));
    }

    /// A node has lost its power.
    pub(super) fn off(&self, node: &str) {
        self.set(node, None);
    }

    /// What was seen after `from`.
    pub(super) fn since(&self, from: Instant) -> Vec<(Instant, Seen)> {
        let mut events = held(&self.events).clone();
        events.retain(|(at, _)| *at > from);
        events
    }

    /// Which nodes have the address now, as the kernel knows it.
    pub(super) fn holders(&self) -> Vec<&'static str> {
        let processes = *held(&self.processes);
        let has = |process: Option<u32>| process.is_some_and(|process| self.has(process));
        let nodes = NODES.into_iter().zip(processes);
        nodes
            .filter_map(|(node, process)| has(process).then_some(node))
            .collect()
    }

    /// Fails with [`BrokenPromise`] if two nodes were seen with the address.
    pub(super) fn check(&self) -> Result<()> {
        match held(&self.both).clone() {
            Some(text) => Err(BrokenPromise(text).into()),
            None => Ok(()),
        }
    }

    fn has_ended(&self) -> bool {
        self.quit.load(Ordering::SeqCst)
    }

    fn set(&self, node: &str, process: Option<u32>) {
        let mut processes = held(&self.processes);
        for (name, place) in NODES.iter().zip(processes.iter_mut()) {
            if *name == node {
                *place = process;
            }
        }
    }

    fn look(&self, had: &mut [bool; NODES.len()]) {
        let holders = self.holders();
        for (node, had) in NODES.into_iter().zip(had) {
            let has = holders.contains(&node);
            if has != *had {
                let seen = if has {
                    Seen::Come(node)
                } else {
                    Seen::Gone(node)
                };
                held(&self.events).push((Instant::now(), seen));
                *had = has;
            }
        }
        // They are not looked at all at once: the first may have lost it before the second got it.
        if let [first, second, ..] = holders.as_slice()
            && self.holders().starts_with(&[first, second])
        {
            let text = format!("{first} and {second} have {} both", self.service);
            held(&self.both).get_or_insert(text);
        }
    }

    /// Whether the network of a process has the address, as an address of its own.
    fn has(&self, process: u32) -> bool {
        let list = fs::read_to_string(format!("/proc/{process}/net/fib_trie"));
        is_local(&list.unwrap_or_default(), self.service)
    }

    fn hear(&self, frame: &[u8]) {
        if let Some(node) = announcer(frame, self.service) {
            held(&self.events).push((Instant::now(), Seen::Announced(node)));
        }
    }
}

/// Whether a list of routes has an address as local: the line of the address, and the next one.
fn is_local(list: &str, address: IpAddr) -> bool {
    let leaf = format!("|-- {address}");
    let mut lines = list.lines();
    while let Some(line) = lines.next() {
        if line.trim() == leaf && lines.next().is_some_and(|line| line.contains("host LOCAL")) {
            return true;
        }
    }
    false
}

/// Which node announces `service` with this frame, if one does: it asks for its own address.
fn announcer(frame: &[u8], service: IpAddr) -> Option<&'static str> {
    let IpAddr::V4(service) = service else {
        return None;
    };
    let field = |at: usize, bytes: usize| frame.get(at..at + bytes);
    let is_service = |at| field(at, 4) == Some(&service.octets());
    if !is_service(SENDER_IP_AT) || !is_service(TARGET_IP_AT) {
        return None;
    }
    let (last, first) = field(SENDER_MAC_AT, MAC.len() + 1)?.split_last()?;
    if first != MAC {
        return None;
    }
    NODES.get(usize::from(*last).checked_sub(1)?).copied()
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 100));

    fn frame(mac: u8, sender: u8, target: u8) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(MAC);
        frame.push(mac);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(MAC);
        frame.push(mac);
        frame.extend([192, 0, 2, sender]);
        frame.extend([0; 6]);
        frame.extend([192, 0, 2, target]);
        frame
    }

    #[test]
    fn whoever_asks_for_its_own_address_announces_it() {
        assert_eq!(announcer(&frame(2, 100, 100), SERVICE), Some("n2"));
        // A question of somebody else, another address, a stranger's card, a piece of a frame.
        assert_eq!(announcer(&frame(2, 2, 100), SERVICE), None);
        assert_eq!(announcer(&frame(2, 2, 2), SERVICE), None);
        assert_eq!(announcer(&frame(9, 100, 100), SERVICE), None);
        assert_eq!(announcer(&frame(0, 100, 100), SERVICE), None);
        let whole = frame(1, 100, 100);
        for count in 0..whole.len() {
            let piece = whole.get(..count).unwrap_or_default();
            assert_eq!(announcer(piece, SERVICE), None);
        }
    }

    #[test]
    fn an_address_is_local_where_the_kernel_says_so() {
        let there = "Main:\n     |-- 192.0.2.100\n        /32 host LOCAL\n";
        assert!(is_local(there, SERVICE));
        let route = "Main:\n     |-- 192.0.2.100\n        /32 link UNICAST\n";
        assert!(!is_local(route, SERVICE));
        let longer = "Main:\n     |-- 192.0.2.10\n        /32 host LOCAL\n";
        assert!(!is_local(longer, SERVICE));
    }
}
