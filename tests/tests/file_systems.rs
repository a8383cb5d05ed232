//! One real Linux client on exports of every kind of file system, of mounts inside an export, and
//! of a server with fewer rights than root has.
//!
//! Each export gets the same work: names, links, data, a listing, and a file that stays open while
//! the server is killed and started again, so that every kind of handle is seen to survive. The
//! mount commands of servers with ports of their own are those that the server itself prints.
//! Needs root.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use havenfs_tests::lab::site::in_lab;
use havenfs_tests::lab::{Machine, Process, Vm, havenfs_binary};

/// The work on an export that is mounted at `$1`. File descriptor 9 stays open over the restart
/// that happens when `/tmp/restart` appears and until `/tmp/restarted` does.
const WORK: &str = r"set -e
    cd $1; rm -rf work; mkdir work; cd work
    mkdir -p a/b; echo one >a/file; ln a/file a/b/link; ln -s ../file a/b/symlink; mkfifo fifo
    [ $(stat -c %h a/file) = 2 ]; [ $(cat a/b/symlink) = one ]
    for i in $(seq 200); do : >a/b/$i; done
    [ $(ls a/b | wc -l) = 202 ]
    mv a/b a/c; mv a/c/7 seven; rm a/c/8
    [ $(ls a/c | wc -l) = 200 ]; [ $(cat a/c/symlink) = one ]
    head -c 3000000 /dev/urandom >data; sum=$(sha256sum <data)
    exec 9<>data; head -c 1000 <&9 >/dev/null
    (cd a/c; touch /tmp/restart; while ! [ -e /tmp/restarted ]; do sleep 0.1; done; ls >/dev/null; [ -p ../../fifo ])
    tail -c +1 /proc/self/fd/9 | sha256sum | grep -q ${sum%% *}
    echo more >&9; sync; mv seven a/eight; rmdir a/c 2>/dev/null && exit 1
    rm -r a/c; [ $(cat a/file) = one ]; exec 9>&-; cd ..; rm -r work";

const LIMIT: Duration = Duration::from_mins(2);

/// Runs [`WORK`] on each mounted export, with a kill and restart of the server in the middle.
fn work(
    c1: &Vm<'_>,
    mounted: &[&str],
    server: &mut Process,
    restart: impl Fn() -> Result<Process>,
) -> Result<()> {
    for at in mounted {
        c1.sh("rm -f /tmp/restart /tmp/restarted")?;
        let line = format!("set -- {at}\n{WORK}");
        let mut running = c1.spawn(
            "work",
            LIMIT,
            &format!("({line}) && echo work done || echo work failed"),
        )?;
        c1.sh_within(LIMIT, "while ! [ -e /tmp/restart ]; do sleep 0.1; done")
            .with_context(|| format!("work at {at} did not get to the restart"))?;
        server.kill()?;
        *server = restart()?;
        c1.sh("touch /tmp/restarted")?;
        running
            .wait_for_line("work done", LIMIT)
            .with_context(|| format!("work at {at}: {}", running.output().unwrap_or_default()))?;
    }
    Ok(())
}

#[test]
fn every_kind_of_file_system_is_served() -> Result<()> {
    in_lab("kinds", |lab| {
        let s1 = lab.host("s1");
        s1.sh("cd /srv; mkdir ext4 xfs btrfs tmpfs overlay lower upper-disk
            for kind in ext4 xfs btrfs; do
                truncate -s 400M $kind.img; mkfs.$kind -q $kind.img; mount -o loop $kind.img $kind
            done
            btrfs -q subvolume create btrfs/subvolume; echo inside >btrfs/subvolume/file
            mount -t tmpfs tmpfs tmpfs
            mount -t tmpfs tmpfs upper-disk; mkdir upper-disk/upper upper-disk/work
            echo lower >lower/file
            mount -t overlay overlay -o lowerdir=lower,upperdir=upper-disk/upper,workdir=upper-disk/work overlay")?;
        let kinds = ["ext4", "xfs", "btrfs", "tmpfs", "overlay"];
        let exports = kinds.map(|kind| format!("/srv/{kind}:*(rw,no_root_squash)"));
        let exports: Vec<&str> = exports.iter().map(String::as_str).collect();
        let mut server = s1.serve_exports(&exports)?;
        let c1 = lab.client("c1")?;
        let places = kinds.map(|kind| format!("/mnt/{kind}"));
        for (kind, place) in kinds.iter().zip(&places) {
            c1.sh(&format!(
                "mkdir {place} && mount -t nfs -o vers=3,nolock s1:/srv/{kind} {place}"
            ))?;
        }
        // The parts of btrfs have inode numbers of their own: clients must see two file systems.
        assert_eq!(c1.sh("cat /mnt/btrfs/subvolume/file")?, "inside\n");
        let devices = c1.sh("stat -c %d /mnt/btrfs /mnt/btrfs/subvolume/file | sort -u | wc -l")?;
        assert_eq!(devices, "2\n");
        // A file of the lower layer keeps its handle when it is written to.
        c1.sh("exec 9<>/mnt/overlay/file; cat <&9; echo upper >&9; sync; grep -q upper /mnt/overlay/file")?;
        let places: Vec<&str> = places.iter().map(String::as_str).collect();
        let worked = work(&c1, &places, &mut server, || s1.serve_exports(&exports));
        c1.sh("umount -a -t nfs")?;
        drop(server);
        worked
    })
}

#[test]
fn mounts_inside_an_export_are_crossed_only_where_allowed() -> Result<()> {
    in_lab("cross", |lab| {
        let s1 = lab.host("s1");
        s1.sh(
            "mkdir -p /srv/plain/inner /srv/cross/inner /srv/parent/child
            for outer in plain cross; do
                echo under >/srv/$outer/inner/under
                mount -t tmpfs tmpfs /srv/$outer/inner
                mkdir /srv/$outer/inner/dir; echo mounted >/srv/$outer/inner/dir/file
            done
            mount -t tmpfs tmpfs /srv/parent/child; echo child >/srv/parent/child/file",
        )?;
        let exports = [
            "/srv/plain:*(rw,no_root_squash)",
            "/srv/cross:*(rw,no_root_squash,crossmnt)",
            "/srv/parent:*(rw,no_root_squash)",
            "/srv/parent/child:*(rw,no_root_squash,nohide)",
        ];
        let mut server = s1.serve_exports(&exports)?;
        let c1 = lab.client("c1")?;
        for name in ["plain", "cross", "parent"] {
            c1.sh(&format!(
                "mkdir /mnt/{name} && mount -t nfs -o vers=3,nolock s1:/srv/{name} /mnt/{name}"
            ))?;
        }
        assert_eq!(c1.sh("ls /mnt/plain/inner")?, "under\n");
        assert_eq!(c1.sh("cat /mnt/cross/inner/dir/file")?, "mounted\n");
        assert_eq!(c1.sh("cat /mnt/parent/child/file")?, "child\n");
        let devices = c1.sh("stat -c %d /mnt/cross /mnt/cross/inner/dir | sort -u | wc -l")?;
        assert_eq!(devices, "2\n", "a mount is a file system of its own");
        work(&c1, &["/mnt/cross/inner"], &mut server, || {
            s1.serve_exports(&exports)
        })?;
        c1.sh("umount -a -t nfs")?;
        Ok(())
    })
}

/// Docker's default set; what is missing for us is CAP_DAC_READ_SEARCH (opening by handle) and
/// CAP_SYS_ADMIN.
const DOCKER: &str = "-all,+chown,+dac_override,+fsetid,+fowner,+mknod,+net_raw,+setgid,+setuid,\
    +setfcap,+setpcap,+net_bind_service,+sys_chroot,+kill,+audit_write";

#[test]
fn containers_and_users_without_privilege_serve_with_the_handle_table() -> Result<()> {
    in_lab("rights", |lab| {
        let s1 = lab.host("s1");
        let binary = havenfs_binary()?;
        s1.sh(
            "mkdir -m 777 /srv/docker /srv/userns /srv/user /srv/state /srv/state/user
            chown 1001:1001 /srv/user /srv/state/user",
        )?;
        // The ready line says how to mount, with locks where they can be found.
        let machine = Machine {
            locks: true,
            ..Machine::default()
        };
        let c1 = lab.boot("c1", &machine)?;
        // Each its own: the server before may still be on its way out.
        let high = [
            "--nfs-port",
            "12049",
            "--mount-port",
            "12050",
            "--nlm-port",
            "12051",
        ];
        let higher = [
            "--nfs-port",
            "13049",
            "--mount-port",
            "13050",
            "--nlm-port",
            "13051",
            "--nsm-port",
            "13052",
        ];
        for (name, prefix, ports) in [
            ("docker", vec!["setpriv", "--bounding-set", DOCKER], &[][..]),
            (
                "userns",
                vec!["unshare", "--user", "--map-root-user"],
                &high[..],
            ),
            (
                "user",
                vec![
                    "setpriv",
                    "--reuid=1001",
                    "--regid=1001",
                    "--clear-groups",
                    "--no-new-privs",
                ],
                &higher[..],
            ),
        ] {
            let start = || -> Result<(Process, String)> {
                let mut command = s1.command(prefix[0])?;
                command
                    .args(&prefix[1..])
                    .arg(&binary)
                    .args(["serve", "--metrics", "off"]);
                command
                    .arg("--export")
                    .arg(format!("/srv/{name}:*(rw,no_root_squash)"));
                command.arg("--state-dir").arg(format!("/srv/state/{name}"));
                command
                    .arg("--control")
                    .arg(format!("/srv/state/{name}/control"));
                command.args(ports);
                let mut server = s1.spawn(name, &mut command)?;
                let line = server.wait_for_line("havenfs ready", LIMIT)?;
                Ok((server, line))
            };
            let (mut server, line) = start().with_context(|| format!("server as {name}"))?;
            let (_, mount) = line
                .split_once("; mount ")
                .context("the ready line says how to mount")?;
            let at = format!("/mnt/{name}");
            let mount = mount
                .strip_suffix(" /mnt")
                .context("the command ends with /mnt")?;
            c1.sh(&format!("mkdir {at}; mount {mount} {at}"))
                .with_context(|| format!("as {name}: {line}"))?;
            work(&c1, &[&at], &mut server, || Ok(start()?.0))
                .with_context(|| format!("server as {name}"))?;
            let owner = c1.sh(&format!(
                "touch /mnt/{name}/mine; stat -c %u /mnt/{name}/mine"
            ))?;
            ensure!(
                owner.trim() == if name == "user" { "1001" } else { "0" },
                "{name}: {owner}"
            );
            c1.sh(&format!("umount /mnt/{name}"))?;
        }
        Ok(())
    })
}
