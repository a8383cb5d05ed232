//! Random and mutated messages through real sockets; the decoders alone have property tests of
//! their own. The seed is printed, and `HAVENFS_WIRE_SEED` sets it, so that a failure can be
//! replayed.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::nfs::{args, procedure};
use havenfs_tests::client::rpc::{next_xid, record};
use havenfs_tests::client::{Header, Peer};
use havenfs_tests::server::V4;

use super::good_client::GoodClient;
use super::scene::Scene;

/// Pseudo-random numbers (xorshift64*); the seed replays a failure.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let given = std::env::var("HAVENFS_WIRE_SEED").ok();
        let seed = given
            .and_then(|seed| seed.parse().ok())
            .unwrap_or(20_260_101);
        eprintln!("HAVENFS_WIRE_SEED={seed}");
        Self(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

#[test]
fn forged_handles_open_nothing() -> Result<()> {
    let mut s = Scene::new()?;
    let good = GoodClient::start(&mut s)?;
    let mut random = Random::new();
    let root = s.root.clone();
    for _ in 0..20 {
        let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
        let mut bytes = Vec::new();
        for _ in 0..500 {
            let mut fh = root.clone();
            match random.below(3) {
                0 => {
                    let len = random.below(65);
                    fh = random.bytes(len);
                }
                1 => {
                    let at = random.below(fh.len());
                    fh[at] = fh[at].wrapping_add(1 + random.below(255) as u8);
                }
                _ => {
                    let len = random.below(fh.len());
                    fh.truncate(len);
                }
            }
            let header = Header::new(program::NFS, 3, procedure::GETATTR, &s.cred());
            bytes.extend(record(
                &header.message(next_xid(), &args(|w| w.opaque(&fh))),
            ));
        }
        peer.send_raw(&bytes)?;
        for _ in 0..500 {
            let reply = peer.receive()?;
            let status = reply.get(24..28).and_then(|bytes| bytes.first_chunk());
            ensure!(status == Some(&10_001u32.to_be_bytes()), "{reply:02x?}");
        }
    }
    good.judge(&mut s, "forged handles")
}

/// A proper call of any program, as the material for mutations.
fn any_call(s: &Scene, random: &mut Random) -> (bool, Vec<u8>) {
    let name = random.bytes(1 + random.0 as usize % 12);
    let words = |random: &mut Random, count: usize| -> Vec<u32> {
        (0..count).map(|_| random.below(9) as u32).collect()
    };
    let mount = random.below(4) == 0;
    let (program, version, procedure) = if mount {
        (
            program::MOUNT,
            1 + random.below(3) as u32,
            random.below(7) as u32,
        )
    } else {
        (program::NFS, 3, random.below(23) as u32)
    };
    let tail = random.below(10);
    let tail = words(random, tail);
    let args = args(|w| {
        if mount {
            w.opaque(s.site.export().as_os_str().as_encoded_bytes());
        } else {
            w.opaque(&s.root);
            if random.below(2) == 0 {
                w.opaque(&name);
            }
            for word in &tail {
                w.u32(*word);
            }
        }
    });
    let header = Header::new(program, version, procedure, &s.cred());
    (mount, header.message(next_xid(), &args))
}

fn mutate(message: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..random.below(4) {
        let at = random.below(message.len());
        match random.below(5) {
            0 => message.truncate(at.max(8)),
            1 => {
                let len = random.below(100);
                let more = random.bytes(len);
                message.extend(more);
            }
            2 => {
                let word = [0, 1, 2, 0x7fff_ffff, u32::MAX][random.below(5)];
                let start = at / 4 * 4;
                if let Some(place) = message.get_mut(start..start + 4) {
                    place.copy_from_slice(&word.to_be_bytes());
                }
            }
            _ => {
                if let Some(byte) = message.get_mut(at) {
                    *byte = random.next() as u8;
                }
            }
        }
    }
}

#[test]
fn random_and_mutated_messages() -> Result<()> {
    let mut s = Scene::new()?;
    let good = GoodClient::start(&mut s)?;
    let mut random = Random::new();
    let nfs = s.server.nfs_at(V4);
    let mount = SocketAddr::new(V4, s.server.mount_port);
    let mut over_udp = Peer::udp(mount)?;
    let mut answered = 0;
    let mut closed = 0;
    for _ in 0..150 {
        let mut to_nfs = Vec::new();
        let mut to_mount = Vec::new();
        for _ in 0..100 {
            let (is_mount, mut message) = any_call(&s, &mut random);
            mutate(&mut message, &mut random);
            if random.below(50) == 0 {
                let len = random.below(200);
                message = random.bytes(len);
            }
            if is_mount {
                if random.below(2) == 0 {
                    over_udp.send_raw(&message)?;
                } else {
                    to_mount.extend(record(&message));
                }
            } else {
                to_nfs.extend(record(&message));
            }
            if random.below(400) == 0 {
                let len = random.below(300);
                to_nfs.extend(random.bytes(len));
            }
        }
        for (address, bytes) in [(nfs, to_nfs), (mount, to_mount)] {
            let mut peer = Peer::tcp(address)?;
            peer.set_answer_time(Duration::from_millis(30))?;
            // A server that closes early is within its rights.
            let _ = peer.send_raw(&bytes);
            while peer.receive().is_ok() {
                answered += 1;
            }
            closed += 1;
        }
    }
    eprintln!("{answered} answers on {closed} connections");
    ensure!(answered > 1000, "next to nothing was answered");
    good.judge(&mut s, "random messages")
}
