//! What a client's machine serves: a portmapper, and a lock manager and a status monitor for the
//! calls that the service makes.
//!
//! Owns the sockets, over UDP and TCP, and one thread for each socket and connection, and ends them
//! when it is dropped. Answers GETPORT, GRANTED and GRANTED_MSG, and SM_NOTIFY; a notice of a
//! restart is believed if it comes from the service's own address, and has the locks reclaimed.
//! What a grant means is for [`Locks`] to say.
//!
//! Limits: a record of [`RECORD_BYTES_MAX`], [`CONNECTIONS_MAX`] connections, [`JOBS_MAX`] jobs.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use havenfs_nlm::wire::{Nlm4Res, Nlm4Stats, Nlm4TestArgs, procedure as nlm};
use havenfs_nsm::wire::{StatChge, procedure as nsm};
use havenfs_rpc::message::{AcceptStat, Call, reply_accepted};
use havenfs_rpc::portmap::{Mapping, Protocol, VERSION_2, procedure as portmap};
use havenfs_rpc::program;
use havenfs_rpc::record::{self, RecordReader};
use havenfs_rpc::xdr::{Writer, decode_all};

use super::super::interrupt::Interrupted;
use super::super::ledger::{Ledger, Lock};
use super::nlm::Locks;
use super::rpc::{Machine, RpcClient, args, is_timeout};

const RECORD_BYTES_MAX: usize = 8 * 1024;
const CONNECTIONS_MAX: usize = 32;
const JOBS_MAX: usize = 64;
/// How soon a worker notices that its host is gone.
const LOOK: Duration = Duration::from_millis(20);

/// A notice of a restart that was received.
#[derive(Debug, Clone)]
pub(crate) struct Notice {
    /// The name under which the service told it.
    pub(crate) name: String,
    /// The service's new NSM state.
    pub(crate) nsm_state: i32,
    /// Where it came from.
    pub(crate) from: IpAddr,
    /// When.
    pub(crate) at: Instant,
}

/// What became of reclaiming after one notice.
#[derive(Debug, Clone)]
pub(crate) struct Reclaimed {
    /// The service's NSM state that was told.
    pub(crate) nsm_state: i32,
    /// Each lock and the answer.
    pub(crate) answers: Vec<(Lock, Nlm4Stats)>,
    /// When all were answered.
    pub(crate) at: Instant,
}

/// A machine that listens.
#[derive(Debug)]
pub(crate) struct Host {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Where a thread waits that has to be woken to notice its end.
    udp: Vec<SocketAddr>,
    tcp: Vec<SocketAddr>,
}

#[derive(Debug)]
struct Shared {
    machine: Arc<Machine>,
    service: IpAddr,
    locks: Arc<Locks>,
    ledger: Arc<Ledger>,
    udp_port: u16,
    tcp_port: u16,
    notices: Mutex<Vec<Notice>>,
    reclaimed: Mutex<Vec<Reclaimed>>,
    reclaims: SyncSender<i32>,
    results: SyncSender<Vec<u8>>,
    connections: Mutex<Vec<(TcpStream, JoinHandle<()>)>>,
}

/// Where a machine is, and whom it talks to.
#[derive(Debug)]
pub(crate) struct Place {
    /// Its portmapper.
    pub(crate) portmap: SocketAddr,
    /// The address that notices are believed from.
    pub(crate) service: IpAddr,
}

impl Host {
    /// Starts to listen. `results` sends the answers to GRANTED_MSG, which are calls.
    pub(crate) fn start(
        place: &Place,
        locks: Arc<Locks>,
        ledger: Arc<Ledger>,
        results: RpcClient,
        machine: &Arc<Machine>,
    ) -> Result<Self> {
        let any = SocketAddr::new(place.portmap.ip(), 0);
        let fail = "a client cannot listen on its loopback address";
        let (udp, tcp) = bind(any).context(fail)?;
        let (portmap_udp, portmap_tcp) = bind(place.portmap).context(fail)?;
        let (reclaims, reclaims_wanted) = sync_channel(JOBS_MAX);
        let (results_out, results_wanted) = sync_channel(JOBS_MAX);
        let shared = Arc::new(Shared {
            machine: Arc::clone(machine),
            service: place.service,
            locks,
            ledger,
            udp_port: udp.local_addr()?.port(),
            tcp_port: tcp.local_addr()?.port(),
            notices: Mutex::default(),
            reclaimed: Mutex::default(),
            reclaims,
            results: results_out,
            connections: Mutex::default(),
        });
        let mut host = Self {
            shared: Arc::clone(&shared),
            threads: Vec::new(),
            udp: vec![udp.local_addr()?, portmap_udp.local_addr()?],
            tcp: vec![tcp.local_addr()?, portmap_tcp.local_addr()?],
        };
        for socket in [udp, portmap_udp] {
            let shared = Arc::clone(&shared);
            host.threads
                .push(thread::spawn(move || shared.receive(&socket)));
        }
        for listener in [tcp, portmap_tcp] {
            let shared = Arc::clone(&shared);
            host.threads
                .push(thread::spawn(move || accept(&shared, &listener)));
        }
        let reclaiming = Arc::clone(&shared);
        host.threads
            .push(thread::spawn(move || reclaiming.reclaim(&reclaims_wanted)));
        host.threads.push(thread::spawn(move || {
            shared.send_results(results, &results_wanted);
        }));
        Ok(host)
    }

    /// The notices of restarts so far, in order.
    pub(crate) fn notices(&self) -> Vec<Notice> {
        held(&self.shared.notices).clone()
    }

    /// What became of reclaiming so far, in order.
    pub(crate) fn reclaimed(&self) -> Vec<Reclaimed> {
        held(&self.shared.reclaimed).clone()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.shared.machine.end();
        for address in &self.tcp {
            let _ = TcpStream::connect(address);
        }
        for address in &self.udp {
            let from = SocketAddr::new(address.ip(), 0);
            let _ = UdpSocket::bind(from).and_then(|socket| socket.send_to(&[], address));
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        let connections = std::mem::take(&mut *held(&self.shared.connections));
        for (stream, thread) in connections {
            let _ = stream.shutdown(Shutdown::Both);
            let _ = thread.join();
        }
    }
}

fn bind(address: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let udp = UdpSocket::bind(address)?;
    Ok((udp, TcpListener::bind(address)?))
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    for stream in listener.incoming() {
        if shared.has_quit() {
            return;
        }
        let Ok(stream) = stream else { continue };
        let mut connections = held(&shared.connections);
        connections.retain(|(_, thread)| !thread.is_finished());
        let Ok(copy) = stream.try_clone() else {
            continue;
        };
        // Above the limit the connection is dropped, which closes it.
        if connections.len() < CONNECTIONS_MAX {
            let shared = Arc::clone(shared);
            // An end with an error is an end.
            let serve = move || drop(shared.serve(stream));
            connections.push((copy, thread::spawn(serve)));
        }
    }
}

impl Shared {
    fn has_quit(&self) -> bool {
        self.machine.has_ended()
    }

    fn receive(&self, socket: &UdpSocket) {
        let mut buffer = [0; RECORD_BYTES_MAX];
        while !self.has_quit() {
            let Ok((count, from)) = socket.recv_from(&mut buffer) else {
                continue;
            };
            let message = buffer.get(..count).unwrap_or_default();
            if let Some(reply) = self.answer(message, from.ip()) {
                // A lost reply is asked for again.
                let _ = socket.send_to(&reply, from);
            }
        }
    }

    fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let from = stream.peer_addr()?.ip();
        let mut reader = RecordReader::new(RECORD_BYTES_MAX);
        let mut piece = [0; RECORD_BYTES_MAX];
        while !self.has_quit() {
            let too_long = |_| io::Error::from(io::ErrorKind::InvalidData);
            while let Some(message) = reader.next_record().map_err(too_long)? {
                if let Some(reply) = self.answer(&message, from) {
                    let mut out = Vec::new();
                    let start = record::begin_record(&mut out);
                    out.extend_from_slice(&reply);
                    record::end_record(&mut out, start);
                    stream.write_all(&out)?;
                }
            }
            let (buffer, bytes_max) = reader.space();
            let room = bytes_max.min(RECORD_BYTES_MAX);
            let room = piece.get_mut(..room).unwrap_or_default();
            match stream.read(room) {
                Ok(0) => return Ok(()),
                Ok(count) => buffer.extend_from_slice(room.get(..count).unwrap_or_default()),
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The reply to a call, or none to what is no call.
    fn answer(&self, message: &[u8], from: IpAddr) -> Option<Vec<u8>> {
        let call = Call::decode(message).ok()?;
        let mut reply = Vec::new();
        let (stat, results) = match self.results_of(&call, from) {
            Ok(results) => (AcceptStat::Success, results),
            Err(stat) => (stat, Vec::new()),
        };
        reply_accepted(&mut Writer::new(&mut reply), call.xid, stat);
        reply.extend_from_slice(&results);
        Some(reply)
    }

    fn results_of(&self, call: &Call<'_>, from: IpAddr) -> Result<Vec<u8>, AcceptStat> {
        let garbage = |_| AcceptStat::GarbageArgs;
        match (call.program, call.version, call.procedure) {
            (program::PORTMAP, VERSION_2, portmap::PMAP_GETPORT) => {
                let mapping: Mapping = decode_all(call.args).map_err(garbage)?;
                Ok(args(|w| w.u32(self.port(&mapping).into())))
            }
            (program::PORTMAP, 3 | 4, _) => Err(AcceptStat::ProgMismatch {
                low: VERSION_2,
                high: VERSION_2,
            }),
            (program::NLM, 4, nlm::GRANTED) => {
                let granted: Nlm4TestArgs<'_> = decode_all(call.args).map_err(garbage)?;
                Ok(args(|w| w.value(&self.granted(&granted))))
            }
            (program::NLM, 4, nlm::GRANTED_MSG) => {
                let granted: Nlm4TestArgs<'_> = decode_all(call.args).map_err(garbage)?;
                // The service tells a grant again whose answer does not come.
                let _ = self
                    .results
                    .try_send(args(|w| w.value(&self.granted(&granted))));
                Ok(Vec::new())
            }
            (program::NSM, 1, nsm::SM_NOTIFY) => {
                let change: StatChge<'_> = decode_all(call.args).map_err(garbage)?;
                self.noticed(&change, from);
                Ok(Vec::new())
            }
            (program::PORTMAP, VERSION_2, 0) | (program::NLM, 4, 0) | (program::NSM, 1, 0) => {
                Ok(Vec::new())
            }
            (program::PORTMAP | program::NLM | program::NSM, ..) => Err(AcceptStat::ProcUnavail),
            _ => Err(AcceptStat::ProgUnavail),
        }
    }

    /// The port of a program here; 0 if it is not served.
    fn port(&self, mapping: &Mapping) -> u16 {
        let served = [(program::NLM, 4), (program::NSM, 1)];
        let asked = (mapping.program, mapping.version);
        match Protocol::from_number(mapping.protocol) {
            Some(Protocol::Tcp) if served.contains(&asked) => self.tcp_port,
            Some(Protocol::Udp) if served.contains(&asked) => self.udp_port,
            _ => 0,
        }
    }

    fn granted<'a>(&self, granted: &Nlm4TestArgs<'a>) -> Nlm4Res<'a> {
        Nlm4Res {
            cookie: granted.cookie,
            stat: self.locks.granted(granted),
        }
    }

    fn noticed(&self, change: &StatChge<'_>, from: IpAddr) {
        let mut notices = held(&self.notices);
        let name = String::from_utf8_lossy(change.mon_name).into_owned();
        let is_new = from == self.service
            && notices
                .iter()
                .all(|notice| notice.nsm_state != change.state);
        notices.push(Notice {
            name,
            nsm_state: change.state,
            from,
            at: Instant::now(),
        });
        if is_new {
            // Full only if the service was restarted so many times in a second.
            let _ = self.reclaims.try_send(change.state);
        }
    }

    fn reclaim(&self, wanted: &Receiver<i32>) {
        while let Some(nsm_state) = self.next(wanted) {
            match self.locks.reclaim() {
                Ok(answers) => {
                    for (lock, stat) in &answers {
                        if *stat != Nlm4Stats::Granted {
                            let text = format!("reclaiming {lock} is answered {stat:?}");
                            self.ledger.broken(text);
                        }
                    }
                    held(&self.reclaimed).push(Reclaimed {
                        nsm_state,
                        answers,
                        at: Instant::now(),
                    });
                }
                Err(error) if error.is::<Interrupted>() => return,
                Err(error) => self
                    .ledger
                    .broken(format!("locks cannot be reclaimed: {error:#}")),
            }
        }
    }

    fn send_results(&self, mut rpc: RpcClient, wanted: &Receiver<Vec<u8>>) {
        while let Some(result) = self.next(wanted) {
            // It comes again if it was lost.
            let _ = rpc.call(nlm::GRANTED_RES, &result);
        }
    }

    /// The next job, or none if this host is to end.
    fn next<T>(&self, jobs: &Receiver<T>) -> Option<T> {
        loop {
            match jobs.recv_timeout(LOOK) {
                _ if self.has_quit() => return None,
                Ok(job) => return Some(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
