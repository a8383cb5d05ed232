//! A client's machine: mounts the export and locks as a Linux machine does, without a kernel.
//!
//! Owns what belongs to one machine: its address, its connections, the programs that it serves.
//! Finds all ports through the service's portmapper. Judges nothing; what it was told goes into the
//! [`Ledger`].
//!
//! - `rpc`: calls that outlive a connection.  - `nfs`: MOUNT and NFS.
//! - `nlm`: the lock manager.  - `host`: what the service calls.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use havenfs_nsm::wire as nsm_wire;
use havenfs_rpc::portmap::{Mapping, Protocol, VERSION_2, procedure as portmap};
use havenfs_rpc::program;
use havenfs_rpc::xdr::Reader;

use super::ledger::{Bytes, Ledger, Lock};

pub(super) mod host;
pub(super) mod nfs;
pub(super) mod nlm;
pub(super) mod rpc;

use self::host::{Host, Place};
use self::nfs::Nfs;
use self::nlm::Locks;
use self::rpc::{Machine, RpcClient, Target, args};

/// The version of MOUNT and NFS.
const VERSION_3: u32 = 3;
/// The version of NLM that goes with it.
const NLM_VERSION: u32 = 4;

/// Where the service is, and what is mounted.
#[derive(Debug, Clone)]
pub(super) struct Export {
    /// The service's portmapper.
    pub(super) portmap: SocketAddr,
    /// The exported directory.
    pub(super) path: Vec<u8>,
    /// The port that the machines' own portmappers are asked on.
    pub(super) host_portmap_port: u16,
}

/// A client's machine.
#[derive(Debug)]
pub(super) struct Client {
    /// Its name in the story.
    pub(super) name: &'static str,
    /// Its connection for files.
    pub(super) nfs: Nfs,
    /// The handle of the export's directory.
    pub(super) root: Vec<u8>,
    /// The handle of the file that has locks.
    pub(super) locked: Vec<u8>,
    /// Its lock manager.
    pub(super) locks: Arc<Locks>,
    /// What it serves.
    pub(super) host: Host,
    source: IpAddr,
    ports: Ports,
    machine: Arc<Machine>,
}

/// Where the service's programs are.
#[derive(Debug, Clone, Copy)]
struct Ports {
    nfs: SocketAddr,
    nlm: SocketAddr,
}

impl Client {
    /// Mounts the export, makes or finds the file `locked`, and begins to listen.
    pub(super) fn mount(
        name: &'static str,
        source: IpAddr,
        export: &Export,
        locked: &str,
        ledger: &Arc<Ledger>,
    ) -> Result<Self> {
        let machine = Machine::start();
        let service = export.portmap.ip();
        let target = |program, version, server| Target {
            source,
            server,
            program,
            version,
        };
        let portmap = target(program::PORTMAP, VERSION_2, export.portmap);
        let mut portmap = RpcClient::new(portmap, &machine);
        let mut find = |program, version| -> Result<SocketAddr> {
            let port = get_port(&mut portmap, program, version)?;
            Ok(SocketAddr::new(service, port))
        };
        let mount = find(program::MOUNT, VERSION_3)?;
        let ports = Ports {
            nfs: find(program::NFS, VERSION_3)?,
            nlm: find(program::NLM, NLM_VERSION)?,
        };
        // Asked for as clients do, to see that it is there.
        find(program::NSM, nsm_wire::VERSION)?;
        let mount = target(program::MOUNT, VERSION_3, mount);
        let root = nfs::mount(&mut RpcClient::new(mount, &machine), &export.path)?;
        let mut nfs = Nfs::new(RpcClient::new(
            target(program::NFS, VERSION_3, ports.nfs),
            &machine,
        ));
        let locked = nfs.create(&root, locked)?;
        let nlm = target(program::NLM, NLM_VERSION, ports.nlm);
        let calls = RpcClient::new(nlm, &machine);
        let locks = Locks::new(name, locked.clone(), calls, Arc::clone(ledger));
        let locks = Arc::new(locks);
        let place = Place {
            portmap: SocketAddr::new(source, export.host_portmap_port),
            service,
        };
        let results = RpcClient::new(nlm, &machine);
        let host = Host::start(
            &place,
            Arc::clone(&locks),
            Arc::clone(ledger),
            results,
            &machine,
        )?;
        Ok(Self {
            name,
            nfs,
            root,
            locked,
            locks,
            host,
            source,
            ports,
            machine,
        })
    }

    /// Another connection for files, which ends with `machine`.
    pub(super) fn another_nfs(&self, machine: &Arc<Machine>) -> Nfs {
        Nfs::new(RpcClient::new(self.nfs_target(), machine))
    }

    /// Closes all connections to the service.
    pub(super) fn unmount(&self) {
        self.machine.close_all();
    }

    /// Another connection for locks, which nothing else waits for.
    pub(super) fn another_lock_manager(&self, ledger: &Arc<Ledger>) -> Locks {
        let calls = RpcClient::new(self.nlm_target(), &self.machine);
        Locks::new(self.name, self.locked.clone(), calls, Arc::clone(ledger))
    }

    /// Who is called for files.
    pub(super) const fn nfs_target(&self) -> Target {
        Target {
            source: self.source,
            server: self.ports.nfs,
            program: program::NFS,
            version: VERSION_3,
        }
    }

    /// Who is called for locks.
    pub(super) const fn nlm_target(&self) -> Target {
        Target {
            source: self.source,
            server: self.ports.nlm,
            program: program::NLM,
            version: NLM_VERSION,
        }
    }

    /// A lock of a process on this machine.
    pub(super) fn lock(&self, svid: i32, first: u64, count: u64) -> Lock {
        self.locks.of_process(svid, Bytes { first, count })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.machine.end();
    }
}

fn get_port(portmap: &mut RpcClient, program: u32, version: u32) -> Result<u16> {
    let mapping = Mapping {
        program,
        version,
        protocol: Protocol::Tcp.number(),
        port: 0,
    };
    let results = portmap.call(portmap::PMAP_GETPORT, &args(|w| w.value(&mapping)))?;
    let port = Reader::new(&results).u32()?;
    ensure!(port != 0, "the portmapper does not know program {program}");
    u16::try_from(port).context("the portmapper tells a port that is none")
}
