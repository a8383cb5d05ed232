//! Every node knows the connections that clients have to a service, so that whoever takes it over
//! can wake them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_tests::client::Peer;
use havenfs_tests::client::peer::Transport;
use havenfs_tests::cluster::Cluster;

use crate::scene::{ALPHA, ONE};

/// How long clients have at least to come back before they are forgotten, less what it takes to
/// find out that the service is there.
const BACK_TIME: Duration = Duration::from_secs(5);

fn connect(cluster: &Cluster, number: u8, port: u16) -> Result<Peer> {
    let own = SocketAddr::new(cluster.site.client(number), 0);
    let at = SocketAddr::new(cluster.site.service(ALPHA), port);
    Peer::connect_from(Transport::Tcp, own, at)
}

fn wait_for_count(cluster: &Cluster, node: &str, count: u64) -> Result<()> {
    let what = format!("{node} knows of {count} connections");
    cluster.wait(&what, |cluster| {
        let status = cluster.service(node, ALPHA).ok()?;
        (status.connections == count).then_some(())
    })
}

#[test]
fn the_connections_of_a_dead_node_are_known_to_the_next() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let ports = cluster.site.ports;
        let dies = cluster.wait_serving(ALPHA, |_| true)?.node;
        let open = [
            connect(cluster, 1, ports.nfs)?,
            connect(cluster, 2, ports.nfs)?,
            connect(cluster, 2, ports.nlm)?,
        ];
        // Nobody waits for an answer there.
        let _unknown = connect(cluster, 3, ports.mount)?;
        for node in cluster.others(&[dies]) {
            wait_for_count(cluster, node, 3)?;
        }

        cluster.kill(dies)?;
        let next = cluster.wait_serving(ALPHA, |serving| serving.node != dies)?;
        let served = Instant::now();
        let status = cluster.service(next.node, ALPHA)?;
        ensure!(status.connections == 3, "{status:?}");

        // One comes back, and the others are forgotten, later.
        let back = connect(cluster, 1, ports.nfs)?;
        drop(open);
        let third = cluster.others(&[dies, next.node])[0];
        wait_for_count(cluster, third, 4)?;
        wait_for_count(cluster, third, 1)?;
        let forgotten = served.elapsed();
        println!("forgotten after {} ms", forgotten.as_millis());
        ensure!(forgotten >= BACK_TIME, "{forgotten:?}");
        drop(back);
        wait_for_count(cluster, third, 0)
    })
}
