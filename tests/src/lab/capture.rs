//! What hosts and virtual machines of a lab send: frames on the bridge of the data segment.
//!
//! Owns the process that captures and the reading of its file, as far as tests ask: who sent a
//! frame, by the address of its card; when, by the clock of the machine that runs the test; and
//! what kind of packet is in it. A frame that a cut cable swallowed is not seen.
//!
//! Invariant: the capture ends with its guard. Frames that are cut short in the file are left out.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::clock::Micros;
use super::{Lab, Process};

/// The address of a network card.
pub type Mac = [u8; 6];

/// A capture that goes on.
#[derive(Debug)]
pub struct Capture {
    file: PathBuf,
    process: Process,
}

/// A frame on the bridge.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Frame {
    /// When it came by.
    pub at: Micros,
    /// Who sent it.
    pub mac: Mac,
    /// The sender's address inside of it; that of an ARP frame or a neighbour advertisement is what
    /// it claims to have.
    pub from: IpAddr,
    /// The receiver's address inside of it.
    pub to: IpAddr,
    /// What it is.
    pub kind: Kind,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// ARP.
    Arp {
        /// Whether it is a reply and no request.
        is_reply: bool,
    },
    /// TCP.
    Tcp {
        /// The sender's port.
        port: u16,
        /// The receiver's port.
        to_port: u16,
        /// The sequence number and the number that is acknowledged.
        numbers: [u32; 2],
        /// Whether the sender begins the connection, or answers that.
        syn: bool,
        /// Whether the sender says that it sends no more.
        fin: bool,
        /// Whether the sender ends the connection.
        rst: bool,
        /// How many bytes of data.
        payload: usize,
    },
    /// UDP.
    Udp {
        /// The sender's port.
        port: u16,
    },
    /// ICMP or, in IPv6, ICMPv6, with its type.
    Icmp(u8),
}

impl Lab {
    /// Starts to capture all frames of the data segment.
    pub fn capture(&self, name: &str) -> Result<Capture> {
        let dir = self.captures();
        fs::create_dir_all(&dir)?;
        let file = dir.join(format!("{name}.pcap"));
        let mut command = self.script("net.sh");
        command.arg("capture").arg(&file);
        let log = dir.join(format!("{name}.log"));
        let mut process = Process::spawn(log, &mut command)?;
        process.wait_for_line("listening on", Duration::from_secs(10))?;
        Ok(Capture { file, process })
    }
}

impl Capture {
    /// Ends it, so that all is in the file.
    ///
    /// # Errors
    /// Frames were lost: what is not in the file may still have been sent.
    pub fn end(&mut self) -> Result<()> {
        self.process.signal(Signal::INT)?;
        self.process.wait(Duration::from_secs(10))?;
        let said = self.process.output()?;
        let is_whole = said.contains("\n0 packets dropped by kernel");
        ensure!(is_whole, "the capture is not whole: {said}");
        Ok(())
    }

    /// The frames so far that tests ask about; others are left out.
    pub fn frames(&self) -> Result<Vec<Frame>> {
        frames(&fs::read(&self.file)?)
    }
}

/// The address of the card that a server host has on the data segment: `s1` to `s3`.
#[must_use]
pub fn mac_of(host: &str) -> Mac {
    let number = host.as_bytes().get(1).map_or(0, |digit| digit - b'0');
    [0x52, 0x54, 0, 0x77, 2, number]
}

impl Frame {
    /// Whether it says anything on behalf of an address that has moved away: that a connection
    /// ends, an answer, that something can't be reached, or where the address is.
    #[must_use]
    pub fn speaks(&self) -> bool {
        match self.kind {
            Kind::Tcp { payload, .. } => self.ends() || payload > 0,
            Kind::Arp { .. } | Kind::Udp { .. } | Kind::Icmp(_) => true,
        }
    }

    /// Whether it begins a TCP connection, or answers that.
    #[must_use]
    pub fn begins(&self) -> bool {
        matches!(self.kind, Kind::Tcp { syn: true, .. })
    }

    /// Whether it says that a TCP connection ends.
    #[must_use]
    pub fn ends(&self) -> bool {
        matches!(self.kind, Kind::Tcp { fin, rst, .. } if fin || rst)
    }

    /// Whether it goes the other way on the same TCP connection.
    #[must_use]
    pub fn answers(&self, other: &Self) -> bool {
        let sides = |frame: &Self| match frame.kind {
            Kind::Tcp { port, to_port, .. } => Some([(frame.from, port), (frame.to, to_port)]),
            _ => None,
        };
        let [own, other] = [sides(self), sides(other)];
        own.is_some_and(|[from, to]| other == Some([to, from]))
    }

    /// Whether it tells all neighbours where an address is that nobody has asked for.
    #[must_use]
    pub fn announces(&self) -> bool {
        match self.kind {
            Kind::Arp { .. } => self.from == self.to,
            Kind::Icmp(ADVERTISEMENT) => self.to == IpAddr::V6(ALL_NODES),
            _ => false,
        }
    }

    /// Whether it is an ACK that no connection has sent: its numbers are in no window.
    #[must_use]
    pub fn wakes(&self) -> bool {
        matches!(
            self.kind,
            Kind::Tcp {
                numbers: [0, 0],
                syn: false,
                fin: false,
                rst: false,
                payload: 0,
                ..
            }
        )
    }

    /// Whether it says that something can't be reached, whose first bytes it then has.
    #[must_use]
    pub fn is_unreachable(&self) -> bool {
        match self.from {
            IpAddr::V4(_) => self.kind == Kind::Icmp(3),
            IpAddr::V6(_) => self.kind == Kind::Icmp(1),
        }
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, kind, .. } = self;
        match kind {
            Kind::Arp { .. } => write!(f, "ARP of {from} to {to}"),
            Kind::Icmp(number) => write!(f, "ICMP {number} from {from} to {to}"),
            Kind::Udp { port } => write!(f, "UDP from {from} port {port} to {to}"),
            Kind::Tcp {
                port,
                fin,
                rst,
                payload,
                ..
            } => {
                let fin = if *fin { " FIN" } else { "" };
                let rst = if *rst { " RST" } else { "" };
                write!(
                    f,
                    "TCP{fin}{rst} of {payload} bytes from {from} port {port} to {to}"
                )
            }
        }
    }
}

/// Reads a file that tcpdump wrote.
fn frames(file: &[u8]) -> Result<Vec<Frame>> {
    let Some(mut rest) = file.get(FILE_HEADER_BYTES..) else {
        return Ok(Vec::new());
    };
    ensure!(file[..4] == MAGIC, "not a capture of this machine");
    let mut found = Vec::new();
    while let Some((head, behind)) = rest.split_at_checked(RECORD_HEADER_BYTES) {
        let word = |at: usize| {
            let bytes = head[at..at + 4].try_into();
            bytes.map(u32::from_ne_bytes).context("four bytes")
        };
        let at = Micros::from(word(0)?) * 1_000_000 + Micros::from(word(4)?);
        // The last frame may still be on its way to the file.
        let Some((bytes, next)) = behind.split_at_checked(word(8)? as usize) else {
            break;
        };
        found.extend(frame(at, bytes));
        rest = next;
    }
    Ok(found)
}

fn frame(at: Micros, bytes: &[u8]) -> Option<Frame> {
    let mac = bytes.get(6..12)?.try_into().ok()?;
    let inner = bytes.get(14..)?;
    let (from, to, kind) = match bytes.get(12..14)? {
        [0x08, 0x06] => (v4(inner, 14)?, v4(inner, 24)?, arp(inner)?),
        [0x08, 0x00] => {
            let header = usize::from(inner.first()? & 0xf) * 4;
            let length = usize::from(u16_at(inner, 2)?);
            let kind = kind(
                *inner.get(9)?,
                inner.get(header..)?,
                length - header.min(length),
            )?;
            (v4(inner, 12)?, v4(inner, 16)?, kind)
        }
        [0x86, 0xdd] => {
            let length = usize::from(u16_at(inner, 4)?);
            let kind = kind(*inner.get(6)?, inner.get(40..)?, length)?;
            let from = match kind {
                Kind::Icmp(ADVERTISEMENT) => v6(inner, 40 + 8)?,
                _ => v6(inner, 8)?,
            };
            (from, v6(inner, 24)?, kind)
        }
        _ => return None,
    };
    Some(Frame {
        at,
        mac,
        from,
        to,
        kind,
    })
}

fn arp(inner: &[u8]) -> Option<Kind> {
    let is_reply = u16_at(inner, 6)? == 2;
    Some(Kind::Arp { is_reply })
}

/// What a packet of so many bytes is, of which perhaps only the first ones were kept.
fn kind(protocol: u8, bytes: &[u8], length: usize) -> Option<Kind> {
    let port = || u16_at(bytes, 0);
    match protocol {
        1 | 58 => Some(Kind::Icmp(*bytes.first()?)),
        17 => Some(Kind::Udp { port: port()? }),
        6 => {
            let header = usize::from(*bytes.get(12)? >> 4) * 4;
            let flags = *bytes.get(13)?;
            Some(Kind::Tcp {
                port: port()?,
                to_port: u16_at(bytes, 2)?,
                numbers: [u32_at(bytes, 4)?, u32_at(bytes, 8)?],
                syn: flags & 2 != 0,
                fin: flags & 1 != 0,
                rst: flags & 4 != 0,
                payload: length.saturating_sub(header),
            })
        }
        _ => None,
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let two = bytes.get(at..at + 2)?.try_into().ok()?;
    Some(u16::from_be_bytes(two))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_be_bytes(four))
}

fn v4(bytes: &[u8], at: usize) -> Option<IpAddr> {
    let four: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(Ipv4Addr::from(four).into())
}

fn v6(bytes: &[u8], at: usize) -> Option<IpAddr> {
    let all: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
    Some(Ipv6Addr::from(all).into())
}

/// ICMPv6: a neighbour advertisement. In IPv4 nothing has this number.
pub const ADVERTISEMENT: u8 = 136;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const FILE_HEADER_BYTES: usize = 24;
const RECORD_HEADER_BYTES: usize = 16;
/// Times in microseconds, numbers in this machine's order.
const MAGIC: [u8; 4] = 0xa1b2_c3d4_u32.to_ne_bytes();

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with frames that were cut to 64 bytes.
    fn file(frames: &[&[u8]]) -> Vec<u8> {
        let mut file = MAGIC.to_vec();
        file.resize(FILE_HEADER_BYTES, 0);
        for frame in frames {
            let length = frame.len() as u32;
            for word in [5, 7, length, length] {
                file.extend(word.to_ne_bytes());
            }
            file.extend(*frame);
        }
        file
    }

    fn ethernet(kind: [u8; 2], inner: &[u8]) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(mac_of("s2"));
        frame.extend(kind);
        frame.extend(inner);
        frame
    }

    /// IPv4 of this protocol, whose header says `length` bytes in all.
    fn ipv4(protocol: u8, length: u8, inner: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, length, 0, 0, 0, 0, 64, protocol, 0, 0];
        packet.extend([10, 77, 0, 100, 10, 77, 0, 11]);
        packet.extend(inner);
        ethernet([8, 0], &packet)
    }

    fn tcp(flags: u8) -> Vec<u8> {
        let mut header = vec![8, 1, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags];
        header.resize(20, 0);
        header
    }

    #[test]
    fn a_file_tells_who_sent_what() -> Result<()> {
        let mut arp = vec![0; 28];
        arp[14..18].copy_from_slice(&[10, 77, 0, 100]);
        let all = file(&[
            &ipv4(6, 140, &tcp(0x11)),
            &ipv4(6, 40, &tcp(0x10)),
            &ipv4(1, 28, &[3, 3]),
            &ethernet([8, 6], &arp),
            &ethernet([0x12, 0x34], &[]),
        ]);
        let frames = frames(&all)?;
        assert_eq!(frames.len(), 4, "{frames:?}");
        assert_eq!((frames[0].at, frames[0].mac), (5_000_007, mac_of("s2")));
        let said: Vec<String> = frames.iter().map(Frame::to_string).collect();
        assert_eq!(
            said[0],
            "TCP FIN of 100 bytes from 10.77.0.100 port 2049 to 10.77.0.11"
        );
        let speaks: Vec<bool> = frames.iter().map(Frame::speaks).collect();
        assert_eq!(speaks, [true, false, true, true], "{said:?}");
        Ok(())
    }

    #[test]
    fn an_answer_goes_back_on_the_same_connection() -> Result<()> {
        let mut back = tcp(0x11);
        back.swap(0, 2);
        back.swap(1, 3);
        let mut back = ipv4(6, 40, &back);
        // The addresses change their places as well.
        let (from, to) = back[26..34].split_at_mut(4);
        from.swap_with_slice(to);
        let frames = frames(&file(&[
            &ipv4(6, 40, &tcp(2)),
            &back,
            &ipv4(1, 28, &[3, 3]),
            &ipv4(6, 40, &tcp(4)),
        ]))?;
        let answers: Vec<bool> = frames.iter().map(|it| it.answers(&frames[0])).collect();
        assert_eq!(answers, [false, true, false, false]);
        assert!(frames[1].answers(&frames[3]) && !frames[2].answers(&frames[2]));
        assert!(frames[0].begins() && frames[1].ends() && frames[3].ends());
        assert!(!frames[0].ends() && !frames[1].begins());
        Ok(())
    }

    #[test]
    fn an_announcement_names_its_address_twice() -> Result<()> {
        let (mut gratuitous, mut question) = (vec![0; 28], vec![0; 28]);
        gratuitous[7] = 2;
        for sender in [14, 24] {
            gratuitous[sender..sender + 4].copy_from_slice(&[10, 77, 0, 100]);
        }
        question[24..28].copy_from_slice(&[10, 77, 0, 100]);
        let frames = frames(&file(&[
            &ethernet([8, 6], &gratuitous),
            &ethernet([8, 6], &question),
        ]))?;
        assert_eq!(frames[0].kind, Kind::Arp { is_reply: true });
        assert_eq!(frames[1].kind, Kind::Arp { is_reply: false });
        let announces: Vec<bool> = frames.iter().map(Frame::announces).collect();
        assert_eq!(announces, [true, false]);
        Ok(())
    }

    #[test]
    fn an_ack_without_numbers_wakes() -> Result<()> {
        let mut numbered = tcp(0x10);
        numbered[7] = 1;
        let frames = frames(&file(&[
            &ipv4(6, 40, &tcp(0x10)),
            &ipv4(6, 40, &numbered),
            &ipv4(6, 40, &tcp(0x12)),
            &ipv4(6, 41, &tcp(0x10)),
        ]))?;
        let wakes: Vec<bool> = frames.iter().map(Frame::wakes).collect();
        assert_eq!(wakes, [true, false, false, false]);
        Ok(())
    }

    #[test]
    fn a_file_that_is_still_written_has_fewer_frames() -> Result<()> {
        let all = file(&[&ipv4(6, 40, &tcp(0))]);
        for end in 0..all.len() {
            assert!(frames(&all[..end])?.is_empty(), "{end}");
        }
        Ok(())
    }
}
