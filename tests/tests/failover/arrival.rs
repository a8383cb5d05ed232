//! A node that was given the service says so to all who have to know: neighbours hear where its
//! addresses are now, and the clients that the last active node had are woken. And the node that
//! gave it away has nothing left of it.
//!
//! Judged by the capture of the data segment, and by what the kernel of the old node says of its
//! sockets.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use havenfs_rpc::program::{NFS_PORT, NLM_PORT};
use havenfs_tests::lab::capture::{ADVERTISEMENT, Frame, Kind, mac_of};
use havenfs_tests::lab::clock::Micros;
use havenfs_tests::lab::cluster::{Serving, host_of};

use crate::scene::{Scene, now};

/// A connection of a client to the service.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Connection {
    port: u16,
    client: IpAddr,
    client_port: u16,
}

impl Scene<'_> {
    /// Judges what a node sent since a case began, in which it was given the service.
    pub(crate) fn new_node_arrives(
        &self,
        before: Serving,
        after: Serving,
        began: Micros,
    ) -> Result<()> {
        let looked = now();
        let frames = self.capture.frames()?;
        let mac = mac_of(host_of(after.node));
        let new: Vec<&Frame> = frames
            .iter()
            .filter(|it| it.mac == mac && it.at >= began)
            .collect();
        for address in self.addresses()? {
            is_announced(address, &new, looked)
                .with_context(|| format!("{} brings {address}", after.node))?;
        }
        let lost = self.connections_of(before, &frames, began)?;
        ensure!(!lost.is_empty(), "nobody was connected to the old node");
        for connection in lost {
            self.is_woken(connection, &frames, &new)
                .with_context(|| format!("{connection:?} of {}", before.node))?;
        }
        Ok(())
    }

    /// Waits until all nodes know of a connection of a client, as they do after a moment.
    pub(crate) fn somebody_is_known(&self, before: Serving) -> Result<()> {
        let deadline = Instant::now() + KNOWN_TIME_MAX;
        loop {
            let frames = self.capture.frames()?;
            if !self.connections_of(before, &frames, now())?.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "nobody stays connected");
            thread::sleep(POLL);
        }
    }

    /// The connections that clients had for some time when a case began, on which the active node
    /// had something to say in the last moments.
    fn connections_of(
        &self,
        before: Serving,
        frames: &[Frame],
        began: Micros,
    ) -> Result<BTreeSet<Connection>> {
        let address = self.address()?;
        let mac = mac_of(host_of(before.node));
        let old: Vec<&Frame> = frames
            .iter()
            .filter(|it| it.mac == mac && it.from == address && it.at < began)
            .collect();
        let of = |old: &[&Frame]| -> BTreeSet<Connection> {
            old.iter().filter_map(|it| connection(it)).collect()
        };
        let known = old.partition_point(|it| it.at < began - KNOWN_AFTER_US);
        let lives = old.partition_point(|it| it.at < began - LIVES_US);
        Ok(&of(&old[..known]) & &of(&old[lives..]))
    }

    /// The client hears an ACK that no connection has sent, and answers it.
    fn is_woken(&self, connection: Connection, frames: &[Frame], new: &[&Frame]) -> Result<()> {
        let address = self.address()?;
        let Connection {
            port,
            client,
            client_port,
        } = connection;
        let wakes = new.iter().filter(|it| it.wakes() && it.from == address);
        let mut wakes = wakes.filter(|it| {
            let Kind::Tcp {
                port: from,
                to_port,
                ..
            } = it.kind
            else {
                return false;
            };
            (from, it.to, to_port) == (port, client, client_port)
        });
        let first = wakes.next().context("the client was not woken")?;
        let in_time = first.at..first.at + ANSWER_US_MAX;
        let answer = frames.iter().find(|it| {
            let is_empty = matches!(it.kind, Kind::Tcp { payload: 0, .. });
            it.answers(first) && is_empty && !it.begins() && in_time.contains(&it.at)
        });
        let answer = answer.context("the client was woken, and did not answer")?;
        let us = answer.at - first.at;
        eprintln!("  woken: {client} port {client_port}, which answered after {us} us");
        Ok(())
    }

    /// A node that does not have the service has no socket of its addresses, nor the addresses.
    pub(crate) fn nothing_is_left_on(&self, node: &str) -> Result<()> {
        let host = self.cluster.host(node);
        for address in self.addresses()? {
            let is_own = match address {
                IpAddr::V4(ip) => ip.to_string(),
                IpAddr::V6(ip) => format!("[{ip}]"),
            };
            let sockets = host.sh(&format!("ss -Htuan src '{is_own}'"))?;
            ensure!(sockets.is_empty(), "left on {node}: {sockets}");
            let at = host.sh(&format!("ip -o address show to {address}"))?;
            ensure!(at.is_empty(), "left on {node}: {at}");
        }
        Ok(())
    }
}

/// Neighbours are told some times where an address is, in IPv4 in both forms, since some of them
/// hear only one. How often it was due is counted from the first time on.
fn is_announced(address: IpAddr, new: &[&Frame], looked: Micros) -> Result<()> {
    let forms: &[(&str, Kind)] = match address {
        IpAddr::V4(_) => &[
            ("requests", Kind::Arp { is_reply: false }),
            ("replies", Kind::Arp { is_reply: true }),
        ],
        IpAddr::V6(_) => &[("advertisements", Kind::Icmp(ADVERTISEMENT))],
    };
    for (form, kind) in forms {
        let told = new.iter().filter(|it| it.from == address);
        let told = told.filter(|it| it.announces() && it.kind == *kind);
        let times: Vec<Micros> = told.map(|it| it.at).collect();
        let first = times.first().with_context(|| format!("no {form}"))?;
        let since = looked - first - LATE_US_MAX;
        let due = ANNOUNCED_AFTER_US.iter().filter(|after| **after <= since);
        let due = due.count().max(1);
        ensure!(times.len() >= due, "{} {form}, not {due}", times.len());
    }
    Ok(())
}

/// The connection of a client on which a node sent that; none if it is not to be woken.
fn connection(frame: &Frame) -> Option<Connection> {
    let Kind::Tcp {
        port,
        to_port,
        syn: false,
        fin: false,
        rst: false,
        ..
    } = frame.kind
    else {
        return None;
    };
    let is_kept = [NFS_PORT, NLM_PORT].contains(&port) && !frame.wakes();
    is_kept.then_some(Connection {
        port,
        client: frame.to,
        client_port: to_port,
    })
}

/// When an address is announced again, of the first second.
const ANNOUNCED_AFTER_US: [Micros; 4] = [0, 200_000, 500_000, 1_000_000];
/// A busy machine is late.
const LATE_US_MAX: Micros = 500_000;
/// After this the other nodes know a connection: it is told when it was seen twice.
const KNOWN_AFTER_US: Micros = 1_500_000;
/// A connection on which something was said so lately has not ended.
const LIVES_US: Micros = 300_000;
const KNOWN_TIME_MAX: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(100);
/// A client that is not stuck answers at once; it is told three times in one second.
const ANSWER_US_MAX: Micros = 1_500_000;
