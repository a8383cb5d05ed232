//! What a service is, as all nodes agree on it: its names, its addresses and its export list.
//!
//! Files of nodes differ for a while, or by mistake; the service must not change when it moves. So
//! what is served is a replicated [`Definition`], and the files of a node are no more than a
//! proposal of one. Each has a version; a new one is taken only if its proposer knew the one before
//! it, so that of two who change it at once one has to look again.
//!
//! Pure. The export list is text, one line of exports(5) for each export, in the order of the list:
//! what a line means is decided by `export`, and whether its directory is there by the node that
//! opens it. Which interface the addresses go on is each node's own.
//!
//! Invariants: versions rise by one; what is stored is within the bounds of [`Definition::check`].

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::NodeId;

/// What a service is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// What hosts know it as.
    pub names: Vec<Box<str>>,
    /// Where clients reach it.
    pub addresses: Vec<ServiceAddress>,
    /// What it exports: lines of exports(5), in the order of the list.
    pub exports: Vec<Box<str>>,
}

/// An address of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceAddress {
    /// The address.
    pub ip: IpAddr,
    /// The length of its network's prefix, if it moves along with the service.
    pub prefix: Option<u8>,
}

impl ServiceAddress {
    /// Whether its prefix is one of such an address.
    fn is_good(&self) -> bool {
        let prefix_max = if self.ip.is_ipv4() { 32 } else { 128 };
        self.prefix
            .is_none_or(|prefix| (1..=prefix_max).contains(&prefix))
    }
}

impl fmt::Display for ServiceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix {
            Some(prefix) => write!(f, "{}/{prefix}", self.ip),
            None => self.ip.fmt(f),
        }
    }
}

/// A definition with its version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defined {
    /// How often the service was defined, from 1.
    pub version: u64,
    /// As what.
    pub definition: Definition,
}

/// What the active node has made of a definition, for whoever proposed it on another node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InForce {
    /// Which definition; 0 if none yet.
    pub version: u64,
    /// Whether it could not be brought into force.
    pub refused: bool,
    /// What the active node says about it.
    pub said: Box<str>,
}

/// What a service has of definitions.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Definitions {
    /// The last one.
    pub(super) defined: Option<Arc<Defined>>,
    /// What became of it.
    pub(super) in_force: Arc<InForce>,
}

/// Why a definition is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Undefined {
    /// Somebody else has changed it meanwhile.
    #[error("the definition has version {0} by now")]
    OtherVersion(u64),
    /// It is above a bound.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// An address names one service.
    #[error(
        "service `{by}` has the address {ip}\nhint: if `{by}` is in the files of no node any more, \
         `havenfs service forget {by}` ends it"
    )]
    AddressTaken {
        /// The address.
        ip: IpAddr,
        /// Whose it is.
        by: Box<str>,
    },
    /// The active node of another service runs with an address that this one had before.
    #[error("node number {node} still serves `{by}` on {ip}: restart that node first", node = node.0)]
    AddressInUse {
        /// The address.
        ip: IpAddr,
        /// What is served on it.
        by: Box<str>,
        /// Where.
        node: NodeId,
    },
}

impl Undefined {
    /// The same for people, who know nodes by their names.
    pub fn told(&self, name_of: impl FnOnce(NodeId) -> String) -> String {
        match self {
            Self::AddressInUse { ip, by, node } => format!(
                "node {node} still serves `{by}` on {ip}\nhint: restart node {node} first: it runs \
                 with the addresses that `{by}` had before",
                node = name_of(*node)
            ),
            _ => self.to_string(),
        }
    }
}

/// A bound that a definition is above.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooLarge {
    /// See [`NAMES_MAX`].
    #[error("a service has {NAMES_MAX} names at most, of {NAME_BYTES_MAX} bytes each")]
    Names,
    /// See [`ADDRESSES_MAX`].
    #[error("a service has {ADDRESSES_MAX} addresses at most, with prefixes as of their networks")]
    Addresses,
    /// See [`EXPORTS_MAX`] and [`EXPORTS_BYTES_MAX`].
    #[error(
        "a service of a cluster has {EXPORTS_MAX} exports at most, and {EXPORTS_BYTES_MAX} bytes \
         of lines for them"
    )]
    Exports,
}

impl Definition {
    /// Whether it is within the bounds.
    ///
    /// # Errors
    /// Which one it is above.
    pub fn check(&self) -> Result<(), TooLarge> {
        let mut names = self.names.iter();
        if self.names.len() > NAMES_MAX || names.any(|name| name.len() > NAME_BYTES_MAX) {
            return Err(TooLarge::Names);
        }
        let mut addresses = self.addresses.iter();
        if self.addresses.len() > ADDRESSES_MAX || !addresses.all(ServiceAddress::is_good) {
            return Err(TooLarge::Addresses);
        }
        let bytes: usize = self.exports.iter().map(|line| line.len()).sum();
        if self.exports.len() > EXPORTS_MAX || bytes > EXPORTS_BYTES_MAX {
            return Err(TooLarge::Exports);
        }
        Ok(())
    }

    /// What differs from another one, in words.
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let parts = [
            ("names", self.names != other.names),
            ("addresses", self.addresses != other.addresses),
            ("exports", self.exports != other.exports),
        ];
        let differing = parts.into_iter().filter(|(_, differs)| *differs);
        differing.map(|(part, _)| part).collect()
    }
}

impl Definitions {
    /// The version of the last one; 0 if there is none.
    pub fn version(&self) -> u64 {
        self.defined.as_ref().map_or(0, |defined| defined.version)
    }

    /// What was written; none if it is above a bound.
    pub(super) fn restored(defined: Option<Defined>, in_force: InForce) -> Option<Self> {
        if let Some(defined) = &defined {
            defined.definition.check().ok()?;
        }
        (in_force.said.len() <= SAID_BYTES_MAX).then(|| Self {
            defined: defined.map(Arc::new),
            in_force: Arc::new(in_force),
        })
    }

    /// Takes a new one, if its proposer knew the last.
    pub(super) fn define(
        &mut self,
        expected_version: u64,
        definition: &Definition,
    ) -> Result<u64, Undefined> {
        if self.version() != expected_version {
            return Err(Undefined::OtherVersion(self.version()));
        }
        definition.check()?;
        let version = expected_version.saturating_add(1);
        self.defined = Some(Arc::new(Defined {
            version,
            definition: definition.clone(),
        }));
        Ok(version)
    }

    /// Notes what the active node has made of one; what it says is cut.
    pub(super) fn note(&mut self, in_force: &InForce) {
        let mut said = String::from(&*in_force.said);
        said.truncate(said.floor_char_boundary(SAID_BYTES_MAX));
        self.in_force = Arc::new(InForce {
            said: said.into(),
            ..*in_force
        });
    }
}

/// Names of one service: hosts are told of a restart under each.
pub const NAMES_MAX: usize = 64;
/// What NSM can carry of a name.
pub const NAME_BYTES_MAX: usize = 1024;
/// Addresses of one service.
pub const ADDRESSES_MAX: usize = 64;
/// Exports of one service.
pub const EXPORTS_MAX: usize = 10_000;
/// Bytes of the lines of all exports: what one entry of the log may hold up.
pub const EXPORTS_BYTES_MAX: usize = 512 << 10;
/// What is kept of what the active node says.
pub const SAID_BYTES_MAX: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(exports: usize) -> Definition {
        Definition {
            names: vec!["nfs".into()],
            addresses: Vec::new(),
            exports: (0..exports)
                .map(|export| format!("/{export} *(rw)").into())
                .collect(),
        }
    }

    #[test]
    fn of_two_who_knew_the_same_version_one_has_to_look_again() {
        let mut definitions = Definitions::default();
        assert_eq!(definitions.define(0, &definition(1)), Ok(1));
        assert_eq!(definitions.define(1, &definition(2)), Ok(2));
        let before = definitions.clone();
        for stale in [0, 1, 3] {
            let refused = Err(Undefined::OtherVersion(2));
            assert_eq!(definitions.define(stale, &definition(3)), refused);
        }
        assert_eq!(definitions, before);
    }

    #[test]
    fn what_is_above_a_bound_changes_nothing() {
        let mut definitions = Definitions::default();
        assert_eq!(definitions.define(0, &definition(EXPORTS_MAX)), Ok(1));
        let before = definitions.clone();
        let long = Definition {
            exports: vec!["x".repeat(EXPORTS_BYTES_MAX + 1).into()],
            ..definition(0)
        };
        for exports in [definition(EXPORTS_MAX + 1), long] {
            let refused = Err(Undefined::TooLarge(TooLarge::Exports));
            assert_eq!(definitions.define(1, &exports), refused);
        }
        let named = Definition {
            names: vec!["n".repeat(NAME_BYTES_MAX + 1).into()],
            ..definition(0)
        };
        let refused = Err(Undefined::TooLarge(TooLarge::Names));
        assert_eq!(definitions.define(1, &named), refused);
        assert_eq!(definitions, before);
    }

    #[test]
    fn what_differs_is_named() {
        let one = definition(1);
        assert!(one.differences(&one).is_empty());
        let other = Definition {
            names: Vec::new(),
            ..definition(2)
        };
        assert_eq!(one.differences(&other), ["names", "exports"]);
    }

    #[test]
    fn what_the_active_node_says_is_cut_at_a_character() {
        let mut definitions = Definitions::default();
        definitions.note(&InForce {
            version: 3,
            refused: true,
            said: format!("x{}", "\u{e4}".repeat(SAID_BYTES_MAX)).into(),
        });
        assert_eq!(definitions.in_force.said.len(), SAID_BYTES_MAX - 1);
        assert_eq!(definitions.in_force.version, 3);
    }
}
