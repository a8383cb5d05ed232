//! Addresses of a service that move along with it, as the configuration says them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// The addresses of a service, and where they go on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FloatingConfig {
    /// The network interface.
    pub interface: String,
    /// The addresses.
    pub addresses: Vec<FloatingAddress>,
}

impl fmt::Display for FloatingConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses: Vec<String> = self.addresses.iter().map(ToString::to_string).collect();
        write!(f, "{}={}", self.interface, addresses.join(","))
    }
}

impl FromStr for FloatingConfig {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let (interface, addresses) = text.split_once('=').ok_or(NoAddress)?;
        let addresses = addresses.split(',').map(|address| {
            let WrittenAddress { ip, prefix } = address.parse()?;
            let prefix = prefix.ok_or(NoAddress)?;
            Ok(FloatingAddress { ip, prefix })
        });
        Ok(Self {
            interface: interface.to_owned(),
            addresses: addresses.collect::<Result<_, _>>()?,
        })
    }
}

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FloatingAddress {
    /// The address.
    pub ip: IpAddr,
    /// How many bits the network has, as in `192.0.2.100/24`.
    pub prefix: u8,
}

impl fmt::Display for FloatingAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

/// An address as it is written: with a prefix it can be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrittenAddress {
    /// The address.
    pub ip: IpAddr,
    /// The length of the prefix, if there is one.
    pub prefix: Option<u8>,
}

/// Why it is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is no address such as 192.0.2.100, 192.0.2.100/24 or 2001:db8::100/64")]
pub struct NoAddress;

impl FromStr for WrittenAddress {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let (ip, prefix) = match text.split_once('/') {
            Some((ip, prefix)) => (ip, Some(prefix.parse().map_err(|_| NoAddress)?)),
            None => (text, None),
        };
        let ip: IpAddr = ip.parse().map_err(|_| NoAddress)?;
        let prefix_max = if ip.is_ipv4() { 32 } else { 128 };
        if prefix.is_some_and(|prefix: u8| prefix == 0 || prefix > prefix_max)
            || ip.is_unspecified()
            || ip.is_multicast()
        {
            return Err(NoAddress);
        }
        Ok(Self { ip, prefix })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_with_and_without_a_prefix() {
        let read = |text: &str| text.parse::<WrittenAddress>().map(|read| read.prefix);
        assert_eq!(read("192.0.2.100"), Ok(None));
        assert_eq!(read("192.0.2.100/24"), Ok(Some(24)));
        assert_eq!(read("2001:db8::100/64"), Ok(Some(64)));
        for wrong in [
            "",
            "nfs",
            "192.0.2.100/33",
            "192.0.2.100/",
            "192.0.2.100/0",
            "2001:db8::1/129",
            "0.0.0.0",
            "224.0.0.1/8",
            "192.0.2.100/24/24",
        ] {
            assert_eq!(read(wrong), Err(NoAddress), "{wrong}");
        }
    }

    #[test]
    fn what_is_told_to_another_process_is_read_back() {
        let text = "eth0=192.0.2.100/24,2001:db8::100/64";
        let read: FloatingConfig = text.parse().expect("addresses");
        assert_eq!(read.addresses.len(), 2);
        assert_eq!(read.to_string(), text);
        assert_eq!("eth0".parse::<FloatingConfig>(), Err(NoAddress));
    }
}
