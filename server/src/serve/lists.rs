//! The export lists of this node, looked at when it starts.
//!
//! Where nothing else says what is served, a mistake ends the start. In a cluster the definitions
//! hold, and a node may be wanted just because others fail: once it has copies of all of them, what
//! its own lists say is told and nothing more, and their disks are not waited for.

use crate::config::cluster::NodeConfig;
use crate::definitions;
use crate::serve::opening::service_dir;
use crate::state::State;
use crate::volumes::{self, ExportsError};

/// Looks for mistakes, and for files that two services show.
///
/// # Errors
/// Without a cluster either of them; in one, files of two services that may not be defined yet.
pub(super) fn check(config: &NodeConfig, state: &State) -> Result<(), ExportsError> {
    if config.cluster.is_none() {
        return volumes::check_lists(&config.export_lists());
    }
    let is_defined = |name: &str| {
        let dir = service_dir(state, name);
        dir.is_ok_and(|dir| matches!(definitions::copy(&dir), Ok(Some(_))))
    };
    if !config
        .services
        .iter()
        .all(|service| is_defined(&service.name))
    {
        return match volumes::check_lists(&config.export_lists()) {
            Err(error @ ExportsError::Overlap { .. }) => Err(error),
            told => {
                warn(told);
                Ok(())
            }
        };
    }
    let config = config.clone();
    let looking = std::thread::Builder::new().name("lists".to_owned());
    let looking = looking.spawn(move || warn(volumes::check_lists(&config.export_lists())));
    if let Err(error) = looking {
        tracing::warn!(%error, "the export lists of this node are not looked at");
    }
    Ok(())
}

fn warn(told: Result<(), ExportsError>) {
    if let Err(error) = told {
        tracing::warn!(
            "the files of this node can't be served as they are; what the cluster has of its \
             services holds: {error}"
        );
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use crate::cluster::definition::{Defined, Definition};
    use crate::config::File;
    use crate::config::cluster::plan;

    const TWO: &str = "node = 'n1'\n[cluster]\nkey_file = '/nowhere'\n\
        [[cluster.member]]\nname = 'n1'\naddress = '192.0.2.1:7300'\n\
        [[service]]\nname = 'a'\naddresses = ['192.0.2.7']\nstorage = 'cluster-fs'\n\
        exports = ['/srv/a(MORE)']\n\
        [[service]]\nname = 'b'\naddresses = ['192.0.2.8']\nstorage = 'cluster-fs'\n\
        exports = ['/srv/a/b']\n";

    fn config(more: &str) -> NodeConfig {
        let file: File = toml::from_str(&TWO.replace("(MORE)", more)).unwrap();
        plan(File::default(), file).unwrap()
    }

    #[test]
    fn once_services_are_defined_the_lists_do_not_keep_a_node_from_starting() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(dir.path()).unwrap();
        let shares = config("");
        assert!(check(&shares, &state).is_err());
        // A mistake in a list does not: the services may be defined by other nodes.
        assert!(check(&config(":*(no_such_option)"), &state).is_ok());
        for name in ["a", "b"] {
            let defined = Defined {
                version: 1,
                definition: Definition::default(),
            };
            let dir = service_dir(&state, name).unwrap();
            definitions::keep_copy(&dir, &defined).unwrap();
        }
        assert!(check(&shares, &state).is_ok());
        let alone = NodeConfig {
            cluster: None,
            ..shares
        };
        assert!(check(&alone, &state).is_err());
    }
}
