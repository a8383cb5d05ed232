//! The situations that cells of [`super::table`] share.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use havenfs_tests::client::Answer;
use nfs3_types::nfs3::nfsstat3;

use super::scene::{FULL, Scene};

/// A cell that this machine can't produce.
#[derive(Debug)]
pub(crate) struct NotHere(pub(crate) &'static str);

impl std::fmt::Display for NotHere {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for NotHere {}

/// The handle with its last byte changed.
pub(crate) fn forged(fh: &[u8]) -> Vec<u8> {
    let mut forged = fh.to_vec();
    if let Some(last) = forged.last_mut() {
        *last ^= 1;
    }
    forged
}

/// A name that is one byte too long.
pub(crate) fn long_name() -> Vec<u8> {
    vec![b'n'; 256]
}

/// The handle of a file that was removed through NFS.
pub(crate) fn gone_file(s: &mut Scene) -> Result<Vec<u8>> {
    let fh = s.file("gone", b"text")?;
    s.nfs.remove(&s.root, b"gone")?;
    ensure!(!s.path("gone").exists(), "REMOVE has not removed");
    Ok(fh)
}

/// The handle of a directory that was removed through NFS.
pub(crate) fn gone_dir(s: &mut Scene) -> Result<Vec<u8>> {
    let fh = s.dir("gone")?;
    s.nfs.rmdir(&s.root, b"gone")?;
    ensure!(!s.path("gone").exists(), "RMDIR has not removed");
    Ok(fh)
}

/// The handle of a directory with this mode, and `inside` and `inside-dir` in it.
pub(crate) fn closed_dir(s: &mut Scene, mode: u32) -> Result<Vec<u8>> {
    let fh = s.dir("closed")?;
    fs::write(s.path("closed/inside"), "")?;
    fs::create_dir(s.path("closed/inside-dir"))?;
    s.own("closed", mode)?;
    Ok(fh)
}

/// A process that holds a lease on a file.
pub(crate) struct Lease(Child);

impl Drop for Lease {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A file that a local process has a lease on, as Samba has, and does not give back when asked.
pub(crate) fn leased_file(s: &mut Scene) -> Result<(Vec<u8>, Lease)> {
    let fh = s.file("leased", b"text")?;
    let program = "import fcntl, os, signal, sys\n\
        signal.signal(signal.SIGIO, signal.SIG_IGN)\n\
        fd = os.open(sys.argv[1], os.O_RDWR)\n\
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n\
        print('leased', flush=True)\n\
        sys.stdin.read()\n";
    let mut child = Command::new("python3")
        .args(["-c", program])
        .arg(s.path("leased"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("python3 takes the lease")?;
    let stdout = child.stdout.take().context("no output")?;
    let lease = Lease(child);
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    ensure!(line.trim() == "leased", "no lease");
    Ok((fh, lease))
}

/// Makes names on a file system with room for a few until there is no more room.
pub(crate) fn until_no_space(
    s: &mut Scene,
    make: fn(&mut Scene, &[u8], &[u8]) -> Result<Answer>,
) -> Result<Answer> {
    let dir = s.other_root(FULL)?;
    for number in 0..1000 {
        let name = format!("{:p}-{number}", make as *const ());
        let answer = make(s, &dir, name.as_bytes())?;
        if answer.status != nfsstat3::NFS3_OK {
            return Ok(answer);
        }
    }
    bail!("there is room for 1000 names")
}
