//! A stage of the demo's own: namespaces for processes, mounts and network, in which nothing has a
//! name outside and with which everything in them ends.
//!
//! `havenfs demo --netns` is two processes. The first one, which a person has started, only makes
//! the namespaces, starts the second one in them as their process 1, passes the wish to stop on,
//! and ends with the other's status. If the first one is killed, the second one stops by itself.
//! When process 1 ends, however it ends, the kernel kills every process in its namespaces, nodes,
//! guards and virtual machines, and then takes the network away. So no run is in the way of another
//! one, whatever becomes of it.
//!
//! Owns no file. Changes nothing of the machine's own namespaces.

use std::process::{Command, ExitCode, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use havenfs::backend::sys;
use rustix::process::{geteuid, getpid};
use rustix::thread::UnshareFlags;

use super::interrupt;
use super::{EXIT_FAILED, ON_STAGE};

/// How often the end of the second process is looked for.
const LOOK: Duration = Duration::from_millis(10);

/// Starts this program again on a stage, and waits for its end.
pub(super) fn raise() -> Result<ExitCode> {
    ensure!(
        geteuid().is_root(),
        "`--netns` makes networks and moves an address between them, for which one has to be \
         root\nhint: run it with sudo, or run `havenfs demo`, which shows the same on loopback \
         addresses and needs no root"
    );
    for (program, package) in [("ip", "iproute2"), ("mount", "mount")] {
        ensure!(
            find(program).is_some(),
            "the program `{program}` is not there\nhint: install the package {package}, or run \
             `havenfs demo` without --netns, which needs nothing"
        );
    }
    let exe = std::env::current_exe().context("cannot find this program's own file")?;
    // Before the namespaces: a thread can't be started by whoever has left those for processes.
    interrupt::watch()?;
    let own = UnshareFlags::NEWPID | UnshareFlags::NEWNS | UnshareFlags::NEWNET;
    sys::leave_namespaces(own).map_err(|error| {
        anyhow!(
            "cannot make namespaces: {error}\nhint: in a container this takes CAP_SYS_ADMIN; \
             `havenfs demo` without --netns needs no rights"
        )
    })?;
    let mut command = Command::new(&exe);
    command.args(std::env::args_os().skip(1)).arg(ON_STAGE);
    // A Ctrl-C is for this process alone, which passes it on.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    // At whose end the other one stops, so also at the end of this process.
    let child = command.stdin(Stdio::piped()).spawn();
    let mut child = child.with_context(|| format!("cannot start `{}`", exe.display()))?;
    interrupt::note_child(&child);
    loop {
        if let Some(status) = interrupt::has_ended(&mut child) {
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            return Ok(ExitCode::from(code.unwrap_or(EXIT_FAILED)));
        }
        if interrupt::check().is_err() {
            drop(child.stdin.take());
        }
        std::thread::sleep(LOOK);
    }
}

/// Makes oneself at home on the stage: the first thing that the second process does.
pub(super) fn enter() -> Result<()> {
    ensure!(
        getpid().is_init(),
        "`{ON_STAGE}` is for `havenfs demo --netns` itself, which says it in namespaces of its own: \
         here it would change this machine\nhint: leave it out"
    );
    interrupt::stop_at_end_of_input();
    // Nothing that is mounted from here on is seen outside.
    run("mount", &["--make-rprivate", "/"], None)
        .and_then(|()| run("mount", &["-t", "proc", "proc", "/proc"], None))
        .map_err(|error| {
            anyhow!(
                "{error}\nhint: a container that may not mount cannot show this; `havenfs demo` \
                 without --netns needs no rights"
            )
        })
}

/// Does what the lines say to the network that this thread is in.
pub(super) fn ip(lines: &str) -> Result<()> {
    run("ip", &["-batch", "-"], Some(lines))
}

/// Where a program of the system is, if it is there.
pub(super) fn find(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(Into::into);
    let mut dirs = std::env::split_paths(&path).chain(usual);
    dirs.find_map(|dir| Some(dir.join(program)).filter(|path| path.is_file()))
}

/// Runs a program of the system to its end, which must be a good one.
fn run(program: &str, args: &[&str], input: Option<&str>) -> Result<()> {
    use std::io::Write as _;
    let path = find(program).with_context(|| format!("the program `{program}` is not there"))?;
    let mut command = Command::new(path);
    command.args(args).stdin(Stdio::piped());
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = child.with_context(|| format!("cannot start `{program}`"))?;
    if let (Some(mut stdin), Some(text)) = (child.stdin.take(), input) {
        // What it does not read it says something about.
        let _ = stdin.write_all(text.as_bytes());
    }
    drop(child.stdin.take());
    let output = child.wait_with_output()?;
    check_end(program, args, &output)
}

/// Whether a program has ended well.
pub(super) fn check_end(program: &str, args: &[&str], output: &Output) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "`{program} {}` fails: {}",
        args.join(" "),
        said.trim()
    );
    Ok(())
}
