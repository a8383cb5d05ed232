//! Export rules on every call: hosts, read-only per host, ports, and lists that change.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Result, ensure};
use havenfs_tests::client::nfs::FILE_SYNC;
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::{Cred, Nfs, Peer, Sattr};
use havenfs_tests::server::{Server, Site, V4};
use nfs3_types::nfs3::Nfs3Option;
use nfs3_types::nfs3::nfsstat3::{
    NFS3_OK as OK, NFS3ERR_ACCES as ACCES, NFS3ERR_PERM as PERM, NFS3ERR_ROFS as ROFS,
    NFS3ERR_STALE as STALE,
};
use rustix::process::Signal;

use super::scene::{OPEN, ok, status};

/// A client of NFS that comes from 127.0.0.`last`.
fn from(server: &Server, last: u8) -> Result<Nfs> {
    let own = SocketAddr::new(IpAddr::from([127, 0, 0, last]), 0);
    let peer = Peer::connect_from(Transport::Tcp, own, server.nfs_at(V4))?;
    Ok(Nfs::new(peer, Cred::root()))
}

fn exported(path: &Path, rules: &str) -> String {
    format!("{}:{rules}", path.display())
}

#[test]
fn each_host_has_the_rights_of_its_rule() -> Result<()> {
    let site = Site::new()?;
    fs::write(site.export().join("f"), "text")?;
    let rules = "127.0.0.1(rw,insecure,no_root_squash) 127.0.0.2(ro,insecure,no_root_squash) \
                 127.0.0.16/28(rw,insecure,no_root_squash)";
    let server = site.serve_exports(&[&exported(&site.export(), rules)], &[])?;
    let root = server.handle(&site.export())?;
    let fh = from(&server, 1)?.find(&root, b"f")?;
    for (last, reads, writes) in [
        (1, OK, OK),
        (2, OK, ROFS),
        (3, ACCES, ACCES),
        (15, ACCES, ACCES),
        (16, OK, OK),
        (31, OK, OK),
        (32, ACCES, ACCES),
    ] {
        let mut nfs = from(&server, last)?;
        let got = status(&nfs.read(&fh, 0, 10)?);
        ensure!(got == reads, "READ from {last}: {got}");
        let got = status(&nfs.write(&fh, 0, FILE_SYNC, b"text")?);
        ensure!(got == writes, "WRITE from {last}: {got}");
        let got = status(&nfs.setattr(&root, &Sattr::mode(0o777), None)?);
        ensure!(got == writes, "SETATTR from {last}: {got}");
        let got = status(&nfs.commit(&fh, 0, 0)?);
        ensure!(got == writes || got == reads, "COMMIT from {last}: {got}");
    }
    Ok(())
}

/// RENAME and LINK judge both handles alike.
#[test]
fn a_rule_holds_for_the_second_handle_too() -> Result<()> {
    let site = Site::new()?;
    for name in ["a", "b"] {
        fs::create_dir(site.path().join(name))?;
        fs::write(site.path().join(name).join("f"), name)?;
    }
    let (a, b) = (site.path().join("a"), site.path().join("b"));
    let server = site.serve_exports(
        &[
            &exported(&a, &format!("*({OPEN})")),
            &exported(
                &b,
                "127.0.0.1(ro,insecure,no_root_squash) 127.0.0.2(rw,insecure)",
            ),
        ],
        &[],
    )?;
    let (root_a, root_b) = (server.handle(&a)?, server.handle(&b)?);
    let mut nfs = from(&server, 1)?;
    let fh_b = nfs.find(&root_b, b"f")?;
    let fh_a = nfs.find(&root_a, b"f")?;
    for (dirs, expected) in [((&root_a, &root_b), ROFS), ((&root_b, &root_a), ROFS)] {
        let got = status(&nfs.rename((dirs.0, b"f"), (dirs.1, b"x"))?);
        ensure!(got == expected, "{got}");
    }
    ensure!(status(&nfs.link(&fh_b, &root_a, b"x")?) == ROFS);
    ensure!(status(&nfs.link(&fh_a, &root_b, b"x")?) == ROFS);
    let mut nfs = from(&server, 3)?;
    ensure!(status(&nfs.rename((&root_a, b"f"), (&root_b, b"x"))?) == ACCES);
    ensure!(status(&nfs.link(&fh_b, &root_a, b"x")?) == ACCES);
    ensure!(a.join("f").exists() && b.join("f").exists());
    ensure!(!a.join("x").exists() && !b.join("x").exists());
    Ok(())
}

#[test]
fn secure_exports_need_a_reserved_port_needs_root() -> Result<()> {
    let site = Site::new()?;
    let server = site.serve("rw,no_root_squash")?;
    let peer = Peer::connect_reserved(Transport::Tcp, (V4, server.mount_port).into())?;
    let mut mount = havenfs_tests::client::mount::Mount::new(peer, Cred::root());
    let path = site.export();
    let root = mount.mnt(path.as_os_str().as_encoded_bytes())?;
    let root = root.map_err(|status| anyhow::anyhow!("MNT: {status}"))?;
    let peer = Peer::connect_reserved(Transport::Tcp, server.nfs_at(V4))?;
    Nfs::new(peer, Cred::root()).attributes(&root)?;
    // The handle alone is not enough, whatever port it was asked for from.
    let mut nfs = server.nfs(Cred::root())?;
    let got = status(&nfs.getattr(&root)?);
    ensure!(got == PERM || got == ACCES, "{got}");
    nfs.null()?;
    Ok(())
}

#[test]
fn nested_exports_have_their_own_rules_and_roots() -> Result<()> {
    let site = Site::new()?;
    let inner = site.export().join("inner");
    fs::create_dir(&inner)?;
    fs::write(inner.join("f"), "text")?;
    let outer_rule = exported(&site.export(), &format!("*({OPEN})"));
    let inner_rule = exported(&inner, "127.0.0.2(ro,insecure)");
    let server = site.serve_exports(&[&outer_rule, &inner_rule], &[])?;
    let mut allowed = from(&server, 2)?;
    let own = SocketAddr::new([127, 0, 0, 2].into(), 0);
    let peer = Peer::connect_from(Transport::Tcp, own, (V4, server.mount_port).into())?;
    let mut mount = havenfs_tests::client::mount::Mount::new(peer, Cred::root());
    let root = mount.mnt(inner.as_os_str().as_encoded_bytes())?;
    let root = root.map_err(|status| anyhow::anyhow!("MNT: {status}"))?;
    let fh = allowed.find(&root, b"f")?;
    ensure!(status(&allowed.write(&fh, 0, FILE_SYNC, b"x")?) == ROFS);
    // Its root is no way up into the outer export.
    ensure!(allowed.find(&root, b"..")? == root);
    let refused = server.mount()?.mnt(inner.as_os_str().as_encoded_bytes())?;
    ensure!(refused == Err(13), "{refused:?}");
    let mut stranger = from(&server, 3)?;
    ensure!(status(&stranger.read(&fh, 0, 1)?) == ACCES);
    Ok(())
}

#[test]
fn a_reload_changes_what_it_names_and_nothing_else() -> Result<()> {
    let site = Site::new()?;
    for name in ["a", "b"] {
        fs::create_dir(site.path().join(name))?;
        fs::write(site.path().join(name).join("f"), name)?;
    }
    let line = |name: &str, rules: &str| format!("{} {rules}\n", site.path().join(name).display());
    let list = site.path().join("exports");
    let write = |text: String| fs::write(&list, text);
    let both = line("a", "*(rw,insecure,no_root_squash)") + &line("b", "*(ro,insecure)");
    write(both.clone())?;
    let file = list.display().to_string();
    let mut server = site.serve_exports(&[], &["--exports-file", &file])?;
    let (root_a, root_b) = (
        server.handle(&site.path().join("a"))?,
        server.handle(&site.path().join("b"))?,
    );
    let mut nfs = server.nfs(Cred::root())?;
    let (fh_a, fh_b) = (nfs.find(&root_a, b"f")?, nfs.find(&root_b, b"f")?);
    let verifier = ok(nfs.write(&fh_a, 0, 0, b"A")?)?.verf.0;

    let reload = |server: &mut Server, text: String, words: &str| -> Result<()> {
        write(text)?;
        let before = server.log()?.matches(words).count();
        server.signal(Signal::HUP)?;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while server.log()?.matches(words).count() == before {
            ensure!(std::time::Instant::now() < deadline, "{}", server.log()?);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Ok(())
    };
    // `b` becomes writable, on the same connection and with the same handles.
    let changed =
        line("a", "*(rw,insecure,no_root_squash)") + &line("b", "*(rw,insecure,no_root_squash)");
    reload(&mut server, changed, "export lists reloaded")?;
    ok(nfs.write(&fh_b, 0, FILE_SYNC, b"B")?)?;
    ensure!(
        ok(nfs.commit(&fh_a, 0, 0)?)?.verf.0 == verifier,
        "the verifier changed"
    );
    // A list with a mistake changes nothing.
    let wrong = line("a", "*(rw,insecure,no_root_sqaush)");
    reload(&mut server, wrong, "unknown option")?;
    ok(nfs.write(&fh_b, 0, FILE_SYNC, b"B")?)?;
    // `b` goes, and comes back with its handles.
    let without = line("a", "*(rw,insecure,no_root_squash)");
    reload(&mut server, without, "export lists reloaded")?;
    ensure!(status(&nfs.getattr(&fh_b)?) == STALE);
    ensure!(status(&nfs.getattr(&root_b)?) == STALE);
    nfs.attributes(&fh_a)?;
    reload(&mut server, both, "export lists reloaded")?;
    nfs.attributes(&fh_b)?;
    ensure!(status(&nfs.write(&fh_b, 0, FILE_SYNC, b"B")?) == ROFS);
    Ok(())
}

/// Directories that something else is mounted on stay closed unless `crossmnt` opens them.
#[test]
fn mounts_inside_an_export_needs_root() -> Result<()> {
    for (options, crosses) in [(OPEN.to_owned(), false), (format!("{OPEN},crossmnt"), true)] {
        let site = Site::new()?.with_mounts(
            "mkdir export/m export/beside; touch export/m/under; \
             mount -t tmpfs -o size=64k,mode=777 none export/m; touch export/m/over",
        );
        let server = site.serve(&options)?;
        let root = server.handle(&site.export())?;
        let mut nfs = server.nfs(Cred::root())?;
        if crosses {
            let mounted = nfs.find(&root, b"m")?;
            nfs.find(&mounted, b"over")?;
            ensure!(nfs.find(&mounted, b"..")? == root || nfs.find(&mounted, b"..")? == mounted);
            let (outer, inner) = (nfs.attributes(&root)?, nfs.attributes(&mounted)?);
            ensure!(outer.fsid != inner.fsid, "two file systems with one fsid");
            let beside = nfs.find(&root, b"beside")?;
            let moved = nfs.rename((&mounted, b"over"), (&beside, b"x"))?;
            ensure!(status(&moved) == nfs3_types::nfs3::nfsstat3::NFS3ERR_XDEV);
        } else if let Ok(shown) = nfs.find(&root, b"m") {
            ensure!(
                nfs.find(&shown, b"over").is_err(),
                "the mounted file system is open"
            );
        }
        // Whatever the options, the list shows the name, and no handle but LOOKUP's.
        let found = nfs.find(&root, b"m").ok();
        let page = ok(nfs.readdirplus(&root, 0, 8192, 32_768)?)?;
        let entry = page
            .reply
            .entries
            .0
            .iter()
            .find(|entry| entry.name.as_ref() == b"m");
        let entry = entry.ok_or_else(|| anyhow::anyhow!("the name is not listed"))?;
        if let Nfs3Option::Some(fh) = &entry.name_handle {
            ensure!(
                Some(fh.data.to_vec()) == found,
                "crossing {crosses}: another handle than LOOKUP's"
            );
        }
    }
    Ok(())
}
