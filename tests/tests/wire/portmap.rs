//! The embedded portmapper over real sockets: what it tells is what answers.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::portmap::{Portmap, TCP, UDP};
use havenfs_tests::client::{Cred, Header, Outcome, Peer};
use havenfs_tests::server::{Server, Site, V4, V6};

use super::scene::OPEN;

fn serve(site: &Site, more: &[&str]) -> Result<Server> {
    let export = format!("{}:*({OPEN})", site.export().display());
    site.serve_with_portmapper(&[&export], more)
}

#[test]
fn every_entry_of_the_list_answers() -> Result<()> {
    let site = Site::new()?;
    let server = serve(&site, &["--nfs-udp"])?;
    for transport in [Transport::Tcp, Transport::Udp] {
        let mut portmap = server.portmap_at(V4, transport)?;
        let list = portmap.dump()?;
        ensure!(
            list.contains(&(program::NFS, 3, TCP, server.nfs_port.into())),
            "{list:?}"
        );
        ensure!(
            list.contains(&(program::NFS, 3, UDP, server.nfs_port.into())),
            "{list:?}"
        );
        for version in [1, 3] {
            for protocol in [TCP, UDP] {
                let entry = (program::MOUNT, version, protocol, server.mount_port.into());
                ensure!(list.contains(&entry), "{list:?}");
            }
        }
        for (program, version, protocol, port) in list {
            ensure!(portmap.getport(program, version, protocol)? == port);
            let address = SocketAddr::new(V4, u16::try_from(port)?);
            let over = if protocol == TCP {
                Transport::Tcp
            } else {
                Transport::Udp
            };
            let mut peer = Peer::connect(over, address)?;
            let null = Header::new(program, version, 0, &Cred::None);
            let got = peer.exchange(&null, &[])?;
            ensure!(
                got == Outcome::Success(Vec::new()),
                "{program} {version}: {got:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn what_is_not_served_is_not_registered() -> Result<()> {
    let site = Site::new()?;
    let server = serve(&site, &[])?;
    let mut portmap = server.portmap_at(V4, Transport::Udp)?;
    // NFS over UDP is off.
    ensure!(portmap.getport(program::NFS, 3, UDP)? == 0);
    for protocol in [TCP, UDP] {
        for program in [program::NFSACL, 400_000] {
            ensure!(portmap.getport(program, 4, protocol)? == 0, "{program}");
        }
        for version in [1, 3, 4] {
            let port = portmap.getport(program::NLM, version, protocol)?;
            ensure!(port == u32::from(server.nlm_port), "NLM {version}: {port}");
        }
        ensure!(portmap.getport(program::NSM, 1, protocol)? == u32::from(server.nsm_port));
    }
    let header = Header::new(program::PORTMAP, 1, 0, &Cred::None);
    ensure!(portmap.peer.exchange(&header, &[])? == Outcome::ProgMismatch(2, 4));
    Ok(())
}

#[test]
fn addresses_are_those_that_the_client_used() -> Result<()> {
    let site = Site::new()?;
    let server = serve(&site, &[])?;
    let port = server.nfs_port;
    let tail = format!(".{}.{}", port >> 8, port & 0xff);
    for version in [3, 4] {
        for transport in [Transport::Tcp, Transport::Udp] {
            let mut portmap = server.portmap_at(V4, transport)?;
            let address = portmap.getaddr(version, program::NFS, 3, "tcp")?;
            ensure!(address == format!("127.0.0.1{tail}"), "{address}");
            ensure!(
                portmap
                    .getaddr(version, program::NFSACL, 3, "tcp")?
                    .is_empty()
            );
            let mut portmap = server.portmap_at(V6, transport)?;
            let address = portmap.getaddr(version, program::NFS, 3, "tcp6")?;
            ensure!(address == format!("::1{tail}"), "{address}");
        }
    }
    Ok(())
}

/// CALLIT lets a stranger call through us, with our address.
#[test]
fn calls_are_never_forwarded() -> Result<()> {
    let site = Site::new()?;
    let server = serve(&site, &[])?;
    for transport in [Transport::Tcp, Transport::Udp] {
        for (version, procedure) in [(2, 5), (3, 5), (4, 5), (4, 10)] {
            let mut portmap = server.portmap_at(V4, transport)?;
            portmap.peer.set_answer_time(Duration::from_millis(100))?;
            let args: Vec<u8> = [program::MOUNT, 3, 5, 0]
                .iter()
                .flat_map(|n| n.to_be_bytes())
                .collect();
            match portmap.outcome(version, procedure, &args) {
                Err(_) | Ok(Outcome::ProcUnavail | Outcome::GarbageArgs) => {}
                Ok(other) => anyhow::bail!("version {version}, {procedure}: {other:?}"),
            }
        }
    }
    Ok(())
}

/// SET and UNSET are for this machine's own superuser: a reserved port on loopback.
#[test]
fn strangers_register_nothing() -> Result<()> {
    let site = Site::new()?;
    let server = serve(&site, &[])?;
    let mut portmap = server.portmap_at(V4, Transport::Tcp)?;
    ensure!(!portmap.set(400_001, 1, TCP, 5555)?);
    ensure!(!portmap.unset(program::NFS, 3)?);
    ensure!(portmap.getport(program::NFS, 3, TCP)? == u32::from(server.nfs_port));
    ensure!(portmap.getport(400_001, 1, TCP)? == 0);
    Ok(())
}

#[test]
fn the_superuser_registers_other_services_needs_root() -> Result<()> {
    let site = Site::new()?;
    let server = serve(&site, &[])?;
    let address = SocketAddr::new(V4, server.portmap_port);
    let peer = Peer::connect_reserved(Transport::Tcp, address).context("reserved port")?;
    let mut portmap = Portmap { peer };
    ensure!(portmap.set(400_001, 1, TCP, 5555)?);
    ensure!(portmap.getport(400_001, 1, TCP)? == 5555);
    ensure!(
        !portmap.set(400_001, 1, TCP, 6666)?,
        "another port for the same program"
    );
    ensure!(portmap.unset(400_001, 1)?);
    ensure!(portmap.getport(400_001, 1, TCP)? == 0);
    // Nobody takes our own entries away.
    portmap.unset(program::NFS, 3)?;
    ensure!(portmap.getport(program::NFS, 3, TCP)? == u32::from(server.nfs_port));
    Ok(())
}
