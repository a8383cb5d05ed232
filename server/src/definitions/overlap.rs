//! Keeps two services from showing the same files: each would give locks on them away.
//!
//! What has to differ is what is in force, and of another service only its last definition is
//! known. So as long as that is not in force where the other one is served, no files are taken into
//! a service: those that the other one lost may still be locked there. Files that a service has in
//! force already are its own, so that to give some away, or to take a definition back, is never
//! kept from it.
//!
//! ```text
//!   alpha: v2, without /srv/x        in force
//!     |---- /srv/x is alpha's still ----|
//!   beta:   v2, with /srv/x: refused    |  taken
//! ```
//!
//! Of two definitions in the log the later one is compared by a node that knows the earlier one.
//!
//! When a service is opened it is compared only with what is known without a disk: the disk of
//! another service must not keep it from clients. Of two that were defined with the same files,
//! the one that was in force with them is served.

use std::collections::HashSet;
use std::sync::Arc;

use super::specs_of;
use crate::cluster::ServiceState;
use crate::cluster::definition::{Defined, Definition};
use crate::export::ExportSpec;
use crate::services::Services;
use crate::volumes::ExportsError;
use crate::volumes::overlap::{Shown, by_paths, compare, with_places};

/// Another service.
#[derive(Debug)]
struct Other {
    name: String,
    defined: Arc<Defined>,
    /// Whether the definition has come into force.
    is_settled: bool,
    /// Whether something of the service may be in force now.
    is_active: bool,
    /// What it shows, if it is open on this node.
    shown: Option<Arc<Vec<Shown>>>,
}

impl Other {
    fn is_redefined(&self) -> bool {
        self.defined.version > 1
    }
}

/// Looks whether exports may be proposed for a service. Waits for the disks of all services.
///
/// # Errors
/// [`ExportsError::Overlap`], [`ExportsError::Unsettled`].
pub fn may_propose(
    services: &Services,
    name: &str,
    specs: &[ExportSpec],
) -> Result<(), ExportsError> {
    let (own, others) = look(services, name);
    // Of its own, too, nothing is known but the last definition.
    let in_force = own.filter(|(_, is_settled)| *is_settled);
    let in_force = in_force.as_ref().map(|(defined, _)| &defined.definition);
    let added = added(name, specs, in_force);
    if added.is_empty() {
        return Ok(());
    }
    all_settled(&others)?;
    let added = with_places(name, &added);
    for other in others {
        // One that can't be read is not served either.
        if let Ok(specs) = specs_of(&other.name, &other.defined.definition) {
            compare(&added, &with_places(&other.name, &specs))?;
        }
    }
    Ok(())
}

/// Looks whether exports may come into force in place of others, on the node that serves them.
/// Waits for the disk of this service alone.
///
/// # Errors
/// [`ExportsError::Overlap`], [`ExportsError::Unsettled`].
pub fn may_replace(
    services: &Services,
    name: &str,
    specs: &[ExportSpec],
    in_force: &Definition,
) -> Result<(), ExportsError> {
    let added = added(name, specs, Some(in_force));
    if added.is_empty() {
        return Ok(());
    }
    let (_, others) = look(services, name);
    all_settled(&others)?;
    compare_known(&with_places(name, &added), &others)
}

/// Looks whether what a service shows may be opened. Touches no disk.
///
/// # Errors
/// [`ExportsError::Overlap`].
pub fn may_open(services: &Services, name: &str, shown: &[Shown]) -> Result<(), ExportsError> {
    let (own, others) = look(services, name);
    let is_settled = own.is_some_and(|(_, is_settled)| is_settled);
    may_open_beside(is_settled, shown, others)
}

fn may_open_beside(
    is_settled: bool,
    shown: &[Shown],
    others: Vec<Other>,
) -> Result<(), ExportsError> {
    // One that has not come into force gives way to one that has, or each would to the other.
    let (waived, others): (Vec<_>, Vec<_>) = others
        .into_iter()
        .partition(|other| is_settled && !other.is_settled);
    for other in waived.iter().filter_map(|other| other.shown.as_ref()) {
        compare(shown, other)?;
    }
    compare_known(shown, &others)
}

/// The definition of a service, with whether it has come into force, and the other services.
fn look(services: &Services, name: &str) -> (Option<(Arc<Defined>, bool)>, Vec<Other>) {
    let state = services.state();
    let mut own = None;
    let mut others = Vec::new();
    for (_, service) in state.services() {
        let Some(defined) = service.defined().cloned() else {
            continue;
        };
        let is_settled = is_settled(service);
        if service.name() == name {
            own = Some((defined, is_settled));
            continue;
        }
        let mut slots = services.slots.iter();
        let slot = slots.find(|slot| slot.config.name == service.name());
        others.push(Other {
            name: service.name().to_owned(),
            defined,
            is_settled,
            is_active: service.active().is_some(),
            shown: slot.and_then(|slot| slot.shown()),
        });
    }
    (own, others)
}

/// Whether the last definition has come into force where the service was served last. One that was
/// refused has not, but that which takes it back has.
fn is_settled(service: &ServiceState) -> bool {
    service.in_force().version == service.version()
}

fn all_settled(others: &[Other]) -> Result<(), ExportsError> {
    let mut others = others.iter();
    // Of a first definition it is known what can be in force: that, or nothing.
    let may_differ = |other: &&Other| other.is_active && !other.is_settled && other.is_redefined();
    match others.find(may_differ) {
        Some(other) => Err(ExportsError::Unsettled(other.name.clone())),
        None => Ok(()),
    }
}

/// The exports whose files are not in force already.
fn added(name: &str, specs: &[ExportSpec], in_force: Option<&Definition>) -> Vec<ExportSpec> {
    let known = in_force.and_then(|in_force| specs_of(name, in_force).ok());
    let known = known.unwrap_or_default();
    let known: HashSet<_> = known.iter().map(|spec| &spec.path).collect();
    let added = specs.iter().filter(|spec| !known.contains(&spec.path));
    added.cloned().collect()
}

/// By paths with all of them, by places with those that are open here.
fn compare_known(shown: &[Shown], others: &[Other]) -> Result<(), ExportsError> {
    for other in others {
        if let Some(others) = &other.shown {
            compare(shown, others)?;
        }
        if let Ok(specs) = specs_of(&other.name, &other.defined.definition) {
            compare(shown, &by_paths(&other.name, &specs))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(paths: &[&str]) -> Definition {
        Definition {
            exports: paths
                .iter()
                .map(|path| format!("{path} *(rw)").into())
                .collect(),
            ..Definition::default()
        }
    }

    fn specs(name: &str, paths: &[&str]) -> Vec<ExportSpec> {
        specs_of(name, &definition(paths)).unwrap_or_default()
    }

    fn other(paths: &[&str], is_settled: bool, is_active: bool) -> Other {
        Other {
            name: "beta".into(),
            defined: Arc::new(Defined {
                version: 2,
                definition: definition(paths),
            }),
            is_settled,
            is_active,
            shown: None,
        }
    }

    #[test]
    fn what_another_service_may_still_have_is_not_free() {
        let told = |is_settled, is_active| all_settled(&[other(&["/b"], is_settled, is_active)]);
        assert!(matches!(told(false, true), Err(ExportsError::Unsettled(name)) if name == "beta"));
        assert!(told(true, true).is_ok());
        // Whoever opens it begins with the definition.
        assert!(told(false, false).is_ok());
        let mut first = other(&["/b"], false, true);
        Arc::make_mut(&mut first.defined).version = 1;
        assert!(all_settled(&[first]).is_ok());
    }

    #[test]
    fn what_is_in_force_already_is_not_taken_from_anybody() {
        let in_force = definition(&["/a", "/x"]);
        let added = |paths| added("alpha", &specs("alpha", paths), Some(&in_force));
        assert!(added(&["/a"]).is_empty());
        assert!(added(&["/x", "/a"]).is_empty());
        // Something else may be mounted there.
        let paths: Vec<_> = added(&["/a", "/a/c"])
            .into_iter()
            .map(|spec| spec.path)
            .collect();
        assert_eq!(paths, [std::path::Path::new("/a/c")]);
    }

    #[test]
    fn of_two_that_are_defined_with_the_same_files_one_is_opened() {
        let shown = by_paths("alpha", &specs("alpha", &["/a", "/x"]));
        let open = |own, others| may_open_beside(own, &shown, others).is_ok();
        let takes_x = |is_settled| vec![other(&["/b", "/x/y"], is_settled, false)];
        assert!(!open(true, takes_x(true)));
        assert!(open(true, takes_x(false)));
        assert!(!open(false, takes_x(true)));
        assert!(!open(false, takes_x(false)));
        assert!(open(false, vec![other(&["/b"], false, true)]));
        // What is open on this node counts in any case.
        let mut here = takes_x(false);
        let has_x = by_paths("beta", &specs("beta", &["/x"]));
        for other in &mut here {
            other.shown = Some(Arc::new(has_x.clone()));
        }
        assert!(!open(true, here));
    }
}
