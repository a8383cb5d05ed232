//! What the nodes of a lab's cluster export, and how it gets from one to the next.
//!
//! Owns the trees and images, what the configuration says of them, what a power cut leaves of them,
//! and the reading of files in the end. The commands that mount an image are
//! `tests/lab/image-hook`, which a test can hold in the middle of a takeover; `tests/lab/image-cut`
//! is the power cut.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::{Cluster, Service, host_of};
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

/// A step of a takeover of an image in which a test can hold a node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// Before the node that lost the service is fenced.
    Fence,
    /// When the image is mounted, and before the node may open it.
    Mount,
}

impl Step {
    const fn name(self) -> &'static str {
        match self {
            Self::Fence => "fence",
            Self::Mount => "mount",
        }
    }

    /// What the commands say of a node that is held in it.
    #[must_use]
    pub fn words_of(self, node: &str) -> String {
        format!("{node} hangs in {}", self.name())
    }
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
        let hook = lab_script("image-hook");
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

    /// Takes from a host that loses its power what it has not written yet. It hears and says
    /// nothing any more then, since it would tell clients of a disk that it has not in truth.
    ///
    /// # Errors
    /// What is left is a file system that was ended in order.
    pub(super) fn cut_storage(&self, name: &str) -> Result<()> {
        if self.plan.storage == Storage::Tree {
            return Ok(());
        }
        self.lab.cut(host_of(name))?;
        self.cut_from_peers(name)?;
        for service in &self.plan.services {
            let place = self.place(service.name);
            let before = fs::metadata(&place)?.ino();
            let mut cut = self.host(name).command(lab_script("image-cut"))?;
            script_must_succeed(cut.arg(&place).arg(service.export))?;
            let is_cut = fs::metadata(&place)?.ino() != before;
            ensure!(
                !is_cut || needs_recovery(&place)?,
                "{name} left nothing in its journal"
            );
        }
        Ok(())
    }

    /// Has the commands of a service hang on a node when it comes to that step.
    pub fn hold(&self, service: &str, name: &str, step: Step) -> Result<()> {
        fs::write(self.hold_file(service, name, step), "")?;
        Ok(())
    }

    /// Lets them go on.
    pub fn let_go(&self, service: &str, name: &str, step: Step) -> Result<()> {
        fs::remove_file(self.hold_file(service, name, step))?;
        Ok(())
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
        if self.plan.storage == Storage::Tree {
            return Ok(fs::read(self.place(service).join(name))?);
        }
        self.end_image(service)?;
        self.debugfs(service, &format!("cat /{name}"))
    }

    /// As [`Cluster::file_in_the_end`], a directory of an image; returns where it is copied to.
    pub fn directory_in_the_end(&mut self, service: &str, name: &str) -> Result<PathBuf> {
        self.end_image(service)?;
        let copy = self.place(service).with_extension("copy");
        fs::create_dir_all(&copy)?;
        self.debugfs(service, &format!("rdump /{name} {}", copy.display()))?;
        Ok(copy)
    }

    fn end_image(&mut self, service: &str) -> Result<()> {
        for node in self.running().collect::<Vec<_>>() {
            self.stop(node)?;
        }
        ensure!(!self.is_mounted(service)?, "the image is still mounted");
        // It changes nothing, and finds a journal that would have to be replayed.
        let place = self.place(service);
        script_must_succeed(Command::new("e2fsck").arg("-fn").arg(&place))
    }

    fn debugfs(&self, service: &str, request: &str) -> Result<Vec<u8>> {
        let mut command = Command::new("debugfs");
        command.args(["-R", request]).arg(self.place(service));
        let output = command.output()?;
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

    fn hold_file(&self, service: &str, name: &str, step: Step) -> PathBuf {
        let kind = format!("events.hold-{name}-{}", step.name());
        self.place(service).with_extension(kind)
    }
}

fn lab_script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("lab").join(name)
}

/// Whether a file system of ext4 was not ended in order, so that its journal is to be replayed.
fn needs_recovery(image: &Path) -> Result<bool> {
    let mut features = [0; 4];
    fs::File::open(image)?.read_exact_at(&mut features, INCOMPATIBLE_FEATURES_AT)?;
    Ok(u32::from_le_bytes(features) & NEEDS_RECOVERY != 0)
}

/// Sparse; with room for a journal.
const IMAGE_BYTES: u64 = 64 << 20;
/// Of the superblock, which begins at 1024.
const INCOMPATIBLE_FEATURES_AT: u64 = 1024 + 0x60;
const NEEDS_RECOVERY: u32 = 4;
