//! Registration with Debian's rpcbind, each test in a network and mount namespace of its own.

use std::process::{Child, Command, Stdio};

use super::*;

/// Tells the copy of this test program that it is inside the namespaces.
const INSIDE: &str = "HAVENFS_TEST_INSIDE_NAMESPACE";

/// Runs `body` in new namespaces: the test program starts itself again there for one test.
fn in_namespace(test: &str, body: impl AsyncFnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        for command in [
            "ip link set lo up",
            "mount -t tmpfs tmpfs /run",
            "install -d -m 755 -o _rpc -g root /run/rpcbind",
        ] {
            let mut words = command.split(' ');
            let status = Command::new(words.next().unwrap())
                .args(words)
                .status()
                .unwrap();
            assert!(status.success(), "{command}");
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        return runtime.block_on(body());
    }
    let (_, module) = module_path!().split_once("::").unwrap();
    let output = Command::new("unshare")
        .args(["--net", "--mount", "--"])
        .arg(std::env::current_exe().unwrap())
        .args([&format!("{module}::{test}"), "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    // A name that matches no test would succeed as well.
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

struct RealRpcbind(Child);

impl RealRpcbind {
    /// Starts rpcbind in the foreground and waits until it answers.
    async fn start(options: &[&str]) -> Self {
        let mut command = Command::new("rpcbind");
        command.arg("-f").args(options).stdin(Stdio::null());
        let mut rpcbind = Self(command.spawn().unwrap());
        let deadline = Instant::now() + TIMEOUT;
        let settings = Settings::new(111, &[]);
        while Rpcbind::find(&settings).await.is_none() {
            assert_eq!(rpcbind.0.try_wait().unwrap(), None, "rpcbind ended");
            assert!(Instant::now() < deadline, "rpcbind does not answer");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        rpcbind
    }
}

impl Drop for RealRpcbind {
    fn drop(&mut self) {
        // Neither fails for a child that has not been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The lines of `rpcinfo` for our programs, as "program version netid address owner".
fn rpcinfo() -> Vec<String> {
    let output = Command::new("rpcinfo").arg("127.0.0.1").output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines: Vec<String> = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| ["100003", "100005"].contains(&words[0]))
        .map(|words| {
            format!(
                "{} {} {} {} {}",
                words[0], words[1], words[2], words[3], words[5]
            )
        })
        .collect();
    lines.sort();
    lines
}

/// The lines that [`own`] makes with this port and owner.
fn expected(nfs_port: u16, owner: &str) -> Vec<String> {
    let mut lines: Vec<String> = own(nfs_port)
        .iter()
        .map(|entry| {
            let address = havenfs_rpc::portmap::universal_address(entry.address);
            let PortEntry {
                program,
                version,
                netid,
                ..
            } = entry;
            format!("{program} {version} {} {address} {owner}", netid.name())
        })
        .collect();
    lines.sort();
    lines
}

async fn start(nfs_port: u16) -> Registration {
    let choice = choose(PortmapMode::Auto, &Settings::new(111, &[]), &own(nfs_port)).await;
    match choice.unwrap() {
        Choice::Registered(registration) => registration,
        other => panic!("{other}"),
    }
}

#[test]
fn root_rpcbind_is_registered_with_and_cleaned_up() {
    in_namespace(
        "root_rpcbind_is_registered_with_and_cleaned_up",
        async || {
            let _rpcbind = RealRpcbind::start(&[]).await;
            let registration = start(2049).await;
            assert_eq!(rpcinfo(), expected(2049, "superuser"));
            assert_eq!(registration.check().await.unwrap(), Checked::Intact);
            // As after a crash: a new process with another port, and nobody at the old one.
            let registration = {
                drop(registration);
                start(2050).await
            };
            assert_eq!(rpcinfo(), expected(2050, "superuser"));
            assert_eq!(registration.remove().await.unwrap(), 12);
            assert_eq!(rpcinfo(), Vec::<String>::new());
            let error = choose(PortmapMode::Embedded, &Settings::new(111, &[]), &own(2049)).await;
            let text = error.unwrap_err().to_string();
            assert!(text.contains("`rpcbind` (pid "), "{text}");
        },
    );
}

#[test]
fn root_rpcbind_is_registered_with_again_after_its_restart() {
    in_namespace(
        "root_rpcbind_is_registered_with_again_after_its_restart",
        async || {
            let first = RealRpcbind::start(&[]).await;
            let registration = start(2049).await;
            drop(first);
            let deadline = Instant::now() + TIMEOUT;
            let renewed = async {
                let rpcbind = RealRpcbind::start(&[]).await;
                while rpcinfo() != expected(2049, "superuser") {
                    assert!(
                        Instant::now() < deadline,
                        "not registered again: {:?}",
                        rpcinfo()
                    );
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                rpcbind
            };
            tokio::select! {
                () = registration.watch(Duration::from_millis(20)) => panic!("the watch ended"),
                _rpcbind = renewed => {}
            }
        },
    );
}

#[test]
fn root_rpcbind_without_its_socket_is_reached_over_loopback() {
    in_namespace(
        "root_rpcbind_without_its_socket_is_reached_over_loopback",
        async || {
            // Only an insecure rpcbind takes changes there.
            let _rpcbind = RealRpcbind::start(&["-i"]).await;
            std::fs::remove_file("/run/rpcbind.sock").unwrap();
            let registration = start(2049).await;
            let lines = rpcinfo();
            assert_eq!(lines.len(), 12, "{lines:?}");
            assert_eq!(registration.remove().await.unwrap(), 12);
        },
    );
}

#[test]
fn root_rpcbind_shows_another_server_that_answers() {
    in_namespace(
        "root_rpcbind_shows_another_server_that_answers",
        async || {
            let _rpcbind = RealRpcbind::start(&[]).await;
            let other = FakeServer::start(program::NFS);
            let theirs = [PortEntry::own(program::NFS, 3, Netid::Tcp, other.port())];
            let settings = Settings::new(111, &[]);
            let choice = choose(PortmapMode::Register, &settings, &theirs)
                .await
                .unwrap();
            assert_eq!(
                choice.to_string(),
                "registered with rpcbind at 127.0.0.1:111"
            );
            let error = choose(PortmapMode::Auto, &settings, &own(2049))
                .await
                .unwrap_err();
            assert!(matches!(error, RegisterError::Conflict { .. }), "{error}");
            assert_eq!(rpcinfo().len(), 1);
        },
    );
}

/// What a command of rpcinfo prints, its columns apart by one space.
fn rpcinfo_says(args: &[&str]) -> String {
    let output = Command::new("rpcinfo").args(args).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "rpcinfo {args:?}: {error}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn root_rpcinfo_understands_the_embedded_portmapper() {
    in_namespace(
        "root_rpcinfo_understands_the_embedded_portmapper",
        async || {
            let fake = FakeRpcbind::start_on_port_111();
            let server = FakeServer::start(program::NFS);
            // rpcinfo looks up the portmapper itself first.
            for version in [2, 3, 4] {
                assert!(
                    fake.table()
                        .set(foreign(program::PORTMAP, version, Netid::Tcp, 111))
                );
            }
            let nfs = PortEntry::own(program::NFS, 3, Netid::Tcp, server.port());
            assert!(fake.table().set(nfs));
            assert!(
                fake.table()
                    .set(foreign(program::MOUNT, 3, Netid::Udp6, 20_048))
            );
            let port = server.port();
            let [high, low] = port.to_be_bytes();
            let text = rpcinfo_says(&["-p", "127.0.0.1"]);
            assert!(
                text.ends_with(&format!("100003 3 tcp {port} nfs")),
                "{text}"
            );
            let text = rpcinfo_says(&["127.0.0.1"]);
            let line = format!("100003 3 tcp 0.0.0.0.{high}.{low} nfs superuser");
            assert!(text.contains(&line), "{text}");
            assert!(
                text.contains("100005 3 udp6 ::.78.80 mountd superuser"),
                "{text}"
            );
            let text = rpcinfo_says(&["-s", "127.0.0.1"]);
            assert!(text.contains("100003 3 tcp nfs superuser"), "{text}");
            let text = rpcinfo_says(&["-l", "127.0.0.1", "100003", "3"]);
            assert!(
                text.contains(&format!("inet/tcp/cots_ord 127.0.0.1.{high}.{low}")),
                "{text}"
            );
            let text = rpcinfo_says(&["-T", "tcp", "127.0.0.1", "100003", "3"]);
            assert_eq!(text, "program 100003 version 3 ready and waiting");
            let text = rpcinfo_says(&["-m", "127.0.0.1"]);
            assert!(
                text.contains("VERADDR INDRECT GETLIST GETSTAT\n0 0 1 1"),
                "{text}"
            );
        },
    );
}
