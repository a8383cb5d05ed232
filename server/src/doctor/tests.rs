//! The doctor looks at temporary directories and ports of these tests.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::Path;

use havenfs_rpc::portmap::{Mapping, Protocol};
use havenfs_rpc::program;

use super::*;
use crate::config::hooks::Hooks;
use crate::config::{self, File, Settings};
use crate::register::PortmapMode;

/// Settings whose every part lies in `dir`, and whose ports the kernel would choose.
fn settings(dir: &Path) -> Settings {
    let line = File {
        exports_file: Some(dir.join("exports")),
        state_dir: Some(dir.join("state")),
        listen: Some(vec![Ipv4Addr::LOCALHOST.into()]),
        nfs_port: Some(0),
        mount_port: Some(0),
        nlm_port: Some(0),
        nsm_port: Some(0),
        portmap: Some("off".into()),
        metrics: Some("off".into()),
        control: Some(dir.join("run/control")),
        ..File::default()
    };
    config::merge(line, File::default()).unwrap()
}

/// What is found for a server without a cluster.
fn run(settings: &Settings) -> Report {
    let service = ServiceConfig {
        name: "default".into(),
        storage: None,
        settings: settings.clone(),
        preferred: None,
        hooks: Hooks::default(),
        storage_time_max: None,
        fail_back: None,
    };
    super::run(&NodeConfig {
        settings: settings.clone(),
        cluster: None,
        services: vec![service],
        origin: None,
    })
}

fn with_export(dir: &Path, rule: &str) -> Settings {
    let data = dir.join("data");
    std::fs::create_dir_all(&data).unwrap();
    let mut settings = settings(dir);
    let argument = format!("{}:{rule}", data.display());
    settings.sources.arguments = vec![argument.into_bytes()];
    settings
}

fn about<'r>(report: &'r Report, topic: &str, part: &str) -> &'r Finding {
    let found = report
        .findings
        .iter()
        .find(|finding| finding.topic == topic && finding.text.contains(part));
    found.unwrap_or_else(|| panic!("nothing about {topic} says `{part}`:\n{report}"))
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn nothing_is_made_and_nothing_is_left_bound() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = with_export(dir.path(), "*(rw)");
    // An address that no other test uses: nobody takes the port in between.
    let address = Ipv4Addr::new(127, 0, 77, 1);
    settings.listen = vec![address.into()];
    settings.nfs_port = TcpListener::bind((address, 0))
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let before = entries(dir.path());
    let report = run(&settings);
    assert_eq!(entries(dir.path()), before);
    let port = settings.nfs_port;
    about(&report, "ports", &format!("NFS port {port} is free (TCP)"));
    TcpListener::bind((address, port)).unwrap();
    about(&report, "state", "does not exist yet");
    about(&report, "exports", "*(rw,");
    about(&report, "storage", "/data`: ");
    let own = about(&report, "server", "no havenfs answers");
    assert_eq!(own.severity, Severity::Ok);
}

#[test]
fn a_taken_port_is_named_with_its_holder() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = with_export(dir.path(), "*(rw)");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let nlm = TcpListener::bind("127.0.0.1:0").unwrap();
    settings.nfs_port = tcp.local_addr().unwrap().port();
    settings.mount_port = udp.local_addr().unwrap().port();
    settings.nlm_port = nlm.local_addr().unwrap().port();
    let report = run(&settings);
    let own = format!("(pid {})", std::process::id());
    for (name, severity) in [
        ("NFS port", Severity::Error),
        ("MOUNT port", Severity::Error),
        ("NLM port", Severity::Error),
    ] {
        let finding = about(&report, "ports", name);
        assert_eq!(finding.severity, severity, "{report}");
        assert!(finding.text.contains(&own), "{}", finding.text);
    }
    let nfs = about(&report, "ports", "NFS port");
    assert_eq!(
        nfs.hint.as_deref(),
        Some("stop it, or choose another port with --nfs-port")
    );
    assert_eq!(report.worst(), Severity::Error);
}

#[test]
fn ports_of_the_running_server_are_as_they_should_be() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = with_export(dir.path(), "*(rw)");
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    settings.nfs_port = held.local_addr().unwrap().port();
    settings.control = dir.path().join("control");
    let listener = UnixListener::bind(&settings.control).unwrap();
    let pid = std::process::id();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 7];
        stream.read_exact(&mut request).unwrap();
        assert_eq!(&request, b"status\n");
        let answer = serde_json::json!({ "pid": pid, "ports": [] });
        stream.write_all(answer.to_string().as_bytes()).unwrap();
    });
    let report = run(&settings);
    server.join().unwrap();
    about(&report, "server", &format!("havenfs runs (process {pid})"));
    let finding = about(&report, "ports", "held by the running havenfs");
    assert_eq!(finding.severity, Severity::Ok, "{report}");
}

#[test]
fn a_portmapper_port_that_does_not_answer_is_told_by_mode() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = with_export(dir.path(), "*(rw)");
    // The doctor asks over TCP, where nobody listens.
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    settings.portmap_port = silent.local_addr().unwrap().port();
    for (mode, severity) in [
        (PortmapMode::Auto, Severity::Warning),
        (PortmapMode::Embedded, Severity::Error),
        (PortmapMode::Register, Severity::Error),
    ] {
        settings.portmap = mode;
        let mut report = Report::default();
        ports::look(&mut report, &settings, None);
        let holder = format!("(pid {})", std::process::id());
        let finding = about(&report, "portmapper", &holder);
        assert_eq!(finding.severity, severity, "{mode:?}: {report}");
    }
}

#[test]
fn other_servers_in_the_portmapper_are_named_with_the_way_out() {
    let entry = |program, version, protocol: Protocol, port| Mapping {
        program,
        version,
        protocol: protocol.number(),
        port,
    };
    let entries = vec![
        entry(program::NLM, 4, Protocol::Tcp, 40_001),
        entry(program::NLM, 1, Protocol::Udp, 40_002),
        entry(program::NSM, 1, Protocol::Udp, 40_003),
        entry(program::PORTMAP, 2, Protocol::Tcp, 111),
    ];
    let mut report = Report::default();
    ports::look_at_entries(&mut report, entries, None);
    for (text, way_out) in [
        (
            "NLM is registered by another server: TCP port 40001, UDP port 40002;",
            "`umount -a -t nfs`",
        ),
        (
            "NSM is registered by another server: UDP port 40003;",
            "`systemctl stop rpc-statd.service`",
        ),
    ] {
        let finding = about(&report, "portmapper", text);
        assert_eq!(finding.severity, Severity::Warning, "{report}");
        let hint = finding.hint.as_deref().unwrap();
        assert!(hint.contains(way_out), "{hint}");
    }
    assert_eq!(report.findings.len(), 2, "{report}");
}

#[test]
fn mistakes_in_exports_come_with_place_and_hint() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(dir.path());
    let list = dir.path().join("exports");
    std::fs::write(&list, "/srv *(rw)\n/srv/x *(rw,no_root_sqaush)\n").unwrap();
    let report = run(&settings);
    let finding = about(&report, "exports", "unknown option `no_root_sqaush`");
    assert_eq!(finding.severity, Severity::Error);
    let place = format!("{}:2:", list.display());
    assert!(finding.text.starts_with(&place), "{}", finding.text);
    assert_eq!(
        finding.hint.as_deref(),
        Some("did you mean `no_root_squash`?")
    );

    let missing = format!("{}/nowhere *(ro)\n", dir.path().display());
    std::fs::write(&list, missing).unwrap();
    let finding = about(&run(&settings), "exports", "does not exist").clone();
    assert_eq!(finding.severity, Severity::Error);

    settings.sources.file = None;
    settings.sources.directory = None;
    let report = run(&settings);
    about(&report, "exports", "no directory is exported");
}

#[test]
fn a_state_directory_where_clients_reach_it_is_warned_about() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = with_export(dir.path(), "*(rw)");
    let report = run(&settings);
    let shared = about(&report, "state", "clients can fill it");
    assert_eq!(shared.severity, Severity::Warning);

    settings.state_dir = dir.path().join("data/state");
    let report = run(&settings);
    let inside = about(&report, "state", "lies inside the export");
    assert_eq!(inside.severity, Severity::Warning);
}

#[test]
fn a_state_directory_that_can_not_be_used_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = with_export(dir.path(), "*(ro)");
    std::fs::write(dir.path().join("file"), "").unwrap();
    settings.state_dir = dir.path().join("file/state");
    let report = run(&settings);
    let finding = about(&report, "state", "is not a directory");
    assert_eq!(finding.severity, Severity::Error);

    settings.state_dir = dir.path().join("state");
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&settings.state_dir)
        .unwrap();
    std::fs::write(settings.state_dir.join("state.json"), "{ torn").unwrap();
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&settings.state_dir, open).unwrap();
    let report = run(&settings);
    assert_eq!(
        about(&report, "state", "is damaged").severity,
        Severity::Error
    );
    about(&report, "state", "other users may enter");
}

#[test]
fn a_name_that_leads_nowhere_is_told() {
    let dir = tempfile::tempdir().unwrap();
    // Reserved for names that never exist (RFC 6761 6.4); an address needs no name server.
    let settings = with_export(dir.path(), "no-such-host.invalid(rw) localhost(ro)");
    let report = run(&settings);
    let finding = about(&report, "names", "`no-such-host.invalid`");
    assert_eq!(finding.severity, Severity::Warning);
    let known = about(&report, "names", "exported host `localhost`");
    assert_eq!(known.severity, Severity::Ok);
}

#[test]
fn a_report_reads_well_and_serialises() {
    let mut report = Report::default();
    assert_eq!(report.worst(), Severity::Ok);
    report.ok("ports", "NFS port 2049 is free");
    report.error("state", "bad", "do this\nand that");
    let text = "\
ok       ports       NFS port 2049 is free
error    state       bad
                     hint: do this
                     hint: and that
1 error, 0 warnings
";
    assert_eq!(report.to_string(), text);
    assert_eq!(
        serde_json::to_value(&report).unwrap(),
        serde_json::json!({ "findings": [
            { "topic": "ports", "severity": "ok", "text": "NFS port 2049 is free" },
            { "topic": "state", "severity": "error", "text": "bad",
              "hint": "do this\nand that" },
        ] })
    );
}

const MEMBER: &str = r#"
node = "n1"
portmap = "off"
metrics = "off"
[cluster]
key_file = "DIR/cluster.key"
[[cluster.member]]
name = "n1"
address = "127.0.77.9:7300"
[[cluster.member]]
name = "n2"
address = "192.0.2.2:7300"
[[service]]
name = "alpha"
names = ["localhost", "none.invalid"]
addresses = ["127.0.77.8/8"]
interface = "lo"
exports = ["DIR/later:*(rw)"]
storage = "fence"
fence_command = ["DIR/fence"]
takeover_command = ["/bin/sh"]
release_command = ["/bin/sh"]
"#;

/// What is found for a member of a cluster whose files lie in `dir`.
fn run_member(dir: &Path, text: &str) -> Report {
    let own = "node = \"n1\"\nstate_dir = \"DIR/state\"\ncontrol = \"DIR/control\"";
    let text = text.replace("node = \"n1\"", own);
    let path = dir.join("havenfs.toml");
    std::fs::write(&path, text.replace("DIR", dir.to_str().unwrap())).unwrap();
    let file = File::read(&path).unwrap();
    super::run(&config::cluster::plan(File::default(), file).unwrap())
}

#[test]
fn what_a_member_of_a_cluster_needs_is_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let report = run_member(dir, MEMBER);
    let severity = |report: &Report, topic, part: &str| about(report, topic, part).severity;
    for (topic, part, expected) in [
        ("key", "cannot read the cluster key", Severity::Error),
        (
            "members",
            "127.0.77.9:7300, where others reach `n1`, is an address of this machine",
            Severity::Ok,
        ),
        (
            "commands",
            "fence` can't be run now: there is no",
            Severity::Error,
        ),
        ("commands", "takeover_command `/bin/sh`, 30 s", Severity::Ok),
        ("addresses", "interface lo is there", Severity::Ok),
        (
            "addresses",
            "127.0.77.8 is on this machine, and no havenfs runs",
            Severity::Error,
        ),
        ("exports", "once the takeover_command has", Severity::Ok),
        (
            "names",
            "`localhost` of service `alpha` is 127.0.0.1",
            Severity::Warning,
        ),
        (
            "names",
            "`none.invalid` of service `alpha` does not resolve here",
            Severity::Warning,
        ),
    ] {
        assert_eq!(severity(&report, topic, part), expected, "{part}");
    }
    // What is not executable, an interface that is not there, somebody else's file.
    std::fs::write(dir.join("fence"), "").unwrap();
    let mistaken = MEMBER
        .replace("\"lo\"", "\"none0\"")
        .replace("127.0.77.9", "192.0.2.1")
        .replace("127.0.77.8/8", "192.0.2.100/24");
    let report = run_member(dir, &mistaken);
    for (topic, part, expected) in [
        (
            "members",
            "192.0.2.1:7300, where others reach `n1`, is no address",
            Severity::Error,
        ),
        (
            "commands",
            "fence` can't be run now: Permission",
            Severity::Error,
        ),
        (
            "addresses",
            "this machine has no interface none0",
            Severity::Error,
        ),
        (
            "addresses",
            "192.0.2.100 is not on this machine now",
            Severity::Ok,
        ),
    ] {
        assert_eq!(severity(&report, topic, part), expected, "{part}");
    }
    let fixed = MEMBER
        .replace("interface = \"lo\"\n", "")
        .replace("127.0.77.8/8", "192.0.2.100");
    let part = "the fixed address 192.0.2.100 is none of this machine";
    let report = run_member(dir, &fixed);
    assert_eq!(severity(&report, "addresses", part), Severity::Error);
}
