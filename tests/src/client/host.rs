//! What a client's machine serves: a lock manager, a status monitor and a portmapper, so that a
//! test receives what the server sends on its own.
//!
//! A [`Host`] has an address of its own on loopback (127.x.y.z; the kernel has them all). Its
//! portmapper answers lookups by itself, from a list that the test may change; it listens on port
//! 111 for a server that asks there, which needs root, or on any other port. All other calls go to
//! the test, which answers a [`Received`] or lets it be: a call that is dropped is never answered.
//! Only NULL is answered by itself.
//!
//! Owns its threads, one for each socket and connection, and ends them when it is dropped. Calls
//! wait in a queue of [`CALLS_MAX`]; a test that takes none for so long has lost its way.

use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use havenfs_rpc::message::{AcceptStat, reply_accepted};
use havenfs_rpc::program;
use havenfs_rpc::xdr::Writer;
use onc_rpc::RpcMessage;
use socket2::{Domain, Protocol, Socket, Type};

use super::nlm::{self, Lock, Tested};
use super::nsm;
use super::peer::{ANSWER_TIME_MAX, Peer, Transport};
use super::rpc;

mod portmapper;

use portmapper::Portmapper;
pub use portmapper::{Lookup, Lookups};

/// How many calls wait for the test.
const CALLS_MAX: usize = 1024;
/// How soon a thread notices that its host is gone.
const LOOK_UP: Duration = Duration::from_millis(50);

/// A machine that serves NLM and NSM on UDP and TCP.
#[derive(Debug)]
pub struct Host {
    /// Where the portmapper listens, over both transports.
    pub portmap: SocketAddr,
    /// Where NLM and NSM listen over UDP.
    pub udp: SocketAddr,
    /// Where NLM and NSM listen over TCP.
    pub tcp: SocketAddr,
    calls: Receiver<Result<Received>>,
    shared: Arc<Shared>,
    listeners: Vec<JoinHandle<()>>,
}

/// What the threads share with the host.
#[derive(Debug)]
struct Shared {
    gone: AtomicBool,
    calls: SyncSender<Result<Received>>,
    portmapper: Mutex<Portmapper>,
    connections: Mutex<Vec<(TcpStream, JoinHandle<()>)>>,
}

impl Host {
    /// Starts a machine at `address` with its portmapper on port 111, which needs root.
    pub fn start(address: IpAddr) -> Result<Self> {
        Self::start_at(SocketAddr::new(address, program::PORTMAP_PORT))
    }

    /// Starts a machine whose portmapper listens at `portmap`; port 0 is any.
    pub fn start_at(portmap: SocketAddr) -> Result<Self> {
        let service = SocketAddr::new(portmap.ip(), 0);
        let (udp, tcp) = (bind_udp(service)?, bind_tcp(service)?);
        let (portmap_tcp, portmap_udp) = pair(portmap)?;
        let (sender, calls) = sync_channel(CALLS_MAX);
        let (udp_at, tcp_at) = (udp.local_addr()?, tcp.local_addr()?);
        let shared = Arc::new(Shared {
            gone: AtomicBool::new(false),
            calls: sender,
            portmapper: Mutex::new(Portmapper::new(portmap.ip(), udp_at.port(), tcp_at.port())),
            connections: Mutex::new(Vec::new()),
        });
        let mut host = Self {
            portmap: portmap_tcp.local_addr()?,
            udp: udp_at,
            tcp: tcp_at,
            calls,
            shared,
            listeners: Vec::new(),
        };
        for socket in [udp, portmap_udp] {
            let shared = Arc::clone(&host.shared);
            host.listeners
                .push(thread::spawn(move || shared.receive(&Arc::new(socket))));
        }
        for listener in [tcp, portmap_tcp] {
            let shared = Arc::clone(&host.shared);
            host.listeners
                .push(thread::spawn(move || shared.accept(&listener)));
        }
        Ok(host)
    }

    /// Changes how the portmapper takes lookups.
    pub fn set_lookups(&self, lookups: Lookups) {
        self.shared.portmapper().lookups = lookups;
    }

    /// Takes a program out of the portmapper's list.
    pub fn unregister(&self, program: u32) {
        self.shared.portmapper().unregister(program);
    }

    /// Puts an entry into the portmapper's list; an earlier one of the same kind goes.
    pub fn register(&self, program: u32, version: u32, protocol: u32, port: u16) {
        let mut portmapper = self.shared.portmapper();
        portmapper.register(program, version, protocol, port);
    }

    /// The lookups so far.
    pub fn lookups(&self) -> Vec<Lookup> {
        self.shared.portmapper().seen.clone()
    }

    /// Waits for the next call. A message that is no proper call is an error.
    pub fn next_call(&self) -> Result<Received> {
        self.next_call_within(ANSWER_TIME_MAX)?
            .context("the server sends nothing")
    }

    /// Waits for the next call, but not for long: `None` if there is none in time.
    pub fn next_call_within(&self, limit: Duration) -> Result<Option<Received>> {
        match self.calls.recv_timeout(limit) {
            Ok(received) => received.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the host has no threads"),
        }
    }

    /// Waits for a call of this procedure and drops all others, repetitions of earlier calls for
    /// instance.
    pub fn next_call_of(&self, program: u32, procedure: u32) -> Result<Received> {
        let deadline = Instant::now() + ANSWER_TIME_MAX;
        let mut others = Vec::new();
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match self.next_call_within(left)? {
                Some(call) if (call.program, call.procedure) == (program, procedure) => {
                    return Ok(call);
                }
                Some(other) => others.push((other.program, other.procedure)),
                None => break,
            }
        }
        bail!("no call of {program}, procedure {procedure}; others: {others:?}")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.shared.gone.store(true, Ordering::Relaxed);
        for listener in self.listeners.drain(..) {
            let _ = listener.join();
        }
        let connections: Vec<_> = self.shared.connections().drain(..).collect();
        for (stream, thread) in connections {
            let _ = stream.shutdown(Shutdown::Both);
            let _ = thread.join();
        }
    }
}

/// A call that the server made.
#[derive(Debug)]
pub struct Received {
    /// The address and port that it came from.
    pub from: SocketAddr,
    /// What it came over.
    pub transport: Transport,
    /// Its transaction id.
    pub xid: u32,
    /// Its program.
    pub program: u32,
    /// Its version.
    pub version: u32,
    /// Its procedure.
    pub procedure: u32,
    /// The flavor of its credential.
    pub flavor: u32,
    /// Its arguments.
    pub args: Vec<u8>,
    way_back: WayBack,
}

/// How a call is answered.
#[derive(Debug, Clone)]
enum WayBack {
    Udp(Arc<UdpSocket>, SocketAddr),
    Tcp(Arc<Mutex<Peer>>),
}

impl WayBack {
    fn send(&self, message: &[u8]) -> Result<()> {
        match self {
            Self::Udp(socket, to) => {
                socket.send_to(message, to)?;
                Ok(())
            }
            Self::Tcp(peer) => held(peer).send(message),
        }
    }
}

impl Received {
    /// Reads a call with the crate `onc-rpc`; one that it can't read comes from a broken server.
    fn open(message: &[u8], from: SocketAddr, way_back: WayBack) -> Result<Self> {
        let record = rpc::record(message);
        let call = RpcMessage::<&[u8], &[u8]>::try_from(record.as_slice())
            .map_err(|error| anyhow!("no RPC message: {error}: {message:02x?}"))?;
        let body = call.call_body().context("a reply instead of a call")?;
        ensure!(body.auth_verifier().id() == 0, "verifier of a call");
        Ok(Self {
            from,
            transport: match way_back {
                WayBack::Udp(..) => Transport::Udp,
                WayBack::Tcp(_) => Transport::Tcp,
            },
            xid: call.xid(),
            program: body.program(),
            version: body.program_version(),
            procedure: body.procedure(),
            flavor: body.auth_credentials().id(),
            args: body.payload().to_vec(),
            way_back,
        })
    }

    /// Answers SUCCESS with these results; `_MSG` and `_RES` forms and SM_NOTIFY have none.
    pub fn reply(&self, results: &[u8]) -> Result<()> {
        let mut message = Vec::new();
        reply_accepted(
            &mut Writer::new(&mut message),
            self.xid,
            AcceptStat::Success,
        );
        message.extend_from_slice(results);
        self.way_back.send(&message)
    }

    /// Answers that the call was not carried out, PROC_UNAVAIL for instance.
    pub fn refuse(&self, stat: AcceptStat) -> Result<()> {
        let mut message = Vec::new();
        reply_accepted(&mut Writer::new(&mut message), self.xid, stat);
        self.way_back.send(&message)
    }

    /// Reads the lock of GRANTED or GRANTED_MSG.
    pub fn granted(&self) -> Result<Lock> {
        self.is(
            program::NLM,
            &[nlm::procedure::GRANTED, nlm::procedure::GRANTED_MSG],
        )?;
        Lock::granted(self.version, &self.args)
    }

    /// Reads cookie and status of LOCK_RES, CANCEL_RES or UNLOCK_RES.
    pub fn res(&self) -> Result<(Vec<u8>, u32)> {
        use nlm::procedure::{CANCEL_RES, LOCK_RES, UNLOCK_RES};
        self.is(program::NLM, &[LOCK_RES, CANCEL_RES, UNLOCK_RES])?;
        nlm::read_res(&self.args)
    }

    /// Reads cookie and finding of TEST_RES.
    pub fn test_res(&self) -> Result<(Vec<u8>, Tested)> {
        self.is(program::NLM, &[nlm::procedure::TEST_RES])?;
        nlm::read_test_res(self.version, &self.args)
    }

    /// Reads name and state of SM_NOTIFY.
    pub fn notified(&self) -> Result<(Vec<u8>, i32)> {
        self.is(program::NSM, &[nsm::procedure::SM_NOTIFY])?;
        nsm::read_notify(&self.args)
    }

    fn is(&self, program: u32, procedures: &[u32]) -> Result<()> {
        let wanted = self.program == program && procedures.contains(&self.procedure);
        ensure!(wanted, "not {program} {procedures:?} but {self:?}");
        Ok(())
    }
}

impl Shared {
    fn portmapper(&self) -> MutexGuard<'_, Portmapper> {
        held(&self.portmapper)
    }

    fn connections(&self) -> MutexGuard<'_, Vec<(TcpStream, JoinHandle<()>)>> {
        held(&self.connections)
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Serves a UDP socket until the host is gone.
    fn receive(&self, socket: &Arc<UdpSocket>) {
        let mut message = vec![0; 65_536];
        while !self.is_gone() {
            if let Ok((len, from)) = socket.recv_from(&mut message) {
                let way_back = WayBack::Udp(Arc::clone(socket), from);
                self.take(message.get(..len).unwrap_or_default(), from, way_back);
            }
        }
    }

    /// Accepts connections until the host is gone.
    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        while !self.is_gone() {
            if let Ok((stream, from)) = listener.accept()
                && let Err(error) = self.serve(stream, from)
            {
                self.hand_over(Err(error.into()));
            }
        }
    }

    /// Starts a thread that serves a connection until it ends.
    fn serve(self: &Arc<Self>, stream: TcpStream, from: SocketAddr) -> io::Result<()> {
        // The listener's own limit is inherited.
        stream.set_read_timeout(None)?;
        let way_back = WayBack::Tcp(Arc::new(Mutex::new(Peer::Tcp(stream.try_clone()?))));
        let mut peer = Peer::Tcp(stream.try_clone()?);
        let shared = Arc::clone(self);
        let thread = thread::spawn(move || {
            while let Ok(message) = peer.receive() {
                shared.take(&message, from, way_back.clone());
            }
        });
        self.connections().push((stream, thread));
        Ok(())
    }

    /// Answers lookups and NULL; hands everything else to the test.
    fn take(&self, message: &[u8], from: SocketAddr, way_back: WayBack) {
        match Received::open(message, from, way_back) {
            Ok(call) if call.program == program::PORTMAP => {
                if let Err(error) = self.portmapper().answer(&call) {
                    self.hand_over(Err(error));
                }
            }
            // An asker that has left meanwhile needs no answer.
            Ok(call) if call.procedure == 0 => drop(call.reply(&[])),
            other => self.hand_over(other),
        }
    }

    /// Puts a call, or what is wrong with one, into the queue of the test.
    fn hand_over(&self, call: Result<Received>) {
        let taken = self.calls.try_send(call);
        assert!(taken.is_ok() || self.is_gone(), "nobody takes the calls");
    }
}

fn bind_udp(at: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(at).with_context(|| format!("cannot bind {at} over UDP"))?;
    socket.set_read_timeout(Some(LOOK_UP))?;
    Ok(socket)
}

fn bind_tcp(at: SocketAddr) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    // It bounds the wait for a connection, too.
    socket.set_read_timeout(Some(LOOK_UP))?;
    socket
        .bind(&at.into())
        .with_context(|| format!("cannot bind {at} over TCP"))?;
    socket.listen(16)?;
    Ok(socket.into())
}

/// Binds the same port over both transports; where any port will do, tries until one does.
fn pair(at: SocketAddr) -> Result<(TcpListener, UdpSocket)> {
    const TRIES: usize = 20;
    let mut last = anyhow!("not tried");
    for _ in 0..TRIES {
        let tcp = bind_tcp(at)?;
        match bind_udp(tcp.local_addr()?) {
            Ok(udp) => return Ok((tcp, udp)),
            Err(error) => last = error,
        }
        if at.port() != 0 {
            break;
        }
    }
    Err(last)
}

/// A lock whose former holder may have panicked: that fails the test by itself.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
