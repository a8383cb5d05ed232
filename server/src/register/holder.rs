//! Who holds a port and how it is freed, for the hint of an error message.
//!
//! Owns reading `/proc`; a guess that can't be made is `None`. Never used for a decision.
//!
//! Source: proc(5), `/proc/net/tcp` and `/proc/pid/fd`.

use std::fs;
use std::path::Path;

use havenfs_rpc::program;

use super::how_to_free;

/// The column of `/proc/net/tcp` and its siblings that holds the inode.
const INODE_COLUMN: usize = 9;
/// The state of a listening socket in the fourth column of `/proc/net/tcp`.
const LISTENING: &str = "0A";
/// What is said of a socket that no process has.
const NO_PROCESS: &str = "the kernel or a process outside this container";

/// Describes the holder of `port` in this network namespace: "`rpcbind` (pid 123)".
pub(crate) fn port_holder(port: u16) -> Option<String> {
    let mut inodes = Vec::new();
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        // A kernel without IPv6 lacks two of them.
        let text = fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
        let found = socket_inodes(&text, port, table.starts_with("tcp"));
        inodes.extend(found.into_iter().map(|inode| format!("socket:[{inode}]")));
    }
    if inodes.is_empty() {
        return None;
    }
    let processes = fs::read_dir("/proc").ok()?.filter_map(Result::ok);
    for process in processes {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        if holds_one(&process.path().join("fd"), &inodes) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!(
                "`{}` (pid {pid})",
                name.trim_end().escape_default()
            ));
        }
    }
    // Only root sees the sockets of every process, so that only then none of them has it.
    rustix::process::geteuid()
        .is_root()
        .then(|| NO_PROCESS.to_owned())
}

/// What to do about a port that `program` needs and `holder`, as [`port_holder`] describes it, has;
/// `option` chooses another port.
pub(crate) fn free_port_hint(program: u32, holder: Option<&str>, option: &str) -> String {
    let is_usual_one = match (program, holder) {
        (program::NFS, None | Some(NO_PROCESS)) => nfsd_runs(),
        (program::NLM, Some(holder)) => holder == NO_PROCESS,
        (program::NSM, Some(holder)) => holder.starts_with("`rpc.statd`"),
        _ => false,
    };
    let first = match holder {
        _ if is_usual_one => how_to_free(program),
        Some(_) => "stop it",
        None => "find out with `ss -lnp` as root who has it",
    };
    format!("{first}, or choose another port with {option}")
}

/// Whether the kernel's NFS server runs.
pub(crate) fn nfsd_runs() -> bool {
    let threads = fs::read_to_string("/proc/fs/nfsd/threads").unwrap_or_default();
    threads.trim().parse().is_ok_and(|threads: u32| threads > 0)
}

/// The inodes of the sockets that are bound to `port`, from the text of a table.
fn socket_inodes(text: &str, port: u16, only_listening: bool) -> Vec<&str> {
    let inode = |line| {
        let columns: Vec<&str> = str::split_whitespace(line).collect();
        let (_, hex) = columns.get(1)?.rsplit_once(':')?;
        let listening = !only_listening || *columns.get(3)? == LISTENING;
        let wanted = u16::from_str_radix(hex, 16) == Ok(port) && listening;
        columns.get(INODE_COLUMN).copied().filter(|_| wanted)
    };
    text.lines().skip(1).filter_map(inode).collect()
}

/// Whether a process has one of these sockets open; `false` if it may not be looked at.
fn holds_one(fds: &Path, inodes: &[String]) -> bool {
    let Ok(entries) = fs::read_dir(fds) else {
        return false;
    };
    entries
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .any(|link| {
            inodes
                .iter()
                .any(|inode| link.as_os_str() == inode.as_str())
        })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};

    use super::*;

    #[test]
    fn finds_this_process() {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let own = format!("(pid {})", std::process::id());
        for address in [tcp.local_addr().unwrap(), udp.local_addr().unwrap()] {
            let holder = port_holder(address.port()).unwrap();
            assert!(holder.ends_with(&own), "{holder}");
        }
    }

    #[test]
    fn the_usual_holder_of_a_port_is_sent_away_by_name() {
        let hint = |program, holder| free_port_hint(program, holder, "--x-port");
        let lockd = hint(program::NLM, Some(NO_PROCESS));
        assert!(lockd.contains("umount -a -t nfs"), "{lockd}");
        let statd = hint(program::NSM, Some("`rpc.statd` (pid 7)"));
        assert!(
            statd.contains("systemctl stop rpc-statd.service"),
            "{statd}"
        );
        assert!(statd.ends_with(", or choose another port with --x-port"));
        let other = hint(program::NSM, Some("`nc` (pid 7)"));
        assert_eq!(other, "stop it, or choose another port with --x-port");
        assert!(hint(program::NLM, None).contains("`ss -lnp`"));
    }

    #[test]
    fn a_connection_does_not_hold_its_port() {
        let row = |local: &str, state: &str, inode: u32| {
            let (peer, zeros) = ("00000000:0000", "00000000:00000000 00:00000000 00000000");
            format!("   0: {local} {peer} {state} {zeros}     0        0 {inode} 1 0\n")
        };
        let text = [
            "  sl  local_address rem_address   st tx_queue rx_queue\n".to_owned(),
            row("00000000:006F", "0A", 41),
            row("0100007F:006F", "01", 42),
            row("00000000:0801", "0A", 43),
            "   3: garbage\n".to_owned(),
        ]
        .concat();
        assert_eq!(socket_inodes(&text, 111, true), ["41"]);
        assert_eq!(socket_inodes(&text, 111, false), ["41", "42"]);
        assert_eq!(socket_inodes(&text, 112, false), Vec::<&str>::new());
    }

    #[test]
    fn a_free_port_has_no_holder() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let stream = TcpStream::connect(address).unwrap();
        // An outgoing port is in the table and yet nobody listens there.
        assert_eq!(port_holder(stream.local_addr().unwrap().port()), None);
    }
}
