//! The client against peers that answer well, badly and not at all.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::net::{Ipv4Addr, TcpListener, UdpSocket as StdUdpSocket};
use std::os::unix::net::UnixListener;
use std::thread::{self, JoinHandle};

use havenfs_rpc::auth::AuthStat;
use havenfs_rpc::message::{reply_accepted, reply_auth_error};
use std::io::{Read, Write};

use super::*;

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(300);
const PROCEDURE: Procedure = Procedure {
    program: 100_000,
    version: 4,
    number: 4,
};

struct Word(u32);

impl Encode for Word {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.u32(self.0);
    }
}

/// A successful reply with one word of results.
fn reply(xid: u32, word: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let mut writer = Writer::new(&mut out);
    reply_accepted(&mut writer, xid, AcceptStat::Success);
    writer.u32(word);
    out
}

fn refused(xid: u32, stat: AcceptStat) -> Vec<u8> {
    let mut out = Vec::new();
    reply_accepted(&mut Writer::new(&mut out), xid, stat);
    out
}

fn in_record(message: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let start = record::begin_record(&mut out);
    out.extend_from_slice(message);
    record::end_record(&mut out, start);
    out
}

/// Serves one connection: `answer` turns each call's id and argument into the bytes to send.
fn serve_stream(
    mut stream: impl Read + Write + Send + 'static,
    answer: impl Fn(u32, u32) -> Vec<u8> + Send + 'static,
) {
    let mut call = [0; 48];
    while stream.read_exact(&mut call).is_ok() {
        let call = Call::decode(&call[4..]).unwrap();
        assert_eq!(
            (call.program, call.version, call.procedure),
            (100_000, 4, 4)
        );
        let word = u32::from_be_bytes(call.args.try_into().unwrap());
        if stream.write_all(&answer(call.xid, word)).is_err() {
            return;
        }
    }
}

fn tcp_peer(
    answer: impl Fn(u32, u32) -> Vec<u8> + Send + 'static,
) -> (Target, JoinHandle<SocketAddr>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = Target::Tcp(listener.local_addr().unwrap());
    let thread = thread::spawn(move || {
        let (stream, peer) = listener.accept().unwrap();
        serve_stream(stream, answer);
        peer
    });
    (target, thread)
}

async fn connect(target: Target, timeout: Duration) -> RpcClient {
    RpcClient::connect(target, SourcePort::Any, timeout)
        .await
        .unwrap()
}

#[tokio::test]
async fn calls_over_tcp_skip_late_replies() {
    let (target, _) = tcp_peer(|xid, word| {
        [
            in_record(&reply(xid ^ 1, 0)),
            in_record(&reply(xid, word + 1)),
        ]
        .concat()
    });
    let mut client = connect(target, LONG).await;
    for word in 0..3 {
        let results = client.call(PROCEDURE, &Word(word)).await.unwrap();
        assert_eq!(results, (word + 1).to_be_bytes());
    }
}

#[tokio::test]
async fn calls_through_a_local_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        serve_stream(listener.accept().unwrap().0, |xid, word| {
            in_record(&reply(xid, word))
        });
    });
    let mut client = connect(Target::Local(path), LONG).await;
    assert_eq!(
        client.call(PROCEDURE, &Word(7)).await.unwrap(),
        7u32.to_be_bytes()
    );
}

#[tokio::test]
async fn udp_repeats_the_call_and_takes_only_its_reply() {
    let peer = StdUdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let stranger = StdUdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = Target::Udp(peer.local_addr().unwrap());
    let thread = thread::spawn(move || {
        let mut buffer = [0; 100];
        let mut xids = Vec::new();
        for _ in 0..2 {
            let (len, _) = peer.recv_from(&mut buffer).unwrap();
            xids.push(Call::decode(&buffer[..len]).unwrap().xid);
        }
        let (len, client) = peer.recv_from(&mut buffer).unwrap();
        let xid = Call::decode(&buffer[..len]).unwrap().xid;
        assert_eq!(xids, [xid, xid]);
        stranger.send_to(&reply(xid, 666), client).unwrap();
        peer.send_to(&reply(xid ^ 1, 667), client).unwrap();
        peer.send_to(&[1, 2], client).unwrap();
        peer.send_to(&reply(xid, 8), client).unwrap();
    });
    let mut client = connect(target, LONG).await;
    assert_eq!(
        client.call(PROCEDURE, &Word(7)).await.unwrap(),
        8u32.to_be_bytes()
    );
    thread.join().unwrap();
}

#[tokio::test]
async fn silence_ends_at_the_deadline() {
    let silent = StdUdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    for target in [
        Target::Udp(silent.local_addr().unwrap()),
        Target::Tcp(listener.local_addr().unwrap()),
    ] {
        let error = connect(target, SHORT)
            .await
            .call(PROCEDURE, &NoArgs)
            .await
            .unwrap_err();
        assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
    }
}

#[tokio::test]
async fn nobody_there_is_told_at_once() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = RpcClient::connect(Target::Tcp(address), SourcePort::Any, LONG).await;
    assert!(matches!(error, Err(ClientError::Connect { .. })));
    let error = connect(Target::Udp(address), LONG)
        .await
        .call(PROCEDURE, &NoArgs)
        .await;
    assert!(matches!(error, Err(ClientError::Lost { .. })), "{error:?}");
}

#[tokio::test]
async fn a_reply_above_the_limit_is_malformed() {
    let (target, _) = tcp_peer(|_, _| vec![0xff; 4]);
    let error = connect(target, LONG)
        .await
        .call(PROCEDURE, &Word(1))
        .await
        .unwrap_err();
    assert!(matches!(error, ClientError::Malformed { .. }), "{error}");
}

#[tokio::test]
async fn a_closed_connection_is_lost() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = Target::Tcp(listener.local_addr().unwrap());
    let mut client = connect(target, LONG).await;
    drop(listener.accept().unwrap());
    let error = client.call(PROCEDURE, &Word(1)).await.unwrap_err();
    assert!(matches!(error, ClientError::Lost { .. }), "{error}");
}

#[tokio::test]
async fn refusals_keep_their_reason() {
    let (target, _) = tcp_peer(|xid, word| {
        in_record(&match word {
            0 => refused(xid, AcceptStat::ProgMismatch { low: 2, high: 2 }),
            1 => refused(xid, AcceptStat::SystemErr),
            2 => {
                let mut out = Vec::new();
                reply_auth_error(&mut Writer::new(&mut out), xid, AuthStat::TooWeak);
                out
            }
            // A call instead of a reply.
            _ => [xid.to_be_bytes(), [0; 4]].concat(),
        })
    });
    let mut client = connect(target, LONG).await;
    let error = client.call(PROCEDURE, &Word(0)).await.unwrap_err();
    assert!(error.is_other_version(), "{error}");
    let error = client.call(PROCEDURE, &Word(1)).await.unwrap_err();
    assert!(!error.is_other_version(), "{error}");
    assert!(matches!(
        error,
        ClientError::NotServed {
            stat: AcceptStat::SystemErr,
            ..
        }
    ));
    let error = client.call(PROCEDURE, &Word(2)).await.unwrap_err();
    let weak = ReplyOutcome::AuthError(AuthStat::TooWeak as u32);
    assert!(matches!(error, ClientError::Denied { outcome, .. } if outcome == weak));
    let error = client.call(PROCEDURE, &Word(3)).await.unwrap_err();
    assert!(matches!(error, ClientError::Malformed { .. }), "{error}");
}

#[tokio::test]
async fn root_calls_come_from_a_reserved_port() {
    let (target, thread) = tcp_peer(|xid, word| in_record(&reply(xid, word)));
    let mut client = RpcClient::connect(target, SourcePort::Reserved, LONG)
        .await
        .unwrap();
    client.call(PROCEDURE, &Word(1)).await.unwrap();
    drop(client);
    assert!(RESERVED_PORTS.contains(&thread.join().unwrap().port()));
    let peer = StdUdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = Target::Udp(peer.local_addr().unwrap());
    let thread = thread::spawn(move || {
        let mut buffer = [0; 100];
        let (len, client) = peer.recv_from(&mut buffer).unwrap();
        let xid = Call::decode(&buffer[..len]).unwrap().xid;
        peer.send_to(&reply(xid, 8), client).unwrap();
        client
    });
    let results = call_once(target, SourcePort::Reserved, LONG, PROCEDURE, &NoArgs)
        .await
        .unwrap();
    assert_eq!(results, 8u32.to_be_bytes());
    assert!(RESERVED_PORTS.contains(&thread.join().unwrap().port()));
}
