//! A disk that fails: what could not be synced is not answered as if it were, and the write
//! verifier is another one, so that clients send again what they had not committed. Needs root.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::client::nfs::{FILE_SYNC, How, UNSTABLE};
use havenfs_tests::client::{Cred, Sattr};
use havenfs_tests::server::Site;
use nfs3_types::nfs3::nfsstat3;

use crate::scene::{OPEN, made, ok, status};

/// Shuts a file system down, as a disk that is gone does: `EXT4_IOC_SHUTDOWN`, which no program of
/// the shell calls.
const SHUT_DOWN: &str = "import fcntl, os, struct, sys
fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587D, struct.pack('I', 2))";

#[test]
fn after_a_sync_that_failed_the_write_verifier_is_another() -> Result<()> {
    let site = Site::new()?;
    // Seen by the server alone, and gone with it.
    let site = site.with_mounts(
        "truncate -s 16M image && mkfs.ext4 -q -F image && mkdir -p failing && \
         mount -o loop image failing && chmod 777 failing",
    );
    let [failing, well] = [site.path().join("failing"), site.export()];
    let exports = [&failing, &well].map(|path| format!("{}:*({OPEN})", path.display()));
    let server = site.serve_exports(&[&exports[0], &exports[1]], &[])?;
    let mut nfs = server.nfs(Cred::root())?;
    let mut file = |path| {
        let root = server.handle(path)?;
        let how = How::Guarded(Sattr::mode(0o600));
        made(nfs.create(&root, b"f", how)?, |ok| &ok.obj)
    };
    let (on_failing, on_well) = (file(&failing)?, file(&well)?);
    let first = ok(nfs.write(&on_failing, 0, UNSTABLE, b"unstable")?)?
        .verf
        .0;
    ensure!(ok(nfs.write(&on_well, 0, UNSTABLE, b"unstable")?)?.verf.0 == first);

    let seen = format!("/proc/{}/root{}", server.pid(), failing.display());
    let mut shut_down = Command::new("python3");
    let ended = shut_down.args(["-c", SHUT_DOWN, &seen]).status();
    ensure!(ended.context("python3")?.success(), "not shut down");
    ensure!(status(&nfs.commit(&on_failing, 0, 0)?) == nfsstat3::NFS3ERR_IO);
    let second = ok(nfs.write(&on_well, 0, UNSTABLE, b"unstable")?)?.verf.0;
    ensure!(second != first, "clients believe that their data is there");
    ensure!(ok(nfs.commit(&on_well, 0, 0)?)?.verf.0 == second);
    // Nor is anything stable that can't be.
    ensure!(status(&nfs.write(&on_failing, 0, FILE_SYNC, b"stable")?) == nfsstat3::NFS3ERR_IO);
    Ok(())
}
