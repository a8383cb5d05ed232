//! A configuration that names other members than the cluster has: the cluster's count, and the log
//! says so, so that somebody corrects the file.
//!
//! A node that starts, or was just added, reads memberships in its log that are long over, and
//! members may be added one after the other. So the list is compared when it has stayed as it is
//! for a while and this node is in it, and again whenever it has changed.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::leading::members;
use super::peer::{self, Configured};
use super::types::{Member, StoredMembership};

/// Says what the configuration has otherwise than the cluster; runs as long as the engine.
pub(super) async fn compare(
    own: u64,
    mut settled: watch::Receiver<StoredMembership>,
    configured: &[Configured],
) {
    let mut differing = Differing::default();
    loop {
        let now = members(&settled.borrow_and_update());
        match timeout(STAYS, settled.changed()).await {
            Ok(Ok(())) => continue,
            Ok(Err(_)) => return,
            Err(_) => {}
        }
        if let Some(difference) = differing.news(own, &now, configured) {
            tracing::warn!(
                "the cluster has other members than the configuration, and these count: \
                 {difference}\nhint: correct [[cluster.member]] in the configuration"
            );
        }
        if settled.changed().await.is_err() {
            return;
        }
    }
}

/// What was said.
#[derive(Debug, Default)]
struct Differing(Option<String>);

impl Differing {
    /// What differs, if that was not said last. Of a cluster without this node nothing is said:
    /// that is of the past, or this node is to end.
    fn news(
        &mut self,
        own: u64,
        members: &BTreeMap<u64, Member>,
        configured: &[Configured],
    ) -> Option<String> {
        if !members.contains_key(&own) {
            return None;
        }
        let now = difference(members, configured);
        if now == self.0 {
            return None;
        }
        self.0.clone_from(&now);
        now
    }
}

fn difference(members: &BTreeMap<u64, Member>, configured: &[Configured]) -> Option<String> {
    let mut actual: Vec<Configured> = members.values().map(Configured::of).collect();
    actual.sort();
    peer::difference(configured, &actual)
}

/// How long a list of members stays as it is before it is compared.
const STAYS: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_difference_is_said_once_and_not_before_this_node_is_a_member() {
        let member = |number: u64| Member {
            name: format!("n{number}").into(),
            ..Member::alone(number)
        };
        let members = |numbers: &[u64]| -> BTreeMap<u64, Member> {
            let numbers = numbers.iter();
            numbers.map(|number| (*number, member(*number))).collect()
        };
        let configured: Vec<Configured> = [1, 2, 4]
            .map(|number| Configured {
                name: member(number).name,
                address: member(number).address,
                witness: false,
            })
            .into();
        let mut differing = Differing::default();
        let mut news = |numbers: &[u64]| differing.news(4, &members(numbers), &configured);
        assert_eq!(news(&[1, 2]), None, "it is not added yet");
        assert_eq!(news(&[1, 2, 4]), None);
        let lacks = news(&[1, 4]).unwrap_or_default();
        assert!(lacks.starts_with("it lacks `n2`"), "{lacks}");
        assert_eq!(news(&[1, 4]), None, "it was said");
        assert_eq!(news(&[1, 2, 4]), None);
        let more = news(&[1, 2, 3, 4]).unwrap_or_default();
        assert!(more.ends_with("which this node's file lacks"), "{more}");
    }
}
