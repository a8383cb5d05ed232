//! The load generator: connections with a fixed number of calls outstanding on one thread.
//!
//! Each received answer is checked and replaced by a new call at once; all calls that one receive
//! made room for leave with one send. With a single connection the socket is blocking, with more
//! of them one epoll set is waited for.

use std::io::{ErrorKind, IoSlice, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::event::epoll;
use serde::{Deserialize, Serialize};

use crate::cpu::{self, Sample};
use crate::session::{ANSWER_TIME_MAX, seed};
use crate::work::{Payload, Slot, Work};

/// Most connections: four bits of the transaction id.
pub(crate) const CONNECTIONS_MAX: usize = 16;
/// Most outstanding calls per connection: eight bits of the transaction id.
pub(crate) const OUTSTANDING_MAX: usize = 256;
/// Holds the longest reply, a READ of 1 MiB, and a first piece of the next.
const INPUT_BYTES: usize = (1 << 20) + (192 << 10);
/// How much is received while the length of the next reply is not known.
const FIRST_BYTES: usize = 64 << 10;
const LAST_FRAGMENT: u32 = 1 << 31;

/// How long to measure.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Extent {
    /// After a warm-up, for this long.
    Time(Duration),
    /// From the first call until every slot went once through its directory, but at most this
    /// long.
    OnePass(Duration),
}

/// What was measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// Calls, or entries of directories.
    pub(crate) units: u64,
    pub(crate) seconds: f64,
    /// Processor time of the server in nanoseconds.
    pub(crate) server_ns: u64,
    /// Processor time of the generator in nanoseconds.
    pub(crate) generator_ns: u64,
    /// Answers checked, warm-up included.
    pub(crate) checked: u64,
    /// Where it is of interest.
    #[serde(default)]
    pub(crate) latency: Option<Latency>,
}

/// How long calls took, from being made to being answered, in us.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Latency {
    pub(crate) median: f64,
    pub(crate) percentile_99: f64,
    pub(crate) longest: f64,
}

impl Latency {
    /// Of all that was measured; none if that is nothing.
    pub(crate) fn of(mut times: Vec<Duration>) -> Option<Self> {
        times.sort_unstable();
        let at = |share: usize| {
            let time = times.get((times.len() * share / 100).min(times.len().checked_sub(1)?))?;
            Some(time.as_secs_f64() * 1e6)
        };
        Some(Self {
            median: at(50)?,
            percentile_99: at(99)?,
            longest: at(100)?,
        })
    }
}

impl Figures {
    pub(crate) fn server_us(&self) -> f64 {
        self.server_ns as f64 / 1e3 / self.units.max(1) as f64
    }

    pub(crate) fn generator_us(&self) -> f64 {
        self.generator_ns as f64 / 1e3 / self.units.max(1) as f64
    }

    pub(crate) fn rate(&self) -> f64 {
        self.units as f64 / self.seconds.max(1e-9)
    }
}

/// A part of the output that is still to be sent.
#[derive(Debug, Clone, Copy)]
enum Piece {
    Own { start: usize, end: usize },
    Payload(Payload),
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
    /// Received bytes are `input[start..filled]`.
    start: usize,
    filled: usize,
    /// Earlier fragments of a reply in several fragments.
    fragments: Vec<u8>,
    out: Vec<u8>,
    pieces: Vec<Piece>,
    /// How many pieces are sent, and how many bytes of the next one.
    sent: usize,
    sent_bytes: usize,
    slots: Vec<Slot>,
    waits_to_send: bool,
    blocking: bool,
}

impl Connection {
    fn open(address: SocketAddr, outstanding: usize, blocking: bool) -> anyhow::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, ANSWER_TIME_MAX)
            .with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(!blocking)?;
        stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        Ok(Self {
            stream,
            input: vec![0; INPUT_BYTES],
            start: 0,
            filled: 0,
            fragments: Vec::new(),
            out: Vec::new(),
            pieces: Vec::new(),
            sent: 0,
            sent_bytes: 0,
            slots: (0..outstanding).map(|_| Slot::default()).collect(),
            waits_to_send: false,
            blocking,
        })
    }

    fn issue(&mut self, work: &mut Work, number: usize, slot: usize) {
        let start = self.out.len();
        let slot = &mut self.slots[slot];
        // The low bits stay: they say which slot it is.
        slot.xid = slot.xid.wrapping_add(1 << 12);
        let payload = work.issue(number, slot, &mut self.out);
        let end = self.out.len();
        match self.pieces.last_mut() {
            Some(Piece::Own { end: last, .. }) if *last == start => *last = end,
            _ => self.pieces.push(Piece::Own { start, end }),
        }
        self.pieces.extend(payload.map(Piece::Payload));
    }

    /// Sends what is there; returns whether something is left because the socket is full.
    fn flush(&mut self, work: &Work) -> anyhow::Result<bool> {
        while self.sent < self.pieces.len() {
            let mut slices = [IoSlice::new(&[]); 64];
            let mut skip = self.sent_bytes;
            let mut count = 0;
            for (place, piece) in slices.iter_mut().zip(&self.pieces[self.sent..]) {
                let bytes = match *piece {
                    Piece::Own { start, end } => &self.out[start..end],
                    Piece::Payload(payload) => work.payload(payload),
                };
                *place = IoSlice::new(&bytes[skip..]);
                skip = 0;
                count += 1;
            }
            match self.stream.write_vectored(&slices[..count]) {
                Ok(mut written) => {
                    for slice in &slices[..count] {
                        if written < slice.len() {
                            self.sent_bytes += written;
                            break;
                        }
                        written -= slice.len();
                        self.sent += 1;
                        self.sent_bytes = 0;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error).context("send calls"),
            }
        }
        self.out.clear();
        self.pieces.clear();
        self.sent = 0;
        Ok(false)
    }

    /// Receives once; returns whether anything came.
    fn receive(&mut self) -> anyhow::Result<bool> {
        if self.start == self.filled {
            self.start = 0;
            self.filled = 0;
        }
        let held = &self.input[self.start..self.filled];
        let missing = match held.first_chunk::<4>() {
            Some(mark) => {
                let len = (u32::from_be_bytes(*mark) & !LAST_FRAGMENT) as usize + 4;
                ensure!(len <= INPUT_BYTES, "a reply announces {len} bytes");
                (len - held.len()).max(if len > FIRST_BYTES { 0 } else { FIRST_BYTES })
            }
            None => FIRST_BYTES,
        };
        if self.filled + missing > self.input.len() {
            self.input.copy_within(self.start..self.filled, 0);
            self.filled -= self.start;
            self.start = 0;
        }
        let end = (self.filled + missing).min(self.input.len());
        match self.stream.read(&mut self.input[self.filled..end]) {
            Ok(0) => bail!("the server closed the connection"),
            Ok(len) => {
                self.filled += len;
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && !self.blocking => Ok(false),
            Err(error) => Err(error).context("no answer"),
        }
    }
}

/// Everything that one measurement needs.
#[derive(Debug)]
pub(crate) struct Load {
    connections: Vec<Connection>,
    epoll: OwnedFd,
    work: Work,
    checked: u64,
    units: u64,
    issuing: bool,
    one_pass: bool,
    outstanding: usize,
    /// How long the answered calls took, if that is of interest.
    times: Option<Vec<Duration>>,
}

impl Load {
    pub(crate) fn open(
        address: SocketAddr,
        work: Work,
        connections: usize,
        outstanding: usize,
    ) -> anyhow::Result<Self> {
        ensure!(
            (1..=CONNECTIONS_MAX).contains(&connections)
                && (1..=OUTSTANDING_MAX).contains(&outstanding),
            "1 to {CONNECTIONS_MAX} connections with 1 to {OUTSTANDING_MAX} calls are possible"
        );
        let times = work.is_timed().then(Vec::new);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let blocking = connections == 1;
        let mut load = Self {
            connections: Vec::new(),
            epoll,
            work,
            checked: 0,
            units: 0,
            issuing: true,
            one_pass: false,
            outstanding: 0,
            times,
        };
        let base = seed() & !0xfff;
        for number in 0..connections {
            let mut connection = Connection::open(address, outstanding, blocking)?;
            for (slot, state) in connection.slots.iter_mut().enumerate() {
                state.xid = base | (number << 8 | slot) as u32;
            }
            let data = epoll::EventData::new_u64(number as u64);
            epoll::add(&load.epoll, &connection.stream, data, epoll::EventFlags::IN)?;
            load.connections.push(connection);
        }
        Ok(load)
    }

    /// Runs the load and measures the processes `pids`.
    pub(crate) fn run(mut self, pids: &[u32], extent: Extent) -> anyhow::Result<Figures> {
        let (warm_up, length) = match extent {
            Extent::Time(length) => (length.mul_f64(0.2).min(Duration::from_millis(500)), length),
            Extent::OnePass(length) => (Duration::ZERO, length),
        };
        self.one_pass = matches!(extent, Extent::OnePass(_));
        let mut before = Sample::take(pids)?;
        let mut own_before = cpu::own_thread_ns();
        let mut start = Instant::now();
        for number in 0..self.connections.len() {
            let per_connection = self.connections[number].slots.len();
            for slot in 0..per_connection {
                self.issue(number, slot);
            }
            self.flush(number)?;
        }
        let mut warm = warm_up.is_zero();
        let mut events = Vec::with_capacity(CONNECTIONS_MAX);
        while self.outstanding > 0 {
            self.turn(&mut events)?;
            let now = Instant::now();
            if !warm && now - start >= warm_up {
                warm = true;
                before = Sample::take(pids)?;
                own_before = cpu::own_thread_ns();
                start = Instant::now();
                self.units = 0;
                self.times = self.times.map(|_| Vec::new());
            } else if warm && now - start >= length {
                break;
            }
        }
        let generator_ns = cpu::own_thread_ns() - own_before;
        let figures = Figures {
            units: self.units,
            seconds: start.elapsed().as_secs_f64(),
            server_ns: Sample::take(pids)?.since_ns(&before),
            generator_ns,
            checked: self.checked,
            latency: self.times.take().and_then(Latency::of),
        };
        self.drain(&mut events)?;
        Ok(figures)
    }

    /// Waits for the answers that are still under way, so that the next row starts alone.
    fn drain(&mut self, events: &mut Vec<epoll::Event>) -> anyhow::Result<()> {
        self.issuing = false;
        while self.outstanding > 0 {
            self.turn(events)?;
        }
        Ok(())
    }

    fn issue(&mut self, number: usize, slot: usize) {
        let connection = &mut self.connections[number];
        let over_all = number * connection.slots.len() + slot;
        connection.issue(&mut self.work, over_all, slot);
        connection.slots[slot].issued = self.times.as_ref().map(|_| Instant::now());
        self.outstanding += 1;
    }

    fn turn(&mut self, events: &mut Vec<epoll::Event>) -> anyhow::Result<()> {
        if self.connections.len() == 1 {
            self.connections[0].receive()?;
            self.take_answers(0)?;
            return self.flush(0);
        }
        events.clear();
        let timeout = ANSWER_TIME_MAX.try_into()?;
        epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(events),
            Some(&timeout),
        )?;
        ensure!(!events.is_empty(), "no answer within {ANSWER_TIME_MAX:?}");
        for event in events.iter() {
            let number = event.data.u64() as usize;
            let flags = event.flags;
            if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP)
                && self.connections[number].receive()?
            {
                self.take_answers(number)?;
            }
            self.flush(number)?;
        }
        Ok(())
    }

    fn flush(&mut self, number: usize) -> anyhow::Result<()> {
        let connection = &mut self.connections[number];
        let left = connection.flush(&self.work)?;
        if left != connection.waits_to_send {
            connection.waits_to_send = left;
            let mut flags = epoll::EventFlags::IN;
            flags.set(epoll::EventFlags::OUT, left);
            let data = epoll::EventData::new_u64(number as u64);
            epoll::modify(&self.epoll, &connection.stream, data, flags)?;
        }
        Ok(())
    }

    /// Checks every whole answer and issues a call in its place.
    fn take_answers(&mut self, number: usize) -> anyhow::Result<()> {
        loop {
            let connection = &mut self.connections[number];
            let held = &connection.input[connection.start..connection.filled];
            let Some((mark, rest)) = held.split_first_chunk::<4>() else {
                return Ok(());
            };
            let mark = u32::from_be_bytes(*mark);
            let len = (mark & !LAST_FRAGMENT) as usize;
            let Some(body) = rest.get(..len) else {
                return Ok(());
            };
            connection.start += 4 + len;
            let message = if mark & LAST_FRAGMENT != 0 && connection.fragments.is_empty() {
                body
            } else {
                connection.fragments.extend_from_slice(body);
                if mark & LAST_FRAGMENT == 0 {
                    continue;
                }
                connection.fragments.as_slice()
            };
            let xid = message.first_chunk::<4>().context("a reply without xid")?;
            let xid = u32::from_be_bytes(*xid);
            let place = (xid & 0xff) as usize;
            let slot = connection
                .slots
                .get_mut(place)
                .filter(|slot| slot.xid == xid)
                .context("a reply with an xid that is not outstanding")?;
            let units = self.work.check(slot, message)?;
            let done = self.one_pass && slot.passes > 0;
            // Answered: a second reply to it would be an error.
            slot.xid = slot.xid.wrapping_add(1 << 12);
            connection.fragments.clear();
            if let (Some(times), Some(issued)) = (&mut self.times, slot.issued) {
                times.push(issued.elapsed());
            }
            self.units += units;
            self.checked += 1;
            self.outstanding -= 1;
            if self.issuing && !done {
                self.issue(number, place);
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;
    use crate::compare::WHO;
    use crate::session::Session;
    use crate::workload::Workload;

    /// Creates and removes files through the floor's server, with and without epoll.
    #[test]
    fn every_call_of_a_load_is_answered_and_checked() {
        let root = tempfile::tempdir().unwrap();
        let scratch = root.path().join(crate::dataset::SCRATCH);
        std::fs::create_dir(&scratch).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let path = root.path().to_path_buf();
        // Ends with the test's process.
        std::thread::spawn(move || crate::floor::serve(&path, &listener));
        for (connections, outstanding) in [(3, 4), (1, 5), (1, 1)] {
            let mut session = Session::connect(address, WHO).unwrap();
            let root = session.mount("/").unwrap();
            let slots = connections * outstanding;
            let work = Work::prepare(Workload::CreateRemove, &mut session, &root, WHO, slots);
            let load = Load::open(address, work.unwrap(), connections, outstanding).unwrap();
            let length = Extent::Time(Duration::from_millis(20));
            let figures = load.run(&[std::process::id()], length).unwrap();
            assert!(figures.units > 0 && figures.checked >= figures.units);
            assert!(figures.server_ns > 0);
        }
        // Everything was drained, so at most one file of each slot is left.
        assert!(std::fs::read_dir(&scratch).unwrap().count() <= 12);
    }
}
