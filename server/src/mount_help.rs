//! `havenfs mount-help HOST`: what to type on a client of each kind.
//!
//! Owns the texts and the options that matter. Asks nobody: what is served comes from the running
//! server's answers ([`Served::from_answers`]) or from the defaults.
//!
//! What decides the options is whether a portmapper is on its usual port. Without it a client must
//! be told both ports, which not every client can be. And since no client can be told the port of
//! NLM, each must then be told to keep locks to itself, or its programs hang or fail at the first
//! one.
//!
//! Source: nfs(5) of nfs-utils; mount_nfs(8) of macOS and of FreeBSD, whose client always asks
//! the portmapper for MOUNT; Microsoft's documentation of mount for Client for NFS.

use std::fmt::Write as _;

use havenfs_rpc::program;
use serde_json::Value;

use crate::config::Settings;

/// What a client has to know about the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// The exported directories; the first one is shown unless another is asked for.
    pub exports: Vec<ServedExport>,
    /// NFS's port.
    pub nfs_port: u16,
    /// MOUNT's port.
    pub mount_port: u16,
    /// Whether a portmapper tells these ports on port 111.
    pub has_portmapper: bool,
}

/// One exported directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedExport {
    /// What clients mount.
    pub path: String,
    /// Whether a rule insists on source ports below 1024.
    pub secure: bool,
    /// Whether no rule lets anybody write.
    pub read_only: bool,
}

impl Served {
    /// What a server with these settings serves, as far as the settings say.
    pub fn from_settings(settings: &Settings) -> Self {
        let chosen = |port, default| if port == 0 { default } else { port };
        Self {
            exports: Vec::new(),
            nfs_port: chosen(settings.nfs_port, program::NFS_PORT),
            mount_port: chosen(settings.mount_port, program::MOUNT_PORT),
            has_portmapper: settings.portmap != crate::register::PortmapMode::Off
                && settings.portmap_port == program::PORTMAP_PORT,
        }
    }

    /// What a running server serves, from its answers to `status` and `exports`; `None` if they
    /// don't say it.
    ///
    /// `status.portmapper` is the text of the ready line (`embedded`, `registered with rpcbind at
    /// ADDRESS:PORT`, `off ...`); without it only an embedded portmapper is known.
    pub fn from_answers(status: &Value, exports: &Value) -> Option<Self> {
        let ports = status.get("ports")?.as_array()?;
        let port_of = |number: u32| {
            let entry = ports
                .iter()
                .find(|entry| entry.get("program").and_then(Value::as_u64) == Some(number.into()));
            let port = entry?.get("port")?.as_u64()?;
            u16::try_from(port).ok()
        };
        let usual = format!(":{}", program::PORTMAP_PORT);
        let registered = status
            .get("portmapper")
            .and_then(Value::as_str)
            .is_some_and(|text| text.starts_with("registered") && text.ends_with(&usual));
        Some(Self {
            exports: exports
                .as_array()?
                .iter()
                .filter_map(ServedExport::from_answer)
                .collect(),
            nfs_port: port_of(program::NFS)?,
            mount_port: port_of(program::MOUNT)?,
            has_portmapper: registered || port_of(program::PORTMAP) == Some(program::PORTMAP_PORT),
        })
    }

    /// The export that a path lies in: the innermost.
    fn export_of(&self, path: &str) -> Option<&ServedExport> {
        let holds = |export: &&ServedExport| std::path::Path::new(path).starts_with(&export.path);
        let holding = self.exports.iter().filter(holds);
        holding.max_by_key(|export| export.path.len())
    }
}

impl ServedExport {
    fn from_answer(answer: &Value) -> Option<Self> {
        let rules = answer.get("rules")?.as_array()?;
        let has = |rule: &Value, word: &str| {
            let options = rule.get("options").and_then(Value::as_array);
            options.is_some_and(|options| options.iter().any(|option| option == word))
        };
        Some(Self {
            path: answer.get("path")?.as_str()?.to_owned(),
            secure: rules.iter().any(|rule| has(rule, "secure")),
            read_only: rules.iter().all(|rule| has(rule, "ro")),
        })
    }
}

/// Shown where it is not known what is exported.
const SOME_PATH: &str = "/srv/data";

/// The commands that mount from `host`, for each kind of client. `path` is what to mount: an
/// export or a directory in it; without one, the first export.
pub fn text(host: &str, path: Option<&str>, served: &Served) -> String {
    let first = served.exports.first().map(|export| export.path.as_str());
    let path = path.or(first).unwrap_or(SOME_PATH);
    let export = served.export_of(path);
    // Who is not known to be let in from any port must come from a reserved one.
    let secure = export.is_none_or(|export| export.secure);
    let mut out = String::new();
    head(&mut out, host, path, export, served);
    linux(&mut out, host, path, served);
    macos(&mut out, host, path, secure, served);
    freebsd(&mut out, host, path, served);
    windows(&mut out, host, path, secure, served);
    out.push_str(if served.has_portmapper {
        "\nLocks: programs on different clients exclude each other. For that the server calls back, so\n\
         let it reach port 111 and the ports of lockd and statd on the client.\n"
    } else {
        "\nWhy no locks: clients find the lock manager through a portmapper on port 111 of the server\n\
         alone, and there is none. With the options above programs lock among themselves on one\n\
         client; locks of different clients don't meet.\n"
    });
    out
}

/// Adds a line; a `String` takes whatever it is given.
fn put(out: &mut String, line: std::fmt::Arguments<'_>) {
    let _ = writeln!(out, "{line}");
}

fn head(out: &mut String, host: &str, path: &str, export: Option<&ServedExport>, served: &Served) {
    let Served {
        nfs_port,
        mount_port,
        ..
    } = served;
    let portmapper = if served.has_portmapper {
        "a portmapper tells them"
    } else {
        "no portmapper tells them, so they are named below"
    };
    put(
        out,
        format_args!(
            "Mounting {path} from {host} (NFS port {nfs_port}, MOUNT port {mount_port};\n\
             {portmapper})"
        ),
    );
    match export {
        Some(export) if export.read_only => {
            put(out, format_args!("It is exported read-only."));
        }
        None if !served.exports.is_empty() => {
            let paths: Vec<&str> = served.exports.iter().map(|e| e.path.as_str()).collect();
            put(
                out,
                format_args!(
                    "note: {path} is not exported; exported are {}",
                    paths.join(", ")
                ),
            );
        }
        _ => {}
    }
}

/// A host as it stands before `:PATH`: IPv6 addresses take brackets.
fn in_brackets(host: &str) -> String {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if bare.parse::<std::net::Ipv6Addr>().is_ok() {
        format!("[{bare}]")
    } else {
        host.to_owned()
    }
}

/// Quotes a word for a POSIX shell if it needs it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:,=[]".contains(c);
    if word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

fn linux(out: &mut String, host: &str, path: &str, served: &Served) {
    let options = if served.has_portmapper {
        "vers=3".to_owned()
    } else {
        format!(
            "vers=3,nolock,proto=tcp,port={},mountproto=tcp,mountport={}",
            served.nfs_port, served.mount_port
        )
    };
    let source = quoted(&format!("{}:{path}", in_brackets(host)));
    put(
        out,
        format_args!("\nLinux (as root; Debian and Ubuntu: apt-get install nfs-common)"),
    );
    put(
        out,
        format_args!("  mount -t nfs -o {options} {source} /mnt"),
    );
    put(out, format_args!("or in /etc/fstab"));
    let word = format!("{}:{}", in_brackets(host), path.replace(' ', "\\040"));
    put(
        out,
        format_args!("  {word}  /mnt  nfs  {options},_netdev  0  0"),
    );
}

fn macos(out: &mut String, host: &str, path: &str, secure: bool, served: &Served) {
    let mut options = "vers=3,tcp".to_owned();
    if !served.has_portmapper {
        options.push_str(",locallocks");
    }
    if secure {
        options.push_str(",resvport");
    }
    if !served.has_portmapper {
        let _ = write!(
            options,
            ",port={},mountport={}",
            served.nfs_port, served.mount_port
        );
    }
    let source = quoted(&format!("{}:{path}", in_brackets(host)));
    put(out, format_args!("\nmacOS"));
    put(
        out,
        format_args!("  mkdir -p ~/nfs && sudo mount -t nfs -o {options} {source} ~/nfs"),
    );
    if secure {
        put(
            out,
            format_args!(
                "  (resvport: the export is `secure`, and macOS comes from high ports by itself)"
            ),
        );
    }
}

fn freebsd(out: &mut String, host: &str, path: &str, served: &Served) {
    let mut options = "nfsv3,tcp".to_owned();
    if served.nfs_port != program::NFS_PORT {
        let _ = write!(options, ",port={}", served.nfs_port);
    }
    let source = quoted(&format!("{}:{path}", in_brackets(host)));
    put(out, format_args!("\nFreeBSD (as root)"));
    put(
        out,
        format_args!("  mount -t nfs -o {options} {source} /mnt"),
    );
    if served.has_portmapper {
        put(
            out,
            format_args!(
                "  (locks need its own daemons: sysrc rpc_lockd_enable=YES rpc_statd_enable=YES, \
                 then\n   service statd start && service lockd start; or mount with nolockd)"
            ),
        );
    } else {
        put(
            out,
            format_args!(
                "  (needs a portmapper on port 111 of the server: this client can't be told \
                 MOUNT's\n   port)"
            ),
        );
    }
}

fn windows(out: &mut String, host: &str, path: &str, secure: bool, served: &Served) {
    let host = match host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<std::net::Ipv6Addr>()
    {
        // A UNC name can't hold colons; Windows knows this spelling for such addresses, of which
        // none may begin with a dash.
        Ok(address) => {
            let dashed = address.to_string().replace(':', "-");
            let zero = if dashed.starts_with('-') { "0" } else { "" };
            format!("{zero}{dashed}.ipv6-literal.net")
        }
        Err(_) => host.to_owned(),
    };
    let unc = format!("\\\\{host}{}", path.replace('/', "\\"));
    let unc = if unc.contains(' ') {
        format!("\"{unc}\"")
    } else {
        unc
    };
    put(
        out,
        format_args!(
            "\nWindows (turn the feature \"Client for NFS\" on first; in cmd, not as administrator)"
        ),
    );
    put(out, format_args!("  mount -o anon,mtype=hard {unc} X:"));
    put(
        out,
        format_args!(
            "  (anon: calls come as user and group -2, so let that user write, or export with\n   \
             all_squash,anonuid=UID,anongid=GID; mtype=hard: wait for the server, not give up)"
        ),
    );
    if secure {
        put(
            out,
            format_args!(
                "  (if the mount is refused: `nfsadmin client config UseReservedPorts=yes`, or \
                 export\n   with insecure)"
            ),
        );
    }
    if !served.has_portmapper {
        put(
            out,
            format_args!(
                "  (needs a portmapper on port 111 of the server: this client can't be told ports)"
            ),
        );
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use serde_json::json;

    use super::*;

    fn answers(nfs: u16, portmapper: Option<&str>, options: &[&str]) -> (Value, Value) {
        let mut status = json!({ "ports": [
            { "program": 100_003, "version": 3, "netid": "tcp", "port": nfs },
            { "program": 100_005, "version": 3, "netid": "udp", "port": 20_048 },
        ] });
        if let Some(text) = portmapper {
            status["portmapper"] = text.into();
        }
        let exports = json!([
            { "path": "/srv/data", "rules": [{ "client": "*", "options": options }] },
            { "path": "/srv/data/inner", "rules": [{ "client": "*", "options": ["ro"] }] },
        ]);
        (status, exports)
    }

    fn line<'t>(text: &'t str, start: &str) -> &'t str {
        let mut lines = text.lines().map(str::trim_start);
        lines.find(|line| line.starts_with(start)).unwrap()
    }

    #[test]
    fn with_a_portmapper_no_port_is_named() {
        let registered = "registered with rpcbind at 127.0.0.1:111";
        let (status, exports) = answers(2049, Some(registered), &["rw", "secure"]);
        let served = Served::from_answers(&status, &exports).unwrap();
        let text = text("nfs-service", None, &served);
        assert_eq!(
            line(&text, "mount -t nfs -o vers"),
            "mount -t nfs -o vers=3 nfs-service:/srv/data /mnt"
        );
        assert_eq!(
            line(&text, "mkdir"),
            "mkdir -p ~/nfs && sudo mount -t nfs -o vers=3,tcp,resvport \
             nfs-service:/srv/data ~/nfs"
        );
        assert_eq!(
            line(&text, "mount -t nfs -o nfsv3"),
            "mount -t nfs -o nfsv3,tcp nfs-service:/srv/data /mnt"
        );
        assert_eq!(
            line(&text, "mount -o anon,mtype=hard"),
            "mount -o anon,mtype=hard \\\\nfs-service\\srv\\data X:"
        );
        assert!(!text.contains("needs a portmapper"), "{text}");
        assert!(
            text.contains("different clients exclude each other"),
            "{text}"
        );
        // rpcbind on another port, where no client looks.
        let (status, exports) = answers(2049, Some("registered with rpcbind at [::1]:1110"), &[]);
        let served = Served::from_answers(&status, &exports).unwrap();
        assert!(!served.has_portmapper);
    }

    #[test]
    fn without_a_portmapper_both_ports_are_named() {
        let (status, exports) = answers(12_049, Some("off (as asked)"), &["rw", "insecure"]);
        let served = Served::from_answers(&status, &exports).unwrap();
        let text = text("2001:db8::7", Some("/srv/data/a b"), &served);
        assert_eq!(
            line(&text, "mount -t nfs -o vers"),
            "mount -t nfs -o vers=3,nolock,proto=tcp,port=12049,mountproto=tcp,mountport=20048 \
             '[2001:db8::7]:/srv/data/a b' /mnt"
        );
        let macos = line(&text, "mkdir");
        assert!(macos.contains("-o vers=3,tcp,locallocks,port=12049,mountport=20048 "));
        assert!(text.contains("Why no locks"), "{text}");
        assert!(text.contains("[2001:db8::7]:/srv/data/a\\040b  /mnt  nfs"));
        assert_eq!(
            line(&text, "mount -o anon,mtype=hard"),
            "mount -o anon,mtype=hard \"\\\\2001-db8--7.ipv6-literal.net\\srv\\data\\a b\" X:"
        );
        assert_eq!(text.matches("needs a portmapper").count(), 2, "{text}");
    }

    #[test]
    fn an_embedded_portmapper_is_known_by_its_port() {
        let (mut status, exports) = answers(2049, None, &["rw"]);
        assert!(
            !Served::from_answers(&status, &exports)
                .unwrap()
                .has_portmapper
        );
        let own = json!({ "program": 100_000, "version": 2, "netid": "tcp", "port": 111 });
        status["ports"].as_array_mut().unwrap().push(own);
        assert!(
            Served::from_answers(&status, &exports)
                .unwrap()
                .has_portmapper
        );
        assert_eq!(Served::from_answers(&json!({}), &exports), None);
    }

    #[test]
    fn the_innermost_export_decides_and_a_stranger_is_told() {
        let (status, exports) = answers(2049, None, &["rw", "secure"]);
        let served = Served::from_answers(&status, &exports).unwrap();
        let inner = text("h", Some("/srv/data/inner/x"), &served);
        assert!(inner.contains("exported read-only"), "{inner}");
        assert!(!inner.contains("resvport"), "{inner}");
        let other = text("h", Some("/srv/database"), &served);
        assert!(
            other
                .contains("/srv/database is not exported; exported are /srv/data, /srv/data/inner"),
            "{other}"
        );
    }
}
