//! Keeps clients from seeing how this process dies.
//!
//! When a process is killed, the kernel closes its connections: clients hear their ends at once,
//! connect anew while nobody listens, and Linux clients then pause for three seconds, which is
//! longer than the takeover takes. So a second, small process has a copy of every connection, which
//! is then not closed with the first; it sees the death, takes the addresses away as if the power
//! had failed, destroys the connections without a word, and ends. Nothing else depends on it: if it
//! can't be started or dies, clients wait longer, and that is all.
//!
//! [`Guard`] is our side of it, [`run`] the other process. Between them is a pair of sockets:
//!
//! ```text
//!   number of a connection, with its descriptor    keep a copy
//!   number of a connection                         close the copy: then the peer hears the end
//!   end of file                                    the other process is dead
//! ```
//!
//! With number 0 comes the lock of the state directory: the next life of the server waits until the
//! addresses are gone, so that it never loses them to the guard of the last one.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use super::{AddressError, Floating};
use crate::backend::sys;
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
    process: Mutex<Child>,
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
            process: Mutex::new(process),
        };
        guard.send(0, Some(lock))?;
        Ok(Arc::new(guard))
    }

    /// Gives a copy of a connection to the other process; none if that can't be done now.
    pub fn hold(self: &Arc<Self>, connection: impl AsFd) -> Option<Held> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self.send(number, Some(connection.as_fd())) {
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

    fn let_go(&self, number: u64) {
        let mut untold = self.untold();
        untold.push(number);
        // Whoever comes next tells what is left.
        while let Some(number) = untold.last() {
            match self.send(*number, None) {
                Err(Errno::AGAIN) => return,
                // If it is dead, so are its copies.
                Ok(()) | Err(_) => untold.pop(),
            };
        }
    }

    fn send(&self, number: u64, descriptor: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let bytes = number.to_ne_bytes();
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
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = process.wait();
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
    while let Some((number, copy)) = receive(socket)? {
        match copy {
            Some(copy) => copies.insert(number, copy),
            None => copies.remove(&number),
        };
    }
    let cleaned: Vec<_> = floating.iter().map(Floating::clean).collect();
    // Closed when the connections are destroyed, and with them the lock.
    drop(copies);
    cleaned.into_iter().collect()
}

/// The next message; none when the other end is gone. Whatever else goes wrong says nothing about
/// the other process, which must not lose its addresses by it.
fn receive(socket: BorrowedFd<'_>) -> Result<Option<(u64, Option<OwnedFd>)>, AddressError> {
    let failed = |source| AddressError::Guard { source };
    let mut bytes = [0; 8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            received => break received.map_err(|error| failed(error.into()))?,
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    if received.bytes != bytes.len() {
        return Err(failed(io::ErrorKind::InvalidData.into()));
    }
    let copy = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(Some((u64::from_ne_bytes(bytes), copy)))
}

/// How the binary is told that it is the other process.
const COMMAND: &str = "guard";
