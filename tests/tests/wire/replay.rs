//! The reply cache: a call that is sent again gets its first answer and has no second effect.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_rpc::program;
use havenfs_rpc::xdr::Writer;
use havenfs_tests::client::nfs::{args, dirop, procedure, write_args};
use havenfs_tests::client::peer::{ANSWER_TIME_MAX, Transport};
use havenfs_tests::client::rpc::next_xid;
use havenfs_tests::client::{Cred, Header, Peer};
use havenfs_tests::server::V4;

use super::scene::{STRANGER, Scene};

const OK: u32 = 0;
const NOENT: u32 = 2;
const EXIST: u32 = 17;

/// Sends a message with this transaction id and returns the whole reply.
fn send(peer: &mut Peer, xid: u32, procedure: u32, cred: &Cred, args: &[u8]) -> Result<Vec<u8>> {
    let header = Header::new(program::NFS, 3, procedure, cred);
    peer.send(&header.message(xid, args))?;
    peer.receive()
}

/// The status in a reply to an accepted call.
fn status(reply: &[u8]) -> Result<u32> {
    // xid, REPLY, MSG_ACCEPTED, verifier (flavor, length), SUCCESS
    let bytes = reply.get(24..28).and_then(|bytes| bytes.first_chunk());
    let bytes = bytes.ok_or_else(|| anyhow::anyhow!("short reply {reply:02x?}"))?;
    Ok(u32::from_be_bytes(*bytes))
}

/// `sattr3` with a mode, as clients send it.
fn attributes(w: &mut Writer<'_>) {
    w.u32(1);
    w.u32(0o755);
    for _ in 0..5 {
        w.u32(0);
    }
}

/// The calls that would fail, or do harm, the second time.
fn calls(s: &mut Scene) -> Result<Vec<(u32, Vec<u8>)>> {
    let file = s.file("to-link", b"")?;
    s.file("to-remove", b"")?;
    s.file("to-rename", b"")?;
    s.dir("to-rmdir")?;
    let root = s.root.clone();
    let named = |name: &[u8], more: &dyn Fn(&mut Writer<'_>)| {
        args(|w| {
            dirop(w, &root, name);
            more(w);
        })
    };
    Ok(vec![
        (
            procedure::CREATE,
            named(b"created", &|w| {
                w.u32(1);
                attributes(w);
            }),
        ),
        (procedure::MKDIR, named(b"made", &attributes)),
        (
            procedure::SYMLINK,
            named(b"symlinked", &|w| {
                attributes(w);
                w.opaque(b"text");
            }),
        ),
        (
            procedure::MKNOD,
            named(b"fifo", &|w| {
                w.u32(7);
                attributes(w);
            }),
        ),
        (procedure::REMOVE, named(b"to-remove", &|_| {})),
        (procedure::RMDIR, named(b"to-rmdir", &|_| {})),
        (
            procedure::RENAME,
            named(b"to-rename", &|w| dirop(w, &root, b"renamed")),
        ),
        (
            procedure::LINK,
            args(|w| {
                w.opaque(&file);
                dirop(w, &root, b"linked");
            }),
        ),
    ])
}

fn repeat_all(transport: Transport) -> Result<()> {
    let mut s = Scene::over(V4, transport)?;
    let cred = s.cred();
    for (procedure, args) in calls(&mut s)? {
        let xid = next_xid();
        let mut peer = Peer::connect(transport, s.server.nfs_at(V4))?;
        let first = send(&mut peer, xid, procedure, &cred, &args)?;
        ensure!(status(&first)? == OK, "{procedure}: {}", status(&first)?);
        let changed = fs::metadata(s.path(""))?.modified()?;
        let again = send(&mut peer, xid, procedure, &cred, &args)?;
        ensure!(
            again == first,
            "{procedure}: another answer on the same connection"
        );
        // Clients that lost their connection come back from another port.
        let mut other = Peer::connect(transport, s.server.nfs_at(V4))?;
        let again = send(&mut other, xid, procedure, &cred, &args)?;
        ensure!(
            again == first,
            "{procedure}: another answer on a new connection"
        );
        ensure!(
            fs::metadata(s.path(""))?.modified()? == changed,
            "{procedure}: done twice"
        );
        // The same call under a new id is a new call.
        let anew = send(&mut other, next_xid(), procedure, &cred, &args)?;
        let anew = status(&anew)?;
        ensure!(anew == NOENT || anew == EXIST, "{procedure}: {anew}");
    }
    Ok(())
}

#[test]
fn repeats_over_tcp_get_the_first_answer() -> Result<()> {
    repeat_all(Transport::Tcp)
}

#[test]
fn repeats_over_udp_get_the_first_answer() -> Result<()> {
    repeat_all(Transport::Udp)
}

#[test]
fn the_same_id_with_anything_else_is_another_call() -> Result<()> {
    let mut s = Scene::new()?;
    let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
    let cred = s.cred();
    let xid = next_xid();
    for name in ["a", "b", "c"] {
        s.file(name, b"")?;
        let args = args(|w| dirop(w, &s.root, name.as_bytes()));
        let reply = send(&mut peer, xid, procedure::REMOVE, &cred, &args)?;
        ensure!(status(&reply)? == OK && !s.path(name).exists(), "{name}");
    }
    // Arguments that differ far behind their beginning, as those of two WRITEs do not: the offset
    // and the length are at the front.
    let fh = s.file("f", b"")?;
    for at in [0, 3] {
        let args = write_args(&fh, at, 3, 2, b"abc");
        let reply = send(&mut peer, xid, procedure::WRITE, &cred, &args)?;
        ensure!(status(&reply)? == OK);
    }
    ensure!(fs::read(s.path("f"))? == b"abcabc");
    // Another procedure with the same arguments.
    let args = args(|w| dirop(w, &s.root, b"f"));
    let reply = send(&mut peer, xid, procedure::RMDIR, &cred, &args)?;
    ensure!(status(&reply)? == 20);
    let reply = send(&mut peer, xid, procedure::REMOVE, &cred, &args)?;
    ensure!(status(&reply)? == OK);
    Ok(())
}

/// A user must not see what another user's call was answered.
#[test]
fn another_user_gets_an_answer_of_his_own_needs_root() -> Result<()> {
    let mut s = Scene::new()?;
    let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
    s.own("", 0o755)?;
    s.file("f", b"")?;
    let args = args(|w| dirop(w, &s.root, b"f"));
    let xid = next_xid();
    let stranger = Cred::user(STRANGER, STRANGER);
    let refused = send(&mut peer, xid, procedure::REMOVE, &stranger, &args)?;
    ensure!(status(&refused)? == 13 && s.path("f").exists());
    let done = send(&mut peer, xid, procedure::REMOVE, &s.cred(), &args)?;
    ensure!(status(&done)? == OK && !s.path("f").exists());
    let again = send(&mut peer, xid, procedure::REMOVE, &stranger, &args)?;
    ensure!(again == refused);
    Ok(())
}

/// Another host's call is another call, whatever its id.
#[test]
fn another_host_gets_an_answer_of_its_own() -> Result<()> {
    let mut s = Scene::new()?;
    let cred = s.cred();
    s.file("f", b"")?;
    let args = args(|w| dirop(w, &s.root, b"f"));
    let xid = next_xid();
    let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
    let reply = send(&mut peer, xid, procedure::REMOVE, &cred, &args)?;
    ensure!(status(&reply)? == OK);
    let own = ([127, 0, 0, 5], 0).into();
    let mut other = Peer::connect_from(Transport::Tcp, own, s.server.nfs_at(V4))?;
    let reply = send(&mut other, xid, procedure::REMOVE, &cred, &args)?;
    ensure!(status(&reply)? == NOENT);
    Ok(())
}

/// The second copy of a call that is under way is attached to it: both connections send the call,
/// the file is made once, and one of them hears of it.
#[test]
fn copies_sent_at_once_have_one_effect() -> Result<()> {
    let s = Scene::new()?;
    let cred = s.cred();
    for round in 0..50 {
        let name = format!("dir-{round}");
        let args = args(|w| {
            dirop(w, &s.root, name.as_bytes());
            attributes(w);
        });
        let header = Header::new(program::NFS, 3, procedure::MKDIR, &cred);
        let xid = next_xid();
        let message = header.message(xid, &args);
        let mut first = Peer::tcp(s.server.nfs_at(V4))?;
        let mut second = Peer::tcp(s.server.nfs_at(V4))?;
        first.send(&message)?;
        second.send(&message)?;
        let reply = from_either(&mut first, &mut second)?;
        ensure!(status(&reply)? == OK, "round {round}: {}", status(&reply)?);
    }
    Ok(())
}

/// The next message on either connection: the one whose copy came last is told.
fn from_either(first: &mut Peer, second: &mut Peer) -> Result<Vec<u8>> {
    for peer in [&*first, &*second] {
        peer.set_answer_time(Duration::from_millis(20))?;
    }
    let deadline = Instant::now() + ANSWER_TIME_MAX;
    while Instant::now() < deadline {
        for peer in [&mut *first, &mut *second] {
            if let Ok(reply) = peer.receive() {
                return Ok(reply);
            }
        }
    }
    anyhow::bail!("neither copy was answered")
}
