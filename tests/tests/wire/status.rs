//! The table of procedure and status of RFC 1813 3.3: which cells a test reaches and how, and why
//! the others can't be reached.
//!
//! [`RFC`] is the RFC's own list. Every cell of it is either in [`super::table::cells`] or in
//! [`UNREACHED`], which a test checks. The RFC says (3.2) that servers may answer with statuses
//! that a procedure's list leaves out; cells beyond the list are run too and printed apart.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::{Answer, Nfs};
use havenfs_tests::server::{V4, V6};
use nfs3_types::nfs3::nfsstat3::{
    self, NFS3_OK as OK, NFS3ERR_ACCES as ACCES, NFS3ERR_BAD_COOKIE as BAD_COOKIE,
    NFS3ERR_BADHANDLE as BADHANDLE, NFS3ERR_BADTYPE as BADTYPE, NFS3ERR_DQUOT as DQUOT,
    NFS3ERR_EXIST as EXIST, NFS3ERR_FBIG as FBIG, NFS3ERR_INVAL as INVAL, NFS3ERR_IO as IO,
    NFS3ERR_ISDIR as ISDIR, NFS3ERR_MLINK as MLINK, NFS3ERR_NAMETOOLONG as NAMETOOLONG,
    NFS3ERR_NOENT as NOENT, NFS3ERR_NOSPC as NOSPC, NFS3ERR_NOT_SYNC as NOT_SYNC,
    NFS3ERR_NOTDIR as NOTDIR, NFS3ERR_NOTEMPTY as NOTEMPTY, NFS3ERR_NOTSUPP as NOTSUPP,
    NFS3ERR_NXIO as NXIO, NFS3ERR_PERM as PERM, NFS3ERR_ROFS as ROFS,
    NFS3ERR_SERVERFAULT as SERVERFAULT, NFS3ERR_STALE as STALE, NFS3ERR_TOOSMALL as TOOSMALL,
    NFS3ERR_XDEV as XDEV,
};

use super::scene::Scene;
use super::situation::NotHere;
use super::{table, table_root};

/// A way to reach one status of one procedure.
pub(crate) struct Cell {
    pub(crate) procedure: &'static str,
    pub(crate) status: nfsstat3,
    pub(crate) situation: &'static str,
    /// Whether the answer must carry attributes: not where no file is known.
    pub(crate) attributes: bool,
    pub(crate) run: fn(&mut Scene) -> Result<Answer>,
}

/// Writes cells as a table: procedure, then status, situation and how to get there. `(unknown)`
/// behind a status says that no attributes can be expected.
macro_rules! cells {
    ($($procedure:literal {$(
        $status:ident $(($without:ident))?, $situation:literal, $run:expr;
    )*})*) => {
        &[$($($crate::status::Cell {
            procedure: $procedure,
            status: $status,
            situation: $situation,
            attributes: $crate::status::attributes!($($without)?),
            run: $run,
        }),*),*]
    };
}

macro_rules! attributes {
    () => {
        true
    };
    (unknown) => {
        false
    };
}

pub(crate) use {attributes, cells};

/// The statuses that RFC 1813 3.3 lists for each procedure.
pub(crate) const RFC: &[(&str, &[nfsstat3])] = &[
    ("GETATTR", &[OK, IO, STALE, BADHANDLE, SERVERFAULT]),
    (
        "SETATTR",
        &[
            OK,
            PERM,
            IO,
            ACCES,
            INVAL,
            NOSPC,
            ROFS,
            DQUOT,
            NOT_SYNC,
            STALE,
            BADHANDLE,
            NOTSUPP,
            SERVERFAULT,
        ],
    ),
    (
        "LOOKUP",
        &[
            OK,
            IO,
            NOENT,
            ACCES,
            NOTDIR,
            NAMETOOLONG,
            STALE,
            BADHANDLE,
            SERVERFAULT,
        ],
    ),
    ("ACCESS", &[OK, IO, STALE, BADHANDLE, SERVERFAULT]),
    (
        "READLINK",
        &[OK, IO, INVAL, ACCES, STALE, BADHANDLE, NOTSUPP, SERVERFAULT],
    ),
    (
        "READ",
        &[OK, IO, NXIO, ACCES, INVAL, STALE, BADHANDLE, SERVERFAULT],
    ),
    (
        "WRITE",
        &[
            OK,
            IO,
            ACCES,
            FBIG,
            DQUOT,
            NOSPC,
            ROFS,
            INVAL,
            STALE,
            BADHANDLE,
            SERVERFAULT,
        ],
    ),
    ("CREATE", MAKING),
    ("MKDIR", MAKING),
    ("SYMLINK", MAKING),
    (
        "MKNOD",
        &[
            OK,
            IO,
            ACCES,
            EXIST,
            NOTDIR,
            NOSPC,
            ROFS,
            NAMETOOLONG,
            DQUOT,
            STALE,
            BADHANDLE,
            NOTSUPP,
            SERVERFAULT,
            BADTYPE,
        ],
    ),
    (
        "REMOVE",
        &[
            OK,
            NOENT,
            IO,
            ACCES,
            NOTDIR,
            NAMETOOLONG,
            ROFS,
            STALE,
            BADHANDLE,
            SERVERFAULT,
        ],
    ),
    (
        "RMDIR",
        &[
            OK,
            NOENT,
            IO,
            ACCES,
            INVAL,
            EXIST,
            NOTDIR,
            NAMETOOLONG,
            ROFS,
            NOTEMPTY,
            STALE,
            BADHANDLE,
            NOTSUPP,
            SERVERFAULT,
        ],
    ),
    (
        "RENAME",
        &[
            OK,
            NOENT,
            IO,
            ACCES,
            EXIST,
            XDEV,
            NOTDIR,
            ISDIR,
            INVAL,
            NOSPC,
            ROFS,
            MLINK,
            NAMETOOLONG,
            NOTEMPTY,
            DQUOT,
            STALE,
            BADHANDLE,
            NOTSUPP,
            SERVERFAULT,
        ],
    ),
    (
        "LINK",
        &[
            OK,
            IO,
            ACCES,
            EXIST,
            XDEV,
            NOTDIR,
            INVAL,
            NOSPC,
            ROFS,
            MLINK,
            NAMETOOLONG,
            DQUOT,
            STALE,
            BADHANDLE,
            NOTSUPP,
            SERVERFAULT,
        ],
    ),
    (
        "READDIR",
        &[
            OK,
            IO,
            ACCES,
            NOTDIR,
            BAD_COOKIE,
            TOOSMALL,
            STALE,
            BADHANDLE,
            SERVERFAULT,
        ],
    ),
    (
        "READDIRPLUS",
        &[
            OK,
            IO,
            ACCES,
            NOTDIR,
            BAD_COOKIE,
            TOOSMALL,
            STALE,
            BADHANDLE,
            NOTSUPP,
            SERVERFAULT,
        ],
    ),
    ("FSSTAT", &[OK, IO, STALE, BADHANDLE, SERVERFAULT]),
    ("FSINFO", &[OK, STALE, BADHANDLE, SERVERFAULT]),
    ("PATHCONF", &[OK, STALE, BADHANDLE, SERVERFAULT]),
    ("COMMIT", &[OK, IO, STALE, BADHANDLE, SERVERFAULT]),
];

const MAKING: &[nfsstat3] = &[
    OK,
    IO,
    ACCES,
    EXIST,
    NOTDIR,
    NOSPC,
    ROFS,
    NAMETOOLONG,
    DQUOT,
    STALE,
    BADHANDLE,
    NOTSUPP,
    SERVERFAULT,
];

/// Why cells are not reached: procedure (`*` is every one), status, reason.
pub(crate) const UNREACHED: &[(&str, nfsstat3, &str)] = &[
    ("*", IO, "needs a disk that fails"),
    (
        "*",
        SERVERFAULT,
        "never answered: what fails has a status of its own",
    ),
    ("*", DQUOT, "needs a file system with quotas"),
    (
        "SETATTR",
        NOTSUPP,
        "needs a file system that can't store an attribute",
    ),
    (
        "READLINK",
        NOTSUPP,
        "every file system of Linux has symbolic links or none to read",
    ),
    (
        "READLINK",
        ACCES,
        "links have no permissions, and the export's rule is a cell of GETATTR",
    ),
    ("READ", NXIO, "devices are never opened: INVAL"),
    ("CREATE", NOTSUPP, "files are always supported"),
    ("MKDIR", NOTSUPP, "directories are always supported"),
    (
        "SYMLINK",
        NOTSUPP,
        "needs a file system without symbolic links, which says PERM",
    ),
    (
        "MKNOD",
        NOTSUPP,
        "needs a file system without special files, which says PERM",
    ),
    ("RMDIR", NOTSUPP, "removing is always supported"),
    (
        "RENAME",
        EXIST,
        "Linux says NOTEMPTY, ISDIR or NOTDIR instead",
    ),
    (
        "RENAME",
        MLINK,
        "no file system at hand bounds the links of a directory",
    ),
    ("RENAME", NOTSUPP, "renaming is always supported"),
    (
        "LINK",
        INVAL,
        "linking a directory is answered PERM, as link(2) does",
    ),
    (
        "LINK",
        NOTSUPP,
        "needs a file system without links, which says PERM",
    ),
    (
        "READDIR",
        BAD_COOKIE,
        "the file systems at hand take any cookie",
    ),
    (
        "READDIRPLUS",
        BAD_COOKIE,
        "the file systems at hand take any cookie",
    ),
    ("READDIRPLUS", NOTSUPP, "always supported"),
    (
        "SETATTR",
        NOSPC,
        "shrinking and growing sparse files take no space at hand",
    ),
    (
        "RENAME",
        NOSPC,
        "a name that is moved takes no space in the file systems at hand",
    ),
];

fn reason(procedure: &str, status: nfsstat3) -> Option<&'static str> {
    UNREACHED
        .iter()
        .find(|(of, which, _)| (*of == "*" || *of == procedure) && *which == status)
        .map(|(_, _, reason)| *reason)
}

#[test]
fn every_cell_of_the_rfc_is_reached_or_has_a_reason() {
    let cells = table::cells().chain(table_root::cells_of_root());
    let reached: BTreeSet<(&str, u32)> = cells
        .map(|cell| (cell.procedure, cell.status as u32))
        .collect();
    for (procedure, statuses) in RFC {
        for status in *statuses {
            let is_reached = reached.contains(&(procedure, *status as u32));
            let reason = reason(procedure, *status);
            assert!(
                is_reached != reason.is_some(),
                "{procedure} {status}: reached {is_reached}, reason {reason:?}"
            );
        }
    }
}

#[test]
fn cells_over_tcp() -> Result<()> {
    run_all(V4, Transport::Tcp, table::cells())
}

#[test]
fn cells_over_tcp_and_ipv6() -> Result<()> {
    run_all(V6, Transport::Tcp, table::cells())
}

#[test]
fn cells_over_udp() -> Result<()> {
    run_all(V4, Transport::Udp, table::cells())
}

#[test]
fn cells_needs_root() -> Result<()> {
    run_all(V4, Transport::Tcp, table_root::cells_of_root())
}

const JUKEBOX: &str = "NFS3ERR_JUKEBOX";
/// Above the number of cells: a cell that is run again has another directory.
const SECOND_TRY: usize = 10_000;

/// Runs cells, each in a directory of its own, and prints the table.
fn run_all(
    ip: IpAddr,
    transport: Transport,
    cells: impl Iterator<Item = &'static Cell>,
) -> Result<()> {
    let mut scene = Scene::over(ip, transport)?;
    let mut reached = Vec::new();
    let mut not_here = Vec::new();
    let mut wrong = Vec::new();
    for (number, cell) in cells.enumerate() {
        let what = format!("{} {}: {}", cell.procedure, cell.status, cell.situation);
        let mut result = run(&mut scene, number, cell);
        if cell.status.to_string() != JUKEBOX
            && result
                .as_ref()
                .is_err_and(|error| format!("{error:#}").contains(JUKEBOX))
        {
            // "Ask again" (RFC 1813 2.6): now and then the kernel is short of something for a
            // moment. A client would ask again, and so does this one, once.
            eprintln!("asked again: {what}");
            result = run(&mut scene, number + SECOND_TRY, cell);
        }
        match result.with_context(|| what.clone()) {
            Ok(()) => reached.push((cell, what)),
            Err(error) if error.is::<NotHere>() => not_here.push(format!("{error:#}")),
            Err(error) => wrong.push(format!("{error:#}")),
        }
    }
    let listed = |cell: &Cell| {
        let of = RFC
            .iter()
            .find(|(procedure, _)| *procedure == cell.procedure);
        of.is_some_and(|(_, statuses)| statuses.contains(&cell.status))
    };
    eprintln!("reached over {transport:?} at {ip}:");
    for (cell, what) in &reached {
        let beyond = if listed(cell) {
            ""
        } else {
            " (beyond the RFC's list)"
        };
        eprintln!("  {what}{beyond}");
    }
    eprintln!("not reached, and why:");
    for (procedure, status, reason) in UNREACHED {
        eprintln!("  {procedure} {status}: {reason}");
    }
    for what in &not_here {
        eprintln!("  {what}");
    }
    ensure!(wrong.is_empty(), "wrong cells:\n{}", wrong.join("\n"));
    Ok(())
}

fn run(scene: &mut Scene, number: usize, cell: &Cell) -> Result<()> {
    // Cells don't see each other's files: each has the export's root in its own directory.
    let name = format!("cell-{number}");
    let outer = scene.root.clone();
    let dir = scene.dir(&name)?;
    scene.enter(&name, dir);
    let answer = (cell.run)(scene);
    scene.leave(outer);
    let answer = answer?;
    ensure!(answer.status == cell.status, "answered {}", answer.status);
    ensure!(
        !answer.claims_before,
        "claims to know the attributes before"
    );
    if cell.attributes {
        ensure!(!answer.after.is_empty(), "results without attributes");
        ensure!(
            answer.after.iter().all(Option::is_some),
            "attributes are missing: {:?}",
            answer.after.iter().map(Option::is_some).collect::<Vec<_>>()
        );
    }
    Ok(())
}

/// What a cell's client looks like when it has another connection or identity.
pub(crate) fn as_client<T>(
    scene: &mut Scene,
    cred: havenfs_tests::client::Cred,
    work: impl FnOnce(&mut Nfs) -> Result<T>,
) -> Result<T> {
    let before = std::mem::replace(&mut scene.nfs.cred, cred);
    let result = work(&mut scene.nfs);
    scene.nfs.cred = before;
    result
}
