//! What commands see, what is told of their ends, and that nothing of them stays.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;

use rustix::process::kill_process;

use super::*;

fn hook(script: &str) -> Hook {
    Hook {
        title: "fence hook for node `n2`".to_owned(),
        command: HookCommand {
            program: "/bin/sh".into(),
            arguments: ["-c", script, "hook", "a b", "$HOME"]
                .map(str::to_owned)
                .into(),
        },
        environment: vec![
            ("HAVENFS_SERVICE", Some("alpha".to_owned())),
            ("CARGO_PKG_NAME", None),
        ],
        time_max: Duration::from_secs(20),
    }
}

fn end_of(hook: &Hook) -> Result<String, HookError> {
    run(hook, &AtomicBool::new(false)).map(|said| said.to_string())
}

impl Remnant {
    /// One for a child that was started elsewhere, in its starter's process group.
    pub(in crate::serve) fn of_child(title: &str, child: Child) -> Arc<Self> {
        let (output, _) = io::pipe().unwrap_or_else(|error| panic!("no pipe: {error}"));
        let id = Pid::from_child(&child);
        Arc::new(Self {
            title: title.to_owned(),
            id,
            running: Mutex::new(Some(Running {
                child,
                id,
                output,
                said: Said::default(),
            })),
        })
    }

    /// Kills the child.
    pub(in crate::serve) fn kill(&self) {
        let _ = rustix::process::kill_process(self.id, Signal::KILL);
    }
}

/// Waits until a process that a hook started is gone.
fn wait_gone(id: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let is_there = || {
        let stat = std::fs::read_to_string(Path::new("/proc").join(id).join("stat"));
        // One that nobody has waited for yet has ended as well.
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    };
    while is_there() {
        assert!(Instant::now() < deadline, "process {id} is still there");
        std::thread::sleep(PAUSE_MAX);
    }
}

#[test]
fn a_command_gets_its_arguments_and_environment_and_no_shell_reads_them() {
    let script = "echo \"$1|$2|$HAVENFS_SERVICE|${CARGO_PKG_NAME-none}|$(umask)|${PATH:+path}\"";
    let said = end_of(&hook(script)).unwrap();
    assert_eq!(said, "a b|$HOME|alpha|none|0022|path");
}

#[test]
fn a_command_has_no_input_no_descriptors_and_a_group_of_its_own() {
    let script = "cat; set -- $(cat /proc/self/stat); echo $5; ls -l /proc/$$/fd";
    let kept = tempfile::NamedTempFile::new().unwrap();
    let said = end_of(&hook(script)).unwrap();
    let (group, descriptors) = said.split_once('\n').unwrap();
    let own = rustix::process::getpgrp().as_raw_pid().to_string();
    assert_ne!(group, own);
    assert!(descriptors.contains("/dev/null"), "{descriptors}");
    let path = kept.path().to_string_lossy();
    assert!(!descriptors.contains(&*path), "{descriptors}");
}

#[test]
fn failures_are_told_with_the_last_line() {
    for (script, expected) in [
        (
            "echo first; echo 'not there' >&2; echo; exit 3",
            "fence hook for node `n2` exited with status 3: not there",
        ),
        ("exit 1", "fence hook for node `n2` exited with status 1"),
        (
            "printf 'a\\033[1mb\\007'; exit 2",
            "fence hook for node `n2` exited with status 2: a[1mb",
        ),
        (
            "echo gone; kill -9 $$",
            "fence hook for node `n2` was killed by signal 9: gone",
        ),
    ] {
        assert_eq!(end_of(&hook(script)).unwrap_err().to_string(), expected);
    }
    let mut missing = hook("");
    missing.command.program = "/nowhere/fence".into();
    let error = end_of(&missing).unwrap_err();
    assert!(error.said().is_none());
    let error = error.to_string();
    assert!(
        error.contains("cannot start `/nowhere/fence`: No such file"),
        "{error}"
    );
}

#[test]
fn of_what_a_command_says_the_end_is_kept() {
    let script = "i=0; while [ $i -lt 30000 ]; do echo line $i; i=$((i+1)); done; exit 4";
    let error = end_of(&hook(script)).unwrap_err();
    let said = error.said().unwrap().to_string();
    assert!(said.len() <= SAID_BYTES_MAX && said.len() > SAID_BYTES_MAX - 20);
    assert!(said.ends_with("line 29999"), "{said}");
}

#[test]
fn at_the_end_of_its_time_a_command_is_killed_with_all_that_it_started() {
    // Neither the child nor what it started ends by a SIGTERM.
    let script = "trap '' TERM; (while :; do sleep 1; done) & echo $!; wait; while :; do sleep 1; \
                  done";
    let mut slow = hook(script);
    slow.time_max = Duration::from_secs(1);
    let begun = Instant::now();
    let error = end_of(&slow).unwrap_err();
    assert!(begun.elapsed() >= slow.time_max + TERM_TIME);
    let text = error.to_string();
    assert!(text.contains("did not end within 1 s"), "{text}");
    wait_gone(error.said().unwrap().to_string().trim());
}

#[test]
fn a_command_that_ends_by_sigterm_leaves_nobody_either() {
    let script = "(trap '' TERM; while :; do sleep 1; done) & echo $!; wait";
    let mut slow = hook(script);
    slow.time_max = Duration::from_secs(1);
    let error = end_of(&slow).unwrap_err();
    wait_gone(error.said().unwrap().to_string().trim());
}

#[test]
fn what_cannot_be_killed_is_told_until_it_has_ended() {
    // What has started something which goes on is not over, also if it has ended itself.
    for script in [
        "trap '' TERM; sleep 60; :",
        "(trap '' TERM; sleep 60; :) & exec sleep 60",
    ] {
        let mut slow = hook(script);
        slow.time_max = Duration::from_millis(200);
        // As the kernel answers if the program runs as somebody else.
        let error = run_with(&slow, &AtomicBool::new(false), |id, signal| match signal {
            Signal::TERM => kill_process(id, Signal::TERM),
            _ => Err(Errno::PERM),
        });
        let remnant = match error {
            Err(HookError::StillRuns(remnant)) => remnant,
            other => panic!("{script}: {other:?}"),
        };
        let text = remnant.to_string();
        assert!(text.contains("hook for node `n2` was to be"), "{text}");
        assert!(!remnant.has_ended());
        kill_process_group(remnant.id, Signal::KILL).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !remnant.has_ended() {
            assert!(Instant::now() < deadline, "it is still there");
            std::thread::sleep(PAUSE_MAX);
        }
        assert!(remnant.has_ended());
    }
}

#[test]
fn a_command_dies_with_who_has_started_it() {
    let running = std::thread::spawn(|| Running::start(&hook("exec sleep 60")));
    let mut running = running.join().unwrap().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    assert!(running.wait(|| Instant::now() >= deadline).unwrap());
    assert_eq!(running.child.wait().unwrap().signal(), Some(9));
}

#[test]
fn a_command_that_is_not_needed_any_more_is_killed() {
    let cut_short = AtomicBool::new(true);
    let error = run(&hook("sleep 60"), &cut_short).unwrap_err();
    assert!(matches!(error, HookError::CutShort(_)), "{error}");
}

#[test]
fn a_daemon_that_a_command_leaves_is_not_waited_for() {
    let said = end_of(&hook("sleep 60 & echo $!")).unwrap();
    let id = said.parse().ok().and_then(Pid::from_raw).unwrap();
    kill_process(id, Signal::KILL).unwrap();
}
