//! What a host's name may look like.
//!
//! Monitors that used names as file names could be told to create and delete any file. Nothing here
//! becomes a file name, but names are shown, logged and sent on, and a name that no host can have
//! has no business in any of these.
//!
//! Source: CERT advisory CA-96.09; XNFS chapter 11 for the length.

use crate::wire::SM_MAXSTRLEN;

/// Why a name is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameProblem {
    /// It has no bytes.
    Empty,
    /// It has more than [`SM_MAXSTRLEN`] bytes.
    TooLong,
    /// It begins with a dot.
    LeadingDot,
    /// It contains a slash.
    Slash,
    /// It contains a control character: 0 to 31 or 127.
    Control,
}

impl std::fmt::Display for NameProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Empty => "the name is empty",
            Self::TooLong => "the name is longer than 1024 bytes",
            Self::LeadingDot => "the name begins with a dot",
            Self::Slash => "the name contains a slash",
            Self::Control => "the name contains a control character",
        })
    }
}

impl std::error::Error for NameProblem {}

/// Judges a `mon_name` or `caller_name`. Names are bytes: bytes above 127 are no business of this
/// function, and neither is whether such a host exists.
///
/// # Errors
/// The first problem, in the order of [`NameProblem`].
pub fn judge(name: &[u8]) -> Result<(), NameProblem> {
    if name.is_empty() {
        Err(NameProblem::Empty)
    } else if name.len() > SM_MAXSTRLEN {
        Err(NameProblem::TooLong)
    } else if name.starts_with(b".") {
        Err(NameProblem::LeadingDot)
    } else if name.contains(&b'/') {
        Err(NameProblem::Slash)
    } else if name.iter().any(u8::is_ascii_control) {
        Err(NameProblem::Control)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_hosts_pass() {
        let longest = [b'x'; SM_MAXSTRLEN];
        let names: [&[u8]; 8] = [
            b"client1",
            b"client1.example.com.",
            b"192.0.2.7",
            b"fe80::1%eth0",
            b"Bob's PC",
            b"a..b",
            b"b\xc3\xbcro",
            &longest,
        ];
        for name in names {
            assert_eq!(judge(name), Ok(()), "{}", name.escape_ascii());
        }
    }

    #[test]
    fn each_problem_is_found() {
        let too_long = [b'x'; SM_MAXSTRLEN + 1];
        let cases: [(&[u8], NameProblem); 10] = [
            (b"", NameProblem::Empty),
            (&too_long, NameProblem::TooLong),
            (b".", NameProblem::LeadingDot),
            (b"../../etc/passwd", NameProblem::LeadingDot),
            (b"/etc/passwd", NameProblem::Slash),
            (b"host/..", NameProblem::Slash),
            (b"host\0", NameProblem::Control),
            (b"host\n", NameProblem::Control),
            (b"\x1b[2J", NameProblem::Control),
            (b"host\x7f", NameProblem::Control),
        ];
        for (name, problem) in cases {
            assert_eq!(judge(name), Err(problem), "{}", name.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn what_passes_is_one_visible_component_of_a_path(
            name in prop::collection::vec(any::<u8>(), 0..1100),
        ) {
            if judge(&name).is_ok() {
                prop_assert!((1..=SM_MAXSTRLEN).contains(&name.len()));
                prop_assert!(name.first() != Some(&b'.'));
                prop_assert!(name.iter().all(|byte| *byte >= b' ' && !b"/\x7f".contains(byte)));
            }
        }
    }
}
