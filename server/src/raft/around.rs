//! What the other members of the configuration are, before this node begins a cluster or goes on
//! with one by itself: what it can't know by its own store.

use std::path::Path;

use super::error::StoreError;
use super::offline::{self, OfflineError};
use super::peer::{ClusterKey, Configured, Peers};
use super::stored::{self, Formed, Stored};
use crate::config::cluster::ClusterConfig;

/// The members that a configuration names.
pub(super) fn configured(cluster: &ClusterConfig) -> Vec<Configured> {
    let members = cluster.members.iter().map(|member| Configured {
        name: member.name.as_str().into(),
        address: member.address,
        witness: member.witness,
    });
    members.collect()
}

/// Makes sure that the others belong to no cluster, before this node begins one. `absent` are those
/// of whom an operator knows it.
///
/// # Errors
/// If one does, or one that is not in `absent` does not say.
pub fn check_none_formed(cluster: &ClusterConfig, absent: &[String]) -> Result<(), OfflineError> {
    let said = ask_all(cluster, &configured(cluster))?;
    judge(&cluster.node, &said, absent).map_err(OfflineError::Refused)
}

/// Makes sure that no other member answers as one of the cluster of the store in `dir`, before this
/// node goes on without them: whoever answers may serve. Who is silent may, too; that is for the
/// operator to know.
///
/// # Errors
/// If one does.
pub fn check_none_lives(cluster: &ClusterConfig, dir: &Path) -> Result<(), OfflineError> {
    let formed = stored::read(dir)?.and_then(|stored| stored.formed);
    let Some(formed) = formed else {
        return Ok(());
    };
    // The configuration may lack some that were added, and may know some by newer addresses.
    let mut all = configured(cluster);
    for member in offline::members(dir)? {
        if !all.contains(&member) {
            all.push(member);
        }
    }
    judge_lost(&ask_all(cluster, &all)?, formed.cluster_id).map_err(OfflineError::Refused)
}

/// What a member said: the cluster that it belongs to, if any; or why it said nothing.
type Said = (Box<str>, Result<Option<u64>, String>);

/// Asks all of these members but this node.
fn ask_all(cluster: &ClusterConfig, all: &[Configured]) -> Result<Vec<Said>, OfflineError> {
    let key = ClusterKey::read(&cluster.key_file);
    let key = key.map_err(|error| StoreError::Cluster(error.to_string()))?;
    let nobody = Stored {
        store_id: 0,
        formed: None,
        pending: None,
    };
    let peers = Peers::new(key, &cluster.node, &nobody, false, all);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(StoreError::io("start a runtime for", Path::new("asking")))?;
    let said = runtime.block_on(peers.look(all));
    let said = said.into_iter().map(|(member, said)| {
        let said = said.map(|hello| hello.cluster_id());
        (member.name, said.map_err(|error| error.to_string()))
    });
    Ok(said.collect())
}

fn judge_lost(said: &[Said], cluster_id: u64) -> Result<(), String> {
    let mut said = said.iter();
    let lives = said.find(|(_, said)| *said == Ok(Some(cluster_id)));
    lives.map_or(Ok(()), |(name, _)| {
        Err(format!(
            "node `{name}` answers, and belongs to this cluster: it is not off, and may serve\n\
             hint: if enough of the others live, start this node as it is; else stop `{name}`, make \
             sure that it can neither write to the storage nor come back by itself, and say this \
             again"
        ))
    })
}

fn judge(own: &str, said: &[Said], absent: &[String]) -> Result<(), String> {
    for (name, said) in said {
        if let Ok(Some(id)) = said {
            return Err(format!(
                "node `{name}` belongs to a cluster already, {id:016x}, and this would be another \
                 one\nhint: to have this node in it, start it with an empty state directory, and \
                 say what `havenfs cluster status` of `{name}` says; if the state directory of \
                 `{own}` was lost, say `havenfs cluster remove {own}` there before"
            ));
        }
    }
    if let Some(unknown) = absent
        .iter()
        .find(|absent| said.iter().all(|(name, _)| **name != ***absent))
    {
        return Err(format!(
            "the configuration has no other member `{unknown}`\nhint: compare the names in \
             [[cluster.member]]"
        ));
    }
    let silent = said.iter().filter_map(|(name, said)| {
        let problem = said.as_ref().err()?;
        let is_absent = absent.iter().any(|absent| **absent == **name);
        (!is_absent).then_some((name, problem))
    });
    let silent: Vec<_> = silent.collect();
    if silent.is_empty() {
        return Ok(());
    }
    let why: Vec<String> = silent
        .iter()
        .map(|(name, problem)| format!("`{name}` can't be asked: {problem}"))
        .collect();
    let words: Vec<String> = silent
        .iter()
        .map(|(name, _)| format!("--absent {name}"))
        .collect();
    Err(format!(
        "other members may belong to a cluster already: {}\nhint: if you know that none of them \
         does, say so: `havenfs cluster init {}`",
        why.join("; "),
        words.join(" ")
    ))
}

/// Makes sure that no other member of the configuration has gone on without this node, which is the
/// only voter that it knows.
pub(super) async fn check_none_went_on(
    peers: &Peers,
    configured: &[Configured],
    own: &Formed,
    store_id: u64,
) -> Result<(), StoreError> {
    for (member, said) in peers.look(configured).await {
        if said.is_ok_and(|hello| hello.went_on_without(own, store_id)) {
            let name = &member.name;
            return Err(StoreError::Cluster(format!(
                "node `{name}` has gone on with this cluster without this node, which would be a \
                 second one\nhint: only one of them may serve: stop the other one, move its state \
                 directory away, start it, and say `havenfs cluster add` on the one that is left"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_goes_on_alone_beside_one_that_answers() {
        let said = |n2, n3| -> [Said; 2] { [("n2".into(), n2), ("n3".into(), n3)] };
        let silent = || Err("it is silent".to_owned());
        // Others may have been begun anew, or belong elsewhere.
        for other in [Ok(None), Ok(Some(8)), silent()] {
            assert_eq!(judge_lost(&said(silent(), other), 7), Ok(()));
        }
        let problem = judge_lost(&said(silent(), Ok(Some(7))), 7);
        assert!(problem.is_err_and(|problem| problem.contains("`n3` answers")));
    }

    #[test]
    fn a_cluster_is_begun_only_where_there_is_none() {
        let said = |n2, n3| -> [Said; 2] { [("n2".into(), n2), ("n3".into(), n3)] };
        let judged = |said: &[Said], absent: &[&str]| {
            let absent: Vec<String> = absent.iter().map(|name| (*name).to_owned()).collect();
            match judge("n1", said, &absent) {
                Ok(()) => String::new(),
                Err(problem) => problem,
            }
        };
        let silent = || Err("it is silent".to_owned());
        assert_eq!(judged(&said(Ok(None), Ok(None)), &[]), "");
        assert_eq!(judged(&said(Ok(None), silent()), &["n3"]), "");
        let problem = judged(&said(silent(), silent()), &["n3"]);
        assert!(problem.contains("init --absent n2`"), "{problem}");
        let problem = judged(&said(Ok(Some(7)), silent()), &["n2", "n3"]);
        assert!(problem.contains("`n2` belongs to a cluster"), "{problem}");
        assert!(judged(&said(Ok(None), Ok(None)), &["n4"]).contains("`n4`"));
    }
}
