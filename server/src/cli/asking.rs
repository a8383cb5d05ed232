//! Asking the running server over its control socket, and saying why it does not answer.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use havenfs::config;
use serde_json::Value;

use super::ControlArgs;

/// Asks the server that is named; what it can't do is an error.
pub(super) fn ask_server(args: &ControlArgs, request: &str) -> anyhow::Result<Value> {
    let path = args.control.clone().unwrap_or_else(config::default_control);
    let request = match &args.service {
        Some(service) => format!("@{service} {request}"),
        None => request.to_owned(),
    };
    let answer = ask(&path, &request)?;
    if let Some(error) = answer.get("error").and_then(Value::as_str) {
        anyhow::bail!("{error}");
    }
    Ok(answer)
}

/// Asks the server behind the socket at `path`.
pub(super) fn ask(path: &Path, request: &str) -> anyhow::Result<Value> {
    anyhow::ensure!(
        !request.contains('\n'),
        "a path with a line break can't be named here"
    );
    // `locks verify` goes on as long as the host does, and a node that is added has to be sent the
    // log.
    let is_long = ["verify ", "add ", "remove "];
    let is_long = is_long.iter().any(|word| request.contains(word));
    ask_within(path, request, (!is_long).then_some(ANSWER_MAX))
}

fn ask_within(path: &Path, request: &str, time_max: Option<Duration>) -> anyhow::Result<Value> {
    let place = path.display();
    let mut stream = UnixStream::connect(path).with_context(|| {
        format!(
            "no server answers on `{place}`\nhint: is `havenfs serve` running? name its socket \
             with --control"
        )
    })?;
    stream.set_read_timeout(time_max)?;
    let mut answer = String::new();
    let asked = stream
        .write_all(format!("{request}\n").as_bytes())
        .and_then(|()| stream.read_to_string(&mut answer));
    match asked {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            let seconds = time_max.unwrap_or_default().as_secs();
            anyhow::bail!(
                "a server runs on `{place}`, and does not answer within {seconds} s\nhint: it may be \
                 stopped, or its machine overloaded: see `systemctl status havenfs` and its log"
            )
        }
        // It ended with the question unread, or in the midst of the answer.
        Err(_) => anyhow::bail!(ended(path)),
        Ok(_) => serde_json::from_str(&answer).map_err(|_| anyhow::anyhow!(ended(path))),
    }
}

fn ended(path: &Path) -> String {
    format!(
        "the server on `{}` has not answered to the end; it may have ended meanwhile\nhint: see its \
         log, `journalctl -u havenfs`",
        path.display()
    )
}

/// How long a server that runs may be silent.
const ANSWER_MAX: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use std::os::unix::net::UnixListener;

    use super::*;

    fn error(path: &Path) -> String {
        let asked = ask_within(path, "status", Some(Duration::from_millis(50)));
        asked.unwrap_err().to_string()
    }

    #[test]
    fn it_is_told_apart_whether_nobody_is_there_or_somebody_is_silent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        assert!(error(&path).starts_with("no server answers on `"));
        // The kernel takes connections for a server that is stopped.
        let listener = UnixListener::bind(&path).unwrap();
        let silent = error(&path);
        assert!(silent.starts_with("a server runs on `"), "{silent}");
        let answering = std::thread::spawn(move || {
            // That of the question before, which nobody waits for any more.
            drop(listener.accept().unwrap());
            for said in ["", "{\"don", "\n\n{\"done\":\"it is served\"}"] {
                let (mut stream, _) = listener.accept().unwrap();
                stream.read_exact(&mut [0; 7]).unwrap();
                stream.write_all(said.as_bytes()).unwrap();
            }
        });
        for _ in 0..2 {
            let ended = error(&path);
            assert!(ended.starts_with("the server on `"), "{ended}");
        }
        // Empty lines say that it is still there.
        let answer = ask(&path, "status").unwrap();
        assert_eq!(answer["done"], "it is served");
        answering.join().unwrap();
    }
}
