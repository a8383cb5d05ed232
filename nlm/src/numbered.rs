//! Keys that are long and used often get a number: files, hosts and lock owners.

use std::sync::Arc;

use imbl::OrdMap;

/// Keys with their numbers, and a value for each.
#[derive(Debug, Clone)]
pub(crate) struct Numbered<K: Ord, V> {
    numbers: OrdMap<Arc<K>, u32>,
    entries: OrdMap<u32, (Arc<K>, V)>,
    /// The number that was given last.
    last: u32,
}

impl<K: Ord, V> Default for Numbered<K, V> {
    fn default() -> Self {
        Self {
            numbers: OrdMap::default(),
            entries: OrdMap::default(),
            last: 0,
        }
    }
}

impl<K: Ord, V: PartialEq> PartialEq for Numbered<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.last == other.last && self.entries == other.entries
    }
}

impl<K: Ord + Clone, V: Clone> Numbered<K, V> {
    /// The number of a key.
    pub(crate) fn number(&self, key: &K) -> Option<u32> {
        self.numbers.get(key).copied()
    }

    /// The key with a number.
    pub(crate) fn key(&self, number: u32) -> Option<&K> {
        self.entries.get(&number).map(|(key, _)| &**key)
    }

    /// The value of a number.
    pub(crate) fn value(&self, number: u32) -> Option<&V> {
        self.entries.get(&number).map(|(_, value)| value)
    }

    /// The value of a number, to be changed.
    pub(crate) fn value_mut(&mut self, number: u32) -> Option<&mut V> {
        self.entries.get_mut(&number).map(|(_, value)| value)
    }

    /// The number of a key, which is given one with the value of `new` if it has none.
    pub(crate) fn enter(&mut self, key: &K, new: impl FnOnce() -> V) -> u32 {
        if let Some(number) = self.number(key) {
            return number;
        }
        loop {
            // After four billion of them they begin again; most are long gone by then.
            self.last = self.last.checked_add(1).unwrap_or(1);
            if !self.entries.contains_key(&self.last) {
                break;
            }
        }
        self.restore(self.last, key.clone(), new());
        self.last
    }

    /// Forgets a number and its key.
    pub(crate) fn remove(&mut self, number: u32) {
        if let Some((key, _)) = self.entries.remove(&number) {
            self.numbers.remove(&key);
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// All numbers with keys and values, by number.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &K, &V)> {
        self.entries
            .iter()
            .map(|(number, (key, value))| (*number, &**key, value))
    }

    /// All numbers whose keys are in a range, by key.
    pub(crate) fn numbers_in(
        &self,
        range: impl std::ops::RangeBounds<K>,
    ) -> impl Iterator<Item = u32> {
        self.numbers.range(range).map(|(_, number)| *number)
    }

    /// The number that was given last, for snapshots.
    pub(crate) const fn last(&self) -> u32 {
        self.last
    }

    /// Sets the number that was given last, from a snapshot.
    pub(crate) const fn set_last(&mut self, last: u32) {
        self.last = last;
    }

    /// Enters a key with its number, from a snapshot.
    pub(crate) fn restore(&mut self, number: u32, key: K, value: V) {
        let key = Arc::new(key);
        self.numbers.insert(Arc::clone(&key), number);
        self.entries.insert(number, (key, value));
    }
}
