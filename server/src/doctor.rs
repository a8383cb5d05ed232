//! `havenfs doctor`: what would stand in the way of `serve` here, and what each lack costs.
//!
//! Owns looking and telling. It never changes anything: no file is written, no entry is set in
//! rpcbind, every port that is tried is closed again before a client could reach it. It works as
//! any user, and sees what that user may see; most findings are about the rights of the process
//! itself, so it is to be run as the user that will serve.
//!
//! A finding is an error if `serve` will refuse to start or an export can't be served, a warning
//! if something is lost or will be in the way later, and fine otherwise. Nothing here decides
//! anything for `serve`, which makes its own checks.
//!
//! - `cluster`: the key, addresses, interfaces, and the commands of services.
//! - `plan`: what a configuration means, for `havenfs config check`, which is told as findings too.
//! - `ports`: who holds our ports, the portmapper, other servers in the kernel or in rpcbind.
//! - `rights`: capabilities, user namespace, limit of open files.
//! - `storage`: the file systems of the exports and of the state directory.
//! - `mounts`: which file system a path lies on, as the kernel's table says.
//! - `names`: host names of the exports, names of the services, and our own.
//! - `server`: whether a havenfs runs already, as its control socket says.

use std::fmt;

use serde::Serialize;

use self::mounts::{Mount, Mounts};
use crate::config::cluster::NodeConfig;
use crate::config::service::{ServiceConfig, Storage};
use crate::export::{self, DirectoryFault, ExportSpec, Loaded, Problem};

mod cluster;
mod mounts;
mod names;
mod plan;
mod ports;
mod rights;
mod server;
mod storage;
#[cfg(test)]
mod tests;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// It works, but something is lost or will be in the way.
    Warning,
    /// `serve` will refuse to start, or an export can't be served.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about: `server`, `ports`, `portmapper`, `kernel`, `rights`, `limits`, `exports`,
    /// `storage`, `state` or `names`; of a cluster `key`, `members`, `addresses` or `commands`. A
    /// plan has more of them.
    pub topic: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub text: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Everything that was found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Report {
    /// In the order of looking.
    pub findings: Vec<Finding>,
}

impl Report {
    /// A report that says no more than that something can't be used; a line that begins with
    /// `hint: ` is the hint.
    pub fn of_error(topic: &'static str, text: &str) -> Self {
        let mut report = Self::default();
        let (text, hint) = match text.split_once("\nhint: ") {
            Some((text, hint)) => (text, Some(hint.to_owned())),
            None => (text, None),
        };
        report.add(topic, Severity::Error, text.to_owned(), hint);
        report
    }

    /// The worst severity; [`Severity::Ok`] if there is no finding.
    pub fn worst(&self) -> Severity {
        let severities = self.findings.iter().map(|finding| finding.severity);
        severities.max().unwrap_or(Severity::Ok)
    }

    fn count(&self, severity: Severity) -> usize {
        let findings = self.findings.iter();
        findings
            .filter(|finding| finding.severity == severity)
            .count()
    }

    fn add(&mut self, topic: &'static str, severity: Severity, text: String, hint: Option<String>) {
        self.findings.push(Finding {
            topic,
            severity,
            text,
            hint,
        });
    }

    fn ok(&mut self, topic: &'static str, text: impl Into<String>) {
        self.add(topic, Severity::Ok, text.into(), None);
    }

    fn warning(&mut self, topic: &'static str, text: impl Into<String>, hint: impl Into<String>) {
        self.add(topic, Severity::Warning, text.into(), Some(hint.into()));
    }

    fn error(&mut self, topic: &'static str, text: impl Into<String>, hint: impl Into<String>) {
        self.add(topic, Severity::Error, text.into(), Some(hint.into()));
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// Columns before the text of a finding.
const INDENT: usize = 21;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            let Finding {
                topic,
                severity,
                text,
                hint,
            } = finding;
            let (first, rest) = text.split_once('\n').unwrap_or((text, ""));
            writeln!(f, "{severity:<8} {topic:<11} {first}")?;
            let hint = hint.iter().flat_map(|hint| hint.lines());
            let hints = hint.map(|line| format!("hint: {line}"));
            for line in rest.lines().map(str::to_owned).chain(hints) {
                writeln!(f, "{:INDENT$}{line}", "")?;
            }
        }
        let (errors, warnings) = (self.count(Severity::Error), self.count(Severity::Warning));
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        writeln!(
            f,
            "{errors} error{}, {warnings} warning{}",
            plural(errors),
            plural(warnings)
        )
    }
}

pub use self::plan::explain;

/// Looks at everything that `serve` with this configuration would need.
pub fn run(config: &NodeConfig) -> Report {
    let settings = &config.settings;
    let mut report = Report::default();
    let running = server::look(&mut report, settings);
    ports::look(&mut report, settings, running.as_ref());
    rights::look(&mut report, settings);
    cluster::look(&mut report, config, running.as_ref());
    let mounts = Mounts::read();
    let services = config.services.iter();
    let specs = services.flat_map(|service| look_at_exports(&mut report, service, &mounts));
    let specs: Vec<ExportSpec> = specs.collect();
    storage::look_at_exports(&mut report, &specs, &mounts);
    storage::look_at_state(&mut report, settings, &specs, &mounts, running.as_ref());
    names::look(&mut report, &config.services, &specs);
    report
}

/// Reads the export lists; returns those exports whose directory can be looked at further.
fn look_at_exports(
    report: &mut Report,
    service: &ServiceConfig,
    mounts: &Mounts,
) -> Vec<ExportSpec> {
    let topic = "exports";
    let Loaded { specs, warnings } = match export::load(&service.settings.sources) {
        Ok(loaded) => loaded,
        Err(errors) => {
            for problem in &errors.0 {
                tell(report, problem);
            }
            return Vec::new();
        }
    };
    for problem in &warnings {
        tell(report, problem);
    }
    if specs.is_empty() {
        report.warning(
            topic,
            "no directory is exported",
            "name one with --export, or list it in /etc/exports; `serve` refuses to start without",
        );
        return specs;
    }
    // What is mounted with the service is not there where it is not served; what is in its place is
    // an empty directory of this machine.
    let is_there = |spec: &ExportSpec| {
        let is_brought = service.hooks.takeover.is_some();
        !is_brought || spec.path.exists() && !mounts.is_on_root(&spec.path)
    };
    let (specs, later): (Vec<_>, Vec<_>) = specs.into_iter().partition(is_there);
    for spec in &later {
        report.ok(
            topic,
            format!("{spec}, once the takeover_command has brought it"),
        );
    }
    let faults = export::check_directories(&specs);
    for fault in &faults {
        tell(report, &fault.problem);
    }
    let usable = |spec: &ExportSpec| {
        let mut faults = faults.iter().filter(|fault| fault.path == spec.path);
        faults.all(|fault| fault.fault == DirectoryFault::SameDirectory)
    };
    let usable: Vec<ExportSpec> = specs.into_iter().filter(usable).collect();
    for spec in &usable {
        report.ok(topic, spec.to_string());
        if service.storage == Some(Storage::ClusterFs)
            && let Some(kind) = mounts.of(&spec.path).and_then(Mount::of_one_machine)
        {
            report.warning(
                "storage",
                format!(
                    "`{}`: storage = \"cluster-fs\", and {kind} is none: if two machines mount it \
                     at a time, it is destroyed",
                    spec.path.display()
                ),
                "fine where all nodes are on this machine; else see docs/guide.md 3 for a disk that \
                 one node has at a time",
            );
        }
    }
    usable
}

fn tell(report: &mut Report, problem: &Problem) {
    let severity = match problem.severity {
        export::Severity::Error => Severity::Error,
        export::Severity::Warning => Severity::Warning,
    };
    let text = format!("{}: {}", problem.origin, problem.message);
    report.add("exports", severity, text, problem.hint.clone());
}
