//! MOUNT: what can be mounted, the list of mounts, and the list of exports.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use havenfs_tests::client::mount::{Mount, procedure};
use havenfs_tests::client::nfs::args;
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::{Cred, Outcome, Peer};
use havenfs_tests::server::{Server, Site, V4, V6};

use super::scene::{Scene, USER};

const NOENT: u32 = 2;
const ACCES: u32 = 13;
const NOTDIR: u32 = 20;
const NAMETOOLONG: u32 = 63;

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

/// A client of MOUNT that comes from another address of this machine.
fn mount_from(server: &Server, own: [u8; 4]) -> Result<Mount> {
    let own = SocketAddr::new(IpAddr::from(own), 0);
    let peer = Peer::connect_from(Transport::Tcp, own, (V4, server.mount_port).into())?;
    Ok(Mount::new(peer, Cred::root()))
}

/// Status by status, over both transports, IPv4 and IPv6.
#[test]
fn every_status_that_can_be_reached() -> Result<()> {
    let site = Site::new()?;
    for name in ["export/d", "export/d/e", "private", "not-exported"] {
        fs::create_dir(site.path().join(name))?;
    }
    fs::write(site.path().join("export/f"), "")?;
    std::os::unix::fs::symlink("d", site.path().join("export/l"))?;
    std::os::unix::fs::symlink("../not-exported", site.path().join("export/out"))?;
    let open = format!("{}:*(rw,insecure,no_root_squash)", site.export().display());
    let private = format!(
        "{}:192.0.2.1(rw,insecure)",
        site.path().join("private").display()
    );
    let server = site.serve_exports(&[&open, &private], &[])?;
    let long = "n".repeat(256);
    let cases: [(&str, Result<(), u32>); 20] = [
        ("export", Ok(())),
        ("export/", Ok(())),
        ("export///", Ok(())),
        ("/export", Ok(())),
        ("export/d", Ok(())),
        ("export/d/e/", Ok(())),
        ("export//d", Ok(())),
        ("export/f", Err(NOTDIR)),
        ("export/f/x", Err(NOTDIR)),
        ("export/l", Err(NOTDIR)),
        ("export/l/e", Err(NOTDIR)),
        ("export/out", Err(NOTDIR)),
        ("export/none", Err(NOENT)),
        ("export/d/none/x", Err(NOENT)),
        (&format!("export/{long}"), Err(NAMETOOLONG)),
        ("private", Err(ACCES)),
        ("private/none", Err(ACCES)),
        ("not-exported", Err(NOENT)),
        ("", Err(NOENT)),
        ("exp", Err(NOENT)),
    ];
    for (ip, transport) in [
        (V4, Transport::Tcp),
        (V4, Transport::Udp),
        (V6, Transport::Tcp),
    ] {
        let mut mount = server.mount_at(ip, transport)?;
        for (path, expected) in &cases {
            let path = format!("{}/{path}", site.path().display());
            let got = mount.mnt(path.as_bytes())?.map(|_| ());
            ensure!(got == *expected, "{path} over {transport:?}: {got:?}");
        }
    }
    let mut mount = server.mount()?;
    for path in [&b""[..], b"/", b"relative", b"export"] {
        let got = mount.mnt(path)?;
        ensure!(got.is_err(), "{}: {got:?}", path.escape_ascii());
    }
    Ok(())
}

#[test]
fn no_path_leads_out_of_the_export() -> Result<()> {
    let s = Scene::new()?;
    let outside = s.site.path().join("outside");
    fs::create_dir(&outside)?;
    fs::create_dir(s.path("d"))?;
    std::os::unix::fs::symlink(&outside, s.path("absolute"))?;
    let export = s.site.export();
    let export = export.display();
    let mut mount = s.server.mount()?;
    for path in [
        format!("{export}/.."),
        format!("{export}/../outside"),
        format!("{export}/d/../../outside"),
        format!("{export}/absolute"),
        format!("{export}/absolute/../outside"),
        format!("{export}/d/\0"),
    ] {
        let got = mount.mnt(path.as_bytes())?;
        ensure!(got.is_err(), "{path}: mounted");
    }
    // What stays inside is refused or the right directory.
    if let Ok(fh) = mount.mnt(format!("{export}/d/..").as_bytes())? {
        ensure!(fh == s.root);
    }
    if let Ok(fh) = mount.mnt(format!("{export}/./").as_bytes())? {
        ensure!(fh == s.root);
    }
    Ok(())
}

#[test]
fn paths_above_1024_bytes_are_garbage() -> Result<()> {
    let s = Scene::new()?;
    let mut mount = s.server.mount()?;
    for (len, garbage) in [(1024, false), (1025, true), (5000, true)] {
        let path = args(|w| w.opaque(&vec![b'/'; len]));
        for procedure in [procedure::MNT, procedure::UMNT] {
            let got = mount.outcome(procedure, &path)?;
            ensure!(
                (got == Outcome::GarbageArgs) == garbage,
                "{len} bytes: {got:?}"
            );
        }
    }
    for (procedure, args) in [(procedure::DUMP, &[0; 4][..]), (procedure::EXPORT, &[0; 4])] {
        ensure!(mount.outcome(procedure, args)? == Outcome::GarbageArgs);
    }
    ensure!(mount.outcome(procedure::MNT, &[])? == Outcome::GarbageArgs);
    Ok(())
}

/// A directory below the export's root is found as the caller, not as the server.
#[test]
fn a_closed_directory_can_not_be_mounted_through_needs_root() -> Result<()> {
    let s = Scene::with_options("rw,insecure")?;
    fs::create_dir_all(s.path("closed/inner"))?;
    s.own("closed", 0o700)?;
    let inner = s.path("closed/inner");
    let mut mount = s.server.mount()?;
    ensure!(
        mount.mnt(bytes(&inner))? == Err(ACCES),
        "squashed root came through"
    );
    mount.cred = Cred::user(USER, USER);
    ensure!(mount.mnt(bytes(&inner))?.is_ok());
    Ok(())
}

#[test]
fn the_list_has_what_was_mounted_and_each_host_takes_its_own() -> Result<()> {
    let s = Scene::new()?;
    fs::create_dir(s.path("d"))?;
    let text = |path: &Path| path.display().to_string();
    let (export, dir) = (text(&s.site.export()), text(&s.path("d")));
    let mut own = s.server.mount()?;
    own.umntall()?;
    ensure!(own.mnt(bytes(&s.path("none")))?.is_err());
    ensure!(own.dump()?.is_empty(), "an entry without OK");
    let mut other = mount_from(&s.server, [127, 0, 0, 2])?;
    for mount in [&mut own, &mut other] {
        for path in [&export, &dir, &dir] {
            ensure!(mount.mnt(path.as_bytes())?.is_ok());
        }
    }
    let entry = |host: &str, path: &str| (host.to_owned(), path.to_owned());
    let mut list = own.dump()?;
    list.sort();
    let all = [
        entry("127.0.0.1", &export),
        entry("127.0.0.1", &dir),
        entry("127.0.0.2", &export),
        entry("127.0.0.2", &dir),
    ];
    ensure!(list == all, "{list:?}");
    // Neither UMNT nor UMNTALL touches what another host has.
    own.umnt(dir.as_bytes())?;
    own.umnt(b"/never/mounted")?;
    let mut list = own.dump()?;
    list.sort();
    ensure!(
        list == [all[0].clone(), all[2].clone(), all[3].clone()],
        "{list:?}"
    );
    other.umntall()?;
    ensure!(own.dump()? == [all[0].clone()]);
    // The old version has the same list.
    other.version = 1;
    ensure!(other.dump()? == [all[0].clone()]);
    // An orderly end forgets nothing, nor does a kill once the list is on disk, which takes a
    // moment: the list is advisory, so nobody waits for it.
    let Scene { site, server, .. } = s;
    ensure!(server.stop()?.success());
    let server = site.serve("rw,insecure,no_root_squash")?;
    let list = server.mount()?.dump()?;
    ensure!(list == [all[0].clone()], "after a stop: {list:?}");
    ensure!(server.mount()?.mnt(dir.as_bytes())?.is_ok());
    wait_for_list(&site, &dir)?;
    server.kill()?;
    let server = site.serve("rw,insecure")?;
    let list = server.mount()?.dump()?;
    ensure!(list == all[..2], "after a kill: {list:?}");
    server.mount()?.umntall()?;
    ensure!(server.stop()?.success());
    let server = site.serve("rw,insecure")?;
    let list = server.mount()?.dump()?;
    ensure!(list.is_empty(), "after UMNTALL and a stop: {list:?}");
    Ok(())
}

#[test]
fn the_export_list_says_for_whom() -> Result<()> {
    let site = Site::new()?;
    fs::create_dir(site.path().join("b"))?;
    let a = format!("{}:*(ro)", site.export().display());
    let b = format!(
        "{}:192.0.2.0/24(rw) client.example(ro) 2001:db8::7(ro)",
        site.path().join("b").display()
    );
    let server = site.serve_exports(&[&a, &b], &[])?;
    for version in [1, 3] {
        for transport in [Transport::Tcp, Transport::Udp] {
            let mut mount = server.mount_at(V4, transport)?;
            mount.version = version;
            let mut list = mount.export()?;
            list.sort();
            ensure!(list.len() == 2, "{list:?}");
            let (path, groups) = &list[0];
            ensure!(Path::new(path) == site.path().join("b"));
            let shown: Vec<&str> = groups.iter().map(String::as_str).collect();
            ensure!(
                shown.len() == 3 && shown.contains(&"192.0.2.0/24"),
                "{shown:?}"
            );
            ensure!(shown.contains(&"client.example") && shown.contains(&"2001:db8::7"));
            let (path, groups) = &list[1];
            ensure!(
                Path::new(path) == site.export() && groups.len() <= 1,
                "{groups:?}"
            );
        }
    }
    Ok(())
}

/// Handles of version 1 have 32 bytes and belong to NFS 2, which is not served.
#[test]
fn version_1_gives_no_handles() -> Result<()> {
    let s = Scene::new()?;
    let mut mount = s.server.mount()?;
    let path = s.site.export();
    let path = args(|w| w.opaque(bytes(&path)));
    for version in [1, 2] {
        mount.version = version;
        let got = mount.outcome(procedure::MNT, &path)?;
        ensure!(got == Outcome::Success(vec![0, 0, 0, 13]), "{got:?}");
        ensure!(mount.outcome(procedure::NULL, &[])? == Outcome::Success(Vec::new()));
    }
    Ok(())
}

/// A reserved port is asked for by default, and the log says what to do.
#[test]
fn an_unreserved_port_is_refused_with_a_remedy() -> Result<()> {
    let site = Site::new()?;
    let mut server = site.serve("rw")?;
    let got = server.mount()?.mnt(bytes(&site.export()))?;
    ensure!(got == Err(ACCES), "{got:?}");
    let line = server.wait_for_line("insecure")?;
    ensure!(line.contains("port"), "{line}");
    Ok(())
}

#[test]
fn a_directory_with_any_name_can_be_mounted() -> Result<()> {
    let site = Site::new()?;
    let name = "a b\u{e9}#\"x";
    fs::create_dir(site.export().join(name))?;
    fs::set_permissions(site.export(), fs::Permissions::from_mode(0o755))?;
    let server = site.serve("rw,insecure,no_root_squash")?;
    let path = site.export().join(name);
    server.handle(&path)?;
    let list = server.mount()?.dump()?;
    ensure!(
        list.iter().any(|(_, dir)| Path::new(dir) == path),
        "{list:?}"
    );
    ensure!(server.stop()?.success());
    let server = site.serve("rw,insecure,no_root_squash")?;
    let list = server.mount()?.dump()?;
    let found = list.iter().find(|(_, dir)| Path::new(dir) == path);
    found.ok_or_else(|| anyhow!("{list:?}"))?;
    Ok(())
}

/// Waits until the list in the state directory has this path.
fn wait_for_list(site: &Site, path: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let quoted = format!("\"{path}\"");
    loop {
        let text = fs::read_to_string(site.path().join("state/mounts")).unwrap_or_default();
        if text.contains(&quoted) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the list is not saved: {text}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
