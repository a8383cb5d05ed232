//! The usual scene of a wire test: a site, a server and a client that acts as a plain user.
//!
//! As root, the user is [`USER`] and the exported directory is that user's. Otherwise it is
//! whoever runs the test, since the server then acts as nobody else. So the same test proves the
//! same thing in both cases.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use havenfs_tests::client::nfs::How;
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::{Cred, Nfs, Peer, Sattr};
use havenfs_tests::server::{Server, Site, V4};
use nfs3_types::nfs3::{Nfs3Option, Nfs3Result, nfsstat3, post_op_fh3};

/// The user and group of tests that run as root.
pub(crate) const USER: u32 = 4201;
/// Another user and group.
pub(crate) const STRANGER: u32 = 4202;

/// A server with one export, and the client of a user who may write there.
pub(crate) struct Scene {
    pub(crate) site: Site,
    pub(crate) server: Server,
    pub(crate) nfs: Nfs,
    /// The handle of the export's root.
    pub(crate) root: Vec<u8>,
    /// Where `root` is for this process.
    at: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Options that let every test in: read-write, any port, nobody squashed.
pub(crate) const OPEN: &str = "rw,insecure,no_root_squash";

/// An export of [`Scene::over`] that is read-only; it holds `file`.
pub(crate) const READ_ONLY: &str = "read-only";
/// An export of [`Scene::over`] that is not the first.
pub(crate) const OTHER: &str = "other";
/// An export of [`Scene::over`] on a file system with next to no space; for root only.
pub(crate) const FULL: &str = "full";

impl Scene {
    /// Serves an empty directory over IPv4 and TCP.
    pub(crate) fn new() -> Result<Self> {
        Self::with_options(OPEN)
    }

    /// The same with other export options.
    pub(crate) fn with_options(options: &str) -> Result<Self> {
        let site = Site::new()?;
        let server = site.serve(options)?;
        Self::of(site, server, V4, Transport::Tcp)
    }

    /// The same at an address and over a transport, with more exports: [`READ_ONLY`], which is
    /// the same directory as the first for readers only, [`OTHER`], and [`FULL`] for root.
    pub(crate) fn over(ip: IpAddr, transport: Transport) -> Result<Self> {
        let mut site = Site::new()?;
        for name in [READ_ONLY, OTHER, FULL] {
            fs::create_dir(site.path().join(name))?;
        }
        fs::write(site.path().join(READ_ONLY).join("file"), "read-only")?;
        if is_root() {
            site = site.with_mounts(&format!(
                "mount -t tmpfs -o size=64k,nr_inodes=4,mode=777 none {FULL}"
            ));
        }
        let path = |name: &str, options: &str| {
            format!("{}:*({options})", site.path().join(name).display())
        };
        let exports = [
            path("export", OPEN),
            path(READ_ONLY, "ro,insecure,no_root_squash"),
            path(OTHER, OPEN),
            path(FULL, OPEN),
        ];
        let exports: Vec<&str> = exports.iter().map(String::as_str).collect();
        let server = site.serve_exports(&exports, &["--nfs-udp"])?;
        Self::of(site, server, ip, transport)
    }

    /// The handle of another export's root.
    pub(crate) fn other_root(&self, name: &str) -> Result<Vec<u8>> {
        self.server.handle(&self.site.path().join(name))
    }

    /// Makes a directory of the export the scene's root.
    pub(crate) fn enter(&mut self, name: &str, dir: Vec<u8>) {
        self.at.push(name);
        self.root = dir;
    }

    /// Takes [`Scene::enter`] back.
    pub(crate) fn leave(&mut self, root: Vec<u8>) {
        self.at.pop();
        self.root = root;
    }

    /// Takes a site and its running server.
    pub(crate) fn of(site: Site, server: Server, ip: IpAddr, transport: Transport) -> Result<Self> {
        let (uid, gid) = plain_user();
        if is_root() {
            std::os::unix::fs::chown(server.inside(&site.export()), Some(uid), Some(gid))?;
        }
        let root = server.handle(&site.export())?;
        let peer = Peer::connect(transport, server.nfs_at(ip))?;
        Ok(Self {
            at: site.export(),
            nfs: Nfs::new(peer, Cred::user(uid, gid)),
            site,
            server,
            root,
            uid,
            gid,
        })
    }

    /// Where a file of the export is for this process.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }

    /// Another client, on a connection of its own.
    pub(crate) fn client(&self, cred: Cred) -> Result<Nfs> {
        self.server.nfs(cred)
    }

    /// The client's own identity.
    pub(crate) fn cred(&self) -> Cred {
        Cred::user(self.uid, self.gid)
    }

    /// Makes a file of the user with these bytes and mode 0644; returns its handle.
    pub(crate) fn file(&mut self, name: &str, bytes: &[u8]) -> Result<Vec<u8>> {
        fs::write(self.path(name), bytes)?;
        self.own(name, 0o644)?;
        let root = self.root.clone();
        self.nfs.find(&root, name.as_bytes())
    }

    /// Makes a directory of the user with mode 0755; returns its handle.
    pub(crate) fn dir(&mut self, name: &str) -> Result<Vec<u8>> {
        fs::create_dir(self.path(name))?;
        self.own(name, 0o755)?;
        let root = self.root.clone();
        self.nfs.find(&root, name.as_bytes())
    }

    /// Makes a file through NFS; returns its handle.
    pub(crate) fn create(&mut self, name: &str) -> Result<Vec<u8>> {
        let how = How::Guarded(Sattr::mode(0o644));
        let root = self.root.clone();
        made(self.nfs.create(&root, name.as_bytes(), how)?, |ok| &ok.obj)
    }

    /// Makes a name unfit for anything but being there: a FIFO of the user.
    pub(crate) fn fifo(&mut self, name: &str) -> Result<Vec<u8>> {
        let path = self.path(name);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o666),
            0,
        )?;
        self.own(name, 0o666)?;
        let root = self.root.clone();
        self.nfs.find(&root, name.as_bytes())
    }

    /// Makes a symbolic link; returns its handle.
    pub(crate) fn link(&mut self, name: &str, text: &str) -> Result<Vec<u8>> {
        std::os::unix::fs::symlink(text, self.path(name))?;
        let root = self.root.clone();
        self.nfs.find(&root, name.as_bytes())
    }

    /// Makes the user the owner and sets the mode.
    pub(crate) fn own(&self, name: &str, mode: u32) -> Result<()> {
        let path = self.path(name);
        if is_root() {
            std::os::unix::fs::lchown(&path, Some(self.uid), Some(self.gid))?;
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(())
    }
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The user that a test's calls come from.
pub(crate) fn plain_user() -> (u32, u32) {
    if is_root() {
        (USER, USER)
    } else {
        let uid = rustix::process::geteuid().as_raw();
        (uid, rustix::process::getegid().as_raw())
    }
}

/// The results of a call that must have succeeded.
pub(crate) fn ok<T, E: std::fmt::Debug>(result: Nfs3Result<T, E>) -> Result<T> {
    match result {
        Nfs3Result::Ok(ok) => Ok(ok),
        Nfs3Result::Err((status, more)) => bail!("status {status}, {more:?}"),
    }
}

/// The handle that a creating call returned.
pub(crate) fn made<T, E: std::fmt::Debug>(
    result: Nfs3Result<T, E>,
    obj: impl FnOnce(&T) -> &post_op_fh3,
) -> Result<Vec<u8>> {
    let ok = ok(result)?;
    match obj(&ok) {
        Nfs3Option::Some(fh) => Ok(fh.data.to_vec()),
        Nfs3Option::None => Err(anyhow!("no handle of the new object")),
    }
}

/// The status of any result.
pub(crate) fn status<T, E>(result: &Nfs3Result<T, E>) -> nfsstat3 {
    match result {
        Nfs3Result::Ok(_) => nfsstat3::NFS3_OK,
        Nfs3Result::Err((status, _)) => *status,
    }
}
