//! What the documents tell people to write into their configuration is right: `config check` finds
//! nothing wrong with it but what lies on their machines.
//!
//! A block that begins with `node` is a whole configuration. All others are parts of a service, as
//! that of the last whole one: what they say stands in place of what that says.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::{fs, iter};

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::lab::havenfs_binary;

const DOCUMENTS: [&str; 2] = [
    include_str!("../../../docs/cluster.md"),
    include_str!("../../../docs/guide.md"),
];
const SERVICE: &str = "[[service]]\n";

/// The blocks of TOML of a document.
fn blocks(document: &str) -> impl Iterator<Item = &str> {
    let parts = document.split("\n```toml\n").skip(1);
    parts.filter_map(|part| Some(part.split_once("\n```")?.0))
}

/// The key of a line, if it has one.
fn key(line: &str) -> Option<&str> {
    Some(line.split_once(" = ")?.0).filter(|key| !key.contains(['#', '{']))
}

/// A configuration with what a part of a service says in place of what its own service says.
fn with_part(whole: &str, part: &str) -> Option<String> {
    let (cluster, service) = whole.split_once(SERVICE)?;
    let part = part.trim_start_matches(SERVICE);
    let said: Vec<&str> = part.lines().filter_map(key).collect();
    let is_said = |line: &&str| key(line).is_some_and(|key| said.contains(&key));
    let rest = service.lines().filter(|line| !is_said(line));
    let lines = iter::once(SERVICE.trim_end())
        .chain(rest)
        .chain(part.lines());
    Some(cluster.to_owned() + &lines.collect::<Vec<_>>().join("\n") + "\n")
}

/// What `config check` finds wrong with a configuration.
fn errors(dir: &Path, text: &str) -> Result<Vec<String>> {
    let key = dir.join("key");
    fs::write(&key, [7; 32])?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    let text = text.replace("/etc/havenfs/cluster.key", &key.to_string_lossy());
    let config = dir.join("havenfs.toml");
    fs::write(&config, text)?;
    let checked = Command::new(havenfs_binary()?)
        .args(["config", "check"])
        .arg(&config)
        .output()?;
    let said = String::from_utf8_lossy(&checked.stdout).into_owned()
        + &String::from_utf8_lossy(&checked.stderr);
    let errors = said.lines().filter(|line| line.starts_with("error"));
    let errors: Vec<String> = errors.map(str::to_owned).collect();
    ensure!(
        checked.status.success() == errors.is_empty(),
        "{}: {said}",
        checked.status
    );
    Ok(errors)
}

#[test]
fn what_the_documents_say_to_configure_is_right() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (mut checked, mut whole) = (0, None);
    for block in DOCUMENTS.into_iter().flat_map(blocks) {
        let is_whole = block.starts_with("node = ") || block.contains("\nnode = ");
        if is_whole {
            whole = Some(block.to_owned());
        }
        let before = whole.as_ref().context("no whole configuration before it")?;
        let text = if is_whole {
            before.clone()
        } else {
            with_part(before, block).context("no service")?
        };
        let errors = errors(dir.path(), &text)?;
        ensure!(errors.is_empty(), "{errors:?} in:\n{text}");
        checked += 1;
    }
    ensure!(checked >= 6, "only {checked} blocks were found");
    // It can be seen to be wrong.
    let wrong = whole.context("none")?.replace("preferred", "prefered");
    let errors = errors(dir.path(), &wrong)?;
    ensure!(errors[0].contains("prefered"), "{errors:?}");
    Ok(())
}
