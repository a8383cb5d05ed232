//! The usual scene of the tests of NLM and NSM: a server with a file, and hosts that lock it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Result;
use havenfs_tests::client::nlm::Lock;
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::{Cred, Host, Nlm, Nsm, Peer};
use havenfs_tests::server::{Server, Site, V4};

/// Two hosts that only call, by their addresses.
pub(crate) const A: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11));
pub(crate) const B: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 12));

/// A server with a file, and what hosts ask about it.
pub(crate) struct Scene {
    pub(crate) site: Site,
    pub(crate) server: Server,
    pub(crate) fh: Vec<u8>,
}

impl Scene {
    pub(crate) fn new(options: &str) -> Result<Self> {
        Self::with(options, &[])
    }

    /// The same with further arguments for the server.
    pub(crate) fn with(options: &str, more: &[&str]) -> Result<Self> {
        Self::at_with(Site::new()?, options, more)
    }

    /// The same at a site of the test's own making.
    pub(crate) fn at(site: Site, options: &str) -> Result<Self> {
        Self::at_with(site, options, &[])
    }

    fn at_with(site: Site, options: &str, more: &[&str]) -> Result<Self> {
        fs::write(site.export().join("file"), "content")?;
        let server = serve(&site, options, more)?;
        let fh = look_up(&server, &site, "file")?;
        Ok(Self { site, server, fh })
    }

    /// The same server killed and started again.
    pub(crate) fn restart(self, options: &str) -> Result<Self> {
        self.restart_with(options, &[])
    }

    pub(crate) fn restart_with(self, options: &str, more: &[&str]) -> Result<Self> {
        self.server.kill()?;
        let server = serve(&self.site, options, more)?;
        Ok(Self { server, ..self })
    }

    pub(crate) fn lock_of(&self, host: &str, svid: i32) -> Lock {
        Lock::new(&self.fh, host, svid)
    }

    /// A LOCK that waits.
    pub(crate) fn waiting(&self, host: &str, svid: i32) -> Lock {
        Lock {
            block: true,
            ..self.lock_of(host, svid)
        }
    }

    /// Sends notices of reboots from a reserved port of a host. Needs root.
    pub(crate) fn nsm(&self, from: IpAddr) -> Result<Nsm> {
        let server = SocketAddr::new(V4, self.server.nsm_port);
        let peer = Peer::connect_reserved_from(Transport::Udp, from, server)?;
        Ok(Nsm::new(peer))
    }
}

fn serve(site: &Site, options: &str, more: &[&str]) -> Result<Server> {
    let export = format!("{}:*({options})", site.export().display());
    site.serve_exports(&[&export], more)
}

pub(crate) fn look_up(server: &Server, site: &Site, name: &str) -> Result<Vec<u8>> {
    let root = server.handle(&site.export())?;
    let mut nfs = server.nfs(Cred::root())?;
    nfs.find(&root, name.as_bytes())
}

/// A machine that calls and is called, at an address that no other test uses. Needs root.
pub(crate) struct Machine {
    pub(crate) address: IpAddr,
    pub(crate) host: Host,
}

impl Machine {
    pub(crate) fn start(number: u8) -> Result<Self> {
        let [.., high, low] = std::process::id().to_be_bytes();
        let address = IpAddr::from([127, 64 | (high & 63), low, number]);
        let host = Host::start(address)?;
        Ok(Self { address, host })
    }

    pub(crate) fn nlm(&self, scene: &Scene, transport: Transport) -> Result<Nlm> {
        scene.server.nlm_at(self.address, transport)
    }
}
