//! The words of an option list, read one by one.
//!
//! Owns which words there are and what each does to a [`Reading`]. The rule for a word that we
//! know but do not act upon: if it states what we do anyway it passes in silence, else its author
//! is told. A word that nobody knows is refused, since a misspelt `no_root_squash` or `ro` must
//! not become its opposite. Source for the words: exports(5) of nfs-utils.

use std::path::PathBuf;

use super::options::NOBODY_ID;
use super::parse::export_path;
use super::problem::shown;
use super::{Fsid, Options, Squash};

/// What was read so far for one client; begins as the line's default options.
#[derive(Debug, Clone, Default)]
pub(super) struct Reading {
    options: Options,
    no_root_squash: bool,
    all_squash: bool,
    pub(super) fsid: Option<Fsid>,
    pub(super) mountpoint: Option<Mountpoint>,
    security: Restriction,
    transport: Restriction,
}

/// What must be a mount point for the export to be offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mountpoint {
    /// The export's own directory.
    Export,
    /// Another one.
    Path(PathBuf),
}

/// A list of flavours that an export is restricted to, as far as it was read.
#[derive(Debug, Clone, Default)]
struct Restriction {
    given: bool,
    /// One that we serve is among them.
    served: bool,
    /// The latest list lacks ours: what varies by flavour and follows is not for our callers.
    elsewhere: bool,
}

/// What there is to say about one option.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Remark {
    /// It cannot be used.
    Refused {
        /// What is wrong.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// It is taken, but the author should know.
    Doubt {
        /// What to know.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
}

impl Remark {
    fn refused(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Refused {
            message: message.into(),
            hint: Some(hint.into()),
        }
    }

    fn doubt(message: impl Into<String>, hint: Option<&str>) -> Self {
        Self::Doubt {
            message: message.into(),
            hint: hint.map(Into::into),
        }
    }
}

impl Reading {
    /// Reads one option of the list.
    pub(super) fn apply(&mut self, option: &[u8]) -> Option<Remark> {
        let (word, value) = match option.iter().position(|&byte| byte == b'=') {
            Some(at) => (&option[..at], option.get(at + 1..)),
            None => (option, None),
        };
        let Some(&known) = WORDS.iter().find(|known| known.as_bytes() == word) else {
            return Some(unknown("option", word, WORDS.iter().copied()));
        };
        if value.is_some() && !TAKING_VALUES.contains(&known) {
            return Some(Remark::refused(
                format!("option `{known}` takes no value"),
                format!("write {known}"),
            ));
        }
        let Some(value) = value else {
            return self.apply_word(known);
        };
        self.apply_value(known, value)
    }

    /// Ends the list: says which callers may use the export with which options.
    pub(super) fn finish(&self) -> Result<Options, Remark> {
        for (restriction, word, ours) in [
            (&self.security, "sec", "sys"),
            (&self.transport, "xprtsec", "none"),
        ] {
            if restriction.given && !restriction.served {
                return Err(Remark::refused(
                    format!("no flavour of this client's {word}= list can be served"),
                    format!("add {ours} to {word}= if that is safe here; {word}={ours} is served"),
                ));
            }
        }
        let squash = match (self.all_squash, self.no_root_squash) {
            (true, _) => Squash::All,
            (false, true) => Squash::None,
            (false, false) => Squash::Root,
        };
        Ok(Options {
            squash,
            ..self.options
        })
    }

    fn apply_word(&mut self, word: &str) -> Option<Remark> {
        let ours = !self.security.elsewhere;
        match word {
            "ro" | "rw" => {
                if ours {
                    self.options.read_only = word == "ro";
                }
            }
            "root_squash" | "no_root_squash" => {
                if ours {
                    self.no_root_squash = word == "no_root_squash";
                }
            }
            "all_squash" | "no_all_squash" => {
                if ours {
                    self.all_squash = word == "all_squash";
                }
            }
            "sync" => self.options.sync = true,
            "async" => {
                self.options.sync = false;
                return Some(Remark::doubt(
                    "`async` answers writes before they are on stable storage: a crash or a \
                     takeover loses acknowledged data",
                    Some("use sync unless the data can be made again"),
                ));
            }
            "secure" | "insecure" => self.options.secure = word == "secure",
            "crossmnt" | "nocrossmnt" => self.options.crossmnt = word == "crossmnt",
            "nohide" => self.options.nohide = true,
            "hide" => {
                self.options.nohide = false;
                return Some(without_effect(word));
            }
            "manage_gids" | "manage-gids" => self.options.manage_gids = true,
            "no_manage_gids" => self.options.manage_gids = false,
            "no_auth_nlm" | "insecure_locks" => self.options.no_auth_nlm = true,
            "auth_nlm" | "secure_locks" => {
                self.options.no_auth_nlm = false;
                return Some(without_effect(word));
            }
            "mountpoint" | "mp" => self.mountpoint = Some(Mountpoint::Export),
            // They say what happens anyway.
            "no_subtree_check" | "map_identity" | "link_absolute" => {}
            "noaccess" | "map_daemon" | "link_relative" | "public" => {
                return Some(Remark::refused(
                    format!("option `{word}` of old servers is not supported"),
                    "leave it out, and see that the export is still what you mean",
                ));
            }
            _ if TAKING_VALUES.contains(&word) => {
                return Some(Remark::refused(
                    format!("option `{word}` needs a value"),
                    format!("write {word}=VALUE"),
                ));
            }
            _ => return Some(without_effect(word)),
        }
        None
    }

    fn apply_value(&mut self, word: &str, value: &[u8]) -> Option<Remark> {
        match word {
            "anonuid" | "anongid" => {
                let Some(id) = parse_id(value) else {
                    return Some(Remark::refused(
                        format!("`{}` is not a user or group number", shown(value)),
                        format!("write {word}=NUMBER, from 0 to 4294967294"),
                    ));
                };
                if word == "anonuid" {
                    self.options.anon_uid = id;
                } else {
                    self.options.anon_gid = id;
                }
                (id == 0).then(|| {
                    Remark::doubt(
                        format!("`{word}=0` makes squashed callers root"),
                        Some("use the number of an account without rights"),
                    )
                })
            }
            "fsid" => {
                let Some(fsid) = parse_fsid(value) else {
                    return Some(Remark::refused(
                        format!("`{}` is not an fsid", shown(value)),
                        "write fsid=NUMBER, fsid=root, or fsid= and the 32 digits of a UUID",
                    ));
                };
                self.fsid = Some(fsid);
                None
            }
            "mountpoint" | "mp" => match export_path(value) {
                Ok(path) => {
                    self.mountpoint = Some(Mountpoint::Path(path));
                    None
                }
                Err(message) => Some(Remark::refused(message, "write mountpoint=/full/path")),
            },
            "sec" => self
                .security
                .read(word, value, &["sys", "unix"], SECURITY_FLAVOURS),
            "xprtsec" => self
                .transport
                .read(word, value, &["none"], TRANSPORT_FLAVOURS),
            "refer" | "replicas" => Some(Remark::refused(
                format!("`{word}=` sends clients to other servers, which NFSv3 cannot"),
                "export the directory on the server that has it",
            )),
            "mapping" if value == b"identity" => None,
            "mapping" | "squash_uids" | "squash_gids" => Some(Remark::refused(
                format!("option `{word}` of old servers is not supported"),
                "use root_squash or all_squash with anonuid= and anongid=",
            )),
            _ => Some(without_effect(word)),
        }
    }
}

impl Restriction {
    fn read(&mut self, word: &str, value: &[u8], ours: &[&str], known: &[&str]) -> Option<Remark> {
        self.given = true;
        let mut listed_ours = false;
        let mut unserved = Vec::new();
        for flavour in value.split(|&byte| byte == b':') {
            match known.iter().find(|known| known.as_bytes() == flavour) {
                Some(flavour) if ours.contains(flavour) => listed_ours = true,
                Some(flavour) => unserved.push(*flavour),
                None => {
                    // The list is refused as a whole: no second message about it.
                    self.served = true;
                    let what = format!("{word}= flavour");
                    return Some(unknown(&what, flavour, known.iter().copied()));
                }
            }
        }
        self.served |= listed_ours;
        self.elsewhere = !listed_ours;
        (!unserved.is_empty() && self.served).then(|| {
            Remark::doubt(
                format!(
                    "{word}={} is not served; callers must use {}",
                    unserved.join(":"),
                    ours[0]
                ),
                None,
            )
        })
    }
}

fn without_effect(word: &str) -> Remark {
    Remark::doubt(format!("option `{word}` has no effect here"), None)
}

/// Refuses a word and names the known one that its author may have meant.
fn unknown<'a>(what: &str, word: &[u8], known: impl Iterator<Item = &'a str>) -> Remark {
    Remark::Refused {
        message: format!("unknown {what} `{}`", shown(word)),
        hint: nearest(word, known).map(|known| format!("did you mean `{known}`?")),
    }
}

/// The known word that is most like this one, if any is like it at all.
pub fn nearest<'a>(word: &[u8], known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase();
    let by_distance = known.map(|known| (distance(&word, known.as_bytes()), known));
    let (distance, known) = by_distance.min()?;
    (distance <= (known.len() / 2).max(1)).then_some(known)
}

/// Counts the letters to insert, remove, replace or swap with a neighbour.
pub(super) fn distance(left: &[u8], right: &[u8]) -> usize {
    if left.len() > WORD_BYTES_COMPARED_MAX {
        return usize::MAX;
    }
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=right.len()).collect();
    for (row, &a) in left.iter().enumerate() {
        let mut current = vec![row + 1];
        for (column, &b) in right.iter().enumerate() {
            let mut best = (last[column] + usize::from(a != b))
                .min(last[column + 1] + 1)
                .min(current[column] + 1);
            if row > 0 && column > 0 && a == right[column - 1] && left[row - 1] == b {
                best = best.min(before_last[column - 1] + 1);
            }
            current.push(best);
        }
        before_last = std::mem::replace(&mut last, current);
    }
    last[right.len()]
}

fn parse_id(value: &[u8]) -> Option<u32> {
    let number: i64 = std::str::from_utf8(value).ok()?.parse().ok()?;
    // Old lists say -2 for nobody: the number that a 32-bit int of that value is.
    let id = if number < 0 {
        u32::try_from((1 << 32) + number)
    } else {
        u32::try_from(number)
    };
    id.ok()
        .filter(|&id| id != NOBODY_ID && number >= i64::from(i32::MIN))
}

fn parse_fsid(value: &[u8]) -> Option<Fsid> {
    let text = std::str::from_utf8(value).ok()?;
    if text == "root" {
        return Some(Fsid::Root);
    }
    let digits: Vec<u8> = text
        .chars()
        .filter_map(|c| c.to_digit(16))
        .map(|d| d as u8)
        .collect();
    if digits.len() == 32
        && !text
            .chars()
            .any(|c| c.is_alphabetic() && !c.is_ascii_hexdigit())
    {
        let mut uuid = [0; 16];
        for (byte, pair) in uuid.iter_mut().zip(digits.chunks(2)) {
            *byte = pair.iter().fold(0, |byte, digit| (byte << 4) | digit);
        }
        return Some(Fsid::Uuid(uuid));
    }
    // As strtoul(3) with base 0 reads it, without its sign and blanks.
    let (radix, digits) = match text.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, text.get(2..)?),
        [b'0', _, ..] => (8, text.get(1..)?),
        _ => (10, text),
    };
    if digits.starts_with('+') {
        return None;
    }
    match u32::from_str_radix(digits, radix).ok()? {
        0 => Some(Fsid::Root),
        number => Some(Fsid::Number(number)),
    }
}

/// A longer word is not compared with the known ones.
const WORD_BYTES_COMPARED_MAX: usize = 40;

/// Every option that is known, with or without effect.
pub(super) const WORDS: &[&str] = &[
    "ro",
    "rw",
    "sync",
    "async",
    "root_squash",
    "no_root_squash",
    "all_squash",
    "no_all_squash",
    "anonuid",
    "anongid",
    "secure",
    "insecure",
    "fsid",
    "crossmnt",
    "nocrossmnt",
    "nohide",
    "hide",
    "mountpoint",
    "mp",
    "manage_gids",
    "manage-gids",
    "no_manage_gids",
    "sec",
    "xprtsec",
    "no_subtree_check",
    "subtree_check",
    "wdelay",
    "no_wdelay",
    "acl",
    "no_acl",
    "pnfs",
    "no_pnfs",
    "security_label",
    "auth_nlm",
    "no_auth_nlm",
    "secure_locks",
    "insecure_locks",
    "nordirplus",
    "refer",
    "replicas",
    "reexport",
    "map_identity",
    "map_daemon",
    "mapping",
    "squash_uids",
    "squash_gids",
    "noaccess",
    "link_relative",
    "link_absolute",
    "public",
];
const TAKING_VALUES: &[&str] = &[
    "anonuid",
    "anongid",
    "fsid",
    "mountpoint",
    "mp",
    "sec",
    "xprtsec",
    "refer",
    "replicas",
    "reexport",
    "mapping",
    "squash_uids",
    "squash_gids",
];
const SECURITY_FLAVOURS: &[&str] = &["sys", "unix", "none", "null", "krb5", "krb5i", "krb5p"];
const TRANSPORT_FLAVOURS: &[&str] = &["none", "tls", "mtls"];

#[cfg(test)]
mod tests {
    use super::*;

    fn read(list: &str) -> Options {
        let mut reading = Reading::default();
        for option in list.split(',').filter(|option| !option.is_empty()) {
            assert!(!matches!(
                reading.apply(option.as_bytes()),
                Some(Remark::Refused { .. })
            ));
        }
        reading.finish().expect(list)
    }

    #[test]
    fn later_words_win_and_all_squash_beats_no_root_squash() {
        assert!(!read("ro,rw").read_only);
        assert_eq!(read("no_root_squash,all_squash").squash, Squash::All);
        assert_eq!(
            read("no_root_squash,all_squash,no_all_squash").squash,
            Squash::None
        );
    }

    #[test]
    fn flavours_we_lack_do_not_open_the_export() {
        assert!(read("sec=sys,ro,sec=krb5,rw").read_only);
        assert!(!read("sec=krb5:sys,rw").read_only);
        for list in [b"sec=krb5".as_slice(), b"xprtsec=tls:mtls"] {
            let mut reading = Reading::default();
            assert_eq!(reading.apply(list), None);
            assert!(reading.finish().is_err());
        }
    }

    #[test]
    fn fsids_are_numbers_or_uuids() {
        let uuid = "f8b3e0c2-1d5a-4b7e-9c3d-0123456789ab";
        for (text, written) in [
            ("0", "root"),
            ("root", "root"),
            ("7", "7"),
            ("0x10", "16"),
            ("010", "8"),
            (uuid, uuid),
        ] {
            assert_eq!(
                parse_fsid(text.as_bytes()).expect(text).to_string(),
                written
            );
        }
        for text in [
            "",
            "-1",
            "+1",
            "x",
            "4294967296",
            "0x",
            "f8b3e0c2",
            &uuid.replace('a', "g"),
        ] {
            assert_eq!(parse_fsid(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn identities_are_32_bit_and_not_all_ones() {
        assert_eq!(parse_id(b"-2"), Some(4_294_967_294));
        for text in [
            "-1",
            "4294967295",
            "4294967296",
            "",
            "nobody",
            "-2147483649",
        ] {
            assert_eq!(parse_id(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn every_known_word_is_acted_upon() {
        for word in WORDS {
            for text in [(*word).to_owned(), format!("{word}=1")] {
                if let Some(Remark::Refused { message, .. }) =
                    Reading::default().apply(text.as_bytes())
                {
                    assert!(!message.starts_with("unknown option"), "{message}");
                }
            }
        }
    }

    #[test]
    fn the_nearest_word_counts_swaps_as_one() {
        assert_eq!(distance(b"no_root_sqaush", b"no_root_squash"), 1);
        assert_eq!(distance(b"kitten", b"sitting"), 3);
        assert_eq!(distance(&[b'x'; 100], b"ro"), usize::MAX);
    }
    #[test]
    fn defaults_are_those_of_exports() {
        let words = Options::default().words();
        assert_eq!(words, ["ro", "sync", "secure", "root_squash"]);
        assert_eq!(read(""), Options::default());
    }
}
