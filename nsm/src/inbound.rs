//! SM_NOTIFY from a host: which of the hosts that we know has rebooted.
//!
//! NSM has no authentication, and to believe a notice means to release locks. So a notice counts
//! only for hosts with the address that it came from; the name in it chooses among several behind
//! one address, as with containers or address translation. A name alone releases nothing. A host
//! with several addresses may send from one under which we don't know it; then its name must have
//! that address, which is for the caller to find out.
//!
//! Any state number but the last few that were seen counts, also a lower one and an even one (the
//! host has gone down on purpose): what matters is that the host is not in the life it was in.

/// Which of `names`, all of hosts behind the address that a notice came from, are meant by
/// `mon_name`: if there is one, that one, whatever the name; of several those with the name, with
/// or without the domain. Hosts often send their full name and their short one after each other.
pub fn meant<'a>(mon_name: &[u8], names: impl Iterator<Item = &'a [u8]> + Clone) -> Vec<&'a [u8]> {
    let mut distinct: Vec<&[u8]> = names.collect();
    distinct.sort_unstable();
    distinct.dedup();
    if let [_] = distinct[..] {
        return distinct;
    }
    distinct.retain(|name| same_name(name, mon_name));
    distinct
}

/// Whether two names may be those of one host: equal, or one is the other without its domain.
pub fn same_name(one: &[u8], other: &[u8]) -> bool {
    let is_short = |name: &[u8]| !name.contains(&b'.');
    if is_short(one) == is_short(other) {
        return one.eq_ignore_ascii_case(other);
    }
    short(one).eq_ignore_ascii_case(short(other))
}

/// The part before the first dot.
pub fn short(name: &[u8]) -> &[u8] {
    name.split(|byte| *byte == b'.').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge<'a>(mon_name: &str, names: &[&'a str]) -> Vec<&'a [u8]> {
        meant(
            mon_name.as_bytes(),
            names.iter().map(|name| name.as_bytes()),
        )
    }

    #[test]
    fn one_host_behind_an_address_is_meant_by_any_name() {
        assert_eq!(judge("whatever", &["c1"]), [b"c1"]);
        assert_eq!(judge("10.0.0.1", &["c1", "c1"]), [b"c1"]);
    }

    #[test]
    fn of_several_the_name_chooses() {
        let names = ["c1", "c2", "c10"];
        assert_eq!(judge("c1", &names), [b"c1"]);
        assert_eq!(judge("C1.example.org", &names), [b"c1"]);
        assert!(judge("c", &names).is_empty());
        assert!(judge("c3", &names).is_empty());
        let names = ["c1.example.org", "c1.example.com"];
        assert_eq!(judge("c1.example.com", &names), [b"c1.example.com"]);
        assert_eq!(judge("c1", &names).len(), 2, "it may be either");
        assert!(judge("c1.example.net", &names).is_empty());
        assert!(judge("c1", &[]).is_empty());
    }
}
