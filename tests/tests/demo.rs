//! `havenfs demo`: it tells its story to the end, notices each planted fault, and leaves nothing
//! behind, however it ends; on loopback addresses and, as root, on a network of the nodes' own.
//!
//! Runs the built binary as a user would: from another directory, without a home. Judges the exit
//! status and the last line, and looks for processes and files that are left.

use std::fs::{self, Permissions};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use havenfs_tests::lab::havenfs_binary;
use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

/// The promise of the demo itself.
const TIME_MAX: Duration = Duration::from_mins(1);
/// How long processes may take to be gone.
const GONE_TIME_MAX: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);
/// Somebody without rights.
const NOBODY: u32 = 65_534;
const COLUMNS: usize = 80;

/// A place for the demo's temporary directory.
struct Place(TempDir);

impl Place {
    fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("havenfs-").tempdir()?;
        fs::set_permissions(dir.path(), Permissions::from_mode(0o777))?;
        Ok(Self(dir))
    }

    fn command(&self, binary: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(binary);
        command.arg("demo").args(args).current_dir("/");
        command.env("TMPDIR", self.0.path()).env_remove("HOME");
        command
    }

    /// Runs the demo to its end; returns what it wrote, and fails if it leaves anything behind.
    fn run(&self, args: &[&str]) -> Result<Output> {
        let began = Instant::now();
        let output = self.command(&havenfs_binary()?, args).output()?;
        ensure!(began.elapsed() < TIME_MAX, "{:?}", began.elapsed());
        self.nothing_is_left()?;
        Ok(output)
    }

    /// Waits until no process has this place in its command line, and looks for files.
    fn nothing_is_left(&self) -> Result<()> {
        self.no_process_is_left()?;
        let deadline = Instant::now() + GONE_TIME_MAX;
        loop {
            let files: Vec<PathBuf> = fs::read_dir(self.0.path())?
                .map(|entry| Ok(entry?.path()))
                .collect::<Result<_>>()?;
            if files.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "left: {files:?}");
            std::thread::sleep(POLL);
        }
    }

    fn no_process_is_left(&self) -> Result<()> {
        let deadline = Instant::now() + GONE_TIME_MAX;
        while let Some(process) = self.process()? {
            ensure!(Instant::now() < deadline, "left: {process}");
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn process(&self) -> Result<Option<String>> {
        let place = self.0.path().to_string_lossy().into_owned();
        for process in fs::read_dir("/proc")? {
            // It may end while it is looked at.
            let line = fs::read(process?.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains(&place) {
                return Ok(Some(line));
            }
        }
        Ok(None)
    }

    /// Starts the demo and waits until it writes a line with these words.
    fn start_until(&self, args: &[&str], words: &str) -> Result<Child> {
        let mut command = self.command(&havenfs_binary()?, args);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let output = child.stdout.take().context("no standard output")?;
        let mut told = String::new();
        for line in BufReader::new(output).lines() {
            let line = line?;
            if line.contains(words) {
                return Ok(child);
            }
            told.push_str(&line);
            told.push('\n');
        }
        let status = child.wait()?;
        bail!("the demo ends before it says `{words}`: {status}\n{told}")
    }
}

fn lines(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(str::to_owned).collect()
}

fn told(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    format!("{}\n{}\n{errors}", output.status, lines(output).join("\n"))
}

/// Checks the exit status and that the last line begins so; returns the last line.
fn ends_with(output: &Output, code: i32, begin: &str) -> Result<String> {
    ensure!(output.status.code() == Some(code), "{}", told(output));
    let last = lines(output).pop().unwrap_or_default();
    ensure!(last.starts_with(begin), "{}", told(output));
    Ok(last)
}

#[test]
fn the_story_ends_well() -> Result<()> {
    let output = Place::new()?.run(&["--verbose"])?;
    ends_with(&output, 0, "OK: ")?;
    let fits = |line: &String| line.len() <= COLUMNS && line.is_ascii();
    ensure!(lines(&output).iter().all(fits), "{}", told(&output));
    // Not a terminal: no colours.
    ensure!(!output.stdout.contains(&0x1b), "{}", told(&output));
    Ok(())
}

#[test]
fn a_paused_node_says_nothing_when_it_wakes() -> Result<()> {
    let output = Place::new()?.run(&["--pause"])?;
    ends_with(&output, 0, "OK: ")?;
    Ok(())
}

#[test]
fn a_normal_user_can_run_it() -> Result<()> {
    let place = Place::new()?;
    if !geteuid().is_root() {
        // Then all other tests show it.
        return Ok(());
    }
    // Where the binary is, nobody else may be allowed to go.
    let elsewhere = Place::new()?;
    let binary = elsewhere.0.path().join("havenfs");
    fs::copy(havenfs_binary()?, &binary)?;
    let mut command = place.command(&binary, &[]);
    let output = command.uid(NOBODY).gid(NOBODY).output()?;
    ends_with(&output, 0, "OK: ")?;
    place.nothing_is_left()
}

/// Runs the demo with a planted fault, which it has to name with one of these words.
fn is_noticed(fault: &str, words: &[&str]) -> Result<()> {
    let output = Place::new()?.run(&["--break", fault])?;
    let last = ends_with(&output, 1, "BROKEN PROMISE: ")?;
    ensure!(words.iter().any(|word| last.contains(word)), "{last}");
    Ok(())
}

#[test]
fn a_forgotten_lock_is_noticed() -> Result<()> {
    is_noticed("grant", &["forgotten", "granted"])
}

#[test]
fn an_answer_without_a_lease_is_noticed() -> Result<()> {
    is_noticed("lease", &["lease"])
}

#[test]
fn data_that_was_only_in_memory_is_noticed() -> Result<()> {
    is_noticed("fsync", &["acknowledged records are gone"])
}

#[test]
fn a_directory_with_something_in_it_is_refused() -> Result<()> {
    let (place, mine) = (Place::new()?, tempfile::tempdir()?);
    fs::write(mine.path().join("mine"), "")?;
    let root = mine.path().to_string_lossy().into_owned();
    let output = place.run(&["--root", &root])?;
    ensure!(output.status.code() == Some(2), "{}", told(&output));
    ensure!(told(&output).contains("hint: "), "{}", told(&output));
    ensure!(mine.path().join("mine").exists());
    Ok(())
}

#[test]
fn keep_keeps_the_logs() -> Result<()> {
    let (place, mine) = (Place::new()?, tempfile::tempdir()?);
    let root = mine.path().to_string_lossy().into_owned();
    let output = place.run(&["--keep", "--root", &root])?;
    ends_with(&output, 0, "OK: ")?;
    let kept = lines(&output).iter().any(|line| line.contains("kept: "));
    ensure!(kept, "{}", told(&output));
    for node in ["n1", "n2", "n3"] {
        ensure!(mine.path().join(node).join("log").exists(), "{node}");
    }
    Ok(())
}

#[test]
fn it_cleans_up_after_an_interrupt() -> Result<()> {
    let place = Place::new()?;
    let mut child = place.start_until(&[], "GRANTED")?;
    kill_process(Pid::from_child(&child), Signal::INT)?;
    let status = child.wait()?;
    ensure!(status.code() == Some(130), "{status}");
    place.nothing_is_left()
}

#[test]
fn its_nodes_do_not_outlive_it() -> Result<()> {
    let place = Place::new()?;
    let mut child = place.start_until(&[], "GRANTED")?;
    child.kill()?;
    child.wait()?;
    place.no_process_is_left()
}

/// Whether there can be a Linux kernel in a virtual machine here.
fn has_user_mode_linux() -> bool {
    let programs = ["/usr/bin/linux.uml", "/sbin/mount.nfs", "/sbin/rpc.statd"];
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    programs.iter().all(|program| Path::new(program).exists()) && !processor.contains("amx_tile")
}

#[test]
fn root_machines_on_a_network_of_their_own() -> Result<()> {
    let output = Place::new()?.run(&["--netns", "--verbose"])?;
    ends_with(&output, 0, "OK: ")?;
    let lines = lines(&output);
    let fits = |line: &String| line.len() <= COLUMNS && line.is_ascii();
    ensure!(lines.iter().all(fits), "{}", told(&output));
    let text = lines.join("\n");
    let mut wanted = vec![
        "192.0.2.100 is no longer on n1",
        "192.0.2.100 is on n2's card",
        "n2 announces by ARP",
        "n1 announces by ARP",
    ];
    if has_user_mode_linux() {
        wanted.extend([
            "K locks bytes",
            "K's kernel writes on",
            "K unlocks bytes",
            "its kernel log has no word",
        ]);
    } else {
        wanted.push("no Linux kernel takes part");
    }
    for words in wanted {
        ensure!(text.contains(words), "not told: {words}\n{}", told(&output));
    }
    let devices = Path::new("/sys/class/net");
    for cable in ["n1", "n2", "n3", "linux"] {
        ensure!(!devices.join(cable).exists(), "left: {cable}");
    }
    Ok(())
}

#[test]
fn root_a_forgotten_lock_is_noticed_on_a_network_of_their_own() -> Result<()> {
    let mine = tempfile::tempdir()?;
    let root = mine.path().to_string_lossy().into_owned();
    let args = ["--netns", "--break", "grant", "--root", &root];
    let output = Place::new()?.run(&args)?;
    let last = ends_with(&output, 1, "BROKEN PROMISE: ")?;
    let words = ["forgotten", "granted"];
    ensure!(words.iter().any(|word| last.contains(word)), "{last}");
    // The directory is not the demo's own, but what was in it is.
    let left = fs::read_dir(mine.path())?.count();
    ensure!(left == 0, "{left} files are left");
    Ok(())
}

#[test]
fn root_two_at_once_end_without_a_trace() -> Result<()> {
    let (stopped, killed) = (Place::new()?, Place::new()?);
    let mut first = stopped.start_until(&["--netns"], "GRANTED")?;
    // Not later in its story, or the first one's is over.
    let mut second = killed.start_until(&["--netns"], "have found each other")?;
    kill_process(Pid::from_child(&first), Signal::INT)?;
    let status = first.wait()?;
    ensure!(status.code() == Some(130), "{status}");
    stopped.nothing_is_left()?;
    second.kill()?;
    second.wait()?;
    killed.nothing_is_left()
}

#[test]
fn root_a_normal_user_is_told_what_a_network_takes() -> Result<()> {
    let elsewhere = Place::new()?;
    let binary = elsewhere.0.path().join("havenfs");
    fs::copy(havenfs_binary()?, &binary)?;
    let place = Place::new()?;
    let mut command = place.command(&binary, &["--netns"]);
    let output = command.uid(NOBODY).gid(NOBODY).output()?;
    ensure!(output.status.code() == Some(2), "{}", told(&output));
    ensure!(told(&output).contains("hint: "), "{}", told(&output));
    place.nothing_is_left()
}
