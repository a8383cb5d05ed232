//! The checks: the ledger held against what the service answers now.
//!
//! Every check asks over the wire, from the client that does not have what is asked about, and ends
//! with [`BrokenPromise`] in words that name what was promised. An error of a call is a broken
//! promise as well once the service has begun to serve: see [`promised`].

use std::time::{Duration, Instant};

use anyhow::Result;
use havenfs_nlm::wire::Nlm4Stats;

use super::client::Client;
use super::client::nfs::Attributes;
use super::client::nlm::Locks;
use super::cluster::LOOK;
use super::interrupt::{self, Interrupted};
use super::ledger::{BrokenPromise, Ledger, Lock};

/// How long a client may have to wait for the notice of a restart.
const NOTICE_TIME_MAX: Duration = Duration::from_secs(10);

/// Fails with a broken promise.
pub(super) fn broken<T>(text: impl Into<String>) -> Result<T> {
    Err(BrokenPromise(text.into()).into())
}

/// Takes an error of a call for what it is: something that was promised did not happen.
pub(super) fn promised<T>(result: Result<T>, what: &str) -> Result<T> {
    result.map_err(|error| {
        if error.is::<Interrupted>() || error.is::<BrokenPromise>() {
            error
        } else {
            BrokenPromise(format!("{what}: {error:#}")).into()
        }
    })
}

/// Has the other client ask for every lock of the ledger; returns how many there are.
pub(super) fn all_locks_are_held(ledger: &Ledger, a: &Client, b: &Client) -> Result<usize> {
    let held = ledger.held();
    for lock in &held {
        let other = if lock.owner.client == a.name { b } else { a };
        is_held(&other.locks, *lock)?;
    }
    ledger.check()?;
    Ok(held.len())
}

/// Asks as a stranger on another client for bytes that `lock` has: TEST names the holder, LOCK is
/// denied.
pub(super) fn is_held(other: &Locks, lock: Lock) -> Result<()> {
    const STRANGER: i32 = 99;
    let wanted = other.of_process(STRANGER, lock.bytes);
    match promised(other.test(wanted), "a lock cannot be tested")? {
        Some(holder) if holder.is(lock.owner) => {}
        Some(holder) => {
            let Lock { owner, bytes } = lock;
            let svid = holder.svid;
            return broken(format!(
                "process {svid} has {bytes} now, which {owner} was granted"
            ));
        }
        None => return broken(format!("the lock on {lock} is forgotten")),
    }
    match promised(other.lock(wanted, false), "a lock cannot be asked for")? {
        Nlm4Stats::Denied => Ok(()),
        Nlm4Stats::Granted => broken(format!("somebody else was granted {lock}")),
        stat => broken(format!("a LOCK that conflicts is answered {stat:?}")),
    }
}

/// A new lock in nobody's way has to be granted, whatever has happened to the nodes.
pub(super) fn is_granted(stat: Nlm4Stats, lock: Lock) -> Result<()> {
    match stat {
        Nlm4Stats::Granted => Ok(()),
        Nlm4Stats::DeniedGracePeriod => broken("a new lock has to wait for a grace period"),
        stat => broken(format!("a free lock, {lock}, is answered {stat:?}")),
    }
}

/// A file handle from before names the same file, and its name still leads to that handle.
pub(super) fn handle_still_works(
    client: &mut Client,
    name: &str,
    fh: &[u8],
    before: Attributes,
) -> Result<()> {
    let now = promised(
        client.nfs.getattr(fh),
        "a file handle from before does not work",
    )?;
    if (now.fsid, now.fileid) != (before.fsid, before.fileid) || now.size < before.size {
        return broken("a file handle from before leads to another file");
    }
    let root = client.root.clone();
    let found = promised(
        client.nfs.lookup(&root, name),
        "a file is not found any more",
    )?;
    if found != fh {
        return broken("a file has another handle than before");
    }
    Ok(())
}

/// What a client heard of a restart.
#[derive(Debug)]
pub(super) struct Heard {
    /// When the first notice came.
    pub(super) notice_at: Instant,
    /// The names that the service was called by.
    pub(super) names: Vec<String>,
    /// The service's new NSM state.
    pub(super) nsm_state: i32,
    /// How many locks were reclaimed.
    pub(super) reclaimed: usize,
    /// When all reclaims were answered.
    pub(super) reclaimed_at: Instant,
}

/// Waits until a client has heard of the restart after `since` and has reclaimed its locks.
pub(super) fn hears_of_it(client: &Client, since: Instant, ledger: &Ledger) -> Result<Heard> {
    let deadline = Instant::now() + NOTICE_TIME_MAX;
    loop {
        ledger.check()?;
        let reclaimed = client.host.reclaimed();
        if let Some(reclaimed) = reclaimed.iter().find(|reclaimed| reclaimed.at > since) {
            let mut notices = client.host.notices();
            notices.retain(|notice| notice.nsm_state == reclaimed.nsm_state);
            let first = notices.first().map_or(reclaimed.at, |notice| notice.at);
            return Ok(Heard {
                notice_at: first,
                names: notices.into_iter().map(|notice| notice.name).collect(),
                nsm_state: reclaimed.nsm_state,
                reclaimed: reclaimed.answers.len(),
                reclaimed_at: reclaimed.at,
            });
        }
        if Instant::now() > deadline {
            let seconds = NOTICE_TIME_MAX.as_secs();
            let strange: Vec<String> = client
                .host
                .notices()
                .iter()
                .filter(|notice| notice.at > since)
                .map(|notice| format!(" (but {} from {})", notice.name, notice.from))
                .collect();
            let strange = strange.concat();
            let name = client.name;
            return broken(format!(
                "client {name} hears of no restart in {seconds} s{strange}"
            ));
        }
        interrupt::sleep(LOOK)?;
    }
}
