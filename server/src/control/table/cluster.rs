//! The cluster and its services for people. (Writing to a string can't fail: the results of
//! `write!` are left alone.)

use std::fmt::Write as _;

use serde_json::Value;

use super::text;

/// Who is in the cluster, who leads, and where each service is.
pub(super) fn whole(answer: &Value) -> String {
    let mut out = members(answer);
    for service in list(answer, "services") {
        out.push_str(&one(answer, service));
    }
    out
}

/// A node that waits for its cluster.
pub(super) fn missing(answer: &Value) -> String {
    let mut out = format!(
        "node             {}; WAITS FOR ITS CLUSTER, and serves nothing yet\n",
        text_of(answer, "node")
    );
    for (place, missing) in list(answer, "missing").iter().enumerate() {
        let head = if place == 0 { "missing" } else { "" };
        // Hints are lines of their own.
        let lines = text(missing).replace('\n', &format!("\n{:17}", ""));
        let _ = writeln!(out, "{head:<17}{lines}");
    }
    out
}

/// The services alone, as `service list` shows them.
pub(super) fn services(answer: &Value) -> String {
    let services = list(answer, "services").iter();
    services.map(|service| one(answer, service)).collect()
}

fn members(answer: &Value) -> String {
    let members = list(answer, "members");
    if members.is_empty() {
        return String::new();
    }
    let said = |name: &str| answer.get(name).and_then(Value::as_str);
    let leads = match (said("leader"), said("led")) {
        (Some(leader), _) => format!("{leader} leads"),
        (None, Some(led)) => format!("NOBODY LEADS: {led} led, and is not heard of"),
        (None, None) => "NOBODY LEADS: there is no majority".to_owned(),
    };
    let mut out = format!("node             {}; {leads}\n", text_of(answer, "node"));
    for (place, member) in members.iter().enumerate() {
        let head = if place == 0 { "members" } else { "" };
        let is = |name: &str| member.get(name).and_then(Value::as_bool) == Some(true);
        let state = match (is("lives"), is("witness")) {
            (_, true) if member.get("lives") == Some(&Value::Bool(false)) => {
                ", witness, NOT HEARD OF lately"
            }
            (_, true) => ", witness",
            (true, false) => "",
            (false, false) => ", NOT HEARD OF lately",
        };
        let (name, address) = (text_of(member, "name"), text_of(member, "address"));
        let learns = if member.get("votes") == Some(&Value::Bool(false)) {
            ", DOES NOT VOTE YET"
        } else {
            ""
        };
        let leaves = if is("leaves") {
            format!(
                ", ITS REMOVAL WAS BEGUN\n{:17}hint: say `havenfs cluster remove {name}` again",
                ""
            )
        } else {
            String::new()
        };
        let _ = writeln!(out, "{head:<17}{name} at {address}{state}{learns}{leaves}");
    }
    if answer.get("joint") == Some(&Value::Bool(true)) {
        let _ = writeln!(
            out,
            "{:17}THE VOTERS ARE BEING CHANGED: a majority of the old and one of the new must live",
            ""
        );
    }
    for (place, applicant) in list(answer, "waiting").iter().enumerate() {
        let head = if place == 0 { "to be added" } else { "" };
        let name = text_of(applicant, "name");
        let said = applicant.get("problem").and_then(Value::as_str);
        let said = said.map_or_else(
            || format!("`{}`", text_of(applicant, "command")),
            |problem| problem.replace('\n', &format!("\n{:17}", "")),
        );
        let _ = writeln!(out, "{head:<17}{name} waits: {said}");
    }
    out
}

fn one(answer: &Value, service: &Value) -> String {
    let get = |name: &str| text_of(service, name);
    let is = |name: &str| service.get(name).and_then(Value::as_bool) == Some(true);
    let here = text_of(answer, "node");
    let place = match service.get("active").and_then(Value::as_str) {
        Some(active) if is("released") => format!("on {active}, BEING RELEASED by an operator"),
        None if is("released") => {
            "RELEASED by an operator: on no node until it is taken or moved".to_owned()
        }
        Some(active) if active == here && is("serving") => format!("on {active}, here"),
        Some(active) if active == here && !list(service, "unfenced").is_empty() => {
            format!(
                "on {active}, here, and waits for the fence of {}",
                get("unfenced")
            )
        }
        Some(active) if active == here => format!("on {active}, here, and SILENT: no lease"),
        Some(active) if !list(service, "unfenced").is_empty() => {
            format!(
                "on {active}, and waits for the fence of {}",
                get("unfenced")
            )
        }
        Some(active) => format!("on {active}"),
        None => "on NO NODE".to_owned(),
    };
    // Else it is where it would be anyway.
    let is_put = match (service.get("placed"), service.get("preferred")) {
        (Some(Value::String(placed)), Some(Value::String(preferred))) => {
            placed != preferred && service.get("active") == service.get("placed")
        }
        _ => false,
    };
    let put = if is_put {
        ", where an operator has put it"
    } else {
        ""
    };
    // Of a service that the log has not named yet nothing is known.
    let table = if service.get("complete") == Some(&Value::Bool(false)) {
        ", LOCKS MAY BE MISSING"
    } else {
        ""
    };
    let mut out = format!(
        "service          {}: {place}{put}; epoch {}, NSM state {}{table}\n{:17}{} locks, {} waiting",
        get("name"),
        get("epoch"),
        get("nsm_state"),
        "",
        get("locks"),
        get("waiting"),
    );
    if service.get("connections").is_some_and(Value::is_u64) {
        let _ = write!(out, ", {} connections", get("connections"));
    }
    if service.get("addresses").is_some_and(Value::is_array) {
        let _ = write!(out, "; {} at {}", get("names"), get("addresses"));
    }
    if let Some(interface) = service.get("interface").filter(|one| one.is_object()) {
        let is_up = interface.get("link").and_then(Value::as_bool) == Some(true);
        let down = if is_up { "" } else { ", WHOSE LINK IS DOWN" };
        let _ = write!(out, " on {}{down}", text_of(interface, "name"));
    }
    out.push('\n');
    if let Some(definition) = service.get("definition").filter(|one| one.is_object()) {
        out.push_str(&defined(definition));
    }
    if let Some(first) = list(service, "unfenced").first().and_then(Value::as_str) {
        let (name, nodes) = (get("name"), get("unfenced"));
        let _ = writeln!(
            out,
            "{:17}DOWN UNTIL FENCED: {nodes}; if it is off for sure, `havenfs service \
             confirm-fence {name} --node {first}`",
            ""
        );
    }
    if let Some(problem) = service["storage"]["problem"].as_str() {
        let _ = writeln!(out, "{:17}STORAGE FAILS here: {problem}", "");
    } else if let Some(probe) = service["storage"]["probe"].as_str() {
        let _ = writeln!(out, "{:17}storage works here ({probe})", "");
    }
    if !list(service, "storage_fails_on").is_empty() {
        let nodes = get("storage_fails_on");
        let _ = writeln!(out, "{:17}its storage FAILS ON {nodes}", "");
    }
    if let Some(takeover) = service.get("last_takeover").filter(|last| last.is_object()) {
        let from = match takeover.get("from").and_then(Value::as_str) {
            Some(from) => format!(" from {from}"),
            None => String::new(),
        };
        let _ = writeln!(
            out,
            "{:17}last came here by {}{from} in {} ms: {}",
            "",
            text_of(takeover, "kind"),
            text_of(takeover, "total_ms"),
            phases(takeover)
        );
    }
    let departure = service.get("last_departure");
    if let Some(departure) = departure.filter(|last| last.is_object()) {
        let _ = writeln!(
            out,
            "{:17}last left here by {} in {} ms: {}",
            "",
            text_of(departure, "kind"),
            text_of(departure, "total_ms"),
            phases(departure)
        );
    }
    out
}

/// What each step of a takeover or departure took.
fn phases(of: &Value) -> String {
    let phases = list(of, "phases").iter();
    let phases = phases.map(|phase| format!("{} {}", text_of(phase, "name"), text_of(phase, "ms")));
    phases.collect::<Vec<_>>().join(", ")
}

/// Where this node, or the last reload, is not as it should be.
fn defined(definition: &Value) -> String {
    let get = |name: &str| text_of(definition, name);
    let mut out = String::new();
    if !list(definition, "differs").is_empty() {
        let _ = writeln!(
            out,
            "{:17}THE FILES OF THIS NODE DIFFER from version {}, which is served: {}. Make them \
             the same, or have all nodes serve what they say: `havenfs exports reload` here",
            "",
            get("version"),
            get("differs").replace(',', ", "),
        );
    }
    let is = |name: &str| definition.get(name).and_then(Value::as_bool) == Some(true);
    if is("unread") {
        let _ = writeln!(
            out,
            "{:17}THE FILES OF THIS NODE HAVE MISTAKES, see its log; what the cluster has is served",
            "",
        );
    }
    if is("restart") {
        let _ = writeln!(
            out,
            "{:17}RESTART THIS NODE: the service has other addresses now: {}",
            "",
            get("addresses")
        );
    }
    if let Some(refused) = definition.get("refused").filter(|one| one.is_object()) {
        let problem = text_of(refused, "problem").replace('\n', " ");
        let _ = writeln!(
            out,
            "{:17}RELOAD REFUSED by the active node, version {}: {problem}",
            "",
            text_of(refused, "version"),
        );
    }
    out
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    let list = value.get(name).and_then(Value::as_array);
    list.map_or(&[][..], Vec::as_slice)
}

fn text_of(value: &Value, name: &str) -> String {
    value.get(name).map_or_else(|| "-".to_owned(), text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn it_says_who_leads_and_where_each_service_is() {
        let service = json!({
            "name": "alpha", "names": ["nfs.example"], "addresses": ["192.0.2.100"],
            "active": "n1", "serving": true, "complete": true, "epoch": 3, "nsm_state": 7,
            "locks": 18, "waiting": 1, "connections": 4,
            "interface": { "name": "eth0", "link": true, "addresses_here": true },
            "last_takeover": {
                "kind": "takeover", "from": "n2", "total_ms": 1250.5,
                "phases": [{ "name": "lease", "ms": 1248.0 }, { "name": "assign", "ms": 2.5 }],
            },
            "last_departure": {
                "kind": "move", "total_ms": 12.5,
                "phases": [{ "name": "drain", "ms": 10.0 }, { "name": "release", "ms": 2.5 }],
            },
        });
        let mut answer = json!({
            "node": "n1", "leader": "n2", "services": [service],
            "members": [
                { "name": "n1", "address": "192.0.2.1:7300", "lives": true, "witness": false },
                { "name": "n2", "address": "192.0.2.2:7300", "lives": false, "witness": false },
                { "name": "w", "address": "192.0.2.3:7300", "lives": null, "witness": true },
            ],
        });
        let shown = whole(&answer);
        let expected = "\
node             n1; n2 leads
members          n1 at 192.0.2.1:7300
                 n2 at 192.0.2.2:7300, NOT HEARD OF lately
                 w at 192.0.2.3:7300, witness
service          alpha: on n1, here; epoch 3, NSM state 7
                 18 locks, 1 waiting, 4 connections; nfs.example at 192.0.2.100 on eth0
                 last came here by takeover from n2 in 1250.5 ms: lease 1248.0, assign 2.5
                 last left here by move in 12.5 ms: drain 10.0, release 2.5
";
        assert_eq!(shown, expected);
        assert!(!shown.contains("FENCE"), "{shown}");
        answer["services"][0]["released"] = json!(true);
        let shown = whole(&answer);
        let released = "alpha: on n1, BEING RELEASED by an operator; epoch 3";
        assert!(shown.contains(released), "{shown}");
        answer["services"][0]["active"] = Value::Null;
        let shown = whole(&answer);
        assert!(shown.contains("alpha: RELEASED by an operator"), "{shown}");
        answer["services"][0]["released"] = json!(false);
        assert!(whole(&answer).contains("alpha: on NO NODE"), "{shown}");
        answer["services"][0]["active"] = json!("n1");
        answer["services"][0]["placed"] = json!("n1");
        answer["services"][0]["preferred"] = json!("n2");
        let shown = whole(&answer);
        let put = "alpha: on n1, here, where an operator has put it; epoch 3";
        assert!(shown.contains(put), "{shown}");
        answer["services"][0]["placed"] = Value::Null;
        answer["leader"] = Value::Null;
        answer["services"][0]["serving"] = json!(false);
        let shown = whole(&answer);
        assert!(shown.contains("SILENT: no lease"), "{shown}");
        answer["services"][0]["unfenced"] = json!(["n2", "n3"]);
        answer["members"][2]["lives"] = json!(false);
        answer["members"][1]["votes"] = json!(false);
        answer["members"][0]["leaves"] = json!(true);
        answer["joint"] = json!(true);
        answer["waiting"] = json!([{ "name": "n4", "command": "havenfs cluster add n4" }]);
        if let Some(waiting) = answer["waiting"].as_array_mut() {
            waiting.push(json!({ "name": "n2", "problem": "node `n2` lives\nhint: wait" }));
        }
        answer["services"][0]["interface"]["link"] = json!(false);
        let shown = whole(&answer);
        let waits = "\n                 n2 waits: node `n2` lives\n                 hint: wait\n";
        assert!(shown.contains(waits), "{shown}");
        assert!(shown.contains("n1; NOBODY LEADS: there is no"), "{shown}");
        answer["led"] = json!("n2");
        let shown = whole(&answer);
        let led = "n1; NOBODY LEADS: n2 led, and is not heard of\n";
        assert!(shown.contains(led), "{shown}");
        assert!(shown.contains("witness, NOT HEARD OF"), "{shown}");
        assert!(shown.contains("lately, DOES NOT VOTE YET"), "{shown}");
        let leaves =
            ", ITS REMOVAL WAS BEGUN\n                 hint: say `havenfs cluster remove n1`";
        assert!(shown.contains(leaves), "{shown}");
        assert!(shown.contains("THE VOTERS ARE BEING CHANGED"), "{shown}");
        let waits = "to be added      n4 waits: `havenfs cluster add n4`";
        assert!(shown.contains(waits), "{shown}");
        assert!(shown.contains("on eth0, WHOSE LINK IS DOWN"), "{shown}");
        assert!(!shown.contains("SILENT"), "{shown}");
        let waits = "alpha: on n1, here, and waits for the fence of n2,n3;";
        assert!(shown.contains(waits), "{shown}");
        assert!(shown.contains("DOWN UNTIL FENCED: n2,n3;"), "{shown}");
        assert!(shown.contains("confirm-fence alpha --node n2`"), "{shown}");
        answer["node"] = json!("w");
        let shown = whole(&answer);
        let waits = "alpha: on n1, and waits for the fence of n2,n3;";
        assert!(shown.contains(waits), "{shown}");
        assert!(shown.contains("DOWN UNTIL FENCED: n2,n3;"), "{shown}");
    }

    #[test]
    fn a_node_that_waits_says_for_what() {
        let answer = json!({ "node": "n1", "missing": ["n2 is silent\nhint: start it", "n3"] });
        let expected = "\
node             n1; WAITS FOR ITS CLUSTER, and serves nothing yet
missing          n2 is silent
                 hint: start it
                 n3
";
        assert_eq!(missing(&answer), expected);
    }

    #[test]
    fn it_says_where_this_node_or_a_reload_is_not_as_it_should_be() {
        let mut definition = json!({
            "version": 4, "addresses": ["192.0.2.9/24"], "exports": 1, "differs": [],
            "restart": false, "refused": null,
        });
        assert_eq!(defined(&definition), "");
        definition["differs"] = json!(["names", "exports"]);
        definition["restart"] = json!(true);
        definition["unread"] = json!(true);
        definition["refused"] = json!({ "version": 3, "problem": "no\nhint: make it" });
        let shown = defined(&definition);
        let lines: Vec<&str> = shown.lines().map(str::trim_start).collect();
        for (line, begin) in lines.iter().zip([
            "THE FILES OF THIS NODE DIFFER from version 4, which is served: names, exports. ",
            "THE FILES OF THIS NODE HAVE MISTAKES, see its log; what the cluster has is served",
            "RESTART THIS NODE: the service has other addresses now: 192.0.2.9/24",
            "RELOAD REFUSED by the active node, version 3: no hint: make it",
        ]) {
            assert!(line.starts_with(begin), "{shown}");
        }
        assert_eq!(lines.len(), 4);
    }
}
