//! One connection: handshake, frames, messages.
//!
//! ```text
//!   opening side:  "havenfs" version | length 2 | handshake 1     (without the key: closed here)
//!   other side:                        length 2 | handshake 2
//!   both sides:    length 2 | sealed ( total length 4 | message ... ) | length 2 | sealed ( ... )
//! ```
//!
//! The handshake is Noise's `NNpsk0`: who can't prove the key in the first bytes gets no answer.
//! Keys are new for each connection, and so what was recorded can't be read later with the key
//! file. The prologue holds the version, so that two versions never come past the handshake. Each
//! frame is sealed under its number, and so a frame that is repeated, left out, out of order or
//! changed does not open, and the connection ends.
//!
//! A message begins in a frame of its own. Its length comes first and is checked before anything of
//! it is kept; then memory grows with the frames that have come. [`Receiver::receive`] may be
//! dropped at any time and called again; [`Sender::flush`] may not.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use snow::params::NoiseParams;
use snow::{Builder, StatelessTransportState};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

use super::key::ClusterKey;
use super::wire::Message;
use crate::raft::codec::DecodeError;

/// The longest message before the other side has said who it is.
pub(super) const HELLO_BYTES_MAX: usize = 16 << 10;
/// The longest message from a member: openraft sends few hundred entries at a time.
pub(super) const MESSAGE_BYTES_MAX: usize = (64 << 20) + (64 << 10);

/// What the opening side begins with; the last byte is the version.
const PREFACE: [u8; 8] = *b"havenfs\x01";
/// Noise names the pattern and its parts.
const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
/// An ephemeral key and a tag.
const HANDSHAKE_BYTES: usize = 48;
const FRAME_BYTES_MAX: usize = u16::MAX as usize;
const TAG_BYTES: usize = 16;
const PLAIN_BYTES_MAX: usize = FRAME_BYTES_MAX - TAG_BYTES;
const LENGTH_BYTES: usize = 4;
/// What is read at a time.
const READ_BYTES: usize = 2 + FRAME_BYTES_MAX;
/// Buffers above this are given back after a message.
const BUFFER_KEPT_BYTES: usize = 1 << 20;
/// A peer that takes nothing for so long is given up.
const WRITE_MAX: Duration = Duration::from_secs(5);
/// When a silent peer is probed, and how long sent bytes may stay unacknowledged: a node that lost
/// its power says nothing.
const PROBE_AFTER: Duration = Duration::from_secs(1);
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(3);
const PROBES: u32 = 2;

/// Why a connection is of no use.
#[derive(Debug, thiserror::Error)]
pub(in crate::raft) enum LinkError {
    /// The kernel said so.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The other side ended it.
    #[error("the connection was closed")]
    Closed,
    /// The other side closed it in place of an answer to the handshake.
    #[error(
        "it closes the connection at the handshake\nhint: compare the cluster keys of both nodes, \
         and the versions of havenfs; its log says which it was"
    )]
    NotWelcome,
    /// The other side speaks another version.
    #[error(
        "it speaks version {0} between nodes, and this program version {own}\nhint: run the same \
         version of havenfs on all nodes", own = PREFACE[7]
    )]
    OtherVersion(u8),
    /// The other side lacks the cluster key, or is no node at all.
    #[error("it does not have the cluster key")]
    Stranger,
    /// A frame is not what was sent.
    #[error("a frame was damaged, repeated, or is none")]
    Forged,
    /// A message is too long.
    #[error("a message of {bytes} bytes, and {bytes_max} are the most")]
    TooLong {
        /// How long.
        bytes: usize,
        /// What was allowed.
        bytes_max: usize,
    },
    /// A message can't be read.
    #[error("a message can't be read: {0}")]
    Damaged(#[from] DecodeError),
    /// A message came that has no place there.
    #[error("a message came out of place")]
    OutOfPlace,
    /// The other side took too long.
    #[error("no answer in time")]
    TimedOut,
}

/// A connection whose other side has the cluster key.
pub(in crate::raft) struct Link {
    pub(super) sender: Sender,
    pub(super) receiver: Receiver,
}

impl Link {
    /// As the side that opened the connection. The caller sets the deadline.
    pub(super) async fn open(mut stream: TcpStream, key: &ClusterKey) -> Result<Self, LinkError> {
        prepare(&stream)?;
        let secret = key.of_links();
        let noise = builder(&secret).and_then(Builder::build_initiator);
        let mut noise = noise.map_err(|error| own(&error))?;
        let mut out = [0; PREFACE.len() + 2 + HANDSHAKE_BYTES];
        let (begin, message) = out.split_at_mut(PREFACE.len() + 2);
        let written = noise.write_message(&[], message);
        written.map_err(|error| own(&error))?;
        begin[..PREFACE.len()].copy_from_slice(&PREFACE);
        begin[PREFACE.len()..].copy_from_slice(&(HANDSHAKE_BYTES as u16).to_be_bytes());
        let answer = async {
            stream.write_all(&out).await?;
            read_handshake(&mut stream).await
        };
        // The other side closes with bytes unread, which may look like a reset.
        let answer = answer.await.map_err(|_| LinkError::NotWelcome)?;
        let answer = answer.ok_or(LinkError::Forged)?;
        let opened = noise.read_message(&answer, &mut []);
        opened.map_err(|_| LinkError::Forged)?;
        Self::begin(stream, noise)
    }

    /// As the side that accepted the connection. The caller sets the deadline.
    pub(super) async fn accept(mut stream: TcpStream, key: &ClusterKey) -> Result<Self, LinkError> {
        prepare(&stream)?;
        let mut preface = [0; PREFACE.len()];
        stream.read_exact(&mut preface).await.map_err(closed)?;
        if preface != PREFACE {
            let (name, version) = preface.split_at(PREFACE.len() - 1);
            return Err(match (PREFACE.strip_prefix(name), version) {
                (Some(_), [version]) => LinkError::OtherVersion(*version),
                _ => LinkError::Stranger,
            });
        }
        let message = read_handshake(&mut stream).await.map_err(closed)?;
        let message = message.ok_or(LinkError::Stranger)?;
        let secret = key.of_links();
        let noise = builder(&secret).and_then(Builder::build_responder);
        let mut noise = noise.map_err(|error| own(&error))?;
        let opened = noise.read_message(&message, &mut []);
        opened.map_err(|_| LinkError::Stranger)?;
        let mut out = [0; 2 + HANDSHAKE_BYTES];
        let (begin, message) = out.split_at_mut(2);
        begin.copy_from_slice(&(HANDSHAKE_BYTES as u16).to_be_bytes());
        let written = noise.write_message(&[], message);
        written.map_err(|error| own(&error))?;
        stream.write_all(&out).await?;
        Self::begin(stream, noise)
    }

    fn begin(stream: TcpStream, noise: snow::HandshakeState) -> Result<Self, LinkError> {
        let noise = noise.into_stateless_transport_mode();
        let noise = Arc::new(noise.map_err(|error| own(&error))?);
        let (reading, writing) = stream.into_split();
        Ok(Self {
            sender: Sender {
                stream: writing,
                noise: Arc::clone(&noise),
                frames: 0,
                plain: Vec::new(),
                sealed: Vec::new(),
            },
            receiver: Receiver {
                stream: reading,
                noise,
                frames: 0,
                raw: Vec::new(),
                message: Vec::new(),
                total: None,
                bytes_max: HELLO_BYTES_MAX,
            },
        })
    }

    /// Sends a request and returns the answer. The caller sets the deadline, and closes the
    /// connection if this is dropped.
    pub(super) async fn ask(&mut self, request: &Message) -> Result<Message, LinkError> {
        self.sender.send(request).await?;
        self.receiver.receive().await
    }
}

fn builder(secret: &[u8; 32]) -> Result<Builder<'_>, snow::Error> {
    let pattern: NoiseParams = PATTERN.parse()?;
    Builder::new(pattern).psk(0, secret)?.prologue(&PREFACE)
}

/// An error that has nothing to do with the other side.
fn own(error: &snow::Error) -> LinkError {
    LinkError::Io(io::Error::other(error.to_string()))
}

fn closed(error: io::Error) -> LinkError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => LinkError::Closed,
        _ => LinkError::Io(error),
    }
}

/// `None` if what comes is no handshake.
async fn read_handshake(stream: &mut TcpStream) -> io::Result<Option<[u8; HANDSHAKE_BYTES]>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).await?;
    if usize::from(u16::from_be_bytes(length)) != HANDSHAKE_BYTES {
        return Ok(None);
    }
    let mut message = [0; HANDSHAKE_BYTES];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new()
        .with_time(PROBE_AFTER)
        .with_interval(PROBE_AFTER)
        .with_retries(PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))
}

/// The half of a connection that sends.
pub(super) struct Sender {
    stream: OwnedWriteHalf,
    noise: Arc<StatelessTransportState>,
    /// How many were sealed.
    frames: u64,
    plain: Vec<u8>,
    sealed: Vec<u8>,
}

impl Sender {
    /// Sends one message. If this is dropped, the connection is of no use.
    pub(super) async fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        self.add(message)?;
        self.flush().await
    }

    /// Seals one message, to be sent with others.
    pub(super) fn add(&mut self, message: &Message) -> Result<(), LinkError> {
        self.add_as(|out| message.encode(out))
    }

    /// Seals the message whose bytes `put` appends.
    pub(super) fn add_as(&mut self, put: impl FnOnce(&mut Vec<u8>)) -> Result<(), LinkError> {
        self.plain.clear();
        self.plain.extend_from_slice(&[0; LENGTH_BYTES]);
        put(&mut self.plain);
        let bytes = self.plain.len() - LENGTH_BYTES;
        if bytes > MESSAGE_BYTES_MAX {
            let bytes_max = MESSAGE_BYTES_MAX;
            return Err(LinkError::TooLong { bytes, bytes_max });
        }
        if let Some(length) = self.plain.first_chunk_mut() {
            *length = (bytes as u32).to_le_bytes();
        }
        let plain = std::mem::take(&mut self.plain);
        for part in plain.chunks(PLAIN_BYTES_MAX) {
            self.seal(part)?;
        }
        if plain.capacity() <= BUFFER_KEPT_BYTES {
            self.plain = plain;
        }
        Ok(())
    }

    fn seal(&mut self, plain: &[u8]) -> Result<(), LinkError> {
        let bytes = plain.len() + TAG_BYTES;
        self.sealed.extend_from_slice(&(bytes as u16).to_be_bytes());
        let at = self.sealed.len();
        self.sealed.resize(at + bytes, 0);
        let (_, out) = self.sealed.split_at_mut(at);
        let sealed = self.noise.write_message(self.frames, plain, out);
        sealed.map_err(|error| own(&error))?;
        self.frames += 1;
        Ok(())
    }

    /// Sends what was added. If this is dropped, the connection is of no use.
    pub(super) async fn flush(&mut self) -> Result<(), LinkError> {
        let written = timeout(WRITE_MAX, self.stream.write_all(&self.sealed));
        written.await.map_err(|_| LinkError::TimedOut)??;
        self.sealed.clear();
        self.sealed.shrink_to(BUFFER_KEPT_BYTES);
        Ok(())
    }
}

/// The half of a connection that receives.
pub(super) struct Receiver {
    stream: OwnedReadHalf,
    noise: Arc<StatelessTransportState>,
    /// How many were opened.
    frames: u64,
    /// What was read and is not opened yet.
    raw: Vec<u8>,
    /// What was opened of a message that has not come whole, with its length before it.
    message: Vec<u8>,
    total: Option<usize>,
    bytes_max: usize,
}

impl Receiver {
    /// The other side has said who it is, and it is a member.
    pub(super) fn admit(&mut self) {
        self.bytes_max = MESSAGE_BYTES_MAX;
    }

    /// The next message. Waits without end; may be dropped and called again.
    pub(super) async fn receive(&mut self) -> Result<Message, LinkError> {
        loop {
            if self.take()? {
                let message = Message::decode(self.message.get(LENGTH_BYTES..).unwrap_or_default());
                self.message.clear();
                self.message.shrink_to(BUFFER_KEPT_BYTES);
                self.total = None;
                return Ok(message?);
            }
            self.raw.reserve(READ_BYTES.saturating_sub(self.raw.len()));
            if self.stream.read_buf(&mut self.raw).await? == 0 {
                return Err(LinkError::Closed);
            }
        }
    }

    /// Opens the frames that are there, up to the end of a message; returns whether it is whole.
    fn take(&mut self) -> Result<bool, LinkError> {
        let mut taken = 0;
        let mut whole = false;
        while !whole
            && let Some((length, rest)) = self.raw.get(taken..).and_then(<[u8]>::split_first_chunk)
        {
            let bytes = usize::from(u16::from_be_bytes(*length));
            if bytes <= TAG_BYTES {
                return Err(LinkError::Forged);
            }
            let Some(frame) = rest.get(..bytes) else {
                break;
            };
            let at = self.message.len();
            self.message.resize(at + bytes - TAG_BYTES, 0);
            let (_, plain) = self.message.split_at_mut(at);
            let opened = self.noise.read_message(self.frames, frame, plain);
            opened.map_err(|_| LinkError::Forged)?;
            self.frames += 1;
            taken += 2 + bytes;
            whole = self.is_whole()?;
        }
        self.raw.drain(..taken);
        Ok(whole)
    }

    fn is_whole(&mut self) -> Result<bool, LinkError> {
        let total = if let Some(total) = self.total {
            total
        } else {
            let length = self.message.first_chunk().ok_or(LinkError::Forged)?;
            let bytes = u32::from_le_bytes(*length) as usize;
            let bytes_max = self.bytes_max;
            if bytes > bytes_max {
                return Err(LinkError::TooLong { bytes, bytes_max });
            }
            *self.total.insert(LENGTH_BYTES + bytes)
        };
        match self.message.len().cmp(&total) {
            std::cmp::Ordering::Less => Ok(false),
            std::cmp::Ordering::Equal => Ok(true),
            std::cmp::Ordering::Greater => Err(LinkError::Forged),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests;
