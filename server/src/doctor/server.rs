//! Whether a havenfs runs already, as the one that answers on the control socket says.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::Report;
use crate::config::Settings;

/// How long the server has for its answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);
/// The longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// A havenfs that runs.
#[derive(Debug)]
pub(super) struct Running {
    /// Its process.
    pub(super) pid: u64,
    /// Program, version and port of what it serves.
    ports: Vec<(u64, u64, u64)>,
}

impl Running {
    /// Whether it serves this program and version on this port.
    pub(super) fn serves(&self, program: u32, version: u32, port: u32) -> bool {
        self.ports
            .contains(&(program.into(), version.into(), port.into()))
    }

    /// Whether a port's holder, as `register::port_holder` describes it, is this server.
    pub(super) fn is_holder(&self, holder: Option<&str>) -> bool {
        holder.is_some_and(|holder| holder.ends_with(&format!("(pid {})", self.pid)))
    }
}

/// Asks the control socket.
pub(super) fn look(report: &mut Report, settings: &Settings) -> Option<Running> {
    let path = settings.control.display();
    match ask(&settings.control) {
        Ok(status) => {
            let number = |value: &Value, name: &str| value.get(name).and_then(Value::as_u64);
            let pid = number(&status, "pid")?;
            let ports = status.get("ports").and_then(Value::as_array);
            let port = |entry: &Value| {
                let get = |name| number(entry, name);
                Some((get("program")?, get("version")?, get("port")?))
            };
            report.ok(
                "server",
                format!("havenfs runs (process {pid}) and answers on `{path}`"),
            );
            Some(Running {
                pid,
                ports: ports.into_iter().flatten().filter_map(port).collect(),
            })
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            report.warning(
                "server",
                format!("this user may not ask the control socket `{path}`"),
                "run `havenfs doctor` as the user that serves",
            );
            None
        }
        // No socket, or one that a dead server left behind, which `serve` replaces.
        Err(_) => {
            report.ok("server", format!("no havenfs answers on `{path}`"));
            None
        }
    }
}

fn ask(path: &Path) -> io::Result<Value> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
    stream.set_write_timeout(Some(ANSWER_TIME_MAX))?;
    stream.write_all(b"status\n")?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}
