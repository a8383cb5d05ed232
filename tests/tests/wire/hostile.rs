//! A hostile peer: what it sends must cost the server neither its memory nor its other clients.
//!
//! Each test lets a well-behaved client work while it attacks; see [`super::good_client`].

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::nfs::{args, procedure, write_args};
use havenfs_tests::client::rpc::{LAST_FRAGMENT, next_xid, record};
use havenfs_tests::client::{Header, Peer};
use havenfs_tests::server::{Server, V4};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};

use super::good_client::GoodClient;
use super::scene::Scene;

const MIB: usize = 1 << 20;

/// Raises the limit of open files; returns how many connections a test may have.
fn connections_max() -> usize {
    let limit = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit,
            maximum: limit,
        },
    );
    let now = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
    usize::try_from(now).unwrap_or(1024).saturating_sub(100)
}

/// Connects from 127.0.0.`last`, without any time limit of its own.
fn attack(server: &Server, last: u8) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(IpAddr::from([127, 0, 0, last]), 0).into())?;
    socket.connect(&server.nfs_at(V4).into())?;
    Ok(socket.into())
}

/// Whether the server has closed this connection by now.
fn is_closed(stream: &mut TcpStream) -> bool {
    let _ = stream.set_nonblocking(true);
    match stream.read(&mut [0; 1]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    }
}

/// Writes as much as the server takes within `limit`.
fn push(stream: &mut TcpStream, bytes: &[u8], limit: Duration) {
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_write_timeout(Some(limit));
    // Refusing more is the server's right.
    let _ = stream.write_all(bytes);
}

fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds()? {
        ensure!(Instant::now() < deadline, "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn read_call(s: &Scene, fh: &[u8], count: u32) -> Vec<u8> {
    let args = args(|w| {
        w.opaque(fh);
        w.u64(0);
        w.u32(count);
    });
    let header = Header::new(program::NFS, 3, procedure::READ, &s.cred());
    record(&header.message(next_xid(), &args))
}

#[test]
fn idle_connections_by_the_thousand() -> Result<()> {
    let mut s = Scene::new()?;
    let most = connections_max().min(9000);
    let good = GoodClient::start(&mut s)?;
    let idle = s.server.descriptors()?;
    let mut streams = Vec::new();
    // One host beyond its own bound, and three that together exceed the bound of all.
    for number in 0..most {
        let last = if number < most / 2 {
            100
        } else {
            101 + (number % 3) as u8
        };
        streams.push(attack(&s.server, last)?);
    }
    let closed = streams
        .iter_mut()
        .filter_map(|stream| is_closed(stream).then_some(()))
        .count();
    eprintln!("{most} connections, {closed} of them closed at once");
    ensure!(most < 9000 || closed > 0, "no bound on connections");
    drop(streams);
    wait_until("descriptors come back", || {
        Ok(s.server.descriptors()? <= idle + 8)
    })?;
    good.judge(&mut s, "idle connections")
}

#[test]
fn half_records_hold_little_memory() -> Result<()> {
    let mut s = Scene::new()?;
    let good = GoodClient::start(&mut s)?;
    let mut half = (LAST_FRAGMENT | MIB as u32).to_be_bytes().to_vec();
    half.resize(400 * 1024, 7);
    let mut streams = Vec::new();
    for number in 0..1000 {
        let mut stream = attack(&s.server, 100 + (number % 4) as u8)?;
        push(&mut stream, &half, Duration::from_millis(20));
        streams.push(stream);
    }
    good.judge(&mut s, "half records")?;
    drop(streams);
    Ok(())
}

#[test]
fn length_fields_of_2_gib() -> Result<()> {
    let mut s = Scene::new()?;
    let good = GoodClient::start(&mut s)?;
    for number in 0..500 {
        let mut stream = attack(&s.server, 100)?;
        let last = if number % 2 == 0 { LAST_FRAGMENT } else { 0 };
        push(
            &mut stream,
            &(last | 0x7fff_ffff).to_be_bytes(),
            Duration::from_secs(1),
        );
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let read = stream.read(&mut [0; 1]);
        ensure!(!matches!(read, Ok(1)), "an answer to nothing");
    }
    // The same inside of calls: every word of a proper call becomes a huge length.
    let fh = s.root.clone();
    let call = write_args(&fh, 0, 4, 0, b"data");
    let header = Header::new(program::NFS, 3, procedure::WRITE, &s.cred());
    let message = header.message(next_xid(), &call);
    for at in (8..message.len()).step_by(4) {
        for huge in [u32::MAX, 0x7fff_ffff, 0x1000_0000] {
            let mut forged = message.clone();
            if let Some(word) = forged.get_mut(at..at + 4) {
                word.copy_from_slice(&huge.to_be_bytes());
            }
            let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
            peer.send(&forged)?;
            let reply = peer.receive()?;
            ensure!(reply.len() < 1000, "word {at}: {} bytes", reply.len());
        }
    }
    good.judge(&mut s, "length fields of 2 GiB")
}

#[test]
fn replies_that_are_never_read() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("big", &vec![1; MIB])?;
    let good = GoodClient::start(&mut s)?;
    let call = read_call(&s, &fh, MIB as u32);
    let calls = call.repeat(500);
    let mut streams = Vec::new();
    for number in 0..64 {
        let mut stream = attack(&s.server, 100 + (number % 4) as u8)?;
        push(&mut stream, &calls, Duration::from_millis(50));
        streams.push(stream);
    }
    // Listings, and calls that the workers answer, from others.
    let list = args(|w| {
        w.opaque(&s.root);
        w.u64(0);
        w.u64(0);
        w.u32(MIB as u32);
        w.u32(MIB as u32);
    });
    let header = Header::new(program::NFS, 3, procedure::READDIRPLUS, &s.cred());
    let list = record(&header.message(next_xid(), &list)).repeat(2000);
    for _ in 0..16 {
        let mut stream = attack(&s.server, 110)?;
        push(&mut stream, &list, Duration::from_millis(50));
        streams.push(stream);
    }
    good.judge(&mut s, "replies never read")?;
    drop(streams);
    Ok(())
}

/// Who sends and goes away leaves nothing behind.
#[test]
fn peers_that_hang_up_in_the_middle() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.create("f")?;
    let good = GoodClient::start(&mut s)?;
    let idle = s.server.descriptors()?;
    let call = write_args(&fh, 0, 300_000, 0, &vec![3; 300_000]);
    let header = Header::new(program::NFS, 3, procedure::WRITE, &s.cred());
    let message = record(&header.message(next_xid(), &call));
    for number in 0..400 {
        let mut stream = attack(&s.server, 100)?;
        let len = if number % 2 == 0 {
            message.len()
        } else {
            number * 700
        };
        push(
            &mut stream,
            message.get(..len).unwrap_or(&message),
            Duration::from_secs(1),
        );
        // A reset instead of an orderly end, every other time.
        if number % 4 < 2 {
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        }
    }
    wait_until("descriptors come back", || {
        Ok(s.server.descriptors()? <= idle + 8)
    })?;
    good.judge(&mut s, "hang up in the middle")
}

/// A record that does not arrive whole, and replies that nobody reads, end their connections; what
/// is merely idle stays.
#[test]
fn slow_peers_are_closed_in_time() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("big", &vec![1; MIB])?;
    let mut half = attack(&s.server, 100)?;
    half.write_all(&[0x80, 0, 1, 0, 1, 2, 3])?;
    let mut unread = attack(&s.server, 100)?;
    let calls = read_call(&s, &fh, MIB as u32).repeat(50);
    push(&mut unread, &calls, Duration::from_secs(1));
    let mut idle = attack(&s.server, 100)?;
    let began = Instant::now();
    half.set_read_timeout(Some(Duration::from_mins(1)))?;
    let end = half.read(&mut [0; 1]);
    eprintln!("half a record: {end:?} after {:?}", began.elapsed());
    ensure!(matches!(&end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset));
    let deadline = began + Duration::from_mins(1);
    // It can't be read without helping it; the server's side of it must be gone.
    let held = |s: &Scene| -> Result<bool> {
        let port = unread.local_addr()?.port();
        let table = std::fs::read_to_string(format!("/proc/{}/net/tcp", s.server.pid()))?;
        let remote = format!(":{port:04X} 01 ");
        Ok(table.lines().any(|line| line.contains(&remote)))
    };
    while held(&s)? {
        ensure!(Instant::now() < deadline, "still held after a minute");
        std::thread::sleep(Duration::from_millis(50));
    }
    eprintln!("replies never read: closed after {:?}", began.elapsed());
    ensure!(!is_closed(&mut idle), "an idle connection was closed");
    s.nfs.null()
}
