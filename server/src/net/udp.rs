//! UDP: one task per socket. A reply leaves from the address that the call was sent to, and to the
//! port it came from: clients that have connected their socket drop everything else.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use havenfs_rpc::record::{MARK_BYTES, Record};
use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use tokio::io::Interest;
use tokio::sync::watch;
use tokio::time::sleep;

use super::intake::Intake;
use super::limits::{CALLS_OUTSTANDING_MAX, DATAGRAM_BYTES_MAX, Share};
use super::mailbox::Mailbox;
use super::tcp::Stop;
use crate::call::{Origin, Port, Transport};
use crate::gate::Gate;
use crate::node::Node;

/// How long to wait before asking again whether all connections together hold less.
const BUDGET_RETRY: Duration = Duration::from_millis(10);
/// Datagrams taken with one system call.
const BATCH: usize = 8;

/// Serves datagrams until it is stopped.
pub async fn serve(
    node: Arc<Node>,
    port: Port,
    socket: UdpSocket,
    mut stop: watch::Receiver<Stop>,
) -> io::Result<()> {
    let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
    // That has set "don't fragment", which suits QUIC; replies here may need several packets.
    if socket.local_addr()?.is_ipv6() {
        sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DONT)?;
    } else {
        sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DONT)?;
    }
    let socket = Socket {
        local: socket.local_addr()?,
        io: tokio::net::UdpSocket::from_std(socket)?,
        state,
    };
    let mailbox = Arc::new(Mailbox::default());
    // Who sends a datagram can't be known for sure: all senders of a socket share.
    let share = Share::new(Arc::clone(&node.budget), Arc::default());
    let mut buffers = vec![vec![0; DATAGRAM_BYTES_MAX]; BATCH];
    // No new calls: what was taken is answered.
    let mut finishes = false;
    loop {
        // Datagrams that come while too many calls are with the workers are dropped by the kernel
        // when its queue is full; clients send them again.
        let may_read = !finishes
            && mailbox.outstanding() < CALLS_OUTSTANDING_MAX
            && share.has_room(mailbox.reserved());
        let readable = tokio::select! {
            biased;
            stop = stopped(&mut stop, finishes) => {
                // A socket that is closed refuses datagrams, and clients shall find the other node.
                if stop == Stop::Destroy || !node.floats {
                    return Ok(());
                }
                finishes = true;
                false
            }
            () = mailbox.changed() => false,
            ready = socket.io.readable(), if may_read => {
                ready?;
                true
            }
            // Room in the budget is given back by others, who do not tell.
            () = sleep(BUDGET_RETRY), if !may_read => false,
        };
        if readable {
            receive(&node, port, &socket, &mailbox, &share, &mut buffers).await?;
        }
        for reply in mailbox.take() {
            if let Some((peer, from)) = reply.to {
                socket.send(&node.gate, &reply.bytes, peer, from).await;
            }
        }
    }
}

/// Waits for the end of the service; if that has begun, for its end.
async fn stopped(stop: &mut watch::Receiver<Stop>, finishes: bool) -> Stop {
    let is_new = |stop: &Stop| *stop == Stop::Destroy || (stop.is_stopped() && !finishes);
    // An error says that it is over as well.
    stop.wait_for(is_new)
        .await
        .map_or(Stop::Destroy, |stop| *stop)
}

struct Socket {
    io: tokio::net::UdpSocket,
    state: UdpSocketState,
    local: SocketAddr,
}

impl Socket {
    /// Sends a reply if the gate is open when the socket has room for it; what the network refuses
    /// is lost, and the client asks again.
    async fn send(&self, gate: &Gate, record: &[u8], peer: SocketAddr, from: IpAddr) {
        let transmit = Transmit {
            destination: peer,
            ecn: None,
            contents: record.get(MARK_BYTES..).unwrap_or_default(),
            segment_size: None,
            src_ip: Some(from),
        };
        let sent = self
            .io
            .async_io(Interest::WRITABLE, || {
                if !gate.is_open() {
                    return Ok(());
                }
                self.state.try_send(UdpSockRef::from(&self.io), &transmit)
            })
            .await;
        if let Err(error) = sent {
            tracing::debug!(%peer, %error, "cannot send a datagram");
        }
    }
}

/// Takes what is there and answers what can be answered at once.
async fn receive(
    node: &Arc<Node>,
    port: Port,
    socket: &Socket,
    mailbox: &Arc<Mailbox>,
    share: &Share,
    buffers: &mut [Vec<u8>],
) -> io::Result<()> {
    let mut metas = [RecvMeta::default(); BATCH];
    let received = {
        let mut slices: Vec<IoSliceMut<'_>> = buffers
            .iter_mut()
            .map(|buffer| IoSliceMut::new(buffer))
            .collect();
        socket.io.try_io(Interest::READABLE, || {
            socket
                .state
                .recv(UdpSockRef::from(&socket.io), &mut slices, &mut metas)
        })
    };
    let count = match received {
        Ok(count) => count,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
        // An ICMP error for an earlier reply: it says nothing about this socket.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut out = Vec::new();
    let mut jobs = Vec::new();
    let mut clock = Instant::now();
    for (meta, buffer) in metas.iter().zip(buffers.iter()).take(count) {
        let from = meta.dst_ip.unwrap_or_else(|| socket.local.ip());
        let local = SocketAddr::new(from, socket.local.port());
        let origin = Origin::new(meta.addr, local, Transport::Udp);
        // The kernel may hand over several datagrams of one peer in one buffer.
        let stride = meta.stride.max(1);
        for datagram in buffer.get(..meta.len).unwrap_or_default().chunks(stride) {
            let mut intake = Intake {
                node,
                port,
                mailbox,
                reply_to: Some((meta.addr, from)),
                share,
                jobs: &mut jobs,
                clock: &mut clock,
            };
            out.clear();
            intake.take(&origin, Record::Lent(datagram), &mut out);
            if !out.is_empty() {
                socket.send(&node.gate, &out, meta.addr, from).await;
            }
        }
    }
    node.pool.submit(mailbox.id(), &mut jobs);
    Ok(())
}
