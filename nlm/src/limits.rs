//! What a lock table may hold: each bound has a name, a default and a largest value.
//!
//! The bounds are part of the replicated state, so that every node comes to the same outcome at
//! the same entry of the log whatever its own configuration says.

use serde::{Deserialize, Serialize};

/// A bound of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Limit {
    /// Hosts that are known at a time; one that has nothing gives way to a new one.
    Hosts,
    /// Hosts behind one address: several behind address translation, or names that somebody makes
    /// up.
    HostsPerAddress,
    /// Ranges and shares held in all.
    Locks,
    /// Ranges and shares held by one host.
    LocksPerHost,
    /// Ranges held on one file.
    LocksPerFile,
    /// Shares of one file: each new one is compared with all of them.
    SharesPerFile,
    /// Requests that wait in all.
    Waiting,
    /// Requests of one host that wait.
    WaitingPerHost,
    /// Requests that wait for one file.
    WaitingPerFile,
    /// Bytes of the names of hosts and lock owners in all. They are as long as hosts like, up to
    /// 1,024 bytes each.
    NameBytes,
    /// Bytes of the name of one host and of its lock owners.
    NameBytesPerHost,
}

impl Limit {
    /// All of them, each at the place of its number.
    pub const ALL: [Self; 11] = [
        Self::Hosts,
        Self::HostsPerAddress,
        Self::Locks,
        Self::LocksPerHost,
        Self::LocksPerFile,
        Self::SharesPerFile,
        Self::Waiting,
        Self::WaitingPerHost,
        Self::WaitingPerFile,
        Self::NameBytes,
        Self::NameBytesPerHost,
    ];

    /// What it is called in configuration, metrics and messages.
    pub const fn name(self) -> &'static str {
        self.row().0
    }

    /// Its value if nothing is configured.
    pub const fn default_value(self) -> u32 {
        self.row().1
    }

    /// The largest value that the table is made for.
    pub const fn value_max(self) -> u32 {
        self.row().2
    }

    const fn row(self) -> (&'static str, u32, u32) {
        match self {
            Self::Hosts => ("hosts", 20_000, 1_000_000),
            Self::HostsPerAddress => ("hosts_per_address", 256, 10_000),
            Self::Locks => ("locks", 2_000_000, 5_000_000),
            Self::LocksPerHost => ("locks_per_host", 250_000, 5_000_000),
            Self::LocksPerFile => ("locks_per_file", 1_000_000, 5_000_000),
            Self::SharesPerFile => ("shares_per_file", 1000, 10_000),
            Self::Waiting => ("waiting", 200_000, 1_000_000),
            Self::WaitingPerHost => ("waiting_per_host", 10_000, 1_000_000),
            Self::WaitingPerFile => ("waiting_per_file", 10_000, 100_000),
            Self::NameBytes => ("name_bytes", 256 << 20, 2 << 30),
            Self::NameBytesPerHost => ("name_bytes_per_host", 32 << 20, 2 << 30),
        }
    }
}

/// The bounds in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<u32>", into = "Vec<u32>")]
pub struct Limits([u32; Limit::ALL.len()]);

impl Default for Limits {
    fn default() -> Self {
        Self(Limit::ALL.map(Limit::default_value))
    }
}

impl Limits {
    /// The value of a bound.
    pub const fn get(&self, limit: Limit) -> u32 {
        self.0[limit as usize]
    }

    /// Sets a bound, to its largest value if that is less.
    pub fn set(&mut self, limit: Limit, value: u32) {
        self.0[limit as usize] = value.min(limit.value_max());
    }

    /// The bound, if `count` has reached it: one more would be too many.
    pub(crate) const fn reached(&self, limit: Limit, count: usize) -> Option<Limit> {
        if count >= self.get(limit) as usize {
            Some(limit)
        } else {
            None
        }
    }
}

impl From<Vec<u32>> for Limits {
    /// What a program that knew fewer bounds wrote has the defaults for the others.
    fn from(values: Vec<u32>) -> Self {
        let mut limits = Self::default();
        for (limit, value) in Limit::ALL.into_iter().zip(values) {
            limits.set(limit, value);
        }
        limits
    }
}

impl From<Limits> for Vec<u32> {
    fn from(limits: Limits) -> Self {
        limits.0.to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_is_at_its_place_and_fits() {
        for (place, limit) in Limit::ALL.into_iter().enumerate() {
            assert_eq!(limit as usize, place);
            assert!(limit.default_value() <= limit.value_max(), "{limit:?}");
        }
    }

    #[test]
    fn fewer_values_leave_the_rest_as_it_is_by_default() {
        let mut limits = Limits::default();
        limits.set(Limit::Hosts, 7);
        limits.set(Limit::SharesPerFile, u32::MAX);
        assert_eq!(limits.get(Limit::SharesPerFile), 10_000);
        let values = Vec::from(limits);
        assert_eq!(Limits::from(values.clone()), limits);
        let fewer = Limits::from(values[..1].to_vec());
        assert_eq!(fewer.get(Limit::Hosts), 7);
        assert_eq!(fewer.get(Limit::SharesPerFile), 1000);
    }
}
