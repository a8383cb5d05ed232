//! Hosts whose writes are refused, since a lock of theirs was broken and they may not know it.
//!
//! A broken lock goes to whoever waits for it, while programs of the host that had it may go on
//! writing as if nothing had happened. So an operator may have the host's writes refused, to one
//! file or to all, until it is known to be harmless.

use std::net::IpAddr;

use crate::keys::FileKey;
use crate::table::LockTable;

impl LockTable {
    /// Refuses the writes of a host to a file, or to all if none is named. Returns false if there
    /// are [`REFUSED_MAX`] such refusals already.
    pub fn refuse_writes(&mut self, address: IpAddr, file: Option<FileKey>) -> bool {
        let entry = (address, file);
        if self.refused.len() >= REFUSED_MAX && !self.refused.contains(&entry) {
            return false;
        }
        self.refused.insert(entry);
        true
    }

    /// Takes a refusal back; if no file is named, all of the host's. Returns how many there were.
    pub fn allow_writes(&mut self, address: IpAddr, file: Option<&FileKey>) -> usize {
        let before = self.refused.len();
        self.refused = std::mem::take(&mut self.refused)
            .into_iter()
            .filter(|(of, which)| *of != address || (file.is_some() && which.as_ref() != file))
            .collect();
        before - self.refused.len()
    }

    /// Whether a host may not write to a file now; if none is named, to no file.
    pub fn refuses_writes(&self, address: IpAddr, file: Option<&FileKey>) -> bool {
        !self.refused.is_empty()
            && (self.refused.contains(&(address, None))
                || file.is_some_and(|file| self.refused.contains(&(address, Some(file.clone())))))
    }

    /// All refusals: the host's address, and the file if it is for one.
    pub fn refused_writers(&self) -> impl Iterator<Item = &(IpAddr, Option<FileKey>)> {
        self.refused.iter()
    }
}

/// How many refusals there may be; an operator makes each by hand.
pub const REFUSED_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_refused_until_they_are_allowed() {
        let mut table = LockTable::default();
        let file = |number: u8| FileKey(Box::new([number]));
        let host = |number: u8| IpAddr::from([10, 0, 0, number]);
        assert!(table.refuse_writes(host(1), Some(file(1))));
        assert!(table.refuse_writes(host(2), None));
        for (number, name, refused) in [(1, 1, true), (1, 2, false), (2, 2, true), (3, 1, false)] {
            assert_eq!(
                table.refuses_writes(host(number), Some(&file(name))),
                refused
            );
        }
        assert_eq!(table.allow_writes(host(1), Some(&file(2))), 0);
        assert_eq!(table.allow_writes(host(1), Some(&file(1))), 1);
        assert!(!table.refuses_writes(host(1), Some(&file(1))));
        assert!(table.refuse_writes(host(2), Some(file(3))));
        assert!(table.refuses_writes(host(2), None) && !table.refuses_writes(host(1), None));
        assert_eq!(table.allow_writes(host(2), None), 2);
        assert_eq!(table.refused_writers().count(), 0);
    }

    #[test]
    fn there_are_only_so_many() {
        let mut table = LockTable::default();
        for number in 0..REFUSED_MAX as u128 {
            assert!(table.refuse_writes(IpAddr::from(number.to_be_bytes()), None));
        }
        assert!(!table.refuse_writes(IpAddr::from([10, 0, 0, 1]), None));
        assert!(table.refuse_writes(IpAddr::from([0; 16]), None));
    }
}
