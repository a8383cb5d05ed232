//! One call at a time, for everything that is not measured: mounting and finding handles.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use havenfs_rpc::auth::{AUTH_SYS, AuthSys, Gids, OpaqueAuth};
use havenfs_rpc::message::Call;
use havenfs_rpc::xdr::{Reader, Writer};
use havenfs_rpc::{program, record};
use rustix::net::{self, AddressFamily, SocketType};

/// How long a server may take for one answer before it counts as hanging.
pub(crate) const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// Longest answer that is accepted here.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Longest NFSv3 file handle (RFC 1813 2.4).
const HANDLE_BYTES_MAX: usize = 64;

/// What follows the transaction id of every successful reply: REPLY, MSG_ACCEPTED, the verifier
/// AUTH_NONE of length 0, SUCCESS.
pub(crate) const ACCEPTED: [u8; 20] = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A user as AUTH_SYS names them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Appends one whole record: mark, header and the arguments that `arguments` appends.
/// `payload` is the length of data that the caller sends behind it.
pub(crate) fn append_call(
    out: &mut Vec<u8>,
    who: Identity,
    (program, version, procedure): (u32, u32, u32),
    arguments: impl FnOnce(&mut Writer<'_>),
    payload: usize,
) {
    let mut body = Vec::new();
    AuthSys {
        stamp: 0,
        machine_name: b"bench",
        uid: who.uid,
        gid: who.gid,
        gids: Gids::new([who.gid]),
    }
    .encode(&mut Writer::new(&mut body));
    let start = record::begin_record(out);
    let call = Call {
        xid: 0,
        program,
        version,
        procedure,
        cred: OpaqueAuth {
            flavor: AUTH_SYS,
            body: &body,
        },
        verf: OpaqueAuth::NONE,
        args: &[],
    };
    call.encode(&mut Writer::new(out));
    arguments(&mut Writer::new(out));
    let len = out.len() - start - record::MARK_BYTES + payload;
    let mark = (1_u32 << 31) | len as u32;
    out[start..start + record::MARK_BYTES].copy_from_slice(&mark.to_be_bytes());
}

/// A connection that waits for each answer.
#[derive(Debug)]
pub(crate) struct Session {
    stream: TcpStream,
    who: Identity,
    xid: u32,
}

impl Session {
    pub(crate) fn connect(address: SocketAddr, who: Identity) -> anyhow::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, ANSWER_TIME_MAX)
            .with_context(|| format!("connect to {address}"))?;
        Self::over(stream, who)
    }

    /// Connects as another machine: from an address of its own.
    pub(crate) fn connect_from(
        source: IpAddr,
        address: SocketAddr,
        who: Identity,
    ) -> anyhow::Result<Self> {
        let socket = net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
        net::bind(&socket, &SocketAddr::new(source, 0))
            .and_then(|()| net::connect(&socket, &address))
            .with_context(|| format!("connect from {source} to {address}"))?;
        Self::over(TcpStream::from(socket), who)
    }

    /// Waits for an answer no longer than this.
    pub(crate) fn set_patience(&self, time_max: Duration) -> anyhow::Result<()> {
        Ok(self.stream.set_read_timeout(Some(time_max))?)
    }

    fn over(stream: TcpStream, who: Identity) -> anyhow::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        Ok(Self {
            stream,
            who,
            // Another than that of the last run, for a server that remembers replies.
            xid: seed(),
        })
    }

    /// Sends a call and returns its results.
    pub(crate) fn call(
        &mut self,
        what: (u32, u32, u32),
        arguments: impl FnOnce(&mut Writer<'_>),
    ) -> anyhow::Result<Vec<u8>> {
        let mut out = Vec::new();
        append_call(&mut out, self.who, what, arguments, 0);
        self.xid = self.xid.wrapping_add(1);
        out[4..8].copy_from_slice(&self.xid.to_be_bytes());
        self.stream.write_all(&out)?;
        let answer = self.answer()?;
        let results = answer
            .strip_prefix(&self.xid.to_be_bytes())
            .and_then(|rest| rest.strip_prefix(&ACCEPTED))
            .with_context(|| format!("call {what:?} was not accepted"))?;
        Ok(results.to_vec())
    }

    /// Waits for one whole reply.
    fn answer(&mut self) -> anyhow::Result<Vec<u8>> {
        let mut answer = Vec::new();
        loop {
            let mut mark = [0; 4];
            self.stream.read_exact(&mut mark).context("no answer")?;
            let mark = u32::from_be_bytes(mark);
            let len = (mark & !(1 << 31)) as usize;
            ensure!(answer.len() + len <= ANSWER_BYTES_MAX, "answer too long");
            let start = answer.len();
            answer.resize(start + len, 0);
            self.stream.read_exact(&mut answer[start..])?;
            if mark & (1 << 31) != 0 {
                return Ok(answer);
            }
        }
    }

    /// Sends a call for each item at once and returns the results of all, in their order.
    pub(crate) fn calls<T>(
        &mut self,
        what: (u32, u32, u32),
        items: impl IntoIterator<Item = T>,
        arguments: impl Fn(&T, &mut Writer<'_>),
    ) -> anyhow::Result<Vec<Vec<u8>>> {
        let first = self.xid.wrapping_add(1);
        let mut out = Vec::new();
        for item in items {
            let start = out.len();
            append_call(&mut out, self.who, what, |args| arguments(&item, args), 0);
            self.xid = self.xid.wrapping_add(1);
            out[start + 4..start + 8].copy_from_slice(&self.xid.to_be_bytes());
        }
        self.stream.write_all(&out)?;
        let count = self.xid.wrapping_sub(first).wrapping_add(1) as usize;
        let mut answers = vec![Vec::new(); count];
        for _ in 0..count {
            let answer = self.answer()?;
            let (xid, rest) = answer.split_first_chunk::<4>().context("no xid")?;
            let at = u32::from_be_bytes(*xid).wrapping_sub(first) as usize;
            let results = rest.strip_prefix(&ACCEPTED).context("not accepted")?;
            let place = answers.get_mut(at).context("an unknown xid")?;
            ensure!(place.is_empty(), "a call was answered twice");
            *place = results.to_vec();
        }
        Ok(answers)
    }

    /// Mounts `path` (MOUNT version 3) and returns its handle.
    pub(crate) fn mount(&mut self, path: &str) -> anyhow::Result<Vec<u8>> {
        let results = self.call((program::MOUNT, 3, 1), |args| args.opaque(path.as_bytes()))?;
        let mut reader = Reader::new(&results);
        let status = reader.u32()?;
        ensure!(status == 0, "mounting {path} failed with status {status}");
        Ok(reader.opaque(HANDLE_BYTES_MAX)?.to_vec())
    }

    /// Looks a name up and returns its handle.
    pub(crate) fn lookup(&mut self, directory: &[u8], name: &str) -> anyhow::Result<Vec<u8>> {
        let results = self.call((program::NFS, 3, 3), |args| {
            args.opaque(directory);
            args.opaque(name.as_bytes());
        })?;
        let mut reader = Reader::new(&results);
        let status = reader.u32()?;
        ensure!(
            status == 0,
            "LOOKUP of {name} failed with status {status}; was the data set made here with \
             `havenfs-bench prepare DIR`?"
        );
        Ok(reader.opaque(HANDLE_BYTES_MAX)?.to_vec())
    }

    /// Removes a name, whether it exists or not.
    pub(crate) fn remove(&mut self, directory: &[u8], name: &str) -> anyhow::Result<()> {
        self.call((program::NFS, 3, 12), |args| {
            args.opaque(directory);
            args.opaque(name.as_bytes());
        })?;
        Ok(())
    }

    /// Asks for the file id of a file.
    pub(crate) fn file_id(&mut self, handle: &[u8]) -> anyhow::Result<u64> {
        let results = self.call((program::NFS, 3, 1), |args| args.opaque(handle))?;
        let mut reader = Reader::new(&results);
        let status = reader.u32()?;
        ensure!(status == 0, "GETATTR failed with status {status}");
        reader.fixed::<52>()?;
        Ok(reader.u64()?)
    }
}

/// A number that differs from run to run.
pub(crate) fn seed() -> u32 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |time| {
            (time.as_micros() as u32).wrapping_mul(0x9e37_79b9)
        })
}
