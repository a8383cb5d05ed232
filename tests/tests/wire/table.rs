//! The cells of [`super::status`]: for each procedure, the situations that produce its statuses.
//!
//! A cell works in a directory of its own (`scene.root`), which belongs to the scene's user.

use std::fs;

use anyhow::Result;
use havenfs_tests::client::nfs::{FILE_SYNC, How, Node, UNSTABLE, answer};
use havenfs_tests::client::{Answer, Sattr};
use nfs3_types::nfs3::nfsstat3::{
    NFS3_OK as OK, NFS3ERR_ACCES as ACCES, NFS3ERR_BADHANDLE as BADHANDLE,
    NFS3ERR_BADTYPE as BADTYPE, NFS3ERR_EXIST as EXIST, NFS3ERR_FBIG as FBIG,
    NFS3ERR_INVAL as INVAL, NFS3ERR_ISDIR as ISDIR, NFS3ERR_JUKEBOX as JUKEBOX,
    NFS3ERR_MLINK as MLINK, NFS3ERR_NAMETOOLONG as NAMETOOLONG, NFS3ERR_NOENT as NOENT,
    NFS3ERR_NOT_SYNC as NOT_SYNC, NFS3ERR_NOTDIR as NOTDIR, NFS3ERR_NOTEMPTY as NOTEMPTY,
    NFS3ERR_PERM as PERM, NFS3ERR_ROFS as ROFS, NFS3ERR_STALE as STALE,
    NFS3ERR_TOOSMALL as TOOSMALL, NFS3ERR_XDEV as XDEV,
};

use super::scene::{OTHER, READ_ONLY, Scene};
use super::situation::{NotHere, closed_dir, forged, gone_dir, gone_file, leased_file, long_name};
use super::status::{Cell, cells};

/// Cells that any user can run.
pub(crate) fn cells() -> impl Iterator<Item = &'static Cell> {
    let making = [CREATING, MAKING_DIRS, LINKING, MAKING_NODES];
    [OBJECTS, DATA, TAKING, MOVING, LISTING]
        .into_iter()
        .chain(making)
        .flatten()
}

const OBJECTS: &[Cell] = cells! {
    "GETATTR" {
        OK, "a directory", |s| answer(s.nfs.getattr(&s.root));
        STALE(unknown), "a removed file", |s| {
            let fh = gone_file(s)?;
            answer(s.nfs.getattr(&fh))
        };
        BADHANDLE(unknown), "a forged handle", |s| answer(s.nfs.getattr(&forged(&s.root)));
    }
    "SETATTR" {
        OK, "the owner sets a mode", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.setattr(&fh, &Sattr::mode(0o600), None))
        };
        NOT_SYNC, "a guard that is not the ctime", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.setattr(&fh, &Sattr::mode(0o600), Some((1, 2))))
        };
        INVAL, "the size of a FIFO", |s| {
            let fh = s.fifo("f")?;
            answer(s.nfs.setattr(&fh, &Sattr::size(1), None))
        };
        ISDIR, "the size of a directory", |s| {
            answer(s.nfs.setattr(&s.root, &Sattr::size(1), None))
        };
        FBIG, "a size above 2^63", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.setattr(&fh, &Sattr::size(1 << 63), None))
        };
        ROFS, "a read-only export", |s| {
            let dir = s.other_root(READ_ONLY)?;
            answer(s.nfs.setattr(&dir, &Sattr::mode(0o777), None))
        };
        JUKEBOX, "the size of a file with a lease on it", |s| {
            let (fh, _lease) = leased_file(s)?;
            answer(s.nfs.setattr(&fh, &Sattr::size(0), None))
        };
        STALE(unknown), "a removed file", |s| {
            let fh = gone_file(s)?;
            answer(s.nfs.setattr(&fh, &Sattr::mode(0), None))
        };
        BADHANDLE(unknown), "a forged handle", |s| {
            answer(s.nfs.setattr(&forged(&s.root), &Sattr::mode(0), None))
        };
    }
    "LOOKUP" {
        OK, "a file", |s| {
            s.file("f", b"")?;
            answer(s.nfs.lookup(&s.root, b"f"))
        };
        NOENT, "no such name", |s| answer(s.nfs.lookup(&s.root, b"f"));
        ACCES, "a directory that can't be searched", |s| {
            let dir = closed_dir(s, 0o644)?;
            answer(s.nfs.lookup(&dir, b"f"))
        };
        ACCES, "an empty name", |s| answer(s.nfs.lookup(&s.root, b""));
        NOTDIR, "in a file", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.lookup(&fh, b"x"))
        };
        NAMETOOLONG, "256 bytes", |s| answer(s.nfs.lookup(&s.root, &long_name()));
        STALE(unknown), "in a removed directory", |s| {
            let dir = gone_dir(s)?;
            answer(s.nfs.lookup(&dir, b"x"))
        };
        BADHANDLE(unknown), "a forged handle", |s| answer(s.nfs.lookup(&forged(&s.root), b"x"));
    }
    "ACCESS" {
        OK, "a directory", |s| answer(s.nfs.access(&s.root, 0x3f));
        STALE(unknown), "a removed file", |s| {
            let fh = gone_file(s)?;
            answer(s.nfs.access(&fh, 0x3f))
        };
        BADHANDLE(unknown), "a forged handle", |s| answer(s.nfs.access(&forged(&s.root), 1));
    }
    "READLINK" {
        OK, "a symbolic link", |s| {
            let fh = s.link("l", "text")?;
            answer(s.nfs.readlink(&fh))
        };
        INVAL, "a file", |s| {
            let fh = s.file("f", b"text")?;
            answer(s.nfs.readlink(&fh))
        };
        STALE(unknown), "a removed link", |s| {
            let fh = s.link("l", "text")?;
            s.nfs.remove(&s.root, b"l")?;
            answer(s.nfs.readlink(&fh))
        };
        BADHANDLE(unknown), "a forged handle", |s| answer(s.nfs.readlink(&forged(&s.root)));
    }
    "FSSTAT" {
        OK, "the root", |s| answer(s.nfs.fsstat(&s.root));
        STALE(unknown), "a removed directory", |s| {
            let dir = gone_dir(s)?;
            answer(s.nfs.fsstat(&dir))
        };
        BADHANDLE(unknown), "a forged handle", |s| answer(s.nfs.fsstat(&forged(&s.root)));
    }
    "FSINFO" {
        OK, "the root", |s| answer(s.nfs.fsinfo(&s.root));
        STALE(unknown), "a removed directory", |s| {
            let dir = gone_dir(s)?;
            answer(s.nfs.fsinfo(&dir))
        };
        BADHANDLE(unknown), "a forged handle", |s| answer(s.nfs.fsinfo(&forged(&s.root)));
    }
    "PATHCONF" {
        OK, "the root", |s| answer(s.nfs.pathconf(&s.root));
        STALE(unknown), "a removed directory", |s| {
            let dir = gone_dir(s)?;
            answer(s.nfs.pathconf(&dir))
        };
        BADHANDLE(unknown), "a forged handle", |s| answer(s.nfs.pathconf(&forged(&s.root)));
    }
};

const DATA: &[Cell] = cells! {
    "READ" {
        OK, "a file", |s| {
            let fh = s.file("f", b"text")?;
            answer(s.nfs.read(&fh, 0, 100))
        };
        INVAL, "a FIFO, which is not opened", |s| {
            let fh = s.fifo("f")?;
            answer(s.nfs.read(&fh, 0, 100))
        };
        ISDIR, "a directory", |s| answer(s.nfs.read(&s.root, 0, 100));
        JUKEBOX, "a file with a lease on it", |s| {
            let (fh, _lease) = leased_file(s)?;
            answer(s.nfs.read(&fh, 0, 100))
        };
        STALE(unknown), "a removed file", |s| {
            let fh = gone_file(s)?;
            answer(s.nfs.read(&fh, 0, 100))
        };
        BADHANDLE(unknown), "a forged handle", |s| answer(s.nfs.read(&forged(&s.root), 0, 1));
    }
    "WRITE" {
        OK, "a file", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.write(&fh, 0, FILE_SYNC, b"text"))
        };
        FBIG, "beyond 2^63", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.write(&fh, i64::MAX as u64, UNSTABLE, b"text"))
        };
        INVAL, "a FIFO, which is not opened", |s| {
            let fh = s.fifo("f")?;
            answer(s.nfs.write(&fh, 0, UNSTABLE, b"text"))
        };
        ISDIR, "a directory", |s| answer(s.nfs.write(&s.root, 0, UNSTABLE, b"text"));
        ROFS, "a read-only export", |s| {
            let dir = s.other_root(READ_ONLY)?;
            let fh = s.nfs.find(&dir, b"file")?;
            answer(s.nfs.write(&fh, 0, UNSTABLE, b"text"))
        };
        JUKEBOX, "a file with a lease on it", |s| {
            let (fh, _lease) = leased_file(s)?;
            answer(s.nfs.write(&fh, 0, UNSTABLE, b"text"))
        };
        STALE(unknown), "a removed file", |s| {
            let fh = gone_file(s)?;
            answer(s.nfs.write(&fh, 0, UNSTABLE, b"text"))
        };
        BADHANDLE(unknown), "a forged handle", |s| {
            answer(s.nfs.write(&forged(&s.root), 0, UNSTABLE, b"text"))
        };
    }
    "COMMIT" {
        OK, "a file", |s| {
            let fh = s.file("f", b"")?;
            s.nfs.write(&fh, 0, UNSTABLE, b"text")?;
            answer(s.nfs.commit(&fh, 0, 0))
        };
        INVAL, "a range beyond 2^64", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.commit(&fh, u64::MAX, 2))
        };
        STALE(unknown), "a removed file", |s| {
            let fh = gone_file(s)?;
            answer(s.nfs.commit(&fh, 0, 0))
        };
        BADHANDLE(unknown), "a forged handle", |s| answer(s.nfs.commit(&forged(&s.root), 0, 0));
    }
};

/// The four procedures that make a name have the same cells but for what they make.
macro_rules! making {
    ($procedure:literal, $make:expr; $($more:tt)*) => {
        cells! {
            $procedure {
                OK, "a new name", |s| $make(s, &s.root.clone(), b"new");
                ACCES, "a directory that can't be changed", |s| {
                    let dir = closed_dir(s, 0o555)?;
                    $make(s, &dir, b"new")
                };
                EXIST, "a name that a directory has", |s| {
                    s.dir("d")?;
                    let fh = s.root.clone();
                    // CREATE says ISDIR to an UNCHECKED one, so `$make` must not be that.
                    $make(s, &fh, b"d")
                };
                NOTDIR, "in a file", |s| {
                    let fh = s.file("f", b"")?;
                    $make(s, &fh, b"new")
                };
                NAMETOOLONG, "256 bytes", |s| $make(s, &s.root.clone(), &long_name());
                ROFS, "a read-only export", |s| {
                    let dir = s.other_root(READ_ONLY)?;
                    $make(s, &dir, b"new")
                };
                STALE(unknown), "in a removed directory", |s| {
                    let dir = gone_dir(s)?;
                    $make(s, &dir, b"new")
                };
                BADHANDLE(unknown), "a forged handle", |s| $make(s, &forged(&s.root), b"new");
                $($more)*
            }
        }
    };
}

pub(crate) type Make = fn(&mut Scene, &[u8], &[u8]) -> Result<Answer>;
pub(crate) const CREATE: Make =
    |s, dir, name| answer(s.nfs.create(dir, name, How::Guarded(Sattr::mode(0o644))));
pub(crate) const MKDIR: Make = |s, dir, name| answer(s.nfs.mkdir(dir, name, &Sattr::mode(0o755)));
pub(crate) const SYMLINK: Make =
    |s, dir, name| answer(s.nfs.symlink(dir, name, &Sattr::default(), b"text"));
pub(crate) const MKNOD: Make =
    |s, dir, name| answer(s.nfs.mknod(dir, name, Node::Fifo, &Sattr::mode(0o644)));

const CREATING: &[Cell] = making!("CREATE", CREATE;
    ISDIR, "UNCHECKED with the name of a directory", |s| {
        s.dir("d")?;
        answer(s.nfs.create(&s.root, b"d", How::Unchecked(Sattr::default())))
    };
    EXIST, "UNCHECKED with the name of a FIFO", |s| {
        s.fifo("f")?;
        answer(s.nfs.create(&s.root, b"f", How::Unchecked(Sattr::default())))
    };
    EXIST, "EXCLUSIVE with the name of a file", |s| {
        s.file("f", b"")?;
        answer(s.nfs.create(&s.root, b"f", How::Exclusive(*b"verifier")))
    };
);
const MAKING_DIRS: &[Cell] = making!("MKDIR", MKDIR;);
const LINKING: &[Cell] = making!("SYMLINK", SYMLINK;);
const MAKING_NODES: &[Cell] = making!("MKNOD", MKNOD;
    BADTYPE, "a regular file", |s| {
        answer(s.nfs.mknod(&s.root, b"f", Node::Other(1), &Sattr::default()))
    };
);
const TAKING: &[Cell] = cells! {
    "REMOVE" {
        OK, "a file", |s| {
            s.file("f", b"")?;
            answer(s.nfs.remove(&s.root, b"f"))
        };
        NOENT, "no such name", |s| answer(s.nfs.remove(&s.root, b"f"));
        ISDIR, "a directory", |s| {
            s.dir("d")?;
            answer(s.nfs.remove(&s.root, b"d"))
        };
        ACCES, "in a directory that can't be changed", |s| {
            let dir = closed_dir(s, 0o555)?;
            answer(s.nfs.remove(&dir, b"inside"))
        };
        NOTDIR, "in a file", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.remove(&fh, b"x"))
        };
        NAMETOOLONG, "256 bytes", |s| answer(s.nfs.remove(&s.root, &long_name()));
        ROFS, "a read-only export", |s| {
            let dir = s.other_root(READ_ONLY)?;
            answer(s.nfs.remove(&dir, b"file"))
        };
        STALE(unknown), "in a removed directory", |s| {
            let dir = gone_dir(s)?;
            answer(s.nfs.remove(&dir, b"x"))
        };
        BADHANDLE(unknown), "a forged handle", |s| answer(s.nfs.remove(&forged(&s.root), b"x"));
    }
    "RMDIR" {
        OK, "an empty directory", |s| {
            s.dir("d")?;
            answer(s.nfs.rmdir(&s.root, b"d"))
        };
        NOENT, "no such name", |s| answer(s.nfs.rmdir(&s.root, b"d"));
        ACCES, "in a directory that can't be changed", |s| {
            let dir = closed_dir(s, 0o555)?;
            answer(s.nfs.rmdir(&dir, b"inside-dir"))
        };
        INVAL, "the name .", |s| answer(s.nfs.rmdir(&s.root, b"."));
        EXIST, "the name ..", |s| answer(s.nfs.rmdir(&s.root, b".."));
        NOTDIR, "a file", |s| {
            s.file("f", b"")?;
            answer(s.nfs.rmdir(&s.root, b"f"))
        };
        NOTEMPTY, "a directory with a file in it", |s| {
            s.dir("d")?;
            fs::write(s.path("d/f"), "")?;
            answer(s.nfs.rmdir(&s.root, b"d"))
        };
        NAMETOOLONG, "256 bytes", |s| answer(s.nfs.rmdir(&s.root, &long_name()));
        ROFS, "a read-only export", |s| {
            let dir = s.other_root(READ_ONLY)?;
            answer(s.nfs.rmdir(&dir, b"x"))
        };
        STALE(unknown), "in a removed directory", |s| {
            let dir = gone_dir(s)?;
            answer(s.nfs.rmdir(&dir, b"x"))
        };
        BADHANDLE(unknown), "a forged handle", |s| answer(s.nfs.rmdir(&forged(&s.root), b"x"));
    }
};

const MOVING: &[Cell] = cells! {
    "RENAME" {
        OK, "a file", |s| {
            s.file("a", b"")?;
            answer(s.nfs.rename((&s.root, b"a"), (&s.root, b"b")))
        };
        NOENT, "no such name", |s| answer(s.nfs.rename((&s.root, b"a"), (&s.root, b"b")));
        ACCES, "from a directory that can't be changed", |s| {
            let dir = closed_dir(s, 0o555)?;
            answer(s.nfs.rename((&dir, b"inside"), (&s.root, b"b")))
        };
        XDEV, "to another export", |s| {
            s.file("a", b"")?;
            let other = s.other_root(OTHER)?;
            answer(s.nfs.rename((&s.root, b"a"), (&other, b"b")))
        };
        NOTDIR, "a directory onto a file", |s| {
            s.dir("d")?;
            s.file("f", b"")?;
            answer(s.nfs.rename((&s.root, b"d"), (&s.root, b"f")))
        };
        NOTDIR, "in a file", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.rename((&s.root, b"f"), (&fh, b"x")))
        };
        ISDIR, "a file onto a directory", |s| {
            s.dir("d")?;
            s.file("f", b"")?;
            answer(s.nfs.rename((&s.root, b"f"), (&s.root, b"d")))
        };
        INVAL, "a directory into itself", |s| {
            let dir = s.dir("d")?;
            answer(s.nfs.rename((&s.root, b"d"), (&dir, b"x")))
        };
        INVAL, "the name .", |s| answer(s.nfs.rename((&s.root, b"."), (&s.root, b"x")));
        INVAL, "to the name ..", |s| {
            s.dir("d")?;
            answer(s.nfs.rename((&s.root, b"d"), (&s.root, b"..")))
        };
        NOTEMPTY, "onto a directory with a file in it", |s| {
            s.dir("d")?;
            s.dir("e")?;
            fs::write(s.path("e/f"), "")?;
            answer(s.nfs.rename((&s.root, b"d"), (&s.root, b"e")))
        };
        NAMETOOLONG, "256 bytes", |s| {
            s.file("a", b"")?;
            answer(s.nfs.rename((&s.root, b"a"), (&s.root, &long_name())))
        };
        ROFS, "a read-only export", |s| {
            let dir = s.other_root(READ_ONLY)?;
            answer(s.nfs.rename((&dir, b"file"), (&dir, b"x")))
        };
        STALE(unknown), "to a removed directory", |s| {
            s.file("a", b"")?;
            let dir = gone_dir(s)?;
            answer(s.nfs.rename((&s.root, b"a"), (&dir, b"b")))
        };
        BADHANDLE(unknown), "a forged handle", |s| {
            answer(s.nfs.rename((&s.root, b"a"), (&forged(&s.root), b"b")))
        };
    }
    "LINK" {
        OK, "a file", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.link(&fh, &s.root, b"g"))
        };
        ACCES, "into a directory that can't be changed", |s| {
            let fh = s.file("f", b"")?;
            let dir = closed_dir(s, 0o555)?;
            answer(s.nfs.link(&fh, &dir, b"g"))
        };
        EXIST, "a name that is there", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.link(&fh, &s.root, b"f"))
        };
        XDEV, "into another export", |s| {
            let fh = s.file("f", b"")?;
            let other = s.other_root(OTHER)?;
            answer(s.nfs.link(&fh, &other, b"g"))
        };
        NOTDIR, "in a file", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.link(&fh, &fh, b"g"))
        };
        PERM, "a directory", |s| {
            let dir = s.dir("d")?;
            answer(s.nfs.link(&dir, &s.root, b"e"))
        };
        NAMETOOLONG, "256 bytes", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.link(&fh, &s.root, &long_name()))
        };
        ROFS, "a read-only export", |s| {
            let dir = s.other_root(READ_ONLY)?;
            let fh = s.nfs.find(&dir, b"file")?;
            answer(s.nfs.link(&fh, &dir, b"g"))
        };
        MLINK, "a file with as many names as there can be", |s| {
            let fh = s.file("f", b"")?;
            let most = super::scene::ok(s.nfs.pathconf(&fh)?)?.linkmax;
            if !(1000..=70_000).contains(&most) {
                return Err(NotHere("this file system has no small bound").into());
            }
            for number in 1..most {
                if fs::hard_link(s.path("f"), s.path(&format!("l{number}"))).is_err() {
                    break;
                }
            }
            answer(s.nfs.link(&fh, &s.root, b"one-more"))
        };
        STALE(unknown), "a removed file", |s| {
            let fh = gone_file(s)?;
            answer(s.nfs.link(&fh, &s.root, b"g"))
        };
        BADHANDLE(unknown), "a forged handle", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.link(&forged(&fh), &s.root, b"g"))
        };
    }
};

const LISTING: &[Cell] = cells! {
    "READDIR" {
        OK, "a directory", |s| answer(s.nfs.readdir(&s.root, 0, 4096));
        ACCES, "a directory that can't be read", |s| {
            let dir = closed_dir(s, 0o311)?;
            answer(s.nfs.readdir(&dir, 0, 4096))
        };
        NOTDIR, "a file", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.readdir(&fh, 0, 4096))
        };
        TOOSMALL, "room for no entry", |s| answer(s.nfs.readdir(&s.root, 0, 64));
        STALE(unknown), "a removed directory", |s| {
            let dir = gone_dir(s)?;
            answer(s.nfs.readdir(&dir, 0, 4096))
        };
        BADHANDLE(unknown), "a forged handle", |s| {
            answer(s.nfs.readdir(&forged(&s.root), 0, 4096))
        };
    }
    "READDIRPLUS" {
        OK, "a directory", |s| answer(s.nfs.readdirplus(&s.root, 0, 4096, 8192));
        ACCES, "a directory that can't be read", |s| {
            let dir = closed_dir(s, 0o311)?;
            answer(s.nfs.readdirplus(&dir, 0, 4096, 8192))
        };
        NOTDIR, "a file", |s| {
            let fh = s.file("f", b"")?;
            answer(s.nfs.readdirplus(&fh, 0, 4096, 8192))
        };
        TOOSMALL, "room for no entry", |s| answer(s.nfs.readdirplus(&s.root, 0, 64, 128));
        STALE(unknown), "a removed directory", |s| {
            let dir = gone_dir(s)?;
            answer(s.nfs.readdirplus(&dir, 0, 4096, 8192))
        };
        BADHANDLE(unknown), "a forged handle", |s| {
            answer(s.nfs.readdirplus(&forged(&s.root), 0, 4096, 8192))
        };
    }
};
