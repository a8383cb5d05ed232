//! Who may do what: ACCESS, the owner's override, and squashing.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use anyhow::{Result, ensure};
use havenfs_tests::client::nfs::{FILE_SYNC, How, Node, UNSTABLE};
use havenfs_tests::client::{Cred, Sattr};
use nfs3_types::nfs3::{
    ACCESS3_DELETE, ACCESS3_EXECUTE, ACCESS3_EXTEND, ACCESS3_LOOKUP, ACCESS3_MODIFY, ACCESS3_READ,
    nfsstat3,
};

use super::scene::{OPEN, STRANGER, Scene, USER, is_root, made, ok, status};

const ALL: u32 = 0x3f;
const FILE_WRITE: u32 = ACCESS3_MODIFY | ACCESS3_EXTEND;
const DIR_WRITE: u32 = ACCESS3_MODIFY | ACCESS3_EXTEND | ACCESS3_DELETE;

/// What ACCESS must say for one class of the mode's bits.
fn rights(bits: u32, is_dir: bool) -> u32 {
    let (r, w, x) = (bits & 4 != 0, bits & 2 != 0, bits & 1 != 0);
    let mut rights = 0;
    if r {
        rights |= ACCESS3_READ;
    }
    if is_dir {
        if x {
            rights |= ACCESS3_LOOKUP;
        }
        if w && x {
            rights |= DIR_WRITE;
        }
    } else {
        if w {
            rights |= FILE_WRITE;
        }
        if x {
            rights |= ACCESS3_EXECUTE;
        }
    }
    rights
}

#[test]
fn owner_rights_follow_the_first_class_of_the_mode() -> Result<()> {
    let mut s = Scene::new()?;
    for is_dir in [false, true] {
        let name = if is_dir { "d" } else { "f" };
        let fh = if is_dir {
            s.dir(name)?
        } else {
            s.file(name, b"")?
        };
        for bits in 0..8 {
            s.own(name, bits << 6)?;
            let got = ok(s.nfs.access(&fh, ALL)?)?.access;
            ensure!(
                got == rights(bits, is_dir),
                "mode 0{bits}00, directory {is_dir}: {got:#x}"
            );
            // Only what was asked for is answered.
            let got = ok(s.nfs.access(&fh, ACCESS3_READ)?)?.access;
            ensure!(
                got == rights(bits, is_dir) & ACCESS3_READ,
                "asked for READ: {got:#x}"
            );
        }
        s.own(name, 0o755)?;
    }
    Ok(())
}

#[test]
fn matrix_of_classes_needs_root() -> Result<()> {
    let mut s = Scene::new()?;
    let supplementary = Cred::Sys {
        uid: STRANGER,
        gid: STRANGER,
        gids: vec![1, 2, USER],
    };
    let callers = [
        (Cred::user(USER, STRANGER), 6),
        (Cred::user(STRANGER, USER), 3),
        (supplementary, 3),
        (Cred::user(STRANGER, STRANGER), 0),
    ];
    for is_dir in [false, true] {
        let name = if is_dir { "d" } else { "f" };
        let fh = if is_dir {
            s.dir(name)?
        } else {
            s.file(name, b"")?
        };
        for mode in [
            0o700, 0o070, 0o007, 0o420, 0o241, 0o124, 0o777, 0o000, 0o750, 0o664,
        ] {
            s.own(name, mode)?;
            for (cred, shift) in &callers {
                let mut nfs = s.client(cred.clone())?;
                let got = ok(nfs.access(&fh, ALL)?)?.access;
                let expected = rights((mode >> shift) & 7, is_dir);
                ensure!(
                    got == expected,
                    "{cred:?}, mode {mode:o}: {got:#x}, not {expected:#x}"
                );
            }
            let mut nfs = s.client(Cred::root())?;
            let got = ok(nfs.access(&fh, ALL)?)?.access;
            let may_execute = is_dir || mode & 0o111 != 0;
            let expected = rights(if may_execute { 7 } else { 6 }, is_dir);
            ensure!(
                got == expected,
                "root, mode {mode:o}: {got:#x}, not {expected:#x}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_read_only_export_clears_the_bits_of_writing() -> Result<()> {
    let mut s = Scene::with_options("ro,insecure,no_root_squash")?;
    let dir = s.dir("d")?;
    let fh = s.file("f", b"")?;
    s.own("f", 0o700)?;
    let got = ok(s.nfs.access(&dir, ALL)?)?.access;
    ensure!(got == ACCESS3_READ | ACCESS3_LOOKUP, "directory: {got:#x}");
    let got = ok(s.nfs.access(&fh, ALL)?)?.access;
    ensure!(got == ACCESS3_READ | ACCESS3_EXECUTE, "file: {got:#x}");
    // What a FIFO is written with does not reach the file system.
    let fh = s.fifo("p")?;
    let got = ok(s.nfs.access(&fh, ALL)?)?.access;
    ensure!(got == ACCESS3_READ | FILE_WRITE, "FIFO: {got:#x}");
    Ok(())
}

/// The client has checked when it opened the file; the mode may have changed since.
#[test]
fn the_owner_reads_and_writes_whatever_the_mode_says() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("f", b"text")?;
    s.own("f", 0)?;
    ensure!(ok(s.nfs.read(&fh, 0, 10)?)?.data.as_ref() == b"text");
    ok(s.nfs.write(&fh, 0, FILE_SYNC, b"TEXT")?)?;
    ok(s.nfs.commit(&fh, 0, 0)?)?;
    ok(s.nfs.setattr(&fh, &Sattr::size(2), None)?)?;
    ensure!(fs::metadata(s.path("f"))?.len() == 2);
    // ACCESS does not override: it is what the client checks with.
    ensure!(is_root() || ok(s.nfs.access(&fh, ALL)?)?.access == 0);
    Ok(())
}

#[test]
fn a_group_member_without_the_bit_is_refused_needs_root() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("f", b"text")?;
    s.own("f", 0o604)?;
    let mut member = s.client(Cred::user(STRANGER, USER))?;
    // The group's class decides, though all others may read.
    ensure!(status(&member.read(&fh, 0, 10)?) == nfsstat3::NFS3ERR_ACCES);
    let mut other = s.client(Cred::user(STRANGER, STRANGER))?;
    ok(other.read(&fh, 0, 10)?)?;
    Ok(())
}

#[test]
fn permissions_are_judged_on_every_call_though_the_file_is_open_needs_root() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.file("f", b"text")?;
    let mut stranger = s.client(Cred::user(STRANGER, STRANGER))?;
    s.own("f", 0o666)?;
    ok(stranger.read(&fh, 0, 10)?)?;
    ok(stranger.write(&fh, 0, UNSTABLE, b"x")?)?;
    s.own("f", 0o600)?;
    ensure!(status(&stranger.read(&fh, 0, 10)?) == nfsstat3::NFS3ERR_ACCES);
    ensure!(status(&stranger.write(&fh, 0, UNSTABLE, b"x")?) == nfsstat3::NFS3ERR_ACCES);
    Ok(())
}

/// Makes a file with this credential and says whose it is.
fn owner_of_new(s: &Scene, cred: Cred, name: &str) -> Result<(u32, u32)> {
    let mut nfs = s.client(cred)?;
    ok(nfs.create(&s.root, name.as_bytes(), How::Guarded(Sattr::mode(0o644)))?)?;
    let meta = fs::metadata(s.path(name))?;
    Ok((meta.uid(), meta.gid()))
}

/// A scene whose root everyone may write to.
fn open_to_all(options: &str) -> Result<Scene> {
    let s = Scene::with_options(options)?;
    fs::set_permissions(s.path(""), fs::Permissions::from_mode(0o777))?;
    Ok(s)
}

const NOBODY: u32 = 65_534;

#[test]
fn root_squash_is_the_default_needs_root() -> Result<()> {
    let s = open_to_all("rw,insecure")?;
    ensure!(owner_of_new(&s, Cred::root(), "r")? == (NOBODY, NOBODY));
    ensure!(owner_of_new(&s, Cred::user(USER, 0), "g")? == (USER, NOBODY));
    ensure!(owner_of_new(&s, Cred::user(USER, USER), "u")? == (USER, USER));
    ensure!(owner_of_new(&s, Cred::user(u32::MAX, u32::MAX), "m")? == (NOBODY, NOBODY));
    ensure!(owner_of_new(&s, Cred::None, "n")? == (NOBODY, NOBODY));
    // A supplementary group 0 gives no right to root's files either.
    fs::write(s.path("of-group-0"), "x")?;
    fs::set_permissions(s.path("of-group-0"), fs::Permissions::from_mode(0o040))?;
    let cred = Cred::Sys {
        uid: USER,
        gid: USER,
        gids: vec![0],
    };
    let mut nfs = s.client(cred)?;
    let fh = nfs.find(&s.root, b"of-group-0")?;
    ensure!(status(&nfs.read(&fh, 0, 1)?) == nfsstat3::NFS3ERR_ACCES);
    let mut root = s.client(Cred::root())?;
    ensure!(status(&root.read(&fh, 0, 1)?) == nfsstat3::NFS3ERR_ACCES);
    Ok(())
}

#[test]
fn squash_options_choose_the_identity_needs_root() -> Result<()> {
    let s = open_to_all(OPEN)?;
    ensure!(owner_of_new(&s, Cred::root(), "r")? == (0, 0));
    ensure!(owner_of_new(&s, Cred::None, "n")? == (NOBODY, NOBODY));
    let s = open_to_all("rw,insecure,anonuid=777,anongid=778")?;
    ensure!(owner_of_new(&s, Cred::root(), "r")? == (777, 778));
    ensure!(owner_of_new(&s, Cred::user(USER, USER), "u")? == (USER, USER));
    let s = open_to_all("rw,insecure,all_squash,no_root_squash,anonuid=777,anongid=778")?;
    ensure!(owner_of_new(&s, Cred::root(), "r")? == (777, 778));
    ensure!(owner_of_new(&s, Cred::user(USER, USER), "u")? == (777, 778));
    // Nor does a squashed caller keep its groups.
    fs::write(s.path("of-user"), "x")?;
    std::os::unix::fs::chown(s.path("of-user"), Some(0), Some(USER))?;
    fs::set_permissions(s.path("of-user"), fs::Permissions::from_mode(0o040))?;
    let cred = Cred::Sys {
        uid: USER,
        gid: USER,
        gids: vec![USER],
    };
    let mut nfs = s.client(cred)?;
    let fh = nfs.find(&s.root, b"of-user")?;
    ensure!(status(&nfs.read(&fh, 0, 1)?) == nfsstat3::NFS3ERR_ACCES);
    Ok(())
}

#[test]
fn only_real_root_makes_devices_needs_root() -> Result<()> {
    let s = open_to_all("rw,insecure")?;
    let mut squashed = s.client(Cred::root())?;
    let zero = Node::Character(1, 5);
    let mode = Sattr::mode(0o666);
    let refused = squashed.mknod(&s.root, b"zero", zero, &mode)?;
    ensure!(status(&refused) == nfsstat3::NFS3ERR_PERM);
    let s = open_to_all(OPEN)?;
    let mut root = s.client(Cred::root())?;
    let fh = made(root.mknod(&s.root, b"zero", zero, &mode)?, |ok| &ok.obj)?;
    let attributes = root.attributes(&fh)?;
    ensure!((attributes.rdev.specdata1, attributes.rdev.specdata2) == (1, 5));
    ensure!(attributes.mode == 0o666);
    Ok(())
}
