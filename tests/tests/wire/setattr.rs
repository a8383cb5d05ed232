//! Attributes: what GETATTR says of each kind of file, and what SETATTR changes.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use anyhow::{Result, ensure};
use havenfs_tests::client::nfs::{FILE_SYNC, How, UNSTABLE};
use havenfs_tests::client::{Cred, Outcome, Sattr, SetTime};
use nfs3_types::nfs3::{Nfs3Option, Nfs3Result, fattr3, ftype3, nfsstat3, nfstime3};

use super::scene::{STRANGER, Scene, USER, is_root, made, ok, status};

/// Compares what the wire says with what the file system says.
fn agrees(attributes: &fattr3, meta: &fs::Metadata) -> Result<()> {
    let time = |seconds: i64, nanoseconds: i64| nfstime3 {
        seconds: seconds as u32,
        nseconds: nanoseconds as u32,
    };
    ensure!(attributes.mode == meta.mode() & 0o7777, "mode");
    ensure!(u64::from(attributes.nlink) == meta.nlink(), "nlink");
    ensure!(
        (attributes.uid, attributes.gid) == (meta.uid(), meta.gid()),
        "owner"
    );
    ensure!(attributes.size == meta.size(), "size");
    ensure!(attributes.used == meta.blocks() * 512, "used");
    ensure!(attributes.fileid == meta.ino(), "fileid");
    ensure!(
        attributes.atime == time(meta.atime(), meta.atime_nsec()),
        "atime"
    );
    ensure!(
        attributes.mtime == time(meta.mtime(), meta.mtime_nsec()),
        "mtime"
    );
    ensure!(
        attributes.ctime == time(meta.ctime(), meta.ctime_nsec()),
        "ctime"
    );
    Ok(())
}

#[test]
fn getattr_tells_what_the_file_system_tells() -> Result<()> {
    let mut s = Scene::new()?;
    let kinds = [
        ("f", s.file("f", &[7; 5000])?, ftype3::NF3REG),
        ("d", s.dir("d")?, ftype3::NF3DIR),
        ("l", s.link("l", "some text")?, ftype3::NF3LNK),
        ("p", s.fifo("p")?, ftype3::NF3FIFO),
    ];
    fs::hard_link(s.path("f"), s.path("g"))?;
    let root = s.nfs.attributes(&s.root)?;
    for (name, fh, kind) in kinds {
        let attributes = s.nfs.attributes(&fh)?;
        ensure!(attributes.type_ == kind, "{name}: {:?}", attributes.type_);
        agrees(&attributes, &fs::symlink_metadata(s.path(name))?)?;
        ensure!(attributes.fsid == root.fsid, "one file system, two fsids");
    }
    agrees(&root, &fs::metadata(s.path(""))?)
}

#[test]
fn setattr_changes_each_attribute_alone() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("f", b"0123456789")?;
    let before = s.nfs.attributes(&fh)?;
    ok(s.nfs.setattr(&fh, &Sattr::mode(0o4751), None)?)?;
    ensure!(fs::metadata(s.path("f"))?.mode() & 0o7777 == 0o4751);
    let atime = Sattr {
        atime: SetTime::To(1_000_000_000, 123_456_789),
        ..Sattr::default()
    };
    ok(s.nfs.setattr(&fh, &atime, None)?)?;
    let after = s.nfs.attributes(&fh)?;
    let set = nfstime3 {
        seconds: 1_000_000_000,
        nseconds: 123_456_789,
    };
    ensure!(after.atime == set && after.mtime == before.mtime);
    let mtime = Sattr {
        mtime: SetTime::To(0x9000_0000, 1),
        ..Sattr::default()
    };
    ok(s.nfs.setattr(&fh, &mtime, None)?)?;
    let after = s.nfs.attributes(&fh)?;
    // The wire's seconds are unsigned: a time after 2038.
    ensure!(after.mtime.seconds == 0x9000_0000 && after.atime == set);
    for (size, data) in [(4u64, &b"0123"[..]), (8, b"0123\0\0\0\0"), (0, b"")] {
        ok(s.nfs.setattr(&fh, &Sattr::size(size), None)?)?;
        ensure!(fs::read(s.path("f"))? == data, "size {size}");
    }
    let now = Sattr {
        atime: SetTime::Now,
        mtime: SetTime::Now,
        ..Sattr::default()
    };
    ok(s.nfs.setattr(&fh, &now, None)?)?;
    let after = s.nfs.attributes(&fh)?;
    ensure!(after.mtime.seconds != 0x9000_0000 && after.atime != set);
    // Nothing to change is no error.
    ok(s.nfs.setattr(&fh, &Sattr::default(), None)?)?;
    Ok(())
}

#[test]
fn the_guard_compares_seconds_and_nanoseconds() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("f", b"")?;
    let ctime = s.nfs.attributes(&fh)?.ctime;
    let off_by_one = (ctime.seconds, ctime.nseconds ^ 1);
    let refused = s.nfs.setattr(&fh, &Sattr::mode(0o600), Some(off_by_one))?;
    ensure!(status(&refused) == nfsstat3::NFS3ERR_NOT_SYNC);
    ensure!(fs::metadata(s.path("f"))?.mode() & 0o7777 == 0o644);
    let guard = (ctime.seconds, ctime.nseconds);
    ok(s.nfs.setattr(&fh, &Sattr::mode(0o600), Some(guard))?)?;
    // The ctime is another one now, so the same guard no longer fits.
    let again = s.nfs.setattr(&fh, &Sattr::mode(0o640), Some(guard))?;
    ensure!(status(&again) == nfsstat3::NFS3ERR_NOT_SYNC);
    Ok(())
}

#[test]
fn a_call_that_fails_in_one_attribute_changes_none_needs_root() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("f", b"0123456789")?;
    let both = Sattr {
        size: Some(0),
        uid: Some(STRANGER),
        ..Sattr::default()
    };
    ensure!(status(&s.nfs.setattr(&fh, &both, None)?) == nfsstat3::NFS3ERR_PERM);
    ensure!(fs::metadata(s.path("f"))?.len() == 10);
    let both = Sattr {
        mode: Some(0o777),
        gid: Some(STRANGER),
        ..Sattr::default()
    };
    ensure!(status(&s.nfs.setattr(&fh, &both, None)?) == nfsstat3::NFS3ERR_PERM);
    ensure!(fs::metadata(s.path("f"))?.mode() & 0o7777 == 0o644);
    let both = Sattr {
        size: Some(1 << 63),
        mode: Some(0o777),
        ..Sattr::default()
    };
    ensure!(status(&s.nfs.setattr(&fh, &both, None)?) == nfsstat3::NFS3ERR_FBIG);
    ensure!(fs::metadata(s.path("f"))?.mode() & 0o7777 == 0o644);
    // On a directory the size is refused before the mode is set.
    let dir = s.dir("d")?;
    let both = Sattr {
        size: Some(0),
        mode: Some(0o777),
        ..Sattr::default()
    };
    ensure!(status(&s.nfs.setattr(&dir, &both, None)?) == nfsstat3::NFS3ERR_ISDIR);
    ensure!(fs::metadata(s.path("d"))?.mode() & 0o7777 == 0o755);
    Ok(())
}

#[test]
fn owners_change_groups_they_belong_to_needs_root() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("f", b"")?;
    let to = |gid| Sattr {
        gid: Some(gid),
        ..Sattr::default()
    };
    ensure!(status(&s.nfs.setattr(&fh, &to(STRANGER), None)?) == nfsstat3::NFS3ERR_PERM);
    let cred = Cred::Sys {
        uid: USER,
        gid: USER,
        gids: vec![STRANGER],
    };
    let mut member = s.client(cred)?;
    ok(member.setattr(&fh, &to(STRANGER), None)?)?;
    ensure!(fs::metadata(s.path("f"))?.gid() == STRANGER);
    let mut root = s.client(Cred::root())?;
    let both = Sattr {
        uid: Some(STRANGER),
        gid: Some(USER),
        ..Sattr::default()
    };
    ok(root.setattr(&fh, &both, None)?)?;
    let meta = fs::metadata(s.path("f"))?;
    ensure!((meta.uid(), meta.gid()) == (STRANGER, USER));
    Ok(())
}

/// chown by its owner takes the set-id bits of a file away, as chown(2) does.
#[test]
fn set_id_bits_are_lost_by_write_and_chown_needs_root() -> Result<()> {
    let mut s = Scene::new()?;
    let mode = |s: &Scene| Ok::<_, anyhow::Error>(fs::metadata(s.path("f"))?.mode() & 0o7777);
    let fh = s.file("f", b"text")?;
    s.own("f", 0o6775)?;
    ok(s.nfs.write(&fh, 0, UNSTABLE, b"x")?)?;
    ensure!(mode(&s)? == 0o775, "a write by the owner: {:o}", mode(&s)?);
    s.own("f", 0o6775)?;
    ok(s.nfs.setattr(&fh, &Sattr::size(1), None)?)?;
    ensure!(mode(&s)? == 0o775, "a cut by the owner: {:o}", mode(&s)?);
    s.own("f", 0o6777)?;
    let mut stranger = s.client(Cred::user(STRANGER, STRANGER))?;
    ok(stranger.write(&fh, 0, FILE_SYNC, b"x")?)?;
    ensure!(mode(&s)? == 0o777, "a write by a stranger: {:o}", mode(&s)?);
    let mut root = s.client(Cred::root())?;
    s.own("f", 0o6775)?;
    ok(root.write(&fh, 0, UNSTABLE, b"x")?)?;
    ensure!(mode(&s)? == 0o6775, "root keeps them: {:o}", mode(&s)?);
    let cred = Cred::Sys {
        uid: USER,
        gid: USER,
        gids: vec![STRANGER],
    };
    let mut member = s.client(cred)?;
    let give = Sattr {
        gid: Some(STRANGER),
        ..Sattr::default()
    };
    ok(member.setattr(&fh, &give, None)?)?;
    ensure!(mode(&s)? == 0o775, "chown by the owner: {:o}", mode(&s)?);
    // A user can't set the set-group-id bit for a group he is not in.
    std::os::unix::fs::chown(s.path("f"), Some(USER), Some(STRANGER))?;
    ok(s.nfs.setattr(&fh, &Sattr::mode(0o2755), None)?)?;
    ensure!(
        mode(&s)? == 0o755,
        "chmod for a foreign group: {:o}",
        mode(&s)?
    );
    Ok(())
}

#[test]
fn a_setgid_directory_hands_its_group_down_needs_root() -> Result<()> {
    let mut s = Scene::new()?;
    let dir = s.dir("d")?;
    std::os::unix::fs::chown(s.path("d"), Some(USER), Some(STRANGER))?;
    fs::set_permissions(s.path("d"), fs::Permissions::from_mode(0o2775))?;
    ok(s.nfs.create(&dir, b"f", How::Guarded(Sattr::mode(0o644)))?)?;
    ok(s.nfs.mkdir(&dir, b"e", &Sattr::mode(0o755))?)?;
    ok(s.nfs.symlink(&dir, b"l", &Sattr::default(), b"x")?)?;
    for (name, mode) in [("f", 0o644), ("e", 0o2755), ("l", 0o777)] {
        let meta = fs::symlink_metadata(s.path("d").join(name))?;
        ensure!(
            (meta.uid(), meta.gid()) == (USER, STRANGER),
            "{name}: {}",
            meta.gid()
        );
        ensure!(
            meta.mode() & 0o7777 == mode,
            "{name}: mode {:o}",
            meta.mode() & 0o7777
        );
    }
    Ok(())
}

#[test]
fn malformed_attributes_are_garbage() -> Result<()> {
    use havenfs_tests::client::nfs::{args, procedure::SETATTR};
    let mut s = Scene::new()?;
    let fh = s.root.clone();
    let bad_bool = args(|w| {
        w.opaque(&fh);
        w.u32(2);
        for _ in 0..6 {
            w.u32(0);
        }
    });
    ensure!(s.nfs.outcome(SETATTR, &bad_bool)? == Outcome::GarbageArgs);
    let bad_time = args(|w| {
        w.opaque(&fh);
        for value in [0, 0, 0, 0, 3, 0, 0] {
            w.u32(value);
        }
    });
    ensure!(s.nfs.outcome(SETATTR, &bad_time)? == Outcome::GarbageArgs);
    // A second has fewer nanoseconds: refused, not carried over.
    let fh = s.file("f", b"")?;
    let odd = Sattr {
        mtime: SetTime::To(1, 1_000_000_000),
        ..Sattr::default()
    };
    ensure!(status(&s.nfs.setattr(&fh, &odd, None)?) == nfsstat3::NFS3ERR_INVAL);
    // The values that the kernel takes for "now" and "keep" are no times either.
    for nanoseconds in [(1 << 30) - 1, (1 << 30) - 2] {
        let odd = Sattr {
            mtime: SetTime::To(1, nanoseconds),
            ..Sattr::default()
        };
        let got = status(&s.nfs.setattr(&fh, &odd, None)?);
        ensure!(got == nfsstat3::NFS3ERR_INVAL, "{nanoseconds:#x}: {got}");
    }
    Ok(())
}

#[test]
fn bits_outside_the_mode_are_ignored() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("f", b"")?;
    ok(s.nfs.setattr(&fh, &Sattr::mode(0o100_600), None)?)?;
    ensure!(s.nfs.attributes(&fh)?.mode == 0o600);
    let fh = made(
        s.nfs
            .create(&s.root, b"g", How::Guarded(Sattr::mode(0o100_640)))?,
        |ok| &ok.obj,
    )?;
    ensure!(s.nfs.attributes(&fh)?.mode == 0o640);
    Ok(())
}

/// The answer's own attributes are those after the change.
#[test]
fn wcc_data_has_the_state_afterwards() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("f", b"")?;
    let changed = ok(s.nfs.setattr(&fh, &Sattr::mode(0o600), None)?)?;
    let Nfs3Option::Some(after) = changed.obj_wcc.after else {
        anyhow::bail!("no attributes");
    };
    ensure!(after.mode == 0o600 && after.ctime == s.nfs.attributes(&fh)?.ctime);
    let written = ok(s.nfs.write(&fh, 0, FILE_SYNC, b"12345")?)?;
    let Nfs3Option::Some(after) = written.file_wcc.after else {
        anyhow::bail!("no attributes");
    };
    ensure!(after.size == 5 && after.mtime == s.nfs.attributes(&fh)?.mtime);
    let Nfs3Result::Ok(made) = s.nfs.mkdir(&s.root, b"d", &Sattr::mode(0o755))? else {
        anyhow::bail!("MKDIR");
    };
    let (Nfs3Option::Some(dir), Nfs3Option::Some(own)) = (made.dir_wcc.after, made.obj_attributes)
    else {
        anyhow::bail!("no attributes");
    };
    let meta = fs::metadata(s.path(""))?;
    ensure!(u64::from(dir.nlink) == meta.nlink() && dir.fileid == meta.ino());
    ensure!(own.type_ == ftype3::NF3DIR && own.uid == s.uid);
    ensure!(is_root() || own.gid == s.gid);
    Ok(())
}
