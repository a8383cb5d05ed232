//! Files that two services show: each would have locks of its own on them.
//!
//! Two ways to compare. By path, which touches no disk; and by place, which file system and where
//! in there, which finds the same files behind other paths, and waits for the disk. So places of
//! what is open are kept as they were found ([`Shown`]): no service waits for another one's disk.

use std::path::{Path, PathBuf};

use super::ExportsError;
use crate::backend::volume;
use crate::export::{self, ExportSpec, Sources};

/// What a service exports.
#[derive(Debug, Clone)]
pub struct Shown {
    service: String,
    path: PathBuf,
    /// Its file system, and where it is in there, if that was looked for and found.
    place: Option<(u64, PathBuf)>,
}

impl Shown {
    /// Whether another service shows some of the same files.
    fn shares_with(&self, other: &Self) -> bool {
        let is_in = |one: &Path, other: &Path| one.starts_with(other) || other.starts_with(one);
        let places = self.place.as_ref().zip(other.place.as_ref());
        let same = places.is_some_and(|((number, path), (other, other_path))| {
            number == other && is_in(path, other_path)
        });
        self.service != other.service && (same || is_in(&self.path, &other.path))
    }
}

/// What a service shows, with places. Waits for the disk.
pub fn with_places(service: &str, specs: &[ExportSpec]) -> Vec<Shown> {
    let specs = specs.iter();
    let shown = specs.map(|spec| Shown {
        service: service.to_owned(),
        place: volume::place_of(&spec.path),
        path: spec.path.clone(),
    });
    shown.collect()
}

/// The same by paths alone.
pub fn by_paths(service: &str, specs: &[ExportSpec]) -> Vec<Shown> {
    let specs = specs.iter();
    let shown = specs.map(|spec| Shown {
        service: service.to_owned(),
        place: None,
        path: spec.path.clone(),
    });
    shown.collect()
}

/// Compares what two services show.
///
/// # Errors
/// [`ExportsError::Overlap`].
pub fn compare(one: &[Shown], other: &[Shown]) -> Result<(), ExportsError> {
    for shown in one {
        if let Some(twin) = other.iter().find(|other| other.shares_with(shown)) {
            return Err(ExportsError::Overlap {
                one: twin.service.clone(),
                other: shown.service.clone(),
                path: shown.path.clone(),
            });
        }
    }
    Ok(())
}

/// Looks for such files of services whose exports are in lists: by name and list. Waits for the
/// disk.
///
/// # Errors
/// [`ExportsError::Overlap`], or mistakes in a list.
pub fn check_lists(services: &[(&str, &Sources)]) -> Result<(), ExportsError> {
    if services.len() < 2 {
        return Ok(());
    }
    let mut read = Vec::new();
    for (name, sources) in services {
        let loaded = export::load(sources).map_err(ExportsError::Lists)?;
        read.push((*name, loaded.specs));
    }
    let read: Vec<_> = read.iter().map(|(name, specs)| (*name, &**specs)).collect();
    check_overlap(&read)
}

/// The same for services by name and exports. Waits for the disk.
///
/// # Errors
/// [`ExportsError::Overlap`].
pub fn check_overlap(services: &[(&str, &[ExportSpec])]) -> Result<(), ExportsError> {
    let mut seen: Vec<Shown> = Vec::new();
    for (name, specs) in services {
        let shown = with_places(name, specs);
        compare(&shown, &seen)?;
        seen.extend(shown);
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn sources(path: &Path) -> Sources {
        Sources {
            file: None,
            directory: None,
            arguments: vec![path.to_str().unwrap().as_bytes().to_vec()],
        }
    }

    #[test]
    fn services_that_show_the_same_files_are_found_by_whatever_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["a/inside", "b"] {
            std::fs::create_dir_all(path(name)).unwrap();
        }
        symlink(path("a"), path("link")).unwrap();
        let found = |one: &str, other: &str| {
            let (one, other) = (sources(&path(one)), sources(&path(other)));
            match check_lists(&[("x", &one), ("y", &other)]) {
                Ok(()) => None,
                Err(ExportsError::Overlap { one, other, .. }) => Some((one, other)),
                Err(error) => panic!("{error}"),
            }
        };
        let both = Some(("x".to_owned(), "y".to_owned()));
        assert_eq!(found("a", "b"), None);
        assert_eq!(found("a", "a"), both);
        assert_eq!(found("a", "a/inside"), both);
        assert_eq!(found("a/inside", "a"), both);
        assert_eq!(found("link/inside", "a"), both);
    }
}
