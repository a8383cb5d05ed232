//! A client's machine that behaves: it takes every GRANTED for its own and says so, and hears every
//! notice of a restart. It reclaims nothing, so a lock that the service has lost stays lost.
//!
//! Owns a [`Host`] and the thread that answers for it. What came, and when, is for the test to
//! judge.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use havenfs_rpc::program;

use super::load::{Go, Load};
use super::site::Site;
use super::{POLL, TIME_MAX};
use crate::client::host::Received;
use crate::client::nlm::{self, Lock, stat};
use crate::client::peer::Transport;
use crate::client::{Cred, Host, Nlm, Peer, nsm};

/// How soon the thread notices that its machine is gone.
const LOOK_UP: Duration = Duration::from_millis(50);

/// A machine that is called.
#[derive(Debug)]
pub struct Machine {
    heard: Arc<Mutex<Heard>>,
    _answering: Load<()>,
}

/// What came.
#[derive(Debug, Clone, Default)]
pub struct Heard {
    /// Every SM_NOTIFY.
    pub notices: Vec<Notice>,
    /// Every GRANTED.
    pub grants: Vec<Grant>,
    /// What came and should not.
    pub problems: Vec<String>,
}

/// A notice of a restart.
#[derive(Debug, Clone)]
pub struct Notice {
    /// Under which name.
    pub name: String,
    /// With which state.
    pub nsm_state: i32,
    /// From where.
    pub from: SocketAddr,
    /// When.
    pub at: Instant,
}

/// A telling that a lock is granted.
#[derive(Debug, Clone)]
pub struct Grant {
    /// Which lock.
    pub lock: Lock,
    /// When.
    pub at: Instant,
}

impl Machine {
    /// Starts the machine of the client with this number.
    pub fn start(site: &Site, number: u8) -> Result<Self> {
        let host = Host::start_at(site.host_portmap(number))?;
        let heard = Arc::new(Mutex::new(Heard::default()));
        let (own, nlm_port) = (Arc::clone(&heard), site.ports.nlm);
        let answering = Load::start(move |go: &Go| {
            while go.on() {
                match host.next_call_within(LOOK_UP) {
                    Ok(None) => {}
                    Ok(Some(call)) => {
                        if let Err(error) = take(&host, &call, nlm_port, &own) {
                            held(&own).problems.push(format!("{error:#}"));
                        }
                    }
                    Err(error) => held(&own).problems.push(format!("{error:#}")),
                }
            }
            Ok(())
        });
        Ok(Self {
            heard,
            _answering: answering,
        })
    }

    /// What came so far.
    pub fn heard(&self) -> Heard {
        held(&self.heard).clone()
    }

    /// When the owner of a lock was told that it is granted, for the first time; none if it was
    /// not.
    pub fn granted(&self, lock: &Lock) -> Option<Instant> {
        let heard = held(&self.heard);
        let mut grants = heard.grants.iter();
        let grant = grants.find(|grant| {
            let told = &grant.lock;
            (&told.oh, told.svid, told.l_offset, told.l_len)
                == (&lock.oh, lock.svid, lock.l_offset, lock.l_len)
        });
        grant.map(|grant| grant.at)
    }

    /// Waits until the owner of a lock is told that it is granted.
    pub fn wait_granted(&self, lock: &Lock) -> Result<Instant> {
        let deadline = Instant::now() + TIME_MAX;
        loop {
            if let Some(at) = self.granted(lock) {
                return Ok(at);
            }
            if Instant::now() > deadline {
                bail!("no GRANTED of {lock:?}; came: {:?}", self.heard());
            }
            thread::sleep(POLL);
        }
    }

    /// Waits for a notice of a restart with a higher state than `state`.
    pub fn wait_notice(&self, state: i64) -> Result<Notice> {
        let deadline = Instant::now() + TIME_MAX;
        loop {
            let heard = self.heard();
            let mut notices = heard.notices.iter();
            if let Some(notice) = notices.find(|notice| i64::from(notice.nsm_state) > state) {
                return Ok(notice.clone());
            }
            if Instant::now() > deadline {
                bail!("no notice of a state above {state}; came: {heard:?}");
            }
            thread::sleep(POLL);
        }
    }
}

/// Answers a call and writes down what it says.
fn take(host: &Host, call: &Received, nlm_port: u16, heard: &Mutex<Heard>) -> Result<()> {
    let at = Instant::now();
    match (call.program, call.procedure) {
        (program::NSM, nsm::procedure::SM_NOTIFY) => {
            let (name, nsm_state) = call.notified()?;
            call.reply(&[])?;
            held(heard).notices.push(Notice {
                name: String::from_utf8_lossy(&name).into_owned(),
                nsm_state,
                from: call.from,
                at,
            });
            Ok(())
        }
        (program::NLM, nlm::procedure::GRANTED_MSG) => {
            let lock = call.granted()?;
            call.reply(&[])?;
            let cookie = lock.cookie.clone();
            held(heard).grants.push(Grant { lock, at });
            let service = SocketAddr::new(call.from.ip(), nlm_port);
            let own = SocketAddr::new(host.tcp.ip(), 0);
            // If nobody listens just now, the service asks again.
            if let Ok(peer) = Peer::connect_from(Transport::Tcp, own, service) {
                let _ = Nlm::new(peer, Cred::root()).granted_res(&cookie, stat::GRANTED);
            }
            Ok(())
        }
        _ => bail!("an unexpected call: {call:?}"),
    }
}

fn held(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}
