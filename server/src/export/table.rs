//! The exports in force, and the one question that every call asks of them.
//!
//! Owns which export a path or an id belongs to and which rule a peer falls under. A table never
//! changes; a reload makes a new one and swaps it in whole. It holds no directory and no handle.
//!
//! Order of rules (Source: exports(5), Machine Name Formats): hosts by address or name, then
//! networks, then wildcards, then everybody; within one kind as given. Unlike exportfs(8), which
//! files a plain address under networks, an address here is a host, as its manual says.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};

use super::client::wildcard_matches;
use super::{ClientPattern, ClientRule, ExportSpec, Names};

/// All exports in force.
#[derive(Debug, Default)]
pub struct ExportTable {
    /// In the order in which the lists first mention them.
    exports: Vec<Export>,
    by_id: BTreeMap<u32, usize>,
    by_path: BTreeMap<PathBuf, usize>,
}

/// One export in force.
#[derive(Debug)]
pub struct Export {
    /// The number that stands for it in file handles.
    pub id: u32,
    /// What the lists say about it.
    pub spec: ExportSpec,
    /// The rules of `spec` in the order in which they are tried.
    rules: Vec<ClientRule>,
}

/// What the export list says about a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// It may, as far as the options of this rule go.
    Allowed(&'a ClientRule),
    /// No rule is for it.
    Refused,
    /// It depends on a name that is being looked up: drop the call, or say JUKEBOX; never refuse.
    Pending,
}

/// Whether one pattern is for a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Match {
    Yes,
    No,
    Unknown,
}

impl ExportTable {
    /// Makes a table; `id_of` says which id a path has, and never the same for two.
    ///
    /// # Panics
    /// If it does: then handles of one export would open the other.
    pub fn new(specs: Vec<ExportSpec>, mut id_of: impl FnMut(&Path) -> u32) -> Self {
        let mut table = Self::default();
        for spec in specs {
            let (id, index) = (id_of(&spec.path), table.exports.len());
            let twin = table.by_id.insert(id, index);
            assert!(twin.is_none(), "export id {id} was given to two paths");
            table.by_path.insert(spec.path.clone(), index);
            table.exports.push(Export::new(id, spec));
        }
        table
    }

    /// Returns the exports in the order of the lists.
    pub fn exports(&self) -> &[Export] {
        &self.exports
    }

    /// Returns the export of a file handle.
    pub fn by_id(&self, id: u32) -> Option<&Export> {
        self.exports.get(*self.by_id.get(&id)?)
    }

    /// Returns the export that a path lies in, and the rest of the path below it.
    ///
    /// Of nested exports it is the innermost, whoever may use it, as mountd(8) does. Components
    /// are compared whole; a path that is not absolute or contains `..` lies in none.
    pub fn by_path<'p>(&self, path: &'p Path) -> Option<(&Export, &'p Path)> {
        let plain = path.is_absolute()
            && path
                .components()
                .all(|component| component != Component::ParentDir);
        if !plain {
            return None;
        }
        path.ancestors().find_map(|above| {
            let export = self.exports.get(*self.by_path.get(above)?)?;
            Some((export, path.strip_prefix(above).ok()?))
        })
    }

    /// Returns the export that contains this one, if any.
    pub fn parent_of(&self, export: &Export) -> Option<&Export> {
        let (parent, _) = self.by_path(export.spec.path.parent()?)?;
        Some(parent)
    }

    /// Lists the host names that rules mention.
    pub fn host_names(&self) -> impl Iterator<Item = &str> {
        self.rules().filter_map(|rule| match &rule.client {
            ClientPattern::Name(name) => Some(&**name),
            _ => None,
        })
    }

    /// Says whether some rule is a pattern of names, so that peers' names are needed.
    pub fn has_wildcards(&self) -> bool {
        self.rules()
            .any(|rule| matches!(rule.client, ClientPattern::Wildcard(_)))
    }

    /// Says whether some rule takes groups from this machine's directory.
    pub fn manages_gids(&self) -> bool {
        self.rules().any(|rule| rule.options.manage_gids)
    }

    fn rules(&self) -> impl Iterator<Item = &ClientRule> {
        self.exports.iter().flat_map(|export| &export.rules)
    }
}

impl Export {
    fn new(id: u32, spec: ExportSpec) -> Self {
        let mut rules = spec.rules.clone();
        // Stable: within a kind the order of the list stays.
        rules.sort_by_key(|rule| rule.client.rank());
        Self { id, spec, rules }
    }

    /// Returns the rules in the order in which they are tried.
    pub fn rules(&self) -> &[ClientRule] {
        &self.rules
    }

    /// Says what a peer may do here. Never waits: see [`Verdict::Pending`].
    pub fn policy(&self, peer: IpAddr, names: &Names) -> Verdict<'_> {
        decide(&self.rules, peer.to_canonical(), names)
    }
}

/// Finds the first rule that is for a peer, unless an earlier one may turn out to be.
pub(super) fn decide<'a>(rules: &'a [ClientRule], peer: IpAddr, names: &Names) -> Verdict<'a> {
    let mut open: Option<&ClientRule> = None;
    let mut open_differ = false;
    for rule in rules {
        match matches(&rule.client, peer, names) {
            Match::No => {}
            Match::Unknown => {
                open_differ |= open.is_some_and(|open| open.options != rule.options);
                open = open.or(Some(rule));
            }
            // Which of them it is makes no difference if all say the same.
            Match::Yes if !open_differ && open.is_none_or(|open| open.options == rule.options) => {
                return Verdict::Allowed(rule);
            }
            Match::Yes => return Verdict::Pending,
        }
    }
    if open.is_some() {
        Verdict::Pending
    } else {
        Verdict::Refused
    }
}

fn matches(client: &ClientPattern, peer: IpAddr, names: &Names) -> Match {
    let known = |known: bool| if known { Match::Yes } else { Match::No };
    match client {
        ClientPattern::Any => Match::Yes,
        ClientPattern::Address(address) => known(*address == peer),
        ClientPattern::Network(network) => known(network.contains(peer)),
        ClientPattern::Name(name) => names
            .addresses_of(name)
            .map_or(Match::Unknown, |addresses| known(addresses.contains(&peer))),
        ClientPattern::Wildcard(pattern) => names.names_of(peer).map_or(Match::Unknown, |names| {
            known(names.iter().any(|name| wildcard_matches(pattern, name)))
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::export::{NoAnswer, Resolver, parse_argument};

    fn export(clients: &str) -> Export {
        let argument = format!("/srv/data:{clients}");
        let loaded = parse_argument(1, argument.as_bytes()).expect("a valid argument");
        let mut table = ExportTable::new(loaded.specs, |_| 7);
        table.exports.remove(0)
    }

    /// Answers as a small DNS would; `slow.example` never answers.
    fn resolver() -> Resolver {
        Resolver {
            forward: Box::new(|name| match name {
                "client1" | "client1.example" => Ok(vec![ip("192.0.2.1"), ip("2001:db8::1")]),
                "client10" => Ok(vec![ip("192.0.2.10")]),
                "liar.example" => Ok(vec![ip("198.51.100.1")]),
                "broken.example" => Err(NoAnswer),
                _ => Ok(vec![]),
            }),
            reverse: Box::new(|peer| match peer.to_string().as_str() {
                "192.0.2.1" => Ok(vec!["Client1.example.".into()]),
                "192.0.2.66" => Ok(vec!["liar.example".into()]),
                "192.0.2.99" => Err(NoAnswer),
                _ => Ok(vec![]),
            }),
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    /// Asks until the answer is not `Pending`; one that must stay so is not asked this way.
    fn settled(export: &Export, peer: &str, names: &Names) -> Option<String> {
        let deadline = Instant::now() + Duration::from_mins(1);
        loop {
            match export.policy(ip(peer), names) {
                Verdict::Allowed(rule) => return Some(rule.client.to_string()),
                Verdict::Refused => return None,
                Verdict::Pending => assert!(Instant::now() < deadline, "still pending"),
            }
            std::thread::yield_now();
        }
    }

    fn started(export: &Export) -> Names {
        let names = Names::new(resolver());
        let table = ExportTable::new(vec![export.spec.clone()], |_| 1);
        names.prepare(&table).expect("threads");
        names
    }

    #[test]
    fn hosts_come_before_networks_before_wildcards_before_everybody() {
        let export = export("*(ro) *.example(rw) 192.0.2.0/24(ro) 192.0.2.7(rw) client1(rw)");
        let names = started(&export);
        let rule = |peer: &str| settled(&export, peer, &names).expect("allowed");
        assert_eq!(rule("192.0.2.7"), "192.0.2.7");
        assert_eq!(rule("::ffff:192.0.2.7"), "192.0.2.7");
        assert_eq!(rule("192.0.2.1"), "client1");
        assert_eq!(rule("2001:db8::1"), "client1");
        assert_eq!(rule("192.0.2.8"), "192.0.2.0/24");
        assert_eq!(rule("203.0.113.1"), "*");
    }

    #[test]
    fn names_are_compared_whole() {
        let export = export("client1(rw)");
        let names = started(&export);
        assert_eq!(
            settled(&export, "192.0.2.1", &names).as_deref(),
            Some("client1")
        );
        assert_eq!(settled(&export, "192.0.2.10", &names), None);
    }

    #[test]
    fn a_reverse_name_counts_only_if_it_leads_back() {
        let export = export("*.example(rw)");
        let names = started(&export);
        assert_eq!(
            settled(&export, "192.0.2.1", &names).as_deref(),
            Some("*.example")
        );
        assert_eq!(
            settled(&export, "192.0.2.66", &names),
            None,
            "liar.example is elsewhere"
        );
        assert_eq!(
            settled(&export, "192.0.2.67", &names),
            None,
            "it has no name"
        );
    }

    #[test]
    fn what_is_not_known_yet_is_pending_and_not_refused() {
        // Nothing is started: no question is ever answered.
        let names = Names::new(resolver());
        for clients in ["client1(rw)", "*.example(rw)", "client1(rw) *(ro)"] {
            let export = export(clients);
            assert_eq!(
                export.policy(ip("192.0.2.1"), &names),
                Verdict::Pending,
                "{clients}"
            );
        }
        let export = export("client1(rw) client10(rw) 192.0.2.0/24(rw) *(ro)");
        assert!(matches!(
            export.policy(ip("192.0.2.1"), &names),
            Verdict::Allowed(_)
        ));
        assert_eq!(export.policy(ip("203.0.113.1"), &names), Verdict::Pending);
    }

    #[test]
    fn paths_belong_to_the_innermost_export_by_components() {
        let text = b"/srv *\n/srv/data/inner *\n/srv/data *\n";
        let source = crate::export::Source::file("t");
        let loaded = crate::export::parse_exports(source, text).expect("valid");
        let mut next = 0;
        let table = ExportTable::new(loaded.specs, |_| {
            next += 1;
            next
        });
        for (path, id, rest) in [
            ("/srv", 1, ""),
            ("/srv/", 1, ""),
            ("/srv/database", 1, "database"),
            ("/srv/data", 3, ""),
            ("//srv//data/x/", 3, "x"),
            ("/srv/data/inner/y", 2, "y"),
        ] {
            let (export, below) = table.by_path(Path::new(path)).expect(path);
            assert_eq!((export.id, below), (id, Path::new(rest)), "{path}");
        }
        for path in ["", "/", "srv", "/srvx", "/srv/data/../..", "/srv/../srv"] {
            assert!(table.by_path(Path::new(path)).is_none(), "{path}");
        }
        let inner = table.by_id(2).expect("inner");
        assert_eq!(table.parent_of(inner).map(|parent| parent.id), Some(3));
        assert!(table.by_id(9).is_none());
    }
}
