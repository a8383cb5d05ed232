//! What an operator may do to locks and hosts. Each is a change like any other: it is on disk
//! before anybody hears of it, and whoever waited is served by the same entry.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use havenfs_nlm::ending::Freed;
use havenfs_nlm::keys::FileKey;
use havenfs_nlm::listing::LockId;
use havenfs_nlm::table::LockTable;
use havenfs_nsm::notifier::Target;
use tokio::time::{Instant, sleep};

use super::{LockService, announcing, unix_seconds};
use crate::cluster::{Outcome, ServiceCommand};
use crate::raft::Unavailable;

/// What a host that was asked has reclaimed.
#[derive(Debug)]
pub struct Verified {
    /// Under so many addresses of ours the host is known and was told; 0 if it never wanted to be.
    pub told: usize,
    /// Locks that it held when it was asked and holds still.
    pub held: usize,
    /// Those of them that it did not reclaim.
    pub missing: Vec<LockId>,
}

impl LockService {
    /// Ends grace; returns what to say about it.
    pub async fn end_grace(&self, why: &'static str) -> Result<String, Unavailable> {
        let (epoch, now) = (self.epoch_to_change()?, unix_seconds());
        let outcome = self.change(ServiceCommand::EndGrace { epoch, now }).await?;
        Ok(match outcome {
            Outcome::Freed(freed) => {
                tracing::info!(why, lapsed = freed.locks, "grace is over");
                format!("grace is over; {} locks were not reclaimed", freed.locks)
            }
            _ => "there is no grace to end".to_owned(),
        })
    }

    /// Ends grace when its time is over. Without a majority it can't be ended, and new locks would
    /// be refused for ever after.
    pub(super) async fn end_grace_for_sure(&self) {
        let mut is_said = false;
        while let Err(error) = self.end_grace("its time is over").await {
            if self.gate.is_over() {
                return;
            }
            if !std::mem::replace(&mut is_said, true) {
                tracing::warn!(%error, "grace is over and can't be ended yet; it is tried again");
            }
            sleep(END_GRACE_AGAIN).await;
        }
    }

    /// Ends what the hosts behind an address hold and wait for, on one file or on all; they can't
    /// reclaim it.
    pub async fn break_locks(
        &self,
        address: IpAddr,
        file: Option<FileKey>,
    ) -> Result<Freed, Unavailable> {
        let command = ServiceCommand::Break {
            epoch: self.epoch_to_change()?,
            address,
            file,
            now: unix_seconds(),
        };
        self.end_by_operator(address, command).await
    }

    /// The same for a host that is gone for good: it is not told of restarts any more.
    pub async fn expire(&self, address: IpAddr) -> Result<Freed, Unavailable> {
        let command = ServiceCommand::Expire {
            epoch: self.epoch_to_change()?,
            address,
            now: unix_seconds(),
        };
        self.end_by_operator(address, command).await
    }

    async fn end_by_operator(
        &self,
        address: IpAddr,
        command: ServiceCommand,
    ) -> Result<Freed, Unavailable> {
        match self.change(command).await? {
            Outcome::Freed(freed) => {
                tracing::warn!(%address, locks = freed.locks, "locks broken by an operator");
                self.counters.locks_broken.add(freed.locks as u64);
                Ok(freed)
            }
            _ => Err(Unavailable::Unknown),
        }
    }

    /// Refuses the writes of a host to a file, or to all if none is named; or allows them again.
    /// Returns how many refusals came or went, none if there are too many.
    pub async fn refuse_writes(
        &self,
        address: IpAddr,
        file: Option<FileKey>,
        refused: bool,
    ) -> Result<Option<usize>, Unavailable> {
        let command = ServiceCommand::RefuseWrites {
            epoch: self.epoch_to_change()?,
            address,
            file,
            refused,
        };
        let outcome = self.change(command).await?;
        self.look_for_refusals();
        match outcome {
            Outcome::Refusals(count) => {
                tracing::warn!(%address, refused, count, "an operator decided about writes");
                Ok(Some(count))
            }
            Outcome::TooManyRefusals => Ok(None),
            _ => Err(Unavailable::Unknown),
        }
    }

    /// Tells a host that the service was restarted, so that it reclaims its locks. The state number
    /// rises first: hosts pass over a number that they have seen. Returns under how many addresses
    /// of ours the host is known.
    pub async fn notify(&self, host: IpAddr) -> Result<usize, Unavailable> {
        self.notify_if(|address| address == host).await
    }

    /// The same for all hosts that want to hear of it; returns how many are being told.
    pub async fn notify_all(&self) -> Result<usize, Unavailable> {
        self.notify_if(|_| true).await
    }

    async fn notify_if(&self, is_meant: impl Fn(IpAddr) -> bool) -> Result<usize, Unavailable> {
        let targets: BTreeSet<Target> = {
            let state = self.state();
            let hosts = state.table().monitored_hosts(true);
            let hosts = hosts.filter(|key| is_meant(key.address));
            hosts.map(announcing::target).collect()
        };
        if targets.is_empty() {
            return Ok(0);
        }
        let command = ServiceCommand::RaiseNsmState {
            epoch: self.epoch_to_change()?,
            unix_seconds: unix_seconds().into(),
        };
        self.change(command).await?;
        let number = self.state().nsm_state();
        let to_tell = self
            .serving()
            .as_ref()
            .map(|serving| serving.telling.to_tell.clone());
        let Some(to_tell) = to_tell else {
            return Ok(0);
        };
        let mut told = 0;
        for target in targets {
            // It fails when the service is closed, and whoever opens it next tells all.
            told += usize::from(to_tell.send((target, number)).await.is_ok());
        }
        Ok(told)
    }

    /// Tells a host of a restart and waits until it has reclaimed all that it holds, or has not
    /// come back for [`QUIET_MAX`].
    pub async fn verify(self: &Arc<Self>, host: IpAddr) -> Result<Verified, Unavailable> {
        let (asked, asked_at) = (Instant::now(), unix_seconds());
        let holds = move |table: &LockTable| {
            let held = table.held_entries();
            let of_host = held.filter(|held| held.lock.host.address == host);
            of_host.map(|held| held.id).collect::<Vec<_>>()
        };
        let mut missing = self.of_table(holds).await?;
        let told = self.notify(host).await?;
        let (mut known, mut heard) = (0, Instant::now());
        loop {
            if self.gate.is_over() {
                return Err(Unavailable::Stopped);
            }
            let locks = Arc::clone(self);
            let (before, before_known) = (missing.len(), known);
            (missing, known) = self
                .of_table(move |table| {
                    // What was taken since is known to the host as well.
                    let spoken_of = |id: LockId, since| {
                        since > asked_at || locks.reclaims.last(id).is_some_and(|at| at >= asked)
                    };
                    let (mut left, mut known) = (Vec::new(), before_known);
                    for id in missing {
                        match table.held_since(id, host) {
                            Some(since) if spoken_of(id, since) => known += 1,
                            Some(_) => left.push(id),
                            None => {}
                        }
                    }
                    (left, known)
                })
                .await?;
            if missing.len() < before {
                heard = Instant::now();
            }
            if told == 0 || missing.is_empty() || heard.elapsed() > QUIET_MAX {
                return Ok(Verified {
                    told,
                    held: known + missing.len(),
                    missing,
                });
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Looks at a copy of the table where it holds nobody up.
    async fn of_table<T: Send + 'static>(
        &self,
        look: impl FnOnce(&LockTable) -> T + Send + 'static,
    ) -> Result<T, Unavailable> {
        let table = self.state().table().clone();
        let looking = tokio::task::spawn_blocking(move || look(&table));
        looking.await.map_err(|_| Unavailable::Stopped)
    }

    /// No client waits for this answer, so that no connection is to be closed if there is none.
    fn epoch_to_change(&self) -> Result<u32, Unavailable> {
        let is_open = self.gate.is_open();
        is_open
            .then(|| self.gate.epoch())
            .ok_or(Unavailable::Stopped)
    }

    async fn change(&self, command: ServiceCommand) -> Result<Outcome, Unavailable> {
        let outcome = self.ask(command).await?;
        self.look_at_table(&outcome);
        Ok(outcome)
    }
}

/// Before it is tried again to end grace.
const END_GRACE_AGAIN: Duration = Duration::from_secs(1);
/// How long a host may be silent before what it has not reclaimed counts as missing: some tries of
/// a notice may be lost.
const QUIET_MAX: Duration = Duration::from_secs(15);
/// How often to look.
const LOOK_EVERY: Duration = Duration::from_millis(100);
