//! Export lists gathered from texts and arguments.
//!
//! Owns what lies above a line: the bounds of a text, where the directory of an `--export` argument
//! ends, several lists about one directory, and the end result. Touches no file: `load` does. All
//! problems are collected, and one error among them refuses the whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::lex::{Lexer, OpenQuote, Place, unescape};
use super::parse::{Line, export_path};
use super::problem::{ExportErrors, Origin, Problem, Severity, Source};
use super::{ClientPattern, ClientRule, ExportSpec, Fsid, Loaded};

/// Reads one export list.
///
/// # Errors
/// All problems of the text, if at least one of them is an error.
pub fn parse_exports(source: Source, text: &[u8]) -> Result<Loaded, ExportErrors> {
    let mut collector = Collector::default();
    collector.add_text(&source, text);
    collector.finish()
}

/// Reads the `number`th `--export` argument, `DIR[:CLIENT(OPTIONS)[ CLIENT(OPTIONS)]...]`.
///
/// A colon may belong to the directory or to an IPv6 address, so DIR ends at the first colon whose
/// right side reads as a list of clients (their options may be wrong); `\072` or quotes around DIR
/// write a colon of the directory.
///
/// # Errors
/// All problems of the argument, if at least one of them is an error.
pub fn parse_argument(number: u32, text: &[u8]) -> Result<Loaded, ExportErrors> {
    let mut collector = Collector::default();
    collector.add_argument(number, text);
    collector.finish()
}

/// Gathers export lists; several may speak of one directory.
#[derive(Debug, Default)]
pub(super) struct Collector {
    specs: Vec<ExportSpec>,
    by_path: BTreeMap<PathBuf, usize>,
    /// For each export, its rules by client: a list may have thousands.
    rules: Vec<BTreeMap<String, usize>>,
    problems: Vec<Problem>,
    /// An error is among the problems.
    refused: bool,
    rule_count: usize,
}

/// One rule as a line states it.
pub(super) struct Mention<'a> {
    pub(super) path: &'a Path,
    /// Where the line names the directory.
    pub(super) origin: Origin,
    pub(super) rule: ClientRule,
    pub(super) fsid: Option<Fsid>,
    pub(super) mountpoint: Option<PathBuf>,
}

impl Collector {
    /// Adds a text in exports(5) syntax.
    pub(super) fn add_text(&mut self, source: &Source, text: &[u8]) {
        let mut line = Line {
            source,
            collector: self,
        };
        if text.len() > TEXT_BYTES_MAX {
            line.error(
                WHOLE,
                format!("the list is longer than {TEXT_BYTES_MAX} bytes"),
                None,
            );
            return;
        }
        let mut lexer = Lexer::new(text);
        while let Some(words) = lexer.next_line() {
            match words {
                Ok(words) => line.read(&words),
                Err(OpenQuote(place)) => line.error(
                    place,
                    "quote is not closed on this line",
                    Some("write \\042 for a quote that belongs to the name".into()),
                ),
            }
        }
    }

    /// Adds the `number`th `--export` argument.
    pub(super) fn add_argument(&mut self, number: u32, text: &[u8]) {
        let source = Source::Argument(number);
        let mut line = Line {
            source: &source,
            collector: self,
        };
        let start = Place { line: 1, column: 1 };
        if text.len() > TEXT_BYTES_MAX {
            line.error(
                start,
                format!("it is longer than {TEXT_BYTES_MAX} bytes"),
                None,
            );
            return;
        }
        let (directory, colon) = split_argument(text);
        let path = match export_path(&argument_directory(directory)) {
            Ok(path) => path,
            Err(message) => {
                let hint = "write the full path of a directory, such as /srv/data:*(rw)";
                line.error(start, message, Some(hint.into()));
                return;
            }
        };
        let Some(colon) = colon else {
            line.read_clients(path, start, &[]);
            return;
        };
        let column = u32::try_from(colon).unwrap_or(u32::MAX).saturating_add(2);
        let clients = text.get(colon + 1..).unwrap_or_default();
        let mut words = Vec::new();
        let mut lexer = Lexer::starting_at(clients, Place { line: 1, column });
        while let Some(more) = lexer.next_line() {
            match more {
                Ok(more) => words.extend(more),
                Err(OpenQuote(place)) => line.error(place, "quote is not closed", None),
            }
        }
        if words.is_empty() {
            let hint = "write DIR:*(rw) for everybody, or DIR alone for everybody read-only";
            line.error(start, "no client follows the colon", Some(hint.into()));
        } else {
            line.read_clients(path, start, &words);
        }
    }

    /// Adds a rule to the export that it is about.
    pub(super) fn add_rule(&mut self, mention: Mention<'_>) {
        let Mention {
            path,
            origin,
            rule,
            fsid,
            mountpoint,
        } = mention;
        self.rule_count += 1;
        if self.rule_count > RULES_MAX {
            if self.rule_count == RULES_MAX + 1 {
                self.error(&rule.origin, format!("more than {RULES_MAX} clients"), None);
            }
            return;
        }
        let index = *self.by_path.entry(path.to_owned()).or_insert_with(|| {
            let path = path.to_owned();
            self.specs.push(ExportSpec {
                path,
                fsid: None,
                mountpoint: None,
                rules: vec![],
                origin,
            });
            self.rules.push(BTreeMap::new());
            self.specs.len() - 1
        });
        let (Some(spec), Some(rules)) = (self.specs.get_mut(index), self.rules.get_mut(index))
        else {
            return;
        };
        let (at, path) = (rule.origin.clone(), path.display());
        let mut conflicts = Vec::new();
        if let Some((old, new)) = settle(&mut spec.fsid, fsid) {
            conflicts.push(format!("fsid={new} of `{path}` is fsid={old} elsewhere"));
        }
        if let Some((old, new)) = settle(&mut spec.mountpoint, mountpoint) {
            let (old, new) = (old.display(), new.display());
            conflicts.push(format!(
                "mountpoint `{new}` of `{path}` is `{old}` elsewhere"
            ));
        }
        let name = rule.client.to_string();
        let earlier = rules
            .get(&name)
            .and_then(|&earlier| spec.rules.get(earlier))
            .cloned();
        if earlier.is_none() {
            rules.insert(name, spec.rules.len());
            spec.rules.push(rule.clone());
        }
        for message in conflicts {
            self.error(
                &at,
                message,
                Some("an export has one, whichever client asks"),
            );
        }
        let Some(earlier) = earlier else { return };
        let (severity, hint) = if earlier.options == rule.options {
            (Severity::Warning, "remove one of the two")
        } else {
            (
                Severity::Error,
                "the two differ; keep the one that is meant",
            )
        };
        let message = format!(
            "`{}` has a rule for `{path}` already ({})",
            rule.client, earlier.origin
        );
        self.add_problem(Problem {
            severity,
            origin: at,
            message,
            hint: Some(hint.into()),
        });
    }

    /// Notes a problem.
    pub(super) fn add_problem(&mut self, problem: Problem) {
        let error = problem.severity == Severity::Error;
        // Past the bound only the first error counts: it must still refuse the list.
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        } else if error && !self.refused {
            self.problems.pop();
            self.problems.push(problem);
        }
        self.refused |= error;
    }

    fn error(&mut self, origin: &Origin, message: String, hint: Option<&str>) {
        let (severity, origin) = (Severity::Error, origin.clone());
        self.add_problem(Problem {
            severity,
            origin,
            message,
            hint: hint.map(Into::into),
        });
    }

    /// Returns what was gathered, in the order in which it was given.
    pub(super) fn finish(mut self) -> Result<Loaded, ExportErrors> {
        let mut owners = BTreeMap::new();
        let mut conflicts = Vec::new();
        for spec in &self.specs {
            let Some(fsid) = spec.fsid else { continue };
            if let Some(other) = owners.insert(fsid, spec) {
                let (path, other_path) = (spec.path.display(), other.path.display());
                let origin = spec.origin.clone();
                let of = format!("fsid={fsid} of `{path}` belongs to `{other_path}` already");
                conflicts.push((origin, format!("{of} ({})", other.origin)));
            }
        }
        for (origin, message) in conflicts {
            self.error(
                &origin,
                message,
                Some("give each exported directory its own fsid"),
            );
        }
        if self.refused {
            return Err(ExportErrors(self.problems));
        }
        Ok(Loaded {
            specs: self.specs,
            warnings: self.problems,
        })
    }
}

/// Returns the directory of an argument, and where the colon before its clients stands.
fn split_argument(text: &[u8]) -> (&[u8], Option<usize>) {
    let quoted = match text {
        [b'"', rest @ ..] => rest
            .iter()
            .position(|&byte| byte == b'"')
            .map_or(0, |at| at + 2),
        _ => 0,
    };
    let colons: Vec<usize> = (quoted..text.len())
        .filter(|&at| text.get(at) == Some(&b':'))
        .take(COLONS_MAX)
        .collect();
    let is_clients = |&&at: &&usize| {
        let right = text.get(at + 1..).unwrap_or_default();
        reads_as_clients(right)
    };
    // If none fits, the first is the likeliest, and the message names what follows it.
    match colons.iter().find(is_clients).or(colons.first()) {
        Some(&at) => (text.get(..at).unwrap_or_default(), Some(at)),
        None => (text, None),
    }
}

/// Says whether each word is a client, or looks like options, whatever the options are.
fn reads_as_clients(text: &[u8]) -> bool {
    let mut words = text
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
        .map(|word| word.split(|&byte| byte == b'(').next().unwrap_or_default())
        .peekable();
    words.peek().is_some()
        && words.all(|name| {
            let name = name.strip_prefix(b"\"").unwrap_or(name);
            name.starts_with(b"-")
                || name.starts_with(b"@")
                || name.starts_with(b"gss/")
                || ClientPattern::parse(name).is_ok()
        })
}

/// Takes quotes off and resolves escapes; spaces need neither in an argument.
fn argument_directory(text: &[u8]) -> Vec<u8> {
    let inner = text
        .strip_prefix(b"\"")
        .and_then(|text| text.strip_suffix(b"\""));
    unescape(inner.unwrap_or(text))
}

/// Takes over a value that an export can have only once; returns the two if they differ.
fn settle<T: PartialEq + Clone>(slot: &mut Option<T>, new: Option<T>) -> Option<(T, T)> {
    let new = new?;
    match slot {
        None => {
            *slot = Some(new);
            None
        }
        Some(old) => (*old != new).then(|| (old.clone(), new)),
    }
}

/// Stands for a text as a whole.
const WHOLE: Place = Place { line: 0, column: 1 };
/// An export list of a thousand directories has some 100 KB.
const TEXT_BYTES_MAX: usize = 1 << 20;
/// Places tried as the end of an argument's directory.
const COLONS_MAX: usize = 64;
/// Clients of all exports together; each name among them is a lookup.
pub(super) const RULES_MAX: usize = 16_384;
/// Nobody reads more.
const PROBLEMS_MAX: usize = 1000;
