//! A cluster whose nodes run commands for the storage of their service.
//!
//! The commands are small scripts that write a line each into one file, so that the order of the
//! lines is the order in which they ran. A script fails, or hangs, as long as a file says so.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::cluster::{Cluster, NODES, Serving};

use crate::scene::{ALPHA, ONE};

/// What each script begins with: its line, and its failure.
const BEGIN: &str = r#"#!/bin/sh
echo "$1 $HAVENFS_NODE lost=$HAVENFS_LOST_NODE epoch=$HAVENFS_EPOCH $HAVENFS_REASON" >> "$2/events"
echo "$HAVENFS_SERVICE $HAVENFS_ADDRESSES" > "$2/service"
if [ -e "$2/$1-fails-on-$HAVENFS_NODE" ]; then
    echo "more about it"
    echo "the $1 has no power" >&2
    exit 3
fi
if [ -e "$2/$1-hangs-on-$HAVENFS_NODE" ]; then
    echo $$ > "$2/hangs.new"
    mv "$2/hangs.new" "$2/hangs"
    exec sleep 600
fi
"#;
/// The storage appears with its takeover, and must not be open when it is let go.
const TAKEOVER: &str = r#"mkdir -p "$2/export-alpha" && chmod 0777 "$2/export-alpha""#;
const RELEASE: &str = r#"
if ls -l /proc/$PPID/fd | grep -F "$2/export-"; then
    exit 9
fi
"#;

/// A cluster with commands.
pub(crate) struct Hooked {
    pub(crate) cluster: Cluster,
}

impl Hooked {
    /// Runs a test on a cluster whose nodes are told to run commands; its failure shows their logs.
    pub(crate) fn run(test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let hooked = Self::new(|text, commands| {
            let commands = format!("storage = \"fence\"\n{commands}");
            text.replace("storage = \"cluster-fs\"\n", &commands)
        })?;
        hooked.shown(|hooked| {
            hooked.cluster.start()?;
            test(hooked)
        })
    }

    /// A cluster that does not run yet. `configure` is given what the configuration of a node says
    /// without commands, and the lines about them.
    pub(crate) fn new(configure: impl Fn(&str, &str) -> String) -> Result<Self> {
        let cluster = Cluster::new(&ONE)?;
        let dir = cluster.site.path().to_path_buf();
        let mut commands = "hook_seconds = 20\n".to_owned();
        for (name, more) in [("fence", ""), ("takeover", TAKEOVER), ("release", RELEASE)] {
            let script = dir.join(format!("{name}.sh"));
            fs::write(&script, format!("{BEGIN}{more}"))?;
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
            writeln!(
                commands,
                "{name}_command = [\"{}\", \"{name}\", \"{}\"]",
                script.display(),
                dir.display()
            )?;
        }
        for node in NODES {
            let text = cluster.site.config_text(node)?;
            fs::write(cluster.site.config(node), configure(&text, &commands))?;
        }
        fs::remove_dir(cluster.site.export(ALPHA))?;
        Ok(Self { cluster })
    }

    pub(crate) fn shown(mut self, test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let result = test(&mut self);
        if result.is_err() {
            self.cluster.show_logs();
            eprintln!("--- events\n{}", self.events().join("\n"));
        }
        result
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.cluster.site.path().join(name)
    }

    /// What has run, in its order, but for what a node lets go when it begins: that is at any time.
    pub(crate) fn events(&self) -> Vec<String> {
        let mut events = self.all_events();
        events.retain(|line| !is_beginning(line));
        events
    }

    /// What has run, in its order.
    pub(crate) fn all_events(&self) -> Vec<String> {
        let events = fs::read_to_string(self.path("events")).unwrap_or_default();
        events.lines().map(str::to_owned).collect()
    }

    /// Has a command fail on a node, or work again.
    pub(crate) fn fails(&self, command: &str, node: &str, fails: bool) -> Result<()> {
        set(&self.path(&format!("{command}-fails-on-{node}")), fails)
    }

    /// Has a command hang on a node, or work again.
    pub(crate) fn hangs(&self, command: &str, node: &str, hangs: bool) -> Result<()> {
        set(&self.path(&format!("{command}-hangs-on-{node}")), hangs)
    }

    /// Waits until a command hangs; returns the place of its process.
    pub(crate) fn wait_hangs(&self) -> Result<PathBuf> {
        let id = self.cluster.wait("a command hangs", |_| {
            fs::read_to_string(self.path("hangs")).ok()
        })?;
        let process = Path::new("/proc").join(id.trim());
        ensure!(!has_ended(&process), "it has ended before it was seen");
        Ok(process)
    }

    /// Kills the node that serves while no fence succeeds; returns it, and the node that has the
    /// service and can't open it, once that has said why.
    pub(crate) fn lose_without_fence(&mut self) -> Result<(Serving, &'static str)> {
        let before = self.cluster.wait_serving(ALPHA, |_| true)?;
        for node in NODES {
            self.fails("fence", node, true)?;
        }
        self.cluster.kill(before.node)?;
        let others = self.cluster.others(&[before.node]);
        let said = format!(
            "fence hook for node `{}` exited with status 3: the fence has no power",
            before.node
        );
        let next = self.cluster.wait("a fence fails", |cluster| {
            let mut others = others.iter();
            others
                .find(|node| cluster.log(node).is_ok_and(|log| log.contains(&said)))
                .copied()
        })?;
        let log = self.cluster.log(next)?;
        let hint = format!("service confirm-fence {ALPHA} --node {}", before.node);
        ensure!(
            log.contains("which stays down") && log.contains(&hint),
            "{log}"
        );
        ensure!(log.contains("more about it"), "{log}");
        Ok((before, next))
    }

    /// The service is assigned to a node, and not served.
    pub(crate) fn is_down_on(&self, node: &str, unfenced: &str) -> Result<()> {
        let serving = self.cluster.serving(ALPHA)?;
        ensure!(serving.is_none(), "{serving:?}");
        let status = self.cluster.status(node)?;
        let service = &status["services"][0];
        ensure!(service["active"] == *node, "{status}");
        ensure!(service["unfenced"][0] == *unfenced, "{status}");
        Ok(())
    }
}

/// Whether a process has ended; also if nobody has waited for it.
pub(crate) fn has_ended(process: &Path) -> bool {
    fs::read_to_string(process.join("stat")).map_or(true, |stat| stat.contains(") Z "))
}

/// Whether an event is a node's that begins, and lets go what an earlier life of it may have left.
fn is_beginning(event: &str) -> bool {
    event.starts_with("release") && event.ends_with("start")
}

fn set(path: &Path, is_there: bool) -> Result<()> {
    if is_there {
        fs::write(path, "")
    } else {
        fs::remove_file(path)
    }
    .with_context(|| format!("cannot change {}", path.display()))
}
