//! A node that has lost the service says nothing more by its address: nothing that ends a
//! connection, answers, or sends clients to where the service is no longer.
//!
//! Judged by the capture of the data segment, where the card that sent a frame tells the node.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use havenfs_tests::cluster::LEASE_TIME;
use havenfs_tests::lab::capture::{Frame, mac_of};
use havenfs_tests::lab::clock::Micros;
use havenfs_tests::lab::cluster::{Serving, host_of};

use crate::scene::{ALPHA, Expected, Scene};

/// Who must say nothing since when, as long as this epoch lasts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Silence {
    node: &'static str,
    since: Micros,
    epoch: u64,
}

impl Scene<'_> {
    /// Judges what was sent since a case began, in which the service went to another node. Whatever
    /// happened had happened at the second of the two times.
    pub(crate) fn old_node_is_silent(
        &mut self,
        expected: Expected,
        before: Serving,
        after: Serving,
        [began, happened]: [Micros; 2],
    ) -> Result<()> {
        let address = self.address()?;
        let frames = self.capture.frames()?;
        let of = |node, frame: &&Frame| frame.mac == mac_of(host_of(node)) && frame.speaks();
        let by_address = |frame: &&Frame| frame.from == address;
        let old: Vec<&Frame> = frames.iter().filter(|it| of(before.node, it)).collect();
        let is_seen = old.iter().any(|it| it.at < began && by_address(it));
        ensure!(is_seen, "the capture does not show the old node at all");
        let mut new = frames.iter().filter(|it| of(after.node, it));
        let first = new
            .find(|it| it.at >= began && by_address(it))
            .context("the new node said nothing by the service's address")?;
        let since = match expected {
            // The old node could not renew its lease any more: it ended before others took over.
            Expected::Takeover => {
                let lease_us = Micros::try_from(LEASE_TIME.as_micros())?;
                let margin_us = Micros::try_from(MARGIN.as_micros())?;
                (first.at - margin_us).min(happened + lease_us)
            }
            _ => first.at,
        };
        let ms = |frame: &Frame| (frame.at - began) / 1000;
        for frame in old.iter().filter(|it| it.at >= began && it.at < since) {
            let is_end = by_address(frame) && frame.ends() && !answers_an_end(frame, &frames);
            if is_end || frame.is_unreachable() {
                eprintln!("  the old node after {} ms: {frame}", ms(frame));
                // A process that is killed can't help it.
                ensure!(expected != Expected::Move, "a client was turned away");
            }
        }
        eprintln!("  the new node first after {} ms: {first}", ms(first));
        let epoch = after.epoch;
        let node = before.node;
        self.silence = Some(Silence { node, since, epoch });
        self.silence_goes_on()
    }

    /// Judges what was sent since by the node that lost the service last, if it has not got it
    /// back.
    pub(crate) fn silence_goes_on(&self) -> Result<()> {
        let Some(Silence { node, since, epoch }) = self.silence else {
            return Ok(());
        };
        let serving = self.cluster.serving(ALPHA.name)?;
        if serving.is_none_or(|serving| serving.epoch != epoch) {
            return Ok(());
        }
        let address = self.address()?;
        let mac = mac_of(host_of(node));
        let frames = self.capture.frames()?;
        let late: Vec<&Frame> = frames
            .iter()
            .filter(|it| it.mac == mac && it.at >= since && it.speaks())
            // An error by the node's own address is heard by a client as well.
            .filter(|it| it.from == address || it.is_unreachable() && it.to != address)
            .collect();
        if let Some(frame) = late.first() {
            bail!(
                "the old node spoke {} times after it had lost the service, first after {} ms: \
                 {frame}",
                late.len(),
                (frame.at - since) / 1000
            );
        }
        Ok(())
    }

    /// Judges that a node said nothing by the service's address for some time. Whatever was to
    /// silence it had happened at the first of the two times.
    pub(crate) fn was_silent(&self, node: &str, [from, to]: [Micros; 2]) -> Result<()> {
        let since = from + Micros::try_from(LEASE_TIME.as_micros())?;
        ensure!(since < to, "too short for the end of a lease");
        let address = self.address()?;
        let mac = mac_of(host_of(node));
        let frames = self.capture.frames()?;
        let own = |frame: &&Frame| frame.mac == mac && frame.from == address && frame.speaks();
        let is_seen = frames.iter().any(|it| own(&it) && it.at < from);
        ensure!(is_seen, "the capture does not show {node} at all");
        let late = frames
            .iter()
            .find(|it| own(it) && (since..to).contains(&it.at));
        if let Some(frame) = late {
            let ms = (frame.at - from) / 1000;
            bail!("{node} spoke without a majority, after {ms} ms: {frame}");
        }
        Ok(())
    }

    /// The address that clients use.
    pub(crate) fn address(&self) -> Result<IpAddr> {
        let is_v6 = self.setting.options.contains("tcp6");
        let mut addresses = self.addresses()?.into_iter();
        let address = addresses.find(|address| address.is_ipv6() == is_v6);
        address.context("an address that clients use")
    }

    /// The addresses of the service.
    pub(crate) fn addresses(&self) -> Result<Vec<IpAddr>> {
        let service = self.setting.plan.services.first().context("a service")?;
        let addresses = service.addresses.iter().map(|address| {
            let (address, _) = address.split_once('/').context("a prefix")?;
            Ok(address.parse()?)
        });
        addresses.collect()
    }
}

/// Whether the other side had ended the connection itself before this frame: what says so as well
/// then turns nobody away. That may be a reset: an end that crosses an acknowledgement is answered
/// once more, to a socket that is closed by then.
fn answers_an_end(frame: &Frame, frames: &[Frame]) -> bool {
    let before = frames.iter().filter(|it| it.at <= frame.at);
    let mut turns = before.filter(|it| it.answers(frame) && (it.begins() || it.ends()));
    turns.next_back().is_some_and(Frame::ends)
}

/// How much earlier than the new node's first word the lease of the old one is over: half of the
/// margin that others wait. The rest is for what was answered in time, but sent a little later.
const MARGIN: Duration = Duration::from_millis(25);
