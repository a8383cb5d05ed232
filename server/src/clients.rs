//! The connections that NFS clients have open, for `havenfs clients`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::call::Origin;
use crate::clock::unix_seconds;

/// A client's connection and what came over it.
#[derive(Debug)]
pub struct Client {
    /// The client's address and port.
    pub peer: SocketAddr,
    /// The address of ours that it uses.
    pub local: SocketAddr,
    /// When it connected, in seconds since 1970.
    pub since: u64,
    calls: AtomicU64,
    bytes_received: AtomicU64,
    bytes_sent: AtomicU64,
    last_call: AtomicU64,
}

/// What a connection has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Calls received.
    pub calls: u64,
    /// Bytes received.
    pub bytes_received: u64,
    /// Bytes sent.
    pub bytes_sent: u64,
    /// When the last call came, in seconds since 1970; 0 if none did.
    pub last_call: u64,
}

impl Client {
    /// Adds a batch of calls.
    pub fn add(&self, calls: u64, bytes_sent: u64) {
        self.calls.fetch_add(calls, Ordering::Relaxed);
        self.bytes_sent.fetch_add(bytes_sent, Ordering::Relaxed);
        if calls > 0 {
            self.last_call.store(unix_seconds(), Ordering::Relaxed);
        }
    }

    /// Adds received bytes.
    pub fn add_received(&self, bytes: u64) {
        self.bytes_received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// What came over it so far.
    pub fn traffic(&self) -> Traffic {
        Traffic {
            calls: self.calls.load(Ordering::Relaxed),
            bytes_received: self.bytes_received.load(Ordering::Relaxed),
            bytes_sent: self.bytes_sent.load(Ordering::Relaxed),
            last_call: self.last_call.load(Ordering::Relaxed),
        }
    }
}

/// All connections of NFS clients.
#[derive(Debug, Default)]
pub struct Clients {
    next: AtomicU64,
    open: Mutex<BTreeMap<u64, Arc<Client>>>,
}

impl Clients {
    /// Enters a connection for as long as the returned value lives.
    pub fn enter(self: &Arc<Self>, origin: &Origin) -> Entered {
        let client = Arc::new(Client {
            peer: origin.peer,
            local: origin.local,
            since: unix_seconds(),
            calls: AtomicU64::new(0),
            bytes_received: AtomicU64::new(0),
            bytes_sent: AtomicU64::new(0),
            last_call: AtomicU64::new(0),
        });
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.insert(number, Arc::clone(&client));
        drop(open);
        Entered {
            clients: Arc::clone(self),
            number,
            client,
        }
    }

    /// The open connections, oldest first.
    pub fn list(&self) -> Vec<Arc<Client>> {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }
}

/// An open connection's place in the list.
#[derive(Debug)]
pub struct Entered {
    clients: Arc<Clients>,
    number: u64,
    client: Arc<Client>,
}

impl std::ops::Deref for Entered {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.clients
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.number);
    }
}
