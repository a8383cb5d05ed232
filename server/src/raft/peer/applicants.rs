//! Empty nodes that ask for the cluster and are not in it: for people, who are told how to add
//! them.
//!
//! They ask some times a second as long as they wait, so that what was not heard of for a while is
//! forgotten.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::hello::{Hello, Standing};
use crate::raft::types::Member;

/// How many are told apart; only holders of the cluster's key get here.
const APPLICANTS_MAX: usize = 32;
/// One that has not asked for so long is forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(5);

/// A node that waits to be added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applicant {
    /// Its name.
    pub name: String,
    /// Where it says that it is reached.
    pub address: SocketAddr,
    /// Whether it only votes.
    pub witness: bool,
    /// Whether there is a member of its name, which it was before its disk was lost.
    pub replaces: bool,
}

impl Applicant {
    /// What adds it if there is no member of its name.
    pub fn add_command(&self) -> String {
        let witness = if self.witness { " --witness" } else { "" };
        let (name, address) = (&self.name, self.address);
        format!("havenfs cluster add {name} --address {address}{witness}")
    }

    /// What adds it, in one line for a shell.
    pub fn command(&self) -> String {
        let (name, add) = (&self.name, self.add_command());
        if self.replaces {
            format!("havenfs cluster remove {name} && {add}")
        } else {
            add
        }
    }
}

/// What to say where a machine, `which` for people, has the name of a member that lives.
pub fn lives(name: &str, address: SocketAddr, which: &str) -> String {
    format!(
        "node `{name}` lives at {address}: give {which} another name; only if that one is to be \
         replaced, stop it first"
    )
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Applicants(Mutex<Known>);

/// By name and store, with when they asked last.
type Known = BTreeMap<(Box<str>, u64), (Applicant, Instant)>;

impl Applicants {
    /// Notes one that asks a node that knows `members`.
    pub(super) fn note(&self, members: &BTreeMap<u64, Member>, hello: &Hello) {
        let Standing::Unformed {
            empty: true,
            configured,
        } = &hello.standing
        else {
            return;
        };
        let mut known = members.values();
        if known.any(|member| member.store_id == hello.store_id()) {
            // It was added just now, and hears of it with this answer.
            return;
        }
        let mut configured = configured.iter();
        let Some(own) = configured.find(|one| one.name == hello.name) else {
            return;
        };
        let applicant = Applicant {
            name: own.name.to_string(),
            address: own.address,
            witness: own.witness,
            replaces: members.values().any(|member| member.name == hello.name),
        };
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, (_, asked)| asked.elapsed() < FORGOTTEN_AFTER);
        let key = (hello.name.clone(), hello.store_id);
        if known.len() < APPLICANTS_MAX || known.contains_key(&key) {
            let is_news = known
                .insert(key, (applicant.clone(), Instant::now()))
                .is_none();
            let Applicant { name, address, .. } = &applicant;
            if is_news && applicant.replaces {
                // Whether the member is to make way depends on whether it lives.
                tracing::warn!(
                    %name,
                    %address,
                    "an empty node has the name of a member\nhint: see `havenfs cluster status` \
                     for what to do"
                );
            } else if is_news {
                let command = applicant.command();
                tracing::info!(%name, "an empty node waits to be added: `{command}`");
            }
        }
    }

    /// Who has asked lately and is none of `members` by now.
    pub(super) fn list(&self, members: &BTreeMap<u64, Member>) -> Vec<Applicant> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let lately = known
            .iter()
            .filter(|(_, (_, asked))| asked.elapsed() < FORGOTTEN_AFTER);
        let left = lately.filter(|((_, store_id), _)| {
            let mut members = members.values();
            members.all(|member| member.store_id != *store_id)
        });
        left.map(|(_, (applicant, _))| applicant.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::raft::peer::hello::Configured;

    #[test]
    fn who_was_added_waits_no_more() {
        let own = Configured {
            name: "n2".into(),
            address: SocketAddr::from(([192, 0, 2, 2], 7300)),
            witness: false,
        };
        let hello = Hello {
            name: own.name.clone(),
            store_id: 7,
            standing: Standing::Unformed {
                empty: true,
                configured: Arc::new([own]),
            },
        };
        let applicants = Applicants::default();
        let before = BTreeMap::from([(1, Member::alone(6))]);
        applicants.note(&before, &hello);
        assert_eq!(applicants.list(&before).len(), 1);
        let after = BTreeMap::from([(1, Member::alone(6)), (2, Member::alone(7))]);
        assert_eq!(applicants.list(&after), []);
    }
}
