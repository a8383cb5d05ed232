//! The cache of opened files, permissions and handles on a real directory.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod gated;

use std::ffi::CString;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;

use havenfs_rpc::auth::Gids;
use rustix::fs::{XattrFlags, setxattr};
use rustix::io::Errno;

use super::attributes::Want;
use super::credential::{self, Caller, Groups};
use super::data;
use super::file::File;
use super::files::Files;
use super::handle::{HandleKey, Signer};
use super::namespace::{Change, CreateHow};
use super::setattr::Changes;
use super::table::HandleTable;
use super::volume::Volume;
use super::{Failure, Mode};
use crate::gate::Gate;

/// The smallest cache that is made.
const OPENED_MAX: usize = 64;

fn files(state: &Path) -> Files {
    files_behind(state, Arc::new(Gate::open_for_good()))
}

fn files_behind(state: &Path, gate: Arc<Gate>) -> Files {
    let key = HandleKey {
        id: 1,
        secret: [7; 16],
    };
    Files::new(
        Signer::new(vec![key]),
        HandleTable::load(state).unwrap(),
        std::collections::HashMap::new(),
        OPENED_MAX,
        gate,
    )
}

fn root(files: &Files, dir: &Path) -> Arc<File> {
    let volume = files.add_volume(Volume::open(dir, 1, 0, 1, false).unwrap());
    files.open_root(&volume).unwrap()
}

fn look_up(files: &Files, dir: &Arc<File>, name: &str, caller: &Caller) -> Arc<File> {
    let name = CString::new(name).unwrap();
    let attributes = dir.attributes().unwrap();
    files
        .lookup(dir, &attributes, &name, caller, Mode::Worker)
        .unwrap()
}

fn user(uid: u32) -> Caller {
    Caller {
        uid,
        gid: uid,
        groups: Groups::Wire(Gids::default()),
    }
}

#[test]
fn a_file_in_use_or_with_unsynced_writes_is_opened_once() {
    let (state, exported) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let me = credential::own_caller();
    for number in 0..20 * OPENED_MAX {
        std::fs::write(exported.path().join(format!("{number}")), "x").unwrap();
    }
    let files = files(state.path());
    let dir = root(&files, exported.path());
    let held = look_up(&files, &dir, "0", me);
    let dirty = {
        let file = look_up(&files, &dir, "1", me);
        data::write(&files, &file, me, 0, b"unsynced", false).unwrap();
        assert!(file.is_dirty());
        (file.handle, Arc::as_ptr(&file) as usize)
    };
    for number in 2..20 * OPENED_MAX {
        look_up(&files, &dir, &number.to_string(), me);
    }
    assert!(
        files.opened_count() <= 2 * OPENED_MAX,
        "{} files open",
        files.opened_count()
    );
    assert!(Arc::ptr_eq(
        &held,
        &files.open(&held.handle, Mode::Worker).unwrap()
    ));
    let again = files.open(&dirty.0, Mode::Worker).unwrap();
    assert_eq!(
        Arc::as_ptr(&again) as usize,
        dirty.1,
        "its writes would be forgotten"
    );
    data::commit(&files, &again, me).unwrap();
    assert!(!again.is_dirty());
}

#[test]
fn files_without_a_commit_do_not_stay_open_without_bound() {
    let (state, exported) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let me = credential::own_caller();
    let files = files(state.path());
    let dir = root(&files, exported.path());
    let change = Change {
        files: &files,
        caller: me,
        durable: false,
    };
    for number in 0..10 * OPENED_MAX {
        let name = CString::new(format!("{number}")).unwrap();
        let how = CreateHow::Guarded(Changes {
            mode: Some(0o600),
            ..Changes::default()
        });
        let file = change.create(&dir, &name, &how, |_| Ok(())).unwrap();
        data::write(&files, &file, me, 0, b"never committed", false).unwrap();
    }
    assert!(
        files.opened_count() <= 2 * OPENED_MAX,
        "{} files open",
        files.opened_count()
    );
}

#[test]
fn a_sync_that_fails_makes_another_write_verifier_and_leaves_the_file_unsynced() {
    let (state, exported) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let me = credential::own_caller();
    std::fs::write(exported.path().join("file"), "x").unwrap();
    let files = files(state.path());
    let dir = root(&files, exported.path());
    let file = look_up(&files, &dir, "file", me);
    let first = files.write_verifier();
    data::write(&files, &file, me, 0, b"unsynced", false).unwrap();
    data::commit(&files, &file, me).unwrap();
    assert_eq!(files.write_verifier(), first);
    data::write(&files, &file, me, 0, b"unsynced", false).unwrap();
    // What can't be synced stands for a disk that fails.
    let (pipe, _) = std::io::pipe().unwrap();
    let sync = || data::sync_file(&files, &file, pipe.as_fd());
    assert_eq!(file.sync_written(sync), Err(Errno::INVAL));
    let second = files.write_verifier();
    assert_ne!(second, first);
    assert!(file.is_dirty(), "a COMMIT would answer without a sync");
    data::commit(&files, &file, me).unwrap();
    assert!(!file.is_dirty());
    assert_eq!(files.write_verifier(), second);
}

#[test]
fn tidying_syncs_what_was_left_and_forgets_what_was_removed() {
    let (state, exported) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let me = credential::own_caller();
    for name in ["left", "removed"] {
        std::fs::write(exported.path().join(name), "x").unwrap();
    }
    let files = files(state.path());
    let dir = root(&files, exported.path());
    let left = look_up(&files, &dir, "left", me);
    data::write(&files, &left, me, 0, b"y", false).unwrap();
    let removed = look_up(&files, &dir, "removed", me).handle;
    std::fs::remove_file(exported.path().join("removed")).unwrap();
    let before = files.opened_count();
    files.tidy();
    assert_eq!(files.opened_count(), before - 1);
    assert_eq!(
        files.open(&removed, Mode::Worker).unwrap_err(),
        Failure::Stale
    );
    assert!(left.is_dirty(), "it was used since the last time");
    files.tidy();
    assert!(!left.is_dirty());
}

#[test]
fn a_created_file_is_found_by_its_handle_after_a_restart() {
    let (state, exported) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let me = credential::own_caller();
    let handle = {
        let files = files(state.path());
        let dir = root(&files, exported.path());
        let change = Change {
            files: &files,
            caller: me,
            durable: true,
        };
        let how = CreateHow::Guarded(Changes {
            mode: Some(0o600),
            ..Changes::default()
        });
        change
            .create(&dir, c"new", &how, |_| Ok(()))
            .unwrap()
            .handle
    };
    let files = files(state.path());
    assert_eq!(
        files.open(&handle, Mode::Worker).unwrap_err(),
        Failure::Stale,
        "no volume yet"
    );
    let dir = root(&files, exported.path());
    assert_eq!(
        files.open(&handle, Mode::Inline).unwrap_err(),
        Failure::Wait
    );
    let file = files.open(&handle, Mode::Worker).unwrap();
    assert_eq!(
        file.attributes(),
        look_up(&files, &dir, "new", me).attributes()
    );
}

/// An ACL as Linux stores it: version 2, then tag, permissions and id of each entry.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

const NOBODY: u32 = u32::MAX;

#[test]
fn root_an_acl_is_judged_by_the_kernel() {
    let (state, exported) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = exported.path().join("file");
    std::fs::write(&path, "x").unwrap();
    // Owner rw, user 1000 r, group nothing, mask r, others nothing.
    let entries = [
        (1, 6, NOBODY),
        (2, 4, 1000),
        (4, 0, NOBODY),
        (0x10, 4, NOBODY),
        (0x20, 0, NOBODY),
    ];
    setxattr(
        &path,
        c"system.posix_acl_access",
        &acl(&entries),
        XattrFlags::empty(),
    )
    .unwrap();
    let files = files(state.path());
    let dir = root(&files, exported.path());
    let file = look_up(&files, &dir, "file", &user(0));
    let attributes = file.attributes().unwrap();
    let denied = Err(Failure::Os(Errno::ACCESS));
    let allows = |uid, want| file.allows(&attributes, &user(uid), want, Mode::Worker);
    assert_eq!(
        file.allows(&attributes, &user(1000), Want::READ, Mode::Inline),
        Err(Failure::Wait)
    );
    assert_eq!(allows(1000, Want::READ), Ok(()));
    assert_eq!(allows(1000, Want::WRITE), denied);
    // The group bits of the mode are the mask here: by them alone, group 0 could read.
    let mut in_group = user(1001);
    in_group.gid = 0;
    assert_eq!(
        file.allows(&attributes, &in_group, Want::READ, Mode::Worker),
        denied
    );
    assert_eq!(allows(1001, Want::READ), denied);
    assert_eq!(allows(0, Want::READ.and(Want::WRITE)), Ok(()));
    credential::as_server();
}

#[test]
fn root_a_write_of_another_user_takes_the_set_id_bits() {
    use std::os::unix::fs::PermissionsExt as _;
    let (state, exported) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = exported.path().join("file");
    std::fs::write(&path, "x").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o6777)).unwrap();
    let files = files(state.path());
    let dir = root(&files, exported.path());
    let file = look_up(&files, &dir, "file", &user(0));
    data::write(&files, &file, &user(1000), 0, b"theirs", false).unwrap();
    credential::as_server();
    assert_eq!(file.attributes().unwrap().mode, 0o777);
}
