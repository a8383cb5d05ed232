//! One line of exports(5), read into the rules of an export.
//!
//! Owns the grammar `PATH [-OPTIONS] [CLIENT][(OPTIONS)] ...`, the merging of rules into the export
//! that they are about, and every message about them. A line with an error yields what is sound of
//! it, so that all problems are told at once.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use super::ClientRule;
use super::client::{self, ClientPattern};
use super::collect::{Collector, Mention};
use super::lex::{Place, Word};
use super::problem::{Origin, Problem, Severity, Source, shown};
use super::words::{Mountpoint, Reading, Remark, WORDS};

/// One logical line on its way into the collector.
pub(super) struct Line<'a> {
    pub(super) source: &'a Source,
    pub(super) collector: &'a mut Collector,
}

impl Line<'_> {
    /// Reads a line of a file.
    pub(super) fn read(&mut self, words: &[Word]) {
        let Some((first, rest)) = words.split_first() else {
            return;
        };
        if !first.quoted && first.bytes.ends_with(b")") && first.bytes.contains(&b'(') {
            self.warn(
                first.place(0),
                format!("`{}` is taken as the directory's name", shown(&first.bytes)),
                Some("put a space between directory and client, or quotes around the name".into()),
            );
        }
        match export_path(&first.bytes) {
            Ok(path) => self.read_clients(path, first.place(0), rest),
            Err(message) => {
                let hint = "each line begins with the full path of a directory; \
                            put quotes around a name with spaces";
                self.error(first.place(0), message, Some(hint.into()));
            }
        }
    }

    /// Reads what follows the directory.
    pub(super) fn read_clients(&mut self, path: PathBuf, at: Place, words: &[Word]) {
        let mut defaults = Reading::default();
        let mut any = false;
        let mut bare: Option<&Word> = None;
        for word in words {
            if word.bytes.first() == Some(&b'-') {
                self.read_options(&mut defaults, word, 1..word.bytes.len());
                bare = None;
                continue;
            }
            any = true;
            let mut reading = defaults.clone();
            let Some((name, sound)) = self.read_client_word(&mut reading, word) else {
                continue;
            };
            if name.is_empty() {
                self.warn_about_everyone(word, bare);
            }
            bare = (!word.bytes.contains(&b'(')).then_some(word);
            let Some(client) = self.read_client(name, word) else {
                continue;
            };
            if sound {
                self.add_rule(&path, at, client, &reading, word.place(0));
            }
        }
        if !any {
            self.add_rule(&path, at, ClientPattern::Any, &defaults, at);
        }
    }

    /// Reads `CLIENT(OPTIONS)`; returns the client's text and whether its options are sound.
    fn read_client_word<'w>(
        &mut self,
        reading: &mut Reading,
        word: &'w Word,
    ) -> Option<(&'w [u8], bool)> {
        let bytes = &word.bytes[..];
        let Some(open) = bytes.iter().position(|&byte| byte == b'(') else {
            if let Some(close) = bytes.iter().position(|&byte| byte == b')') {
                let hint = "write options as CLIENT(rw,sync), without spaces";
                self.error(word.place(close), "`)` without `(`", Some(hint.into()));
                return None;
            }
            return Some((bytes, true));
        };
        let Some(close) = bytes.iter().position(|&byte| byte == b')') else {
            let hint = "separate options by commas, without spaces, and close with `)`";
            self.error(
                word.place(open),
                "option list is not closed",
                Some(hint.into()),
            );
            return None;
        };
        if close < open {
            self.error(word.place(close), "`)` before `(`", None);
            return None;
        }
        if let Some(rest) = bytes.get(close + 1..).filter(|rest| !rest.is_empty()) {
            let hint = if rest.starts_with(b"#") {
                "put a space before a comment"
            } else {
                "put a space between clients"
            };
            let message = format!("`{}` follows the option list", shown(rest));
            self.error(word.place(close + 1), message, Some(hint.into()));
            return None;
        }
        let sound = self.read_options(reading, word, open + 1..close);
        Some((&bytes[..open], sound))
    }

    /// Reads a comma-separated part of a word; returns whether all of it could be used.
    fn read_options(
        &mut self,
        reading: &mut Reading,
        word: &Word,
        part: std::ops::Range<usize>,
    ) -> bool {
        let mut sound = true;
        let mut at = part.start;
        let list = word.bytes.get(part).unwrap_or_default();
        let list = list.strip_suffix(b",").unwrap_or(list);
        if list.is_empty() {
            return true;
        }
        for option in list.split(|&byte| byte == b',') {
            let place = word.place(at);
            at += option.len() + 1;
            let option = option.trim_ascii_start();
            if option.is_empty() {
                self.error(place, "empty option", Some("remove the extra comma".into()));
                sound = false;
                continue;
            }
            match reading.apply(option) {
                Some(Remark::Refused { message, hint }) => {
                    self.error(place, message, hint);
                    sound = false;
                }
                Some(Remark::Doubt { message, hint }) => self.warn(place, message, hint),
                None => {}
            }
        }
        sound
    }

    fn read_client(&mut self, name: &[u8], word: &Word) -> Option<ClientPattern> {
        match ClientPattern::parse(name) {
            Ok(client::Parsed { client, doubt }) => {
                if let Some(doubt) = doubt {
                    self.warn(word.place(0), doubt.message, Some(doubt.hint));
                }
                if WORDS.iter().any(|known| known.as_bytes() == name) {
                    let text = shown(name);
                    let message = format!("option `{text}` is taken as the name of a host");
                    let hint = format!("write CLIENT({text}), without a space before `(`");
                    self.warn(word.place(0), message, Some(hint));
                }
                Some(client)
            }
            Err(refusal) => {
                self.error(word.place(0), refusal.message, Some(refusal.hint));
                None
            }
        }
    }

    fn warn_about_everyone(&mut self, word: &Word, bare: Option<&Word>) {
        let options = shown(&word.bytes);
        let (message, hint) = match bare.map(|word| shown(&word.bytes)) {
            Some(host) => (
                format!("the space after `{host}` gives `{options}` to everybody, not to `{host}`"),
                format!("write {host}{options}, or *{options} if everybody is meant"),
            ),
            None => (
                format!("`{options}` without a client applies to everybody"),
                format!("write *{options}"),
            ),
        };
        self.warn(word.place(0), message, Some(hint));
    }

    fn add_rule(
        &mut self,
        path: &Path,
        at: Place,
        client: ClientPattern,
        reading: &Reading,
        place: Place,
    ) {
        let options = match reading.finish() {
            Ok(options) => options,
            Err(Remark::Refused { message, hint } | Remark::Doubt { message, hint }) => {
                self.error(place, message, hint);
                return;
            }
        };
        let mountpoint = reading
            .mountpoint
            .as_ref()
            .map(|mountpoint| match mountpoint {
                Mountpoint::Export => path.to_owned(),
                Mountpoint::Path(path) => path.clone(),
            });
        self.collector.add_rule(Mention {
            path,
            origin: self.origin(at),
            rule: ClientRule {
                client,
                options,
                origin: self.origin(place),
            },
            fsid: reading.fsid,
            mountpoint,
        });
    }

    /// Notes an error at a place of the line.
    pub(super) fn error(&mut self, place: Place, message: impl Into<String>, hint: Option<String>) {
        self.tell(Severity::Error, place, message.into(), hint);
    }

    fn warn(&mut self, place: Place, message: impl Into<String>, hint: Option<String>) {
        self.tell(Severity::Warning, place, message.into(), hint);
    }

    fn tell(&mut self, severity: Severity, place: Place, message: String, hint: Option<String>) {
        let origin = self.origin(place);
        self.collector.add_problem(Problem {
            severity,
            origin,
            message,
            hint,
        });
    }

    fn origin(&self, place: Place) -> Origin {
        Origin {
            source: self.source.clone(),
            line: place.line,
            column: place.column,
        }
    }
}

/// Reads the path of an export: absolute, of a length that MOUNT can carry, without `..`.
pub(super) fn export_path(bytes: &[u8]) -> Result<PathBuf, String> {
    if bytes.first() != Some(&b'/') {
        return Err(format!("`{}` is not an absolute path", shown(bytes)));
    }
    if bytes.contains(&0) {
        return Err(format!("`{}` contains a null byte", shown(bytes)));
    }
    if bytes.len() > PATH_BYTES_MAX {
        return Err(format!(
            "the path `{}` is longer than {PATH_BYTES_MAX} bytes",
            shown(bytes)
        ));
    }
    let path = PathBuf::from(OsString::from_vec(bytes.to_vec()));
    if path
        .components()
        .any(|component| component == Component::ParentDir)
    {
        return Err(format!("the path `{}` contains `..`", shown(bytes)));
    }
    // Doubled and final slashes and `.` vanish, so that equal paths are equal bytes.
    Ok(path.components().collect())
}

/// Writes a path as the lexer reads it back.
pub(super) fn escape_path(path: &Path) -> String {
    super::lex::escape(path.as_os_str().as_bytes())
}

/// MNTPATHLEN of RFC 1813 5.1.
const PATH_BYTES_MAX: usize = 1024;
