//! The numbers that file handles and locks are made of: ids of exports, of the file systems inside
//! them, and of file systems as locks know them.
//!
//! Numbers are added and never changed or dropped, since handles that clients hold depend on them:
//! an export that is taken away and comes back finds its old id. They are replicated, so that they
//! are the same on every node, and one export has one id in the whole cluster, so that the handle
//! of another service names no export here.

use serde::{Deserialize, Serialize};

use super::ServiceId;

/// All numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbers {
    exports: Vec<ExportNumbers>,
}

/// The numbers of one export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportNumbers {
    /// The service that it belongs to.
    pub service: ServiceId,
    /// The exported directory.
    pub path: Box<[u8]>,
    /// What handles say.
    pub id: u32,
    /// What clients see as `fsid`, unless it is configured.
    pub fsid: u64,
    /// The file system, as locks know it.
    pub file_system: Option<u32>,
    /// File systems mounted inside.
    pub mounts: Vec<MountNumbers>,
}

/// The numbers of a file system that is mounted inside an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountNumbers {
    /// Relative to the export.
    pub path: Box<[u8]>,
    /// Its number within the export.
    pub fs_id: u32,
    /// What clients see as `fsid`.
    pub fsid: u64,
    /// The file system, as locks know it.
    pub file_system: Option<u32>,
}

/// Asks for a number. What has one keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Allot {
    /// For an export.
    Export {
        /// The service that it belongs to.
        service: ServiceId,
        /// The exported directory.
        path: Box<[u8]>,
        /// Random.
        fsid: u64,
    },
    /// For a file system mounted inside an export.
    Mount {
        /// The export.
        export: u32,
        /// Relative to the export.
        path: Box<[u8]>,
        /// Random.
        fsid: u64,
    },
    /// For a file system as locks know it: `number`, or one that no other has. Only in the epoch in
    /// which it was seen: a late one would take the number away under which there are locks.
    FileSystem {
        /// The service that shows it.
        service: ServiceId,
        /// In which epoch.
        epoch: u32,
        /// The export.
        export: u32,
        /// The file system within it; 0 is the one of its root.
        fs_id: u32,
        /// That of another volume which shows the same file system.
        number: Option<u32>,
    },
    /// All that a state directory of an earlier version had. Only where there are none yet.
    Import(Vec<ExportNumbers>),
}

impl Numbers {
    /// All exports that ever were.
    pub fn exports(&self) -> &[ExportNumbers] {
        &self.exports
    }

    /// The numbers of an export by its directory.
    pub fn of_path(&self, service: ServiceId, path: &[u8]) -> Option<&ExportNumbers> {
        let mut exports = self.exports.iter();
        exports.find(|export| export.service == service && *export.path == *path)
    }

    /// The numbers of an export by its id.
    pub fn of_export(&self, id: u32) -> Option<&ExportNumbers> {
        self.exports.iter().find(|export| export.id == id)
    }

    /// Adds what is asked for, if it is not there.
    pub(super) fn allot(&mut self, asked: &Allot) {
        match asked {
            Allot::Export {
                service,
                path,
                fsid,
            } => {
                if self.of_path(*service, path).is_none() {
                    let ids = self.exports.iter().map(|export| export.id);
                    let id = ids.max().unwrap_or(0).saturating_add(1);
                    self.exports.push(ExportNumbers {
                        service: *service,
                        path: path.clone(),
                        id,
                        fsid: *fsid,
                        file_system: None,
                        mounts: Vec::new(),
                    });
                }
            }
            Allot::Mount { export, path, fsid } => {
                let export = self.exports.iter_mut().find(|known| known.id == *export);
                if let Some(export) = export
                    && export.mounts.iter().all(|mount| mount.path != *path)
                {
                    let ids = export.mounts.iter().map(|mount| mount.fs_id);
                    let fs_id = ids.max().unwrap_or(0).saturating_add(1);
                    export.mounts.push(MountNumbers {
                        path: path.clone(),
                        fs_id,
                        fsid: *fsid,
                        file_system: None,
                    });
                }
            }
            Allot::FileSystem {
                export,
                fs_id,
                number,
                ..
            } => {
                let next = self.file_system_max().saturating_add(1);
                if let Some(place) = self.file_system_mut(*export, *fs_id) {
                    // What has a number loses it only to that of its twin.
                    *place = number.or(*place).or(Some(next));
                }
            }
            Allot::Import(exports) => {
                if self.exports.is_empty() {
                    self.exports.clone_from(exports);
                }
            }
        }
    }

    fn file_system_mut(&mut self, export: u32, fs_id: u32) -> Option<&mut Option<u32>> {
        let export = self.exports.iter_mut().find(|known| known.id == export)?;
        if fs_id == 0 {
            return Some(&mut export.file_system);
        }
        let mut mounts = export.mounts.iter_mut();
        let mount = mounts.find(|mount| mount.fs_id == fs_id)?;
        Some(&mut mount.file_system)
    }

    fn file_system_max(&self) -> u32 {
        let mounts = self.exports.iter().flat_map(|export| &export.mounts);
        let mounts = mounts.filter_map(|mount| mount.file_system);
        let roots = self.exports.iter().filter_map(|export| export.file_system);
        roots.chain(mounts).max().unwrap_or(0)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    fn export(service: u32, path: &str) -> Allot {
        Allot::Export {
            service: ServiceId(service),
            path: path.as_bytes().into(),
            fsid: 7,
        }
    }

    #[test]
    fn what_has_a_number_keeps_it_and_no_two_are_alike() {
        let mut numbers = Numbers::default();
        for (service, path) in [(1, "/a"), (2, "/a"), (1, "/b"), (1, "/a")] {
            numbers.allot(&export(service, path));
        }
        let id = |service, path: &str| {
            let found = numbers.of_path(ServiceId(service), path.as_bytes());
            found.map(|export| export.id)
        };
        assert_eq!(
            [id(1, "/a"), id(2, "/a"), id(1, "/b"), id(2, "/b")],
            [Some(1), Some(2), Some(3), None]
        );
    }

    #[test]
    fn mounts_are_numbered_within_their_export() {
        let mut numbers = Numbers::default();
        numbers.allot(&export(1, "/a"));
        for path in ["x", "y", "x"] {
            numbers.allot(&Allot::Mount {
                export: 1,
                path: path.as_bytes().into(),
                fsid: 9,
            });
        }
        numbers.allot(&Allot::Mount {
            export: 5,
            path: b"x".as_slice().into(),
            fsid: 9,
        });
        let ids = |numbers: &Numbers| {
            let mounts = &numbers.of_export(1).unwrap().mounts;
            let ids = mounts.iter().map(|mount| (mount.fs_id, mount.file_system));
            ids.collect::<Vec<_>>()
        };
        assert_eq!(ids(&numbers), [(1, None), (2, None)]);
        for (fs_id, number) in [(0, None), (2, None), (1, Some(1))] {
            let export = 1;
            numbers.allot(&Allot::FileSystem {
                service: ServiceId(1),
                epoch: 0,
                export,
                fs_id,
                number,
            });
        }
        assert_eq!(ids(&numbers), [(1, Some(1)), (2, Some(2))]);
        assert_eq!(numbers.of_export(1).unwrap().file_system, Some(1));
    }

    #[test]
    fn an_import_never_replaces_numbers() {
        let mut numbers = Numbers::default();
        numbers.allot(&export(1, "/a"));
        let before = numbers.clone();
        numbers.allot(&Allot::Import(Vec::new()));
        let mut other = Numbers::default();
        other.allot(&export(1, "/b"));
        numbers.allot(&Allot::Import(other.exports.clone()));
        assert_eq!(numbers, before);
        let mut empty = Numbers::default();
        empty.allot(&Allot::Import(other.exports.clone()));
        assert_eq!(empty, other);
    }
}
