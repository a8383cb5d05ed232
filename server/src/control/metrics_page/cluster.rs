//! The part of the page that every member of a cluster shows, whether it serves anything or not:
//! who is heard of, where each service is, how it came here.

use std::fmt::Write as _;
use std::sync::PoisonError;
use std::time::Duration;

use crate::cluster::Wish;
use crate::cluster::service::ServiceState;
use crate::services::{Health, Services, Slot};

/// What is so right now.
pub(super) fn put(text: &mut String, services: &Services) {
    let own = services.cluster.own().node;
    let leads = services.cluster.leader() == Some(own);
    family(text, "leads", "1 if this node leads the log.");
    sample(text, "leads", &[], u64::from(leads));
    let p99 = {
        let times = services.renewal_times.lock();
        times.unwrap_or_else(PoisonError::into_inner).p99()
    };
    if let Some(p99) = p99 {
        let name = "lease_renewal_p99_microseconds";
        family(
            text,
            name,
            "What 99 of the last 100 renewals of the lease took at most.",
        );
        sample(
            text,
            name,
            &[],
            u64::try_from(p99.as_micros()).unwrap_or(u64::MAX),
        );
    }
    family(
        text,
        "member_heard",
        "1 if a member was heard of lately; missing if this node can't know.",
    );
    let state = services.state();
    for member in services.cluster.members() {
        if let Some(heard) = services.cluster.is_heard(&member, &state) {
            let labels = [("member", member.name.as_str())];
            sample(text, "member_heard", &labels, u64::from(heard));
        }
    }
    let named = services.slots.iter().map(|slot| {
        let service = slot.id.get().and_then(|id| state.service(*id));
        (&**slot, slot.config.name.as_str(), service)
    });
    let named: Vec<_> = named.collect();
    family(
        text,
        "service_here",
        "1 if this node answers for a service.",
    );
    for (slot, name, _) in &named {
        let serving = slot.serving().is_some_and(|node| node.gate.is_open());
        sample(
            text,
            "service_here",
            &[("service", name)],
            u64::from(serving),
        );
    }
    family(text, "service_epoch", "How often a service was assigned.");
    for (_, name, service) in &named {
        let epoch = service.map_or(0, ServiceState::epoch);
        sample(
            text,
            "service_epoch",
            &[("service", name)],
            u64::from(epoch),
        );
    }
    family(
        text,
        "service_released",
        "1 if an operator has released a service, so that nobody serves it.",
    );
    for (_, name, service) in &named {
        let released = service.is_some_and(|service| service.wish() == Wish::Nobody);
        sample(
            text,
            "service_released",
            &[("service", name)],
            u64::from(released),
        );
    }
    family(text, "service_unfenced", "Nodes whose fence is waited for.");
    for (slot, name, service) in &named {
        let needs_fence = slot.config.hooks.fence.is_some();
        let unfenced = service.filter(|_| needs_fence);
        let unfenced = unfenced.map_or(0, |service| service.unfenced().count());
        sample(
            text,
            "service_unfenced",
            &[("service", name)],
            unfenced as u64,
        );
    }
    family(
        text,
        "service_storage_works",
        "0 if the storage of a service does not work on this node; missing if it was not tried.",
    );
    for (slot, name, _) in &named {
        let works = match &*slot.health.borrow() {
            Health::Untried => continue,
            health => !health.fails(),
        };
        let labels = [("service", *name)];
        sample(text, "service_storage_works", &labels, u64::from(works));
    }
    family(
        text,
        "service_link",
        "1 if the interface of a service has a link.",
    );
    for (slot, name, _) in &named {
        if let Some(floating) = &slot.floating {
            let interface = floating.config().interface.as_str();
            let labels = [("service", *name), ("interface", interface)];
            let link = *floating.link().borrow();
            sample(text, "service_link", &labels, u64::from(link));
        }
    }
    let slots: Vec<_> = named.iter().map(|(slot, name, _)| (*slot, *name)).collect();
    put_phases(text, &slots);
}

/// What each step took when a service came here and left the last time.
fn put_phases<'a>(text: &mut String, slots: &[(&'a Slot, &'a str)]) {
    let name = "takeover_phase_microseconds";
    let help = "How long each step took when a service came here last.";
    let takeovers = slots.iter().filter_map(|(slot, service)| {
        let takeover = slot.takeover()?;
        Some((*service, takeover.kind, takeover.phases))
    });
    put_family(text, name, help, takeovers);
    let name = "departure_phase_microseconds";
    let help = "How long each step took when a service left this node last.";
    let departures = slots.iter().filter_map(|(slot, service)| {
        let departure = slot.departure()?;
        Some((*service, departure.kind, departure.phases))
    });
    put_family(text, name, help, departures);
}

type Phases<'a> = (&'a str, &'static str, Vec<(&'static str, Duration)>);

fn put_family<'a>(
    text: &mut String,
    name: &str,
    help: &str,
    all: impl Iterator<Item = Phases<'a>>,
) {
    family(text, name, help);
    for (service, kind, phases) in all {
        for (phase, took) in phases {
            let labels = [("service", service), ("kind", kind), ("phase", phase)];
            let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            sample(text, name, &labels, microseconds);
        }
    }
}

fn family(text: &mut String, name: &str, help: &str) {
    // Writing to a string can't fail.
    let _ = write!(
        text,
        "# HELP havenfs_{name} {help}\n# TYPE havenfs_{name} gauge\n"
    );
}

/// Names of services, members and interfaces need no escapes: they have no quotes.
fn sample(text: &mut String, name: &str, labels: &[(&str, &str)], value: u64) {
    let labels: Vec<String> = labels
        .iter()
        .map(|(label, value)| format!("{label}=\"{value}\""))
        .collect();
    let labels = match &labels[..] {
        [] => String::new(),
        labels => format!("{{{}}}", labels.join(",")),
    };
    // Writing to a string can't fail.
    let _ = writeln!(text, "havenfs_{name}{labels} {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_have_the_form_that_prometheus_reads() {
        let mut text = String::new();
        family(&mut text, "leads", "Help.");
        sample(&mut text, "leads", &[], 1);
        sample(&mut text, "here", &[("service", "a"), ("kind", "move")], 0);
        let expected = "# HELP havenfs_leads Help.\n# TYPE havenfs_leads gauge\nhavenfs_leads 1\n\
                        havenfs_here{service=\"a\",kind=\"move\"} 0\n";
        assert_eq!(text, expected);
    }
}
