//! UDP, IPv6, and which address an answer comes from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::mount::Mount;
use havenfs_tests::client::nfs::{FILE_SYNC, procedure};
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::{Cred, Header, Nfs, Outcome, Peer};
use havenfs_tests::server::{Site, V4, V6};
use nfs3_types::nfs3::nfsstat3;

use super::scene::{OPEN, Scene, ok, status};

/// A connected socket, as the Linux kernel's, hears nothing from any other address.
#[test]
fn answers_come_from_the_address_that_was_asked() -> Result<()> {
    let site = Site::new()?;
    let export = format!("{}:*({OPEN})", site.export().display());
    let server = site.serve_exports(&[&export], &["--nfs-udp", "--listen", "0.0.0.0"])?;
    for last in [1, 2, 77] {
        let ip = IpAddr::V4(Ipv4Addr::new(127, 0, 0, last));
        for transport in [Transport::Tcp, Transport::Udp] {
            let mut nfs = Nfs::new(Peer::connect(transport, server.nfs_at(ip))?, Cred::root());
            nfs.null()?;
            let mut mount = server.mount_at(ip, transport)?;
            let path = site.export();
            let root = mount.mnt(path.as_os_str().as_encoded_bytes())?;
            let root = root.map_err(|status| anyhow::anyhow!("MNT: {status}"))?;
            // Answered inline, and by a worker.
            nfs.attributes(&root)?;
            ok(nfs.readdir(&root, 0, 4096)?)?;
        }
    }
    Ok(())
}

#[test]
fn nfs_over_udp_is_off_unless_asked_for() -> Result<()> {
    let s = Scene::new()?;
    let mut peer = Peer::udp(s.server.nfs_at(V4))?;
    peer.set_answer_time(Duration::from_millis(500))?;
    let header = Header::new(program::NFS, 3, procedure::NULL, &Cred::None);
    ensure!(peer.exchange(&header, &[]).is_err());
    // MOUNT is always there.
    s.server.mount_at(V4, Transport::Udp)?.dump()?;
    Ok(())
}

#[test]
fn reads_and_writes_fit_into_datagrams() -> Result<()> {
    for ip in [V4, V6] {
        let mut s = Scene::over(ip, Transport::Udp)?;
        let data: Vec<u8> = (0..200_000u32).map(|at| at as u8).collect();
        let fh = s.file("f", &data)?;
        for count in [8192, 32_768, 60_000, 65_536, 1 << 20] {
            let got = ok(s.nfs.read(&fh, 0, count)?)?;
            ensure!(got.count > 0 && !got.eof, "{count}: {}", got.count);
            ensure!(got.data.as_ref() == &data[..got.count as usize]);
        }
        for len in [8192, 32_768, 60_000] {
            let done = ok(s.nfs.write(&fh, 0, FILE_SYNC, &data[..len])?)?;
            ensure!(done.count as usize == len);
        }
        let page = ok(s.nfs.readdirplus(&s.root, 0, 1 << 20, 1 << 20)?)?;
        ensure!(page.reply.eof);
        // What FSINFO promises must fit, too.
        let info = ok(s.nfs.fsinfo(&s.root)?)?;
        ensure!(ok(s.nfs.read(&fh, 0, info.rtpref)?)?.count > 0);
    }
    Ok(())
}

#[test]
fn a_large_directory_over_udp_is_complete() -> Result<()> {
    let mut s = Scene::over(V4, Transport::Udp)?;
    for number in 0..3000 {
        std::fs::write(s.path(&format!("a-rather-long-name-{number}")), "")?;
    }
    let (mut cookie, mut count) = (0, 0);
    loop {
        let page = ok(s.nfs.readdirplus(&s.root, cookie, 1 << 20, 1 << 20)?)?;
        count += page.reply.entries.0.len();
        cookie = page
            .reply
            .entries
            .0
            .last()
            .map_or(cookie, |entry| entry.cookie);
        if page.reply.eof {
            break;
        }
    }
    ensure!(count >= 3002, "{count}");
    Ok(())
}

#[test]
fn junk_datagrams_do_no_harm() -> Result<()> {
    let mut s = Scene::over(V4, Transport::Udp)?;
    let mut peer = Peer::udp(s.server.nfs_at(V4))?;
    for junk in [&b""[..], b"x", b"\0\0\0\0", &[0xff; 100], &vec![0; 60_000]] {
        peer.send_raw(junk)?;
    }
    s.nfs.null()?;
    // Replies are not answered, or two servers would talk for ever.
    let mut reply = 5u32.to_be_bytes().to_vec();
    reply.extend(1u32.to_be_bytes());
    reply.extend([0; 16]);
    peer.send_raw(&reply)?;
    peer.set_answer_time(Duration::from_millis(200))?;
    while let Ok(message) = peer.receive() {
        ensure!(
            message.first_chunk() != Some(&5u32.to_be_bytes()),
            "a reply was answered"
        );
    }
    Ok(())
}

/// An IPv4 host that comes over an IPv6 socket is the IPv4 host, and `::1` is not.
#[test]
fn mapped_addresses_are_the_ipv4_host() -> Result<()> {
    let site = Site::new()?;
    let export = format!("{}:127.0.0.1(rw,insecure)", site.export().display());
    let server = site.serve_exports(&[&export], &["--listen", "0.0.0.0", "--listen", "::"])?;
    let root = server.handle(&site.export())?;
    let mapped = IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped());
    let any: SocketAddr = (Ipv6Addr::UNSPECIFIED, 0).into();
    let peer = Peer::connect_from(Transport::Tcp, any, server.nfs_at(mapped))?;
    Nfs::new(peer, Cred::root()).attributes(&root)?;
    let mut over_6 = Nfs::new(Peer::tcp(server.nfs_at(V6))?, Cred::root());
    ensure!(status(&over_6.getattr(&root)?) == nfsstat3::NFS3ERR_ACCES);
    let path = site.export();
    let path = path.as_os_str().as_encoded_bytes();
    let refused = server.mount_at(V6, Transport::Tcp)?.mnt(path)?;
    ensure!(refused == Err(13), "{refused:?}");
    let mapped_port = SocketAddr::new(mapped, server.mount_port);
    let peer = Peer::connect_from(Transport::Udp, any, mapped_port)?;
    ensure!(Mount::new(peer, Cred::root()).mnt(path)?.is_ok());
    let list = server.mount()?.dump()?;
    ensure!(list.iter().all(|(host, _)| host == "127.0.0.1"), "{list:?}");
    Ok(())
}

#[test]
fn rules_for_ipv6_hosts() -> Result<()> {
    let site = Site::new()?;
    let export = format!("{}:::1/128(rw,insecure)", site.export().display());
    let server = site.serve_exports(&[&export], &[])?;
    let path = site.export();
    let path = path.as_os_str().as_encoded_bytes();
    let root = server.mount_at(V6, Transport::Udp)?.mnt(path)?;
    let root = root.map_err(|status| anyhow::anyhow!("MNT: {status}"))?;
    let mut nfs = Nfs::new(Peer::tcp(server.nfs_at(V6))?, Cred::root());
    nfs.attributes(&root)?;
    let mut over_4 = server.nfs(Cred::root())?;
    ensure!(status(&over_4.getattr(&root)?) == nfsstat3::NFS3ERR_ACCES);
    let header = Header::new(program::NFS, 4, 0, &Cred::None);
    ensure!(nfs.peer.exchange(&header, &[])? == Outcome::ProgMismatch(3, 3));
    Ok(())
}
