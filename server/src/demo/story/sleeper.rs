//! A paused node must not answer when it wakes: its lease has run out meanwhile.
//!
//! A process that is stopped keeps its sockets, so its address tells nothing here. What tells is a
//! connection that was made to it before: calls that are sent over it while the node sleeps lie in
//! its socket, and the node finds them before anything else when it wakes. By then the service is
//! somebody else's, and an answer, even one that is right, would be the old node acting for it.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use havenfs_rpc::xdr::Writer;

use super::super::client::Client;
use super::super::client::nfs::procedure as nfs;
use super::super::client::rpc::{Connection, Target, args, encode};
use super::super::interrupt;
use super::super::ledger::BrokenPromise;
use super::super::proof::{broken, promised};
use super::{SERVE_TIME_MAX, Scene};

/// How long a node that wakes may take to answer.
const WAKE_TIME_MAX: Duration = Duration::from_secs(3);
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);
/// NULL, the same in every program.
const NULL: u32 = 0;

impl Scene<'_, '_> {
    /// Pauses the active node until another one has the service, and listens what it says then.
    pub(super) fn pause(&mut self) -> Result<String> {
        let old = self.active.clone();
        let mut probes = Probes::connect(&self.b)?;
        self.timeline
            .section(&format!("{} falls asleep", old.node), "since the pause");
        let paused = Instant::now();
        self.cluster.pause(old.node)?;
        let text = format!(
            "SIGSTOP: {} stands still, with all its sockets open",
            old.node
        );
        self.timeline.step(Duration::ZERO, &text);
        probes.send()?;
        let text = "calls are sent to it over connections that it has had before";
        self.timeline.step(paused.elapsed(), text);
        let assigned = self.cluster.wait_assigned_away(old.node, SERVE_TIME_MAX)?;
        let Some((node, epoch)) = assigned else {
            return broken(format!(
                "no other node takes over while {} sleeps",
                old.node
            ));
        };
        let text = format!("the service is {node}'s now, in epoch {epoch}");
        self.timeline.step(paused.elapsed(), &text);
        self.cluster.resume(old.node)?;
        self.timeline
            .step(paused.elapsed(), &format!("SIGCONT: {} wakes", old.node));
        let silence = probes.listen(old.node)?;
        let all = silence.closed + silence.silent;
        let text = format!(
            "{} has answered none of {all} calls and closed {} connections",
            old.node, silence.closed
        );
        self.timeline.step(paused.elapsed(), &text);
        let active = self
            .cluster
            .wait_active(SERVE_TIME_MAX, |active| active.node != old.node)?;
        let Some(active) = active else {
            return broken(format!("{node} does not begin to serve"));
        };
        self.timeline
            .step(paused.elapsed(), &format!("{} answers", active.node));
        self.wait_for_writes(active.at)?;
        self.active = active;
        self.timeline.section("What is left", "how long it took");
        let locked = self.b.locked.clone();
        let first = promised(self.b.nfs.read(&locked, 0, 4), "a file cannot be read")?;
        if first == b"late" {
            return broken(format!("{} wrote after its lease had run out", old.node));
        }
        self.records_are_there()?;
        self.locks_are_held()?;
        self.unlock()?;
        self.load.stop();
        let (records, locks) = (self.ledger.stable().len(), self.ledger.grants());
        Ok(format!(
            "{} slept and woke, and said nothing; {records} records, {locks} locks, none lost",
            old.node
        ))
    }
}

/// Connections to a node, each with a call that is to be sent while it sleeps.
struct Probes {
    probes: Vec<Probe>,
}

struct Probe {
    name: &'static str,
    connection: Connection,
    target: Target,
    procedure: u32,
    args: Vec<u8>,
    xid: u32,
}

/// What became of the probes.
#[derive(Debug, Default)]
struct Silence {
    /// Connections that the node closed.
    closed: usize,
    /// Connections on which nothing came.
    silent: usize,
}

impl Probes {
    /// Connects to whoever answers now, and makes sure that it does.
    fn connect(client: &Client) -> Result<Self> {
        let fh = &client.locked;
        let test = test_args(client);
        let write = args(|w| {
            w.opaque(fh);
            w.u64(0);
            w.u32(4);
            w.u32(0);
            w.opaque(b"late");
        });
        let plan = [
            (
                "GETATTR",
                client.nfs_target(),
                nfs::GETATTR,
                args(|w| w.opaque(fh)),
            ),
            ("WRITE", client.nfs_target(), nfs::WRITE, write),
            (
                "TEST",
                client.nlm_target(),
                havenfs_nlm::wire::procedure::TEST,
                test,
            ),
        ];
        let mut probes = Vec::new();
        for (name, target, procedure, args) in plan {
            let mut connection = Connection::open(target).context("cannot connect to the node")?;
            connection.send(&encode(&target, 1, NULL, &[]))?;
            connection
                .receive(1, Instant::now() + ANSWER_TIME_MAX)
                .context("the active node does not answer NULL")?;
            probes.push(Probe {
                name,
                connection,
                target,
                procedure,
                args,
                xid: 2,
            });
        }
        Ok(Self { probes })
    }

    /// Sends all calls to the sleeping node; nothing of it is answered now.
    fn send(&mut self) -> Result<()> {
        for probe in &mut self.probes {
            let message = encode(&probe.target, probe.xid, probe.procedure, &probe.args);
            probe.connection.send(&message)?;
        }
        Ok(())
    }

    /// Waits for what the node does with them now that it is awake.
    ///
    /// # Errors
    /// [`BrokenPromise`] if one of them is answered.
    fn listen(&mut self, node: &str) -> Result<Silence> {
        let mut silence = Silence::default();
        let deadline = Instant::now() + WAKE_TIME_MAX;
        for probe in &mut self.probes {
            interrupt::check()?;
            match probe.connection.receive(probe.xid, deadline) {
                Ok(_) => {
                    let name = probe.name;
                    let text = format!("{node} answered {name} after its lease had run out");
                    return Err(BrokenPromise(text).into());
                }
                Err(error) if error.kind() == ErrorKind::TimedOut => silence.silent += 1,
                Err(_) => silence.closed += 1,
            }
        }
        Ok(silence)
    }
}

/// A TEST by a process that is in nobody's story.
fn test_args(client: &Client) -> Vec<u8> {
    use havenfs_nlm::wire::{Nlm4Lock, Nlm4TestArgs};
    let call = Nlm4TestArgs {
        cookie: b"wake",
        exclusive: true,
        alock: Nlm4Lock {
            caller_name: b"client-b",
            fh: &client.locked,
            oh: b"98@client-b",
            svid: 98,
            l_offset: 0,
            l_len: 1,
        },
    };
    let mut out = Vec::new();
    Writer::new(&mut out).value(&call);
    out
}
