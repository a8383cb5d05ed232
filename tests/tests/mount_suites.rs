//! Programs that others wrote to judge file systems and NFS servers, run by a real Linux client on
//! our export: pjdfstest (POSIX calls and their errors), fsx (random reads, writes, truncates and
//! mappings of one file) and libnfs's own client.
//!
//! pjdfstest must fail exactly where `tests/lab/pjdfstest.expected` says so. From what was run
//! `docs/conformance.md` is written anew; it holds no times or dates, so it changes only when a
//! result does. Needs root.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use havenfs_tests::lab::Vm;
use havenfs_tests::lab::site::{EXPORT, in_lab};

#[test]
fn posix_suites_fail_only_where_expected() -> Result<()> {
    in_lab("suites", |lab| {
        let _server = lab.host("s1").serve()?;
        let c1 = lab.client("c1")?;
        c1.mount("s1", EXPORT)?;
        let expected = expected_failures()?;
        let (verdicts, told) = run_pjdfstest(&c1)?;

        let with = |verdict: &str| -> BTreeSet<&String> {
            let of = verdicts.iter().filter(|(_, v)| *v == verdict);
            of.map(|(name, _)| name).collect()
        };
        let failed = with("FAILED");
        let wrong: Vec<_> = failed
            .iter()
            .filter(|n| !expected.contains_key(**n))
            .collect();
        ensure!(
            wrong.is_empty(),
            "pjdfstest: failed unexpectedly: {wrong:#?}\n{told}"
        );
        let healed: Vec<_> = expected.keys().filter(|n| !failed.contains(n)).collect();
        ensure!(
            healed.is_empty(),
            "expected to fail, but did not: {healed:#?}"
        );

        for seed in FSX_SEEDS {
            c1.sh_within(LIMIT, &fsx_command(seed))?;
        }
        c1.unmount()?;
        write_report(&expected, &with("ok"), &with("skipped"))
    })
}

#[test]
fn libnfs_lists_copies_and_reads() -> Result<()> {
    in_lab("libnfs", |lab| {
        let s1 = lab.host("s1");
        s1.sh(&format!(
            "mkdir -p {EXPORT}/dir && seq 100000 >{EXPORT}/dir/numbers"
        ))?;
        let _server = s1.serve()?;
        let c1 = lab.client("c1")?;
        let url = format!("nfs://10.77.0.1{EXPORT}");
        let listed = c1.sh(&format!("nfs-ls {url}/dir"))?;
        ensure!(
            listed.contains("588895") && listed.contains("numbers"),
            "{listed}"
        );
        let sum = s1.sh(&format!("sha256sum <{EXPORT}/dir/numbers"))?;
        assert_eq!(
            c1.sh(&format!("nfs-cat {url}/dir/numbers | sha256sum"))?,
            sum
        );

        let made = c1.sh("head -c 9000001 /dev/urandom | tee /tmp/made | sha256sum")?;
        c1.sh(&format!("nfs-cp /tmp/made {url}/made"))?;
        assert_eq!(s1.sh(&format!("sha256sum <{EXPORT}/made"))?, made);
        c1.sh(&format!(
            "nfs-cp {url}/made /tmp/back && cmp /tmp/made /tmp/back"
        ))?;
        assert_ne!(c1.exec(&format!("nfs-cat {url}/missing"))?.status, 0);
        Ok(())
    })
}

/// Runs the suite; returns each test's verdict and what was printed about those that failed.
fn run_pjdfstest(vm: &Vm<'_>) -> Result<(BTreeMap<String, String>, String)> {
    vm.put(&lab_file("pjdfstest.toml"), "/tmp/pjdfstest.toml")?;
    vm.sh("mkdir /mnt/pjdfstest")?;
    // Its exit status only says that something failed, which is to be expected.
    let output = vm.exec_within(LIMIT, PJDFSTEST_COMMAND)?;
    let mut verdicts = BTreeMap::new();
    let mut told = output.stderr;
    let mut about_failure = false;
    for line in output.stdout.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(verdict), None) = (words.next(), words.next(), words.next())
            && ["ok", "FAILED", "skipped"].contains(&verdict)
        {
            verdicts.insert(name.to_owned(), verdict.to_owned());
            about_failure = verdict == "FAILED";
        }
        if about_failure {
            told.push_str(line);
            told.push('\n');
        }
    }
    ensure!(
        verdicts.len() >= PJDFSTEST_TESTS,
        "only {} tests ran\n{told}",
        verdicts.len()
    );
    Ok((verdicts, told))
}

/// The tests that are expected to fail, with the reasons.
fn expected_failures() -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(lab_file("pjdfstest.expected"))?;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let split = lines.map(|line| {
        let (name, reason) = line.split_once(": ").context("NAME: REASON")?;
        Ok((name.to_owned(), reason.to_owned()))
    });
    split.collect()
}

fn write_report(
    expected: &BTreeMap<String, String>,
    passed: &BTreeSet<&String>,
    skipped: &BTreeSet<&String>,
) -> Result<()> {
    let mut text = String::new();
    writeln!(text, "{REPORT_HEAD}")?;
    writeln!(text, "## pjdfstest {PJDFSTEST_VERSION}\n")?;
    writeln!(text, "Command, in the client: `{PJDFSTEST_COMMAND}`,")?;
    writeln!(text, "with `tests/lab/pjdfstest.toml`.\n")?;
    writeln!(
        text,
        "| passed | failed as expected | skipped by the suite |"
    )?;
    writeln!(text, "|---|---|---|")?;
    writeln!(
        text,
        "| {} | {} | {} |\n",
        passed.len(),
        expected.len(),
        skipped.len()
    )?;
    writeln!(text, "Expected failures (one that passes fails the run):\n")?;
    for (name, reason) in expected {
        writeln!(text, "- `{name}`: {reason}")?;
    }
    writeln!(
        text,
        "\nSkipped, since the suite finds no way to test it on this file system:\n"
    )?;
    for name in skipped {
        writeln!(text, "- `{name}`")?;
    }
    writeln!(text, "\n## fsx {FSX_VERSION}\n")?;
    for seed in FSX_SEEDS {
        writeln!(text, "- `{}`: passed", fsx_command(seed))?;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/conformance.md");
    if fs::read_to_string(&path).ok().as_ref() != Some(&text) {
        fs::write(&path, text).context("docs/conformance.md")?;
    }
    Ok(())
}

fn fsx_command(seed: u32) -> String {
    format!("/suites/fsx -N {FSX_OPERATIONS} -S {seed} -P /tmp /mnt/fsx-{seed}")
}

fn lab_file(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("lab").join(name)
}

const REPORT_HEAD: &str = "# Conformance

Written by the test run (`tests/tests/mount_suites.rs`), not by hand. The client is a Linux kernel
in a virtual machine that mounted our export with `mount -t nfs -o vers=3,nolock`; the server
exports a tmpfs with `(rw,no_root_squash)`.
";
/// /dev/shm is the second file system, for calls that must not cross.
const PJDFSTEST_COMMAND: &str = "cd /tmp && NO_COLOR=1 /suites/pjdfstest -c /tmp/pjdfstest.toml \\
    -p /mnt/pjdfstest -s /dev/shm";
/// As pinned in tests/lab/fetch.sh.
const PJDFSTEST_VERSION: &str = "0.2.2";
const PJDFSTEST_TESTS: usize = 398;
const FSX_VERSION: &str = "0.3.2";
const FSX_SEEDS: [u32; 3] = [1, 2, 3];
const FSX_OPERATIONS: u32 = 4000;
const LIMIT: Duration = Duration::from_mins(5);
