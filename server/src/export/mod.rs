//! Who may use which directory, and as whom: export lists in the syntax of exports(5).
//!
//! Owns the syntax (`lex`, `parse`, `client`, `words`), the files it is read from (`load`), the
//! answer to "may this address, and with which options" (`table`), and what that answer needs from
//! the resolver and the user database (`names`, `groups`). It decides and never serves: it opens
//! no exported file, allots no export id and stores nothing.
//!
//! Used by `serve` and `exports check` (load), by every NFS, MOUNT and lock call (table).
//!
//! Invariants:
//! - A call never waits for DNS or the user database. What is not known yet is `Pending`, and a
//!   thread of its own finds it out.
//! - A list with one error is refused whole: half an access list may be the open half.
//! - Addresses are compared in canonical form, so `::ffff:a.b.c.d` is the IPv4 host everywhere.

use std::path::PathBuf;

mod background;
mod client;
mod collect;
mod describe;
mod groups;
mod lex;
mod load;
mod names;
mod options;
mod parse;
mod problem;
mod table;
#[cfg(test)]
mod tests;
mod words;

pub use background::NoAnswer;
pub use client::{ClientPattern, Network};
pub use collect::{parse_argument, parse_exports};
pub use groups::Groups;
pub use load::{DirectoryFault, DirectoryProblem, Sources, check_directories, load, load_file};
pub use names::{Names, Resolver};
pub use options::{Fsid, Options, Squash};

pub use problem::{ExportErrors, Origin, Problem, Severity, Source};
pub use table::{Export, ExportTable, Verdict};
pub use words::nearest;

/// One exported directory, as all lists together describe it.
///
/// Its `Display` is one line of exports(5) that reads back as the same export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportSpec {
    /// The directory, absolute, without final or doubled slashes: what clients mount.
    pub path: PathBuf,
    /// The file system id that its author chose.
    pub fsid: Option<Fsid>,
    /// What must be a mount point for the export to be offered; often the export itself.
    pub mountpoint: Option<PathBuf>,
    /// At least one rule, in the order given; no two for the same client.
    pub rules: Vec<ClientRule>,
    /// Where it was first mentioned.
    pub origin: Origin,
}

impl ExportSpec {
    /// Whether no client may write.
    pub fn is_read_only(&self) -> bool {
        self.rules.iter().all(|rule| rule.options.read_only)
    }
}

/// What one kind of clients may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientRule {
    /// Whom the rule is for.
    pub client: ClientPattern,
    /// What they may do.
    pub options: Options,
    /// Where the rule was given.
    pub origin: Origin,
}

/// Export lists that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// One per directory, in the order of first mention.
    pub specs: Vec<ExportSpec>,
    /// What their author should know.
    pub warnings: Vec<Problem>,
}
