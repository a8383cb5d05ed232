//! The lock manager of a client's machine: asks for locks, hears of grants, reclaims.
//!
//! Owns the connection to the service's NLM and the requests that wait; what was granted is in the
//! [`Ledger`]. Behaves as Linux does: a request is on the list of waiting ones before it is sent,
//! since GRANTED may overtake the reply; GRANTED is answered for what waits or is held already;
//! after a restart of the service all locks are reclaimed and all waiting requests are sent again,
//! and nothing else is asked meanwhile.
//!
//! It does not listen: [`super::host`] does, and calls here.
//!
//! Source: RFC 1813 6, XNFS chapter 10.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use havenfs_nlm::wire::{
    Nlm4Lock, Nlm4LockArgs, Nlm4Res, Nlm4Stats, Nlm4TestArgs, Nlm4TestRes, Nlm4TestRply,
    Nlm4UnlockArgs, procedure,
};
use havenfs_rpc::xdr::decode_all;

use super::super::interrupt;
use super::super::ledger::{Bytes, KERNEL, Ledger, Lock, Owner};
use super::rpc::{RpcClient, args};

/// The client's own NSM state: up, and never changed.
const NSM_STATE: i32 = 3;
/// How often a grant that is waited for is looked for.
const LOOK: Duration = Duration::from_millis(1);

/// Who is in the way, says TEST.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// The bytes that identify it.
    pub(crate) oh: Vec<u8>,
    /// The process.
    pub(crate) svid: i32,
}

impl Holder {
    /// Whether this is how the server knows `owner`.
    pub(crate) fn is(&self, owner: Owner) -> bool {
        if owner.svid == KERNEL {
            let client = format!("@{}", caller_name(owner.client));
            return self.oh.ends_with(client.as_bytes());
        }
        self.svid == owner.svid && self.oh == owner_handle(owner)
    }
}

/// The lock manager.
#[derive(Debug)]
pub(crate) struct Locks {
    caller_name: String,
    client: &'static str,
    /// The one file that has locks.
    fh: Vec<u8>,
    calls: Mutex<RpcClient>,
    waiting: Mutex<Vec<Lock>>,
    /// What was granted by a call of the server, and when.
    told: Mutex<Vec<(Lock, Instant)>>,
    cookie: AtomicU32,
    ledger: Arc<Ledger>,
}

impl Locks {
    /// Makes the lock manager of `client`, which locks the file `fh`.
    pub(crate) fn new(
        client: &'static str,
        fh: Vec<u8>,
        calls: RpcClient,
        ledger: Arc<Ledger>,
    ) -> Self {
        Self {
            caller_name: caller_name(client),
            client,
            fh,
            calls: Mutex::new(calls),
            waiting: Mutex::default(),
            told: Mutex::default(),
            cookie: AtomicU32::new(1),
            ledger,
        }
    }

    /// A lock of a process on this machine.
    pub(crate) const fn of_process(&self, svid: i32, bytes: Bytes) -> Lock {
        let client = self.client;
        Lock {
            owner: Owner { client, svid },
            bytes,
        }
    }

    /// LOCK; with `block` the request waits if somebody has the lock.
    pub(crate) fn lock(&self, lock: Lock, block: bool) -> Result<Nlm4Stats> {
        let mut calls = held(&self.calls);
        if block {
            held(&self.waiting).push(lock);
        }
        let stat = self.send_lock(&mut calls, lock, block, false)?;
        match stat {
            Nlm4Stats::Granted => self.take(lock),
            Nlm4Stats::Blocked => {}
            _ => held(&self.waiting).retain(|waiting| *waiting != lock),
        }
        Ok(stat)
    }

    /// TEST: who stands in the way of a lock, if anybody does.
    pub(crate) fn test(&self, lock: Lock) -> Result<Option<Holder>> {
        let cookie = self.next_cookie();
        let oh = owner_handle(lock.owner);
        let call = Nlm4TestArgs {
            cookie: &cookie,
            exclusive: true,
            alock: self.alock(lock, &oh),
        };
        let results = held(&self.calls).call(procedure::TEST, &args(|w| w.value(&call)))?;
        let res: Nlm4TestRes<'_> = decode_all(&results).context("TEST has a malformed result")?;
        match res.stat {
            Nlm4TestRply::Denied(holder) => Ok(Some(Holder {
                oh: holder.oh.to_owned(),
                svid: holder.svid,
            })),
            Nlm4TestRply::Other(Nlm4Stats::Granted) => Ok(None),
            Nlm4TestRply::Other(stat) => anyhow::bail!("TEST is answered {stat:?}"),
        }
    }

    /// UNLOCK.
    pub(crate) fn unlock(&self, lock: Lock) -> Result<Nlm4Stats> {
        let mut calls = held(&self.calls);
        self.ledger.release(lock);
        let cookie = self.next_cookie();
        let oh = owner_handle(lock.owner);
        let call = Nlm4UnlockArgs {
            cookie: &cookie,
            alock: self.alock(lock, &oh),
        };
        stat_of(&calls.call(procedure::UNLOCK, &args(|w| w.value(&call)))?)
    }

    /// After a restart of the service: asks for everything again that this client holds, and then
    /// for what it waits for. Returns what was answered.
    pub(crate) fn reclaim(&self) -> Result<Vec<(Lock, Nlm4Stats)>> {
        let mut calls = held(&self.calls);
        let mut answers = Vec::new();
        let own = |lock: &Lock| lock.owner.client == self.client;
        for lock in self.ledger.held().into_iter().filter(own) {
            answers.push((lock, self.send_lock(&mut calls, lock, false, true)?));
        }
        let waiting = held(&self.waiting).clone();
        for lock in waiting {
            if self.send_lock(&mut calls, lock, true, false)? == Nlm4Stats::Granted {
                self.take(lock);
            }
        }
        Ok(answers)
    }

    /// GRANTED, called by the server: what this client answers.
    pub(crate) fn granted(&self, args: &Nlm4TestArgs<'_>) -> Nlm4Stats {
        let is_meant = |lock: &&Lock| {
            let oh = owner_handle(lock.owner);
            self.alock(**lock, &oh) == args.alock && args.exclusive
        };
        let waiting = held(&self.waiting).iter().find(is_meant).copied();
        if let Some(lock) = waiting {
            held(&self.told).push((lock, Instant::now()));
            self.take(lock);
            return Nlm4Stats::Granted;
        }
        // Told again: the answer to the first telling was lost.
        if self.ledger.held().iter().any(|lock| is_meant(&lock)) {
            Nlm4Stats::Granted
        } else {
            Nlm4Stats::Denied
        }
    }

    /// Waits until the server has called GRANTED for a lock; returns when that was.
    pub(crate) fn wait_granted(&self, lock: Lock, limit: Duration) -> Result<Option<Instant>> {
        let deadline = Instant::now() + limit;
        loop {
            let told = held(&self.told)
                .iter()
                .find(|(told, _)| *told == lock)
                .copied();
            if told.is_some() || Instant::now() > deadline {
                return Ok(told.map(|(_, at)| at));
            }
            interrupt::sleep(LOOK)?;
        }
    }

    /// Whether a request still waits.
    pub(crate) fn waits_for(&self, lock: Lock) -> bool {
        held(&self.waiting).contains(&lock)
    }

    fn take(&self, lock: Lock) {
        self.ledger.granted(lock);
        held(&self.waiting).retain(|waiting| *waiting != lock);
    }

    fn send_lock(
        &self,
        calls: &mut RpcClient,
        lock: Lock,
        block: bool,
        reclaim: bool,
    ) -> Result<Nlm4Stats> {
        let cookie = self.next_cookie();
        let oh = owner_handle(lock.owner);
        let call = Nlm4LockArgs {
            cookie: &cookie,
            block,
            exclusive: true,
            alock: self.alock(lock, &oh),
            reclaim,
            state: NSM_STATE,
        };
        stat_of(&calls.call(procedure::LOCK, &args(|w| w.value(&call)))?)
    }

    fn alock<'a>(&'a self, lock: Lock, oh: &'a [u8]) -> Nlm4Lock<'a> {
        let Bytes { first, count } = lock.bytes;
        Nlm4Lock {
            caller_name: self.caller_name.as_bytes(),
            fh: &self.fh,
            oh,
            svid: lock.owner.svid,
            l_offset: first,
            l_len: count,
        }
    }

    fn next_cookie(&self) -> [u8; 4] {
        self.cookie.fetch_add(1, Ordering::Relaxed).to_be_bytes()
    }
}

/// What a client's machine calls itself.
pub(crate) fn caller_name(client: &str) -> String {
    format!("client-{}", client.to_ascii_lowercase())
}

/// As Linux names an owner.
fn owner_handle(owner: Owner) -> Vec<u8> {
    format!("{}@{}", owner.svid, caller_name(owner.client)).into_bytes()
}

fn stat_of(results: &[u8]) -> Result<Nlm4Stats> {
    let res: Nlm4Res<'_> = decode_all(results).context("a lock call has a malformed result")?;
    Ok(res.stat)
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
