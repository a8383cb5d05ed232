//! Which clients a rule means: addresses, networks, names and patterns of names.
//!
//! Owns the syntax of the left side of `CLIENT(OPTIONS)` and the comparison itself; asking the
//! resolver is the business of `names`. Invariants: addresses are canonical (`::ffff:a.b.c.d` is
//! the IPv4 host), networks have no host bits, names are lower case without a final dot, so that
//! equal patterns are equal values.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::problem::shown;

/// The clients that a rule applies to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ClientPattern {
    /// Everybody: `*` or no client at all.
    Any,
    /// One address.
    Address(IpAddr),
    /// All addresses of a network.
    Network(Network),
    /// One host, known by name; it is whatever addresses the name resolves to.
    Name(Box<str>),
    /// All hosts whose forward-confirmed name fits the pattern; `*` and `?` match dots too.
    Wildcard(Box<str>),
}

/// An IPv4 or IPv6 network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    /// Makes the network of `prefix` bits (at most 32 or 128) that `address` lies in.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let (address, prefix) = match (address, address.to_canonical()) {
            // An IPv4 network written in IPv6 form.
            (IpAddr::V6(_), IpAddr::V4(v4)) if prefix >= 96 => (IpAddr::V4(v4), prefix - 96),
            _ => (address, prefix),
        };
        let address = match address {
            IpAddr::V4(v4) if prefix <= 32 => {
                IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & mask_v4(prefix)))
            }
            IpAddr::V6(v6) if prefix <= 128 => {
                IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & mask_v6(prefix)))
            }
            _ => return None,
        };
        Some(Self { address, prefix })
    }

    /// Returns the first address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Returns the number of fixed bits.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Says whether a canonical address lies in the network.
    pub fn contains(&self, peer: IpAddr) -> bool {
        match (self.address, peer) {
            (IpAddr::V4(own), IpAddr::V4(peer)) => {
                own.to_bits() == peer.to_bits() & mask_v4(self.prefix)
            }
            (IpAddr::V6(own), IpAddr::V6(peer)) => {
                own.to_bits() == peer.to_bits() & mask_v6(self.prefix)
            }
            _ => false,
        }
    }

    fn is_one_host(self) -> bool {
        match self.address {
            IpAddr::V4(_) => self.prefix == 32,
            IpAddr::V6(_) => self.prefix == 128,
        }
    }
}

impl ClientPattern {
    /// Reads one client as exports(5) writes it.
    ///
    /// # Errors
    /// Says what is wrong with the text, and what to write instead.
    pub(super) fn parse(bytes: &[u8]) -> Result<Parsed, Refusal> {
        if bytes.is_empty() || bytes == b"*" {
            return Ok(Parsed::plain(Self::Any));
        }
        let Ok(text) = std::str::from_utf8(bytes) else {
            return Err(Refusal::not_a_client(bytes));
        };
        if text.starts_with('@') {
            return Err(Refusal {
                message: format!("netgroup `{}` is not supported", shown(bytes)),
                hint: "list its hosts by name, address, network or wildcard".into(),
            });
        }
        if text.starts_with("gss/") {
            return Err(Refusal {
                message: format!("client `{}` asks for Kerberos, not supported", shown(bytes)),
                hint: "name the clients that may use sec=sys".into(),
            });
        }
        if text.contains('/') {
            return parse_network(text);
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Parsed::plain(Self::Address(address.to_canonical())));
        }
        if let Some(inner) = text
            .strip_prefix('[')
            .and_then(|text| text.strip_suffix(']'))
            && inner.parse::<Ipv6Addr>().is_ok()
        {
            return Err(Refusal {
                message: format!("IPv6 address `{text}` stands in brackets"),
                hint: format!("write {inner}"),
            });
        }
        if text.contains(['*', '?', '[']) {
            parse_wildcard(text)
        } else {
            parse_name(text)
        }
    }

    /// Ranks the kinds of patterns: a lower rank is tried first.
    ///
    /// Source: exports(5), Machine Name Formats.
    pub fn rank(&self) -> u8 {
        match self {
            Self::Address(_) | Self::Name(_) => 0,
            Self::Network(_) => 1,
            Self::Wildcard(_) => 2,
            Self::Any => 3,
        }
    }
}

impl fmt::Display for ClientPattern {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => out.write_str("*"),
            Self::Address(address) => write!(out, "{address}"),
            Self::Network(network) => write!(out, "{}/{}", network.address, network.prefix),
            Self::Name(name) | Self::Wildcard(name) => out.write_str(name),
        }
    }
}

/// A client that was understood, with what its author should know about it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parsed {
    pub(super) client: ClientPattern,
    pub(super) doubt: Option<Refusal>,
}

impl Parsed {
    fn plain(client: ClientPattern) -> Self {
        Self {
            client,
            doubt: None,
        }
    }
}

/// Why a client is not taken, or not as written.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) message: String,
    pub(super) hint: String,
}

impl Refusal {
    fn not_a_client(bytes: &[u8]) -> Self {
        let hint = if bytes.contains(&b',') {
            "separate clients by spaces; options stand in (...) right after a client"
        } else if bytes.contains(&b'=') {
            "options stand in (...) right after a client, without a space"
        } else {
            "write a host name, an address, ADDRESS/PREFIX, a wildcard such as *.example.org, or *"
        };
        Self {
            message: format!("`{}` is not a client", shown(bytes)),
            hint: hint.into(),
        }
    }
}

/// Says whether a host name fits a pattern of `*`, `?` and `[classes]`, without regard to case.
pub(super) fn wildcard_matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut at, mut here) = (0, 0);
    // After a mismatch the last `*` takes one more character; an earlier one need never change.
    let mut retry: Option<(usize, usize)> = None;
    loop {
        let step = match (pattern.get(at), name.get(here)) {
            (None, None) => return true,
            (Some(b'*'), _) => {
                retry = Some((at + 1, here));
                at += 1;
                continue;
            }
            (Some(_), Some(&byte)) => one_matches(pattern.get(at..).unwrap_or_default(), byte),
            _ => None,
        };
        if let Some(length) = step {
            at += length;
            here += 1;
        } else if let Some((after_star, from)) = retry
            && from < name.len()
        {
            retry = Some((after_star, from + 1));
            (at, here) = (after_star, from + 1);
        } else {
            return false;
        }
    }
}

/// Compares one character with the element that `pattern` begins with; returns its length.
fn one_matches(pattern: &[u8], byte: u8) -> Option<usize> {
    let byte = byte.to_ascii_lowercase();
    match pattern.first()? {
        b'?' => Some(1),
        b'[' => {
            let (class, length) = class(pattern)?;
            class_matches(class, byte).then_some(length)
        }
        own => (own.to_ascii_lowercase() == byte).then_some(1),
    }
}

/// Returns the inside of the class that `pattern` begins with, and the length of the whole.
fn class(pattern: &[u8]) -> Option<(&[u8], usize)> {
    let close = pattern.iter().position(|&byte| byte == b']')?;
    Some((pattern.get(1..close)?, close + 1))
}

fn class_matches(class: &[u8], byte: u8) -> bool {
    let (negated, mut members) = match class {
        [b'!' | b'^', members @ ..] => (true, members),
        members => (false, members),
    };
    let mut found = false;
    while let Some((&first, rest)) = members.split_first() {
        let (low, high) = (first.to_ascii_lowercase(), rest);
        if let [b'-', last, after @ ..] = high {
            found |= (low..=last.to_ascii_lowercase()).contains(&byte);
            members = after;
        } else {
            found |= low == byte;
            members = rest;
        }
    }
    found != negated
}

fn parse_network(text: &str) -> Result<Parsed, Refusal> {
    let (left, right) = text.split_once('/').unwrap_or((text, ""));
    let bad = |hint: &str| Refusal {
        message: format!("`{}` is not a network", shown(text.as_bytes())),
        hint: hint.into(),
    };
    let address = left
        .parse::<IpAddr>()
        .map_err(|_| bad("write ADDRESS/PREFIX, for example 192.0.2.0/24 or 2001:db8::/64"))?;
    let prefix = if right.contains('.') {
        let mask = right.parse::<Ipv4Addr>().ok().map(Ipv4Addr::to_bits);
        match (address, mask) {
            (IpAddr::V4(_), Some(mask)) if mask.leading_ones() + mask.trailing_zeros() >= 32 => {
                u8::try_from(mask.leading_ones()).ok()
            }
            _ => None,
        }
    } else if !right.is_empty() && right.bytes().all(|byte| byte.is_ascii_digit()) {
        right.parse().ok()
    } else {
        None
    };
    let network = prefix
        .and_then(|prefix| Network::new(address, prefix))
        .ok_or_else(|| {
            bad("the prefix is 0 to 32 (IPv6: 128) or, for IPv4, a mask such as 255.255.255.0")
        })?;
    let doubt = (network.address() != address.to_canonical()).then(|| Refusal {
        message: format!("`{text}` has bits set beyond its prefix; they are ignored"),
        hint: format!("write {}/{}", network.address(), network.prefix()),
    });
    let client = if network.is_one_host() {
        ClientPattern::Address(network.address())
    } else {
        ClientPattern::Network(network)
    };
    Ok(Parsed { client, doubt })
}

fn parse_wildcard(text: &str) -> Result<Parsed, Refusal> {
    let mut rest = text.as_bytes();
    let mut letters = false;
    while let Some((&first, after)) = rest.split_first() {
        match first {
            b'[' => {
                let inner = class(rest).filter(|(inner, _)| {
                    let members = inner.strip_prefix(b"!").or(inner.strip_prefix(b"^"));
                    let members = members.unwrap_or(inner);
                    !members.is_empty() && members.iter().all(|&byte| is_name_byte(byte))
                });
                let Some((inner, length)) = inner else {
                    return Err(Refusal {
                        message: format!("`{}` has a bad [class]", shown(text.as_bytes())),
                        hint: "write for example [0-9], [abc] or [!a-f]".into(),
                    });
                };
                letters |= inner.iter().any(u8::is_ascii_alphabetic);
                rest = rest.get(length..).unwrap_or_default();
                continue;
            }
            b'*' | b'?' => {}
            byte if is_name_byte(byte) => letters |= byte.is_ascii_alphabetic(),
            _ => return Err(Refusal::not_a_client(text.as_bytes())),
        }
        rest = after;
    }
    if text.len() > NAME_BYTES_MAX {
        return Err(Refusal::not_a_client(text.as_bytes()));
    }
    // `*.*` has no digits either and is a pattern of names; `192.0.2.*` means addresses.
    let means_addresses = !letters && text.bytes().any(|byte| byte.is_ascii_digit());
    let doubt = means_addresses.then(|| Refusal {
        message: format!("wildcard `{text}` matches host names, not addresses"),
        hint: "write a network, for example 192.0.2.0/24".into(),
    });
    let client = ClientPattern::Wildcard(text.to_ascii_lowercase().into());
    Ok(Parsed { client, doubt })
}

fn parse_name(text: &str) -> Result<Parsed, Refusal> {
    let name = text.strip_suffix('.').unwrap_or(text);
    let valid = name.len() <= NAME_BYTES_MAX
        && name.split('.').all(|label| {
            (1..=LABEL_BYTES_MAX).contains(&label.len())
                && !label.starts_with('-')
                && label.bytes().all(is_name_byte)
        });
    if !valid {
        return Err(Refusal::not_a_client(text.as_bytes()));
    }
    if name
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.')
    {
        return Err(Refusal {
            message: format!("`{}` is not an IPv4 address", shown(text.as_bytes())),
            hint: "write four numbers from 0 to 255, or a network such as 192.0.2.0/24".into(),
        });
    }
    Ok(Parsed::plain(ClientPattern::Name(
        name.to_ascii_lowercase().into(),
    )))
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_')
}

fn mask_v4(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

fn mask_v6(prefix: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
}

/// RFC 1035 2.3.4, less the length byte and the root label.
const NAME_BYTES_MAX: usize = 253;
/// RFC 1035 2.3.4.
const LABEL_BYTES_MAX: usize = 63;

#[cfg(test)]
mod tests {
    use super::*;

    fn client(text: &str) -> ClientPattern {
        ClientPattern::parse(text.as_bytes()).expect(text).client
    }

    #[test]
    fn each_form_is_recognised_and_written_back() {
        for (text, written) in [
            ("", "*"),
            ("*", "*"),
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("2001:DB8::1", "2001:db8::1"),
            ("192.0.2.0/24", "192.0.2.0/24"),
            ("192.0.2.0/255.255.252.0", "192.0.0.0/22"),
            ("192.0.2.9/32", "192.0.2.9"),
            ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:db8:9:e54::/64", "2001:db8:9:e54::/64"),
            ("Host.Example.org.", "host.example.org"),
            ("proj*.local.domain", "proj*.local.domain"),
            ("buildhost[0-9].local.domain", "buildhost[0-9].local.domain"),
        ] {
            assert_eq!(client(text).to_string(), written, "{text}");
        }
        assert_eq!(
            client("a/b".replace("a/b", "*").as_str()),
            ClientPattern::Any
        );
        assert!(matches!(client("host"), ClientPattern::Name(_)));
        assert!(matches!(client("ho?t"), ClientPattern::Wildcard(_)));
    }

    #[test]
    fn what_is_no_client_is_refused() {
        for text in [
            "@trusted",
            "gss/krb5",
            "host/24",
            "192.0.2.0/33",
            "192.0.2.0/255.0.255.0",
            "192.0.2.0/",
            "2001:db8::/129",
            "2001:db8::/255.255.0.0",
            "[2001:db8::1]",
            "host[0-9",
            "host[]",
            "host[!]",
            "a,b",
            "fsid=0",
            "300.1.2.3",
            "10.0.0",
            "-host",
            "a..b",
            "h\u{e4}",
            "=public",
            "192.0.2.0/+8",
        ] {
            assert!(ClientPattern::parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn networks_contain_their_own_family_only() {
        let network = Network::new("10.1.0.0".parse().expect("v4"), 16).expect("network");
        assert!(network.contains("10.1.255.255".parse().expect("v4")));
        assert!(!network.contains("10.2.0.0".parse().expect("v4")));
        let all = Network::new("::".parse().expect("v6"), 0).expect("network");
        assert!(all.contains("2001:db8::1".parse().expect("v6")));
        assert!(!all.contains("10.2.0.0".parse().expect("v4")));
    }

    #[test]
    fn wildcards_match_dots_but_not_longer_names() {
        for (pattern, name, expected) in [
            ("*.cs.foo.edu", "a.cs.foo.edu", true),
            ("*.cs.foo.edu", "a.b.CS.foo.edu", true),
            ("*.cs.foo.edu", "cs.foo.edu", false),
            ("client?", "client1", true),
            ("client?", "client10", false),
            ("client[0-9]", "client7", true),
            ("client[!0-9]", "client7", false),
            ("client[^a-c]", "clientd", true),
            ("c*t[12]*", "client2.example", true),
            ("a*b*c", "abxbxc", true),
            ("a*b*c", "abxbx", false),
            ("*", "", true),
            ("?", "", false),
        ] {
            assert_eq!(
                wildcard_matches(pattern, name),
                expected,
                "{pattern} {name}"
            );
        }
    }
}
