//! Programs of the machine that tests with disks of their own run. They need root.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// A test that needs root says so, since what it proves would be missing else.
pub(crate) fn is_root() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "disks need root: run ./test --user to leave this out"
    );
    Ok(())
}

/// Runs a program, which has to succeed.
pub(crate) fn sh(words: &[&str]) -> Result<()> {
    let output = Command::new(words[0]).args(&words[1..]).output();
    let output = output.with_context(|| words.join(" "))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", words.join(" "));
    Ok(())
}

/// A path as a word.
pub(crate) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
