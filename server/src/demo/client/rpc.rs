//! Calls over TCP as a Linux client makes them: one at a time, and never given up lightly.
//!
//! Owns one connection to one program and what becomes of it. A call whose connection ends, or that
//! has no answer for [`ANSWER_WAIT`], is sent again over a new connection with the same transaction
//! id, in short steps so that an outage is measured finely; Linux waits longer in between. Replies
//! are bounded and matched by transaction id.
//!
//! It knows no program. Whether an answer is what was promised is for others to say, except that
//! there has to be one within [`CALL_TIME_MAX`].

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use havenfs::random::random_u64;
use havenfs_rpc::auth::{AUTH_SYS, AuthSys, Gids, OpaqueAuth};
use havenfs_rpc::message::{AcceptStat, Call, Reply, ReplyOutcome};
use havenfs_rpc::record::{self, RecordReader};
use havenfs_rpc::xdr::{Writer, decode_all};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::process::{getegid, geteuid};
use socket2::{Domain, Socket, Type};

use super::super::interrupt;
use super::super::ledger::BrokenPromise;

/// The longest reply: a READ of [`super::nfs::READ_BYTES_MAX`] and its header.
const REPLY_BYTES_MAX: usize = 128 * 1024;
/// How long a call waits for its answer before it is sent again.
const ANSWER_WAIT: Duration = Duration::from_millis(700);
/// How long making a connection may take.
const CONNECT_WAIT: Duration = Duration::from_millis(100);
/// The pause between tries.
const STEP: Duration = Duration::from_millis(10);
/// How long the service may be away.
const CALL_TIME_MAX: Duration = Duration::from_secs(20);
const READ_BYTES: usize = 16 * 1024;

/// Which program of which server is called, and from where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    /// The address that the client calls from: its name to the server.
    pub(crate) source: IpAddr,
    /// The server's address and port.
    pub(crate) server: SocketAddr,
    /// The program.
    pub(crate) program: u32,
    /// Its version.
    pub(crate) version: u32,
}

/// What all connections of a machine share: when it ends, and the other side's ends.
///
/// A kernel answers the end of a connection with its own end at once, also where nobody reads; a
/// server that is about to stop waits for that.
#[derive(Debug, Default)]
pub(crate) struct Machine {
    quit: AtomicBool,
    streams: Mutex<Vec<TcpStream>>,
}

impl Machine {
    /// Begins to look after connections, until the machine is dropped or ends.
    pub(crate) fn start() -> Arc<Self> {
        let machine = Arc::new(Self::default());
        let weak = Arc::downgrade(&machine);
        // Holds nothing that has to be waited for.
        thread::spawn(move || {
            while let Some(machine) = weak.upgrade().filter(|machine| !machine.has_ended()) {
                machine.close_ended();
                drop(machine);
                thread::sleep(STEP);
            }
        });
        machine
    }

    /// Ends all calls that are under way.
    pub(crate) fn end(&self) {
        self.quit.store(true, Ordering::SeqCst);
    }

    /// Whether it is to end.
    pub(crate) fn has_ended(&self) -> bool {
        self.quit.load(Ordering::SeqCst)
    }

    /// Closes all connections, as unmounting does.
    pub(crate) fn close_all(&self) {
        for stream in self.streams().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn close_ended(&self) {
        self.streams().retain(|stream| {
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            let is_open = match recv(stream, &mut [0_u8][..], flags) {
                Ok((count, _)) => count > 0,
                Err(errno) => matches!(errno, Errno::AGAIN | Errno::INTR),
            };
            if !is_open {
                let _ = stream.shutdown(Shutdown::Both);
            }
            is_open
        });
    }

    fn streams(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client of one program.
#[derive(Debug)]
pub(crate) struct RpcClient {
    target: Target,
    xid: u32,
    connection: Option<Connection>,
    resends: u32,
    machine: Arc<Machine>,
}

impl RpcClient {
    /// Makes a client that connects when it is used, and gives up when its machine ends.
    pub(crate) fn new(target: Target, machine: &Arc<Machine>) -> Self {
        Self {
            target,
            machine: Arc::clone(machine),
            xid: random_u64() as u32,
            connection: None,
            resends: 0,
        }
    }

    /// How often a call was sent again.
    pub(crate) const fn resends(&self) -> u32 {
        self.resends
    }

    /// Makes a call and returns its results, however long the service is away, up to a limit.
    ///
    /// # Errors
    /// [`BrokenPromise`] if nobody answers within [`CALL_TIME_MAX`]; another error if the call is
    /// refused as such.
    pub(crate) fn call(&mut self, procedure: u32, args: &[u8]) -> Result<Vec<u8>> {
        self.xid = self.xid.wrapping_add(1);
        let xid = self.xid;
        let message = encode(&self.target, xid, procedure, args);
        let deadline = Instant::now() + CALL_TIME_MAX;
        loop {
            interrupt::check()?;
            if self.machine.has_ended() {
                return Err(interrupt::Interrupted.into());
            }
            let lost = match self.exchange(xid, &message) {
                Ok(reply) => return results(&reply),
                Err(lost) => lost,
            };
            self.connection = None;
            self.resends += 1;
            if Instant::now() > deadline {
                let Target { server, .. } = self.target;
                let seconds = CALL_TIME_MAX.as_secs();
                let text = format!("nobody answers on {server} for {seconds} s ({lost})");
                return Err(BrokenPromise(text).into());
            }
            interrupt::sleep(STEP)?;
        }
    }

    fn exchange(&mut self, xid: u32, message: &[u8]) -> io::Result<Vec<u8>> {
        let mut connection = if let Some(connection) = self.connection.take() {
            connection
        } else {
            let connection = Connection::open(self.target)?;
            self.machine.streams().push(connection.stream.try_clone()?);
            connection
        };
        connection.send(message)?;
        let reply = connection.receive(xid, Instant::now() + ANSWER_WAIT)?;
        self.connection = Some(connection);
        Ok(reply)
    }
}

/// One connection, for those who want to see what becomes of it.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    reader: RecordReader,
}

impl Connection {
    /// Connects from the client's own address.
    pub(crate) fn open(target: Target) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(target.server), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(target.source, 0).into())?;
        socket.connect_timeout(&target.server.into(), CONNECT_WAIT)?;
        socket.set_tcp_nodelay(true)?;
        // A stopped server reads nothing; a call must not wait for it here either.
        socket.set_write_timeout(Some(ANSWER_WAIT))?;
        Ok(Self {
            stream: socket.into(),
            reader: RecordReader::new(REPLY_BYTES_MAX),
        })
    }

    /// Sends a message as one record.
    pub(crate) fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let mut out = Vec::with_capacity(record::MARK_BYTES + message.len());
        let start = record::begin_record(&mut out);
        out.extend_from_slice(message);
        record::end_record(&mut out, start);
        self.stream.write_all(&out)
    }

    /// Waits for the reply with this transaction id; others are late ones, and are dropped.
    ///
    /// # Errors
    /// `TimedOut` if there is none in time; anything else says that the connection has ended.
    pub(crate) fn receive(&mut self, xid: u32, deadline: Instant) -> io::Result<Vec<u8>> {
        loop {
            let too_long = |_| io::Error::new(ErrorKind::InvalidData, "a reply is too long");
            while let Some(reply) = self.reader.next_record().map_err(too_long)? {
                if reply.first_chunk() == Some(&xid.to_be_bytes()) {
                    return Ok(reply.into_owned());
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(ErrorKind::TimedOut, "no answer"));
            }
            self.stream.set_read_timeout(Some(left))?;
            let (buffer, bytes_max) = self.reader.space();
            let mut piece = [0; READ_BYTES];
            let room = piece
                .get_mut(..bytes_max.min(READ_BYTES))
                .unwrap_or_default();
            match self.stream.read(room) {
                Ok(0) => return Err(io::Error::new(ErrorKind::UnexpectedEof, "closed")),
                Ok(count) => buffer.extend_from_slice(room.get(..count).unwrap_or_default()),
                // The time is looked at above.
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The machine may have a copy of the stream, which would keep it open.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Whether a read only ran out of time.
pub(crate) fn is_timeout(error: &io::Error) -> bool {
    use ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
}

/// A call of the user that runs the demo.
pub(crate) fn encode(target: &Target, xid: u32, procedure: u32, args: &[u8]) -> Vec<u8> {
    let credential = AuthSys {
        stamp: 0,
        machine_name: b"havenfs-demo",
        uid: geteuid().as_raw(),
        gid: getegid().as_raw(),
        gids: Gids::default(),
    };
    let mut body = Vec::new();
    credential.encode(&mut Writer::new(&mut body));
    let call = Call {
        xid,
        program: target.program,
        version: target.version,
        procedure,
        cred: OpaqueAuth {
            flavor: AUTH_SYS,
            body: &body,
        },
        verf: OpaqueAuth::NONE,
        args,
    };
    let mut message = Vec::new();
    call.encode(&mut Writer::new(&mut message));
    message
}

/// Encodes arguments.
pub(crate) fn args(write: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut Writer::new(&mut out));
    out
}

fn results(reply: &[u8]) -> Result<Vec<u8>> {
    let reply: Reply<'_> = decode_all(reply).context("the server sends no proper reply")?;
    match reply.outcome {
        ReplyOutcome::Accepted(AcceptStat::Success) => Ok(reply.results.to_owned()),
        outcome => bail!("the server refuses a call: {outcome:?}"),
    }
}
