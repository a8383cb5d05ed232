//! Export options: their defaults, and what they do to a caller's identity.
//!
//! Owns [`Options`], [`Squash`] and [`Fsid`]; `words` reads them. An option says what is to be done
//! and does nothing: dispatch checks the port, the NFS programs check `read_only`, the backend acts
//! as the identity that comes out of `squash`. Source for the defaults: exports(5) of nfs-utils.

use std::fmt;

/// What a client that matches a rule may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one independent word of exports(5)"
)]
pub struct Options {
    /// Calls that change anything get ROFS.
    pub read_only: bool,
    /// Stable writes are on stable storage before they are answered; `async` answers early.
    pub sync: bool,
    /// Which callers become the anonymous user.
    pub squash: Squash,
    /// The anonymous user.
    pub anon_uid: u32,
    /// The anonymous group.
    pub anon_gid: u32,
    /// Calls must come from a source port below 1024.
    pub secure: bool,
    /// File systems mounted below the export are served as parts of it.
    pub crossmnt: bool,
    /// The export shows up within the export above it.
    pub nohide: bool,
    /// Supplementary groups come from this machine's directory, not from the call.
    pub manage_gids: bool,
    /// Lock calls are not checked against the file's permissions.
    pub no_auth_nlm: bool,
}

/// Which callers are mapped to the anonymous user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Squash {
    /// Nobody.
    None,
    /// User 0 and group 0.
    Root,
    /// Everybody.
    All,
}

/// The number or UUID that an export's author chose to identify its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fsid {
    /// `fsid=root` or `fsid=0`; it means the number 0 in NFSv3.
    Root,
    /// A number other than 0.
    Number(u32),
    /// A UUID.
    Uuid([u8; 16]),
}

impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: true,
            sync: true,
            squash: Squash::Root,
            anon_uid: ANONYMOUS,
            anon_gid: ANONYMOUS,
            secure: true,
            crossmnt: false,
            nohide: false,
            manage_gids: false,
            no_auth_nlm: false,
        }
    }
}

impl Options {
    /// Maps a caller's user and group to those to act as.
    ///
    /// `0xffffffff` is nobody's identity and becomes the anonymous one.
    /// Source: the Linux kernel server's behaviour; RFC 1813 4.4 leaves it to the server.
    pub fn squash(&self, uid: u32, gid: u32) -> (u32, u32) {
        (
            if self.squashes(uid) {
                self.anon_uid
            } else {
                uid
            },
            if self.squashes(gid) {
                self.anon_gid
            } else {
                gid
            },
        )
    }

    /// Maps supplementary groups; with `manage_gids`, give those of this machine.
    pub fn squash_groups(&self, groups: &[u32]) -> impl Iterator<Item = u32> {
        let kept = if self.squash == Squash::All {
            &[]
        } else {
            groups
        };
        kept.iter().map(|&gid| {
            if self.squashes(gid) {
                self.anon_gid
            } else {
                gid
            }
        })
    }

    /// Says whether `squash_groups` would leave a list as it is, which spares making a new one.
    pub fn keeps_groups(&self, groups: &[u32]) -> bool {
        !groups.iter().any(|&gid| self.squashes(gid))
    }

    /// Returns the user and group of a caller without identity (AUTH_NONE).
    pub fn anonymous(&self) -> (u32, u32) {
        (self.anon_uid, self.anon_gid)
    }

    /// Says whether a call may come from this source port.
    pub fn admits_port(&self, port: u16) -> bool {
        !self.secure || port < RESERVED_PORTS_END
    }

    fn squashes(&self, id: u32) -> bool {
        match self.squash {
            Squash::None => id == NOBODY_ID,
            Squash::Root => id == NOBODY_ID || id == 0,
            Squash::All => true,
        }
    }

    /// Lists the options as words: the important ones always, the others if not the default.
    pub fn words(&self) -> Vec<String> {
        let default = Self::default();
        let mut words: Vec<String> = vec![
            if self.read_only { "ro" } else { "rw" }.into(),
            if self.sync { "sync" } else { "async" }.into(),
            if self.secure { "secure" } else { "insecure" }.into(),
            match self.squash {
                Squash::None => "no_root_squash",
                Squash::Root => "root_squash",
                Squash::All => "all_squash",
            }
            .into(),
        ];
        if self.anon_uid != default.anon_uid {
            words.push(format!("anonuid={}", self.anon_uid));
        }
        if self.anon_gid != default.anon_gid {
            words.push(format!("anongid={}", self.anon_gid));
        }
        for (set, word) in [
            (self.crossmnt, "crossmnt"),
            (self.nohide, "nohide"),
            (self.manage_gids, "manage_gids"),
            (self.no_auth_nlm, "no_auth_nlm"),
        ] {
            if set {
                words.push(word.into());
            }
        }
        words
    }
}

impl fmt::Display for Fsid {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => out.write_str("root"),
            Self::Number(number) => write!(out, "{number}"),
            Self::Uuid(bytes) => {
                for (index, byte) in bytes.iter().enumerate() {
                    let dash = if matches!(index, 4 | 6 | 8 | 10) {
                        "-"
                    } else {
                        ""
                    };
                    write!(out, "{dash}{byte:02x}")?;
                }
                Ok(())
            }
        }
    }
}

/// The user and group of squashed callers unless the export says otherwise.
const ANONYMOUS: u32 = 65534;
/// The number that stands for no user and no group.
pub(super) const NOBODY_ID: u32 = u32::MAX;
/// IPPORT_RESERVED.
const RESERVED_PORTS_END: u16 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_squash_maps_user_and_groups_zero() {
        let root = Options::default();
        assert_eq!(root.squash(0, 0), (65534, 65534));
        assert_eq!(root.squash(1000, 100), (1000, 100));
        let groups: Vec<u32> = root.squash_groups(&[0, 100, 0, u32::MAX]).collect();
        assert_eq!(groups, [65534, 100, 65534, 65534]);
        assert!(root.keeps_groups(&[100, 27]) && !root.keeps_groups(&[100, 0]));
    }

    #[test]
    fn all_squash_drops_groups_and_none_keeps_root() {
        let all = Options {
            squash: Squash::All,
            anon_uid: 150,
            anon_gid: 160,
            ..Options::default()
        };
        assert_eq!(all.squash(1000, 1000), (150, 160));
        assert_eq!(all.squash_groups(&[0, 100]).count(), 0);
        let none = Options {
            squash: Squash::None,
            anon_uid: 150,
            ..Options::default()
        };
        assert_eq!(none.squash(0, 0), (0, 0));
        assert!(none.squash_groups(&[0, 100]).eq([0, 100]));
        assert_eq!(none.squash(u32::MAX, u32::MAX), (150, 65534));
    }
}
