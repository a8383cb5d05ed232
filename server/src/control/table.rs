//! Answers of the control socket as tables for people. (Writing to a string can't fail: the results
//! of `write!` are left alone.)

mod cluster;

use std::fmt::Write as _;

use serde_json::Value;

/// Renders an answer; `request` says what was asked.
pub fn render(request: &str, answer: &Value) -> String {
    // It may name its service first.
    let named = request
        .strip_prefix('@')
        .and_then(|named| named.split_once(' '));
    let request = named.map_or(request, |(_, rest)| rest);
    match request {
        "status" | "cluster" if answer.get("missing").is_some() => cluster::missing(answer),
        "status" => status(answer),
        "clients" => columns(
            &[
                "peer",
                "local",
                "exports",
                "calls",
                "bytes_received",
                "bytes_sent",
                "idle_seconds",
            ],
            answer,
            "no NFS client is connected\n",
        ),
        "hosts" => entries(HOSTS, answer, "no host has locked anything\n"),
        "locks" => entries(LOCKS, answer, "nothing is locked\n"),
        "waiting" => entries(WAITING, answer, "nobody waits for a lock\n"),
        "refused" => entries(&["host", "path"], answer, "nobody's writes are refused\n"),
        _ if request.starts_with("host ") => host(answer),
        _ if request.starts_with("verify ") => verified(answer),
        "exports" => exports(answer),
        "cluster" => cluster::whole(answer),
        "services" => cluster::services(answer),
        _ => match answer.get("done").and_then(Value::as_str) {
            Some(done) => format!("{done}\n"),
            None => format!("{answer:#}\n"),
        },
    }
}

const HOSTS: &[&str] = &[
    "address",
    "name",
    "service_address",
    "held",
    "waiting",
    "monitored",
    "lost",
    "restart",
];
const LOCKS: &[&str] = &[
    "path", "range", "kind", "host", "name", "owner", "age", "notes",
];
const WAITING: &[&str] = &["path", "range", "kind", "host", "name", "owner", "age"];

/// A list that may be longer than what is shown.
fn entries(names: &[&str], answer: &Value, none: &str) -> String {
    let mut out = columns(names, answer.get("entries").unwrap_or(&Value::Null), none);
    let more = answer.get("not_shown").and_then(Value::as_u64);
    if let Some(more) = more.filter(|more| *more > 0) {
        let _ = writeln!(out, "and {more} more, which are not shown");
    }
    out
}

fn host(answer: &Value) -> String {
    let part = |name: &str| answer.get(name).unwrap_or(&Value::Null);
    let mut out = columns(HOSTS, part("hosts"), "");
    let _ = write!(
        out,
        "\nholds:\n{}\nwaits for:\n{}",
        entries(LOCKS, part("locks"), "nothing\n"),
        entries(WAITING, part("waiting"), "nothing\n")
    );
    let refused = part("writes_refused").get("entries");
    let refused = refused
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice);
    for what in refused {
        let _ = writeln!(out, "\nits writes to {} are refused", text(what));
    }
    out
}

fn verified(answer: &Value) -> String {
    let get = |name: &str| answer.get(name).map_or_else(|| "-".to_owned(), text);
    let (held, reclaimed) = (get("held"), get("reclaimed"));
    let head = format!(
        "{} holds {held} locks and has reclaimed {reclaimed}\n",
        get("host")
    );
    let missing = answer.get("missing").unwrap_or(&Value::Null);
    let list = entries(LOCKS, missing, "");
    if list.is_empty() {
        return head;
    }
    format!(
        "{head}it does not know of these, or did not answer in time. To break them ends all locks of \
         the machine on the same file, also those that it has reclaimed:\n{list}"
    )
}

/// How long ago, in the two largest units.
fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {}s", seconds % 60),
        3600..86_400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

fn cell(row: &Value, name: &str) -> String {
    if name == "age" {
        let seconds = row.get("age_seconds").and_then(Value::as_u64);
        return seconds.map_or_else(|| "-".to_owned(), age);
    }
    if name == "path" && row.get(name) == Some(&Value::Null) {
        return "all files".to_owned();
    }
    row.get(name).map_or_else(String::new, text)
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) if values.is_empty() => "-".to_owned(),
        Value::Array(values) => values.iter().map(text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// A line a row, each column as wide as its widest value.
fn columns(names: &[&str], answer: &Value, none: &str) -> String {
    let rows = answer.as_array().map_or(&[][..], Vec::as_slice);
    if rows.is_empty() {
        return none.to_owned();
    }
    let head = names
        .iter()
        .map(|name| name.replace('_', " ").to_uppercase())
        .collect();
    let mut lines: Vec<Vec<String>> = vec![head];
    for row in rows {
        lines.push(names.iter().map(|name| cell(row, name)).collect());
    }
    let mut out = String::new();
    for line in &lines {
        for (column, cell) in line.iter().enumerate() {
            let width = lines
                .iter()
                .filter_map(|line| line.get(column))
                .map(String::len)
                .max();
            let width = if column + 1 == line.len() {
                0
            } else {
                width.unwrap_or(0) + 2
            };
            let _ = write!(out, "{cell:width$}");
        }
        out.push('\n');
    }
    out
}

fn status(answer: &Value) -> String {
    let get = |name: &str| answer.get(name).map_or_else(|| "-".to_owned(), text);
    let mut out = format!(
        "havenfs {} (process {}), start number {}\nstate directory  {}\n",
        get("version"),
        get("pid"),
        get("starts"),
        get("state_dir"),
    );
    if answer.get("members").is_some() {
        out.push_str(&cluster::whole(answer));
    }
    if answer.get("exports").is_none() {
        return out;
    }
    let _ = write!(
        out,
        "portmapper       {}\nexports          {}\nconnections      {}\ncalls served     {}\n\
         files open       {}\nbytes held       {}\n",
        get("portmapper"),
        get("exports"),
        get("connections"),
        get("calls"),
        get("files_open"),
        get("held_bytes"),
    );
    let hit = answer.get("limits_hit").and_then(Value::as_object);
    let hit: Vec<String> = hit
        .into_iter()
        .flatten()
        .filter(|(_, count)| count.as_u64() != Some(0))
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    let hit = if hit.is_empty() {
        "none".to_owned()
    } else {
        hit.join(", ")
    };
    let _ = writeln!(out, "limits hit       {hit}");
    if let Some(locking) = answer.get("locking").filter(|locking| locking.is_object()) {
        out.push_str(&locks(locking));
    }
    out
}

fn locks(locking: &Value) -> String {
    let get = |name: &str| locking.get(name).map_or_else(|| "-".to_owned(), text);
    let is = |name: &str| locking.get(name).and_then(Value::as_bool) == Some(true);
    let table = if is("complete") {
        format!("complete since epoch {}", get("since_epoch"))
    } else {
        format!(
            "locks may be missing since epoch {} ({})",
            get("since_epoch"),
            get("cause")
        )
    };
    let grace = if is("in_grace") {
        "; grace: only reclaims are granted, until it ends or `havenfs service end-grace`"
    } else {
        ""
    };
    let mut out = format!(
        "lock table       {table}{grace}\nepoch            {} (NSM state {})\n\
         locks            {} held, {} waiting, {} granted and not confirmed; {} shares\n",
        get("epoch"),
        get("nsm_state"),
        get("locks"),
        get("waiting"),
        get("unconfirmed_grants"),
        get("shares"),
    );
    let number = |name: &str| locking.get(name).and_then(Value::as_u64).unwrap_or(0);
    if number("from_before") > 0 {
        let _ = writeln!(
            out,
            "                 {} from before the last start, {} of them not reclaimed",
            number("from_before"),
            number("not_reclaimed")
        );
    }
    if number("suspect") > 0 {
        let _ = writeln!(
            out,
            "                 {} suspect: see `havenfs locks list`",
            number("suspect")
        );
    }
    if number("writes_refused") > 0 {
        let _ = writeln!(
            out,
            "writes refused   {}: see `havenfs locks refused`",
            number("writes_refused")
        );
    }
    let _ = writeln!(
        out,
        "hosts            {}; of the last restart {} were told, {} are being told, {} not reached",
        get("hosts"),
        get("hosts_told"),
        get("hosts_being_told"),
        get("hosts_not_reached"),
    );
    out
}

fn exports(answer: &Value) -> String {
    let mut out = String::new();
    for export in answer.as_array().map_or(&[][..], Vec::as_slice) {
        let get = |name: &str| export.get(name).map_or_else(|| "-".to_owned(), text);
        let open = export.get("open").and_then(Value::as_bool) == Some(true);
        let kernel = export.get("kernel_handles").and_then(Value::as_bool) == Some(true);
        let state = match (open, kernel) {
            (false, _) => ", NOT OPEN",
            (true, false) => ", handle table",
            (true, true) => "",
        };
        let _ = writeln!(
            out,
            "{} (id {}, fsid {}{state})",
            get("path"),
            get("id"),
            get("fsid")
        );
        for rule in export
            .get("rules")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let get = |name: &str| rule.get(name).map_or_else(String::new, text);
            let _ = writeln!(out, "    {}({})", get("client"), get("options"));
        }
    }
    out
}
