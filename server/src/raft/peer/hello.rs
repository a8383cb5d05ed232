//! Who is at the other end, and whether it is the one that is meant: plain decisions.
//!
//! Both sides of a connection say [`Hello`]. In a cluster, a node is what its number, name and
//! store say together: the number alone would let a wiped disk vote as if it had its log, and a
//! node of another cluster change ours. A node that belongs to no cluster yet may only ask who is
//! there, see `forming`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::raft::types::Member;

/// A member as the configuration file names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::raft) struct Configured {
    /// Its name.
    pub(in crate::raft) name: Box<str>,
    /// Where it is reached.
    pub(in crate::raft) address: SocketAddr,
    /// Whether it only votes.
    pub(in crate::raft) witness: bool,
}

impl Configured {
    /// A member of the log, as a file would name it.
    pub(in crate::raft) fn of(member: &Member) -> Self {
        Self {
            name: member.name.clone(),
            address: member.address,
            witness: member.witness,
        }
    }
}

/// What a node says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::raft) struct Hello {
    /// The name that its configuration gives it.
    pub(super) name: Box<str>,
    /// The random number that its store was born with.
    pub(super) store_id: u64,
    /// Which cluster it belongs to.
    pub(super) standing: Standing,
}

impl Hello {
    /// The random number that its store was born with.
    pub(in crate::raft) const fn store_id(&self) -> u64 {
        self.store_id
    }

    /// Whether it belongs to no cluster and its log holds nothing.
    pub(in crate::raft) const fn is_empty_node(&self) -> bool {
        matches!(self.standing, Standing::Unformed { empty: true, .. })
    }

    /// The store with which a node may be added to a cluster, with this name, address and kind.
    ///
    /// # Errors
    /// Why it may not be.
    pub(in crate::raft) fn may_be_added(
        &self,
        (name, address, witness): (&str, SocketAddr, bool),
    ) -> Result<u64, String> {
        if *self.name != *name {
            let found = &self.name;
            return Err(format!(
                "the node there calls itself `{found}`, not `{name}`\nhint: compare the name and \
                 the address with its configuration"
            ));
        }
        match &self.standing {
            Standing::Unformed {
                empty: true,
                configured,
            } => {
                let mut configured = configured.iter();
                let own = configured.find(|one| *one.name == *name);
                // It binds this address, and serves or does not, as its configuration says.
                match own {
                    Some(own) if own.address != address || own.witness != witness => {
                        let kind = |witness| if witness { "a witness" } else { "no witness" };
                        let (address, kind) = (own.address, kind(own.witness));
                        Err(format!(
                            "the configuration of node `{name}` says that it is at {address} and \
                             {kind}\nhint: add it so, or correct its configuration and start it anew"
                        ))
                    }
                    _ => Ok(self.store_id),
                }
            }
            Standing::Unformed { .. } => Err(format!(
                "node `{name}` has locks of its own, from a time without a cluster\nhint: stop it, \
                 move its state directory away, and start it"
            )),
            Standing::Formed { .. } => Err(format!(
                "node `{name}` belongs to a cluster already, this one as it was or another one\n\
                 hint: stop it, move its state directory away, and start it"
            )),
        }
    }
}

/// Which cluster a node belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// None yet.
    Unformed {
        /// Whether its log holds nothing.
        empty: bool,
        /// The members of the cluster that it is meant for, by name.
        configured: Arc<[Configured]>,
    },
    /// One.
    Formed {
        /// The random number that the cluster was born with.
        cluster_id: u64,
        /// How often the cluster was begun anew by a sole survivor.
        generation: u32,
        /// The number that the node has there.
        node: u64,
        /// All members; told only to those who belong to none yet.
        members: BTreeMap<u64, Member>,
    },
}

/// What tells a cluster from all others, and from what it was before it was begun anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClusterName {
    /// The random number that it was born with.
    pub(super) id: u64,
    /// How often it was begun anew by a sole survivor.
    pub(super) generation: u32,
}

/// Why a node is not served, or not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::raft) enum Refusal {
    /// It belongs to no cluster, or we don't.
    #[error("node `{name}` belongs to no cluster yet")]
    Unformed {
        /// Which node.
        name: Box<str>,
    },
    /// It belongs to another cluster.
    #[error(
        "node `{name}` belongs to another cluster ({theirs:016x}, and this is {ours:016x})\nhint: \
         correct the addresses in its configuration; if it is to change clusters, stop it and move \
         its state directory away"
    )]
    OtherCluster {
        /// Which node.
        name: Box<str>,
        /// Its cluster.
        theirs: u64,
        /// Ours.
        ours: u64,
    },
    /// Its disk was wiped or replaced, or a copy of its name runs elsewhere.
    #[error(
        "node `{name}` comes with another store than the one it was admitted with\nhint: if its \
         state directory was lost, say `havenfs cluster remove {name}` and then `havenfs cluster \
         add {name}` on a member; if not, two machines are called `{name}`: stop the wrong one"
    )]
    OtherStore {
        /// Which node.
        name: Box<str>,
    },
    /// It has another name than its number stands for.
    #[error(
        "node {node} calls itself `{name}`, and was admitted as `{admitted}`\nhint: give it its \
         name back, or remove it from the cluster and add it anew"
    )]
    OtherName {
        /// Its number.
        node: u64,
        /// What it calls itself.
        name: Box<str>,
        /// What it is.
        admitted: Box<str>,
    },
    /// It belongs to an earlier generation of the cluster.
    #[error(
        "node `{name}` has the log of generation {theirs} of the cluster, and this is generation \
         {ours}: it was given up as lost\nhint: stop it, move its state directory away, start it, \
         and say `havenfs cluster add {name}` on a member"
    )]
    EarlierGeneration {
        /// Which node.
        name: Box<str>,
        /// Its generation.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// It belongs to a later generation: this node was given up.
    #[error(
        "node `{name}` has generation {theirs} of the cluster, and this node generation {ours}: it \
         was given up as lost\nhint: stop this node, move its state directory away, start it, and \
         add it anew with `havenfs cluster add` on a member"
    )]
    LaterGeneration {
        /// Which node.
        name: Box<str>,
        /// Its generation.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// It is a member no more.
    #[error(
        "node `{name}` was removed from the cluster\nhint: stop it; to have it back, move its \
         state directory away, start it, and say `havenfs cluster add {name}` on a member"
    )]
    Removed {
        /// Which node.
        name: Box<str>,
    },
    /// Another node answers at its address.
    #[error(
        "node `{name}` (number {node}) answers where node {expected} was expected\nhint: compare \
         the addresses in the configuration of all nodes"
    )]
    OtherNode {
        /// Who answers.
        name: Box<str>,
        /// Its number.
        node: u64,
        /// Who was asked.
        expected: u64,
    },
}

/// Whether the node that says `hello` is the member that it says it is; returns its number.
///
/// `members` is the membership as far as this node knows it, which may be behind: a number above
/// all known ones is that of a node that was added since, and whoever has the key and belongs to
/// the cluster is believed about that. Numbers are never given twice, so that a lower unknown one
/// is that of a removed node; of higher ones `is_retired` knows.
pub(super) fn admit(
    ours: ClusterName,
    members: &BTreeMap<u64, Member>,
    is_retired: impl Fn(u64) -> bool,
    hello: &Hello,
) -> Result<u64, Refusal> {
    let name = hello.name.clone();
    let Standing::Formed {
        cluster_id,
        generation,
        node,
        ..
    } = &hello.standing
    else {
        return Err(Refusal::Unformed { name });
    };
    if *cluster_id != ours.id {
        let (theirs, ours) = (*cluster_id, ours.id);
        return Err(Refusal::OtherCluster { name, theirs, ours });
    }
    let (theirs, ours) = (*generation, ours.generation);
    if theirs < ours {
        return Err(Refusal::EarlierGeneration { name, theirs, ours });
    }
    if theirs > ours {
        return Err(Refusal::LaterGeneration { name, theirs, ours });
    }
    match members.get(node) {
        Some(member) => check(*node, member, hello)?,
        None if is_retired(*node) || members.keys().next_back().is_some_and(|last| last > node) => {
            return Err(Refusal::Removed { name });
        }
        None => {}
    }
    Ok(*node)
}

/// Whether the node that says `hello` is the member that was to be reached.
pub(super) fn confirm(
    ours: ClusterName,
    expected: u64,
    member: &Member,
    hello: &Hello,
) -> Result<(), Refusal> {
    let found = admit(ours, &BTreeMap::new(), |_| false, hello)?;
    if found != expected {
        return Err(Refusal::OtherNode {
            name: hello.name.clone(),
            node: found,
            expected,
        });
    }
    check(expected, member, hello)
}

fn check(node: u64, member: &Member, hello: &Hello) -> Result<(), Refusal> {
    let name = hello.name.clone();
    if member.store_id != hello.store_id {
        return Err(Refusal::OtherStore { name });
    }
    if member.name != hello.name {
        let admitted = member.name.clone();
        return Err(Refusal::OtherName {
            node,
            name,
            admitted,
        });
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    fn member(number: u64) -> Member {
        Member {
            name: format!("n{number}").into(),
            ..Member::alone(number * 100)
        }
    }

    fn hello(number: u64) -> Hello {
        Hello {
            name: format!("n{number}").into(),
            store_id: number * 100,
            standing: Standing::Formed {
                cluster_id: 7,
                generation: 2,
                node: number,
                members: BTreeMap::new(),
            },
        }
    }

    const OURS: ClusterName = ClusterName {
        id: 7,
        generation: 2,
    };

    fn admit_to(ours: ClusterName, hello: &Hello) -> Result<u64, Refusal> {
        admit(ours, &members(), |node| node == 5, hello)
    }

    fn members() -> BTreeMap<u64, Member> {
        [1, 3].map(|number| (number, member(number))).into()
    }

    #[test]
    fn a_member_with_its_store_is_admitted() {
        assert_eq!(admit_to(OURS, &hello(3)), Ok(3));
        confirm(OURS, 3, &member(3), &hello(3)).unwrap();
        // Added since.
        assert_eq!(admit_to(OURS, &hello(4)), Ok(4));
        // Added and removed since.
        let removed = admit_to(OURS, &hello(5)).unwrap_err();
        assert!(matches!(removed, Refusal::Removed { .. }), "{removed}");
    }

    #[test]
    fn an_empty_node_is_added_as_its_configuration_has_it() {
        let address = SocketAddr::from(([192, 0, 2, 4], 7300));
        let own = Configured {
            name: "n3".into(),
            address,
            witness: true,
        };
        let empty = |empty| Hello {
            standing: Standing::Unformed {
                empty,
                configured: Arc::new([own.clone()]),
            },
            ..hello(3)
        };
        let node = empty(true);
        assert_eq!(node.may_be_added(("n3", address, true)), Ok(300));
        let refused = |hello: &Hello, name, witness| {
            hello.may_be_added((name, address, witness)).unwrap_err()
        };
        assert!(refused(&node, "n3", false).contains("and a witness"));
        assert!(refused(&node, "n4", true).contains("calls itself `n3`"));
        assert!(refused(&empty(false), "n3", true).contains("locks of its own"));
        assert!(refused(&hello(3), "n3", true).contains("belongs to a cluster already"));
    }

    #[test]
    fn others_are_refused_with_what_to_do() {
        let refused = |hello: &Hello| admit_to(OURS, hello).unwrap_err();
        let wiped = Hello {
            store_id: 5,
            ..hello(3)
        };
        let text = refused(&wiped).to_string();
        assert!(
            text.contains("node `n3` comes with another store"),
            "{text}"
        );
        assert!(text.contains("`havenfs cluster remove n3`"), "{text}");
        assert_eq!(confirm(OURS, 3, &member(3), &wiped), Err(refused(&wiped)));
        let renamed = Hello {
            name: "n9".into(),
            ..hello(3)
        };
        assert!(matches!(refused(&renamed), Refusal::OtherName { .. }));
        assert!(matches!(refused(&hello(2)), Refusal::Removed { .. }));
        let foreign = admit_to(ClusterName { id: 8, ..OURS }, &hello(3)).unwrap_err();
        assert!(matches!(foreign, Refusal::OtherCluster { .. }), "{foreign}");
        for generation in [1, 3] {
            let ours = ClusterName { generation, ..OURS };
            let refusal = admit_to(ours, &hello(3)).unwrap_err();
            let is_later = matches!(refusal, Refusal::LaterGeneration { .. });
            let is_earlier = matches!(refusal, Refusal::EarlierGeneration { .. });
            assert_eq!((is_later, is_earlier), (generation < 2, generation > 2));
        }
        let other = confirm(OURS, 1, &member(1), &hello(3)).unwrap_err();
        assert!(matches!(other, Refusal::OtherNode { .. }), "{other}");
        let unformed = Hello {
            standing: Standing::Unformed {
                empty: true,
                configured: Arc::new([]),
            },
            ..hello(3)
        };
        assert!(matches!(refused(&unformed), Refusal::Unformed { .. }));
    }
}
