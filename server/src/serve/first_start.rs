//! What people are told when a service is served for the first time ever: nobody holds a lock.
//!
//! That is right for a new service, and wrong if it ran before and its state directory was lost, is
//! not mounted or is another one; or if another lock manager of this machine, the kernel's, gave
//! locks to hosts until now. An empty directory can't know. So it is said, with what to do; nothing
//! is decided here.

use std::path::Path;

/// Says it in the log. `is_known`: the server is alone, and was started with this state directory
/// before; in a cluster a service may be new at any time.
pub(super) fn tell(service: &str, is_known: bool) {
    if is_known {
        tracing::warn!(
            service,
            "the store of locks is new, though this server was started before: nobody holds any\n\
             hint: if clients have locks, the store was lost: stop it, and bring that back; or start \
             it once with --recover, so that clients can reclaim their locks before others take them"
        );
    } else {
        tracing::info!(
            service,
            "the store of locks is new: nobody holds any\nhint: if this service ran before, its \
             state directory was lost or is not mounted: stop it, and bring that back; or start it \
             once with --recover, so that clients can reclaim their locks before others take them"
        );
    }
    let hosts = MONITORED
        .iter()
        .flat_map(|place| hosts_in(Path::new(place)));
    let hosts: Vec<String> = hosts.collect();
    if hosts.is_empty() {
        return;
    }
    tracing::warn!(
        service,
        "rpc.statd of this machine monitored hosts: {}\nhint: if they hold locks that the kernel's \
         NFS server gave them, this service does not know of those: end the programs on them that \
         lock files; or start once with --recover, and have the hosts told with `sm-notify -f`",
        in_words(&hosts)
    );
}

/// The first few, and how many more there are.
fn in_words(hosts: &[String]) -> String {
    let first: Vec<&str> = hosts.iter().take(3).map(String::as_str).collect();
    match hosts.len() - first.len() {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

/// The hosts whose names rpc.statd keeps in a directory; none if it is not there.
fn hosts_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| {
        entry
            .file_name()
            .to_string_lossy()
            .escape_debug()
            .to_string()
    });
    let mut names: Vec<String> = names.take(HOSTS_MAX).collect();
    names.sort_unstable();
    names
}

/// Where rpc.statd keeps the hosts that it monitors, on Debian and elsewhere.
const MONITORED: [&str; 2] = ["/var/lib/nfs/statd/sm", "/var/lib/nfs/sm"];
/// More are not counted.
const HOSTS_MAX: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_hosts_are_named_and_the_rest_is_counted() {
        let dir = tempfile::tempdir();
        let dir = dir.as_ref().map_or(Path::new("/"), tempfile::TempDir::path);
        assert_eq!(hosts_in(&dir.join("none")), [""; 0]);
        for name in ["c", "a", "b\n", "d", "e"] {
            assert!(std::fs::write(dir.join(name), "").is_ok());
        }
        let hosts = hosts_in(dir);
        assert_eq!(in_words(&hosts), "a, b\\n, c and 2 more");
        assert_eq!(in_words(&hosts[..2]), "a, b\\n");
    }
}
