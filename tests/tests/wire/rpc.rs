//! RPC: every way in which a call can be refused.

use anyhow::{Result, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::nfs::{args, procedure};
use havenfs_tests::client::rpc::record;
use havenfs_tests::client::{Cred, Header, Outcome, Peer};
use havenfs_tests::server::V4;
use nfs3_types::nfs3::GETATTR3res;
use onc_rpc::{RpcMessage, auth::AuthFlavor};

use super::scene::{Scene, ok};

/// `auth_stat`.
const BADCRED: u32 = 1;
const REJECTEDCRED: u32 = 2;
const BADVERF: u32 = 3;
const TOOWEAK: u32 = 5;

fn nfs_header(procedure: u32, cred: &Cred) -> Header {
    Header::new(program::NFS, 3, procedure, cred)
}

#[test]
fn onc_rpc_reads_our_calls_as_we_mean_them() -> Result<()> {
    let cred = Cred::Sys {
        uid: 7,
        gid: 8,
        gids: vec![9, 10],
    };
    let bytes = record(&Header::new(1, 2, 3, &cred).message(4, b"args"));
    let message = RpcMessage::<&[u8], &[u8]>::try_from(bytes.as_slice())?;
    let call = message
        .call_body()
        .ok_or_else(|| anyhow::anyhow!("no call"))?;
    ensure!(message.xid() == 4 && call.rpc_version() == 2);
    ensure!((call.program(), call.program_version(), call.procedure()) == (1, 2, 3));
    let AuthFlavor::AuthUnix(sys) = call.auth_credentials() else {
        anyhow::bail!("{call:?}")
    };
    ensure!((sys.uid(), sys.gid(), sys.gids()) == (7, 8, Some(&[9, 10][..])));
    ensure!(call.payload() == b"args");
    Ok(())
}

#[test]
fn programs_versions_and_procedures_that_are_not_served() -> Result<()> {
    let s = Scene::new()?;
    let mut nfs = Peer::tcp(s.server.nfs_at(V4))?;
    let mut mount = s.server.mount()?.peer;
    let mut ask = |mount_port: bool, program, version, procedure| {
        let peer = if mount_port { &mut mount } else { &mut nfs };
        peer.exchange(
            &Header::new(program, version, procedure, &Cred::root()),
            &[],
        )
    };
    for program in [
        0,
        1,
        program::MOUNT,
        program::PORTMAP,
        program::NFSACL,
        u32::MAX,
    ] {
        ensure!(
            ask(false, program, 3, 0)? == Outcome::ProgUnavail,
            "{program}"
        );
    }
    for program in [program::NFS, program::PORTMAP, program::NLM] {
        ensure!(
            ask(true, program, 3, 0)? == Outcome::ProgUnavail,
            "{program}"
        );
    }
    for version in [0, 1, 2, 4, 5, u32::MAX] {
        for procedure in [0, 1, 22] {
            let got = ask(false, program::NFS, version, procedure)?;
            ensure!(got == Outcome::ProgMismatch(3, 3), "NFS {version}: {got:?}");
        }
    }
    for version in [0, 4, u32::MAX] {
        let got = ask(true, program::MOUNT, version, 0)?;
        ensure!(
            got == Outcome::ProgMismatch(1, 3),
            "MOUNT {version}: {got:?}"
        );
    }
    for procedure in [22, 23, u32::MAX] {
        ensure!(ask(false, program::NFS, 3, procedure)? == Outcome::ProcUnavail);
    }
    for version in [1, 3] {
        for procedure in [6, 7, u32::MAX] {
            ensure!(ask(true, program::MOUNT, version, procedure)? == Outcome::ProcUnavail);
        }
    }
    Ok(())
}

#[test]
fn versions_of_rpc_itself() -> Result<()> {
    let s = Scene::new()?;
    let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
    for rpc_version in [0, 1, 3, u32::MAX] {
        let mut header = nfs_header(0, &Cred::None);
        header.rpc_version = rpc_version;
        ensure!(peer.exchange(&header, &[])? == Outcome::RpcMismatch(2, 2));
    }
    Ok(())
}

#[test]
fn credentials_that_are_refused() -> Result<()> {
    let mut s = Scene::new()?;
    let root = args(|w| w.opaque(&s.root));
    let sys = |change: &dyn Fn(&mut Vec<u8>)| {
        // stamp, machine name "host", uid, gid, no groups
        let mut body = args(|w| {
            w.u32(0);
            w.opaque(b"host");
            w.u32(s.uid);
            w.u32(s.gid);
            w.u32(0);
        });
        change(&mut body);
        Cred::Raw { flavor: 1, body }
    };
    let raw = |flavor, body: &[u8]| Cred::Raw {
        flavor,
        body: body.to_vec(),
    };
    let gids = |count| Cred::Sys {
        uid: s.uid,
        gid: s.gid,
        gids: vec![1; count],
    };
    let long_name = args(|w| {
        w.u32(0);
        w.opaque(&[b'h'; 257]);
        w.u32(0);
        w.u32(0);
        w.u32(0);
    });
    let cases = [
        ("17 groups", gids(17), &[BADCRED][..]),
        ("no body", raw(1, b""), &[BADCRED]),
        (
            "cut",
            sys(&|body| body.truncate(body.len() - 4)),
            &[BADCRED],
        ),
        ("bytes behind", sys(&|body| body.extend([0; 4])), &[BADCRED]),
        ("a long machine name", raw(1, &long_name), &[BADCRED]),
        ("AUTH_NONE with a body", raw(0, b"body"), &[BADCRED]),
        ("AUTH_SHORT", raw(2, b""), &[REJECTEDCRED, TOOWEAK]),
        ("AUTH_DES", raw(3, b""), &[REJECTEDCRED, TOOWEAK]),
        ("RPCSEC_GSS", raw(6, &[0; 20]), &[REJECTEDCRED, TOOWEAK]),
        ("AUTH_TLS", raw(7, b""), &[BADCRED]),
        (
            "an unknown flavor",
            raw(400_000, b"x"),
            &[REJECTEDCRED, TOOWEAK],
        ),
    ];
    for (what, cred, expected) in cases {
        s.nfs.cred = cred;
        match s.nfs.outcome(procedure::GETATTR, &root)? {
            Outcome::AuthError(stat) => ensure!(expected.contains(&stat), "{what}: {stat}"),
            other => anyhow::bail!("{what}: {other:?}"),
        }
    }
    for cred in [gids(16), gids(0), Cred::None, sys(&|_| {})] {
        s.nfs.cred = cred;
        ok(s.nfs.call::<GETATTR3res>(procedure::GETATTR, &root)?)?;
    }
    // A body above 400 bytes is no `opaque_auth` at all.
    s.nfs.cred = raw(1, &[0; 404]);
    let got = s.nfs.outcome(procedure::GETATTR, &root)?;
    ensure!(
        matches!(got, Outcome::GarbageArgs | Outcome::AuthError(BADCRED)),
        "{got:?}"
    );
    Ok(())
}

#[test]
fn verifiers_that_are_refused() -> Result<()> {
    let s = Scene::new()?;
    let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
    let root = args(|w| w.opaque(&s.root));
    for (flavor, body) in [(0, &b"body"[..]), (1, b""), (6, b"mic!"), (7, b"")] {
        let mut header = nfs_header(procedure::GETATTR, &Cred::root());
        header.verifier = Cred::Raw {
            flavor,
            body: body.to_vec(),
        };
        let got = peer.exchange(&header, &root)?;
        ensure!(got == Outcome::AuthError(BADVERF), "{flavor}: {got:?}");
    }
    Ok(())
}

/// RFC 9289 4.1: a server without TLS answers the probe as any NULL, and the client goes on
/// without. The client checks of every reply that its verifier does not say STARTTLS.
#[test]
fn the_tls_probe_is_answered_with_no() -> Result<()> {
    let s = Scene::new()?;
    let tls = Cred::Raw {
        flavor: 7,
        body: Vec::new(),
    };
    let mut peer = Peer::tcp(s.server.nfs_at(V4))?;
    ensure!(peer.exchange(&nfs_header(0, &tls), &[])? == Outcome::Success(Vec::new()));
    ensure!(peer.exchange(&nfs_header(0, &Cred::None), &[])? == Outcome::Success(Vec::new()));
    let body = Cred::Raw {
        flavor: 7,
        body: vec![0; 4],
    };
    ensure!(peer.exchange(&nfs_header(0, &body), &[])? == Outcome::AuthError(BADCRED));
    Ok(())
}

/// Proper arguments of each procedure, none of which changes anything.
fn proper_args(s: &Scene) -> Vec<(u32, Vec<u8>)> {
    let dirop = |w: &mut havenfs_rpc::xdr::Writer<'_>, name: &[u8]| {
        w.opaque(&s.root);
        w.opaque(name);
    };
    let words = |words: &[u32]| {
        args(|w| {
            w.opaque(&s.root);
            for word in words {
                w.u32(*word);
            }
        })
    };
    let named = |words: &[u32]| {
        args(|w| {
            dirop(w, b".");
            for word in words {
                w.u32(*word);
            }
        })
    };
    let nothing = [0; 6];
    vec![
        (procedure::GETATTR, words(&[])),
        (procedure::SETATTR, words(&[0, 0, 0, 0, 0, 0, 0])),
        (procedure::LOOKUP, named(&[])),
        (procedure::ACCESS, words(&[0x3f])),
        (procedure::READLINK, words(&[])),
        (procedure::READ, words(&[0, 0, 10])),
        (procedure::WRITE, words(&[0, 0, 0, 0, 0])),
        (procedure::CREATE, named(&[1, 0, 0, 0, 0, 0, 0])),
        (procedure::MKDIR, named(&nothing)),
        (
            procedure::SYMLINK,
            named(&[0, 0, 0, 0, 0, 0, 1, 0x6161_6161]),
        ),
        (procedure::MKNOD, named(&[7, 0, 0, 0, 0, 0, 0])),
        (procedure::REMOVE, named(&[])),
        (procedure::RMDIR, named(&[])),
        (
            procedure::RENAME,
            args(|w| {
                dirop(w, b".");
                dirop(w, b".");
            }),
        ),
        (
            procedure::LINK,
            args(|w| {
                w.opaque(&s.root);
                dirop(w, b".");
            }),
        ),
        (procedure::READDIR, words(&[0, 0, 0, 0, 4096])),
        (procedure::READDIRPLUS, words(&[0, 0, 0, 0, 4096, 8192])),
        (procedure::FSSTAT, words(&[])),
        (procedure::FSINFO, words(&[])),
        (procedure::PATHCONF, words(&[])),
        (procedure::COMMIT, words(&[0, 0, 0])),
    ]
}

#[test]
fn arguments_that_end_early_or_late_are_garbage() -> Result<()> {
    let mut s = Scene::new()?;
    let cases = proper_args(&s);
    ensure!(cases.len() == 21);
    for (procedure, proper) in cases {
        let got = s.nfs.outcome(procedure, &proper)?;
        ensure!(matches!(got, Outcome::Success(_)), "{procedure}: {got:?}");
        for len in (0..proper.len()).step_by(4) {
            let got = s.nfs.outcome(procedure, &proper[..len])?;
            ensure!(
                got == Outcome::GarbageArgs,
                "{procedure}, {len} bytes: {got:?}"
            );
        }
        for more in [1, 4, 1000] {
            let mut longer = proper.clone();
            longer.resize(proper.len() + more, 0);
            let got = s.nfs.outcome(procedure, &longer)?;
            ensure!(
                got == Outcome::GarbageArgs,
                "{procedure}, {more} more: {got:?}"
            );
        }
    }
    ensure!(
        s.nfs.outcome(0, &[0; 4])? == Outcome::GarbageArgs,
        "NULL with arguments"
    );
    Ok(())
}

#[test]
fn enums_and_bools_out_of_range_are_garbage() -> Result<()> {
    let mut s = Scene::new()?;
    let with = |name: bool, words: &[u32]| {
        args(|w| {
            w.opaque(&s.root);
            if name {
                w.opaque(b"x");
            }
            for word in words {
                w.u32(*word);
            }
        })
    };
    let cases = [
        (procedure::SETATTR, with(false, &[2, 0, 0, 0, 0, 0, 0])),
        (procedure::SETATTR, with(false, &[0, 0, 0, 0, 3, 0, 0])),
        (procedure::SETATTR, with(false, &[0, 0, 0, 0, 0, 0, 2])),
        (procedure::WRITE, with(false, &[0, 0, 0, 3, 0])),
        (procedure::CREATE, with(true, &[3, 0, 0, 0, 0, 0, 0])),
        (procedure::CREATE, with(true, &[1, 0, 0, 0, 9, 0, 0])),
        (procedure::MKDIR, with(true, &[0, 2, 0, 0, 0, 0])),
        (procedure::MKNOD, with(true, &[0, 0, 0, 0, 0, 0, 0])),
        (procedure::MKNOD, with(true, &[8, 0, 0, 0, 0, 0, 0])),
    ];
    for (procedure, args) in cases {
        let got = s.nfs.outcome(procedure, &args)?;
        ensure!(got == Outcome::GarbageArgs, "{procedure}: {got:?}");
    }
    Ok(())
}
