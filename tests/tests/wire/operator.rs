//! What an operator sees of locks, and does to them and to hosts.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use anyhow::{Result, ensure};
use havenfs_tests::client::nfs::{FILE_SYNC, How, answer};
use havenfs_tests::client::nlm::{Lock, stat};
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::{Cred, Nfs, Peer, Sattr};
use havenfs_tests::server::{Site, V4};
use nfs3_types::nfs3::nfsstat3;

use crate::locking::{A, B, Scene, look_up};
use crate::scene::OPEN;

#[test]
fn an_operator_sees_locks_and_breaks_them() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
    ensure!(a.lock(&scene.lock_of("a", 7).range(0, 10))? == stat::GRANTED);
    let waiting = Lock {
        block: true,
        ..scene.lock_of("b", 1)
    };
    ensure!(b.lock(&waiting)? == stat::BLOCKED);
    let path = scene.site.export().join("file").display().to_string();
    let locks = scene.site.ask("locks")?;
    let first = &locks["entries"][0];
    ensure!(
        first["path"] == path.as_str() && first["range"] == "0-9",
        "{locks}"
    );
    ensure!(first["host"] == "127.0.0.11" && first["name"] == "a" && first["owner"] == 7);
    ensure!(
        first["confirmed"] == true && first["kind"] == "exclusive",
        "{locks}"
    );
    let waits = scene.site.ask("waiting")?;
    ensure!(
        waits["entries"][0]["host"] == "127.0.0.12" && waits["entries"][0]["range"] == "0-end",
        "{waits}"
    );
    let hosts = scene.site.ask("hosts")?;
    ensure!(
        hosts["entries"].as_array().map(Vec::len) == Some(2),
        "{hosts}"
    );
    let plan = scene.site.ask(&format!("would-break 127.0.0.11 {path}"))?;
    let told = plan["done"].as_str().unwrap_or_default();
    ensure!(
        told.starts_with("1 locks") && told.contains(" 1 requests of other hosts"),
        "{plan}"
    );
    ensure!(scene.site.ask("break nobody")?["error"].is_string());
    let elsewhere = format!("break 127.0.0.11 {path}.other");
    ensure!(scene.site.ask(&elsewhere)?["error"].is_string());
    ensure!(scene.site.ask(&format!("break 127.0.0.11 {path}"))?["done"].is_string());
    let locks = scene.site.ask("locks")?;
    ensure!(
        locks["entries"][0]["host"] == "127.0.0.12" && locks["entries"][0]["confirmed"] == false,
        "{locks}"
    );
    // The one who had it can't get it back by reclaiming it.
    let reclaim = Lock {
        reclaim: true,
        ..scene.lock_of("a", 7).range(0, 10)
    };
    ensure!(b.unlock(&scene.lock_of("b", 1))? == stat::GRANTED);
    ensure!(a.lock(&reclaim)? == stat::DENIED);
    ensure!(a.lock(&scene.lock_of("a", 7))? == stat::GRANTED, "but anew");
    fs::remove_file(scene.site.export().join("file"))?;
    let locks = scene.site.ask("locks")?;
    ensure!(
        locks["entries"].as_array().map(Vec::len) == Some(1),
        "{locks}"
    );
    Ok(())
}

#[test]
fn writes_of_a_host_whose_lock_was_broken_are_refused_until_allowed() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let path = scene.site.export().join("file").display().to_string();
    let mut a = scene.server.nlm(A)?;
    ensure!(a.lock(&scene.lock_of("a", 7))? == stat::GRANTED);
    for request in ["refuse", "break"] {
        let answer = scene.site.ask(&format!("{request} 127.0.0.11 {path}"))?;
        ensure!(answer["done"].is_string(), "{answer}");
    }
    let mut of_a = writer(&scene, A)?;
    let mut of_b = writer(&scene, B)?;
    let acces = Some(nfsstat3::NFS3ERR_ACCES);
    ensure!(write(&mut of_a, &scene.fh)? == acces);
    let cut = answer(of_a.setattr(&scene.fh, &Sattr::size(0), None))?;
    ensure!(cut.status == nfsstat3::NFS3ERR_ACCES, "{cut:?}");
    let root = scene.server.handle(&scene.site.export())?;
    let cut = How::Unchecked(Sattr::size(0));
    let made = answer(of_a.create(&root, b"file", cut))?;
    ensure!(made.status == nfsstat3::NFS3ERR_ACCES, "{made:?}");
    let mode = answer(of_a.setattr(&scene.fh, &Sattr::mode(0o666), None))?;
    ensure!(mode.status == nfsstat3::NFS3_OK, "{mode:?}");
    ensure!(write(&mut of_b, &scene.fh)?.is_none());
    fs::write(scene.site.export().join("other"), "")?;
    let other = look_up(&scene.server, &scene.site, "other")?;
    ensure!(write(&mut of_a, &other)?.is_none(), "only that file");
    ensure!(scene.site.ask("status")?["locking"]["writes_refused"] == 1);
    // It outlives the process.
    let scene = scene.restart(OPEN)?;
    let mut of_a = writer(&scene, A)?;
    ensure!(write(&mut of_a, &scene.fh)? == acces);
    let refused = scene.site.ask("refused")?;
    ensure!(
        refused["entries"][0]["path"] == path.as_str() && refused["entries"][1].is_null(),
        "{refused}"
    );
    let allowed = scene.site.ask(&format!("allow 127.0.0.11 {path}"))?;
    ensure!(allowed["done"].is_string(), "{allowed}");
    ensure!(write(&mut of_a, &scene.fh)?.is_none());
    ensure!(
        scene.site.ask("allow 127.0.0.11")?["error"].is_string(),
        "none is left"
    );
    // All files of a host.
    scene.site.ask("refuse 127.0.0.11")?;
    ensure!(write(&mut of_a, &other)? == acces);
    scene.site.ask("allow 127.0.0.11")?;
    ensure!(write(&mut of_a, &other)?.is_none());
    Ok(())
}

fn writer(scene: &Scene, host: IpAddr) -> Result<Nfs> {
    let (own, server) = (SocketAddr::new(host, 0), scene.server.nfs_at(V4));
    let peer = Peer::connect_from(Transport::Tcp, own, server)?;
    Ok(Nfs::new(peer, Cred::root()))
}

/// Why the server does not take a WRITE, if it does not.
fn write(nfs: &mut Nfs, fh: &[u8]) -> Result<Option<nfsstat3>> {
    let done = answer(nfs.write(fh, 0, FILE_SYNC, b"x"))?;
    Ok(Some(done.status).filter(|status| *status != nfsstat3::NFS3_OK))
}

/// What is asked carelessly must not end more than was meant.
#[test]
fn requests_that_can_be_misread_are_refused() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let mut a = scene.server.nlm(A)?;
    for name in ["one", "two", "two "] {
        fs::write(scene.site.export().join(name), "")?;
        let fh = look_up(&scene.server, &scene.site, name)?;
        ensure!(a.lock(&Lock::new(&fh, "a", 1))? == stat::GRANTED);
    }
    let export = scene.site.export().display().to_string();
    let held = || -> Result<u64> {
        let status = scene.site.ask("status")?;
        Ok(status["locking"]["locks"].as_u64().unwrap_or(0))
    };
    let long = format!("break 127.0.0.11 {export}/{:0>5000}", "");
    let host = "break 127.0.0.11 ".to_owned();
    for request in [
        &host,
        &long,
        "break ",
        "refuse 127.0.0.11 ",
        "break 127.0.0.11\n",
    ] {
        ensure!(scene.site.ask(request)?["error"].is_string(), "{request}");
    }
    ensure!(held()? == 3);
    scene.site.ask(&format!("break 127.0.0.11 {export}/two "))?;
    let left = scene.site.ask("locks")?;
    let of = |name: &str| left.to_string().contains(&format!("{export}/{name}\""));
    ensure!(of("one") && of("two") && !of("two "), "{left}");
    // Both are shown alike once no name leads to them.
    for name in ["one", "two"] {
        fs::remove_file(scene.site.export().join(name))?;
    }
    let scene = scene.restart(OPEN)?;
    let entries = scene.site.ask("locks")?;
    let shown = entries["entries"][0]["path"].as_str().unwrap_or_default();
    let answer = scene.site.ask(&format!("break 127.0.0.11 {shown}"))?;
    ensure!(answer["error"].is_string(), "{answer}");
    ensure!(scene.site.ask("status")?["locking"]["locks"] == 2);
    Ok(())
}

/// The locks stay, come off as ever, and are counted.
#[test]
fn needs_root_an_export_with_locks_is_taken_away() -> Result<()> {
    let site = Site::new()?;
    let other = site.path().join("other");
    fs::create_dir(&other)?;
    let site = site.with_mounts("mount -t tmpfs -o mode=777 none other; echo x > other/file");
    let list = site.path().join("list");
    let line = |path: &Path| format!("{} *({OPEN})\n", path.display());
    fs::write(&list, line(&site.export()) + &line(&other))?;
    let server = site.serve_exports(&[], &["--exports-file", &list.display().to_string()])?;
    let root = server.handle(&other)?;
    let fh = server.nfs(Cred::root())?.find(&root, b"file")?;
    let mut a = server.nlm(A)?;
    ensure!(a.lock(&Lock::new(&fh, "a", 1))? == stat::GRANTED);
    fs::write(&list, line(&site.export()))?;
    let told = site.ask("reload")?;
    let told = told["done"].as_str().unwrap_or_default();
    ensure!(
        told.contains("; 1 locks are on files that no export shows"),
        "{told}"
    );
    ensure!(site.ask("status")?["locking"]["locks"] == 1);
    ensure!(a.unlock(&Lock::new(&fh, "a", 1))? == stat::GRANTED);
    ensure!(site.ask("status")?["locking"]["locks"] == 0);
    Ok(())
}

#[test]
fn a_host_that_expires_holds_nothing_and_is_told_nothing() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let (mut a, mut b) = (scene.server.nlm(A)?, scene.server.nlm(B)?);
    ensure!(a.lock(&scene.lock_of("a", 1))? == stat::GRANTED);
    let done = scene.site.ask("expire 127.0.0.11")?;
    ensure!(
        done["done"]
            .as_str()
            .is_some_and(|done| done.starts_with("1 locks")),
        "{done}"
    );
    ensure!(b.lock(&scene.lock_of("b", 1))? == stat::GRANTED);
    let host = scene.site.ask("host 127.0.0.11")?;
    ensure!(
        host["hosts"][0]["monitored"] == false && host["hosts"][0]["lost"] == 1,
        "{host}"
    );
    ensure!(scene.site.ask("notify 127.0.0.11")?["error"].is_string());
    ensure!(scene.site.ask("expire 127.0.0.99")?["error"].is_string());
    Ok(())
}

#[test]
fn limits_are_configured_and_counted() -> Result<()> {
    let site_config = tempfile::NamedTempFile::new()?;
    fs::write(
        site_config.path(),
        "[lock_limits]\nlocks_per_host = 2\nhosts = 2\n",
    )?;
    let config = site_config.path().display().to_string();
    // A port that is free now; if somebody else takes it, there are no metrics and the test fails.
    let port = TcpListener::bind((V4, 0))?.local_addr()?;
    let metrics = port.to_string();
    let scene = Scene::with(OPEN, &["--config", &config, "--metrics", &metrics])?;
    let mut a = scene.server.nlm(A)?;
    for start in [0, 100] {
        ensure!(a.lock(&scene.lock_of("a", 1).range(start, 10))? == stat::GRANTED);
    }
    let third = scene.lock_of("a", 1).range(200, 10);
    ensure!(a.lock(&third)? == stat::DENIED_NOLOCKS);
    ensure!(a.lock(&third)? == stat::DENIED_NOLOCKS);
    let mut b = scene.server.nlm(B)?;
    ensure!(b.lock(&scene.lock_of("b", 1).range(300, 10))? == stat::GRANTED);
    ensure!(b.lock(&scene.lock_of("c", 1).range(400, 10))? == stat::DENIED_NOLOCKS);
    let hit = &scene.site.ask("status")?["limits_hit"];
    ensure!(hit["locks_per_host"] == 2 && hit["hosts"] == 1, "{hit}");
    let page = scrape(port)?;
    for line in [
        "havenfs_lock_limit_hit_total{limit=\"locks_per_host\"} 2",
        "havenfs_nlm_calls_total{procedure=\"LOCK\",status=\"Granted\"} 3",
        "havenfs_nlm_calls_total{procedure=\"LOCK\",status=\"DeniedNolocks\"} 3",
        "havenfs_locks_held 3",
        "havenfs_hosts_known 2",
        "havenfs_lock_table_complete 1",
    ] {
        ensure!(page.lines().any(|of| of == line), "{line} in {page}");
    }
    Ok(())
}

/// The metrics page.
fn scrape(port: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect(port)?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}
