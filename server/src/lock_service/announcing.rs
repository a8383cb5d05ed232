//! Tells hosts that the service was restarted: carries out what [`Notifier`] says.
//!
//! Hosts are told from the address that they know, under every name of the service, over UDP and
//! then TCP, all at once and without holding anything up. Locks don't depend on it: with a complete
//! table they stay whether a host hears of the restart or not.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use havenfs_nsm::inbound::short;
use havenfs_nsm::notifier::{Notice, Notifier, Progress, Target};
use havenfs_nsm::nsm_state::NsmState;
use havenfs_nsm::wire::{self, StatChge};
use havenfs_rpc::portmap::Protocol;
use havenfs_rpc::program;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::LockService;
use crate::config::Announce;
use crate::host_calls::{Callee, HostCalls};

/// How far the hosts of this activation were told, to be looked at from elsewhere.
#[derive(Debug, Default)]
pub(super) struct Announcements(Mutex<Notifier>);

impl Announcements {
    /// All hosts that are or were told.
    pub(super) fn progress(&self) -> Vec<(Target, Progress)> {
        self.notifier().progress().collect()
    }

    fn notifier(&self) -> MutexGuard<'_, Notifier> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The names that hosts are told; they change when the service is defined anew.
#[derive(Debug)]
pub(super) struct ServiceNames(Mutex<Arc<[String]>>);

impl ServiceNames {
    pub(super) fn new(configured: &[String]) -> Self {
        Self(Mutex::new(names(configured).into()))
    }

    pub(super) fn set(&self, configured: &[String]) {
        *self.place() = names(configured).into();
    }

    fn now(&self) -> Arc<[String]> {
        Arc::clone(&self.place())
    }

    fn place(&self) -> MutexGuard<'_, Arc<[String]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The names that hosts may know a service by: each as it is configured and without its domain.
fn names(configured: &[String]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    // Full names first, as most hosts know the service by one.
    let shorts = configured
        .iter()
        .map(|name| String::from_utf8_lossy(short(name.as_bytes())).into_owned());
    for name in configured.iter().cloned().chain(shorts) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Whom a restart concerns.
pub(super) fn targets(locks: &LockService, announce: Announce) -> Vec<Target> {
    let state = locks.state();
    let table = state.table();
    let in_grace = state.in_grace();
    let hosts: HashSet<Target> = match announce {
        Announce::Never => HashSet::new(),
        Announce::Auto if !in_grace => table.deliveries(0).map(|d| target(&d.host)).collect(),
        // Where locks may be missing, hosts of which none is known may have some.
        Announce::Always | Announce::Auto => table.monitored_hosts(in_grace).map(target).collect(),
    };
    hosts.into_iter().collect()
}

pub(super) const fn target(host: &havenfs_nlm::host::HostKey) -> Target {
    Target {
        service_address: host.service_address,
        address: host.address,
    }
}

/// Tells hosts of one activation until it is dropped. `more` are hosts to be told anew, with a
/// higher number, since they pass over one that they have seen, and with the names of that moment.
pub(super) async fn run(
    calls: Arc<HostCalls>,
    service_names: Arc<ServiceNames>,
    state: NsmState,
    first: Vec<Target>,
    announcements: Arc<Announcements>,
    mut more: mpsc::Receiver<(Target, NsmState)>,
) {
    let start = Instant::now();
    let now_ms = || start.elapsed().as_millis() as u64;
    // The service's address, as text, is a name as well: many hosts know it by that alone.
    let names = service_names.now();
    *announcements.notifier() = Notifier::new(names.len() + 1);
    if !first.is_empty() {
        tracing::info!(
            hosts = first.len(),
            nsm_state = state.0,
            "telling hosts of the restart"
        );
    }
    for target in first {
        announcements.notifier().tell(0, target);
    }
    let begun = (state, names);
    let mut raised: HashMap<Target, (NsmState, Arc<[String]>)> = HashMap::new();
    let mut tries = JoinSet::new();
    loop {
        let deadline = {
            let mut notifier = announcements.notifier();
            while let Some(notice) = notifier.poll(now_ms()) {
                let calls = Arc::clone(&calls);
                let (state, names) = raised.get(&notice.target).unwrap_or(&begun).clone();
                tries.spawn(async move {
                    let answered = send(&calls, &names, state, &notice).await;
                    (notice.target, answered)
                });
            }
            notifier.next_deadline_ms()
        };
        let wake = start + Duration::from_millis(deadline.unwrap_or(0));
        tokio::select! {
            Some((target, state)) = more.recv() => {
                let names = service_names.now();
                let mut notifier = announcements.notifier();
                notifier.set_names(names.len() + 1);
                raised.insert(target, (state, names));
                notifier.tell(now_ms(), target);
            }
            Some(done) = tries.join_next() => {
                // A panic has ended the process already.
                if let Ok((target, answered)) = done {
                    let mut notifier = announcements.notifier();
                    notifier.tried(now_ms(), target, &answered);
                    note(&notifier, target);
                }
            }
            () = sleep_until(wake), if deadline.is_some() => {}
            else => return,
        }
    }
}

fn note(notifier: &Notifier, target: Target) {
    match notifier.progress_of(target) {
        Some(Progress::Told) => tracing::debug!(host = %target.address, "told of the restart"),
        Some(Progress::GivenUp) => tracing::warn!(
            host = %target.address,
            "did not answer in 15 minutes; it may not know of the restart, and keeps its locks"
        ),
        Some(Progress::Telling { .. }) | None => {}
    }
}

/// Sends one notice under each name that was not answered; returns those that are answered now.
async fn send(calls: &HostCalls, names: &[String], state: NsmState, notice: &Notice) -> Vec<usize> {
    let callee = Callee {
        address: notice.target.address,
        from: notice.target.service_address,
        program: (program::NSM, wire::VERSION),
        protocol: if notice.tcp {
            Protocol::Tcp
        } else {
            Protocol::Udp
        },
    };
    let own = notice.target.service_address.to_string();
    let mut answered = Vec::new();
    let mut look_up = notice.look_up;
    for number in &notice.names {
        let name = names.get(*number).unwrap_or(&own);
        let args = StatChge {
            mon_name: name.as_bytes(),
            state: state.0,
        };
        let call = calls.call(callee, wire::procedure::SM_NOTIFY, &args, look_up);
        let result = match notice.time_max_ms.map(Duration::from_millis) {
            Some(time_max) => timeout(time_max, call).await.ok(),
            None => Some(call.await),
        };
        look_up = false;
        let problem = match result {
            Some(Ok(_)) => {
                answered.push(*number);
                continue;
            }
            Some(Err(error)) => error.to_string(),
            None => "it does not answer".to_owned(),
        };
        tracing::debug!(host = %callee.address, name, problem, "cannot tell of the restart");
        // The other names would fare no better now.
        break;
    }
    answered
}
