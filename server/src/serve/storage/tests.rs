//! What a command that can't be ended, or fails, means for the storage.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;
use std::process::Stdio;

use super::*;
use crate::cluster::lease::Moment;

fn storage(dir: &Path, release: &str) -> Storage {
    let command = |script: &str| HookCommand {
        program: "/bin/sh".into(),
        arguments: ["-c".to_owned(), format!("cd {}; {script}", dir.display())].into(),
    };
    Storage {
        service: "alpha".to_owned(),
        node: Some("n1".to_owned()),
        addresses: String::new(),
        hooks: Hooks {
            release: Some(command(release)),
            ..Hooks::default()
        },
        in_use: Arc::default(),
        is_up: true,
        failures: 0,
        not_before: Moment::default(),
        epoch: 0,
        is_ready: false,
        fencing: Fencing::default(),
        running: None,
        remnant: None,
    }
}

#[tokio::test]
async fn nothing_is_let_go_beside_a_command_that_cannot_be_ended() {
    let dir = tempfile::tempdir().unwrap();
    let mut storage = storage(dir.path(), "touch released");
    let released = dir.path().join("released");
    let mut child = std::process::Command::new("/bin/sleep");
    let child = child.arg("60").stdin(Stdio::null()).spawn().unwrap();
    let remnant = Remnant::of_child("takeover hook", child);
    let end = Err(HookError::StillRuns(Arc::clone(&remnant)));
    storage.keep_remnant(end).unwrap_err();
    for is_up in [true, false] {
        storage.is_up = is_up;
        let error = storage.put_down(Reason::Move).await.unwrap_err();
        assert!(error.to_string().contains("takeover hook"), "{error}");
        assert!(storage.may_be_up() && !released.exists());
    }
    storage.is_up = true;
    remnant.kill();
    while !remnant.has_ended() {
        tokio::task::yield_now().await;
    }
    storage.put_down(Reason::Move).await.unwrap();
    assert!(!storage.may_be_up() && released.exists());
}

#[tokio::test]
async fn what_cannot_be_let_go_is_tried_again_later() {
    let dir = tempfile::tempdir().unwrap();
    let mut storage = storage(
        dir.path(),
        "echo $HAVENFS_REASON $HAVENFS_EPOCH >> tries; [ -e works ]",
    );
    let tries = || std::fs::read_to_string(dir.path().join("tries")).unwrap();
    let again = storage.let_go(7).await.unwrap();
    assert!(again > boot_time() && storage.may_be_up());
    assert_eq!(storage.let_go(7).await, Some(again));
    assert_eq!(tries(), "start 7\n");
    storage.not_before = Moment::default();
    // After the first time.
    let later = storage.let_go(8).await.unwrap();
    assert!(later.since(boot_time()) > PAUSE);
    std::fs::write(dir.path().join("works"), "").unwrap();
    storage.not_before = Moment::default();
    assert_eq!(storage.let_go(8).await, None);
    assert!(!storage.may_be_up());
}

#[tokio::test]
async fn what_cannot_be_undone_is_tried_again_and_kept_until_then() {
    let dir = tempfile::tempdir().unwrap();
    let mut storage = storage(dir.path(), "echo $HAVENFS_REASON >> tries; [ -e works ]");
    let again = storage.undo().await.unwrap();
    assert!(again > boot_time() && storage.may_be_up());
    assert_eq!(storage.undo().await, Some(again));
    std::fs::write(dir.path().join("works"), "").unwrap();
    storage.not_before = Moment::default();
    assert_eq!(storage.undo().await, None);
    assert!(!storage.may_be_up());
    let tries = std::fs::read_to_string(dir.path().join("tries")).unwrap();
    assert_eq!(tries, "failed\nfailed\n");
}

/// A probe that is stuck in the kernel is a write that only the fence keeps from the disk.
#[tokio::test]
async fn with_a_fence_and_no_release_command_nothing_may_be_open() {
    let dir = tempfile::tempdir().unwrap();
    let mut storage = storage(dir.path(), "");
    let command = storage.hooks.release.take();
    let probe = storage.in_use();
    storage.hooks.fence.clone_from(&command);
    let early = timeout(Duration::from_millis(20), storage.put_down(Reason::Failed)).await;
    assert!(early.is_err() && storage.may_be_up());
    drop(probe);
    storage.put_down(Reason::Failed).await.unwrap();
    assert!(!storage.may_be_up());
    // Without a fence it is the storage's own affair.
    (storage.hooks.fence, storage.hooks.takeover, storage.is_up) = (None, command, true);
    let _probe = storage.in_use();
    storage.put_down(Reason::Failed).await.unwrap();
}
