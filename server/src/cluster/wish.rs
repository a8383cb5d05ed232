//! Where a service is wanted, and where it was put: what operators have said of it, as far as the
//! log must remember that.
//!
//! A wish is replicated, since it must be fulfilled also if the node dies that was asked. It ends
//! when the service is assigned the next time, but for [`Wish::Nobody`]: a service that an operator
//! has released stays down, over restarts of all nodes, until it is moved or taken. Only the node
//! that still has it may assign it to itself, to let it go in the end.
//!
//! A service that an operator has put on a node stays there, whatever node it prefers: that is
//! [`Placed`], which ends when another node has the service, since that one did not get it by the
//! operator's word.

use serde::{Deserialize, Serialize};

use super::NodeId;

/// Where a service is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Wish {
    /// Where it is, or wherever it can be. Stored as no node was once.
    #[default]
    Anywhere,
    /// On this node, if that one lives. Stored as a node was once.
    On(NodeId),
    /// Nowhere: it is to be released, and to stay so.
    Nobody,
}

impl Wish {
    /// The node that it names.
    pub const fn node(self) -> Option<NodeId> {
        match self {
            Self::On(node) => Some(node),
            Self::Anywhere | Self::Nobody => None,
        }
    }

    /// What is left of it when the service is assigned.
    pub(super) const fn after_assignment(self) -> Self {
        match self {
            Self::Anywhere | Self::On(_) => Self::Anywhere,
            Self::Nobody => Self::Nobody,
        }
    }
}

/// The node that an operator has put a service on, as long as no other one has had it since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Placed(pub(super) Option<NodeId>);

impl Placed {
    /// The service is assigned to a node.
    pub(super) fn assigned_to(&mut self, node: NodeId) {
        if self.0 != Some(node) {
            self.0 = None;
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn a_wish_is_stored_as_an_optional_node_was() {
        let bytes = |wish: Wish| postcard::to_extend(&wish, Vec::new()).unwrap();
        let earlier = |node: Option<NodeId>| postcard::to_extend(&node, Vec::new()).unwrap();
        assert_eq!(bytes(Wish::Anywhere), earlier(None));
        for node in [NodeId(0), NodeId(3), NodeId(u64::MAX)] {
            assert_eq!(bytes(Wish::On(node)), earlier(Some(node)));
        }
        assert_eq!(bytes(Wish::Nobody), [2]);
    }

    #[test]
    fn who_was_put_somewhere_stays_until_another_node_has_it() {
        let (one, other) = (NodeId(1), NodeId(2));
        let mut placed = Placed(Some(one));
        placed.assigned_to(one);
        assert_eq!(placed, Placed(Some(one)));
        placed.assigned_to(other);
        placed.assigned_to(one);
        assert_eq!(placed, Placed(None));
    }
}
