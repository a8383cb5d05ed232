//! What a configuration means, word by word.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::config::cluster::plan;
use crate::config::{ConfigError, File};

const GOOD: &str = r#"
node = "n1"
state_dir = "/proc/none/state"
nsm_port = 662
[cluster]
key_file = "DIR/cluster.key"
[[cluster.member]]
name = "n1"
address = "192.0.2.1:7300"
[[cluster.member]]
name = "n2"
address = "192.0.2.2:7300"
[[cluster.member]]
name = "w"
address = "192.0.2.3:7300"
witness = true
[[service]]
name = "alpha"
names = ["nfs.example.org", "nfs"]
addresses = ["192.0.2.100/24", "2001:db8::100/64"]
interface = "eth0"
exports = ["/none/alpha:192.0.2.0/24(rw)"]
storage = "fence"
fence_command = ["/bin/sh", "-c", "exit 1"]
takeover_command = ["/bin/sh"]
release_command = ["/bin/sh"]
hook_seconds = 20
preferred = "n1"
failback = "auto"
"#;

/// Explains a file to a machine that is called `n1`; names in the folder begin with DIR.
fn explained(text: &str) -> Result<String, String> {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_str().unwrap();
    let key = dir.path().join("cluster.key");
    std::fs::write(&key, "the key of all nodes of this cluster").unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let path = dir.path().join("havenfs.toml");
    std::fs::write(&path, text.replace("DIR", at)).unwrap();
    let read = File::read(&path).and_then(|file| plan(File::default(), file));
    let shown = |error: ConfigError| error.to_string().replace(at, "DIR");
    let report = explain(&read.map_err(shown)?, "n1.example.org");
    Ok(report.to_string().replace(at, "DIR"))
}

#[test]
fn a_good_file_is_told_in_words() {
    let told = explained(GOOD).unwrap();
    assert_eq!(told, include_str!("good.txt"), "{told}");
}

#[test]
fn what_will_surprise_is_warned_about() {
    let fence = "storage = \"fence\"\nfence_command = [\"/bin/sh\", \"-c\", \"exit 1\"]";
    let second = "[[service]]\nname = 'beta'\naddresses = ['192.0.2.101']\n\
                  exports = ['/none/beta:*']\nstorage = 'cluster-fs'\n";
    for (from, to, expected) in [
        (
            "[[cluster.member]]\nname = \"w\"\naddress = \"192.0.2.3:7300\"\nwitness = true\n",
            "",
            "n1, n2: 2 of 2 must live, so none may be lost: without either of the two nobody serves",
        ),
        (
            "[[service]]",
            "[[cluster.member]]\nname = \"n4\"\naddress = \"192.0.2.4:7300\"\n[[service]]",
            "hint: no more than of 3 members",
        ),
        (
            "node = \"n1\"",
            "node = \"n2\"",
            "this machine is called `n1.example.org`, which is another member than `n2`",
        ),
        (
            fence,
            "storage = \"cluster-fs\"",
            "`alpha`: storage = \"cluster-fs\" and a takeover_command",
        ),
        (
            "[[service]]",
            &format!("{second}[[service]]"),
            "end as well: beta",
        ),
        (
            "names = [\"nfs.example.org\", \"nfs\"]\n",
            "",
            "`alpha` has no names",
        ),
        (
            "takeover_command = [\"/bin/sh\"]",
            "takeover_command = [\"/none\"]",
            "takeover_command `/none` can't be run now: there is no such file",
        ),
        (
            "release_command = [\"/bin/sh\"]",
            "",
            "no release_command: nothing unmounts it",
        ),
        ("DIR/cluster.key", "DIR/havenfs.toml", "error    key"),
        (
            "192.0.2.100/24",
            "192.0.2.2/24",
            "192.0.2.2 is the address of member `n2`",
        ),
        ("/none/alpha", "/proc", "lies inside the export `/proc`"),
        (
            "/none/alpha:192.0.2.0/24(rw)",
            "/none/alpha:*(rww)",
            "hint: did you mean `rw`?",
        ),
    ] {
        assert!(GOOD.contains(from), "{from}");
        let told = explained(&GOOD.replacen(from, to, 1)).unwrap();
        let is_told = told.contains(expected);
        assert!(is_told, "{to}: {told}");
    }
}

#[test]
fn mistakes_have_a_line_and_the_word_that_was_meant() {
    for (from, to, expected) in [
        (
            "node = ",
            "nod = ",
            "2: unknown field `nod`\nhint: did you mean `node`?",
        ),
        (
            "key_file",
            "keyfile",
            "6: unknown field `keyfile`\nhint: did you mean `key_file`?",
        ),
        (
            "fence_command",
            "fenc_command",
            "24: unknown field `fenc_command`\nhint: did you mean `fence_command`?",
        ),
        (
            "\"fence\"",
            "\"fense\"",
            "23: unknown variant `fense`\nhint: did you mean `fence`?",
        ),
        (
            "storage = \"fence\"",
            "",
            "17: service: `alpha` does not say what keeps a node that lost it from writing: storage = \"cluster-fs\", \"arbitrated\" or \"fence\"",
        ),
        (
            "fence_command = [\"/bin/sh\", \"-c\", \"exit 1\"]",
            "",
            "23: service: `alpha` has storage = \"fence\" and no fence_command",
        ),
        (
            "\"nfs\"]",
            "\"a/b\"]",
            "19: service.names: `a/b` is no name",
        ),
        (
            "192.0.2.100/24",
            "192.0.2.100/33",
            "20: service.addresses: `192.0.2.100/33` is no address",
        ),
        (
            "interface = \"eth0\"",
            "",
            "20: service: `alpha` has an address with a prefix",
        ),
        (
            "preferred = \"n1\"",
            "preferred = \"w\"",
            "28: service.preferred: `w` is no member with data",
        ),
        (
            "hook_seconds = 20",
            "hook_seconds = 0",
            "27: service: `alpha` has hook_seconds = 0",
        ),
        (
            "[\"/bin/sh\"]",
            "[\"mount\"]",
            "25: service: `alpha` has a takeover_command that begins with `mount`",
        ),
        (
            "192.0.2.3:7300",
            "192.0.2.3:0",
            "15: cluster.member.address: `192.0.2.3:0` is no address",
        ),
        (
            "name = \"w\"",
            "name = \"n2\"",
            "14: cluster.member.name: `n2` is there twice",
        ),
        (
            "node = \"n1\"",
            "node = \"n9\"",
            "2: node: `n9` is no [[cluster.member]]",
        ),
        (
            "nsm_port = 662",
            "metrics = 'here'",
            "4: metrics: `here` is neither",
        ),
        ("nsm_port = 662", "nsm_port = 66200", "4: "),
        ("node = \"n1\"\n", "", "1: node: is missing"),
        (
            "failback = \"auto\"",
            "failback_seconds = 9",
            "29: service: `alpha` has failback_seconds, which are",
        ),
    ] {
        assert!(GOOD.contains(from), "{from}");
        let error = explained(&GOOD.replacen(from, to, 1)).unwrap_err();
        let expected = format!("DIR/havenfs.toml:{expected}");
        assert!(error.starts_with(&expected), "{to}: {error}");
    }
}

#[test]
fn a_server_without_a_cluster_is_told_of_as_well() {
    let told = explained("export = ['/none/data:*(rw)']\nstate_dir = '/proc/none'\n").unwrap();
    assert!(told.contains("this server is alone"), "{told}");
    assert!(told.ends_with("0 errors, 0 warnings\n"), "{told}");
}
