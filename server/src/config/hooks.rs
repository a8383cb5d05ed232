//! The commands of a service that this program runs for its storage: the fence, and what comes
//! before the storage is opened and after it is closed.
//!
//! Owns what the configuration says of them and whether that makes sense. Does not run them, and
//! does not look whether the programs are there: they may lie on what is mounted later.
//!
//! Invariants: a program has an absolute path; a service whose storage needs a fence has one, and
//! no other service has one.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// The commands of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hooks {
    /// Makes sure that a lost node writes no more; there if the storage needs it.
    pub fence: Option<HookCommand>,
    /// Makes the storage ready, before exports are opened.
    pub takeover: Option<HookCommand>,
    /// Lets the storage go, after everything is closed.
    pub release: Option<HookCommand>,
    /// How long each may take.
    pub time_max: Duration,
}

impl Hooks {
    /// The commands that there are, each with its key.
    pub fn all(&self) -> impl Iterator<Item = (&'static str, &HookCommand)> {
        let all = [
            ("fence_command", &self.fence),
            ("takeover_command", &self.takeover),
            ("release_command", &self.release),
        ];
        let commands = all.into_iter();
        commands.filter_map(|(key, command)| Some((key, command.as_ref()?)))
    }
}

impl Default for Hooks {
    fn default() -> Self {
        Self {
            fence: None,
            takeover: None,
            release: None,
            time_max: Duration::from_secs(HOOK_SECONDS_DEFAULT),
        }
    }
}

/// A program and its arguments; no shell reads them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookCommand {
    /// The program, an absolute path.
    pub program: PathBuf,
    /// What it is given.
    pub arguments: Vec<String>,
}

/// What the configuration file says of the commands of one service.
#[derive(Debug, Default)]
pub(super) struct HookKeys {
    pub(super) fence_command: Option<Vec<String>>,
    pub(super) takeover_command: Option<Vec<String>>,
    pub(super) release_command: Option<Vec<String>>,
    pub(super) hook_seconds: Option<u64>,
}

/// Whether there is anybody to fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FenceNeed {
    /// There is no other node.
    Alone,
    /// The storage keeps a lost node from writing by itself.
    Arbitrated,
    /// Nothing else does.
    Needed,
}

impl HookKeys {
    /// Makes sense of it.
    ///
    /// # Errors
    /// The key, and what is wrong, to be said after the name of the service.
    pub(super) fn check(self, need: FenceNeed) -> Result<Hooks, (&'static str, String)> {
        let Self {
            fence_command,
            takeover_command,
            release_command,
            hook_seconds,
        } = self;
        match (need, &fence_command) {
            (FenceNeed::Needed, None) => {
                return Err((
                    "storage",
                    "has storage = \"fence\" and no fence_command: name a program that makes sure \
                     that the node HAVENFS_LOST_NODE can't write to the storage any more, and \
                     succeeds only then"
                        .to_owned(),
                ));
            }
            (FenceNeed::Alone, Some(_)) => {
                return Err((
                    "fence_command",
                    "has a fence_command, but without [cluster] there is no other node to fence: \
                     remove it"
                        .to_owned(),
                ));
            }
            (FenceNeed::Arbitrated, Some(_)) => {
                return Err((
                    "fence_command",
                    "has a fence_command, which would never be run: say storage = \"fence\", or \
                     remove it"
                        .to_owned(),
                ));
            }
            (FenceNeed::Needed, Some(_)) | (_, None) => {}
        }
        let seconds = hook_seconds.unwrap_or(HOOK_SECONDS_DEFAULT);
        if !(1..=HOOK_SECONDS_MAX).contains(&seconds) {
            let problem =
                format!("has hook_seconds = {seconds}, which is not from 1 to {HOOK_SECONDS_MAX}");
            return Err(("hook_seconds", problem));
        }
        let command = |key: &'static str, words: Option<Vec<String>>| match words {
            None => Ok(None),
            Some(words) => HookCommand::of(words)
                .map(Some)
                .map_err(|problem| (key, format!("has a {key} that {problem}"))),
        };
        Ok(Hooks {
            fence: command("fence_command", fence_command)?,
            takeover: command("takeover_command", takeover_command)?,
            release: command("release_command", release_command)?,
            time_max: Duration::from_secs(seconds),
        })
    }
}

impl HookCommand {
    fn of(words: Vec<String>) -> Result<Self, String> {
        if words.iter().any(|word| word.contains('\0')) {
            return Err("contains a zero byte".to_owned());
        }
        let mut words = words.into_iter();
        let program = words.next().ok_or(
            "is an empty list: say the program and its arguments, each as a string of its own",
        )?;
        if !Path::new(&program).is_absolute() {
            return Err(format!(
                "begins with `{program}`: say the program's whole path, beginning with /"
            ));
        }
        Ok(Self {
            program: program.into(),
            arguments: words.collect(),
        })
    }
}

const HOOK_SECONDS_DEFAULT: u64 = 30;
const HOOK_SECONDS_MAX: u64 = 600;

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn commands_are_a_program_and_its_arguments() {
        let keys = HookKeys {
            fence_command: Some(words(&["/sbin/fence", "--node", "a b"])),
            release_command: Some(words(&["/bin/umount"])),
            hook_seconds: Some(600),
            ..HookKeys::default()
        };
        let hooks = keys.check(FenceNeed::Needed).unwrap();
        let fence = hooks.fence.unwrap();
        assert_eq!(fence.program, Path::new("/sbin/fence"));
        assert_eq!(fence.arguments, ["--node", "a b"]);
        assert_eq!(hooks.takeover, None);
        assert_eq!(hooks.release.unwrap().arguments, [""; 0]);
        assert_eq!(hooks.time_max, Duration::from_mins(10));
        let none = HookKeys::default().check(FenceNeed::Alone).unwrap();
        assert_eq!(none, Hooks::default());
    }

    #[test]
    fn mistakes_say_what_to_do() {
        let fence = || HookKeys {
            fence_command: Some(words(&["/f"])),
            ..HookKeys::default()
        };
        let takeover = |list: &[&str]| HookKeys {
            takeover_command: Some(words(list)),
            ..HookKeys::default()
        };
        let seconds = |seconds| HookKeys {
            hook_seconds: Some(seconds),
            ..HookKeys::default()
        };
        for (keys, need, expected) in [
            (
                HookKeys::default(),
                FenceNeed::Needed,
                "no fence_command: name a program",
            ),
            (fence(), FenceNeed::Alone, "no other node to fence"),
            (fence(), FenceNeed::Arbitrated, "say storage = \"fence\""),
            (
                takeover(&[]),
                FenceNeed::Alone,
                "takeover_command that is an empty list",
            ),
            (
                takeover(&["mount", "/a"]),
                FenceNeed::Alone,
                "begins with `mount`",
            ),
            (takeover(&[""]), FenceNeed::Alone, "begins with ``"),
            (takeover(&["/a", "b\0"]), FenceNeed::Alone, "a zero byte"),
            (seconds(0), FenceNeed::Alone, "is not from 1 to 600"),
            (seconds(601), FenceNeed::Alone, "is not from 1 to 600"),
        ] {
            let (_, error) = keys.check(need).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
