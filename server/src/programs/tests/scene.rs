//! A server without sockets on directories of its own, and the judge of what it answers.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use havenfs_rpc::message::{AcceptStat, Call, Reply, ReplyOutcome};
use havenfs_rpc::portmap::{Netid, procedure as portmap};
use havenfs_rpc::program;
use havenfs_rpc::xdr::{Decode as _, Reader};
use tempfile::TempDir;

use super::samples::{Sample, args, encoded, mount_call, nfs_call, put_dirop};
use crate::backend::credential;
use crate::backend::handle::HandleKey;
use crate::backend::table::HandleTable;
use crate::call::{Mode, Origin, Port, Served, Transport};
use crate::dispatch;
use crate::export::Sources;
use crate::gate::Gate;
use crate::mount_list::MountList;
use crate::node::{Node, Parts};
use crate::numbering::Numbering;
use crate::programs::UDP_LIST_BYTES_MAX;
use crate::programs::mount::wire::{Dirpath, Mountres3, procedure as mount};
use crate::programs::nfs3::TRANSFER_BYTES_MAX;
use crate::programs::nfs3::wire::Nfsstat3;
use crate::programs::portmap::PortEntry;
use crate::volumes;

/// The header of a reply and results without data, text or entries.
const SMALL_REPLY_BYTES: usize = 512;
/// The longest text of a symbolic link, with its padding.
const LINK_TEXT_BYTES: usize = 4096;
/// The most data in a datagram.
const UDP_TRANSFER_BYTES_MAX: u32 = 32 * 1024;
/// What the lists of MOUNT and the portmapper come to with all that these tests register.
const LIST_BYTES: usize = 128 * 1024;
/// What is in the buffer before a reply, which must stay there.
const BEFORE: [u8; 8] = *b"earlier.";

/// A server without sockets on directories of its own.
pub(super) struct Scene {
    node: Node,
    exported: TempDir,
    _state: TempDir,
    pub(super) root: Vec<u8>,
    pub(super) file: Vec<u8>,
    /// A file that is longer than the longest READ.
    pub(super) large: Vec<u8>,
    pub(super) link: Vec<u8>,
}

impl Scene {
    pub(super) fn new() -> Self {
        let (state_dir, exported) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(exported.path().join("file"), "content").unwrap();
        std::fs::write(exported.path().join("removed"), "").unwrap();
        std::fs::write(exported.path().join("renamed"), "").unwrap();
        std::fs::create_dir(exported.path().join("folder")).unwrap();
        let large = std::fs::File::create(exported.path().join("large")).unwrap();
        large.set_len(2 * u64::from(TRANSFER_BYTES_MAX)).unwrap();
        // The longest text that the kernel keeps.
        let text = "t".repeat(LINK_TEXT_BYTES - 1);
        symlink(text, exported.path().join("link")).unwrap();
        let mut scene = Self {
            node: node(
                state_dir.path(),
                exported.path(),
                Gate::open_for_good(),
                false,
            ),
            exported,
            _state: state_dir,
            root: Vec::new(),
            file: Vec::new(),
            large: Vec::new(),
            link: Vec::new(),
        };
        let reply = scene.results(&mount_call(3, mount::MNT, scene.dirpath()));
        let Mountres3::Ok(mounted) = Mountres3::decode(&mut Reader::new(&reply)).unwrap() else {
            panic!("MNT: {reply:?}");
        };
        scene.root = mounted.fhandle.to_vec();
        scene.file = scene.look_up("file");
        scene.large = scene.look_up("large");
        scene.link = scene.look_up("link");
        scene
    }

    pub(super) fn dirpath(&self) -> Vec<u8> {
        encoded(&Dirpath(self.exported.path().as_os_str().as_bytes()))
    }

    fn look_up(&self, name: &str) -> Vec<u8> {
        let args = args(|w| put_dirop(w, &self.root, name));
        let reply = self.results(&nfs_call(3, args, Nfsstat3::Ok));
        let mut reader = Reader::new(&reply);
        assert_eq!(reader.u32(), Ok(0), "LOOKUP {name}");
        reader.opaque(64).unwrap().to_vec()
    }

    /// Sends a proper call, which must be accepted; returns its results.
    pub(super) fn results(&self, sample: &Sample) -> Vec<u8> {
        let reply = self.ask(sample.port, Transport::Tcp, &sample.message());
        let reply = reply.expect("a reply");
        let reply = Reply::decode(&mut Reader::new(&reply)).unwrap();
        let success = ReplyOutcome::Accepted(AcceptStat::Success);
        assert_eq!(reply.outcome, success, "{sample:?}");
        reply.results.to_vec()
    }

    /// Gives the server a message as a connection or socket does, and judges what comes back.
    /// `None` is the silence that is documented: no call, or a call to be forwarded.
    pub(super) fn ask(&self, port: Port, transport: Transport, message: &[u8]) -> Option<Vec<u8>> {
        // On this machine anyone may change the portmapper's table, from elsewhere nobody.
        let (peer, local) = match transport {
            Transport::Tcp => ("127.0.0.1:700", "127.0.0.1:111"),
            Transport::Udp => ("192.0.2.7:40000", "192.0.2.1:111"),
        };
        let origin = Origin::new(peer.parse().unwrap(), local.parse().unwrap(), transport);
        let mut out = BEFORE.to_vec();
        let (answered, reply_bytes_max) = match Call::decode(message) {
            Err(error) => {
                let answered = dispatch::refuse(&self.node, error, &mut out);
                // A message type of its own, or none, is no call.
                assert_eq!(answered, message.get(4..8) == Some(&[0; 4]), "{error:?}");
                (answered, SMALL_REPLY_BYTES)
            }
            Ok(call) => {
                let mut serve = |mode| {
                    let (node, clock) = (&self.node, &mut Instant::now());
                    dispatch::serve(node, port, &origin, mode, &call, clock, &mut out)
                };
                let mut served = serve(Mode::Inline);
                if matches!(served, Served::Wait) {
                    served = serve(Mode::Worker);
                }
                let answered = match served {
                    Served::Replied => true,
                    Served::Silent => false,
                    Served::Wait | Served::Pending | Served::Propose(_) => {
                        panic!("{served:?}: {call:?}")
                    }
                };
                assert!(answered || may_be_silent(port, &call), "silent: {call:?}");
                (answered, reply_bytes_max(&call, transport))
            }
        };
        let reply = out.strip_prefix(&BEFORE).expect("earlier replies stay");
        if !answered {
            assert!(reply.is_empty(), "silence leaves nothing behind");
            return None;
        }
        assert!(
            reply.len() <= reply_bytes_max && reply.len().is_multiple_of(4),
            "{} bytes answer {message:02x?}",
            reply.len()
        );
        let header = Reply::decode(&mut Reader::new(reply)).expect("a reply");
        assert_eq!(Some(&header.xid.to_be_bytes()), message.first_chunk());
        let success = header.outcome == ReplyOutcome::Accepted(AcceptStat::Success);
        assert!(success || header.results.is_empty(), "results of a refusal");
        Some(reply.to_vec())
    }

    /// Sends a message and returns what became of it.
    pub(super) fn outcome(&self, sample: &Sample, message: &[u8]) -> Option<ReplyOutcome> {
        let reply = self.ask(sample.port, Transport::Tcp, message)?;
        Some(Reply::decode(&mut Reader::new(&reply)).unwrap().outcome)
    }
}

impl Drop for Scene {
    /// Makes what was changed by random SETATTRs removable.
    fn drop(&mut self) {
        credential::as_server();
        // What can't be made removable stays in the folder for temporary files.
        let open = |path: &Path| {
            let _ = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700));
        };
        open(self.exported.path());
        let entries = std::fs::read_dir(self.exported.path());
        for entry in entries.into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open(&entry.path());
            }
        }
    }
}

/// What `serve` puts together, without sockets and with one export that all may write.
pub(crate) fn node(state_dir: &Path, exported: &Path, gate: Gate, floats: bool) -> Node {
    let mut argument = exported.as_os_str().as_bytes().to_vec();
    // `async`: nothing here is about what survives.
    argument.extend(b":*(rw,async,insecure,no_root_squash)");
    let sources = Sources {
        file: None,
        directory: None,
        arguments: vec![argument],
    };
    let numbers = Numbering::in_memory();
    let specs = volumes::read_lists(&sources).unwrap();
    let exports = volumes::load_table(specs, &numbers).unwrap();
    let node = Node::new(Parts {
        gate: Arc::new(gate),
        mounts: MountList::open(state_dir).unwrap(),
        handle_keys: vec![HandleKey {
            id: 1,
            secret: [7; 16],
        }],
        numbers,
        handles: HandleTable::load(state_dir).unwrap(),
        exports,
        descriptors: 1024,
        floats,
        guard: None,
        storage_use: Arc::default(),
    })
    .unwrap();
    let own = Netid::ALL.map(|netid| PortEntry::own(program::NFS, 3, netid, 2049));
    node.ports.set_own(own);
    volumes::open_exports(&node).unwrap();
    node
}

/// The calls that are never answered: those that a portmapper should forward.
fn may_be_silent(port: Port, call: &Call<'_>) -> bool {
    port == Port::Portmap && call.program == program::PORTMAP && call.procedure == portmap::BCAST
}

/// How long the reply to a call may be: the last argument of READ, READDIR and READDIRPLUS says
/// what the client has room for.
fn reply_bytes_max(call: &Call<'_>, transport: Transport) -> usize {
    let asked = || {
        call.args
            .last_chunk()
            .map_or(0, |word| u32::from_be_bytes(*word))
    };
    let more = match (call.program, call.procedure) {
        (program::NFS, 5) => LINK_TEXT_BYTES,
        (program::NFS, 6 | 16 | 17) => match transport {
            Transport::Tcp => asked().min(TRANSFER_BYTES_MAX) as usize,
            Transport::Udp => asked().min(UDP_TRANSFER_BYTES_MAX) as usize,
        },
        (program::MOUNT, mount::DUMP | mount::EXPORT) => LIST_BYTES,
        (program::PORTMAP, portmap::DUMP | portmap::GETADDRLIST) => match transport {
            Transport::Tcp => LIST_BYTES,
            Transport::Udp => UDP_LIST_BYTES_MAX,
        },
        _ => 0,
    };
    SMALL_REPLY_BYTES + more
}
