//! The cells of [`super::status`] that need root: other users, devices, and a full file system.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::ensure;
use havenfs_tests::client::nfs::{FILE_SYNC, How, Node, UNSTABLE, answer};
use havenfs_tests::client::{Cred, Sattr, SetTime};
use nfs3_types::nfs3::Nfs3Result;
use nfs3_types::nfs3::nfsstat3::{
    NFS3_OK as OK, NFS3ERR_ACCES as ACCES, NFS3ERR_INVAL as INVAL, NFS3ERR_NOSPC as NOSPC,
    NFS3ERR_PERM as PERM,
};

use super::scene::{FULL, STRANGER};
use super::situation::until_no_space;
use super::status::{Cell, as_client, cells};
use super::table::{CREATE, MKDIR, MKNOD, SYMLINK};

/// Cells that need root.
pub(crate) fn cells_of_root() -> impl Iterator<Item = &'static Cell> {
    OF_ROOT.iter()
}

const STRANGERS: Cred = Cred::user(STRANGER, STRANGER);

const OF_ROOT: &[Cell] = cells! {
    "SETATTR" {
        PERM, "a stranger sets the mode", |s| {
            let fh = s.file("f", b"")?;
            as_client(s, STRANGERS, |nfs| answer(nfs.setattr(&fh, &Sattr::mode(0o777), None)))
        };
        PERM, "a user gives a file away", |s| {
            let fh = s.file("f", b"")?;
            let give = Sattr { uid: Some(STRANGER), ..Sattr::default() };
            answer(s.nfs.setattr(&fh, &give, None))
        };
        PERM, "a stranger sets a time of his own", |s| {
            let fh = s.file("f", b"")?;
            s.own("f", 0o666)?;
            let set = Sattr { mtime: SetTime::To(1, 0), ..Sattr::default() };
            as_client(s, STRANGERS, |nfs| answer(nfs.setattr(&fh, &set, None)))
        };
        ACCES, "a stranger cuts a file that he may not write", |s| {
            let fh = s.file("f", b"text")?;
            as_client(s, STRANGERS, |nfs| answer(nfs.setattr(&fh, &Sattr::size(0), None)))
        };
        ACCES, "a stranger touches a file that he may not write", |s| {
            let fh = s.file("f", b"text")?;
            let touch = Sattr { mtime: SetTime::Now, atime: SetTime::Now, ..Sattr::default() };
            as_client(s, STRANGERS, |nfs| answer(nfs.setattr(&fh, &touch, None)))
        };
        OK, "a stranger touches a file that he may write", |s| {
            let fh = s.file("f", b"text")?;
            s.own("f", 0o666)?;
            let touch = Sattr { mtime: SetTime::Now, atime: SetTime::Now, ..Sattr::default() };
            as_client(s, STRANGERS, |nfs| answer(nfs.setattr(&fh, &touch, None)))
        };
    }
    "READ" {
        ACCES, "a stranger", |s| {
            let fh = s.file("f", b"text")?;
            s.own("f", 0o600)?;
            as_client(s, STRANGERS, |nfs| answer(nfs.read(&fh, 0, 10)))
        };
        OK, "a stranger who may only execute", |s| {
            let fh = s.file("f", b"text")?;
            s.own("f", 0o711)?;
            as_client(s, STRANGERS, |nfs| answer(nfs.read(&fh, 0, 10)))
        };
        INVAL, "a character device, which is not opened", |s| {
            let root = s.root.clone();
            let fh = as_client(s, Cred::root(), |nfs| {
                nfs.mknod(&root, b"zero", Node::Character(1, 5), &Sattr::mode(0o666))?;
                nfs.find(&root, b"zero")
            })?;
            answer(s.nfs.read(&fh, 0, 10))
        };
    }
    "WRITE" {
        ACCES, "a stranger", |s| {
            let fh = s.file("f", b"text")?;
            as_client(s, STRANGERS, |nfs| answer(nfs.write(&fh, 0, UNSTABLE, b"x")))
        };
        NOSPC, "a full file system", |s| {
            let dir = s.other_root(FULL)?;
            s.nfs.create(&dir, b"n0", How::Unchecked(Sattr::mode(0o666)))?;
            let fh = s.nfs.find(&dir, b"n0")?;
            // What still fits may be written first, and the answer then says how much that was.
            let data = vec![1; 256 * 1024];
            let mut at = 0;
            while let Nfs3Result::Ok(done) = s.nfs.write(&fh, at, FILE_SYNC, &data)? {
                ensure!(done.count > 0 && at + u64::from(done.count) <= 65_536, "wrote {at}");
                at += u64::from(done.count);
            }
            ensure!(s.nfs.attributes(&fh)?.size == at, "more was written than answered");
            answer(s.nfs.write(&fh, at, FILE_SYNC, &data))
        };
    }
    "COMMIT" {
        ACCES, "a stranger", |s| {
            let fh = s.file("f", b"text")?;
            as_client(s, STRANGERS, |nfs| answer(nfs.commit(&fh, 0, 0)))
        };
    }
    "CREATE" {
        NOSPC, "a full file system", |s| until_no_space(s, CREATE);
        ACCES, "a stranger in a directory with mode 0755", |s| {
            let root = s.root.clone();
            as_client(s, STRANGERS, |nfs| {
                answer(nfs.create(&root, b"new", How::Guarded(Sattr::default())))
            })
        };
    }
    "MKDIR" {
        NOSPC, "a full file system", |s| until_no_space(s, MKDIR);
    }
    "SYMLINK" {
        NOSPC, "a full file system", |s| until_no_space(s, SYMLINK);
    }
    "MKNOD" {
        NOSPC, "a full file system", |s| until_no_space(s, MKNOD);
        OK, "root makes a block device", |s| {
            let root = s.root.clone();
            as_client(s, Cred::root(), |nfs| {
                answer(nfs.mknod(&root, b"loop", Node::Block(7, 99), &Sattr::mode(0o600)))
            })
        };
        PERM, "a user makes a device", |s| {
            answer(s.nfs.mknod(&s.root, b"zero", Node::Character(1, 5), &Sattr::mode(0o666)))
        };
    }
    "REMOVE" {
        PERM, "another's file in a sticky directory", |s| {
            s.file("f", b"")?;
            fs::set_permissions(s.path(""), fs::Permissions::from_mode(0o1777))?;
            let root = s.root.clone();
            as_client(s, STRANGERS, |nfs| answer(nfs.remove(&root, b"f")))
        };
    }
    "LINK" {
        NOSPC, "a full file system", |s| until_no_space(s, |s, dir, name| {
            s.nfs.create(dir, b"n0", How::Unchecked(Sattr::mode(0o666)))?;
            let fh = s.nfs.find(dir, b"n0")?;
            answer(s.nfs.link(&fh, dir, name))
        });
    }
};
