//! The floor: the least that any server of this protocol can cost on this machine.
//!
//! One thread, one epoll set; each batch of calls that one receive brought is answered with one
//! send. A call is decoded as far as its unavoidable system call needs, and that call is made on a
//! descriptor that has been open since LOOKUP. No identity, no permission, no limits, no other
//! attributes than the ones that a system call of the procedure returns anyway: it is a yardstick
//! and no server, and it believes what it is sent.

use std::collections::HashMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::Context as _;
use havenfs_rpc::program;
use havenfs_rpc::xdr::{Reader, XdrError};
use rustix::event::epoll;
use rustix::fs::{self, AtFlags, Mode, OFlags, Stat};

use crate::session::ACCEPTED;

/// Holds a batch of eight WRITEs of 1 MiB.
const INPUT_BYTES: usize = 9 << 20;
/// What one receive may bring: more gains nothing and spoils the cache.
const RECEIVE_BYTES: usize = 256 << 10;

const OK: u32 = 0;
const ERR_IO: u32 = 5;
const PROC_UNAVAIL: u32 = 3;

struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
    start: usize,
    filled: usize,
    out: Output,
    sent: usize,
}

/// Replies in a buffer that is never zeroed again, so that data can be read straight into it.
struct Output {
    bytes: Vec<u8>,
    len: usize,
}

impl Output {
    /// The next `len` bytes, whatever they hold.
    fn space(&mut self, len: usize) -> &mut [u8] {
        let start = self.len;
        self.len += len;
        if self.bytes.len() < self.len {
            self.bytes.resize(self.len, 0);
        }
        &mut self.bytes[start..self.len]
    }

    fn put(&mut self, bytes: &[u8]) {
        self.space(bytes.len()).copy_from_slice(bytes);
    }

    fn u32(&mut self, value: u32) {
        self.put(&value.to_be_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.put(&value.to_be_bytes());
    }

    /// A handle: eight bytes.
    fn handle(&mut self, index: u64) {
        self.u32(8);
        self.u64(index);
    }
}

/// The open files; a handle is an index.
struct Files {
    open: Vec<OwnedFd>,
    by_inode: HashMap<u64, u64>,
}

/// Serves NFS and MOUNT on one port of loopback until killed; every path mounts `root`.
pub(crate) fn run(root: &Path, port: u16) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .with_context(|| format!("listen on port {port}"))?;
    serve(root, &listener)
}

/// Serves the connections of `listener`.
pub(crate) fn serve(root: &Path, listener: &TcpListener) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let listening = epoll::EventData::new_u64(u64::MAX);
    epoll::add(&epoll, listener, listening, epoll::EventFlags::IN)?;
    let root = fs::open(root, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut files = Files {
        open: vec![root],
        by_inode: HashMap::new(),
    };
    let mut connections: HashMap<u64, Connection> = HashMap::new();
    let mut number = 0;
    let mut events = Vec::with_capacity(64);
    loop {
        events.clear();
        epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            let key = event.data.u64();
            if key == u64::MAX {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
                number += 1;
                let data = epoll::EventData::new_u64(number);
                epoll::add(&epoll, &stream, data, epoll::EventFlags::IN)?;
                let connection = Connection {
                    stream,
                    input: vec![0; INPUT_BYTES],
                    start: 0,
                    filled: 0,
                    out: Output {
                        bytes: Vec::new(),
                        len: 0,
                    },
                    sent: 0,
                };
                connections.insert(number, connection);
                continue;
            }
            let Some(connection) = connections.get_mut(&key) else {
                continue;
            };
            let was_full = connection.out.len > 0;
            match connection.turn(&mut files) {
                Ok(full) if full != was_full => {
                    // While replies wait, calls wait as well.
                    let flags = if full {
                        epoll::EventFlags::OUT
                    } else {
                        epoll::EventFlags::IN
                    };
                    let data = epoll::EventData::new_u64(key);
                    epoll::modify(&epoll, &connection.stream, data, flags)?;
                }
                Ok(_) => {}
                Err(_) => {
                    connections.remove(&key);
                }
            }
        }
    }
}

impl Connection {
    /// Receives, answers and sends; returns whether the socket is full.
    fn turn(&mut self, files: &mut Files) -> anyhow::Result<bool> {
        if self.out.len == 0 {
            if self.start == self.filled {
                self.start = 0;
                self.filled = 0;
            } else if self.filled + RECEIVE_BYTES > self.input.len() {
                self.input.copy_within(self.start..self.filled, 0);
                self.filled -= self.start;
                self.start = 0;
            }
            let end = (self.filled + RECEIVE_BYTES).min(self.input.len());
            match self.stream.read(&mut self.input[self.filled..end]) {
                Ok(0) => anyhow::bail!("closed"),
                Ok(len) => self.filled += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
            self.answer(files)?;
        }
        while self.sent < self.out.len {
            match self.stream.write(&self.out.bytes[self.sent..self.out.len]) {
                Ok(len) => self.sent += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
        self.out.len = 0;
        self.sent = 0;
        Ok(false)
    }

    fn answer(&mut self, files: &mut Files) -> anyhow::Result<()> {
        while let Some((mark, rest)) = self.input[self.start..self.filled].split_first_chunk::<4>()
        {
            let len = (u32::from_be_bytes(*mark) & !(1 << 31)) as usize;
            let Some(message) = rest.get(..len) else {
                break;
            };
            self.start += 4 + len;
            let start = self.out.len;
            self.out.u32(0);
            files.call(message, &mut self.out)?;
            let len = (self.out.len - start - 4) as u32;
            let mark = len | 1 << 31;
            self.out.bytes[start..start + 4].copy_from_slice(&mark.to_be_bytes());
        }
        Ok(())
    }
}

impl Files {
    fn call(&mut self, message: &[u8], out: &mut Output) -> Result<(), XdrError> {
        let mut reader = Reader::new(message);
        out.u32(reader.u32()?);
        out.put(&ACCEPTED);
        // CALL and the version of RPC.
        reader.fixed::<8>()?;
        let program = reader.u32()?;
        let _version = reader.u32()?;
        let procedure = reader.u32()?;
        for _ in ["credential", "verifier"] {
            reader.u32()?;
            reader.opaque(400)?;
        }
        let start = out.len;
        let done = match (program, procedure) {
            (program::MOUNT, 1) => {
                out.u32(OK);
                out.handle(0);
                out.u32(0);
                Ok(())
            }
            (program::NFS, 0) => Ok(()),
            (program::NFS, 1) => self.getattr(reader, out),
            (program::NFS, 3) => self.lookup(reader, out),
            (program::NFS, 4) => self.access(reader, out),
            (program::NFS, 6) => self.read(reader, out),
            (program::NFS, 7) => self.write(reader, out),
            (program::NFS, 8) => self.create(reader, out),
            (program::NFS, 12) => self.remove(reader, out),
            _ => {
                out.len = start - 4;
                out.u32(PROC_UNAVAIL);
                Ok(())
            }
        };
        if done.is_err() {
            out.len = start;
            out.u32(ERR_IO);
        }
        Ok(())
    }

    fn file(&self, reader: &mut Reader<'_>) -> anyhow::Result<&OwnedFd> {
        let handle = reader.opaque(64)?.first_chunk::<8>().context("handle")?;
        let index = u64::from_be_bytes(*handle) as usize;
        self.open.get(index).context("handle")
    }

    fn getattr(&self, mut reader: Reader<'_>, out: &mut Output) -> anyhow::Result<()> {
        let stat = fs::fstat(self.file(&mut reader)?)?;
        out.u32(OK);
        attributes(out, &stat);
        Ok(())
    }

    fn access(&self, mut reader: Reader<'_>, out: &mut Output) -> anyhow::Result<()> {
        let stat = fs::fstat(self.file(&mut reader)?)?;
        out.u32(OK);
        out.u32(1);
        attributes(out, &stat);
        out.u32(reader.u32()?);
        Ok(())
    }

    fn lookup(&mut self, mut reader: Reader<'_>, out: &mut Output) -> anyhow::Result<()> {
        let directory = self.file(&mut reader)?;
        let name = reader.opaque(255)?;
        let stat = fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let index = if let Some(index) = self.by_inode.get(&stat.st_ino) {
            *index
        } else {
            let access = match fs::FileType::from_raw_mode(stat.st_mode) {
                fs::FileType::Directory => OFlags::RDONLY,
                _ => OFlags::RDWR,
            };
            let file = fs::openat(directory, name, access | OFlags::CLOEXEC, Mode::empty())?;
            self.open.push(file);
            let index = self.open.len() as u64 - 1;
            self.by_inode.insert(stat.st_ino, index);
            index
        };
        out.u32(OK);
        out.handle(index);
        out.u32(1);
        attributes(out, &stat);
        out.u32(0);
        Ok(())
    }

    fn read(&self, mut reader: Reader<'_>, out: &mut Output) -> anyhow::Result<()> {
        let file = self.file(&mut reader)?;
        let offset = reader.u64()?;
        let count = reader.u32()?;
        // No attributes, the count, not at the end, and the count again before the data.
        for word in [OK, 0, count, 0, count] {
            out.u32(word);
        }
        let space = out.space(count as usize);
        anyhow::ensure!(rustix::io::pread(file, &mut *space, offset)? == space.len());
        Ok(())
    }

    fn write(&self, mut reader: Reader<'_>, out: &mut Output) -> anyhow::Result<()> {
        let file = self.file(&mut reader)?;
        let offset = reader.u64()?;
        let count = reader.u32()?;
        let _stable = reader.u32()?;
        let data = reader.opaque(1 << 20)?;
        anyhow::ensure!(rustix::io::pwrite(file, data, offset)? == data.len());
        // No attributes before and after, the count, UNSTABLE and the write verifier.
        for word in [OK, 0, 0, count, 0, 0, 0] {
            out.u32(word);
        }
        Ok(())
    }

    fn create(&self, mut reader: Reader<'_>, out: &mut Output) -> anyhow::Result<()> {
        let directory = self.file(&mut reader)?;
        let name = reader.opaque(255)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let file = fs::openat(directory, name, flags, Mode::from_raw_mode(0o644))?;
        let stat = fs::fstat(&file)?;
        out.u32(OK);
        out.u32(1);
        out.handle(stat.st_ino);
        out.u32(1);
        attributes(out, &stat);
        for word in [0, 0] {
            out.u32(word);
        }
        Ok(())
    }

    fn remove(&self, mut reader: Reader<'_>, out: &mut Output) -> anyhow::Result<()> {
        let directory = self.file(&mut reader)?;
        let name = reader.opaque(255)?;
        fs::unlinkat(directory, name, AtFlags::empty())?;
        for word in [OK, 0, 0] {
            out.u32(word);
        }
        Ok(())
    }
}

/// `fattr3`.
fn attributes(out: &mut Output, stat: &Stat) {
    let kind = match fs::FileType::from_raw_mode(stat.st_mode) {
        fs::FileType::Directory => 2,
        _ => 1,
    };
    let mode = stat.st_mode & 0o7777;
    for word in [kind, mode, stat.st_nlink as u32, stat.st_uid, stat.st_gid] {
        out.u32(word);
    }
    out.u64(stat.st_size as u64);
    out.u64(stat.st_blocks as u64 * 512);
    out.u64(0);
    out.u64(stat.st_dev);
    out.u64(stat.st_ino);
    for (seconds, nanoseconds) in [
        (stat.st_atime, stat.st_atime_nsec),
        (stat.st_mtime, stat.st_mtime_nsec),
        (stat.st_ctime, stat.st_ctime_nsec),
    ] {
        out.u32(seconds as u32);
        out.u32(nanoseconds as u32);
    }
}
