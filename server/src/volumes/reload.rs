//! Brings another export list into force on a service that is open.
//!
//! Whatever may fail comes first: directories are looked at and opened, file systems get their
//! numbers (which stay, and mean nothing without an export). From then on nothing fails.

use std::sync::Arc;

use super::{
    ExportsError, Fresh, load_table, missing, number_file_system, numbering, open_volumes, prepare,
};
use crate::backend::probe::{Expected, probe};
use crate::export::{ExportSpec, ExportTable};
use crate::node::Node;

/// Brings what changed in the exports into force; nothing else changes for clients. Where one of
/// them can't be, everything stays as it was: whatever may fail comes first. `tries`: whether an
/// export that clients may write to, and could not before, is refused if this node can't.
pub fn reload(specs: Vec<ExportSpec>, node: &Node, tries: bool) -> Result<String, ExportsError> {
    let table = load_table(specs, &node.numbers)?;
    prepare(&node.names, &node.groups, &table)?;
    let before = node.exports.load_full();
    let volume_options = |table: &ExportTable, id: u32| {
        table.by_id(id).map(|export| {
            let rules = export.rules();
            let crossing = rules
                .iter()
                .map(|rule| (rule.options.crossmnt, rule.options.nohide));
            (export.spec.fsid, crossing.collect::<Vec<_>>())
        })
    };
    let changed: Vec<u32> = table
        .exports()
        .iter()
        .filter(|export| volume_options(&before, export.id) != volume_options(&table, export.id))
        .map(|export| export.id)
        .collect();
    let mut fresh = Vec::new();
    for export in missing(node, &table, &changed) {
        fresh.extend(open_volumes(node, &table, export)?);
    }
    if tries {
        try_writes(node, &before, &table, &fresh)?;
    }
    let alone = numbering(node);
    for (at, Fresh { volume, path }) in fresh.iter().enumerate() {
        let mut twins = node.files.twins_of(volume);
        twins.retain(|twin| table.by_id(twin.export_id).is_some());
        let twins = twins.iter().map(|twin| &**twin);
        let beside = fresh[..at].iter().map(|fresh| &fresh.volume);
        let beside = beside.filter(|other| other.superblock == volume.superblock);
        number_file_system(node, volume, path, twins.chain(beside))?;
    }
    // The new volume takes the place of the old one in one step: no handle is stale in between.
    for Fresh { volume, .. } in fresh {
        node.files.add_volume(volume);
    }
    drop(alone);
    let table = Arc::new(table);
    node.exports.store(Arc::clone(&table));
    for gone in before
        .exports()
        .iter()
        .filter(|export| table.by_id(export.id).is_none())
    {
        node.files.remove_export(gone.id);
    }
    let count = table.exports().len();
    let hidden = locks_without_export(node, &table);
    tracing::info!(exports = count, hidden, "export lists reloaded");
    let hidden = match hidden {
        0 => String::new(),
        hidden => format!("; {hidden} locks are on files that no export shows, and stay"),
    };
    Ok(format!("{count} exports in force{hidden}"))
}

/// Tries the file systems that clients may write to, and could not before.
fn try_writes(
    node: &Node,
    before: &ExportTable,
    table: &ExportTable,
    fresh: &[Fresh],
) -> Result<(), ExportsError> {
    for export in table.exports() {
        let new = fresh.iter().map(|fresh| &fresh.volume);
        let mut new = new.filter(|volume| volume.export_id == export.id && volume.fs_id == 0);
        let new = new.next();
        let was = before.by_id(export.id).map(|export| expected(&export.spec));
        let expected = expected(&export.spec);
        if expected != Expected::Writable || was == Some(expected) && new.is_none() {
            continue;
        }
        let known = node.files.volume(export.id, 0);
        if let Some(volume) = new.or(known.as_deref()) {
            let tried = probe(volume.root(), expected);
            tried.map_err(|errno| ExportsError::NotWritable {
                path: export.spec.path.clone(),
                errno,
            })?;
        }
    }
    Ok(())
}

/// What is expected of the file system of an export.
pub fn expected(spec: &ExportSpec) -> Expected {
    if spec.is_read_only() {
        Expected::Readable
    } else {
        Expected::Writable
    }
}

/// How many locks there are on file systems that no export of the table shows.
fn locks_without_export(node: &Node, table: &ExportTable) -> usize {
    let Some(locks) = node.locks.get() else {
        return 0;
    };
    let shown = node.files.file_systems_of(|id| table.by_id(id).is_some());
    let state = locks.state().table().clone();
    let numbers = state
        .held_entries()
        .filter_map(|held| held.lock.file.0.first_chunk().copied());
    numbers
        .filter(|number| !shown.contains(&u32::from_be_bytes(*number)))
        .count()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use std::fs::{Permissions, create_dir, set_permissions};
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::backend::handle::HandleKey;
    use crate::backend::sys;
    use crate::backend::table::HandleTable;
    use crate::export::Sources;
    use crate::gate::Gate;
    use crate::mount_list::MountList;
    use crate::node::Parts;
    use crate::numbering::Numbering;
    use crate::volumes::{open_exports, read_lists};

    fn specs(paths: &[&Path]) -> Vec<ExportSpec> {
        let arguments = paths.iter().map(|path| {
            let mut argument = path.as_os_str().as_bytes().to_vec();
            argument.extend(b":*(rw)");
            argument
        });
        let sources = Sources {
            file: None,
            directory: None,
            arguments: arguments.collect(),
        };
        read_lists(&sources).unwrap()
    }

    fn node(state_dir: &Path, specs: Vec<ExportSpec>) -> Node {
        let numbers = Numbering::in_memory();
        let exports = load_table(specs, &numbers).unwrap();
        let node = Node::new(Parts {
            gate: Arc::new(Gate::open_for_good()),
            mounts: MountList::open(state_dir).unwrap(),
            handle_keys: vec![HandleKey {
                id: 1,
                secret: [7; 16],
            }],
            numbers,
            handles: HandleTable::load(state_dir).unwrap(),
            exports,
            descriptors: 1024,
            floats: false,
            guard: None,
            storage_use: Arc::default(),
        });
        let node = node.unwrap();
        open_exports(&node).unwrap();
        node
    }

    fn in_force(node: &Node) -> Vec<PathBuf> {
        let exports = node.exports.load();
        let open = exports.exports().iter().map(|export| {
            assert!(node.files.volume(export.id, 0).is_some());
            export.spec.path.clone()
        });
        let open: Vec<_> = open.collect();
        assert_eq!(node.files.volumes().len(), open.len());
        open
    }

    #[test]
    fn where_one_export_can_not_be_opened_all_stays_as_it_was() {
        let (state_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let [one, two, shut] = ["one", "two", "shut"].map(|name| dir.path().join(name));
        for path in [&one, &two, &shut] {
            create_dir(path).unwrap();
        }
        let node = node(state_dir.path(), specs(&[&one]));
        set_permissions(&shut, Permissions::from_mode(0o000)).unwrap();
        let wanted = specs(&[&two, &shut]);
        let refused = std::thread::scope(|scope| {
            let reloading = scope.spawn(|| {
                // Root may open everything; where this fails the process is not root.
                let _ = sys::set_fsuid(65_534);
                reload(wanted.clone(), &node, false)
            });
            reloading.join().unwrap()
        });
        assert!(
            matches!(refused, Err(ExportsError::Volume(_))),
            "{refused:?}"
        );
        assert_eq!(in_force(&node), [one]);
        set_permissions(&shut, Permissions::from_mode(0o755)).unwrap();
        reload(wanted, &node, true).unwrap();
        assert_eq!(in_force(&node), [two.clone(), shut.clone()]);
        let number = |path: &Path| {
            let exports = node.exports.load();
            let (export, _) = exports.by_path(path).unwrap();
            node.files.file_system(export.id, 0).unwrap()
        };
        assert_eq!(number(&two), number(&shut), "they are on one file system");
    }
}
