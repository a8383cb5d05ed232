//! What the cluster part of a configuration says, and how its mistakes are told.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::time::Duration;

use super::*;

const WHOLE: &str = r#"
node = "n2"
[cluster]
key_file = "/k"
[[cluster.member]]
name = "w"
address = "192.0.2.3:7300"
witness = true
[[cluster.member]]
name = "n1"
address = "192.0.2.1:7300"
[[cluster.member]]
name = "n2"
address = "192.0.2.2:7300"
[[service]]
name = "alpha"
addresses = ["192.0.2.100"]
exports = ["/srv:*(rw)"]
storage = "cluster-fs"
preferred = "n1"
"#;

fn read(text: &str) -> Result<NodeConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("havenfs.toml");
    std::fs::write(&path, text).unwrap();
    let file = File::read(&path).map_err(|error| error.to_string())?;
    plan(File::default(), file).map_err(|error| error.to_string())
}

#[test]
fn a_cluster_is_read_with_its_members_by_name() {
    let config = read(WHOLE).unwrap();
    let cluster = config.cluster.unwrap();
    let names: Vec<&str> = cluster
        .members
        .iter()
        .map(|one| one.name.as_str())
        .collect();
    assert_eq!(names, ["n1", "n2", "w"]);
    assert_eq!((cluster.node.as_str(), cluster.lease_ms), ("n2", 1200));
    let [service] = &config.services[..] else {
        panic!("{:?}", config.services);
    };
    assert_eq!(service.settings.service_names, ["alpha"]);
    assert_eq!(service.preferred.as_deref(), Some("n1"));
    assert!(service.settings.sources.file.is_none());
}

#[test]
fn the_storage_of_a_service_is_asked_unless_told_otherwise() {
    let with = |line: &str| read(&format!("{WHOLE}{line}\n"));
    let time_max = |line| with(line).unwrap().services[0].storage_time_max;
    assert_eq!(time_max(""), Some(Duration::from_secs(10)));
    assert_eq!(
        time_max("storage_seconds = 600"),
        Some(Duration::from_mins(10))
    );
    assert_eq!(time_max("storage_seconds = 0"), None);
    let error = with("storage_seconds = 601").unwrap_err();
    assert!(
        error.contains("storage_seconds of more than 600"),
        "{error}"
    );
}

#[test]
fn a_service_may_have_commands_for_its_storage() {
    let commands = "storage = 'fence'\nfence_command = ['/sbin/fence', '-v']\nhook_seconds = 5\n\
                    takeover_command = ['/bin/mount', '/srv']";
    let config = read(&WHOLE.replace("storage = \"cluster-fs\"", commands)).unwrap();
    let hooks = &config.services[0].hooks;
    assert_eq!(hooks.fence.as_ref().unwrap().arguments, ["-v"]);
    assert_eq!(hooks.takeover.as_ref().unwrap().arguments, ["/srv"]);
    assert_eq!(hooks.release, None);
    assert_eq!(hooks.time_max, Duration::from_secs(5));
}

#[test]
fn without_a_cluster_there_is_nobody_to_fence() {
    let alone = "[[service]]\nname = 'a'\naddresses = ['192.0.2.1']\nexports = ['/srv:*(rw)']\n";
    let commands = "takeover_command = ['/bin/mount']\nrelease_command = ['/bin/umount']\n";
    let config = read(&format!("{alone}{commands}")).unwrap();
    assert!(config.services[0].hooks.release.is_some());
    let fence = "storage = 'fence'\nfence_command = ['/f']\n";
    let error = read(&format!("{alone}{fence}")).unwrap_err();
    assert!(error.contains("no other node to fence"), "{error}");
}

#[test]
fn without_a_cluster_there_is_one_service() {
    let config = read("export = ['/a']\n").unwrap();
    assert!(config.cluster.is_none());
    assert_eq!(config.services.len(), 1);
    assert_eq!(config.services[0].name, LONE_NAME);
}

#[test]
fn mistakes_are_named() {
    for (from, to, expected) in [
        ("node = \"n2\"", "", "node: is missing"),
        (
            "node = \"n2\"",
            "node = \"n9\"",
            ":2: node: `n9` is no [[cluster.member]]",
        ),
        (
            "name = \"w\"",
            "name = \"n1\"",
            ":10: cluster.member.name: `n1` is there twice",
        ),
        ("name = \"w\"", "name = \"a/b\"", "`a/b` is no name"),
        ("192.0.2.3:7300", "192.0.2.3", ":7: invalid socket address"),
        (
            "192.0.2.3:7300",
            "w:7300",
            "it is an IP address, no name, and a port",
        ),
        (
            "192.0.2.3:7300",
            "192.0.2.1:7300",
            "is that of two: `n1` and `w` both have it",
        ),
        (
            "192.0.2.3:7300",
            "192.0.2.3:0",
            ":7: cluster.member.address: `192.0.2.3:0` is no address that others can reach",
        ),
        (
            "storage = \"cluster-fs\"",
            "",
            ":15: service: `alpha` does not say what keeps a node",
        ),
        (
            "cluster-fs",
            "fence",
            ":19: service: `alpha` has storage = \"fence\" and no",
        ),
        (
            "preferred = \"n1\"",
            "fence_command = ['/f']",
            ":20: service: `alpha` has a fence_command, which would never",
        ),
        (
            "preferred = \"n1\"",
            "takeover_command = 'mount /srv'",
            "expected a sequence",
        ),
        (
            "cluster-fs",
            "drbd",
            ":19: unknown variant `drbd`, expected one of",
        ),
        (
            "preferred = \"n1\"",
            "preferred = \"w\"",
            ":20: service.preferred: `w` is no member with data",
        ),
        ("addresses = [\"192.0.2.100\"]", "", "has no addresses"),
        ("exports = [\"/srv:*(rw)\"]", "", "exports nothing"),
        (
            "[\"192.0.2.100\"]",
            "[\"192.0.2.100\", \"192.0.2.100\"]",
            ":17: service: `alpha` has 192.0.2.100, which `alpha` has already",
        ),
        (
            "key_file = \"/k\"",
            "key_file = \"/k\"\nlease_ms = 100",
            ":5: cluster.lease_ms: `100` is not from 1000",
        ),
        (
            "preferred = \"n1\"",
            "failback = 'auto'",
            ":20: service: `alpha` has failback = \"auto\" and no preferred node",
        ),
        (
            "preferred = \"n1\"",
            "preferred = 'n1'\nfailback_seconds = 9",
            "which are for failback = \"auto\"",
        ),
        (
            "preferred = \"n1\"",
            "preferred = 'n1'\nfailback = 'allways'",
            "unknown variant `allways`, expected",
        ),
        (
            "preferred = \"n1\"",
            "preferred = 'n1'\nfailback = 'auto'\nfailback_seconds = 0",
            "has failback_seconds = 0, which is not from 1 to",
        ),
        (
            "witness = true",
            "witnes = true",
            ":8: unknown field `witnes`\nhint: did you mean `witness`?",
        ),
        (
            "node = \"n2\"",
            "node = \"n2\"\nexport = ['/a']",
            "outside of [[service]]",
        ),
    ] {
        assert!(WHOLE.contains(from), "{from}");
        let error = read(&WHOLE.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(expected), "{to}: {error}");
    }
}

#[test]
fn addresses_that_move_have_a_prefix_and_an_interface() {
    let with = |lines: &str| read(&WHOLE.replace(r#"addresses = ["192.0.2.100"]"#, lines));
    let config = with("addresses = ['192.0.2.100/24', '2001:db8::100/64']\ninterface = 'eth0'");
    let config = config.unwrap();
    let settings = &config.services[0].settings;
    assert_eq!(settings.listen.len(), 2);
    let floating = settings.floating.as_ref().unwrap().to_string();
    assert_eq!(floating, "eth0=192.0.2.100/24,2001:db8::100/64");
    for (lines, problem) in [
        ("addresses = ['192.0.2.100/24']", "on which interface"),
        (
            "addresses = ['192.0.2.100']\ninterface = 'eth0'",
            "without a prefix",
        ),
        (
            "addresses = ['192.0.2.100']\naddress_mode = 'managed'",
            "on which interface",
        ),
        (
            "addresses = ['192.0.2.100']\naddress_mode = 'fixed'\ninterface = 'eth0'",
            "fixed addresses and an interface",
        ),
        ("addresses = ['nfs.example.org']", "is no address such as"),
        ("addresses = []", "has no addresses"),
    ] {
        let error = with(lines).unwrap_err();
        assert!(error.contains(problem), "{lines}: {error}");
    }
}

#[test]
fn an_export_is_not_a_line_of_an_export_list() {
    let error = read(&WHOLE.replace("/srv:*(rw)", "/srv *(rw)")).unwrap_err();
    assert!(error.contains("has a colon between"), "{error}");
}

#[test]
fn a_service_goes_back_after_a_minute_if_nothing_else_is_said() {
    let with = |lines: &str| {
        let lines = format!("preferred = \"n1\"\n{lines}");
        read(&WHOLE.replace("preferred = \"n1\"\n", &lines))
            .unwrap()
            .services[0]
            .fail_back
    };
    assert_eq!(with(""), None);
    assert_eq!(with("failback = 'never'\n"), None);
    assert_eq!(with("failback = 'auto'\n"), Some(Duration::from_mins(1)));
    let seconds = "failback = 'auto'\nfailback_seconds = 5\n";
    assert_eq!(with(seconds), Some(Duration::from_secs(5)));
}
