//! Mistakes in the configuration of a cluster: the node ends with an error that names the place.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use havenfs_tests::cluster::Cluster;
use havenfs_tests::lab::havenfs_binary;
use serde_json::Value;

use crate::scene::{ONE, TWO};

/// Starts `n1` with a changed configuration; returns what it says when it ends, which it has to.
fn refusal(cluster: &mut Cluster, changes: &[(&str, &str)]) -> Result<String> {
    let mut text = cluster.site.config_text("n1")?;
    for (from, to) in changes {
        ensure!(text.contains(from), "no `{from}` in {text}");
        text = text.replace(from, to);
    }
    fs::write(cluster.site.config("n1"), text)?;
    cluster.spawn("n1")?;
    let status = cluster.wait_ended("n1")?;
    let log = cluster.log("n1")?;
    ensure!(
        !status.success() && status.code().is_some(),
        "{status}: {log}"
    );
    Ok(log)
}

#[test]
fn mistakes_are_named_with_their_place() -> Result<()> {
    let mut cluster = Cluster::new(&ONE)?;
    let config = cluster.site.config("n1");
    let config = config.to_string_lossy();
    let member = "\n[[cluster.member]]";
    for (from, to, words) in [
        (
            "node = \"n1\"",
            "node = \"n9\"",
            vec!["node: `n9`", "cluster.member"],
        ),
        ("node = \"n1\"\n", "", vec!["node", "is missing"]),
        (
            "preferred = \"n1\"",
            "preferred = \"n9\"",
            vec!["service.preferred: `n9`", "is no member with data"],
        ),
        (
            "address = \"127",
            "witness = true\naddress = \"127",
            vec!["cluster.member", "are all witnesses"],
        ),
        (
            member,
            "\nlease_ms = 5\n[[cluster.member]]",
            vec!["lease_ms"],
        ),
        (
            "storage = \"cluster-fs\"",
            "",
            vec!["service: `alpha`", "storage"],
        ),
        (
            "storage = \"cluster-fs\"",
            "storage = \"fence\"",
            vec!["service: `alpha`", "no fence_command"],
        ),
        (
            "storage = \"cluster-fs\"",
            "storage = \"fence\"\nfence_command = []",
            vec!["service: `alpha`", "fence_command that is an empty list"],
        ),
        ("names = [", "nmes = [", vec![&*config, "nmes", "names"]),
    ] {
        let log = refusal(&mut cluster, &[(from, to)])?;
        for word in words {
            ensure!(log.contains(word), "{to}: no `{word}` in: {log}");
        }
    }
    Ok(())
}

/// Asks for a check of a file; returns whether it is good, and what is said.
fn check(path: &Path, options: &[&str]) -> Result<(bool, String)> {
    let mut command = Command::new(havenfs_binary()?);
    let output = command
        .args(["config", "check"])
        .arg(path)
        .args(options)
        .output()?;
    ensure!(output.status.code().is_some_and(|code| code < 2));
    let told = String::from_utf8(output.stdout)?;
    Ok((output.status.success(), told))
}

#[test]
fn a_check_says_what_will_happen_and_changes_nothing() -> Result<()> {
    let cluster = Cluster::new(&TWO)?;
    let config = cluster.site.config("n1");
    let (is_good, told) = check(&config, &[])?;
    ensure!(is_good && told.contains("\n0 errors, "), "{told}");
    for words in [
        "n1, n2, n3: 2 of 3 must live, so one may be lost",
        "`alpha`: clients mount from alpha.example",
        "everybody: read and write, root stays root",
        "`beta` begins on n2 the first time; it stays where it is",
    ] {
        ensure!(told.contains(words), "{told}");
    }
    ensure!(!cluster.site.state("n1").exists(), "it made something");
    let (_, told) = check(&config, &["--json"])?;
    let told: Value = serde_json::from_str(&told)?;
    let findings = told["findings"].as_array().map_or(0, Vec::len);
    ensure!(findings > 10, "{told}");
    let text = cluster.site.config_text("n1")?;
    let line = text.lines().position(|line| line.contains("preferred"));
    fs::write(&config, text.replacen("preferred", "prefered", 1))?;
    let (is_good, told) = check(&config, &[])?;
    let place = format!("{}:{}: ", config.display(), line.unwrap_or_default() + 1);
    ensure!(!is_good && told.contains(&place), "{told}");
    ensure!(told.contains("hint: did you mean `preferred`?"), "{told}");
    let (is_good, told) = check(&cluster.site.path().join("none"), &["--json"])?;
    let told: Value = serde_json::from_str(&told)?;
    let first = &told["findings"][0];
    ensure!(!is_good && first["severity"] == "error", "{told}");
    Ok(())
}

#[test]
fn a_key_that_others_may_read_is_refused() -> Result<()> {
    let mut cluster = Cluster::new(&ONE)?;
    let key = cluster.site.path().join("cluster.key");
    for (mode, text, words) in [
        (
            0o644,
            "the key of all nodes of this cluster",
            ["0644", "chmod 0600"],
        ),
        (0o600, "short", ["5 bytes", "32"]),
    ] {
        fs::write(&key, text)?;
        fs::set_permissions(&key, fs::Permissions::from_mode(mode))?;
        let log = refusal(&mut cluster, &[])?;
        let whole = log.contains(&*key.to_string_lossy()) && log.contains("hint: ");
        ensure!(
            whole && words.iter().all(|word| log.contains(word)),
            "{log}"
        );
    }
    fs::remove_file(&key)?;
    let log = refusal(&mut cluster, &[])?;
    ensure!(log.contains("cannot read the cluster key"), "{log}");
    Ok(())
}

#[test]
fn members_that_cannot_be_reached_as_configured_are_refused() -> Result<()> {
    let mut cluster = Cluster::new(&ONE)?;
    let port = cluster.site.ports.peer;
    // Nobody's address: this machine can't listen there.
    let text = cluster.site.config_text("n1")?;
    let own = text
        .lines()
        .find_map(|line| line.strip_prefix("address = \"")?.strip_suffix('"'))
        .unwrap_or_default()
        .to_owned();
    let nobodys = format!("192.0.2.1:{port}");
    let log = refusal(&mut cluster, &[(&own, &nobodys)])?;
    ensure!(log.contains(&nobodys) && log.contains("hint: "), "{log}");
    let other = own.replace(".1:", ".2:");
    let log = refusal(&mut cluster, &[(&other, &own)])?;
    let named = log.contains("`n1` and `n2` both have");
    ensure!(named && log.contains(&own), "{log}");
    Ok(())
}

/// An address names the service that is asked, so two can't have the same.
#[test]
fn services_that_share_an_address_are_refused() -> Result<()> {
    let mut cluster = Cluster::new(&TWO)?;
    let [alpha, beta] = ["alpha", "beta"].map(|name| cluster.site.service(name).to_string());
    let log = refusal(&mut cluster, &[(&beta, &alpha)])?;
    let named = log.contains("alpha") && log.contains("beta") && log.contains(&alpha);
    ensure!(named, "{log}");
    Ok(())
}

/// Each service knows its own locks alone, so a file that two export would be locked twice.
#[test]
fn services_that_share_files_are_refused() -> Result<()> {
    let mut cluster = Cluster::new(&TWO)?;
    let log = refusal(&mut cluster, &[("export-beta", "export-alpha")])?;
    let named = log.contains("alpha") && log.contains("beta") && log.contains("export-alpha");
    ensure!(named, "{log}");
    Ok(())
}
