//! What the nodes of a lab's cluster export, and how it gets from one to the next.
//!
//! Owns the trees and images, what the configuration says of them, and the reading of a file in the
//! end. The commands that mount an image are `tests/lab/image-hook`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::{Cluster, Service};
use crate::lab::{Output, script_must_succeed};

/// Where the files of a service lie.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Storage {
    /// In a directory of the machine that all hosts see, as a cluster file system shows it.
    #[default]
    Tree,
    /// In ext4, with its journal, in an image that one host at a time may mount.
    Image,
}

impl Cluster<'_> {
    pub(super) fn make_storage(&self) -> Result<()> {
        for service in &self.plan.services {
            let place = self.place(service.name);
            match self.plan.storage {
                Storage::Tree => {
                    fs::create_dir_all(&place)?;
                    fs::set_permissions(&place, fs::Permissions::from_mode(0o777))?;
                }
                Storage::Image => {
                    fs::create_dir_all(place.parent().context("a directory")?)?;
                    fs::File::create(&place)?.set_len(IMAGE_BYTES)?;
                    let mut make = Command::new("mkfs.ext4");
                    script_must_succeed(make.arg("-q").arg(&place))?;
                }
            }
        }
        Ok(())
    }

    /// Mounts what a host exports all the time; a host that boots has nothing mounted.
    pub(super) fn mount_storage(&self, name: &str) -> Result<()> {
        for service in &self.plan.services {
            let (place, export) = (self.place(service.name), service.export);
            let mut line = format!("mkdir -p {export}");
            if self.plan.storage == Storage::Tree {
                line = format!("{line} && mount --bind {} {export}", place.display());
            }
            self.host(name).sh(&line)?;
        }
        Ok(())
    }

    /// What the configuration of a service says of its storage.
    pub(super) fn storage_text(&self, service: &Service) -> String {
        if self.plan.storage == Storage::Tree {
            return "storage = \"cluster-fs\"\n".to_owned();
        }
        let hook = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/image-hook");
        let (image, events) = (self.place(service.name), self.events_file(service.name));
        let command = |verb: &str| {
            let [hook, image, events] = [&hook, &image, &events].map(|path| path.display());
            format!(
                "{verb}_command = [\"{hook}\", \"{verb}\", \"{image}\", \"{}\", \"{events}\"]\n",
                service.export
            )
        };
        let commands = ["fence", "takeover", "release"].map(command).concat();
        format!("storage = \"fence\"\n{commands}")
    }

    /// What the commands of a service have done, in its order.
    pub fn events(&self, service: &str) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.events_file(service))?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Whether a host has the image of a service mounted.
    pub fn is_mounted(&self, service: &str) -> Result<bool> {
        let mut ask = Command::new("losetup");
        ask.args(["-n", "-O", "NAME", "-j"]);
        let found = Output::from(ask.arg(self.place(service)).output()?);
        Ok(!found.success("losetup")?.is_empty())
    }

    /// A file of a service as it is when all is over: an image is looked at from outside, so its
    /// nodes end first, and must leave nothing behind.
    pub fn file_in_the_end(&mut self, service: &str, name: &str) -> Result<Vec<u8>> {
        let place = self.place(service);
        if self.plan.storage == Storage::Tree {
            return Ok(fs::read(place.join(name))?);
        }
        for node in self.running().collect::<Vec<_>>() {
            self.stop(node)?;
        }
        ensure!(!self.is_mounted(service)?, "the image is still mounted");
        // It changes nothing, and finds a journal that would have to be replayed.
        script_must_succeed(Command::new("e2fsck").arg("-fn").arg(&place))?;
        let mut read = Command::new("debugfs");
        let read = read.arg("-R").arg(format!("cat /{name}"));
        let output = read.arg(&place).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(output.stdout)
    }

    /// The directory or image of a service.
    fn place(&self, service: &str) -> PathBuf {
        self.lab.run.join("storage").join(service)
    }

    fn events_file(&self, service: &str) -> PathBuf {
        self.place(service).with_extension("events")
    }
}

/// Sparse; with room for a journal.
const IMAGE_BYTES: u64 = 64 << 20;
