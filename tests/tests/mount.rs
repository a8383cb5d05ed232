//! A real Linux client works on our export: mounting, reading, two users, much data, many names,
//! and a server that is killed while the client writes.
//!
//! The client is a Linux kernel in a virtual machine and the server the real binary on a host of
//! the lab; what the client sees is compared with what lies in the server's own file system.
//! Needs root. The POSIX test suites have a file of their own, power cuts too.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use havenfs_tests::lab::acks::{Answered, wait_for_changes};
use havenfs_tests::lab::site::{EXPORT, copy_out, in_lab};
use havenfs_tests::lab::{Process, Vm};

/// Every path below the current directory with its attributes, and every file's checksum.
const LISTING: &str = "export LC_ALL=C; find . -printf '%p %y %s %m %U %G %n %T@ %l\\n' | sort
    find . -type f -print0 | sort -z | xargs -0 sha256sum";

#[test]
fn a_linux_client_mounts_reads_and_unmounts() -> Result<()> {
    in_lab("read", |lab| {
        let s1 = lab.host("s1");
        s1.sh(&format!(
            "mkdir -p {EXPORT} && cd {EXPORT}
             mkdir -p many deep/a/b/c && ln -s ../many/17 deep/link
             for i in $(seq 300); do echo $i >many/$i; done
             head -c 64M /dev/urandom >big; truncate -s 5G sparse.end && echo end >>sparse.end
             printf x >'name with blanks' && printf y >$'bytes\\xff\\x01'
             chown 1001:1002 many/1 && chmod 4751 many/1 && ln many/2 deep/a/two"
        ))?;
        // Checksums of the sparse file's 5 GiB would tell nothing more than its end does.
        let listing = LISTING.replace("-type f", "-type f -size -1000000k");
        let right = s1.sh(&format!("cd {EXPORT}; {listing}"))?;
        let _server = s1.serve()?;

        let c1 = lab.client("c1")?;
        c1.mount("s1", EXPORT)?;
        let seen = c1.sh_within(MINUTES, &format!("cd /mnt; {listing}"))?;
        assert_eq!(seen, right);
        assert_eq!(c1.sh("tail -c 4 /mnt/sparse.end")?, "end\n");
        assert_eq!(
            c1.sh("readlink /mnt/deep/link; cat /mnt/deep/link")?,
            "../many/17\n17\n"
        );
        assert_eq!(c1.exec("cat /mnt/missing")?.status, 1);

        c1.unmount()?;
        assert_eq!(c1.sh("ls -A /mnt")?, "");
        // A directory below the export is mounted as well.
        c1.mount("s1", &format!("{EXPORT}/many"))?;
        assert_eq!(c1.sh("cat /mnt/300")?, "300\n");
        c1.unmount()
    })
}

#[test]
fn showmount_and_rpcinfo_tell_the_truth() -> Result<()> {
    in_lab("tools", |lab| {
        let _server = lab.host("s1").serve()?;
        let c1 = lab.client("c1")?;

        let exports = c1.sh("showmount --no-headers -e s1")?;
        assert_eq!(
            exports.split_whitespace().collect::<Vec<_>>(),
            [EXPORT, "*"]
        );

        let programs = c1.sh("rpcinfo -p s1")?;
        for (program, version, transport, port) in [
            ("100000", "2", "tcp", "111"),
            ("100000", "2", "udp", "111"),
            ("100003", "3", "tcp", "2049"),
            ("100005", "1", "udp", "20048"),
            ("100005", "3", "tcp", "20048"),
            ("100005", "3", "udp", "20048"),
        ] {
            let told = programs.lines().any(|line| {
                let words: Vec<_> = line.split_whitespace().collect();
                words.starts_with(&[program, version, transport, port])
            });
            ensure!(
                told,
                "{program} {version} {transport} {port} is missing in\n{programs}"
            );
        }
        // rpcbind's own protocol, versions 3 and 4.
        assert!(c1.sh("rpcinfo -s s1")?.contains("100003"));
        c1.sh(
            "rpcinfo -T tcp s1 nfs 3 && rpcinfo -T tcp s1 mountd 3 && rpcinfo -T udp s1 mountd 3",
        )?;
        assert_ne!(c1.exec("rpcinfo -T tcp s1 nfs 4")?.status, 0);

        assert_eq!(c1.sh("showmount --no-headers -a s1")?, "");
        c1.mount("s1", EXPORT)?;
        assert_eq!(
            c1.sh("showmount --no-headers -a s1")?.trim(),
            format!("10.77.0.11:{EXPORT}")
        );
        assert_eq!(c1.sh("showmount --no-headers -d s1")?.trim(), EXPORT);
        c1.unmount()?;
        assert_eq!(c1.sh("showmount --no-headers -a s1")?, "");
        Ok(())
    })
}

#[test]
fn users_get_what_is_theirs_and_nothing_else() -> Result<()> {
    // In order, in one directory that all may write to and that is sticky.
    const STEPS: &[(&str, &str, bool)] = &[
        ("u1", "umask 077; mkdir own && echo secret >own/file", true),
        ("u2", "cat own/file", false),
        ("u2", "ls own", false),
        ("u2", "touch own/new", false),
        ("u1", "grep -q secret own/file", true),
        ("root", "grep -q secret own/file", true),
        ("u1", "echo one >mine && chmod 644 mine", true),
        ("u2", "cat mine", true),
        ("u2", "echo two >>mine", false),
        ("u2", "rm -f mine", false),
        ("u2", "mv mine theirs", false),
        ("u2", "chmod 666 mine", false),
        ("u2", "touch -d yesterday mine", false),
        ("u1", "chown u2 mine", false),
        ("u1", "chgrp u2 mine", false),
        // u1 and u2 are in team, u3 is not.
        ("u1", "chgrp team mine && chmod 640 mine", true),
        ("u2", "cat mine", true),
        ("u3", "cat mine", false),
        // A file that was opened stays usable to its owner, whatever its mode becomes.
        (
            "u1",
            "exec 3>kept; chmod 0 kept; echo late >&3 && exec 3>&-",
            true,
        ),
        ("root", "grep -q late kept", true),
        ("u1", "cat kept", false),
        // A directory with the set-group-id bit gives its group to what is made in it.
        (
            "root",
            "mkdir shared && chgrp team shared && chmod 2775 shared",
            true,
        ),
        (
            "u1",
            "touch shared/file && test $(stat -c %U:%G shared/file) = u1:team",
            true,
        ),
        (
            "u2",
            "mkdir shared/dir && test $(stat -c %G:%a shared/dir) = team:2755",
            true,
        ),
        ("u3", "touch shared/no", false),
        // A write by somebody else takes the set-user-id bit away.
        (
            "u1",
            "cp /bin/true tool && chmod 4777 tool && test $(stat -c %a tool) = 4777",
            true,
        ),
        ("u2", "echo more >>tool", true),
        ("u1", "test $(stat -c %a tool) = 777", true),
        ("u2", "mkfifo pipe && test -p pipe && mknod no c 1 3", false),
        (
            "root",
            "mknod null c 1 3 && test -c null && chown u2:u2 mine",
            true,
        ),
        ("u2", "test $(stat -c %U:%G mine) = u2:u2 && rm mine", true),
    ];
    in_lab("users", |lab| {
        let s1 = lab.host("s1");
        s1.sh(&format!(
            "mkdir -p {EXPORT}/work /srv/squash && chmod 1777 {EXPORT}/work /srv/squash"
        ))?;
        let _server = s1.serve_exports(&[
            &format!("{EXPORT}:*(rw,no_root_squash)"),
            "/srv/squash:*(rw)",
        ])?;
        let c1 = lab.client("c1")?;
        c1.mount("s1", EXPORT)?;
        for &(user, line, allowed) in STEPS {
            let output = c1.exec(&as_user(user, &format!("cd /mnt/work; {line}")))?;
            ensure!(
                (output.status == 0) == allowed,
                "{user}: {line}\nshould {}: {output:?}",
                if allowed { "work" } else { "fail" }
            );
        }
        c1.unmount()?;

        c1.mount("s1", "/srv/squash")?;
        let owner = c1.sh("touch /mnt/by-root && stat -c %u:%g /mnt/by-root")?;
        assert_eq!(owner.trim(), "65534:65534");
        c1.sh(&as_user("u1", "touch /mnt/by-u1"))?;
        assert_ne!(c1.exec("chown u2 /mnt/by-u1")?.status, 0);
        assert_eq!(
            s1.sh("stat -c %u:%g /srv/squash/by-u1")?.trim(),
            "1001:1001"
        );
        c1.unmount()
    })
}

#[test]
fn a_gibibyte_is_written_and_read_back() -> Result<()> {
    in_lab("gibibyte", |lab| {
        let s1 = lab.host("s1");
        let _server = s1.serve()?;
        let c1 = lab.client("c1")?;
        c1.mount("s1", EXPORT)?;
        let written = c1.sh_within(
            MINUTES,
            "head -c 1G /dev/urandom | tee /mnt/big | sha256sum",
        )?;
        // Mounted anew, so that nothing comes from the client's cache.
        c1.unmount()?;
        assert_eq!(s1.sh(&format!("sha256sum <{EXPORT}/big"))?, written);
        c1.mount("s1", EXPORT)?;
        assert_eq!(c1.sh_within(MINUTES, "sha256sum </mnt/big")?, written);
        c1.unmount()
    })
}

#[test]
fn a_directory_of_100_000_files_is_made_listed_and_removed() -> Result<()> {
    // Half of them are made by the client: each costs it some three calls.
    const MAKE: &str = "import os
for i in range(50000, 100000):
    os.close(os.open(f'/mnt/many/file-{i:06}', os.O_CREAT | os.O_WRONLY))";
    const LIST: &str = "import os
names = os.listdir('/mnt/many')
assert len(names) == 100000, len(names)
assert set(names) == {f'file-{i:06}' for i in range(100000)}
with os.scandir('/mnt/many') as found:
    assert all(e.is_file(follow_symlinks=False) for e in found)";
    const REMOVE: &str = "import os
for name in os.listdir('/mnt/many'):
    os.unlink('/mnt/many/' + name)
assert os.listdir('/mnt/many') == []
os.rmdir('/mnt/many')";
    in_lab("names", |lab| {
        let s1 = lab.host("s1");
        s1.sh(&format!(
            "mkdir -p {EXPORT}/many && cd {EXPORT}/many && seq -f 'file-%06.0f' 0 49999 | xargs touch"
        ))?;
        let _server = s1.serve()?;
        let c1 = lab.client("c1")?;
        c1.mount("s1", EXPORT)?;
        for program in [MAKE, LIST, REMOVE] {
            c1.sh_within(MINUTES, &format!("python3 -c \"{program}\""))?;
        }
        assert_eq!(s1.sh(&format!("ls -A {EXPORT}"))?, "");
        c1.unmount()
    })
}

#[test]
fn a_killed_server_loses_nothing_answered_and_no_handle() -> Result<()> {
    const KILLS: usize = 3;
    const WORKERS: [&str; 2] = ["w1", "w2"];
    in_lab("killed", |lab| {
        let s1 = lab.host("s1");
        let mut server = s1.serve()?;
        let c1 = lab.client("c1")?;
        c1.mount("s1", EXPORT)?;
        // Beside the small changes a stream of data, most of it not yet committed when the
        // server dies: the client must notice, by the write verifier, and send it again. The
        // client keeps all of it in memory too, and must have room for it.
        let mut stream = c1.spawn(
            "stream",
            MINUTES,
            "for i in $(seq 6); do head -c 12M /dev/urandom | tee /tmp/part >>/tmp/sent
               cat /tmp/part >>/mnt/stream || exit 1; done
             sync /mnt/stream && sha256sum </tmp/sent",
        )?;
        let mut workers = Vec::new();
        for (seed, name) in WORKERS.iter().enumerate() {
            workers.push(c1.spawn_worker(name, seed as u64)?);
        }
        for _ in 0..KILLS {
            for worker in &workers {
                wait_for_changes(worker, 100, MINUTES)?;
            }
            server.kill()?;
            settle(&workers)?;
            let copy = lab.share().join("copy");
            copy_out(&s1, EXPORT, &copy)?;
            for (name, worker) in WORKERS.iter().zip(&workers) {
                let losses = Answered::parse(&worker.output()?)?.losses(&copy, name);
                ensure!(losses.is_empty(), "answered, but lost: {losses:#?}");
            }
            server = s1.serve()?;
        }
        for worker in &workers {
            wait_for_changes(worker, 100, MINUTES)?;
        }
        assert!(stream.wait(MINUTES)?.success(), "{}", stream.output()?);
        assert_eq!(
            s1.sh(&format!("sha256sum <{EXPORT}/stream"))?,
            stream.output()?
        );
        drop(workers);
        wait_until_unmounted(&c1)
    })
}

/// Waits until no worker says anything more: what they were told has come through.
fn settle(workers: &[Process]) -> Result<()> {
    let deadline = Instant::now() + MINUTES;
    let mut before = Vec::new();
    loop {
        let said: Vec<String> = workers.iter().map(Process::output).collect::<Result<_>>()?;
        if said == before {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "workers get answers from a dead server"
        );
        before = said;
        std::thread::sleep(QUIET);
    }
}

/// Unmounts as soon as the client's programs, which were just killed, are gone.
fn wait_until_unmounted(vm: &Vm<'_>) -> Result<()> {
    let deadline = Instant::now() + MINUTES;
    while vm.exec("umount /mnt")?.status != 0 {
        ensure!(Instant::now() < deadline, "still busy\n{}", vm.sh("ps ax")?);
    }
    Ok(())
}

/// The shell command that runs `line` as a user with that user's groups.
fn as_user(user: &str, line: &str) -> String {
    let quoted = line.replace('\'', "'\\''");
    match user {
        "root" => format!("bash -c '{quoted}'"),
        _ => format!("setpriv --reuid {user} --regid {user} --init-groups bash -c '{quoted}'"),
    }
}

const MINUTES: Duration = Duration::from_mins(5);
/// An answer reaches the log within milliseconds.
const QUIET: Duration = Duration::from_millis(500);
