//! What a service is, is the cluster's: nodes whose files differ serve it all the same, a reload on
//! any node is for all, and a mistake of one changes nothing.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::client::mount::Mount;
use havenfs_tests::client::nlm::stat;
use havenfs_tests::client::peer::Transport;
use havenfs_tests::client::{Cred, Peer};
use havenfs_tests::cluster::client::Client;
use havenfs_tests::cluster::{Cluster, NODES};
use serde_json::Value;

use crate::scene::{ALPHA, BETA, ONE, Scene, TWO};

/// What MNT answers where nothing is exported.
const NOENT: u32 = 2;

/// Another directory that could be exported.
fn another(cluster: &Cluster) -> Result<PathBuf> {
    let path = cluster.site.path().join("another");
    if !path.exists() {
        fs::create_dir(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777))?;
    }
    Ok(path)
}

/// Changes a node's configuration file.
fn change(cluster: &Cluster, node: &str, from: &str, to: &str) -> Result<()> {
    let path = cluster.site.config(node);
    let text = fs::read_to_string(&path)?;
    ensure!(text.contains(from), "no `{from}` in {text}");
    Ok(fs::write(path, text.replace(from, to))?)
}

/// Has a node's file export another directory in place of the first.
fn export_another(cluster: &Cluster, node: &str) -> Result<()> {
    let (one, other) = (cluster.site.export(ALPHA), another(cluster)?);
    let [one, other] = [one, other].map(|path| format!("\"{}:", path.display()));
    change(cluster, node, &one, &other)
}

/// What MNT of a directory says, as a status.
fn mount(cluster: &Cluster, path: &std::path::Path) -> Result<u32> {
    let client = Client::new(&cluster.site, "a", 1, ALPHA);
    let mounted = client.mount(&path.to_string_lossy())?;
    Ok(mounted.err().unwrap_or(0))
}

fn definition(cluster: &Cluster, node: &str) -> Option<Value> {
    let status = cluster.status(node).ok()?;
    let service = status["services"].as_array()?.first()?.clone();
    Some(service["definition"].clone())
}

fn wait_definition(
    cluster: &Cluster,
    node: &str,
    what: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Result<Value> {
    let found = cluster.wait(&format!("{node}: {what}"), |cluster| {
        definition(cluster, node).filter(|found| wanted(found))
    });
    found.with_context(|| format!("{:?}", definition(cluster, node)))
}

#[test]
fn a_node_whose_files_differ_serves_what_the_cluster_has_and_says_so() -> Result<()> {
    let mut cluster = Cluster::new(&ONE)?;
    let (export, other) = (cluster.site.export(ALPHA), another(&cluster)?);
    for name in NODES {
        cluster.spawn(name)?;
    }
    cluster.wait_serving(ALPHA, |serving| serving.node == "n1")?;
    // Its files are others when it comes back.
    cluster.stop("n2")?;
    export_another(&cluster, "n2")?;
    change(
        &cluster,
        "n2",
        "names = [\"alpha.example\"]",
        "names = [\"other.example\"]",
    )?;
    cluster.restart("n2")?;
    let told = wait_definition(&cluster, "n2", "differs", |found| {
        found["differs"] == serde_json::json!(["names", "exports"])
    })?;
    ensure!(told["version"] == 1 && told["restart"] == false, "{told}");
    let log = cluster.log("n2")?;
    ensure!(log.contains("the files of this node differ"), "{log}");
    let told = definition(&cluster, "n1").context("no definition")?;
    ensure!(told["differs"] == serde_json::json!([]), "{told}");

    // Nor does it matter if they can't be understood.
    cluster.stop("n3")?;
    change(&cluster, "n3", "rw,no_root_squash", "rw,no_rot_squash")?;
    cluster.restart("n3")?;
    wait_definition(&cluster, "n3", "has mistakes", |found| {
        found["unread"] == true
    })?;
    cluster.wait("n3 says so in its log", |cluster| {
        let log = cluster.log("n3").ok()?;
        log.contains("no_rot_squash").then_some(())
    })?;

    cluster.move_to(ALPHA, "n2")?;
    ensure!(mount(&cluster, &export)? == 0);
    ensure!(mount(&cluster, &other)? == NOENT);
    Ok(())
}

#[test]
fn a_reload_on_a_standby_changes_what_the_active_node_exports() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let (export, other) = (cluster.site.export(ALPHA), another(cluster)?);
        ensure!(mount(cluster, &export)? == 0);
        export_another(cluster, "n3")?;
        let answer = cluster.ask("n3", "reload")?;
        let done = answer["done"].as_str().unwrap_or_default();
        let told = done.contains("version 2, on n1: 1 exports in force");
        ensure!(told, "{answer}");
        ensure!(mount(cluster, &other)? == 0);
        ensure!(mount(cluster, &export)? == NOENT);
        // The others have other files now, and say so.
        wait_definition(cluster, "n1", "differs", |found| {
            found["version"] == 2 && found["differs"] == serde_json::json!(["exports"])
        })?;

        // Of two who knew the same version one has to look again.
        let answer = cluster.ask("n2", "reload 1")?;
        let error = answer["error"].as_str().unwrap_or_default();
        let told = error.contains("it has version 2") && error.contains("hint: ");
        ensure!(told, "{answer}");
        ensure!(mount(cluster, &other)? == 0);

        // And back again, by another node, with a signal.
        cluster.hang_up("n2")?;
        // A call that comes while it is brought into force may have to be sent again.
        wait_definition(cluster, "n1", "in force", |found| found["in_force"] == 3)?;
        ensure!(mount(cluster, &export)? == 0);
        let answer = cluster.ask("n3", "reload 3")?;
        ensure!(answer["done"].is_string(), "{answer}");
        ensure!(mount(cluster, &other)? == 0);

        // It outlives the active node, and the files of the next.
        cluster.kill("n1")?;
        cluster.wait_serving(ALPHA, |serving| serving.node != "n1")?;
        ensure!(mount(cluster, &other)? == 0);
        ensure!(mount(cluster, &export)? == NOENT);
        Ok(())
    })
}

#[test]
fn what_cannot_be_brought_into_force_changes_nothing() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let export = cluster.site.export(ALPHA);
        // A mistake in the list is found where it is.
        change(cluster, "n2", "rw,no_root_squash", "rw,no_rot_squash")?;
        let answer = cluster.ask("n2", "reload")?;
        let error = answer["error"].as_str().unwrap_or_default();
        ensure!(error.contains("no_rot_squash"), "{answer}");
        let told = definition(cluster, "n1").context("no definition")?;
        ensure!(told["version"] == 1, "{told}");
        // A directory that is not there, by the active node, which takes the definition back.
        change(cluster, "n3", "export-alpha", "export-nothing")?;
        let answer = cluster.ask("n3", "reload")?;
        let error = answer["error"].as_str().unwrap_or_default();
        let told = error.starts_with("n1 can't bring it into force")
            && error.contains("export-nothing")
            && error.contains("does not exist");
        ensure!(told, "{answer}");
        ensure!(mount(cluster, &export)? == 0);
        let told = wait_definition(cluster, "n2", "taken back", |found| {
            found["version"] == 3 && found["in_force"] == 3
        })?;
        let problem = told["refused"]["problem"].as_str().unwrap_or_default();
        ensure!(problem.starts_with("version 2: "), "{told}");
        cluster.kill("n1")?;
        cluster.wait_serving(ALPHA, |serving| serving.node != "n1")?;
        ensure!(mount(cluster, &export)? == 0);
        Ok(())
    })
}

#[test]
fn the_mount_list_is_known_after_a_takeover_and_a_move() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let export = cluster.site.export(ALPHA);
        let at = (cluster.site.service(ALPHA), cluster.site.ports.mount);
        let clients: Vec<IpAddr> = (0..5).map(|number| cluster.site.client(number)).collect();
        let connect = |number: usize| -> Result<Mount> {
            let own = (clients[number], 0);
            let peer = Peer::connect_from(Transport::Tcp, own.into(), at.into())?;
            Ok(Mount::new(peer, Cred::root()))
        };
        let path = export.to_string_lossy().into_owned();
        let entry = |number: usize| (clients[number].to_string(), path.clone());
        for number in [1, 2] {
            let mounted = connect(number)?.mnt(path.as_bytes())?;
            ensure!(mounted.is_ok(), "{mounted:?}");
        }
        connect(2)?.umnt(path.as_bytes())?;
        // A move takes along what is not told yet.
        let served = cluster.move_to(ALPHA, "n2")?;
        let dumped = connect(3)?.dump()?;
        ensure!(dumped == [entry(1)], "{dumped:?}");
        let mounted = connect(3)?.mnt(path.as_bytes())?;
        ensure!(mounted.is_ok(), "{mounted:?}");
        for node in cluster.others(&[served.node]) {
            cluster.wait(&format!("{node} knows of two mounts"), |cluster| {
                let status = cluster.status(node).ok()?;
                (status["services"][0]["mounts"] == 2).then_some(())
            })?;
        }
        cluster.kill(served.node)?;
        cluster.wait_serving(ALPHA, |serving| serving.node != served.node)?;
        let dumped = connect(4)?.dump()?;
        ensure!(dumped == [entry(1), entry(3)], "{dumped:?}");
        Ok(())
    })
}

#[test]
fn new_addresses_come_with_a_restart_and_who_has_them_goes_first() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let old = cluster.site.service(ALPHA).to_string();
        let new = old.replace(".100", ".110");
        for node in NODES {
            change(cluster, node, &format!("\"{old}\""), &format!("\"{new}\""))?;
        }
        let answer = cluster.ask("n2", "reload")?;
        let done = answer["done"].as_str().unwrap_or_default();
        ensure!(done.contains("when the nodes are restarted"), "{answer}");
        // It is served as before, and every node says what is to be done.
        ensure!(mount(cluster, &cluster.site.export(ALPHA))? == 0);
        for node in NODES {
            wait_definition(cluster, node, "wants a restart", |found| {
                found["restart"] == true && found["addresses"][0] == *new
            })?;
        }
        cluster.stop("n3")?;
        cluster.restart("n3")?;
        wait_definition(cluster, "n3", "has the new address", |found| {
            found["version"] == 2 && found["restart"] == false
        })?;
        // Else it would be the turn of n2.
        cluster.kill("n1")?;
        let next = cluster.wait_serving(ALPHA, |serving| serving.node != "n1")?;
        ensure!(next.node == "n3", "{next:?}");
        let at = SocketAddr::new(new.parse()?, cluster.site.ports.mount);
        let own = SocketAddr::new(cluster.site.client(1), 0);
        let peer = Peer::connect_from(Transport::Tcp, own, at)?;
        let path = cluster.site.export(ALPHA);
        let mounted = Mount::new(peer, Cred::root()).mnt(path.to_string_lossy().as_bytes())?;
        ensure!(mounted.is_ok(), "{mounted:?}");
        Ok(())
    })
}

#[test]
fn hosts_hear_of_new_names_as_soon_as_they_are_defined() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let mut scene = Scene::new(cluster)?;
        let held = scene.held();
        ensure!(scene.a.lock(&held)? == stat::GRANTED);
        let names = "names = [\"new.example\", \"more.example\"]";
        change(cluster, "n2", "names = [\"alpha.example\"]", names)?;
        let answer = cluster.ask("n2", "reload")?;
        ensure!(answer["done"].is_string(), "{answer}");
        let active = cluster.wait_serving(ALPHA, |_| true)?.node;
        let notify = format!("notify {}", cluster.site.client(1));
        let answer = cluster.ask(active, &notify)?;
        ensure!(answer["done"].is_string(), "{answer}");
        let wanted = ["new.example", "new", "more.example", "more"];
        cluster.wait("the host hears of all names", |_| {
            let heard = scene.machine_a.heard().notices;
            let told = |name: &&str| heard.iter().any(|notice| notice.name == *name);
            wanted.iter().all(told).then_some(())
        })?;
        let heard = scene.machine_a.heard().notices;
        let old = heard.iter().any(|notice| notice.name.contains("alpha"));
        ensure!(!old, "{heard:?}");
        Ok(())
    })
}

/// Two reloads on different nodes that together would give files to two services.
#[test]
fn files_of_another_service_are_refused() -> Result<()> {
    Cluster::run(&TWO, |cluster| {
        let (alpha, beta) = (cluster.site.export(ALPHA), cluster.site.export(BETA));
        let [from, to] = [&beta, &alpha].map(|path| path.display().to_string());
        change(cluster, "n3", &from, &to)?;
        let answer = cluster.ask("n3", &format!("@{BETA} reload"))?;
        let error = answer["error"].as_str().unwrap_or_default();
        ensure!(error.contains(ALPHA) && error.contains(BETA), "{answer}");
        ensure!(
            error.contains("hint: ") || error.contains("each export"),
            "{answer}"
        );
        ensure!(mount(cluster, &alpha)? == 0);
        Ok(())
    })
}

/// By two reloads, first out of the one and then into the other; and they stay there.
#[test]
fn files_go_from_one_service_to_another() -> Result<()> {
    Cluster::run(&TWO, |cluster| {
        let (alpha, beta) = (cluster.site.export(ALPHA), cluster.site.export(BETA));
        another(cluster)?;
        export_another(cluster, "n3")?;
        let [from, to] = [&beta, &alpha].map(|path| format!("\"{}:", path.display()));
        change(cluster, "n3", &from, &to)?;
        let reload = |service: &str| cluster.ask("n3", &format!("@{service} reload"));
        let answer = reload(BETA)?;
        ensure!(answer["error"].is_string(), "{answer}");
        for service in [ALPHA, BETA] {
            let answer = reload(service)?;
            ensure!(answer["done"].is_string(), "{answer}");
        }
        ensure!(mount(cluster, &alpha)? == NOENT);
        for service in [ALPHA, BETA] {
            cluster.move_to(service, "n3")?;
        }
        let client = Client::new(&cluster.site, "b", 2, BETA);
        let mounted = client.mount(&alpha.to_string_lossy())?;
        ensure!(mounted.is_ok(), "{mounted:?}");
        ensure!(mount(cluster, &alpha)? == NOENT);
        Ok(())
    })
}
