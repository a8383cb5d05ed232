//! What is said where an empty node is to be added under the name of a voter.

use std::net::SocketAddr;

use super::Changes;
use super::error::{ChangeError, refused};
use crate::raft::peer::lives;
use crate::raft::types::Member;

impl Changes {
    /// Why the empty node at `address` can't be added under the name of `member`. If that one
    /// lives, it is another machine, and nobody is to remove it for that.
    pub(super) async fn has_namesake(
        &self,
        name: &str,
        member: &Member,
        address: SocketAddr,
    ) -> ChangeError {
        if self.peers.is_there(member).await {
            let which = format!("the machine at {address}");
            return refused(lives(name, member.address, &which));
        }
        refused(format!(
            "node `{name}` is a member with the store that it had before\nhint: say `havenfs \
             cluster remove {name}` first"
        ))
    }
}
