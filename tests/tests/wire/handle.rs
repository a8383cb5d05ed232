//! File handles: forged, cut, too long, stale, and their life across restarts.

use std::fs;

use anyhow::{Result, ensure};
use havenfs_tests::client::nfs::{FILE_SYNC, How, args, procedure};
use havenfs_tests::client::{Cred, Outcome, Sattr};
use havenfs_tests::server::Site;
use nfs3_types::nfs3::nfsstat3::{
    NFS3ERR_ACCES as ACCES, NFS3ERR_BADHANDLE as BADHANDLE, NFS3ERR_STALE as STALE,
};

use super::scene::{OPEN, Scene, made, ok, plain_user, status};

#[test]
fn no_change_of_a_handle_goes_unnoticed() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("f", b"secret")?;
    for at in 0..fh.len() {
        for bit in 0..8 {
            let mut forged = fh.clone();
            forged[at] ^= 1 << bit;
            let got = status(&s.nfs.getattr(&forged)?);
            ensure!(got == BADHANDLE, "byte {at}, bit {bit}: {got}");
        }
    }
    for len in 0..fh.len() {
        let got = status(&s.nfs.getattr(&fh[..len])?);
        ensure!(got == BADHANDLE, "{len} bytes: {got}");
    }
    for len in fh.len() + 1..=64 {
        let mut longer = fh.clone();
        longer.resize(len, 0);
        let got = status(&s.nfs.getattr(&longer)?);
        ensure!(got == BADHANDLE, "{len} bytes: {got}");
    }
    s.nfs.attributes(&fh)?;
    Ok(())
}

#[test]
fn a_handle_above_64_bytes_is_garbage() -> Result<()> {
    let mut s = Scene::new()?;
    for len in [65, 100, 1000] {
        let long = args(|w| w.opaque(&vec![1; len]));
        for procedure in [procedure::GETATTR, procedure::READLINK, procedure::FSINFO] {
            let got = s.nfs.outcome(procedure, &long)?;
            ensure!(got == Outcome::GarbageArgs, "{len} bytes: {got:?}");
        }
    }
    let cut = args(|w| w.u32(64));
    ensure!(s.nfs.outcome(procedure::GETATTR, &cut)? == Outcome::GarbageArgs);
    Ok(())
}

#[test]
fn a_handle_of_another_server_is_none_of_ours() -> Result<()> {
    let mut s = Scene::new()?;
    let other = Site::new()?;
    let server = other.serve(OPEN)?;
    let foreign = server.handle(&other.export())?;
    ensure!(status(&s.nfs.getattr(&foreign)?) == BADHANDLE);
    Ok(())
}

#[test]
fn a_file_that_is_gone_is_stale_however_it_went() -> Result<()> {
    let mut s = Scene::new()?;
    // Through NFS, while the server has it open.
    let fh = s.create("a")?;
    ok(s.nfs.write(&fh, 0, FILE_SYNC, b"text")?)?;
    ok(s.nfs.remove(&s.root, b"a")?)?;
    ensure!(status(&s.nfs.read(&fh, 0, 1)?) == STALE);
    ensure!(status(&s.nfs.write(&fh, 0, FILE_SYNC, b"x")?) == STALE);
    // By another client, and locally, behind the server's back.
    let fh = s.create("b")?;
    let mut other = s.client(s.cred())?;
    ok(s.nfs.write(&fh, 0, FILE_SYNC, b"text")?)?;
    ok(other.remove(&s.root, b"b")?)?;
    ensure!(status(&s.nfs.read(&fh, 0, 1)?) == STALE);
    let fh = s.create("c")?;
    ok(s.nfs.write(&fh, 0, FILE_SYNC, b"text")?)?;
    fs::remove_file(s.path("c"))?;
    ensure!(status(&s.nfs.read(&fh, 0, 1)?) == STALE);
    ensure!(status(&s.nfs.getattr(&fh)?) == STALE);
    // A new file of the same name is another one, even in the same inode.
    let again = s.create("c")?;
    ensure!(again != fh, "the handle of a removed file came back");
    ensure!(status(&s.nfs.getattr(&fh)?) == STALE);
    Ok(())
}

/// What the server keeps open must not keep the space of removed files.
#[test]
fn the_space_of_a_removed_file_is_freed() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.create("big")?;
    let block = vec![1; 1 << 20];
    for at in 0..32u64 {
        ok(s.nfs.write(&fh, at << 20, 0, &block)?)?;
    }
    ok(s.nfs.commit(&fh, 0, 0)?)?;
    ok(s.nfs.remove(&s.root, b"big")?)?;
    let held = fs::read_dir(format!("/proc/{}/fd", s.server.pid()))?
        .flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .filter(|path| path.to_string_lossy().contains("big (deleted)"))
        .count();
    ensure!(held == 0, "{held} descriptors keep it");
    Ok(())
}

#[test]
fn a_handle_follows_its_file_wherever_it_goes() -> Result<()> {
    let mut s = Scene::new()?;
    let a = s.dir("a")?;
    let b = s.dir("b")?;
    let fh = made(
        s.nfs.create(&a, b"f", How::Guarded(Sattr::mode(0o644)))?,
        |ok| &ok.obj,
    )?;
    ok(s.nfs.rename((&a, b"f"), (&b, b"g"))?)?;
    s.nfs.attributes(&fh)?;
    ok(s.nfs.link(&fh, &s.root, b"h")?)?;
    ok(s.nfs.remove(&b, b"g")?)?;
    ok(s.nfs.write(&fh, 0, FILE_SYNC, b"still here")?)?;
    ensure!(fs::read(s.path("h"))? == b"still here");
    ok(s.nfs.rename((&s.root, b"a"), (&b, b"inner"))?)?;
    ensure!(s.nfs.find(&a, b"..")? == b);
    Ok(())
}

#[test]
fn handles_survive_restarts() -> Result<()> {
    let mut s = Scene::new()?;
    let dir = s.dir("d")?;
    let file = made(
        s.nfs.create(&dir, b"f", How::Guarded(Sattr::mode(0o644)))?,
        |ok| &ok.obj,
    )?;
    let link = s.link("l", "text")?;
    let gone = s.create("gone")?;
    let root = s.root.clone();
    let Scene { site, server, .. } = s;
    server.kill()?;
    fs::remove_file(site.export().join("gone"))?;
    let (uid, gid) = plain_user();
    for _ in 0..2 {
        let server = site.serve(OPEN)?;
        let mut nfs = server.nfs(Cred::user(uid, gid))?;
        // Without MNT or LOOKUP before.
        ok(nfs.write(&file, 0, FILE_SYNC, b"text")?)?;
        ensure!(ok(nfs.readlink(&link)?)?.data.0.as_ref() == b"text");
        ensure!(nfs.find(&dir, b"f")? == file && nfs.find(&root, b"d")? == dir);
        ensure!(nfs.find(&dir, b"..")? == root);
        ensure!(status(&nfs.getattr(&gone)?) == STALE);
        ensure!(server.handle(&site.export())? == root);
        ensure!(server.stop()?.success());
    }
    Ok(())
}

/// The export that a handle was made for decides what may be done with it.
#[test]
fn each_export_has_handles_and_rules_of_its_own() -> Result<()> {
    let site = Site::new()?;
    for name in ["a", "b"] {
        fs::create_dir(site.path().join(name))?;
        fs::write(site.path().join(name).join("f"), name)?;
    }
    let export = |name: &str, rule: &str| format!("{}:{rule}", site.path().join(name).display());
    let (a, b) = (
        export("a", "127.0.0.1(ro,insecure)"),
        export("b", "127.0.0.9(ro,insecure)"),
    );
    let server = site.serve_exports(&[&a, &b], &[])?;
    let root_a = server.handle(&site.path().join("a"))?;
    let mut nfs = server.nfs(Cred::root())?;
    let fh = nfs.find(&root_a, b"f")?;
    ensure!(ok(nfs.read(&fh, 0, 10)?)?.data.as_ref() == b"a");
    // From a host that may, to one that may not.
    let own = ([127, 0, 0, 9], 0).into();
    let peer = havenfs_tests::client::Peer::connect_from(
        havenfs_tests::client::peer::Transport::Tcp,
        own,
        server.nfs_at(havenfs_tests::server::V4),
    )?;
    let mut other = havenfs_tests::client::Nfs::new(peer, Cred::root());
    ensure!(status(&other.getattr(&root_a)?) == ACCES);
    ensure!(status(&other.read(&fh, 0, 10)?) == ACCES);
    Ok(())
}
