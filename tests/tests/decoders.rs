//! What decoding costs in memory: nothing that a hostile length field asks for.
//!
//! An allocator that counts per thread measures every decoder on proper messages, on the same ones
//! with every word changed, and on noise. Decoders of arguments borrow from the message and take
//! nothing at all; lists take a small multiple of the message; a whole call takes no more than its
//! reply may hold. That the answers are right is tested elsewhere.

use std::fs::Permissions;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use allocation_counter::measure;
use anyhow::{Context as _, Result, ensure};
use havenfs::backend::credential;
use havenfs::backend::handle::{FileHandle, HandleKey};
use havenfs::backend::setattr::Changes;
use havenfs::backend::table::HandleTable;
use havenfs::call::{Mode, Origin, Port, Served, Transport};
use havenfs::export::Sources;
use havenfs::gate::Gate;
use havenfs::mount_list::MountList;
use havenfs::node::{Node, Parts};
use havenfs::numbering::Numbering;
use havenfs::programs::mount::wire as mount;
use havenfs::programs::nfs3::{TRANSFER_BYTES_MAX, wire as nfs3};
use havenfs::{dispatch, volumes};
use havenfs_nlm::wire::{self as nlm, Nlm4Stats};
use havenfs_nlm::wire_v3::{Narrow, NlmVersion};
use havenfs_nsm::wire as nsm;
use havenfs_rpc::auth::{AUTH_SYS, AuthSys, Credential, Gids, OpaqueAuth};
use havenfs_rpc::message::{Call, Reply};
use havenfs_rpc::portmap::{List, Mapping, Netbuf, Rpcb, RpcbEntry, Uaddr};
use havenfs_rpc::program;
use havenfs_rpc::record::RecordReader;
use havenfs_rpc::xdr::{Decode, Encode, Reader, Writer, decode_all};

/// Values that a hostile peer puts into length fields and counts.
const WORDS: [u32; 8] = [0, 1, 2, 64, 1024, 65_536, 0x7fff_ffff, u32::MAX];
/// How many bytes a list may take for each byte of its message: elements are wider in memory than
/// on the wire (a slice is two words), and a vector that grows has twice what it needs and, for a
/// moment, its old half as well.
const LIST_FACTOR: u64 = 16;
/// What the smallest vectors take.
const LIST_BYTES: u64 = 1024;
/// What carrying out a call takes beside its reply: paths, attributes, a page of a directory.
const CALL_BYTES: u64 = 64 * 1024;

/// Random bytes (xorshift64*), the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

fn encoded(value: &impl Encode) -> Vec<u8> {
    args(|w| w.value(value))
}

fn args(write: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut Writer::new(&mut out));
    out
}

/// `message`, and what a hostile peer makes of it: every word changed, cut everywhere, noise.
fn hostile(message: &[u8]) -> Vec<Vec<u8>> {
    let mut all = vec![message.to_vec()];
    for at in (0..message.len().saturating_sub(3)).step_by(4) {
        all.push(message[..at].to_vec());
        for word in WORDS {
            let mut changed = message.to_vec();
            changed[at..at + 4].copy_from_slice(&word.to_be_bytes());
            all.push(changed);
        }
    }
    let mut noise = Noise(message.len() as u64 | 1);
    for _ in 0..200 {
        let len = noise.next() as usize % 400;
        all.push(noise.bytes(len));
    }
    all
}

/// Fails if decoding `message` or a hostile variant as `T` takes more than `bytes_max` allows.
fn decodes_within<T>(
    message: &[u8],
    bytes_max: impl Fn(usize) -> u64,
    decode: impl Fn(&[u8]) -> T,
) -> Result<()> {
    for message in hostile(message) {
        let taken = measure(|| drop(decode(&message))).bytes_max;
        let allowed = bytes_max(message.len());
        ensure!(
            taken <= allowed,
            "{}: {taken} bytes for {message:02x?}",
            std::any::type_name::<T>()
        );
    }
    Ok(())
}

const fn nothing(_: usize) -> u64 {
    0
}

const fn of_list(message_bytes: usize) -> u64 {
    LIST_BYTES + LIST_FACTOR * message_bytes as u64
}

fn call<'a>(program: (u32, u32, u32), cred: &'a [u8], args: &'a [u8]) -> Call<'a> {
    let (program, version, procedure) = program;
    Call {
        xid: 7,
        program,
        version,
        procedure,
        cred: OpaqueAuth {
            flavor: AUTH_SYS,
            body: cred,
        },
        verf: OpaqueAuth::NONE,
        args,
    }
}

fn superuser() -> Vec<u8> {
    let sys = AuthSys {
        stamp: 1,
        machine_name: b"host",
        uid: 0,
        gid: 0,
        gids: Gids::new([4, 5]),
    };
    args(|w| sys.encode(w))
}

fn message(call: &Call<'_>) -> Vec<u8> {
    args(|w| call.encode(w))
}

#[test]
fn the_allocator_counts() -> Result<()> {
    let taken = measure(|| drop(std::hint::black_box(vec![0u8; 1000])));
    ensure!(taken.bytes_max == 1000, "{taken:?}");
    Ok(())
}

#[test]
fn headers_and_credentials_take_nothing() -> Result<()> {
    let cred = superuser();
    let call = message(&call((program::NFS, 3, 1), &cred, &[0; 40]));
    decodes_within(&call, nothing, |bytes| Call::decode(bytes).is_ok())?;
    decodes_within(&call, nothing, |bytes| {
        let call = Call::decode(bytes).ok()?;
        Credential::decode(call.cred, call.verf).ok()?;
        Some(())
    })?;
    decodes_within(&cred, nothing, |bytes| AuthSys::decode(bytes).is_ok())?;
    let mut reply = Vec::new();
    havenfs_rpc::message::reply_rpc_mismatch(&mut Writer::new(&mut reply), 7);
    decodes_within(&reply, nothing, |bytes| {
        decode_all::<Reply<'_>>(bytes).is_ok()
    })
}

/// [`decodes_within`] for a type that is decoded from all of a message.
macro_rules! takes {
    ($bytes_max:ident, $type:ty, $message:expr) => {
        decodes_within($message, $bytes_max, |bytes| {
            decode_all::<$type>(bytes).is_ok()
        })
        .context(stringify!($type))?
    };
}

#[test]
fn the_portmappers_messages_take_nothing_and_its_lists_little() -> Result<()> {
    let mapping = Mapping {
        program: 1,
        version: 2,
        protocol: 6,
        port: 4,
    };
    let rpcb = Rpcb {
        program: 1,
        version: 2,
        netid: b"tcp",
        addr: b"192.0.2.1.8.1",
        owner: b"",
    };
    let netbuf = Netbuf {
        maxlen: 16,
        buf: &[9; 16],
    };
    let entry = RpcbEntry::new(havenfs_rpc::portmap::Netid::Udp6, b"::.0.111");
    takes!(nothing, Mapping, &encoded(&mapping));
    takes!(nothing, Rpcb<'_>, &encoded(&rpcb));
    takes!(nothing, Netbuf<'_>, &encoded(&netbuf));
    takes!(nothing, Uaddr<'_>, &encoded(&Uaddr(b"192.0.2.1.8.1")));
    takes!(of_list, List<Mapping>, &encoded(&List(vec![mapping; 20])));
    takes!(of_list, List<Rpcb<'_>>, &encoded(&List(vec![rpcb; 20])));
    takes!(
        of_list,
        List<RpcbEntry<'_>>,
        &encoded(&List(vec![entry; 20]))
    );
    // The densest lists: elements of nothing but empty strings.
    let words = args(|w| (0..300).for_each(|i| w.u32(u32::from(i % 6 == 0))));
    takes!(of_list, List<Rpcb<'_>>, &words);
    Ok(())
}

#[test]
fn arguments_of_nfs_take_nothing() -> Result<()> {
    let handle = args(|w| w.opaque(&[1; 40]));
    let dirop = args(|w| {
        w.opaque(&[1; 40]);
        w.opaque(b"name");
    });
    let words = [1, 0o644, 1, 0, 1, 0, 1, 0, 9, 1, 2, 3, 4];
    let sattr = args(|w| words.iter().for_each(|word| w.u32(*word)));
    takes!(nothing, FileHandle, &handle);
    takes!(nothing, nfs3::Diropargs3<'_>, &dirop);
    takes!(nothing, nfs3::Filename3<'_>, &args(|w| w.opaque(b"name")));
    takes!(nothing, Changes, &sattr);
    decodes_within(&args(|w| w.opaque(b"text")), nothing, |bytes| {
        nfs3::nfspath3(&mut Reader::new(bytes)).is_ok()
    })
}

#[test]
fn arguments_of_mount_take_nothing_and_its_lists_little() -> Result<()> {
    let body = mount::Mountbody {
        ml_hostname: b"host",
        ml_directory: b"/srv",
    };
    let export = mount::Exportnode {
        ex_dir: b"/srv",
        ex_groups: vec![mount::Groupnode { gr_name: b"*" }; 3],
    };
    let mounted = mount::Mountres3::Ok(mount::Mountres3Ok {
        fhandle: &[1; 40],
        auth_flavors: vec![1, 6],
    });
    takes!(
        nothing,
        mount::Dirpath<'_>,
        &encoded(&mount::Dirpath(b"/srv"))
    );
    takes!(of_list, mount::Mountres3<'_>, &encoded(&mounted));
    let bodies = encoded(&mount::Mountlist(vec![body; 20]));
    takes!(of_list, mount::Mountlist<'_>, &bodies);
    let exports = encoded(&mount::Exports(vec![export; 20]));
    takes!(of_list, mount::Exports<'_>, &exports);
    // The densest lists: exports of "" to nobody, and to one "" each.
    for period in [3, 5] {
        let words = args(|w| {
            for i in 0..300 {
                w.u32(u32::from(i % period == 0 || period == 5 && i % period == 2));
            }
        });
        takes!(of_list, mount::Exports<'_>, &words);
    }
    Ok(())
}

/// [`takes!`] with [`nothing`] for a type of the lock manager, in version 4 and in the older ones.
macro_rules! takes_nothing_in_all_versions {
    ($type:ty, $value:expr) => {
        takes!(nothing, $type, &encoded(&$value));
        takes!(nothing, Narrow<$type>, &encoded(&Narrow($value)));
        for version in NlmVersion::ALL {
            decodes_within(&encoded(&$value), nothing, |bytes| {
                version.decode::<$type>(bytes).is_ok()
            })?;
        }
    };
}

#[test]
fn messages_of_the_lock_manager_take_nothing() -> Result<()> {
    let cookie = &[0, 0, 0, 7];
    let (caller_name, fh, oh) = (b"client1".as_slice(), &[1; 40], b"7@client1".as_slice());
    let alock = nlm::Nlm4Lock {
        caller_name,
        fh,
        oh,
        svid: 7,
        l_offset: 10,
        l_len: 0,
    };
    let (block, exclusive, reclaim, state) = (true, true, false, 3);
    let stat = Nlm4Stats::Blocked;
    takes_nothing_in_all_versions!(
        nlm::Nlm4TestArgs<'_>,
        nlm::Nlm4TestArgs {
            cookie,
            exclusive,
            alock
        }
    );
    let lock = nlm::Nlm4LockArgs {
        cookie,
        block,
        exclusive,
        alock,
        reclaim,
        state,
    };
    takes_nothing_in_all_versions!(nlm::Nlm4LockArgs<'_>, lock);
    let cancel = nlm::Nlm4CancArgs {
        cookie,
        block,
        exclusive,
        alock,
    };
    takes_nothing_in_all_versions!(nlm::Nlm4CancArgs<'_>, cancel);
    takes_nothing_in_all_versions!(
        nlm::Nlm4UnlockArgs<'_>,
        nlm::Nlm4UnlockArgs { cookie, alock }
    );
    takes_nothing_in_all_versions!(nlm::Nlm4Res<'_>, nlm::Nlm4Res { cookie, stat });
    let holder = nlm::Nlm4Holder {
        exclusive,
        svid: 8,
        oh,
        l_offset: 0,
        l_len: 100,
    };
    let tested = nlm::Nlm4TestRes {
        cookie,
        stat: nlm::Nlm4TestRply::Denied(holder),
    };
    takes_nothing_in_all_versions!(nlm::Nlm4TestRes<'_>, tested);
    let share = nlm::Nlm4Share {
        caller_name,
        fh,
        oh,
        mode: nlm::Fsh4Mode::Dw,
        access: nlm::Fsh4Access::R,
    };
    takes_nothing_in_all_versions!(
        nlm::Nlm4ShareArgs<'_>,
        nlm::Nlm4ShareArgs {
            cookie,
            share,
            reclaim
        }
    );
    let shared = nlm::Nlm4ShareRes {
        cookie,
        stat,
        sequence: 0,
    };
    takes_nothing_in_all_versions!(nlm::Nlm4ShareRes<'_>, shared);
    let name = caller_name;
    takes_nothing_in_all_versions!(nlm::Nlm4Notify<'_>, nlm::Nlm4Notify { name, state });
    let told = nlm::NsmNotifyArgs {
        mon_name: name,
        state,
        private: [5; 16],
    };
    takes!(nothing, nlm::NsmNotifyArgs<'_>, &encoded(&told));
    Ok(())
}

#[test]
fn messages_of_the_status_monitor_take_nothing() -> Result<()> {
    let (mon_name, state) = (b"client1".as_slice(), 3);
    let my_id = nsm::MyId {
        my_name: b"server",
        my_prog: program::NLM,
        my_vers: 4,
        my_proc: 16,
    };
    let mon_id = nsm::MonId { mon_name, my_id };
    let mon = nsm::Mon {
        mon_id,
        private: [5; 16],
    };
    let answer = nsm::SmStatRes {
        res_stat: nsm::SmRes::StatSucc,
        state,
    };
    takes!(
        nothing,
        nsm::SmName<'_>,
        &encoded(&nsm::SmName { mon_name })
    );
    takes!(nothing, nsm::MyId<'_>, &encoded(&my_id));
    takes!(nothing, nsm::MonId<'_>, &encoded(&mon_id));
    takes!(nothing, nsm::Mon<'_>, &encoded(&mon));
    takes!(nothing, nsm::SmStatRes, &encoded(&answer));
    takes!(nothing, nsm::SmStat, &encoded(&nsm::SmStat { state }));
    let change = nsm::StatChge { mon_name, state };
    takes!(nothing, nsm::StatChge<'_>, &encoded(&change));
    Ok(())
}

/// Feeds a stream in pieces; returns whether it was refused.
fn feed(stream: &[u8], piece: usize, record_bytes_max: usize) -> bool {
    let mut reader = RecordReader::new(record_bytes_max);
    let mut rest = stream;
    while !rest.is_empty() {
        let (buffer, free) = reader.space();
        let (now, later) = rest.split_at(piece.min(free).min(rest.len()));
        buffer.extend_from_slice(now);
        rest = later;
        loop {
            match reader.next_record() {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return true,
            }
        }
    }
    false
}

#[test]
fn records_take_what_the_maximum_says_whatever_the_marks_say() -> Result<()> {
    const RECORD_BYTES_MAX: usize = 256 * 1024;
    const SHARED_BYTES: u64 = 64 * 1024;
    let mark = |last: bool, len: u32| (len | u32::from(last) << 31).to_be_bytes();
    // A length above the maximum: the buffer that every connection has, and no more.
    for len in [RECORD_BYTES_MAX as u32 + 1, 0x7fff_ffff] {
        for last in [false, true] {
            let mut refused = false;
            let taken = measure(|| refused = feed(&mark(last, len), 4, RECORD_BYTES_MAX));
            ensure!(
                refused && taken.bytes_max <= SHARED_BYTES,
                "{len}: {taken:?}"
            );
        }
    }
    // Fragments that add up to more than the maximum, and an endless row of them: a record that
    // grows has its old buffer and one of twice the size for a moment.
    for fragment_bytes in [0, 1, 100, 40_000] {
        let body = vec![7; fragment_bytes];
        let mut stream = Vec::new();
        for _ in 0..2 * RECORD_BYTES_MAX / fragment_bytes.max(1) {
            stream.extend(mark(false, fragment_bytes as u32));
            stream.extend(&body);
        }
        let mut refused = false;
        let taken = measure(|| refused = feed(&stream, 5000, RECORD_BYTES_MAX)).bytes_max;
        let allowed = SHARED_BYTES + 3 * RECORD_BYTES_MAX as u64;
        ensure!(taken <= allowed, "fragments of {fragment_bytes}: {taken}");
        ensure!(
            refused == (fragment_bytes > 0),
            "fragments of {fragment_bytes}"
        );
    }
    // Noise.
    let mut noise = Noise(1);
    for _ in 0..500 {
        let mut stream = noise.bytes(300);
        // Most marks that are noise are far too long.
        stream[0] &= 0x80;
        let taken = measure(|| {
            feed(&stream, 50, RECORD_BYTES_MAX);
        });
        let taken = taken.bytes_max;
        let allowed = SHARED_BYTES + 3 * RECORD_BYTES_MAX as u64;
        ensure!(taken <= allowed, "{taken}");
    }
    Ok(())
}

/// A server without sockets and with one export.
fn node(state_dir: &Path, exported: &Path) -> Result<Node> {
    let mut argument = exported.as_os_str().as_bytes().to_vec();
    argument.extend(b":*(rw,async,insecure,no_root_squash)");
    let sources = Sources {
        file: None,
        directory: None,
        arguments: vec![argument],
    };
    let numbers = Numbering::in_memory();
    let specs = volumes::read_lists(&sources)?;
    let exports = volumes::load_table(specs, &numbers)?;
    let node = Node::new(Parts {
        gate: Arc::new(Gate::open_for_good()),
        mounts: MountList::open(state_dir)?,
        handle_keys: vec![HandleKey {
            id: 1,
            secret: [7; 16],
        }],
        numbers,
        handles: HandleTable::load(state_dir)?,
        exports,
        descriptors: 1024,
        floats: false,
        guard: None,
        storage_use: Arc::default(),
    })?;
    volumes::open_exports(&node)?;
    Ok(node)
}

/// Carries a message out as the server does; returns the reply.
fn carry_out(node: &Node, port: Port, message: &[u8]) -> Result<Vec<u8>> {
    let origin = Origin::new(
        "127.0.0.1:700".parse()?,
        "127.0.0.1:111".parse()?,
        Transport::Tcp,
    );
    let mut out = Vec::new();
    match Call::decode(message) {
        Err(error) => drop(dispatch::refuse(node, error, &mut out)),
        Ok(call) => {
            for mode in [Mode::Inline, Mode::Worker] {
                let clock = &mut Instant::now();
                let served = dispatch::serve(node, port, &origin, mode, &call, clock, &mut out);
                if !matches!(served, Served::Wait) {
                    break;
                }
            }
        }
    }
    Ok(out)
}

#[test]
fn a_call_takes_what_its_reply_may_hold() -> Result<()> {
    let (state, exported) = (tempfile::tempdir()?, tempfile::tempdir()?);
    std::fs::write(exported.path().join("file"), vec![7; 100_000])?;
    let node = node(state.path(), exported.path())?;
    let cred = superuser();
    let dirpath = encoded(&mount::Dirpath(exported.path().as_os_str().as_bytes()));
    let mnt = message(&call((program::MOUNT, 3, 1), &cred, &dirpath));
    let reply = carry_out(&node, Port::Mount, &mnt)?;
    let reply = Reply::decode(&mut Reader::new(&reply))?;
    let mount::Mountres3::Ok(mounted) = decode_all(reply.results)? else {
        anyhow::bail!("MNT: {reply:?}");
    };
    let root = mounted.fhandle.to_vec();
    let mut calls = vec![(Port::Mount, mnt)];
    for procedure in 1..22 {
        let args = args(|w| {
            w.opaque(&root);
            if matches!(procedure, 3 | 8..=15) {
                w.opaque(b"file");
            }
            // Offsets, counts, sizes and lengths of every procedure.
            (0..8).for_each(|_| w.u32(0));
        });
        calls.push((
            Port::Nfs,
            message(&call((program::NFS, 3, procedure), &cred, &args)),
        ));
    }
    for procedure in 1..13 {
        let args = encoded(&Uaddr(b"192.0.2.1.8.1"));
        let call = call((program::PORTMAP, 4, procedure), &cred, &args);
        calls.push((Port::Portmap, message(&call)));
    }
    for (port, call) in calls {
        for message in hostile(&call) {
            let mut reply = Ok(Vec::new());
            let taken = measure(|| reply = carry_out(&node, port, &message)).bytes_max;
            // READ and READDIR reserve what was asked for, up to the longest transfer.
            let asked = message
                .last_chunk()
                .map_or(0, |word| u32::from_be_bytes(*word));
            let reply_bytes_max = asked.min(TRANSFER_BYTES_MAX).max(reply?.len() as u32);
            let allowed = CALL_BYTES + 3 * u64::from(reply_bytes_max) + of_list(message.len());
            ensure!(taken <= allowed, "{taken} bytes for {message:02x?}");
        }
    }
    // The calls changed who this thread is and who may enter the folder, which is removed now.
    credential::as_server();
    std::fs::set_permissions(exported.path(), Permissions::from_mode(0o700))?;
    Ok(())
}
