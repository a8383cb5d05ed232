//! That a majority lives, before anything is changed that needs one: else the change would be begun
//! and never be done.

use std::collections::BTreeSet;

use tokio::time::{Instant, sleep};

use super::error::{ChangeError, refused};
use super::sight::{SILENT_MAX, Sight, sight};
use super::{Changes, POLL};

impl Changes {
    /// Waits a moment for those who may be coming back.
    pub(super) async fn wait_for_majority(&self) -> Result<(), ChangeError> {
        let begun = Instant::now();
        loop {
            match has_majority(&sight(&self.engine)) {
                Err(_) if begun.elapsed() < SILENT_MAX => sleep(POLL).await,
                result => return result,
            }
        }
    }
}

fn has_majority(sight: &Sight) -> Result<(), ChangeError> {
    let silent: BTreeSet<u64> = sight.voters.difference(&sight.heard).copied().collect();
    let live = sight.voters.len() - silent.len();
    if live > sight.voters.len() / 2 {
        return Ok(());
    }
    let (all, silent_names) = (sight.names(&sight.voters), sight.names(&silent));
    let is_witness = sight.members.get(&sight.own).is_some_and(|own| own.witness);
    let last = if live == 1 && !is_witness {
        let own = sight.name(sight.own);
        let names: Vec<&str> = silent.iter().map(|node| sight.name(*node)).collect();
        let alone = go_alone(&names);
        format!("; if nothing is left of {silent_names}, stop node `{own}` and say there {alone}")
    } else {
        String::new()
    };
    Err(refused(format!(
        "there is no majority: of {all}, which vote, {silent_names} was not heard of lately, so \
         that nothing can be changed\nhint: start {silent_names}{last}"
    )))
}

/// What the last node is told to go on without these, with its server stopped.
pub fn go_alone(lost: &[&str]) -> String {
    let lost: Vec<String> = lost
        .iter()
        .map(|name| format!(" --i-fenced {name}"))
        .collect();
    format!(
        "`havenfs cluster sole-survivor --config /etc/havenfs/havenfs.toml{}`",
        lost.concat()
    )
}

#[cfg(test)]
mod tests {
    use super::super::sight::tests::sight_of;
    use super::*;

    fn said(voters: &[u64], witnesses: &[u64], heard: &[u64]) -> String {
        let own = heard.first().copied().unwrap_or_default();
        let sight = sight_of(own, voters, witnesses, heard);
        has_majority(&sight)
            .err()
            .map_or_else(String::new, |error| error.to_string())
    }

    #[test]
    fn the_last_one_is_told_how_to_go_on_alone() {
        assert_eq!(said(&[1], &[], &[1]), "");
        assert_eq!(said(&[1, 2, 3], &[], &[1, 3]), "");
        let two = said(&[1, 2], &[], &[1]);
        let alone = "stop node `n1` and say there `havenfs cluster sole-survivor --config \
                     /etc/havenfs/havenfs.toml --i-fenced n2`";
        assert!(two.contains(alone), "{two}");
        assert!(said(&[1, 2, 3], &[], &[2]).contains("--i-fenced n1 --i-fenced n3`"));
        // A witness has nothing to go on with, and of two that live none is alone.
        for no_majority in [said(&[1, 2], &[1], &[1]), said(&[1, 2, 3, 4], &[], &[1, 2])] {
            assert!(no_majority.starts_with("there is no majority"));
            assert!(!no_majority.contains("sole-survivor"), "{no_majority}");
        }
    }
}
