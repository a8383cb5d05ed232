//! Export lists as text: one line of exports(5), or sentences for people.
//!
//! `Display` of [`ExportSpec`] reads back as the same export; `describe` tells what was understood,
//! in the order in which rules are tried, which is not the order in which they were written.

use std::fmt::{self, Write as _};

use super::parse::escape_path;
use super::{ClientPattern, ClientRule, ExportSpec, ExportTable, Loaded, Options, Squash};

impl fmt::Display for ExportSpec {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&escape_path(&self.path))?;
        for (index, rule) in self.rules.iter().enumerate() {
            let mut words = rule.options.words();
            // They belong to the export; exports(5) has no other place for them than a client.
            if index == 0 {
                if let Some(fsid) = self.fsid {
                    words.push(format!("fsid={fsid}"));
                }
                if let Some(mountpoint) = &self.mountpoint {
                    words.push(if *mountpoint == self.path {
                        "mountpoint".into()
                    } else {
                        format!("mountpoint={}", escape_path(mountpoint))
                    });
                }
            }
            write!(out, " {}({})", rule.client, words.join(","))?;
        }
        Ok(())
    }
}

impl Loaded {
    /// Tells people what was understood; warnings are not part of it.
    pub fn describe(&self) -> String {
        // The numbers are for this text only.
        let mut next = 0;
        let table = ExportTable::new(self.specs.clone(), |_| {
            next += 1;
            next
        });
        let mut out = String::new();
        for export in table.exports() {
            if !out.is_empty() {
                out.push('\n');
            }
            let spec = &export.spec;
            put(
                &mut out,
                format_args!("{}  (from {})", spec.path.display(), spec.origin),
            );
            if let Some(parent) = table.parent_of(export) {
                let parent = parent.spec.path.display();
                put(
                    &mut out,
                    format_args!("  lies inside the export {parent}; its own rules apply"),
                );
            }
            if let Some(fsid) = spec.fsid {
                put(&mut out, format_args!("  file system id {fsid}"));
            }
            if let Some(mountpoint) = &spec.mountpoint {
                let mountpoint = mountpoint.display();
                put(
                    &mut out,
                    format_args!("  offered only while {mountpoint} is a mount point"),
                );
            }
            for (number, rule) in (1..).zip(export.rules()) {
                put(&mut out, format_args!("  {number}. {}", rule.describe()));
            }
            if !export
                .rules()
                .iter()
                .any(|rule| rule.client == ClientPattern::Any)
            {
                put(&mut out, format_args!("  all others: refused"));
            }
        }
        if out.is_empty() {
            out.push_str("nothing is exported\n");
        }
        out
    }
}

impl ClientRule {
    /// Tells whom the rule is for and what they may do.
    pub fn describe(&self) -> String {
        format!("{}: {}", self.client.describe(), self.options.describe())
    }
}

impl ClientPattern {
    /// Tells whom the pattern is for.
    pub fn describe(&self) -> String {
        match self {
            Self::Any => "everybody".into(),
            Self::Address(_) | Self::Name(_) => format!("host {self}"),
            Self::Network(_) => format!("network {self}"),
            Self::Wildcard(_) => format!("hosts named {self}"),
        }
    }
}

impl Options {
    /// Tells what the options allow.
    pub fn describe(&self) -> String {
        let (uid, gid) = self.anonymous();
        let mut parts = vec![
            if self.read_only {
                "read-only"
            } else {
                "read and write"
            }
            .into(),
            match self.squash {
                Squash::None => "root stays root".into(),
                Squash::Root => format!("root becomes {uid}:{gid}"),
                Squash::All => format!("every user becomes {uid}:{gid}"),
            },
        ];
        for (set, text) in [
            (self.secure, "source port below 1024 required"),
            (!self.secure, "any source port"),
            (!self.sync, "acknowledged writes can be lost (async)"),
            (self.crossmnt, "crosses mounts"),
            (self.nohide, "visible within the export above"),
            (self.manage_gids, "groups looked up on this server"),
            (
                self.no_auth_nlm,
                "lock calls not checked against permissions",
            ),
        ] {
            if set {
                parts.push(text.into());
            }
        }
        parts.join(", ")
    }
}

fn put(out: &mut String, line: fmt::Arguments<'_>) {
    // Writing into a string cannot fail.
    let _ = writeln!(out, "{line}");
}
