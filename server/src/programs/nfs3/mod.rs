//! NFS version 3: one function per procedure, in the order of RFC 1813 3.3.
//!
//! A procedure decodes its arguments whole, resolves its handles under the export's rules,
//! asks the backend, and appends its results. Every failure that has attributes in its results
//! carries them.

mod attr;
mod dir;
mod io;
mod readdir;
pub mod wire;

use std::sync::Arc;

use havenfs_rpc::auth::{Credential, Gids};
use havenfs_rpc::xdr::{Reader, Writer};
use rustix::io::Errno;

use crate::backend::Failure;
use crate::backend::attributes::Attributes;
use crate::backend::credential::{self, Caller, Groups};
use crate::backend::file::File;
use crate::backend::handle::FileHandle;
use crate::call::{Mode, Refusal, Request, Transport};
use crate::export::{ExportTable, Options, Verdict};
use crate::node::Node;
use wire::{FATTR3_BYTES, Fail, Nfsstat3, fattr3, put_post_op_attr, put_wcc_data};

/// The most bytes that a READ returns or a WRITE takes.
pub const TRANSFER_BYTES_MAX: u32 = 1024 * 1024;

/// The same over UDP, where a reply must fit into one datagram.
const UDP_TRANSFER_BYTES_MAX: u32 = 32 * 1024;

/// The procedures of RFC 1813 3.3, by number.
pub const PROCEDURES: [&str; 22] = [
    "NULL",
    "GETATTR",
    "SETATTR",
    "LOOKUP",
    "ACCESS",
    "READLINK",
    "READ",
    "WRITE",
    "CREATE",
    "MKDIR",
    "SYMLINK",
    "MKNOD",
    "REMOVE",
    "RMDIR",
    "RENAME",
    "LINK",
    "READDIR",
    "READDIRPLUS",
    "FSSTAT",
    "FSINFO",
    "PATHCONF",
    "COMMIT",
];

/// Serves one call of NFS.
///
/// # Errors
/// Why there are no results.
pub fn serve(node: &Node, request: &Request<'_>, writer: &mut Writer<'_>) -> Result<(), Refusal> {
    let exports = node.exports.load();
    let call = Nfs3 {
        node,
        request,
        exports: &exports,
    };
    let args = Reader::new(request.args);
    match request.procedure {
        1 => call.getattr(args, writer),
        3 => call.lookup(args, writer),
        4 => call.access(args, writer),
        6 => call.read(args, writer),
        5 => call.readlink(args, writer),
        19 => call.fsinfo(args, writer),
        22.. => Err(Refusal::ProcUnavail),
        // What changes anything, lists a directory or asks the file system always may wait.
        _ if request.mode == Mode::Inline => Err(Refusal::Wait),
        2 => call.setattr(args, writer),
        7 => call.write(args, writer),
        8 => call.create(args, writer),
        9 => call.mkdir(args, writer),
        10 => call.symlink(args, writer),
        11 => call.mknod(args, writer),
        12 => call.remove(args, writer),
        13 => call.rmdir(args, writer),
        14 => call.rename(args, writer),
        15 => call.link(args, writer),
        16 => call.readdir(args, writer),
        17 => call.readdirplus(args, writer),
        18 => call.fsstat(args, writer),
        20 => call.pathconf(args, writer),
        21 => call.commit(args, writer),
        0 => Ok(()),
    }
}

/// Appends the results of a procedure that is to be called again later, without attributes.
pub fn put_off(procedure: u32, writer: &mut Writer<'_>) {
    writer.u32(Nfsstat3::Jukebox as u32);
    // `wcc_data` is two of `attributes_follow`, `post_op_attr` is one.
    let absent = match procedure {
        1 => 0,
        2 | 7..=13 | 21 => 2,
        14 => 4,
        15 => 3,
        _ => 1,
    };
    for _ in 0..absent {
        writer.u32(0);
    }
}

/// One call with what all procedures need.
struct Nfs3<'a> {
    node: &'a Node,
    request: &'a Request<'a>,
    exports: &'a ExportTable,
}

/// A handle that was resolved: the file, and what the caller may do with it.
struct Target {
    file: Arc<File>,
    caller: Caller,
    options: Options,
}

/// A [`Target`] with its attributes, as they are and as clients see them.
struct Seen {
    target: Target,
    attributes: Attributes,
    attr: [u8; FATTR3_BYTES],
}

impl Target {
    /// Succeeds if the peer may change what is in the export.
    ///
    /// # Errors
    /// ROFS where the export is read-only for this peer.
    fn may_change(&self) -> Result<(), Fail> {
        if self.options.read_only {
            Err(Nfsstat3::RoFs.into())
        } else {
            Ok(())
        }
    }
}

impl Nfs3<'_> {
    /// Succeeds unless an operator has the writes of this host to this file refused, since a lock
    /// of it was broken. A write that is with the kernel already when it is said still lands.
    ///
    /// # Errors
    /// ACCES.
    fn may_write(&self, handle: &FileHandle) -> Result<(), Failure> {
        let host = self.request.origin.host();
        let key = || self.node.files.lock_key(handle).ok();
        let locks = self.node.locks.get();
        if locks.is_some_and(|locks| locks.refuses_writes(host, key)) {
            return Err(Errno::ACCESS.into());
        }
        Ok(())
    }

    /// Opens a handle under the rules of its export.
    ///
    /// # Errors
    /// BADHANDLE; STALE if the file or its export is gone; ACCES if no rule is for this peer; PERM
    /// if the source port must be reserved and is not; JUKEBOX while a name is being looked up.
    fn target(&self, handle: &FileHandle) -> Result<Target, Fail> {
        let file = match self.node.files.open(handle, self.request.mode) {
            Err(Failure::Stale) if self.node.awaits_volume_of(handle) => {
                return Err(Nfsstat3::Jukebox.into());
            }
            file => file?,
        };
        let (options, caller) = self.admit(file.volume.export_id)?;
        Ok(Target {
            file,
            caller,
            options,
        })
    }

    /// [`Nfs3::target`] with its attributes.
    fn see(&self, handle: &FileHandle) -> Result<Seen, Fail> {
        let target = self.target(handle)?;
        let attributes = self.note(handle, target.file.attributes())?;
        Ok(Seen {
            attr: encode(&target.file, &attributes),
            target,
            attributes,
        })
    }

    fn admit(&self, export_id: u32) -> Result<(Options, Caller), Fail> {
        let export = self.exports.by_id(export_id).ok_or(Nfsstat3::Stale)?;
        let rule = match export.policy(self.request.origin.host(), &self.node.names) {
            Verdict::Allowed(rule) => rule,
            Verdict::Refused => return Err(Nfsstat3::Acces.into()),
            Verdict::Pending => return Err(Nfsstat3::Jukebox.into()),
        };
        if !rule.options.admits_port(self.request.origin.peer.port()) {
            self.node
                .metrics
                .refused_port(&self.request.origin.peer, &export.spec.path);
            return Err(Nfsstat3::Perm.into());
        }
        let caller = caller(self.node, &self.request.credential, &rule.options)?;
        Ok((rule.options, caller))
    }

    /// The most data in one reply; over UDP what a datagram holds.
    fn transfer_bytes_max(&self) -> u32 {
        match self.request.origin.transport {
            Transport::Tcp => TRANSFER_BYTES_MAX,
            Transport::Udp => UDP_TRANSFER_BYTES_MAX,
        }
    }

    /// Forgets a file whose last name is gone, so that the cache does not keep it alive.
    fn note<T>(&self, handle: &FileHandle, result: Result<T, Failure>) -> Result<T, Fail> {
        if matches!(result, Err(Failure::Stale)) {
            self.node.files.forget(handle);
        }
        Ok(result?)
    }
}

/// The attributes of a file as clients see them.
fn encode(file: &File, attributes: &Attributes) -> [u8; FATTR3_BYTES] {
    fattr3(attributes, file.fsid(attributes))
}

/// The attributes of a file now, if they can be had.
fn attr_of(file: &File) -> Option<[u8; FATTR3_BYTES]> {
    file.attributes()
        .ok()
        .map(|attributes| encode(file, &attributes))
}

/// Whom a call acts as.
///
/// # Errors
/// JUKEBOX while the caller's groups are being looked up.
pub fn caller(
    node: &Node,
    credential: &Credential<'_>,
    options: &Options,
) -> Result<Caller, Nfsstat3> {
    if !credential::can_switch() {
        return Ok(credential::own_caller().clone());
    }
    let Credential::Sys(sys) = credential else {
        let (uid, gid) = options.anonymous();
        return Ok(Caller {
            uid,
            gid,
            groups: Groups::Wire(Gids::default()),
        });
    };
    let (uid, gid) = options.squash(sys.uid, sys.gid);
    let groups = if options.manage_gids {
        let resolved = node.groups.of(sys.uid).ok_or(Nfsstat3::Jukebox)?;
        if options.keeps_groups(&resolved) {
            Groups::Resolved(resolved)
        } else {
            Groups::Resolved(options.squash_groups(&resolved).collect())
        }
    } else {
        Groups::Wire(Gids::new(options.squash_groups(sys.gids.as_slice())))
    };
    Ok(Caller { uid, gid, groups })
}

/// Appends the status and then the results of success or failure.
///
/// # Errors
/// [`Refusal::Wait`] if the procedure may have to wait; then nothing was appended.
fn conclude<T>(
    writer: &mut Writer<'_>,
    result: Result<T, Fail>,
    on_success: impl FnOnce(&mut Writer<'_>, T),
    on_failure: impl FnOnce(&mut Writer<'_>),
) -> Result<(), Refusal> {
    match result {
        Ok(value) => {
            writer.u32(Nfsstat3::Ok as u32);
            on_success(writer, value);
        }
        Err(Fail::Wait) => return Err(Refusal::Wait),
        Err(Fail::Silence) => return Err(Refusal::Silence),
        Err(Fail::Status(status)) => {
            writer.u32(status as u32);
            on_failure(writer);
        }
    }
    Ok(())
}

/// [`conclude`] for results that begin with the attributes of one object, failed or not.
fn with_attr<T>(
    writer: &mut Writer<'_>,
    attr: Option<&[u8; FATTR3_BYTES]>,
    result: Result<T, Fail>,
    on_success: impl FnOnce(&mut Writer<'_>, T),
) -> Result<(), Refusal> {
    let put = |writer: &mut Writer<'_>| put_post_op_attr(writer, attr);
    let succeed = |writer: &mut Writer<'_>, value| {
        put(writer);
        on_success(writer, value);
    };
    conclude(writer, result, succeed, put)
}

/// [`conclude`] for results that begin with the weak cache data of one object, failed or not.
fn with_wcc<T>(
    writer: &mut Writer<'_>,
    attr: Option<&[u8; FATTR3_BYTES]>,
    result: Result<T, Fail>,
    on_success: impl FnOnce(&mut Writer<'_>, T),
) -> Result<(), Refusal> {
    let put = |writer: &mut Writer<'_>| put_wcc_data(writer, attr);
    let succeed = |writer: &mut Writer<'_>, value| {
        put(writer);
        on_success(writer, value);
    };
    conclude(writer, result, succeed, put)
}
