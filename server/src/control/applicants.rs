//! What an operator is told of the empty nodes that wait to be added.
//!
//! One that has the name of a member may be that member with a new disk, which is to be removed and
//! added anew, or another machine that was given a name that is in use. To remove the member would
//! then cost the cluster a node that is well: that is advised only where it is not heard of.

use serde_json::{Value, json};

use crate::cluster::ClusterState;
use crate::raft::{Applicant, MemberSeen, go_alone, lives};
use crate::services::Services;

/// All that have asked this node lately: of each what adds it, or why it can't be added so.
pub(super) fn waiting(services: &Services) -> Value {
    let cluster = &services.cluster;
    let (applicants, members) = (cluster.applicants(), cluster.members());
    let state = services.state();
    let others = others(services, &members, &state);
    let has_data = !services.config.is_witness();
    let waiting = applicants.into_iter().map(|applicant| {
        let mut namesakes = members.iter();
        let namesake = namesakes.find(|member| member.name == applicant.name);
        let namesake = namesake.map(|member| (member, cluster.is_heard(member, &state)));
        let advice = advice(&applicant, namesake).and_then(|command| {
            let hindrance = hindrance(&applicant, others.as_deref(), has_data);
            hindrance.map_or(Ok(command), Err)
        });
        json!({
            "name": applicant.name,
            "address": applicant.address.to_string(),
            "witness": applicant.witness,
            "command": advice.as_ref().ok(),
            "problem": advice.as_ref().err(),
        })
    });
    waiting.collect()
}

/// What adds a node; an error says why nothing does now. `namesake` is the member of its name, and
/// whether that one is heard of, as far as this node can know.
fn advice(
    applicant: &Applicant,
    namesake: Option<(&MemberSeen, Option<bool>)>,
) -> Result<String, String> {
    let Some((member, is_heard)) = namesake else {
        return Ok(applicant.command());
    };
    let (name, address) = (&applicant.name, applicant.address);
    // Where the applicant listens the member can't.
    if member.address == address {
        return Ok(applicant.command());
    }
    match is_heard {
        Some(true) => {
            let which = format!("the machine at {address}");
            Err(lives(name, member.address, &which))
        }
        Some(false) => Ok(applicant.command()),
        None => Err(format!(
            "node `{name}` is a member at {}, and may live: the node that leads knows\nhint: see \
             `havenfs cluster status` there",
            member.address
        )),
    }
}

/// The other voters, and whether each lives, if nobody leads; none if somebody does.
fn others(
    services: &Services,
    members: &[MemberSeen],
    state: &ClusterState,
) -> Option<Vec<(String, bool)>> {
    let cluster = &services.cluster;
    if cluster.leader().is_some() {
        return None;
    }
    let own = cluster.own().node;
    let voters = members
        .iter()
        .filter(|member| member.votes && member.node != own);
    let others = voters.map(|member| {
        let lives = cluster.is_heard(member, state) == Some(true);
        (member.name.clone(), lives)
    });
    Some(others.collect())
}

/// Why a node that has the place of a member can't be added, where nobody leads.
fn hindrance(
    applicant: &Applicant,
    others: Option<&[(String, bool)]>,
    has_data: bool,
) -> Option<String> {
    let others = others.filter(|_| applicant.replaces)?;
    let name = &applicant.name;
    let lost: Vec<&str> = others.iter().map(|(name, _)| &**name).collect();
    let silent = others
        .iter()
        .filter(|(other, lives)| !lives && other != name);
    let silent: Vec<&str> = silent.map(|(name, _)| &**name).collect();
    // A witness has nothing to go on with.
    let is_last = has_data && others.iter().all(|(other, lives)| !lives || other == name);
    let alone = format!(
        "stop this node, say {}, start it, and say `{}`",
        go_alone(&lost),
        applicant.add_command()
    );
    let hint = match (silent.is_empty(), is_last) {
        (true, true) => format!("this node is the only one that is left: {alone}"),
        (false, true) => format!(
            "start {}; if nothing is left of {} but this node: {alone}",
            silent.join(" and "),
            if silent.len() == 1 {
                "that one"
            } else {
                "those"
            }
        ),
        (_, false) => "see who is not heard of, and start those nodes".to_owned(),
    };
    Some(format!(
        "there is no majority, so that `{name}` can be neither removed nor added\nhint: {hint}"
    ))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::cluster::NodeId;

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([198, 51, 100, last], 7300))
    }

    fn applicant(replaces: bool) -> Applicant {
        Applicant {
            name: "n2".to_owned(),
            address: at(9),
            witness: false,
            replaces,
        }
    }

    fn member(address: SocketAddr) -> MemberSeen {
        MemberSeen {
            node: NodeId(2),
            name: "n2".to_owned(),
            address,
            witness: false,
            votes: true,
        }
    }

    #[test]
    fn a_member_that_lives_is_not_to_be_removed() {
        let add = "havenfs cluster add n2 --address 198.51.100.9:7300";
        assert_eq!(advice(&applicant(false), None).as_deref(), Ok(add));
        let said = |address, is_heard| advice(&applicant(true), Some((&member(address), is_heard)));
        let lives = "node `n2` lives at 198.51.100.2:7300: give the machine at 198.51.100.9:7300 \
                     another name; only if that one is to be replaced, stop it first";
        assert_eq!(said(at(2), Some(true)), Err(lives.to_owned()));
        assert!(said(at(2), None).is_err_and(|said| said.contains("may live")));
        // It is silent, or its machine has a new disk and its lease is not over yet.
        let replace = Ok(format!("havenfs cluster remove n2 && {add}"));
        assert_eq!(said(at(2), Some(false)), replace);
        assert_eq!(said(at(9), Some(true)), replace);
    }

    #[test]
    fn without_a_majority_nobody_is_removed() {
        let said = |others: &[(&str, bool)]| {
            let others = others
                .iter()
                .map(|(name, lives)| ((*name).to_owned(), *lives));
            let others: Vec<_> = others.collect();
            hindrance(&applicant(true), Some(&others), true).unwrap_or_default()
        };
        assert_eq!(hindrance(&applicant(true), None, true), None);
        assert_eq!(hindrance(&applicant(false), Some(&[]), true), None);
        let two = said(&[("n2", true)]);
        let alone = "hint: this node is the only one that is left: stop this node, say `havenfs \
                     cluster sole-survivor --config /etc/havenfs/havenfs.toml --i-fenced n2`, \
                     start it, and say `havenfs cluster add n2 --address 198.51.100.9:7300`";
        assert!(two.ends_with(alone), "{two}");
        let three = said(&[("n2", false), ("w", false)]);
        assert!(
            three.contains("hint: start w; if nothing is left of that one"),
            "{three}"
        );
        assert!(three.contains("--i-fenced n2 --i-fenced w`"), "{three}");
        // Another one lives, and may have what this one lacks.
        assert!(!said(&[("n2", false), ("n3", true)]).contains("sole-survivor"));
        let others = [("n2".to_owned(), false)];
        let witness = hindrance(&applicant(true), Some(&others), false);
        assert!(witness.is_some_and(|said| !said.contains("sole-survivor")));
    }
}
