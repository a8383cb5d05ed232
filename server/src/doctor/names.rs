//! Names of hosts: those in the export lists, those that clients mount from, and our own.
//!
//! The resolver may hang for as long as it likes; each name is asked for on a thread of its own,
//! and what has no answer in time is said to have none.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use super::Report;
use crate::config::service::ServiceConfig;
use crate::export::{ClientPattern, ExportSpec, NoAnswer, Resolver};

/// How long all names together may take.
const TIME_MAX: Duration = Duration::from_secs(5);
/// Names that are tried; a list with more has the same resolver for the rest.
const NAMES_MAX: usize = 64;

type Answer = Result<Vec<IpAddr>, NoAnswer>;

/// Looks the names up.
pub(super) fn look(report: &mut Report, services: &[ServiceConfig], specs: &[ExportSpec]) {
    let nodename = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let rules = specs.iter().flat_map(|spec| &spec.rules);
    let exported: BTreeSet<String> = rules
        .filter_map(|rule| match &rule.client {
            ClientPattern::Name(name) => Some(name.to_string()),
            _ => None,
        })
        .collect();
    let mut names: Vec<String> = exported.into_iter().take(NAMES_MAX).collect();
    let exported = names.len();
    // Without addresses of its own a service has those of this machine.
    let services = services
        .iter()
        .filter(|service| !service.settings.listen.is_empty());
    let mounted: Vec<(&str, &ServiceConfig)> = services
        .flat_map(|service| {
            let names = service.settings.service_names.iter();
            names.map(move |name| (name.as_str(), service))
        })
        .take(NAMES_MAX)
        .collect();
    names.extend(mounted.iter().map(|(name, _)| (*name).to_owned()));
    names.push(nodename);
    // Room for every answer: no thread waits here.
    let (sender, answers) = sync_channel(names.len());
    for (index, name) in names.iter().enumerate() {
        let (sender, name) = (sender.clone(), name.clone());
        let ask = move || {
            // Nobody may be waiting any more.
            let _ = sender.send((index, (Resolver::system().forward)(&name)));
        };
        // Without a thread there is no answer, which is then said.
        let _ = std::thread::Builder::new().name("doctor".into()).spawn(ask);
    }
    drop(sender);
    let mut found: Vec<Option<Answer>> = names.iter().map(|_| None).collect();
    let deadline = Instant::now() + TIME_MAX;
    let left = || deadline.saturating_duration_since(Instant::now());
    // It ends when all have answered, or in time.
    while let Ok((index, answer)) = answers.recv_timeout(left()) {
        if let Some(slot) = found.get_mut(index) {
            *slot = Some(answer);
        }
    }
    let own = names.len() - 1;
    for (index, (name, answer)) in names.iter().zip(&found).enumerate() {
        if index == own {
            tell_own(report, name, answer.as_ref());
        } else if let Some((_, service)) = index
            .checked_sub(exported)
            .and_then(|index| mounted.get(index))
        {
            tell_mounted(report, name, answer.as_ref(), service);
        } else {
            tell_exported(report, name, answer.as_ref());
        }
    }
}

fn list(addresses: &[IpAddr]) -> String {
    let mut addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
    addresses.dedup();
    addresses.join(", ")
}

fn tell_exported(report: &mut Report, name: &str, answer: Option<&Answer>) {
    let topic = "names";
    match answer {
        Some(Ok(addresses)) if !addresses.is_empty() => {
            let addresses = list(addresses);
            report.ok(topic, format!("exported host `{name}` is {addresses}"));
        }
        Some(Ok(_)) => report.warning(
            topic,
            format!("exported host `{name}` has no address: its rule fits nobody"),
            "correct the name, add it to /etc/hosts, or write the address in its place",
        ),
        Some(Err(_)) | None => report.warning(
            topic,
            format!("nobody answers for exported host `{name}`: its calls are delayed until then"),
            "check /etc/resolv.conf, add the name to /etc/hosts, or write the address in its place",
        ),
    }
}

/// A name of a service should be one of its addresses and nothing else.
fn tell_mounted(report: &mut Report, name: &str, answer: Option<&Answer>, service: &ServiceConfig) {
    let (topic, own) = ("names", &service.settings.listen);
    let service = &service.name;
    match answer {
        Some(Ok(found)) if !found.is_empty() => {
            let others: Vec<IpAddr> = found
                .iter()
                .filter(|address| !own.contains(address))
                .copied()
                .collect();
            if others.is_empty() {
                let found = list(found);
                report.ok(
                    topic,
                    format!("name `{name}` of service `{service}` is {found}"),
                );
                return;
            }
            report.warning(
                topic,
                format!(
                    "name `{name}` of service `{service}` is {}, and not only an address of it ({})",
                    list(&others),
                    list(own)
                ),
                "correct DNS or /etc/hosts, or the addresses of the service",
            );
        }
        // A name without a domain may be resolved by clients alone.
        Some(Ok(_) | Err(_)) | None => report.warning(
            topic,
            format!("name `{name}` of service `{service}` does not resolve here"),
            "fine, if clients resolve it; else add it to DNS, or remove it from `names`",
        ),
    }
}

fn tell_own(report: &mut Report, name: &str, answer: Option<&Answer>) {
    let topic = "names";
    match answer {
        Some(Ok(addresses)) if !addresses.is_empty() => {
            let only = if addresses.iter().all(IpAddr::is_loopback) {
                ", for this machine alone; clients need an address or a name of their own for it"
            } else {
                ""
            };
            let addresses = list(addresses);
            report.ok(
                topic,
                format!("own host name `{name}` is {addresses}{only}"),
            );
        }
        _ => report.warning(
            topic,
            format!(
                "own host name `{name}` does not resolve: the mount command that `serve` \
                     prints may not work as it stands"
            ),
            "let clients mount by address, or add the name to DNS",
        ),
    }
}
