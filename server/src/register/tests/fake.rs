//! An rpcbind made of our own portmapper, and a server that answers NULL.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::ops::RangeInclusive;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use havenfs_rpc::auth::Credential;
use havenfs_rpc::message::{AcceptStat, Call, reply_accepted};
use havenfs_rpc::record::{self, RecordReader};
use havenfs_rpc::xdr::Writer;

use super::{PortTable, program};
use crate::call::{Mode, Origin, Request, Transport};
use crate::programs::portmap;

/// An rpcbind on a TCP port and a local socket; its threads end with the process.
pub(super) struct FakeRpcbind {
    port: u16,
    dir: tempfile::TempDir,
    table: Arc<Mutex<Arc<PortTable>>>,
}

impl FakeRpcbind {
    /// Takes changes through its local socket only, as rpcbind does by default.
    pub(super) fn start(versions: RangeInclusive<u32>) -> Self {
        Self::start_with(0, versions, false)
    }

    /// Serves on the portmapper's own port, for programs that know no other.
    pub(super) fn start_on_port_111() -> Self {
        Self::start_with(program::PORTMAP_PORT, 2..=4, false)
    }

    /// Takes changes from loopback and a reserved port as well.
    pub(super) fn trusting_loopback(versions: RangeInclusive<u32>) -> Self {
        Self::start_with(0, versions, true)
    }

    fn start_with(port: u16, versions: RangeInclusive<u32>, trusting_loopback: bool) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixListener::bind(dir.path().join("socket")).unwrap();
        let table = Arc::new(Mutex::new(Arc::new(PortTable::new([]))));
        let (tables, range) = (Arc::clone(&table), versions.clone());
        thread::spawn(move || {
            for stream in listener.incoming().map(Result::unwrap) {
                let peer_port = if trusting_loopback {
                    stream.peer_addr().unwrap().port()
                } else {
                    40_000
                };
                let (tables, range) = (Arc::clone(&tables), range.clone());
                thread::spawn(move || answer_stream(stream, &tables, &range, peer_port));
            }
        });
        let tables = Arc::clone(&table);
        thread::spawn(move || {
            for stream in socket.incoming().map(Result::unwrap) {
                let (tables, range) = (Arc::clone(&tables), versions.clone());
                thread::spawn(move || answer_stream(stream, &tables, &range, 1));
            }
        });
        Self { port, dir, table }
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    pub(super) fn sockets(&self) -> Vec<PathBuf> {
        vec![
            self.dir.path().join("absent"),
            self.dir.path().join("socket"),
        ]
    }

    pub(super) fn table(&self) -> Arc<PortTable> {
        Arc::clone(&self.table.lock().unwrap())
    }

    /// Forgets everything, as a restart does.
    pub(super) fn replace_table(&self) {
        *self.table.lock().unwrap() = Arc::new(PortTable::new([]));
    }
}

fn answer_stream(
    stream: impl Read + Write,
    tables: &Mutex<Arc<PortTable>>,
    versions: &RangeInclusive<u32>,
    peer_port: u16,
) {
    let peer = (Ipv4Addr::LOCALHOST, peer_port).into();
    let local = (Ipv4Addr::LOCALHOST, 111).into();
    let origin = Origin::new(peer, local, Transport::Tcp);
    answer_calls(stream, |call, writer| {
        if !versions.contains(&call.version) {
            let (low, high) = (*versions.start(), *versions.end());
            reply_accepted(writer, call.xid, AcceptStat::ProgMismatch { low, high });
            return;
        }
        let table = Arc::clone(&tables.lock().unwrap());
        let request = Request {
            origin: &origin,
            mode: Mode::Inline,
            xid: call.xid,
            version: call.version,
            procedure: call.procedure,
            credential: Credential::None,
            args: call.args,
        };
        reply_accepted(writer, call.xid, AcceptStat::Success);
        if call.procedure == 0 {
            return;
        }
        portmap::serve(&table, &request, writer).unwrap();
    });
}

/// A server of one program whose every call succeeds without results.
pub(super) struct FakeServer {
    port: u16,
}

impl FakeServer {
    pub(super) fn start(program: u32) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for stream in listener.incoming().map(Result::unwrap) {
                answer_calls(stream, |call, writer| {
                    let served = call.program == program && program != program::PORTMAP;
                    let stat = if served {
                        AcceptStat::Success
                    } else {
                        AcceptStat::ProgUnavail
                    };
                    reply_accepted(writer, call.xid, stat);
                });
            }
        });
        Self { port }
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }
}

fn answer_calls(mut stream: impl Read + Write, answer: impl Fn(&Call<'_>, &mut Writer<'_>)) {
    let mut reader = RecordReader::new(10_000);
    loop {
        while let Some(message) = reader.next_record().unwrap() {
            let mut out = Vec::new();
            let start = record::begin_record(&mut out);
            answer(&Call::decode(&message).unwrap(), &mut Writer::new(&mut out));
            record::end_record(&mut out, start);
            if stream.write_all(&out).is_err() {
                return;
            }
        }
        let mut bytes = [0; 4096];
        match stream.read(&mut bytes) {
            Ok(0) | Err(_) => return,
            Ok(len) => {
                let (buffer, free) = reader.space();
                assert!(len <= free);
                buffer.extend_from_slice(&bytes[..len]);
            }
        }
    }
}

/// A port on which nothing listens.
pub(super) fn dead_port() -> u16 {
    // It stays bound, and so nobody else gets it, but a socket that does not listen refuses.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let any_port = std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    socket.bind(&any_port.into()).unwrap();
    let port = socket.local_addr().unwrap().as_socket().unwrap().port();
    std::mem::forget(socket);
    port
}
