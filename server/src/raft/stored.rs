//! `store.json`: what a store is, and which cluster it belongs to.
//!
//! Version 1 has the random id that the store was born with, and that is all of a store that
//! belongs to no cluster. Version 2 has what forming the cluster settled as well: the cluster's id,
//! this node's number, and the members as they were then. Version 3 has the cluster's generation
//! besides. Version 4 has where in the log something was begun that is not known to be done, see
//! `offline`. Who is a member now is in the log; the file is what a node knows before it has read
//! any log. `peer::forming` writes it, once, or `offline`.
//!
//! The file is replaced whole, so that after a crash there is the old one or the new one.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::types::{Member, NAME_BYTES_MAX};
use crate::state::replace_file;

/// The newest version that is read.
const VERSION: u32 = 4;
/// The most members of a cluster.
pub(super) const MEMBERS_MAX: usize = 32;

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    /// The random number that the store was born with.
    pub(super) store_id: u64,
    /// The cluster that it belongs to.
    pub(super) formed: Option<Formed>,
    /// Where in the log an operator's repair begins that is not known to be done. No server starts
    /// then: part of it may be there.
    pub(super) pending: Option<u64>,
}

impl Stored {
    /// Nothing may be half done.
    ///
    /// # Errors
    /// What to do, if something is.
    pub(super) fn check_done(&self) -> Result<(), StoreError> {
        let command = match (self.pending, &self.formed) {
            (None, _) => return Ok(()),
            (Some(_), None) => "init",
            (Some(_), Some(_)) => "sole-survivor",
        };
        Err(StoreError::HalfDone { command })
    }
}

/// What forming a cluster settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Formed {
    /// The random number that the cluster was born with.
    pub(super) cluster_id: u64,
    /// How often the cluster was begun anew by a sole survivor.
    pub(super) generation: u32,
    /// This node's number.
    pub(super) node: u64,
    /// All nodes with their numbers, as they were when this node became one of them.
    pub(super) members: BTreeMap<u64, Member>,
}

impl Formed {
    /// Whether this node begins the cluster's log, if its own is empty.
    pub(super) fn is_founder(&self) -> bool {
        self.node == FOUNDER
    }
}

/// The number of the node that begins the cluster's log.
pub(super) const FOUNDER: u64 = 1;

#[derive(Deserialize)]
struct AnyVersion {
    version: u32,
    cluster_id: Option<serde::de::IgnoredAny>,
}

#[derive(Serialize, Deserialize)]
struct Alone {
    version: u32,
    store_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pending: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct InCluster {
    version: u32,
    store_id: String,
    cluster_id: String,
    #[serde(default, skip_serializing_if = "is_first")]
    generation: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pending: Option<u64>,
    node: u64,
    members: Vec<MemberText>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks with a reference"
)]
const fn is_first(generation: &u32) -> bool {
    *generation == 0
}

#[derive(Serialize, Deserialize)]
struct MemberText {
    node: u64,
    name: String,
    store_id: String,
    address: SocketAddr,
    witness: bool,
}

/// Where the file is.
pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join("store.json")
}

/// Reads the file; `None` if there is none. Waits for the disk.
pub(super) fn read(dir: &Path) -> Result<Option<Stored>, StoreError> {
    let path = path(dir);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::io("read", &path)(error)),
    };
    let damaged = |problem: String| StoreError::damaged(&path, 0, problem);
    let json = |error: serde_json::Error| damaged(error.to_string());
    let AnyVersion {
        version,
        cluster_id,
    } = serde_json::from_slice(&bytes).map_err(json)?;
    let stored = match version {
        1 | VERSION if cluster_id.is_none() => {
            let text: Alone = serde_json::from_slice(&bytes).map_err(json)?;
            Stored {
                store_id: number(&text.store_id).map_err(damaged)?,
                formed: None,
                pending: text.pending,
            }
        }
        2..=VERSION => {
            in_cluster(serde_json::from_slice(&bytes).map_err(json)?).map_err(damaged)?
        }
        0 => return Err(damaged("version 0".to_owned())),
        _ => {
            return Err(StoreError::Newer {
                path,
                problem: format!("version {version}, and this program knows {VERSION}"),
            });
        }
    };
    Ok(Some(stored))
}

fn in_cluster(text: InCluster) -> Result<Stored, String> {
    let store_id = number(&text.store_id)?;
    if text.members.len() > MEMBERS_MAX {
        return Err(format!("it has more than {MEMBERS_MAX} members"));
    }
    let mut members = BTreeMap::new();
    for member in text.members {
        if member.name.is_empty() || member.name.len() > NAME_BYTES_MAX {
            return Err(format!(
                "the name of node {} has not 1 to {NAME_BYTES_MAX} bytes",
                member.node
            ));
        }
        let value = Member {
            store_id: number(&member.store_id)?,
            name: member.name.into(),
            address: member.address,
            witness: member.witness,
        };
        if members.insert(member.node, value).is_some() {
            return Err(format!("it has two nodes {}", member.node));
        }
    }
    if members.get(&text.node).map(|own| own.store_id) != Some(store_id) {
        return Err("its own node is not among the members".to_owned());
    }
    Ok(Stored {
        store_id,
        formed: Some(Formed {
            cluster_id: number(&text.cluster_id)?,
            generation: text.generation,
            node: text.node,
            members,
        }),
        pending: text.pending,
    })
}

/// Writes the file, in the oldest version that can say it. Waits for the disk.
pub(super) fn write(dir: &Path, stored: &Stored) -> Result<(), StoreError> {
    let path = path(dir);
    let store_id = hex(stored.store_id);
    let pending = stored.pending;
    let text = match &stored.formed {
        None => serde_json::to_vec_pretty(&Alone {
            version: if pending.is_some() { VERSION } else { 1 },
            store_id,
            pending,
        }),
        Some(formed) => {
            let members = formed.members.iter().map(|(node, member)| MemberText {
                node: *node,
                name: member.name.to_string(),
                store_id: hex(member.store_id),
                address: member.address,
                witness: member.witness,
            });
            serde_json::to_vec_pretty(&InCluster {
                version: match (formed.generation, pending) {
                    (_, Some(_)) => VERSION,
                    (0, None) => 2,
                    (_, None) => 3,
                },
                store_id,
                cluster_id: hex(formed.cluster_id),
                generation: formed.generation,
                pending,
                node: formed.node,
                members: members.collect(),
            })
        }
    };
    let text = text.map_err(|error| StoreError::damaged(&path, 0, error.to_string()))?;
    replace_file(&path, &text).map_err(StoreError::io("write", &path))
}

fn hex(number: u64) -> String {
    format!("{number:016x}")
}

fn number(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text, 16).map_err(|error| error.to_string())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    fn in_cluster() -> Stored {
        let member = |number: u64| Member {
            store_id: number << 40,
            name: format!("n{number}").into(),
            address: SocketAddr::from(([127, 0, 0, 1], 7300)),
            witness: number == 3,
        };
        Stored {
            store_id: 2 << 40,
            formed: Some(Formed {
                cluster_id: u64::MAX,
                generation: 0,
                node: 2,
                members: (1..=3).map(|number| (number, member(number))).collect(),
            }),
            pending: None,
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), None);
        let alone = Stored {
            store_id: 0xab,
            formed: None,
            pending: None,
        };
        let half_begun = Stored {
            pending: Some(0),
            ..alone.clone()
        };
        let half_survived = Stored {
            pending: Some(77),
            ..in_cluster()
        };
        let mut again = in_cluster();
        again.formed.as_mut().unwrap().generation = 7;
        for (stored, version) in [
            (alone, 1),
            (in_cluster(), 2),
            (again, 3),
            (half_begun, 4),
            (half_survived, 4),
        ] {
            assert_eq!(stored.check_done().is_ok(), version < 4);
            write(dir.path(), &stored).unwrap();
            assert_eq!(read(dir.path()).unwrap(), Some(stored));
            let text = std::fs::read_to_string(path(dir.path())).unwrap();
            assert!(text.contains(&format!("\"version\": {version},")), "{text}");
        }
    }

    #[test]
    fn what_contradicts_itself_is_damaged_and_what_is_newer_is_newer() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &in_cluster()).unwrap();
        let text = std::fs::read_to_string(path(dir.path())).unwrap();
        let read_as = |from: &str, to: &str| {
            assert!(text.contains(from), "{from}");
            std::fs::write(path(dir.path()), text.replacen(from, to, 1)).unwrap();
            read(dir.path()).unwrap_err()
        };
        for (from, to) in [
            ("0000020000000000", "0000020000000001"),
            ("\"node\": 2", "\"node\": 4"),
            ("\"name\": \"n1\"", "\"name\": \"\""),
            ("\"node\": 1", "\"node\": 3"),
            ("\"cluster_id\"", "\"other\""),
            ("\"version\": 2", "\"version\": 0"),
        ] {
            let error = read_as(from, to);
            assert!(
                matches!(error, StoreError::Damaged { .. }),
                "{from}: {error}"
            );
        }
        let error = read_as("\"version\": 2", "\"version\": 5");
        assert!(matches!(error, StoreError::Newer { .. }), "{error}");
    }
}
