//! Where something in an export list stands, and what is wrong with it there.
//!
//! Owns [`Origin`], [`Problem`] and [`ExportErrors`]. A problem is a value: errors and warnings are
//! collected side by side, so that one run shows everything there is to repair. Nothing here logs.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The file or argument that an export list came from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source {
    /// A file in exports(5) syntax.
    File(Arc<Path>),
    /// The n-th `--export` argument, counted from 1.
    Argument(u32),
}

impl Source {
    /// Names a file.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self::File(path.into().into())
    }
}

/// A place in an export list.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin {
    /// The file or argument.
    pub source: Source,
    /// The line, from 1; 0 stands for the file as a whole.
    pub line: u32,
    /// The column in bytes, from 1.
    pub column: u32,
}

impl fmt::Display for Origin {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::File(path) if self.line == 0 => write!(out, "{}", path.display()),
            Source::File(path) => {
                write!(out, "{}:{}:{}", path.display(), self.line, self.column)
            }
            Source::Argument(number) => write!(out, "--export #{number}:{}", self.column),
        }
    }
}

/// Whether a problem keeps the export list from being used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The list is refused.
    Error,
    /// The list is used, perhaps not as its author thinks.
    Warning,
}

/// One thing that is wrong or doubtful; its text is `FILE:LINE:COLUMN: message` and a `hint:` line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {}{message}{}", label(*.severity), hint_line(.hint.as_deref()))]
pub struct Problem {
    /// Error or warning.
    pub severity: Severity,
    /// Where it is.
    pub origin: Origin,
    /// What is wrong, in one sentence without a full stop.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// Every problem of export lists of which at least one is an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", all_lines(.0))]
pub struct ExportErrors(pub Vec<Problem>);

impl ExportErrors {
    /// Returns the errors without the warnings.
    pub fn errors(&self) -> impl Iterator<Item = &Problem> {
        self.0
            .iter()
            .filter(|problem| problem.severity == Severity::Error)
    }
}

/// Shows text of a user within a message: bounded, and without control characters.
pub(super) fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::new();
    for (count, character) in text.chars().enumerate() {
        if count == SHOWN_CHARS_MAX {
            out.push_str("...");
            break;
        }
        if character.is_control() {
            out.extend(character.escape_default());
        } else {
            out.push(character);
        }
    }
    out
}

fn label(severity: Severity) -> &'static str {
    match severity {
        Severity::Error => "",
        Severity::Warning => "warning: ",
    }
}

fn hint_line(hint: Option<&str>) -> String {
    hint.map_or_else(String::new, |hint| format!("\nhint: {hint}"))
}

fn all_lines(problems: &[Problem]) -> String {
    problems
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}

/// Text quoted in a message is cut after this many characters.
const SHOWN_CHARS_MAX: usize = 80;
