//! Names: which bytes a name may have, "." and "..", and what RENAME and REMOVE make of them.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;

use anyhow::{Result, ensure};
use havenfs_tests::client::nfs::{How, Node, args, procedure};
use havenfs_tests::client::{Outcome, Sattr};
use nfs3_types::nfs3::nfsstat3::{
    self, NFS3_OK as OK, NFS3ERR_ACCES as ACCES, NFS3ERR_EXIST as EXIST, NFS3ERR_INVAL as INVAL,
    NFS3ERR_ISDIR as ISDIR, NFS3ERR_NAMETOOLONG as NAMETOOLONG, NFS3ERR_NOENT as NOENT,
    NFS3ERR_NOTEMPTY as NOTEMPTY, NFS3ERR_STALE as STALE,
};

use super::scene::{Scene, made, ok, status};

/// The status of every procedure that takes a name, for one name.
fn statuses(s: &mut Scene, name: &[u8]) -> Result<Vec<(&'static str, nfsstat3)>> {
    let fh = s.nfs.find(&s.root, b"f")?;
    let new = Sattr::default();
    Ok(vec![
        ("LOOKUP", status(&s.nfs.lookup(&s.root, name)?)),
        (
            "CREATE",
            status(&s.nfs.create(&s.root, name, How::Unchecked(new))?),
        ),
        (
            "EXCLUSIVE",
            status(&s.nfs.create(&s.root, name, How::Exclusive([1; 8]))?),
        ),
        ("MKDIR", status(&s.nfs.mkdir(&s.root, name, &new)?)),
        (
            "SYMLINK",
            status(&s.nfs.symlink(&s.root, name, &new, b"x")?),
        ),
        (
            "MKNOD",
            status(&s.nfs.mknod(&s.root, name, Node::Fifo, &new)?),
        ),
        ("LINK", status(&s.nfs.link(&fh, &s.root, name)?)),
        (
            "RENAME from",
            status(&s.nfs.rename((&s.root, name), (&s.root, b"x"))?),
        ),
        (
            "RENAME to",
            status(&s.nfs.rename((&s.root, b"f"), (&s.root, name))?),
        ),
        ("REMOVE", status(&s.nfs.remove(&s.root, name)?)),
        ("RMDIR", status(&s.nfs.rmdir(&s.root, name)?)),
    ])
}

#[test]
fn what_is_no_name_is_refused_by_every_procedure() -> Result<()> {
    let mut s = Scene::new()?;
    s.file("f", b"")?;
    let long = vec![b'n'; 256];
    let longer = vec![b'n'; 4000];
    let cases: [(&[u8], nfsstat3); 7] = [
        (b"", ACCES),
        (b"a/b", ACCES),
        (b"/", ACCES),
        (b"a\0b", ACCES),
        (b"\0", ACCES),
        (&long, NAMETOOLONG),
        (&longer, NAMETOOLONG),
    ];
    for (name, expected) in cases {
        for (procedure, got) in statuses(&mut s, name)? {
            let name = name.get(..10).unwrap_or(name).escape_ascii();
            ensure!(got == expected, "{procedure} of {name}: {got}");
        }
    }
    Ok(())
}

#[test]
fn dot_and_dot_dot_are_nothing_to_make_or_take() -> Result<()> {
    let mut s = Scene::new()?;
    s.file("f", b"")?;
    for name in [&b"."[..], b".."] {
        let is_dot = name == b".";
        for (procedure, got) in statuses(&mut s, name)? {
            let expected = match procedure {
                "LOOKUP" => OK,
                "RENAME from" | "RENAME to" => INVAL,
                "REMOVE" => ISDIR,
                "RMDIR" if is_dot => INVAL,
                _ => EXIST,
            };
            ensure!(
                got == expected,
                "{procedure} of {}: {got}",
                name.escape_ascii()
            );
        }
    }
    ensure!(s.path("f").exists());
    Ok(())
}

#[test]
fn dot_is_the_directory_and_dot_dot_stops_at_the_root() -> Result<()> {
    let mut s = Scene::new()?;
    let dir = s.dir("d")?;
    let inner = made(s.nfs.mkdir(&dir, b"e", &Sattr::mode(0o755))?, |ok| &ok.obj)?;
    ensure!(s.nfs.find(&inner, b".")? == inner);
    ensure!(s.nfs.find(&inner, b"..")? == dir);
    ensure!(s.nfs.find(&dir, b"..")? == s.root);
    ensure!(s.nfs.find(&s.root, b"..")? == s.root, "out of the export");
    // A directory that is moved out of the export leads nowhere.
    fs::rename(s.path("d/e"), s.site.path().join("e"))?;
    let got = status(&s.nfs.lookup(&inner, b"..")?);
    ensure!(got == STALE || got == NOENT, "{got}");
    Ok(())
}

#[test]
fn any_other_bytes_are_a_name() -> Result<()> {
    let mut s = Scene::new()?;
    let all: Vec<u8> = (1..=255).filter(|byte| *byte != b'/').collect();
    let most = vec![0xff; 255];
    let names: [&[u8]; 9] = [
        &all,
        &most,
        b" ",
        b"\n",
        b"...",
        b"-rf",
        b"\\",
        b"\xc3\x28",
        "\u{1f600}".as_bytes(),
    ];
    for name in names {
        let fh = made(
            s.nfs
                .create(&s.root, name, How::Guarded(Sattr::default()))?,
            |ok| &ok.obj,
        )?;
        ensure!(s.nfs.find(&s.root, name)? == fh, "{}", name.escape_ascii());
        ensure!(fs::metadata(s.site.export().join(OsStr::from_bytes(name))).is_ok());
        let listed = ok(s.nfs.readdir(&s.root, 0, 8192)?)?;
        ensure!(
            listed
                .reply
                .entries
                .0
                .iter()
                .any(|entry| entry.name.as_ref() == name)
        );
        ok(s.nfs.rename((&s.root, name), (&s.root, b"other"))?)?;
        ok(s.nfs.rename((&s.root, b"other"), (&s.root, name))?)?;
        ok(s.nfs.remove(&s.root, name)?)?;
    }
    Ok(())
}

#[test]
fn a_name_without_its_padding_is_garbage() -> Result<()> {
    let mut s = Scene::new()?;
    let mut message = args(|w| {
        w.opaque(&s.root);
        w.opaque(b"x");
    });
    message.truncate(message.len() - 3);
    ensure!(s.nfs.outcome(procedure::LOOKUP, &message)? == Outcome::GarbageArgs);
    let huge = args(|w| {
        w.opaque(&s.root);
        w.u32(u32::MAX);
    });
    ensure!(s.nfs.outcome(procedure::LOOKUP, &huge)? == Outcome::GarbageArgs);
    Ok(())
}

#[test]
fn rename_replaces_what_it_may() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("a", b"a")?;
    let replaced = s.file("b", b"b")?;
    ok(s.nfs.rename((&s.root, b"a"), (&s.root, b"b"))?)?;
    ensure!(fs::read(s.path("b"))? == b"a" && !s.path("a").exists());
    ensure!(
        s.nfs.find(&s.root, b"b")? == fh,
        "another handle after RENAME"
    );
    ensure!(status(&s.nfs.getattr(&replaced)?) == STALE);
    // A file replaces a link and not what it names.
    s.link("l", "b")?;
    s.file("c", b"c")?;
    ok(s.nfs.rename((&s.root, b"c"), (&s.root, b"l"))?)?;
    ensure!(fs::read(s.path("b"))? == b"a" && fs::read(s.path("l"))? == b"c");
    // A directory replaces an empty one.
    let dir = s.dir("d")?;
    fs::write(s.path("d/inside"), "")?;
    s.dir("e")?;
    ok(s.nfs.rename((&s.root, b"d"), (&s.root, b"e"))?)?;
    ensure!(s.path("e/inside").exists() && s.nfs.find(&s.root, b"e")? == dir);
    Ok(())
}

#[test]
fn rename_onto_itself_or_its_own_link_does_nothing() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("a", b"a")?;
    ok(s.nfs.rename((&s.root, b"a"), (&s.root, b"a"))?)?;
    ok(s.nfs.link(&fh, &s.root, b"b")?)?;
    ok(s.nfs.rename((&s.root, b"a"), (&s.root, b"b"))?)?;
    ensure!(
        s.path("a").exists() && s.path("b").exists(),
        "a link was lost"
    );
    ensure!(s.nfs.attributes(&fh)?.nlink == 2);
    s.dir("d")?;
    ok(s.nfs.rename((&s.root, b"d"), (&s.root, b"d"))?)?;
    Ok(())
}

#[test]
fn a_directory_can_not_be_moved_into_itself() -> Result<()> {
    let mut s = Scene::new()?;
    let dir = s.dir("d")?;
    let inner = made(s.nfs.mkdir(&dir, b"e", &Sattr::mode(0o755))?, |ok| &ok.obj)?;
    for (to, name) in [(&dir, b"x"), (&inner, b"x")] {
        let got = status(&s.nfs.rename((&s.root, b"d"), (to, name))?);
        ensure!(got == INVAL, "{got}");
    }
    // A directory above the one it would replace.
    let got = status(&s.nfs.rename((&dir, b"e"), (&s.root, b"d"))?);
    ensure!(got == NOTEMPTY || got == EXIST, "{got}");
    Ok(())
}

/// Permission for RENAME is the right to change both directories.
#[test]
fn a_moved_directory_has_another_parent() -> Result<()> {
    let mut s = Scene::new()?;
    let a = s.dir("a")?;
    let b = s.dir("b")?;
    let inner = made(s.nfs.mkdir(&a, b"e", &Sattr::mode(0o755))?, |ok| &ok.obj)?;
    let done = ok(s.nfs.rename((&a, b"e"), (&b, b"e"))?)?;
    ensure!(s.nfs.find(&inner, b"..")? == b);
    let links = |wcc: nfs3_types::nfs3::wcc_data| wcc.after.unwrap().nlink;
    let (from, to) = (links(done.fromdir_wcc), links(done.todir_wcc));
    let real = |name: &str| Ok::<_, anyhow::Error>(fs::metadata(s.path(name))?.nlink());
    ensure!(u64::from(from) == real("a")? && u64::from(to) == real("b")?);
    Ok(())
}
