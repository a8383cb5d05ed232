//! MOUNT versions 1, 2 and 3: from a path to the first file handle.
//!
//! MNT walks from the root of the export to a directory inside it, name by name, as the caller
//! and without following symbolic links, so that it gives out nothing that LOOKUP would not. The
//! mount list is advisory (RFC 1813 5): access is judged on every NFS call and never by it, and it
//! is saved a little later.
//!
//! Version 1 hands out 32-byte handles, which only NFS version 2 uses; its MNT is refused, and its
//! other procedures, which `showmount` uses, are those of version 3.

pub mod wire;

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::sync::Arc;

use havenfs_rpc::auth::AUTH_SYS;
use havenfs_rpc::xdr::{Writer, decode_all};
use rustix::io::Errno;

use self::wire::{
    Dirpath, Exportnode, Fhstatus, Groupnode, Mountbody, Mountres3, Mountres3Ok, Mountstat3,
    procedure,
};
use crate::backend::handle::FileHandle;
use crate::backend::{Failure, Mode};
use crate::call::{Origin, Refusal, Request};
use crate::export::{Export, Options, Verdict};
use crate::node::Node;
use crate::programs::{nfs3, write_list};
use crate::volumes;

/// Serves one call of MOUNT.
///
/// # Errors
/// Why there are no results.
pub fn serve(node: &Node, request: &Request<'_>, writer: &mut Writer<'_>) -> Result<(), Refusal> {
    match request.procedure {
        procedure::MNT => {
            let path: Dirpath<'_> = decode_all(request.args)?;
            if request.version < 3 {
                writer.value(&Fhstatus::Err(Mountstat3::Acces as u32));
                return Ok(());
            }
            if request.mode == Mode::Inline {
                let exports = node.exports.load();
                if let Some((export, _)) = exports.by_path(to_path(normal(path.0))) {
                    // Not on a worker: those are for the disk.
                    admitted(node, request, export)?;
                }
                return Err(Refusal::Wait);
            }
            mnt(node, request, path.0, writer)
        }
        procedure::DUMP => {
            decode_all::<()>(request.args)?;
            dump(node, request.origin, writer);
            Ok(())
        }
        // UMNT and UMNTALL (RFC 1813 5.2.3, 5.2.4): only ever entries of the caller.
        procedure::UMNT => {
            let path: Dirpath<'_> = decode_all(request.args)?;
            node.mounts.remove(request.origin.host(), normal(path.0));
            Ok(())
        }
        procedure::UMNTALL => {
            decode_all::<()>(request.args)?;
            node.mounts.remove_all(request.origin.host());
            Ok(())
        }
        procedure::EXPORT => {
            decode_all::<()>(request.args)?;
            export_list(node, request.origin, writer);
            Ok(())
        }
        _ => Err(Refusal::ProcUnavail),
    }
}

/// The path without slashes at its end; nothing means the root.
fn normal(path: &[u8]) -> &[u8] {
    let end = path
        .iter()
        .rposition(|byte| *byte != b'/')
        .map_or(0, |last| last + 1);
    match path.get(..end) {
        None | Some([]) => b"/",
        Some(path) => path,
    }
}

fn to_path(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

/// RFC 1813 5.2.1.
fn mnt(
    node: &Node,
    request: &Request<'_>,
    path: &[u8],
    writer: &mut Writer<'_>,
) -> Result<(), Refusal> {
    let path = normal(path);
    let found = find(node, request, to_path(path))?;
    match &found {
        Ok(handle) => {
            node.mounts.add(request.origin.host(), path);
            writer.value(&Mountres3::Ok(Mountres3Ok {
                fhandle: handle.as_slice(),
                auth_flavors: vec![AUTH_SYS],
            }));
        }
        Err(status) => {
            tracing::info!(
                peer = %request.origin.peer,
                path = %path.escape_ascii(),
                ?status,
                "mount refused"
            );
            writer.value(&Mountres3::Err(*status));
        }
    }
    Ok(())
}

/// Finds the directory that a client wants to mount.
fn find(
    node: &Node,
    request: &Request<'_>,
    path: &Path,
) -> Result<Result<FileHandle, Mountstat3>, Refusal> {
    let exports = node.exports.load_full();
    let Some((export, inside)) = exports.by_path(path) else {
        return Ok(Err(Mountstat3::Noent));
    };
    let Some(options) = admitted(node, request, export)? else {
        return Ok(Err(Mountstat3::Acces));
    };
    if !options.admits_port(request.origin.peer.port()) {
        node.metrics
            .refused_port(&request.origin.peer, &export.spec.path);
        return Ok(Err(Mountstat3::Acces));
    }
    // The group list of a user is still being looked up: the client asks again.
    let caller = nfs3::caller(node, &request.credential, &options).map_err(|_| Refusal::Silence)?;
    let Some(volume) = node.files.volume(export.id, 0) else {
        // Not open yet, or its directory has gone: never a lasting "no" (protocol of takeovers).
        return Err(Refusal::Silence);
    };
    let walk = || -> Result<FileHandle, Failure> {
        let mut dir = node.files.open_root(&volume)?;
        for component in inside.components() {
            let Component::Normal(name) = component else {
                continue;
            };
            let name = CString::new(name.as_bytes()).map_err(|_| Failure::Os(Errno::NOENT))?;
            let attributes = dir.attributes()?;
            let found = node
                .files
                .lookup(&dir, &attributes, &name, &caller, Mode::Worker);
            dir = match found {
                Err(Failure::Os(Errno::XDEV)) => volumes::cross(
                    node,
                    &exports,
                    &dir,
                    &name,
                    options.crossmnt,
                    request.origin.host(),
                )?,
                found => found?,
            };
        }
        dir.must_be_dir()?;
        Ok(Arc::clone(&dir).handle)
    };
    Ok(walk().map_err(|failure| match failure {
        Failure::Os(Errno::ACCESS | Errno::PERM) => Mountstat3::Acces,
        Failure::Os(Errno::NOENT) | Failure::Stale => Mountstat3::Noent,
        Failure::Os(Errno::NOTDIR | Errno::LOOP) => Mountstat3::Notdir,
        Failure::Os(Errno::NAMETOOLONG) => Mountstat3::Nametoolong,
        _ => Mountstat3::Io,
    }))
}

/// The options for this peer.
///
/// # Errors
/// [`Refusal::Pending`] while the name of a host is being looked up: a refusal would stick.
fn admitted(
    node: &Node,
    request: &Request<'_>,
    export: &Export,
) -> Result<Option<Options>, Refusal> {
    match export.policy(request.origin.host(), &node.names) {
        Verdict::Allowed(rule) => Ok(Some(rule.options)),
        Verdict::Refused => Ok(None),
        Verdict::Pending => Err(Refusal::Pending),
    }
}

/// RFC 1813 5.2.2.
fn dump(node: &Node, origin: &Origin, writer: &mut Writer<'_>) {
    let entries = node.mounts.entries();
    let hosts: Vec<String> = entries.iter().map(|entry| entry.host.to_string()).collect();
    let list = entries.iter().zip(&hosts).map(|(entry, host)| Mountbody {
        ml_hostname: host.as_bytes(),
        ml_directory: &entry.path,
    });
    write_list(origin, writer, list);
}

/// RFC 1813 5.2.5.
fn export_list(node: &Node, origin: &Origin, writer: &mut Writer<'_>) {
    let exports = node.exports.load();
    let groups: Vec<Vec<String>> = exports
        .exports()
        .iter()
        .map(|export| {
            export
                .spec
                .rules
                .iter()
                .map(|rule| rule.client.to_string())
                .collect()
        })
        .collect();
    let list = exports
        .exports()
        .iter()
        .zip(&groups)
        .map(|(export, groups)| Exportnode {
            ex_dir: export.spec.path.as_os_str().as_bytes(),
            ex_groups: groups
                .iter()
                .map(|group| Groupnode {
                    gr_name: group.as_bytes(),
                })
                .collect(),
        });
    write_list(origin, writer, list);
}
