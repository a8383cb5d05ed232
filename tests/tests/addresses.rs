//! The addresses of a service on the network of one machine: they come with the service and go with
//! it, however it ends, and whatever is done to the interface.
//!
//! The server is the real binary, alone in a network namespace that the test makes, with a pair of
//! virtual interfaces as its network. What clients see of a takeover is in `failover`.

use std::fs;
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::lab::{Output, havenfs_binary};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

const SERVICE: [&str; 2] = ["192.0.2.100", "2001:db8::100"];
const OWN: &str = "192.0.2.1";

/// A network namespace with the interface `eth0`, and a server in it.
struct Machine {
    namespace: String,
    dir: TempDir,
    server: Option<Child>,
}

impl Machine {
    fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let machine = Self {
            namespace: format!("havenfs-addresses-{}-{count}", std::process::id()),
            dir: tempfile::tempdir()?,
            server: None,
        };
        run(Command::new("ip").args(["netns", "add", &machine.namespace]))?;
        machine.sh("ip link set lo up")?;
        machine.plug()?;
        Ok(machine)
    }

    /// Makes the interface.
    fn plug(&self) -> Result<()> {
        self.sh(
            "ip link add eth0 type veth peer name cable && ip link set cable up && \
             ip link set eth0 up",
        )
        .map(drop)
    }

    fn inside(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.namespace])
            .arg(program);
        command
    }

    fn sh(&self, line: &str) -> Result<String> {
        run(self.inside("sh").args(["-c", line]))
    }

    /// Starts a server without a cluster, whose service has these addresses.
    fn serve(&mut self) -> Result<()> {
        let dir = self.dir.path();
        let export = dir.join("export");
        fs::create_dir_all(&export)?;
        let [v4, v6] = SERVICE;
        let config = format!(
            "state_dir = '{0}/state'\ncontrol = '{0}/control'\nmetrics = 'off'\n\
             portmap = 'embedded'\n\
             [[service]]\nname = 'alpha'\naddresses = ['{v4}/24', '{v6}/64']\n\
             interface = 'eth0'\nexports = ['{1}:*(rw)']\n",
            dir.display(),
            export.display()
        );
        fs::write(dir.join("havenfs.toml"), config)?;
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log())?;
        let mut server = self.inside(havenfs_binary()?);
        server
            .args(["serve", "--config"])
            .arg(dir.join("havenfs.toml"));
        let server = server
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.server = Some(server.spawn()?);
        Ok(())
    }

    fn log(&self) -> std::path::PathBuf {
        self.dir.path().join("log")
    }

    /// Ends the server with a signal; `ip netns exec` is the server itself.
    fn signal(&mut self, signal: Signal) -> Result<()> {
        if let Some(mut server) = self.server.take() {
            kill(&server.id().to_string(), signal)?;
            server.wait()?;
        }
        Ok(())
    }

    /// The processes on this network.
    fn processes(&self) -> Result<Vec<String>> {
        let pids = run(Command::new("ip").args(["netns", "pids", &self.namespace]))?;
        Ok(pids.split_whitespace().map(str::to_owned).collect())
    }

    fn has(&self, ip: &str) -> Result<bool> {
        let address: IpAddr = ip.parse()?;
        let there = self.sh("ip -o address show dev eth0 || true")?;
        let mut words = there.split_whitespace();
        Ok(words.any(|word| {
            let ip = word.split('/').next().unwrap_or_default();
            ip.parse() == Ok(address)
        }))
    }

    /// Waits until the service's addresses are there, or none is.
    fn until(&self, are_there: bool, what: &str) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let [v4, v6] = SERVICE.map(|ip| self.has(ip));
            if v4? == are_there && v6? == are_there {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{what}: addresses there: not {are_there}\n{}\n{}",
                self.sh("ip address; ip rule; ip -6 rule")?,
                fs::read_to_string(self.log())?
            );
            std::thread::sleep(POLL);
        }
    }

    /// Makes sure that nothing is left that drops packets.
    fn drops_nothing(&self) -> Result<()> {
        let rules = self.sh("ip rule; ip -6 rule")?;
        ensure!(!rules.contains("blackhole"), "{rules}");
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.signal(Signal::KILL);
        // Its guard, too; nobody else is in there.
        for pid in self.processes().unwrap_or_default() {
            let _ = kill(&pid, Signal::KILL);
        }
        let _ = run(Command::new("ip").args(["netns", "delete", &self.namespace]));
    }
}

#[test]
fn root_they_come_with_the_service_and_go_with_it_however_it_ends() -> Result<()> {
    let mut machine = Machine::new()?;
    for end in [Signal::TERM, Signal::KILL] {
        machine.serve()?;
        machine.until(true, "a start")?;
        machine.drops_nothing()?;
        // Nothing else of this machine takes them as its own source.
        let there = machine.sh("ip address show dev eth0")?;
        ensure!(there.matches("deprecated").count() == 2, "{there}");
        // Whoever has no other address in that network reaches it by this one.
        machine.sh("ip -6 route get 2001:db8::5 from 2001:db8::100")?;
        machine.sh("ip route get 192.0.2.5 from 192.0.2.100")?;
        machine.signal(end)?;
        machine.until(false, "the end of the process")?;
        machine.drops_nothing()?;
    }
    // A stopped guard can't help: the next start clears away what is left.
    machine.serve()?;
    machine.until(true, "a start")?;
    for pid in machine.processes()? {
        let command = fs::read(format!("/proc/{pid}/cmdline"))?;
        if command.windows(6).any(|word| word == b"\0guard") {
            kill(&pid, Signal::KILL)?;
        }
    }
    machine.signal(Signal::KILL)?;
    ensure!(machine.has(SERVICE[0])?, "nobody took it away");
    machine.serve()?;
    machine.until(true, "a start after a death without a guard")?;
    machine.drops_nothing()
}

#[test]
fn root_they_come_back_whatever_becomes_of_the_interface() -> Result<()> {
    let mut machine = Machine::new()?;
    machine.sh("ip link set eth0 down")?;
    machine.serve()?;
    machine.sh("ip link set eth0 up")?;
    machine.until(true, "a start without a link")?;
    machine.sh("ip address flush dev eth0 scope global")?;
    machine.until(true, "addresses that somebody removed")?;
    machine.sh("ip link set eth0 down")?;
    machine.until(false, "a cable that is out")?;
    machine.sh("ip link set eth0 up")?;
    machine.until(true, "a cable that is back")?;
    machine.sh("ip link delete eth0")?;
    machine.plug()?;
    machine.until(true, "an interface that was made anew")?;
    machine.drops_nothing()
}

#[test]
fn root_addresses_of_the_machine_itself_stay() -> Result<()> {
    let mut machine = Machine::new()?;
    machine.serve()?;
    machine.until(true, "a start")?;
    // After the service's: so the kernel takes it for a secondary one, and it has to outlive the
    // first.
    machine.sh("ip address add 192.0.2.1/24 dev eth0 && ip route add default via 192.0.2.5")?;
    machine.signal(Signal::TERM)?;
    machine.until(false, "the end")?;
    ensure!(machine.has(OWN)?, "its own address is gone");
    let routes = machine.sh("ip route")?;
    ensure!(routes.contains("default"), "{routes}");

    // One that the machine has already is not taken over, and not taken away.
    let own = format!("ip address add {}/24 dev eth0", SERVICE[0]);
    machine.sh(&own)?;
    machine.serve()?;
    if let Some(mut server) = machine.server.take() {
        ensure!(!server.wait()?.success(), "it should not start");
    }
    let log = fs::read_to_string(machine.log())?;
    ensure!(
        log.contains("is an address of this machine already"),
        "{log}"
    );
    ensure!(log.contains("hint: "), "{log}");
    ensure!(
        machine.has(SERVICE[0])?,
        "it took the machine's address away"
    );
    Ok(())
}

fn kill(pid: &str, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(pid.parse()?);
    let pid = pid.context("no process has the number 0")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// Runs a command that must succeed; returns what it says.
fn run(command: &mut Command) -> Result<String> {
    let output = Output::from(command.stdin(Stdio::null()).output()?);
    output.success(&format!("{command:?}"))
}

/// A start on a busy machine takes a while, and a link that is back is believed after a second.
const LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);
