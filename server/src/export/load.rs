//! Export lists from their files and arguments, and the state of the directories they name.
//!
//! The only part of `export` that reads files. Checking directories is separate from loading, since
//! a directory may come and go (`mountpoint`) while the list stays valid. Both can block on a slow
//! file system and belong on the control side, never on a call's path.

use std::collections::BTreeMap;
use std::os::unix::{ffi::OsStrExt, fs::MetadataExt};
use std::path::{Path, PathBuf};
use std::{fs, io};

use super::collect::Collector;
use super::lex::unescape;
use super::problem::{Origin, Problem, Severity, Source};
use super::{ExportErrors, ExportSpec, Loaded};

/// Where export lists come from.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The main list; it may be missing.
    pub file: Option<PathBuf>,
    /// A folder whose `*.exports` files are read too; it may be missing.
    pub directory: Option<PathBuf>,
    /// The `--export` arguments.
    pub arguments: Vec<Vec<u8>>,
}

impl Default for Sources {
    fn default() -> Self {
        Self {
            file: Some("/etc/exports".into()),
            directory: Some("/etc/exports.d".into()),
            arguments: Vec::new(),
        }
    }
}

/// Reads all export lists: the file, the folder's files by name, then the arguments.
///
/// # Errors
/// All problems of all lists, if at least one of them is an error.
pub fn load(sources: &Sources) -> Result<Loaded, ExportErrors> {
    let mut collector = Collector::default();
    if let Some(file) = &sources.file {
        add_file(&mut collector, file, Missing::Fine);
    }
    if let Some(directory) = &sources.directory {
        for file in listed_files(&mut collector, directory) {
            add_file(&mut collector, &file, Missing::Fine);
        }
    }
    for (number, argument) in (1..).zip(&sources.arguments) {
        collector.add_argument(number, argument);
    }
    collector.finish()
}

/// Reads one file, which must exist.
///
/// # Errors
/// All problems of the list, if at least one of them is an error.
pub fn load_file(path: &Path) -> Result<Loaded, ExportErrors> {
    let mut collector = Collector::default();
    add_file(&mut collector, path, Missing::Error);
    collector.finish()
}

/// What keeps a directory from being served, or is worth knowing about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectoryFault {
    /// There is nothing at this path.
    Missing,
    /// There is something else than a directory.
    NotADirectory,
    /// It cannot be looked at.
    Unreadable,
    /// What must be mounted is not: do not offer the export now.
    NotMounted,
    /// Another export is the same directory; both work.
    SameDirectory,
}

/// A fault of one exported directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryProblem {
    /// The export.
    pub path: PathBuf,
    /// What is wrong.
    pub fault: DirectoryFault,
    /// The same for people; its severity is `Warning` where the others can be served.
    pub problem: Problem,
}

/// Looks at the exported directories as they are now.
pub fn check_directories(specs: &[ExportSpec]) -> Vec<DirectoryProblem> {
    let mounts = mount_points();
    let mut seen: BTreeMap<(u64, u64), &ExportSpec> = BTreeMap::new();
    let mut out = Vec::new();
    for spec in specs {
        let path = spec.path.display();
        let found = match check_directory(spec, mounts.as_deref()) {
            Ok(identity) => seen.insert(identity, spec).map(|other| {
                let other = other.path.display();
                (
                    DirectoryFault::SameDirectory,
                    format!("`{path}` is the same directory as `{other}`"),
                    "clients of the two share files and locks; export it once if you can".into(),
                )
            }),
            Err((fault, message, hint)) => Some((fault, message, hint)),
        };
        let Some((fault, message, hint)) = found else {
            continue;
        };
        let severity = match fault {
            DirectoryFault::SameDirectory | DirectoryFault::NotMounted => Severity::Warning,
            _ => Severity::Error,
        };
        let origin = spec.origin.clone();
        let problem = Problem {
            severity,
            origin,
            message,
            hint: Some(hint),
        };
        out.push(DirectoryProblem {
            path: spec.path.clone(),
            fault,
            problem,
        });
    }
    out
}

type Fault = (DirectoryFault, String, String);

fn check_directory(spec: &ExportSpec, mounts: Option<&[PathBuf]>) -> Result<(u64, u64), Fault> {
    let path = spec.path.display();
    if let Some(mountpoint) = &spec.mountpoint
        && !is_mount_point(mountpoint, mounts)
    {
        let message = format!(
            "`{path}` is not offered: nothing is mounted on `{}`",
            mountpoint.display()
        );
        let hint = "mount the file system, then run `havenfs exports reload`";
        return Err((DirectoryFault::NotMounted, message, hint.into()));
    }
    match fs::metadata(&spec.path) {
        Ok(found) if found.is_dir() => Ok((found.dev(), found.ino())),
        Ok(_) => Err((
            DirectoryFault::NotADirectory,
            format!("`{path}` is not a directory"),
            "export the directory that holds it".into(),
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err((
            DirectoryFault::Missing,
            format!("directory `{path}` does not exist"),
            format!("create it (mkdir -p {path}) or correct the path"),
        )),
        Err(error) => Err((
            DirectoryFault::Unreadable,
            format!("cannot look at `{path}`: {error}"),
            "check the permissions of the directories above it".into(),
        )),
    }
}

/// Says whether something is mounted on a directory, by the kernel's table where there is one.
fn is_mount_point(path: &Path, mounts: Option<&[PathBuf]>) -> bool {
    let Ok(real) = fs::canonicalize(path) else {
        return false;
    };
    if let Some(mounts) = mounts {
        return mounts.contains(&real);
    }
    match (fs::metadata(&real), fs::metadata(real.join(".."))) {
        (Ok(own), Ok(above)) => own.dev() != above.dev() || own.ino() == above.ino(),
        _ => false,
    }
}

/// Reads where file systems are mounted; a bind mount shows here and in no device number.
fn mount_points() -> Option<Vec<PathBuf>> {
    let table = fs::read("/proc/self/mountinfo").ok()?;
    let lines = table.split(|&byte| byte == b'\n');
    let points = lines.filter_map(|line| line.split(|&byte| byte == b' ').nth(4));
    Some(
        points
            .map(|point| PathBuf::from(std::ffi::OsStr::from_bytes(&unescape(point))))
            .collect(),
    )
}

/// Whether a list that is not there is an error.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Fine,
    Error,
}

fn add_file(collector: &mut Collector, path: &Path, missing: Missing) {
    let source = Source::file(path);
    match fs::read(path) {
        Ok(text) => collector.add_text(&source, &text),
        Err(error) if error.kind() == io::ErrorKind::NotFound && missing == Missing::Fine => {}
        Err(error) => collector.add_problem(unreadable(source, &error)),
    }
}

/// Lists the `*.exports` files of a folder in the order of their names.
fn listed_files(collector: &mut Collector, directory: &Path) -> Vec<PathBuf> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            collector.add_problem(unreadable(Source::file(directory), &error));
            return Vec::new();
        }
    };
    let mut files = Vec::new();
    for entry in entries {
        match entry {
            Ok(entry) => {
                let name = entry.file_name();
                let name = name.as_bytes();
                // A file that an editor keeps aside (`.x.exports.swp`, `x.exports~`) is no list.
                if name.ends_with(b".exports") && !name.starts_with(b".") && entry.path().is_file()
                {
                    files.push(entry.path());
                }
            }
            Err(error) => collector.add_problem(unreadable(Source::file(directory), &error)),
        }
    }
    files.sort();
    files
}

fn unreadable(source: Source, error: &io::Error) -> Problem {
    Problem {
        severity: Severity::Error,
        origin: Origin {
            source,
            line: 0,
            column: 0,
        },
        message: format!("cannot read the export list: {error}"),
        hint: Some("check that the file exists and that this user may read it".into()),
    }
}
