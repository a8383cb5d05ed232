//! The file systems behind the exports, and the state directory.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, accessat, statvfs};
use rustix::io::Errno;
use serde_json::Value;

use super::Report;
use super::mounts::{Mount, Mounts};
use super::server::Running;
use crate::backend::sys;
use crate::backend::volume::Volume;
use crate::config::Settings;
use crate::export::ExportSpec;

/// The state directory should never run short of this.
const STATE_BYTES_FREE: u64 = 64 << 20;

/// Looks at each export's directory and file system.
pub(super) fn look_at_exports(report: &mut Report, specs: &[ExportSpec], mounts: &Mounts) {
    for spec in specs {
        look_at_export(report, spec, mounts.of(&spec.path));
    }
}

fn look_at_export(report: &mut Report, spec: &ExportSpec, mount: Option<&Mount>) {
    let topic = "storage";
    let path = spec.path.display();
    let crosses = spec.rules.iter().any(|rule| rule.options.crossmnt);
    // The numbers are of no account: no handle is made of this volume.
    let volume = match Volume::open(&spec.path, 0, 0, 0, crosses) {
        Ok(volume) => volume,
        Err(errno) => {
            report.error(
                topic,
                format!("`{path}` can't be opened: {errno}"),
                "let the user that serves read and enter the directory",
            );
            return;
        }
    };
    let kind = mount.map_or("a file system that the kernel does not name", |mount| {
        &mount.kind
    });
    if volume.has_handles {
        report.ok(topic, format!("`{path}`: {kind}, kernel file handles"));
    } else {
        let (reason, hint) = match sys::name_to_handle(volume.root().as_fd(), c"") {
            Err(Errno::OPNOTSUPP) => (
                "it makes no file handles",
                "another file system, or for overlayfs a volume of the host in its place, has them",
            ),
            Err(_) => (
                "its file handles can't be used",
                "another file system has them",
            ),
            Ok(_) => (
                "this process may not open its file handles",
                "run as root with CAP_DAC_READ_SEARCH in the initial user namespace",
            ),
        };
        report.warning(
            topic,
            format!(
                "`{path}`: {kind}, {reason}: the handle table in the state directory stands in, \
                 and files that are moved locally go stale"
            ),
            hint,
        );
    }
    if let Some(mount) = mount {
        look_at_promises(report, spec, mount);
    }
}

/// What the file system makes of a sync, and of writing at all.
fn look_at_promises(report: &mut Report, spec: &ExportSpec, mount: &Mount) {
    let topic = "storage";
    let (path, kind) = (spec.path.display(), &mount.kind);
    let writable = !spec.is_read_only();
    if writable && mount.is_read_only() {
        report.warning(
            topic,
            format!("`{path}`: exported with rw, but {kind} is mounted read-only"),
            format!("`mount -o remount,rw {path}`, or export it with ro"),
        );
    }
    if !writable {
        return;
    }
    if let Some(reason) = mount.sync_is_void() {
        report.warning(
            topic,
            format!("`{path}`: {reason}"),
            "keep only what may be lost there; clients are told that their data is stable",
        );
    } else if mount.is_remote() {
        report.warning(
            topic,
            format!("`{path}`: whether synced data stays is up to what is behind {kind}"),
            "serve it from the machine that holds the disks",
        );
    } else if mount.lacks_journal() {
        report.warning(
            topic,
            format!(
                "`{path}`: ext4 without a journal: a power cut can damage it beyond what was \
                 synced, and creating and removing files is slow at times"
            ),
            "unmount it and run `tune2fs -O has_journal DEVICE`",
        );
    }
}

/// Looks at the state directory, and at the place of the control socket.
pub(super) fn look_at_state(
    report: &mut Report,
    settings: &Settings,
    specs: &[ExportSpec],
    mounts: &Mounts,
    running: Option<&Running>,
) {
    let topic = "state";
    if let Some(dir) = settings.control.parent()
        && running.is_none()
        && let Err(problem) = can_make_files(dir)
    {
        report.error(
            topic,
            format!("the control socket can't be made: {problem}"),
            "name another place with --control",
        );
    }
    let dir = &settings.state_dir;
    let shown = dir.display();
    if let Err(problem) = can_make_files(dir) {
        report.error(
            topic,
            format!("state directory `{shown}`: {problem}"),
            "run as its owner, or name another place with --state-dir",
        );
        return;
    }
    match fs::metadata(dir) {
        Ok(found) => {
            report.ok(topic, format!("state directory `{shown}` can be used"));
            look_inside(report, dir, &found, running);
        }
        Err(_) => report.ok(
            topic,
            format!("state directory `{shown}` does not exist yet; `serve` makes it"),
        ),
    }
    // What is not there yet will be on the file system of what is above it.
    let place = existing(dir);
    let free = statvfs(place).map_or(u64::MAX, |fs| fs.f_bavail.saturating_mul(fs.f_frsize));
    if free < STATE_BYTES_FREE {
        report.warning(
            topic,
            format!(
                "only {} MiB are free for the state directory `{shown}`",
                free >> 20
            ),
            "make room: without it no new export, mount or handle can be noted",
        );
    }
    if mounts.of(place).is_some_and(Mount::is_in_memory) {
        report.warning(
            topic,
            format!(
                "state directory `{shown}` is in memory: after a reboot all clients must mount anew"
            ),
            "name a place on a disk with --state-dir",
        );
    }
    look_at_neighbours(report, place, dir, specs);
}

/// Whether an export shares the state directory's file system, or even contains it.
pub(super) fn look_at_neighbours(
    report: &mut Report,
    place: &Path,
    dir: &Path,
    specs: &[ExportSpec],
) {
    let topic = "state";
    let shown = dir.display();
    let Ok(device) = fs::metadata(place).map(|found| found.dev()) else {
        return;
    };
    let real = fs::canonicalize(place).unwrap_or_else(|_| place.to_path_buf());
    let is_inside = |spec: &&ExportSpec| {
        fs::canonicalize(&spec.path).is_ok_and(|export| real.starts_with(export))
    };
    if let Some(spec) = specs.iter().find(is_inside) {
        report.warning(
            topic,
            format!(
                "state directory `{shown}` lies inside the export `{}`: clients with root's \
                 rights can read the key that signs file handles",
                spec.path.display()
            ),
            "name a place that is not exported with --state-dir",
        );
        return;
    }
    let writable = |spec: &&ExportSpec| {
        !spec.is_read_only() && fs::metadata(&spec.path).is_ok_and(|found| found.dev() == device)
    };
    if let Some(spec) = specs.iter().find(writable) {
        report.warning(
            topic,
            format!(
                "state directory `{shown}` shares a file system with the export `{}`: clients can \
                 fill it",
                spec.path.display()
            ),
            "name a place on another file system with --state-dir, or give clients quotas",
        );
    }
}

/// What lies in a state directory that exists.
fn look_inside(report: &mut Report, dir: &Path, found: &fs::Metadata, running: Option<&Running>) {
    let topic = "state";
    let shown = dir.display();
    let file = dir.join("state.json");
    match fs::read(&file) {
        Ok(text) => {
            if found.permissions().mode() & 0o077 != 0 {
                report.warning(
                    topic,
                    format!("other users may enter the state directory `{shown}`"),
                    format!("`chmod 700 {shown}`: it holds the key that signs file handles"),
                );
            }
            if serde_json::from_slice::<Value>(&text).is_err() {
                report.error(
                    topic,
                    format!("`{}` is damaged", file.display()),
                    "restore it from a backup; without one move it away, and all clients must \
                     mount anew",
                );
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => report.error(
            topic,
            format!("`{}` can't be read: {error}", file.display()),
            "run as the user that serves",
        ),
    }
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    if let Some(pid) = lock_holder(&dir.join("lock"), &locks)
        && running.is_none_or(|running| running.pid.to_string() != pid)
    {
        report.error(
            topic,
            format!("state directory `{shown}` is in use by process {pid}"),
            "stop that server, or give this one a state directory of its own with --state-dir",
        );
    }
}

/// The process that holds the lock file, without touching the lock: a server that starts in this
/// moment would be refused otherwise. Source: proc(5), `/proc/locks`.
fn lock_holder(lock: &Path, locks: &str) -> Option<String> {
    let inode = fs::metadata(lock).ok()?.ino().to_string();
    let said = fs::read_to_string(lock).unwrap_or_default();
    let holder = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (pid, file) = (words.get(4)?, words.get(5)?);
        let matches = words.get(1) == Some(&"FLOCK")
            && file.rsplit(':').next() == Some(inode.as_str())
            // Inode numbers repeat on other file systems; the holder has noted who it is.
            && said.trim() == *pid;
        matches.then(|| (*pid).to_owned())
    };
    locks.lines().find_map(holder)
}

/// Whether files can be made in `dir`, which need not exist yet.
fn can_make_files(dir: &Path) -> Result<(), String> {
    let place = existing(dir);
    match fs::metadata(place) {
        Ok(found) if !found.is_dir() => {
            return Err(format!("`{}` is not a directory", place.display()));
        }
        Ok(_) => {}
        Err(error) => return Err(format!("`{}`: {error}", place.display())),
    }
    accessat(
        CWD,
        place,
        Access::WRITE_OK | Access::EXEC_OK,
        AtFlags::EACCESS,
    )
    .map_err(|errno| format!("`{}` can't be written: {errno}", place.display()))
}

/// The directory itself, or the nearest one above it that exists.
pub(super) fn existing(dir: &Path) -> &Path {
    let mut above = dir
        .ancestors()
        .filter(|path| !path.as_os_str().is_empty() && path.symlink_metadata().is_ok());
    above.next().unwrap_or(Path::new("."))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn the_lock_is_found_in_the_kernels_table() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join("lock");
        fs::write(&lock, "4711\n").unwrap();
        let inode = fs::metadata(&lock).unwrap().ino();
        let line = |kind: &str, pid: u32| {
            format!("1: {kind}  ADVISORY  WRITE {pid} fe:00:{inode} 0 EOF\n")
        };
        let holder = |table: &str| lock_holder(&lock, table);
        assert_eq!(holder(&line("FLOCK", 4711)), Some("4711".into()));
        assert_eq!(holder(&line("POSIX", 4711)), None);
        assert_eq!(holder(&line("FLOCK", 4712)), None);
        assert_eq!(holder("1: FLOCK\n\n"), None);
    }

    #[test]
    fn what_does_not_exist_yet_is_judged_by_what_is_above_it() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(can_make_files(&dir.path().join("a/b")), Ok(()));
        fs::write(dir.path().join("file"), "").unwrap();
        let problem = can_make_files(&dir.path().join("file/b")).unwrap_err();
        assert!(problem.ends_with("/file` is not a directory"), "{problem}");
    }
}
