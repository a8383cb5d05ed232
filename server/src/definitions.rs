//! Definitions of services between the files of this node and the cluster.
//!
//! Reads what the files say ([`of_files`]), turns what the cluster has back into exports
//! ([`specs_of`]) and settings ([`with_definition`]), and keeps a copy of it for the next start.
//! Which definition holds is decided in [`cluster::definition`](crate::cluster::definition) alone.
//!
//! # Addresses
//!
//! Exports and names change while a service is served; addresses do not: they are given to the
//! guard process and to listeners when the process starts. So a node runs with the addresses that
//! the service had then, by the copy, and a node that runs with others than the service has now
//! lets the other nodes take it first, and says that it wants to be restarted. If none of them
//! takes it, a service with old addresses is better than none, and no two nodes serve at a time.
//!
//! The copy is needed since a start must not wait for a majority to know which addresses it may
//! have to take away. It may be old; then the node restarts once more.

pub mod overlap;

use std::io::{self, Read as _};
use std::path::Path;

use crate::cluster::definition::{Defined, Definition, ServiceAddress};
use crate::config::Settings;
use crate::config::floating::{FloatingAddress, FloatingConfig};
use crate::config::service::ServiceConfig;
use crate::export::{self, ExportSpec, Source};
use crate::state::replace_file;
use crate::volumes::{self, ExportsError};

/// What the files of this node say of a service. Waits for the disk.
///
/// # Errors
/// Mistakes in the export lists, or more of them than a definition may have.
pub fn of_files(service: &ServiceConfig) -> Result<Definition, ExportsError> {
    let settings = &service.settings;
    let specs = volumes::read_lists(&settings.sources)?;
    if specs.is_empty() {
        return Err(ExportsError::Nothing);
    }
    let names = settings.service_names.iter();
    let definition = Definition {
        names: names.map(|name| name.as_str().into()).collect(),
        addresses: addresses_of(settings),
        exports: specs.iter().map(|spec| spec.to_string().into()).collect(),
    };
    definition.check().map_err(ExportsError::TooLarge)?;
    Ok(definition)
}

/// The addresses that settings give a service.
pub fn addresses_of(settings: &Settings) -> Vec<ServiceAddress> {
    if let Some(floating) = &settings.floating {
        let addresses = floating.addresses.iter();
        let moving = addresses.map(|address| ServiceAddress {
            ip: address.ip,
            prefix: Some(address.prefix),
        });
        return moving.collect();
    }
    let fixed = settings.listen.iter();
    let fixed = fixed.map(|ip| ServiceAddress {
        ip: *ip,
        prefix: None,
    });
    fixed.collect()
}

/// The exports of a definition.
///
/// # Errors
/// A line is none that this program knows.
pub fn specs_of(service: &str, definition: &Definition) -> Result<Vec<ExportSpec>, ExportsError> {
    let source = Source::file(format!("the cluster's exports of `{service}`"));
    let text = definition.exports.join("\n");
    let loaded = export::parse_exports(source, text.as_bytes()).map_err(ExportsError::Lists)?;
    // Whoever wrote the list was warned.
    Ok(loaded.specs)
}

/// The names of a definition.
pub fn names_of(definition: &Definition) -> Vec<String> {
    let names = definition.names.iter();
    names.map(ToString::to_string).collect()
}

/// The settings of a service as it is defined; the interface is this node's own. Addresses that
/// move along need one: without it the node runs with what its own files say.
#[must_use]
pub fn with_definition(mut service: ServiceConfig, definition: &Definition) -> ServiceConfig {
    let settings = &mut service.settings;
    settings.service_names = names_of(definition);
    let addresses = &definition.addresses;
    let moving = addresses.iter().filter_map(|address| {
        let prefix = address.prefix?;
        let ip = address.ip;
        Some(FloatingAddress { ip, prefix })
    });
    let moving: Vec<_> = moving.collect();
    let listen = addresses.iter().map(|address| address.ip).collect();
    let interface = settings.floating.take();
    if moving.is_empty() {
        settings.listen = listen;
    } else if let Some(FloatingConfig { interface, .. }) = interface
        && moving.len() == addresses.len()
    {
        settings.listen = listen;
        settings.floating = Some(FloatingConfig {
            interface,
            addresses: moving,
        });
    }
    service
}

/// Keeps a copy for the next start of this node, in the service's folder of its state directory.
/// Waits for the disk.
///
/// # Errors
/// It can't be written.
pub fn keep_copy(dir: &Path, defined: &Defined) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let bytes = serde_json::to_vec(defined).map_err(io::Error::other)?;
    replace_file(&dir.join(COPY_NAME), &bytes)
}

/// Removes the copy, if there is one. Waits for the disk.
///
/// # Errors
/// It can't be removed.
pub fn drop_copy(dir: &Path) -> io::Result<()> {
    match std::fs::remove_file(dir.join(COPY_NAME)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the copies of services that this node does not have in its files. One that is forgotten
/// and begins anew with the same name is what the files say then. `services`: where each has a
/// directory.
///
/// # Errors
/// One can't be removed.
pub fn drop_other_copies(services: &Path, own: &[&str]) -> io::Result<()> {
    let entries = match std::fs::read_dir(services) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if own.iter().all(|name| entry.file_name() != **name) {
            drop_copy(&entry.path())?;
        }
    }
    Ok(())
}

/// The copy; none if there is none. Waits for the disk.
///
/// # Errors
/// It can't be read, or is none.
pub fn copy(dir: &Path) -> io::Result<Option<Defined>> {
    let file = match std::fs::File::open(dir.join(COPY_NAME)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(COPY_BYTES_MAX).read_to_end(&mut bytes)?;
    let damaged = |problem: String| io::Error::new(io::ErrorKind::InvalidData, problem);
    let defined: Defined =
        serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    let check = defined.definition.check();
    check.map_err(|problem| damaged(problem.to_string()))?;
    Ok(Some(defined))
}

const COPY_NAME: &str = "definition.json";
/// Every byte of every line may be written as six.
const COPY_BYTES_MAX: u64 = 8 << 20;

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use crate::config::File;
    use crate::config::cluster::plan;

    fn service(text: &str) -> ServiceConfig {
        let file: File = toml::from_str(text).unwrap();
        plan(File::default(), file).unwrap().services.remove(0)
    }

    const MOVING: &str = "[[service]]\nname = 'a'\nnames = ['nfs.example']\n\
        addresses = ['192.0.2.9/24']\ninterface = 'eth7'\n\
        exports = ['/srv/with blank:10.0.0.0/8(rw,no_root_squash) *(ro)', '/srv/b']\n";
    const FIXED: &str =
        "[[service]]\nname = 'a'\naddresses = ['192.0.2.7']\nexports = ['/srv/c']\n";

    #[test]
    fn what_files_say_reads_back_as_the_same_exports() {
        let service = service(MOVING);
        let definition = of_files(&service).unwrap();
        let specs = specs_of("a", &definition).unwrap();
        let again: Vec<_> = specs.iter().map(|spec| spec.to_string().into()).collect();
        assert_eq!(definition.exports, again);
        assert_eq!(specs[0].path, Path::new("/srv/with blank"));
        assert_eq!((specs.len(), specs[0].rules.len()), (2, 2));
        assert_eq!(definition.addresses[0].to_string(), "192.0.2.9/24");
    }

    #[test]
    fn addresses_are_the_clusters_and_the_interface_is_this_nodes() {
        let moving = of_files(&service(MOVING)).unwrap();
        let fixed = of_files(&service(FIXED)).unwrap();
        let other = MOVING.replace("192.0.2.9/24", "192.0.2.8/25");
        let there = with_definition(service(&other.replace("eth7", "eth1")), &moving);
        let floating = there.settings.floating.clone().unwrap();
        assert_eq!(floating.to_string(), "eth1=192.0.2.9/24");
        assert_eq!(addresses_of(&there.settings), moving.addresses);
        assert_eq!(there.settings.service_names, ["nfs.example"]);
        let there = with_definition(service(MOVING), &fixed);
        assert_eq!(addresses_of(&there.settings), fixed.addresses);
        // Nowhere to put them: what it has is better than nothing.
        let there = with_definition(service(FIXED), &moving);
        assert_eq!(addresses_of(&there.settings), fixed.addresses);
    }

    #[test]
    fn the_copy_is_what_was_kept_or_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(copy(dir.path()).unwrap().is_none());
        let defined = Defined {
            version: 7,
            definition: of_files(&service(MOVING)).unwrap(),
        };
        keep_copy(dir.path(), &defined).unwrap();
        assert_eq!(copy(dir.path()).unwrap(), Some(defined));
        std::fs::write(dir.path().join(COPY_NAME), "{").unwrap();
        assert!(copy(dir.path()).is_err());
        for _ in 0..2 {
            drop_copy(dir.path()).unwrap();
            assert!(copy(dir.path()).unwrap().is_none());
        }
    }

    #[test]
    fn of_services_in_no_file_of_this_node_no_copy_stays() {
        let dir = tempfile::tempdir().unwrap();
        let services = dir.path().join("services");
        drop_other_copies(&services, &["a"]).unwrap();
        let defined = Defined {
            version: 7,
            definition: of_files(&service(MOVING)).unwrap(),
        };
        for name in ["a", "b"] {
            keep_copy(&services.join(name), &defined).unwrap();
        }
        drop_other_copies(&services, &["a", "c"]).unwrap();
        assert!(copy(&services.join("a")).unwrap().is_some());
        assert!(copy(&services.join("b")).unwrap().is_none());
    }
}
