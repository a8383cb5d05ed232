//! The machines that hold locks, as far as they hear of a restart: each has an address of its own,
//! where one socket answers for its portmapper and its status monitor.

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use havenfs_rpc::program::{NSM, PORTMAP, PORTMAP_PORT};
use rustix::event::epoll;

use crate::scale;
use crate::session::ACCEPTED;

/// The machines. Dropping it ends their thread.
#[derive(Debug)]
pub(crate) struct Hosts {
    told: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    count: usize,
}

impl Hosts {
    /// Opens a socket for each.
    pub(crate) fn start(count: usize) -> anyhow::Result<Self> {
        let (told, stop) = (Arc::default(), Arc::default());
        let sockets: Vec<UdpSocket> = (0..count)
            .map(|host| {
                let address = SocketAddr::new(scale::address(host), PORTMAP_PORT);
                let socket = UdpSocket::bind(address).context("open a host's socket")?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            })
            .collect::<anyhow::Result<_>>()?;
        let listening = listen(sockets, Arc::clone(&told), Arc::clone(&stop));
        Ok(Self {
            told,
            stop,
            thread: Some(std::thread::spawn(listening)),
            count,
        })
    }

    /// Waits until all have heard of a restart since the last call of this, counted from `began`.
    pub(crate) fn wait_for_all(
        &self,
        began: Instant,
        time_max: Duration,
    ) -> anyhow::Result<Duration> {
        loop {
            let told = self.told.load(Ordering::Acquire);
            if told == self.count {
                let took = began.elapsed();
                self.told.store(FORGET, Ordering::Release);
                return Ok(took);
            }
            ensure!(
                began.elapsed() < time_max,
                "{told} of {} hosts heard of the restart in time",
                self.count
            );
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // What it says is of no use any more.
            let _ = thread.join();
        }
    }
}

/// Answers GETPORT with the port of this very socket, and SM_NOTIFY with nothing, and counts the
/// hosts that were told.
fn listen(
    sockets: Vec<UdpSocket>,
    told: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
) -> impl FnOnce() -> anyhow::Result<()> {
    move || {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (host, socket) in (0_u64..).zip(&sockets) {
            let data = epoll::EventData::new_u64(host);
            epoll::add(&epoll, socket, data, epoll::EventFlags::IN)?;
        }
        let mut heard = BTreeSet::new();
        let mut events = Vec::with_capacity(EVENTS);
        let timeout = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 10_000_000,
        };
        while !stop.load(Ordering::Acquire) {
            events.clear();
            epoll::wait(
                &epoll,
                rustix::buffer::spare_capacity(&mut events),
                Some(&timeout),
            )?;
            if told.load(Ordering::Acquire) == FORGET {
                heard.clear();
                told.store(0, Ordering::Release);
            }
            for event in &events {
                let host = event.data.u64();
                let Some(socket) = sockets.get(host as usize) else {
                    continue;
                };
                let mut call = [0; 2048];
                while let Ok((len, from)) = socket.recv_from(&mut call) {
                    let Some((answer, is_notice)) = answer(&call[..len]) else {
                        continue;
                    };
                    // It asks again if this is lost.
                    let _ = socket.send_to(&answer, from);
                    if is_notice && heard.insert(host) {
                        told.fetch_add(1, Ordering::AcqRel);
                    }
                }
            }
        }
        Ok(())
    }
}

/// The reply to a call, and whether it was a notice.
fn answer(call: &[u8]) -> Option<(Vec<u8>, bool)> {
    let word = |place: usize| {
        let bytes = call.get(place * 4..place * 4 + 4)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    };
    let mut reply = call.get(..4)?.to_vec();
    reply.extend(ACCEPTED);
    match (word(3)?, word(5)?) {
        (PORTMAP, GETPORT) => {
            reply.extend(u32::from(PORTMAP_PORT).to_be_bytes());
            Some((reply, false))
        }
        (NSM, SM_NOTIFY) => Some((reply, true)),
        _ => None,
    }
}

const GETPORT: u32 = 3;
const SM_NOTIFY: u32 = 6;
/// The count is to begin anew.
const FORGET: usize = usize::MAX;
const EVENTS: usize = 256;
const POLL: Duration = Duration::from_millis(5);
