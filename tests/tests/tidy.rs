//! The rules of the house that no compiler checks: who may know what, and what sources look like.
//!
//! Reads manifests and source text only, so a failure names a file and a line. Text in comments
//! does not count where code is meant; a test says in its name and its messages what the rule is.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use toml::{Table, Value};

/// A file longer than this has more than one subject.
const LINES_MAX: usize = 800;
/// rustfmt's width, which it does not enforce in comments.
const COLUMNS_MAX: usize = 100;
/// How far above a pause its deadline may be checked.
const DEADLINE_WITHIN_LINES: usize = 12;

/// Tests that sleep for another reason than to look again at a condition with a deadline.
const SLEEPERS: [(&str, &str); 1] = [(
    "tests/tests/power_cut.rs",
    "the power must fail at a moment that no condition picks",
)];

/// A source file, with its path from the root of the checkout.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn is_under(&self, folder: &str) -> bool {
        self.path
            .strip_prefix(folder)
            .is_some_and(|rest| rest.starts_with('/'))
    }

    /// The lines with their numbers, without comments and without what stands in quotation marks.
    fn code(&self) -> impl Iterator<Item = (usize, String)> {
        (1..).zip(self.text.lines().map(code_of))
    }

    /// The lines as they are, with their numbers.
    fn whole(&self) -> impl Iterator<Item = (usize, String)> {
        (1..).zip(self.text.lines().map(str::to_owned))
    }

    /// The line on which the unit tests begin: the first one where all is a test.
    fn tests_from(&self) -> usize {
        let path = &self.path;
        if self.is_under("tests") || path.contains("/tests/") || path.ends_with("/tests.rs") {
            return 1;
        }
        let lines: Vec<&str> = self.text.lines().collect();
        let begins = |at: &usize| {
            lines[*at] == "#[cfg(test)]" && lines[*at..].iter().any(|line| line.contains("mod "))
        };
        (0..lines.len())
            .find(begins)
            .map_or(usize::MAX, |at| at + 1)
    }

    /// [`Source::code`] of what is not a unit test.
    fn product(&self) -> impl Iterator<Item = (usize, String)> {
        let tests_from = self.tests_from();
        self.code().take_while(move |(line, _)| *line < tests_from)
    }
}

/// A line of Rust without its comment and with its strings empty. Strings of several lines are not
/// seen as such.
fn code_of(line: &str) -> String {
    let mut code = String::new();
    let mut rest = line.chars().peekable();
    let mut quoted = false;
    while let Some(c) = rest.next() {
        match c {
            '\\' if quoted => {
                rest.next();
            }
            '\'' if !quoted && rest.peek() == Some(&'"') => {
                rest.next();
            }
            '"' => {
                quoted = !quoted;
                code.push(c);
            }
            '/' if !quoted && rest.peek() == Some(&'/') => break,
            _ if quoted => {}
            _ => code.push(c),
        }
    }
    code
}

fn root() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    Ok(root.context("tests/ lies in the checkout")?.to_path_buf())
}

/// All files below the root with one of these extensions, without build output and hidden folders.
fn files(extensions: &[&str]) -> Result<Vec<Source>> {
    let root = root()?;
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            if name.starts_with('.') || name == "target" {
                continue;
            }
            let extension = path.extension().and_then(|extension| extension.to_str());
            if entry.file_type()?.is_dir() {
                folders.push(path);
            } else if extension.is_some_and(|extension| extensions.contains(&extension)) {
                found.push(Source {
                    text: fs::read_to_string(&path)
                        .with_context(|| format!("{} is no text", path.display()))?,
                    path: path.strip_prefix(&root)?.to_string_lossy().into_owned(),
                });
            }
        }
    }
    ensure!(
        !found.is_empty(),
        "no {extensions:?} below {}",
        root.display()
    );
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn sources() -> Result<Vec<Source>> {
    files(&["rs"])
}

/// Whether `words` stands in `line` and is no part of a longer name.
fn has(line: &str, words: &str) -> bool {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let joins = |edge: Option<char>, beside: Option<char>| {
        edge.is_some_and(is_name) && beside.is_some_and(is_name)
    };
    line.match_indices(words).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + words.len()..]);
        !joins(words.chars().next(), before.chars().next_back())
            && !joins(words.chars().next_back(), after.chars().next())
    })
}

/// Fails with one line for each violation.
fn none(rule: &str, violations: &[String]) -> Result<()> {
    ensure!(violations.is_empty(), "{rule}\n{}", violations.join("\n"));
    Ok(())
}

/// `path:line: text` for every line that `breaks` the rule.
fn lines_that(
    lines: impl Iterator<Item = (usize, String)>,
    source: &Source,
    breaks: impl Fn(&str) -> bool,
) -> Vec<String> {
    lines
        .filter(|(_, line)| breaks(line))
        .map(|(number, line)| format!("{}:{number}: {}", source.path, line.trim()))
        .collect()
}

/// What follows each `prefix` in a line, as far as a path of Rust goes.
fn paths_after<'l>(line: &'l str, prefix: &'l str) -> impl Iterator<Item = &'l str> {
    line.match_indices(prefix).map(move |(at, _)| {
        let rest = &line[at + prefix.len()..];
        let is_path = |c: char| c.is_alphanumeric() || matches!(c, '_' | ':');
        rest.split(|c| !is_path(c)).next().unwrap_or_default()
    })
}

#[test]
fn the_checks_see_what_they_look_for() -> Result<()> {
    let source = Source {
        path: "server/src/x.rs".into(),
        text: "use a::HashMap; // b\n// HashMap\nlet my_HashMap = \"HashMap\";\n#[cfg(test)]\nmod tests {\n}\n"
            .into(),
    };
    let hits = lines_that(source.code(), &source, |line| has(line, "HashMap"));
    ensure!(hits == ["server/src/x.rs:1: use a::HashMap;"], "{hits:?}");
    ensure!(source.tests_from() == 4 && source.product().count() == 3);
    let found: Vec<_> = paths_after("f(libc::A_B, libc::c::d)", "libc::").collect();
    ensure!(found == ["A_B", "c::d"], "{found:?}");
    ensure!(names_path_in("see /src/x", "/src") && !names_path_in("server/src/x", "/src"));
    let paths: Vec<_> = sources()?.into_iter().map(|source| source.path).collect();
    for path in [
        "rpc/src/xdr.rs",
        "server/src/main.rs",
        "tests/tests/tidy.rs",
    ] {
        ensure!(paths.iter().any(|found| found == path), "{path} not seen");
    }
    Ok(())
}

// Who may know what.

/// The crates without input or output, and what each may depend on.
const CORE: [(&str, &[&str]); 3] = [
    ("rpc", &[]),
    ("nlm", &["havenfs-rpc", "imbl", "serde"]),
    ("nsm", &["havenfs-rpc", "imbl", "serde"]),
];

#[test]
fn core_crates_know_only_what_they_must() -> Result<()> {
    let mut hits = Vec::new();
    for (member, known) in CORE {
        let manifest: Table =
            fs::read_to_string(root()?.join(member).join("Cargo.toml"))?.parse()?;
        for table in ["build-dependencies", "target"] {
            ensure!(!manifest.contains_key(table), "{member} has {table}");
        }
        let dependencies = manifest.get("dependencies").and_then(Value::as_table);
        for (name, _) in dependencies.into_iter().flatten() {
            if !known.contains(&name.as_str()) {
                hits.push(format!("{member} depends on {name}"));
            }
        }
    }
    none(
        "rpc knows nobody; nlm and nsm know rpc, neither each other nor the server",
        &hits,
    )
}

#[test]
fn core_crates_turn_values_into_values_and_nothing_else() -> Result<()> {
    // Clock, files, sockets, threads; and containers whose order differs from run to run.
    let strange = [
        "std::fs",
        "std::thread",
        "std::process",
        "std::env",
        "std::time",
        "tokio",
        "rustix",
        "libc",
        "TcpStream",
        "TcpListener",
        "UdpSocket",
        "UnixStream",
        "Instant",
        "SystemTime",
        "HashMap",
        "HashSet",
        "unsafe",
    ];
    let mut hits = Vec::new();
    for source in sources()? {
        let is_core = CORE
            .iter()
            .any(|(member, _)| source.is_under(&format!("{member}/src")));
        if is_core {
            let breaks = |line: &str| strange.iter().any(|word| has(line, word));
            hits.extend(lines_that(source.product(), &source, breaks));
        }
    }
    none(
        "rpc, nlm and nsm have no input, output, clock or chance",
        &hits,
    )?;
    for (member, _) in CORE {
        let folder = root()?.join(member);
        let lib = fs::read_to_string(folder.join("src/lib.rs"))?;
        ensure!(
            lib.contains("#![forbid(unsafe_code)]"),
            "{member} forbids unsafe code"
        );
        let clippy = fs::read_to_string(folder.join("clippy.toml"))
            .with_context(|| format!("{member} has a clippy.toml"))?;
        for banned in ["Instant::now", "SystemTime::now", "HashMap", "HashSet"] {
            ensure!(clippy.contains(banned), "{member} bans {banned}");
        }
    }
    Ok(())
}

#[test]
fn wire_modules_neither_index_nor_cut_numbers() -> Result<()> {
    let denied = "#![deny(clippy::indexing_slicing, clippy::as_conversions)]";
    let mut seen = 0;
    for source in sources()? {
        let is_wire = ["nlm/src/wire", "nsm/src/wire"]
            .iter()
            .any(|begin| source.path.starts_with(begin));
        // What lies in a folder is part of the module beside it.
        if is_wire && source.path.matches('/').count() == 2 {
            seen += 1;
            ensure!(source.text.contains(denied), "{} denies both", source.path);
        }
    }
    ensure!(seen == 3, "{seen} wire modules");
    Ok(())
}

#[test]
fn unsafe_code_is_in_backend_sys_alone() -> Result<()> {
    let mut hits = Vec::new();
    for source in sources()? {
        if source.path == "server/src/backend/sys.rs" {
            continue;
        }
        hits.extend(lines_that(source.code(), &source, |line| {
            let opens = has(line, "unsafe_code") && !line.contains("forbid");
            has(line, "unsafe") || opens
        }));
    }
    none("unsafe code outside server/src/backend/sys.rs", &hits)
}

/// Whether every path behind `prefix` in a line is one of `known` or lies in one.
fn knows_only(line: &str, prefix: &str, known: &[&str]) -> bool {
    let fits = |path: &str| {
        known.iter().any(|known| {
            let rest = path.strip_prefix(known);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        })
    };
    paths_after(line, prefix).all(fits)
}

#[test]
fn backend_knows_no_rpc() -> Result<()> {
    // A caller's groups come from the credential as they are.
    let rpc = ["auth::Gids"];
    // The gate is asked right before whatever changes a file.
    let own = ["backend", "fault", "gate", "random", "state"];
    let mut hits = Vec::new();
    for source in sources()? {
        if !source.is_under("server/src/backend") {
            continue;
        }
        hits.extend(lines_that(source.product(), &source, |line| {
            let known =
                knows_only(line, "havenfs_rpc::", &rpc) && knows_only(line, "crate::", &own);
            !known || has(line, "tokio")
        }));
    }
    none("backend makes system calls and knows no RPC", &hits)
}

#[test]
fn programs_ask_and_do_nothing_else() -> Result<()> {
    let own = [
        "backend",
        "call",
        "cluster",
        "export",
        "lock_service",
        "node",
        "programs",
        "volumes",
    ];
    let strange = [
        "std::fs",
        "std::process",
        "std::thread",
        "std::env",
        "tokio",
        "TcpStream",
        "UdpSocket",
    ];
    let mut hits = Vec::new();
    for source in sources()? {
        if !source.is_under("server/src/programs") {
            continue;
        }
        hits.extend(lines_that(source.product(), &source, |line| {
            // Error numbers and address families are values, not calls.
            let called = !knows_only(line, "rustix::", &["io::Errno"])
                || !knows_only(line, "libc::", &["AF_INET", "AF_INET6"]);
            let knows_more = !knows_only(line, "crate::", &own);
            called || knows_more || strange.iter().any(|word| has(line, word))
        }));
    }
    none(
        "programs decode, ask and encode: no system calls, no sockets",
        &hits,
    )
}

#[test]
fn errors_of_the_server_are_typed() -> Result<()> {
    let mut hits = Vec::new();
    for source in sources()? {
        let at_the_edge = ["server/src/main.rs", "server/src/cli.rs"].contains(&&*source.path)
            || source.is_under("server/src/cli")
            || source.is_under("server/src/demo");
        if source.is_under("server/src") && !at_the_edge {
            hits.extend(lines_that(source.product(), &source, |line| {
                has(line, "anyhow")
            }));
        }
    }
    none("anyhow only in main.rs, cli and demo", &hits)
}

#[test]
fn channels_are_bounded() -> Result<()> {
    let unbounded = ["unbounded_channel", "unbounded", "std::sync::mpsc::channel"];
    let mut hits = Vec::new();
    for source in sources()? {
        if !source.is_under("tests") && !source.is_under("bench") {
            hits.extend(lines_that(source.product(), &source, |line| {
                unbounded.iter().any(|word| has(line, word))
            }));
        }
    }
    none("every channel has a bound", &hits)
}

// What manifests say.

/// The members' names and manifests.
fn members() -> Result<Vec<(String, Table)>> {
    let workspace: Table = fs::read_to_string(root()?.join("Cargo.toml"))?.parse()?;
    let members = workspace["workspace"]["members"].as_array();
    members
        .context("members is a list")?
        .iter()
        .map(|member| {
            let name = member.as_str().context("a member is a path")?;
            let text = fs::read_to_string(root()?.join(name).join("Cargo.toml"))?;
            Ok((name.to_owned(), text.parse()?))
        })
        .collect()
}

/// Calls `see` for every dependency of a manifest, those of one platform included.
fn each_dependency(manifest: &Table, see: &mut impl FnMut(&str, &Value)) {
    for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
        for (name, wanted) in manifest
            .get(kind)
            .and_then(Value::as_table)
            .into_iter()
            .flatten()
        {
            see(name, wanted);
        }
    }
    let targets = manifest.get("target").and_then(Value::as_table);
    for target in targets.into_iter().flat_map(Table::values) {
        if let Some(target) = target.as_table() {
            each_dependency(target, see);
        }
    }
}

#[test]
fn versions_are_in_the_workspace_table_only() -> Result<()> {
    let workspace: Table = fs::read_to_string(root()?.join("Cargo.toml"))?.parse()?;
    let listed = workspace["workspace"]["dependencies"].as_table();
    let listed = listed.context("[workspace.dependencies]")?;
    let mut hits = Vec::new();
    let mut used = Vec::new();
    for (member, manifest) in members()? {
        each_dependency(&manifest, &mut |name, wanted| {
            used.push(name.to_owned());
            if wanted.get("workspace").and_then(Value::as_bool) != Some(true) {
                hits.push(format!("{member}: {name} has a version of its own"));
            }
        });
    }
    for (name, wanted) in listed {
        let is_ours = wanted.get("path").is_some();
        if !is_ours && wanted.get("default-features").and_then(Value::as_bool) != Some(false) {
            hits.push(format!("{name}: default features are on"));
        }
        if !used.contains(name) {
            hits.push(format!("{name}: nobody uses it"));
        }
    }
    none("dependencies stand in [workspace.dependencies]", &hits)
}

#[test]
fn members_inherit_lints_edition_and_licence() -> Result<()> {
    for (member, manifest) in members()? {
        let inherited = |table: &str, key: &str| {
            let value = manifest.get(table).and_then(|table| table.get(key));
            let value = value.and_then(|value| value.get("workspace").or(Some(value)));
            value.and_then(Value::as_bool) == Some(true)
        };
        ensure!(inherited("lints", "workspace"), "{member}: lints");
        for key in ["version", "edition", "rust-version", "license"] {
            // What stands in for a crate of others has the version of that one.
            if key == "version" && member.starts_with("patches/") {
                continue;
            }
            ensure!(inherited("package", key), "{member}: {key}");
        }
    }
    Ok(())
}

// What sources look like.

#[test]
fn no_file_is_too_long() -> Result<()> {
    let long: Vec<String> = sources()?
        .iter()
        .map(|source| (&source.path, source.text.lines().count()))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .map(|(path, lines)| format!("{path}: {lines} lines"))
        .collect();
    none("files have at most 800 lines", &long)
}

#[test]
fn sources_are_narrow_ascii() -> Result<()> {
    let mut hits = Vec::new();
    for source in files(&["rs", "toml", "sh"])? {
        hits.extend(lines_that(source.whole(), &source, |line| {
            // A string can be too wide for a break; rustfmt looks after code.
            let wide = line.trim_start().starts_with("//") && line.len() > COLUMNS_MAX;
            !line.is_ascii() || line.contains('\t') || line.ends_with(' ') || wide
        }));
    }
    none(
        "plain ASCII, at most 100 columns, no tabs, no blanks at line ends",
        &hits,
    )
}

#[test]
fn nothing_is_left_for_later() -> Result<()> {
    // Put together here, since this file is searched too.
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("HA", "CK"),
        concat!("todo", "!"),
        concat!("unimplemented", "!"),
        concat!("dbg", "!"),
        concat!("#[ign", "ore"),
    ];
    let mut hits = Vec::new();
    for source in files(&["rs", "toml", "sh", "md"])? {
        let whole = source.whole();
        let breaks = |line: &str| words.iter().any(|word| has(line, word));
        hits.extend(lines_that(whole, &source, breaks));
    }
    none("what is unfinished is not in the tree", &hits)
}

#[test]
fn every_file_says_what_it_is() -> Result<()> {
    let silent: Vec<String> = sources()?
        .into_iter()
        .filter(|source| !source.text.starts_with("//! "))
        .map(|source| source.path)
        .collect();
    none("a file begins with its header", &silent)
}

#[test]
fn lints_are_silenced_with_a_reason() -> Result<()> {
    let mut hits = Vec::new();
    for source in sources()? {
        let lines: Vec<&str> = source.text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let line = line.trim_start();
            let silences = ["#[allow(", "#![allow(", "#[expect(", "#![expect("];
            if !silences.iter().any(|begin| line.starts_with(begin)) {
                continue;
            }
            let end = lines[at..].iter().position(|line| line.contains(")]"));
            let whole = &lines[at..=at + end.unwrap_or(0)];
            if !whole.iter().any(|line| line.contains("reason = ")) {
                hits.push(format!("{}:{}: {line}", source.path, at + 1));
            }
        }
    }
    none("a silenced lint has a reason", &hits)
}

#[test]
fn tests_wait_for_conditions() -> Result<()> {
    let (mut hits, mut unused) = (Vec::new(), SLEEPERS.to_vec());
    for source in sources()? {
        let tests_from = source.tests_from();
        let code: Vec<String> = source.code().map(|(_, line)| line).collect();
        for (at, line) in code.iter().enumerate().skip(tests_from.saturating_sub(1)) {
            let sleeps = ["thread::sleep(", "time::sleep("];
            if !sleeps.iter().any(|sleep| line.contains(sleep)) {
                continue;
            }
            let above = &code[at.saturating_sub(DEADLINE_WITHIN_LINES)..at];
            if above.iter().any(|line| has(line, "deadline")) {
                continue;
            }
            if SLEEPERS.iter().any(|(path, _)| source.path == *path) {
                unused.retain(|(path, _)| source.path != *path);
                continue;
            }
            hits.push(format!("{}:{}: {}", source.path, at + 1, line.trim()));
        }
    }
    none(
        "tests wait for a condition with a deadline, not for a time",
        &hits,
    )?;
    ensure!(unused.is_empty(), "no longer sleeps: {unused:?}");
    Ok(())
}

/// Whether `line` names something in `folder`, and not in one whose path only ends the same.
fn names_path_in(line: &str, folder: &str) -> bool {
    let goes_on = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '}');
    line.match_indices(folder).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + folder.len()..]);
        folder.len() > 1 && !before.ends_with(goes_on) && !after.starts_with(goes_on)
    })
}

#[test]
fn pages_name_no_path_of_somebodys_machine() -> Result<()> {
    let checkout = root()?.to_string_lossy().into_owned();
    let home = std::env::var("HOME").unwrap_or_default();
    let mut hits = Vec::new();
    for page in files(&["md", "toml", "rs", "sh", "service"])? {
        let is_page = Path::new(&page.path).extension() == Some("md".as_ref());
        hits.extend(lines_that(page.whole(), &page, |line| {
            // Whose home it is says "you" in an example.
            let of_somebody =
                |homes| paths_after(line, homes).any(|rest| !rest.is_empty() && rest != "you");
            let in_home =
                names_path_in(line, &home) || of_somebody("/home/") || of_somebody("/Users/");
            names_path_in(line, &checkout) || is_page && in_home
        }));
    }
    none("a page names only paths that its reader has", &hits)
}
