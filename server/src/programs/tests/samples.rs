//! Proper calls of all procedures of all programs: what the tests send, cut and change.

use havenfs_rpc::auth::{AUTH_SYS, AuthSys, Gids, OpaqueAuth};
use havenfs_rpc::message::Call;
use havenfs_rpc::portmap::{Mapping, Netbuf, Rpcb, Uaddr, procedure as portmap};
use havenfs_rpc::program;
use havenfs_rpc::xdr::{Encode, Writer};

use super::scene::Scene;
use crate::call::Port;
use crate::programs::mount::wire::procedure as mount;
use crate::programs::nfs3::wire::Nfsstat3;

const XID: u32 = 0x1234_5678;

/// A proper call.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(super) port: Port,
    pub(super) program: u32,
    pub(super) version: u32,
    pub(super) procedure: u32,
    pub(super) args: Vec<u8>,
    /// What NFS answers.
    pub(super) status: Nfsstat3,
}

impl Sample {
    /// The call of a superuser with its header.
    pub(crate) fn message(&self) -> Vec<u8> {
        message(self.program, self.version, self.procedure, &self.args)
    }

    pub(super) fn call_is_forwarded(&self) -> bool {
        self.program == program::PORTMAP && self.procedure == portmap::BCAST
    }
}

impl Scene {
    /// Proper calls of all procedures of all programs.
    pub(super) fn samples(&self) -> Vec<Sample> {
        let mut samples = self.nfs_samples();
        let path = self.dirpath();
        for version in 1..=3 {
            for procedure in [0, mount::DUMP, mount::UMNTALL, mount::EXPORT] {
                samples.push(mount_call(version, procedure, Vec::new()));
            }
            for procedure in [mount::MNT, mount::UMNT] {
                samples.push(mount_call(version, procedure, path.clone()));
            }
        }
        samples.extend(portmap_samples());
        samples
    }

    fn nfs_samples(&self) -> Vec<Sample> {
        let (root, file) = (self.root.as_slice(), self.file.as_slice());
        let handle = |fh: &[u8]| args(|w| w.opaque(fh));
        let dirop = |name: &str| args(|w| put_dirop(w, root, name));
        let made = |name: &str, rest: &dyn Fn(&mut Writer<'_>)| {
            args(|w| {
                put_dirop(w, root, name);
                rest(w);
            })
        };
        let commit = args(|w| {
            w.opaque(file);
            w.u64(0);
            w.u32(0);
        });
        let setattr = |guarded| {
            args(|w| {
                w.opaque(file);
                put_sattr(w);
                w.bool(guarded);
                if guarded {
                    w.u64(1);
                }
            })
        };
        let write = args(|w| {
            w.opaque(file);
            w.u64(2);
            w.u32(5);
            w.u32(1);
            w.opaque(b"hello");
        });
        let read = args(|w| {
            w.opaque(&self.large);
            w.u64(0);
            w.u32(4096);
        });
        let list = |counts: &[u32]| {
            args(|w| {
                w.opaque(root);
                w.u64(0);
                w.u64(0);
                for count in counts {
                    w.u32(*count);
                }
            })
        };
        let create = |how, rest: &dyn Fn(&mut Writer<'_>)| {
            made(&format!("created-{how}"), &|w| {
                w.u32(how);
                rest(w);
            })
        };
        let node = |kind, rest: &dyn Fn(&mut Writer<'_>)| {
            made(&format!("made-{kind}"), &|w| {
                w.u32(kind);
                rest(w);
            })
        };
        let ok = |procedure, args| nfs_call(procedure, args, Nfsstat3::Ok);
        vec![
            ok(0, Vec::new()),
            ok(1, handle(root)),
            ok(2, setattr(false)),
            nfs_call(2, setattr(true), Nfsstat3::NotSync),
            ok(3, dirop("file")),
            ok(
                4,
                args(|w| {
                    w.opaque(file);
                    w.u32(0x3f);
                }),
            ),
            ok(5, handle(&self.link)),
            ok(6, read),
            ok(7, write),
            ok(8, create(0, &put_sattr)),
            ok(8, create(1, &put_sattr)),
            ok(8, create(2, &|w| w.u64(77))),
            ok(9, made("folder-2", &put_sattr)),
            ok(
                10,
                made("link-2", &|w| {
                    put_sattr(w);
                    w.opaque(b"text");
                }),
            ),
            nfs_call(11, node(1, &|_| ()), Nfsstat3::BadType),
            ok(11, node(7, &put_sattr)),
            ok(12, dirop("removed")),
            ok(13, dirop("folder")),
            ok(14, made("renamed", &|w| put_dirop(w, root, "renamed-2"))),
            ok(
                15,
                args(|w| {
                    w.opaque(file);
                    put_dirop(w, root, "file-2");
                }),
            ),
            ok(16, list(&[4096])),
            ok(17, list(&[512, 4096])),
            ok(18, handle(root)),
            ok(19, handle(root)),
            ok(20, handle(root)),
            ok(21, commit),
        ]
    }
}

pub(crate) fn message(program: u32, version: u32, procedure: u32, args: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    let sys = AuthSys {
        stamp: 1,
        machine_name: b"host",
        uid: 0,
        gid: 0,
        gids: Gids::new([0, 5]),
    };
    sys.encode(&mut Writer::new(&mut body));
    let call = Call {
        xid: XID,
        program,
        version,
        procedure,
        cred: OpaqueAuth {
            flavor: AUTH_SYS,
            body: &body,
        },
        verf: OpaqueAuth::NONE,
        args,
    };
    let mut message = Vec::new();
    call.encode(&mut Writer::new(&mut message));
    message
}

pub(crate) fn nfs_call(procedure: u32, args: Vec<u8>, status: Nfsstat3) -> Sample {
    Sample {
        port: Port::Nfs,
        program: program::NFS,
        version: 3,
        procedure,
        args,
        status,
    }
}

pub(super) fn mount_call(version: u32, procedure: u32, args: Vec<u8>) -> Sample {
    Sample {
        port: Port::Mount,
        program: program::MOUNT,
        version,
        procedure,
        args,
        status: Nfsstat3::Ok,
    }
}

fn portmap_samples() -> Vec<Sample> {
    let mapping = encoded(&Mapping {
        program: program::NFS,
        version: 3,
        protocol: 6,
        port: 0,
    });
    let rpcb = encoded(&Rpcb {
        program: program::NLM,
        version: 4,
        netid: b"tcp",
        addr: b"0.0.0.0.8.1",
        owner: b"superuser",
    });
    let uaddr = encoded(&Uaddr(b"192.0.2.1.8.1"));
    let taddr = encoded(&Netbuf {
        maxlen: 16,
        buf: &[2, 0, 8, 1, 192, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    });
    let mut samples = Vec::new();
    let mut push = |version, procedure, args: &[u8]| {
        samples.push(Sample {
            port: Port::Portmap,
            program: program::PORTMAP,
            version,
            procedure,
            args: args.to_vec(),
            status: Nfsstat3::Ok,
        });
    };
    push(2, 0, &[]);
    for procedure in portmap::PMAP_SET..=portmap::PMAP_GETPORT {
        push(2, procedure, &mapping);
    }
    push(2, portmap::PMAP_DUMP, &[]);
    push(2, portmap::PMAP_CALLIT, &mapping);
    for version in 3..=4 {
        for procedure in [0, portmap::DUMP, portmap::GETTIME] {
            push(version, procedure, &[]);
        }
        for procedure in portmap::SET..=portmap::GETADDR {
            push(version, procedure, &rpcb);
        }
        push(version, portmap::BCAST, &rpcb);
        push(version, portmap::UADDR2TADDR, &uaddr);
        push(version, portmap::TADDR2UADDR, &taddr);
    }
    push(4, portmap::GETVERSADDR, &rpcb);
    push(4, portmap::GETADDRLIST, &rpcb);
    push(4, portmap::GETSTAT, &[]);
    samples
}

pub(crate) fn args(write: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut Writer::new(&mut out));
    out
}

pub(super) fn encoded(value: &impl Encode) -> Vec<u8> {
    args(|w| w.value(value))
}

pub(crate) fn put_dirop(writer: &mut Writer<'_>, dir: &[u8], name: &str) {
    writer.opaque(dir);
    writer.opaque(name.as_bytes());
}

/// `sattr3` with a value in every kind of field: mode, size, atime now, mtime of the client.
pub(crate) fn put_sattr(writer: &mut Writer<'_>) {
    for word in [1, 0o700, 0, 0, 1, 0, 3, 1, 2, 1000, 5] {
        writer.u32(word);
    }
}
