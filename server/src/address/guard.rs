//! Keeps clients from seeing how this process dies, and takes its addresses away when it is
//! stopped.
//!
//! When a process is killed, the kernel closes its connections: clients hear their ends at once,
//! connect anew while nobody listens, and Linux clients then pause for three seconds, which is
//! longer than the takeover takes. So a second, small process has a copy of every connection, which
//! is then not closed with the first; it sees the death, takes the addresses away as if the power
//! had failed, destroys the connections without a word, and ends. It is also told until when the
//! lease of each service holds, and does the same when that is over and the first process, stopped
//! or starved, has not done it: else its kernel would answer for a service that another node has.
//!
//! Nothing else depends on it: if it can't be started or dies, clients wait longer, and the kernel
//! takes the addresses of a stopped process away a second later.
//!
//! [`Guard`] is our side of it, [`run`] the other process. Between them is a pair of sockets:
//!
//! ```text
//!   KEEP, number of a connection, its descriptor    keep a copy
//!   CLOSE, number of a connection                   close the copy: then the peer hears the end
//!   LEASE + place of a service, a moment            its addresses stay until then; 0: it has none
//!   end of file                                     the other process is dead
//! ```
//!
//! With the first number, 0, comes the lock of the state directory: the next life of the server
//! waits until the addresses are gone, so that it never loses them to the guard of the last one.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use super::{AddressError, Floating};
use crate::backend::sys;
use crate::clock::boot_time;
use crate::cluster::lease::Moment;
use crate::config::floating::FloatingConfig;

/// Our end of the way to the other process.
#[derive(Debug)]
pub struct Guard {
    socket: OwnedFd,
    next: AtomicU64,
    /// It was found to be dead.
    is_dead: AtomicBool,
    /// Connections whose end could not be told yet.
    untold: Mutex<Vec<u64>>,
    /// Reaped when this is dropped.
    process: Child,
}

/// A connection of which the other process has a copy, until this is dropped. To be dropped after
/// the connection itself.
#[derive(Debug)]
pub struct Held {
    guard: Arc<Guard>,
    number: u64,
}

impl Guard {
    /// Starts the other process; `lock` is what the next life of this one waits for.
    pub fn start(floating: &[Arc<Floating>], lock: BorrowedFd<'_>) -> io::Result<Arc<Self>> {
        let kind = SocketType::SEQPACKET;
        let (own, other) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("havenfs")
            .arg(COMMAND)
            .stdin(other)
            .stdout(Stdio::null());
        for one in floating {
            command.arg(one.config().to_string());
        }
        // What a terminal sends to stop the server is not meant for it.
        let process = command.process_group(0).spawn()?;
        let guard = Self {
            socket: own,
            next: AtomicU64::new(1),
            is_dead: AtomicBool::new(false),
            untold: Mutex::default(),
            process,
        };
        guard.send(KEEP, 0, Some(lock))?;
        Ok(Arc::new(guard))
    }

    /// Gives a copy of a connection to the other process; none if that can't be done now.
    pub fn hold(self: &Arc<Self>, connection: impl AsFd) -> Option<Held> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self.send(KEEP, number, Some(connection.as_fd())) {
            if error == Errno::PIPE && !self.is_dead.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    "the guard is dead: if this process is killed, clients wait some seconds longer"
                );
            }
            return None;
        }
        Some(Held {
            guard: Arc::clone(self),
            number,
        })
    }

    /// Until when the addresses of a service, by its place, may be here; none if they are not, or
    /// without an end.
    pub(super) fn lease(&self, place: usize, until: Option<Moment>) {
        let until = until.map_or(0, |until| until.0);
        // If it can't be told now, the next renewal tells it; meanwhile it acts too early, which
        // costs connections and no promise.
        let _ = self.send(LEASE + place as u64, until, None);
    }

    fn let_go(&self, number: u64) {
        let mut untold = self.untold();
        untold.push(number);
        // Whoever comes next tells what is left.
        while let Some(number) = untold.last() {
            match self.send(CLOSE, *number, None) {
                Err(Errno::AGAIN) => return,
                // If it is dead, so are its copies.
                Ok(()) | Err(_) => untold.pop(),
            };
        }
    }

    fn send(&self, kind: u64, value: u64, descriptor: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let bytes = [kind.to_ne_bytes(), value.to_ne_bytes()].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, flags).map(drop)
    }

    fn untold(&self) -> MutexGuard<'_, Vec<u64>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guard {
    /// All addresses are gone by now, and the other process finds nothing to do.
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        let _ = self.process.wait();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.guard.let_go(self.number);
    }
}

/// The other process: waits for the death of the first one, with copies of its connections, and
/// then takes these addresses away. `socket` is its end of the pair.
pub fn run(floating: Vec<FloatingConfig>, socket: BorrowedFd<'_>) -> Result<(), AddressError> {
    // Who ends a whole service asks all its processes; this one ends right after the first one.
    sys::ignore_requests_to_end();
    let floating = floating.into_iter().map(|one| Floating::new(one, None));
    let floating: Vec<_> = floating.collect();
    let mut copies = HashMap::new();
    let mut leases = vec![None; floating.len()];
    loop {
        match receive(socket)? {
            // Only who has read all may judge: this process may have been stopped as well, and what
            // it knows be old.
            Received::Nothing => {
                let now = boot_time();
                for (one, lease) in floating.iter().zip(&mut leases) {
                    if lease.take_if(|until| *until <= now).is_some() {
                        // There is nobody who could be told of a failure; the kernel ends what is
                        // left.
                        let _ = one.clean();
                    }
                }
                wait_for(socket, leases.iter().flatten().min().copied())?;
            }
            Received::End => break,
            Received::Message(KEEP, number, Some(copy)) => {
                copies.insert(number, copy);
            }
            Received::Message(CLOSE, number, _) => {
                copies.remove(&number);
            }
            Received::Message(kind, until, _) => {
                let place = usize::try_from(kind.wrapping_sub(LEASE)).unwrap_or(usize::MAX);
                if let Some(lease) = leases.get_mut(place) {
                    *lease = (until > 0).then(|| Moment(until) + PATIENCE);
                }
            }
        }
    }
    let cleaned: Vec<_> = floating.iter().map(Floating::clean).collect();
    // Closed when the connections are destroyed, and with them the lock.
    drop(copies);
    cleaned.into_iter().collect()
}

/// Waits until there is something to receive, or it is that moment.
fn wait_for(socket: BorrowedFd<'_>, until: Option<Moment>) -> Result<(), AddressError> {
    let time_max = until.map(|until| until.since(boot_time()));
    let time_max = time_max.map(|time_max| Timespec {
        tv_sec: time_max.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: time_max.subsec_nanos().into(),
    });
    let mut ready = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    match poll(&mut ready, time_max.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(failed(error.into())),
    }
}

const fn failed(source: io::Error) -> AddressError {
    AddressError::Guard { source }
}

/// What there is to hear.
enum Received {
    /// Not yet.
    Nothing,
    /// The other end is gone.
    End,
    /// Its kind, what it says, and a descriptor that came with it.
    Message(u64, u64, Option<OwnedFd>),
}

/// The next message. Whatever goes wrong says nothing about the other process, which must not lose
/// its addresses by it.
fn receive(socket: BorrowedFd<'_>) -> Result<Received, AddressError> {
    let mut bytes = [0; 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        match recvmsg(socket, &mut parts, &mut ancillary, flags) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(Received::Nothing),
            received => break received.map_err(|error| failed(error.into()))?,
        }
    };
    if received.bytes == 0 {
        return Ok(Received::End);
    }
    if received.bytes != bytes.len() {
        return Err(failed(io::ErrorKind::InvalidData.into()));
    }
    let [kind, value] = [0, 8].map(|at| {
        let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
        word.map_or(0, u64::from_ne_bytes)
    });
    let copy = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(Received::Message(kind, value, copy))
}

const KEEP: u64 = 0;
const CLOSE: u64 = 1;
/// And above it.
const LEASE: u64 = 2;
/// How long the other process may take to withdraw its addresses itself. Others take over no sooner
/// than 50 ms after the end of a lease.
const PATIENCE: Duration = Duration::from_millis(20);

/// How the binary is told that it is the other process.
const COMMAND: &str = "guard";
