//! A network for the nodes and the clients: a bridge, a cable to each machine, and the power that a
//! machine may lose.
//!
//! Owns the bridge and the cables, all in the network namespace that the demo itself is in: so the
//! demo's clients are on the bridge, with an address each. A node gets namespaces of its own for
//! network and processes each time it is switched on; it is process 1 there, so its end is the end
//! of all that it has started, as with a machine that loses its power, and its network goes with
//! it: no connection of its last life ever speaks again.
//!
//! Invariant: a cable is named for its node, and is there while the node has power.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::{Child, Command};
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use havenfs::backend::sys;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::sight::Sight;
use super::site::{CLIENTS, NODES, PREFIX_BITS, Site};
use super::stage::ip;

/// The namespace of the thread that opens this.
const OWN_NETWORK: &str = "/proc/thread-self/ns/net";
/// A node's card; a guest's is at the other end of a cable with this name.
pub(super) const CARD: &str = "eth0";
/// The cable of the virtual machine.
pub(super) const GUEST_CABLE: &str = "linux";
/// The first bytes of the nodes' hardware addresses; the last one is the node's number.
pub(super) const MAC: [u8; 5] = [0x02, 0x00, 0xc0, 0x00, 0x02];
/// The number of the bridge itself, where the demo's clients are.
const BRIDGE: u8 = 201;

/// The network.
#[derive(Debug)]
pub(super) struct Bridge {
    sight: Arc<Sight>,
}

impl Bridge {
    /// Makes the bridge, with the addresses of the clients in this process.
    pub(super) fn make(site: &Site) -> Result<Self> {
        // Without an address of its own it has the lowest one of its cables, so another one when a
        // cable is gone, and nobody on the other cables would know.
        let mac = mac(BRIDGE);
        let address = |client| {
            let address = site.client(client);
            format!("address add {address}/{PREFIX_BITS} dev br0\n")
        };
        let addresses = CLIENTS.map(address).concat();
        ip(&format!(
            "link set lo up\n\
             link add br0 address {mac} type bridge forward_delay 0 stp_state 0 mcast_snooping 0\n\
             link set br0 up\n{addresses}"
        ))
        .map_err(|error| {
            anyhow!(
                "cannot make a network: {error}\nhint: this takes the kernel's `bridge` and \
                 `veth`, which `modprobe` loads; `havenfs demo` without --netns needs neither"
            )
        })?;
        let sight = Sight::open(site.service())?;
        Ok(Self { sight })
    }

    /// What is seen of the service's address.
    pub(super) const fn sight(&self) -> &Arc<Sight> {
        &self.sight
    }

    /// Switches a node on: a new machine with a card and an address, and `command` as all it runs.
    pub(super) fn switch_on(
        &self,
        node: &'static str,
        address: IpAddr,
        command: &mut Command,
    ) -> Result<Child> {
        // Namespaces are a thread's, and this one ends: nothing else of the demo is in them.
        let started = thread::scope(|scope| {
            let booting = scope.spawn(|| boot(node, address, command));
            let result = booting.join();
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let child = started.with_context(|| format!("cannot switch {node} on"))?;
        self.sight.on(node, child.id());
        Ok(child)
    }

    /// Cuts a node's cable; whoever calls this then ends the node's process.
    pub(super) fn cut(&self, node: &str) -> Result<()> {
        ip(&format!("link delete {node}\n")).context("cannot cut a cable")?;
        self.sight.off(node);
        Ok(())
    }

    /// Lays a cable for the virtual machine.
    #[expect(clippy::unused_self, reason = "there has to be a bridge")]
    pub(super) fn add_guest(&self) -> Result<()> {
        ip(&format!(
            "tuntap add dev {GUEST_CABLE} mode tap\nlink set {GUEST_CABLE} master br0 up\n"
        ))
        .context("cannot make a cable for a virtual machine")
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.sight.close();
    }
}

/// The hardware address of a card.
pub(super) fn mac(number: u8) -> String {
    let first = MAC.map(|byte| format!("{byte:02x}:")).concat();
    format!("{first}{number:02x}")
}

fn boot(node: &'static str, address: IpAddr, command: &mut Command) -> Result<Child> {
    let number = (1..).zip(NODES).find(|(_, name)| *name == node);
    let (number, _) = number.unwrap_or((0_u8, node));
    let of_the_demo = File::open(OWN_NETWORK)?;
    sys::leave_namespaces(UnshareFlags::NEWNET)?;
    let own = File::open(OWN_NETWORK)?;
    let (process, fd) = (std::process::id(), own.as_raw_fd());
    let mac = mac(number);
    let go = |to: &File| {
        move_into_link_name_space(to.as_fd(), Some(LinkNameSpaceType::Network))
            .context("cannot enter a network namespace")
    };
    go(&of_the_demo)?;
    ip(&format!(
        "link add {node} type veth peer name {CARD} address {mac} netns \
         /proc/{process}/fd/{fd}\n\
         link set {node} master br0 up\n"
    ))?;
    go(&own)?;
    ip(&format!(
        "link set lo up\nlink set {CARD} up\naddress add {address}/{PREFIX_BITS} dev {CARD}\n"
    ))?;
    sys::leave_namespaces(UnshareFlags::NEWPID)?;
    command.spawn().context("cannot start a node")
}
