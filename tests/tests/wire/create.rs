//! The procedures that make names, beyond their statuses: what is made, and how CREATE treats what
//! is there already.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

use anyhow::{Result, ensure};
use havenfs_tests::client::nfs::{FILE_SYNC, How, Node, args, procedure};
use havenfs_tests::client::{Cred, Outcome, Sattr, SetTime};
use nfs3_types::nfs3::{Nfs3Option, ftype3, nfsstat3};

use super::scene::{OPEN, STRANGER, Scene, made, ok, plain_user, status};

#[test]
fn unchecked_takes_a_file_and_sets_its_size_only() -> Result<()> {
    let mut s = Scene::new()?;
    let how = How::Unchecked(Sattr::mode(0o640));
    let fh = made(s.nfs.create(&s.root, b"f", how)?, |ok| &ok.obj)?;
    ok(s.nfs.write(&fh, 0, FILE_SYNC, b"0123456789")?)?;
    ensure!(fs::metadata(s.path("f"))?.mode() & 0o7777 == 0o640);
    let again = made(
        s.nfs
            .create(&s.root, b"f", How::Unchecked(Sattr::mode(0o777)))?,
        |ok| &ok.obj,
    )?;
    ensure!(again == fh, "the same file has another handle");
    let meta = fs::metadata(s.path("f"))?;
    ensure!(
        meta.mode() & 0o7777 == 0o640 && meta.len() == 10,
        "more than the size was set"
    );
    for size in [4, 0] {
        let how = How::Unchecked(Sattr::size(size));
        ok(s.nfs.create(&s.root, b"f", how)?)?;
        ensure!(fs::metadata(s.path("f"))?.len() == size);
    }
    // A new file with a size; it has no mode, so this process may not read it.
    ok(s.nfs
        .create(&s.root, b"g", How::Unchecked(Sattr::size(5)))?)?;
    ensure!(fs::metadata(s.path("g"))?.len() == 5);
    Ok(())
}

#[test]
fn guarded_refuses_whatever_is_there() -> Result<()> {
    let mut s = Scene::new()?;
    s.file("f", b"text")?;
    s.dir("d")?;
    s.link("dangling", "nowhere")?;
    for name in ["f", "d", "dangling", ".", ".."] {
        let how = How::Guarded(Sattr::size(0));
        let got = status(&s.nfs.create(&s.root, name.as_bytes(), how)?);
        ensure!(got == nfsstat3::NFS3ERR_EXIST, "{name}: {got}");
    }
    ensure!(fs::read(s.path("f"))? == b"text");
    ensure!(!s.path("nowhere").exists(), "a link was followed");
    Ok(())
}

/// UNCHECKED must not follow a link, or a client writes to files it was never given.
#[test]
fn unchecked_does_not_follow_links() -> Result<()> {
    let mut s = Scene::new()?;
    fs::write(s.site.path().join("secret"), "secret")?;
    s.link("out", "../secret")?;
    s.link("dangling", "nowhere")?;
    for name in [b"out".as_slice(), b"dangling"] {
        let got = status(
            &s.nfs
                .create(&s.root, name, How::Unchecked(Sattr::size(0)))?,
        );
        ensure!(got == nfsstat3::NFS3ERR_EXIST, "{got}");
    }
    ensure!(fs::read(s.site.path().join("secret"))? == b"secret");
    ensure!(!s.path("nowhere").exists());
    Ok(())
}

#[test]
fn exclusive_may_be_repeated_by_its_verifier_alone() -> Result<()> {
    let mut s = Scene::new()?;
    let how = How::Exclusive([0xff, 2, 3, 4, 0xff, 6, 7, 8]);
    let first = ok(s.nfs.create(&s.root, b"f", how)?)?;
    let Nfs3Option::Some(fh) = first.obj else {
        anyhow::bail!("no handle")
    };
    let again = made(s.nfs.create(&s.root, b"f", how)?, |ok| &ok.obj)?;
    ensure!(fh.data.as_ref() == again);
    let other = How::Exclusive([0xff, 2, 3, 4, 0xff, 6, 7, 9]);
    ensure!(status(&s.nfs.create(&s.root, b"f", other)?) == nfsstat3::NFS3ERR_EXIST);
    let other = How::Exclusive([0xff, 2, 3, 5, 0xff, 6, 7, 8]);
    ensure!(status(&s.nfs.create(&s.root, b"f", other)?) == nfsstat3::NFS3ERR_EXIST);
    // A kill of the server forgets its memory, not what it answered.
    let root = s.root.clone();
    let Scene { site, server, .. } = s;
    server.kill()?;
    let server = site.serve(OPEN)?;
    let (uid, gid) = plain_user();
    let mut nfs = server.nfs(Cred::user(uid, gid))?;
    let again = made(nfs.create(&root, b"f", how)?, |ok| &ok.obj)?;
    ensure!(fh.data.as_ref() == again);
    // What the client does next.
    let finish = Sattr {
        mode: Some(0o444),
        atime: SetTime::Now,
        mtime: SetTime::Now,
        ..Sattr::default()
    };
    ok(nfs.setattr(&again, &finish, None)?)?;
    ok(nfs.write(&again, 0, FILE_SYNC, b"text")?)?;
    // Now it is a file like any other.
    ensure!(status(&nfs.create(&root, b"f", how)?) == nfsstat3::NFS3ERR_EXIST);
    ensure!(fs::read(site.export().join("f"))? == b"text");
    Ok(())
}

#[test]
fn nobody_else_gets_into_an_exclusive_file_needs_root() -> Result<()> {
    let mut s = Scene::new()?;
    let how = How::Exclusive(*b"12345678");
    let fh = made(s.nfs.create(&s.root, b"f", how)?, |ok| &ok.obj)?;
    let mut stranger = s.client(Cred::user(STRANGER, STRANGER))?;
    ensure!(status(&stranger.read(&fh, 0, 1)?) == nfsstat3::NFS3ERR_ACCES);
    ensure!(status(&stranger.write(&fh, 0, FILE_SYNC, b"x")?) == nfsstat3::NFS3ERR_ACCES);
    Ok(())
}

#[test]
fn modes_are_as_asked_and_owners_are_the_callers() -> Result<()> {
    let mut s = Scene::new()?;
    for mode in [0o000, 0o400, 0o666, 0o777, 0o4755, 0o1644] {
        let (file, dir) = (format!("f{mode:o}"), format!("d{mode:o}"));
        let new = Sattr::mode(mode);
        ok(s.nfs.create(&s.root, file.as_bytes(), How::Guarded(new))?)?;
        ok(s.nfs.mkdir(&s.root, dir.as_bytes(), &new)?)?;
        for name in [&file, &dir] {
            let meta = fs::metadata(s.path(name))?;
            ensure!(
                meta.mode() & 0o7777 == mode,
                "{name}: {:o}",
                meta.mode() & 0o7777
            );
            ensure!((meta.uid(), meta.gid()) == (s.uid, s.gid), "{name}: owner");
        }
    }
    Ok(())
}

#[test]
fn mknod_makes_fifos_and_sockets_and_nothing_else() -> Result<()> {
    let mut s = Scene::new()?;
    let mode = Sattr::mode(0o640);
    for (name, node, kind) in [
        ("p", Node::Fifo, ftype3::NF3FIFO),
        ("s", Node::Socket, ftype3::NF3SOCK),
    ] {
        let done = ok(s.nfs.mknod(&s.root, name.as_bytes(), node, &mode)?)?;
        let Nfs3Option::Some(attributes) = done.obj_attributes else {
            anyhow::bail!("no attributes")
        };
        ensure!(attributes.type_ == kind && attributes.mode == 0o640);
        ensure!((attributes.uid, attributes.gid) == (s.uid, s.gid));
    }
    ensure!(fs::symlink_metadata(s.path("p"))?.file_type().is_fifo());
    ensure!(fs::symlink_metadata(s.path("s"))?.file_type().is_socket());
    for kind in [1, 2, 5] {
        let got = status(&s.nfs.mknod(&s.root, b"x", Node::Other(kind), &mode)?);
        ensure!(got == nfsstat3::NFS3ERR_BADTYPE, "{kind}: {got}");
    }
    for kind in [0, 8, u32::MAX] {
        let bad = args(|w| {
            w.opaque(&s.root);
            w.opaque(b"x");
            w.u32(kind);
        });
        let got = s.nfs.outcome(procedure::MKNOD, &bad)?;
        ensure!(got == Outcome::GarbageArgs, "{kind}: {got:?}");
    }
    Ok(())
}

#[test]
fn symlinks_keep_any_text() -> Result<()> {
    let mut s = Scene::new()?;
    let long = vec![b'x'; 4095];
    let texts: [&[u8]; 5] = [b"a", b"/etc/passwd", b"../../..", b"\xff\xfe\n \x01", &long];
    for (number, text) in texts.into_iter().enumerate() {
        let name = format!("l{number}");
        let new = Sattr::default();
        let fh = made(s.nfs.symlink(&s.root, name.as_bytes(), &new, text)?, |ok| {
            &ok.obj
        })?;
        ensure!(ok(s.nfs.readlink(&fh)?)?.data.0.as_ref() == text);
        ensure!(s.nfs.attributes(&fh)?.size == text.len() as u64);
    }
    let refused = [
        (
            &b""[..],
            &[nfsstat3::NFS3ERR_INVAL, nfsstat3::NFS3ERR_NOENT][..],
        ),
        (b"a\0b", &[nfsstat3::NFS3ERR_INVAL, nfsstat3::NFS3ERR_ACCES]),
        (&[b'x'; 4096], &[nfsstat3::NFS3ERR_NAMETOOLONG]),
        (&[b'x'; 8000], &[nfsstat3::NFS3ERR_NAMETOOLONG]),
    ];
    for (text, statuses) in refused {
        let got = status(&s.nfs.symlink(&s.root, b"x", &Sattr::default(), text)?);
        ensure!(statuses.contains(&got), "{} bytes: {got}", text.len());
        ensure!(
            fs::symlink_metadata(s.path("x")).is_err(),
            "made, though refused"
        );
    }
    Ok(())
}

#[test]
fn links_share_the_file_and_its_handle() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("f", b"text")?;
    let dir = s.dir("d")?;
    let done = ok(s.nfs.link(&fh, &dir, b"g")?)?;
    let Nfs3Option::Some(attributes) = done.file_attributes else {
        anyhow::bail!("no attributes")
    };
    ensure!(attributes.nlink == 2);
    ensure!(s.nfs.find(&dir, b"g")? == fh, "two names, two handles");
    ok(s.nfs.remove(&s.root, b"f")?)?;
    let after = s.nfs.attributes(&fh)?;
    ensure!(after.nlink == 1 && ok(s.nfs.read(&fh, 0, 10)?)?.data.as_ref() == b"text");
    // Links to what is no regular file.
    let fifo = s.fifo("p")?;
    ok(s.nfs.link(&fifo, &dir, b"p2")?)?;
    let link = s.link("l", "text")?;
    ok(s.nfs.link(&link, &dir, b"l2")?)?;
    ensure!(fs::symlink_metadata(s.path("d/l2"))?.is_symlink());
    Ok(())
}

/// The kernel's rule against links to others' files is for local users.
#[test]
fn a_user_links_a_file_that_is_not_his_needs_root() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("f", b"text")?;
    std::os::unix::fs::chown(s.path("f"), Some(STRANGER), Some(STRANGER))?;
    ok(s.nfs.link(&fh, &s.root, b"g")?)?;
    ensure!(fs::metadata(s.path("g"))?.uid() == STRANGER);
    Ok(())
}
